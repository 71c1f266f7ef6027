//! Global services: one task on each node that takes tasks, all made in one transaction (a client
//! that watches would else see it converged too early).

use mesh_types::task::TaskState;

use super::{
    restart::{self, Outdated, Standing},
    view::{Place, Places, Round, occupant},
};
use crate::model::{Availability, NodeState, Service};

pub(super) fn plan(round: &mut Round<'_>, service: &Service, places: &Places<'_>) {
    let mut moving = places.values().any(|tasks| restart::stopping(round, tasks));
    let mut outdated: Vec<Outdated<'_>> = Vec::new();
    for (place, tasks) in places {
        let (Place::Node(node), Some(task)) = (place, occupant(tasks)) else { continue };
        if round.evicts(*node) {
            round.end(task, TaskState::Shutdown);
            continue;
        }
        match restart::tend(round, service, *place, tasks, task) {
            Standing::Settled => {}
            Standing::Moving => moving = true,
            Standing::Outdated => outdated.push((*place, tasks, task)),
        }
    }
    for node in round.store.nodes.values() {
        let place = Place::Node(node.id);
        let tasks = places.get(&place).map_or(&[][..], Vec::as_slice);
        let eligible =
            node.status.state == NodeState::Ready && node.spec.availability == Availability::Active;
        if eligible && occupant(tasks).is_none() {
            round.create(service, place, tasks, 0);
            moving = true;
        }
    }
    restart::roll(round, service, &outdated, moving);
}
