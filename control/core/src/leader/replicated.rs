//! Replicated services: a number of slots, each with one task.

use std::collections::BTreeMap;

use mesh_types::{NodeId, task::TaskState};

use super::{
    restart,
    update::{self, Standings},
    view::{Place, Places, Round, occupant},
};
use crate::model::{Service, Task};

pub(super) fn plan(round: &mut Round<'_>, service: &Service, places: &Places<'_>, replicas: u64) {
    let mut slots: BTreeMap<u64, &Task> = BTreeMap::new();
    for (place, tasks) in places {
        if let (Place::Slot(slot), Some(task)) = (place, update::serving(tasks)) {
            slots.insert(*slot, task);
        }
    }
    let replicas = usize::try_from(replicas).unwrap_or(usize::MAX);
    for slot in surplus(round, &slots, replicas) {
        slots.remove(&slot);
        let tasks = places.get(&Place::Slot(slot)).map_or(&[][..], Vec::as_slice);
        for task in tasks.iter().filter(|task| task.desired <= TaskState::Running) {
            round.end(task, TaskState::Remove);
        }
    }
    let mut standings = Standings::default();
    for slot in slots.keys() {
        let place = Place::Slot(*slot);
        let tasks = places.get(&place).map_or(&[][..], Vec::as_slice);
        let Some(task) = occupant(tasks) else { continue };
        restart::tidy(round, tasks, task);
        if let Some(old) = restart::predecessor(tasks, task) {
            restart::hand_over(round, service, old, task);
            standings.moves(place);
            continue;
        }
        let leaves = !task.status.state.is_final() && round.leaves(task);
        let serves = task.status.state == TaskState::Running;
        if round.stranded(task) && !task.status.state.is_final() || leaves && !serves {
            // Nobody is served there: replaced at once, wherever there is room.
            restart::replace(round, service, place, tasks, task, 0);
            standings.moves(place);
        } else if leaves {
            // A drained node, or one that no longer fits: nobody must miss it.
            restart::succeed(round, service, place, tasks, task);
            standings.moves(place);
        } else {
            let standing = restart::tend(round, service, place, tasks, task);
            standings.stands(place, standing);
        }
    }
    let missing = replicas.saturating_sub(slots.len());
    let free: Vec<u64> = (1..).filter(|slot| !slots.contains_key(slot)).take(missing).collect();
    for slot in free {
        let place = Place::Slot(slot);
        round.create(service, place, places.get(&place).map_or(&[][..], Vec::as_slice), 0, None);
        standings.moves(place);
    }
    update::plan(round, service, places, standings);
}

/// The slots to give up: first those that do not run, the least advanced first; then one by one
/// from the node with the most copies, of those that can be told. Among equals the highest slot
/// goes.
fn surplus(round: &Round<'_>, slots: &BTreeMap<u64, &Task>, replicas: usize) -> Vec<u64> {
    let mut excess = slots.len().saturating_sub(replicas);
    let mut victims = Vec::with_capacity(excess);
    let runs = |task: &Task| {
        task.status.state == TaskState::Running && task.node.is_some() && !round.leaves(task)
    };
    let mut idle: Vec<(bool, TaskState, u64)> = (slots.iter().filter(|(_, task)| !runs(task)))
        .map(|(slot, task)| (!task.status.state.is_final(), task.status.state, u64::MAX - slot))
        .collect();
    idle.sort_unstable();
    for (_, _, reversed) in idle.into_iter().take(excess) {
        victims.push(u64::MAX - reversed);
        excess -= 1;
    }
    let mut copies: BTreeMap<NodeId, Vec<u64>> = BTreeMap::new();
    for (slot, task) in slots.iter().filter(|(_, task)| runs(task)) {
        if let Some(node) = task.node {
            copies.entry(node).or_default().push(*slot);
        }
    }
    while excess > 0 {
        let hears = |node: NodeId| !round.is_silent(node) && !round.is_deaf(node);
        let fullest = (copies.iter_mut().filter(|(_, slots)| !slots.is_empty()))
            .max_by_key(|(node, slots)| (hears(**node), slots.len(), slots.last().copied()));
        let Some(slot) = fullest.and_then(|(_, slots)| slots.pop()) else { break };
        victims.push(slot);
        excess -= 1;
    }
    victims
}
