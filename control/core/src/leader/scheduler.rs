//! Puts pending tasks on nodes: spread. A task goes to the node with the fewest tasks of its
//! service, then the fewest tasks, then the lowest id; nodes on which the service keeps failing
//! come last.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::{NodeId, ServiceId, spec::Constraint, task::TaskState};

use super::view::Round;
use crate::{
    command::TaskChange,
    model::{Availability, Node, NodeState, Task},
};

/// This many failures of the same spec within [`FAILURE_WINDOW_MS`] rank a node last (Swarm's
/// numbers).
const FAILURES: usize = 5;
const FAILURE_WINDOW_MS: u64 = 5 * 60 * 1000;

/// A node's `gw0` range has room for this many tasks.
const NODE_TASKS: usize = 65_000;

pub(super) fn plan(round: &mut Round<'_>) {
    let store = round.store;
    let mut pending: BTreeMap<ServiceId, Vec<&Task>> = BTreeMap::new();
    let mut load: BTreeMap<NodeId, usize> = BTreeMap::new();
    for task in store.tasks.values() {
        let state = task.status.state;
        if state == TaskState::Pending && task.desired <= TaskState::Running && !round.ends(task.id)
        {
            pending.entry(task.service).or_default().push(task);
        }
        if let Some(node) = placed(task) {
            *load.entry(node).or_default() += 1;
        }
    }
    for (service, mut tasks) in pending {
        tasks.sort_by_key(|task| task.age());
        spread(round, service, &tasks, &mut load);
    }
}

/// The node that a task burdens.
fn placed(task: &Task) -> Option<NodeId> {
    let counts = task.status.state >= TaskState::Assigned && !task.status.state.is_final();
    task.node.filter(|_| counts)
}

/// Whether a node takes new tasks with these constraints.
pub(super) fn takes(node: &Node, constraints: &[Constraint]) -> bool {
    available(node) && node.satisfies(constraints)
}

fn available(node: &Node) -> bool {
    node.status.state == NodeState::Ready && node.spec.availability == Availability::Active
}

fn spread(
    round: &mut Round<'_>,
    service: ServiceId,
    tasks: &[&Task],
    load: &mut BTreeMap<NodeId, usize>,
) {
    let store = round.store;
    let mut copies: BTreeMap<NodeId, usize> = BTreeMap::new();
    let mut failures: BTreeMap<NodeId, usize> = BTreeMap::new();
    let spec_version = store.services.get(&service).map(|service| service.spec_version);
    for task in store.tasks.values().filter(|task| task.service == service) {
        if let Some(node) = placed(task).filter(|_| task.desired <= TaskState::Running) {
            *copies.entry(node).or_default() += 1;
        }
        let failed = matches!(task.status.state, TaskState::Failed | TaskState::Rejected)
            && Some(task.spec_version) == spec_version
            && round.now_ms.saturating_sub(task.status.since_ms) < FAILURE_WINDOW_MS;
        if let Some(node) = task.node.filter(|_| failed) {
            *failures.entry(node).or_default() += 1;
        }
    }
    let count = |map: &BTreeMap<NodeId, usize>, node| map.get(&node).copied().unwrap_or(0);
    let mut ranking: BTreeSet<(bool, usize, usize, NodeId)> = store
        .nodes
        .values()
        .filter(|node| available(node))
        .map(|node| {
            let id = node.id;
            let last = round.is_silent(id) || count(&failures, id) >= FAILURES;
            (last, count(&copies, id), count(load, id), id)
        })
        .filter(|(_, _, load, _)| *load < NODE_TASKS)
        .collect();
    for task in tasks {
        let fits = |id: NodeId| {
            task.node.is_none_or(|chosen| chosen == id)
                && store.nodes.get(&id).is_some_and(|node| node.satisfies(&task.spec.constraints))
        };
        let best = ranking.iter().find(|entry| fits(entry.3)).copied();
        let Some(best) = best else {
            let err = refusal(round, task);
            if err != task.status.err {
                round.push(TaskChange::Explain { id: task.id, err });
            }
            continue;
        };
        let (failing, copies, burden, node) = best;
        ranking.remove(&best);
        if burden + 1 < NODE_TASKS {
            ranking.insert((failing, copies + 1, burden + 1, node));
        }
        *load.entry(node).or_default() += 1;
        round.push(TaskChange::Assign { id: task.id, node });
    }
}

/// Why no node takes a task; begins with Swarm's words.
fn refusal(round: &Round<'_>, task: &Task) -> String {
    let nodes = round.store.nodes.values();
    let asked: Vec<&Node> =
        nodes.filter(|node| task.node.is_none_or(|chosen| chosen == node.id)).collect();
    let (mut down, mut unknown, mut drained, mut paused, mut full) = (0, 0, 0, 0, 0);
    let mut unfit = 0;
    for node in &asked {
        if available(node) && !node.satisfies(&task.spec.constraints) {
            unfit += 1;
            continue;
        }
        match (node.status.state, node.spec.availability) {
            (NodeState::Down | NodeState::Disconnected, _) => down += 1,
            (NodeState::Unknown, _) => unknown += 1,
            (NodeState::Ready, Availability::Drain) => drained += 1,
            (NodeState::Ready, Availability::Pause) => paused += 1,
            (NodeState::Ready, Availability::Active) => full += 1,
        }
    }
    let parts = [
        (down, "down"),
        (unknown, "not heard of yet"),
        (drained, "drained"),
        (paused, "paused"),
        (full, "full"),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    let nodes = |count: usize| format!("{count} {}", if count == 1 { "node" } else { "nodes" });
    let mut reasons = Vec::new();
    if unfit > 0 {
        reasons.push(format!("scheduling constraints not satisfied on {}", nodes(unfit)));
    }
    let rest = asked.len() - unfit;
    if rest > 0 {
        let parts = parts.join(", ");
        reasons.push(format!("{} not available for new tasks: {parts}", nodes(rest)));
    }
    if reasons.is_empty() {
        return "no suitable node".to_owned();
    }
    format!("no suitable node ({})", reasons.join("; "))
}
