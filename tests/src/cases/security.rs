//! Packets that must not arrive, and the counters that say so.

use std::net::{Ipv4Addr, UdpSocket};

use anyhow::{Context, Result, ensure};
use mesh_lab::Lab;

use super::{group, restart};
use crate::cluster::{Cluster, SOON, Task, eventually, list, text};

group!("security": a_strangers_tunnel, another_nodes_tunnel, a_false_source_address, a_false_mac,
    a_tunnel_without_sense, frames_that_no_task_sends, a_task_in_its_nodes_name,
    no_path_around_the_overlay, no_path_to_another_network, no_path_to_a_nodes_loopback,
    what_routers_and_servers_say_is_not_a_tasks_to_say, drops_are_shown);

/// Copies sent of each bad packet.
const COPIES: u64 = 20;
const VXLAN_PORT: u16 = 4789;

/// Two tasks on different nodes of network `app`, neither on `m1`, with packets passing.
fn pair(c: &Cluster) -> Result<(Task, Task)> {
    c.network("app")?;
    c.service("--name each --mode global --network app", crate::cluster::WHOAMI)?;
    let tasks = c.wait_running("each", 5)?;
    let on = |node: &str| tasks.iter().find(|t| t.node == node).cloned().context("no task there");
    let (from, to) = (on("m2")?, on("w1")?);
    let address = address(&to)?;
    eventually("the pair to be connected", SOON, || {
        c.in_task(&from.id, &["ping", "-c1", "-W1", &address])?.ok()
    })?;
    Ok((from, to))
}

fn address(task: &Task) -> Result<String> {
    task.addresses.get("app").cloned().context("a task without an address")
}

/// The VXLAN payload of a genuine packet between the pair, as the switch sees it.
fn genuine(c: &Cluster, from: &Task, to: &Task) -> Result<Vec<u8>> {
    const PCAP_HEADERS: usize = 24 + 16;
    const OUTER_HEADERS: usize = 14 + 20 + 8;
    // Of a network: the data-path probes have VNI 0.
    let filter = format!(
        "tcpdump -i {} -c 1 -U -w - 'udp dst port {VXLAN_PORT} and udp[12:2] != 0' 2>/dev/null",
        to.node
    );
    let mut capture = c.lab.exec("router", &["timeout", "10", "sh", "-c", &filter]);
    let capture = capture.stdout(std::process::Stdio::piped()).spawn().context("start tcpdump")?;
    let address = address(to)?;
    // tcpdump says nothing that could be waited for; so packets flow until it has one.
    let output = std::thread::scope(|scope| {
        let done = scope.spawn(move || capture.wait_with_output());
        while !done.is_finished() {
            let _ = c.in_task(&from.id, &["ping", "-c1", "-W1", &address]);
        }
        done.join().map_err(|_| anyhow::anyhow!("the capture panicked"))
    })??;
    let payload = output.stdout.get(PCAP_HEADERS + OUTER_HEADERS..).context("nothing captured")?;
    ensure!(payload.len() > 8 + 14, "captured only {} bytes", payload.len());
    Ok(payload.to_vec())
}

/// Sends a VXLAN payload to a node, from another machine of the lab.
fn inject(c: &Cluster, from: &str, to: Ipv4Addr, payload: &[u8]) -> Result<()> {
    c.lab.inside(from, || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..COPIES {
            socket.send_to(payload, (to, VXLAN_PORT))?;
        }
        Ok(())
    })
}

/// Runs `attack` and checks that a counter of `node` grew by the packets sent, and that the task
/// got none of them.
fn dropped_as(
    c: &Cluster,
    node: &str,
    counter: &str,
    victim: &Task,
    attack: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let received = || -> Result<u64> {
        let text = c.task_sh(&victim.id, "cat /sys/class/net/eth0/statistics/rx_packets")?;
        text.parse().with_context(|| format!("{text:?} is no number"))
    };
    let before = (c.counter(node, counter)?, received()?);
    attack()?;
    eventually(&format!("{counter} of {node} to grow by {COPIES}"), SOON, || {
        let grown = c.counter(node, counter)? - before.0;
        ensure!(grown >= COPIES, "it grew by {grown}");
        Ok(())
    })?;
    let got = received()? - before.1;
    ensure!(got < COPIES, "the task received {got} packets during the attack");
    Ok(())
}

/// The client is no node of the cluster: even a copy of a good packet is refused from there.
fn a_strangers_tunnel(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let payload = genuine(c, &from, &to)?;
    let node = c.lab.node(&to.node)?.address;
    dropped_as(c, &to.node, "tunnel_source", &to, || inject(c, "client", node, &payload))
}

/// A node may only send for its own endpoints.
fn another_nodes_tunnel(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let payload = genuine(c, &from, &to)?;
    let node = c.lab.node(&to.node)?.address;
    ensure!(from.node != "m3" && to.node != "m3");
    dropped_as(c, &to.node, "tunnel_owner", &to, || inject(c, "m3", node, &payload))
}

fn a_false_source_address(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let target = address(&to)?;
    // Another task's address, and one that nobody has.
    let script = format!(
        "ip addr add 172.31.99.99/32 dev eth0; ping -c {COPIES} -i 0.02 -W 1 -I 172.31.99.99 {target}"
    );
    dropped_as(c, &from.node, "source_address", &to, || {
        let ran = c.in_task(&from.id, &["sh", "-c", &script])?;
        ensure!(ran.status != 0, "pings from a false address are answered");
        Ok(())
    })
}

fn a_false_mac(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let target = address(&to)?;
    // The node puts the MAC right again at once, so it is falsified before each packet; and the
    // neighbour is given, since ARP with a false MAC is dropped just so.
    let script = format!(
        "ip neigh replace {target} lladdr {} nud permanent dev eth0; for i in $(seq 60); do \
         ip link set eth0 address 02:00:00:00:00:01; ping -c 1 -W 0.02 {target}; done; \
         ip neigh del {target} dev eth0",
        mac_of(c, &to)?
    );
    dropped_as(c, &from.node, "source_mac", &to, || {
        c.in_task(&from.id, &["sh", "-c", &script]).map(drop)
    })
}

fn mac_of(c: &Cluster, task: &Task) -> Result<String> {
    c.task_sh(&task.id, "cat /sys/class/net/eth0/address")
}

fn a_tunnel_without_sense(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let node = c.lab.node(&to.node)?.address;
    let good = genuine(c, &from, &to)?;
    let sender = from.node.clone();
    // From the right node, but in pieces: none may crash or pass.
    for length in [0, 1, 7, 8, 21, 22, 30, 41] {
        inject(c, &sender, node, good.get(..length).unwrap_or_default())?;
    }
    let mut foreign_vni = good;
    foreign_vni[4..7].copy_from_slice(&[0xff, 0xff, 0xfe]);
    dropped_as(c, &to.node, "tunnel_vni", &to, || inject(c, &sender, node, &foreign_vni))
}

/// Of the right node and for the right task: with a VLAN tag, or in fragments, a frame is dropped
/// by its name, and what is good goes on.
fn frames_that_no_task_sends(c: &Cluster) -> Result<()> {
    const ETHERTYPE: usize = 8 + 12;
    const FLAGS: usize = 8 + 14 + 6;
    let (from, to) = pair(c)?;
    let node = c.lab.node(&to.node)?.address;
    let good = genuine(c, &from, &to)?;
    let mut tagged = good.clone();
    tagged.splice(ETHERTYPE..ETHERTYPE, [0x81, 0x00, 0x00, 0x05]);
    let mut fragment = good.clone();
    fragment[FLAGS] |= 0x20;
    let mut later = good;
    later[FLAGS + 1] = 8;
    let address = address(&to)?;
    for (counter, frame) in [("ethertype", tagged), ("fragment", fragment), ("fragment", later)] {
        dropped_as(c, &to.node, counter, &to, || {
            inject(c, &from.node, node, &frame)?;
            c.in_task(&from.id, &["ping", "-c1", "-W2", &address])?.ok().map(drop)
        })
        .with_context(|| counter.to_owned())?;
    }
    Ok(())
}

/// Neither a task's address nor a VIP of a network that it is not on leads anywhere, by any of its
/// links; with that network's MACs neither.
fn no_path_to_another_network(c: &Cluster) -> Result<()> {
    let (_, to) = pair(c)?;
    let (target, mac) = (address(&to)?, mac_of(c, &to)?);
    let service = c.api("GET", "/services/each")?;
    let vips = list(&service["Endpoint"]["VirtualIPs"]);
    let vip = vips.iter().filter_map(|vip| text(&vip["Addr"])).next().context("no VIP")?;
    let vip = vip.split('/').next().unwrap_or_default().to_owned();
    c.network("other")?;
    c.service("--name evil --mode global --network other", crate::cluster::WHOAMI)?;
    let tasks = c.wait_running("evil", 5)?;
    let evil = tasks.iter().find(|task| task.node == to.node).context("no task there")?;
    for goal in [&target, &vip] {
        let ran = c.in_task(&evil.id, &["ping", "-c2", "-i0.1", "-W1", goal])?;
        ensure!(ran.status != 0, "a task on `other` reaches {goal} on `app`");
    }
    // As if it were on the same link.
    let script = format!(
        "ip route add {target}/32 dev eth0; ip neigh replace {target} lladdr {mac} nud permanent \
         dev eth0; ping -c {COPIES} -i 0.02 -W 1 {target}"
    );
    dropped_as(c, &evil.node, "no_endpoint", &to, || {
        let ran = c.in_task(&evil.id, &["sh", "-c", &script])?;
        ensure!(ran.status != 0, "a task on `other` reaches {target} by its MAC");
        Ok(())
    })
}

/// What listens on a node's 127.0.0.1 trusts those on the node.
fn no_path_to_a_nodes_loopback(c: &Cluster) -> Result<()> {
    let (from, _) = pair(c)?;
    let node = from.node.clone();
    let (listener, port) = c.lab.inside(&node, || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        // Its own node reaches it.
        std::net::TcpStream::connect(("127.0.0.1", port))?;
        Ok((listener, port))
    })?;
    listener.accept().context("the node does not reach itself")?;
    listener.set_nonblocking(true)?;
    let gateway = c.task_sh(&from.id, "ip route show default | cut -d' ' -f3")?;
    let script = format!(
        "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet; \
         ip route add table 77 127.0.0.1/32 via {gateway} dev gw0; \
         ip rule add pref 0 to 127.0.0.1 table 77 2>/dev/null; \
         ip rule add pref 1 lookup local 2>/dev/null; ip rule del pref 0 lookup local; \
         timeout 2 bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}'; echo $?; \
         ip rule add pref 0 lookup local; ip rule del to 127.0.0.1 table 77"
    );
    let said = c.task_sh(&from.id, &script)?;
    ensure!(said.trim() != "0", "a task connects to 127.0.0.1:{port} of {node}");
    let reached = listener.accept();
    ensure!(reached.is_err(), "a task reached 127.0.0.1:{port} of {node}: {reached:?}");
    Ok(())
}

/// Offers of a DHCP server reach no other task, nor does what is sent to all nodes of a link by
/// IPv6, as router advertisements are.
fn what_routers_and_servers_say_is_not_a_tasks_to_say(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let own: Ipv4Addr = address(&from)?.parse()?;
    let all = Ipv4Addr::from_bits(own.to_bits() | 0xff);
    let netns = restart::netns(c, &from)?;
    dropped_as(c, &from.node, "multicast", &to, || {
        Lab::inside_netns(&netns, || {
            let server = UdpSocket::bind((own, 67))?;
            server.set_broadcast(true)?;
            for _ in 0..COPIES {
                server.send_to(&[2; 300], (all, 68))?;
            }
            Ok(())
        })
    })?;
    // The node takes IPv6 from the link again at once, so it is given before each packet.
    let conf = "/proc/sys/net/ipv6/conf/eth0/disable_ipv6";
    let script = format!(
        "for i in $(seq 60); do echo 0 >{conf}; ip -6 addr replace fe80::1/64 dev eth0 nodad; \
         ping -6 -c 1 -W 0.02 ff02::1%eth0; done; echo 1 >{conf}"
    );
    dropped_as(c, &from.node, "multicast", &to, || {
        c.in_task(&from.id, &["bash", "-c", &script]).map(drop)
    })
}

/// What a task sends to another node is masqueraded as its own node: frames that it forges would
/// pass for those of its neighbours, and it would reach what nodes keep for each other.
fn a_task_in_its_nodes_name(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let payload = genuine(c, &from, &to)?;
    c.network("other")?;
    c.service("--name evil --mode global --network other", crate::cluster::WHOAMI)?;
    let tasks = c.wait_running("evil", 5)?;
    let evil = tasks.iter().find(|task| task.node == from.node).context("no task there")?;
    let (own, peer) = (c.lab.node(&from.node)?.address, c.lab.node(&to.node)?.address);
    let bytes: String = payload.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let forge = |node: Ipv4Addr| {
        format!("for i in $(seq {COPIES}); do printf '{bytes}' >/dev/udp/{node}/{VXLAN_PORT}; done")
    };
    for node in [peer, own] {
        dropped_as(c, &from.node, "node_port", &to, || {
            c.task_sh(&evil.id, &forge(node)).map(drop)
        })?;
    }
    let manager = c.lab.node("m1")?.address;
    for (node, port) in [(manager, 2377), (own, 2377), (peer, 7946), (own, 7946)] {
        let before = c.counter(&from.node, "node_port")?;
        let script = format!("timeout 1 bash -c 'exec 3<>/dev/tcp/{node}/{port}'");
        let ran = c.in_task(&evil.id, &["bash", "-c", &script])?;
        ensure!(ran.status != 0, "a task connects to port {port} of node {node}");
        let grown = c.counter(&from.node, "node_port")? - before;
        ensure!(grown > 0, "port {port} of node {node}: not counted");
    }
    Ok(())
}

/// A host outside that routes the overlay's subnet through a node gets nowhere.
fn no_path_around_the_overlay(c: &Cluster) -> Result<()> {
    let (_, to) = pair(c)?;
    let target = address(&to)?;
    let route = |verb: &str| {
        c.on("router", &["ip", "route", verb, &format!("{target}/32"), "via", "192.0.2.21"])?.ok()
    };
    route("add")?;
    let ran = c.on("client", &["ping", "-c2", "-W1", &target]);
    route("del")?;
    ensure!(ran?.status != 0, "the client reaches {target} on the overlay");
    Ok(())
}

/// `meshctl node stats` names the reason and the number.
fn drops_are_shown(c: &Cluster) -> Result<()> {
    let (from, to) = pair(c)?;
    let target = address(&to)?;
    let script = "ip link set eth0 address 02:00:00:00:00:01; ping -c 5 -i 0.02 -W 1 ".to_owned();
    c.in_task(&from.id, &["sh", "-c", &(script + &target)])?;
    let shown = c.meshctl("m1", &format!("node stats {}", from.node))?.ok()?;
    let line =
        shown.lines().find(|line| line.starts_with("source_mac ")).context("no such line")?;
    let words: Vec<_> = line.split_whitespace().collect();
    ensure!(words.len() == 3 && words[1] == "drop", "{line:?}");
    ensure!(words[2].parse::<u64>()? > 0, "{line:?}");
    let json = c.meshctl("m1", &format!("node stats {} --format json", from.node))?.ok()?;
    ensure!(json.lines().any(|line| line.contains("source_mac")), "{json}");
    Ok(())
}
