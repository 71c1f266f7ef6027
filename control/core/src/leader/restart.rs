//! What follows when a task ended, must leave its node, or is out of date.

use mesh_types::{spec::RestartCondition, task::TaskState};

use super::view::{Place, Round};
use crate::{
    command::TaskChange,
    model::{Service, Task},
};

/// A successor waits this long for its predecessor's end, then starts all the same (as Swarm's).
const STOP_WAIT_MS: u64 = 60_000;

/// What the restart policy says of a task that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is over.
    Done,
    /// Replace it after this pause.
    Restart {
        /// Pause before the replacement starts.
        delay_ms: u64,
    },
}

/// Judges a task that ended while it should have run.
pub(super) fn judge(task: &Task) -> Verdict {
    let policy = &task.spec.restart;
    let delay_ms = u64::try_from(policy.delay.as_millis()).unwrap_or(u64::MAX);
    let wanted = match (task.status.state, policy.condition) {
        // Lost with its node, through no fault of its own.
        (TaskState::Orphaned, _) => return Verdict::Restart { delay_ms: 0 },
        (_, RestartCondition::Any) => true,
        (state, RestartCondition::OnFailure) => state != TaskState::Complete,
        (_, RestartCondition::None) => false,
    };
    // The window is judged at the task's end, so that the verdict never changes later.
    let attempts = if task.window_over(task.status.since_ms) { 0 } else { task.attempts };
    // Zero means no limit, as in Swarm.
    let spent = policy.max_attempts.is_some_and(|max| max > 0 && attempts >= max);
    if wanted && !spent { Verdict::Restart { delay_ms } } else { Verdict::Done }
}

/// How a place stands, for the pace of updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing to wait for.
    Settled,
    /// On its way to run.
    Moving,
    /// Runs, but from an old spec.
    Outdated,
}

/// Looks after one occupant that its place keeps: replaces it if it ended or, being out of date, is
/// not even running. (A running one is replaced by [`roll`], one at a time.)
pub(super) fn tend(
    round: &mut Round<'_>,
    service: &Service,
    place: Place,
    tasks: &[&Task],
    task: &Task,
) -> Standing {
    let outdated = task.spec_version != service.spec_version;
    let state = task.status.state;
    if state.is_final() {
        let verdict = if outdated { Verdict::Restart { delay_ms: 0 } } else { judge(task) };
        return match verdict {
            Verdict::Done => Standing::Settled,
            Verdict::Restart { delay_ms } => {
                replace(round, service, place, tasks, task, delay_ms);
                Standing::Moving
            }
        };
    }
    match (outdated, state) {
        (true, TaskState::Running) => Standing::Outdated,
        (true, _) => {
            replace(round, service, place, tasks, task, 0);
            Standing::Moving
        }
        (false, TaskState::Running) => Standing::Settled,
        // It waits for leases that the update itself may free: that is watched by `stopping`.
        (false, TaskState::New) if !task.status.err.is_empty() => Standing::Settled,
        (false, _) => Standing::Moving,
    }
}

/// Ends a task and makes its successor.
pub(super) fn replace(
    round: &mut Round<'_>,
    service: &Service,
    place: Place,
    tasks: &[&Task],
    task: &Task,
    delay_ms: u64,
) {
    round.end(task, TaskState::Shutdown);
    round.create(service, place, tasks, delay_ms);
}

/// A place with a running task that is out of date.
pub(super) type Outdated<'a> = (Place, &'a [&'a Task], &'a Task);

/// The rolling update: replaces one running task that is out of date, if nothing else of the
/// service is on its way up or down.
pub(super) fn roll(
    round: &mut Round<'_>,
    service: &Service,
    outdated: &[Outdated<'_>],
    moving: bool,
) {
    if let (false, Some((place, tasks, task))) = (moving, outdated.first()) {
        replace(round, service, *place, tasks, task, 0);
    }
}

/// Whether a task of the place is on its way down, on a node that can tell.
pub(super) fn stopping(round: &Round<'_>, tasks: &[&Task]) -> bool {
    tasks.iter().any(|task| task.desired > TaskState::Running && round.blocks(task))
}

/// Lets a task that waits go on to run: its delay is over, and what was there before it has ended.
pub(super) fn release(round: &mut Round<'_>, tasks: &[&Task]) {
    for (index, task) in tasks.iter().enumerate() {
        if task.desired >= TaskState::Running || task.status.state.is_final() || round.ends(task.id)
        {
            continue;
        }
        let start = task.start_at_ms.unwrap_or(0);
        let blocked = tasks.iter().take(index).any(|before| round.blocks(before));
        let deadline = start.max(task.meta.created_ms.saturating_add(STOP_WAIT_MS));
        let due = if blocked { deadline } else { start };
        if round.now_ms >= due {
            round.push(TaskChange::Desire { id: task.id, state: TaskState::Running });
        } else {
            round.wake(due);
        }
    }
}
