//! The store: objects by id, and the deterministic function that applies a proposal.

use std::{
    collections::BTreeMap,
    net::IpAddr,
};

use mesh_types::{NetworkId, NodeId, Revision, ServiceId, TaskId};
use serde::{Deserialize, Serialize};

use crate::{
    command::{Outcome, Proposal, Rejection},
    model::{Cluster, Network, Node, Service, Task},
};

/// All objects. Serialised whole as a raft snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Store {
    /// The log index of the last entry applied.
    pub revision: Revision,
    /// The cluster, once initialised.
    pub cluster: Option<Cluster>,
    /// Nodes.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Networks.
    pub networks: BTreeMap<NetworkId, Network>,
    /// Services.
    pub services: BTreeMap<ServiceId, Service>,
    /// Tasks.
    pub tasks: BTreeMap<TaskId, Task>,
    /// Node-local `gw0` addresses in use, by node.
    pub local_gateways: BTreeMap<NodeId, BTreeMap<IpAddr, TaskId>>,
}

impl Store {
    /// Applies one log entry. All or nothing: a rejected proposal leaves the objects untouched (the
    /// revision moves on all the same).
    ///
    /// # Errors
    /// [`Rejection`], equal on every manager.
    pub fn apply(&mut self, revision: Revision, proposal: &Proposal) -> Result<Outcome, Rejection> {
        let _ = (revision, proposal);
        Err(Rejection::Precondition("not implemented yet".into()))
    }
}
