//! A node without raft, kernel and executor: the real store behind a mutex, and a stand-in for the
//! orchestrator that makes tasks and walks each through its states, one step per tick.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bytes::Bytes;
use mesh_control::{
    command::{Command, InitCluster, NewNode, NodeReport, Outcome, Proposal, TaskChange},
    events::{EventLog, Number},
    model::{CaRotation, NodeDescription, NodeKeys, NodeSpec, NodeState, NodeStatus, Role},
    store::Store,
};
use mesh_types::{
    ClusterId, NetworkId, NodeId, NodeNumber, Revision, TaskId,
    spec::ServiceMode,
    task::{TaskState, TaskStatus},
};
use meshd::api::{
    ApiError, Backend,
    backend::{
        Counter, EngineFacts, ExecInput, ExecOutput, ExecRequest, ExecSession, InitRequest,
        JoinRequest, JoinTokens, Leadership, LocalState, LogLine, LogsOutput, LogsRequest,
        Membership, NodeStats, SwarmState,
    },
    events::Feed,
};
use tokio::sync::{mpsc, watch};

/// The token that the fake cluster's only other member would take.
pub(crate) const TOKEN: &str = "SWMTKN-1-fake-worker";

#[derive(Debug, Default)]
struct State {
    store: Store,
    me: Option<NodeId>,
    role: Role,
    next_id: u128,
    no_leader: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Fake(Mutex<State>, Events);

#[derive(Debug)]
struct Events {
    log: Arc<Mutex<EventLog>>,
    next: watch::Sender<Number>,
}

impl Default for Events {
    fn default() -> Self {
        let log = Arc::new(Mutex::new(EventLog::keeping(100)));
        Self { log, next: watch::Sender::new(0) }
    }
}

fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

impl State {
    fn apply(&mut self, command: Command) -> Result<Outcome, ApiError> {
        let revision = Revision::new(self.store.revision.get() + 1).unwrap();
        let proposal = Proposal { now_ms: now_ms(), command };
        self.store.apply(revision, &proposal).map_err(ApiError::from)
    }

    fn fresh(&mut self) -> u128 {
        self.next_id += 1;
        // Spread over the whole range, as random ids are; odd, so never twice the same.
        self.next_id.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
    }

    /// Makes the tasks that are missing, asks those that are too many or out of date to end.
    fn orchestrate(&mut self) {
        let mut changes = Vec::new();
        let services: Vec<_> = self.store.services.values().cloned().collect();
        let node = self.me.unwrap();
        for service in services {
            let mut have: BTreeMap<u64, TaskId> = BTreeMap::new();
            let wanted = match service.spec.mode {
                _ if service.removing => 0,
                ServiceMode::Replicated { replicas } => replicas,
                ServiceMode::Global => 1,
            };
            for task in self.store.tasks.values().filter(|task| task.service == service.id) {
                let slot = task.slot.unwrap_or(1);
                let good = slot <= wanted && task.spec_version == service.spec_version;
                if task.desired > TaskState::Running {
                    continue;
                }
                if good && !task.status.state.is_final() {
                    have.insert(slot, task.id);
                } else {
                    changes.push(TaskChange::Desire { id: task.id, state: TaskState::Shutdown });
                }
            }
            for slot in (1..=wanted).filter(|slot| !have.contains_key(slot)) {
                let global = matches!(service.spec.mode, ServiceMode::Global);
                let id = TaskId::from_bits(self.fresh());
                changes.push(TaskChange::Create {
                    id,
                    service: service.id,
                    slot: (!global).then_some(slot),
                    node: global.then_some(node),
                    desired: TaskState::Running,
                    start_at_ms: None,
                    replaces: None,
                });
            }
        }
        if !changes.is_empty() {
            self.apply(Command::ChangeTasks(changes)).unwrap();
        }
    }

    /// One step of every task.
    fn advance(&mut self) {
        let node = self.me.unwrap();
        let (mut changes, mut statuses) = (Vec::new(), Vec::new());
        for task in self.store.tasks.values() {
            let next = match task.status.state {
                TaskState::New => {
                    changes.push(TaskChange::Allocate { id: task.id });
                    continue;
                }
                TaskState::Pending => {
                    changes.push(TaskChange::Assign { id: task.id, node });
                    continue;
                }
                state if state.is_final() => continue,
                _ if task.desired > TaskState::Running => TaskState::Shutdown,
                TaskState::Assigned => TaskState::Preparing,
                TaskState::Preparing => TaskState::Starting,
                TaskState::Starting => TaskState::Running,
                _ => continue,
            };
            let running = next == TaskState::Running;
            statuses.push((
                task.id,
                TaskStatus {
                    state: next,
                    since_ms: now_ms(),
                    message: if running { "started" } else { "on its way" }.into(),
                    err: String::new(),
                    pid: running.then_some(4711),
                    exit_code: None,
                },
            ));
        }
        if !changes.is_empty() {
            self.apply(Command::ChangeTasks(changes)).unwrap();
        }
        if !statuses.is_empty() {
            self.apply(Command::ReportTasks { node, statuses }).unwrap();
        }
    }
}

impl Fake {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// One round of the stand-in orchestrator.
    pub(crate) fn tick(&self) {
        let mut state = self.lock();
        if state.store.cluster.is_some() && state.role == Role::Manager {
            state.orchestrate();
            state.advance();
            let next = self.1.log.lock().unwrap().look(&state.store, now_ms());
            self.1.next.send_replace(next);
        }
    }

    /// Loses or finds its leader.
    pub(crate) fn set_leaderless(&self, no_leader: bool) {
        self.lock().no_leader = no_leader;
    }

    fn check(state: &State) -> Result<(), ApiError> {
        match (&state.me, state.role, state.no_leader) {
            (None, ..) => Err(ApiError::not_in_swarm()),
            (_, Role::Worker, _) => Err(ApiError::worker()),
            (_, _, true) => Err(ApiError::no_leader()),
            _ => Ok(()),
        }
    }
}

fn description() -> NodeDescription {
    NodeDescription {
        hostname: "m1".into(),
        architecture: "x86_64".into(),
        os: "linux".into(),
        engine_version: "0.1.0".into(),
        nano_cpus: 2_000_000_000,
        memory_bytes: 1 << 30,
        host_routes: BTreeSet::new(),
        keys: NodeKeys::default(),
    }
}

#[async_trait]
impl Backend for Fake {
    fn local(&self) -> LocalState {
        let state = self.lock();
        let engine = EngineFacts {
            hostname: "m1".into(),
            kernel: "6.1".into(),
            operating_system: "Debian".into(),
            architecture: "x86_64".into(),
            cpus: 2,
            memory_bytes: 1 << 30,
            state_dir: "/var/lib/mesh".into(),
            tasks_running: 0,
            can_limit: [true, true, false],
            cgroup_version: 1,
        };
        let swarm = match state.me {
            None => SwarmState::Inactive,
            Some(node) => SwarmState::Active(Membership {
                node,
                number: NodeNumber::MIN,
                cluster: state.store.cluster.as_ref().map_or(ClusterId::from_bits(0), |c| c.id),
                role: state.role,
                address: [192, 0, 2, 11].into(),
                managers: vec![(node, ([192, 0, 2, 11], 2377).into())],
            }),
        };
        LocalState { engine, swarm }
    }

    fn leadership(&self) -> Option<Leadership> {
        let state = self.lock();
        Self::check(&state).ok()?;
        let reachable = BTreeSet::from([NodeNumber::MIN]);
        Some(Leadership { leader: NodeNumber::MIN, reachable })
    }

    async fn metrics(&self) -> String {
        meshd::metrics::text()
    }

    async fn catch_up(&self) -> Result<(), ApiError> {
        Ok(())
    }

    fn read(&self, f: &mut dyn FnMut(&Store)) -> Result<(), ApiError> {
        let state = self.lock();
        Self::check(&state)?;
        f(&state.store);
        Ok(())
    }

    async fn rotate_ca(&self, forced: u64) -> Result<(), ApiError> {
        let rotation = CaRotation {
            id: [1; 32],
            cert_pem: "another certificate".into(),
            key_pem: "another key".into(),
            cross_pem: "signed by the old one".into(),
            replaces: self
                .lock()
                .store
                .cluster
                .as_ref()
                .map(|c| c.ca_cert_pem.clone())
                .unwrap_or_default(),
            started_ms: 0,
        };
        self.propose(Command::RotateCa { forced, rotation: Box::new(rotation) }).await.map(drop)
    }

    async fn propose(&self, command: Command) -> Result<Outcome, ApiError> {
        let mut state = self.lock();
        Self::check(&state)?;
        state.apply(command)
    }

    fn fresh_id(&self) -> u128 {
        self.lock().fresh()
    }

    async fn init(&self, request: InitRequest) -> Result<NodeId, ApiError> {
        let mut state = self.lock();
        if state.me.is_some() {
            return Err(ApiError::already_in_swarm());
        }
        let (cluster, ingress, node) = (state.fresh(), state.fresh(), state.fresh());
        let id = NodeId::from_bits(node);
        state.apply(Command::Init(Box::new(InitCluster {
            id: ClusterId::from_bits(cluster),
            spec: request.spec,
            ca_cert_pem: "no certificate".into(),
            ca_key_pem: "no key".into(),
            worker_secret: [1; 16],
            manager_secret: [2; 16],
            gossip_key: [3; 32],
            ingress: NetworkId::from_bits(ingress),
            first: NewNode {
                id,
                spec: NodeSpec {
                    role: Role::Manager,
                    availability: request.availability,
                    ..NodeSpec::default()
                },
                description: description(),
                address: ([192, 0, 2, 11], 2377).into(),
                vtep: [192, 0, 2, 11].into(),
            },
        })))?;
        let ready = NodeReport {
            id,
            status: Some(NodeStatus { state: NodeState::Ready, ..NodeStatus::default() }),
            description: None,
        };
        state.apply(Command::ReportNodes(vec![ready]))?;
        state.me = Some(id);
        state.role = Role::Manager;
        Ok(id)
    }

    async fn join(&self, request: JoinRequest) -> Result<(), ApiError> {
        let mut state = self.lock();
        if state.me.is_some() {
            return Err(ApiError::already_in_swarm());
        }
        if request.token != TOKEN {
            return Err(ApiError::invalid_token());
        }
        state.me = Some(NodeId::from_bits(state.fresh()));
        state.role = Role::Worker;
        Ok(())
    }

    async fn leave(&self, force: bool) -> Result<(), ApiError> {
        let mut state = self.lock();
        if state.me.is_none() {
            return Err(ApiError::not_part_of_swarm());
        }
        if state.role == Role::Manager && !force {
            return Err(ApiError::leave_as_manager(1, 1));
        }
        *state = State { next_id: state.next_id, ..State::default() };
        Ok(())
    }

    fn join_tokens(&self) -> Result<JoinTokens, ApiError> {
        let state = self.lock();
        Self::check(&state)?;
        let cluster = state.store.cluster.as_ref().unwrap();
        let token = |secret: [u8; 16]| format!("SWMTKN-1-fake-{:x}", u128::from_be_bytes(secret));
        Ok(JoinTokens {
            worker: token(cluster.worker_secret),
            manager: token(cluster.manager_secret),
        })
    }

    /// `cat` echoes; anything else says its name on both streams and exits with 3.
    async fn task_exec(&self, _: TaskId, request: ExecRequest) -> Result<ExecSession, ApiError> {
        if request.argv[0] == "nosuch" {
            return Err(ApiError::bad_request("nosuch: no such file or directory"));
        }
        let (input, mut received) = mpsc::channel(4);
        let (send, output) = mpsc::channel(4);
        tokio::spawn(async move {
            if request.argv[0] == "cat" {
                while let Some(ExecInput::Stdin(bytes)) = received.recv().await {
                    let _ = send.send(ExecOutput::Stdout(bytes)).await;
                }
                let _ = send.send(ExecOutput::Exit(0)).await;
            } else {
                let text = Bytes::from(format!("{}\n", request.argv.join(" ")));
                let _ = send.send(ExecOutput::Stdout(text.clone())).await;
                let _ = send.send(ExecOutput::Stderr(text)).await;
                let _ = send.send(ExecOutput::Exit(3)).await;
            }
        });
        Ok(ExecSession { input, output })
    }

    /// Each task says `one` after a second, `two` to standard error after two; to one who follows
    /// also `three`.
    async fn task_logs(
        &self,
        _: NodeId,
        request: LogsRequest,
    ) -> Result<mpsc::Receiver<LogsOutput>, ApiError> {
        let (send, output) = mpsc::channel(4);
        tokio::spawn(async move {
            let wanted = |stderr| if stderr { request.stderr } else { request.stdout };
            let told = |second: i64, stderr, text: &'static [u8]| {
                let at_ns = second * 1_000_000_000;
                let of = request.tasks.iter().filter(|(_, since_ns)| *since_ns <= at_ns);
                let line = |(task, _): &(TaskId, i64)| LogLine {
                    task: *task,
                    stderr,
                    at_ns,
                    text: Bytes::from_static(text),
                };
                LogsOutput::Lines(of.filter(|_| wanted(stderr)).map(line).collect())
            };
            let _ = send.send(told(1, false, b"one\n")).await;
            let _ = send.send(told(2, true, b"two\n")).await;
            let _ = send.send(LogsOutput::Now).await;
            if request.follow {
                let _ = send.send(told(3, false, b"three\n")).await;
            }
        });
        Ok(output)
    }

    fn events(&self) -> Result<Feed, ApiError> {
        Self::check(&self.lock())?;
        Ok(Feed { log: Arc::clone(&self.1.log), next: self.1.next.subscribe() })
    }

    async fn node_stats(&self, _: Option<NodeId>) -> Result<NodeStats, ApiError> {
        let node = self.lock().me.ok_or_else(ApiError::not_in_swarm)?;
        let counter = |name: &str, value, is_drop| Counter { name: name.into(), value, is_drop };
        Ok(NodeStats {
            node,
            hostname: "m1".into(),
            counters: vec![counter("forwarded", 42, false), counter("source_guard", 7, true)],
        })
    }
}
