//! What nodes have room for, and how tasks are spread.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::{
    NodeId, ServiceId,
    resources::Amount,
    spec::{ServiceMode, ServiceSpec, UpdateOrder},
};
use proptest::prelude::*;

use crate::{
    command::Command,
    fixtures::{Bench, NODE_CAPACITY, node_id, service},
    leader::room::placed,
    model::{Node, Task, UpdateState},
};

const CPU: u64 = 1_000_000_000;
const GIB: u64 = 1 << 30;

fn reserving(name: &str, replicas: u64, cpus: u64, gib: u64) -> ServiceSpec {
    let mut spec = service(name, replicas, &[]);
    spec.task.resources.reserved = Amount { nano_cpus: cpus * CPU, memory_bytes: gib * GIB };
    spec
}

fn waits(bench: &Bench, id: ServiceId) -> BTreeSet<String> {
    let waiting = |task: &&Task| task.node.is_none() || placed(task).is_none();
    bench.live(id).into_iter().filter(waiting).map(|task| task.status.err.clone()).collect()
}

fn label(bench: &mut Bench, number: u128, key: &str, value: &str) {
    let Node { meta, mut spec, id, .. } = bench.store.nodes[&node_id(number)].clone();
    spec.labels.insert(key.into(), value.into());
    bench.apply(Command::UpdateNode { id, version: meta.version, spec }).unwrap();
}

/// Time passes until nothing is left to do.
fn rest(bench: &mut Bench) {
    bench.run();
    while let Some(wake) = bench.settle() {
        bench.now_ms = wake;
        bench.run();
    }
}

fn by_node(bench: &Bench, id: ServiceId) -> BTreeMap<NodeId, usize> {
    let mut counts = BTreeMap::new();
    for node in bench.live(id).into_iter().filter_map(placed) {
        *counts.entry(node).or_default() += 1;
    }
    counts
}

#[test]
fn what_is_reserved_is_kept_and_a_task_waits_for_its_room() {
    // Nodes of 4 CPUs and 8 GiB.
    let mut bench = Bench::with_nodes(3);
    let big = bench.create_service(1, reserving("big", 4, 3, 1));
    let wide = bench.create_service(2, reserving("wide", 1, 0, 8));
    bench.run();
    assert_eq!(bench.running(big), 3);
    let words = |text: &str| BTreeSet::from([text.to_owned()]);
    assert_eq!(waits(&bench, big), words("no suitable node (insufficient CPUs on 3 nodes)"));
    assert_eq!(waits(&bench, wide), words("no suitable node (insufficient memory on 3 nodes)"));
    let huge = bench.create_service(3, reserving("huge", 1, 5, 9));
    bench.run();
    let text = "no suitable node (insufficient CPUs and memory on 3 nodes)";
    assert_eq!(waits(&bench, huge), words(text));
    // Room is made: the oldest service first.
    bench.update_service(big, |spec| spec.mode = ServiceMode::Replicated { replicas: 2 }).unwrap();
    bench.run();
    assert_eq!((bench.running(big), bench.running(wide)), (2, 1));
    // Others that reserve nothing fit anywhere.
    let small = bench.create_service(4, service("small", 3, &[]));
    bench.run();
    assert_eq!(bench.running(small), 3);
}

#[test]
fn a_global_task_waits_on_its_own_node() {
    let mut bench = Bench::with_nodes(2);
    let mut spec = reserving("all", 0, 3, 0);
    spec.mode = ServiceMode::Global;
    let one = bench.create_service(1, reserving("one", 1, 2, 0));
    bench.run();
    let all = bench.create_service(2, spec);
    bench.run();
    assert_eq!((bench.running(one), bench.running(all)), (1, 1));
    assert_eq!(bench.live(all).len(), 2);
    let text = "no suitable node (insufficient CPUs on 1 node)";
    assert_eq!(waits(&bench, all), BTreeSet::from([text.to_owned()]));
    bench.apply(Command::RemoveService { id: one }).unwrap();
    bench.run();
    assert_eq!(bench.running(all), 2);
}

#[test]
fn a_node_runs_no_more_than_it_may() {
    let mut bench = Bench::with_nodes(2);
    let mut spec = service("web", 5, &[]);
    spec.task.max_per_node = 2;
    let web = bench.create_service(1, spec);
    bench.run();
    assert_eq!(by_node(&bench, web).into_values().collect::<Vec<_>>(), [2, 2]);
    let text = "no suitable node (max replicas per node reached on 2 nodes)";
    assert_eq!(waits(&bench, web), BTreeSet::from([text.to_owned()]));
    bench.update_service(web, |spec| spec.task.max_per_node = 3).unwrap();
    rest(&mut bench);
    assert_eq!(bench.running(web), 5);
}

/// Start first would wait for ever for what only the old task's end can give.
#[test]
fn without_room_for_both_the_new_one_comes_in_the_old_ones_place() {
    let full = |spec: &mut ServiceSpec| spec.task.resources.reserved.nano_cpus = 3 * CPU;
    let single = |spec: &mut ServiceSpec| spec.task.max_per_node = 1;
    for tight in [full as fn(&mut ServiceSpec), single] {
        let mut bench = Bench::with_nodes(2);
        let mut spec = service("web", 2, &[]);
        tight(&mut spec);
        spec.update.order = UpdateOrder::StartFirst;
        let web = bench.create_service(1, spec);
        bench.run();
        assert_eq!(bench.running(web), 2);
        bench.update_service(web, |spec| spec.task.force_update += 1).unwrap();
        rest(&mut bench);
        let service = &bench.store.services[&web];
        assert_eq!(service.update.as_ref().unwrap().state, UpdateState::Completed);
        assert!(bench.live(web).iter().all(|task| !service.outdates(task)));
        // One that asks for more than any node has takes nothing away.
        bench.update_service(web, |spec| spec.task.resources.reserved.nano_cpus = 9 * CPU).unwrap();
        bench.run();
        assert_eq!(bench.running(web), 2);
    }
}

#[test]
fn tasks_are_spread_over_labels_first() {
    let mut bench = Bench::with_nodes(5);
    // Zone a has three nodes, b one, and one has none; racks within a.
    for (number, zone, rack) in [(1, "a", "1"), (2, "a", "1"), (3, "a", "2"), (4, "b", "1")] {
        label(&mut bench, number, "zone", zone);
        label(&mut bench, number, "rack", rack);
    }
    let mut spec = service("web", 12, &[]);
    spec.task.spread =
        vec!["node.labels.zone".parse().unwrap(), "node.labels.rack".parse().unwrap()];
    let web = bench.create_service(1, spec);
    bench.run();
    let counts: Vec<usize> = by_node(&bench, web).into_values().collect();
    assert_eq!(counts, [1, 1, 2, 4, 4]);
}

proptest! {
    /// Whatever is asked for: no node has more reserved than it has or more tasks than it may, and
    /// what waits fits nowhere.
    #[test]
    fn room_is_neither_overdrawn_nor_left(
        asked in prop::collection::vec((0_u64..5, 0_u64..5, 0_u64..9, 0_u64..3), 1..8),
        gone in prop::collection::vec(any::<bool>(), 8),
    ) {
        let mut bench = Bench::with_nodes(4);
        label(&mut bench, 1, "zone", "a");
        let mut ids = Vec::new();
        for (number, (replicas, cpus, gib, most)) in (1_u128..).zip(&asked) {
            let mut spec = reserving(&format!("s{number}"), *replicas, *cpus, *gib);
            spec.task.max_per_node = *most;
            spec.task.spread = vec!["node.labels.zone".parse().unwrap()];
            ids.push(bench.create_service(number, spec));
            bench.run();
            check(&bench)?;
        }
        for (id, gone) in ids.iter().zip(gone) {
            if gone {
                bench.apply(Command::RemoveService { id: *id }).unwrap();
                bench.run();
                check(&bench)?;
            }
        }
    }
}

fn check(bench: &Bench) -> Result<(), TestCaseError> {
    let tasks = || bench.store.tasks.values();
    let mut free = BTreeMap::new();
    for node in bench.store.nodes.keys() {
        let mut used = Amount::default();
        for task in tasks().filter(|task| placed(task) == Some(*node)) {
            used = used.plus(task.spec.resources.reserved);
        }
        prop_assert!(used.nano_cpus <= NODE_CAPACITY.nano_cpus, "{used:?}");
        prop_assert!(used.memory_bytes <= NODE_CAPACITY.memory_bytes, "{used:?}");
        free.insert(*node, NODE_CAPACITY.minus(used));
    }
    for task in tasks().filter(|task| !task.status.state.is_final()) {
        let (most, wanted) = (task.spec.max_per_node, task.spec.resources.reserved);
        let on = |node| {
            let here = |other: &&Task| other.service == task.service && placed(other) == Some(node);
            tasks().filter(here).count() as u64
        };
        match placed(task) {
            Some(node) => prop_assert!(most == 0 || on(node) <= most),
            None => {
                let fits = free.iter().find(|(node, free)| {
                    free.minus(wanted).plus(wanted) == **free && (most == 0 || on(**node) < most)
                });
                prop_assert_eq!(fits, None, "{:#?}", task);
            }
        }
    }
    Ok(())
}
