//! The state machine: the store in memory. Snapshots are the store as a whole, on the disk.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Instant,
};

use futures::{Stream, TryStreamExt};
use mesh_control::store::Store;
use mesh_types::Revision;
use openraft::{
    EntryPayload, RaftSnapshotBuilder,
    storage::{EntryResponder, RaftStateMachine},
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    config::{Observe, Timed},
    disk::{Disk, StoredSnapshot, blocking, log_id},
    types::{
        Answer, Entry, LogId, Membership, Reply, Snapshot, SnapshotMeta, Types, WriteId, decode,
        encode,
    },
};

/// How many writes are remembered by id. A retry comes within seconds; a leader commits far fewer
/// writes in that time.
const REMEMBERED: usize = 4096;

/// What is replicated: the store and the answers of recent writes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Image {
    store: Store,
    recent: VecDeque<(WriteId, Answer)>,
}

#[derive(Debug, Default)]
struct State {
    image: Image,
    applied: Option<LogId>,
    membership: Membership,
}

/// The store as readers and the state machine share it.
#[derive(Debug)]
pub(crate) struct Shared {
    state: RwLock<State>,
    revision: watch::Sender<Revision>,
}

impl Shared {
    // A panic inside `apply` stops raft for good; readers may still look at what there is.
    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn read<R>(&self, f: impl FnOnce(&Store) -> R) -> R {
        f(&self.state().image.store)
    }

    /// The ids of the writes applied, oldest first.
    #[cfg(test)]
    pub(crate) fn writes(&self) -> Vec<WriteId> {
        self.state().image.recent.iter().map(|(id, _)| *id).collect()
    }

    /// Where they are in the log.
    #[cfg(test)]
    pub(crate) fn written_at(&self) -> std::collections::BTreeSet<u64> {
        self.state().image.recent.iter().map(|(_, answer)| answer.index).collect()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    fn announce(&self) {
        let revision = self.state().image.store.revision;
        self.revision.send_if_modified(|known| {
            let newer = *known != revision;
            *known = revision;
            newer
        });
    }
}

fn revision_of(id: LogId) -> Revision {
    // Every u64 is a revision.
    Revision::new(id.index).unwrap_or(Revision::MAX)
}

impl State {
    fn apply(&mut self, entry: Entry) -> Reply {
        let id = log_id(&entry);
        let revision = revision_of(id);
        let answer = match entry.payload {
            EntryPayload::Blank => None,
            EntryPayload::Membership(membership) => {
                self.membership = Membership::new(Some(id), membership);
                None
            }
            EntryPayload::Normal(write) => Some(self.image.write(id.index, revision, write)),
        };
        // Raft's own entries move it on too: one number says how far a node is.
        self.image.store.revision = revision;
        self.applied = Some(id);
        Reply(answer)
    }
}

impl Image {
    fn write(&mut self, index: u64, revision: Revision, write: crate::types::Write) -> Answer {
        if let Some((_, answer)) = self.recent.iter().rev().find(|(id, _)| *id == write.id) {
            return answer.clone();
        }
        let answer = Answer { index, result: self.store.apply(revision, &write.proposal) };
        if self.recent.len() >= REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((write.id, answer.clone()));
        answer
    }
}

/// openraft's handle on the shared state.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    shared: Arc<Shared>,
    disk: Arc<Disk>,
    observe: Observe,
}

impl Machine {
    /// Starts from the last snapshot; openraft applies the log behind it again.
    pub(crate) fn load(disk: Arc<Disk>, observe: Observe) -> Result<Self, io::Error> {
        let state = match disk.snapshot()? {
            Some(stored) => restore(&stored.meta, &stored.data)?,
            None => State::default(),
        };
        let revision = watch::Sender::new(state.image.store.revision);
        let shared = Arc::new(Shared { state: RwLock::new(state), revision });
        Ok(Self { shared, disk, observe })
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }
}

fn restore(meta: &SnapshotMeta, data: &[u8]) -> io::Result<State> {
    let image = decode(data).map_err(io::Error::other)?;
    Ok(State { image, applied: meta.last_log_id, membership: meta.last_membership.clone() })
}

/// A snapshot from another manager.
#[cfg(fuzzing)]
pub(crate) fn fuzz_snapshot(data: &[u8]) -> io::Result<()> {
    restore(&SnapshotMeta::default(), data).map(drop)
}

impl RaftSnapshotBuilder<Types> for Machine {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let shared = self.shared();
        let began = Instant::now();
        let stored = blocking(&self.disk, move |disk| {
            let (meta, encoded) = {
                let state = shared.state();
                let meta = SnapshotMeta {
                    last_log_id: state.applied,
                    last_membership: state.membership.clone(),
                };
                (meta, encode(&state.image))
            };
            let data = encoded.map_err(|e| disk.unusable_snapshot(e))?;
            let stored = StoredSnapshot { meta, data };
            disk.save_snapshot(&stored)?;
            Ok(stored)
        })
        .await?;
        (self.observe)(Timed::Snapshot, began.elapsed());
        Ok(Snapshot { meta: stored.meta, snapshot: stored.data })
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, Membership)> {
        let state = self.shared.state();
        Ok((state.applied, state.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + Send,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let began = Instant::now();
            let reply = self.shared.state_mut().apply(entry);
            (self.observe)(Timed::Apply, began.elapsed());
            // First the readers here, then the proposer: it may look at once.
            self.shared.announce();
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: Vec<u8>) -> io::Result<()> {
        let stored = StoredSnapshot { meta: meta.clone(), data };
        let state = restore(&stored.meta, &stored.data)?;
        blocking(&self.disk, move |disk| disk.save_snapshot(&stored)).await?;
        *self.shared.state_mut() = state;
        self.shared.announce();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let stored = blocking(&self.disk, Disk::snapshot).await?;
        Ok(stored.map(|stored| Snapshot { meta: stored.meta, snapshot: stored.data }))
    }
}
