//! The leader's loops as one pure function over a store view.
//!
//! One round looks at the whole store and asks for what should change, as one transaction (several
//! when it is a lot):
//! orchestrators ([`replicated`], [`global`], with [`restart`] for what ended) say which tasks
//! there should be and [`update`] how fast, [`stop`] lets draining tasks end, then waiting tasks
//! are let go, leases are tried again, the [`scheduler`] places what is pending, and the [`reaper`]
//! forgets what is over. A chain of steps takes several rounds (a task made in one is placed in the
//! next), so call it again after its commands were applied; it returns nothing once all is as it
//! should be. The cost of a round is that of walking all tasks once.

mod global;
mod reaper;
mod replicated;
mod restart;
mod room;
mod scheduler;
mod stop;
mod update;
mod view;

use mesh_types::{NodeId, Revision, spec::ServiceMode, task::TaskState};

use crate::{
    command::{Command, TaskChange},
    store::Store,
};

/// What the loops ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// Proposals to make, in order.
    pub commands: Vec<Command>,
    /// Look again then at the latest, even if nothing changes (ms since the epoch).
    pub wake_at_ms: Option<u64>,
}

/// What the leader knows beside the store; lost with leadership, never needed for correctness.
#[derive(Debug, Default)]
pub struct LeaderMemory {
    /// How far each node's kernel is, by its own word: all records up to there are applied.
    pub acked: std::collections::BTreeMap<NodeId, Revision>,
    /// Nodes that were not heard for two seconds: nobody waits for their word.
    pub silent: std::collections::BTreeSet<NodeId>,
    /// The leader is new: those that are silent to it may have spoken to others, and are waited for
    /// all the same.
    pub listening: bool,
}

/// One round. Level-triggered: called on every change of the store and at `wake_at_ms`; with
/// nothing left to do it returns no commands. `fresh` draws ids.
pub fn decide(
    store: &Store,
    memory: &mut LeaderMemory,
    now_ms: u64,
    fresh: &mut dyn FnMut() -> u128,
) -> Decision {
    let places = view::places(store);
    let mut round = view::Round::new(store, memory, now_ms, fresh);
    stop::plan(&mut round);
    for (id, service) in &store.services {
        let of_service = places.get(id).unwrap_or(view::NO_PLACES);
        match service.spec.mode {
            ServiceMode::Replicated { replicas } => {
                replicated::plan(&mut round, service, of_service, replicas);
            }
            ServiceMode::Global => global::plan(&mut round, service, of_service),
        }
        for tasks in of_service.values() {
            restart::release(&mut round, tasks);
        }
    }
    allocate(&mut round);
    scheduler::plan(&mut round);
    reaper::plan(&mut round, &places);
    let (steps, look_again) = store.key_steps(now_ms);
    look_again.into_iter().for_each(|at_ms| round.wake(at_ms));
    let mut decision = round.decision();
    decision.commands.extend(steps);
    decision
}

/// Tries again for tasks without leases, where that would change anything.
fn allocate(round: &mut view::Round<'_>) {
    let store = round.store;
    for task in store.tasks.values() {
        let waits = task.status.state == TaskState::New && task.desired <= TaskState::Running;
        if waits
            && !round.ends(task.id)
            && store.choose_leases(task).err().is_none_or(|reason| reason != task.status.err)
        {
            round.push(TaskChange::Allocate { id: task.id });
        }
    }
}

#[cfg(test)]
mod tests;
