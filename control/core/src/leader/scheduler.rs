//! Puts pending tasks on nodes that have what they ask for, and spreads them: over the values of
//! labels that their service names, then to the node with the fewest tasks of the service, then the
//! fewest tasks, then the lowest id; nodes on which the service keeps failing come last.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::{
    NodeId, ServiceId,
    spec::{Constraint, Spread},
    task::TaskState,
};

use super::{
    room::{Room, placed},
    view::Round,
};
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
    let mut use_of = Use { load: BTreeMap::new(), room: round.room.clone() };
    for task in store.tasks.values() {
        let state = task.status.state;
        if state == TaskState::Pending && task.desired <= TaskState::Running && !round.ends(task.id)
        {
            pending.entry(task.service).or_default().push(task);
        }
        if let Some(node) = placed(task) {
            *use_of.load.entry(node).or_default() += 1;
        }
    }
    for (service, mut tasks) in pending {
        tasks.sort_by_key(|task| task.age());
        spread(round, service, &tasks, &mut use_of);
    }
}

/// How nodes are used, with what this round puts there.
struct Use {
    /// Tasks of each node.
    load: BTreeMap<NodeId, usize>,
    room: Room,
}

/// Whether a node takes new tasks with these constraints.
pub(super) fn takes(node: &Node, constraints: &[Constraint]) -> bool {
    available(node) && node.satisfies(constraints)
}

fn available(node: &Node) -> bool {
    node.status.state == NodeState::Ready && node.spec.availability == Availability::Active
}

/// Whether the node of a running task would take its successor once that task is gone.
pub(super) fn takes_instead(round: &Round<'_>, old: &Task, new: &Task) -> bool {
    let Some(node) = old.node.and_then(|id| round.store.nodes.get(&id)) else { return false };
    let copies = || {
        let tasks = round.store.tasks.values().filter(|task| is_copy(task, new.service, node.id));
        tasks.filter(|task| task.id != old.id).count()
    };
    let (wanted, freed) = (new.spec.resources.reserved, old.spec.resources.reserved);
    takes(node, &new.spec.constraints)
        && round.room.would_do(node, wanted, freed)
        && !is_enough(new, copies)
}

/// Whether a task counts as its service's on a node.
fn is_copy(task: &Task, service: ServiceId, node: NodeId) -> bool {
    task.service == service && placed(task) == Some(node) && task.desired <= TaskState::Running
}

/// Whether so many tasks of its service are all that a node may run.
fn is_enough(task: &Task, copies: impl FnOnce() -> usize) -> bool {
    let most = task.spec.max_per_node;
    most > 0 && copies() as u64 >= most
}

/// A node's place in line: ranked last, tasks of the service, all tasks.
type Rank = (bool, usize, usize, NodeId);

/// The nodes by their values of the labels that tasks are spread over: a tree whose leaves hold
/// nodes. Without such labels it is one leaf.
struct Branches<'a> {
    leaves: BTreeMap<Vec<&'a str>, BTreeSet<Rank>>,
    /// Tasks of the service below each inner node, named by the values that lead to it.
    copies: BTreeMap<Vec<&'a str>, usize>,
}

impl<'a> Branches<'a> {
    fn new(nodes: impl Iterator<Item = (&'a Node, Rank)>, over: &[Spread]) -> Self {
        let mut branches = Self { leaves: BTreeMap::new(), copies: BTreeMap::new() };
        for (node, rank) in nodes {
            let value = |spread: &Spread| node.spec.labels.get(&spread.label).map_or("", |v| v);
            let path: Vec<&str> = over.iter().map(value).collect();
            branches.count(&path, rank.1);
            branches.leaves.entry(path).or_default().insert(rank);
        }
        branches
    }

    fn count(&mut self, path: &[&'a str], copies: usize) {
        for depth in 1..=path.len() {
            *self.copies.entry(path[..depth].to_vec()).or_default() += copies;
        }
    }

    /// The first node in line that fits, in the branch with the fewest tasks, level by level.
    fn best(&self, fits: impl Fn(&Rank) -> bool) -> Option<(Vec<&'a str>, Rank)> {
        let mut paths: Vec<&Vec<&str>> = self.leaves.keys().collect();
        let copies = |path: &[&str]| self.copies.get(path).copied().unwrap_or(0);
        paths.sort_by_cached_key(|path| {
            (1..=path.len()).map(|depth| copies(&path[..depth])).collect::<Vec<_>>()
        });
        let find = |last: bool| {
            paths.iter().find_map(|path| {
                let mut ranks = self.leaves[*path].iter();
                let rank = ranks.find(|rank| rank.0 == last && fits(rank))?;
                Some(((*path).clone(), *rank))
            })
        };
        find(false).or_else(|| find(true))
    }

    /// One more task of the service is on a node, unless that is full now.
    fn put(&mut self, path: &[&'a str], rank: Rank) {
        self.count(path, 1);
        let (last, copies, burden, node) = rank;
        if let Some(leaf) = self.leaves.get_mut(path) {
            leaf.remove(&rank);
            if burden + 1 < NODE_TASKS {
                leaf.insert((last, copies + 1, burden + 1, node));
            }
        }
    }
}

fn spread(round: &mut Round<'_>, service: ServiceId, tasks: &[&Task], use_of: &mut Use) {
    let store = round.store;
    let mut copies: BTreeMap<NodeId, usize> = BTreeMap::new();
    let mut failures: BTreeMap<NodeId, usize> = BTreeMap::new();
    let current = store.services.get(&service);
    let spec_version = current.map(|service| service.spec_version);
    for task in store.tasks.values().filter(|task| task.service == service) {
        if let Some(node) = placed(task).filter(|node| is_copy(task, service, *node)) {
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
    let nodes = (store.nodes.values())
        .filter(|node| available(node))
        .map(|node| {
            let id = node.id;
            let last = round.is_silent(id) || count(&failures, id) >= FAILURES;
            (node, (last, count(&copies, id), count(&use_of.load, id), id))
        })
        .filter(|(_, (_, _, load, _))| *load < NODE_TASKS);
    let over = current.map_or(&[][..], |service| &service.spec.task.spread);
    let mut branches = Branches::new(nodes, over);
    for task in tasks {
        let reserved = task.spec.resources.reserved;
        let fits = |(_, copies, _, id): &Rank| {
            task.node.is_none_or(|chosen| chosen == *id)
                && use_of.room.lacks(*id, reserved).is_none()
                && !is_enough(task, || *copies)
                && store.nodes.get(id).is_some_and(|node| node.satisfies(&task.spec.constraints))
        };
        let Some((path, rank)) = branches.best(fits) else {
            let err = refusal(round, task, &use_of.room, &copies);
            if err != task.status.err {
                round.push(TaskChange::Explain { id: task.id, err });
            }
            continue;
        };
        let node = rank.3;
        branches.put(&path, rank);
        *copies.entry(node).or_default() += 1;
        *use_of.load.entry(node).or_default() += 1;
        use_of.room.take(node, reserved);
        round.push(TaskChange::Assign { id: task.id, node });
    }
}

/// Why no node takes a task; begins with Swarm's words.
fn refusal(
    round: &Round<'_>,
    task: &Task,
    room: &Room,
    copies: &BTreeMap<NodeId, usize>,
) -> String {
    let nodes = round.store.nodes.values();
    let asked: Vec<&Node> =
        nodes.filter(|node| task.node.is_none_or(|chosen| chosen == node.id)).collect();
    let mut lacking: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut unfit, mut enough) = (0, 0);
    let mut unavailable =
        [(0, "down"), (0, "not heard of yet"), (0, "drained"), (0, "paused"), (0, "full")];
    for node in &asked {
        let ready = available(node);
        if ready && !node.satisfies(&task.spec.constraints) {
            unfit += 1;
        } else if let Some(what) = room.lacks(node.id, task.spec.resources.reserved)
            && ready
        {
            *lacking.entry(what).or_default() += 1;
        } else if ready && is_enough(task, || copies.get(&node.id).copied().unwrap_or(0)) {
            enough += 1;
        } else {
            let why = match (node.status.state, node.spec.availability) {
                (NodeState::Down | NodeState::Disconnected, _) => 0,
                (NodeState::Unknown, _) => 1,
                (NodeState::Ready, Availability::Drain) => 2,
                (NodeState::Ready, Availability::Pause) => 3,
                (NodeState::Ready, Availability::Active) => 4,
            };
            unavailable[why].0 += 1;
        }
    }
    let nodes = |count: usize| format!("{count} {}", if count == 1 { "node" } else { "nodes" });
    let mut reasons = Vec::new();
    if unfit > 0 {
        reasons.push(format!("scheduling constraints not satisfied on {}", nodes(unfit)));
    }
    for (what, count) in lacking {
        reasons.push(format!("insufficient {what} on {}", nodes(count)));
    }
    if enough > 0 {
        reasons.push(format!("max replicas per node reached on {}", nodes(enough)));
    }
    let parts: Vec<_> = unavailable.iter().filter(|(count, _)| *count > 0).collect();
    if !parts.is_empty() {
        let rest = parts.iter().map(|(count, _)| count).sum();
        let parts: Vec<_> = parts.iter().map(|(count, what)| format!("{count} {what}")).collect();
        let parts = parts.join(", ");
        reasons.push(format!("{} not available for new tasks: {parts}", nodes(rest)));
    }
    if reasons.is_empty() {
        return "no suitable node".to_owned();
    }
    format!("no suitable node ({})", reasons.join("; "))
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
