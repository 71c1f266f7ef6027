//! Replicated services: a number of slots, each with one task.

use std::collections::BTreeMap;

use mesh_types::{NodeId, task::TaskState};

use super::{
    restart::{self, Outdated, Standing},
    view::{Place, Places, Round, occupant},
};
use crate::model::{Service, Task};

pub(super) fn plan(round: &mut Round<'_>, service: &Service, places: &Places<'_>, replicas: u64) {
    let mut slots: BTreeMap<u64, &Task> = BTreeMap::new();
    for (place, tasks) in places {
        if let (Place::Slot(slot), Some(task)) = (place, occupant(tasks)) {
            slots.insert(*slot, task);
        }
    }
    let replicas = usize::try_from(replicas).unwrap_or(usize::MAX);
    for slot in surplus(round, &slots, replicas) {
        if let Some(task) = slots.remove(&slot) {
            round.end(task, TaskState::Remove);
        }
    }
    let mut moving = places.values().any(|tasks| restart::stopping(round, tasks));
    let mut outdated: Vec<Outdated<'_>> = Vec::new();
    for (slot, task) in &slots {
        let place = Place::Slot(*slot);
        let tasks = places.get(&place).map_or(&[][..], Vec::as_slice);
        // Drained, or lost: replaced at once, wherever there is room.
        let evicted = task.node.is_some_and(|node| round.evicts(node));
        if evicted && !task.status.state.is_final() {
            restart::replace(round, service, place, tasks, task, 0);
            moving = true;
            continue;
        }
        match restart::tend(round, service, place, tasks, task) {
            Standing::Settled => {}
            Standing::Moving => moving = true,
            Standing::Outdated => outdated.push((place, tasks, task)),
        }
    }
    let missing = replicas.saturating_sub(slots.len());
    let free: Vec<u64> = (1..).filter(|slot| !slots.contains_key(slot)).take(missing).collect();
    for slot in free {
        let place = Place::Slot(slot);
        round.create(service, place, places.get(&place).map_or(&[][..], Vec::as_slice), 0);
        moving = true;
    }
    restart::roll(round, service, &outdated, moving);
}

/// The slots to give up: first those that do not run, the least advanced first; then one by one
/// from the node with the most copies. Among equals the highest slot goes.
fn surplus(round: &Round<'_>, slots: &BTreeMap<u64, &Task>, replicas: usize) -> Vec<u64> {
    let mut excess = slots.len().saturating_sub(replicas);
    let mut victims = Vec::with_capacity(excess);
    let runs = |task: &Task| {
        task.status.state == TaskState::Running && !task.node.is_none_or(|node| round.evicts(node))
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
        let fullest = copies.values_mut().max_by_key(|slots| (slots.len(), slots.last().copied()));
        let Some(slot) = fullest.and_then(Vec::pop) else { break };
        victims.push(slot);
        excess -= 1;
    }
    victims
}
