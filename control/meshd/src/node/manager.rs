//! What a manager does beside being a node: runs the leader's loops while it leads, and serves the
//! revision stream.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh_control::{
    command::{Command, NodeReport, Outcome, Proposal, Rejection},
    events::{EventLog, Number},
    leader::{LeaderMemory, decide},
    model::{Node, NodeState, NodeStatus, Role},
    store::Store,
    stream::{RecordLog, assignments, ended, subscription},
};
use mesh_raft::{ProposeError, Raft};
use mesh_types::{
    NodeId, NodeNumber, Revision, TaskId,
    record::{Delta, Scope},
    task::{TaskAssignment, TaskState, TaskStatus},
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    clock,
    liveness::{HEARTBEAT, LEFT, Liveness},
};
use crate::{api::events::Feed, metrics::list};

/// The leader looks at liveness this often.
const TICK: Duration = Duration::from_millis(500);
/// Acknowledgements of several nodes come close together.
const GATHER: Duration = Duration::from_millis(5);
/// So many events are remembered for those who ask later.
const EVENTS_MAX: usize = 2048;
/// Changes come in bursts, and a look costs a walk over all objects.
const EVENTS_GATHER: Duration = Duration::from_millis(20);

/// A manager's share of the control plane.
pub(crate) struct Manager {
    /// The replicated store.
    pub(crate) raft: Raft,
    liveness: Mutex<Liveness>,
    log: Mutex<RecordLog>,
    acked: Mutex<BTreeMap<NodeId, Revision>>,
    /// Nodes acknowledged something: the leader's loops may go on, others pass it to the leader.
    news: Notify,
    events: Feed,
    /// Taken by the one who feeds it.
    feeder: Mutex<Option<watch::Sender<Number>>>,
    closed: AtomicBool,
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").finish_non_exhaustive()
    }
}

/// A node's tasks: those to run, and those that ended there and are not forgotten.
pub(crate) type Assigned = (Vec<TaskAssignment>, BTreeSet<TaskId>);

/// One view of the store for a session.
#[derive(Debug)]
pub(crate) struct View {
    /// The step from where the node was.
    pub(crate) delta: Delta,
    /// Its whole set of tasks, unless this manager is behind the node.
    pub(crate) assignments: Option<Assigned>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Manager {
    /// Wraps a started raft.
    #[must_use]
    pub(crate) fn new(raft: Raft) -> Arc<Self> {
        let (feeder, next) = watch::channel(0);
        let events = Feed { log: Arc::new(Mutex::new(EventLog::keeping(EVENTS_MAX))), next };
        Arc::new(Self {
            raft,
            events,
            feeder: Mutex::new(Some(feeder)),
            liveness: Mutex::default(),
            log: Mutex::default(),
            acked: Mutex::default(),
            news: Notify::new(),
            closed: AtomicBool::new(false),
        })
    }

    /// This node is no manager any more: its sessions with others end.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// See [`Manager::close`].
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Proposes with this node's clock, on whichever manager leads.
    ///
    /// # Errors
    /// As [`Raft::propose`].
    pub(crate) async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        let proposal = Proposal { now_ms: clock::wall_ms(), command };
        self.raft.propose(proposal).await.map(|applied| applied.outcome)
    }

    /// Of what another node says, that which is about nodes of the cluster: the rest would be kept
    /// for nobody.
    pub(crate) fn nodes_of<T>(&self, mut said: Vec<T>, of: impl Fn(&T) -> NodeId) -> Vec<T> {
        self.raft.read(|store| said.retain(|item| store.nodes.contains_key(&of(item))));
        said
    }

    /// A node was heard, directly or through another manager.
    pub(crate) fn heard(&self, nodes: &[NodeId]) {
        let now = clock::monotonic();
        let mut liveness = lock(&self.liveness);
        for node in nodes {
            liveness.heard(*node, now);
        }
        drop(liveness);
    }

    /// A node reports what it is now like. Written only where it differs from the store.
    pub(crate) async fn described(
        &self,
        node: NodeId,
        description: mesh_control::model::NodeDescription,
    ) -> Result<(), ProposeError> {
        let known = self
            .raft
            .read(|store| store.nodes.get(&node).is_some_and(|n| n.description == description));
        if known {
            return Ok(());
        }
        description.check().map_err(|why| ProposeError::Rejected(Rejection::Invalid(why)))?;
        let report = NodeReport { id: node, status: None, description: Some(description) };
        self.propose(Command::ReportNodes(vec![report])).await.map(drop)
    }

    /// How far a node's kernel is, by its own word. Leader memory, never in the store.
    pub(crate) fn acked(&self, node: NodeId, revision: Revision) {
        if lock(&self.acked).insert(node, revision) != Some(revision) {
            self.news.notify_one();
        }
    }

    /// The data paths of these nodes answered probes a moment ago.
    pub(crate) fn reached(&self, nodes: &[NodeId]) {
        let now = clock::monotonic();
        let mut liveness = lock(&self.liveness);
        for node in nodes {
            liveness.reached(*node, now);
        }
    }

    /// What the leader should know: who was heard and reached lately, and how far they are.
    fn hearsay(&self) -> Hearsay {
        let (now, window) = (clock::monotonic(), HEARTBEAT * 2);
        let liveness = lock(&self.liveness);
        let heard = liveness.recent(now, window);
        let reached = liveness.recently_reached(now, window);
        drop(liveness);
        let acked = lock(&self.acked);
        let acks = heard.iter().filter_map(|node| Some((*node, *acked.get(node)?))).collect();
        Hearsay { heard, reached, acks }
    }

    /// A node reports how its tasks are.
    pub(crate) async fn tasks_reported(
        &self,
        node: NodeId,
        statuses: Vec<(TaskId, TaskStatus)>,
    ) -> Result<(), ProposeError> {
        // Of those that run now and were not known to.
        let begun: Vec<u64> = self.raft.read(|store| {
            let running = statuses.iter().filter(|(_, status)| status.state == TaskState::Running);
            let tasks = running.filter_map(|(id, _)| store.tasks.get(id));
            tasks.filter(|task| task.running.is_none()).map(|task| task.meta.created_ms).collect()
        });
        self.propose(Command::ReportTasks { node, statuses }).await?;
        let now = clock::wall_ms();
        for created in begun {
            let delay = Duration::from_millis(now.saturating_sub(created));
            list::SWARM_SCHEDULING.observe(&[], delay);
        }
        Ok(())
    }

    /// A node said that it leaves: it is down at once, and its tasks are replaced.
    pub(crate) async fn left(&self, node: NodeId) -> Result<(), ProposeError> {
        let status = NodeStatus { state: NodeState::Down, message: LEFT.to_owned(), lost: true };
        let report = NodeReport { id: node, status: Some(status), description: None };
        self.propose(Command::ReportNodes(vec![report])).await.map(drop)
    }

    /// The step that brings a node up to date, and its tasks. `None`: the node is not (or no
    /// longer) of this cluster. A store that is behind the node says nothing new: an older set of
    /// tasks would end the younger ones.
    pub(crate) fn view(
        &self,
        node: NodeId,
        from: Revision,
        held: &BTreeSet<Scope>,
    ) -> Option<View> {
        self.raft.read(|store| {
            if store.revision < from {
                let delta = Delta { to: from, scopes: held.clone(), ..Delta::default() };
                return Some(View { delta, assignments: None });
            }
            store.nodes.get(&node)?;
            let mut log = lock(&self.log);
            log.update(store);
            let wanted = subscription(store, node);
            let delta = log.delta(from, held, &wanted);
            let assigned = (assignments(store, node), ended(store, node));
            Some(View { delta, assignments: Some(assigned) })
        })
    }

    /// The managers, for nodes to turn to, the leader first.
    pub(crate) fn managers(&self) -> Vec<Node> {
        let leader = self.raft.leadership().borrow().leader.map(|(number, _)| number);
        let mut managers: Vec<Node> = self.raft.read(|store| {
            store.nodes.values().filter(|n| n.spec.role == Role::Manager).cloned().collect()
        });
        managers.sort_by_key(|node| Some(node.voter()) != leader);
        managers
    }

    /// Runs until aborted.
    pub(crate) async fn run(self: Arc<Self>, forward: impl AsyncForward) {
        tokio::join!(
            self.stay_awake(),
            self.lead_or_follow(forward),
            self.keep_voters(),
            self.keep_events()
        );
    }

    /// What happens in the cluster, for those who watch.
    pub(crate) fn events(&self) -> Feed {
        self.events.clone()
    }

    /// Looks for events whenever the store changes. Its end is that of all who watch.
    async fn keep_events(&self) {
        let Some(feeder) = lock(&self.feeder).take() else { return };
        let mut revisions = self.raft.watch();
        loop {
            revisions.borrow_and_update();
            let look = |store: &Store| lock(&self.events.log).look(store, clock::wall_ms());
            let began = Instant::now();
            let next = self.raft.read(look);
            let took = began.elapsed();
            feeder.send_if_modified(|known| std::mem::replace(known, next) != next);
            if revisions.changed().await.is_err() {
                return;
            }
            // The larger the store, the rarer: a twentieth of a core at most.
            tokio::time::sleep(EVENTS_GATHER.max(took * 20)).await;
        }
    }

    /// Tells liveness that time passes, also while a round waits for the store: see
    /// [`Liveness::pulse`].
    async fn stay_awake(&self) {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            ticks.tick().await;
            lock(&self.liveness).pulse(clock::monotonic());
        }
    }

    /// The leader's loops while this node leads; else passes on what it heard.
    async fn lead_or_follow(&self, forward: impl AsyncForward) {
        let mut revisions = self.raft.watch();
        let mut leadership = self.raft.leadership();
        let mut memory = LeaderMemory::default();
        let mut led_term = None;
        let mut led_by = None;
        let mut wake = Instant::now();
        loop {
            // Neither changes any more once raft has stopped, over a full disk for one.
            tokio::select! {
                Ok(()) = revisions.changed() => {}
                Ok(()) = leadership.changed() => {}
                () = self.news.notified() => tokio::time::sleep(GATHER).await,
                () = tokio::time::sleep_until(wake) => {}
            }
            wake = Instant::now() + TICK;
            let leading = leadership.borrow_and_update().clone();
            if std::mem::replace(&mut led_by, leading.leader) != leading.leader {
                list::RAFT_LEADER_CHANGES.count(&[]);
            }
            if !leading.me_leader {
                if let Some((number, address)) = leading.leader {
                    forward.forward(number, address, self.hearsay()).await;
                }
                continue;
            }
            // Once per term: a leader that lost its majority for a moment goes on with what it
            // knows, or a busy machine would give dead nodes a fresh start again and again.
            if led_term != Some(leading.term) {
                led_term = Some(leading.term);
                memory = LeaderMemory::default();
                self.raft.read(|store| lock(&self.liveness).lead(store, clock::monotonic()));
                tracing::info!(term = leading.term, "leading");
            }
            // Mark what stands now as seen: what changes from here on wakes the next round.
            revisions.borrow_and_update();
            let began = std::time::Instant::now();
            if let Some(at) = self.round(leading.term, &mut memory).await {
                wake = wake.min(at);
            }
            list::RECONCILER_SECONDS.observe_since(&["leader"], began);
            list::RECONCILER_ROUNDS.count(&["leader", "done"]);
        }
    }

    /// Aligns the voters while this node leads. Beside the loops: a manager that cannot be reached
    /// takes its time to fail, and nothing else may wait for that.
    async fn keep_voters(&self) {
        let mut revisions = self.raft.watch();
        let mut leadership = self.raft.leadership();
        loop {
            tokio::select! {
                Ok(()) = revisions.changed() => {}
                Ok(()) = leadership.changed() => {}
                () = tokio::time::sleep(TICK) => {}
            }
            revisions.borrow_and_update();
            let leading = leadership.borrow_and_update().clone();
            if leading.me_leader {
                let voters = leading.voters.keys().copied().collect();
                self.align_voters(&voters, &leading.learners).await;
            }
        }
    }

    /// One round of the leader's loops. Returns when to look again at the latest.
    async fn round(&self, term: u64, memory: &mut LeaderMemory) -> Option<Instant> {
        let reports =
            self.raft.read(|store| lock(&self.liveness).verdicts(store, clock::monotonic()));
        if !reports.is_empty() {
            for report in &reports {
                let status = report.status.clone().unwrap_or_default();
                let NodeStatus { state, message, lost } = status;
                let state = state.name();
                tracing::info!(node = %report.id, state, lost, reason = message, "node state");
            }
            self.propose_logged(term, Command::ReportNodes(reports)).await;
        }
        let now_ms = clock::wall_ms();
        memory.acked.clone_from(&lock(&self.acked));
        (memory.silent, memory.listening) = self.raft.read(|store| {
            let (now, liveness) = (clock::monotonic(), lock(&self.liveness));
            (liveness.silent(store, now), liveness.listening(now))
        });
        let decision =
            self.raft.read(|store: &Store| decide(store, memory, now_ms, &mut rand::random));
        for command in decision.commands {
            self.propose_logged(term, command).await;
        }
        decision
            .wake_at_ms
            .map(|at| Instant::now() + Duration::from_millis(at.saturating_sub(now_ms)))
    }

    /// As the leader of this term: a view that was true of it says nothing to its successor.
    async fn propose_logged(&self, term: u64, command: Command) {
        let proposal = Proposal { now_ms: clock::wall_ms(), command };
        let proposed = self.raft.propose_leading(term, proposal).await;
        list::LEADER_COMMANDS.count(&[if proposed.is_ok() { "done" } else { "failed" }]);
        if let Err(error) = proposed {
            // The next round decides anew over what then stands.
            tracing::warn!(%error, "a leader's proposal failed");
        }
    }

    /// Every manager that is alive votes; nobody else does. One change at a time.
    async fn align_voters(&self, voters: &BTreeSet<NodeNumber>, learners: &BTreeSet<NodeNumber>) {
        let recent: BTreeSet<NodeId> =
            lock(&self.liveness).recent(clock::monotonic(), HEARTBEAT * 2).into_iter().collect();
        let (add, keep) = self.raft.read(|store| {
            let managers = || store.nodes.values().filter(|n| n.spec.role == Role::Manager);
            // One that leaves is down in the store at once, though it was heard a moment ago.
            let alive = |n: &&Node| n.status.state == NodeState::Ready && recent.contains(&n.id);
            let add = managers()
                .filter(|n| !voters.contains(&n.voter()))
                .find(alive)
                .map(|n| (n.voter(), n.address));
            let keep: BTreeSet<NodeNumber> = managers().map(Node::voter).collect();
            (add, keep)
        });
        // Itself last: others can do that, once they lead.
        let me = self.raft.number();
        let others = voters.union(learners).filter(|number| !keep.contains(number));
        let remove = others.copied().max_by_key(|number| *number != me);
        if let Some((number, address)) = add {
            tracing::info!(%number, %address, "adding a voter");
            if let Err(error) = self.raft.add_voter(number, address).await {
                tracing::warn!(%number, %error, "could not add a voter");
            }
        } else if remove == Some(me) {
            if let Err(error) = self.raft.hand_over(&keep).await {
                tracing::warn!(%error, "this manager is demoted, and could not hand over yet");
            }
        } else if let Some(number) = remove {
            tracing::info!(%number, "removing a voter");
            if let Err(error) = self.raft.remove_voter(number).await {
                tracing::warn!(%number, %error, "could not remove a voter");
            }
        }
    }
}

/// What a manager heard of nodes.
#[derive(Debug, Default)]
pub(crate) struct Hearsay {
    /// Their daemons were heard.
    pub(crate) heard: Vec<NodeId>,
    /// Their data paths answered.
    pub(crate) reached: Vec<NodeId>,
    /// How far their kernels are.
    pub(crate) acks: Vec<(NodeId, Revision)>,
}

/// How a manager that does not lead passes on what it heard.
pub(crate) trait AsyncForward: Send + Sync + 'static {
    /// Tells the leader.
    fn forward(
        &self,
        leader: NodeNumber,
        address: std::net::SocketAddr,
        hearsay: Hearsay,
    ) -> impl Future<Output = ()> + Send;
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use async_trait::async_trait;
    use bytes::Bytes;
    use mesh_raft::{RaftConfig, RpcKind, Transport, TransportError};

    use super::*;

    /// Reaches no other manager.
    pub(in crate::node) struct Nobody;

    #[async_trait]
    impl Transport for Nobody {
        async fn call(
            &self,
            _: NodeNumber,
            _: SocketAddr,
            _: RpcKind,
            _: Bytes,
            _: Duration,
        ) -> Result<Bytes, TransportError> {
            Err(TransportError::Unreachable("nobody is there".to_owned()))
        }
    }

    impl AsyncForward for Nobody {
        async fn forward(&self, _: NodeNumber, _: SocketAddr, _: Hearsay) {}
    }

    /// Of this thread, by the kernel's first figure: nanoseconds on a CPU.
    fn busy() -> Duration {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    }

    /// As when its disk is full: the node goes on, and needs the CPU for that.
    #[tokio::test]
    async fn a_manager_whose_raft_stopped_does_not_spin() {
        let dir = std::env::temp_dir().join(format!("meshd-manager-{}", std::process::id()));
        let address = (Ipv4Addr::LOCALHOST, 2377).into();
        let config = RaftConfig::new(dir.clone(), NodeNumber::MIN, address, [1; 32]);
        let raft = Raft::start(config, Arc::new(Nobody)).await.unwrap();
        let manager = Manager::new(raft.clone());
        raft.shutdown().await;
        let began = busy();
        let looked = Duration::from_millis(500);
        let ran = tokio::time::timeout(looked, Arc::clone(&manager).run(Nobody)).await;
        let busy = busy() - began;
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(ran.is_err(), "its loops ended");
        assert!(busy < looked / 5, "it was busy for {busy:?} of {looked:?}");
    }
}
