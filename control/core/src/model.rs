//! The objects of the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnetwork::IpNetwork;
use mesh_types::{
    ClusterId, EndpointId, Epoch, NetworkId, NodeId, NodeNumber, Revision, ServiceId, TaskId, Vni,
    resources::Amount,
    spec::{
        Constraint, ConstraintKey, Labels, NetworkAttachment, NetworkSpec, PortSpec, ServiceSpec,
        TaskSpec, UpdatePolicy,
    },
    task::{EndpointLease, TaskState, TaskStatus},
};
use serde::{Deserialize, Serialize};

/// What every object has. Times are milliseconds since the Unix epoch, as the proposer saw them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Meta {
    /// The revision of the last change: the optimistic lock of updates.
    pub version: Revision,
    /// When it was made.
    pub created_ms: u64,
    /// When it was last changed.
    pub updated_ms: u64,
}

/// The cluster itself: one object, made by `swarm init`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its id.
    pub id: ClusterId,
    /// Version and times.
    pub meta: Meta,
    /// What the operator set.
    pub spec: ClusterSpec,
    /// The root certificate, PEM.
    pub ca_cert_pem: String,
    /// The root key, PEM (PKCS #8). The log is sealed at rest.
    pub ca_key_pem: String,
    /// The secret of the worker token.
    pub worker_secret: [u8; 16],
    /// The secret of the manager token.
    pub manager_secret: [u8; 16],
    /// The digest of the root certificate, once it was changed.
    #[serde(default)]
    pub ca_id: Option<RootId>,
    /// Another root that is to take its place.
    #[serde(default)]
    pub ca_rotation: Option<Box<CaRotation>>,
    /// How often another root was asked for.
    #[serde(default)]
    pub ca_forced: u64,
    /// Seals gossip datagrams.
    pub gossip_key: [u8; 32],
    /// The generation of that key.
    #[serde(default = "GossipKeys::first")]
    pub gossip_epoch: Epoch,
    /// The key that is to take its place.
    #[serde(default)]
    pub gossip_next: Option<NextGossipKey>,
    /// The next endpoint id to lease. Never goes back.
    pub next_endpoint: EndpointId,
    /// The next node number to lease. Never goes back.
    pub next_node: NodeNumber,
    /// The next VNI to lease (wraps, skipping those in use).
    pub next_vni: Vni,
    /// Managers that were removed or demoted, the oldest first. Their certificates are good for a
    /// while, their word in raft is not.
    #[serde(default)]
    pub removed_managers: Vec<NodeId>,
}

impl Cluster {
    /// The roots that nodes trust, PEM; the last one signs their certificates.
    #[must_use]
    pub fn roots(&self) -> Vec<&str> {
        let next = self.ca_rotation.iter().map(|rotation| rotation.cert_pem.as_str());
        std::iter::once(self.ca_cert_pem.as_str()).chain(next).collect()
    }

    /// The keys of gossip.
    #[must_use]
    pub fn gossip_keys(&self) -> GossipKeys {
        GossipKeys { key: self.gossip_key, epoch: self.gossip_epoch, next: self.gossip_next }
    }
}

/// SHA-256 of a root certificate (DER).
pub type RootId = [u8; 32];

/// Another root certificate on its way. Until every node has a certificate of it, both are trusted,
/// and certificates that the new one signed come with the new one's key signed by the old root: so
/// who has not heard of the new one yet trusts them too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaRotation {
    /// The new root.
    pub id: RootId,
    /// Its certificate, PEM.
    pub cert_pem: String,
    /// Its key, PEM (PKCS #8).
    pub key_pem: String,
    /// Its key, signed by the root that it replaces, PEM.
    pub cross_pem: String,
    /// That root, PEM.
    pub replaces: String,
    /// When it began, by its proposer's clock.
    pub started_ms: u64,
}

/// The keys of gossip: the one of this epoch, and the one of the next that is to take its place.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GossipKeys {
    /// The key.
    #[serde(rename = "gossip_key")]
    pub key: [u8; 32],
    /// Its generation.
    #[serde(rename = "gossip_epoch", default = "GossipKeys::first")]
    pub epoch: Epoch,
    /// Its successor.
    #[serde(rename = "gossip_next", default)]
    pub next: Option<NextGossipKey>,
}

/// A key of gossip on its way: every node opens with it before one seals with it, and all seal with
/// it before the old one is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextGossipKey {
    /// The key.
    pub key: [u8; 32],
    /// All nodes hold it: it seals.
    pub in_use: bool,
}

impl GossipKeys {
    /// The first generation.
    #[must_use]
    pub fn first() -> Epoch {
        Epoch::MIN
    }

    /// The generation of the next key.
    #[must_use]
    pub fn next_epoch(&self) -> Epoch {
        self.epoch.next().unwrap_or(Epoch::MIN)
    }

    /// The generation that seals.
    #[must_use]
    pub fn sealing(&self) -> Epoch {
        if self.next.is_some_and(|next| next.in_use) { self.next_epoch() } else { self.epoch }
    }
}

impl std::fmt::Debug for GossipKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the keys.
        f.debug_struct("GossipKeys").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for NextGossipKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NextGossipKey").field("in_use", &self.in_use).finish_non_exhaustive()
    }
}

/// How far a node is with the cluster's keys, by its own word.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeKeys {
    /// The root that signed its certificate.
    pub issuer: Option<RootId>,
    /// The roots that it trusts.
    pub trusts: BTreeSet<RootId>,
    /// Generations of the gossip key that it opens.
    pub opens: BTreeSet<Epoch>,
    /// The generation that it seals with.
    pub seals: Option<Epoch>,
}

/// What the operator set for the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSpec {
    /// User labels.
    pub labels: Labels,
    /// Subnets of networks are leased from these.
    pub address_pools: Vec<IpNetwork>,
    /// The prefix length of a leased subnet.
    pub subnet_len: u8,
    /// VXLAN's UDP port, 1024–49151.
    pub data_path_port: u16,
    /// Ended tasks kept per slot.
    pub task_history: u32,
    /// Life of a node certificate, seconds.
    pub certificate_secs: u64,
    /// How long a node must be silent, its data path too, before its tasks are replaced, seconds.
    pub reschedule_after_secs: u64,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            labels: Labels::new(),
            // Swarm's default pool; 10.0.0.0/24 becomes the ingress network, as there.
            address_pools: vec![
                IpNetwork::new(IpAddr::from([10, 0, 0, 0]), 8)
                    .unwrap_or_else(|_| unreachable!("10.0.0.0/8 is a network")),
            ],
            subnet_len: 24,
            data_path_port: 4789,
            task_history: 5,
            certificate_secs: 90 * 24 * 3600,
            reschedule_after_secs: 15,
        }
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its number.
    pub number: NodeNumber,
    /// Its number among the voters, if that is another one: see [`Node::voter`].
    #[serde(default)]
    pub voter: Option<NodeNumber>,
    /// Version and times.
    pub meta: Meta,
    /// What the operator set.
    pub spec: NodeSpec,
    /// What the node says of itself.
    pub description: NodeDescription,
    /// Where managers (port 2377) and other nodes (7946) reach it: the advertised address.
    pub address: SocketAddr,
    /// Where its tunnels end.
    pub vtep: IpAddr,
    /// Whether it is alive, as the leader sees it.
    pub status: NodeStatus,
    /// Since when it is lost, ms since the epoch.
    pub lost_since_ms: Option<u64>,
}

impl Node {
    /// Its number among the voters. A new one each time that it becomes a manager again: it reads
    /// the log from its start, and must not find itself among the voters of that time.
    #[must_use]
    pub fn voter(&self) -> NodeNumber {
        self.voter.unwrap_or(self.number)
    }

    /// Its daemon is not heard, or left: it can neither be told nor tell anything.
    #[must_use]
    pub fn is_down(&self) -> bool {
        matches!(self.status.state, NodeState::Down | NodeState::Disconnected)
    }

    /// What its tasks can have of it.
    #[must_use]
    pub fn capacity(&self) -> Amount {
        let NodeDescription { nano_cpus, memory_bytes, .. } = self.description;
        Amount { nano_cpus, memory_bytes }
    }

    /// Whether all of these hold for it.
    #[must_use]
    pub fn satisfies(&self, constraints: &[Constraint]) -> bool {
        constraints.iter().all(|constraint| {
            let value = constraint.value.as_str();
            let same = match &constraint.key {
                ConstraintKey::Id => self.id.to_string() == value,
                ConstraintKey::Hostname => self.description.hostname.eq_ignore_ascii_case(value),
                ConstraintKey::Role => self.spec.role.name().eq_ignore_ascii_case(value),
                ConstraintKey::Label(label) => {
                    self.spec.labels.get(label).map_or("", String::as_str) == value
                }
            };
            same == constraint.equal
        })
    }
}

/// What the operator set for a node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeSpec {
    /// An optional name that wins over the host name.
    pub name: Option<String>,
    /// User labels.
    pub labels: Labels,
    /// Manager or worker.
    pub role: Role,
    /// Whether it takes tasks.
    pub availability: Availability,
}

/// A node's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs tasks.
    #[default]
    Worker,
    /// Holds the store too.
    Manager,
}

impl Role {
    /// As users write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Manager => "manager",
        }
    }
}

/// Whether a node takes tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Availability {
    /// Takes new tasks.
    #[default]
    Active,
    /// Keeps what it has, takes no more.
    Pause,
    /// Has its tasks moved away.
    Drain,
}

impl Availability {
    /// As users write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Pause => "pause",
            Self::Drain => "drain",
        }
    }
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeDescription {
    /// Host name.
    pub hostname: String,
    /// `x86_64`.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// Version of meshd.
    pub engine_version: String,
    /// CPUs in billionths.
    pub nano_cpus: u64,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Addresses and routes of the host that are none of ours: no subnet may overlap them.
    pub host_routes: BTreeSet<IpNetwork>,
    /// The cluster's keys that it holds.
    #[serde(default)]
    pub keys: NodeKeys,
}

impl NodeDescription {
    /// Whether it is within what a node may say of itself: every manager keeps it, and every change
    /// of it.
    ///
    /// # Errors
    /// What is too long, for people.
    pub fn check(&self) -> Result<(), String> {
        const TEXT_MAX: usize = 256;
        const ROUTES_MAX: usize = 16_384;
        const KEYS_MAX: usize = 16;
        let Self { hostname, architecture, os, engine_version, host_routes, keys, .. } = self;
        let texts = [
            ("host name", hostname),
            ("architecture", architecture),
            ("operating system", os),
            ("version", engine_version),
        ];
        if let Some((what, _)) = texts.iter().find(|(_, text)| text.len() > TEXT_MAX) {
            return Err(format!("the node's {what} is longer than {TEXT_MAX} bytes"));
        }
        if host_routes.len() > ROUTES_MAX {
            return Err(format!(
                "the node has {} addresses and routes of its own; subnets can be kept apart from \
                 {ROUTES_MAX} at most",
                host_routes.len()
            ));
        }
        if keys.trusts.len().max(keys.opens.len()) > KEYS_MAX {
            return Err(format!("the node says that it holds more than {KEYS_MAX} keys"));
        }
        Ok(())
    }
}

/// Whether a node is alive.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The verdict.
    pub state: NodeState,
    /// Why it is not ready.
    pub message: String,
    /// Neither its daemon nor its data path was heard for [`ClusterSpec::reschedule_after_secs`]:
    /// its tasks are replaced. (A node whose daemon alone is silent is down, and keeps its tasks.)
    pub lost: bool,
}

/// The leader's verdict about a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Never heard of since the leader changed.
    #[default]
    Unknown,
    /// Missed its heartbeats.
    Down,
    /// Has a session.
    Ready,
    /// Left.
    Disconnected,
}

impl NodeState {
    /// As users write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Down => "down",
            Self::Ready => "ready",
            Self::Disconnected => "disconnected",
        }
    }
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Version and times.
    pub meta: Meta,
    /// What the user asked for.
    pub spec: NetworkSpec,
    /// Leased.
    pub vni: Vni,
    /// Given or leased.
    pub subnet: IpNetwork,
    /// Given or the first host.
    pub gateway: IpAddr,
    /// Who holds which address. One owner each, by construction.
    pub leases: BTreeMap<IpAddr, Holder>,
    /// Where the next search for a free address begins, so that addresses are reused late.
    pub cursor: u128,
}

/// Who holds an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Holder {
    /// The network's gateway.
    Gateway,
    /// A service's VIP.
    Vip(ServiceId),
    /// An interface of a task.
    Endpoint(TaskId, EndpointId),
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its id.
    pub id: ServiceId,
    /// Version and times.
    pub meta: Meta,
    /// What the user asked for.
    pub spec: ServiceSpec,
    /// Revision at which `spec.task` or `spec.networks` last changed: tasks made from an older one
    /// are out of date.
    pub spec_version: Revision,
    /// The spec before the last update.
    pub previous_spec: Option<Box<ServiceSpec>>,
    /// VIPs, in the order of `spec.networks` (and the ingress network when ports are published).
    pub vips: Vec<(NetworkId, IpAddr)>,
    /// Published ports with the leased ones filled in.
    pub ports: Vec<PortSpec>,
    /// Removed by the user: its tasks are being ended.
    pub removing: bool,
    /// How its last update or rollback goes or went.
    pub update: Option<UpdateStatus>,
    /// The places whose new task ended too early in that update, one task each.
    pub update_failures: Vec<UpdateFailure>,
}

impl Service {
    /// Whether a task would be made differently today. A spec that came back is not out of date.
    #[must_use]
    pub fn outdates(&self, task: &Task) -> bool {
        task.spec_version != self.spec_version
            && (task.spec != self.spec.task
                || task.networks != self.spec.networks
                || task.published == self.ports.is_empty())
    }

    /// Whether tasks are being replaced, and by which policy.
    #[must_use]
    pub fn rolls(&self) -> Option<(UpdateState, &UpdatePolicy)> {
        match self.update.as_ref()?.state {
            state @ UpdateState::Updating => Some((state, &self.spec.update)),
            state @ UpdateState::RollbackStarted => Some((state, &self.spec.rollback)),
            UpdateState::Paused
            | UpdateState::Completed
            | UpdateState::RollbackPaused
            | UpdateState::RollbackCompleted => None,
        }
    }
}

/// A new task that ended before its update's monitoring was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateFailure {
    /// The task.
    pub task: TaskId,
    /// Its slot, or nothing for a global service.
    pub slot: Option<u64>,
    /// Its node, for a global service.
    pub node: Option<NodeId>,
}

/// How an update goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateStatus {
    /// How far it is.
    pub state: UpdateState,
    /// When it began, ms since the epoch.
    pub started_ms: u64,
    /// When it ended, if it did.
    pub completed_ms: Option<u64>,
    /// For people.
    pub message: String,
}

/// How far an update is; the names are Docker's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateState {
    /// Tasks are being replaced.
    Updating,
    /// Too many new tasks failed; it waits for the user.
    Paused,
    /// All tasks are of the new spec.
    Completed,
    /// Tasks go back to the spec before.
    RollbackStarted,
    /// Too many tasks of the way back failed.
    RollbackPaused,
    /// All tasks are of the spec before again.
    RollbackCompleted,
}

impl UpdateState {
    /// As users write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Updating => "updating",
            Self::Paused => "paused",
            Self::Completed => "completed",
            Self::RollbackStarted => "rollback_started",
            Self::RollbackPaused => "rollback_paused",
            Self::RollbackCompleted => "rollback_completed",
        }
    }
}

/// A task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id.
    pub id: TaskId,
    /// Version and times.
    pub meta: Meta,
    /// Its service.
    pub service: ServiceId,
    /// Its service's name when it was made.
    pub service_name: String,
    /// Its slot; `None` for global services.
    pub slot: Option<u64>,
    /// Its node; for global services from the start.
    pub node: Option<NodeId>,
    /// [`Service::spec_version`] that it was made from.
    pub spec_version: Revision,
    /// What it runs.
    pub spec: TaskSpec,
    /// The networks that it joins.
    pub networks: Vec<NetworkAttachment>,
    /// Whether its service publishes ports.
    pub published: bool,
    /// Its interfaces; empty while `New` and once given back.
    pub leases: Vec<EndpointLease>,
    /// How far it should go. Written by managers alone.
    pub desired: TaskState,
    /// How far it is. Written from its node's reports, and by managers before a node has it.
    pub status: TaskStatus,
    /// With desired `Ready`: when to go on to `Running` (the restart delay), ms since the epoch.
    pub start_at_ms: Option<u64>,
    /// States that it went through and when (ms), newest last; for `service ps` and `doctor`.
    pub history: Vec<(TaskState, u64)>,
    /// The log index that made it: orders the tasks of a place, whatever the proposers' clocks.
    pub made: Revision,
    /// How many restarts of its place by the restart policy led to it, within the policy's window.
    pub attempts: u64,
    /// When that count began, ms since the epoch.
    pub attempts_since_ms: u64,
    /// How far its end is on its way to its node.
    pub stop: Stop,
    /// The revision, and ms since the epoch, at which it was first known to run.
    pub running: Option<(Revision, u64)>,
    /// The task of its place that it was made beside, to take over from it (start first).
    pub replaces: Option<TaskId>,
}

/// How a task is ended without losing a connection: first it takes no new ones anywhere, then its
/// node is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Stop {
    /// It should run.
    #[default]
    No,
    /// Its endpoints are draining; the nodes may not all know yet, so its process goes on.
    Draining {
        /// Since this revision.
        at: Revision,
        /// And this time, ms since the epoch.
        since_ms: u64,
    },
    /// Its node is told.
    Released,
}

impl Task {
    /// `<service>.<slot>.<task id>`; the node id stands for the slot of a global service's task.
    #[must_use]
    pub fn name(&self) -> String {
        match (self.slot, self.node) {
            (Some(slot), _) => format!("{}.{}.{}", self.service_name, slot, self.id),
            (None, Some(node)) => format!("{}.{}.{}", self.service_name, node, self.id),
            (None, None) => format!("{}.{}", self.service_name, self.id),
        }
    }
}
