//! Data-path probes and what is told of them, in clusters where only some nodes watch each.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use mesh_gossip::{
    Hint, HintState, Subject,
    probe::{Limits, PERIOD, Probes},
};
use rand::RngExt;

use crate::net::{SEC, Sim, expected, number};

/// Virtual time goes on by this much.
const STEP: Duration = Duration::from_millis(10);

/// A cluster whose nodes probe each other, as the daemon has it: what probes find goes to gossip,
/// what gossip hears goes to the probes.
struct Watch {
    sim: Sim,
    probes: BTreeMap<u64, Probes>,
    /// Nodes whose data path is cut.
    cut: BTreeSet<u64>,
    ticks: BTreeMap<u64, Duration>,
    nonce: u64,
    sent: u64,
}

fn end(n: u64) -> IpAddr {
    Ipv4Addr::from_bits(u32::try_from(n).unwrap()).into()
}

impl Watch {
    /// A cluster whose nodes know each other.
    fn new(seed: u64, count: u64, limits: Limits) -> Self {
        let mut sim = Sim::new(seed, count);
        sim.await_within(60 * SEC, "all see all", Sim::agreed);
        let nodes = (1..=count).map(|n| (number(n), end(n))).collect();
        let mut probes = BTreeMap::new();
        let mut ticks = BTreeMap::new();
        for n in 1..=count {
            let mut of = Probes::new(number(n), limits);
            of.set_nodes(sim.now, &nodes);
            probes.insert(n, of);
            ticks.insert(n, sim.now + PERIOD.mul_f64(sim.rng.random_range(0.0..1.0)));
        }
        let mut watch = Self { sim, probes, cut: BTreeSet::new(), ticks, nonce: 0, sent: 0 };
        watch.run(SEC);
        watch
    }

    fn step(&mut self) {
        self.sim.run(STEP);
        let now = self.sim.now;
        for (n, probes) in &mut self.probes {
            if !self.sim.nodes.contains_key(n) {
                continue;
            }
            let heard = self.sim.with(*n, |node, _| node.accusations()).unwrap();
            let new = probes.set_accused(now, &heard);
            if new || self.ticks[n] <= now {
                self.ticks.insert(*n, now + PERIOD);
                let nonce = &mut self.nonce;
                let sent = probes.tick(now, &mut || {
                    *nonce += 1;
                    *nonce
                });
                self.sent += sent.len() as u64;
                for (peer, vtep, nonce) in sent {
                    let both_ways = 1.0 - (1.0 - self.sim.loss).powi(2);
                    let lost = self.sim.rng.random_bool(both_ways);
                    if !lost && !self.cut.contains(n) && !self.cut.contains(&peer.get()) {
                        probes.answered(now, peer, vtep, nonce);
                    }
                }
            }
            let silent = probes.silent();
            self.sim.with(*n, |node, now| node.set_silent(now, silent));
        }
    }

    fn run(&mut self, time: Duration) {
        let until = self.sim.now + time;
        while self.sim.now < until {
            self.step();
        }
    }

    /// How many other nodes have a peer out of their balancing.
    fn without(&self, peer: u64) -> usize {
        let out = |(n, probes): &(&u64, &Probes)| {
            **n != peer && !self.cut.contains(n) && probes.withdrawn().contains(&number(peer))
        };
        self.probes.iter().filter(out).count()
    }

    /// Runs until so many have it out; how long that took.
    fn until_without(&mut self, peer: u64, wanted: impl Fn(usize) -> bool) -> Duration {
        let start = self.sim.now;
        while !wanted(self.without(peer)) {
            assert!(self.sim.now < start + 5 * SEC, "{} of {peer}", self.without(peer));
            self.step();
        }
        self.sim.now - start
    }
}

#[test]
fn a_dead_node_is_out_everywhere_in_about_a_second_though_few_watch_it() {
    const NODES: usize = 160;
    for seed in 1..=2 {
        let mut watch = Watch::new(seed, NODES as u64, Limits::DEFAULT);
        watch.sim.loss = 0.01;
        let before = watch.sent;
        watch.run(SEC);
        let per_node = (watch.sent - before) / NODES as u64;
        assert!(per_node <= 170, "{per_node} probes per second and node");
        watch.sim.nodes.remove(&7);
        watch.cut.insert(7);
        let start = watch.sim.now;
        let most = watch.until_without(7, |out| out * 100 >= (NODES - 1) * 99);
        watch.until_without(7, |out| out == NODES - 1);
        let all = watch.sim.now - start;
        // Its data path is back before its daemon is.
        watch.run(2 * SEC);
        watch.cut.clear();
        let back = watch.until_without(7, |out| out == 0);
        println!("seed {seed}: out at 99 % after {most:?}, at all after {all:?}, back {back:?}");
        assert!(most <= Duration::from_millis(800), "99 % after {most:?}");
        assert!(all <= SEC, "all after {all:?}");
        assert!(back <= SEC, "back after {back:?}");
        // All look at the one that was out for a while.
        watch.run(SEC);
        let before = watch.sent;
        watch.run(SEC);
        assert!((watch.sent - before) / NODES as u64 <= per_node + 11);
        // Three lost probes in a row are one watcher's own mistake, for a moment, and no other's.
        assert!((1..=NODES as u64).all(|n| watch.without(n) <= 1));
    }
}

#[test]
fn liars_take_nobody_out() {
    let limits = Limits { peers: 5, watchers: 6, quorum: 3 };
    let mut watch = Watch::new(4, 20, limits);
    // One says of all that they are silent, in its own name and in everybody else's.
    for (owner, peer) in (1..=20).flat_map(|o| (1..=20).map(move |p| (o, p))) {
        let subject = Subject::DataPath(number(peer));
        let lie =
            Hint { subject, owner: number(owner), generation: 1 << 40, state: HintState::Dead };
        watch.sim.with(3, |node, now| node.hint(now, lie));
    }
    for _ in 0..500 {
        watch.step();
        assert!((1..=20).all(|n| watch.without(n) == 0));
    }
    // Those in whose name it lied have said the contrary.
    let accused = watch.sim.with(1, |node, _| node.accusations()).unwrap();
    assert!(accused.values().all(|by| by.iter().all(|n| n.get() == 3)), "{accused:?}");
}

#[test]
fn what_an_earlier_life_said_is_taken_back() {
    let limits = Limits { peers: 2, watchers: 3, quorum: 1 };
    let mut watch = Watch::new(5, 8, limits);
    watch.cut.insert(2);
    watch.until_without(2, |out| out == 7);
    let said = watch.sim.with(1, |node, _| node.accusations()).unwrap();
    let accuser = said[&number(2)].first().unwrap().get();
    // It restarts; meanwhile the other is back.
    watch.sim.nodes.remove(&accuser);
    watch.cut.clear();
    watch.run(SEC);
    watch.sim.start(accuser, 2);
    watch.sim.with(accuser, |node, now| node.set_members(now, expected(1..=8)));
    watch.run(5 * SEC);
    for n in 1..=8 {
        let accused = watch.sim.with(n, |node, _| node.accusations()).unwrap();
        assert!(accused.is_empty(), "{n} still hears {accused:?}");
    }
}
