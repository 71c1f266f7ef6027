//! What the API asks of the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use mesh_control::{
    command::{Command, Outcome},
    model::{CaRotation, Role},
    store::Store,
    token::JoinToken,
};
use mesh_raft::{ProposeError, ReadError};
use mesh_types::{NodeId, NodeNumber, TaskId};
use tokio::sync::mpsc;

use super::{Node, State, bootstrap, exec, logs, manager::Manager, member::Member};
use crate::{
    api::{
        ApiError,
        backend::{
            Backend, Counter, ExecRequest, ExecSession, InitRequest, JoinRequest, JoinTokens,
            Leadership, LocalState, LogsOutput, LogsRequest, Membership, NodeStats, SwarmState,
        },
        events::Feed,
    },
    gossip::GOSSIP_PORT,
    pki::{self, Root},
    rpc::{
        CallError, Route,
        messages::{self, StatsResponse},
    },
    tls::Expect,
};

/// A call to another node on behalf of the API.
const PATIENCE: Duration = Duration::from_secs(10);

impl Node {
    fn member(&self) -> Result<Arc<Member>, ApiError> {
        match self.state() {
            State::Active(member) => Ok(member),
            State::Inactive | State::Pending => Err(ApiError::not_in_swarm()),
            State::Error(why) => {
                Err(ApiError::internal(format!("this node cannot take up its membership: {why}")))
            }
        }
    }

    fn manager(&self) -> Result<(Arc<Member>, Arc<Manager>), ApiError> {
        let member = self.member()?;
        let manager = member.manager().ok_or_else(ApiError::worker)?;
        Ok((member, manager))
    }

    /// Does it to the end, even if the client that asked for it goes away half-way.
    async fn to_the_end<T, F>(&self, work: impl FnOnce(Arc<Self>) -> F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ApiError>> + Send + 'static,
    {
        let node =
            self.me.upgrade().ok_or_else(|| ApiError::unavailable("the daemon is stopping"))?;
        let done = tokio::spawn(work(node)).await;
        done.map_err(|error| ApiError::internal(error.to_string()))?
    }

    /// Changes the membership; one change at a time.
    async fn become_member(
        &self,
        make: impl Future<Output = Result<Arc<Member>, ApiError>>,
    ) -> Result<NodeId, ApiError> {
        let Ok(_changing) = self.changing.try_lock() else {
            return Err(ApiError::unavailable("this node is joining or leaving already"));
        };
        if matches!(self.state(), State::Active(_) | State::Error(_)) {
            return Err(ApiError::already_in_swarm());
        }
        self.set_state(State::Pending);
        match make.await {
            Ok(member) => {
                let node = member.identity().node;
                self.set_state(State::Active(member));
                Ok(node)
            }
            Err(error) => {
                self.set_state(State::Inactive);
                Err(error)
            }
        }
    }
}

fn not_proposed(error: ProposeError) -> ApiError {
    match error {
        ProposeError::Rejected(rejection) => rejection.into(),
        ProposeError::NoLeader => ApiError::no_leader(),
        ProposeError::TooLarge { .. } => ApiError::bad_request(error.to_string()),
        ProposeError::Behind { .. } => ApiError::deadline_exceeded(),
        ProposeError::Stopped(_) => ApiError::internal(error.to_string()),
    }
}

fn not_called(node: &str, error: &CallError) -> ApiError {
    match error {
        CallError::Refused(refusal) => ApiError::internal(refusal.message.clone()),
        other => ApiError::unavailable(format!("node {node} does not answer: {other}")),
    }
}

impl Node {
    async fn leave_now(&self, force: bool) -> Result<(), ApiError> {
        let Ok(_changing) = self.changing.try_lock() else {
            return Err(ApiError::unavailable("this node is joining or leaving already"));
        };
        let member = match self.state() {
            State::Active(member) => member,
            State::Inactive | State::Pending => return Err(ApiError::not_part_of_swarm()),
            State::Error(_) if force => {
                super::member::sweep(&self.options)
                    .await
                    .map_err(|error| ApiError::internal(format!("{error:#}")))?;
                self.set_state(State::Inactive);
                return Ok(());
            }
            State::Error(why) => {
                return Err(ApiError::unavailable(format!(
                    "this node cannot take up its membership ({why}). Use `--force` to forget it."
                )));
            }
        };
        if member.identity().role == Role::Manager && !force {
            let (managers, reachable) = member.manager().map_or((1, 1), |manager| {
                let reachable = self.leadership().map_or(0, |l| l.reachable.len());
                (manager.managers().len(), reachable)
            });
            return Err(ApiError::leave_as_manager(managers, reachable));
        }
        self.set_state(State::Inactive);
        member.leave().await.map_err(|error| {
            ApiError::internal(format!("left, but something is left behind: {error:#}"))
        })
    }
}

#[async_trait]
impl Backend for Node {
    fn events(&self) -> Result<Feed, ApiError> {
        Ok(self.manager()?.1.events())
    }

    fn local(&self) -> LocalState {
        let mut engine = self.engine.clone();
        let swarm = match self.state() {
            State::Inactive => SwarmState::Inactive,
            State::Pending => SwarmState::Pending,
            State::Error(why) => SwarmState::Error(why),
            State::Active(member) => {
                let running = |t: &crate::agent::TaskView| t.status.pid.is_some();
                engine.tasks_running =
                    member.agent.snapshot().tasks.values().filter(|t| running(t)).count();
                let settings = member.settings.borrow();
                let identity = member.identity();
                SwarmState::Active(Membership {
                    node: identity.node,
                    number: identity.number,
                    cluster: identity.cluster,
                    role: identity.role,
                    address: settings.address.ip(),
                    managers: settings.managers.iter().map(|m| (m.node, m.address)).collect(),
                })
            }
        };
        LocalState { engine, swarm }
    }

    fn leadership(&self) -> Option<Leadership> {
        let (member, manager) = self.manager().ok()?;
        let watch = manager.raft.leadership();
        let leadership = watch.borrow();
        let (leader, _) = leadership.leader?;
        if !leadership.has_quorum {
            return None;
        }
        // Voters have numbers of their own.
        let nodes: BTreeMap<NodeNumber, NodeNumber> = manager
            .raft
            .read(|store| store.nodes.values().map(|n| (n.voter(), n.number)).collect());
        let node = |voter: &NodeNumber| nodes.get(voter).copied();
        let mut reachable: BTreeSet<NodeNumber> = if leadership.me_leader {
            leadership.reachable.iter().filter_map(node).collect()
        } else {
            let alive = member.alive();
            leadership.voters.keys().filter_map(node).filter(|n| alive.contains(n)).collect()
        };
        let leader = node(&leader)?;
        reachable.insert(leader);
        // Itself, once it is among them.
        let own = leadership.voters.contains_key(&manager.raft.number());
        reachable.extend(own.then(|| member.identity().number));
        Some(Leadership { leader, reachable })
    }

    async fn catch_up(&self) -> Result<(), ApiError> {
        // Why there is no manager is the read's to say.
        let Ok((_, manager)) = self.manager() else { return Ok(()) };
        if !manager.raft.leadership().borrow().has_quorum {
            return Err(ApiError::no_leader());
        }
        match manager.raft.read_barrier().await {
            Ok(_) => Ok(()),
            Err(ReadError::NoLeader) => Err(ApiError::no_leader()),
            Err(stopped @ ReadError::Stopped(_)) => Err(ApiError::internal(stopped.to_string())),
        }
    }

    fn read(&self, f: &mut dyn FnMut(&Store)) -> Result<(), ApiError> {
        let (_, manager) = self.manager()?;
        if !manager.raft.leadership().borrow().has_quorum {
            return Err(ApiError::no_leader());
        }
        manager.raft.read(|store| f(store));
        Ok(())
    }

    async fn rotate_ca(&self, forced: u64) -> Result<(), ApiError> {
        let (_, manager) = self.manager()?;
        let cluster = manager.raft.read(|store| store.cluster.clone());
        let cluster = cluster.ok_or_else(ApiError::no_leader)?;
        let (now, internal) =
            (SystemTime::now(), |e: pki::PkiError| ApiError::internal(e.to_string()));
        let replaces = cluster.ca_cert_pem.clone();
        let old = Root { cert_pem: cluster.ca_cert_pem, key_pem: cluster.ca_key_pem.into() };
        let new = Root::generate(cluster.id, now).map_err(internal)?;
        let rotation = CaRotation {
            id: new.digest().map_err(internal)?,
            cross_pem: old.cross_sign(&new, cluster.id, now).map_err(internal)?,
            cert_pem: new.cert_pem,
            key_pem: new.key_pem.to_string(),
            replaces,
            started_ms: 0,
        };
        tracing::info!("another root certificate takes the place of the cluster's");
        self.propose(Command::RotateCa { forced, rotation: Box::new(rotation) }).await.map(drop)
    }

    async fn propose(&self, command: Command) -> Result<Outcome, ApiError> {
        let (_, manager) = self.manager()?;
        manager.propose(command).await.map_err(not_proposed)
    }

    fn fresh_id(&self) -> u128 {
        rand::random()
    }

    async fn init(&self, request: InitRequest) -> Result<NodeId, ApiError> {
        self.to_the_end(|node| async move {
            node.become_member(bootstrap::init(&node.options, &node.engine, request)).await
        })
        .await
    }

    async fn join(&self, request: JoinRequest) -> Result<(), ApiError> {
        self.to_the_end(|node| async move {
            node.become_member(bootstrap::join(&node.options, &node.engine, request)).await
        })
        .await
        .map(drop)
    }

    async fn leave(&self, force: bool) -> Result<(), ApiError> {
        self.to_the_end(|node| async move { node.leave_now(force).await }).await
    }

    fn join_tokens(&self) -> Result<JoinTokens, ApiError> {
        let mut cluster = None;
        self.read(&mut |store| cluster.clone_from(&store.cluster))?;
        let cluster = cluster.ok_or_else(ApiError::no_leader)?;
        let root = pki::parse_pem(&cluster.ca_cert_pem)
            .map_err(|error| ApiError::internal(error.to_string()))?;
        Ok(JoinTokens {
            worker: JoinToken::new(&root, cluster.worker_secret).to_string(),
            manager: JoinToken::new(&root, cluster.manager_secret).to_string(),
        })
    }

    async fn task_exec(&self, task: TaskId, request: ExecRequest) -> Result<ExecSession, ApiError> {
        let (member, manager) = self.manager()?;
        let found = manager.raft.read(|store| {
            let task = store.tasks.get(&task)?;
            let node = task.node.and_then(|id| store.nodes.get(&id)).cloned();
            Some((task.name(), task.status.state, node))
        });
        let (name, state, node) =
            found.ok_or_else(|| ApiError::not_found(format!("task {task} not found")))?;
        let Some(node) = node.filter(|_| state == mesh_types::task::TaskState::Running) else {
            return Err(ApiError::conflict(format!(
                "task {name} is not running: it is {}",
                format!("{state:?}").to_lowercase()
            )));
        };
        let call = messages::ExecRequest {
            task,
            argv: request.argv,
            env: request.env,
            dir: request.dir,
            user: None,
            tty: None,
            stdin: true,
        };
        let address = SocketAddr::new(node.address.ip(), GOSSIP_PORT);
        let (writer, reader) = member
            .client
            .exec(address, Expect::Node(node.id), &call, PATIENCE)
            .await
            .map_err(|error| not_called(node.name(), &error))?;
        Ok(exec::bridge(writer, reader))
    }

    async fn task_logs(
        &self,
        node: NodeId,
        request: LogsRequest,
    ) -> Result<mpsc::Receiver<LogsOutput>, ApiError> {
        let (member, manager) = self.manager()?;
        let found = manager.raft.read(|store| store.nodes.get(&node).cloned());
        let gone = || ApiError::not_found(format!("node {node} is not in the cluster any more"));
        let found = found.ok_or_else(gone)?;
        let address = SocketAddr::new(found.address.ip(), GOSSIP_PORT);
        let reader = member.client.logs(address, Expect::Node(node), &request, PATIENCE).await;
        Ok(logs::bridge(reader.map_err(|error| not_called(found.name(), &error))?))
    }

    async fn metrics(&self) -> String {
        self.scrape().await
    }

    async fn node_stats(&self, node: Option<NodeId>) -> Result<NodeStats, ApiError> {
        let member = self.member()?;
        let own = member.identity().node;
        let (node, hostname, counters) = match node.filter(|node| *node != own) {
            None => {
                let counters = member.handler.counters().await;
                let counters = counters.map_err(|error| ApiError::internal(error.message))?;
                (own, self.engine.hostname.clone(), counters)
            }
            Some(node) => {
                let (_, manager) = self.manager()?;
                let found = manager.raft.read(|store| store.nodes.get(&node).cloned());
                let found =
                    found.ok_or_else(|| ApiError::not_found(format!("node {node} not found")))?;
                let address = SocketAddr::new(found.address.ip(), GOSSIP_PORT);
                let answer: Result<StatsResponse, _> = member
                    .client
                    .call(address, Expect::Node(node), Route::Stats, &(), PATIENCE)
                    .await;
                let answer = answer.map_err(|error| not_called(found.name(), &error))?;
                (node, found.name().to_owned(), answer.counters)
            }
        };
        let mut counters: Vec<Counter> = counters
            .into_iter()
            .map(|c| Counter { name: c.name, value: c.value, is_drop: c.is_drop })
            .collect();
        counters.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(NodeStats { node, hostname, counters })
    }
}
