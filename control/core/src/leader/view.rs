//! What a round works with: the tasks by place, and the changes asked for so far.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::{NodeId, Revision, ServiceId, TaskId, spec::Constraint, task::TaskState};

use super::{Decision, LeaderMemory, room::Room};
use crate::{
    command::{Command, TaskChange},
    model::{Availability, Node, Service, Task},
    store::Store,
};

/// One transaction has no more changes: an entry of the log has a maximum, and one service with
/// very many replicas must not keep all others from being looked after.
pub(super) const CHANGES_MAX: usize = 2048;

/// Nobody waits longer than this for nodes to apply a change.
const ACK_WAIT_MS: u64 = 10_000;

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
    /// What every node that is waited for has applied; `None`: there is none to wait for.
    acked: Option<u64>,
    silent: BTreeSet<NodeId>,
    /// As the round began.
    pub(super) room: Room,
}

impl<'a> Round<'a> {
    pub(super) fn new(
        store: &'a Store,
        memory: &LeaderMemory,
        now_ms: u64,
        fresh: &'a mut dyn FnMut() -> u128,
    ) -> Self {
        let (changes, ending) = (Vec::new(), BTreeSet::new());
        let silent = |node: &Node| memory.silent.contains(&node.id) && !memory.listening;
        let heard = |node: &&Node| !node.is_down() && !silent(node);
        let acked = store
            .nodes
            .values()
            .filter(heard)
            .map(|node| memory.acked.get(&node.id).map_or(0, |revision| revision.get()))
            .min();
        let silent = memory.silent.clone();
        let room = Room::of(store);
        Self { store, now_ms, fresh, changes, ending, wake_at_ms: None, acked, silent, room }
    }

    /// Whether all nodes have applied a change, or had the time to. Looks again when they had it.
    pub(super) fn known(&mut self, revision: Revision, since_ms: u64) -> bool {
        let deadline = since_ms.saturating_add(ACK_WAIT_MS);
        let known =
            self.acked.is_none_or(|acked| acked >= revision.get()) || self.now_ms >= deadline;
        if !known {
            self.wake(deadline);
        }
        known
    }

    /// Whether a task runs and the nodes balance to it.
    pub(super) fn serves(&mut self, task: &Task) -> bool {
        task.status.state == TaskState::Running
            && task.running.is_none_or(|(revision, since_ms)| self.known(revision, since_ms))
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
    /// has ended (stop first), apart from the one that it is to take over from (start first).
    pub(super) fn create(
        &mut self,
        service: &Service,
        place: Place,
        there: &[&Task],
        delay_ms: u64,
        replaces: Option<TaskId>,
    ) {
        let (slot, node) = match place {
            Place::Slot(slot) => (Some(slot), None),
            Place::Node(node) => (None, Some(node)),
        };
        let blocks = |task: &&Task| Some(task.id) != replaces && self.blocks(task, node);
        let waits = delay_ms > 0 || there.iter().any(blocks);
        let (desired, start_at_ms) = if waits {
            (TaskState::Ready, Some(self.now_ms.saturating_add(delay_ms)))
        } else {
            (TaskState::Running, None)
        };
        let id = TaskId::from_bits((self.fresh)());
        let service = service.id;
        self.push(TaskChange::Create { id, service, slot, node, desired, start_at_ms, replaces });
    }

    /// Whether a task's successor has to wait for it: it has not ended, and its node can be told to
    /// end it. One whose daemon is down cannot be, may be for ever, and serves on meanwhile: it
    /// ends when its node is heard again. (A successor on that very node waits for that anyway.)
    pub(super) fn blocks(&self, task: &Task, successor: Option<NodeId>) -> bool {
        let waits = |node| {
            let same = successor == Some(node) && task.status.state > TaskState::Assigned;
            !self.lost(node) && (same || !self.is_deaf(node))
        };
        !task.status.state.is_final()
            && task.status.state >= TaskState::Assigned
            && task.node.is_some_and(waits)
    }

    /// A node that can be told nothing now.
    pub(super) fn is_deaf(&self, node: NodeId) -> bool {
        self.store.nodes.get(&node).is_none_or(Node::is_down)
    }

    /// A node that was not heard for a moment: others are better for new tasks.
    pub(super) fn is_silent(&self, node: NodeId) -> bool {
        self.silent.contains(&node)
    }

    /// A node that runs nothing any more as far as anybody can tell.
    pub(super) fn lost(&self, node: NodeId) -> bool {
        self.store.nodes.get(&node).is_none_or(|node| node.status.lost)
    }

    /// Whether a node must not keep its tasks with these constraints.
    pub(super) fn evicts(&self, node: NodeId, constraints: &[Constraint]) -> bool {
        self.store.nodes.get(&node).is_none_or(|node| {
            node.status.lost
                || node.spec.availability == Availability::Drain
                || !node.satisfies(constraints)
        })
    }

    /// Whether a task has to go elsewhere.
    pub(super) fn leaves(&self, task: &Task) -> bool {
        task.node.is_some_and(|node| self.evicts(node, &task.spec.constraints))
    }

    /// A task that serves nobody as far as anybody can tell, and will not soon: its node is lost,
    /// or its daemon was before the task ran.
    pub(super) fn stranded(&self, task: &Task) -> bool {
        let placed = task.node.filter(|_| task.status.state >= TaskState::Assigned);
        placed.is_some_and(|node| {
            let down = self.store.nodes.get(&node).is_none_or(Node::is_down);
            self.lost(node) || (down && task.status.state < TaskState::Running)
        })
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
