//! What a cluster does when all is well: nodes, names, balancing, the mesh, the world outside.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{CLIENT, Demo, LAB, NODES, PATIENCE, REPLICAS};
use crate::shell::{eventually, output};

const REQUESTS: usize = 50;

impl Demo {
    pub(super) fn nodes_ready(&self, took: Duration) -> Result<String> {
        let socket = format!("/run/mesh-lab/{LAB}/m1.sock");
        let listed = output("curl", &["-sfS", "--unix-socket", &socket, "http://mesh/nodes"])?;
        let nodes: Value = serde_json::from_str(&listed).context("the list of nodes")?;
        let ready = nodes.as_array().map_or(0, |list| {
            list.iter().filter(|node| node["Status"]["State"] == "ready").count()
        });
        ensure!(ready == NODES.len(), "{ready} of {}", NODES.len());
        ensure!(took < Duration::from_secs(10), "{ready}, but only after {took:.1?}");
        Ok(format!("{ready} of {} in {:.1} s", NODES.len(), took.as_secs_f64()))
    }

    pub(super) fn create(&self) -> Result<String> {
        let begin = Instant::now();
        self.on("m1", &["meshctl", "network", "create", "--driver", "overlay", "app"])?;
        let replicas = REPLICAS.to_string();
        self.service(
            &["--name", "web", "--replicas", &replicas, "--publish", "8080:80"],
            &["meshctl", "whoami", "--http", "80"],
        )?;
        self.service(&["--name", "iperf", "--replicas", "1"], &["iperf3", "-s"])?;
        Ok(format!("{REPLICAS} replicas run after {:.1} s", begin.elapsed().as_secs_f64()))
    }

    fn service(&self, options: &[&str], command: &[&str]) -> Result<()> {
        let head =
            ["meshctl", "service", "create", "-q", "--runtime", "process", "--network", "app"];
        self.on("m1", &[&head, options, &["--"], command].concat()).map(drop)
    }

    pub(super) fn name_resolves(&self) -> Result<String> {
        eventually(PATIENCE, || {
            let vip = self.in_task("iperf.1", &["dig", "+short", "+time=1", "web"])?;
            let tasks = self.in_task("iperf.1", &["dig", "+short", "+time=1", "tasks.web"])?;
            let tasks: BTreeSet<_> = tasks.lines().collect();
            ensure!(vip.lines().count() == 1, "`web` is {vip:?}, not one address");
            ensure!(!tasks.contains(vip.as_str()), "`web` is {vip}, the address of a task");
            ensure!(tasks.len() == REPLICAS, "`tasks.web` has {} addresses", tasks.len());
            Ok(format!("web is {vip}; tasks.web is {} other addresses", tasks.len()))
        })
    }

    pub(super) fn spread(&self) -> Result<String> {
        let script = format!(
            "for i in $(seq {REQUESTS}); do curl -s --max-time 5 http://web/ || exit 1; echo; done"
        );
        let answers = eventually(PATIENCE, || self.in_task("iperf.1", &["sh", "-c", &script]))?;
        let mut tasks = BTreeMap::<String, usize>::new();
        let mut nodes = BTreeSet::new();
        for line in answers.lines().filter(|line| !line.trim().is_empty()) {
            let answer: Value = serde_json::from_str(line).with_context(|| format!("{line:?}"))?;
            *tasks.entry(text(&answer, "task")?).or_default() += 1;
            nodes.insert(text(&answer, "node")?);
        }
        let answered: usize = tasks.values().sum();
        ensure!(answered == REQUESTS, "{answered} of {REQUESTS} requests answered");
        ensure!(tasks.len() > 1 && nodes.len() > 1, "all by {tasks:?} on {nodes:?}");
        let counts: Vec<_> = tasks.values().map(usize::to_string).collect();
        Ok(format!(
            "{answered} by {} tasks on {} nodes: {}",
            tasks.len(),
            nodes.len(),
            counts.join(" ")
        ))
    }

    pub(super) fn mesh(&self) -> Result<String> {
        let mut slowest = Duration::ZERO;
        for (node, address) in NODES {
            let url = format!("http://{address}:8080/");
            let answer = eventually(PATIENCE, || {
                let begin = Instant::now();
                let said = self.on("client", &["curl", "-sS", "--max-time", "5", &url]);
                let said = said.with_context(|| format!("through {node}"))?;
                slowest = slowest.max(begin.elapsed());
                serde_json::from_str::<Value>(&said).with_context(|| format!("{said:?}"))
            })?;
            let seen = text(&answer, "client")?;
            ensure!(
                seen.starts_with(&format!("{CLIENT}:")),
                "through {node} the client is seen as {seen}, not {CLIENT}"
            );
        }
        let ms = slowest.as_millis();
        Ok(format!("through {n} of {n} nodes, seen as {CLIENT}, at most {ms} ms", n = NODES.len()))
    }

    pub(super) fn outside(&self) -> Result<String> {
        let url = "http://www.example.test/";
        let said = eventually(PATIENCE, || {
            self.in_task("iperf.1", &["curl", "-sS", "-4", "--max-time", "5", url])
        })?;
        let answer: Value = serde_json::from_str(&said).with_context(|| format!("{said:?}"))?;
        let seen = text(&answer, "client")?;
        let address = seen.rsplit_once(':').map_or(seen.as_str(), |(address, _)| address);
        let node = NODES.iter().find(|(_, a)| *a == address);
        let (node, _) =
            node.with_context(|| format!("seen there as {address}, which is no node"))?;
        Ok(format!("www.example.test by name; seen there as {address}, node {node}"))
    }
}

fn text(answer: &Value, field: &str) -> Result<String> {
    let text = answer[field].as_str().with_context(|| format!("no {field:?} in {answer}"))?;
    Ok(text.to_owned())
}
