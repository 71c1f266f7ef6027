//! Answers other nodes.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use mesh_control::{
    model::{Node, Role},
    store::Store,
};
use mesh_raft::{ProposeError, RpcKind};
use mesh_types::{
    NodeId, Revision, TaskId,
    record::{NodeRecord, RecordSet, Scope},
    task::TaskStatus,
};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    admit::{Door, sign},
    dataplane, exec,
    liveness::HEARTBEAT,
    logs,
    manager::{Assigned, Manager},
};
use crate::{
    agent::AgentHandle,
    dns_process::Resolver,
    gossip::{Answers, Unanswered},
    pki::{self, Subject},
    rpc::{
        Joiner, Refusals, RpcError, RpcErrorKind, RpcHandler, Standing,
        frames::{FrameReader, FrameWriter},
        messages::{
            ClusterKeys, CounterValue, ExecInput, ExecOutput, ExecRequest, JoinRequest,
            JoinResponse, LogsOutput, LogsRequest, ManagerAddress, NodeUpdate, RenewRequest,
            RenewResponse, ReportRequest, ReportResponse, SessionRequest, StatsResponse,
        },
    },
};

/// Changes within this time go out as one update.
const GATHER: Duration = Duration::from_millis(5);
/// A session begins once this manager is as far as the leader; longer it does not wait for that.
const CATCH_UP: Duration = Duration::from_secs(3);
/// The most that a node may say of a task at once, in bytes.
const TEXT_MAX: usize = 4096;
const STARTING: &str = "the node is still starting";

/// What a node answers with. The parts come up one after the other, and the listener must be there
/// first (raft needs it), so they are filled in as they start.
#[derive(Default)]
pub(crate) struct Handler {
    /// Of managers only; nodes become managers and workers again.
    manager: RwLock<Option<Arc<Manager>>>,
    /// Runs the tasks.
    pub(crate) agent: OnceLock<AgentHandle>,
    /// For the counters.
    pub(crate) dataplane: OnceLock<dataplane::Handle>,
    /// For its counters.
    pub(crate) resolver: OnceLock<Arc<Resolver>>,
    /// Compares notes with others.
    pub(crate) gossip: OnceLock<Answers>,
    /// Who is a node and a manager, as this node was told.
    pub(crate) records: OnceLock<watch::Receiver<Arc<RecordSet>>>,
    /// Lets nodes in.
    door: Door,
    /// Whom it turned away.
    refusals: Refusals,
}

pub(super) fn unavailable(what: impl std::fmt::Display) -> RpcError {
    RpcError::new(RpcErrorKind::Unavailable, what)
}

pub(super) fn denied(what: impl std::fmt::Display) -> RpcError {
    RpcError::new(RpcErrorKind::Denied, what)
}

pub(super) fn not_proposed(error: &ProposeError) -> RpcError {
    let kind = match error {
        ProposeError::Rejected(_) | ProposeError::TooLarge { .. } => RpcErrorKind::Invalid,
        ProposeError::NoLeader | ProposeError::Behind { .. } | ProposeError::Stopped(_) => {
            RpcErrorKind::Unavailable
        }
    };
    RpcError::new(kind, error)
}

impl Handler {
    /// What calls to a manager come to from now on.
    pub(crate) fn set_manager(&self, manager: Option<Arc<Manager>>) {
        *self.manager.write().unwrap_or_else(PoisonError::into_inner) = manager;
    }

    fn manager(&self) -> Result<Arc<Manager>, RpcError> {
        let manager = self.manager.read().unwrap_or_else(PoisonError::into_inner).clone();
        manager.ok_or_else(|| unavailable("this node is no manager, or still starting"))
    }

    /// Refuses a caller that is no node, or not such a one, as this node was told.
    fn recorded(
        &self,
        caller: NodeId,
        what: &str,
        right: impl Fn(&NodeRecord) -> bool,
    ) -> Result<(), RpcError> {
        let records = self.records.get().ok_or_else(|| unavailable(STARTING))?;
        let records = records.borrow();
        if records.nodes.values().any(|node| node.id == caller && right(node)) {
            return Ok(());
        }
        if records.nodes.is_empty() {
            // No manager has told it anything yet.
            return Err(unavailable(STARTING));
        }
        Err(denied(format!("node {caller} is no {what} that this node knows of")))
    }

    /// Refuses one that the store gives no voice in raft. Its word is final: a node that was
    /// demoted or removed has none. A manager that just started has no store yet, and must hear the
    /// leader to get one; one that is behind may not know its leader yet. The leader knows all.
    fn voice(&self, caller: NodeId) -> Result<(), RpcError> {
        let manager = self.manager()?;
        let leads = manager.raft.leadership().borrow().me_leader;
        let (heard, number) = manager.raft.read(|store| {
            let known = store.cluster.is_none() || store.nodes.contains_key(&caller);
            let heard = store.may_be_manager(caller) && (known || !leads);
            (heard, store.nodes.get(&caller).map(Node::voter))
        });
        // One that is being demoted goes on until the others are enough without its vote.
        if heard || number.is_some_and(|number| manager.raft.takes_part(number)) {
            return Ok(());
        }
        Err(denied(format!("node {caller} is no manager of this cluster")))
    }

    /// The counters of the data plane, of gossip and of the resolver.
    pub(crate) async fn counters(&self) -> Result<Vec<CounterValue>, RpcError> {
        let starting = || unavailable(STARTING);
        let dataplane = self.dataplane.get().ok_or_else(starting)?;
        let mut counters = dataplane.counters().await.map_err(unavailable)?;
        let gossip = self.gossip.get().into_iter().flat_map(Answers::counters);
        counters.extend(gossip.map(|(name, value)| CounterValue {
            name: name.to_owned(),
            value,
            is_drop: false,
        }));
        let (refused, door) = (self.refusals.counters(), self.door.counters());
        counters.extend(refused.into_iter().chain(door).map(|(name, value)| CounterValue {
            name: name.to_owned(),
            value,
            is_drop: false,
        }));
        let resolver = self.resolver.get().map(|resolver| resolver.counters());
        counters.extend(
            resolver.into_iter().flatten().map(|(name, value, is_drop)| CounterValue {
                name: name.to_owned(),
                value,
                is_drop,
            }),
        );
        Ok(counters)
    }

    /// The manager's side, for a node of the cluster. `NotFound` is final: the node was removed.
    async fn known(&self, node: NodeId) -> Result<Arc<Manager>, RpcError> {
        let manager = self.manager()?;
        let known = || manager.raft.read(|store| store.nodes.contains_key(&node));
        if known() {
            return Ok(manager);
        }
        // A manager that is behind may not have heard of a new node yet.
        manager.raft.read_barrier().await.map_err(unavailable)?;
        if known() {
            return Ok(manager);
        }
        let why = format!("node {node} is not in the cluster any more");
        Err(RpcError::new(RpcErrorKind::NotFound, why))
    }
}

/// What a node says of its own tasks, and not at any length: each report is kept by every manager.
fn own(
    store: &Store,
    node: NodeId,
    mut statuses: Vec<(TaskId, TaskStatus)>,
) -> Vec<(TaskId, TaskStatus)> {
    let mut seen = BTreeSet::new();
    statuses.retain(|(task, _)| {
        store.tasks.get(task).is_some_and(|task| task.node == Some(node)) && seen.insert(*task)
    });
    for (_, status) in &mut statuses {
        for text in [&mut status.message, &mut status.err] {
            text.truncate(text.floor_char_boundary(TEXT_MAX));
        }
    }
    statuses
}

/// Waits until this manager knows all that was done before.
async fn current(manager: &Manager) -> Result<(), RpcError> {
    let barrier = tokio::time::timeout(CATCH_UP, manager.raft.read_barrier()).await;
    let late = |_| unavailable("this manager reaches no majority of the managers");
    barrier.map_err(late)?.map(drop).map_err(unavailable)
}

#[async_trait]
impl RpcHandler for Handler {
    async fn vouch(&self, from: Subject, standing: Standing) -> Result<(), RpcError> {
        match standing {
            Standing::None => Ok(()),
            Standing::Stored => self.known(from.node).await.map(drop),
            Standing::Voice => self.voice(from.node),
            Standing::RecordedNode => self.recorded(from.node, "node", |_| true),
            Standing::RecordedManager => self.recorded(from.node, "manager", |node| node.manager),
        }
    }

    fn knows(&self, ip: IpAddr) -> bool {
        let Some(records) = self.records.get() else { return false };
        let ip = ip.to_canonical();
        records.borrow().nodes.values().any(|node| node.address == ip || node.vtep == ip)
    }

    fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    async fn join(&self, from: Joiner, request: JoinRequest) -> Result<JoinResponse, RpcError> {
        self.door.admit(&*self.manager()?, &from, request).await
    }

    async fn raft(&self, _: Subject, kind: RpcKind, body: Bytes) -> Result<Bytes, RpcError> {
        self.manager()?.raft.serve(kind, body).await.map_err(unavailable)
    }

    async fn session(
        &self,
        from: Subject,
        request: SessionRequest,
    ) -> Result<BoxStream<'static, NodeUpdate>, RpcError> {
        let manager = self.manager()?;
        // One that is behind would send older tasks, and one that is cut off never learns that it,
        // or the node, was removed.
        current(&manager).await?;
        self.known(from.node).await?;
        manager.heard(&[from.node]);
        let described = manager.described(from.node, request.description).await;
        described.map_err(|error| not_proposed(&error))?;
        let (updates, stream) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            let mut feed = Feed {
                node: from.node,
                revision: request.revision,
                held: request.scopes,
                assignments: None,
                managers: Vec::new(),
                keys: None,
            };
            let mut revisions = manager.raft.watch();
            loop {
                revisions.borrow_and_update();
                let Some(update) = feed.step(&manager) else { return };
                if updates.send(update).await.is_err() {
                    return;
                }
                let _ = tokio::time::timeout(HEARTBEAT, revisions.changed()).await;
                tokio::time::sleep(GATHER).await;
            }
        });
        Ok(ReceiverStream::new(stream).boxed())
    }

    async fn report(
        &self,
        from: Subject,
        request: ReportRequest,
    ) -> Result<ReportResponse, RpcError> {
        let manager = self.known(from.node).await?;
        manager.heard(&[from.node]);
        // Its certificate may be older than its role.
        let manages = manager.raft.read(|store| store.may_be_manager(from.node));
        if from.role == Role::Manager && manages {
            manager.heard(&manager.nodes_of(request.heard, |node| *node));
            for (node, revision) in manager.nodes_of(request.acks, |(node, _)| *node) {
                manager.acked(node, revision);
            }
        }
        manager.reached(&manager.nodes_of(request.reached, |node| *node));
        // What a manager passes on says nothing of its own kernel.
        if request.acked > Revision::MIN {
            manager.acked(from.node, request.acked);
        }
        if let Some(description) = request.description {
            let described = manager.described(from.node, description).await;
            described.map_err(|error| not_proposed(&error))?;
        }
        let statuses = manager.raft.read(|store| own(store, from.node, request.statuses));
        if !statuses.is_empty() {
            let reported = manager.tasks_reported(from.node, statuses).await;
            reported.map_err(|error| not_proposed(&error))?;
        }
        Ok(ReportResponse { revision: manager.raft.read(|store| store.revision) })
    }

    async fn exec(
        &self,
        _: Subject,
        request: ExecRequest,
        input: FrameReader<ExecInput>,
        output: FrameWriter<ExecOutput>,
    ) {
        match self.agent.get() {
            Some(agent) => exec::serve(agent, request, input, output).await,
            None => {
                let _ = output.send(&ExecOutput::Failed(STARTING.to_owned())).await;
            }
        }
    }

    async fn renew(&self, from: Subject, request: RenewRequest) -> Result<RenewResponse, RpcError> {
        let invalid = |error| RpcError::new(RpcErrorKind::Invalid, error);
        let key = pki::PublicKey::from_der(&request.public_key).map_err(invalid)?;
        let manager = self.known(from.node).await?;
        current(&manager).await?;
        let (node, cluster) = manager
            .raft
            .read(|store| Some((store.nodes.get(&from.node)?.clone(), store.cluster.clone()?)))
            .ok_or_else(|| unavailable("the node or its cluster is gone"))?;
        // One that became a manager again meanwhile is a worker first: its store goes, and nobody
        // may count on it then.
        let role = match request.voter {
            Some(voter) if voter != node.voter() => Role::Worker,
            _ => node.spec.role,
        };
        if role == Role::Worker && request.voter.is_some_and(|voter| !manager.raft.is_out(voter)) {
            return Err(unavailable("the node's vote is still being given back"));
        }
        let cert_pem = sign(&cluster, from.node, role, &key)?;
        tracing::info!(node = %from.node, role = role.name(), "signed a node's new key");
        Ok(RenewResponse { role, voter: node.voter(), cert_pem })
    }

    async fn logs(&self, _: Subject, request: LogsRequest, output: FrameWriter<LogsOutput>) {
        let served = match self.agent.get() {
            Some(agent) => logs::serve(agent, &request, &output).await,
            None => Err(STARTING.to_owned()),
        };
        if let Err(why) = served {
            let _ = output.send(&LogsOutput::Failed(why)).await;
        }
    }

    async fn anti_entropy(&self, from: Subject, body: Bytes) -> Result<Bytes, RpcError> {
        let gossip = self.gossip.get().ok_or_else(|| unavailable(STARTING))?;
        gossip.answer(from.node, body).await.map_err(|error| match error {
            Unanswered::Busy(why) => unavailable(why),
            Unanswered::Refused(_) => RpcError::new(RpcErrorKind::Invalid, error),
        })
    }

    async fn stats(&self, _: Subject) -> Result<StatsResponse, RpcError> {
        Ok(StatsResponse { counters: self.counters().await? })
    }

    async fn leave(&self, from: Subject) -> Result<(), RpcError> {
        let manager = self.known(from.node).await?;
        manager.left(from.node).await.map_err(|error| not_proposed(&error))
    }
}

/// Where one session is.
struct Feed {
    node: NodeId,
    revision: Revision,
    held: BTreeSet<Scope>,
    assignments: Option<Assigned>,
    managers: Vec<ManagerAddress>,
    keys: Option<(ClusterKeys, u16)>,
}

impl Feed {
    /// What the node does not have yet; `None` when it is no longer of the cluster, or this node no
    /// longer a manager.
    fn step(&mut self, manager: &Manager) -> Option<NodeUpdate> {
        if manager.is_closed() {
            return None;
        }
        let view = manager.view(self.node, self.revision, &self.held)?;
        self.revision = view.delta.to;
        self.held.clone_from(&view.delta.scopes);
        let undecided = !manager.raft.leadership().borrow().has_quorum;
        let mut update = NodeUpdate { delta: view.delta, undecided, ..NodeUpdate::default() };
        if view.assignments.is_some() && self.assignments != view.assignments {
            if let Some((assignments, ended)) = view.assignments.clone() {
                (update.assignments, update.ended) = (Some(assignments), ended);
            }
            self.assignments = view.assignments;
        }
        let managers = addresses(manager);
        if self.managers != managers {
            update.managers = Some(managers.clone());
            self.managers = managers;
        }
        let keys = manager.raft.read(|store| {
            let cluster = store.cluster.as_ref()?;
            Some((ClusterKeys::of(cluster), cluster.spec.data_path_port))
        });
        if self.keys != keys {
            (update.keys, update.data_path_port) = keys.clone().unzip();
            self.keys = keys;
        }
        Some(update)
    }
}

/// The managers as nodes need them. Sorted, so that a change of the leader is no change here.
pub(super) fn addresses(manager: &Manager) -> Vec<ManagerAddress> {
    let mut managers: Vec<ManagerAddress> = manager
        .managers()
        .iter()
        .map(|n| ManagerAddress { node: n.id, number: n.voter(), address: n.address })
        .collect();
    managers.sort_unstable();
    managers
}

#[cfg(test)]
#[path = "handler_tests.rs"]
mod tests;
