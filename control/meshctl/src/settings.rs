//! `meshctl swarm update` and `swarm ca`.

use anyhow::{Result, bail};
use clap::Args;
use mesh_api::Swarm;
use serde_json::{Value, json};

use crate::{client::Client, output::say, service::duration};

#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Ended tasks kept per slot
    #[arg(long, value_name = "N")]
    task_history_limit: Option<i64>,
    /// How long a node must be silent, its data path too, before its tasks are replaced
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    reschedule_after: Option<u64>,
    /// Life of node certificates, from their next renewal on
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    cert_expiry: Option<u64>,
}

pub(crate) async fn update(client: &Client, args: UpdateArgs) -> Result<()> {
    let mut swarm: Value = client.get("/swarm").await?;
    let mut spec = swarm["Spec"].take();
    if !edit(&mut spec, &args) {
        bail!(crate::Usage(
            "nothing to change: give --task-history-limit, --reschedule-after or --cert-expiry"
                .into()
        ));
    }
    let version = &swarm["Version"]["Index"];
    client.tell(&format!("/swarm/update?version={version}"), Some(&spec)).await?;
    say("Swarm updated.")
}

/// Makes of a spec what the flags say; whether they say anything.
fn edit(spec: &mut Value, args: &UpdateArgs) -> bool {
    let changes = [
        ("Orchestration", "TaskHistoryRetentionLimit", args.task_history_limit.map(|n| json!(n))),
        ("Orchestration", "RescheduleAfter", args.reschedule_after.map(|n| json!(n))),
        ("CAConfig", "NodeCertExpiry", args.cert_expiry.map(|n| json!(n))),
    ];
    let mut changed = false;
    for (part, key, value) in changes {
        if let Some(value) = value {
            spec[part][key] = value;
            changed = true;
        }
    }
    changed
}

pub(crate) async fn root(client: &Client) -> Result<()> {
    let swarm: Swarm = client.get("/swarm").await?;
    say(swarm.tls_info.trust_root.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_what_it_names_alone() {
        let none =
            UpdateArgs { task_history_limit: None, reschedule_after: None, cert_expiry: None };
        let mut spec =
            json!({"Name": "default", "Orchestration": {"TaskHistoryRetentionLimit": 5}});
        assert!(!edit(&mut spec, &none));
        assert!(edit(&mut spec, &UpdateArgs { cert_expiry: Some(7), ..none }));
        assert_eq!(spec["CAConfig"]["NodeCertExpiry"], 7);
        assert_eq!(spec["Orchestration"]["TaskHistoryRetentionLimit"], 5);
    }
}
