//! Kernel state is held level: what is changed by hand comes back, what is not ours stays.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::group;
use crate::cluster::{Cluster, SOON, Task, eventually, list};

group!("heal": the_nft_table, links_and_addresses, map_entries,
    foreign_objects_stay, a_restart_changes_nothing);

/// A task of `each` on `w1` and its peer on `w2`, with packets passing.
fn set_up(c: &Cluster) -> Result<(Task, Task)> {
    c.network("app")?;
    c.service("--name each --mode global --network app --publish 8080:80", crate::cluster::WHOAMI)?;
    let tasks = c.wait_running("each", 5)?;
    let on = |node: &str| tasks.iter().find(|t| t.node == node).cloned().context("no task there");
    let pair = (on("w1")?, on("w2")?);
    works(c, &pair)?;
    Ok(pair)
}

/// Everything that needs kernel state on `w1` passes.
fn works(c: &Cluster, (from, to): &(Task, Task)) -> Result<()> {
    let address = to.addresses.get("app").context("a task without an address")?;
    eventually("overlay, VIP, mesh and the way out", SOON, || {
        c.in_task(&from.id, &["ping", "-c1", "-W1", address])?.ok()?;
        c.fetch_in_task(&from.id, "http://each/")?;
        c.in_task(&from.id, &["ping", "-c1", "-W1", "198.51.100.7"])?.ok()?;
        c.fetch("client", "http://192.0.2.21:8080/")
    })?;
    Ok(())
}

fn sh(c: &Cluster, script: &str) -> Result<String> {
    c.on("w1", &["sh", "-c", script])?.ok()
}

fn the_nft_table(c: &Cluster) -> Result<()> {
    let pair = set_up(c)?;
    let rules = || sh(c, "nft -s list ruleset");
    let before = rules()?;
    ensure!(before.contains("masquerade"), "{before}");
    for harm in ["nft flush ruleset", "nft flush table ip mesh || nft flush table inet mesh"] {
        sh(c, harm)?;
        eventually(&format!("the rules to be back after {harm:?}"), SOON, || {
            ensure!(rules()? == before, "now: {}", rules()?);
            Ok(())
        })?;
    }
    works(c, &pair)
}

fn links_and_addresses(c: &Cluster) -> Result<()> {
    let pair = set_up(c)?;
    let links = || sh(c, "ip -br link show type vxlan; ip -br link show type veth | grep ^mv");
    let names = |text: &str| -> Vec<String> {
        let mut names: Vec<_> = text
            .lines()
            .filter_map(|line| line.split(['@', ' ']).next().map(str::to_owned))
            .collect();
        names.sort();
        names
    };
    let before = names(&links()?);
    ensure!(before.len() >= 3, "a VXLAN device and two veths at least: {before:?}");
    for harm in [
        "ip link del $(ip -br link show type vxlan | cut -d' ' -f1)",
        "for l in $(ip -br link show type veth | grep -o '^mv[0-9a-f]*'); do ip link set $l down; done",
    ] {
        sh(c, harm)?;
        eventually(&format!("the links to be back after {harm:?}"), SOON, || {
            let (now, text) = (names(&links()?), links()?);
            ensure!(now == before && !text.contains("DOWN"), "{before:?}, now {text}");
            Ok(())
        })?;
        works(c, &pair)?;
    }
    // Inside the task: its address and its default route.
    let (task, _) = &pair;
    c.task_sh(&task.id, "ip addr flush dev eth0; ip route del default")?;
    works(c, &pair)
}

fn map_entries(c: &Cluster) -> Result<()> {
    let pair = set_up(c)?;
    let pins = format!("/sys/fs/bpf/mesh/{}/w1", c.lab.name());
    for map in ["ENDPOINTS", "PUBLISHED", "SERVICES", "VTEPS", "PORTS", "ADDRESSES"] {
        let pin = sh(c, &format!("find {pins} -name {map}"))?;
        let entries: Value =
            serde_json::from_str(&sh(c, &format!("bpftool -j map dump pinned {pin}"))?)?;
        let entry = list(&entries).first().with_context(|| format!("{map} is empty"))?;
        let key: Vec<_> = list(&entry["key"]).iter().filter_map(Value::as_str).collect();
        sh(c, &format!("bpftool map delete pinned {pin} key {}", key.join(" ")))?;
        let count = list(&entries).len();
        eventually(&format!("the entry to be back in {map}"), SOON, || {
            let now: Value =
                serde_json::from_str(&sh(c, &format!("bpftool -j map dump pinned {pin}"))?)?;
            ensure!(list(&now).len() == count, "{} of {count} entries", list(&now).len());
            Ok(())
        })?;
    }
    works(c, &pair)
}

fn foreign_objects_stay(c: &Cluster) -> Result<()> {
    let foreign = "ip link add foreign0 type veth peer foreign1 && \
        ip link set foreign1 up && ip addr add 10.250.0.1/24 dev foreign0 && \
        ip link set foreign0 up && ip route add 10.251.0.0/24 via 10.250.0.2 && \
        nft add table ip foreign && nft add chain ip foreign c";
    sh(c, foreign)?;
    let seen = || {
        sh(c, "ip -br addr show foreign0; ip route show 10.251.0.0/24; nft list table ip foreign")
    };
    let before = seen()?;
    let pair = set_up(c)?;
    c.lab.end_daemon("w1", mesh_lab::DaemonSignal::Kill)?;
    c.lab.start("w1")?;
    works(c, &pair)?;
    c.empty()?;
    let after = seen()?;
    sh(c, "ip link del foreign0; nft delete table ip foreign")?;
    ensure!(before == after, "before:\n{before}\nnow:\n{after}");
    Ok(())
}

/// A new daemon finds all as it should be: it replaces no link and no program.
fn a_restart_changes_nothing(c: &Cluster) -> Result<()> {
    let pair = set_up(c)?;
    let state = || sh(c, "ip -br link | sort; bpftool net show dev eth0");
    let before = state()?;
    c.lab.end_daemon("w1", mesh_lab::DaemonSignal::Kill)?;
    c.lab.start("w1")?;
    works(c, &pair)?;
    let after = state()?;
    ensure!(before == after, "before:\n{before}\nnow:\n{after}");
    Ok(())
}
