//! Decisions, case by case. Whole histories are in `crate::sim`.

use std::{collections::BTreeMap, time::Duration};

use mesh_types::{
    NodeId, ServiceId,
    spec::{RestartCondition, ServiceMode},
    task::TaskState,
};

use crate::{
    command::Command,
    fixtures::{Bench, node_id, service},
    leader::{LeaderMemory, decide, view::CHANGES_MAX},
    model::{Availability, NodeState},
};

fn replicas(count: u64) -> ServiceMode {
    ServiceMode::Replicated { replicas: count }
}

fn spread(bench: &Bench, id: ServiceId) -> BTreeMap<NodeId, usize> {
    let mut counts = BTreeMap::new();
    for task in bench.live(id) {
        *counts.entry(task.node.unwrap()).or_default() += 1;
    }
    counts
}

fn availability(bench: &mut Bench, number: u128, availability: Availability) {
    let id = node_id(number);
    let node = bench.store.nodes[&id].clone();
    let mut spec = node.spec;
    spec.availability = availability;
    bench.apply(Command::UpdateNode { id, version: node.meta.version, spec }).unwrap();
}

#[test]
fn tasks_spread_and_scaling_keeps_them_spread() {
    let mut bench = Bench::with_nodes(3);
    let web = bench.create_service(1, service("web", 7, &[]));
    bench.run();
    assert_eq!(bench.running(web), 7);
    assert!(spread(&bench, web).values().all(|count| (2..=3).contains(count)));
    bench.update_service(web, |spec| spec.mode = replicas(3)).unwrap();
    bench.run();
    assert!(spread(&bench, web).values().all(|count| *count == 1));
    // What was scaled away leaves no history behind.
    assert_eq!(bench.store.tasks.len(), 3);
}

#[test]
fn scaling_down_takes_what_does_not_run_first() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 3, &[]));
    bench.run();
    let failed = bench.live(web)[0].id;
    bench.report(failed, TaskState::Failed);
    bench.settle();
    let kept: Vec<_> = bench
        .live(web)
        .iter()
        .filter(|t| t.status.state == TaskState::Running)
        .map(|t| t.id)
        .collect();
    bench.update_service(web, |spec| spec.mode = replicas(2)).unwrap();
    bench.run();
    let mut left: Vec<_> = bench.live(web).iter().map(|t| t.id).collect();
    left.sort_unstable();
    assert_eq!(left, kept);
}

#[test]
fn a_failing_command_is_paced() {
    let mut bench = Bench::with_nodes(1);
    let web = bench.create_service(1, service("web", 1, &[]));
    let mut starts = Vec::new();
    for _ in 0..4 {
        bench.run();
        starts.push(bench.now_ms);
        let task = bench.live(web)[0].id;
        assert_eq!(bench.store.tasks[&task].status.state, TaskState::Running);
        bench.report(task, TaskState::Failed);
        bench.run();
        let waiting = bench.live(web)[0];
        assert_eq!((waiting.status.state, waiting.desired), (TaskState::Ready, TaskState::Ready));
        assert_ne!(waiting.id, task);
        assert_eq!(waiting.slot, Some(1));
        let wake = bench.settle().unwrap();
        bench.now_ms = wake - 1;
        bench.run();
        assert_eq!(bench.running(web), 0);
        bench.now_ms = wake;
    }
    assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == 5_000), "{starts:?}");
}

#[test]
fn history_is_bounded() {
    let mut bench = Bench::with_nodes(1);
    let web = bench.create_service(1, service("web", 1, &[]));
    for _ in 0..12 {
        bench.run();
        let task = bench.live(web)[0].id;
        bench.report(task, TaskState::Failed);
        bench.run();
        bench.now_ms += 5_000;
    }
    bench.run();
    assert_eq!(bench.store.tasks.len(), 1 + 5);
}

#[test]
fn the_policy_says_when_to_give_up() {
    let cases = [
        (RestartCondition::Any, None, TaskState::Complete, 9),
        (RestartCondition::OnFailure, None, TaskState::Complete, 0),
        (RestartCondition::OnFailure, None, TaskState::Failed, 9),
        (RestartCondition::None, None, TaskState::Failed, 0),
        (RestartCondition::Any, Some(3), TaskState::Failed, 3),
        (RestartCondition::Any, Some(0), TaskState::Failed, 9),
        (RestartCondition::Any, Some(7), TaskState::Rejected, 7),
    ];
    for (condition, max_attempts, end, expected) in cases {
        let mut bench = Bench::with_nodes(1);
        let mut spec = service("web", 1, &[]);
        spec.task.restart.condition = condition;
        spec.task.restart.max_attempts = max_attempts;
        let web = bench.create_service(1, spec);
        let mut restarts = 0;
        while restarts < 9 {
            bench.run();
            bench.report(bench.live(web)[0].id, end);
            bench.now_ms += 5_000;
            bench.run();
            if bench.live(web).is_empty() {
                break;
            }
            restarts += 1;
            bench.now_ms += 5_000;
        }
        assert_eq!(restarts, expected, "{condition:?} {max_attempts:?} {end:?}");
    }
}

#[test]
fn attempts_count_within_the_window() {
    let mut bench = Bench::with_nodes(1);
    let mut spec = service("web", 1, &[]);
    spec.task.restart.max_attempts = Some(2);
    spec.task.restart.window = Duration::from_secs(60);
    let web = bench.create_service(1, spec);
    for _ in 0..6 {
        bench.run();
        bench.now_ms += 61_000;
        bench.report(bench.live(web)[0].id, TaskState::Failed);
        bench.run();
        bench.now_ms += 5_000;
        bench.run();
        assert_eq!(bench.running(web), 1, "old attempts do not count");
    }
    for left in [1, 0] {
        bench.report(bench.live(web)[0].id, TaskState::Failed);
        bench.run();
        bench.now_ms += 5_000;
        bench.run();
        assert_eq!(bench.running(web), left);
        if left == 0 {
            break;
        }
    }
}

#[test]
fn a_drained_node_is_left_without_delay() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 4, &[]));
    let every = bench.create_service(2, {
        let mut spec = service("every", 0, &[]);
        spec.mode = ServiceMode::Global;
        spec
    });
    bench.run();
    assert_eq!((bench.running(web), bench.running(every)), (4, 2));
    availability(&mut bench, 2, Availability::Drain);
    bench.run();
    assert_eq!(spread(&bench, web), BTreeMap::from([(node_id(1), 4)]));
    assert_eq!(spread(&bench, every), BTreeMap::from([(node_id(1), 1)]));
    availability(&mut bench, 2, Availability::Active);
    bench.run();
    assert_eq!(bench.running(every), 2);
}

#[test]
fn a_lost_nodes_tasks_are_replaced_and_end_when_it_is_back() {
    let mut bench = Bench::with_nodes(3);
    let web = bench.create_service(1, service("web", 3, &[]));
    bench.run();
    bench.node_state(3, NodeState::Down);
    bench.settle();
    let there = bench.live(web).into_iter().filter(|t| t.node == Some(node_id(3)));
    let stray: Vec<_> = there.map(|task| (task.id, task.desired, task.leases.len())).collect();
    assert_eq!(stray.len(), 1);
    assert_eq!((stray[0].1, stray[0].2), (TaskState::Shutdown, 1), "it still holds its leases");
    let fresh: Vec<_> = bench
        .live(web)
        .iter()
        .filter(|t| t.status.state == TaskState::Assigned)
        .map(|t| (t.id, t.desired))
        .collect();
    assert_eq!(fresh.len(), 1);
    assert_eq!(fresh[0].1, TaskState::Running, "nobody waits for a node that cannot tell");
    bench.node_state(3, NodeState::Ready);
    bench.run();
    assert_eq!((bench.live(web).len(), bench.running(web)), (3, 3));
}

#[test]
fn without_a_node_the_reason_is_said() {
    let mut bench = Bench::with_nodes(2);
    availability(&mut bench, 1, Availability::Pause);
    bench.node_state(2, NodeState::Down);
    let web = bench.create_service(1, service("web", 1, &[]));
    bench.settle();
    let task = bench.live(web)[0];
    assert_eq!(task.status.state, TaskState::Pending);
    assert_eq!(
        task.status.err,
        "no suitable node (2 nodes not available for new tasks: 1 down, 1 paused)"
    );
    bench.node_state(2, NodeState::Ready);
    bench.run();
    assert_eq!(bench.live(web)[0].status.err, "");
    assert_eq!(bench.running(web), 1);
}

#[test]
fn an_update_replaces_one_task_at_a_time() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 4, &[]));
    bench.run();
    bench.update_service(web, |spec| spec.task.force_update += 1).unwrap();
    let mut least = 4;
    for _ in 0..40 {
        bench.settle();
        least = least.min(bench.running(web));
        let next = bench.store.tasks.values().find_map(|task| {
            let goal = task.desired.min(TaskState::Shutdown);
            (task.status.state >= TaskState::Assigned
                && !task.status.state.is_final()
                && task.status.state < goal)
                .then_some((task.id, goal))
        });
        let Some((task, goal)) = next else { break };
        bench.report(task, goal);
    }
    assert_eq!(least, 3);
    let version = bench.store.services[&web].spec_version;
    assert_eq!(bench.running(web), 4);
    assert!(bench.live(web).iter().all(|task| task.spec_version == version));
}

#[test]
fn an_update_heals_a_service_that_cannot_start() {
    let mut bench = Bench::with_nodes(1);
    let web = bench.create_service(1, service("web", 3, &[]));
    bench.settle();
    for task in bench.live(web).iter().map(|t| t.id).collect::<Vec<_>>() {
        bench.report(task, TaskState::Failed);
    }
    bench.settle();
    bench.update_service(web, |spec| spec.task.command = vec!["better".into()]).unwrap();
    bench.run();
    assert_eq!(bench.running(web), 3);
}

#[test]
fn global_tasks_are_made_in_one_transaction() {
    let mut bench = Bench::with_nodes(5);
    let mut spec = service("every", 0, &[]);
    spec.mode = ServiceMode::Global;
    let every = bench.create_service(1, spec);
    bench.round();
    assert_eq!(bench.live(every).len(), 5);
    bench.run();
    assert_eq!(bench.running(every), 5);
}

#[test]
fn a_huge_service_is_made_in_several_transactions() {
    let mut bench = Bench::with_nodes(3);
    let huge = bench.create_service(1, service("huge", 5000, &[]));
    let mut next = 1 << 64;
    let mut fresh = || {
        next += 1;
        next
    };
    let decision = decide(&bench.store, &mut LeaderMemory::default(), 0, &mut fresh);
    let sizes: Vec<usize> = decision
        .commands
        .iter()
        .map(|command| match command {
            Command::ChangeTasks(changes) => changes.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(sizes, [CHANGES_MAX, CHANGES_MAX, 5000 - 2 * CHANGES_MAX]);
    for command in decision.commands {
        bench.apply(command).unwrap();
    }
    assert_eq!(bench.live(huge).len(), 5000);
}
