//! What follows when a task ended, must leave its node, or is out of date.

use mesh_types::task::TaskState;

use super::{
    scheduler,
    view::{Place, Round},
};
use crate::{
    command::TaskChange,
    model::{Service, Task},
};

/// A successor waits this long for its predecessor's end where the node can be told, then starts
/// all the same (as Swarm's).
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
    let delay_ms = delay_ms(task);
    if task.status.state == TaskState::Orphaned {
        // Lost with its node, through no fault of its own.
        return Verdict::Restart { delay_ms: 0 };
    }
    // The window is judged at the task's end, so that the verdict never changes later.
    let attempts = if task.window_over(task.status.since_ms) { 0 } else { task.attempts };
    let again = policy.wants_again(task.status.state) && !policy.is_spent(attempts);
    if again { Verdict::Restart { delay_ms } } else { Verdict::Done }
}

fn delay_ms(task: &Task) -> u64 {
    u64::try_from(task.spec.restart.delay.as_millis()).unwrap_or(u64::MAX)
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
/// not even running. (A running one is replaced by [`super::update`], at the policy's pace.)
pub(super) fn tend(
    round: &mut Round<'_>,
    service: &Service,
    place: Place,
    tasks: &[&Task],
    task: &Task,
) -> Standing {
    let outdated = service.outdates(task);
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
        (false, TaskState::Running) if round.serves(task) => Standing::Settled,
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
    round.create(service, place, tasks, delay_ms, None);
}

/// Makes a successor beside a running task, which goes on until the successor serves.
pub(super) fn succeed(
    round: &mut Round<'_>,
    service: &Service,
    place: Place,
    tasks: &[&Task],
    task: &Task,
) {
    // One that failed before sets the pace of the next.
    let failed = tasks.iter().any(|other| other.replaces == Some(task.id));
    let delay_ms = if failed { delay_ms(task) } else { 0 };
    round.create(service, place, tasks, delay_ms, Some(task.id));
}

/// The task that an occupant is to take over from, if that still runs.
pub(super) fn predecessor<'a>(tasks: &[&'a Task], occupant: &Task) -> Option<&'a Task> {
    let id = occupant.replaces?;
    let live = |task: &&&Task| {
        task.id == id && task.desired <= TaskState::Running && !task.status.state.is_final()
    };
    tasks.iter().find(live).copied()
}

/// What ended before its successor took over has nothing to come back for.
pub(super) fn tidy(round: &mut Round<'_>, tasks: &[&Task], current: &Task) {
    for task in tasks.iter().filter(|task| task.id != current.id) {
        if task.desired <= TaskState::Running && task.status.state.is_final() {
            round.end(task, TaskState::Shutdown);
        }
    }
}

/// Two live tasks of one place: the new one takes over once it serves; if it cannot, the old one
/// stays.
pub(super) fn hand_over(round: &mut Round<'_>, service: &Service, old: &Task, new: &Task) {
    let state = new.status.state;
    let given_up = state.is_final()
        || round.stranded(new)
        || (state < TaskState::Running && service.outdates(new));
    // No room beside the old one: in its place, then. An old one that has to leave its node does so
    // even if nobody can take over.
    let stuck = !new.status.err.is_empty()
        && match state {
            TaskState::New => true,
            TaskState::Pending => round.leaves(old) || scheduler::takes_instead(round, old, new),
            _ => false,
        };
    if given_up {
        round.end(new, TaskState::Shutdown);
    } else if stuck || round.stranded(old) || round.serves(new) {
        round.end(old, TaskState::Shutdown);
    }
}

/// Whether a task of the place is on its way down, on a node that can tell.
pub(super) fn stopping(round: &Round<'_>, tasks: &[&Task]) -> bool {
    tasks.iter().any(|task| task.desired > TaskState::Running && round.blocks(task, None))
}

/// Lets a task that waits go on to run: its delay is over, and what was there before it has ended.
pub(super) fn release(round: &mut Round<'_>, tasks: &[&Task]) {
    for (index, task) in tasks.iter().enumerate() {
        if task.desired >= TaskState::Running || task.status.state.is_final() || round.ends(task.id)
        {
            continue;
        }
        let start = task.start_at_ms.unwrap_or(0);
        let blocked = tasks
            .iter()
            .take(index)
            .any(|before| task.replaces != Some(before.id) && round.blocks(before, task.node));
        let deadline = start.max(task.meta.created_ms.saturating_add(STOP_WAIT_MS));
        let due = if blocked { deadline } else { start };
        if round.now_ms >= due {
            round.push(TaskChange::Desire { id: task.id, state: TaskState::Running });
        } else {
            round.wake(due);
        }
    }
}
