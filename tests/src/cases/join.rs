//! Init, join and leave by hand, with right and wrong tokens. In a lab without a cluster.

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually, field, row_of};

group!("join": nothing_works_before_init, wrong_tokens, another_clusters_token, join_and_leave,
    a_manager_joins_and_leaves, the_stock_client_joins);

/// Makes a cluster of `node`, whatever an earlier case left.
fn init(c: &Cluster, node: &str) -> Result<()> {
    leave_all(c)?;
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

fn leave_all(c: &Cluster) -> Result<()> {
    leave(c, "w1")?;
    leave(c, "m1")
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
            ensure!(row_of(&nodes, "w1").to_lowercase().contains(word), "{nodes}");
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

/// Two managers: both lead or follow; one that is demoted by leaving takes its vote along.
fn a_manager_joins_and_leaves(c: &Cluster) -> Result<()> {
    init(c, "m1")?;
    join(c, "w1", &token(c, "m1", "manager")?)?.ok()?;
    eventually("w1 to be a manager that can be reached", SOON, || {
        let nodes = c.meshctl("w1", "node ls")?.ok()?;
        ensure!(nodes.contains("Reachable") && nodes.contains("Leader"), "{nodes}");
        Ok(())
    })?;
    c.meshctl("w1", "network create --driver overlay made-there")?.ok()?;
    c.meshctl("m1", "network inspect made-there")?.ok()?;
    c.meshctl("w1", "swarm leave")?.refused(&["manager", "--force"])?;
    c.meshctl("w1", "swarm leave --force")?.ok()?;
    // Alone again, m1 is a majority of itself.
    eventually("m1 to write alone", SOON, || c.meshctl("m1", "network rm made-there")?.ok())?;
    leave(c, "m1")
}

/// What the guides say, by the `docker` that they say it with.
fn the_stock_client_joins(c: &Cluster) -> Result<()> {
    let docker = |node: &str, line: &str| c.docker(node, line);
    leave_all(c)?;
    let said = docker("m1", "swarm init --advertise-addr 192.0.2.11")?.ok()?;
    let command = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("docker "))
        .with_context(|| format!("`swarm init` prints no command to join with: {said}"))?;
    ensure!(command.starts_with("swarm join --token SWMTKN-1-"), "{command}");
    ensure!(docker("w1", command)?.ok()?.contains("joined a swarm as a worker"));
    eventually("w1 to be ready", SOON, || {
        let nodes = docker("m1", "node ls")?.ok()?;
        ensure!(row_of(&nodes, "w1").contains("Ready"), "{nodes}");
        Ok(())
    })?;
    ensure!(docker("m1", "node inspect --pretty w1")?.ok()?.contains("w1"));
    docker("w1", "swarm leave")?.ok()?;
    docker("m1", "swarm leave")?.refused(&["--force"])?;
    docker("m1", "swarm leave --force")?.ok()?;
    ensure!(state(c, "m1")? == "inactive" && state(c, "w1")? == "inactive");
    Ok(())
}
