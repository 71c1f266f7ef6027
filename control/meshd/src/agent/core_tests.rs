//! The core alone: a simulated node carries out its steps, fails them, and restarts meshd.

use std::collections::BTreeSet;

use mesh_types::{
    NodeId, ServiceId,
    spec::{RestartCondition, TaskSpec},
};
use proptest::prelude::*;

use super::*;

fn task(number: u128, desired: TaskState) -> TaskAssignment {
    TaskAssignment {
        id: TaskId::from_bits(number),
        name: format!("web.{number}.x"),
        service: ServiceId::from_bits(1),
        service_name: "web".into(),
        slot: Some(1),
        node: NodeId::from_bits(1),
        spec: TaskSpec { args: vec!["sleep".into()], ..TaskSpec::default() },
        leases: Vec::new(),
        desired,
        drain: Duration::ZERO,
        ports: Vec::new(),
    }
}

fn exit(code: i32) -> Exit {
    Exit { code, oom: false, error: None, at_ms: 0 }
}

fn netns() -> PathBuf {
    "/proc/7/ns/net".into()
}

/// The steps that are to be done now, by name.
fn steps(core: &mut Core) -> Vec<&'static str> {
    let mut out = Vec::new();
    while let Some(action) = core.poll_action() {
        out.push(match action.step {
            Step::Prepare(_) => "prepare",
            Step::Attach(..) => "attach",
            Step::Start => "start",
            Step::Watch => "watch",
            Step::Look(_) => "look",
            Step::Close => "close",
            Step::Pause => "pause",
            Step::Stop { .. } => "stop",
            Step::Detach => "detach",
            Step::Remove => "remove",
        });
    }
    out
}

struct Single {
    core: Core,
    id: TaskId,
}

impl Single {
    fn new(desired: TaskState) -> Self {
        let mut core = Core::default();
        core.handle_assign(1, vec![task(1, desired)], &BTreeSet::new());
        Self { core, id: TaskId::from_bits(1) }
    }

    /// Brings it to Running.
    fn running() -> Self {
        let mut single = Self::new(TaskState::Running);
        single.step("prepare", Outcome::Prepared(netns()));
        single.step("attach", Outcome::Done);
        single.step("start", Outcome::Started(42));
        assert_eq!(steps(&mut single.core), ["watch"]);
        single
    }

    fn want(&mut self, desired: TaskState) {
        self.core.handle_assign(2, vec![task(1, desired)], &BTreeSet::new());
    }

    #[track_caller]
    fn step(&mut self, expected: &str, outcome: Outcome) {
        assert_eq!(steps(&mut self.core), [expected]);
        self.core.handle_outcome(3, self.id, outcome);
    }

    fn status(&self) -> TaskStatus {
        self.core.assigned_tasks().next().map(|(_, status, _)| status.clone()).unwrap_or_default()
    }

    #[track_caller]
    fn assert_status(&self, state: TaskState, message: &str, err: &str) {
        let status = self.status();
        assert_eq!((status.state, &*status.message, &*status.err), (state, message, err));
    }
}

#[test]
fn a_task_goes_through_swarms_states() {
    let mut single = Single::new(TaskState::Running);
    single.assert_status(TaskState::Preparing, "preparing", "");
    single.step("prepare", Outcome::Prepared(netns()));
    single.assert_status(TaskState::Preparing, "preparing network", "");
    single.step("attach", Outcome::Done);
    single.assert_status(TaskState::Starting, "starting", "");
    single.step("start", Outcome::Started(42));
    single.assert_status(TaskState::Running, "started", "");
    assert_eq!(single.status().pid, Some(42));
    single.step("watch", Outcome::Ended(exit(0)));
    // Its leases are given back when the final state is reported: not before it is unplugged.
    single.assert_status(TaskState::Running, "started", "");
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Complete, "finished", "");
    assert_eq!(single.status().exit_code, Some(0));
    // Its output stays until it is forgotten.
    assert!(steps(&mut single.core).is_empty());
    single.core.handle_assign(4, Vec::new(), &BTreeSet::new());
    single.step("remove", Outcome::Done);
    assert_eq!(single.core.leaving(), 0);
}

#[test]
fn the_output_of_what_ended_is_kept_as_long_as_it_is_named() {
    let mut single = Single::running();
    let ended = BTreeSet::from([single.id]);
    single.core.handle_outcome(3, single.id, Outcome::Ended(exit(3)));
    single.step("detach", Outcome::Done);
    // Managers heard of its end: it is none of the node's tasks any more.
    single.core.handle_assign(4, Vec::new(), &ended);
    assert!(steps(&mut single.core).is_empty());
    assert_eq!(single.core.leaving(), 0, "nobody waits for what has ended");
    // A daemon that was started again finds it.
    let found = vec![(single.id, FoundState::Exited(exit(3)))];
    let mut again = Core::restore(5, single.core.kept(), found);
    again.handle_assign(6, Vec::new(), &ended);
    again.handle_managers(7, Managers::There);
    single.core = again;
    single.step("detach", Outcome::Done);
    assert!(steps(&mut single.core).is_empty());
    single.core.handle_assign(8, Vec::new(), &BTreeSet::new());
    single.step("remove", Outcome::Done);
}

#[test]
fn ready_waits_for_running() {
    let mut single = Single::new(TaskState::Ready);
    single.step("prepare", Outcome::Prepared(netns()));
    single.step("attach", Outcome::Done);
    single.assert_status(TaskState::Ready, "prepared", "");
    assert!(steps(&mut single.core).is_empty());
    single.want(TaskState::Running);
    assert_eq!(steps(&mut single.core), ["start"]);
}

#[test]
fn failures_carry_their_reason() {
    let mut single = Single::running();
    single.core.handle_outcome(3, single.id, Outcome::Ended(exit(3)));
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Failed, "started", "task: non-zero exit (3)");

    for (limit, words) in [(0, "out of memory"), (64 << 20, "out of memory, limit 64MiB")] {
        let mut single = Single::running();
        let mut task = task(1, TaskState::Running);
        task.spec.resources.limits.amount.memory_bytes = limit;
        single.core.handle_assign(2, vec![task], &BTreeSet::new());
        let exit = Exit { oom: true, ..exit(137) };
        single.core.handle_outcome(3, single.id, Outcome::Ended(exit));
        single.step("detach", Outcome::Done);
        let err = format!("task: non-zero exit (137): {words}");
        single.assert_status(TaskState::Failed, "started", &err);
    }

    let mut single = Single::new(TaskState::Running);
    single.step("prepare", Outcome::Failed("no cgroup2".into()));
    single.assert_status(TaskState::Rejected, "preparing", "no cgroup2");
    single.step("remove", Outcome::Done);

    let mut single = Single::new(TaskState::Running);
    single.step("prepare", Outcome::Prepared(netns()));
    single.step("attach", Outcome::Failed("no device".into()));
    single.step("remove", Outcome::Done);
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Rejected, "preparing", "network: no device");

    let mut single = Single::new(TaskState::Running);
    single.step("prepare", Outcome::Prepared(netns()));
    single.step("attach", Outcome::Done);
    single.step("start", Outcome::Failed("exec: \"nosuch\": not found".into()));
    single.step("remove", Outcome::Done);
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Failed, "starting", "exec: \"nosuch\": not found");
    assert!(steps(&mut single.core).is_empty());
}

#[test]
fn a_stop_uses_the_services_signal_and_grace() {
    let mut single = Single::running();
    let mut assignment = task(1, TaskState::Shutdown);
    assignment.spec.stop_signal = Some("SIGQUIT".into());
    assignment.spec.stop_grace_period = Some(Duration::from_secs(3));
    single.core.handle_assign(2, vec![assignment], &BTreeSet::new());
    let action = single.core.poll_action().unwrap();
    assert_eq!(action.step, Step::Stop { signal: 3, grace: Duration::from_secs(3) });
    single.core.handle_outcome(3, single.id, Outcome::Done);
    assert!(steps(&mut single.core).is_empty());
    single.core.handle_outcome(3, single.id, Outcome::Ended(exit(143)));
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Shutdown, "shutdown", "");
    assert_eq!(single.status().exit_code, Some(143));
    // Its log is kept while it is in the set.
    assert!(steps(&mut single.core).is_empty());
    single.want(TaskState::Remove);
    single.step("remove", Outcome::Done);
    assert!(steps(&mut single.core).is_empty());
}

#[test]
fn one_that_left_the_set_is_stopped_as_its_service_says() {
    let mut single = Single::running();
    let mut assignment = task(1, TaskState::Running);
    assignment.spec.stop_signal = Some("SIGINT".into());
    single.core.handle_assign(2, vec![assignment], &BTreeSet::new());
    single.core.handle_assign(3, Vec::new(), &BTreeSet::new());
    let action = single.core.poll_action().unwrap();
    assert_eq!(action.step, Step::Stop { signal: 2, grace: GRACE });
    assert_eq!((single.core.leaving(), single.core.assigned_tasks().count()), (1, 0));
    // Also when meshd restarts before it is done, and no manager is there.
    let running = FoundState::Running { netns: netns(), pid: 42 };
    let mut core = Core::restore(9, single.core.kept(), vec![(single.id, running)]);
    assert_eq!(steps(&mut core), ["watch", "stop"]);
}

#[test]
fn one_that_never_ran_is_shut_down_without_running() {
    let mut single = Single::new(TaskState::Shutdown);
    assert!(steps(&mut single.core).is_empty());
    single.assert_status(TaskState::Shutdown, "shutdown", "");

    let mut single = Single::new(TaskState::Ready);
    single.step("prepare", Outcome::Prepared(netns()));
    single.step("attach", Outcome::Done);
    single.want(TaskState::Shutdown);
    single.step("remove", Outcome::Done);
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Shutdown, "shutdown", "");
}

#[test]
fn what_must_succeed_is_tried_again_later_and_says_why() {
    let mut single = Single::running();
    single.core.handle_outcome(3, single.id, Outcome::Ended(exit(0)));
    single.step("detach", Outcome::Failed("busy".into()));
    // The namespace is gone with the process, so the end is reported all the same.
    single.assert_status(TaskState::Complete, "finished", "");
    let again = single.core.poll_action().unwrap();
    assert_eq!(again.step, Step::Detach);
    assert!(again.after > Duration::ZERO && again.after <= RETRY_MAX);
}

#[test]
fn a_restart_takes_a_running_task_over() {
    let single = Single::running();
    let kept = single.core.kept();
    let found = |state| vec![(TaskId::from_bits(1), state)];
    let running = FoundState::Running { netns: netns(), pid: 42 };
    let mut core = Core::restore(9, kept.clone(), found(running.clone()));
    // Plugged anew, watched, not started.
    assert_eq!(steps(&mut core), ["watch", "attach"]);
    core.handle_outcome(9, single.id, Outcome::Failed("no map".into()));
    let status = core.assigned_tasks().next().unwrap().1.clone();
    assert_eq!((status.state, &*status.err), (TaskState::Running, "network: no map"));
    assert_eq!(steps(&mut core), ["attach"]);

    let mut core = Core::restore(9, kept.clone(), found(FoundState::Exited(exit(4))));
    core.handle_managers(9, Managers::There);
    assert_eq!(steps(&mut core), ["detach"]);
    core.handle_outcome(9, single.id, Outcome::Done);
    let status = core.assigned_tasks().next().unwrap().1.clone();
    assert_eq!((status.state, status.exit_code), (TaskState::Failed, Some(4)));

    for found in [found(FoundState::Lost), Vec::new()] {
        let mut core = Core::restore(9, kept.clone(), found);
        core.handle_managers(9, Managers::There);
        assert_eq!(steps(&mut core), ["detach"]);
        core.handle_outcome(9, single.id, Outcome::Done);
        let status = core.assigned_tasks().next().unwrap().1.clone();
        assert!(status.state == TaskState::Failed && status.err.contains("lost"), "{status:?}");
    }

    // Without its assignment it is left alone until a manager has spoken.
    let mut core = Core::restore(9, Vec::new(), found(running));
    assert_eq!(steps(&mut core), ["watch"]);
    let mut other = Core::restore(9, Vec::new(), Vec::new());
    core.handle_assign(10, vec![task(1, TaskState::Running)], &BTreeSet::new());
    assert_eq!(steps(&mut core), ["attach"]);
    core.handle_outcome(10, single.id, Outcome::Done);
    core.handle_assign(11, Vec::new(), &BTreeSet::new());
    assert_eq!(steps(&mut core), ["stop"]);
    other.handle_assign(12, Vec::new(), &BTreeSet::new());
    assert_eq!(other.leaving(), 0);
}

fn server(desired: TaskState, drain_ms: u64) -> TaskAssignment {
    TaskAssignment {
        ports: vec![(Protocol::Tcp, 80), (Protocol::Udp, 7)],
        drain: Duration::from_millis(drain_ms),
        ..task(1, desired)
    }
}

fn saw(listening: &[(Protocol, u16)], connections: usize) -> Outcome {
    let sockets = Sockets {
        listening: listening.iter().copied().collect(),
        connections: vec![80; connections],
    };
    Outcome::Looked(sockets, Duration::from_millis(100))
}

const TCP: (Protocol, u16) = (Protocol::Tcp, 80);
const UDP: (Protocol, u16) = (Protocol::Udp, 7);

/// A server whose process was started, with its first look under way.
fn started_server() -> Single {
    let mut core = Core::default();
    core.handle_assign(1, vec![server(TaskState::Running, 1000)], &BTreeSet::new());
    let mut single = Single { core, id: TaskId::from_bits(1) };
    single.step("prepare", Outcome::Prepared(netns()));
    single.step("attach", Outcome::Done);
    single.step("start", Outcome::Started(42));
    single.assert_status(TaskState::Starting, "started; it does not listen yet", "");
    assert_eq!(single.status().pid, Some(42));
    assert_eq!(steps(&mut single.core), ["watch", "look"]);
    single
}

fn running_server() -> Single {
    let mut single = started_server();
    single.core.handle_outcome(3, single.id, saw(&[TCP, UDP], 0));
    single.assert_status(TaskState::Running, "started", "");
    assert!(steps(&mut single.core).is_empty());
    single
}

#[test]
fn a_server_runs_once_all_its_ports_are_open() {
    let mut single = started_server();
    single.core.handle_outcome(3, single.id, saw(&[TCP], 0));
    single.assert_status(TaskState::Starting, "started; it does not listen yet", "");
    let again = single.core.poll_action().unwrap();
    assert_eq!((again.step, again.after), (Step::Look(netns()), LOOK_OPENING));
    assert!(single.core.take_changed());
    single.core.handle_outcome(3, single.id, saw(&[TCP], 0));
    assert!(!single.core.take_changed(), "a look that tells nothing new costs nothing");
    single.step("look", saw(&[TCP, UDP], 0));
    assert!(single.core.take_changed());
    single.assert_status(TaskState::Running, "started", "");
    assert!(steps(&mut single.core).is_empty());
}

#[test]
fn a_server_that_never_listens_runs_all_the_same_and_says_so() {
    let mut single = started_server();
    for _ in 0..49 {
        single.core.handle_outcome(3, single.id, saw(&[UDP], 0));
        single.assert_status(TaskState::Starting, "started; it does not listen yet", "");
        assert_eq!(steps(&mut single.core), ["look"]);
    }
    single.core.handle_outcome(3, single.id, saw(&[UDP], 0));
    single.assert_status(TaskState::Running, "started; nothing listens on port 80/tcp yet", "");
    assert!(steps(&mut single.core).is_empty());
    // Nobody is asked again after a restart of meshd.
    let running = FoundState::Running { netns: netns(), pid: 42 };
    let mut core = Core::restore(9, single.core.kept(), vec![(single.id, running)]);
    assert_eq!(steps(&mut core), ["watch", "attach"]);
    core.handle_outcome(9, single.id, Outcome::Done);
    assert!(steps(&mut core).is_empty());
}

#[test]
fn a_server_that_ends_while_it_starts_has_failed() {
    let mut single = started_server();
    single.core.handle_outcome(3, single.id, Outcome::Ended(exit(1)));
    single.core.handle_outcome(3, single.id, saw(&[TCP, UDP], 0));
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Failed, "started", "task: non-zero exit (1)");
    // One that is not wanted any more has no connections to wait for.
    let mut single = started_server();
    single.core.handle_assign(3, vec![server(TaskState::Shutdown, 1000)], &BTreeSet::new());
    single.core.handle_outcome(3, single.id, saw(&[TCP], 1));
    assert_eq!(steps(&mut single.core), ["stop"]);
}

#[test]
fn one_on_a_network_is_waited_for_a_moment() {
    let mut assignment = task(1, TaskState::Running);
    assignment.leases = vec![mesh_types::task::EndpointLease {
        endpoint: mesh_types::EndpointId::MIN,
        kind: InterfaceKind::Overlay { network: mesh_types::NetworkId::from_bits(1), index: 0 },
        address: "10.0.1.5/24".parse().unwrap(),
    }];
    let mut core = Core::default();
    core.handle_assign(1, vec![assignment], &BTreeSet::new());
    let mut single = Single { core, id: TaskId::from_bits(1) };
    single.step("prepare", Outcome::Prepared(netns()));
    single.step("attach", Outcome::Done);
    single.step("start", Outcome::Started(42));
    assert_eq!(steps(&mut single.core), ["watch", "look"]);
    for _ in 0..4 {
        single.core.handle_outcome(3, single.id, saw(&[], 0));
        assert_eq!(steps(&mut single.core), ["look"]);
    }
    single.core.handle_outcome(3, single.id, saw(&[], 0));
    single.assert_status(TaskState::Running, "started", "");
}

#[test]
fn connections_end_before_the_task_does() {
    let mut single = running_server();
    single.core.handle_assign(3, vec![server(TaskState::Shutdown, 1000)], &BTreeSet::new());
    single.step("close", Outcome::Done);
    single.step("look", saw(&[TCP], 3));
    single.assert_status(TaskState::Running, "draining: 3 connections open", "");
    // One quiet look is not enough: a connection may be on its way.
    single.step("look", saw(&[TCP], 0));
    single.step("look", saw(&[TCP], 1));
    single.step("look", saw(&[TCP], 0));
    let again = single.core.poll_action().unwrap();
    assert_eq!((again.step, again.after), (Step::Look(netns()), LOOK_DRAINING));
    single.core.handle_outcome(3, single.id, saw(&[TCP], 0));
    assert_eq!(steps(&mut single.core), ["stop"]);
    single.core.handle_outcome(3, single.id, Outcome::Done);
    single.core.handle_outcome(3, single.id, Outcome::Ended(exit(0)));
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Shutdown, "shutdown", "");
}

#[test]
fn draining_has_an_end() {
    let mut single = running_server();
    single.core.handle_assign(3, vec![server(TaskState::Shutdown, 1000)], &BTreeSet::new());
    // One that takes new connections all the while ends, too.
    single.step("close", Outcome::Failed("no map".into()));
    for _ in 0..10 {
        single.step("look", saw(&[TCP], 1));
    }
    assert_eq!(steps(&mut single.core), ["stop"]);

    // Cut short by a later word.
    let mut single = running_server();
    single.core.handle_assign(3, vec![server(TaskState::Shutdown, 1000)], &BTreeSet::new());
    single.step("close", Outcome::Done);
    single.step("look", saw(&[TCP], 1));
    single.step("look", saw(&[TCP], 1));
    assert_eq!(steps(&mut single.core), ["look"]);
    single.core.handle_assign(3, vec![server(TaskState::Remove, 100)], &BTreeSet::new());
    single.core.handle_outcome(3, single.id, saw(&[TCP], 1));
    assert_eq!(steps(&mut single.core), ["stop"]);

    // And by the task's own end.
    let mut single = running_server();
    single.core.handle_assign(3, vec![server(TaskState::Shutdown, 1000)], &BTreeSet::new());
    single.step("close", Outcome::Done);
    assert_eq!(steps(&mut single.core), ["look"]);
    single.core.handle_outcome(3, single.id, Outcome::Ended(exit(0)));
    single.core.handle_outcome(3, single.id, saw(&[], 0));
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Shutdown, "shutdown", "");
}

/// A busy server has another number of connections at each look.
#[test]
fn draining_is_told_once_a_second() {
    let mut single = running_server();
    single.core.handle_assign(3, vec![server(TaskState::Shutdown, 10_000)], &BTreeSet::new());
    single.step("close", Outcome::Done);
    let mut told = Vec::new();
    for open in 1..=30 {
        single.step("look", saw(&[TCP], open));
        let message = single.status().message;
        if told.last() != Some(&message) {
            told.push(message);
        }
    }
    let counts = [1, 10, 20, 30].map(|open| match open {
        1 => "draining: 1 connection open".to_owned(),
        _ => format!("draining: {open} connections open"),
    });
    assert_eq!(told, counts);
}

#[test]
fn a_restart_while_draining_drains_anew_with_its_interfaces() {
    let mut single = running_server();
    single.core.handle_assign(3, vec![server(TaskState::Shutdown, 1000)], &BTreeSet::new());
    single.step("close", Outcome::Done);
    single.step("look", saw(&[TCP], 1));
    let found = || vec![(single.id, FoundState::Running { netns: netns(), pid: 42 })];
    let mut core = Core::restore(9, single.core.kept(), found());
    assert_eq!(steps(&mut core), ["watch", "attach"]);
    core.handle_outcome(9, single.id, Outcome::Done);
    assert_eq!(steps(&mut core), ["close"]);
    core.handle_outcome(9, single.id, Outcome::Done);
    assert_eq!(steps(&mut core), ["look"]);
    // Without interfaces there is nothing to wait for.
    let mut core = Core::restore(9, single.core.kept(), found());
    assert_eq!(steps(&mut core), ["watch", "attach"]);
    core.handle_outcome(9, single.id, Outcome::Failed("no map".into()));
    assert_eq!(steps(&mut core), ["stop"]);
}

/// Ends by itself and is unplugged while no manager is there.
fn ended_alone(single: &mut Single, code: i32) {
    single.core.handle_managers(4, Managers::Away);
    single.core.handle_outcome(4, single.id, Outcome::Ended(exit(code)));
    single.step("detach", Outcome::Done);
}

#[test]
fn without_managers_a_task_is_started_again_here() {
    let mut single = Single::running();
    for message in [
        "restarted once while no manager was reached",
        "restarted 2 times while no manager was reached",
    ] {
        ended_alone(&mut single, 1);
        let pause = single.core.poll_action().unwrap();
        assert_eq!((pause.step, pause.after), (Step::Pause, Duration::from_secs(5)));
        assert_eq!(single.status().state, TaskState::Running, "its leases are kept");
        single.core.handle_outcome(5, single.id, Outcome::Done);
        single.step("prepare", Outcome::Prepared(netns()));
        single.step("attach", Outcome::Done);
        single.step("start", Outcome::Started(43));
        single.assert_status(TaskState::Running, message, "");
        assert_eq!(single.status().pid, Some(43));
        assert_eq!(steps(&mut single.core), ["watch"]);
    }
    // Managers replace it themselves again.
    single.core.handle_managers(6, Managers::There);
    single.core.handle_outcome(6, single.id, Outcome::Ended(exit(1)));
    single.step("detach", Outcome::Done);
    single.assert_status(TaskState::Failed, "started", "task: non-zero exit (1)");
    assert!(steps(&mut single.core).is_empty());
}

#[test]
fn managers_that_come_back_during_the_pause_decide() {
    let mut single = Single::running();
    ended_alone(&mut single, 1);
    assert_eq!(steps(&mut single.core), ["pause"]);
    single.core.handle_managers(5, Managers::There);
    single.assert_status(TaskState::Failed, "started", "task: non-zero exit (1)");
    assert_eq!(single.status().exit_code, Some(1));
    single.core.handle_outcome(6, single.id, Outcome::Done);
    assert!(steps(&mut single.core).is_empty());
}

#[test]
fn what_ends_while_it_is_open_who_decides_waits() {
    for managers in [Managers::There, Managers::Away] {
        let mut single = Single::running();
        single.core.handle_managers(4, Managers::Lost);
        single.core.handle_outcome(4, single.id, Outcome::Ended(exit(1)));
        single.step("detach", Outcome::Done);
        assert!(steps(&mut single.core).is_empty());
        assert_eq!(single.status().state, TaskState::Running, "its leases are kept");
        single.core.handle_managers(5, managers);
        if managers == Managers::Away {
            assert_eq!(steps(&mut single.core), ["pause"]);
        } else {
            single.assert_status(TaskState::Failed, "started", "task: non-zero exit (1)");
            assert!(steps(&mut single.core).is_empty());
        }
    }
}

#[test]
fn restarts_without_managers_keep_to_the_policy() {
    let limited = |condition, code| {
        let mut assignment = task(1, TaskState::Running);
        assignment.spec.restart.condition = condition;
        assignment.spec.restart.max_attempts = Some(1);
        let mut single = Single::running();
        single.core.handle_assign(2, vec![assignment], &BTreeSet::new());
        ended_alone(&mut single, code);
        single
    };
    for (condition, code) in [(RestartCondition::None, 1), (RestartCondition::OnFailure, 0)] {
        let mut single = limited(condition, code);
        assert!(single.status().state.is_final(), "{condition:?}");
        assert!(steps(&mut single.core).is_empty());
    }
    let mut single = limited(RestartCondition::Any, 1);
    single.step("pause", Outcome::Done);
    // A start that fails is an attempt too.
    single.step("prepare", Outcome::Failed("no cgroup2".into()));
    single.assert_status(TaskState::Rejected, "preparing", "no cgroup2");
}

#[test]
fn one_that_ended_while_meshd_was_away_is_started_again_and_counted_on() {
    let mut assignment = task(1, TaskState::Running);
    assignment.spec.restart.max_attempts = Some(2);
    let mut single = Single::running();
    single.core.handle_assign(2, vec![assignment], &BTreeSet::new());
    ended_alone(&mut single, 1);
    single.step("pause", Outcome::Done);
    single.step("prepare", Outcome::Prepared(netns()));
    single.step("attach", Outcome::Done);
    single.step("start", Outcome::Started(43));
    let found = || vec![(TaskId::from_bits(1), FoundState::Exited(exit(4)))];
    for left in [true, false] {
        let core = Core::restore(9, single.core.kept(), found());
        single = Single { core, id: TaskId::from_bits(1) };
        single.step("detach", Outcome::Done);
        single.core.handle_managers(10, Managers::Away);
        if !left {
            single.assert_status(TaskState::Failed, "started", "task: non-zero exit (4)");
            break;
        }
        single.step("pause", Outcome::Done);
        single.step("prepare", Outcome::Prepared(netns()));
        let message = "restarted 2 times while no manager was reached";
        single.assert_status(TaskState::Running, message, "");
    }
}

/// What exists of one task in the simulated node.
#[derive(Debug, Default, Clone)]
struct Real {
    files: bool,
    created: bool,
    running: bool,
    ended: Option<Exit>,
    plugged: bool,
    starts: u32,
    detach_failed: bool,
}

#[derive(Debug, Default)]
struct World {
    real: BTreeMap<TaskId, Real>,
    pending: Vec<Action>,
    reported: BTreeMap<TaskId, TaskState>,
    forgotten: BTreeSet<TaskId>,
    core: Core,
    now: u64,
}

#[derive(Debug, Clone)]
enum Op {
    Assign(Vec<(u8, u8)>),
    /// Carry out a pending step, well or not.
    Carry(usize, bool),
    /// A running task ends by itself.
    Exit(u8, i32),
    Restart,
}

impl World {
    fn collect(&mut self) {
        while let Some(action) = self.core.poll_action() {
            if action.step != Step::Watch {
                let clash =
                    self.pending.iter().any(|p| p.task == action.task && p.step != Step::Watch);
                assert!(!clash, "two steps at once: {action:?} in {:?}", self.pending);
            }
            self.pending.push(action);
        }
        for (assignment, status, _) in self.core.assigned_tasks() {
            let last = self.reported.entry(assignment.id).or_default();
            assert!(status.state >= *last, "went back from {last:?} to {status:?}");
            *last = status.state;
            assert!(status.state.is_final() || !status.message.is_empty(), "{status:?}");
            let real = self.real.entry(assignment.id).or_default();
            if status.state.is_final() {
                assert!(!real.running && !real.created, "final, but there: {real:?}");
                assert!(!real.plugged || real.detach_failed, "final, but plugged: {real:?}");
            }
        }
    }

    fn carry(&mut self, index: usize, well: bool) {
        let waiting = |action: &Action, real: &BTreeMap<TaskId, Real>| {
            let ended = real.get(&action.task).is_some_and(|real| real.ended.is_some());
            action.step != Step::Watch || ended
        };
        let ready: Vec<usize> =
            (0..self.pending.len()).filter(|at| waiting(&self.pending[*at], &self.real)).collect();
        if ready.is_empty() {
            return;
        }
        let action = self.pending.remove(ready[index % ready.len()]);
        let real = self.real.entry(action.task).or_default();
        let outcome = if well || action.step == Step::Watch {
            real.carry_out(&action.step)
        } else {
            real.detach_failed |= action.step == Step::Detach;
            if action.step == Step::Start {
                // The shim records a failed start and goes.
                *real = Real {
                    starts: real.starts,
                    plugged: real.plugged,
                    files: true,
                    ..Real::default()
                };
            }
            Outcome::Failed("no".into())
        };
        self.core.handle_outcome(self.now, action.task, outcome);
    }

    fn restart(&mut self) {
        // A step under way may or may not be done: here, it is not. One that is, is the case of a
        // restart after it.
        self.pending.clear();
        let found = self.real.iter().filter_map(|(id, real)| Some((*id, real.found()?))).collect();
        self.core = Core::restore(self.now, self.core.kept(), found);
    }

    fn run(&mut self, op: Op) {
        self.now += 1;
        match op {
            Op::Assign(set) => {
                let desired =
                    [TaskState::Ready, TaskState::Running, TaskState::Shutdown, TaskState::Remove];
                let set: BTreeMap<u8, u8> = set.into_iter().collect();
                let set = set.iter().map(|(id, want)| {
                    let want = desired[usize::from(*want) % desired.len()];
                    let mut task = task(u128::from(*id), want);
                    // Half of them are servers, whose ports never open here.
                    if id % 2 == 1 {
                        task.ports = vec![(Protocol::Tcp, 80)];
                        task.drain = Duration::from_secs(1);
                    }
                    task
                });
                let set: Vec<TaskAssignment> = set
                    // Managers do not name a task again that they have forgotten.
                    .filter(|t| !self.forgotten.contains(&t.id))
                    .collect();
                let named: BTreeSet<TaskId> = set.iter().map(|t| t.id).collect();
                let known = self.reported.keys().copied();
                self.forgotten.extend(known.filter(|id| !named.contains(id)));
                self.core.handle_assign(self.now, set, &BTreeSet::new());
            }
            Op::Carry(index, well) => self.carry(index, well),
            Op::Exit(id, code) => {
                let real = self.real.entry(TaskId::from_bits(u128::from(id))).or_default();
                if real.running {
                    real.end(code);
                }
            }
            Op::Restart => self.restart(),
        }
        self.collect();
    }
}

impl Real {
    fn end(&mut self, code: i32) {
        self.running = false;
        self.created = false;
        self.ended = Some(exit(code));
    }

    fn found(&self) -> Option<FoundState> {
        if self.running {
            Some(FoundState::Running { netns: netns(), pid: 1 })
        } else if self.created {
            Some(FoundState::Created { netns: netns() })
        } else if let Some(exit) = &self.ended {
            Some(FoundState::Exited(exit.clone()))
        } else {
            self.files.then_some(FoundState::Lost)
        }
    }

    fn carry_out(&mut self, step: &Step) -> Outcome {
        match step {
            Step::Prepare(_) => {
                assert!(!self.running && self.starts == 0, "prepared again after it ran: {self:?}");
                (self.files, self.created) = (true, true);
                Outcome::Prepared(netns())
            }
            Step::Attach(..) => {
                self.plugged = true;
                Outcome::Done
            }
            Step::Start => {
                assert!(self.created && self.plugged, "started unplugged: {self:?}");
                assert_eq!(self.starts, 0, "started twice");
                (self.created, self.running) = (false, true);
                self.starts += 1;
                Outcome::Started(1)
            }
            Step::Pause => Outcome::Done,
            Step::Close => {
                // It may have ended by itself meanwhile.
                assert!(self.plugged, "closed while it is not plugged: {self:?}");
                Outcome::Done
            }
            Step::Look(_) => Outcome::Looked(Sockets::default(), Duration::from_millis(100)),
            Step::Watch => match &self.ended {
                Some(exit) => Outcome::Ended(exit.clone()),
                None => Outcome::Lost("gone".into()),
            },
            Step::Stop { .. } => {
                if self.running {
                    self.end(143);
                }
                Outcome::Done
            }
            Step::Detach => {
                assert!(!self.running && !self.created, "unplugged while it is there: {self:?}");
                self.plugged = false;
                Outcome::Done
            }
            Step::Remove => {
                assert!(!self.running, "removed while running");
                *self = Self { plugged: self.plugged, starts: self.starts, ..Self::default() };
                Outcome::Done
            }
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let set = proptest::collection::vec((0u8..4, 0u8..4), 0..4);
    prop_oneof![
        2 => set.prop_map(Op::Assign),
        8 => (any::<usize>(), proptest::bool::weighted(0.8))
            .prop_map(|(at, well)| Op::Carry(at, well)),
        1 => (0u8..4, prop_oneof![Just(0), Just(3)]).prop_map(|(id, code)| Op::Exit(id, code)),
        1 => Just(Op::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn every_history_is_orderly_and_ends_clean(ops in proptest::collection::vec(op(), 0..120)) {
        let mut world = World::default();
        for op in ops {
            world.run(op);
        }
        world.run(Op::Assign(Vec::new()));
        let mut rounds = 0;
        while !world.pending.is_empty() {
            world.run(Op::Carry(0, true));
            rounds += 1;
            prop_assert!(rounds < 1000, "no end: {:?}", world.pending);
        }
        prop_assert_eq!(world.core.leaving(), 0);
        for (id, real) in world.real {
            let left = real.files || real.created || real.running || real.plugged;
            prop_assert!(!left, "{} left {:?}", id, real);
        }
    }

    #[test]
    fn with_all_well_every_task_gets_where_it_should(
        wants in proptest::collection::vec(0u8..3, 1..6)
    ) {
        let mut world = World::default();
        let set = wants.iter().enumerate().map(|(id, want)| (id as u8, *want)).collect();
        world.run(Op::Assign(set));
        for _ in 0..400 {
            world.run(Op::Carry(0, true));
        }
        let reached: Vec<TaskState> =
            world.core.assigned_tasks().map(|(_, s, _)| s.state).collect();
        let expected: Vec<TaskState> = wants
            .iter()
            .map(|want| usize::from(*want))
            .map(|want| [TaskState::Ready, TaskState::Running, TaskState::Shutdown][want])
            .collect();
        prop_assert_eq!(reached, expected);
    }
}
