//! What crosses the API's socket: requests and answers of the Docker Engine API's swarm part, and
//! of our own additions under `/mesh/`. Plain serde types; absent, null and zero are told apart
//! where Docker's clients do. No types of the store: the daemon converts by hand.
//!
//! Field names are Docker's (`PascalCase`, ids as `ID`), so fields are documented only where the
//! Engine API's own reference does not say it all.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

mod events;
mod limits;
mod network;
mod node;
mod own;
mod service;
mod swarm;
mod system;
mod task;

pub use events::{Actor, Event};
pub use limits::{API_VERSION, BODY_BYTES_MAX, DEFAULT_SOCKET, MIN_API_VERSION};
pub use network::{
    AttachedContainer, ConfigFrom, Ipam, IpamConfig, Network, NetworkCreate, NetworkCreated,
    NetworkPeer, NetworkService, NetworkTask, NetworksPruned,
};
pub use node::{
    EngineDescription, ManagerStatus, Node, NodeDescription, NodeSpec, NodeStatus, Platform,
    Resources, TlsInfo,
};
pub use own::{
    Counter, ExecRequest, Frame, FrameError, FrameKind, GossipKey, NodeStats, Status, StatusNode,
};
pub use service::{
    ContainerSpec, DnsConfig, Endpoint, EndpointSpec, GlobalMode, Limit, NetworkTarget, Placement,
    PlacementPreference, Port, ReplicatedMode, Reservation, ResourceRequirements, RestartPolicy,
    Service, ServiceCreated, ServiceMode, ServiceSpec, ServiceStatus, SpreadOver, TaskTemplate,
    UpdateConfig, UpdateStatus, VirtualIp,
};
pub use swarm::{
    CaConfig, ClusterSpec, Dispatcher, EncryptionConfig, JoinTokens, Orchestration, RaftConfig,
    Swarm, SwarmInit, SwarmJoin,
};
pub use system::{ComponentVersion, Info, RemoteManager, SwarmInfo, VersionInfo};
pub use task::{
    ContainerStatus, IpamOptions, NetworkAttachment, NetworkRef, NetworkRefSpec, Task, TaskStatus,
};

/// Labels and other string maps.
pub type Map = BTreeMap<String, String>;

/// The body of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What failed and what to do.
    pub message: String,
}

/// An object's version: the optimistic lock of updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Version {
    /// To be sent back as `?version=`.
    pub index: u64,
}

/// Whether a value is its type's default: left out of the JSON, as Go's `omitempty` does.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
