//! What events happen to: the cluster of a lab with service `web` on network `app`, published on
//! port 8080.

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_lab::{DaemonSignal, Lab};
use mesh_tests::{
    cluster::{Cluster, WHOAMI, eventually, list},
    load::{Load, Outcome, RATE, Report, Request},
};

/// The service under load.
pub(crate) const SERVICE: &str = "web";
/// Its tasks: one on each node of the lab.
pub(crate) const REPLICAS: usize = 5;
const PORT: u16 = 8080;
/// A roll-out of few tasks, draining and all, on a busy machine; so may a node come back.
const PATIENCE: Duration = Duration::from_secs(90);

/// A cluster under test.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
}

/// A task of the service, as found on its node.
#[derive(Debug, Clone)]
pub(crate) struct Spot {
    pub(crate) id: String,
    pub(crate) pid: u64,
    pub(crate) address: Ipv4Addr,
}

impl Bed {
    /// The cluster of a lab that is up, with its service.
    pub(crate) fn of(lab: Lab) -> Self {
        Self { cluster: Cluster::new(lab, Duration::ZERO) }
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.cluster.lab
    }

    /// Makes network and service.
    pub(crate) fn furnish(&self) -> Result<()> {
        self.cluster.network("app")?;
        let options =
            format!("--name {SERVICE} --replicas {REPLICAS} --network app --publish {PORT}:80");
        self.cluster.service(&options, WHOAMI)
    }

    /// Tells whoever waits what goes on.
    pub(crate) fn step(&self, what: &str) {
        eprintln!("{what}");
    }

    /// Waits until nothing of an earlier event is felt any more.
    pub(crate) fn settle(&self) -> Result<()> {
        self.step("waiting for a cluster at rest");
        eventually("all nodes to be ready and to follow one leader", PATIENCE, || {
            let nodes = self.cluster.api("GET", "/nodes")?;
            for node in list(&nodes) {
                let ready = node["Status"]["State"] == "ready";
                let manager = &node["ManagerStatus"];
                let reachable = manager.is_null() || manager["Reachability"] == "reachable";
                ensure!(ready && reachable, "{} is not", node["Description"]["Hostname"]);
            }
            self.leader().map(drop)
        })?;
        self.wait_for_replicas(REPLICAS)?;
        eventually("every node to answer the client", PATIENCE, || {
            for node in self.lab().nodes() {
                self.cluster.fetch("client", &format!("http://{}:{PORT}/", node.address))?;
            }
            Ok(())
        })
    }

    /// The same, with a task on every node: the scheduler spreads new ones. It puts none on a node
    /// that it has not heard for two seconds, as after a change of leaders; so it may take a second
    /// roll-out.
    pub(crate) fn settle_spread(&self) -> Result<()> {
        self.settle()?;
        eventually("a task on every node", PATIENCE, || {
            let tasks = self.cluster.running(SERVICE)?;
            let on: BTreeSet<_> = tasks.into_iter().map(|task| task.node).collect();
            if on.len() == REPLICAS {
                return Ok(());
            }
            self.step("spreading the tasks again");
            self.roll("--update-parallelism 0")?;
            anyhow::bail!("the tasks were on {on:?} alone")
        })
    }

    /// Waits until exactly so many tasks run and none is on its way to its end.
    pub(crate) fn wait_for_replicas(&self, count: usize) -> Result<()> {
        self.cluster.wait_replaced(SERVICE, count, &BTreeSet::new(), PATIENCE)
    }

    /// Replaces all tasks, and waits until the old ones have ended.
    pub(crate) fn roll(&self, options: &str) -> Result<()> {
        let old: BTreeSet<_> =
            self.cluster.running(SERVICE)?.into_iter().map(|task| task.id).collect();
        let update = format!("service update --detach --force {options} {SERVICE}");
        self.cluster.meshctl("m1", &update)?.ok()?;
        self.cluster.wait_replaced(SERVICE, old.len(), &old, PATIENCE)
    }

    /// Changes the number of tasks, and waits until it is so.
    pub(crate) fn scale(&self, count: usize) -> Result<()> {
        self.cluster.meshctl("m1", &format!("service scale --detach {SERVICE}={count}"))?.ok()?;
        self.wait_for_replicas(count)
    }

    /// The name of the leader.
    pub(crate) fn leader(&self) -> Result<String> {
        self.cluster.leader("m1")
    }

    /// All nodes but one: their names.
    pub(crate) fn all_but(&self, node: &str) -> Vec<String> {
        let names = self.lab().nodes().into_iter().map(|node| node.name);
        names.filter(|name| name != node).collect()
    }

    /// The task on a node.
    pub(crate) fn spot(&self, node: &str) -> Result<Spot> {
        let tasks = self.cluster.running(SERVICE)?;
        let task = tasks.into_iter().find(|task| task.node == node);
        let task = task.with_context(|| format!("no task on {node}"))?;
        let detail = self.cluster.api("GET", &format!("/tasks/{}", task.id))?;
        let pid = detail["Status"]["ContainerStatus"]["PID"].as_u64();
        let address = task.addresses.get("app").and_then(|address| address.parse().ok());
        Ok(Spot {
            pid: pid.with_context(|| format!("{} has no process", task.name))?,
            address: address.with_context(|| format!("{} has no address", task.name))?,
            id: task.id,
        })
    }

    /// Load through all nodes.
    pub(crate) fn load(&self) -> Result<Load> {
        self.load_past("")
    }

    /// Load through all nodes but one.
    pub(crate) fn load_past(&self, node: &str) -> Result<Load> {
        let nodes = self.lab().nodes().into_iter().filter(|one| one.name != node);
        let addresses: Vec<_> = nodes.map(|node| node.address).collect();
        let load = Load::through(&self.cluster, &addresses, PORT, RATE)?;
        put_first("load")?;
        pause();
        Ok(load)
    }

    /// The resolver's process on a node.
    pub(crate) fn resolver(&self, node: &str) -> Result<i32> {
        let control = self.lab().places().state_dir(node).join("dns");
        let control = control.display().to_string();
        for entry in fs::read_dir("/proc").context("read /proc")?.filter_map(Result::ok) {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            let ours = words.iter().any(|word| String::from_utf8_lossy(word).starts_with(&control));
            if ours && words.get(1) == Some(&b"dns".as_slice()) {
                return Ok(pid);
            }
        }
        Err(anyhow::anyhow!("no resolver runs on {node}"))
    }
}

/// Puts this process's threads of a name before all others on the machine's processors: a client
/// that waits for one itself would see gaps that are its own.
pub(crate) fn put_first(name: &str) -> Result<()> {
    for thread in fs::read_dir("/proc/self/task").context("list threads")?.filter_map(Result::ok) {
        let is = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
        if is.trim() == name {
            let id = thread.file_name();
            let renice = Command::new("renice").args(["-n", "-5", "-p"]).arg(id).output();
            let done = renice.context("run renice")?;
            ensure!(done.status.success(), "renice: {}", String::from_utf8_lossy(&done.stderr));
        }
    }
    Ok(())
}

/// So that what goes before and after an event is seen to pass.
pub(crate) fn pause() {
    thread::sleep(Duration::from_millis(500));
}

/// Does `work` while a node is away, and brings the node back whatever came of it.
pub(crate) fn and_back<T>(lab: &Lab, node: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = work();
    lab.start(node)?;
    done
}

/// Kills a daemon; the time is that of the kill.
pub(crate) fn kill(lab: &Lab, node: &str) -> Result<Instant> {
    let begin = Instant::now();
    lab.end_daemon(node, DaemonSignal::Kill)?;
    Ok(begin)
}

/// By then every balancer must long have noticed that somebody is away, and tasks do not move yet.
pub(crate) const NOTICED: Duration = Duration::from_secs(10);

/// How long after `at` the last request began that went where nobody is: it failed, or its first
/// packet was lost, which takes a client a second to notice. Some of them are told. What begins
/// after `within` has other reasons.
pub(crate) fn last_astray(report: &Report, at: Duration, within: Duration) -> Duration {
    const RETRY: Duration = Duration::from_millis(900);
    const TOLD_MAX: usize = 5;
    let astray = |request: &&Request| {
        let lost = request.outcome != Outcome::Ok || request.latency > RETRY;
        lost && (at..at + within).contains(&request.start)
    };
    let astray: Vec<_> = report.requests.iter().filter(astray).collect();
    for request in astray.iter().rev().take(TOLD_MAX).rev() {
        let after = request.start.as_secs_f64() - at.as_secs_f64();
        eprintln!("   astray {after:.3} s after: {request}");
    }
    astray.last().map(|request| request.start).unwrap_or_default().saturating_sub(at)
}
