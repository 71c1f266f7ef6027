//! What nodes have left: all they have, less what is reserved for the tasks that they have not
//! reported the end of. What tasks really take is not counted.

use std::collections::BTreeMap;

use mesh_types::{NodeId, resources::Amount, task::TaskState};

use crate::{
    model::{Node, Task},
    store::Store,
};

/// The node that a task burdens.
pub(super) fn placed(task: &Task) -> Option<NodeId> {
    let counts = task.status.state >= TaskState::Assigned && !task.status.state.is_final();
    task.node.filter(|_| counts)
}

/// What each node has left.
#[derive(Debug, Clone)]
pub(super) struct Room(BTreeMap<NodeId, Amount>);

impl Room {
    pub(super) fn of(store: &Store) -> Self {
        let mut room = Self(store.nodes.values().map(|node| (node.id, node.capacity())).collect());
        for task in store.tasks.values() {
            if let Some(node) = placed(task) {
                room.take(node, task.spec.resources.reserved);
            }
        }
        room
    }

    /// Reserves something on a node.
    pub(super) fn take(&mut self, node: NodeId, wanted: Amount) {
        if let Some(free) = self.0.get_mut(&node) {
            *free = free.minus(wanted);
        }
    }

    /// What a node has too little of, for people. Nothing is wanted of it: nothing is lacking.
    pub(super) fn lacks(&self, node: NodeId, wanted: Amount) -> Option<&'static str> {
        lacking(self.free(node), wanted)
    }

    /// Whether a node would do for `wanted` if `without` were given back.
    pub(super) fn would_do(&self, node: &Node, wanted: Amount, without: Amount) -> bool {
        // Not more than there is, if more is reserved than that.
        let free = self.free(node.id).plus(without);
        lacking(free.min(node.capacity()), wanted).is_none()
    }

    fn free(&self, node: NodeId) -> Amount {
        self.0.get(&node).copied().unwrap_or_default()
    }
}

fn lacking(free: Amount, wanted: Amount) -> Option<&'static str> {
    let cpus = free.nano_cpus < wanted.nano_cpus;
    let memory = free.memory_bytes < wanted.memory_bytes;
    match (cpus, memory) {
        (false, false) => None,
        (true, false) => Some("CPUs"),
        (false, true) => Some("memory"),
        (true, true) => Some("CPUs and memory"),
    }
}
