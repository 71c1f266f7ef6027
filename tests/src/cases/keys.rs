//! The cluster's keys are replaced while everything runs on.

use anyhow::{Context, Result, ensure};
use mesh_lab::DaemonSignal;

use super::group;
use crate::cluster::{Cluster, SOON, WHOAMI, eventually, list};

group!("keys": another_root_takes_its_place, a_rotation_outlives_its_leader,
    who_was_away_is_shut_out_and_told, the_key_of_gossip_is_replaced);

/// The node that asks a manager to admit it again.
const AWAY: &str = "w2";

/// A task on every node that answers over the network; their ids.
fn tasks(c: &Cluster) -> Result<Vec<String>> {
    c.network("app")?;
    c.service("--name each --mode global --network app", WHOAMI)?;
    ids(c, 5)
}

fn ids(c: &Cluster, count: usize) -> Result<Vec<String>> {
    let mut ids: Vec<_> = c.wait_running("each", count)?.into_iter().map(|task| task.id).collect();
    ids.sort();
    Ok(ids)
}

/// Traffic flows between all of them, and none has ended.
fn untouched(c: &Cluster, before: &[String]) -> Result<()> {
    let tasks = c.wait_running("each", before.len())?;
    for from in &tasks {
        ensure!(before.contains(&from.id), "{} is not of before", from.name);
        for to in &tasks {
            let address = to.addresses.get("app").context("no address")?;
            c.in_task(&from.id, &["ping", "-c1", "-W2", address])?.ok()?;
        }
    }
    Ok(())
}

fn root(c: &Cluster, ask: &str) -> Result<String> {
    c.meshctl(ask, "swarm ca")?.ok()
}

fn token(c: &Cluster, ask: &str) -> Result<String> {
    c.meshctl(ask, "swarm join-token -q worker")?.ok()
}

/// All nodes trust the root that the cluster has now, by their own words and by their files.
fn all_trust(c: &Cluster, ask: &str, nodes: &[&str]) -> Result<()> {
    let root = root(c, ask)?;
    for node in nodes {
        let file = c.lab.places().state_dir(node).join("identity/ca.pem");
        eventually(&format!("{node} to trust the new root alone"), SOON, || {
            let held = std::fs::read_to_string(&file)?;
            ensure!(held.trim() == root.trim(), "it trusts {held}");
            Ok(())
        })?;
    }
    eventually("the managers to have heard of that", SOON, || {
        let listed = c.meshctl(ask, "node ls --format {{.TLSStatus}}")?.ok()?;
        ensure!(listed.lines().filter(|word| *word == "Ready").count() == nodes.len(), "{listed}");
        Ok(())
    })
}

fn finished(c: &Cluster, ask: &str) -> Result<()> {
    eventually("the old root to be dropped", SOON, || {
        let swarm = c.lab.call(ask, "GET", "/swarm", None)?;
        ensure!(swarm["RootRotationInProgress"] == false, "it is still on its way");
        Ok(())
    })
}

const ALL: [&str; 5] = ["m1", "m2", "m3", "w1", "w2"];

/// The stock client shows the progress, and comes to its end.
fn another_root_takes_its_place(c: &Cluster) -> Result<()> {
    let before = tasks(c)?;
    let (old_root, old_token) = (root(c, "m1")?, token(c, "m1")?);
    let shown = c.docker("m1", "swarm ca --rotate")?.ok()?;
    let new_root = root(c, "m2")?;
    ensure!(new_root != old_root, "the root is the old one");
    ensure!(shown.contains(new_root.trim()), "{shown}");
    all_trust(c, "m1", &ALL)?;
    ensure!(token(c, "m1")? != old_token, "the join token is the old one");
    for node in ALL {
        c.wait_node("m1", node, "Ready")?;
    }
    untouched(c, &before)?;
    // And ours: again, with another root.
    let shown = c.meshctl("m3", "swarm ca --rotate")?.ok()?;
    ensure!(shown.contains("5 of 5 nodes") && shown.contains("old one is dropped"), "{shown}");
    ensure!(root(c, "m1")? != new_root, "the root is the old one");
    all_trust(c, "m1", &ALL)?;
    untouched(c, &before)
}

/// Whoever leads next goes on with it.
fn a_rotation_outlives_its_leader(c: &Cluster) -> Result<()> {
    let before = tasks(c)?;
    let old_root = root(c, "m1")?;
    let leader = c.leader("m1")?;
    let other = ALL.into_iter().find(|node| *node != leader).context("no other")?;
    c.meshctl(&leader, "swarm ca --rotate --detach")?.ok()?;
    c.lab.end_daemon(&leader, DaemonSignal::Kill)?;
    // It is waited for: a daemon that is away for a moment takes part when it is back.
    let led = eventually("another leader", SOON, || {
        let now = c.leader(other)?;
        ensure!(now != leader, "it is still {now}");
        Ok(())
    });
    c.lab.start(&leader)?;
    led?;
    finished(c, other)?;
    ensure!(root(c, other)? != old_root, "the root is the old one");
    all_trust(c, other, &ALL)?;
    untouched(c, &before)
}

/// A certificate of the old root is good for nothing once that is dropped.
fn who_was_away_is_shut_out_and_told(c: &Cluster) -> Result<()> {
    let before = tasks(c)?;
    let old_token = token(c, "m1")?;
    c.lab.end_daemon(AWAY, DaemonSignal::Kill)?;
    let tried = shut_out(c, &before);
    // For the next case, whatever became of this one.
    c.lab.start(AWAY)?;
    c.meshctl(AWAY, "swarm leave --force")?.ok()?;
    let wrong = c.meshctl(AWAY, &format!("swarm join --token {old_token} 192.0.2.11:2377"))?;
    let joined = token(c, "m1").and_then(|token| {
        c.meshctl(AWAY, &format!("swarm join --token {token} 192.0.2.11:2377"))?.ok()
    });
    tried?;
    wrong.refused(&["does not match the token"])?;
    joined?;
    c.wait_node("m1", AWAY, "Ready")?;
    all_trust(c, "m1", &ALL)
}

fn shut_out(c: &Cluster, before: &[String]) -> Result<()> {
    c.wait_node("m1", AWAY, "Down")?;
    c.meshctl("m1", "swarm ca --rotate --detach")?.ok()?;
    eventually("all others to have certificates of the new root", SOON, || {
        let swarm = c.lab.call("m1", "GET", "/swarm", None)?;
        let nodes = c.lab.call("m1", "GET", "/nodes", None)?;
        let key = |of: &serde_json::Value| of["CertIssuerPublicKey"].clone();
        let wanted = key(&swarm["TLSInfo"]);
        let have = list(&nodes).iter().filter(|n| key(&n["Description"]["TLSInfo"]) == wanted);
        ensure!(have.count() == 4, "{nodes}");
        ensure!(swarm["RootRotationInProgress"] == true, "nobody waits for {AWAY}");
        Ok(())
    })?;
    // Waiting has an end, which an operator may bring about.
    c.meshctl("m1", &format!("node rm --force {AWAY}"))?.ok()?;
    finished(c, "m1")?;
    all_trust(c, "m1", &ALL[..4])?;
    let refused = |node: &str| c.counter(node, "rpc_handshakes_refused");
    let counted = refused("m1")? + refused("m2")? + refused("m3")?;
    let log = c.lab.places().log(AWAY);
    let told = || -> Result<usize> {
        let text = std::fs::read_to_string(&log)?;
        Ok(text.matches("trust different root certificates").count())
    };
    let said = told()?;
    c.lab.start(AWAY)?;
    eventually("the node to be told", SOON, || {
        ensure!(told()? > said, "its log says nothing of the root");
        Ok(())
    })?;
    let now = refused("m1")? + refused("m2")? + refused("m3")?;
    ensure!(now > counted, "no handshake was counted as refused");
    // The others are not disturbed.
    let others: Vec<_> = ids(c, 4)?;
    ensure!(others.iter().all(|id| before.contains(id)), "tasks of others have ended");
    untouched(c, &others)
}

fn the_key_of_gossip_is_replaced(c: &Cluster) -> Result<()> {
    let before = tasks(c)?;
    let file = |node: &str| -> Result<serde_json::Value> {
        let path = c.lab.places().state_dir(node).join("member.json");
        Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
    };
    let old = file("w1")?["gossip_key"].clone();
    let shown = c.meshctl("m2", "swarm rotate-gossip-key")?.ok()?;
    ensure!(shown.contains("is in use; the one before is dropped"), "{shown}");
    for node in ALL {
        eventually(&format!("{node} to hold the new key alone"), SOON, || {
            let held = file(node)?;
            ensure!(held["gossip_key"] != old && held["gossip_next"].is_null(), "not yet");
            let members = c.counter(node, "gossip_members")?;
            ensure!(members == 4, "it sees {members} members");
            Ok(())
        })?;
        c.wait_node("m1", node, "Ready")?;
    }
    untouched(c, &before)
}
