//! The peers, built by hand in namespaces of their own over a switched underlay like the lab's:
//! *raw* (plain routing, no encapsulation, no netfilter) and *docker* (VXLAN and a bridge in a
//! sandbox namespace, br_netfilter, connection tracking and NAT rules as Docker makes them).

use anyhow::Result;

use crate::shell::{Netns, sh};

/// Prefix of the namespaces.
const PREFIX: &str = "mbench";

/// One path from a client task to a server task on two hosts.
#[derive(Debug, Clone)]
pub(crate) struct Path {
    /// Its name in the table.
    pub(crate) name: &'static str,
    /// Where the client runs.
    pub(crate) client: Netns,
    /// Where the server runs.
    pub(crate) server: Netns,
    /// The address that the client goes to.
    pub(crate) to: String,
}

/// The peers, gone when dropped.
#[derive(Debug)]
pub(crate) struct Peers {
    names: Vec<String>,
}

impl Drop for Peers {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = sh(&format!("ip netns del {name}"));
        }
    }
}

fn ns(name: &str) -> String {
    format!("{PREFIX}-{name}")
}

fn ip(name: &str, rest: &str) -> Result<()> {
    sh(&format!("ip -n {} {rest}", ns(name))).map(drop)
}

fn sysctl(name: &str, setting: &str) -> Result<()> {
    Netns::named(&ns(name)).sh(&format!("sysctl -qw {setting}")).map(drop)
}

impl Peers {
    /// Builds everything.
    pub(crate) fn build(mtu: u32) -> Result<Self> {
        let mut peers = Self { names: Vec::new() };
        for name in ["sw", "r1", "r2", "rt1", "rt2", "d1", "d2", "dt1", "dt2", "dx1", "dx2", "c"] {
            let name = ns(name);
            let _ = sh(&format!("ip netns del {name}"));
            sh(&format!("ip netns add {name}"))?;
            sh(&format!("ip -n {name} link set lo up"))?;
            peers.names.push(name);
        }
        ip("sw", "link add br0 type bridge")?;
        ip("sw", &format!("link set br0 up mtu {mtu}"))?;
        ip("sw", "addr add 192.0.2.1/24 dev br0")?;
        sysctl("sw", "net.ipv4.ip_forward=1")?;
        for (host, address) in
            [("r1", "192.0.2.11"), ("r2", "192.0.2.12"), ("d1", "192.0.2.21"), ("d2", "192.0.2.22")]
        {
            ip(
                "sw",
                &format!("link add {host} mtu {mtu} type veth peer name eth0 netns {}", ns(host)),
            )?;
            ip("sw", &format!("link set {host} master br0 up"))?;
            ip(host, &format!("link set eth0 up mtu {mtu}"))?;
            ip(host, &format!("addr add {address}/24 dev eth0"))?;
            ip(host, "route add default via 192.0.2.1")?;
            sysctl(host, "net.ipv4.ip_forward=1")?;
        }
        raw(mtu)?;
        outside(mtu)?;
        for (node, own, peer) in [(1, "192.0.2.21", "192.0.2.22"), (2, "192.0.2.22", "192.0.2.21")]
        {
            docker(node, own, peer, mtu - 50)?;
        }
        Ok(peers)
    }

    /// Plain routing between two hosts.
    pub(crate) fn raw(&self) -> Path {
        Path {
            name: "raw routed",
            client: Netns::named(&ns("rt1")),
            server: Netns::named(&ns("rt2")),
            to: "10.90.2.2".into(),
        }
    }

    /// Docker's overlay path.
    pub(crate) fn docker(&self) -> Path {
        Path {
            name: "docker path",
            client: Netns::named(&ns("dt1")),
            server: Netns::named(&ns("dt2")),
            to: "10.91.0.2".into(),
        }
    }

    /// From a client outside, through one host to a task on another, routed both ways.
    pub(crate) fn routed_from_outside(&self) -> Path {
        Path { name: "routed, no balancer", client: Netns::named(&ns("c")), ..self.raw() }
    }
}

fn raw(mtu: u32) -> Result<()> {
    for (node, other) in [(1, 2), (2, 1)] {
        let (host, task) = (format!("r{node}"), format!("rt{node}"));
        ip(&host, &format!("link add t0 mtu {mtu} type veth peer name eth0 netns {}", ns(&task)))?;
        ip(&host, "link set t0 up")?;
        ip(&host, &format!("addr add 10.90.{node}.1/24 dev t0"))?;
        ip(&task, &format!("link set eth0 up mtu {mtu}"))?;
        ip(&task, &format!("addr add 10.90.{node}.2/24 dev eth0"))?;
        ip(&task, &format!("route add default via 10.90.{node}.1"))?;
        ip(&host, &format!("route add 10.90.{other}.0/24 via 192.0.2.1{other}"))?;
    }
    Ok(())
}

fn outside(mtu: u32) -> Result<()> {
    ip("sw", &format!("link add c0 mtu {mtu} type veth peer name eth0 netns {}", ns("c")))?;
    ip("sw", "link set c0 up")?;
    ip("sw", "addr add 198.51.100.1/24 dev c0")?;
    ip("c", &format!("link set eth0 up mtu {mtu}"))?;
    ip("c", "addr add 198.51.100.7/24 dev eth0")?;
    ip("c", "route add default via 198.51.100.1")?;
    // The mesh's way: in through the first host, to the second, and back the same way.
    ip("sw", "route add 10.90.2.0/24 via 192.0.2.11")?;
    ip("r2", "route add 198.51.100.0/24 via 192.0.2.11")
}

fn docker(node: u32, own: &str, peer: &str, inner_mtu: u32) -> Result<()> {
    let (host, task, sandbox) = (format!("d{node}"), format!("dt{node}"), format!("dx{node}"));
    let other = 3 - node;
    // The VXLAN device is made on the host, so that its socket is there, and moved.
    ip(
        &host,
        &format!(
            "link add vx0 type vxlan id 4097 dstport 4789 local {own} proxy l2miss l3miss learning"
        ),
    )?;
    ip(&host, &format!("link set vx0 netns {}", ns(&sandbox)))?;
    ip(&sandbox, "link add br0 type bridge")?;
    ip(&sandbox, &format!("link set br0 up mtu {inner_mtu}"))?;
    ip(&sandbox, "addr add 10.91.0.254/24 dev br0")?;
    ip(&sandbox, &format!("link set vx0 master br0 up mtu {inner_mtu}"))?;
    ip(
        &sandbox,
        &format!("link add t0 mtu {inner_mtu} type veth peer name eth0 netns {}", ns(&task)),
    )?;
    ip(&sandbox, "link set t0 master br0 up")?;
    let mac = |n: u32| format!("02:42:0a:5b:00:{n:02x}");
    ip(&task, &format!("link set eth0 address {} up mtu {inner_mtu}", mac(node)))?;
    ip(&task, &format!("addr add 10.91.0.{node}/24 dev eth0"))?;
    ip(
        &sandbox,
        &format!("neigh add 10.91.0.{other} lladdr {} dev vx0 nud permanent", mac(other)),
    )?;
    sh(&format!(
        "bridge -n {} fdb add {} dev vx0 dst {peer} self permanent",
        ns(&sandbox),
        mac(other)
    ))?;
    for setting in ["net.bridge.bridge-nf-call-iptables=1", "net.ipv4.ip_forward=1"] {
        sysctl(&sandbox, setting)?;
    }
    // Docker's rules: its resolver's NAT in the task, FORWARD and NAT chains on the host.
    nft(&task, "add table ip nat")?;
    nft(&task, "add chain ip nat out { type nat hook output priority -100 ; }")?;
    nft(&task, "add rule ip nat out ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:40000")?;
    nft(&task, "add chain ip nat post { type nat hook postrouting priority 100 ; }")?;
    nft(&task, "add rule ip nat post ip saddr 127.0.0.11 udp sport 40000 snat to :53")?;
    for place in [&host, &sandbox] {
        nft(place, "add table ip filter")?;
        nft(place, "add chain ip filter forwards { type filter hook forward priority 0 ; }")?;
        nft(place, "add rule ip filter forwards ct state related,established accept")?;
        nft(place, "add table ip nat")?;
        nft(place, "add chain ip nat pre { type nat hook prerouting priority -100 ; }")?;
        nft(place, "add rule ip nat pre fib daddr type local tcp dport 1 dnat to 10.0.0.1")?;
        nft(place, "add chain ip nat post { type nat hook postrouting priority 100 ; }")?;
        nft(place, "add rule ip nat post ip saddr 172.18.0.0/16 masquerade")?;
    }
    Ok(())
}

fn nft(name: &str, rule: &str) -> Result<()> {
    Netns::named(&ns(name)).sh(&format!("nft {rule}")).map(drop)
}
