//! Packets between nodes: the overlay, VIPs, the routing mesh, and what must not get through. The
//! same story in every mode of encapsulation, and between nodes of different modes.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use mesh_dataplane::probe;
use mesh_ebpf_abi::Counter;
use mesh_types::record::EndpointState;

use crate::{
    cluster::{CLIENT, Cluster, INGRESS_VNI, Mode, OVERLAY_VNI, ROUTER, VIP, vtep},
    host::{eventually, in_vm, inside, ip, patience, ping},
    net::{
        Answer, Connection, Forged, LAST_ACK, Server, ask_tcp, ask_udp, count_tcp, exchange_udp,
        hears, own_port, resets, send_frame, udp, udp_from,
    },
    node::node,
};

const DIRECT: Mode = Mode { via_device: false, clsact: false };
const DEVICE: Mode = Mode { via_device: true, clsact: false };
const CLSACT: Mode = Mode { via_device: false, clsact: true };

/// Kinds of MACs.
const ENDPOINT: u8 = 0x02;
const MESH_FORWARD: u8 = 0x06;
const MESH_RETURN: u8 = 0x0a;

/// Enough for segmentation to show.
fn bulk() -> usize {
    if in_vm() { 1_000_000 } else { 8_000_000 }
}

#[test]
fn direct() {
    story("direct", [DIRECT; 3]);
}

#[test]
fn via_device() {
    story("device", [DEVICE; 3]);
}

/// One wire format: nodes of all modes understand each other.
#[test]
fn mixed() {
    story("mixed", [DIRECT, DEVICE, CLSACT]);
}

/// `a` and `b` are backends of `web` on nodes 1 and 2; `c` and `d` are on nodes 1 and 3, which has
/// no backend.
fn story(name: &str, modes: [Mode; 3]) {
    let started = Instant::now();
    let mut cluster = Cluster::new(name, &modes);
    for (task, on, id, backend) in
        [("a", 1, 1, true), ("b", 2, 2, true), ("c", 1, 3, false), ("d", 3, 4, false)]
    {
        cluster.add_task(task, on, id, backend);
    }
    cluster.settle();
    let servers = ["a", "b"].map(|task| Server::start(task, &cluster.netns(task), 80));
    println!("set up: {:?}", started.elapsed());
    for (name, scene) in SCENES {
        let started = Instant::now();
        scene(&mut cluster);
        println!("{name}: {:?}", started.elapsed());
    }
    drop(servers);
}

type Scene = fn(&mut Cluster);

const SCENES: &[(&str, Scene)] = &[
    ("overlay", overlay),
    ("segments stay whole", segments),
    ("VIP", vip),
    ("hairpin", hairpin),
    ("mesh through every node", mesh),
    ("one port, many nodes", one_port),
    ("published ports from inside", mesh_from_inside),
    ("errors come back", errors),
    ("path MTU", path_mtu),
    ("strangers", strangers),
    ("probes", probes),
    ("spoofing", spoofing),
    ("tags", tags),
    ("withdrawn", withdrawn),
    ("draining", draining),
    ("unplugged", unplugged),
];

/// Asks until both backends answered; every answer is checked.
fn both(what: &str, ask: impl Fn() -> Answer, check: impl Fn(&Answer)) {
    let mut seen = BTreeSet::new();
    // That one of two is missed in 40 flows by chance: once in 10^12.
    for _ in 0..40 {
        let answer = ask();
        check(&answer);
        seen.insert(answer.server);
        if seen.len() == 2 {
            return;
        }
    }
    panic!("{what}: only {seen:?} answered");
}

fn overlay(cluster: &mut Cluster) {
    let (a, b, c, d) = (cluster.task("a"), cluster.task("b"), cluster.task("c"), cluster.task("d"));
    for (from, to) in [(&d, &a), (&c, &a), (&c, &b), (&a, &b)] {
        ping(&from.netns, &to.address.to_string());
        for answer in [ask_tcp(&from.netns, to.address, 80), ask_udp(&from.netns, to.address, 80)] {
            assert_eq!(answer.client, answer.own);
            assert_eq!(answer.client.ip(), from.address);
        }
    }
}

/// A segment of the stack's (up to 64 KiB) passes the programs and the tunnel as one.
fn segments(cluster: &mut Cluster) {
    let (a, d) = (cluster.task("a"), cluster.task("d"));
    let counts = |cluster: &Cluster| {
        [(3, Counter::ToTunnel), (1, Counter::FromTunnel), (1, Counter::ToTunnel)]
            .map(|(node, counter)| cluster.counted(node, counter))
    };
    let before = counts(cluster);
    let connection = Connection::open(&d.netns, a.address, 80).unwrap();
    connection.exchange(bulk()).unwrap();
    let after = counts(cluster);
    // Both directions carry data, acknowledgements beside it.
    let single = bulk() as u64 / 1398;
    for (before, after) in before.into_iter().zip(after) {
        assert!(after > before && after - before < single, "{before} to {after}: not {single}");
    }
}

fn vip(cluster: &mut Cluster) {
    for task in [cluster.task("c"), cluster.task("d")] {
        let check = |answer: &Answer| {
            assert_eq!(answer.client, answer.own);
            assert_eq!(answer.client.ip(), task.address);
        };
        both("VIP over TCP", || ask_tcp(&task.netns, VIP, 80), check);
        both("VIP over UDP", || ask_udp(&task.netns, VIP, 80), check);
        let before = cluster.counted(task.on, Counter::EchoAnswered);
        ping(&task.netns, &VIP.to_string());
        assert_eq!(cluster.counted(task.on, Counter::EchoAnswered), before + 1);
    }
    let d = cluster.task("d");
    Connection::open(&d.netns, VIP, 80).unwrap().exchange(bulk()).unwrap();
}

/// A backend calls its own service. If that means itself, it sees the VIP as the client, since its
/// own address would make the answer take a short cut.
fn hairpin(cluster: &mut Cluster) {
    let a = cluster.task("a");
    let check = |answer: &Answer| {
        let seen = if answer.server == "a" { VIP } else { a.address };
        assert_eq!(answer.client, (seen, answer.own.port()).into());
    };
    both("hairpin over TCP", || ask_tcp(&a.netns, VIP, 80), check);
    both("hairpin over UDP", || ask_udp(&a.netns, VIP, 80), check);
}

fn mesh(cluster: &mut Cluster) {
    let client = cluster.netns("client");
    let check = |answer: &Answer| {
        assert_eq!(answer.client, answer.own);
        assert_eq!(answer.client.ip(), CLIENT);
    };
    for node in 1..=3 {
        let before = cluster.counted(node, Counter::MeshIn);
        both("mesh over TCP", || ask_tcp(&client, vtep(node), 8080), check);
        both("mesh over UDP", || ask_udp(&client, vtep(node), 8080), check);
        Connection::open(&client, vtep(node), 8080).unwrap().exchange(bulk() / 4).unwrap();
        assert!(cluster.counted(node, Counter::MeshIn) > before);
    }
}

/// Flows of one client's port through three nodes: two of them meet at one of the two backends,
/// which sees another port in place of the later one's. None is mistaken for another.
fn one_port(cluster: &mut Cluster) {
    let client = cluster.netns("client");
    let own = own_port();
    let check = |answers: Vec<&Answer>| {
        let seen: BTreeSet<_> = answers.iter().map(|a| (&a.server, a.client)).collect();
        assert_eq!(seen.len(), 3, "{answers:?}");
        assert!(answers.iter().all(|answer| answer.client.ip() == CLIENT), "{answers:?}");
        assert!(answers.iter().any(|answer| answer.client.port() != own), "{answers:?}");
    };
    let connections =
        [1, 2, 3].map(|node| Connection::open_from(&client, own, vtep(node), 8080).unwrap());
    check(connections.iter().map(|connection| &connection.answer).collect());
    for connection in connections {
        connection.exchange(100_000).unwrap();
    }
    let sockets = [1, 2, 3].map(|node| udp_from(&client, own, vtep(node), 8080));
    let answers = || sockets.each_ref().map(|socket| exchange_udp(socket, 5).unwrap());
    let first = answers();
    check(first.iter().collect());
    assert_eq!(answers(), first);
}

/// Tasks call published ports: of their own node (where the node stands for the client), of another
/// one (where masquerade does), also a backend that may be its own answer.
fn mesh_from_inside(cluster: &mut Cluster) {
    for task in [cluster.task("a"), cluster.task("c"), cluster.task("d")] {
        for node in 1..=3 {
            let own = vtep(task.on);
            let check = |answer: &Answer| assert_eq!(answer.client.ip(), own, "{answer:?}");
            both("from inside, TCP", || ask_tcp(&task.netns, vtep(node), 8080), check);
            both("from inside, UDP", || ask_udp(&task.netns, vtep(node), 8080), check);
        }
    }
}

/// Nobody listens: the refusal finds its way back through every translation.
fn errors(cluster: &mut Cluster) {
    let (client, d) = (cluster.netns("client"), cluster.task("d"));
    let refused = |netns: &str, to: Ipv4Addr, port: u16| {
        let error = Connection::open(netns, to, port).map(|_| ()).expect_err("nobody listens");
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "TCP {to}:{port}: {error}");
        let error = exchange_udp(&udp(netns, to, port), 5).expect_err("nobody listens");
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "UDP {to}:{port}: {error}");
    };
    for (node, other) in [(1, 2), (3, 1)] {
        // Backends here and elsewhere, as the ports of the clients have it.
        for _ in 0..6 {
            refused(&client, vtep(node), 8081);
            refused(&d.netns, vtep(other), 8081);
        }
    }
    for _ in 0..6 {
        refused(&d.netns, VIP, 81);
    }
}

/// 1500 bytes from outside do not fit the tunnel: the client is told what does.
fn path_mtu(cluster: &mut Cluster) {
    let client = cluster.netns("client");
    let before = cluster.counted(3, Counter::TooBigSent);
    let socket = udp(&client, vtep(3), 8080);
    // Linux sets DF, as a connected socket gets to know the path.
    let error = exchange_udp(&socket, 1472).expect_err("too big");
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{error}");
    assert_eq!(cluster.counted(3, Counter::TooBigSent), before + 1);
    let route = ip(&format!("-n {client} route get {}", vtep(3)));
    assert!(route.contains("mtu 1450"), "{route}");
    let answer = exchange_udp(&socket, 1422).unwrap();
    assert_eq!(answer.client, answer.own);
    ip(&format!("-n {client} route flush cache"));
}

/// What comes through the tunnel comes from the node of its sender, or not at all.
fn strangers(cluster: &mut Cluster) {
    let (a, d) = (cluster.task("a"), cluster.task("d"));
    let target = inside(&a.netns, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9999)).unwrap());
    let good = Forged {
        vni: OVERLAY_VNI,
        from: (ENDPOINT, 4),
        to: (ENDPOINT, 1),
        source: (d.address, 4000),
        target: (a.address, 9999),
        text: "genuine",
    };
    let (router, n2, n3) = (cluster.netns("router"), cluster.netns("n2"), cluster.netns("n3"));
    let dropped = |forged: Forged, netns: &str, from: Ipv4Addr, counter: Counter| {
        let before = cluster.counted(1, counter);
        forged.send(netns, from, vtep(1));
        let what = format!("`{}` counts as {}", forged.text, counter.name());
        eventually(&what, || cluster.counted(1, counter) == before + 1);
    };
    let stranger = Forged { text: "stranger", ..good };
    dropped(stranger, &router, ROUTER, Counter::DropTunnelSource);
    let not_its_owner = Forged { text: "not its owner", ..good };
    dropped(not_its_owner, &n2, vtep(2), Counter::DropTunnelOwner);
    let wrong_network = Forged { text: "wrong network", vni: OVERLAY_VNI + 1, ..good };
    dropped(wrong_network, &n3, vtep(3), Counter::DropTunnelVni);
    let wrong_address = Forged { text: "wrong address", source: (VIP, 4000), ..good };
    dropped(wrong_address, &n3, vtep(3), Counter::DropTunnelOwner);
    let forward = Forged {
        vni: INGRESS_VNI,
        from: (MESH_RETURN, 3),
        to: (MESH_FORWARD, 101),
        source: (CLIENT, 4000),
        target: (vtep(3), 9999),
        text: "not published",
    };
    dropped(forward, &n3, vtep(3), Counter::DropMesh);
    let in_anothers_name = Forged { text: "in another's name", ..forward };
    // A node that gave the packet to another backend may say so, of published ports.
    dropped(in_anothers_name, &n2, vtep(2), Counter::DropMesh);
    // But once, and of nodes of the cluster.
    let twice =
        Forged { text: "twice", to: (MESH_FORWARD, 222), target: (vtep(3), 8080), ..forward };
    dropped(twice, &n2, vtep(2), Counter::DropMesh);
    let nobodys = Forged { text: "in nobody's name", from: (MESH_RETURN, 9), ..forward };
    dropped(nobodys, &n2, vtep(2), Counter::DropTunnelOwner);
    let outsider = Forged { text: "outsider", ..forward };
    dropped(outsider, &router, ROUTER, Counter::DropTunnelSource);
    // To the client in the name of node 1, which may say so of published ports alone.
    let back = Forged {
        from: (MESH_FORWARD, 102),
        to: (MESH_RETURN, 1),
        source: (vtep(1), 22),
        target: (CLIENT, 4000),
        text: "no published port",
        ..forward
    };
    dropped(back, &n2, vtep(2), Counter::DropMesh);
    let not_its_endpoint = Forged { text: "not its endpoint", ..back };
    dropped(not_its_endpoint, &n3, vtep(3), Counter::DropTunnelOwner);
    let unknown =
        Forged { text: "no published port of who is not known", from: (MESH_FORWARD, 222), ..back };
    dropped(unknown, &n2, vtep(2), Counter::DropMesh);
    // Of a published port it may be: a backend that is newer than our records.
    let client = inside(&cluster.netns("client"), || UdpSocket::bind((CLIENT, 4000)).unwrap());
    let newer = Forged { text: "newer", source: (vtep(1), 8080), ..unknown };
    newer.send(&n2, vtep(2), vtep(1));
    assert_eq!(hears(&client, patience()).as_deref(), Some(&b"newer"[..]));
    // The very same from its own node arrives, and it alone.
    good.send(&n3, vtep(3), vtep(1));
    let heard = hears(&target, patience());
    assert_eq!(heard.as_deref(), Some(&b"genuine"[..]));
    assert_eq!(hears(&target, Duration::from_millis(50)), None);
}

/// A node's programs answer the probes of others, and nothing that is none.
fn probes(cluster: &mut Cluster) {
    let socket = |netns: &str, from: Ipv4Addr, to: u64| {
        inside(&cluster.netns(netns), || {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.connect((vtep(to), 4789)).unwrap();
            socket
        })
    };
    for (own, peer) in [(1, 2), (2, 3), (3, 1)] {
        let before = cluster.counted(peer, Counter::ProbeReflected);
        let asks = socket(&format!("n{own}"), vtep(own), peer);
        for nonce in [1, u64::MAX] {
            asks.send(&probe::encode_request(node(own), node(peer), nonce)).unwrap();
            let answer = hears(&asks, patience()).expect("an answer");
            assert_eq!(probe::decode_reply(&answer), Some((node(peer), nonce)));
        }
        assert_eq!(cluster.counted(peer, Counter::ProbeReflected), before + 2);
    }
    let good = probe::encode_request(node(3), node(1), 7);
    let mut reply = good;
    reply[27] = 2;
    let spoilt = |at: usize| {
        let mut bytes = good;
        bytes[at] ^= 1;
        bytes.to_vec()
    };
    let cases = [
        ("n3", vtep(3), reply.to_vec(), Counter::DropProbe),
        ("n3", vtep(3), spoilt(6), Counter::DropProbe),
        ("n3", vtep(3), spoilt(13), Counter::DropProbe),
        ("n3", vtep(3), spoilt(22), Counter::DropProbe),
        ("n3", vtep(3), [&good[..], b"longer"].concat(), Counter::DropProbe),
        ("n3", vtep(3), good[..24].to_vec(), Counter::DropProbe),
        ("n2", vtep(2), good.to_vec(), Counter::DropProbe),
        ("router", ROUTER, good.to_vec(), Counter::DropTunnelSource),
    ];
    let answered = cluster.counted(1, Counter::ProbeReflected);
    for (netns, from, bytes, counter) in cases {
        let before = cluster.counted(1, counter);
        socket(netns, from, 1).send(&bytes).unwrap();
        let what = format!("{bytes:02x?} of {netns} counts as {}", counter.name());
        eventually(&what, || cluster.counted(1, counter) == before + 1);
    }
    assert_eq!(cluster.counted(1, Counter::ProbeReflected), answered);
}

/// A task speaks for itself alone.
fn spoofing(cluster: &mut Cluster) {
    let (a, d) = (cluster.task("a"), cluster.task("d"));
    let target = inside(&a.netns, || UdpSocket::bind((a.address, 9999)).unwrap());
    let send = |from: Ipv4Addr| {
        inside(&d.netns, || {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.send_to(b"spoofed", (a.address, 9999)).unwrap();
        });
    };
    let before = cluster.counted(3, Counter::DropSourceAddr);
    ip(&format!("-n {} addr add 10.0.0.77/32 dev eth0", d.netns));
    send(Ipv4Addr::new(10, 0, 0, 77));
    eventually("the address is refused", || cluster.counted(3, Counter::DropSourceAddr) > before);
    ip(&format!("-n {} addr del 10.0.0.77/32 dev eth0", d.netns));
    let before = cluster.counted(3, Counter::DropSourceMac);
    ip(&format!("-n {} link set eth0 address 02:00:00:00:00:03", d.netns));
    send(d.address);
    eventually("the MAC is refused", || cluster.counted(3, Counter::DropSourceMac) > before);
    assert_eq!(hears(&target, Duration::from_millis(50)), None);
    assert!(cluster.round(3).healed > 0);
    send(d.address);
    assert!(hears(&target, patience()).is_some());
}

/// A tag that a task puts on its frame would be that of a VLAN of the underlay's, one within a
/// tunnel that of a VLAN in the task.
fn tags(cluster: &mut Cluster) {
    let (a, b, c) = (cluster.task("a"), cluster.task("b"), cluster.task("c"));
    let heard =
        [&a, &b].map(|task| inside(&task.netns, || UdpSocket::bind((task.address, 9998)).unwrap()));
    let frame = |to: &crate::cluster::Task, tag: &[u8]| {
        let forged = Forged {
            vni: OVERLAY_VNI,
            from: (ENDPOINT, c.id as u8),
            to: (ENDPOINT, to.id as u8),
            source: (c.address, 9998),
            target: (to.address, 9998),
            text: "tagged",
        };
        let mut frame = forged.bytes();
        frame.splice(8 + 12..8 + 12, tag.iter().copied());
        frame
    };
    const TAG: [u8; 4] = [0x81, 0x00, 0x00, 0x05];
    // From a task to its own node's and to another node's.
    for to in [&a, &b] {
        let before = cluster.counted(c.on, Counter::DropEtherType);
        send_frame(&c.netns, "eth0", &frame(to, &TAG)[8..]);
        eventually("a tagged frame is refused", || {
            cluster.counted(c.on, Counter::DropEtherType) > before
        });
    }
    // Within a tunnel, from the node that may send it.
    let before = cluster.counted(b.on, Counter::DropEtherType);
    let payload = frame(&b, &TAG);
    inside(&cluster.netns(&format!("n{}", c.on)), || {
        let socket = UdpSocket::bind((vtep(c.on), 0)).unwrap();
        socket.send_to(&payload, (vtep(b.on), 4789)).unwrap();
    });
    eventually("a tagged frame in a tunnel is refused", || {
        cluster.counted(b.on, Counter::DropEtherType) > before
    });
    for socket in &heard {
        assert_eq!(hears(socket, Duration::from_millis(50)), None);
    }
    // Without tags all of them are what they seem.
    for (to, socket) in [&a, &b].into_iter().zip(&heard) {
        send_frame(&c.netns, "eth0", &frame(to, &[])[8..]);
        assert!(hears(socket, patience()).is_some());
    }
}

/// A flow that nobody answered leaves the backend whose node is withdrawn; others stay.
fn withdrawn(cluster: &mut Cluster) {
    let (client, d) = (cluster.netns("client"), cluster.task("d"));
    let (a, b) = (cluster.netns("a"), cluster.netns("b"));
    // They hear, and say nothing.
    let mute = ["a", "b"].map(|task| {
        let bound = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 81)).unwrap();
        (task, inside(&cluster.netns(task), bound))
    });
    let goes_to = |socket: &UdpSocket| {
        socket.send(b"hello").unwrap();
        let mut heard = None;
        eventually("a backend hears it", || {
            let a_moment = Duration::from_millis(1);
            heard = mute.iter().find(|(_, socket)| hears(socket, a_moment).is_some());
            heard.is_some()
        });
        heard.map(|(task, _)| *task).unwrap()
    };
    for (netns, to, deaf, port) in [(&client, vtep(3), 8081, 8080), (&d.netns, VIP, 81, 80)] {
        let established = (0..40)
            .map(|_| Connection::open(netns, to, port).unwrap())
            .find(|connection| connection.answer.server == "a")
            .expect("one to `a`");
        let half_open = (0..40)
            .map(|_| udp(netns, to, deaf))
            .find(|socket| goes_to(socket) == "a")
            .expect("one to `a`");
        assert_eq!(goes_to(&half_open), "a");
        cluster.set_withdrawn(3, &[1]);
        assert_eq!(goes_to(&half_open), "b");
        // To its very last packet, which comes when both sides have closed it.
        let before = resets(&b);
        established.exchange(100_000).unwrap();
        eventually("`a` hears the end", || count_tcp(&a, LAST_ACK) == 0);
        assert_eq!(resets(&b), before, "`b` got packets of a connection to `a`");
        cluster.set_withdrawn(3, &[]);
    }
}

/// A backend that drains keeps its flows and gets no new ones.
fn draining(cluster: &mut Cluster) {
    let (client, d) = (cluster.netns("client"), cluster.task("d"));
    let places = [(client.as_str(), vtep(1), 8080), (&client, vtep(3), 8080), (&d.netns, VIP, 80)];
    let to_a = |(netns, to, port): (&str, Ipv4Addr, u16)| {
        let connection = (0..40)
            .map(|_| Connection::open(netns, to, port).unwrap())
            .find(|connection| connection.answer.server == "a")
            .expect("one to `a`");
        let socket = (0..40)
            .map(|_| udp(netns, to, port))
            .find(|socket| exchange_udp(socket, 5).unwrap().server == "a")
            .expect("one to `a`");
        (connection, socket)
    };
    let old = places.map(to_a);
    cluster.set_state("a", EndpointState::Draining);
    cluster.settle();
    for (netns, to, port) in places {
        for _ in 0..8 {
            assert_eq!(ask_tcp(netns, to, port).server, "b");
            assert_eq!(ask_udp(netns, to, port).server, "b");
        }
    }
    for (connection, socket) in old {
        assert_eq!(exchange_udp(&socket, 5).unwrap().server, "a");
        connection.exchange(100_000).unwrap();
    }
    cluster.set_state("a", EndpointState::Ready);
    cluster.settle();
}

/// What is unplugged is reached no more, and the rest goes on.
fn unplugged(cluster: &mut Cluster) {
    let (client, d) = (cluster.netns("client"), cluster.task("d"));
    let old = (0..40)
        .map(|_| udp(&client, vtep(3), 8080))
        .find(|socket| exchange_udp(socket, 5).unwrap().server == "a")
        .expect("one to `a`");
    exchange_udp(&old, 5).unwrap();
    // Node 3 does not know yet: node 1 gives what it sends to `b`.
    cluster.detach("a");
    let before = cluster.counted(1, Counter::MeshRebalanced);
    // Also what is left of older flows, and remembers it.
    assert_eq!(exchange_udp(&old, 5).unwrap().server, "b");
    let new = cluster.counted(1, Counter::FlowNew);
    assert_eq!(exchange_udp(&old, 5).unwrap().server, "b");
    assert_eq!(cluster.counted(1, Counter::FlowNew), new);
    for _ in 0..40 {
        for answer in [ask_tcp(&client, vtep(3), 8080), ask_udp(&client, vtep(3), 8080)] {
            assert_eq!((answer.server.as_str(), answer.client), ("b", answer.own));
        }
    }
    Connection::open(&client, vtep(3), 8080).unwrap().exchange(bulk() / 4).unwrap();
    assert!(cluster.counted(1, Counter::MeshRebalanced) > before);
    cluster.set_state("a", EndpointState::Draining);
    cluster.settle();
    for _ in 0..8 {
        assert_eq!(ask_tcp(&d.netns, VIP, 80).server, "b");
        assert_eq!(ask_tcp(&cluster.netns("client"), vtep(1), 8080).server, "b");
    }
    let links = ip(&format!("-n {} -o link", cluster.netns("a")));
    assert!(!links.contains("eth0") && !links.contains("gw0"), "{links}");
}
