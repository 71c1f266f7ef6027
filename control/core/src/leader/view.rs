//! What a round works with: the tasks by place, and the changes asked for so far.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::{NodeId, ServiceId, TaskId, task::TaskState};

use super::Decision;
use crate::{
    command::{Command, TaskChange},
    model::{Availability, NodeState, Service, Task},
    store::Store,
};

/// One transaction has no more changes: an entry of the log has a maximum, and one service with
/// very many replicas must not keep all others from being looked after.
pub(super) const CHANGES_MAX: usize = 2048;

/// Where a service wants one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// A slot of a replicated service.
    Slot(u64),
    /// A node, for a global service.
    Node(NodeId),
}

impl Place {
    fn of(task: &Task) -> Option<Self> {
        task.slot.map(Self::Slot).or_else(|| task.node.map(Self::Node))
    }
}

/// The tasks of one service by place, oldest first.
pub(super) type Places<'a> = BTreeMap<Place, Vec<&'a Task>>;

/// Of a service that has no task.
pub(super) const NO_PLACES: &Places<'static> = &BTreeMap::new();

/// All tasks.
pub(super) fn places(store: &Store) -> BTreeMap<ServiceId, Places<'_>> {
    let mut all: BTreeMap<ServiceId, Places<'_>> = BTreeMap::new();
    for task in store.tasks.values() {
        if let Some(place) = Place::of(task) {
            all.entry(task.service).or_default().entry(place).or_default().push(task);
        }
    }
    for tasks in all.values_mut().flat_map(BTreeMap::values_mut) {
        tasks.sort_by_key(|task| task.age());
    }
    all
}

/// The task that a place counts on: the newest that should run (or wait to), ended or not.
pub(super) fn occupant<'a>(tasks: &[&'a Task]) -> Option<&'a Task> {
    tasks.iter().rev().find(|task| task.desired <= TaskState::Running).copied()
}

/// One round.
pub(super) struct Round<'a> {
    pub(super) store: &'a Store,
    pub(super) now_ms: u64,
    fresh: &'a mut dyn FnMut() -> u128,
    changes: Vec<TaskChange>,
    ending: BTreeSet<TaskId>,
    wake_at_ms: Option<u64>,
}

impl<'a> Round<'a> {
    pub(super) fn new(store: &'a Store, now_ms: u64, fresh: &'a mut dyn FnMut() -> u128) -> Self {
        let (changes, ending) = (Vec::new(), BTreeSet::new());
        Self { store, now_ms, fresh, changes, ending, wake_at_ms: None }
    }

    pub(super) fn push(&mut self, change: TaskChange) {
        self.changes.push(change);
    }

    /// Asks for a task's end.
    pub(super) fn end(&mut self, task: &Task, state: TaskState) {
        self.ending.insert(task.id);
        if task.desired < state {
            self.push(TaskChange::Desire { id: task.id, state });
        }
    }

    /// Whether this round asked for its end.
    pub(super) fn ends(&self, id: TaskId) -> bool {
        self.ending.contains(&id)
    }

    /// Makes a task in a place. It starts `delay_ms` from now, and not before what is still there
    /// has ended (stop first).
    pub(super) fn create(
        &mut self,
        service: &Service,
        place: Place,
        there: &[&Task],
        delay_ms: u64,
    ) {
        let waits = delay_ms > 0 || there.iter().any(|task| self.blocks(task));
        let (desired, start_at_ms) = if waits {
            (TaskState::Ready, Some(self.now_ms.saturating_add(delay_ms)))
        } else {
            (TaskState::Running, None)
        };
        let (slot, node) = match place {
            Place::Slot(slot) => (Some(slot), None),
            Place::Node(node) => (None, Some(node)),
        };
        let id = TaskId::from_bits((self.fresh)());
        let service = service.id;
        self.push(TaskChange::Create { id, service, slot, node, desired, start_at_ms });
    }

    /// Whether a task's successor has to wait for it: it has not ended, and its node may tell.
    pub(super) fn blocks(&self, task: &Task) -> bool {
        !task.status.state.is_final()
            && task.status.state >= TaskState::Assigned
            && task.node.is_some_and(|node| !self.lost(node))
    }

    /// A node that runs nothing any more as far as anybody can tell.
    pub(super) fn lost(&self, node: NodeId) -> bool {
        self.store.nodes.get(&node).is_none_or(|node| {
            matches!(node.status.state, NodeState::Down | NodeState::Disconnected)
        })
    }

    /// A node that must not keep its tasks.
    pub(super) fn evicts(&self, node: NodeId) -> bool {
        self.lost(node)
            || self
                .store
                .nodes
                .get(&node)
                .is_some_and(|node| node.spec.availability == Availability::Drain)
    }

    /// Looks again at this time at the latest.
    pub(super) fn wake(&mut self, at_ms: u64) {
        self.wake_at_ms = Some(self.wake_at_ms.map_or(at_ms, |before| before.min(at_ms)));
    }

    pub(super) fn decision(self) -> Decision {
        let mut commands = Vec::new();
        let mut changes = self.changes.into_iter().peekable();
        while changes.peek().is_some() {
            let some = changes.by_ref().take(CHANGES_MAX).collect();
            commands.push(Command::ChangeTasks(some));
        }
        Decision { commands, wake_at_ms: self.wake_at_ms }
    }
}
