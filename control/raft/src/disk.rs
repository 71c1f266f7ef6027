//! What a manager keeps: vote, purge point and snapshot in one database, the log in files of its
//! own ([`crate::log`]), and how far it was committed.
//!
//! Every record is sealed ([`crate::seal`]) and every commit that raft relies on is durable when
//! it returns: `Durability::Immediate` with two-phase commit, which a power cut between two syncs
//! cannot roll back. The commit index alone is not synced: it is a hint for the next start.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use openraft::entry::RaftEntry;
use redb::{Database, Durability, ReadableDatabase, TableDefinition, TableHandle};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{
    log::Log,
    seal::{SealError, Sealer},
    types::{CodecError, Entry, LogId, SnapshotMeta, Vote, decode, encode},
};

const FILE: &str = "raft.redb";
const TABLE: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const VOTE: &str = "vote";
const PURGED: &str = "purged";
const SNAPSHOT: &str = "snapshot";
/// Present once the log's directory was made: from then on it must be there.
const HAS_LOG: &str = "log";
/// The directory of the log's files.
const LOG_DIR: &str = "log";
/// The file of the commit index.
const COMMITTED: &str = "committed";

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
    /// A read or write of the log.
    #[error("{path}: {source}")]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
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

/// The database of what is not the log. Its methods block.
#[derive(Debug)]
pub(crate) struct Meta {
    path: PathBuf,
    db: Database,
    sealer: Arc<Sealer>,
}

/// All that a manager keeps.
#[derive(Debug)]
pub(crate) struct Disk {
    meta: Arc<Meta>,
    log: Log,
    committed: File,
}

fn cannot_open(
    path: &Path,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> DiskError {
    DiskError::Open { path: path.to_owned(), source: source.into() }
}

/// A file that only its owner reads, made if it is not there.
fn private(path: &Path) -> Result<File, DiskError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(|error| cannot_open(path, error))
}

impl Disk {
    /// Opens what is there and checks every record in it. It must be there, and may not be empty.
    pub(crate) fn resume(dir: &Path, key: &[u8; 32]) -> Result<Self, DiskError> {
        let path = dir.join(FILE);
        match std::fs::metadata(&path) {
            Ok(file) if file.len() > 0 => Self::open(dir, key),
            Ok(_) => Err(DiskError::Lost { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DiskError::Lost { path }),
            Err(error) => Err(cannot_open(&path, error)),
        }
    }

    /// Opens or makes it and checks every record in it.
    pub(crate) fn open(dir: &Path, key: &[u8; 32]) -> Result<Self, DiskError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| cannot_open(dir, error))?;
        let path = dir.join(FILE);
        let db = redb::Builder::new()
            .set_cache_size(4 << 20)
            .create_file(private(&path)?)
            .map_err(|error| cannot_open(&path, error))?;
        let sealer = Arc::new(Sealer::new(key).map_err(|error| cannot_open(&path, error))?);
        let meta = Arc::new(Meta { path, db, sealer: Arc::clone(&sealer) });
        meta.refuse_earlier_layout()?;
        // The table is there from the first transaction on.
        meta.write(|_| Ok(()))?;
        let _: Option<Vote> = meta.get(VOTE)?;
        let _: Option<StoredSnapshot> = meta.get(SNAPSHOT)?;
        let purged: Option<LogId> = meta.get(PURGED)?;
        let has_log = meta.get::<()>(HAS_LOG)?.is_some();
        let log = Log::open(&dir.join(LOG_DIR), sealer, purged, !has_log)?;
        let committed = private(&dir.join(COMMITTED))?;
        // The names in the directory must last as the votes and entries in the files do.
        File::open(dir).and_then(|d| d.sync_all()).map_err(|error| cannot_open(dir, error))?;
        if !has_log {
            meta.put(HAS_LOG, &())?;
        }
        Ok(Self { meta, log, committed })
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    pub(crate) fn meta(&self) -> &Arc<Meta> {
        &self.meta
    }

    /// Lost with a power cut, the leader tells it again; a crash of this process keeps it.
    pub(crate) fn save_committed(&self, committed: &LogId) -> Result<(), DiskError> {
        let mut sealed = self.meta.seal(COMMITTED, encode(committed))?;
        let mut out = (sealed.len() as u32).to_le_bytes().to_vec();
        out.append(&mut sealed);
        self.committed.write_all_at(&out, 0).map_err(|source| DiskError::Log {
            path: self.meta.path.with_file_name(COMMITTED),
            source,
        })
    }

    /// `None` too if it cannot be read.
    pub(crate) fn committed(&self) -> Option<LogId> {
        let mut length = [0; 4];
        self.committed.read_exact_at(&mut length, 0).ok()?;
        // Some fifty bytes.
        let mut sealed = vec![0; usize::try_from(u32::from_le_bytes(length)).ok()?.min(4096)];
        self.committed.read_exact_at(&mut sealed, 4).ok()?;
        self.meta.unseal(COMMITTED, &sealed).ok()
    }

    pub(crate) fn save_snapshot(&self, snapshot: &StoredSnapshot) -> Result<(), DiskError> {
        self.meta.put(SNAPSHOT, snapshot)?;
        self.log.snapshot_made();
        Ok(())
    }

    pub(crate) fn snapshot(&self) -> Result<Option<StoredSnapshot>, DiskError> {
        self.meta.get(SNAPSHOT)
    }

    /// For a store that has no encoding.
    pub(crate) fn unusable_snapshot(&self, error: CodecError) -> DiskError {
        self.meta.malformed(SNAPSHOT, error)
    }

    /// Bytes appended since the last snapshot.
    pub(crate) fn grown(&self) -> u64 {
        self.log.grown()
    }
}

impl Meta {
    pub(crate) fn vote(&self) -> Result<Option<Vote>, DiskError> {
        self.get(VOTE)
    }

    pub(crate) fn save_vote(&self, vote: &Vote) -> Result<(), DiskError> {
        self.put(VOTE, vote)
    }

    pub(crate) fn save_purged(&self, upto: &LogId) -> Result<(), DiskError> {
        self.put(PURGED, upto)
    }

    /// The log was a table of the database once: what is in it is not read here, nor passed over.
    fn refuse_earlier_layout(&self) -> Result<(), DiskError> {
        let txn = self.db.begin_read().map_err(|e| self.database(e))?;
        let mut tables = txn.list_tables().map_err(|e| self.database(e))?;
        if tables.any(|table| table.name() == "log") {
            return Err(self.malformed(
                "the log",
                "it is that of an earlier version of meshd: let this manager leave by force \
                 (`swarm leave --force`), remove it on another manager, and join again",
            ));
        }
        Ok(())
    }

    fn database(&self, error: impl Into<redb::Error>) -> DiskError {
        DiskError::Database { path: self.path.clone(), source: Box::new(error.into()) }
    }

    fn malformed(&self, record: &str, why: impl ToString) -> DiskError {
        let (path, record) = (self.path.clone(), record.to_owned());
        DiskError::Malformed { path, record, why: why.to_string() }
    }

    fn sealed(&self, record: &str) -> impl Fn(SealError) -> DiskError {
        let (path, record) = (self.path.clone(), record.to_owned());
        move |source| DiskError::Sealed { path: path.clone(), record: record.clone(), source }
    }

    fn seal(&self, record: &str, plain: Result<Vec<u8>, CodecError>) -> Result<Vec<u8>, DiskError> {
        let plain = plain.map_err(|e| self.malformed(record, e))?;
        self.sealer.seal(record, plain).map_err(self.sealed(record))
    }

    fn unseal<T: DeserializeOwned>(&self, record: &str, sealed: &[u8]) -> Result<T, DiskError> {
        let plain = self.sealer.open(record, sealed).map_err(self.sealed(record))?;
        decode(&plain).map_err(|e| self.malformed(record, e))
    }

    fn write(
        &self,
        change: impl FnOnce(&mut redb::Table<'_, &str, &[u8]>) -> Result<(), redb::StorageError>,
    ) -> Result<(), DiskError> {
        let mut txn = self.db.begin_write().map_err(|e| self.database(e))?;
        txn.set_durability(Durability::Immediate).map_err(|e| self.database(e))?;
        txn.set_two_phase_commit(true);
        {
            let mut table = txn.open_table(TABLE).map_err(|e| self.database(e))?;
            change(&mut table).map_err(|e| self.database(e))?;
        }
        txn.commit().map_err(|e| self.database(e))
    }

    fn put<T: Serialize>(&self, key: &str, value: &T) -> Result<(), DiskError> {
        let sealed = self.seal(key, encode(value))?;
        self.write(|table| table.insert(key, sealed.as_slice()).map(drop))
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, DiskError> {
        let txn = self.db.begin_read().map_err(|e| self.database(e))?;
        let table = txn.open_table(TABLE).map_err(|e| self.database(e))?;
        let value = table.get(key).map_err(|e| self.database(e))?;
        value.map(|sealed| self.unseal(key, sealed.value())).transpose()
    }
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

/// The log id of an entry, for the state machine.
pub(crate) fn log_id(entry: &Entry) -> LogId {
    entry.log_id()
}
