//! Flags of `service update` that change how tasks find names.

use std::net::IpAddr;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::update::{list, object};

#[derive(Debug, Args)]
pub(super) struct NameArgs {
    /// Add a server for names outside the cluster (may be repeated)
    #[arg(long, value_name = "IP")]
    dns_add: Vec<IpAddr>,
    /// Remove a server for names outside the cluster (may be repeated)
    #[arg(long, value_name = "IP")]
    dns_rm: Vec<IpAddr>,
    /// Add a domain in which names are looked for (may be repeated)
    #[arg(long, value_name = "DOMAIN")]
    dns_search_add: Vec<String>,
    /// Remove a domain in which names are looked for (may be repeated)
    #[arg(long, value_name = "DOMAIN")]
    dns_search_rm: Vec<String>,
    /// Add an option of resolv.conf, like ndots:2 (may be repeated)
    #[arg(long, value_name = "OPTION")]
    dns_option_add: Vec<String>,
    /// Remove an option of resolv.conf (may be repeated)
    #[arg(long, value_name = "OPTION")]
    dns_option_rm: Vec<String>,
}

impl NameArgs {
    pub(super) fn apply(&self, spec: &mut Value) -> Result<()> {
        let texts = |servers: &[IpAddr]| servers.iter().map(ToString::to_string).collect();
        let (dns_add, dns_rm): (Vec<_>, Vec<_>) = (texts(&self.dns_add), texts(&self.dns_rm));
        for (key, add, remove) in [
            ("Nameservers", &dns_add, &dns_rm),
            ("Search", &self.dns_search_add, &self.dns_search_rm),
            ("Options", &self.dns_option_add, &self.dns_option_rm),
        ] {
            if add.is_empty() && remove.is_empty() {
                continue;
            }
            let config = object(spec, &["TaskTemplate", "ContainerSpec", "DNSConfig"])?;
            let list = list(config, key)?;
            let is = |have: &Value, texts: &[String]| texts.iter().any(|text| have == text);
            list.retain(|have| !is(have, remove));
            for text in add {
                if !list.iter().any(|have| have == text) {
                    list.push(json!(text));
                }
            }
        }
        Ok(())
    }
}
