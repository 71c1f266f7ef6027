//! `meshctl swarm update`, `swarm ca` and `swarm rotate-gossip-key`.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use mesh_api::{Node, Status, Swarm, TlsInfo};
use serde_json::{Value, json};

use crate::{
    client::{Client, NOTHING},
    output::say,
    service::duration,
};

/// Between looks.
const POLL: Duration = Duration::from_millis(200);

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

#[derive(Debug, Args)]
pub(crate) struct CaArgs {
    /// Replace it: every node gets a certificate of the new root, then the old root is dropped and
    /// the join tokens are other ones. A node that is down has an hour to come back and take part;
    /// later it has to join again (`node rm` it to wait no longer)
    #[arg(long)]
    rotate: bool,
    /// With --rotate: do not wait until it is done
    #[arg(short, long, requires = "rotate")]
    detach: bool,
    /// With --rotate: print nothing
    #[arg(short, long, requires = "rotate")]
    quiet: bool,
}

pub(crate) async fn root(client: &Client, args: &CaArgs) -> Result<()> {
    if args.rotate {
        rotate(client, args).await?;
    }
    if args.detach || args.quiet {
        return Ok(());
    }
    let swarm: Swarm = client.get("/swarm").await?;
    say(swarm.tls_info.trust_root.trim_end())
}

async fn rotate(client: &Client, args: &CaArgs) -> Result<()> {
    let mut swarm: Value = client.get("/swarm").await?;
    let mut spec = swarm["Spec"].take();
    let asked = spec["CAConfig"]["ForceRotate"].as_u64().unwrap_or_default();
    spec["CAConfig"]["ForceRotate"] = json!(asked + 1);
    let version = &swarm["Version"]["Index"];
    client.tell(&format!("/swarm/update?version={version}"), Some(&spec)).await?;
    if args.detach {
        return Ok(());
    }
    let mut told = String::new();
    loop {
        let swarm: Swarm = client.get("/swarm").await?;
        let nodes: Vec<Node> = client.get("/nodes").await?;
        let progress = progress(&swarm, &nodes);
        let line = progress.to_string();
        if line != told && !args.quiet {
            say(&line)?;
            told = line;
        }
        if progress.done {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// How far the nodes are with another root.
#[derive(Debug, PartialEq, Eq)]
struct Progress {
    renewed: usize,
    nodes: usize,
    away: usize,
    done: bool,
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { renewed, nodes, away, done } = self;
        write!(f, "{renewed} of {nodes} nodes have certificates of the new root")?;
        if *away > 0 {
            write!(f, ", {away} without are down")?;
        }
        if *done { f.write_str("; the old one is dropped") } else { Ok(()) }
    }
}

fn progress(swarm: &Swarm, nodes: &[Node]) -> Progress {
    let wanted = &swarm.tls_info;
    let issuer =
        |info: &TlsInfo| (info.cert_issuer_subject.clone(), info.cert_issuer_public_key.clone());
    let has = |node: &&Node| issuer(&node.description.tls_info) == issuer(wanted);
    let away = |node: &&Node| !has(node) && node.status.state == "down";
    let trusts = |node: &Node| away(&node) || node.description.tls_info == *wanted;
    Progress {
        renewed: nodes.iter().filter(has).count(),
        nodes: nodes.len(),
        away: nodes.iter().filter(away).count(),
        done: !swarm.root_rotation_in_progress && nodes.iter().all(trusts),
    }
}

pub(crate) async fn rotate_gossip_key(client: &Client, detach: bool) -> Result<()> {
    let before: Status = client.get("/mesh/status").await?;
    client.tell("/mesh/gossip-key/rotate", NOTHING).await?;
    if detach {
        return Ok(());
    }
    loop {
        let now: Status = client.get("/mesh/status").await?;
        if now.gossip_key.epoch > before.gossip_key.epoch && !now.gossip_key.rotating {
            let epoch = now.gossip_key.epoch;
            return say(format!("Gossip key {epoch} is in use; the one before is dropped."));
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_is_done_when_nobody_trusts_the_old_root() {
        let info = |root: &str, issuer: &str| TlsInfo {
            trust_root: root.into(),
            cert_issuer_subject: String::new(),
            cert_issuer_public_key: issuer.into(),
        };
        let node = |state: &str, info: TlsInfo| {
            let mut node = Node::default();
            node.status.state = state.into();
            node.description.tls_info = info;
            node
        };
        let mut swarm = Swarm { tls_info: info("old", "new"), ..Swarm::default() };
        swarm.root_rotation_in_progress = true;
        let mut nodes = [
            node("ready", info("old new", "new")),
            node("ready", info("old", "old")),
            node("down", info("old", "old")),
        ];
        let seen = progress(&swarm, &nodes);
        assert_eq!(seen, Progress { renewed: 1, nodes: 3, away: 1, done: false });
        swarm.tls_info = info("new", "new");
        swarm.root_rotation_in_progress = false;
        assert!(!progress(&swarm, &nodes).done);
        for node in &mut nodes[..2] {
            node.description.tls_info = info("new", "new");
        }
        let seen = progress(&swarm, &nodes);
        assert!(seen.done);
        assert_eq!(
            seen.to_string(),
            "2 of 3 nodes have certificates of the new root, 1 without are down; the old one is \
             dropped"
        );
    }

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
