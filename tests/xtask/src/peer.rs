//! What the demo's overlay is measured against: a bridge and a VXLAN device per node, two nodes on
//! the same underlay switch as the lab's, one task on each.

use anyhow::{Context, Result};

use crate::shell::output;

/// The address that the peer's server listens on.
pub(crate) const SERVER: &str = "10.231.77.2";
const UNDERLAY: [&str; 2] = ["192.0.2.201", "192.0.2.202"];
const TASKS: [&str; 2] = ["10.231.77.1", SERVER];

/// Four namespaces, gone when dropped.
#[derive(Debug)]
pub(crate) struct BridgeVxlan {
    lab: String,
}

impl Drop for BridgeVxlan {
    fn drop(&mut self) {
        for side in 0..2 {
            for netns in [self.task(side), self.node(side)] {
                let _ = output("ip", &["netns", "del", &netns]);
            }
        }
    }
}

impl BridgeVxlan {
    /// Builds it on the switch of lab `lab`.
    pub(crate) fn build(lab: &str) -> Result<Self> {
        let peer = Self { lab: lab.to_owned() };
        for side in 0..2 {
            peer.build_side(side).context("build the bridge+VXLAN to compare with")?;
        }
        Ok(peer)
    }

    fn node(&self, side: usize) -> String {
        format!("{}-peer-node{side}", self.lab)
    }

    /// The namespace of a task of the peer; 1 is the server's.
    pub(crate) fn task(&self, side: usize) -> String {
        format!("{}-peer-task{side}", self.lab)
    }

    fn build_side(&self, side: usize) -> Result<()> {
        let (node, task) = (self.node(side), self.task(side));
        let (node, task) = (node.as_str(), task.as_str());
        let router = format!("{}-router", self.lab);
        let port = format!("peer{side}");
        let underlay = format!("{}/24", UNDERLAY[side]);
        let address = format!("{}/24", TASKS[side]);
        for netns in [node, task] {
            let _ = output("ip", &["netns", "del", netns]);
            ip(&format!("netns add {netns}"))?;
        }
        ip(&format!(
            "-n {router} link add {port} master underlay type veth peer eth0 netns {node}"
        ))?;
        ip(&format!("-n {router} link set {port} up"))?;
        ip(&format!("-n {node} addr add {underlay} dev eth0"))?;
        ip(&format!("-n {node} link set eth0 up"))?;
        ip(&format!("-n {node} link add br0 type bridge"))?;
        ip(&format!(
            "-n {node} link add vxlan0 type vxlan id 77 dstport 4789 local {} remote {} dev eth0",
            UNDERLAY[side],
            UNDERLAY[1 - side]
        ))?;
        ip(&format!(
            "-n {node} link add task0 mtu 1450 type veth peer eth0 mtu 1450 netns {task}"
        ))?;
        for port in ["vxlan0", "task0"] {
            ip(&format!("-n {node} link set {port} master br0 up"))?;
        }
        ip(&format!("-n {node} link set br0 up"))?;
        ip(&format!("-n {task} addr add {address} dev eth0"))?;
        ip(&format!("-n {task} link set eth0 up"))
    }
}

fn ip(words: &str) -> Result<()> {
    output("ip", &words.split_whitespace().collect::<Vec<_>>()).map(drop)
}
