//! What the resolver is told: whole, each time.

use std::{net::SocketAddr, path::PathBuf};

use mesh_types::{
    NetworkId, Revision, TaskId,
    record::{EndpointRecord, NetworkRecord, RecordSet, ServiceRecord},
};
use serde::{Deserialize, Serialize};

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
}

impl Snapshot {
    /// A snapshot of the records that the node holds.
    #[must_use]
    pub fn new(records: &RecordSet, tasks: Vec<TaskView>, upstreams: Vec<SocketAddr>) -> Self {
        Self {
            revision: records.revision,
            networks: records.networks.values().cloned().collect(),
            services: records.services.values().cloned().collect(),
            endpoints: records.endpoints.values().cloned().collect(),
            tasks,
            upstreams,
        }
    }
}
