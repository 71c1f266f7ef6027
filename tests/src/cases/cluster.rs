//! Forming a cluster, and what nodes say of it.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually, list};

group!("cluster": ready_in_time, managers_and_one_leader, a_follower_forwards_writes, daemon_killed,
    a_new_leader_after_a_crash);

/// The promise of issue and README: five nodes Ready in under 10 s.
fn ready_in_time(c: &Cluster) -> Result<()> {
    ensure!(c.up_took < Duration::from_secs(10), "the lab took {:?}", c.up_took);
    let nodes = c.api("GET", "/nodes")?;
    let ready = list(&nodes).iter().filter(|node| node["Status"]["State"] == "ready").count();
    ensure!(ready == 5, "{ready} of 5 are ready: {nodes}");
    Ok(())
}

fn managers_and_one_leader(c: &Cluster) -> Result<()> {
    let nodes = c.api("GET", "/nodes")?;
    let managers: Vec<_> =
        list(&nodes).iter().filter(|node| node["Spec"]["Role"] == "manager").collect();
    let leaders = managers.iter().filter(|node| node["ManagerStatus"]["Leader"] == true).count();
    ensure!(managers.len() == 3 && leaders == 1, "{} managers, {leaders} lead", managers.len());
    let info = c.lab.call("w1", "GET", "/info", None)?;
    ensure!(info["Swarm"]["LocalNodeState"] == "active", "w1: {info}");
    ensure!(info["Swarm"]["ControlAvailable"] == false, "w1 is a worker: {info}");
    c.meshctl("w1", "service ls")?.refused(&["manager"])
}

fn a_follower_forwards_writes(c: &Cluster) -> Result<()> {
    for (manager, network) in [("m1", "by1"), ("m2", "by2"), ("m3", "by3")] {
        c.meshctl(manager, &format!("network create --driver overlay {network}"))?.ok()?;
        // Whoever wrote it reads it at once.
        c.meshctl(manager, &format!("network inspect {network}"))?.ok()?;
    }
    eventually("all networks on every manager", SOON, || {
        for manager in ["m1", "m2", "m3"] {
            let networks = c.meshctl(manager, "network ls")?.ok()?;
            let all = ["by1", "by2", "by3"].iter().all(|name| networks.contains(name));
            ensure!(all, "{manager} lists {networks}");
        }
        Ok(())
    })
}

/// Tasks and packets need no daemon; and a daemon that comes back finds them again.
fn daemon_killed(c: &Cluster) -> Result<()> {
    c.web("--replicas 5 --publish 8080:80")?;
    let before = c.wait_running("web", 5)?;
    c.on("client", &["true"])?.ok()?;
    c.lab.end_daemon("w1", mesh_lab::DaemonSignal::Kill)?;
    for _ in 0..10 {
        c.fetch("client", "http://192.0.2.21:8080/")?;
    }
    c.lab.start("w1")?;
    c.wait_node("m1", "w1", "Ready")?;
    let after = c.wait_running("web", 5)?;
    let ids =
        |tasks: &[crate::cluster::Task]| tasks.iter().map(|t| t.id.clone()).collect::<Vec<_>>();
    ensure!(ids(&before) == ids(&after), "tasks were replaced: {before:?} {after:?}");
    c.fetch("client", "http://192.0.2.21:8080/").map(drop)
}

fn a_new_leader_after_a_crash(c: &Cluster) -> Result<()> {
    let leader = c.leader("m1")?;
    let other = if leader == "m1" { "m2" } else { "m1" };
    c.lab.crash(&leader)?;
    eventually("another leader", SOON, || {
        let now = c.leader(other)?;
        ensure!(now != leader, "the leader is {now:?}");
        c.meshctl(other, "network create --driver overlay after")?.ok()
    })?;
    c.lab.start(&leader)?;
    eventually("the old leader to follow", SOON, || {
        c.meshctl(&leader, "network inspect after")?.ok()
    })?;
    eventually("all to be ready", SOON, || {
        let nodes = c.lab.call(other, "GET", "/nodes", None)?;
        let ready = list(&nodes).iter().filter(|n| n["Status"]["State"] == "ready").count();
        ensure!(ready == 5, "{ready} are ready");
        Ok(())
    })
}
