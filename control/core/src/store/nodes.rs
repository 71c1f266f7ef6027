//! Nodes: admitted with a number of their own, watched, removed.

use mesh_types::{NodeId, NodeNumber, Revision, TaskId, task::TaskState};

use super::{At, Store};
use crate::{
    command::{NewNode, NodeReport, Outcome, Rejection},
    model::{Node, NodeSpec, NodeState, NodeStatus, Role},
};

/// A node as it is when it is admitted.
pub(super) fn node_of(at: At, new: &NewNode, number: NodeNumber) -> Node {
    Node {
        id: new.id,
        number,
        voter: None,
        meta: at.made(),
        spec: new.spec.clone(),
        description: new.description.clone(),
        address: new.address,
        vtep: new.vtep,
        status: NodeStatus {
            state: NodeState::Unknown,
            message: "not heard of yet".into(),
            lost: false,
        },
        lost_since_ms: None,
    }
}

/// Removed and demoted managers that are remembered. Certificates run out long before so many are.
const REMOVED_MAX: usize = 1024;

impl Store {
    pub(super) fn add_node(&mut self, at: At, new: &NewNode) -> Result<Outcome, Rejection> {
        if self.nodes.contains_key(&new.id) {
            return Err(Rejection::Exists(format!("node {} already exists", new.id)));
        }
        // Frames are taken from a node by the address where its tunnels end: whoever holds a token
        // must not say that it is another one's, which is there.
        let taken = |node: &&Node| {
            node.status.state == NodeState::Ready
                && (node.vtep == new.vtep || node.address.ip() == new.address.ip())
        };
        if let Some(other) = self.nodes.values().find(taken) {
            return Err(Rejection::Precondition(format!(
                "address {} is that of node {} ({}), which is up: if that is this machine as it \
                 was before, wait until it is down, or remove it",
                new.address.ip(),
                other.name(),
                other.id
            )));
        }
        let number = self.lease_number()?;
        self.nodes.insert(new.id, node_of(at, new, number));
        Ok(Outcome::Node(number))
    }

    fn lease_number(&mut self) -> Result<NodeNumber, Rejection> {
        let Some(cluster) = &mut self.cluster else { return Err(no_number()) };
        let number = cluster.next_node;
        cluster.next_node = number.next().ok_or_else(no_number)?;
        Ok(number)
    }

    pub(super) fn update_node(
        &mut self,
        at: At,
        id: NodeId,
        version: Revision,
        spec: &NodeSpec,
    ) -> Result<Outcome, Rejection> {
        let managers = self.managers();
        let node = self.nodes.get(&id).ok_or_else(|| not_found(id))?;
        if node.meta.version != version {
            return Err(Rejection::OutOfSequence);
        }
        if node.spec.role == Role::Manager && spec.role == Role::Worker && managers == 1 {
            return Err(Rejection::Precondition(
                "attempting to demote the last manager of the swarm".into(),
            ));
        }
        let changed = node.spec.role != spec.role;
        let voter = match spec.role {
            Role::Manager if changed => Some(self.lease_number()?),
            Role::Manager | Role::Worker => node.voter,
        };
        if let Some(node) = self.nodes.get_mut(&id) {
            node.spec = spec.clone();
            node.voter = voter;
            at.touch(&mut node.meta);
        }
        if changed {
            self.no_manager(id, spec.role == Role::Worker);
        }
        Ok(Outcome::Done)
    }

    pub(super) fn report_nodes(&mut self, at: At, reports: &[NodeReport]) -> Outcome {
        for report in reports {
            let Some(node) = self.nodes.get_mut(&report.id) else { continue };
            let before = (node.status.clone(), node.description.clone());
            if let Some(status) = &report.status {
                node.status = status.clone();
                node.lost_since_ms = status.lost.then(|| node.lost_since_ms.unwrap_or(at.now_ms));
            }
            if let Some(description) = &report.description {
                node.description = description.clone();
            }
            if before != (node.status.clone(), node.description.clone()) {
                at.touch(&mut node.meta);
            }
        }
        Outcome::Done
    }

    pub(super) fn remove_node(
        &mut self,
        at: At,
        id: NodeId,
        force: bool,
    ) -> Result<Outcome, Rejection> {
        let node = self.nodes.get(&id).ok_or_else(|| not_found(id))?;
        if node.spec.role == Role::Manager && self.managers() == 1 {
            return Err(Rejection::Precondition(format!(
                "node {id} is the last manager of the swarm and can't be removed"
            )));
        }
        if node.spec.role == Role::Manager && !force {
            return Err(Rejection::Precondition(format!(
                "node {id} is a cluster manager and is a member of the raft cluster. It must be \
                 demoted to worker before removal; one that is gone for good can be removed by force"
            )));
        }
        let gone = matches!(node.status.state, NodeState::Down | NodeState::Disconnected);
        if !gone && !force {
            return Err(Rejection::Precondition(format!(
                "node {id} is not down and can't be removed"
            )));
        }
        let why = format!("node {} was removed from the cluster", node.name());
        let orphans: Vec<TaskId> = self
            .tasks
            .values()
            .filter(|task| task.node == Some(id) && !task.status.state.is_final())
            .map(|task| task.id)
            .collect();
        for task in orphans {
            self.conclude(at, task, TaskState::Orphaned, &why);
        }
        self.local_gateways.remove(&id);
        if self.nodes.remove(&id).is_some_and(|node| node.spec.role == Role::Manager) {
            self.no_manager(id, true);
        }
        Ok(Outcome::Done)
    }

    /// Remembers that a node is a manager no more, or forgets that.
    fn no_manager(&mut self, id: NodeId, so: bool) {
        let Some(cluster) = &mut self.cluster else { return };
        cluster.removed_managers.retain(|removed| *removed != id);
        if so {
            let excess = (cluster.removed_managers.len() + 1).saturating_sub(REMOVED_MAX);
            cluster.removed_managers.drain(..excess);
            cluster.removed_managers.push(id);
        }
    }

    /// Whether a node is a manager, or may be one that this store has not heard of yet: what is old
    /// may be this view.
    #[must_use]
    pub fn may_be_manager(&self, id: NodeId) -> bool {
        match self.nodes.get(&id) {
            Some(node) => node.spec.role == Role::Manager,
            None => !self.cluster.as_ref().is_some_and(|c| c.removed_managers.contains(&id)),
        }
    }

    fn managers(&self) -> usize {
        self.nodes.values().filter(|node| node.spec.role == Role::Manager).count()
    }
}

fn not_found(id: NodeId) -> Rejection {
    Rejection::NotFound(format!("node {id} not found"))
}

fn no_number() -> Rejection {
    Rejection::Exhausted("no node number is left".into())
}
