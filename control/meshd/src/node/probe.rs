//! Probes the peers' data paths by [`mesh_gossip::probe`]: its socket, and what goes in and out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use mesh_dataplane::probe::{decode_reply, encode_request};
use mesh_gossip::probe::{Limits, PERIOD, Probes};
use mesh_types::{NodeNumber, net::Protocol, record::RecordSet};
use tokio::{
    net::UdpSocket,
    sync::watch,
    task::AbortHandle,
    time::{Interval, MissedTickBehavior, interval, timeout},
};

use super::clock;
use crate::{
    gossip::{Accusations, update},
    metrics::list,
};

/// When nobody answers for this long, a socket at another port is tried: something on the way may
/// have taken this one from us.
const SOCKET_PATIENCE: Duration = Duration::from_secs(3);
/// Silence shows within half a second; a machine on which much starts at once may take longer.
/// Until then the kernel goes on by what the last daemon left.
const JUDGED_WITHIN: Duration = Duration::from_secs(4);
/// Sockets that are tried for a port that no service publishes.
const SOCKET_ATTEMPTS: usize = 16;

/// The running probes; they end with it.
#[derive(Debug)]
pub(crate) struct Handle {
    /// Peers whose endpoints get no new flows.
    pub(crate) withdrawn: watch::Receiver<BTreeSet<NodeNumber>>,
    /// Peers that answered lately.
    pub(crate) reached: watch::Receiver<BTreeSet<NodeNumber>>,
    /// Peers that this node finds silent as one of their watchers: for the others to know.
    pub(crate) silent: watch::Receiver<BTreeSet<NodeNumber>>,
    judged: watch::Receiver<bool>,
    task: AbortHandle,
}

impl Handle {
    /// Waits until each peer has answered or been withdrawn, or until that should long be so. A
    /// daemon that starts must not put a dead peer back into the balancers for that moment.
    pub(crate) async fn judged(&self) {
        let mut judged = self.judged.clone();
        let _ = timeout(JUDGED_WITHIN, judged.wait_for(|judged| *judged)).await;
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts probing the nodes of the records from this node's tunnel end, and those that the others'
/// accusations make suspicious.
pub(crate) fn start(
    own: NodeNumber,
    limits: Limits,
    (vtep, port): (IpAddr, u16),
    records: watch::Receiver<Arc<RecordSet>>,
    accusations: watch::Receiver<Accusations>,
) -> Result<Handle> {
    let published = published(&records.borrow());
    let socket = open(vtep, &published)?;
    let (withdraw, withdrawn) = watch::channel(BTreeSet::new());
    let (reach, reached) = watch::channel(BTreeSet::new());
    let (tell, silent) = watch::channel(BTreeSet::new());
    let (judge, judged) = watch::channel(false);
    let probes = Probes::new(own, limits).of_everybody();
    let shell = Shell {
        own,
        vtep,
        port,
        socket,
        answered: clock::monotonic(),
        published,
        records,
        accusations,
        probes,
        withdraw,
        reach,
        tell,
        judge,
    };
    let task = tokio::spawn(shell.run()).abort_handle();
    Ok(Handle { withdrawn, reached, silent, judged, task })
}

/// The UDP ports that services publish: what comes to one of them on this node is theirs, and an
/// answer to a probe that was sent from there would never arrive.
fn published(records: &RecordSet) -> BTreeSet<u16> {
    let ports = records.services.values().flat_map(|service| &service.ports);
    ports.filter(|port| port.protocol == Protocol::Udp).map(|port| port.published).collect()
}

/// Opens a socket at a port of the kernel's choice that no service publishes.
fn open(vtep: IpAddr, published: &BTreeSet<u16>) -> Result<UdpSocket> {
    let failed = || format!("opening a UDP socket at {vtep} for data-path probes");
    // Those that will not do are held, so that the kernel chooses others.
    let mut held = Vec::new();
    for _ in 0..SOCKET_ATTEMPTS {
        let socket = std::net::UdpSocket::bind((vtep, 0)).with_context(failed)?;
        if published.contains(&socket.local_addr().with_context(failed)?.port()) {
            held.push(socket);
            continue;
        }
        socket.set_nonblocking(true).with_context(failed)?;
        return UdpSocket::from_std(socket).with_context(failed);
    }
    anyhow::bail!("{}: services publish all {SOCKET_ATTEMPTS} ports that were tried", failed())
}

struct Shell {
    own: NodeNumber,
    vtep: IpAddr,
    port: u16,
    socket: UdpSocket,
    /// When anybody last answered there; at first, when it was opened.
    answered: Duration,
    published: BTreeSet<u16>,
    records: watch::Receiver<Arc<RecordSet>>,
    accusations: watch::Receiver<Accusations>,
    probes: Probes,
    withdraw: watch::Sender<BTreeSet<NodeNumber>>,
    reach: watch::Sender<BTreeSet<NodeNumber>>,
    tell: watch::Sender<BTreeSet<NodeNumber>>,
    judge: watch::Sender<bool>,
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
                        list::PROBES.count(&["in"]);
                        self.answered = clock::monotonic();
                        self.probes.answered(self.answered, peer, from.ip(), nonce);
                        // Nearly all answers are of peers that were well already.
                        if !self.is_well(peer) {
                            self.publish();
                        }
                    }
                }
                changed = self.records.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let records = Arc::clone(&self.records.borrow_and_update());
                    let nodes: BTreeMap<_, _> =
                        records.nodes.values().map(|n| (n.number, n.vtep)).collect();
                    self.probes.set_nodes(clock::monotonic(), &nodes);
                    self.published = published(&records);
                    let own = self.socket.local_addr().map(|own| own.port());
                    if own.is_ok_and(|own| self.published.contains(&own)) {
                        self.reopen();
                    }
                    self.hear(&mut ticks);
                }
                // Without gossip, which has ended then, this node leaves.
                Ok(()) = self.accusations.changed() => self.hear(&mut ticks),
                _ = ticks.tick() => self.tick(),
            }
        }
    }

    /// Takes in what the others say.
    fn hear(&mut self, ticks: &mut Interval) {
        let accusations = self.accusations.borrow_and_update().clone();
        if self.probes.set_accused(clock::monotonic(), &accusations) {
            // Whom it is about is asked at once.
            ticks.reset_immediately();
        }
        self.publish();
    }

    /// Whether a peer was reached when that was last published, and nothing spoke against it.
    fn is_well(&self, peer: NodeNumber) -> bool {
        let within = |set: &watch::Sender<BTreeSet<NodeNumber>>| set.borrow().contains(&peer);
        within(&self.reach) && !within(&self.withdraw) && !within(&self.tell)
    }

    fn reopen(&mut self) {
        self.answered = clock::monotonic();
        match open(self.vtep, &self.published) {
            Ok(socket) => self.socket = socket,
            // Tried again after as long a silence.
            Err(error) => tracing::warn!(error = %format!("{error:#}"), "no other probe socket"),
        }
    }

    fn tick(&mut self) {
        let now = clock::monotonic();
        let probes = self.probes.tick(now, &mut rand::random);
        if !probes.is_empty() && now.saturating_sub(self.answered) >= SOCKET_PATIENCE {
            self.reopen();
        }
        for (number, vtep, nonce) in probes {
            list::PROBES.count(&["out"]);
            let datagram = encode_request(self.own, number, nonce);
            // A full queue or a missing route: no answer will come, which is what counts.
            let _ = self.socket.try_send_to(&datagram, SocketAddr::new(vtep, self.port));
        }
        self.publish();
    }

    fn publish(&self) {
        let withdrawn = self.probes.withdrawn();
        let numbers: Vec<String> = withdrawn.iter().map(ToString::to_string).collect();
        if update(&self.withdraw, withdrawn) {
            tracing::info!(numbers = numbers.join(" "), "peers whose data path is silent");
        }
        update(&self.reach, self.probes.reached(clock::monotonic()));
        update(&self.tell, self.probes.silent());
        update(&self.judge, self.probes.judged());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn published_ports_are_left_alone() {
        let home = IpAddr::from([127, 0, 0, 1]);
        let everywhere: BTreeSet<u16> = (1..=u16::MAX).collect();
        let error = open(home, &everywhere).unwrap_err();
        assert!(error.to_string().contains("127.0.0.1"), "{error}");
        let some: BTreeSet<u16> = (1..=u16::MAX).filter(|port| port % 4 == 0).collect();
        for _ in 0..32 {
            let port = open(home, &some).unwrap().local_addr().unwrap().port();
            assert!(!port.is_multiple_of(4), "{port}");
        }
    }
}
