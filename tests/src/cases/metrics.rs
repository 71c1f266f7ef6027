//! What nodes count, as Prometheus reads it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use mesh_lab::http;

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("metrics": what_happens_is_counted, names_are_those_listed, the_cluster_is_counted,
    scrapers_have_an_address_of_their_own);

/// A node's metrics, by name and labels as they are written.
type Samples = BTreeMap<String, f64>;

fn scrape(c: &Cluster, node: &str) -> Result<Samples> {
    let socket = c.lab.places().socket(node);
    let answer = http::send(&socket, "GET", "/metrics", b"", Duration::from_secs(10))?;
    ensure!(answer.status == 200, "{}", answer.status);
    parse(&String::from_utf8_lossy(&answer.body))
}

/// Reads the text form strictly: every sample is of a family that was declared before it, of no
/// other's, and its labels are well-formed.
fn parse(text: &str) -> Result<Samples> {
    let mut samples = Samples::new();
    let mut declared = BTreeMap::new();
    let body = text.strip_suffix("# EOF\n").context("no end")?;
    for line in body.lines() {
        if let Some(words) = line.strip_prefix("# TYPE ") {
            let (name, kind) = words.split_once(' ').context("a type without a name")?;
            ensure!(declared.insert(name, kind).is_none(), "{name} is declared twice");
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').with_context(|| format!("bad: {line}"))?;
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let family = ["_total", "_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix).filter(|n| declared.contains_key(n)))
                .unwrap_or(name);
            match declared.get(family) {
                Some(&"counter") => ensure!(name == format!("{family}_total"), "{line}"),
                Some(&"gauge") => ensure!(name == family, "{line}"),
                Some(&"histogram") => ensure!(name != family, "{line}"),
                other => bail!("{line}: declared as {other:?}"),
            }
            let labels = labels.strip_suffix('}').with_context(|| format!("bad: {line}"))?;
            for label in labels.split("\",").filter(|label| !label.is_empty()) {
                let (name, _) = label.split_once("=\"").with_context(|| format!("bad: {line}"))?;
                ensure!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{line}");
            }
            let value = value.parse().with_context(|| format!("bad: {line}"))?;
            ensure!(samples.insert(series.to_owned(), value).is_none(), "twice: {line}");
        }
    }
    Ok(samples)
}

fn value(samples: &Samples, series: &str) -> f64 {
    samples.get(series).copied().unwrap_or_default()
}

/// Waits until a series of a node has grown by so much since `before`.
fn grown(c: &Cluster, node: &str, before: &Samples, series: &str, by: f64) -> Result<()> {
    eventually(&format!("{series} of {node} to grow"), SOON, || {
        let grown = value(&scrape(c, node)?, series) - value(before, series);
        ensure!(grown >= by, "it grew by {grown}");
        Ok(())
    })
}

fn what_happens_is_counted(c: &Cluster) -> Result<()> {
    c.network("--subnet 10.76.0.0/24 app")?;
    c.service("--name each --mode global --network app", "sleep infinity")?;
    let task = c.wait_running("each", 5)?.pop().context("no task")?;
    let before = scrape(c, &task.node)?;
    let ping = ["ping", "-b", "-c", "5", "-i", "0.02", "-W", "1", "-I", "eth0", "10.76.0.255"];
    c.in_task(&task.id, &ping)?;
    c.in_task(&task.id, &["dig", "+short", "+time=2", "tasks.each"])?.ok()?;
    let dropped = "mesh_overlay_drops_total{reason=\"multicast\"}";
    grown(c, &task.node, &before, dropped, 5.0)?;
    grown(c, &task.node, &before, "mesh_dns_queries_total", 1.0)?;
    grown(c, &task.node, &before, "mesh_probe_datagrams_total{direction=\"in\"}", 1.0)?;
    let rounds = "mesh_reconciler_rounds_total{loop=\"dataplane\",result=\"done\"}";
    grown(c, &task.node, &before, rounds, 1.0)?;
    let scrapes = "mesh_api_requests_total{method=\"GET\",route=\"/metrics\",code=\"200\"}";
    grown(c, &task.node, &before, scrapes, 1.0)
}

fn the_cluster_is_counted(c: &Cluster) -> Result<()> {
    let leader = c.leader("m1")?;
    let before = scrape(c, &leader)?;
    ensure!(value(&before, "swarm_manager_leader") == 1.0 && before["mesh_raft_quorum"] == 1.0);
    ensure!(value(&before, "swarm_manager_nodes{state=\"ready\"}") == 5.0);
    ensure!(value(&before, "mesh_raft_members{kind=\"voter\"}") == 3.0);
    let constraint = format!("node.hostname=={leader}");
    let options = ["--name", "bad", "--restart-condition", "none", "--constraint", &constraint];
    c.service_args(&options, &["sh", "-c", "exit 3"])?;
    grown(c, &leader, &before, "mesh_task_exits_total{result=\"failed\"}", 1.0)?;
    grown(c, &leader, &before, "swarm_manager_tasks_total{state=\"failed\"}", 1.0)?;
    grown(c, &leader, &before, "swarm_manager_services_total", 1.0)?;
    grown(c, &leader, &before, "swarm_raft_transaction_latency_seconds_count", 1.0)?;
    // What a worker does not know is not there, rather than zero.
    let worker = scrape(c, "w1")?;
    ensure!(value(&worker, "swarm_node_manager") == 0.0 && worker["mesh_gossip_members"] == 4.0);
    let known = worker.keys().find(|s| s.starts_with("swarm_manager_") || s.contains("_raft_term"));
    ensure!(known.is_none(), "{known:?} on a worker");
    Ok(())
}

fn names_are_those_listed(c: &Cluster) -> Result<()> {
    let listed = include_str!("../../../dist/metrics.md");
    let listed: BTreeSet<&str> =
        listed.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let samples = scrape(c, "m1")?;
    for series in samples.keys() {
        let name = series.split('{').next().unwrap_or_default();
        let of = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        ensure!(listed.contains(name) || of.is_some_and(|n| listed.contains(n)), "{series}");
    }
    // Labels are of few words: what there is to scrape does not grow with the cluster.
    ensure!(samples.len() < 1000, "{} series", samples.len());
    Ok(())
}

/// The plan's daemons serve there too. Nothing else is there.
fn scrapers_have_an_address_of_their_own(c: &Cluster) -> Result<()> {
    let ask = |extra: &[&str], path: &str| {
        let url = format!("http://192.0.2.21:9323{path}");
        let curl = ["curl", "-s", "-m", "10", "-w", "%{http_code}"];
        c.on("client", &[&curl[..], extra, &[&url]].concat())?.ok()
    };
    let text = ask(&[], "/metrics")?;
    parse(text.strip_suffix("200").context(text.clone())?.trim_start())?;
    for (extra, path, status) in [
        (&["-X", "POST"][..], "/metrics", "405"),
        (&[], "/nodes", "404"),
        (&["-X", "POST"], "/swarm/leave", "404"),
    ] {
        let answer = ask(extra, path)?;
        ensure!(answer.ends_with(status), "{path}: {answer}");
    }
    Ok(())
}
