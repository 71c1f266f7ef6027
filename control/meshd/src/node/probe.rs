//! Data-path probes: is a peer's tunnel end reachable, whatever its daemon does?
//!
//! Every 100 ms each peer gets a datagram through the tunnel's port, which the peer's BPF program
//! reflects without its daemon. [`Probes`] judges the answers without socket or clock; [`start`]
//! is the shell around it. A peer that stays silent is withdrawn from balancing here; the first
//! answer restores it, unless its link flaps: then it must answer without a gap for longer and
//! longer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use mesh_dataplane::probe::{decode_reply, encode_request};
use mesh_types::{NodeNumber, record::RecordSet};
use tokio::{
    net::UdpSocket,
    sync::watch,
    task::AbortHandle,
    time::{MissedTickBehavior, interval},
};

use super::clock;

/// Between two probes of a peer.
const PERIOD: Duration = Duration::from_millis(100);
/// A peer is withdrawn when three probes in a row went unanswered, beside the way there and back.
const SILENCE: Duration = Duration::from_millis(300);
/// Whoever looks rarer than this was not running meanwhile: the silence was its own.
const SLEPT: Duration = Duration::from_millis(250);
/// Answers to older probes count no more.
const OLDEST: Duration = Duration::from_secs(2);
/// A link that fails again within this time flaps.
const FLAPS_WITHIN: Duration = Duration::from_secs(30);
/// The first answer restores a peer; of a flapping one it takes this long without a gap, doubled
/// by every further failure.
const HOLD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(16));
/// Up to this many peers are all probed.
const PEERS_ALL: usize = 128;
/// Of more, each is watched by this many nodes.
const WATCHERS: usize = 16;

#[derive(Debug)]
struct Peer {
    vtep: IpAddr,
    /// Probes on their way, and when they were sent.
    sent: BTreeMap<u64, Duration>,
    /// When it last answered; at first, when it became a peer.
    answered: Duration,
    /// Smoothed, as in RFC 6298.
    round_trip: Duration,
    /// It answered at least once.
    known: bool,
    withdrawn: bool,
    /// Since when it answers without a gap.
    answers_since: Option<Duration>,
    /// When it was last withdrawn.
    failed: Option<Duration>,
    /// How long it has to answer before it is restored.
    hold: Duration,
}

/// What is known of the peers' data paths. Time is a [`Duration`] since any fixed moment.
#[derive(Debug)]
pub(crate) struct Probes {
    own: NodeNumber,
    peers: BTreeMap<NodeNumber, Peer>,
    ticked: Option<Duration>,
}

impl Probes {
    pub(crate) fn new(own: NodeNumber) -> Self {
        Self { own, peers: BTreeMap::new(), ticked: None }
    }

    /// All nodes with their tunnel ends; this one and those that others watch are left out.
    pub(crate) fn set_nodes(&mut self, now: Duration, nodes: &BTreeMap<NodeNumber, IpAddr>) {
        let watched = watched(self.own, nodes);
        self.peers.retain(|number, peer| {
            watched.contains(number) && nodes.get(number) == Some(&peer.vtep)
        });
        for number in watched {
            let Some(vtep) = nodes.get(&number).copied() else { continue };
            self.peers.entry(number).or_insert_with(|| Peer {
                vtep,
                sent: BTreeMap::new(),
                answered: now,
                round_trip: Duration::ZERO,
                known: false,
                withdrawn: false,
                answers_since: None,
                failed: None,
                hold: Duration::ZERO,
            });
        }
    }

    /// Judges the silence so far; the probes to send now. Called every [`PERIOD`].
    pub(crate) fn tick(
        &mut self,
        now: Duration,
        nonce: &mut dyn FnMut() -> u64,
    ) -> Vec<(NodeNumber, IpAddr, u64)> {
        let before = self.ticked.replace(now);
        let slept = before.is_none_or(|before| now.saturating_sub(before) > SLEPT);
        let mut probes = Vec::with_capacity(self.peers.len());
        for (number, peer) in &mut self.peers {
            if slept {
                peer.answered = peer.answered.max(now.saturating_sub(PERIOD));
                peer.sent.clear();
            }
            peer.judge(now);
            peer.sent.retain(|_, at| now.saturating_sub(*at) < OLDEST);
            let nonce = nonce();
            peer.sent.insert(nonce, now);
            probes.push((*number, peer.vtep, nonce));
        }
        probes
    }

    /// An answer came.
    pub(crate) fn answered(&mut self, now: Duration, number: NodeNumber, from: IpAddr, nonce: u64) {
        let Some(peer) = self.peers.get_mut(&number).filter(|peer| peer.vtep == from) else {
            return;
        };
        // Of a probe that was not sent, or answered already.
        let Some(sent) = peer.sent.remove(&nonce) else { return };
        let took = now.saturating_sub(sent);
        peer.round_trip = if peer.known { (peer.round_trip * 7 + took) / 8 } else { took };
        (peer.known, peer.answered) = (true, now);
        let since = *peer.answers_since.get_or_insert(now);
        if peer.withdrawn && now.saturating_sub(since) >= peer.hold {
            peer.withdrawn = false;
        }
    }

    /// Peers whose endpoints get no new flows.
    pub(crate) fn withdrawn(&self) -> BTreeSet<NodeNumber> {
        self.peers.iter().filter(|(_, peer)| peer.withdrawn).map(|(number, _)| *number).collect()
    }

    /// Peers that answered lately.
    pub(crate) fn reached(&self, now: Duration) -> BTreeSet<NodeNumber> {
        let fresh = |peer: &Peer| peer.known && now.saturating_sub(peer.answered) < peer.limit();
        self.peers.iter().filter(|(_, peer)| fresh(peer)).map(|(number, _)| *number).collect()
    }
}

impl Peer {
    fn limit(&self) -> Duration {
        SILENCE + self.round_trip
    }

    fn judge(&mut self, now: Duration) {
        if now.saturating_sub(self.answered) < self.limit() {
            return;
        }
        self.answers_since = None;
        if self.withdrawn {
            return;
        }
        self.withdrawn = true;
        let flaps = self.failed.is_some_and(|at| now.saturating_sub(at) < FLAPS_WITHIN);
        self.hold = match flaps {
            true => (self.hold * 2).clamp(HOLD.0, HOLD.1),
            false => Duration::ZERO,
        };
        self.failed = Some(now);
    }
}

/// Whom a node probes: everybody, or in a large cluster a share that every node computes alike, so
/// that enough nodes watch each.
fn watched(own: NodeNumber, nodes: &BTreeMap<NodeNumber, IpAddr>) -> BTreeSet<NodeNumber> {
    let others = || nodes.keys().copied().filter(|number| *number != own);
    if nodes.len() <= PEERS_ALL + 1 {
        return others().collect();
    }
    let closer = |peer: NodeNumber| {
        let mine = affinity(own, peer);
        let before = |other: &NodeNumber| *other != peer && affinity(*other, peer) < mine;
        nodes.keys().filter(|other| before(other)).take(WATCHERS).count() < WATCHERS
    };
    others().filter(|peer| closer(*peer)).collect()
}

/// A number that orders the watchers of a peer: rendezvous hashing by the finaliser of splitmix64.
fn affinity(watcher: NodeNumber, peer: NodeNumber) -> u64 {
    let mut x = watcher.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ peer.get().rotate_left(32);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The running probes; they end with it.
#[derive(Debug)]
pub(crate) struct Handle {
    /// Peers whose endpoints get no new flows.
    pub(crate) withdrawn: watch::Receiver<BTreeSet<NodeNumber>>,
    /// Peers that answered lately.
    pub(crate) reached: watch::Receiver<BTreeSet<NodeNumber>>,
    task: AbortHandle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts probing the nodes of the records from this node's tunnel end.
pub(crate) async fn start(
    own: NodeNumber,
    vtep: IpAddr,
    port: u16,
    records: watch::Receiver<Arc<RecordSet>>,
) -> Result<Handle> {
    let socket = UdpSocket::bind((vtep, 0))
        .await
        .with_context(|| format!("opening a UDP socket at {vtep} for data-path probes"))?;
    let (withdraw, withdrawn) = watch::channel(BTreeSet::new());
    let (reach, reached) = watch::channel(BTreeSet::new());
    let shell = Shell { own, port, socket, records, probes: Probes::new(own), withdraw, reach };
    let task = tokio::spawn(shell.run()).abort_handle();
    Ok(Handle { withdrawn, reached, task })
}

struct Shell {
    own: NodeNumber,
    port: u16,
    socket: UdpSocket,
    records: watch::Receiver<Arc<RecordSet>>,
    probes: Probes,
    withdraw: watch::Sender<BTreeSet<NodeNumber>>,
    reach: watch::Sender<BTreeSet<NodeNumber>>,
}

impl Shell {
    async fn run(mut self) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut buffer = [0; 256];
        self.records.mark_changed();
        loop {
            tokio::select! {
                // What was received counts before what is overdue.
                biased;
                received = self.socket.recv_from(&mut buffer) => {
                    // An ICMP error of an earlier probe comes back here: silence says the same.
                    let Ok((length, from)) = received else { continue };
                    let reply = decode_reply(&buffer[..length]);
                    if let Some((peer, nonce)) = reply.filter(|_| from.port() == self.port) {
                        self.probes.answered(clock::monotonic(), peer, from.ip(), nonce);
                        self.publish();
                    }
                }
                changed = self.records.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let records = Arc::clone(&self.records.borrow_and_update());
                    let nodes = records.nodes.values().map(|n| (n.number, n.vtep)).collect();
                    self.probes.set_nodes(clock::monotonic(), &nodes);
                    self.publish();
                }
                _ = ticks.tick() => self.tick(),
            }
        }
    }

    fn tick(&mut self) {
        let probes = self.probes.tick(clock::monotonic(), &mut rand::random);
        for (number, vtep, nonce) in probes {
            let datagram = encode_request(self.own, number, nonce);
            // A full queue or a missing route: no answer will come, which is what counts.
            let _ = self.socket.try_send_to(&datagram, SocketAddr::new(vtep, self.port));
        }
        self.publish();
    }

    fn publish(&self) {
        let update = |of: &watch::Sender<BTreeSet<NodeNumber>>, new: BTreeSet<NodeNumber>| {
            of.send_if_modified(|old| {
                let changed = *old != new;
                *old = new;
                changed
            })
        };
        let withdrawn = self.probes.withdrawn();
        let log = withdrawn.clone();
        if update(&self.withdraw, withdrawn) {
            tracing::info!(nodes = ?log, "peers whose data path is silent");
        }
        update(&self.reach, self.probes.reached(clock::monotonic()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(n: u64) -> NodeNumber {
        NodeNumber::new(n).unwrap()
    }

    fn end(n: u64) -> IpAddr {
        IpAddr::from([192, 0, (n >> 8) as u8, n as u8])
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn nodes(count: u64) -> BTreeMap<NodeNumber, IpAddr> {
        (1..=count).map(|n| (number(n), end(n))).collect()
    }

    /// A pair of nodes; `up` says when the link between them carries packets.
    struct Pair {
        probes: Probes,
        now: Duration,
        next: u64,
        round_trip: Duration,
        flying: Vec<(Duration, u64)>,
    }

    impl Pair {
        fn new(round_trip: Duration) -> Self {
            let mut probes = Probes::new(number(1));
            probes.set_nodes(ms(1000), &nodes(2));
            Self { probes, now: ms(1000), next: 0, round_trip, flying: Vec::new() }
        }

        /// Ten milliseconds at a time; how often the peer went from good to withdrawn.
        fn run(&mut self, duration: Duration, up: impl Fn(Duration) -> bool) -> usize {
            let until = self.now + duration;
            let mut failures = 0;
            while self.now < until {
                let before = self.out();
                let now = self.now;
                let (arrived, flying) =
                    std::mem::take(&mut self.flying).into_iter().partition(|(at, _)| *at <= now);
                self.flying = flying;
                for (_, nonce) in arrived {
                    self.probes.answered(now, number(2), end(2), nonce);
                }
                if now.as_millis().is_multiple_of(100) {
                    let next = &mut self.next;
                    let mut nonce = || {
                        *next += 1;
                        *next
                    };
                    for (_, _, nonce) in self.probes.tick(now, &mut nonce) {
                        if up(now) {
                            self.flying.push((now + self.round_trip, nonce));
                        }
                    }
                }
                failures += usize::from(self.out() && !before);
                self.now += ms(10);
            }
            failures
        }

        fn out(&self) -> bool {
            !self.probes.withdrawn().is_empty()
        }
    }

    #[test]
    fn silence_withdraws_within_half_a_second_and_an_answer_restores_at_once() {
        let mut pair = Pair::new(ms(10));
        assert_eq!(pair.run(ms(5000), |_| true), 0);
        assert!(pair.probes.reached(pair.now).contains(&number(2)));
        assert_eq!(pair.run(ms(500), |_| false), 1);
        assert!(pair.probes.reached(pair.now).is_empty());
        pair.run(ms(120), |_| true);
        assert!(!pair.out());
    }

    #[test]
    fn a_long_way_is_no_silence() {
        let mut pair = Pair::new(ms(280));
        assert_eq!(pair.run(ms(5000), |_| true), 0);
        assert_eq!(pair.run(ms(900), |_| false), 1);
    }

    #[test]
    fn a_flapping_link_does_not_flap_the_peer() {
        let mut pair = Pair::new(ms(10));
        pair.run(ms(1000), |_| true);
        // A second up, a second down, for a minute.
        let start = pair.now;
        let failures = pair.run(ms(60_000), |now| (now - start).as_secs().is_multiple_of(2));
        assert!(failures <= 3, "{failures}");
        pair.run(ms(20_000), |_| true);
        assert!(!pair.out());
    }

    #[test]
    fn one_that_slept_blames_nobody() {
        let mut pair = Pair::new(ms(10));
        pair.run(ms(1000), |_| true);
        pair.now += ms(30_000);
        assert_eq!(pair.run(ms(2000), |_| true), 0);
    }

    #[test]
    fn only_answers_to_own_probes_count() {
        let mut probes = Probes::new(number(1));
        probes.set_nodes(ms(0), &nodes(2));
        let sent = probes.tick(ms(100), &mut || 7);
        assert_eq!(sent.len(), 1);
        probes.answered(ms(110), number(2), end(2), 8);
        probes.answered(ms(110), number(2), end(3), 7);
        assert!(probes.reached(ms(110)).is_empty());
        probes.answered(ms(110), number(2), end(2), 7);
        assert_eq!(probes.reached(ms(110)), BTreeSet::from([number(2)]));
    }

    #[test]
    fn in_a_large_cluster_everybody_is_watched_by_enough() {
        let nodes = nodes(300);
        let mut watchers: BTreeMap<NodeNumber, usize> = BTreeMap::new();
        for own in nodes.keys() {
            let watched = watched(*own, &nodes);
            assert!(watched.len() < 60, "{}", watched.len());
            for peer in watched {
                *watchers.entry(peer).or_default() += 1;
            }
        }
        assert_eq!(watchers.len(), 300);
        assert!(watchers.values().all(|count| *count >= 8));
    }
}
