//! The state machine.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    fmt,
    net::SocketAddr,
    num::{NonZeroU8, NonZeroUsize},
    time::Duration,
};

use foca::{AccumulatingRuntime, Foca, OwnedNotification, PeriodicParams, State, Timer};
use mesh_types::{ClusterId, NodeId, NodeNumber};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use thiserror::Error;

use crate::{
    member::{Expected, Health, Member, MemberView},
    seal::{Keyring, MAX_DATAGRAM, OVERHEAD, OpenError, Sealer},
    suspicion::{Evidence, Suspicions, Verdict},
    wire::{DecodeError, Message, Packet, WireCodec},
};

/// How a member starts.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who it is.
    pub identity: Member,
    /// Whose cluster it is of: authenticated with each datagram.
    pub cluster: ClusterId,
    /// Its keys.
    pub keys: Keyring,
    /// How quick it is.
    pub timings: Timings,
}

/// How quick the protocol is. All nodes of a cluster should use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// Each member probes one other, in a shuffled round, once per period. More than twice `rtt`.
    pub probe_period: Duration,
    /// How long a probe waits for a direct answer before others are asked to try. A high quantile
    /// of the network's round trip.
    pub rtt: Duration,
    /// How long a member must be silent, to all questions, before a suspicion turns into death.
    pub suspicion: Duration,
    /// How often a suspect is asked whether it lives. A small part of `suspicion`: under 30 % loss
    /// about half of the questions stay without answer.
    pub ask_every: Duration,
    /// How often news are passed on, while there are any.
    pub gossip: Duration,
    /// How often a known node that is not a member is greeted. Bounds how long a healed partition
    /// stays unnoticed.
    pub hello: Duration,
    /// How often one member is asked for all that it knows.
    pub sync: Duration,
}

impl Timings {
    /// For one site: a death is seen in 1.3 to 2 s (mostly); 30 % loss kills nobody.
    pub const LAN: Self = Self {
        probe_period: Duration::from_millis(300),
        rtt: Duration::from_millis(100),
        suspicion: Duration::from_secs(1),
        ask_every: Duration::from_millis(50),
        gossip: Duration::from_millis(100),
        hello: Duration::from_millis(500),
        sync: Duration::from_secs(10),
    };
}

/// What happened to another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It is a member now.
    Up(NodeNumber),
    /// It answers nobody any more.
    Down(NodeNumber),
    /// It said that it goes, or the store no longer knows it. (If its word was lost: `Down`.)
    Left(NodeNumber),
    /// Another life of it took the place of the one known (before `Up`, if it was down).
    Restarted(NodeNumber),
}

/// Why a datagram was dropped.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Reject {
    /// It could not be opened.
    #[error("cannot open: {0}")]
    Sealed(#[from] OpenError),
    /// It was sealed by a member, and makes no sense all the same.
    #[error("cannot read: {0}")]
    Malformed(#[from] DecodeError),
    /// The store does not know the sender (yet).
    #[error("node {0} is not known to the store")]
    UnknownNode(NodeNumber),
    /// The sender has this node's own number.
    #[error("the sender claims to be this node")]
    OwnNumber,
    /// foca refused it.
    #[error("refused: {0}")]
    Refused(String),
}

/// How many nodes are greeted at once.
const HELLO_FANOUT: usize = 3;

/// One member's view of the membership.
///
/// Events from outside come in through [`handle_datagram`](Self::handle_datagram),
/// [`handle_timer`](Self::handle_timer) and the verbs (`announce`, `set_members`, `leave`…); after
/// any of them, drain [`poll_transmit`](Self::poll_transmit) and [`poll_event`](Self::poll_event),
/// then call `handle_timer` again at [`next_timer`](Self::next_timer). `now` is the time since any
/// fixed point and never goes back.
pub struct Gossip {
    swim: Foca<Member, WireCodec, StdRng, foca::NoCustomBroadcast>,
    effects: AccumulatingRuntime<Member>,
    sealer: Sealer,
    rng: StdRng,
    timings: Timings,
    timers: BinaryHeap<Reverse<Scheduled>>,
    scheduled: u64,
    suspicions: Suspicions,
    /// When something authentic last came from a member.
    heard: BTreeMap<NodeNumber, Duration>,
    /// `None` until the store was heard: then every holder of the key is taken in.
    expected: Option<BTreeMap<NodeNumber, Expected>>,
    /// Addresses to greet until there is a member.
    seeds: Vec<SocketAddr>,
    next_hello: Duration,
    left: bool,
    transmits: VecDeque<(SocketAddr, Vec<u8>)>,
    events: VecDeque<Event>,
}

/// A timer of foca. Ordered by time, then as foca wants timers that are late together.
#[derive(Debug, PartialEq, Eq)]
struct Scheduled {
    at: Duration,
    timer: Timer<Member>,
    order: u64,
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at
            .cmp(&other.at)
            .then_with(|| self.timer.cmp(&other.timer))
            .then_with(|| self.order.cmp(&other.order))
    }
}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for Gossip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gossip")
            .field("identity", self.swim.identity())
            .field("members", &self.swim.num_members())
            .field("suspicions", &self.suspicions)
            .finish_non_exhaustive()
    }
}

fn count(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN)
}

fn swim_config(timings: &Timings, nodes: usize) -> foca::Config {
    // News are sent 6 + 4·log₁₀(n) times by each node: memberlist's 4·log₁₀(n), and some for loss.
    let transmissions = 6 + 4 * (nodes.max(1).ilog10() + 1);
    foca::Config {
        probe_period: timings.probe_period,
        probe_rtt: timings.rtt,
        num_indirect_probes: count(3),
        max_transmissions: u8::try_from(transmissions)
            .ok()
            .and_then(NonZeroU8::new)
            .unwrap_or(NonZeroU8::MAX),
        suspect_to_down_after: timings.suspicion,
        // Lives are numbered, so forgetting a dead one early does no harm.
        remove_down_after: Some(Duration::from_secs(600)),
        max_packet_size: count(MAX_DATAGRAM - OVERHEAD - 1),
        notify_down_members: true,
        periodic_announce: Some(PeriodicParams { frequency: timings.sync, num_members: count(1) }),
        // `hello` does this, and for nodes that were never members too.
        periodic_announce_to_down_members: None,
        periodic_gossip: Some(PeriodicParams { frequency: timings.gossip, num_members: count(3) }),
    }
}

impl Gossip {
    /// Starts a member that knows nobody. `seed` must be fresh from the system's source of
    /// randomness at each start: the salt of the datagrams' key comes from it.
    #[must_use]
    pub fn new(config: Config, now: Duration, seed: [u8; 32]) -> Self {
        let Config { identity, cluster, keys, timings } = config;
        let mut rng = StdRng::from_seed(seed);
        let mut salt = [0; 16];
        rng.fill_bytes(&mut salt);
        let swim_rng = StdRng::from_rng(&mut rng);
        Self {
            swim: Foca::new(identity, swim_config(&timings, 1), swim_rng, WireCodec),
            effects: AccumulatingRuntime::new(),
            sealer: Sealer::new(cluster, keys, salt),
            rng,
            timings,
            timers: BinaryHeap::new(),
            scheduled: 0,
            suspicions: Suspicions::new(timings.suspicion, timings.ask_every),
            heard: BTreeMap::new(),
            expected: None,
            seeds: Vec::new(),
            next_hello: now,
            left: false,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// This member as others know it.
    #[must_use]
    pub fn identity(&self) -> &Member {
        self.swim.identity()
    }

    /// The active members, this one not among them.
    pub fn members(&self) -> impl Iterator<Item = MemberView> {
        self.swim.iter_members().map(|member| MemberView {
            member: *member.id(),
            health: match member.state() {
                State::Suspect => Health::Suspect,
                State::Alive | State::Down => Health::Alive,
            },
        })
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`handle_timer`](Self::handle_timer) next.
    #[must_use]
    pub fn next_timer(&self) -> Option<Duration> {
        if self.left {
            return None;
        }
        let swim = self.timers.peek().map(|Reverse(scheduled)| scheduled.at);
        [swim, self.suspicions.next_timer(), Some(self.next_hello)].into_iter().flatten().min()
    }

    /// Greets a node of which only the address is known, until there is a member.
    pub fn announce(&mut self, now: Duration, address: SocketAddr) {
        if !self.seeds.contains(&address) {
            self.seeds.push(address);
        }
        self.next_hello = now;
    }

    /// Says who may be a member: the nodes that the store knows. Others are no members from now on,
    /// and those that are missing are greeted until they are there.
    pub fn set_members(&mut self, now: Duration, expected: BTreeMap<NodeNumber, Expected>) {
        let config = swim_config(&self.timings, expected.len());
        // Only the number of transmissions changes, which foca allows at any time.
        let _ = self.swim.set_config(config);
        self.expected = Some(expected);
        let gone: Vec<_> = self
            .swim
            .iter_members()
            .filter(|member| !self.is_expected(member.id().number, member.id().id))
            .map(|member| foca::Member::new(*member.id(), member.incarnation(), State::Down))
            .collect();
        if !gone.is_empty() {
            // Every node learns it from the store, so it is no news for the gossip.
            let _ = self.swim.apply_many(gone.into_iter(), false, &mut self.effects);
            self.drain(now, Some(Event::Left));
        }
        self.next_hello = now;
    }

    /// Changes the keys.
    pub fn set_keys(&mut self, keys: Keyring) {
        self.sealer.set_keys(keys);
    }

    /// Tells the members that this one goes. It does nothing more afterwards: drain
    /// [`poll_transmit`](Self::poll_transmit) and drop it.
    ///
    /// foca's own way to leave is not used: passed on by others it looks like a death.
    pub fn leave(&mut self) {
        let own = *self.swim.identity();
        let members: Vec<_> = self.members().map(|view| view.member.address).collect();
        for address in members {
            self.send(address, &Message::Leaving(own).encode());
        }
        self.left = true;
    }

    /// Takes in one datagram, from whatever address: who sent it is in its sealed part.
    ///
    /// # Errors
    /// [`Reject`] says why it was dropped. Nothing need be done but count it.
    pub fn handle_datagram(&mut self, now: Duration, datagram: &[u8]) -> Result<(), Reject> {
        if self.left {
            return Ok(());
        }
        let payload = self.sealer.open(datagram)?;
        match Message::decode(&payload)? {
            Message::Swim(packet) => self.handle_swim(now, packet),
            Message::Hello(from) => {
                self.accept(now, &from)?;
                self.apply(foca::Member::alive(from))?;
                self.answer(now, from)
            }
            Message::Ask { from, suspect, incarnation } => {
                self.accept(now, &from)?;
                if suspect == *self.swim.identity() {
                    self.apply(foca::Member::new(suspect, incarnation, State::Suspect))?;
                }
                self.answer(now, from)
            }
            Message::Leaving(from) => {
                self.accept(now, &from)?;
                self.apply(foca::Member::down(from))?;
                self.drain(now, Some(Event::Left));
                Ok(())
            }
        }
    }

    /// Does what is due at `now`.
    pub fn handle_timer(&mut self, now: Duration) {
        if self.left {
            return;
        }
        if self.next_timer().is_some_and(|due| now.saturating_sub(due) > self.timings.probe_period)
        {
            // This process did not run for a while. The answers wait unread in the socket.
            self.suspicions.restart(now);
        }
        while self.timers.peek().is_some_and(|Reverse(next)| next.at <= now) {
            let Some(Reverse(next)) = self.timers.pop() else { break };
            // Fails only for probe cycles that were cut short, which foca starts anew by itself.
            let _ = self.swim.handle_timer(next.timer, &mut self.effects);
            self.drain(now, None);
        }
        self.judge(now);
        if now >= self.next_hello {
            self.greet();
            // Spread, so that nodes started together do not stay in step.
            let jitter = self.rng.random_range(0.8..1.2);
            self.next_hello = now + self.timings.hello.mul_f64(jitter);
        }
    }

    fn handle_swim(&mut self, now: Duration, mut packet: Packet) -> Result<(), Reject> {
        self.accept(now, &packet.header.src)?;
        let own = self.swim.identity().number;
        packet.updates.retain(|update| {
            let member = update.id();
            member.number == own || self.is_expected(member.number, member.id)
        });
        let outcome = self.swim.handle_data(&packet.encode(), &mut self.effects);
        self.drain(now, None);
        outcome.map_err(|error| Reject::Refused(error.to_string()))
    }

    /// Whether a sender may speak; if so, it lives.
    fn accept(&mut self, now: Duration, from: &Member) -> Result<(), Reject> {
        if from.number == self.swim.identity().number {
            return Err(Reject::OwnNumber);
        }
        if !self.is_expected(from.number, from.id) {
            return Err(Reject::UnknownNode(from.number));
        }
        self.heard.insert(from.number, now);
        Ok(())
    }

    fn is_expected(&self, number: NodeNumber, id: NodeId) -> bool {
        self.expected
            .as_ref()
            .is_none_or(|expected| expected.get(&number).is_some_and(|node| node.id == id))
    }

    fn apply(&mut self, update: foca::Member<Member>) -> Result<(), Reject> {
        self.swim
            .apply_many(std::iter::once(update), true, &mut self.effects)
            .map_err(|error| Reject::Refused(error.to_string()))
    }

    /// Answers with an announcement: it carries this node's life and incarnation, and is answered
    /// with all that the other knows.
    fn answer(&mut self, now: Duration, to: Member) -> Result<(), Reject> {
        let outcome = self.swim.announce(to, &mut self.effects);
        self.drain(now, None);
        outcome.map_err(|error| Reject::Refused(error.to_string()))
    }

    fn judge(&mut self, now: Duration) {
        if self.suspicions.is_empty() {
            return;
        }
        let swim = &self.swim;
        self.suspicions.retain(|suspicion| {
            swim.iter_members().any(|member| {
                *member.id() == suspicion.member
                    && member.state() == State::Suspect
                    && member.incarnation() == suspicion.incarnation
            })
        });
        let active: Vec<_> = self.swim.iter_members().map(|member| member.id().number).collect();
        let evidence = Evidence { heard: &self.heard, active: &active };
        for verdict in self.suspicions.judge(now, &evidence) {
            match verdict {
                Verdict::Ask { suspect, incarnation } => {
                    let from = *self.swim.identity();
                    let ask = Message::Ask { from, suspect, incarnation };
                    self.send(suspect.address, &ask.encode());
                }
                Verdict::Dead(timer) => {
                    let _ = self.swim.handle_timer(timer, &mut self.effects);
                    self.drain(now, None);
                }
            }
        }
    }

    /// Greets some of the nodes that should be members and are not.
    fn greet(&mut self) {
        let own = *self.swim.identity();
        let active: Vec<_> = self.swim.iter_members().map(|member| member.id().number).collect();
        let mut missing: Vec<SocketAddr> = self
            .expected
            .iter()
            .flatten()
            .filter(|(number, _)| **number != own.number && !active.contains(number))
            .map(|(_, node)| node.address)
            .collect();
        if active.is_empty() {
            missing.extend(&self.seeds);
        }
        for address in missing.into_iter().sample(&mut self.rng, HELLO_FANOUT) {
            self.send(address, &Message::Hello(own).encode());
        }
    }

    fn send(&mut self, to: SocketAddr, payload: &[u8]) {
        // The payload's size is bounded by foca's packet size and by the messages' own.
        if let Some(datagram) = self.sealer.seal(payload) {
            self.transmits.push_back((to, datagram));
        }
    }

    /// Carries out what foca asked for. `gone` names the event of members that go down in it, if
    /// that is not a death.
    fn drain(&mut self, now: Duration, gone: Option<fn(NodeNumber) -> Event>) {
        let mut rejoined = false;
        while let Some(notification) = self.effects.to_notify() {
            match notification {
                OwnedNotification::MemberUp(member) => {
                    self.events.push_back(Event::Up(member.number));
                }
                OwnedNotification::MemberDown(member) => {
                    self.heard.remove(&member.number);
                    let event = gone.unwrap_or(Event::Down);
                    self.events.push_back(event(member.number));
                }
                OwnedNotification::Rename(_, member) => {
                    self.events.push_back(Event::Restarted(member.number));
                }
                OwnedNotification::Rejoin(_) => rejoined = true,
                OwnedNotification::Active
                | OwnedNotification::Idle
                | OwnedNotification::Defunct => {}
            }
        }
        while let Some((to, packet)) = self.effects.to_send() {
            self.send(to.address, &Message::swim(&packet));
        }
        while let Some((after, timer)) = self.effects.to_schedule() {
            if matches!(timer, Timer::ChangeSuspectToDown { .. }) {
                self.suspicions.open(now, timer);
            } else {
                self.scheduled += 1;
                let scheduled = Scheduled { at: now + after, timer, order: self.scheduled };
                self.timers.push(Reverse(scheduled));
            }
        }
        if rejoined {
            // A new life starts disconnected; foca looks at its members again when it is told news.
            let _ = self.swim.apply_many(std::iter::empty(), false, &mut self.effects);
            self.drain(now, gone);
        }
    }
}
