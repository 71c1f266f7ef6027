//! Task states, leases, and what a manager tells a node to run.

use core::time::Duration;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{
    ids::{EndpointId, NetworkId, NodeId, ServiceId, TaskId, Vni},
    mac::Mac,
    net::{Mtu, Protocol},
    record::Address,
    spec::TaskSpec,
};

/// The life of a task. It only ever goes up (a Lamport clock, as in Swarm): a later report with a
/// lower state is stale and dropped.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Made; leases still missing.
    #[default]
    New,
    /// Leases held; waiting for a node.
    Pending,
    /// A node is chosen.
    Assigned,
    /// The node knows of it.
    Accepted,
    /// The node makes its namespaces and interfaces.
    Preparing,
    /// Everything stands but the process.
    Ready,
    /// The process starts.
    Starting,
    /// It runs.
    Running,
    /// It ended by itself with status 0.
    Complete,
    /// It was asked to end, and did.
    Shutdown,
    /// It ended by itself with an error.
    Failed,
    /// It could not be prepared.
    Rejected,
    /// As a desired state: end it, then forget it.
    Remove,
    /// Its node is lost for good.
    Orphaned,
}

impl TaskState {
    /// As users read it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Pending => "pending",
            Self::Assigned => "assigned",
            Self::Accepted => "accepted",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Shutdown => "shutdown",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::Remove => "remove",
            Self::Orphaned => "orphaned",
        }
    }

    /// Nothing follows: the process is gone and the leases can be given back.
    #[must_use]
    pub fn is_final(self) -> bool {
        self > Self::Running
    }
}

/// What is known of a task from its node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TaskStatus {
    /// How far it is.
    pub state: TaskState,
    /// When that was reported, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// What happens now, in a few words (`started`, `preparing network`). Never empty for a state
    /// that is not final.
    pub message: String,
    /// Why it waits or failed; empty when all is well.
    pub err: String,
    /// Its process id on the node, while it runs.
    pub pid: Option<u32>,
    /// Its exit status, once it ended (128 + n: killed by signal n).
    pub exit_code: Option<i32>,
}

/// The lease of one interface, made in the transaction that needed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointLease {
    /// Names the MAC too.
    pub endpoint: EndpointId,
    /// What the interface is for, and so its name.
    pub kind: InterfaceKind,
    /// The address with its prefix length.
    pub address: Address,
}

impl EndpointLease {
    /// The interface's MAC.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.endpoint.into()
    }
}

/// What an interface of a task is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum InterfaceKind {
    /// `eth<index>` on an overlay network.
    Overlay {
        /// Which network.
        network: NetworkId,
        /// The position in the service's list of networks.
        index: u8,
    },
    /// `gw0` with an address of the ingress network: published traffic arrives here.
    IngressGateway {
        /// The ingress network.
        network: NetworkId,
    },
    /// `gw0` with an address of the node-local range: the way out alone.
    LocalGateway,
}

impl InterfaceKind {
    /// The interface's name inside the task.
    #[must_use]
    pub fn ifname(self) -> String {
        match self {
            Self::Overlay { index, .. } => format!("eth{index}"),
            Self::IngressGateway { .. } | Self::LocalGateway => "gw0".to_owned(),
        }
    }

    /// The network whose addresses it uses, if it is not node-local.
    #[must_use]
    pub fn network(self) -> Option<NetworkId> {
        match self {
            Self::Overlay { network, .. } | Self::IngressGateway { network } => Some(network),
            Self::LocalGateway => None,
        }
    }
}

/// A task as its node is told to run it. A node always gets its whole set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskAssignment {
    /// The task.
    pub id: TaskId,
    /// `<service>.<slot>.<task id>`; for global services the node id stands for the slot.
    pub name: String,
    /// Its service.
    pub service: ServiceId,
    /// Its service's name.
    pub service_name: String,
    /// Its slot; `None` for global services.
    pub slot: Option<u64>,
    /// The node.
    pub node: NodeId,
    /// What to run.
    pub spec: TaskSpec,
    /// Its interfaces.
    pub leases: Vec<EndpointLease>,
    /// How far it should go: `Ready`, `Running`, `Shutdown` or `Remove`. A task that is to end
    /// stays at `Running` here until the nodes that balance to it have applied its draining.
    pub desired: TaskState,
    /// How long its open connections may take to end before it is told to stop.
    #[serde(default)]
    pub drain: Duration,
    /// The ports that its service publishes, as the task listens on them: it counts as running once
    /// it does.
    #[serde(default)]
    pub ports: Vec<(Protocol, u16)>,
}

/// All that the data plane needs to plug one interface into a network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceSpec {
    /// Names the MAC and the host side's link.
    pub endpoint: EndpointId,
    /// Name inside the namespace.
    pub ifname: String,
    /// Address and prefix length.
    pub address: Address,
    /// Overlay or ingress VNI; `None` on a node-local `gw0`.
    pub vni: Option<Vni>,
    /// The gateway's address on this interface.
    pub gateway: IpAddr,
    /// Whether the default route leaves here (`gw0` alone).
    pub default_route: bool,
    /// Packet size.
    pub mtu: Mtu,
}
