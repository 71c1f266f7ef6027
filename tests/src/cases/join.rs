//! Init, join and leave by hand, with right and wrong tokens. In a lab without a cluster.

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually, field};

group!("join": nothing_works_before_init, wrong_tokens, another_clusters_token, join_and_leave);

fn init(c: &Cluster, node: &str) -> Result<()> {
    let address = c.lab.member(node)?.address;
    c.meshctl(node, &format!("swarm init --advertise-addr {address}"))?.ok().map(drop)
}

fn token(c: &Cluster, node: &str, role: &str) -> Result<String> {
    c.meshctl(node, &format!("swarm join-token -q {role}"))?.ok()
}

fn join(c: &Cluster, node: &str, token: &str) -> Result<crate::cluster::Ran> {
    c.meshctl(node, &format!("swarm join --token {token} 192.0.2.11:2377"))
}

fn state(c: &Cluster, node: &str) -> Result<String> {
    field(&c.lab.call(node, "GET", "/info", None)?["Swarm"], "LocalNodeState")
}

fn leave(c: &Cluster, node: &str) -> Result<()> {
    if state(c, node)? != "inactive" {
        c.meshctl(node, "swarm leave --force")?.ok()?;
    }
    Ok(())
}

fn nothing_works_before_init(c: &Cluster) -> Result<()> {
    ensure!(state(c, "m1")? == "inactive");
    c.meshctl("m1", "node ls")?.refused(&["swarm"])?;
    c.meshctl("m1", "swarm leave")?.refused(&["swarm"])
}

fn wrong_tokens(c: &Cluster) -> Result<()> {
    init(c, "m1")?;
    c.meshctl("m1", "swarm init")?.refused(&["already"])?;
    let good = token(c, "m1", "worker")?;
    let (head, secret) = good.rsplit_once('-').context("a token without dashes")?;
    let flipped: String = secret.chars().rev().collect();
    for bad in ["nonsense", "SWMTKN-1-x-y", &good[..good.len() - 3], &format!("{head}-{flipped}")] {
        join(c, "w1", bad)?.refused(&["token"])?;
        ensure!(state(c, "w1")? == "inactive", "w1 is {} after {bad:?}", state(c, "w1")?);
    }
    leave(c, "m1")
}

/// The token pins the CA, so the joiner itself refuses the other cluster.
fn another_clusters_token(c: &Cluster) -> Result<()> {
    init(c, "w1")?;
    let other = token(c, "w1", "worker")?;
    leave(c, "w1")?;
    init(c, "m1")?;
    join(c, "w1", &other)?.refused(&[])?;
    ensure!(state(c, "w1")? == "inactive");
    leave(c, "m1")
}

fn join_and_leave(c: &Cluster) -> Result<()> {
    init(c, "m1")?;
    let good = token(c, "m1", "worker")?;
    ensure!(good.starts_with("SWMTKN-1-"), "{good:?}");
    ensure!(good != token(c, "m1", "manager")?, "both roles have one token");
    join(c, "w1", &good)?.ok()?;
    let line_of_w1 = |word: &str| {
        eventually(&format!("w1 to be {word}"), SOON, || {
            let nodes = c.meshctl("m1", "node ls")?.ok()?;
            let line = nodes.lines().find(|line| line.contains("w1")).unwrap_or_default();
            ensure!(line.to_lowercase().contains(word), "{nodes}");
            Ok(())
        })
    };
    line_of_w1("ready")?;
    join(c, "w1", &good)?.refused(&["already"])?;
    c.meshctl("m1", "swarm leave")?.refused(&["--force"])?;
    c.meshctl("w1", "swarm leave")?.ok()?;
    ensure!(state(c, "w1")? == "inactive");
    line_of_w1("down")?;
    leave(c, "m1")
}
