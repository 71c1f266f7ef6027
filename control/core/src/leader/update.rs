//! Rolling updates: running tasks that are out of date are replaced at the pace of the policy.
//!
//! A place takes a seat of the policy's parallelism from the moment it is touched until its new
//! task serves and the policy's delay is over. Whatever else is on its way up or down in the
//! service takes seats too, so that an update never adds to a trouble that is there already. A
//! place whose new task failed has no seat: whether the update goes on at all is then the failure
//! action's to say.

use std::collections::BTreeSet;

use mesh_types::{
    spec::{FailureAction, UpdateOrder},
    task::TaskState,
};

use super::{
    restart::{self, Standing},
    view::{Place, Places, Round, occupant},
};
use crate::{
    command::TaskChange,
    model::{Service, Task, UpdateFailure, UpdateState},
};

/// How the places of a service stand.
#[derive(Debug, Default)]
pub(super) struct Standings {
    moving: BTreeSet<Place>,
    outdated: BTreeSet<Place>,
}

impl Standings {
    /// Something is on its way there.
    pub(super) fn moves(&mut self, place: Place) {
        self.moving.insert(place);
    }

    /// What [`restart::tend`] found.
    pub(super) fn stands(&mut self, place: Place, standing: Standing) {
        match standing {
            Standing::Settled => {}
            Standing::Moving => self.moves(place),
            Standing::Outdated => {
                self.outdated.insert(place);
            }
        }
    }
}

fn failed_at(failure: &UpdateFailure) -> Option<Place> {
    failure.slot.map(Place::Slot).or_else(|| failure.node.map(Place::Node))
}

pub(super) fn plan(
    round: &mut Round<'_>,
    service: &Service,
    places: &Places<'_>,
    mut standings: Standings,
) {
    let Some((state, policy)) = service.rolls() else { return };
    for (place, tasks) in places {
        if restart::stopping(round, tasks) {
            standings.moves(*place);
        }
    }
    let wanted = places.values().filter(|tasks| occupant(tasks).is_some()).count();
    if let Some(change) = give_up(service, state, wanted) {
        round.push(change);
        return;
    }
    for failed in service.update_failures.iter().filter_map(failed_at) {
        standings.moving.remove(&failed);
        standings.outdated.remove(&failed);
    }
    let delay_ms = u64::try_from(policy.delay.as_millis()).unwrap_or(u64::MAX);
    let monitor_ms = u64::try_from(policy.monitor.as_millis()).unwrap_or(u64::MAX);
    let mut seats = standings.moving.clone();
    let mut stable_ms = 0;
    for (place, tasks) in places {
        let fresh = occupant(tasks).filter(|task| task.spec_version == service.spec_version);
        let Some((_, since_ms)) = fresh.and_then(|task| task.running) else { continue };
        stable_ms = since_ms.saturating_add(monitor_ms).max(stable_ms);
        let rested_ms = since_ms.saturating_add(delay_ms);
        if round.now_ms < rested_ms && !standings.outdated.is_empty() {
            seats.insert(*place);
            round.wake(rested_ms);
        }
    }
    if standings.outdated.is_empty() && standings.moving.is_empty() {
        if round.now_ms < stable_ms {
            round.wake(stable_ms);
            return;
        }
        let (state, message) = match state {
            UpdateState::RollbackStarted => (UpdateState::RollbackCompleted, "rollback completed"),
            _ => (UpdateState::Completed, "update completed"),
        };
        round.push(change(service, state, message.to_owned()));
        return;
    }
    let parallelism = match policy.parallelism {
        0 => usize::MAX,
        some => usize::try_from(some).unwrap_or(usize::MAX),
    };
    let free = parallelism.saturating_sub(seats.len());
    for place in standings.outdated.iter().take(free) {
        let Some(tasks) = places.get(place) else { continue };
        let Some(task) = occupant(tasks) else { continue };
        // Beside the old one, on a node that cannot start it, the new one would never take over.
        let order = match place {
            Place::Node(node) if round.is_deaf(*node) => UpdateOrder::StopFirst,
            _ => policy.order,
        };
        match order {
            UpdateOrder::StopFirst => restart::replace(round, service, *place, tasks, task, 0),
            UpdateOrder::StartFirst => restart::succeed(round, service, *place, tasks, task),
        }
    }
}

/// What happens if too many of the new tasks failed.
fn give_up(service: &Service, state: UpdateState, places: usize) -> Option<TaskChange> {
    let (_, policy) = service.rolls()?;
    let last = service.update_failures.last()?;
    let failed = u64::try_from(service.update_failures.len()).unwrap_or(u64::MAX);
    let places = u64::try_from(places).unwrap_or(u64::MAX);
    let borne = places.saturating_mul(u64::from(policy.max_failure_ppm));
    if failed.saturating_mul(1_000_000) <= borne {
        return None;
    }
    let back = state == UpdateState::RollbackStarted;
    let why = format!("due to failure or early termination of task {}", last.task);
    match policy.on_failure {
        FailureAction::Continue => None,
        FailureAction::Rollback if !back && service.previous_spec.is_some() => {
            Some(change(service, UpdateState::RollbackStarted, format!("update rolled back {why}")))
        }
        FailureAction::Pause | FailureAction::Rollback if back => {
            Some(change(service, UpdateState::RollbackPaused, format!("rollback paused {why}")))
        }
        FailureAction::Pause | FailureAction::Rollback => {
            Some(change(service, UpdateState::Paused, format!("update paused {why}")))
        }
    }
}

fn change(service: &Service, state: UpdateState, message: String) -> TaskChange {
    TaskChange::Update { service: service.id, spec_version: service.spec_version, state, message }
}

/// The task of a place that serves: while two stand beside each other, the old one.
pub(super) fn serving<'a>(tasks: &[&'a Task]) -> Option<&'a Task> {
    let current = occupant(tasks)?;
    let old = restart::predecessor(tasks, current);
    Some(old.filter(|old| old.status.state == TaskState::Running).unwrap_or(current))
}
