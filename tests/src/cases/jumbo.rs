//! An underlay with jumbo frames: overlays use all of it.

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("jumbo": tasks_have_the_underlays_mtu, requests_and_answers_pass);

/// 9000 less Ethernet, VXLAN, UDP and IPv4 headers.
const MTU: u32 = 8950;

fn tasks_have_the_underlays_mtu(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name each --mode global --network app", "sleep infinity")?;
    let tasks = c.wait_running("each", c.lab.nodes().len())?;
    for task in &tasks {
        for link in ["eth0", "gw0"] {
            let mtu = c.task_sh(&task.id, &format!("cat /sys/class/net/{link}/mtu"))?;
            ensure!(mtu == MTU.to_string(), "{link} of {} has an MTU of {mtu}", task.name);
        }
    }
    let [from, to] = &tasks[..] else { anyhow::bail!("not two tasks: {tasks:?}") };
    let address = to.addresses.get("app").context("a task without an address")?;
    let ping = |size: u32| {
        let size = (size - 28).to_string();
        c.in_task(&from.id, &["ping", "-c1", "-W1", "-M", "do", "-s", &size, address])
    };
    eventually("a packet of 8950 bytes to pass", SOON, || ping(MTU)?.ok())?;
    ensure!(ping(MTU + 1)?.status != 0, "a packet of 8951 bytes passes");
    Ok(())
}

fn requests_and_answers_pass(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 8080:80 --publish 8007:7")?;
    c.shell()?;
    for _ in 0..4 {
        let length = eventually("20 MB through the VIP", SOON, || {
            c.task_sh("shell.1", "curl -s --max-time 10 'http://web/?size=20MB' | wc -c")
        })?;
        ensure!(length.parse::<u64>().is_ok_and(|n| n >= 20_000_000), "{length} bytes came");
    }
    for node in c.lab.nodes() {
        let script = format!(
            "exec 3<>/dev/tcp/{}/8007; read -r -u3 who; (head -c 5000000 /dev/zero >&3) & \
             head -c 5000000 <&3 | wc -c",
            node.address
        );
        let length = eventually(&format!("5 MB through {}", node.name), SOON, || {
            c.on("client", &["timeout", "10", "bash", "-c", &script])?.ok()
        })?;
        ensure!(length == "5000000", "{length} bytes came back through {}", node.name);
    }
    Ok(())
}
