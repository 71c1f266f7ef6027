//! A network of raft nodes in this process, with links to cut.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use mesh_control::{
    command::{Command, Proposal},
    model::Role,
};
use mesh_history::Dice;
use mesh_types::{NodeNumber, Revision};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    Leadership, ProposeError, Raft, RaftConfig, RpcKind, Timers, Transport, TransportError,
};

/// Removed when dropped.
pub(crate) struct TempDir(PathBuf);

static DIRS: AtomicU32 = AtomicU32::new(0);

impl TempDir {
    pub(crate) fn new(name: &str) -> Self {
        Self::under(&std::env::temp_dir(), name)
    }

    fn under(parent: &Path, name: &str) -> Self {
        let unique = DIRS.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("mesh-raft-{}-{unique}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[derive(Default)]
struct Links {
    nodes: BTreeMap<u64, Raft>,
    /// From, to: what is lost.
    cut: BTreeSet<(u64, u64)>,
    /// Answers to forwarded writes that get lost, so many.
    lose_answers: u32,
    /// What happens to every message.
    weather: Option<Weather>,
}

/// What happens to every message on every link.
#[derive(Debug, Clone)]
pub(crate) struct Weather {
    /// So many of a thousand get lost.
    pub(crate) loss: u64,
    /// The others are late by this at least,
    pub(crate) least: Duration,
    /// and by up to this more.
    pub(crate) delay: Duration,
    pub(crate) dice: Dice,
}

struct Wire {
    from: u64,
    links: Arc<Mutex<Links>>,
}

impl Wire {
    /// Carries a message, or loses it.
    async fn carry(&self, from: u64, to: u64) -> bool {
        let fate = self.links.lock().unwrap().fate(from, to);
        match fate {
            None => return false,
            Some(Duration::ZERO) => {}
            Some(late) => sleep(late).await,
        }
        true
    }

    fn lose_answer(&self, kind: RpcKind) -> bool {
        let mut links = self.links.lock().unwrap();
        let lose = kind == RpcKind::Propose && links.lose_answers > 0;
        links.lose_answers -= u32::from(lose);
        lose
    }
}

impl Links {
    /// A message's lot: `None`, it is lost, or how late it comes.
    fn fate(&mut self, from: u64, to: u64) -> Option<Duration> {
        if self.cut.contains(&(from, to)) {
            return None;
        }
        let Some(Weather { loss, least, delay, dice }) = &mut self.weather else {
            return Some(Duration::ZERO);
        };
        let lost = dice.below(1000) < *loss;
        let micros = u64::try_from(delay.as_micros()).unwrap() + 1;
        (!lost).then(|| *least + Duration::from_micros(dice.below(micros)))
    }
}

/// A cut link says nothing: the caller runs into its time-out, or the transport's keep-alive breaks
/// the connection (the one that carries a snapshot, which has 15 s).
async fn silence(timeout: Duration) -> TransportError {
    let keep_alive = Duration::from_secs(2);
    sleep(timeout.min(keep_alive)).await;
    if timeout < keep_alive {
        TransportError::Timeout(timeout)
    } else {
        TransportError::Failed("the connection broke".into())
    }
}

#[async_trait]
impl Transport for Wire {
    async fn call(
        &self,
        target: NodeNumber,
        _address: SocketAddr,
        kind: RpcKind,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, TransportError> {
        let to = target.get();
        if !self.carry(self.from, to).await {
            return Err(silence(timeout).await);
        }
        let Some(node) = self.links.lock().unwrap().nodes.get(&to).cloned() else {
            return Err(TransportError::Unreachable("connection refused".into()));
        };
        let answer = node.serve(kind, body).await;
        drop(node);
        if self.lose_answer(kind) {
            return Err(TransportError::Failed("connection reset".into()));
        }
        if !self.carry(to, self.from).await {
            return Err(silence(timeout).await);
        }
        answer.map_err(|e| TransportError::Failed(e.to_string()))
    }
}

pub(crate) fn number(n: u64) -> NodeNumber {
    NodeNumber::new(n).unwrap()
}

pub(crate) fn address(n: u64) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 10_000 + u16::try_from(n).unwrap()))
}

/// A group.
pub(crate) struct Net {
    dir: TempDir,
    links: Arc<Mutex<Links>>,
    snapshot_entries: u64,
    timers: Timers,
}

impl Net {
    fn new(dir: TempDir, snapshot_entries: u64, timers: Timers) -> Self {
        Self { dir, links: Arc::default(), snapshot_entries, timers }
    }

    /// Nodes 1..=n, all voters.
    pub(crate) async fn group(name: &str, n: u64, snapshot_entries: u64) -> Self {
        Self::new(TempDir::new(name), snapshot_entries, Timers::default()).form(n).await
    }

    /// The same with other timers, and disks in memory where there is such a thing: a process that
    /// dies loses nothing that it wrote, so syncing adds nothing but time.
    pub(crate) async fn hasty(name: &str, n: u64, snapshot_entries: u64, timers: Timers) -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Self::new(TempDir::under(&parent, name), snapshot_entries, timers).form(n).await
    }

    async fn form(self, n: u64) -> Self {
        let net = self;
        let first = net.start(1).await;
        first.bootstrap().await.unwrap();
        for id in 2..=n {
            net.start(id).await;
            let deadline = Instant::now() + Duration::from_secs(60);
            while let Err(error) = first.add_voter(number(id), address(id)).await {
                assert!(Instant::now() < deadline, "node {id} is not made a voter: {error}");
            }
        }
        net
    }

    pub(crate) fn config(&self, id: u64) -> RaftConfig {
        let dir = self.dir.path().join(id.to_string());
        let mut config = RaftConfig::new(dir, number(id), address(id), [9; 32]);
        config.snapshot_entries = self.snapshot_entries;
        config.timers = self.timers;
        // A node that is started again must find what it knew.
        config.resume = config.dir.exists();
        config
    }

    pub(crate) async fn start(&self, id: u64) -> Raft {
        let wire = Wire { from: id, links: Arc::clone(&self.links) };
        let raft = Raft::start(self.config(id), Arc::new(wire)).await.unwrap();
        self.links.lock().unwrap().nodes.insert(id, raft.clone());
        raft
    }

    /// Stops a node as abruptly as a process can within one, and waits until its file is free.
    pub(crate) async fn stop(&self, id: u64) {
        let raft = self.links.lock().unwrap().nodes.remove(&id).unwrap();
        raft.shutdown().await;
        let dir = self.config(id).dir;
        drop(raft);
        let deadline = Instant::now() + Duration::from_secs(10);
        while crate::disk::Disk::open(&dir, &[9; 32]).is_err() {
            assert!(Instant::now() < deadline, "node {id} does not let go of its file");
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn node(&self, id: u64) -> Raft {
        self.links.lock().unwrap().nodes[&id].clone()
    }

    pub(crate) fn nodes(&self) -> Vec<(u64, Raft)> {
        self.links.lock().unwrap().nodes.iter().map(|(id, raft)| (*id, raft.clone())).collect()
    }

    pub(crate) fn isolate(&self, id: u64) {
        let mut links = self.links.lock().unwrap();
        let others: Vec<u64> = links.nodes.keys().copied().filter(|other| *other != id).collect();
        for other in others {
            links.cut.extend([(id, other), (other, id)]);
        }
    }

    /// Loses what goes from one to the other.
    pub(crate) fn cut(&self, from: u64, to: u64) {
        self.links.lock().unwrap().cut.insert((from, to));
    }

    pub(crate) fn heal(&self) {
        self.links.lock().unwrap().cut.clear();
    }

    pub(crate) fn weather(&self, weather: Option<Weather>) {
        self.links.lock().unwrap().weather = weather;
    }

    pub(crate) fn lose_answers(&self, n: u32) {
        self.links.lock().unwrap().lose_answers = n;
    }

    /// Waits until a node other than `but` leads.
    pub(crate) async fn leader(&self, but: u64, patience: Duration) -> (u64, Raft) {
        let deadline = Instant::now() + patience;
        loop {
            for (id, raft) in self.nodes() {
                if id != but && raft.leadership().borrow().me_leader {
                    return (id, raft);
                }
            }
            assert!(Instant::now() < deadline, "no leader within {patience:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until all of these nodes applied the same writes as the first.
    pub(crate) async fn settled(&self, ids: &[u64]) -> Vec<[u8; 16]> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let all: Vec<_> = ids.iter().map(|id| self.node(*id).writes()).collect();
            if all.iter().all(|writes| *writes == all[0]) {
                return all[0].clone();
            }
            assert!(Instant::now() < deadline, "the nodes {ids:?} differ");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A small write. Whether the store of the day takes or refuses it does not matter here: it was
/// replicated and applied either way.
pub(crate) async fn write(raft: &Raft, n: u8) -> Result<(), ProposeError> {
    let command = Command::RotateToken { role: Role::Worker, secret: [n; 16] };
    match raft.propose(Proposal { now_ms: u64::from(n), command }).await {
        Ok(_) | Err(ProposeError::Rejected(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(crate) async fn until(raft: &Raft, what: &str, test: impl FnMut(&Leadership) -> bool) {
    let mut leadership = raft.leadership();
    let reached = timeout(Duration::from_secs(10), leadership.wait_for(test)).await;
    assert!(matches!(reached, Ok(Ok(_))), "{what}: {:?}", raft.leadership().borrow());
}

pub(crate) async fn reached(raft: &Raft, revision: Revision) {
    let mut watch = raft.watch();
    let there = timeout(Duration::from_secs(10), watch.wait_for(|now| *now >= revision)).await;
    assert!(matches!(there, Ok(Ok(_))), "revision {revision} is not reached");
}
