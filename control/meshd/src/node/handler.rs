//! Answers other nodes.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use mesh_control::{
    command::{Command, NewNode, Outcome},
    model::{Node, NodeSpec, Role},
    token::JoinToken,
};
use mesh_raft::{ProposeError, RpcKind};
use mesh_types::{
    NodeId, Revision,
    record::{NodeRecord, RecordSet, Scope},
};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    dataplane, exec,
    liveness::HEARTBEAT,
    logs,
    manager::{Assigned, Manager},
};
use crate::{
    agent::AgentHandle,
    dns_process::Resolver,
    gossip::{Answers, Unanswered},
    pki::{self, Root, Subject},
    rpc::{
        Joiner, RpcError, RpcErrorKind, RpcHandler,
        frames::{FrameReader, FrameWriter},
        messages::{
            CounterValue, ExecInput, ExecOutput, ExecRequest, JoinRequest, JoinResponse,
            LogsOutput, LogsRequest, ManagerAddress, NodeUpdate, RenewRequest, RenewResponse,
            ReportRequest, ReportResponse, SessionRequest, StatsResponse,
        },
    },
};

/// Changes within this time go out as one update.
const GATHER: Duration = Duration::from_millis(5);
/// A session begins once this manager is as far as the leader; longer it does not wait for that.
const CATCH_UP: Duration = Duration::from_secs(3);

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
    /// Who is a manager, as this node was told.
    pub(crate) records: OnceLock<watch::Receiver<Arc<RecordSet>>>,
}

fn unavailable(what: impl std::fmt::Display) -> RpcError {
    RpcError::new(RpcErrorKind::Unavailable, what)
}

fn denied(what: impl std::fmt::Display) -> RpcError {
    RpcError::new(RpcErrorKind::Denied, what)
}

fn not_proposed(error: &ProposeError) -> RpcError {
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

    /// Refuses one that is no manager any more, whatever its certificate says.
    fn recorded(&self, caller: NodeId) -> Result<(), RpcError> {
        let records =
            self.records.get().ok_or_else(|| unavailable("the node is still starting"))?;
        let manager = |node: &NodeRecord| node.manager && node.id == caller;
        if records.borrow().nodes.values().any(manager) {
            return Ok(());
        }
        Err(denied(format!("node {caller} is no manager that this node knows of")))
    }

    /// The counters of the data plane, of gossip and of the resolver.
    pub(crate) async fn counters(&self) -> Result<Vec<CounterValue>, RpcError> {
        let starting = || unavailable("the node is still starting");
        let dataplane = self.dataplane.get().ok_or_else(starting)?;
        let mut counters = dataplane.counters().await.map_err(unavailable)?;
        let gossip = self.gossip.get().into_iter().flat_map(Answers::counters);
        counters.extend(gossip.map(|(name, value)| CounterValue {
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

/// Waits until this manager knows all that was done before.
async fn current(manager: &Manager) -> Result<(), RpcError> {
    let barrier = tokio::time::timeout(CATCH_UP, manager.raft.read_barrier()).await;
    let late = |_| unavailable("this manager reaches no majority of the managers");
    barrier.map_err(late)?.map(drop).map_err(unavailable)
}

#[async_trait]
impl RpcHandler for Handler {
    async fn join(&self, from: Joiner, request: JoinRequest) -> Result<JoinResponse, RpcError> {
        admit(&*self.manager()?, &from, request).await
    }

    async fn raft(&self, from: Subject, kind: RpcKind, body: Bytes) -> Result<Bytes, RpcError> {
        // The store's word is final: a node that was demoted or removed has no voice. A manager
        // that just started has no store yet, and must hear the leader to get one; one that is
        // behind may not know its leader yet. The leader knows all.
        let manager = self.manager()?;
        let leads = manager.raft.leadership().borrow().me_leader;
        let (heard, number) = manager.raft.read(|store| {
            let known = store.cluster.is_none() || store.nodes.contains_key(&from.node);
            let heard = store.may_be_manager(from.node) && (known || !leads);
            (heard, store.nodes.get(&from.node).map(Node::voter))
        });
        // One that is being demoted goes on until the others are enough without its vote.
        if !heard && !number.is_some_and(|number| manager.raft.takes_part(number)) {
            return Err(denied(format!("node {} is no manager of this cluster", from.node)));
        }
        manager.raft.serve(kind, body).await.map_err(unavailable)
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
                secrets: None,
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
        if !request.statuses.is_empty() {
            let command = Command::ReportTasks { node: from.node, statuses: request.statuses };
            manager.propose(command).await.map_err(|error| not_proposed(&error))?;
        }
        Ok(ReportResponse { revision: manager.raft.read(|store| store.revision) })
    }

    async fn exec(
        &self,
        from: Subject,
        request: ExecRequest,
        input: FrameReader<ExecInput>,
        output: FrameWriter<ExecOutput>,
    ) {
        let agent = self.agent.get().ok_or_else(|| unavailable("the node is still starting"));
        match self.recorded(from.node).and(agent) {
            Ok(agent) => exec::serve(agent, request, input, output).await,
            Err(error) => {
                let _ = output.send(&ExecOutput::Failed(error.message)).await;
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
        let internal = |error| RpcError::new(RpcErrorKind::Internal, error);
        let root = Root { cert_pem: cluster.ca_cert_pem, key_pem: cluster.ca_key_pem.into() };
        let subject = Subject { node: from.node, role, cluster: cluster.id };
        let life = Duration::from_secs(cluster.spec.certificate_secs);
        let cert_pem = root.sign(subject, &key, life, SystemTime::now()).map_err(internal)?;
        tracing::info!(node = %from.node, ?role, "signed a node's new key");
        Ok(RenewResponse { role, voter: node.voter(), cert_pem })
    }

    async fn logs(&self, from: Subject, request: LogsRequest, output: FrameWriter<LogsOutput>) {
        let agent = self.agent.get().ok_or_else(|| unavailable("the node is still starting"));
        let served = match self.recorded(from.node).and(agent) {
            Ok(agent) => logs::serve(agent, &request, &output).await,
            Err(error) => Err(error.message),
        };
        if let Err(why) = served {
            let _ = output.send(&LogsOutput::Failed(why)).await;
        }
    }

    async fn anti_entropy(&self, from: Subject, body: Bytes) -> Result<Bytes, RpcError> {
        let gossip = self.gossip.get().ok_or_else(|| unavailable("the node is still starting"))?;
        gossip.answer(from.node, body).await.map_err(|error| match error {
            Unanswered::Busy(why) => unavailable(why),
            Unanswered::Refused(_) => RpcError::new(RpcErrorKind::Invalid, error),
        })
    }

    async fn stats(&self, from: Subject) -> Result<StatsResponse, RpcError> {
        self.recorded(from.node)?;
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
    secrets: Option<([u8; 32], u16)>,
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
        let secrets = manager.raft.read(|store| {
            store.cluster.as_ref().map(|cluster| (cluster.gossip_key, cluster.spec.data_path_port))
        });
        if self.secrets != secrets {
            update.gossip_key = secrets.map(|(key, _)| key);
            update.data_path_port = secrets.map(|(_, port)| port);
            self.secrets = secrets;
        }
        Some(update)
    }
}

/// The managers as nodes need them. Sorted, so that a change of the leader is no change here.
fn addresses(manager: &Manager) -> Vec<ManagerAddress> {
    let mut managers: Vec<ManagerAddress> = manager
        .managers()
        .iter()
        .map(|n| ManagerAddress { node: n.id, number: n.voter(), address: n.address })
        .collect();
    managers.sort_unstable();
    managers
}

/// Checks a token and admits its bearer.
async fn admit(
    manager: &Manager,
    from: &Joiner,
    request: JoinRequest,
) -> Result<JoinResponse, RpcError> {
    let invalid = || denied("invalid join token");
    let token: JoinToken = request.token.parse().map_err(|_| invalid())?;
    // Rejecting or admitting must not rest on an old view: the token may just have been rotated.
    manager.raft.read_barrier().await.map_err(unavailable)?;
    let cluster = manager
        .raft
        .read(|store| store.cluster.clone())
        .ok_or_else(|| unavailable("the cluster is not initialised yet"))?;
    let root =
        Root { cert_pem: cluster.ca_cert_pem.clone(), key_pem: cluster.ca_key_pem.clone().into() };
    let internal = |error: pki::PkiError| RpcError::new(RpcErrorKind::Internal, error);
    if !token.pins(&pki::parse_pem(&cluster.ca_cert_pem).map_err(internal)?) {
        return Err(invalid());
    }
    let role = token.role(&cluster).map_err(|_| invalid())?;
    let node = NodeId::from_bits(rand::random());
    let address = match request.address.ip() {
        ip if ip.is_unspecified() => SocketAddr::new(from.remote.ip(), request.address.port()),
        _ => request.address,
    };
    let subject = Subject { node, role, cluster: cluster.id };
    let life = Duration::from_secs(cluster.spec.certificate_secs);
    let cert_pem =
        root.sign(subject, &from.public_key, life, SystemTime::now()).map_err(internal)?;
    let new = NewNode {
        id: node,
        spec: NodeSpec { role, availability: request.availability, ..NodeSpec::default() },
        description: request.description,
        address,
        vtep: request.vtep.unwrap_or(address.ip()),
    };
    let outcome = manager.propose(Command::AddNode(Box::new(new))).await;
    let Outcome::Node(number) = outcome.map_err(|error| not_proposed(&error))? else {
        return Err(RpcError::new(RpcErrorKind::Internal, "the store gave the node no number"));
    };
    tracing::info!(%node, %number, ?role, %address, "admitted a node");
    Ok(JoinResponse {
        node,
        number,
        role,
        cert_pem,
        ca_pem: cluster.ca_cert_pem,
        managers: addresses(manager),
        gossip_key: cluster.gossip_key,
        address,
        data_path_port: cluster.spec.data_path_port,
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use mesh_types::{ClusterId, NodeNumber};

    use super::*;

    #[tokio::test]
    async fn a_removed_manager_runs_nothing_here_any_more() {
        let (handler, node) = (Handler::default(), NodeId::from_bits(7));
        let from = Subject { node, role: Role::Manager, cluster: ClusterId::from_bits(1) };
        let kind = |answer: Result<StatsResponse, RpcError>| answer.unwrap_err().kind;
        assert_eq!(kind(handler.stats(from).await), RpcErrorKind::Unavailable);
        let address = IpAddr::from([192, 0, 2, 1]);
        let number = NodeNumber::MIN;
        let name = "m1".to_owned();
        let record = NodeRecord { id: node, number, name, vtep: address, address, manager: true };
        let mut records = RecordSet::default();
        records.nodes.insert(number, record);
        let (records, watched) = watch::channel(Arc::new(records));
        let _ = handler.records.set(watched);
        assert_eq!(handler.recorded(node), Ok(()));
        records.send_modify(|records| Arc::make_mut(records).nodes.clear());
        assert_eq!(kind(handler.stats(from).await), RpcErrorKind::Denied);
    }
}
