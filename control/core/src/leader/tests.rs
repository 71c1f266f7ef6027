//! Decisions, case by case. Whole histories are in `crate::sim`.

use std::{collections::BTreeMap, time::Duration};

use mesh_types::{
    NodeId, ServiceId, TaskId,
    spec::{FailureAction, RestartCondition, ServiceMode, ServiceSpec, UpdateOrder},
    task::TaskState,
};

use crate::{
    command::{Command, Rejection},
    fixtures::{Bench, node_id, service, told},
    leader::{LeaderMemory, decide, view::CHANGES_MAX},
    model::{Availability, NodeState, Stop, Task, UpdateState},
    stream::assignments,
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

/// One whose node hears nothing would go on all the same.
#[test]
fn scaling_down_takes_what_can_be_told_first() {
    let mut bench = Bench::with_nodes(3);
    let web = bench.create_service(1, service("web", 3, &[]));
    bench.run();
    let highest = bench.live(web).into_iter().max_by_key(|task| task.slot).unwrap();
    let (id, node) = (highest.id, highest.node.unwrap());
    bench.memory.silent.insert(node);
    bench.update_service(web, |spec| spec.mode = replicas(2)).unwrap();
    bench.run();
    assert_eq!((bench.running(web), bench.live(web).len()), (2, 2));
    assert!(bench.live(web).iter().any(|task| task.id == id));
    bench.update_service(web, |spec| spec.mode = replicas(0)).unwrap();
    bench.run();
    assert_eq!(bench.live(web).len(), 0);
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
            let goal = told(task);
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

/// All tasks of a service that should run, with their nodes.
fn wanted(bench: &Bench, id: ServiceId) -> Vec<&Task> {
    let live = bench.live(id).into_iter();
    live.filter(|task| task.desired <= TaskState::Running).collect()
}

#[test]
fn a_running_task_ends_when_all_know_that_it_drains() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 2, &[]));
    bench.run();
    bench.mute = true;
    bench.update_service(web, |spec| spec.mode = replicas(1)).unwrap();
    let wake = bench.settle().unwrap();
    assert_eq!(wake, bench.now_ms + 10_000);
    let old = bench.live(web).into_iter().find(|t| t.desired == TaskState::Remove).unwrap().clone();
    let Stop::Draining { at, .. } = old.stop else { panic!("{old:?}") };
    let told = |bench: &Bench| {
        let of_node = assignments(&bench.store, old.node.unwrap());
        of_node.iter().find(|task| task.id == old.id).unwrap().desired
    };
    assert_eq!(told(&bench), TaskState::Running);
    bench.memory.acked.insert(node_id(1), at);
    bench.settle();
    assert_eq!(told(&bench), TaskState::Running, "one of two nodes knows");
    // The other is silent: nobody waits for it, unless the leader is too new to tell.
    bench.memory.silent.insert(node_id(2));
    bench.memory.listening = true;
    bench.settle();
    assert_eq!(told(&bench), TaskState::Running, "a new leader listens first");
    bench.memory.listening = false;
    bench.settle();
    assert_eq!(told(&bench), TaskState::Remove);
}

#[test]
fn nobody_waits_longer_than_the_deadline() {
    let mut bench = Bench::with_nodes(1);
    let web = bench.create_service(1, service("web", 1, &[]));
    bench.run();
    bench.mute = true;
    bench.memory.acked.clear();
    bench.update_service(web, |spec| spec.mode = replicas(0)).unwrap();
    let wake = bench.settle().unwrap();
    bench.now_ms = wake - 1;
    bench.run();
    assert_eq!(bench.running(web), 1);
    bench.now_ms = wake;
    bench.run();
    assert_eq!(bench.live(web).len(), 0);
}

#[test]
fn tasks_of_a_removed_service_end_at_once() {
    let mut bench = Bench::with_nodes(1);
    bench.mute = true;
    let web = bench.create_service(1, service("web", 1, &[]));
    bench.run();
    bench.update_service(web, |spec| spec.mode = replicas(0)).unwrap();
    bench.settle();
    assert!(matches!(bench.live(web)[0].stop, Stop::Draining { .. }));
    bench.apply(Command::RemoveService { id: web }).unwrap();
    assert_eq!(bench.live(web)[0].stop, Stop::Released);
    let assigned = &assignments(&bench.store, node_id(1))[0];
    assert_eq!((assigned.desired, assigned.drain), (TaskState::Remove, Duration::ZERO));
}

#[test]
fn a_node_whose_daemon_alone_is_silent_keeps_its_tasks() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 2, &[]));
    bench.run();
    let before = bench.live(web).into_iter().cloned().collect::<Vec<_>>();
    bench.node_status(2, NodeState::Down, false);
    bench.run();
    assert_eq!(bench.live(web), before.iter().collect::<Vec<_>>());
    bench.node_status(2, NodeState::Down, true);
    bench.settle();
    assert_eq!(wanted(&bench, web).len(), 2);
    assert!(wanted(&bench, web).iter().all(|task| task.node == Some(node_id(1))));
    // A day later its tasks are given up, and what they held with them.
    bench.now_ms += 24 * 3600 * 1000;
    bench.run();
    assert_eq!((bench.live(web).len(), bench.running(web)), (2, 2));
    assert!(bench.store.tasks.values().any(|t| t.status.state == TaskState::Orphaned));
}

/// What runs there serves on, cannot be told to end, and may never be.
#[test]
fn a_roll_out_goes_on_past_a_node_whose_daemon_is_down() {
    let orders = [UpdateOrder::StopFirst, UpdateOrder::StartFirst];
    let modes = [replicas(3), ServiceMode::Global];
    for (order, mode) in orders.into_iter().flat_map(|order| modes.map(|mode| (order, mode))) {
        let mut bench = Bench::with_nodes(3);
        let web = bench.create_service(1, ServiceSpec { mode, ..service("web", 3, &[]) });
        bench.run();
        bench.node_status(3, NodeState::Down, false);
        bench
            .update_service(web, |spec| {
                spec.task.force_update += 1;
                spec.update.order = order;
            })
            .unwrap();
        let begin_ms = bench.now_ms;
        bench.run();
        while status(&bench, web).0 != UpdateState::Completed {
            bench.now_ms = bench.settle().expect("an end of the update");
            bench.run();
        }
        let took_ms = bench.now_ms - begin_ms;
        assert!(took_ms < 10_000, "{order:?} {mode:?} took {took_ms} ms");
        let old: Vec<_> = (bench.live(web).into_iter())
            .filter(|task| bench.store.services[&web].outdates(task))
            .map(|task| (task.status.state, told(task)))
            .collect();
        assert_eq!(old, [(TaskState::Running, TaskState::Shutdown)], "{order:?} {mode:?}");
        bench.node_state(3, NodeState::Ready);
        finish(&mut bench);
        assert_eq!((bench.live(web).len(), bench.running(web)), (3, 3), "{order:?} {mode:?}");
        let service = &bench.store.services[&web];
        assert!(bench.live(web).iter().all(|task| !service.outdates(task)));
    }
}

#[test]
fn a_failing_update_pauses_and_says_so() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 3, &[]));
    bench.run();
    bench.update_service(web, |spec| spec.task.force_update += 1).unwrap();
    assert_eq!(status(&bench, web), (UpdateState::Updating, "update in progress".into()));
    let failed = fail_next(&mut bench, web);
    bench.settle();
    let message = format!("update paused due to failure or early termination of task {failed}");
    assert_eq!(status(&bench, web), (UpdateState::Paused, message));
    bench.run();
    assert_eq!(bench.running(web), 2);
    // A better one goes on.
    bench.update_service(web, |spec| spec.task.force_update += 1).unwrap();
    finish(&mut bench);
    assert_eq!(status(&bench, web), (UpdateState::Completed, "update completed".into()));
    assert_eq!(bench.running(web), 3);
}

#[test]
fn a_failing_update_goes_back() {
    for order in [UpdateOrder::StopFirst, UpdateOrder::StartFirst] {
        let mut bench = Bench::with_nodes(2);
        let mut spec = service("web", 3, &[]);
        spec.update.order = order;
        spec.update.on_failure = FailureAction::Rollback;
        let web = bench.create_service(1, spec);
        bench.run();
        let untouched: Vec<_> = bench.live(web).iter().map(|task| task.id).collect();
        bench.update_service(web, |spec| spec.task.command = vec!["bad".into()]).unwrap();
        let failed = fail_next(&mut bench, web);
        bench.settle();
        let message =
            format!("update rolled back due to failure or early termination of task {failed}");
        // Start first took nothing away, so that there is nothing to bring back.
        if order == UpdateOrder::StopFirst {
            assert_eq!(status(&bench, web), (UpdateState::RollbackStarted, message));
        }
        finish(&mut bench);
        let done = (UpdateState::RollbackCompleted, "rollback completed".into());
        assert_eq!(status(&bench, web), done);
        assert_eq!(bench.running(web), 3);
        assert!(bench.live(web).iter().all(|task| task.spec.command == ["server"]));
        let kept = bench.live(web).iter().filter(|task| untouched.contains(&task.id)).count();
        // Those that the update never came to stay, and start first took none away.
        assert_eq!(kept, if order == UpdateOrder::StartFirst { 3 } else { 2 });
    }
}

#[test]
fn a_rollback_that_is_asked_for_goes_by_its_own_policy() {
    let mut bench = Bench::with_nodes(2);
    let mut spec = service("web", 3, &[]);
    spec.update.parallelism = 1;
    spec.rollback.parallelism = 2;
    spec.rollback.delay = Duration::from_secs(20);
    let web = bench.create_service(1, spec);
    bench.run();
    let roll_back = |bench: &mut Bench| {
        let version = bench.version(web);
        bench.apply(Command::RollBackService { id: web, version })
    };
    let none = roll_back(&mut bench).unwrap_err().to_string();
    assert_eq!(none, "service web does not have a previous spec");
    bench.update_service(web, |spec| spec.task.command = vec!["new".into()]).unwrap();
    let stale = bench.version(web);
    finish(&mut bench);
    let late = bench.apply(Command::RollBackService { id: web, version: stale });
    assert_eq!(late.unwrap_err(), Rejection::OutOfSequence);
    roll_back(&mut bench).unwrap();
    let started = (UpdateState::RollbackStarted, "manually requested rollback".into());
    assert_eq!(status(&bench, web), started);
    bench.run();
    let old = |bench: &Bench| {
        bench.live(web).iter().filter(|task| task.spec.command == ["server"]).count()
    };
    assert_eq!((old(&bench), bench.running(web)), (2, 3));
    assert_eq!(status(&bench, web), started);
    bench.now_ms += 20_000;
    finish(&mut bench);
    let done = (UpdateState::RollbackCompleted, "rollback completed".into());
    assert_eq!((old(&bench), status(&bench, web)), (3, done.clone()));
    // Once more, and it is the new one again.
    roll_back(&mut bench).unwrap();
    finish(&mut bench);
    assert_eq!((old(&bench), status(&bench, web)), (0, done));
}

#[test]
fn a_rollback_that_fails_pauses_and_goes_on_when_the_user_says_so() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 3, &[]));
    bench.run();
    bench.update_service(web, |spec| spec.task.command = vec!["new".into()]).unwrap();
    finish(&mut bench);
    let version = bench.version(web);
    bench.apply(Command::RollBackService { id: web, version }).unwrap();
    let failed = fail_next(&mut bench, web);
    bench.settle();
    let message = format!("rollback paused due to failure or early termination of task {failed}");
    assert_eq!(status(&bench, web), (UpdateState::RollbackPaused, message));
    bench.update_service(web, |spec| spec.labels.extend([("a".into(), "b".into())])).unwrap();
    assert_eq!(status(&bench, web).0, UpdateState::RollbackStarted);
    finish(&mut bench);
    assert_eq!(status(&bench, web).0, UpdateState::RollbackCompleted);
    assert!(bench.live(web).iter().all(|task| task.spec.command == ["server"]));
}

#[test]
fn batches_rest_between_each_other() {
    let mut bench = Bench::with_nodes(2);
    let mut spec = service("web", 4, &[]);
    spec.update.parallelism = 2;
    spec.update.delay = Duration::from_secs(20);
    let web = bench.create_service(1, spec);
    bench.run();
    bench.update_service(web, |spec| spec.task.force_update += 1).unwrap();
    bench.run();
    let fresh = |bench: &Bench| {
        let service = &bench.store.services[&web];
        bench.live(web).iter().filter(|task| !service.outdates(task)).count()
    };
    assert_eq!((fresh(&bench), bench.running(web)), (2, 4));
    bench.now_ms += 19_999;
    bench.run();
    assert_eq!(fresh(&bench), 2);
    bench.now_ms += 1;
    bench.run();
    assert_eq!((fresh(&bench), bench.running(web)), (4, 4));
}

#[test]
fn constraints_choose_nodes_and_are_enforced() {
    let mut bench = Bench::with_nodes(3);
    let mut spec = service("web", 1, &[]);
    spec.task.constraints = vec!["node.labels.zone==a".parse().unwrap()];
    let web = bench.create_service(1, spec);
    bench.settle();
    assert_eq!(
        bench.live(web)[0].status.err,
        "no suitable node (scheduling constraints not satisfied on 3 nodes)"
    );
    label(&mut bench, 2, "a");
    bench.run();
    assert_eq!(spread(&bench, web), BTreeMap::from([(node_id(2), 1)]));
    label(&mut bench, 3, "a");
    label(&mut bench, 2, "b");
    bench.run();
    assert_eq!(spread(&bench, web), BTreeMap::from([(node_id(3), 1)]));
    let mut spec = service("every", 0, &[]);
    spec.mode = ServiceMode::Global;
    spec.task.constraints = vec!["node.role!=manager".parse().unwrap()];
    let every = bench.create_service(2, spec);
    bench.run();
    assert_eq!(spread(&bench, every), BTreeMap::from([(node_id(2), 1), (node_id(3), 1)]));
}

fn label(bench: &mut Bench, number: u128, zone: &str) {
    let id = node_id(number);
    let node = bench.store.nodes[&id].clone();
    let mut spec = node.spec;
    spec.labels.insert("zone".into(), zone.into());
    bench.apply(Command::UpdateNode { id, version: node.meta.version, spec }).unwrap();
}

fn status(bench: &Bench, id: ServiceId) -> (UpdateState, String) {
    let update = bench.store.services[&id].update.clone().unwrap();
    (update.state, update.message)
}

/// Goes on until the first task of the new spec is to start, which then fails.
fn fail_next(bench: &mut Bench, id: ServiceId) -> TaskId {
    for _ in 0..20 {
        bench.settle();
        let version = bench.store.services[&id].spec_version;
        let live: Vec<Task> = bench.live(id).into_iter().cloned().collect();
        for task in live {
            let assigned = task.status.state >= TaskState::Assigned;
            if task.spec_version == version && assigned && task.desired == TaskState::Running {
                bench.report(task.id, TaskState::Failed);
                return task.id;
            }
            if assigned && task.status.state < told(&task) {
                bench.report(task.id, told(&task));
            }
        }
    }
    panic!("no new task");
}

/// Lets all the time pass that somebody waits for.
fn finish(bench: &mut Bench) {
    for _ in 0..100 {
        bench.run();
        let Some(wake) = bench.settle() else { return };
        bench.now_ms = bench.now_ms.max(wake);
    }
    panic!("the cluster never rests");
}
