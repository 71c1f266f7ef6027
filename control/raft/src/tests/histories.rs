//! Aim: whatever happens between managers, clients of any of them see one store: what they see is
//! linearizable, and nothing that was acknowledged is lost.
//!
//! Method: groups in this process, clients on all nodes, and for some seconds kills, restarts,
//! partitions (one-way ones too), loss and delay, voters that go and come back. All choices come
//! from a seed; the threads' own interleaving does not, so a seed that failed may have to be run
//! several times. Each seed has three registers: the two join secrets are written blindly, a node's
//! label by compare and swap.

use std::{
    collections::BTreeSet,
    env,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_control::{
    command::{Command, InitCluster, NewNode, Proposal},
    model::{ClusterSpec, NodeDescription, NodeSpec, Role},
    store::Store,
};
use mesh_history::{Action, Dice, Recorder, check};
use mesh_types::{ClusterId, NetworkId, NodeId};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::net::{Net, Weather, address, number};
use crate::{ProposeError, Raft, Timers};

/// Seeds of the usual run; `MESH_RAFT_SEEDS=7` or `=0-99` names others.
const SEEDS: std::ops::Range<u64> = 0..20;
/// Groups at a time.
const AT_ONCE: usize = 10;
/// How long faults go on.
const TROUBLE: Duration = Duration::from_secs(4);
const CLIENTS: u64 = 5;
/// How long a healed group may take to serve on all nodes again, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);
const LABEL: &str = "register";

/// Somewhat hastier than the usual ones. Much more would be a test of the machine: an election
/// never ends where threads wait longer for their turn than voters for their leader.
const TIMERS: Timers = Timers {
    heartbeat: Duration::from_millis(100),
    election_min: Duration::from_millis(250),
    election_max: Duration::from_millis(450),
    propose: Duration::from_millis(1500),
    change: Duration::from_secs(20),
};

fn seeds() -> Vec<u64> {
    let Ok(named) = env::var("MESH_RAFT_SEEDS") else { return SEEDS.collect() };
    let number = |text: &str| text.parse().expect("MESH_RAFT_SEEDS is a number or a range 0-99");
    match named.split_once('-') {
        Some((first, last)) => (number(first)..=number(last)).collect(),
        None => vec![number(&named)],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn histories_are_linearizable() {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut runs = JoinSet::new();
    for seed in seeds() {
        let places = Arc::clone(&places);
        runs.spawn(async move {
            let _place = places.acquire().await;
            (seed, tokio::spawn(run(seed)).await)
        });
    }
    let (mut told, mut failed) = (0, Vec::new());
    while let Some(done) = runs.join_next().await {
        match done.unwrap() {
            (_, Ok(Ok(operations))) => told += operations,
            (seed, Ok(Err(why))) => failed.push(format!("seed {seed}: {why}")),
            (seed, Err(panic)) => failed.push(format!("seed {seed}: {panic}")),
        }
    }
    eprintln!("{told} operations were answered");
    let again = "run one again with MESH_RAFT_SEEDS=SEED cargo test -p mesh-raft histories";
    assert!(failed.is_empty(), "{}\n{again}", failed.join("\n"));
}

const NODE: NodeId = NodeId::from_bits(1);

fn init() -> Command {
    Command::Init(Box::new(InitCluster {
        id: ClusterId::from_bits(1),
        spec: ClusterSpec::default(),
        ca_cert_pem: String::new(),
        ca_key_pem: String::new(),
        worker_secret: [0; 16],
        manager_secret: [0; 16],
        gossip_key: [0; 32],
        ingress: NetworkId::from_bits(1),
        first: NewNode {
            id: NODE,
            spec: NodeSpec { role: Role::Manager, ..NodeSpec::default() },
            description: NodeDescription::default(),
            address: address(1),
            vtep: address(1).ip(),
        },
    }))
}

/// The registers and what was seen of them.
#[derive(Debug, Default)]
struct Histories {
    worker: Recorder<u64>,
    manager: Recorder<u64>,
    label: Recorder<u64>,
    /// Values are written once each.
    values: AtomicU64,
    /// Log indexes of what was acknowledged.
    acknowledged: Mutex<BTreeSet<u64>>,
}

fn secret(store: &Store, role: Role) -> u64 {
    let cluster = store.cluster.as_ref().unwrap();
    let secret = match role {
        Role::Worker => cluster.worker_secret,
        Role::Manager => cluster.manager_secret,
    };
    u64::from_be_bytes(secret[8..].try_into().unwrap())
}

fn label(store: &Store) -> Option<u64> {
    let labels = &store.nodes.get(&NODE)?.spec.labels;
    Some(labels.get(LABEL).map_or(0, |value| value.parse().unwrap()))
}

impl Histories {
    fn fresh(&self) -> u64 {
        self.values.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn of(&self, role: Role) -> &Recorder<u64> {
        match role {
            Role::Worker => &self.worker,
            Role::Manager => &self.manager,
        }
    }

    /// Whether it is done; `None`: nobody knows.
    async fn propose(&self, raft: &Raft, command: Command) -> Option<bool> {
        let revision = match raft.propose(Proposal { now_ms: 0, command }).await {
            Ok(applied) => applied.revision,
            Err(ProposeError::Behind { revision }) => revision,
            Err(ProposeError::Rejected(_)) => return Some(false),
            Err(_) => return None,
        };
        self.acknowledged.lock().unwrap().insert(revision.get());
        Some(true)
    }

    async fn write(&self, raft: &Raft, role: Role) {
        let value = self.fresh();
        let mut secret = [0; 16];
        secret[8..].copy_from_slice(&value.to_be_bytes());
        let called = self.of(role).call();
        match self.propose(raft, Command::RotateToken { role, secret }).await {
            Some(true) => self.of(role).answered(called, Action::Write(value)),
            Some(false) => panic!("a secret was refused"),
            None => self.of(role).unanswered(called, Action::Write(value)),
        }
    }

    async fn read(&self, raft: &Raft, role: Role) {
        let called = self.of(role).call();
        if raft.read_barrier().await.is_ok() {
            let seen = raft.read(|store| secret(store, role));
            self.of(role).answered(called, Action::Read(seen));
        }
    }

    /// Looks at the label, and puts another in its place unless it changed meanwhile. The look may
    /// be at an old store: the version decides.
    async fn swap(&self, raft: &Raft) {
        let seen = |store: &Store| Some((label(store)?, store.nodes.get(&NODE)?.meta.version));
        // A node that just started has an old store, or none.
        let Some((from, version)) = raft.read(seen) else { return };
        let to = self.fresh();
        let spec = NodeSpec {
            role: Role::Manager,
            labels: [(LABEL.to_owned(), to.to_string())].into(),
            ..NodeSpec::default()
        };
        let called = self.label.call();
        match self.propose(raft, Command::UpdateNode { id: NODE, version, spec }).await {
            Some(true) => self.label.answered(called, Action::Swap { from, to }),
            Some(false) => {}
            None => self.label.unanswered(called, Action::Swap { from, to }),
        }
    }

    async fn read_label(&self, raft: &Raft) {
        let called = self.label.call();
        if raft.read_barrier().await.is_ok() {
            self.label.answered(called, Action::Read(raft.read(label).unwrap()));
        }
    }
}

/// A client that turns to a node at random each time, also to one that is cut off.
async fn client(net: Arc<Net>, histories: Arc<Histories>, mut dice: Dice, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let alive: Vec<u64> = net.nodes().into_iter().map(|(id, _)| id).collect();
        let raft = dice.pick(&alive).and_then(|id| net.nodes().into_iter().find(|n| n.0 == id));
        if let Some((_, raft)) = raft {
            match dice.below(8) {
                0 => histories.write(&raft, Role::Worker).await,
                1 => histories.write(&raft, Role::Manager).await,
                2 => histories.read(&raft, Role::Worker).await,
                3 => histories.read(&raft, Role::Manager).await,
                4..=5 => histories.swap(&raft).await,
                _ => histories.read_label(&raft).await,
            }
        }
        sleep(Duration::from_millis(dice.below(60))).await;
    }
}

/// One thing goes wrong, or gets well.
async fn trouble(net: &Net, size: u64, dice: &mut Dice) {
    let alive: Vec<u64> = net.nodes().into_iter().map(|(id, _)| id).collect();
    let dead: Vec<u64> = (1..=size).filter(|id| !alive.contains(id)).collect();
    let leads = |raft: &Raft| raft.leadership().borrow().me_leader;
    let leader = net.nodes().into_iter().find(|(_, raft)| leads(raft)).map(|(id, _)| id);
    // Half of what happens, happens to the leader.
    let victim = leader.filter(|_| dice.below(2) == 0).or_else(|| dice.pick(&alive)).unwrap_or(1);
    let others = || (1..=size).filter(move |other| *other != victim);
    match dice.below(13) {
        0 => net.isolate(victim),
        1 => others().for_each(|other| net.cut(victim, other)),
        2 => others().for_each(|other| net.cut(other, victim)),
        3 => net.cut(victim, victim % size + 1),
        4 => {
            let side: BTreeSet<u64> = (1..=size).filter(|_| dice.below(2) == 0).collect();
            for from in 1..=size {
                for to in (1..=size).filter(|to| side.contains(&from) != side.contains(to)) {
                    net.cut(from, to);
                }
            }
        }
        5..=6 => net.heal(),
        // More than a minority may be dead at a time: only its disks must stay.
        7..=8 if alive.len() > 1 => net.stop(victim).await,
        10 => retire(net, victim).await,
        9 => {
            let (loss, delay) = (dice.below(100), Duration::from_micros(dice.below(20_000)));
            let dice = Dice::new(dice.below(u64::MAX));
            net.weather(Some(Weather { loss, least: Duration::ZERO, delay, dice }));
        }
        _ => match dice.pick(&dead) {
            Some(id) => drop(net.start(id).await),
            None => net.weather(None),
        },
    }
}

/// A voter goes, and comes back, as far as a majority agrees in time. What is left is made good in
/// the end.
async fn retire(net: &Net, id: u64) {
    let Some((_, other)) = net.nodes().into_iter().find(|(other, _)| *other != id) else { return };
    let patience = Duration::from_secs(1);
    let removed = timeout(patience, other.remove_voter(number(id))).await;
    if matches!(removed, Ok(Ok(()))) {
        let _ = timeout(patience, other.add_voter(number(id), address(id))).await;
    }
}

async fn run(seed: u64) -> Result<usize, String> {
    let mut dice = Dice::new(seed);
    let size = [3, 5][usize::try_from(dice.below(2)).unwrap()];
    let snapshot_entries = [40, 5000][usize::try_from(dice.below(2)).unwrap()];
    let net = Arc::new(Net::hasty(&format!("seed{seed}"), size, snapshot_entries, TIMERS).await);
    let histories = Arc::new(Histories::default());
    let deadline = Instant::now() + RECOVERY;
    while histories.propose(&net.node(1), init()).await.is_none() {
        if Instant::now() > deadline {
            return Err("the group does not begin".to_owned());
        }
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let (net, histories) = (Arc::clone(&net), Arc::clone(&histories));
        clients.spawn(client(net, histories, Dice::new(seed ^ ((n + 1) << 32)), Arc::clone(&stop)));
    }
    let end = Instant::now() + TROUBLE;
    while Instant::now() < end {
        sleep(Duration::from_millis(100 + dice.below(700))).await;
        trouble(&net, size, &mut dice).await;
    }
    net.heal();
    net.weather(None);
    let alive: Vec<u64> = net.nodes().into_iter().map(|(id, _)| id).collect();
    for id in (1..=size).filter(|id| !alive.contains(id)) {
        net.start(id).await;
    }
    // The clients go on over the recovery; it is over when every node votes and serves.
    let deadline = Instant::now() + RECOVERY;
    for id in 1..=size {
        // One that is no voter itself knows of no leader: others are asked in turn.
        let mut asked = (1..=size).cycle().filter(|other| *other != id);
        while let Some(other) = asked.next()
            && net.node(other).add_voter(number(id), address(id)).await.is_err()
        {
            if Instant::now() > deadline {
                return Err(format!("node {id} is not made a voter again"));
            }
        }
        while net.node(id).read_barrier().await.is_err() {
            if Instant::now() > deadline {
                let now = net.node(id).leadership().borrow().clone();
                return Err(format!("node {id} does not serve after all is well: {now:?}"));
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(client) = clients.join_next().await {
        client.map_err(|error| error.to_string())?;
    }
    for id in 1..=size {
        histories.read(&net.node(id), Role::Worker).await;
        histories.read(&net.node(id), Role::Manager).await;
        histories.read_label(&net.node(id)).await;
    }
    judge(&net, size, histories).await
}

/// How many operations were answered, if all is as it should be.
async fn judge(net: &Net, size: u64, histories: Arc<Histories>) -> Result<usize, String> {
    let all: Vec<u64> = (1..=size).collect();
    net.settled(&all).await;
    let histories = Arc::into_inner(histories).ok_or("a client goes on")?;
    let acknowledged = histories.acknowledged.into_inner().unwrap();
    for id in all {
        let raft = net.node(id);
        let kept = raft.written_at();
        if let Some(lost) = acknowledged.iter().find(|index| !kept.contains(index)) {
            return Err(format!("{} lost what was acknowledged at {lost}", number(id)));
        }
    }
    let mut answered = 0;
    for (name, recorder) in [
        ("worker secret", histories.worker),
        ("manager secret", histories.manager),
        ("label", histories.label),
    ] {
        let operations = recorder.into_operations();
        answered += operations.iter().filter(|operation| operation.answered.is_some()).count();
        check(0, &operations).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(answered)
}
