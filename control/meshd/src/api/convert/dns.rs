//! What a service says about names: its tasks' servers, search list and options, and its aliases.

use std::net::IpAddr;

use mesh_api as api;
use mesh_types::spec::DnsSpec;

use crate::api::ApiError;

/// More servers than this are never asked (resolv.conf(5)).
const SERVERS_MAX: usize = 3;
/// Each of them is tried for each name that is not found otherwise: more would multiply questions.
const SEARCH_MAX: usize = 6;
const OPTIONS_MAX: usize = 16;
/// What resolvers take (resolv.conf(5)).
const NDOTS_MAX: u32 = 15;

/// `--dns`, `--dns-search` and `--dns-option`.
pub(super) fn config(sent: Option<api::DnsConfig>) -> Result<DnsSpec, ApiError> {
    let Some(api::DnsConfig { nameservers, search, options }) = sent else {
        return Ok(DnsSpec::default());
    };
    bounded("--dns (DNSConfig.Nameservers)", nameservers.len(), SERVERS_MAX)?;
    bounded("--dns-search (DNSConfig.Search)", search.len(), SEARCH_MAX)?;
    bounded("--dns-option (DNSConfig.Options)", options.len(), OPTIONS_MAX)?;
    let server = |text: &String| {
        let bad = |why: &str| ApiError::bad_request(format!("DNSConfig: server `{text}` {why}"));
        let ip: IpAddr = text.parse().map_err(|_| bad("is no IP address"))?;
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(bad("is no address of a server"));
        }
        // The task's own loopback is where its resolver is.
        if ip.is_loopback() {
            return Err(bad("is a loopback address: tasks have their own, with nothing on it"));
        }
        Ok(ip)
    };
    let servers = nameservers.iter().map(server).collect::<Result<_, _>>()?;
    let is_none = |domain: &String| domain == ".";
    if let Some(bad) = search.iter().find(|domain| !is_none(domain) && !is_domain(domain)) {
        return Err(ApiError::bad_request(format!(
            "DNSConfig: search domain `{bad}` is no domain name: expected one like corp.example, \
             or `.` for none"
        )));
    }
    for option in &options {
        check_option(option)?;
    }
    let search = search.into_iter().filter(|domain| !is_none(domain)).collect();
    Ok(DnsSpec { servers, search, options })
}

fn bounded(what: &str, count: usize, most: usize) -> Result<(), ApiError> {
    if count <= most {
        return Ok(());
    }
    Err(ApiError::bad_request(format!("{what}: {count} are given, at most {most} are used")))
}

fn check_option(option: &str) -> Result<(), ApiError> {
    let is_word = !option.is_empty()
        && option.len() <= 64
        && option.bytes().all(|byte| byte.is_ascii_graphic() && !b"#;".contains(&byte));
    if !is_word {
        return Err(ApiError::bad_request(format!(
            "DNSConfig: option `{}` is no option of resolv.conf(5): expected one like ndots:2",
            option.escape_debug()
        )));
    }
    let ndots = option.strip_prefix("ndots:");
    if ndots.is_some_and(|number| !number.parse().is_ok_and(|n: u32| n <= NDOTS_MAX)) {
        return Err(ApiError::bad_request(format!(
            "DNSConfig: option `{option}`: ndots is a number from 0 to {NDOTS_MAX}"
        )));
    }
    Ok(())
}

/// An alias is a name as services have them, may have several labels, and may begin with `*.`.
pub(super) fn check_alias(alias: &str) -> Result<(), ApiError> {
    let below = alias.strip_prefix("*.").unwrap_or(alias);
    if is_domain(below) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "Networks: alias `{}` is no name: expected labels of letters, digits, `-` and `_`, with dots \
         between them, or such a name behind `*.`",
        alias.escape_debug()
    )))
}

fn is_domain(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // RFC 1035 section 2.3.4, and room for a network's name behind it.
    name.len() <= 189 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(servers: &[&str], search: &[&str], options: &[&str]) -> Option<api::DnsConfig> {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Some(api::DnsConfig {
            nameservers: owned(servers),
            search: owned(search),
            options: owned(options),
        })
    }

    #[test]
    fn what_is_meant_is_kept() {
        assert_eq!(config(None).unwrap(), DnsSpec::default());
        let given =
            sent(&["10.0.0.9", "2001:db8::9"], &[".", "corp.example"], &["ndots:2", "rotate"]);
        let spec = config(given).unwrap();
        assert_eq!(spec.servers.len(), 2);
        assert_eq!(spec.search, ["corp.example"]);
        assert_eq!(spec.options, ["ndots:2", "rotate"]);
    }

    #[test]
    fn what_is_not_is_refused_by_name() {
        let check = |given, part: &str| {
            let error = config(given).unwrap_err();
            assert!(error.message.contains(part), "{}", error.message);
        };
        check(sent(&["dns.example"], &[], &[]), "`dns.example`");
        check(sent(&["127.0.0.53"], &[], &[]), "loopback");
        check(sent(&["0.0.0.0"], &[], &[]), "no address of a server");
        check(sent(&["1.1.1.1"; 4], &[], &[]), "--dns");
        check(sent(&[], &["a b"], &[]), "`a b`");
        check(sent(&[], &["x"; 7], &[]), "--dns-search");
        check(sent(&[], &[], &["ndots:2\nnameserver 192.0.2.1"]), "\\n");
        check(sent(&[], &[], &["ndots:16"]), "0 to 15");
        check(sent(&[], &[], &["ndots:x"]), "0 to 15");
    }

    #[test]
    fn aliases_are_names() {
        let long = "a".repeat(190);
        for good in ["db", "db.main", "*.web", "a_b", "DB"] {
            check_alias(good).unwrap();
        }
        for bad in ["", "*", "*.", "a..b", "a.*.b", "-a", "a b", "a/b", &long] {
            assert!(check_alias(bad).is_err(), "{bad}");
        }
    }
}
