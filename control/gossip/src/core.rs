//! The state machine.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
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
    hint::{self, Hint, HintState, Hints, Subject},
    member::{Expected, Health, Member, MemberView},
    seal::{Keyring, MAX_DATAGRAM, OVERHEAD, OpenError, Sealer},
    suspicion::{Evidence, Suspicions, Verdict},
    sync::{self, Digest, Full, Request, Response, SyncCall},
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
    /// In clusters of more than 100 nodes the period grows with their number, up to a second.
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
    /// How often each member compares all that it knows with another.
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
        sync: Duration::from_secs(30),
    };

    /// How often a member of a cluster of `nodes` probes.
    fn probe_period_of(&self, nodes: usize) -> Duration {
        let grown = self.probe_period.mul_f64(nodes as f64 / SMALL as f64);
        grown.clamp(self.probe_period, SLOWEST_PROBE.max(self.probe_period))
    }
}

/// Clusters up to this size probe as quickly as they can.
const SMALL: usize = 100;
/// However large a cluster is, its members probe this often.
const SLOWEST_PROBE: Duration = Duration::from_secs(1);

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
    /// A node said something new of one of its endpoints, or of another node's data path.
    Hint(Hint),
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
    /// It came on a stream of another node than it says.
    #[error("node {0} sent it, in the name of another")]
    Name(NodeId),
    /// foca refused it.
    #[error("refused: {0}")]
    Refused(String),
}

/// Of all members, about this many compare notes with one that just came up.
const WELCOMES: f64 = 3.0;
/// Within what time; and how long a member that came up lets others settle what it knows.
const WELCOME: Duration = Duration::from_millis(200);
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
    hints: Hints,
    /// Whose data paths this node says are silent.
    silent: BTreeSet<NodeNumber>,
    next_sync: Duration,
    /// With whom, if it is there: one that just came up.
    sync_with: Option<NodeNumber>,
    left: bool,
    transmits: VecDeque<(SocketAddr, Vec<u8>)>,
    syncs: VecDeque<SyncCall>,
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
            hints: Hints::default(),
            silent: BTreeSet::new(),
            next_sync: now + timings.sync,
            sync_with: None,
            left: false,
            transmits: VecDeque::new(),
            syncs: VecDeque::new(),
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

    /// The next call to make, to compare notes: to the peer alone, over a stream that proves who
    /// answers. A call that fails needs no more care: the next one comes, with another peer.
    pub fn poll_sync(&mut self) -> Option<SyncCall> {
        self.syncs.pop_front()
    }

    /// All hints known, this node's own among them.
    pub fn hints(&self) -> impl ExactSizeIterator<Item = Hint> {
        self.hints.iter()
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
        let fixed = [Some(self.next_hello), Some(self.next_sync)];
        let open = [swim, self.suspicions.next_timer(), self.hints.next_timer()];
        open.into_iter().chain(fixed).flatten().min()
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
        let expected = &self.expected;
        self.hints.retain(|owner| expected.as_ref().is_none_or(|e| e.contains_key(&owner)));
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

    /// Says something new of an endpoint, to be told to all. Nothing happens if it is not news.
    pub fn hint(&mut self, now: Duration, hint: Hint) {
        let times = self.hint_times();
        self.hints.learn(now, hint, times);
    }

    /// Says which data paths are silent, of those that this node watches. All are told of what
    /// changed.
    pub fn set_silent(&mut self, now: Duration, silent: BTreeSet<NodeNumber>) {
        let before = std::mem::replace(&mut self.silent, silent);
        let changed: Vec<_> = before.symmetric_difference(&self.silent).copied().collect();
        for peer in changed {
            self.say(now, peer);
        }
    }

    /// Whose data paths are said to be silent, and by which members: others' word counts for as
    /// long as they are here to take it back.
    #[must_use]
    pub fn accusations(&self) -> BTreeMap<NodeNumber, BTreeSet<NodeNumber>> {
        let own = self.swim.identity().number;
        let mut accusations = BTreeMap::<_, BTreeSet<_>>::new();
        let mut active = None;
        for hint in self.hints.iter().filter(|hint| hint.state == HintState::Dead) {
            let Subject::DataPath(peer) = hint.subject else { continue };
            let active: &BTreeSet<_> = active.get_or_insert_with(|| {
                self.swim.iter_members().map(|member| member.id().number).chain([own]).collect()
            });
            if active.contains(&hint.owner) && hint.owner != peer {
                accusations.entry(peer).or_default().insert(hint.owner);
            }
        }
        accusations
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
            Message::Hints { from, hints } => {
                self.accept(now, &from)?;
                self.learn(now, hints);
                Ok(())
            }
        }
    }

    /// Answers another member's call to compare notes. `from`: whom the stream proves it to be.
    ///
    /// # Errors
    /// [`Reject`] says why there is no answer.
    pub fn handle_sync(
        &mut self,
        now: Duration,
        from: NodeId,
        request: &[u8],
    ) -> Result<Vec<u8>, Reject> {
        let request = Request::decode(request)?;
        if request.from.id != from {
            return Err(Reject::Name(from));
        }
        self.accept(now, &request.from)?;
        // As when it had said hello.
        self.apply(foca::Member::alive(request.from))?;
        self.drain(now, None);
        let told = request.full.is_some();
        if let Some(full) = request.full {
            self.take_in(now, full)?;
        }
        let digest = self.digest();
        let full = (!told && digest != request.digest).then(|| self.full());
        Ok(Response { digest, full }.encode())
    }

    /// Takes in the answer to a call.
    ///
    /// # Errors
    /// [`Reject`] says why it was dropped.
    pub fn handle_sync_response(
        &mut self,
        now: Duration,
        peer: &Member,
        response: &[u8],
    ) -> Result<(), Reject> {
        if self.left {
            return Ok(());
        }
        let response = Response::decode(response)?;
        self.accept(now, peer)?;
        let Some(full) = response.full else { return Ok(()) };
        self.take_in(now, full)?;
        if self.digest() != response.digest {
            let request = self.request(Some(self.full()));
            self.syncs.push_back(SyncCall { peer: *peer, request });
        }
        Ok(())
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
        if now >= self.next_sync {
            self.compare();
            let jitter = self.rng.random_range(0.8..1.2);
            self.next_sync = now + self.timings.sync.mul_f64(jitter);
        }
        for hints in self.hints.tell(now, self.timings.gossip) {
            let from = *self.swim.identity();
            let message = Message::Hints { from, hints }.encode();
            let to = self.swim.iter_members().map(|member| member.id().address);
            for address in to.sample(&mut self.rng, hint::FANOUT) {
                self.send(address, &message);
            }
        }
    }

    /// How often this node tells of a hint: as for SWIM, what is lost is small against the rest.
    fn hint_times(&self) -> u8 {
        let size = self.swim.num_members().max(1).ilog10();
        u8::try_from(4 + size).unwrap_or(u8::MAX)
    }

    fn learn(&mut self, now: Duration, hints: Vec<Hint>) {
        let times = self.hint_times();
        let own = self.swim.identity().number;
        for hint in hints {
            let known = |node| self.expected.as_ref().is_none_or(|e| e.contains_key(&node));
            let known = known(hint.owner)
                && match hint.subject {
                    Subject::Endpoint(_) => true,
                    Subject::DataPath(peer) => known(peer),
                };
            if !known || !self.hints.learn(now, hint, times) {
                continue;
            }
            match hint.subject {
                // An earlier life of this node said so, or a liar.
                Subject::DataPath(peer) if hint.owner == own => {
                    if self.silent.contains(&peer) != (hint.state == HintState::Dead) {
                        self.say(now, peer);
                    }
                }
                _ => self.events.push_back(Event::Hint(hint)),
            }
        }
    }

    /// Tells all how a data path does.
    fn say(&mut self, now: Duration, peer: NodeNumber) {
        let own = *self.swim.identity();
        let subject = Subject::DataPath(peer);
        // Above what an earlier life said, whether or not that was heard of yet.
        let known = self.hints.generation(own.number, subject);
        let generation = known.map_or(0, |known| known.saturating_add(1)).max(own.bump);
        let state = match self.silent.contains(&peer) {
            true => HintState::Dead,
            false => HintState::Ready,
        };
        self.hint(now, Hint { subject, owner: own.number, generation, state });
    }

    /// Calls a member to compare notes.
    fn compare(&mut self) {
        let wanted = self.sync_with.take();
        let active = || self.swim.iter_members().map(|member| *member.id());
        let peer = active().find(|member| Some(member.number) == wanted);
        let Some(peer) = peer.or_else(|| active().choose(&mut self.rng)) else { return };
        let request = self.request(None);
        self.syncs.push_back(SyncCall { peer, request });
    }

    fn request(&self, full: Option<Full>) -> Vec<u8> {
        Request { from: *self.swim.identity(), digest: self.digest(), full }.encode()
    }

    fn digest(&self) -> Digest {
        let own = std::iter::once(*self.swim.identity());
        let active: BTreeSet<_> =
            self.swim.iter_members().map(|member| *member.id()).chain(own).collect();
        sync::digest(&active, self.hints.iter())
    }

    fn full(&self) -> Full {
        let own = foca::Member::alive(*self.swim.identity());
        let members = self.swim.iter_membership_state().cloned().chain([own]).collect();
        Full { members, hints: self.hints.iter().collect() }
    }

    /// Takes in all that another knows.
    fn take_in(&mut self, now: Duration, full: Full) -> Result<(), Reject> {
        let own = *self.swim.identity();
        let known: BTreeMap<NodeNumber, Member> =
            self.swim.iter_members().map(|member| (member.id().number, *member.id())).collect();
        let news = full.members.into_iter().filter_map(|update| {
            let member = *update.id();
            if member == own {
                return Some(update);
            }
            if member.number == own.number || !self.is_expected(member.number, member.id) {
                return None;
            }
            if update.state() != State::Down {
                return Some(update);
            }
            // The other may have been cut off, and think so of all. Whom it believes dead is asked,
            // by this node, whether it lives.
            let suspect = foca::Member::new(member, update.incarnation(), State::Suspect);
            (known.get(&member.number) == Some(&member)).then_some(suspect)
        });
        let news: Vec<_> = news.collect();
        // It is no news for the gossip: what one pair was late to learn, most others know.
        let outcome = self.swim.apply_many(news.into_iter(), false, &mut self.effects);
        self.drain(now, None);
        self.learn(now, full.hints);
        outcome.map_err(|error| Reject::Refused(error.to_string()))
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
        let active: BTreeSet<_> =
            self.swim.iter_members().map(|member| member.id().number).collect();
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

    /// Compares notes with one that came up: it may know of what was before, or need to.
    fn welcome(&mut self, now: Duration, who: NodeNumber) {
        let chance = WELCOMES / self.swim.num_members().max(1) as f64;
        if self.rng.random_bool(chance.min(1.0)) {
            self.sync_with = Some(who);
            let soon = now + WELCOME.mul_f64(self.rng.random_range(0.5..1.0));
            self.next_sync = self.next_sync.min(soon);
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
                    self.welcome(now, member.number);
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
                // foca's own period is fixed from the start; the cluster's size is not.
                let after = match timer {
                    Timer::ProbeRandomMember(_) => {
                        self.timings.probe_period_of(self.swim.num_members() + 1)
                    }
                    _ => after,
                };
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
