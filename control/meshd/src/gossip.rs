//! The gossip's socket: drives [`mesh_gossip`] with UDP and the clock.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_gossip::{Config, Event, Expected, Gossip, Keyring, Member, MemberView, Timings};
use mesh_types::{ClusterId, NodeId, NodeNumber};
use rand::RngExt;
use tokio::{
    net::UdpSocket,
    sync::{broadcast, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// The port of the gossip, on every node.
pub const GOSSIP_PORT: u16 = 7946;

/// Events that a slow reader may be behind; it loses the oldest, never [`Shell::members`].
const EVENTS: usize = 256;

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
    events: broadcast::Sender<Event>,
    driver: JoinHandle<()>,
}

#[derive(Debug)]
enum Command {
    Members(BTreeMap<NodeNumber, Expected>),
    Announce(SocketAddr),
    Keys(Keyring),
    Leave,
}

impl Shell {
    /// Opens the socket and starts to gossip, inside a tokio runtime.
    ///
    /// # Errors
    /// If the socket cannot be opened; says which.
    pub fn start(config: ShellConfig) -> io::Result<Self> {
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
        let events = broadcast::Sender::new(EVENTS);
        let driver = Driver { gossip, socket, start, inbox, publish, events: events.clone() };
        let driver = tokio::spawn(driver.run());
        Ok(Self { commands, members, events, driver })
    }

    /// The active members, this node not among them, whenever they change.
    #[must_use]
    pub fn members(&self) -> watch::Receiver<BTreeMap<NodeNumber, MemberView>> {
        self.members.clone()
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
    events: broadcast::Sender<Event>,
}

enum Input {
    Datagram(io::Result<(usize, SocketAddr)>),
    Timer,
    Command(Option<Command>),
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
                    if let Err(reason) = self.gossip.handle_datagram(now, &buffer[..length]) {
                        tracing::debug!(%from, %reason, "gossip datagram dropped");
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

    async fn flush(&mut self) {
        while let Some((to, datagram)) = self.gossip.poll_transmit() {
            if let Err(error) = self.socket.send_to(&datagram, to).await {
                tracing::debug!(%to, %error, "gossip send failed");
            }
        }
        while let Some(event) = self.gossip.poll_event() {
            tracing::info!(?event, "membership");
            // Nobody may be listening.
            let _ = self.events.send(event);
        }
        let members: BTreeMap<_, _> =
            self.gossip.members().map(|view| (view.member.number, view)).collect();
        self.publish.send_if_modified(|published| {
            let changed = *published != members;
            *published = members;
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use mesh_gossip::GossipKey;
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

    fn free_port() -> u16 {
        std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn two_shells_meet_and_one_leaves() {
        let (a, b) = (config(1, free_port()), config(2, free_port()));
        let to_b = b.address;
        let a = Shell::start(a).unwrap();
        let b = Shell::start(b).unwrap();
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

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let taken = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let config = config(1, taken.local_addr().unwrap().port());
        let error = Shell::start(config.clone()).unwrap_err().to_string();
        assert!(error.contains(&config.address.to_string()), "{error}");
    }
}
