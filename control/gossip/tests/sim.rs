//! Whole clusters in virtual time: each seed is one run, exactly repeatable. Datagrams are delayed,
//! reordered and lost; what is proved is what holds over the seeds below, not for all networks.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    net::SocketAddr,
    time::Duration,
};

use mesh_gossip::{Config, Event, Expected, Gossip, GossipKey, Keyring, Member, Timings};
use mesh_types::{ClusterId, Epoch, NodeId, NodeNumber};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const SEC: Duration = Duration::from_secs(1);

type InFlight = (Duration, u64, u64, Vec<u8>);

struct Sim {
    now: Duration,
    rng: StdRng,
    loss: f64,
    nodes: BTreeMap<u64, Gossip>,
    /// Frozen nodes: their sockets fill, their timers wait.
    stalled: BTreeMap<u64, Vec<Vec<u8>>>,
    cut: BTreeSet<(u64, u64)>,
    /// When, a tie-breaker, to whom, what.
    wire: BinaryHeap<Reverse<InFlight>>,
    sent: u64,
    bytes: u64,
    log: Vec<(Duration, u64, Event)>,
}

fn number(n: u64) -> NodeNumber {
    NodeNumber::new(n).unwrap()
}

fn address(n: u64) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, u8::try_from(n).unwrap()], 7946))
}

fn expected(nodes: impl IntoIterator<Item = u64>) -> BTreeMap<NodeNumber, Expected> {
    let node = |n| Expected { id: NodeId::from_bits(u128::from(n)), address: address(n) };
    nodes.into_iter().map(|n| (number(n), node(n))).collect()
}

impl Sim {
    fn new(seed: u64, count: u64) -> Self {
        let mut sim = Self {
            now: Duration::ZERO,
            rng: StdRng::seed_from_u64(seed),
            loss: 0.0,
            nodes: BTreeMap::new(),
            stalled: BTreeMap::new(),
            cut: BTreeSet::new(),
            wire: BinaryHeap::new(),
            sent: 0,
            bytes: 0,
            log: Vec::new(),
        };
        for n in 1..=count {
            sim.start(n, 1);
            let all = expected(1..=count);
            sim.with(n, |node, now| node.set_members(now, all));
        }
        sim
    }

    fn start(&mut self, n: u64, bump: u64) {
        let config = Config {
            identity: Member {
                number: number(n),
                id: NodeId::from_bits(u128::from(n)),
                address: address(n),
                bump,
            },
            cluster: ClusterId::from_bits(1),
            keys: Keyring::new(GossipKey { epoch: Epoch::MIN, secret: [7; 32] }),
            timings: Timings::LAN,
        };
        let seed = self.rng.random();
        self.nodes.insert(n, Gossip::new(config, self.now, seed));
    }

    fn with(&mut self, n: u64, act: impl FnOnce(&mut Gossip, Duration)) {
        let Some(node) = self.nodes.get_mut(&n) else { return };
        act(node, self.now);
        while let Some(event) = node.poll_event() {
            self.log.push((self.now, n, event));
        }
        while let Some((to, datagram)) = node.poll_transmit() {
            assert!(datagram.len() <= 1400);
            self.sent += 1;
            self.bytes += datagram.len() as u64;
            let SocketAddr::V4(v4) = to else { panic!("not ours: {to}") };
            let to = u64::from(v4.ip().octets()[3]);
            let lost = self.rng.random_bool(self.loss) || self.cut.contains(&(n, to));
            if !lost {
                let delay = Duration::from_micros(self.rng.random_range(100..3000));
                self.wire.push(Reverse((self.now + delay, self.sent, to, datagram)));
            }
        }
    }

    fn run_until(&mut self, end: Duration) {
        loop {
            let timer = self
                .nodes
                .iter()
                .filter(|(n, _)| !self.stalled.contains_key(n))
                .filter_map(|(n, node)| Some((node.next_timer()?, *n)))
                .min();
            let arrival = self.wire.peek().map(|Reverse((at, ..))| *at);
            match (timer, arrival) {
                (Some((at, n)), arrival) if at <= end && arrival.is_none_or(|a| at <= a) => {
                    self.now = self.now.max(at);
                    self.with(n, Gossip::handle_timer);
                }
                (_, Some(at)) if at <= end => {
                    let Reverse((at, _, to, datagram)) = self.wire.pop().unwrap();
                    self.now = self.now.max(at);
                    if let Some(queue) = self.stalled.get_mut(&to) {
                        queue.push(datagram);
                    } else {
                        self.with(to, |node, now| drop(node.handle_datagram(now, &datagram)));
                    }
                }
                _ => break,
            }
        }
        self.now = end;
    }

    fn run(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    /// Runs until the condition holds; says how long it took.
    fn await_within(
        &mut self,
        limit: Duration,
        what: &str,
        done: impl Fn(&Self) -> bool,
    ) -> Duration {
        let start = self.now;
        while !done(self) {
            assert!(self.now < start + limit, "not within {limit:?}: {what}");
            self.run(Duration::from_millis(10));
        }
        self.now - start
    }

    fn sees(&self, n: u64) -> BTreeSet<u64> {
        self.nodes[&n].members().map(|view| view.member.number.get()).collect()
    }

    /// Every node sees exactly the others that run.
    fn agreed(&self) -> bool {
        let all: BTreeSet<u64> = self.nodes.keys().copied().collect();
        self.nodes.keys().all(|n| {
            let mut seen = self.sees(*n);
            seen.insert(*n);
            seen == all
        })
    }

    fn deaths(&self) -> Vec<&(Duration, u64, Event)> {
        self.log.iter().filter(|(_, _, event)| matches!(event, Event::Down(_))).collect()
    }

    fn restore(&mut self, n: u64) {
        // Timers are late and the socket is full, and nothing says which is looked at first.
        let queue = self.stalled.remove(&n).unwrap();
        self.with(n, Gossip::handle_timer);
        for datagram in queue {
            self.with(n, |node, now| drop(node.handle_datagram(now, &datagram)));
        }
    }
}

#[test]
fn all_see_each_other() {
    for (seed, count) in [(1, 2), (2, 5), (3, 20), (4, 50)] {
        let mut sim = Sim::new(seed, count);
        sim.loss = 0.05;
        let took = sim.await_within(10 * SEC, "all see all", Sim::agreed);
        assert!(took < 5 * SEC, "{count} nodes took {took:?}");
    }
}

#[test]
fn a_joiner_needs_one_address_only() {
    let mut sim = Sim::new(1, 4);
    sim.await_within(10 * SEC, "four see each other", Sim::agreed);
    sim.start(5, 1);
    sim.with(5, |node, now| node.announce(now, address(2)));
    sim.run(2 * SEC);
    assert!(sim.sees(1).len() == 3 && sim.sees(5).is_empty(), "the store does not know it yet");
    for n in 1..=4 {
        sim.with(n, |node, now| node.set_members(now, expected(1..=5)));
    }
    sim.await_within(5 * SEC, "the fifth is in", Sim::agreed);
}

#[test]
fn a_death_is_seen_by_all_in_two_seconds() {
    let mut all = Vec::new();
    for seed in 0..10 {
        for count in [2, 3, 5, 20, 50] {
            let mut sim = Sim::new(seed, count);
            sim.await_within(10 * SEC, "all see all", Sim::agreed);
            sim.run(3 * SEC);
            assert_eq!(sim.deaths(), Vec::<&(Duration, u64, Event)>::new());
            sim.nodes.remove(&1);
            let took = sim.await_within(10 * SEC, "the death is known", Sim::agreed);
            assert!(
                (SEC..Duration::from_millis(3200)).contains(&took),
                "seed {seed}, {count}: {took:?}"
            );
            all.push(took);
        }
    }
    all.sort();
    assert!(all[all.len() / 2] < 2 * SEC, "median {:?}", all[all.len() / 2]);
}

#[test]
fn a_small_loss_kills_nobody() {
    for seed in 0..20 {
        let mut sim = Sim::new(seed, 10);
        sim.loss = 0.05;
        sim.run(120 * SEC);
        assert!(sim.agreed(), "seed {seed}");
        assert!(sim.deaths().is_empty(), "seed {seed}: {:?}", sim.deaths());
    }
}

#[test]
fn a_third_lost_kills_nobody_in_a_minute() {
    for (seed, count) in (0..12).map(|n| (n, 5)).chain((0..3).map(|n| (n, 30))) {
        let mut sim = Sim::new(seed, count);
        sim.await_within(10 * SEC, "all see all", Sim::agreed);
        sim.loss = 0.3;
        sim.run(60 * SEC);
        assert!(sim.deaths().is_empty(), "seed {seed}, {count} nodes: {:?}", sim.deaths());
        // And still a death is seen.
        sim.nodes.remove(&1);
        sim.await_within(8 * SEC, "a death under loss", |sim| {
            sim.nodes.keys().all(|n| !sim.sees(*n).contains(&1))
        });
    }
}

#[test]
fn a_node_that_was_frozen_blames_nobody() {
    for seed in 0..10 {
        let mut sim = Sim::new(seed, 5);
        sim.await_within(10 * SEC, "all see all", Sim::agreed);
        sim.stalled.insert(1, Vec::new());
        sim.run(4 * SEC);
        sim.restore(1);
        sim.run(5 * SEC);
        let blamed: Vec<_> = sim.deaths().into_iter().filter(|(_, by, _)| *by == 1).collect();
        assert!(blamed.is_empty(), "seed {seed}: {blamed:?}");
        assert!(sim.agreed(), "seed {seed}: it is back");
    }
}

#[test]
fn a_partition_heals_without_help() {
    for seed in 0..5 {
        let mut sim = Sim::new(seed, 6);
        sim.await_within(10 * SEC, "all see all", Sim::agreed);
        for (a, b) in (1..=3).flat_map(|a| (4..=6).map(move |b| (a, b))) {
            sim.cut.extend([(a, b), (b, a)]);
        }
        sim.await_within(12 * SEC, "each side sees itself alone", |sim| {
            (1..=3).all(|n| sim.sees(n).iter().all(|m| *m <= 3))
                && (4..=6).all(|n| sim.sees(n).iter().all(|m| *m > 3))
        });
        sim.run(30 * SEC);
        sim.cut.clear();
        let took = sim.await_within(10 * SEC, "whole again", Sim::agreed);
        assert!(took < 5 * SEC, "seed {seed}: {took:?}");
        // And it stays whole.
        sim.run(10 * SEC);
        assert!(sim.agreed());
    }
}

#[test]
fn one_bad_link_kills_nobody() {
    let mut sim = Sim::new(3, 5);
    sim.await_within(10 * SEC, "all see all", Sim::agreed);
    sim.cut.extend([(1, 2), (2, 1)]);
    sim.run(60 * SEC);
    assert!(sim.deaths().is_empty(), "{:?}", sim.deaths());
}

#[test]
fn a_leaver_is_gone_at_once_and_is_not_called_dead() {
    let mut sim = Sim::new(1, 5);
    sim.await_within(10 * SEC, "all see all", Sim::agreed);
    sim.with(3, |node, _| node.leave());
    sim.run(Duration::from_millis(20));
    for n in [1, 2, 4, 5] {
        assert!(!sim.sees(n).contains(&3));
        assert!(sim.log.iter().any(|(_, by, event)| (*by, *event) == (n, Event::Left(number(3)))));
    }
    assert!(sim.deaths().is_empty());
}

#[test]
fn a_quick_restart_is_seen_as_one() {
    let mut sim = Sim::new(1, 5);
    sim.await_within(10 * SEC, "all see all", Sim::agreed);
    sim.nodes.remove(&2);
    sim.run(Duration::from_millis(200));
    sim.start(2, 2);
    sim.with(2, |node, now| node.set_members(now, expected(1..=5)));
    sim.run(5 * SEC);
    assert!(sim.agreed());
    assert!(sim.deaths().is_empty(), "{:?}", sim.deaths());
    for n in [1, 3, 4, 5] {
        assert!(sim.log.iter().any(|(_, by, e)| (*by, *e) == (n, Event::Restarted(number(2)))));
    }
}

#[test]
fn a_node_that_the_store_forgot_is_no_member_and_stays_out() {
    let mut sim = Sim::new(1, 5);
    sim.await_within(10 * SEC, "all see all", Sim::agreed);
    for n in 1..=4 {
        sim.with(n, |node, now| node.set_members(now, expected(1..=4)));
    }
    sim.run(20 * SEC);
    for n in 1..=4 {
        assert_eq!(sim.sees(n).len(), 3, "node {n}");
        assert!(sim.log.iter().any(|(_, by, e)| (*by, *e) == (n, Event::Left(number(5)))));
    }
}

#[test]
fn an_idle_member_sends_little() {
    let mut sim = Sim::new(1, 20);
    sim.await_within(10 * SEC, "all see all", Sim::agreed);
    sim.run(20 * SEC);
    let before = sim.bytes;
    sim.run(60 * SEC);
    let per_second = (sim.bytes - before) / 60 / 20;
    assert!(per_second < 1200, "{per_second} bytes per second and node");
}
