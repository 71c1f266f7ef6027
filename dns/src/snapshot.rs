//! What the resolver is told: whole, each time.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use mesh_types::{
    NetworkId, Revision, TaskId,
    record::{EndpointRecord, NetworkRecord, RecordSet, ServiceRecord},
};
use serde::{Deserialize, Serialize};

/// [`Policy::ttl`], if nothing else is set.
pub const TTL_DEFAULT: u32 = 5;
/// [`Policy::rate_limit`], if nothing else is set: a third of what one core answers.
pub const RATE_LIMIT_DEFAULT: u32 = 100_000;

/// All that the resolver knows. Written as JSON, since a resolver may be older or younger than the
/// meshd that talks to it: fields that it does not know are skipped, missing ones are empty.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    /// How far the records are.
    pub revision: Revision,
    /// Networks.
    pub networks: Vec<NetworkRecord>,
    /// Services, once for each network.
    pub services: Vec<ServiceRecord>,
    /// Endpoints.
    pub endpoints: Vec<EndpointRecord>,
    /// The tasks of this node, that ask.
    pub tasks: Vec<TaskView>,
    /// The node's own resolvers, in the order in which they are tried.
    pub upstreams: Vec<SocketAddr>,
    /// How answers are given.
    pub policy: Policy,
}

/// What the operator of the node sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Seconds for which an answer about an internal name may be remembered, the answer that there
    /// is none included (RFC 2308 section 5).
    pub ttl: u32,
    /// Queries a second that are answered to one task; 0: no limit.
    pub rate_limit: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { ttl: TTL_DEFAULT, rate_limit: RATE_LIMIT_DEFAULT }
    }
}

/// A task of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskView {
    /// Which.
    pub task: TaskId,
    /// Its network namespace.
    pub netns: PathBuf,
    /// The overlay networks that it is attached to, in the order of its interfaces.
    pub networks: Vec<NetworkId>,
    /// Whether it may ask for outside names: it has a way out (`gw0`). A task on internal networks
    /// alone must not reach the world through its resolver either (CVE-2024-29018).
    pub forward: bool,
    /// Servers of its own (`--dns`), asked instead of the node's, from its own namespace: they see
    /// what the task could send them itself, and so do internal networks alone.
    #[serde(default)]
    pub servers: Vec<IpAddr>,
}

impl Snapshot {
    /// A snapshot of the records that the node holds.
    #[must_use]
    pub fn new(
        records: &RecordSet,
        tasks: Vec<TaskView>,
        upstreams: Vec<SocketAddr>,
        policy: Policy,
    ) -> Self {
        Self {
            revision: records.revision,
            networks: records.networks.values().cloned().collect(),
            services: records.services.values().cloned().collect(),
            endpoints: records.endpoints.values().cloned().collect(),
            tasks,
            upstreams,
            policy,
        }
    }
}
