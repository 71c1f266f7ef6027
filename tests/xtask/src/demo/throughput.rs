//! The demo's overlay beside a bridge and a VXLAN device per node, in one run.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Demo, LAB, PATIENCE, REPLICAS};
use crate::{
    peer::{self, BridgeVxlan},
    shell::{eventually, output},
};

/// Interleaved rounds, and the length of each.
const ROUNDS: usize = 3;
const ROUND_SECONDS: &str = "2";

impl Demo {
    /// The server's node, and a client task elsewhere; peers in turn, medians.
    pub(super) fn throughput(&self) -> Result<String> {
        let node_of = |task: &str| self.in_task(task, &["sh", "-c", "echo $MESH_NODE"]);
        let server_node = node_of("iperf.1")?;
        let client = (1..=REPLICAS)
            .map(|n| format!("web.{n}"))
            .find(|task| node_of(task).is_ok_and(|node| node != server_node));
        let client = client.context("no task of web is on another node than the server")?;
        let bridge = BridgeVxlan::build(LAB)?;
        let _server = Background::start("ip", &["netns", "exec", &bridge.task(1), "iperf3", "-s"])?;
        let bridge_client = bridge.task(0);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(gbits(eventually(PATIENCE, || {
                self.in_task(&client, &["iperf3", "-J", "-t", ROUND_SECONDS, "-c", "tasks.iperf"])
            })?)?);
            theirs.push(gbits(eventually(PATIENCE, || {
                let head = ["netns", "exec", &bridge_client];
                output(
                    "ip",
                    &[&head[..], &["iperf3", "-J", "-t", ROUND_SECONDS, "-c", peer::SERVER]]
                        .concat(),
                )
            })?)?);
        }
        let (ours, theirs) = (median(ours), median(theirs));
        Ok(format!("{ours:.1} against {theirs:.1} Gbit/s, {:.2} times", ours / theirs))
    }
}

/// What iperf3 says was received.
fn gbits(report: String) -> Result<f64> {
    let report: Value = serde_json::from_str(&report).context("iperf3's report")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3: {}", report["error"]))? / 1e9)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A process that ends with this.
struct Background(Child);

impl Background {
    fn start(program: &str, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("start {program}"))?))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
