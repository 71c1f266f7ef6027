//! The mesh side: a lab of its own, with idle tasks whose namespaces the workloads run in.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    peers::Path,
    shell::{Netns, sh},
};

/// The lab's name.
const LAB: &str = "bench";
/// What the mesh publishes for the connection workload.
pub(crate) const PUBLISHED: u16 = 17_002;

/// A running lab, gone when dropped.
#[derive(Debug)]
pub(crate) struct Cluster {
    meshctl: PathBuf,
    sockets: BTreeMap<String, PathBuf>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = sh(&format!("{} lab down --name {LAB}", self.meshctl.display()));
    }
}

impl Cluster {
    /// One manager, one worker, a network, idle tasks on both nodes, one server behind a VIP and a
    /// published port.
    pub(crate) fn up(mtu: u32, via_device: bool) -> Result<Self> {
        let exe = std::env::current_exe()?;
        let meshctl = exe.with_file_name("meshctl");
        let ctl = meshctl.display();
        let _ = sh(&format!("{ctl} lab down --name {LAB}"));
        let option = if via_device { " --meshd-arg=--vxlan-via-device" } else { "" };
        sh(&format!("{ctl} lab up --name {LAB} --managers 1 --workers 1 --mtu {mtu}{option}"))?;
        let mut cluster = Self { meshctl, sockets: BTreeMap::new() };
        let rows: Vec<Value> =
            serde_json::from_str(&cluster.ctl("lab ps --name bench --format json")?)?;
        for row in rows {
            if let (Some(name), Some(socket)) = (row["name"].as_str(), row["socket"].as_str()) {
                cluster.sockets.insert(name.to_owned(), socket.into());
            }
        }
        let create = "--runtime process -q";
        cluster.on_m1("network create -d overlay app")?;
        cluster.on_m1(&format!(
            "service create --name idle --mode global --network app {create} -- sleep infinity"
        ))?;
        cluster.on_m1(&format!(
            "service create --name server --replicas 1 --network app --publish {PUBLISHED}:7002 \
             {create} -- sleep infinity"
        ))?;
        Ok(cluster)
    }

    fn ctl(&self, rest: &str) -> Result<String> {
        sh(&format!("{} {rest}", self.meshctl.display()))
    }

    fn on_m1(&self, rest: &str) -> Result<String> {
        self.ctl(&format!("--host unix://{} {rest}", self.socket("m1")?.display()))
    }

    fn socket(&self, node: &str) -> Result<&PathBuf> {
        self.sockets.get(node).with_context(|| format!("the lab has no node {node}"))
    }

    fn get(&self, path: &str) -> Result<Value> {
        let mut stream = UnixStream::connect(self.socket("m1")?)?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: mesh\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
        serde_json::from_str(body).with_context(|| format!("GET {path}: {answer}"))
    }

    /// Namespace, address and node of each running task of a service.
    fn tasks(&self, service: &str) -> Result<Vec<Task>> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let tasks = self.running(service)?;
            if !tasks.is_empty() {
                return Ok(tasks);
            }
            ensure!(Instant::now() < deadline, "no task of {service} runs after 20 s");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn running(&self, service: &str) -> Result<Vec<Task>> {
        let services = self.get("/services")?;
        let nodes = self.get("/nodes")?;
        let id = services
            .as_array()
            .into_iter()
            .flatten()
            .find(|s| s["Spec"]["Name"] == service)
            .map(|s| s["ID"].clone())
            .with_context(|| format!("no service {service}"))?;
        let hostname = |id: &Value| {
            nodes
                .as_array()
                .into_iter()
                .flatten()
                .find(|n| n["ID"] == *id)
                .and_then(|n| n["Description"]["Hostname"].as_str().map(str::to_owned))
        };
        let all = self.get("/tasks")?;
        let mut tasks = Vec::new();
        for task in all.as_array().into_iter().flatten() {
            if task["ServiceID"] != id || task["Status"]["State"] != "running" {
                continue;
            }
            let pid = task["Status"]["ContainerStatus"]["PID"].as_u64();
            let address = task["NetworksAttachments"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|a| a["Network"]["Spec"]["Name"] == "app")
                .and_then(|a| a["Addresses"][0].as_str())
                .and_then(|a| a.split('/').next())
                .map(str::to_owned);
            if let (Some(pid), Some(address), Some(node)) =
                (pid, address, hostname(&task["NodeID"]))
            {
                tasks.push(Task {
                    netns: Netns(format!("/proc/{pid}/ns/net").into()),
                    address,
                    node,
                });
            }
        }
        Ok(tasks)
    }

    /// The paths to measure: direct, by VIP, and through the mesh from outside.
    pub(crate) fn paths(&self) -> Result<[Path; 3]> {
        let server = self.tasks("server")?.pop().context("the server has no task")?;
        let deadline = Instant::now() + Duration::from_secs(20);
        let client = loop {
            let found = self.tasks("idle")?.into_iter().find(|task| task.node != server.node);
            if let Some(client) = found {
                break client;
            }
            ensure!(Instant::now() < deadline, "no idle task on the other node after 20 s");
            std::thread::sleep(Duration::from_millis(100));
        };
        let services = self.get("/services")?;
        let vip = services
            .as_array()
            .into_iter()
            .flatten()
            .find(|s| s["Spec"]["Name"] == "server")
            .and_then(|s| s["Endpoint"]["VirtualIPs"].as_array().cloned())
            .into_iter()
            .flatten()
            .filter_map(|v| v["Addr"].as_str().map(str::to_owned))
            .find_map(|v| same_net(&v, &server.address))
            .context("the server has no VIP on the network")?;
        let ingress = if client.node == "m1" { "192.0.2.11" } else { "192.0.2.21" };
        let path = |name, client: &Netns, to: &str| Path {
            name,
            client: client.clone(),
            server: server.netns.clone(),
            to: to.to_owned(),
        };
        Ok([
            path("mesh", &client.netns, &server.address),
            path("mesh, VIP", &client.netns, &vip),
            path("mesh, published port", &Netns::named(&format!("{LAB}-client")), ingress),
        ])
    }
}

/// The address of `vip` (`10.0.1.2/24`) if it shares its first three bytes with `address`.
fn same_net(vip: &str, address: &str) -> Option<String> {
    let vip = vip.split('/').next()?;
    (vip.rsplit_once('.')?.0 == address.rsplit_once('.')?.0).then(|| vip.to_owned())
}

#[derive(Debug)]
struct Task {
    netns: Netns,
    address: String,
    node: String,
}
