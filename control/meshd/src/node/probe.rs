//! Probes the peers' data paths by [`mesh_gossip::probe`]: its socket, and what goes in and out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context, Result};
use mesh_dataplane::probe::{decode_reply, encode_request};
use mesh_gossip::probe::{Limits, PERIOD, Probes};
use mesh_types::{NodeNumber, record::RecordSet};
use tokio::{
    net::UdpSocket,
    sync::watch,
    task::AbortHandle,
    time::{Interval, MissedTickBehavior, interval},
};

use super::clock;
use crate::gossip::{Accusations, update};

/// The running probes; they end with it.
#[derive(Debug)]
pub(crate) struct Handle {
    /// Peers whose endpoints get no new flows.
    pub(crate) withdrawn: watch::Receiver<BTreeSet<NodeNumber>>,
    /// Peers that answered lately.
    pub(crate) reached: watch::Receiver<BTreeSet<NodeNumber>>,
    /// Peers that this node finds silent as one of their watchers: for the others to know.
    pub(crate) silent: watch::Receiver<BTreeSet<NodeNumber>>,
    task: AbortHandle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts probing the nodes of the records from this node's tunnel end, and those that the others'
/// accusations make suspicious.
pub(crate) async fn start(
    own: NodeNumber,
    limits: Limits,
    (vtep, port): (IpAddr, u16),
    records: watch::Receiver<Arc<RecordSet>>,
    accusations: watch::Receiver<Accusations>,
) -> Result<Handle> {
    let socket = UdpSocket::bind((vtep, 0))
        .await
        .with_context(|| format!("opening a UDP socket at {vtep} for data-path probes"))?;
    let (withdraw, withdrawn) = watch::channel(BTreeSet::new());
    let (reach, reached) = watch::channel(BTreeSet::new());
    let (tell, silent) = watch::channel(BTreeSet::new());
    let probes = Probes::new(own, limits);
    let shell = Shell { own, port, socket, records, accusations, probes, withdraw, reach, tell };
    let task = tokio::spawn(shell.run()).abort_handle();
    Ok(Handle { withdrawn, reached, silent, task })
}

struct Shell {
    own: NodeNumber,
    port: u16,
    socket: UdpSocket,
    records: watch::Receiver<Arc<RecordSet>>,
    accusations: watch::Receiver<Accusations>,
    probes: Probes,
    withdraw: watch::Sender<BTreeSet<NodeNumber>>,
    reach: watch::Sender<BTreeSet<NodeNumber>>,
    tell: watch::Sender<BTreeSet<NodeNumber>>,
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
                    let nodes: BTreeMap<_, _> =
                        records.nodes.values().map(|n| (n.number, n.vtep)).collect();
                    self.probes.set_nodes(clock::monotonic(), &nodes);
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
        let withdrawn = self.probes.withdrawn();
        let log = withdrawn.clone();
        if update(&self.withdraw, withdrawn) {
            tracing::info!(nodes = ?log, "peers whose data path is silent");
        }
        update(&self.reach, self.probes.reached(clock::monotonic()));
        update(&self.tell, self.probes.silent());
    }
}
