//! The one way to change the store.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use mesh_types::{
    ClusterId, Epoch, NetworkId, NodeId, NodeNumber, Revision, ServiceId, TaskId,
    spec::{NetworkSpec, ServiceSpec},
    task::{TaskState, TaskStatus},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::model::{
    CaRotation, ClusterSpec, NodeDescription, NodeSpec, NodeStatus, Role, RootId, UpdateState,
};

/// One entry of the log. Either all of it is applied or, rejected, nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The proposer's clock, ms since the Unix epoch.
    pub now_ms: u64,
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Makes the cluster, its ingress network and its first manager.
    Init(Box<InitCluster>),
    /// Admits a node whose token and key were checked.
    AddNode(Box<NewNode>),
    /// The operator's changes to a node.
    UpdateNode {
        /// Which.
        id: NodeId,
        /// Its version as the operator saw it.
        version: Revision,
        /// The whole new spec.
        spec: NodeSpec,
    },
    /// What the leader learned about nodes.
    ReportNodes(Vec<NodeReport>),
    /// Removes a node. Its tasks are orphaned, its leases given back.
    RemoveNode {
        /// Which.
        id: NodeId,
        /// Even if it is not down.
        force: bool,
    },
    /// Makes a network.
    CreateNetwork {
        /// A fresh id.
        id: NetworkId,
        /// What the user asked for.
        spec: NetworkSpec,
    },
    /// Removes a network that nothing uses.
    RemoveNetwork {
        /// Which.
        id: NetworkId,
    },
    /// Makes a service.
    CreateService {
        /// A fresh id.
        id: ServiceId,
        /// What the user asked for.
        spec: Box<ServiceSpec>,
    },
    /// Changes a service.
    UpdateService {
        /// Which.
        id: ServiceId,
        /// Its version as the user saw it.
        version: Revision,
        /// The whole new spec.
        spec: Box<ServiceSpec>,
    },
    /// Brings the spec before the last update back, by the rollback policy.
    RollBackService {
        /// Which.
        id: ServiceId,
        /// Its version as the user saw it.
        version: Revision,
    },
    /// Removes a service and its tasks.
    RemoveService {
        /// Which.
        id: ServiceId,
    },
    /// What the leader's loops decided, as one transaction. A change whose task is gone or beyond
    /// it is skipped, so that a decision over an old view does no harm.
    ChangeTasks(Vec<TaskChange>),
    /// What nodes report of their tasks. Lower states than the known ones are stale and dropped.
    ReportTasks {
        /// The reporter; reports about other nodes' tasks are dropped.
        node: NodeId,
        /// Task and status.
        statuses: Vec<(TaskId, TaskStatus)>,
    },
    /// The operator's changes to the cluster's settings.
    UpdateCluster {
        /// The cluster's version as the operator saw it.
        version: Revision,
        /// All settings; those of addresses and ports stay as they were made.
        spec: Box<ClusterSpec>,
    },
    /// Replaces the secret of a join token.
    RotateToken {
        /// Whose.
        role: Role,
        /// A fresh secret.
        secret: [u8; 16],
    },
    /// Begins to replace the root certificate. One that was on its way already is given up for it.
    RotateCa {
        /// How often another root was asked for, this time included.
        forced: u64,
        /// The new root; when it begins is set here.
        rotation: Box<CaRotation>,
    },
    /// Drops the old root, if all nodes have what they need of the new one.
    FinishCaRotation {
        /// The new one.
        id: RootId,
    },
    /// Begins to replace the key of gossip, unless that is under way already.
    RotateGossipKey {
        /// A fresh key.
        key: [u8; 32],
    },
    /// The next step of that, if all nodes have done the last one.
    AdvanceGossipKey {
        /// The generation that is being replaced.
        epoch: Epoch,
        /// Whether the new key was in use already, as the leader saw it.
        in_use: bool,
    },
}

/// See [`Command::Init`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitCluster {
    /// A fresh id.
    pub id: ClusterId,
    /// What the operator set.
    pub spec: ClusterSpec,
    /// Root certificate, PEM.
    pub ca_cert_pem: String,
    /// Root key, PEM.
    pub ca_key_pem: String,
    /// Fresh.
    pub worker_secret: [u8; 16],
    /// Fresh.
    pub manager_secret: [u8; 16],
    /// Fresh.
    pub gossip_key: [u8; 32],
    /// A fresh id for the ingress network.
    pub ingress: NetworkId,
    /// The first manager; it gets number 1.
    pub first: NewNode,
}

/// See [`Command::AddNode`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNode {
    /// A fresh id; the name in its certificate.
    pub id: NodeId,
    /// Role (by token) and availability.
    pub spec: NodeSpec,
    /// What it says of itself.
    pub description: NodeDescription,
    /// Its advertised address with the managers' port.
    pub address: SocketAddr,
    /// Where its tunnels end.
    pub vtep: IpAddr,
}

/// See [`Command::ReportNodes`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Which.
    pub id: NodeId,
    /// The verdict, if it changed.
    pub status: Option<NodeStatus>,
    /// What it says of itself, if it changed.
    pub description: Option<NodeDescription>,
}

/// See [`Command::ChangeTasks`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskChange {
    /// Makes a task of a service. Its leases are taken at once where they can be; else it stays
    /// `New` with the reason.
    Create {
        /// A fresh id.
        id: TaskId,
        /// Its service.
        service: ServiceId,
        /// Its slot, for replicated services.
        slot: Option<u64>,
        /// Its node, for global services.
        node: Option<NodeId>,
        /// `Running`, or `Ready` to wait for `start_at_ms`.
        desired: TaskState,
        /// The restart delay's end.
        start_at_ms: Option<u64>,
        /// The one live task of its place that it may stand beside, to take over from it.
        replaces: Option<TaskId>,
    },
    /// Tries again to take the leases of a `New` task.
    Allocate {
        /// Which.
        id: TaskId,
    },
    /// Puts a pending task on a node.
    Assign {
        /// Which.
        id: TaskId,
        /// Where.
        node: NodeId,
    },
    /// Says why a task waits (`no suitable node …`).
    Explain {
        /// Which.
        id: TaskId,
        /// The reason.
        err: String,
    },
    /// Sets how far it should go; only ever up.
    Desire {
        /// Which.
        id: TaskId,
        /// How far.
        state: TaskState,
    },
    /// A manager's own verdict on a task that no node can report on (node removed: `Orphaned`).
    Conclude {
        /// Which.
        id: TaskId,
        /// A final state.
        state: TaskState,
        /// Why.
        err: String,
    },
    /// All nodes know that a task drains: its own node may be told to end it.
    Release {
        /// Which.
        id: TaskId,
    },
    /// Forgets an ended task.
    Delete {
        /// Which.
        id: TaskId,
    },
    /// How the update of a service goes on, if it is still the one to this version.
    Update {
        /// Whose.
        service: ServiceId,
        /// The service's [`crate::model::Service::spec_version`].
        spec_version: Revision,
        /// What comes next; `RollbackStarted` brings the spec before back.
        state: UpdateState,
        /// For people.
        message: String,
    },
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done.
    Done,
    /// A node was admitted under this number.
    Node(NodeNumber),
    /// A service was made or changed; what the user should know.
    Warnings(Vec<String>),
}

/// Why a command changed nothing. The texts are for people; where Docker's clients look for words,
/// they are Docker's.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Rejection {
    /// There is no such object (HTTP 404).
    #[error("{0}")]
    NotFound(String),
    /// An object of that name exists (409).
    #[error("{0}")]
    Exists(String),
    /// The request makes no sense (400).
    #[error("{0}")]
    Invalid(String),
    /// The state of the cluster does not allow it (400).
    #[error("{0}")]
    Precondition(String),
    /// Docker answers 403 here (network in use).
    #[error("{0}")]
    Forbidden(String),
    /// The object changed since it was read (500, with these words).
    #[error("update out of sequence")]
    OutOfSequence,
    /// No address, VNI or port is left (400).
    #[error("{0}")]
    Exhausted(String),
}

/// The tasks that a decision touches, for logs.
#[must_use]
pub fn touched(changes: &[TaskChange]) -> BTreeSet<TaskId> {
    changes
        .iter()
        .filter_map(|change| match change {
            TaskChange::Create { id, .. }
            | TaskChange::Allocate { id }
            | TaskChange::Assign { id, .. }
            | TaskChange::Explain { id, .. }
            | TaskChange::Desire { id, .. }
            | TaskChange::Conclude { id, .. }
            | TaskChange::Release { id }
            | TaskChange::Delete { id } => Some(*id),
            TaskChange::Update { .. } => None,
        })
        .collect()
}
