//! Overlay networks: making them, refusing bad ones, and packets between tasks.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::group;
use crate::cluster::{Cluster, SOON, eventually, list};

group!("network": create_inspect_remove, overlaps_are_refused, bad_subnets_are_refused,
    duplicate_names_are_refused, a_network_in_use_stays, malformed_and_oversized_bodies,
    tasks_reach_each_other, tasks_on_one_node, networks_are_apart,
    the_mtu_is_the_underlays, broadcasts_are_counted_drops, no_address_left);

fn create_inspect_remove(c: &Cluster) -> Result<()> {
    c.network(
        "--subnet 10.71.0.0/16 --gateway 10.71.0.254 --ip-range 10.71.8.0/24 --attachable \
         --label color=blue --opt com.docker.network.driver.mtu=1400 blue",
    )?;
    let shown = c.meshctl("m1", "network inspect blue")?.ok()?;
    let shown: Value = serde_json::from_str(&shown).context("inspect prints JSON")?;
    let blue = &shown[0];
    let config = &blue["IPAM"]["Config"][0];
    ensure!(blue["Driver"] == "overlay" && blue["Scope"] == "swarm", "{blue}");
    ensure!(blue["Attachable"] == true && blue["Labels"]["color"] == "blue", "{blue}");
    ensure!(config["Subnet"] == "10.71.0.0/16" && config["Gateway"] == "10.71.0.254", "{config}");
    ensure!(config["IPRange"] == "10.71.8.0/24", "{config}");
    // Addresses come from the range.
    c.service("--name one --replicas 1 --network blue", "sleep infinity")?;
    let tasks = c.wait_running("one", 1)?;
    let address = tasks[0].addresses.get("blue").cloned().unwrap_or_default();
    ensure!(address.starts_with("10.71.8."), "the task has {address:?}");
    let mtu = c.task_sh("one.1", "cat /sys/class/net/eth0/mtu")?;
    ensure!(mtu == "1400", "the option gives 1400, the link has {mtu}");
    c.meshctl("m1", "service rm one")?.ok()?;
    eventually("the network to be removable", SOON, || c.meshctl("m1", "network rm blue")?.ok())?;
    c.meshctl("m1", "network inspect blue")?.refused(&["blue"])
}

fn overlaps_are_refused(c: &Cluster) -> Result<()> {
    c.network("--subnet 10.72.0.0/16 first")?;
    for subnet in ["10.72.0.0/16", "10.72.4.0/24", "10.64.0.0/10"] {
        let line = format!("network create --driver overlay --subnet {subnet} second");
        c.meshctl("m1", &line)?.refused(&["overlap"])?;
    }
    // The underlay, a route of every node itself.
    c.meshctl("m1", "network create --driver overlay --subnet 192.0.2.128/25 under")?
        .refused(&["192.0.2"])
}

fn bad_subnets_are_refused(c: &Cluster) -> Result<()> {
    for options in [
        "--subnet 10.73.0.0/33",
        "--subnet 10.73.0.0",
        "--subnet 10.73.0.0/24 --gateway 10.74.0.1",
        "--subnet 10.73.0.0/24 --ip-range 10.74.0.0/25",
        "--subnet 127.0.0.0/8",
        "--subnet 224.0.0.0/8",
    ] {
        let line = format!("network create --driver overlay {options} bad");
        c.meshctl("m1", &line)?.refused(&[])?;
    }
    let networks = c.api("GET", "/networks")?;
    ensure!(!list(&networks).iter().any(|n| n["Name"] == "bad"), "a refused network exists");
    Ok(())
}

fn duplicate_names_are_refused(c: &Cluster) -> Result<()> {
    c.network("twice")?;
    c.meshctl("m2", "network create --driver overlay twice")?.refused(&["twice"])?;
    c.docker("m3", "network create --driver overlay twice")?.refused(&["twice"])
}

fn a_network_in_use_stays(c: &Cluster) -> Result<()> {
    c.web("--replicas 1")?;
    c.meshctl("m1", "network rm app")?.refused(&["app", "web"])?;
    c.docker("m1", "network rm app")?.refused(&["use"])?;
    c.meshctl("m1", "network inspect app")?.ok().map(drop)
}

fn malformed_and_oversized_bodies(c: &Cluster) -> Result<()> {
    const NAMELESS: &str = r#"{"Name":"","Driver":"overlay"}"#;
    for body in ["{", "[]", "nonsense", r#"{"Name":7}"#, NAMELESS] {
        let answer = c.raw("POST", "/networks/create", body.as_bytes())?;
        ensure!(answer.status == 400, "{body}: {} {}", answer.status, answer.message());
        ensure!(!answer.message().is_empty(), "{body}: no reason given");
    }
    let long = vec![b' '; 64 << 20];
    let answer = c.raw("POST", "/services/create", &long)?;
    ensure!(matches!(answer.status, 400 | 413), "64 MiB: {}", answer.status);
    let deep = "[".repeat(100_000);
    let answer = c.raw("POST", "/services/create", deep.as_bytes())?;
    ensure!(answer.status == 400, "deep JSON: {}", answer.status);
    c.api("GET", "/nodes").map(drop)
}

fn tasks_reach_each_other(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name each --mode global --network app", "sleep infinity")?;
    let tasks = c.wait_running("each", 5)?;
    for from in &tasks {
        for to in &tasks {
            let address = to.addresses.get("app").context("a task without an address")?;
            eventually(&format!("{} to reach {}", from.node, to.node), SOON, || {
                c.in_task(&from.id, &["ping", "-c1", "-W1", address])?.ok()
            })?;
        }
    }
    Ok(())
}

fn networks_are_apart(c: &Cluster) -> Result<()> {
    c.network("--internal one")?;
    c.network("--internal two")?;
    c.service("--name a --mode global --network one", "sleep infinity")?;
    c.service("--name b --mode global --network two", "sleep infinity")?;
    let (a, b) = (c.wait_running("a", 5)?, c.wait_running("b", 5)?);
    for to in &b {
        let address = to.addresses.get("two").context("a task without an address")?;
        let ran = c.in_task(&a[0].id, &["ping", "-c1", "-W1", address])?;
        ensure!(ran.status != 0, "a task on `one` reaches {address} on `two`");
    }
    Ok(())
}

fn the_mtu_is_the_underlays(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name each --mode global --network app", "sleep infinity")?;
    let tasks = c.wait_running("each", 5)?;
    // 1500 less Ethernet, VXLAN, UDP and IPv4 headers.
    let mtu = c.task_sh(&tasks[0].id, "cat /sys/class/net/eth0/mtu")?;
    ensure!(mtu == "1450", "{mtu}");
    let other = tasks.iter().find(|t| t.node != tasks[0].node).context("all on one node")?;
    let address = other.addresses.get("app").context("a task without an address")?;
    let ping = |size: &str| {
        c.in_task(&tasks[0].id, &["ping", "-c1", "-W1", "-M", "do", "-s", size, address])
    };
    eventually("a packet of 1450 bytes to pass", SOON, || ping("1422")?.ok())?;
    ensure!(ping("1423")?.status != 0, "a packet of 1451 bytes passes");
    Ok(())
}

/// Peers on one node are as near as on others, and no tunnel is used.
fn tasks_on_one_node(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name ten --replicas 10 --network app", crate::cluster::WHOAMI)?;
    let tasks = c.wait_running("ten", 10)?;
    let pair = tasks
        .iter()
        .find_map(|a| Some((a, tasks.iter().find(|b| a.node == b.node && a.name != b.name)?)));
    let (from, to) = pair.context("no two tasks on one node")?;
    let address = to.addresses.get("app").context("a task without an address")?;
    eventually("its neighbour to answer", SOON, || {
        c.in_task(&from.id, &["ping", "-c1", "-W1", address])?.ok()
    })?;
    let before = c.counter(&from.node, "to_tunnel")?;
    c.in_task(&from.id, &["ping", "-c20", "-i0.01", "-W1", address])?.ok()?;
    let tunnelled = c.counter(&from.node, "to_tunnel")? - before;
    ensure!(tunnelled < 20, "{tunnelled} packets took the tunnel");
    let length = c.task_sh(
        &from.id,
        &format!("curl -s --max-time 10 'http://{address}/?size=2MB' | wc -c"),
    )?;
    ensure!(length.parse::<u64>().is_ok_and(|n| n >= 2_000_000), "{length} bytes came");
    Ok(())
}

fn broadcasts_are_counted_drops(c: &Cluster) -> Result<()> {
    c.network("--subnet 10.74.0.0/24 app")?;
    c.service("--name each --mode global --network app", "sleep infinity")?;
    let task = c.wait_running("each", 5)?.pop().context("no task")?;
    for target in ["10.74.0.255", "224.0.0.1"] {
        let before = c.counter(&task.node, "multicast")?;
        let script = format!("ping -b -c 5 -i 0.02 -W 1 -I eth0 {target}");
        let ran = c.in_task(&task.id, &["sh", "-c", &script])?;
        ensure!(ran.status != 0, "{target} is answered: {}", ran.stdout);
        let grown = c.counter(&task.node, "multicast")? - before;
        ensure!(grown >= 5, "{target}: `multicast` grew by {grown}");
    }
    Ok(())
}

/// A task that has to wait says for what; it goes on when there is room.
fn no_address_left(c: &Cluster) -> Result<()> {
    // Six hosts: the gateway, the VIP, and four more.
    c.network("--subnet 10.75.0.0/29 small")?;
    let create = "service create --detach --name many --replicas 6 --network small \
                  --runtime process -- sleep infinity";
    c.meshctl("m1", create)?.ok()?;
    let waiting = eventually("a task that waits for an address", SOON, || {
        let waiting =
            c.tasks("many")?.into_iter().find(|t| t.state == "pending" || t.state == "new");
        let waiting = waiting.context("none waits")?;
        ensure!(!waiting.error.is_empty(), "{} gives no reason", waiting.name);
        Ok(waiting)
    })?;
    ensure!(waiting.error.contains("small"), "the reason names no network: {:?}", waiting.error);
    let ps = c.meshctl("m1", "service ps --no-trunc many")?.ok()?;
    ensure!(ps.contains(&waiting.error), "service ps lacks {:?}:\n{ps}", waiting.error);
    let stock = c.docker("m1", "service ps --no-trunc many")?.ok()?;
    ensure!(stock.contains(&waiting.error), "docker lacks {:?}:\n{stock}", waiting.error);
    c.wait_running("many", 4)?;
    // Room again: what waited runs.
    c.scale("many", 2)?;
    c.scale("many", 4).map(drop)
}
