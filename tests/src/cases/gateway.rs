//! The way out: `gw0`, masquerading, and networks without it.

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually, field, host_of};

group!("gateway": tasks_reach_the_world, it_sees_the_node, large_from_the_world,
    internal_tasks_do_not, replies_without_a_network);

fn tasks_reach_the_world(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name each --mode global --network app", "sleep infinity")?;
    for task in c.wait_running("each", 5)? {
        eventually(&format!("{} to reach the world", task.name), SOON, || {
            c.in_task(&task.id, &["ping", "-c1", "-W1", "198.51.100.7"])?.ok()?;
            c.fetch_in_task(&task.id, "http://www.example.test/")
        })?;
        let routes = c.task_sh(&task.id, "ip route show default")?;
        ensure!(routes.contains("dev gw0") && routes.lines().count() == 1, "{routes:?}");
    }
    Ok(())
}

fn it_sees_the_node(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name each --mode global --network app", "sleep infinity")?;
    for task in c.wait_running("each", 5)? {
        let answer =
            eventually("an answer", SOON, || c.fetch_in_task(&task.id, "http://198.51.100.7/"))?;
        let seen = field(&answer, "client")?;
        let node = c.lab.node(&task.node)?;
        ensure!(host_of(&seen)? == node.address.to_string(), "{} is seen as {seen}", node.name);
        let udp = c.task_sh(
            &task.id,
            "exec 3<>/dev/udp/198.51.100.7/7; echo hi >&3; timeout 2 dd bs=4096 count=1 status=none <&3",
        )?;
        ensure!(udp.contains(&format!("\"client\":\"{}:", node.address)), "by UDP: {udp}");
    }
    Ok(())
}

/// Segments that the uplink merged must come out whole on `gw0`.
fn large_from_the_world(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.shell()?;
    let script = "exec 3<>/dev/tcp/198.51.100.7/7; read -r -u3 who; \
        (head -c 5000000 /dev/zero >&3) & head -c 5000000 <&3 | wc -c";
    let length = eventually("5 MB to come back", SOON, || {
        c.in_task("shell.1", &["timeout", "15", "bash", "-c", script])?.ok()
    })?;
    ensure!(length == "5000000", "{length} bytes came back");
    Ok(())
}

fn internal_tasks_do_not(c: &Cluster) -> Result<()> {
    c.network("--internal app")?;
    c.shell()?;
    ensure!(c.task_sh("shell.1", "ip route show default")?.is_empty(), "it has a default route");
    for target in ["198.51.100.7", "192.0.2.11", "192.0.2.1"] {
        let ran = c.in_task("shell.1", &["ping", "-c1", "-W1", target])?;
        ensure!(ran.status != 0, "an internal task reaches {target}");
    }
    let links = c.task_sh("shell.1", "ip -br link")?;
    ensure!(!links.contains("gw0"), "{links}");
    Ok(())
}

/// Published but on no overlay network: requests come and replies go by `gw0` alone.
fn replies_without_a_network(c: &Cluster) -> Result<()> {
    c.service("--name lone --replicas 1 --publish 8080:80", crate::cluster::WHOAMI)?;
    let answer = eventually("an answer", SOON, || c.fetch("client", "http://192.0.2.13:8080/"))?;
    let seen = field(&answer, "client")?;
    ensure!(host_of(&seen).context("no port")? == "198.51.100.7", "it is seen as {seen}");
    Ok(())
}
