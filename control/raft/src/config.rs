//! What a raft node is started with.

use std::{fmt, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use mesh_types::NodeNumber;
use openraft::{Config, ConfigError, SnapshotPolicy, StepDownPolicy};

/// What a raft node is started with.
#[derive(Clone)]
pub struct RaftConfig {
    /// Where its file is; made if it is not there.
    pub dir: PathBuf,
    /// This node's number. Never used again by another node, nor by this one with an empty disk:
    /// it would find itself among the voters of an old log, and might lead them.
    pub number: NodeNumber,
    /// Where the other managers reach it.
    pub address: SocketAddr,
    /// Seals what is on disk. Of this node alone.
    pub data_key: [u8; 32],
    /// It took part before: its file must be there. Without it the node has forgotten whom it voted
    /// for and what it acknowledged, and must not go on under its old number.
    pub resume: bool,
    /// How patient it is.
    pub timers: Timers,
    /// Snapshots are made after this many entries; 5,000 by default. Larger: longer restarts.
    pub snapshot_entries: u64,
    /// Or after this many bytes of log; 16 MiB by default.
    pub snapshot_bytes: u64,
    /// Told how long things took; by default nobody is.
    pub observe: Observe,
}

/// Told how long something took. It is called where that is done: it must be quick.
pub type Observe = fn(Timed, Duration);

/// What takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timed {
    /// A write by this node as the leader, until a majority has it and it is applied here.
    Write,
    /// One entry's change of the store in memory.
    Apply,
    /// A snapshot, made and on the disk.
    Snapshot,
}

impl RaftConfig {
    /// With the defaults.
    #[must_use]
    pub fn new(dir: PathBuf, number: NodeNumber, address: SocketAddr, data_key: [u8; 32]) -> Self {
        Self {
            dir,
            number,
            address,
            data_key,
            resume: false,
            timers: Timers::default(),
            snapshot_entries: SNAPSHOT_ENTRIES,
            snapshot_bytes: 16 << 20,
            observe: |_, _| {},
        }
    }
}

impl fmt::Debug for RaftConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the key.
        f.debug_struct("RaftConfig")
            .field("dir", &self.dir)
            .field("number", &self.number)
            .field("address", &self.address)
            .field("resume", &self.resume)
            .field("timers", &self.timers)
            .finish_non_exhaustive()
    }
}

/// How patient a raft node is. All managers of a cluster should have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    /// Between heartbeats, and how long the answer to one may take; 200 ms. Managers with a longer
    /// way there and back between them, in a network or through busy machines, keep no leader.
    pub heartbeat: Duration,
    /// How long a follower waits at least, once its leader's lease ended, until it stands for
    /// election; 300 ms.
    pub election_min: Duration,
    /// How long at most, and the lease itself: voters that heard their leader within this time
    /// elect no other. 550 ms: a dead leader is replaced after 0.85–1.1 s, and a busy machine may
    /// hold up heartbeats for as long.
    pub election_max: Duration,
    /// How long a proposal tries, over changes of the leader; 5 s.
    pub propose: Duration,
    /// How long a change of the voters tries; 20 s.
    pub change: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(200),
            election_min: Duration::from_millis(300),
            election_max: Duration::from_millis(550),
            propose: Duration::from_secs(5),
            change: Duration::from_secs(20),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Snapshots are made after this many entries, unless a configuration says otherwise.
pub const SNAPSHOT_ENTRIES: u64 = 5_000;

/// Entries kept behind a snapshot for followers that are a little late.
const KEEP: u64 = 500;

pub(crate) fn openraft(config: &RaftConfig) -> Result<Arc<Config>, ConfigError> {
    let timers = &config.timers;
    let config = Config {
        cluster_name: "mesh".into(),
        heartbeat_interval: millis(timers.heartbeat),
        election_timeout_min: millis(timers.election_min),
        election_timeout_max: millis(timers.election_max),
        enable_pre_vote: Some(true),
        // A restarted leader stands for election as all do: the usual proof of raft holds.
        enable_leader_restore: Some(false),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_entries),
        max_in_snapshot_log_to_keep: KEEP.min(config.snapshot_entries),
        // Must exceed the snapshot policy: a snapshot could not catch up a follower otherwise.
        replication_lag_threshold: config.snapshot_entries * 2,
        install_snapshot_timeout: 15_000,
        removed_leader_step_down: StepDownPolicy::After(150),
        // A peer that comes back is found within half a second.
        backoff: "100ms 200ms ...500ms".into(),
        ..Config::default()
    };
    Ok(Arc::new(config.validate()?))
}
