//! The engine of one node: healing, restart, refusal, what is not ours.

use std::{net::Ipv4Addr, time::Instant};

use mesh_linux::Report;

use crate::{
    host::{count, ip, patience, ping, sh},
    net::{Asking, Server, udp},
    node::{Damage, Node},
};

fn good(report: &Report) {
    assert!(report.is_converged(), "{:#?}", report.failures);
}

/// Runs `test` on a single-threaded runtime inside the node's namespace.
fn run(name: &str, test: impl AsyncFnOnce(&mut Node) + Send) {
    let mut net = Node::new(name);
    net.inside(async |net| test(net).await);
}

/// Two tasks on one network: they reach each other, the second round finds nothing to do, and the
/// node's own view is complete.
#[test]
fn tasks_of_a_node_reach_each_other() {
    run("ping", async |net| {
        let mut engine = net.engine();
        let (a, b) = (net.task("a"), net.task("b"));
        engine.set_records(net.records());
        let started = Instant::now();
        let la = engine.attach(&a, &[net.eth0(1), net.gw0(2)]).await.unwrap();
        println!("first attach: {:?}", started.elapsed());
        let started = Instant::now();
        engine.attach(&b, &[net.eth0(3), net.gw0(4)]).await.unwrap();
        println!("second attach: {:?}", started.elapsed());
        ping(&net.name("a"), "10.0.0.3");
        let report = engine.round().await;
        good(&report);
        assert!(report.applied.is_empty(), "not level: {:#?}", report.applied);
        let report = engine.detach(&la).await;
        good(&report);
        assert_eq!(count("ip -o link show type veth", "mv"), 2);
        good(&engine.teardown().await);
        net.assert_clean();
    });
}

/// What is changed by hand is put back in one round, each kind of object once, and counted.
#[test]
fn corruption_heals() {
    run("heal", async |net| {
        let mut engine = net.engine();
        let a = net.task("a");
        engine.set_records(net.records());
        engine.attach(&a, &[net.eth0(1), net.gw0(2)]).await.unwrap();
        let ns = net.name("a");
        let tcx = engine.features().tcx;
        let links = net.pins.join(format!("v{}/links", mesh_ebpf_abi::SCHEMA));
        let cut = |pin: &str, link: &str| match tcx {
            true => format!("rm {}", links.join(pin).display()),
            false => format!("tc qdisc del dev {link} clsact"),
        };
        for (damage, object) in [
            ("ip link del mv0000000001".to_owned(), "create link mv0000000001"),
            ("ip link set mv0000000001 down".to_owned(), "change link mv0000000001"),
            ("ip link set mv0000000002 mtu 900".to_owned(), "change link mv0000000002"),
            (format!("ip -n {ns} link set eth0 down"), "change link mv0000000001"),
            (format!("ip -n {ns} link set eth0 address 02:11:22:33:44:55"), "change link mv00"),
            (format!("ip -n {ns} addr flush dev eth0"), "create address 10.0.0.1/24"),
            (format!("ip -n {ns} route del default"), "create default route"),
            (format!("ip -n {ns} link set lo down"), "create link lo"),
            ("ip route del 172.30.0.2".to_owned(), "create route to 172.30.0.2"),
            ("ip neigh del 172.30.0.2 dev mv0000000002".to_owned(), "create neighbour 172.30.0.2"),
            ("sysctl -qw net.ipv4.ip_forward=0".to_owned(), "change sysctl net/ipv4/ip_forward"),
            ("ip link del mesh-vxlan".to_owned(), "create link mesh-vxlan"),
            ("ip link set mesh-vxlan down".to_owned(), "change link mesh-vxlan"),
            ("nft delete table ip mesh".to_owned(), "create nft table"),
            ("nft flush chain ip mesh forward".to_owned(), "change nft table"),
            (cut("uplink", "up0"), "create program"),
            (cut("mv0000000001", "mv0000000001"), "create program"),
            (format!("ip netns exec {ns} tc qdisc del dev lo clsact"), "create program"),
        ] {
            sh(&damage);
            let mut report = engine.round().await;
            // The kernel releases an unpinned link a moment later, and takes the program at the
            // same place only then.
            let deadline = Instant::now() + patience();
            while !report.is_converged() && Instant::now() < deadline {
                assert!(report.failures[0].message.contains("File exists"), "{report:#?}");
                report = engine.round().await;
            }
            good(&report);
            let hit = report.applied.iter().any(|done| done.starts_with(object));
            assert!(hit, "`{damage}`: {:#?}", report.applied);
            assert!(report.healed > 0, "`{damage}` is not counted as healed");
            let report = engine.round().await;
            assert!(report.applied.is_empty(), "`{damage}`: not level: {:#?}", report.applied);
        }
        for (map, damage) in [
            ("ENDPOINTS", Damage::Erase),
            ("PORTS", Damage::Erase),
            ("ADDRESSES", Damage::Erase),
            ("SERVICES", Damage::Erase),
            ("NODES", Damage::Clobber),
            ("ENDPOINTS", Damage::Clobber),
            ("SERVICES", Damage::Clobber),
            ("ADDRESSES", Damage::Clobber),
            ("VTEPS", Damage::Add),
            ("NODES", Damage::Add),
            ("PORTS", Damage::Add),
            ("PUBLISHED", Damage::Add),
            ("MAGLEV", Damage::Clobber),
            ("CONFIG", Damage::Clobber),
        ] {
            let before = net.dump(map);
            net.damage(map, damage);
            assert_ne!(net.dump(map), before, "{map} {damage:?} did nothing");
            let total = engine.healed();
            let report = engine.round().await;
            good(&report);
            assert!(report.healed > 0, "{map} {damage:?}: {:#?}", report.applied);
            assert_eq!(engine.healed(), total + report.healed as u64);
            let after = net.dump(map);
            assert_eq!(after.len(), before.len(), "{map} {damage:?}");
            let report = engine.round().await;
            assert!(report.applied.is_empty(), "{map} {damage:?}: {:#?}", report.applied);
        }
        ping(&ns, "192.0.2.1");
    });
}

/// A program of ours that is attached by another link than the hook's pinned one is taken off: the
/// program that runs, and one of an earlier daemon, which would run in its place.
#[test]
fn copies_of_programs_are_removed() {
    run("copies", async |net| {
        let mut engine = net.engine();
        if !engine.features().tcx {
            return;
        }
        let links = net.pins.join(format!("v{}/links", mesh_ebpf_abi::SCHEMA));
        engine.set_records(net.records());
        good(&engine.round().await);
        for restarts in [false, true] {
            let (pin, second) = (links.join("uplink"), net.pins.join("second"));
            let (pin, second) = (pin.display(), second.display());
            sh(&format!(
                "id=$(bpftool -j link show pinned {pin} | grep -oE '\"id\":[0-9]+' | cut -c6-)
                 bpftool link pin id $id {second} && rm {pin}"
            ));
            if restarts {
                drop(engine);
                engine = net.engine();
                engine.set_records(net.records());
            }
            let report = engine.round().await;
            good(&report);
            let removed = |done: &&String| done.starts_with("delete stray program");
            assert_eq!(report.applied.iter().filter(removed).count(), 1, "{:#?}", report.applied);
            // What a start finds is not counted.
            assert!(restarts || report.healed >= 2, "{:#?}", report.applied);
            let report = engine.round().await;
            assert!(report.applied.is_empty(), "not level: {:#?}", report.applied);
            sh(&format!("rm {second}"));
        }
        good(&engine.teardown().await);
    });
}

/// What others made stays as it is, also where its name looks like ours; and a round does not fail
/// because of it.
#[test]
fn foreign_objects_are_untouched() {
    run("foreign", async |net| {
        let a = net.task("a");
        sh("ip link add mv00000000ff type veth peer name other0");
        sh("ip link add mv1 type veth peer name other1");
        sh("ip link add mesh-foo type veth peer name other2");
        sh("ip route add 198.18.0.0/15 via 192.0.2.9");
        sh("nft add table ip mesher; nft add chain ip mesher c");
        sh("tc qdisc add dev up0 clsact");
        let seen = || {
            let links =
                sh("ip -o link show type veth | sed 's/state.*//' | grep -v 'mv000000000[0-9]'");
            [links, sh("ip route | grep -v 'proto 109'"), sh("nft list table ip mesher")]
        };
        let before = seen();
        let mut engine = net.engine();
        engine.set_records(net.records());
        let lease = engine.attach(&a, &[net.eth0(1), net.gw0(2)]).await.unwrap();
        good(&engine.round().await);
        assert_eq!(seen(), before);
        good(&engine.detach(&lease).await);
        good(&engine.teardown().await);
        assert_eq!(seen(), before);
        assert_eq!(count("tc qdisc show dev up0", "clsact"), 1);
    });
}

/// A daemon that starts again takes over: maps keep their contents, links stay attached, and not
/// a packet is lost meanwhile.
#[test]
fn a_restart_cuts_nothing() {
    run("restart", async |net| {
        let (a, b) = (net.task("a"), net.task("b"));
        let mut engine = net.engine();
        engine.set_records(net.records());
        engine.attach(&a, &[net.eth0(1), net.gw0(2)]).await.unwrap();
        engine.attach(&b, &[net.eth0(3)]).await.unwrap();
        good(&engine.round().await);
        let leases = engine.leases().to_vec();
        let saved = serde_json::to_string(&leases).unwrap();
        let (maps, links) = (net.dump("ENDPOINTS"), sh("ip -o link | sort"));
        let server = Server::start("b", &net.name("b"), 80);
        let asking = Asking::start(udp(&net.name("a"), Ipv4Addr::new(10, 0, 0, 3), 80));
        drop(engine);
        let mut engine = net.engine();
        engine.restore(serde_json::from_str(&saved).unwrap());
        engine.set_records(net.records());
        let report = engine.round().await;
        good(&report);
        // Only the programs are new, and the nft table that nobody vouches for.
        let others: Vec<_> = report
            .applied
            .iter()
            .filter(|done| !done.starts_with("change program") && !done.contains("nft"))
            .collect();
        assert!(others.is_empty(), "{others:#?}");
        assert_eq!((net.dump("ENDPOINTS"), sh("ip -o link | sort")), (maps, links));
        let answers = asking.stop();
        assert!(answers > 10, "only {answers} questions");
        drop(server);
    });
}

/// A task's death takes its interfaces; the next round says so, and its entries go.
#[test]
fn a_namespace_that_ends_is_reported() {
    run("gone", async |net| {
        let (a, b) = (net.task("a"), net.task("b"));
        let mut engine = net.engine();
        engine.set_records(net.records());
        engine.attach(&a, &[net.eth0(1), net.gw0(2)]).await.unwrap();
        engine.attach(&b, &[net.eth0(3)]).await.unwrap();
        mesh_linux::netns::remove(&net.name("a")).unwrap();
        let deadline = Instant::now() + patience();
        loop {
            let report = engine.round().await;
            good(&report);
            assert_eq!(report.gone.len(), 1);
            if count("ip -o link", "mv0") == 1 && net.dump("PORTS").len() == 1 {
                break;
            }
            assert!(Instant::now() < deadline, "{:#?}", report.applied);
        }
        let gone = engine.round().await.gone.remove(0);
        engine.detach(&gone).await;
        let report = engine.round().await;
        assert!(report.gone.is_empty() && report.applied.is_empty(), "{:#?}", report.applied);
        // A new task in place of the old one, under the same name.
        let a = net.task("a");
        engine.attach(&a, &[net.eth0(5)]).await.unwrap();
        ping(&net.name("a"), "10.0.0.3");
    });
}

/// The way of kernels before 6.6: clsact filters, replaced in place on restart.
#[test]
fn clsact_does_it_too() {
    run("clsact", async |net| {
        net.clsact = true;
        let (a, b) = (net.task("a"), net.task("b"));
        let mut engine = net.engine();
        assert!(!engine.features().tcx);
        engine.set_records(net.records());
        engine.attach(&a, &[net.eth0(1), net.gw0(2)]).await.unwrap();
        engine.attach(&b, &[net.eth0(3)]).await.unwrap();
        let leases = engine.leases().to_vec();
        drop(engine);
        let mut engine = net.engine();
        engine.restore(leases);
        engine.set_records(net.records());
        good(&engine.round().await);
        let report = engine.round().await;
        assert!(report.applied.is_empty(), "not level: {:#?}", report.applied);
        assert_eq!(count("tc filter show dev mv0000000001 ingress", "from_task"), 1);
        sh("tc qdisc del dev mv0000000001 clsact");
        let report = engine.round().await;
        assert_eq!(report.healed, 1, "{:#?}", report.applied);
        ping(&net.name("a"), "10.0.0.3");
        good(&engine.teardown().await);
        net.assert_clean();
    });
}

/// What makes no sense is refused before anything is made.
#[test]
fn bad_attachments_are_refused() {
    run("bad", async |net| {
        let (a, b) = (net.task("a"), net.task("b"));
        let mut engine = net.engine();
        engine.set_records(net.records());
        let mut bad = net.eth0(1);
        bad.ifname = "a/b".to_owned();
        let error = engine.attach(&a, &[bad]).await.unwrap_err().to_string();
        assert!(error.contains("`a/b` is not a name"), "{error}");
        let error = engine.attach(&a, &[net.eth0(1), net.eth0(3)]).await.unwrap_err().to_string();
        assert!(error.contains("two interfaces"), "{error}");
        engine.attach(&a, &[net.eth0(1)]).await.unwrap();
        engine.attach(&a, &[net.eth0(1)]).await.unwrap();
        let error = engine.attach(&b, &[net.eth0(1)]).await.unwrap_err().to_string();
        assert!(error.contains("endpoint 1 is plugged into"), "{error}");
        let error = engine.attach("/proc/none".as_ref(), &[]).await.unwrap_err().to_string();
        assert!(error.contains("/proc/none"), "{error}");
        // A name that is taken inside the task: refused by the kernel, and nothing is left of it.
        sh(&format!("ip -n {} link add eth0 type veth peer name eth1", net.name("b")));
        let error = engine.attach(&b, &[net.eth0(3)]).await.unwrap_err().to_string();
        assert!(error.contains("mv0000000003"), "{error}");
        assert_eq!(engine.leases().len(), 1);
        assert_eq!(count("ip -o link", "mv0"), 1);
        assert_eq!(net.dump("PORTS").len(), 1);
    });
}

/// `gw0` leads out: a host that knows no way to the task's address answers the node's.
#[test]
fn the_way_out_is_masqueraded() {
    run("out", async |net| {
        let (a, _) = (net.task("a"), net.task("host"));
        let host = net.name("host");
        ip(&format!("link set wire0 netns {host}"));
        ip(&format!("-n {host} addr add 192.0.2.9/24 dev wire0"));
        ip(&format!("-n {host} link set wire0 up"));
        let mut engine = net.engine();
        engine.set_records(net.records());
        engine.attach(&a, &[net.gw0(2)]).await.unwrap();
        ping(&net.name("a"), "192.0.2.9");
        let routes = engine.host_routes().unwrap();
        assert!(routes.contains(&"192.0.2.0/24".parse().unwrap()), "{routes:?}");
        assert!(routes.iter().all(|route| !route.to_string().starts_with("172.30")), "{routes:?}");
    });
}

/// The data path port of another device: said with the remedy, and the rest works.
#[test]
fn a_taken_port_is_named() {
    run("port", async |net| {
        sh("ip link add taken type vxlan external dstport 4789; ip link set taken up");
        let mut engine = net.engine();
        engine.set_records(net.records());
        let report = engine.round().await;
        let message = &report.failures[0].message;
        assert!(message.contains("mesh-vxlan: UDP port 4789 is taken"), "{message}");
        assert!(!net.dump("ENDPOINTS").is_empty());
        sh("ip link del taken");
        good(&engine.round().await);
    });
}

/// Flows that were silent for too long are collected, the others stay.
#[test]
fn old_flows_are_collected() {
    run("flows", async |net| {
        let mut engine = net.engine();
        // The clock is the caller's.
        let now = 1u64 << 50;
        // `FlowKey`: protocol at byte 40, kind (mesh) at 41; `FlowValue`: time at 32, state
        // (replied, one entry only) at 44.
        for (client, last) in [(1u8, 0), (2, now), (3, 0), (4, now)] {
            let mut key = vec![0; 44];
            (key[0], key[40], key[41]) = (client, 17, 3);
            let mut value = vec![0; 48];
            value[32..40].copy_from_slice(&last.to_ne_bytes());
            value[44] = 17;
            net.map("FLOWS").put(&key, &value).unwrap();
        }
        let mut removed = 0;
        for _ in 0..3 {
            removed += engine.collect_flows(now);
        }
        let left: Vec<u8> = net.dump("FLOWS").keys().map(|key| key[0]).collect();
        assert_eq!((removed, left), (2, vec![2, 4]));
    });
}

/// What is missing is said at once and before anything is changed.
#[test]
fn a_machine_without_bpffs_is_told() {
    run("missing", async |net| {
        let directory = std::env::temp_dir().join(net.name("pins"));
        let config = mesh_linux::EngineConfig { pin_dir: directory.clone(), ..net.config() };
        let error = mesh_linux::Engine::open(config).unwrap_err().to_string();
        assert!(error.contains("a bpffs at") && error.contains("mount -t bpf"), "{error}");
        assert!(!directory.exists());
    });
}
