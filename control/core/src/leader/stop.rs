//! Lets tasks end that nobody balances to any more, and gives up those of nodes lost for long.

use mesh_types::task::TaskState;

use super::view::Round;
use crate::{
    command::TaskChange,
    model::{Stop, Task},
};

/// Tasks of a node that is lost for this long are orphaned, and their leases given back (Swarm's
/// number).
const ORPHAN_AFTER_MS: u64 = 24 * 60 * 60 * 1000;

pub(super) fn plan(round: &mut Round<'_>) {
    for task in round.store.tasks.values().filter(|task| !task.status.state.is_final()) {
        if let Stop::Draining { at, since_ms } = task.stop
            && (!serves_on(round, task) || round.known(at, since_ms))
        {
            round.push(TaskChange::Release { id: task.id });
        }
        orphan(round, task);
    }
}

/// Whether a draining task may still have connections.
fn serves_on(round: &Round<'_>, task: &Task) -> bool {
    round.store.services.contains_key(&task.service)
        && task.node.is_some_and(|node| !round.lost(node))
}

fn orphan(round: &mut Round<'_>, task: &Task) {
    let placed = task.node.filter(|_| task.status.state >= TaskState::Assigned);
    let Some(node) = placed.and_then(|node| round.store.nodes.get(&node)) else { return };
    let Some(since_ms) = node.lost_since_ms else { return };
    let deadline = since_ms.saturating_add(ORPHAN_AFTER_MS);
    if round.now_ms >= deadline {
        let err = format!("node {} is lost for 24 hours", node.name());
        round.push(TaskChange::Conclude { id: task.id, state: TaskState::Orphaned, err });
    } else {
        round.wake(deadline);
    }
}
