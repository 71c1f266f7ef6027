//! The handle: starting, serving, the verbs.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_control::{command::Proposal, store::Store};
use mesh_types::{NodeNumber, Revision};
use openraft::{
    ConfigError, RaftMetrics, ServerState,
    async_runtime::watch::WatchReceiver as _,
    errors::{InitializeError, RaftError},
};
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    config::{self, RaftConfig},
    disk::{Disk, DiskError},
    forward::{
        Applied, GaveUp, ProposeError, ReadError, Refusal, Verdict, VoterChange, VoterError,
    },
    leadership::{LastHeard, Leadership, Progress, judge},
    log::LogStore,
    machine::{Machine, Shared},
    network::{Envelope, Network, RpcKind, SnapshotRequest, Transport},
    types::{CodecError, Member, Snapshot, Types, Write, WriteId, decode, encode},
};

pub(crate) type Core = openraft::Raft<Types, Machine>;

/// No proposal may be larger, encoded: an append must fit into what transports take.
const PROPOSAL_BYTES: usize = 2 << 20;

/// Why a raft node did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The timers make no sense.
    #[error("raft: {0}")]
    Config(#[from] Box<ConfigError>),
    /// The store on disk cannot be used.
    #[error("the store on disk cannot be used: {0}")]
    Disk(#[from] DiskError),
    /// The snapshot is not one of this version's.
    #[error("the snapshot in {path} cannot be used: {source}")]
    Snapshot {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Raft itself.
    #[error("raft did not start: {0}")]
    Raft(String),
}

/// Why a cluster was not made.
#[derive(Debug, Error)]
#[error("the store cannot begin: {0}")]
pub struct BootstrapError(String);

/// Why a call of another node was not served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The body is not what this kind of call has.
    #[error("{0}")]
    Codec(#[from] CodecError),
    /// The caller wanted another node: an address was reused, or a node is misconfigured.
    #[error("this is raft node {me}, not {wanted}")]
    NotMe {
        /// This node's number.
        me: u64,
        /// Whom the caller wanted.
        wanted: u64,
    },
    /// Raft stopped.
    #[error("the store of this manager stopped: {0}")]
    Stopped(String),
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: RaftConfig,
    pub(crate) core: Core,
    pub(crate) transport: TransportBox,
    pub(crate) changing: Mutex<()>,
    shared: Arc<Shared>,
    heard: Arc<LastHeard>,
    leadership: watch::Receiver<Leadership>,
    watcher: JoinHandle<()>,
}

/// A transport that can stand in a `Debug` struct.
pub(crate) struct TransportBox(Arc<dyn Transport>);

impl std::fmt::Debug for TransportBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Transport")
    }
}

impl std::ops::Deref for TransportBox {
    type Target = dyn Transport;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// A manager's raft node. Clones share it.
#[derive(Debug, Clone)]
pub struct Raft(Arc<Inner>);

impl Raft {
    /// Starts or resumes from the disk. A new node does nothing until [`Raft::bootstrap`] here or
    /// [`Raft::add_voter`] on a member.
    ///
    /// # Errors
    /// [`StartError`]: a damaged or foreign file is refused, never emptied.
    pub async fn start(
        config: RaftConfig,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, StartError> {
        let core_config = config::openraft(&config).map_err(Box::new)?;
        let (dir, key, resume) = (config.dir.clone(), config.data_key, config.resume);
        let observe = config.observe;
        let place = dir.display().to_string();
        let opened = tokio::task::spawn_blocking(move || {
            let open = if resume { Disk::resume } else { Disk::open };
            let disk = Arc::new(open(&dir, &key)?);
            let machine = Machine::load(Arc::clone(&disk), observe)
                .map_err(|source| StartError::Snapshot { path: dir, source })?;
            Ok::<_, StartError>((disk, machine))
        });
        let (disk, machine) = opened.await.map_err(|error| {
            // The database panics over pages that make no sense.
            StartError::Raft(format!(
                "the file in {place} is damaged ({error}). Remove this manager from the cluster on \
                 another manager, let it leave by force here, and join again, or restore a backup"
            ))
        })??;
        let number = config.number.get();
        let network = Network { number, transport: Arc::clone(&transport) };
        let shared = machine.shared();
        let log = LogStore { disk: Arc::clone(&disk) };
        let core = Core::new(number, core_config, network, log, machine)
            .await
            .map_err(|e| StartError::Raft(e.to_string()))?;
        let heard = Arc::new(LastHeard::default());
        // The lease, an election, and some: a change of leaders is no loss of the majority.
        let patience = config.timers.election_max * 3;
        let first = judge(&core.metrics().borrow_watched(), &heard, patience);
        let (sender, leadership) = watch::channel(first);
        let watcher = Watcher {
            core: core.clone(),
            shared: Arc::clone(&shared),
            heard: Arc::clone(&heard),
            disk,
            sender,
            patience,
            snapshot_bytes: config.snapshot_bytes,
        };
        let watcher = tokio::spawn(watcher.run());
        let raft = Self(Arc::new(Inner {
            config,
            core,
            transport: TransportBox(transport),
            changing: Mutex::new(()),
            shared,
            heard,
            leadership,
            watcher,
        }));
        raft.lead_if_alone().await?;
        Ok(raft)
    }

    /// A sole voter need not wait for an election time-out.
    async fn lead_if_alone(&self) -> Result<(), StartError> {
        let alone = {
            let metrics = self.0.core.metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.voter_ids().eq([metrics.id])
        };
        if alone {
            let elected = self.0.core.trigger().elect(false).await;
            elected.map_err(|e| StartError::Raft(e.to_string()))?;
        }
        Ok(())
    }

    /// Makes this node the sole voter of a new cluster. Done already: nothing happens. Returns once
    /// it leads.
    ///
    /// # Errors
    /// [`BootstrapError`] if the disk fails or it does not come to lead.
    pub async fn bootstrap(&self) -> Result<(), BootstrapError> {
        let Inner { core, config, .. } = &*self.0;
        let me = config.number.get();
        let member = Member { address: config.address };
        match core.initialize(BTreeMap::from([(me, member)])).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(error) => return Err(BootstrapError(error.to_string())),
        }
        let mut leadership = self.leadership();
        let leads = leadership.wait_for(|now| now.has_quorum);
        match timeout(config.timers.propose, leads).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(BootstrapError("no leader came about in time".into())),
        }
    }

    /// Whether this node is part of a cluster (its log is not empty).
    ///
    /// # Errors
    /// [`ServeError::Stopped`].
    pub async fn is_initialized(&self) -> Result<bool, ServeError> {
        self.0.core.is_initialized().await.map_err(stopped)
    }

    /// Answers a call of another node. The caller must have been authenticated as a manager.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn serve(&self, kind: RpcKind, body: Bytes) -> Result<Bytes, ServeError> {
        let inner = &*self.0;
        let answer = match kind {
            RpcKind::Append => {
                let answer = inner.core.append_entries(self.open(&body)?).await.map_err(stopped)?;
                inner.heard.now();
                encode(&answer)
            }
            RpcKind::Vote => encode(&inner.core.vote(self.open(&body)?).await.map_err(stopped)?),
            RpcKind::PreVote => {
                encode(&inner.core.pre_vote(self.open(&body)?).await.map_err(stopped)?)
            }
            RpcKind::Snapshot => {
                let SnapshotRequest { vote, meta, data } = self.open(&body)?;
                let snapshot = Snapshot { meta, snapshot: data };
                let answer = inner.core.install_full_snapshot(vote, snapshot).await;
                inner.heard.now();
                encode(&answer.map_err(stopped)?)
            }
            RpcKind::TransferLeader => {
                let answer = inner.core.handle_transfer_leader(self.open(&body)?).await;
                encode(&answer.map_err(stopped)?)
            }
            RpcKind::Propose => {
                let write = self.open(&body)?;
                encode(&inner.write_here(write, inner.config.timers.propose).await)
            }
            RpcKind::ReadIndex => {
                let () = self.open(&body)?;
                encode(&inner.read_index_here(inner.config.timers.propose).await)
            }
            RpcKind::ChangeVoters => {
                let change = self.open(&body)?;
                encode(&inner.change_here(change, inner.config.timers.change).await)
            }
        };
        Ok(answer?.into())
    }

    fn open<T: serde::de::DeserializeOwned>(&self, body: &[u8]) -> Result<T, ServeError> {
        let Envelope { to, body } = decode(body)?;
        let me = self.0.config.number.get();
        if to == me { Ok(body) } else { Err(ServeError::NotMe { me, wanted: to }) }
    }

    /// Writes. On a follower it is forwarded; without a leader it is tried again until the deadline
    /// ([`Timers::propose`](crate::Timers)). When it returns, this node's store has it.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn propose(&self, proposal: Proposal) -> Result<Applied, ProposeError> {
        let inner = &*self.0;
        let write = sized(Write { id: fresh_id()?, proposal })?;
        let patience = inner.config.timers.propose;
        let here = |left| inner.write_here(write.clone(), left);
        let answer = inner.on_leader(RpcKind::Propose, &write, patience, here).await;
        let answer = answer.map_err(|gave_up| match gave_up {
            GaveUp::NoLeader => ProposeError::NoLeader,
            GaveUp::Refused(refusal) => ProposeError::Stopped(refusal.to_string()),
        })?;
        let revision = Revision::new(answer.index).unwrap_or(Revision::MAX);
        let caught_up = self.caught_up(revision).await;
        // A refusal is one, however far this node is.
        let outcome = answer.result?;
        if !caught_up {
            return Err(ProposeError::Behind { revision });
        }
        Ok(Applied { revision, outcome })
    }

    /// Writes as the leader of `term`, or not at all: neither forwarded nor tried again. For what
    /// holds only while this node leads. A leader that slept (a paused machine) wakes up believing
    /// that it leads and that everybody is silent; its successor must not hear of that.
    ///
    /// # Errors
    /// [`ProposeError`]; [`ProposeError::NoLeader`] if this node does not lead, or no more.
    pub async fn propose_leading(
        &self,
        term: u64,
        proposal: Proposal,
    ) -> Result<Applied, ProposeError> {
        let inner = &*self.0;
        let write = sized(Write { id: fresh_id()?, proposal })?;
        let leads = {
            let metrics = inner.core.metrics();
            let metrics = metrics.borrow_watched();
            metrics.state == ServerState::Leader && metrics.current_term == term
        };
        if !leads {
            return Err(ProposeError::NoLeader);
        }
        match inner.write_here(write, inner.config.timers.propose).await {
            Verdict::Done(answer) => {
                let revision = Revision::new(answer.index).unwrap_or(Revision::MAX);
                Ok(Applied { revision, outcome: answer.result? })
            }
            Verdict::Again => Err(ProposeError::NoLeader),
            Verdict::Refused(refusal) => Err(ProposeError::Stopped(refusal.to_string())),
        }
    }

    /// After it, a local read sees every write that was done before it was called, anywhere.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read_barrier(&self) -> Result<Revision, ReadError> {
        let inner = &*self.0;
        let here = |left| inner.read_index_here(left);
        let patience = inner.config.timers.propose;
        let index = inner.on_leader(RpcKind::ReadIndex, &(), patience, here).await;
        let index: u64 = index.map_err(|gave_up| match gave_up {
            GaveUp::NoLeader => ReadError::NoLeader,
            GaveUp::Refused(refusal) => ReadError::Stopped(refusal.to_string()),
        })?;
        let revision = Revision::new(index).unwrap_or(Revision::MAX);
        if self.caught_up(revision).await { Ok(revision) } else { Err(ReadError::NoLeader) }
    }

    async fn caught_up(&self, revision: Revision) -> bool {
        let mut watch = self.watch();
        let there = watch.wait_for(|now| *now >= revision);
        matches!(timeout(self.0.config.timers.propose, there).await, Ok(Ok(_)))
    }

    /// The revision of the local store, at each change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Revision> {
        self.0.shared.watch()
    }

    /// This node's number.
    #[must_use]
    pub fn number(&self) -> NodeNumber {
        self.0.config.number
    }

    /// Looks at the local store. Writes wait meanwhile: be brief, never block.
    pub fn read<R>(&self, f: impl FnOnce(&Store) -> R) -> R {
        self.0.shared.read(f)
    }

    /// Log indexes of the writes that are remembered.
    #[cfg(test)]
    pub(crate) fn written_at(&self) -> BTreeSet<u64> {
        self.0.shared.written_at()
    }

    #[cfg(test)]
    pub(crate) fn writes(&self) -> Vec<WriteId> {
        self.0.shared.writes()
    }

    /// Who leads, at each change.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.0.leadership.clone()
    }

    /// How far the log is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress::of(&self.0.core.metrics().borrow_watched())
    }

    /// Makes a node a voter: it catches up as a learner first, so it must be running and serving.
    /// It is one already: nothing happens. Works on any manager.
    ///
    /// # Errors
    /// [`VoterError`]; trying again is always right.
    pub async fn add_voter(
        &self,
        number: NodeNumber,
        address: SocketAddr,
    ) -> Result<(), VoterError> {
        let member = Member { address };
        self.change(number, VoterChange::Add { id: number.get(), member }).await
    }

    /// Removes a voter (or a learner). It is none: nothing happens. A leader that removes itself
    /// hands over first. Works on any manager.
    ///
    /// # Errors
    /// [`VoterError`]; trying again is always right.
    pub async fn remove_voter(&self, number: NodeNumber) -> Result<(), VoterError> {
        self.change(number, VoterChange::Remove { id: number.get() }).await
    }

    /// Whether a node is a voter or a learner, as far as this node has heard.
    #[must_use]
    pub fn takes_part(&self, number: NodeNumber) -> bool {
        let metrics = self.0.core.metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_node(&number.get()).is_some()
    }

    /// Whether it is decided that a node is neither: nobody counts on what it voted or kept.
    #[must_use]
    pub fn is_out(&self, number: NodeNumber) -> bool {
        let metrics = self.0.core.metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        let decided =
            membership.log_id().map(|id| id.index) <= metrics.last_applied.map(|id| id.index);
        decided && membership.membership().get_node(&number.get()).is_none()
    }

    /// Gives the leadership to another voter among these: that which is furthest of those heard a
    /// moment ago. Returns once this node leads no more; at once if it does not.
    ///
    /// # Errors
    /// [`VoterError::NoLeader`] if nobody could take over in time.
    pub async fn hand_over(&self, among: &BTreeSet<NodeNumber>) -> Result<(), VoterError> {
        let core = &self.0.core;
        let heard = self.0.leadership.borrow().reachable.clone();
        let next = {
            let metrics = core.metrics();
            let metrics = metrics.borrow_watched();
            if metrics.state != ServerState::Leader {
                return Ok(());
            }
            let may = |id: &u64| {
                let number = NodeNumber::new(*id).ok();
                *id != metrics.id
                    && number.is_some_and(|n| among.contains(&n) && heard.contains(&n))
            };
            let far = |id: &u64| {
                let known = metrics.replication.as_ref().and_then(|known| *known.get(id)?);
                known.map(|id| id.index)
            };
            metrics.membership_config.voter_ids().filter(|id| may(id)).max_by_key(far)
        };
        let next = next.ok_or(VoterError::NoLeader)?;
        tracing::info!(number = next, "handing the leadership over");
        let asked = core.trigger().transfer_leader(next).await;
        asked.map_err(|error| VoterError::Stopped(error.to_string()))?;
        let mut metrics = core.metrics();
        let over = metrics.wait_until(|now| now.state != ServerState::Leader);
        match timeout(self.0.config.timers.election_max * 4, over).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(VoterError::NoLeader),
        }
    }

    async fn change(&self, number: NodeNumber, change: VoterChange) -> Result<(), VoterError> {
        let inner = &*self.0;
        let here = |left| inner.change_here(change, left);
        let patience = inner.config.timers.change;
        let done = inner.on_leader(RpcKind::ChangeVoters, &change, patience, here).await;
        let _index: u64 = done.map_err(|gave_up| match gave_up {
            GaveUp::NoLeader => VoterError::NoLeader,
            GaveUp::Refused(Refusal::Lagging) => VoterError::Lagging(number),
            GaveUp::Refused(Refusal::Last) => VoterError::Last,
            GaveUp::Refused(Refusal::Stopped(why)) => VoterError::Stopped(why),
        })?;
        Ok(())
    }

    /// Stops. The disk is released once every clone of the handle is gone.
    pub async fn shutdown(&self) {
        self.0.watcher.abort();
        if let Err(error) = self.0.core.shutdown().await {
            tracing::warn!(%error, "raft did not stop cleanly");
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lagging => f.write_str("the new voter did not catch up"),
            Self::Last => f.write_str("it is the last voter"),
            Self::Stopped(why) => f.write_str(why),
        }
    }
}

fn stopped(error: impl ToString) -> ServeError {
    ServeError::Stopped(error.to_string())
}

/// Refuses a write that is larger than an entry may be.
fn sized(write: Write) -> Result<Write, ProposeError> {
    let bytes = encode(&write).map_err(|e| ProposeError::Stopped(e.to_string()))?.len();
    if bytes > PROPOSAL_BYTES {
        return Err(ProposeError::TooLarge { bytes, limit: PROPOSAL_BYTES });
    }
    Ok(write)
}

fn fresh_id() -> Result<WriteId, ProposeError> {
    let mut id = WriteId::default();
    SystemRandom::new()
        .fill(&mut id)
        .map_err(|_| ProposeError::Stopped("the system's random source failed".into()))?;
    Ok(id)
}

/// Follows openraft's metrics: publishes who leads, asks for snapshots by size.
struct Watcher {
    core: Core,
    shared: Arc<Shared>,
    heard: Arc<LastHeard>,
    disk: Arc<Disk>,
    sender: watch::Sender<Leadership>,
    patience: Duration,
    snapshot_bytes: u64,
}

impl Watcher {
    async fn run(self) {
        let mut metrics = self.core.metrics();
        let mut server = self.core.server_metrics();
        let mut revision = self.shared.watch();
        loop {
            self.publish(&metrics.borrow_and_update());
            server.borrow_and_update();
            // Every answer to a heartbeat is a change of `metrics`. While all is well, who leads
            // and who votes says enough, and what silence changes is seen by the tick.
            let settled = self.sender.borrow().has_quorum;
            if self.disk.grown() > self.snapshot_bytes
                && let Err(error) = self.core.trigger().snapshot().await
            {
                tracing::warn!(%error, "no snapshot");
            }
            // Silence changes the verdict too, and no metric tells of it.
            let tick = tokio::time::sleep(self.patience / 4);
            tokio::select! {
                changed = metrics.changed(), if !settled => if changed.is_err() { break },
                changed = server.changed() => if changed.is_err() { break },
                _ = revision.changed() => {}
                () = tick => {}
            }
        }
        // Raft is gone: nobody leads here.
        self.sender.send_replace(Leadership::default());
    }

    fn publish(&self, metrics: &RaftMetrics<Types>) {
        let now = judge(metrics, &self.heard, self.patience);
        self.sender.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
    }
}
