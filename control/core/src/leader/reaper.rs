//! Forgets tasks that are over: all that were to be removed, those of services and slots that are
//! gone, and the oldest beyond the history that each place keeps.

use std::collections::BTreeMap;

use mesh_types::{ServiceId, task::TaskState};

use super::view::{Place, Places, Round, occupant};
use crate::{command::TaskChange, model::Task};

pub(super) fn plan(round: &mut Round<'_>, all: &BTreeMap<ServiceId, Places<'_>>) {
    let history = round.store.cluster.as_ref().map_or(0, |cluster| cluster.spec.task_history);
    let history = usize::try_from(history).unwrap_or(usize::MAX);
    for (service, places) in all {
        let known = round.store.services.contains_key(service);
        for (place, tasks) in places {
            let keep = if known && !vacant(round, *place, tasks) { history } else { 0 };
            let current = occupant(tasks).filter(|_| known).map(|task| task.id);
            let ended: Vec<&Task> = tasks
                .iter()
                .filter(|task| task.status.state.is_final() && Some(task.id) != current)
                .copied()
                .collect();
            let excess = ended.len().saturating_sub(keep);
            for (index, task) in ended.iter().enumerate() {
                if index < excess || task.desired == TaskState::Remove {
                    round.push(TaskChange::Delete { id: task.id });
                }
            }
        }
    }
}

/// A slot given up by scaling down, or a node that is gone, has nobody to show a history for.
fn vacant(round: &Round<'_>, place: Place, tasks: &[&Task]) -> bool {
    match place {
        Place::Slot(_) => occupant(tasks).is_none(),
        Place::Node(node) => !round.store.nodes.contains_key(&node),
    }
}
