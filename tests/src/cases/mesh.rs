//! The routing mesh: published ports on every node, for clients outside.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_lab::topology::CLIENT;
use serde_json::Value;

use super::group;
use crate::cluster::{Cluster, SOON, eventually, field, host_of};

group!("mesh": every_node_answers_tcp, every_node_answers_udp, spread_over_tasks,
    the_task_is_addressed_itself, large_both_ways, many_at_once, a_taken_port_is_refused,
    removed_means_closed, nodes_reach_it_too, too_big_is_said, a_flow_outlives_the_daemons);

fn every_node_answers_tcp(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 8080:80")?;
    for node in c.lab.nodes() {
        let url = format!("http://{}:8080/", node.address);
        let answer = eventually(&format!("an answer through {}", node.name), SOON, || {
            c.fetch("client", &url)
        })?;
        let seen = field(&answer, "client")?;
        ensure!(host_of(&seen)? == CLIENT.to_string(), "through {} it is {seen}", node.name);
    }
    Ok(())
}

fn udp(c: &Cluster, from: &str, node: Ipv4Addr, port: u16) -> Result<Value> {
    c.lab.inside(from, || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        // Connected: an answer from another address than the one asked does not count.
        socket.connect(SocketAddrV4::new(node, port))?;
        socket.send(b"hello")?;
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).context("no answer by UDP")?;
        serde_json::from_slice(&buffer[..length]).context("no JSON by UDP")
    })
}

fn every_node_answers_udp(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 8007:7/udp")?;
    for node in c.lab.nodes() {
        let answer = eventually(&format!("UDP through {}", node.name), SOON, || {
            udp(c, "client", node.address, 8007)
        })?;
        let seen = field(&answer, "client")?;
        ensure!(host_of(&seen)? == CLIENT.to_string(), "through {} it is {seen}", node.name);
    }
    Ok(())
}

fn spread_over_tasks(c: &Cluster) -> Result<()> {
    c.web("--replicas 5 --publish 8080:80")?;
    eventually("all five tasks to answer through m1", SOON, || {
        let mut tasks = BTreeSet::new();
        for _ in 0..60 {
            tasks.insert(field(&c.fetch("client", "http://192.0.2.11:8080/")?, "task")?);
        }
        ensure!(tasks.len() == 5, "{tasks:?}");
        Ok(())
    })
}

/// Late DNAT: the task's own address and target port, whichever node was called.
fn the_task_is_addressed_itself(c: &Cluster) -> Result<()> {
    c.web("--replicas 1 --publish 8080:80")?;
    let answer = eventually("an answer", SOON, || c.fetch("client", "http://192.0.2.12:8080/"))?;
    let server = field(&answer, "server")?;
    ensure!(server.ends_with(":80"), "the task was called at {server}");
    ensure!(!server.starts_with("192.0.2."), "the task was called at {server}");
    Ok(())
}

fn large_both_ways(c: &Cluster) -> Result<()> {
    c.web("--replicas 1 --publish 8080:80 --publish 8007:7")?;
    let tasks = c.wait_running("web", 1)?;
    let nodes = c.lab.nodes();
    // A node without the task: both ways take the tunnel.
    let far = nodes.iter().find(|n| n.name != tasks[0].node).context("one node only")?;
    let script = format!("curl -s --max-time 20 'http://{}:8080/?size=20MB' | wc -c", far.address);
    let length =
        eventually("20 MB from the task", SOON, || c.on("client", &["sh", "-c", &script])?.ok())?;
    ensure!(length.parse::<u64>().is_ok_and(|n| n >= 20_000_000), "{length} bytes came");
    let script = format!(
        "exec 3<>/dev/tcp/{}/8007; read -r -u3 who; (head -c 5000000 /dev/zero >&3) & \
         head -c 5000000 <&3 | wc -c",
        far.address
    );
    let length = c.on("client", &["timeout", "30", "bash", "-c", &script])?.ok()?;
    ensure!(length == "5000000", "{length} bytes came back");
    Ok(())
}

fn many_at_once(c: &Cluster) -> Result<()> {
    c.web("--replicas 5 --publish 8080:80")?;
    eventually("an answer", SOON, || c.fetch("client", "http://192.0.2.11:8080/"))?;
    let script = "for i in $(seq 200); do echo http://192.0.2.1$((i % 3 + 1)):8080/; done | \
        xargs -P 20 -n 1 curl -s -o /dev/null -w '%{http_code}\\n' --max-time 10 | sort | uniq -c";
    let codes = c.on("client", &["sh", "-c", script])?.ok()?;
    ensure!(codes.split_whitespace().eq(["200", "200"]), "200 requests gave {codes:?}");
    Ok(())
}

fn a_taken_port_is_refused(c: &Cluster) -> Result<()> {
    c.web("--replicas 1 --publish 8080:80")?;
    let create = "service create --name late --publish 8080:81 --runtime process -- sleep 60";
    c.meshctl("m2", create)?.refused(&["8080", "web"])?;
    // The same number of another protocol is free.
    c.service("--name other --publish 8080:7/udp", crate::cluster::WHOAMI)
}

fn removed_means_closed(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 8080:80")?;
    eventually("an answer", SOON, || c.fetch("client", "http://192.0.2.11:8080/"))?;
    c.meshctl("m1", "service rm web")?.ok()?;
    eventually("every node to be closed", SOON, || {
        for node in c.lab.nodes() {
            let url = format!("http://{}:8080/", node.address);
            let ran = c.on("client", &["curl", "-s", "--max-time", "1", &url])?;
            ensure!(ran.status != 0, "{} still answers", node.name);
        }
        Ok(())
    })
}

fn nodes_reach_it_too(c: &Cluster) -> Result<()> {
    c.web("--replicas 1 --publish 8080:80")?;
    eventually("m1 to reach it through w2", SOON, || c.fetch("m1", "http://192.0.2.22:8080/"))?;
    Ok(())
}

/// The client's packets fill its link's MTU, the tunnel behind the port has room for less: the
/// client hears of it by ICMP "fragmentation needed", and only then is cut down to size.
fn too_big_is_said(c: &Cluster) -> Result<()> {
    c.web("--replicas 1 --publish 8080:80 --publish 8007:7/udp")?;
    let tasks = c.wait_running("web", 1)?;
    let nodes = c.lab.nodes();
    let far = nodes.iter().find(|n| n.name != tasks[0].node).context("one node only")?;
    let path_mtu = || c.on("client", &["ip", "route", "get", &far.address.to_string()])?.ok();
    c.on("client", &["ip", "route", "flush", "cache"])?.ok()?;
    eventually("UDP through the far node", SOON, || udp(c, "client", far.address, 8007))?;
    ensure!(!path_mtu()?.contains("mtu"), "the path's MTU is known before: {}", path_mtu()?);
    let before = c.counter(&far.name, "too_big_sent")?;
    c.lab.inside("client", || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(SocketAddrV4::new(far.address, 8007))?;
        // 1500 bytes with their headers, DF set as Linux does while it looks for the path's MTU.
        Ok(socket.send(&[0; 1472])?)
    })?;
    eventually("the client to know the path's MTU", SOON, || {
        ensure!(path_mtu()?.contains("mtu 1450"), "{}", path_mtu()?);
        Ok(())
    })?;
    let after = c.counter(&far.name, "too_big_sent")?;
    ensure!(after > before, "{} did not count the ICMP error", far.name);
    c.on("client", &["ip", "route", "flush", "cache"])?.ok().map(drop)
}

/// Packets of a connection need no daemon on their way: none of a node, nor of all of them.
fn a_flow_outlives_the_daemons(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 8007:7")?;
    let script = "exec 3<>/dev/tcp/192.0.2.22/8007; read -r -t 3 -u3 who; \
        for i in $(seq 30); do echo line$i >&3; read -r -t 3 -u3 back || exit 1; \
        [ \"$back\" = line$i ] || exit 2; sleep 0.1; done; echo done";
    eventually("the port to answer", SOON, || {
        c.on("client", &["timeout", "1", "bash", "-c", "exec 3<>/dev/tcp/192.0.2.22/8007"])?.ok()
    })?;
    let workers = ["w1", "w2"];
    std::thread::scope(|scope| {
        let flow = scope.spawn(|| c.on("client", &["bash", "-c", script])?.ok());
        for worker in workers {
            c.lab.end_daemon(worker, mesh_lab::DaemonSignal::Kill)?;
        }
        for worker in workers {
            c.lab.start(worker)?;
        }
        let said = flow.join().map_err(|_| anyhow::anyhow!("the flow panicked"))??;
        ensure!(said == "done", "{said:?}");
        Ok(())
    })
}
