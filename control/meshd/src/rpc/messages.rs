//! What the calls between nodes carry. Fields are named on the wire: a later version may add some.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use bytes::Bytes;
use mesh_control::model::{Availability, Cluster, GossipKeys, NodeDescription, Role};
use mesh_types::{
    NodeId, NodeNumber, Revision, TaskId,
    record::{Delta, Scope},
    task::{TaskAssignment, TaskStatus},
};
use serde::{Deserialize, Serialize};

/// A manager as others reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ManagerAddress {
    /// Its id.
    pub node: NodeId,
    /// Its number among the voters.
    pub number: NodeNumber,
    /// Its address for other nodes.
    pub address: SocketAddr,
}

/// [`Route::Join`](super::Route::Join). The key to sign is the one that the caller showed in the
/// handshake.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The token, whole.
    pub token: String,
    /// What the node says of itself.
    pub description: NodeDescription,
    /// Its advertised address with the managers' port; an unspecified IP means "as you see me".
    pub address: SocketAddr,
    /// Where its tunnels end; `None`: at its address.
    pub vtep: Option<IpAddr>,
    /// Whether it takes tasks.
    pub availability: Availability,
}

impl std::fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the token.
        f.debug_struct("JoinRequest").field("address", &self.address).finish_non_exhaustive()
    }
}

/// The cluster's keys, as every node has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterKeys {
    /// The roots to trust, PEM. The last one signs certificates: who has one of another asks for a
    /// new one at once.
    pub roots: Vec<String>,
    /// Those of gossip.
    pub gossip: GossipKeys,
}

impl ClusterKeys {
    /// As the store has them.
    pub(crate) fn of(cluster: &Cluster) -> Self {
        let roots = cluster.roots().into_iter().map(str::to_owned).collect();
        Self { roots, gossip: cluster.gossip_keys() }
    }
}

/// The answer to a [`JoinRequest`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinResponse {
    /// Its id.
    pub node: NodeId,
    /// Its number.
    pub number: NodeNumber,
    /// Its role, by the token.
    pub role: Role,
    /// Its certificate, PEM.
    pub cert_pem: String,
    /// The root, PEM. Its digest is the token's.
    pub ca_pem: String,
    /// The managers.
    pub managers: Vec<ManagerAddress>,
    /// What it trusts, and gossips with.
    pub keys: ClusterKeys,
    /// The address that it is known under.
    pub address: SocketAddr,
    /// VXLAN's UDP port.
    pub data_path_port: u16,
}

impl std::fmt::Debug for JoinResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the keys.
        f.debug_struct("JoinResponse")
            .field("node", &self.node)
            .field("number", &self.number)
            .field("role", &self.role)
            .field("managers", &self.managers)
            .finish_non_exhaustive()
    }
}

/// [`Route::Session`](super::Route::Session): opens a stream of [`NodeUpdate`]s. Who asks is in the
/// certificate.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SessionRequest {
    /// How far the node's records are.
    pub revision: Revision,
    /// The scopes that it holds as of then.
    pub scopes: BTreeSet<Scope>,
    /// What it says of itself.
    pub description: NodeDescription,
}

/// One step of a session. What is `None` did not change.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeUpdate {
    /// Records. Empty but for `to` when only the revision moved on.
    pub delta: Delta,
    /// The node's whole set of tasks.
    pub assignments: Option<Vec<TaskAssignment>>,
    /// With the assignments: tasks that ended here, whose output is still asked for.
    #[serde(default)]
    pub ended: BTreeSet<TaskId>,
    /// The managers.
    pub managers: Option<Vec<ManagerAddress>>,
    /// What the node trusts, and gossips with.
    #[serde(default)]
    pub keys: Option<ClusterKeys>,
    /// VXLAN's UDP port.
    pub data_path_port: Option<u16>,
    /// The manager knows no leader with a majority behind it: nobody decides anything now.
    #[serde(default)]
    pub undecided: bool,
}

impl std::fmt::Debug for NodeUpdate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the key.
        f.debug_struct("NodeUpdate")
            .field("delta", &self.delta)
            .field("assignments", &self.assignments)
            .field("managers", &self.managers)
            .field("undecided", &self.undecided)
            .finish_non_exhaustive()
    }
}

/// [`Route::Report`](super::Route::Report): also the node's sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReportRequest {
    /// Statuses that changed.
    pub statuses: Vec<(TaskId, TaskStatus)>,
    /// How far the node's kernel state is: all records up to there are applied.
    pub acked: Revision,
    /// What it says of itself, if that changed.
    pub description: Option<NodeDescription>,
    /// From a manager to the leader: nodes that reported to it lately.
    #[serde(default)]
    pub heard: Vec<NodeId>,
    /// Nodes whose data path answered a probe lately: the reporter's, or (from a manager to the
    /// leader) anybody's who reported to it.
    #[serde(default)]
    pub reached: Vec<NodeId>,
    /// From a manager to the leader: how far the nodes are that report to it.
    #[serde(default)]
    pub acks: Vec<(NodeId, Revision)>,
}

/// The answer to a [`ReportRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReportResponse {
    /// The manager's revision.
    pub revision: Revision,
}

/// One counter of a node's data plane, summed over CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterValue {
    /// In snake case; for a drop its reason.
    pub name: String,
    /// Packets or events since the maps were made.
    pub value: u64,
    /// Whether it counts dropped packets.
    pub is_drop: bool,
}

/// The answer to [`Route::Stats`](super::Route::Stats).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StatsResponse {
    /// All counters.
    pub counters: Vec<CounterValue>,
}

/// The first message of [`Route::Exec`](super::Route::Exec).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// In which task.
    pub task: TaskId,
    /// What to run.
    pub argv: Vec<String>,
    /// More environment, `NAME=value`.
    pub env: Vec<String>,
    /// The working directory; the task's if `None`.
    pub dir: Option<String>,
    /// A user; the task's if `None`.
    pub user: Option<String>,
    /// With a terminal of this size (columns, rows).
    pub tty: Option<(u16, u16)>,
    /// Whether stdin is connected.
    pub stdin: bool,
}

/// To the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecInput {
    /// Bytes for stdin.
    Stdin(Bytes),
    /// Its end.
    StdinEnd,
    /// The terminal's new size (columns, rows).
    Resize(u16, u16),
    /// A signal, by number.
    Signal(i32),
}

/// From the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecOutput {
    /// It runs.
    Started,
    /// Bytes of stdout (of the terminal, with one).
    Stdout(Bytes),
    /// Bytes of stderr.
    Stderr(Bytes),
    /// It ended: the last message. 128 + n after signal n.
    Exit(i32),
    /// It did not start, or its node lost it: the last message.
    Failed(String),
}

/// [`Route::Logs`](super::Route::Logs): the output of tasks of the node that is asked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LogsRequest {
    /// Whose, and from when on, in nanoseconds since the Unix epoch.
    pub tasks: Vec<(TaskId, i64)>,
    /// Of what is there, only so many last lines of each.
    pub tail: Option<u64>,
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
    /// Go on as more comes, until all of the tasks have ended.
    pub follow: bool,
}

/// Tasks that one [`LogsRequest`] may name: two files of each are open meanwhile.
pub const LOGS_TASKS_MAX: usize = 256;

/// The answers to a [`LogsRequest`]. The stream's end is that of the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogsOutput {
    /// Lines, in the order of their times up to [`LogsOutput::Now`].
    Lines(Vec<LogLine>),
    /// What was there is told; what follows is new.
    Now,
    /// It cannot be read: the last message.
    Failed(String),
}

/// A line of a task's output, or a part of a long one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Whose.
    pub task: TaskId,
    /// Of standard error; else of standard output.
    pub stderr: bool,
    /// When it came, in nanoseconds since the Unix epoch.
    pub at_ns: i64,
    /// With its newline, if it has one.
    pub text: Bytes,
}

/// [`Route::Renew`](super::Route::Renew). Who asks is in the certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// The new key's public half, DER of SubjectPublicKeyInfo.
    pub public_key: Bytes,
    /// Under which number it has a store.
    pub voter: Option<NodeNumber>,
}

/// The answer to a [`RenewRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewResponse {
    /// The role that the certificate says.
    pub role: Role,
    /// Its number among the voters.
    pub voter: NodeNumber,
    /// The certificate, PEM.
    pub cert_pem: String,
}
