//! The gossip's socket: drives [`mesh_gossip`] with UDP, calls to other nodes and the clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bytes::Bytes;
use mesh_gossip::{
    Config, Event, Expected, Gossip, Keyring, MAX_SYNC, Member, MemberView, SyncCall, Timings,
};
use mesh_types::{ClusterId, NodeId, NodeNumber};
use rand::RngExt;
use tokio::{
    net::UdpSocket,
    sync::{Semaphore, broadcast, mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};

use crate::metrics::list;

/// The port of the gossip, on every node.
pub const GOSSIP_PORT: u16 = 7946;

/// Events that a slow reader may be behind; it loses the oldest, never [`Shell::members`].
const EVENTS: usize = 256;

/// Calls to compare notes that are made at a time, and as many that are answered: each may carry
/// all that a large cluster knows.
const AT_ONCE: usize = 8;

/// Who is said to be silent, and by which members.
pub type Accusations = BTreeMap<NodeNumber, BTreeSet<NodeNumber>>;

/// Calls other members to compare notes with them.
#[async_trait]
pub trait Compare: Send + Sync + 'static {
    /// Sends the request to the member alone, over a stream that proves who answers.
    ///
    /// # Errors
    /// Why there is no answer, for the log.
    async fn compare(&self, member: &Member, request: Bytes) -> Result<Bytes, String>;
}

/// How this node gossips.
#[derive(Debug, Clone)]
pub struct ShellConfig {
    /// This node's number.
    pub number: NodeNumber,
    /// This node's id.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Where to listen: the address that other nodes reach this one at, with [`GOSSIP_PORT`].
    pub address: SocketAddr,
    /// The cluster's gossip key or keys.
    pub keys: Keyring,
    /// How quick it is.
    pub timings: Timings,
}

/// The running gossip of this node. Dropping it stops it without a word to the others, as a restart
/// should; [`leave`](Self::leave) tells them.
#[derive(Debug)]
pub struct Shell {
    commands: mpsc::UnboundedSender<Command>,
    members: watch::Receiver<BTreeMap<NodeNumber, MemberView>>,
    accusations: watch::Receiver<Accusations>,
    events: broadcast::Sender<Event>,
    answers: Answers,
    driver: JoinHandle<()>,
}

#[derive(Debug)]
enum Command {
    Members(BTreeMap<NodeNumber, Expected>),
    Silent(BTreeSet<NodeNumber>),
    Announce(SocketAddr),
    Keys(Keyring),
    Sync { from: NodeId, request: Bytes, done: oneshot::Sender<Result<Vec<u8>, String>> },
    Leave,
}

/// Answers other members that call to compare notes.
#[derive(Debug, Clone)]
pub struct Answers {
    commands: mpsc::UnboundedSender<Command>,
    room: Arc<Semaphore>,
    compared: Arc<Compared>,
    members: watch::Receiver<BTreeMap<NodeNumber, MemberView>>,
}

/// How often notes were compared.
#[derive(Debug, Default)]
struct Compared {
    calls: AtomicU64,
    failures: AtomicU64,
    answers: AtomicU64,
    /// Datagrams that were not a member's.
    dropped: AtomicU64,
}

/// Why a call to compare notes has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// Later.
    #[error("{0}")]
    Busy(&'static str),
    /// The request is wrong, or its sender no member.
    #[error("anti-entropy: {0}")]
    Refused(String),
}

impl Answers {
    /// The answer to `from`, which its certificate proves.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn answer(&self, from: NodeId, request: Bytes) -> Result<Bytes, Unanswered> {
        if request.len() > MAX_SYNC {
            return Err(Unanswered::Refused(format!("more than {MAX_SYNC} bytes")));
        }
        let full = |_| Unanswered::Busy("this node compares notes with too many others");
        let _place = self.room.try_acquire().map_err(full)?;
        let (done, answer) = oneshot::channel();
        let gone = Unanswered::Busy("gossip has ended on this node");
        self.commands.send(Command::Sync { from, request, done }).map_err(|_| gone.clone())?;
        let answer = answer.await.map_err(|_| gone)?.map_err(Unanswered::Refused)?;
        self.compared.answers.fetch_add(1, Ordering::Relaxed);
        Ok(answer.into())
    }

    /// Counters by name: calls of this node that were answered, those that were not, and calls of
    /// others that it answered; how many members there are beside it now; and datagrams that were
    /// dropped: no member's, of a key that is dropped, or seen before.
    #[must_use]
    pub fn counters(&self) -> [(&'static str, u64); 5] {
        let Compared { calls, failures, answers, dropped } = &*self.compared;
        let members = u64::try_from(self.members.borrow().len()).unwrap_or(u64::MAX);
        [
            ("anti_entropy_calls", calls.load(Ordering::Relaxed)),
            ("anti_entropy_failures", failures.load(Ordering::Relaxed)),
            ("anti_entropy_answers", answers.load(Ordering::Relaxed)),
            ("gossip_members", members),
            ("gossip_datagrams_dropped", dropped.load(Ordering::Relaxed)),
        ]
    }
}

impl Shell {
    /// Opens the socket and starts to gossip, inside a tokio runtime.
    ///
    /// # Errors
    /// If the socket cannot be opened; says which.
    pub fn start(config: ShellConfig, caller: impl Compare) -> io::Result<Self> {
        let named = |error: io::Error| {
            let address = config.address;
            io::Error::new(
                error.kind(),
                format!("cannot open gossip socket udp {address}: {error}"),
            )
        };
        let socket = std::net::UdpSocket::bind(config.address).map_err(named)?;
        socket.set_nonblocking(true).map_err(named)?;
        let socket = UdpSocket::from_std(socket).map_err(named)?;

        // A later start must have a higher number; only a clock set back breaks that, and then the
        // others say that this life is over, and it takes the number after theirs.
        let millis = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let identity = Member {
            number: config.number,
            id: config.id,
            address: config.address,
            bump: u64::try_from(millis).unwrap_or(u64::MAX),
        };
        let start = Instant::now();
        let core = Config {
            identity,
            cluster: config.cluster,
            keys: config.keys,
            timings: config.timings,
        };
        let gossip = Gossip::new(core, Duration::ZERO, rand::rng().random());
        let (commands, inbox) = mpsc::unbounded_channel();
        let (publish, members) = watch::channel(BTreeMap::new());
        let (accuse, accusations) = watch::channel(Accusations::new());
        let events = broadcast::Sender::new(EVENTS);
        let answers = Answers {
            commands: commands.clone(),
            room: Arc::new(Semaphore::new(AT_ONCE)),
            compared: Arc::default(),
            members: members.clone(),
        };
        let driver = Driver {
            gossip,
            socket,
            start,
            inbox,
            publish,
            accuse,
            events: events.clone(),
            caller: Arc::new(caller),
            calls: JoinSet::new(),
            compared: Arc::clone(&answers.compared),
        };
        let driver = tokio::spawn(driver.run());
        Ok(Self { commands, members, accusations, events, answers, driver })
    }

    /// The active members, this node not among them, whenever they change.
    #[must_use]
    pub fn members(&self) -> watch::Receiver<BTreeMap<NodeNumber, MemberView>> {
        self.members.clone()
    }

    /// Whose data paths are said to be silent, and by whom, whenever that changes.
    #[must_use]
    pub fn accusations(&self) -> watch::Receiver<Accusations> {
        self.accusations.clone()
    }

    /// Answers others that compare notes with this node.
    #[must_use]
    pub fn answers(&self) -> Answers {
        self.answers.clone()
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Says which nodes the store knows: only they are members. Before the first call every holder
    /// of the key is.
    pub fn update_members(&self, expected: BTreeMap<NodeNumber, Expected>) {
        self.command(Command::Members(expected));
    }

    /// Says whose data paths are silent, of those that this node watches.
    pub fn set_silent(&self, silent: BTreeSet<NodeNumber>) {
        self.command(Command::Silent(silent));
    }

    /// Greets a node by its address alone, until there is a member.
    pub fn announce(&self, address: SocketAddr) {
        self.command(Command::Announce(address));
    }

    /// Changes the keys.
    pub fn set_keys(&self, keys: Keyring) {
        self.command(Command::Keys(keys));
    }

    /// Tells the members that this node goes, and ends.
    pub async fn leave(mut self) {
        self.command(Command::Leave);
        // The driver ends by itself after that; it only fails if it died before.
        let _ = (&mut self.driver).await;
    }

    fn command(&self, command: Command) {
        // The driver lives as long as this handle.
        let _ = self.commands.send(command);
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

struct Driver {
    gossip: Gossip,
    socket: UdpSocket,
    start: Instant,
    inbox: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<BTreeMap<NodeNumber, MemberView>>,
    accuse: watch::Sender<Accusations>,
    events: broadcast::Sender<Event>,
    caller: Arc<dyn Compare>,
    calls: JoinSet<(Member, Result<Bytes, String>)>,
    compared: Arc<Compared>,
}

enum Input {
    Datagram(io::Result<(usize, SocketAddr)>),
    Timer,
    Command(Option<Command>),
    Called(Member, Result<Bytes, String>),
}

impl Driver {
    async fn run(mut self) {
        let mut buffer = [0; 2048];
        loop {
            let timer = self.gossip.next_timer().map(|due| self.start + due);
            let input = tokio::select! {
                // What was received counts before what is overdue.
                biased;
                received = self.socket.recv_from(&mut buffer) => Input::Datagram(received),
                command = self.inbox.recv() => Input::Command(command),
                // One that panicked is none that was answered.
                Some(Ok((peer, answer))) = self.calls.join_next() => Input::Called(peer, answer),
                () = async {
                    match timer {
                        Some(due) => sleep_until(due).await,
                        None => std::future::pending().await,
                    }
                } => Input::Timer,
            };
            let now = self.start.elapsed();
            match input {
                Input::Datagram(Ok((length, from))) => {
                    list::GOSSIP_DATAGRAMS.count(&["in"]);
                    if let Err(reason) = self.gossip.handle_datagram(now, &buffer[..length]) {
                        self.compared.dropped.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!(address = %from, %reason, "gossip datagram dropped");
                    }
                    // Under a flood of datagrams the timers must run all the same.
                    if timer.is_some_and(|due| due <= Instant::now()) {
                        self.gossip.handle_timer(now);
                    }
                }
                // An ICMP error of an earlier send, reported here: the protocol notices by itself.
                Input::Datagram(Err(error)) => tracing::debug!(%error, "gossip receive failed"),
                Input::Timer => self.gossip.handle_timer(now),
                Input::Command(Some(Command::Members(expected))) => {
                    self.gossip.set_members(now, expected);
                }
                Input::Command(Some(Command::Silent(silent))) => {
                    self.gossip.set_silent(now, silent);
                }
                Input::Command(Some(Command::Sync { from, request, done })) => {
                    let answer = self.gossip.handle_sync(now, from, &request);
                    // The caller may have gone away meanwhile.
                    let _ = done.send(answer.map_err(|reason| reason.to_string()));
                }
                Input::Called(peer, answer) => self.compared_with(now, &peer, answer),
                Input::Command(Some(Command::Announce(address))) => {
                    self.gossip.announce(now, address);
                }
                Input::Command(Some(Command::Keys(keys))) => self.gossip.set_keys(keys),
                Input::Command(Some(Command::Leave)) => {
                    self.gossip.leave();
                    self.flush().await;
                    return;
                }
                Input::Command(None) => return,
            }
            self.flush().await;
        }
    }

    fn compared_with(&mut self, now: Duration, peer: &Member, answer: Result<Bytes, String>) {
        let taken = answer.and_then(|answer| {
            let taken = self.gossip.handle_sync_response(now, peer, &answer);
            taken.map_err(|reason| reason.to_string())
        });
        let count = match &taken {
            Ok(()) => &self.compared.calls,
            Err(_) => &self.compared.failures,
        };
        count.fetch_add(1, Ordering::Relaxed);
        if let Err(reason) = taken {
            tracing::debug!(number = %peer.number, %reason, "could not compare notes");
        }
    }

    async fn flush(&mut self) {
        while let Some((to, datagram)) = self.gossip.poll_transmit() {
            list::GOSSIP_DATAGRAMS.count(&["out"]);
            if let Err(error) = self.socket.send_to(&datagram, to).await {
                tracing::debug!(address = %to, %error, "gossip send failed");
            }
        }
        while let Some(SyncCall { peer, request }) = self.gossip.poll_sync() {
            if self.calls.len() < AT_ONCE {
                let caller = Arc::clone(&self.caller);
                self.calls.spawn(async move {
                    let answer = caller.compare(&peer, request.into()).await;
                    (peer, answer)
                });
            }
        }
        let mut news = false;
        while let Some(event) = self.gossip.poll_event() {
            news = true;
            let (name, number) = described(&event);
            list::GOSSIP_EVENTS.count(&[name]);
            match number {
                Some(number) => tracing::info!(%number, event = name, "membership"),
                // A large cluster's node that dies is spoken of by all who watch it.
                None => tracing::debug!(?event, "gossip"),
            }
            // Nobody may be listening.
            let _ = self.events.send(event);
        }
        if news {
            update(&self.accuse, self.gossip.accusations());
        }
        let members: BTreeMap<_, _> =
            self.gossip.members().map(|view| (view.member.number, view)).collect();
        update(&self.publish, members);
    }
}

/// The word for an event, and whose membership it is about.
fn described(event: &Event) -> (&'static str, Option<NodeNumber>) {
    match event {
        Event::Up(number) => ("up", Some(*number)),
        Event::Down(number) => ("down", Some(*number)),
        Event::Left(number) => ("left", Some(*number)),
        Event::Restarted(number) => ("restarted", Some(*number)),
        Event::Hint(_) => ("hint", None),
    }
}

/// Publishes a value if it is another one.
pub(crate) fn update<T: PartialEq>(channel: &watch::Sender<T>, new: T) -> bool {
    channel.send_if_modified(|old| {
        let changed = *old != new;
        *old = new;
        changed
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use mesh_gossip::{GossipKey, seal::Sealer};
    use mesh_types::Epoch;
    use tokio::time::timeout;

    use super::*;

    fn config(n: u64, port: u16) -> ShellConfig {
        ShellConfig {
            number: NodeNumber::new(n).unwrap(),
            id: NodeId::from_bits(u128::from(n)),
            cluster: ClusterId::from_bits(1),
            address: (Ipv4Addr::LOCALHOST, port).into(),
            keys: Keyring::new(GossipKey { epoch: Epoch::MIN, secret: [1; 32] }),
            timings: Timings::LAN,
        }
    }

    /// Calls by a channel instead of TLS.
    #[derive(Default, Clone)]
    struct Direct(Arc<std::sync::OnceLock<(NodeId, Answers)>>);

    #[async_trait]
    impl Compare for Direct {
        async fn compare(&self, _: &Member, request: Bytes) -> Result<Bytes, String> {
            let (own, peer) = self.0.get().ok_or("nobody is there yet")?;
            peer.answer(*own, request).await.map_err(|error| error.to_string())
        }
    }

    fn free_port() -> u16 {
        std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn two_shells_meet_and_one_leaves() {
        let (a, b) = (config(1, free_port()), config(2, free_port()));
        let to_b = b.address;
        let a = Shell::start(a, Direct::default()).unwrap();
        let b = Shell::start(b, Direct::default()).unwrap();
        a.announce(to_b);
        let mut seen = a.members();
        let limit = Duration::from_secs(10);
        timeout(limit, seen.wait_for(|m| m.len() == 1)).await.unwrap().unwrap();
        timeout(limit, b.members().wait_for(|m| m.len() == 1)).await.unwrap().unwrap();
        let mut events = a.events();
        b.leave().await;
        timeout(limit, seen.wait_for(BTreeMap::is_empty)).await.unwrap().unwrap();
        let left = timeout(limit, events.recv()).await.unwrap().unwrap();
        assert_eq!(left, Event::Left(NodeNumber::new(2).unwrap()));
    }

    /// Waits until that many datagrams were dropped.
    async fn dropped(shell: &Shell, count: u64) {
        let all = async {
            while shell.answers().counters()[4].1 < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let counted = || shell.answers().counters()[4].1;
        assert!(timeout(Duration::from_secs(10), all).await.is_ok(), "only {}", counted());
    }

    #[tokio::test]
    async fn what_no_member_says_is_dropped_and_counted() {
        let (a, b) = (config(1, free_port()), config(2, free_port()));
        let (to_a, to_b, cluster) = (a.address, b.address, a.cluster);
        let (old, new) =
            (a.keys.clone(), GossipKey { epoch: Epoch::MIN.next().unwrap(), secret: [2; 32] });
        let a = Shell::start(a, Direct::default()).unwrap();
        let b = Shell::start(b, Direct::default()).unwrap();
        a.announce(to_b);
        let limit = Duration::from_secs(10);
        let mut members = a.members();
        timeout(limit, members.wait_for(|m| m.len() == 1)).await.unwrap().unwrap();
        let before = members.borrow_and_update().clone();
        let evil = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        // Random bytes, an empty one, and the largest that UDP takes.
        let mut sealer = Sealer::new(cluster, old.clone(), [9; 16]);
        let garbage = sealer.seal(b"no message at all").unwrap();
        for datagram in [&[7; 100][..], &[], &[1; 65_507], &garbage, &garbage] {
            evil.send_to(datagram, to_a).await.unwrap();
        }
        dropped(&a, 5).await;
        // Another key, or the right one for another cluster.
        let other = Keyring::new(GossipKey { epoch: Epoch::MIN, secret: [3; 32] });
        for mut sealer in [
            Sealer::new(cluster, other, [9; 16]),
            Sealer::new(ClusterId::from_bits(2), old.clone(), [9; 16]),
        ] {
            evil.send_to(&sealer.seal(b"x").unwrap(), to_a).await.unwrap();
        }
        dropped(&a, 7).await;
        // The keys change under both, and what the old one seals is nobody's any more.
        let both = Keyring { primary: old.primary.clone(), others: vec![new.clone()] };
        let used = Keyring { primary: new.clone(), others: vec![old.primary] };
        for keys in [both, used, Keyring::new(new)] {
            [&a, &b].into_iter().for_each(|shell| shell.set_keys(keys.clone()));
        }
        let counted = a.answers().counters()[4].1;
        evil.send_to(&sealer.seal(b"late").unwrap(), to_a).await.unwrap();
        dropped(&a, counted + 1).await;
        // Nothing of it changed who is a member, and those go on.
        let after = members.borrow_and_update().clone();
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        b.leave().await;
        timeout(limit, members.wait_for(BTreeMap::is_empty)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let taken = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let config = config(1, taken.local_addr().unwrap().port());
        let error = Shell::start(config.clone(), Direct::default()).unwrap_err().to_string();
        assert!(error.contains(&config.address.to_string()), "{error}");
    }

    #[tokio::test]
    async fn members_compare_notes_and_strangers_are_refused() {
        let (a, mut b) = (config(1, free_port()), config(2, free_port()));
        b.timings.sync = Duration::from_millis(50);
        let (to_b, a_id, b_id) = (b.address, a.id, b.id);
        let to_a = Direct::default();
        let a = Shell::start(a, Direct::default()).unwrap();
        let answers = a.answers();
        assert!(to_a.0.set((b_id, answers.clone())).is_ok());
        let b = Shell::start(b, to_a).unwrap();
        a.announce(to_b);
        let limit = Duration::from_secs(10);
        let compared = async {
            let counts = || (b.answers().counters(), answers.counters());
            while counts().0[0].1 < 2 || counts().1[2].1 < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(limit, compared).await.unwrap();
        // What b says of a third one's data path, a hears by its own way too.
        let third = NodeNumber::new(3).unwrap();
        b.set_silent(BTreeSet::from([third]));
        let mut accusations = a.accusations();
        let heard = accusations.wait_for(|all| all.contains_key(&third));
        timeout(limit, heard).await.unwrap().unwrap();

        let refused = answers.answer(a_id, Bytes::from_static(b"garbage")).await;
        assert!(matches!(refused, Err(Unanswered::Refused(_))), "{refused:?}");
        let long = answers.answer(b_id, vec![1; MAX_SYNC + 1].into()).await;
        assert!(matches!(long, Err(Unanswered::Refused(_))), "{long:?}");
        drop(a);
        let gone = answers.answer(b_id, Bytes::from_static(b"garbage")).await;
        assert!(matches!(gone, Err(Unanswered::Busy(_))), "{gone:?}");
    }
}
