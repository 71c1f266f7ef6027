//! The one file on disk: log, vote, commit index, purge point, snapshot.
//!
//! Every record is sealed ([`crate::seal`]) and every commit that raft relies on is durable when
//! it returns: `Durability::Immediate` with two-phase commit, which a power cut between two syncs
//! cannot roll back. The commit index alone is written lazily: it is a hint for the next start.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use openraft::{
    RaftLogReader,
    entry::RaftEntry,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::sync::Arc;
use thiserror::Error;

use crate::{
    seal::{SealError, Sealer},
    types::{CodecError, Entry, LogId, SnapshotMeta, Types, Vote, decode, encode},
};

const FILE: &str = "raft.redb";
const LOG: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
const SNAPSHOT: &str = "snapshot";

/// Why the store on disk cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The directory or the file.
    #[error("{path}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// This node took part before, and what it knew is gone.
    #[error(
        "{path} is gone, and with it what this manager voted for and acknowledged: it must not go \
         on under its old number. Remove it from the cluster on another manager (`node rm \
         --force`), let it leave by force here (`swarm leave --force`) and join again"
    )]
    Lost {
        /// The file.
        path: PathBuf,
    },
    /// A read or write of the database.
    #[error("{path}: {source}")]
    Database {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// A record that does not open.
    #[error(
        "{path}: {record} cannot be read: {source}. Nothing of it is used. Remove this manager from \
         the cluster on another manager and let it join again, or restore a backup"
    )]
    Sealed {
        /// The file.
        path: PathBuf,
        /// Which record.
        record: String,
        /// Why.
        source: SealError,
    },
    /// A record that opened but is not what it should be.
    #[error("{path}: {record}: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which record.
        record: String,
        /// Why.
        why: String,
    },
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        Self::other(error)
    }
}

/// A snapshot as it is stored and sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredSnapshot {
    pub(crate) meta: SnapshotMeta,
    #[serde(with = "bytes_field")]
    pub(crate) data: Vec<u8>,
}

/// Vec<u8> as msgpack `bin`, not as an array of numbers.
pub(crate) mod bytes_field {
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(data: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(data)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        Bytes::deserialize(from).map(Vec::from)
    }
}

/// The file. Its methods block; [`LogStore`] calls them off the runtime.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
    db: Database,
    sealer: Sealer,
    /// Bytes appended since the last snapshot: snapshots are made by size too.
    grown: AtomicU64,
}

impl Disk {
    /// Opens the file and checks every record in it. It must be there, and may not be empty.
    pub(crate) fn resume(dir: &Path, key: &[u8; 32]) -> Result<Self, DiskError> {
        let path = dir.join(FILE);
        match std::fs::metadata(&path) {
            Ok(file) if file.len() > 0 => Self::open(dir, key),
            Ok(_) => Err(DiskError::Lost { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DiskError::Lost { path }),
            Err(error) => Err(DiskError::Open { path, source: error.into() }),
        }
    }

    /// Opens or makes the file and checks every record in it.
    pub(crate) fn open(dir: &Path, key: &[u8; 32]) -> Result<Self, DiskError> {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        let fail = |path: &Path, source: Box<dyn std::error::Error + Send + Sync>| {
            DiskError::Open { path: path.to_owned(), source }
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| fail(dir, e.into()))?;
        let path = dir.join(FILE);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| fail(&path, e.into()))?;
        let db = redb::Builder::new()
            .set_cache_size(16 << 20)
            .create_file(file)
            .map_err(|e| fail(&path, e.into()))?;
        // The name in the directory must last as the votes and entries in the file do.
        std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(|e| fail(dir, e.into()))?;
        let sealer = Sealer::new(key).map_err(|e| fail(&path, e.into()))?;
        let disk = Self { path, db, sealer, grown: AtomicU64::new(0) };
        disk.write(Durability::Immediate, |_, _| Ok(()))?;
        disk.verify()?;
        Ok(disk)
    }

    /// Reads everything once, so that damage is found at the start and not at the worst moment.
    fn verify(&self) -> Result<(), DiskError> {
        let _: Option<Vote> = self.meta(VOTE)?;
        let _: Option<LogId> = self.meta(COMMITTED)?;
        let purged: Option<LogId> = self.meta(PURGED)?;
        let _: Option<StoredSnapshot> = self.meta(SNAPSHOT)?;
        let mut next = purged.map(|id| id.index + 1);
        let txn = self.db.begin_read().map_err(|e| self.database(e))?;
        let table = txn.open_table(LOG).map_err(|e| self.database(e))?;
        for item in table.range::<u64>(..).map_err(|e| self.database(e))? {
            let (index, sealed) = item.map_err(|e| self.database(e))?;
            let index = index.value();
            if next.is_some_and(|next| next != index) {
                return Err(
                    self.malformed(format!("log entry {index}"), "an entry is missing before it")
                );
            }
            self.entry(index, sealed.value())?;
            self.grown.fetch_add(sealed.value().len() as u64, Ordering::Relaxed);
            next = Some(index + 1);
        }
        Ok(())
    }

    fn database(&self, error: impl Into<redb::Error>) -> DiskError {
        DiskError::Database { path: self.path.clone(), source: Box::new(error.into()) }
    }

    fn malformed(&self, record: String, why: impl ToString) -> DiskError {
        DiskError::Malformed { path: self.path.clone(), record, why: why.to_string() }
    }

    fn seal(&self, record: &str, plain: Result<Vec<u8>, CodecError>) -> Result<Vec<u8>, DiskError> {
        let plain = plain.map_err(|e| self.malformed(record.to_owned(), e))?;
        self.sealer.seal(record, plain).map_err(|source| DiskError::Sealed {
            path: self.path.clone(),
            record: record.to_owned(),
            source,
        })
    }

    fn unseal<T: DeserializeOwned>(&self, record: &str, sealed: &[u8]) -> Result<T, DiskError> {
        let plain = self.sealer.open(record, sealed).map_err(|source| DiskError::Sealed {
            path: self.path.clone(),
            record: record.to_owned(),
            source,
        })?;
        decode(&plain).map_err(|e| self.malformed(record.to_owned(), e))
    }

    fn entry(&self, index: u64, sealed: &[u8]) -> Result<Entry, DiskError> {
        let entry: Entry = self.unseal(&entry_place(index), sealed)?;
        if entry.log_id.index != index {
            return Err(self.malformed(entry_place(index), format!("it says {}", entry.log_id)));
        }
        Ok(entry)
    }

    fn write<T>(
        &self,
        durability: Durability,
        change: impl FnOnce(&Self, &WriteTransaction) -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        let mut txn = self.db.begin_write().map_err(|e| self.database(e))?;
        txn.set_durability(durability).map_err(|e| self.database(e))?;
        txn.set_two_phase_commit(true);
        // Both tables are there from the first transaction on.
        txn.open_table(LOG).map_err(|e| self.database(e))?;
        txn.open_table(META).map_err(|e| self.database(e))?;
        let out = change(self, &txn)?;
        txn.commit().map_err(|e| self.database(e))?;
        Ok(out)
    }

    fn put<T: Serialize>(
        &self,
        txn: &WriteTransaction,
        key: &str,
        value: &T,
    ) -> Result<(), DiskError> {
        let sealed = self.seal(key, encode(value))?;
        let mut table = txn.open_table(META).map_err(|e| self.database(e))?;
        table.insert(key, sealed.as_slice()).map_err(|e| self.database(e))?;
        Ok(())
    }

    fn meta<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, DiskError> {
        let txn = self.db.begin_read().map_err(|e| self.database(e))?;
        let table = txn.open_table(META).map_err(|e| self.database(e))?;
        let value = table.get(key).map_err(|e| self.database(e))?;
        value.map(|sealed| self.unseal(key, sealed.value())).transpose()
    }

    fn append(&self, entries: &[Entry]) -> Result<(), DiskError> {
        let mut bytes = 0;
        self.write(Durability::Immediate, |this, txn| {
            let mut table = txn.open_table(LOG).map_err(|e| this.database(e))?;
            let last = table.last().map_err(|e| this.database(e))?.map(|(index, _)| index.value());
            let mut next = last.map(|last| last + 1);
            for entry in entries {
                let index = entry.log_id.index;
                if next.is_some_and(|next| next != index) {
                    return Err(this.malformed(
                        entry_place(index),
                        format!("refused: the log goes on at {}", next.unwrap_or_default()),
                    ));
                }
                let sealed = this.seal(&entry_place(index), encode(entry))?;
                bytes += sealed.len() as u64;
                table.insert(index, sealed.as_slice()).map_err(|e| this.database(e))?;
                next = Some(index + 1);
            }
            Ok(())
        })?;
        self.grown.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Entries of a range, at least one (if there is one) and then up to `limit` bytes.
    fn entries(
        &self,
        range: (Bound<u64>, Bound<u64>),
        limit: usize,
    ) -> Result<Vec<Entry>, DiskError> {
        let txn = self.db.begin_read().map_err(|e| self.database(e))?;
        let table = txn.open_table(LOG).map_err(|e| self.database(e))?;
        let (mut out, mut bytes) = (Vec::new(), 0);
        for item in table.range::<u64>(range).map_err(|e| self.database(e))? {
            let (index, sealed) = item.map_err(|e| self.database(e))?;
            bytes += sealed.value().len();
            if !out.is_empty() && bytes > limit {
                break;
            }
            out.push(self.entry(index.value(), sealed.value())?);
        }
        Ok(out)
    }

    fn log_state(&self) -> Result<LogState<Types>, DiskError> {
        let purged: Option<LogId> = self.meta(PURGED)?;
        let txn = self.db.begin_read().map_err(|e| self.database(e))?;
        let table = txn.open_table(LOG).map_err(|e| self.database(e))?;
        let last = match table.last().map_err(|e| self.database(e))? {
            Some((index, sealed)) => Some(self.entry(index.value(), sealed.value())?.log_id),
            None => purged,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    fn cut(
        &self,
        durability: Durability,
        range: (Bound<u64>, Bound<u64>),
        purged: Option<LogId>,
    ) -> Result<(), DiskError> {
        self.write(durability, |this, txn| {
            {
                let mut table = txn.open_table(LOG).map_err(|e| this.database(e))?;
                table.retain_in::<u64, _>(range, |_, _| false).map_err(|e| this.database(e))?;
            }
            if let Some(purged) = purged {
                this.put(txn, PURGED, &purged)?;
            }
            Ok(())
        })
    }

    pub(crate) fn save_snapshot(&self, snapshot: &StoredSnapshot) -> Result<(), DiskError> {
        self.write(Durability::Immediate, |this, txn| this.put(txn, SNAPSHOT, snapshot))?;
        self.grown.store(0, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn snapshot(&self) -> Result<Option<StoredSnapshot>, DiskError> {
        self.meta(SNAPSHOT)
    }

    /// For a store that has no encoding.
    pub(crate) fn unusable_snapshot(&self, error: CodecError) -> DiskError {
        self.malformed(SNAPSHOT.to_owned(), error)
    }

    /// Bytes appended since the last snapshot.
    pub(crate) fn grown(&self) -> u64 {
        self.grown.load(Ordering::Relaxed)
    }
}

fn entry_place(index: u64) -> String {
    format!("log entry {index}")
}

/// Runs a blocking disk operation off the runtime's own threads.
pub(crate) async fn blocking<T: Send + 'static>(
    disk: &Arc<Disk>,
    work: impl FnOnce(&Disk) -> Result<T, DiskError> + Send + 'static,
) -> io::Result<T> {
    let disk = Arc::clone(disk);
    tokio::task::spawn_blocking(move || work(&disk))
        .await
        .map_err(io::Error::other)?
        .map_err(Into::into)
}

/// openraft's log on the disk. A write returns once it is durable, so writes never overlap.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    pub(crate) disk: Arc<Disk>,
}

fn owned(range: &impl RangeBounds<u64>) -> (Bound<u64>, Bound<u64>) {
    (range.start_bound().cloned(), range.end_bound().cloned())
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let range = owned(&range);
        blocking(&self.disk, move |disk| disk.entries(range, usize::MAX)).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        blocking(&self.disk, |disk| disk.meta(VOTE)).await
    }

    /// For replication: bounded, so that no append grows beyond what the transport takes.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let range = owned(&(start..end));
        blocking(&self.disk, move |disk| disk.entries(range, APPEND_BYTES)).await
    }
}

/// An append carries about this much at most (or one entry).
pub(crate) const APPEND_BYTES: usize = 4 << 20;

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        blocking(&self.disk, Disk::log_state).await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let vote = *vote;
        blocking(&self.disk, move |disk| {
            disk.write(Durability::Immediate, |disk, txn| disk.put(txn, VOTE, &vote))
        })
        .await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        let Some(committed) = committed else { return Ok(()) };
        // A hint: lost with a crash, the leader tells it again. The next durable commit carries it.
        blocking(&self.disk, move |disk| {
            disk.write(Durability::None, |disk, txn| disk.put(txn, COMMITTED, &committed))
        })
        .await
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        blocking(&self.disk, |disk| disk.meta(COMMITTED)).await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        // Only what is on disk is acknowledged: the callback follows the durable commit.
        match blocking(&self.disk, move |disk| disk.append(&entries)).await {
            Ok(()) => {
                callback.io_completed(Ok(()));
                Ok(())
            }
            Err(error) => {
                callback.io_completed(Err(io::Error::other(error.to_string())));
                Err(error)
            }
        }
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let from = last.map_or(Bound::Unbounded, |id| Bound::Excluded(id.index));
        blocking(&self.disk, move |disk| {
            disk.cut(Durability::Immediate, (from, Bound::Unbounded), None)
        })
        .await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        blocking(&self.disk, move |disk| {
            let range = (Bound::Unbounded, Bound::Included(upto.index));
            disk.cut(Durability::Immediate, range, Some(upto))
        })
        .await
    }
}

/// The log id of an entry, for the state machine.
pub(crate) fn log_id(entry: &Entry) -> LogId {
    entry.log_id()
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Disk {
        /// Flips a bit of a stored entry, as a bad disk would.
        pub(crate) fn damage(&self, index: u64) {
            self.write(Durability::Immediate, |this, txn| {
                let mut table = txn.open_table(LOG).map_err(|e| this.database(e))?;
                let mut sealed = table.get(index).unwrap().unwrap().value().to_vec();
                let middle = sealed.len() / 2;
                sealed[middle] ^= 1;
                table.insert(index, sealed.as_slice()).unwrap();
                Ok(())
            })
            .unwrap();
        }
    }
}
