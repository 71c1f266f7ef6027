//! Nodes become managers and workers again, while their tasks run on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually, list};

group!("roles": a_worker_becomes_a_manager_and_back, the_leader_demotes_itself,
    what_would_lose_the_majority_is_refused, roles_outlast_a_restart, certificates_follow_roles);

/// A task on every node, none of which may end.
fn tasks(c: &Cluster) -> Result<Vec<(String, String)>> {
    c.service("--name all --mode global", "sleep infinity")?;
    c.wait_running("all", 5)?;
    running(c, "m1")
}

/// Ids and nodes of the tasks that run, by the word of a manager.
fn running(c: &Cluster, ask: &str) -> Result<Vec<(String, String)>> {
    let filters = "%7B%22service%22:%5B%22all%22%5D,%22desired-state%22:%5B%22running%22%5D%7D";
    let tasks = c.lab.call(ask, "GET", &format!("/tasks?filters={filters}"), None)?;
    let of = list(&tasks).iter().filter(|task| task["Status"]["State"] == "running");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let mut tasks: Vec<_> = of.map(|task| (text(&task["ID"]), text(&task["NodeID"]))).collect();
    tasks.sort();
    Ok(tasks)
}

/// None of the tasks has ended.
fn untouched(c: &Cluster, ask: &str, before: &[(String, String)]) -> Result<()> {
    let now = running(c, ask)?;
    ensure!(now == before, "tasks were touched: {before:?} {now:?}");
    Ok(())
}

/// Waits until a node is a manager that answers, or a worker, by its own word and by that of `ask`.
fn wait_role(c: &Cluster, ask: &str, node: &str, manager: bool) -> Result<()> {
    eventually(
        &format!("{node} to be a {}", if manager { "manager" } else { "worker" }),
        SOON,
        || {
            let nodes = c.lab.call(ask, "GET", "/nodes", None)?;
            let seen = list(&nodes).iter().find(|seen| seen["Description"]["Hostname"] == node);
            let status = &seen.context("it is not listed")?["ManagerStatus"];
            ensure!(status.is_null() != manager, "{ask} says {status}");
            ensure!(!manager || status["Reachability"] == "reachable", "{ask} says {status}");
            let own = c.lab.call(node, "GET", "/info", None)?;
            ensure!(own["Swarm"]["ControlAvailable"] == manager, "{node} says {}", own["Swarm"]);
            if manager {
                c.meshctl(node, "node ls")?.ok()?;
            }
            Ok(())
        },
    )
}

fn a_worker_becomes_a_manager_and_back(c: &Cluster) -> Result<()> {
    let before = tasks(c)?;
    let said = c.docker("m1", "node promote w1")?.ok()?;
    ensure!(said == "Node w1 promoted to a manager in the swarm.", "{said}");
    wait_role(c, "m2", "w1", true)?;
    let again = c.meshctl("w1", "node promote w1")?.ok()?;
    ensure!(again == "Node w1 is already a manager.", "{again}");
    c.meshctl("w1", "network create --driver overlay made-on-w1")?.ok()?;
    c.docker("m3", "network inspect made-on-w1")?.ok()?;
    let said = c.meshctl("m2", "node demote w1")?.ok()?;
    ensure!(said == "Manager w1 demoted in the swarm.", "{said}");
    wait_role(c, "m1", "w1", false)?;
    c.meshctl("w1", "node ls")?.refused(&["not a swarm manager"])?;
    let again = c.docker("m1", "node demote w1")?.ok()?;
    ensure!(again.ends_with("is already a worker."), "{again}");
    // What managers know does not stay with it.
    let store = c.lab.places().state_dir("w1").join("raft");
    ensure!(!store.exists(), "{} is still there", store.display());
    untouched(c, "m1", &before)?;
    // It goes on as a worker: tasks come to it and go.
    c.service("--name here --replicas 1 --constraint node.hostname==w1", "sleep infinity")?;
    ensure!(c.wait_running("here", 1)?[0].node == "w1");
    Ok(())
}

fn the_leader_demotes_itself(c: &Cluster) -> Result<()> {
    let before = tasks(c)?;
    let leader = c.leader("m1")?;
    let other = if leader == "m1" { "m2" } else { "m1" };
    c.docker(&leader, &format!("node demote {leader}"))?.ok()?;
    // Handed over, not lost: nobody waits for an election time-out.
    let begin = std::time::Instant::now();
    eventually("a write", SOON, || {
        c.meshctl(other, "network create --driver overlay next")?.ok().map(drop)
    })?;
    let took = begin.elapsed();
    ensure!(took < Duration::from_secs(5), "no write for {took:?}");
    wait_role(c, other, &leader, false)?;
    ensure!(c.leader(other)? != leader);
    untouched(c, other, &before)?;
    c.meshctl(other, &format!("node promote {leader}"))?.ok()?;
    wait_role(c, other, &leader, true)?;
    c.meshctl(&leader, "network inspect next")?.ok()?;
    untouched(c, &leader, &before)
}

fn what_would_lose_the_majority_is_refused(c: &Cluster) -> Result<()> {
    let leader = c.leader("m1")?;
    let mut others = ["m1", "m2", "m3"].into_iter().filter(|name| *name != leader);
    let (up, down) = (others.next().context("no other")?, others.next().context("no third")?);
    c.lab.end_daemon(down, mesh_lab::DaemonSignal::Kill)?;
    let refused = (|| {
        c.wait_node(&leader, down, "Unreachable")?;
        c.docker(&leader, &format!("node demote {up}"))?.refused(&["loss of quorum"])?;
        c.meshctl(up, &format!("node update --role worker {up}"))?.refused(&["loss of quorum"])?;
        // The one that is down is not missed.
        c.meshctl(up, &format!("node demote {down}"))?.ok()
    })();
    c.lab.start(down)?;
    refused?;
    wait_role(c, &leader, down, false)?;
    c.meshctl(&leader, &format!("node demote {up}"))?.ok()?;
    wait_role(c, &leader, up, false)?;
    for (who, said) in [
        ("docker", c.docker(&leader, &format!("node demote {leader}"))?),
        ("meshctl", c.meshctl(&leader, &format!("node update --role worker {leader}"))?),
    ] {
        said.refused(&["last manager of the swarm"]).context(who)?;
    }
    for node in [up, down] {
        // Of one voter and a second one that just came, neither is a majority for a moment.
        eventually("a promotion", SOON, || {
            c.docker(&leader, &format!("node update --role manager {node}"))?.ok()
        })?;
        wait_role(c, &leader, node, true)?;
    }
    Ok(())
}

fn roles_outlast_a_restart(c: &Cluster) -> Result<()> {
    let before = tasks(c)?;
    c.meshctl("m1", "node promote w2")?.ok()?;
    wait_role(c, "m1", "w2", true)?;
    c.lab.end_daemon("w2", mesh_lab::DaemonSignal::Kill)?;
    c.lab.start("w2")?;
    wait_role(c, "m1", "w2", true)?;
    // Told while its daemon is dead, it hears of it when it is back.
    c.lab.end_daemon("w2", mesh_lab::DaemonSignal::Kill)?;
    let demoted = c.meshctl("m1", "node demote w2")?.ok();
    c.lab.start("w2")?;
    demoted?;
    wait_role(c, "m1", "w2", false)?;
    c.lab.end_daemon("w2", mesh_lab::DaemonSignal::Kill)?;
    c.lab.start("w2")?;
    wait_role(c, "m1", "w2", false)?;
    c.wait_node("m1", "w2", "Ready")?;
    untouched(c, "m1", &before)
}

/// The certificate on disk says the role, and so does the one that others are shown.
fn certificates_follow_roles(c: &Cluster) -> Result<()> {
    let unit = |node: &str| -> Result<String> {
        let file = c.lab.places().state_dir(node).join("identity/cert.pem");
        let file = file.display().to_string();
        c.on(node, &["openssl", "x509", "-noout", "-subject", "-in", &file])?.ok()
    };
    ensure!(unit("w1")?.contains("swarm-worker"), "{}", unit("w1")?);
    c.meshctl("m1", "node promote w1")?.ok()?;
    wait_role(c, "m1", "w1", true)?;
    ensure!(unit("w1")?.contains("swarm-manager"), "{}", unit("w1")?);
    c.meshctl("m1", "node demote w1")?.ok()?;
    wait_role(c, "m1", "w1", false)?;
    ensure!(unit("w1")?.contains("swarm-worker"), "{}", unit("w1")?);
    // Managers' port is closed.
    let port = c.on("m1", &["bash", "-c", "exec 3<>/dev/tcp/192.0.2.21/2377"])?;
    ensure!(port.status != 0, "w1 still listens on 2377");
    Ok(())
}
