//! Frames that nobody should send, run through the programs as the kernel loaded them
//! (`BPF_PROG_TEST_RUN`): whatever comes, a program decides, and a drop has exactly one name.
//!
//! They are made from good frames by a few changes each, so that they get past the first checks.
//! `MESH_FUZZ_SECONDS` and `MESH_FUZZ_SEED` say for how long and which.

use std::{
    net::Ipv4Addr,
    ops::Range,
    time::{Duration, Instant, SystemTime},
};

use mesh_dataplane::{Hook, host_name};
use mesh_ebpf_abi::Counter;
use mesh_linux::Engine;

use crate::{
    cluster::{CLIENT, Cluster, INGRESS_VNI, Mode, OVERLAY_VNI, VIP, vtep},
    host::ip,
    net::{Forged, Server, ask_tcp},
    node::endpoint,
};

const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
/// `TC_ACT_UNSPEC` (which tcx calls next), `TC_ACT_OK`, and those.
const ACTIONS: [i32; 4] = [-1, 0, SHOT, REDIRECT];
/// What the kernel takes (`bpf_test_init` in net/bpf/test_run.c).
const FRAME_BYTES: Range<usize> = 14..1500;

#[test]
fn tcx() {
    storm("storm", Mode { via_device: false, clsact: false });
}

#[test]
fn via_device() {
    storm("storm-device", Mode { via_device: true, clsact: true });
}

fn storm(name: &str, mode: Mode) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number("MESH_FUZZ_SEED").unwrap_or(clock.as_nanos() as u64);
    let patience = Duration::from_secs(number("MESH_FUZZ_SECONDS").unwrap_or(3));
    let mut cluster = Cluster::new(name, &[mode, mode]);
    for (task, on, id, backend) in [("a", 1, 1, true), ("b", 2, 2, true), ("c", 1, 3, false)] {
        cluster.add_task(task, on, id, backend);
    }
    cluster.settle();
    let servers = ["a", "b"].map(|task| Server::start(task, &cluster.netns(task), 80));
    let shown = ip(&format!("-n {} -o link show up0", cluster.netns("n1")));
    let mac = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
    let mut bytes = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap());
    let uplink = std::array::from_fn(|_| bytes.next().unwrap());
    let random = Random { state: seed | 1, uplink };
    let runs = cluster.on(1, |engine| {
        let link = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
        let from_task = |id| (Hook::FromTask(endpoint(id)), link(&host_name(endpoint(id))));
        let mut hooks = vec![(Hook::FromUplink, link("up0"))];
        // eth0 and gw0 of a backend, and of a task that is none.
        hooks.extend([1, 101, 3, 103].map(from_task));
        if mode.via_device {
            hooks.push((Hook::FromVxlan, link("mesh-vxlan")));
        }
        let mut storm = Storm { engine, random, drops: drops(engine) };
        let deadline = Instant::now() + patience;
        let mut runs = 0u64;
        while Instant::now() < deadline {
            for (hook, link) in &hooks {
                let frame = storm.random.frame(*hook);
                storm.run(*hook, *link, &frame).unwrap_or_else(|why| {
                    panic!(
                        "MESH_FUZZ_SEED={seed}: {hook:?} after {runs} frames: {why}: {frame:02x?}"
                    )
                });
                runs += 1;
            }
        }
        runs
    });
    println!("{runs} frames, seed {seed}\n{}", cluster.all_counters());
    assert!(runs > 1000, "only {runs} frames in {patience:?}");
    // Good traffic was not harmed: flows of the storm are evicted, the tables as they were.
    let c = cluster.task("c");
    for to in [cluster.task("a").address, VIP] {
        assert_eq!(ask_tcp(&c.netns, to, 80).client.ip(), c.address);
    }
    drop(servers);
}

fn drops(engine: &Engine) -> u64 {
    let is_drop = |counter: Counter| counter as u32 >= Counter::DropMalformed as u32;
    engine.counters().into_iter().filter(|(of, _)| is_drop(*of)).map(|(_, count)| count).sum()
}

struct Storm<'a> {
    engine: &'a Engine,
    random: Random,
    drops: u64,
}

impl Storm<'_> {
    fn run(&mut self, hook: Hook, link: u32, frame: &[u8]) -> Result<(), String> {
        let action = match self.engine.test_run(hook, link, frame) {
            // Later kernels do not take an IP header that is cut off.
            Err(error) if error.raw_os_error() == Some(EINVAL) && is_cut(frame) => return Ok(()),
            action => action.map_err(|error| error.to_string())?,
        };
        if !ACTIONS.contains(&action) {
            return Err(format!("the action is {action}"));
        }
        let before = std::mem::replace(&mut self.drops, drops(self.engine));
        let counted = self.drops - before;
        // Other packets of the namespaces (neighbour discovery of the kernel's) are counted too.
        match (action, counted) {
            (SHOT, 1) => Ok(()),
            (SHOT, _) => Err(format!("dropped, and counted {counted} times")),
            (_, 0) => Ok(()),
            _ => Err(format!("not dropped, and counted {counted} times")),
        }
    }
}

const EINVAL: i32 = 22;

fn is_cut(frame: &[u8]) -> bool {
    let header = match frame.get(12..14) {
        Some([0x08, 0x00]) => 20,
        Some([0x86, 0xdd]) => 40,
        _ => 0,
    };
    frame.len() < 14 + header
}

/// The gateway's MAC, the same everywhere.
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 0];

/// xorshift64*, and what good frames need to know.
struct Random {
    state: u64,
    /// The underlay link's MAC.
    uplink: [u8; 6],
}

impl Random {
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A good frame for this hook, then up to four changes.
    fn frame(&mut self, hook: Hook) -> Vec<u8> {
        let mut frame = match hook {
            Hook::FromUplink if self.below(4) > 0 => self.tunnelled(),
            Hook::FromUplink => self.of_client(),
            Hook::FromVxlan => self.inner(),
            Hook::FromTask(id) => self.of_task(id.get() as u8),
            Hook::TaskLo(_) => unreachable!("not among the hooks"),
        };
        for _ in 0..self.below(5) {
            self.change(&mut frame);
        }
        frame.resize(frame.len().clamp(FRAME_BYTES.start, FRAME_BYTES.end), 0);
        frame
    }

    fn change(&mut self, frame: &mut Vec<u8>) {
        if frame.is_empty() {
            return;
        }
        // Mostly in the headers.
        let reach = if self.below(4) > 0 { frame.len().min(100) } else { frame.len() };
        let at = self.below(reach);
        match self.below(6) {
            0 => frame[at] ^= 1 << self.below(8),
            1 => frame[at] = self.next() as u8,
            2 => frame[at] = self.pick(&[0, 1, 0x45, 0x4f, 0x60, 0x7f, 0x80, 0xff]),
            3 => frame.truncate(at),
            // A VLAN tag, options, or nothing that makes sense.
            4 => {
                let count = self.pick(&[1, 4, 4, 8, 40]);
                let bytes: Vec<u8> = (0..count).map(|_| self.next() as u8).collect();
                frame.splice(at..at, bytes);
            }
            _ => {
                let end = (at + self.pick(&[1, 4, 8, 20])).min(frame.len());
                frame.drain(at..end);
            }
        }
    }

    /// What a node or a task may send from an endpoint; now and then something else.
    fn forged(&mut self, from: u8) -> Forged {
        let near = self.pick(&[1, 2, 3, 9]);
        let (vni, net) = match from {
            ..100 => (OVERLAY_VNI, 0),
            _ => (INGRESS_VNI, 255),
        };
        let source = Ipv4Addr::new(10, net, 0, from);
        let odd = [VIP, CLIENT, vtep(1), vtep(2), Ipv4Addr::BROADCAST, Ipv4Addr::LOCALHOST];
        let mut forged = Forged {
            vni,
            from: (2, from),
            to: (2, if net == 255 { 100 + near } else { near }),
            source: (source, self.pick(&[80, 1000, 8080])),
            target: (Ipv4Addr::new(10, net, 0, near), self.pick(&[80, 53, 4789, 8080])),
            text: "some bytes, and enough of them to be quoted in an error",
        };
        match self.below(8) {
            0 => forged.target.0 = self.pick(&odd),
            1 => forged.source.0 = self.pick(&odd),
            // Of the mesh, there and back.
            2 | 3 => {
                forged = Forged {
                    vni: INGRESS_VNI,
                    from: (10, 2),
                    to: (6, self.pick(&[101, 102, 103])),
                    source: (CLIENT, self.pick(&[1000, 1001])),
                    target: (vtep(self.pick(&[1, 2])), self.pick(&[8080, 8081, 99])),
                    ..forged
                };
            }
            4 => {
                forged = Forged {
                    vni: INGRESS_VNI,
                    from: (2, 102),
                    to: (10, self.pick(&[1, 2])),
                    source: (vtep(1), self.pick(&[8080, 80])),
                    target: (CLIENT, self.pick(&[1000, 1001])),
                    ..forged
                };
            }
            // Nobody's MAC, another network.
            5 => forged.to = (self.pick(&[2, 6, 10, 14, 0xff]), near),
            6 => forged.vni = self.pick(&[OVERLAY_VNI, INGRESS_VNI, 0, 77]),
            _ => forged.target.0 = self.pick(&[VIP, forged.target.0]),
        }
        forged
    }

    /// VXLAN from one node to another.
    fn tunnelled(&mut self) -> Vec<u8> {
        let payload = [&[8, 0, 0, 0, 0, 0x13, 0x88, 0], &self.inner()[..]].concat();
        let mut payload = payload;
        if self.below(3) == 0 {
            payload[5..7].copy_from_slice(&(INGRESS_VNI as u16).to_be_bytes());
        }
        let from = self.pick(&[vtep(2), vtep(2), vtep(2), vtep(2), vtep(2), vtep(9), CLIENT]);
        let to = (vtep(1), self.pick(&[4789, 4789, 4789, 4789, 4789, 8080]));
        ethernet(self.uplink, 0x0800, &udp(from, to, &payload))
    }

    /// What is in the tunnel to this node.
    fn inner(&mut self) -> Vec<u8> {
        let from = self.pick(&[2, 2, 102]);
        let mut frame = self.forged(from).bytes().split_off(8);
        self.as_tcp(&mut frame);
        frame
    }

    fn of_client(&mut self) -> Vec<u8> {
        let to = (vtep(1), self.pick(&[8080, 8080, 8081, 9999]));
        let mut frame = ethernet(self.uplink, 0x0800, &udp(CLIENT, to, &[0; 60]));
        self.as_tcp(&mut frame);
        frame
    }

    /// From a task's endpoint.
    fn of_task(&mut self, id: u8) -> Vec<u8> {
        match self.below(8) {
            // A request for an address (RFC 826).
            0 => {
                let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, id];
                arp.extend([10, 0, 0, id, 0, 0, 0, 0, 0, 0, 10, 0, 0, self.pick(&[2, 200, 254])]);
                ethernet([0xff; 6], 0x0806, &arp)
            }
            // A router advertisement (RFC 4861 section 4.2), or its like.
            1 => {
                let mut ip = vec![0x60, 0, 0, 0, 0, 16, 58, 255];
                ip.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
                ip.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
                ip.extend([134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
                ethernet([0x33, 0x33, 0, 0, 0, 1], 0x86dd, &ip)
            }
            kind => {
                let mut frame = self.forged(id).bytes().split_off(8);
                if kind == 2 {
                    // To the gateway: the VIP, or out.
                    frame[..6].copy_from_slice(&GATEWAY);
                }
                if id == 103 {
                    // A node-local `gw0`.
                    frame[26..30].copy_from_slice(&[172, 30, 0, 3]);
                }
                self.as_tcp(&mut frame);
                frame
            }
        }
    }

    /// Makes TCP or ICMP of a UDP datagram in IPv4 without options, now and then.
    fn as_tcp(&mut self, frame: &mut [u8]) {
        let (Some(protocol), flags) = (frame.get(23), self.pick(&[2, 16, 17, 18, 4, 0, 0xff]))
        else {
            return;
        };
        if *protocol != 17 || frame.len() < 54 {
            return;
        }
        match self.below(3) {
            0 => {
                frame[23] = 6;
                frame[46] = 0x50;
                frame[47] = flags;
            }
            1 => {
                frame[23] = 1;
                frame[34] = self.pick(&[0, 3, 3, 8, 11, 12]);
                frame[35] = self.pick(&[0, 3, 4]);
                // An error quotes a packet: turned around, it may be one of a flow here.
                let quoted: Vec<u8> = frame[14..34].to_vec();
                if let Some(room) = frame.get_mut(42..62) {
                    room.copy_from_slice(&quoted);
                }
            }
            _ => {}
        }
    }
}

fn ethernet(to: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([0x02, 0, 0, 0, 0, 3]);
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

fn udp(from: Ipv4Addr, (to, port): (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + length).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    for word in [40_000, port, length, 0] {
        ip.extend(word.to_be_bytes());
    }
    ip.extend(payload);
    ip
}
