//! Membership that does not hang on a datagram, and findings of data-path probes that reach nodes
//! which do not probe. In a lab where only two nodes watch each data path, as in a large cluster.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_lab::{Lab, Role};
use serde_json::Value;

use super::group;
use crate::cluster::{Cluster, SOON, eventually, list};

group!("gossip": a_joiner_knows_all_at_once, membership_is_whole_after_gossip_was_blocked);

/// Two rounds of anti-entropy.
const TWO_ROUNDS: Duration = Duration::from_secs(60);

/// A counter of a node of a lab.
fn counter(lab: &Lab, node: &str, name: &str) -> Result<u64> {
    let stats = lab.call(node, "GET", "/mesh/node/stats", None)?;
    let of = |counter: &&Value| counter["Name"] == name;
    let counter = list(&stats["Counters"]).iter().find(of);
    counter.and_then(|c| c["Value"].as_u64()).with_context(|| format!("{node} has no {name}"))
}

/// Waits until each of the nodes has so many others for members. How long it took.
fn members(lab: &Lab, within: Duration, nodes: &[String], count: u64) -> Result<Duration> {
    let begin = Instant::now();
    eventually(&format!("{count} members seen by each of {nodes:?}"), within, || {
        for node in nodes {
            let seen = counter(lab, node, "gossip_members")?;
            ensure!(seen == count, "{node} sees {seen}");
        }
        Ok(())
    })?;
    Ok(begin.elapsed())
}

/// Notes compared by a node, whoever called.
fn compared(lab: &Lab, node: &str) -> Result<u64> {
    Ok(counter(lab, node, "anti_entropy_calls")? + counter(lab, node, "anti_entropy_answers")?)
}

fn names(lab: &Lab) -> Vec<String> {
    lab.nodes().into_iter().map(|node| node.name).collect()
}

fn a_joiner_knows_all_at_once(c: &Cluster) -> Result<()> {
    members(&c.lab, SOON, &names(&c.lab), 4)?;
    // What the command line does too, which opens the lab anew for each command.
    let lab = Lab::open(c.lab.name())?;
    let joined = lab.add_node(Role::Worker)?.name;
    let result = (|| {
        let lab = Lab::open(c.lab.name())?;
        let took = members(&lab, Duration::from_secs(3), &names(&lab), 5)?;
        println!("    all know {joined}, and it all, {took:?} after it had joined");
        eventually("notes to be compared with it", Duration::from_secs(3), || {
            ensure!(compared(&lab, &joined)? > 0, "none were");
            Ok(())
        })
    })();
    Lab::open(c.lab.name())?.remove_node(&joined)?;
    result?;
    members(&c.lab, SOON, &names(&c.lab), 4).map(drop)
}

/// Gossip's datagrams are dropped in one node for longer than a suspicion lasts; all else passes.
fn membership_is_whole_after_gossip_was_blocked(c: &Cluster) -> Result<()> {
    const BLOCK: &str = "nft 'add table inet blocked; \
        add chain inet blocked in { type filter hook input priority 0; }; \
        add chain inet blocked out { type filter hook output priority 0; }; \
        add rule inet blocked in udp dport 7946 drop; \
        add rule inet blocked out udp dport 7946 drop'";
    let lab = &c.lab;
    let all = names(lab);
    members(lab, SOON, &all, 4)?;
    let before = compared(lab, "w1")?;
    c.on("w1", &["sh", "-c", BLOCK])?.ok()?;
    let apart = (|| {
        let (alone, others): (Vec<_>, Vec<_>) = all.iter().cloned().partition(|node| node == "w1");
        members(lab, SOON, &others, 3)?;
        members(lab, SOON, &alone, 0)
    })();
    c.on("w1", &["nft", "delete", "table", "inet", "blocked"])?.ok()?;
    apart?;
    let took = members(lab, TWO_ROUNDS, &all, 4)?;
    eventually("notes to be compared with w1", TWO_ROUNDS, || {
        let now = compared(lab, "w1")?;
        ensure!(now > before, "{now} times, {before} before");
        Ok(())
    })?;
    let failed = counter(lab, "w1", "anti_entropy_failures")?;
    println!("    whole {took:?} after the block, {failed} comparisons failed");
    Ok(())
}
