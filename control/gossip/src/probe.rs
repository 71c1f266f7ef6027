//! Data-path probes: is a peer's tunnel end reachable, whatever its daemon does?
//!
//! Every 100 ms each peer gets a datagram through the tunnel's port, which the peer's BPF program
//! reflects without its daemon. [`Probes`] judges the answers. A peer that stays silent is
//! withdrawn from balancing here; the first answer restores it, unless its link flaps: then it must
//! answer without a gap for longer and longer.
//!
//! In a large cluster only some nodes watch each: the first by rendezvous hashing, so that all know
//! who. What they find is passed on ([`Gossip::set_silent`]), and is a reason to look, never proof:
//! once enough of a peer's own watchers call it silent, every node probes it too, and believes the
//! answers that it gets or lacks itself. So a node that lies, or sees badly, in its own name or in
//! that of others, takes nobody out of balancing anywhere but at home.
//!
//! [`Gossip::set_silent`]: crate::Gossip::set_silent

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use mesh_types::NodeNumber;

/// Between two probes of a peer.
pub const PERIOD: Duration = Duration::from_millis(100);
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
/// Peers that are probed for what others say of them, at most: liars cannot have all probe all.
const ACCUSED_MAX: usize = 256;
/// One of them that was silent for this long is as dead as its watchers say: they will find out
/// when it is back, and it is probed every [`RARELY`] only.
const PATIENCE: Duration = Duration::from_secs(5);
const RARELY: Duration = Duration::from_secs(1);

/// Who probes whom. All nodes of a cluster must use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Up to this many peers are all probed, by all.
    pub peers: usize,
    /// Of more, each is watched by this many nodes.
    pub watchers: usize,
    /// So many watchers must call a peer silent before others look.
    pub quorum: usize,
}

impl Limits {
    /// Sixteen watchers for each node of more than 129. Three of them may be cut off together, or
    /// lie, at no cost but probes.
    pub const DEFAULT: Self = Self { peers: 128, watchers: 16, quorum: 3 };

    /// Whether a cluster is too large for all to probe all.
    fn share(&self, nodes: usize) -> bool {
        nodes > self.peers + 1
    }
}

#[derive(Debug)]
struct Peer {
    vtep: IpAddr,
    /// Whether this node is one of its watchers; else it is probed for what they say.
    watched: bool,
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
pub struct Probes {
    own: NodeNumber,
    limits: Limits,
    nodes: BTreeMap<NodeNumber, IpAddr>,
    /// Whom this node watches.
    watched: BTreeSet<NodeNumber>,
    /// Whom enough of their watchers call silent.
    accused: BTreeSet<NodeNumber>,
    peers: BTreeMap<NodeNumber, Peer>,
    ticked: Option<Duration>,
    /// Everybody is probed until all are judged.
    everybody: bool,
}

impl Probes {
    /// Of a node that knows no other.
    #[must_use]
    pub fn new(own: NodeNumber, limits: Limits) -> Self {
        Self {
            own,
            limits,
            nodes: BTreeMap::new(),
            watched: BTreeSet::new(),
            accused: BTreeSet::new(),
            peers: BTreeMap::new(),
            ticked: None,
            everybody: false,
        }
    }

    /// Probes everybody, whoever watches whom, until all are judged: a node that starts has not
    /// heard yet whom the others found silent.
    #[must_use]
    pub fn of_everybody(mut self) -> Self {
        self.everybody = true;
        self
    }

    /// All nodes with their tunnel ends, this one among them.
    pub fn set_nodes(&mut self, now: Duration, nodes: &BTreeMap<NodeNumber, IpAddr>) {
        if self.nodes == *nodes {
            return;
        }
        self.nodes.clone_from(nodes);
        self.watched = watched(self.own, nodes, &self.limits);
        self.settle(now);
    }

    /// Whom others call silent, and who does. Only the word of a peer's own watchers counts. Says
    /// whether there is somebody to probe for it now who was not before.
    pub fn set_accused(
        &mut self,
        now: Duration,
        accusations: &BTreeMap<NodeNumber, BTreeSet<NodeNumber>>,
    ) -> bool {
        let before: BTreeSet<_> = self.peers.keys().copied().collect();
        self.accused.clear();
        if self.limits.share(self.nodes.len()) {
            let enough = accusations.iter().filter(|(_, by)| by.len() >= self.limits.quorum);
            for (peer, by) in enough {
                let watchers = watchers(*peer, &self.nodes, &self.limits);
                if watchers.intersection(by).count() >= self.limits.quorum {
                    self.accused.insert(*peer);
                }
            }
        }
        self.settle(now);
        self.peers.keys().any(|peer| !before.contains(peer))
    }

    /// Brings the peers in line with who should be probed.
    fn settle(&mut self, now: Duration) {
        let (nodes, watched) = (&self.nodes, &self.watched);
        let accused: BTreeSet<_> = self
            .accused
            .iter()
            .filter(|peer| **peer != self.own && !watched.contains(peer))
            .take(ACCUSED_MAX)
            .copied()
            .collect();
        self.peers.retain(|number, peer| {
            peer.watched = watched.contains(number);
            let probed = self.everybody || accused.contains(number) || peer.stays(now);
            probed && nodes.get(number) == Some(&peer.vtep)
        });
        let others = nodes.keys().filter(|number| self.everybody && **number != self.own);
        for number in watched.union(&accused).chain(others) {
            let Some(vtep) = nodes.get(number).copied() else { continue };
            self.peers.entry(*number).or_insert_with(|| Peer {
                vtep,
                watched: watched.contains(number),
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
    pub fn tick(
        &mut self,
        now: Duration,
        nonce: &mut dyn FnMut() -> u64,
    ) -> Vec<(NodeNumber, IpAddr, u64)> {
        self.everybody &= self.nodes.len() < 2 || !self.judged();
        let everybody = self.everybody;
        self.peers
            .retain(|number, peer| everybody || self.accused.contains(number) || peer.stays(now));
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
            if peer.rests(now) && self.accused.contains(number) {
                continue;
            }
            let nonce = nonce();
            peer.sent.insert(nonce, now);
            probes.push((*number, peer.vtep, nonce));
        }
        probes
    }

    /// An answer came.
    pub fn answered(&mut self, now: Duration, number: NodeNumber, from: IpAddr, nonce: u64) {
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

    /// Whether each peer has answered or been withdrawn: right after a start nothing is known.
    #[must_use]
    pub fn judged(&self) -> bool {
        !self.peers.is_empty() && self.peers.values().all(|peer| peer.known || peer.withdrawn)
            || self.nodes.keys().all(|number| *number == self.own)
    }

    /// Peers whose endpoints get no new flows.
    #[must_use]
    pub fn withdrawn(&self) -> BTreeSet<NodeNumber> {
        self.peers.iter().filter(|(_, peer)| peer.withdrawn).map(|(number, _)| *number).collect()
    }

    /// What to tell the others: whom this node, as a watcher, finds silent. Nothing where all probe
    /// all.
    #[must_use]
    pub fn silent(&self) -> BTreeSet<NodeNumber> {
        if !self.limits.share(self.nodes.len()) {
            return BTreeSet::new();
        }
        let silent = |peer: &Peer| peer.watched && peer.withdrawn;
        self.peers.iter().filter(|(_, peer)| silent(peer)).map(|(number, _)| *number).collect()
    }

    /// Peers that answered lately.
    #[must_use]
    pub fn reached(&self, now: Duration) -> BTreeSet<NodeNumber> {
        let fresh = |peer: &Peer| peer.known && now.saturating_sub(peer.answered) < peer.limit();
        self.peers.iter().filter(|(_, peer)| fresh(peer)).map(|(number, _)| *number).collect()
    }
}

impl Peer {
    fn limit(&self) -> Duration {
        SILENCE + self.round_trip
    }

    /// Whether it is probed whatever others say now: a silent one is not restored by their word,
    /// and whether a link flaps is seen by those alone who go on looking.
    fn stays(&self, now: Duration) -> bool {
        let lately = self.failed.is_some_and(|at| now.saturating_sub(at) < FLAPS_WITHIN);
        self.watched || self.withdrawn || lately
    }

    /// Whether it need not be probed now: others watch it, and it was dead a moment ago.
    fn rests(&self, now: Duration) -> bool {
        let since = |at: &Duration| now.saturating_sub(*at);
        !self.watched
            && self.withdrawn
            && since(&self.answered) >= PATIENCE
            && self.sent.values().any(|sent| since(sent) < RARELY)
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
fn watched(
    own: NodeNumber,
    nodes: &BTreeMap<NodeNumber, IpAddr>,
    limits: &Limits,
) -> BTreeSet<NodeNumber> {
    let others = nodes.keys().copied().filter(|number| *number != own);
    if !limits.share(nodes.len()) {
        return others.collect();
    }
    others.filter(|peer| watchers(*peer, nodes, limits).contains(&own)).collect()
}

/// Who probes a node in a large cluster.
fn watchers(
    peer: NodeNumber,
    nodes: &BTreeMap<NodeNumber, IpAddr>,
    limits: &Limits,
) -> BTreeSet<NodeNumber> {
    let others = nodes.keys().filter(|other| **other != peer);
    let mut others: Vec<_> = others.map(|other| (affinity(*other, peer), *other)).collect();
    if limits.watchers < others.len() {
        others.select_nth_unstable(limits.watchers);
        others.truncate(limits.watchers);
    }
    others.into_iter().map(|(_, other)| other).collect()
}

/// A number that orders the watchers of a peer: rendezvous hashing by the finaliser of splitmix64.
fn affinity(watcher: NodeNumber, peer: NodeNumber) -> u64 {
    let mut x = watcher.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ peer.get().rotate_left(32);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
