//! Tasks: made, allocated, assigned, reported on, ended. Status and desired state only go up.

use mesh_types::{
    NodeId, Revision, ServiceId, TaskId,
    task::{TaskState, TaskStatus},
};

use super::{At, Store};
use crate::{
    command::TaskChange,
    model::{Stop, Task, UpdateFailure},
};

impl Store {
    pub(super) fn change_task(&mut self, at: At, change: &TaskChange) {
        match change {
            TaskChange::Create { id, service, slot, node, desired, start_at_ms, replaces } => {
                let place = Place { slot: *slot, node: *node };
                let wish =
                    Wish { desired: *desired, start_at_ms: *start_at_ms, replaces: *replaces };
                self.create_task(at, *id, *service, place, wish);
            }
            TaskChange::Allocate { id } => self.allocate(at, *id),
            TaskChange::Assign { id, node } => self.assign(at, *id, *node),
            TaskChange::Explain { id, err } => self.explain(at, *id, err),
            TaskChange::Desire { id, state } => self.desire(at, *id, *state),
            TaskChange::Conclude { id, state, err } => self.conclude(at, *id, *state, err),
            TaskChange::Release { id } => self.release(at, *id),
            TaskChange::Delete { id } => self.forget(*id),
            TaskChange::Update { service, spec_version, state, message } => {
                self.advance_update(at, *service, *spec_version, *state, message);
            }
        }
    }

    fn create_task(&mut self, at: At, id: TaskId, service: ServiceId, place: Place, wish: Wish) {
        let Some(service) = self.services.get(&service) else { return };
        let unknown = place.node.is_some_and(|node| !self.nodes.contains_key(&node));
        let past = self.tasks.values().filter(|t| t.service == service.id && place.holds(t));
        let mut newest: Option<&Task> = None;
        let mut taken = false;
        for task in past {
            taken |= task.desired <= TaskState::Running
                && !task.status.state.is_final()
                && wish.replaces != Some(task.id);
            if newest.is_none_or(|other| other.age() < task.age()) {
                newest = Some(task);
            }
        }
        // A place has one live task, beside the one that it takes over from: a decision that was
        // made twice over the same view does no harm.
        if unknown || taken || self.tasks.contains_key(&id) {
            return;
        }
        let (attempts, attempts_since_ms) = newest
            .map_or((0, at.now_ms), |before| next_attempt(before, service.spec_version, at.now_ms));
        let task = Task {
            id,
            meta: at.made(),
            service: service.id,
            service_name: service.spec.name.clone(),
            slot: place.slot,
            node: place.node,
            spec_version: service.spec_version,
            spec: service.spec.task.clone(),
            networks: service.spec.networks.clone(),
            published: !service.ports.is_empty(),
            leases: Vec::new(),
            desired: wish.desired,
            status: TaskStatus {
                state: TaskState::New,
                since_ms: at.now_ms,
                message: "created".into(),
                ..TaskStatus::default()
            },
            start_at_ms: wish.start_at_ms,
            history: vec![(TaskState::New, at.now_ms)],
            made: at.revision,
            attempts,
            attempts_since_ms,
            stop: Stop::No,
            running: None,
            replaces: wish.replaces,
        };
        self.tasks.insert(id, task);
        self.allocate(at, id);
    }

    fn allocate(&mut self, at: At, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        if task.status.state != TaskState::New {
            return;
        }
        match self.choose_leases(task) {
            Ok(leases) => {
                self.take_leases(id, None, leases);
                self.enter(at, id, TaskState::Pending, "pending task scheduling");
            }
            Err(reason) => self.explain(at, id, &reason),
        }
    }

    fn assign(&mut self, at: At, id: TaskId, node: NodeId) {
        let Some(task) = self.tasks.get(&id) else { return };
        let fits = task.node.is_none_or(|chosen| chosen == node) && self.nodes.contains_key(&node);
        if task.status.state != TaskState::Pending || task.desired > TaskState::Running || !fits {
            return;
        }
        match self.choose_local_gateway(task, node) {
            Ok(lease) => {
                self.take_leases(id, Some(node), lease.into_iter().collect());
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.node = Some(node);
                }
                self.enter(at, id, TaskState::Assigned, "scheduler assigned task to node");
            }
            Err(reason) => self.explain(at, id, &reason),
        }
    }

    fn explain(&mut self, at: At, id: TaskId, reason: &str) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.status.state < TaskState::Assigned && task.status.err != reason {
            task.status.err = reason.to_owned();
            at.touch(&mut task.meta);
        }
    }

    /// A task that no node has yet has nothing to end: it is over at once. One that runs for a
    /// service goes on until all nodes know that it takes no more connections.
    pub(super) fn desire(&mut self, at: At, id: TaskId, state: TaskState) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.desired >= state {
            return;
        }
        task.desired = state;
        if state > TaskState::Running && task.stop == Stop::No {
            let served = task.status.state == TaskState::Running
                && self.services.contains_key(&task.service)
                && task.node.and_then(|id| self.nodes.get(&id)).is_some_and(|n| !n.status.lost);
            task.stop = if served {
                Stop::Draining { at: at.revision, since_ms: at.now_ms }
            } else {
                Stop::Released
            };
        }
        at.touch(&mut task.meta);
        if state > TaskState::Running && task.status.state < TaskState::Assigned {
            self.conclude(at, id, TaskState::Shutdown, "");
        }
    }

    pub(super) fn release(&mut self, at: At, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if let Stop::Draining { .. } = task.stop {
            task.stop = Stop::Released;
            at.touch(&mut task.meta);
        }
    }

    pub(super) fn conclude(&mut self, at: At, id: TaskId, state: TaskState, err: &str) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.status.state.is_final() || !state.is_final() {
            return;
        }
        task.status.pid = None;
        self.enter(at, id, state, "ended by the cluster");
        if let Some(task) = self.tasks.get_mut(&id) {
            task.status.err = err.to_owned();
        }
        self.release_leases(id);
    }

    /// Forgets a task that ended; nothing else can be forgotten.
    pub(super) fn forget(&mut self, id: TaskId) {
        if self.tasks.get(&id).is_some_and(|task| task.status.state.is_final()) {
            self.tasks.remove(&id);
        }
    }

    pub(super) fn report_tasks(&mut self, at: At, node: NodeId, statuses: &[(TaskId, TaskStatus)]) {
        for (id, status) in statuses {
            let Some(task) = self.tasks.get_mut(id) else { continue };
            let known = task.status.state;
            // `Remove` and `Orphaned` are no node's to say.
            let stale = task.node != Some(node)
                || known.is_final()
                || status.state < known
                || status.state >= TaskState::Remove;
            let mut status = status.clone();
            if status.message.is_empty() {
                status.message = describe(status.state).into();
            }
            if stale || status == task.status {
                continue;
            }
            if status.state > known {
                task.history.push((status.state, status.since_ms));
            }
            let ended = status.state.is_final();
            if status.state == TaskState::Running && task.running.is_none() {
                task.running = Some((at.revision, at.now_ms));
            }
            task.status = status;
            at.touch(&mut task.meta);
            if ended {
                self.count_failure(at, *id);
                self.release_leases(*id);
            }
        }
    }

    /// A new task that ended by itself before its update's monitoring was over counts against the
    /// update, once for each place.
    fn count_failure(&mut self, at: At, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Some(service) = self.services.get_mut(&task.service) else { return };
        let Some((_, policy)) = service.rolls() else { return };
        let monitor_ms = u64::try_from(policy.monitor.as_millis()).unwrap_or(u64::MAX);
        let early =
            task.running.is_none_or(|(_, since)| at.now_ms.saturating_sub(since) <= monitor_ms);
        let by_itself = matches!(
            task.status.state,
            TaskState::Complete | TaskState::Failed | TaskState::Rejected
        );
        let node = task.node.filter(|_| task.slot.is_none());
        let known = service.update_failures.iter().any(|f| (f.slot, f.node) == (task.slot, node));
        let wanted = task.desired <= TaskState::Running;
        if early && by_itself && wanted && !known && task.spec_version == service.spec_version {
            service.update_failures.push(UpdateFailure { task: id, slot: task.slot, node });
            at.touch(&mut service.meta);
        }
    }

    /// Goes up to a state by the managers' own doing.
    fn enter(&mut self, at: At, id: TaskId, state: TaskState, message: &str) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.status.state = state;
        task.status.since_ms = at.now_ms;
        task.status.message = message.to_owned();
        task.status.err.clear();
        task.history.push((state, at.now_ms));
        at.touch(&mut task.meta);
    }
}

/// What is asked of a new task.
#[derive(Debug, Clone, Copy)]
struct Wish {
    desired: TaskState,
    start_at_ms: Option<u64>,
    replaces: Option<TaskId>,
}

/// Where a task belongs: a slot, or a node for global services.
#[derive(Debug, Clone, Copy)]
struct Place {
    slot: Option<u64>,
    node: Option<NodeId>,
}

impl Place {
    fn holds(self, task: &Task) -> bool {
        match self.slot {
            Some(_) => task.slot == self.slot,
            None => task.slot.is_none() && task.node == self.node,
        }
    }
}

/// How often a place was restarted, counting its next task, and since when: the restart policy's
/// limit holds within its window, or since the spec changed.
fn next_attempt(before: &Task, spec_version: Revision, now_ms: u64) -> (u64, u64) {
    let by_itself = matches!(
        before.status.state,
        TaskState::Complete | TaskState::Failed | TaskState::Rejected
    );
    if before.spec_version != spec_version {
        return (0, now_ms);
    }
    if before.window_over(now_ms) {
        return (u64::from(by_itself), now_ms);
    }
    (before.attempts + u64::from(by_itself), before.attempts_since_ms)
}

impl Task {
    /// Orders the tasks of a place by when they were made.
    #[must_use]
    pub fn age(&self) -> (Revision, TaskId) {
        (self.made, self.id)
    }

    /// Whether the restart policy's window has passed since its first counted attempt.
    #[must_use]
    pub fn window_over(&self, now_ms: u64) -> bool {
        let since_ms = now_ms.saturating_sub(self.attempts_since_ms);
        self.spec.restart.window_ms().is_some_and(|window_ms| since_ms > window_ms)
    }
}

/// What a state says of itself when its reporter did not.
fn describe(state: TaskState) -> &'static str {
    match state {
        TaskState::New => "created",
        TaskState::Pending => "pending task scheduling",
        TaskState::Assigned => "scheduler assigned task to node",
        TaskState::Accepted => "accepted",
        TaskState::Preparing => "preparing",
        TaskState::Ready => "prepared",
        TaskState::Starting => "starting",
        TaskState::Running => "started",
        TaskState::Complete => "finished",
        TaskState::Shutdown => "shutdown",
        TaskState::Failed => "failed",
        TaskState::Rejected => "rejected",
        TaskState::Remove => "removed",
        TaskState::Orphaned => "orphaned",
    }
}
