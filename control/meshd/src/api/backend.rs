//! What the API needs of the node: the one seam between HTTP and the rest of the daemon. The tests
//! put a store without raft behind it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use async_trait::async_trait;
use bytes::Bytes;
use mesh_control::{
    command::{Command, Outcome},
    model::{Availability, ClusterSpec, Role},
    store::Store,
};
use mesh_types::{ClusterId, NodeId, NodeNumber, TaskId};
use tokio::sync::mpsc;

use super::{error::ApiError, events::Feed};
pub use crate::rpc::messages::{LogLine, LogsOutput, LogsRequest};

/// What the handlers ask of the node.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// This node and its membership. Never blocks and never fails.
    fn local(&self) -> LocalState;

    /// Who leads; `None` on workers, outside a cluster, and while no leader has a majority.
    fn leadership(&self) -> Option<Leadership>;

    /// Waits until [`Backend::read`] shows every change that was acknowledged, by any manager,
    /// before this was called. On a node that is no manager there is nothing to wait for.
    ///
    /// # Errors
    /// [`ApiError::no_leader`]: without a majority nobody knows what the others acknowledged.
    async fn catch_up(&self) -> Result<(), ApiError>;

    /// Begins to replace the root certificate; `forced`: how often that was asked for by now.
    async fn rotate_ca(&self, forced: u64) -> Result<(), ApiError>;

    /// Shows the store, as this node has it, to `f`, called at most once.
    ///
    /// # Errors
    /// [`ApiError::not_in_swarm`], [`ApiError::worker`], [`ApiError::no_leader`].
    fn read(&self, f: &mut dyn FnMut(&Store)) -> Result<(), ApiError>;

    /// Has a command applied: locally or, on a follower, through the leader. Returns once the store
    /// that [`Backend::read`] shows holds the result, so that a client reads its own writes.
    ///
    /// # Errors
    /// `ApiError::from(Rejection)`, and those of [`Backend::read`].
    async fn propose(&self, command: Command) -> Result<Outcome, ApiError>;

    /// 128 random bits for an id or a secret.
    fn fresh_id(&self) -> u128;

    /// Makes a cluster of this node alone.
    ///
    /// # Errors
    /// [`ApiError::already_in_swarm`]; `bad_request` where an address is not this host's.
    async fn init(&self, request: InitRequest) -> Result<NodeId, ApiError>;

    /// Joins a cluster. Returns when the node is a member.
    ///
    /// # Errors
    /// [`ApiError::already_in_swarm`]; [`ApiError::invalid_token`]; 500 when no manager answered.
    async fn join(&self, request: JoinRequest) -> Result<(), ApiError>;

    /// Leaves the cluster and forgets it.
    ///
    /// # Errors
    /// [`ApiError::not_part_of_swarm`]; without `force` on a manager
    /// [`ApiError::leave_as_manager`].
    async fn leave(&self, force: bool) -> Result<(), ApiError>;

    /// The join tokens as they stand.
    ///
    /// # Errors
    /// Those of [`Backend::read`].
    fn join_tokens(&self) -> Result<JoinTokens, ApiError>;

    /// Runs a command inside a task's namespaces, on whichever node the task is.
    ///
    /// # Errors
    /// 404 if there is no such task, 409 if it does not run, 400 if the command cannot be started,
    /// 503 if its node does not answer.
    async fn task_exec(&self, task: TaskId, request: ExecRequest) -> Result<ExecSession, ApiError>;

    /// The output of tasks of a node. The channel ends with it; dropped, nobody listens any more.
    ///
    /// # Errors
    /// 404 if there is no such node, 503 if it does not answer.
    async fn task_logs(
        &self,
        node: NodeId,
        request: LogsRequest,
    ) -> Result<mpsc::Receiver<LogsOutput>, ApiError>;

    /// What happens in the cluster.
    ///
    /// # Errors
    /// [`ApiError::not_in_swarm`], [`ApiError::worker`].
    fn events(&self) -> Result<Feed, ApiError>;

    /// The metrics of this daemon, of this moment, in the text of [`crate::metrics`].
    async fn metrics(&self) -> String;

    /// The data plane's counters of a node; of this one with `None`.
    ///
    /// # Errors
    /// 404 if there is no such node, 503 if it does not answer.
    async fn node_stats(&self, node: Option<NodeId>) -> Result<NodeStats, ApiError>;
}

/// This node.
#[derive(Debug, Clone)]
pub struct LocalState {
    /// The machine and the daemon.
    pub engine: EngineFacts,
    /// Its membership.
    pub swarm: SwarmState,
}

/// The machine and the daemon.
#[derive(Debug, Clone, Default)]
pub struct EngineFacts {
    /// The node's name: the host's unless the daemon was given another.
    pub hostname: String,
    /// `uname -r`.
    pub kernel: String,
    /// `PRETTY_NAME` of os-release.
    pub operating_system: String,
    /// `uname -m`.
    pub architecture: String,
    /// CPUs.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The state directory.
    pub state_dir: String,
    /// Tasks that run here now.
    pub tasks_running: usize,
    /// Whether tasks can be limited in CPU time, memory and processes.
    pub can_limit: [bool; 3],
    /// The version of the cgroups that limit them.
    pub cgroup_version: u32,
}

/// Whether this node is in a cluster.
#[derive(Debug, Clone)]
pub enum SwarmState {
    /// In none.
    Inactive,
    /// A join goes on.
    Pending,
    /// In one.
    Active(Membership),
    /// It cannot go on; why.
    Error(String),
}

/// Membership in a cluster.
#[derive(Debug, Clone)]
pub struct Membership {
    /// This node's id.
    pub node: NodeId,
    /// This node's number.
    pub number: NodeNumber,
    /// The cluster.
    pub cluster: ClusterId,
    /// This node's role.
    pub role: Role,
    /// The advertised address.
    pub address: IpAddr,
    /// The managers as this node knows them, itself included if it is one.
    pub managers: Vec<(NodeId, SocketAddr)>,
}

/// Who leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leadership {
    /// The leader.
    pub leader: NodeNumber,
    /// Managers that answer, as far as this node can tell; the leader is always among them.
    pub reachable: BTreeSet<NodeNumber>,
}

/// Where a node is reached: what the user gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeAddress {
    /// An address of this host.
    Ip(IpAddr),
    /// The address of this link of the host.
    Link(String),
}

/// See [`Backend::init`].
#[derive(Debug, Clone)]
pub struct InitRequest {
    /// The advertised address; `None`: the daemon's option, else the host's only address.
    pub advertise: Option<NodeAddress>,
    /// Where tunnels end; `None`: the daemon's option, else the advertised address.
    pub data_path: Option<NodeAddress>,
    /// Whether the first node takes tasks.
    pub availability: Availability,
    /// What the operator set, defaults filled in.
    pub spec: ClusterSpec,
}

/// See [`Backend::join`].
#[derive(Debug, Clone)]
pub struct JoinRequest {
    /// Managers to try, at least one, as `host` or `host:port`.
    pub remotes: Vec<String>,
    /// The join token.
    pub token: String,
    /// As in [`InitRequest`].
    pub advertise: Option<NodeAddress>,
    /// As in [`InitRequest`].
    pub data_path: Option<NodeAddress>,
    /// Whether the node takes tasks.
    pub availability: Availability,
}

/// The two join tokens in their `SWMTKN-1-` form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinTokens {
    /// Admits workers.
    pub worker: String,
    /// Admits managers.
    pub manager: String,
}

/// A command to run inside a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments; never empty.
    pub argv: Vec<String>,
    /// `KEY=value`, on top of the task's own environment.
    pub env: Vec<String>,
    /// Working directory; the task's own if not given.
    pub dir: Option<String>,
}

/// A command that runs inside a task. Dropping `input` abandons it: the process is killed.
#[derive(Debug)]
pub struct ExecSession {
    /// To the process.
    pub input: mpsc::Sender<ExecInput>,
    /// From the process; the last item is [`ExecOutput::Exit`] or [`ExecOutput::Failed`].
    pub output: mpsc::Receiver<ExecOutput>,
}

/// What goes to a process inside a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecInput {
    /// For its standard input.
    Stdin(Bytes),
    /// The end of its standard input.
    Eof,
    /// A signal for it.
    Signal(i32),
}

/// What comes from a process inside a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// From its standard output.
    Stdout(Bytes),
    /// From its standard error.
    Stderr(Bytes),
    /// It ended with this status (128 + n: killed by signal n).
    Exit(i32),
    /// How it ended will not be known; why.
    Failed(String),
}

/// A node's counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeStats {
    /// Whose.
    pub node: NodeId,
    /// Its name.
    pub hostname: String,
    /// Sorted by name.
    pub counters: Vec<Counter>,
}

/// One counter of the data plane, summed over CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// A name in snake case; for drops that of the reason.
    pub name: String,
    /// Packets or events since the programs were loaded.
    pub value: u64,
    /// Whether it counts dropped packets.
    pub is_drop: bool,
}
