//! The store: objects by id, and the deterministic function that applies a proposal.
//!
//! Every command is applied in two steps: look (everything that can be refused is, leases are
//! chosen but not taken), then write (nothing can fail any more). So a rejected proposal leaves no
//! trace. Each object that a command changes gets the log index as its version: [`crate::stream`]
//! relies on that.

mod cluster;
mod keys;
pub mod leases;
mod names;
mod networks;
mod nodes;
mod services;
pub mod subnets;
mod tasks;

use std::{collections::BTreeMap, net::IpAddr};

use mesh_types::{NetworkId, NodeId, Revision, ServiceId, TaskId};
use serde::{Deserialize, Serialize};

use crate::{
    command::{Command, Outcome, Proposal, Rejection},
    model::{Cluster, Meta, Network, Node, Service, Task},
};

pub use subnets::{NODE_LOCAL_GATEWAY, NODE_LOCAL_RANGE};

/// The first and last port that are leased to services that leave the published port open.
pub const LEASED_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

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

/// When a proposal is applied: the log index and the proposer's clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At {
    pub(crate) revision: Revision,
    pub(crate) now_ms: u64,
}

impl At {
    pub(crate) fn made(self) -> Meta {
        Meta { version: self.revision, created_ms: self.now_ms, updated_ms: self.now_ms }
    }

    pub(crate) fn touch(self, meta: &mut Meta) {
        meta.version = self.revision;
        meta.updated_ms = self.now_ms;
    }
}

impl Store {
    /// Applies one log entry. All or nothing: a rejected proposal leaves the objects untouched (the
    /// revision moves on all the same).
    ///
    /// # Errors
    /// [`Rejection`], equal on every manager.
    pub fn apply(&mut self, revision: Revision, proposal: &Proposal) -> Result<Outcome, Rejection> {
        self.revision = revision;
        let at = At { revision, now_ms: proposal.now_ms };
        if let Command::Init(init) = &proposal.command {
            return self.init(at, init);
        }
        if self.cluster.is_none() {
            return Err(Rejection::Precondition(
                "the cluster is not initialised yet: `swarm init` comes first".into(),
            ));
        }
        match &proposal.command {
            Command::Init(_) => unreachable!("handled above"),
            Command::AddNode(node) => self.add_node(at, node),
            Command::UpdateNode { id, version, spec } => self.update_node(at, *id, *version, spec),
            Command::ReportNodes(reports) => Ok(self.report_nodes(at, reports)),
            Command::RemoveNode { id, force } => self.remove_node(at, *id, *force),
            Command::CreateNetwork { id, spec } => self.create_network(at, *id, spec),
            Command::RemoveNetwork { id } => self.remove_network(*id),
            Command::CreateService { id, spec } => self.create_service(at, *id, spec),
            Command::UpdateService { id, version, spec } => {
                self.update_service(at, *id, *version, spec)
            }
            Command::RollBackService { id, version } => self.roll_back_service(at, *id, *version),
            Command::RemoveService { id } => self.remove_service(at, *id),
            Command::ChangeTasks(changes) => {
                for change in changes {
                    self.change_task(at, change);
                }
                Ok(Outcome::Done)
            }
            Command::ReportTasks { node, statuses } => {
                self.report_tasks(at, *node, statuses);
                Ok(Outcome::Done)
            }
            Command::UpdateCluster { version, spec } => self.update_cluster(at, *version, spec),
            Command::RotateToken { role, secret } => self.rotate_token(at, *role, *secret),
            Command::RotateCa { forced, rotation } => self.rotate_ca(at, *forced, rotation),
            Command::FinishCaRotation { id } => Ok(self.finish_ca_rotation(at, id)),
            Command::RotateGossipKey { key } => self.rotate_gossip_key(at, *key),
            Command::AdvanceGossipKey { epoch, in_use } => {
                Ok(self.advance_gossip_key(at, *epoch, *in_use))
            }
        }
    }

    /// The ingress network.
    #[must_use]
    pub fn ingress(&self) -> Option<&Network> {
        self.networks.values().find(|network| network.spec.ingress)
    }

    /// A node's name as people know it: the one given, else its host name.
    #[must_use]
    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| id.to_string(), |node| node.name().to_owned())
    }
}

impl Node {
    /// The name given by the operator, else the host name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.spec.name.as_deref().unwrap_or(&self.description.hostname)
    }
}

#[cfg(test)]
pub(crate) mod tests;
