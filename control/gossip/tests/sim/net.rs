//! The network between the simulated nodes, and their clocks.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    net::SocketAddr,
    time::Duration,
};

use mesh_gossip::{
    Config, Event, Expected, Gossip, GossipKey, Hint, HintState, Keyring, Member, Subject,
    SyncCall, Timings,
};
use mesh_types::{ClusterId, EndpointId, Epoch, NodeId, NodeNumber};
use rand::{RngExt, SeedableRng, rngs::StdRng};

pub(crate) const SEC: Duration = Duration::from_secs(1);

type InFlight = (Duration, u64, u64, Parcel);

/// What travels.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Parcel {
    Datagram(Vec<u8>),
    /// On a stream: nothing of it is lost, but all of it fails in a partition.
    Request(u64, Vec<u8>),
    Response(u64, Vec<u8>),
}

pub(crate) struct Sim {
    pub(crate) now: Duration,
    pub(crate) rng: StdRng,
    pub(crate) loss: f64,
    pub(crate) nodes: BTreeMap<u64, Gossip>,
    /// When each node wants to be woken; what is outdated is passed over.
    pub(crate) wakes: BinaryHeap<Reverse<(Duration, u64)>>,
    pub(crate) woken_at: BTreeMap<u64, Duration>,
    /// Frozen nodes: their sockets fill, their timers wait.
    pub(crate) stalled: BTreeMap<u64, Vec<Vec<u8>>>,
    pub(crate) cut: BTreeSet<(u64, u64)>,
    /// When, a tie-breaker, to whom, what.
    pub(crate) wire: BinaryHeap<Reverse<InFlight>>,
    pub(crate) sent: u64,
    /// All bytes, with the headers of IP, UDP, TCP and TLS.
    pub(crate) bytes: u64,
    pub(crate) log: Vec<(Duration, u64, Event)>,
}

/// IP's and UDP's headers.
pub(crate) const DATAGRAM_HEADERS: u64 = 28;
/// A TCP connection with TLS 1.3 and certificates on both sides, made and closed: about 20 packets.
pub(crate) const STREAM_COST: u64 = 4500;

pub(crate) fn number(n: u64) -> NodeNumber {
    NodeNumber::new(n).unwrap()
}

pub(crate) fn address(n: u64) -> SocketAddr {
    let [.., high, low] = n.to_be_bytes();
    SocketAddr::from(([198, 18, high, low], 7946))
}

pub(crate) fn node_at(address: SocketAddr) -> u64 {
    let SocketAddr::V4(v4) = address else { panic!("not ours: {address}") };
    let [_, _, high, low] = v4.ip().octets();
    u64::from(u16::from_be_bytes([high, low]))
}

pub(crate) fn hint(endpoint: u64, owner: u64, generation: u64, state: HintState) -> Hint {
    let subject = Subject::Endpoint(EndpointId::new(endpoint).unwrap());
    Hint { subject, owner: number(owner), generation, state }
}

pub(crate) fn expected(nodes: impl IntoIterator<Item = u64>) -> BTreeMap<NodeNumber, Expected> {
    let node = |n| Expected { id: NodeId::from_bits(u128::from(n)), address: address(n) };
    nodes.into_iter().map(|n| (number(n), node(n))).collect()
}

impl Sim {
    pub(crate) fn new(seed: u64, count: u64) -> Self {
        let mut sim = Self {
            now: Duration::ZERO,
            rng: StdRng::seed_from_u64(seed),
            loss: 0.0,
            nodes: BTreeMap::new(),
            wakes: BinaryHeap::new(),
            woken_at: BTreeMap::new(),
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

    pub(crate) fn start(&mut self, n: u64, bump: u64) {
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

    pub(crate) fn post(&mut self, from: u64, to: u64, parcel: Parcel) {
        self.sent += 1;
        let (loss, delay) = match &parcel {
            Parcel::Datagram(bytes) => {
                assert!(bytes.len() <= 1400);
                self.bytes += DATAGRAM_HEADERS + bytes.len() as u64;
                (self.loss, 100..3000)
            }
            Parcel::Request(_, bytes) => {
                self.bytes += STREAM_COST + bytes.len() as u64;
                (0.0, 3000..30_000)
            }
            Parcel::Response(_, bytes) => {
                self.bytes += bytes.len() as u64;
                (0.0, 1000..10_000)
            }
        };
        let lost = self.rng.random_bool(loss) || self.cut.contains(&(from, to));
        if !lost {
            let delay = Duration::from_micros(self.rng.random_range(delay));
            self.wire.push(Reverse((self.now + delay, self.sent, to, parcel)));
        }
    }

    pub(crate) fn with<T>(
        &mut self,
        n: u64,
        act: impl FnOnce(&mut Gossip, Duration) -> T,
    ) -> Option<T> {
        let node = self.nodes.get_mut(&n)?;
        let result = act(node, self.now);
        let (mut datagrams, mut calls) = (Vec::new(), Vec::new());
        while let Some(event) = node.poll_event() {
            self.log.push((self.now, n, event));
        }
        datagrams.extend(std::iter::from_fn(|| node.poll_transmit()));
        calls.extend(std::iter::from_fn(|| node.poll_sync()));
        if let Some(at) = node.next_timer()
            && self.woken_at.insert(n, at) != Some(at)
        {
            self.wakes.push(Reverse((at, n)));
        }
        for (to, datagram) in datagrams {
            self.post(n, node_at(to), Parcel::Datagram(datagram));
        }
        for SyncCall { peer, request } in calls {
            self.post(n, peer.number.get(), Parcel::Request(n, request));
        }
        Some(result)
    }

    pub(crate) fn deliver(&mut self, to: u64, parcel: Parcel) {
        match parcel {
            Parcel::Datagram(datagram) => {
                if let Some(queue) = self.stalled.get_mut(&to) {
                    queue.push(datagram);
                } else {
                    self.with(to, |node, now| drop(node.handle_datagram(now, &datagram)));
                }
            }
            // Streams to a frozen node time out.
            _ if self.stalled.contains_key(&to) => {}
            Parcel::Request(from, request) => {
                let id = NodeId::from_bits(u128::from(from));
                let answer = self.with(to, |node, now| node.handle_sync(now, id, &request));
                if let Some(Ok(answer)) = answer {
                    self.post(to, from, Parcel::Response(to, answer));
                }
            }
            Parcel::Response(from, response) => {
                self.with(to, |node, now| {
                    let peer = node.members().map(|v| v.member).find(|m| m.number == number(from));
                    // As the shell does: an answer of one that is no member any more is dropped.
                    if let Some(peer) = peer {
                        drop(node.handle_sync_response(now, &peer, &response));
                    }
                });
            }
        }
    }

    pub(crate) fn run_until(&mut self, end: Duration) {
        loop {
            let timer = self.wakes.peek().map(|Reverse(wake)| *wake);
            let arrival = self.wire.peek().map(|Reverse((at, ..))| *at);
            match (timer, arrival) {
                (Some((at, n)), arrival) if at <= end && arrival.is_none_or(|a| at <= a) => {
                    self.wakes.pop();
                    if self.woken_at.get(&n) == Some(&at) && !self.stalled.contains_key(&n) {
                        self.woken_at.remove(&n);
                        self.now = self.now.max(at);
                        self.with(n, Gossip::handle_timer);
                    }
                }
                (_, Some(at)) if at <= end => {
                    let Reverse((at, _, to, parcel)) = self.wire.pop().unwrap();
                    self.now = self.now.max(at);
                    self.deliver(to, parcel);
                }
                _ => break,
            }
        }
        self.now = end;
    }

    pub(crate) fn run(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    /// Runs until the condition holds; says how long it took.
    pub(crate) fn await_within(
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

    pub(crate) fn sees(&self, n: u64) -> BTreeSet<u64> {
        self.nodes[&n].members().map(|view| view.member.number.get()).collect()
    }

    /// Every node sees exactly the others that run.
    pub(crate) fn agreed(&self) -> bool {
        let all: BTreeSet<u64> = self.nodes.keys().copied().collect();
        self.nodes.keys().all(|n| {
            let mut seen = self.sees(*n);
            seen.insert(*n);
            seen == all
        })
    }

    pub(crate) fn deaths(&self) -> Vec<&(Duration, u64, Event)> {
        self.log.iter().filter(|(_, _, event)| matches!(event, Event::Down(_))).collect()
    }

    pub(crate) fn restore(&mut self, n: u64) {
        // Timers are late and the socket is full, and nothing says which is looked at first.
        let queue = self.stalled.remove(&n).unwrap();
        self.with(n, Gossip::handle_timer);
        for datagram in queue {
            self.with(n, |node, now| drop(node.handle_datagram(now, &datagram)));
        }
    }
}

impl Sim {
    /// Whether a node holds a hint.
    pub(crate) fn knows(&self, n: u64, hint: Hint) -> bool {
        self.nodes[&n].hints().any(|known| known == hint)
    }

    pub(crate) fn same_hints(&self) -> bool {
        let mut all = self.nodes.values().map(|node| node.hints().collect::<Vec<_>>());
        let first = all.next();
        all.all(|hints| Some(hints) == first)
    }

    pub(crate) fn cut_apart(&mut self, left: &[u64], right: &[u64]) {
        for (a, b) in left.iter().flat_map(|a| right.iter().map(move |b| (*a, *b))) {
            self.cut.extend([(a, b), (b, a)]);
        }
    }
}

pub(crate) fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}
