//! Global services: one task on each node that takes tasks, all made in one transaction (a client
//! that watches would else see it converged too early).

use mesh_types::task::TaskState;

use super::{
    restart::{self, Standing},
    scheduler::takes,
    update::{self, Standings},
    view::{Place, Places, Round, occupant},
};
use crate::model::Service;

pub(super) fn plan(round: &mut Round<'_>, service: &Service, places: &Places<'_>) {
    let constraints = &service.spec.task.constraints;
    let mut standings = Standings::default();
    for (place, tasks) in places {
        let (Place::Node(node), Some(task)) = (place, occupant(tasks)) else { continue };
        if round.evicts(*node, constraints) {
            for task in tasks.iter().filter(|task| task.desired <= TaskState::Running) {
                round.end(task, TaskState::Shutdown);
            }
            continue;
        }
        restart::tidy(round, tasks, task);
        if let Some(old) = restart::predecessor(tasks, task) {
            restart::hand_over(round, service, old, task);
            standings.moves(*place);
            continue;
        }
        let mut standing = restart::tend(round, service, *place, tasks, task);
        if standing == Standing::Moving && round.is_deaf(*node) {
            // It follows when its node is back; nobody waits for that.
            standing = Standing::Settled;
        }
        standings.stands(*place, standing);
    }
    for node in round.store.nodes.values() {
        let place = Place::Node(node.id);
        let tasks = places.get(&place).map_or(&[][..], Vec::as_slice);
        if takes(node, constraints) && occupant(tasks).is_none() {
            round.create(service, place, tasks, 0, None);
            standings.moves(place);
        }
    }
    update::plan(round, service, places, standings);
}
