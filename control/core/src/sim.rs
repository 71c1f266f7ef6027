//! A model cluster: the store, the leader's loops and nodes that obey, fail, vanish and come back,
//! over random histories with seeds. After every entry the invariants hold; in the end, once all is
//! well, everything runs. The revision stream is followed along on random paths.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mesh_history::Dice;
use mesh_types::{
    NetworkId, NodeId, Revision, ServiceId, TaskId,
    record::{RecordSet, Scope},
    resources::Amount,
    spec::{
        EndpointMode, FailureAction, RestartCondition, ServiceMode, ServiceSpec, UpdateOrder,
        UpdatePolicy,
    },
    task::{InterfaceKind, TaskState},
};

use crate::{
    command::Command,
    fixtures::{
        Bench, NODE_CAPACITY, network, network_id, new_node, node_id, port, service, service_id,
        told,
    },
    model::{Availability, Holder, Node, NodeState, Role, Stop, Task, UpdateState},
    store::Store,
    stream::{RecordLog, assignments, subscription},
};

/// Some seconds' worth, unoptimised.
const SEEDS: u64 = 200;

/// `MESH_SIM_SEEDS` seeds from `MESH_SIM_SEED` on, if they are set.
fn seeds(usual: u64) -> std::ops::Range<u64> {
    let variable = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let first = variable("MESH_SIM_SEED").unwrap_or(0);
    first..first + variable("MESH_SIM_SEEDS").unwrap_or(usual)
}

/// Says how to see a seed again, if its run panics.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(seed) = self;
            eprintln!(
                "seed {seed} fails; again: MESH_SIM_SEED={seed} MESH_SIM_SEEDS=1 \
                 cargo test --workspace --lib -- sim::"
            );
        }
    }
}

struct Sim {
    bench: Bench,
    dice: Dice,
    next_object: u128,
    next_node: u8,
    /// The largest ids leased so far.
    endpoints: BTreeMap<u64, TaskId>,
    follow: Follow,
}

/// Receivers of the stream that turn to two managers, one of them late.
struct Follow {
    logs: [RecordLog; 2],
    sets: Vec<RecordSet>,
    scopes: BTreeSet<Scope>,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut bench = Bench::with_nodes(3);
        bench.mute = true;
        let logs = [RecordLog::default(), RecordLog::with_tombstones(4)];
        let sets = vec![RecordSet::default(); 3];
        let follow = Follow { logs, sets, scopes: BTreeSet::from([Scope::Cluster]) };
        let (dice, endpoints) = (Dice::new(seed), BTreeMap::new());
        Self { bench, dice, next_object: 1, next_node: 4, endpoints, follow }
    }

    fn fresh(&mut self) -> u128 {
        self.next_object += 1;
        self.next_object
    }

    fn services(&self) -> Vec<ServiceId> {
        self.bench.store.services.keys().copied().collect()
    }

    fn networks(&self) -> Vec<NetworkId> {
        let networks = self.bench.store.networks.values();
        networks.filter(|network| !network.spec.ingress).map(|network| network.id).collect()
    }

    fn nodes(&self) -> Vec<NodeId> {
        self.bench.store.nodes.keys().copied().collect()
    }

    /// Whatever comes of it: what is refused leaves no trace (the bench checks that).
    fn try_apply(&mut self, command: Command) {
        let _ = self.bench.apply(command);
    }

    fn random_spec(&mut self, name: String) -> ServiceSpec {
        let mut networks: Vec<NetworkId> = Vec::new();
        for id in self.networks() {
            if self.dice.chance(40) {
                networks.push(id);
            }
        }
        let mut spec = service(&name, self.dice.below(6), &networks);
        if self.dice.chance(25) {
            spec.mode = ServiceMode::Global;
        }
        if self.dice.chance(20) {
            spec.endpoint_mode = EndpointMode::Dnsrr;
        }
        if self.dice.chance(30) {
            spec.ports.push(port(self.dice.below(3) as u16 * 8000));
        }
        if self.dice.chance(30) {
            spec.task.restart.max_attempts = Some(self.dice.below(3));
        }
        if self.dice.chance(20) {
            spec.task.restart.condition = RestartCondition::OnFailure;
        }
        if self.dice.chance(25) {
            spec.task.constraints.push("node.labels.zone==a".parse().unwrap());
        }
        if self.dice.chance(30) {
            let reserved = &mut spec.task.resources.reserved;
            reserved.nano_cpus = self.dice.below(5) * 1_000_000_000;
            reserved.memory_bytes = self.dice.below(5) << 30;
        }
        if self.dice.chance(20) {
            spec.task.max_per_node = 1 + self.dice.below(2);
        }
        if self.dice.chance(20) {
            spec.task.spread.push("node.labels.zone".parse().unwrap());
        }
        spec.update = self.random_policy();
        spec.rollback = self.random_policy();
        spec
    }

    fn random_policy(&mut self) -> UpdatePolicy {
        let orders = [UpdateOrder::StopFirst, UpdateOrder::StartFirst];
        let actions = [FailureAction::Pause, FailureAction::Continue, FailureAction::Rollback];
        UpdatePolicy {
            parallelism: self.dice.below(3),
            delay: Duration::from_secs(self.dice.below(3)),
            on_failure: self.dice.pick(&actions).unwrap(),
            monitor: Duration::from_secs(self.dice.below(6)),
            max_failure_ppm: self.dice.pick(&[0, 300_000]).unwrap(),
            order: self.dice.pick(&orders).unwrap(),
        }
    }

    /// Some nodes tell how far they are; some fall silent, some are heard again.
    fn acknowledge(&mut self) {
        let memory = &mut self.bench.memory;
        for node in self.bench.store.nodes.keys() {
            if self.dice.chance(20) {
                memory.acked.insert(*node, self.bench.store.revision);
            }
            if self.dice.chance(5) && !memory.silent.remove(node) {
                memory.silent.insert(*node);
            }
        }
    }

    /// One round of the leader, which lets no task end that somebody may still balance to.
    fn round(&mut self) {
        let before = self.bench.store.clone();
        self.bench.round();
        let memory = &self.bench.memory;
        for (id, task) in &before.tasks {
            let Stop::Draining { at, since_ms } = task.stop else { continue };
            if self.bench.store.tasks.get(id).is_none_or(|task| task.stop != Stop::Released) {
                continue;
            }
            let lost = before.nodes.get(&task.node.unwrap()).is_none_or(|node| node.status.lost);
            let waits_for = |node: &&Node| {
                !node.is_down()
                    && !memory.silent.contains(&node.id)
                    && memory.acked.get(&node.id).is_none_or(|acked| *acked < at)
            };
            let late = self.bench.now_ms >= since_ms + 10_000;
            let known = !before.nodes.values().any(|node| waits_for(&node));
            assert!(lost || late || known, "released too early: {task:#?}");
        }
    }

    fn step(&mut self) {
        self.acknowledge();
        self.bench.now_ms += self.dice.below(2_000);
        match self.dice.below(20) {
            0 => {
                let number = self.fresh();
                let subnet = format!("10.77.{}.0/29", self.dice.below(4));
                let subnet = self.dice.chance(60).then_some(subnet.as_str().to_owned());
                let mut spec = network(&format!("net{}", self.dice.below(6)), subnet.as_deref());
                spec.internal = self.dice.chance(30);
                self.try_apply(Command::CreateNetwork { id: network_id(number), spec });
            }
            1 => {
                let networks = self.networks();
                let Some(id) = self.dice.pick(&networks) else { return };
                self.try_apply(Command::RemoveNetwork { id });
            }
            2 | 3 => {
                let number = self.fresh();
                let name = format!("svc{}", self.dice.below(5));
                let spec = Box::new(self.random_spec(name));
                self.try_apply(Command::CreateService { id: service_id(number), spec });
            }
            4 | 5 => {
                let services = self.services();
                let Some(id) = self.dice.pick(&services) else { return };
                let old = self.bench.store.services[&id].clone();
                let mut spec = self.random_spec(old.spec.name.clone());
                if self.dice.chance(50) {
                    // Scaling alone.
                    spec = ServiceSpec { mode: spec.mode, ..old.spec };
                }
                let version = old.meta.version;
                self.try_apply(Command::UpdateService { id, version, spec: Box::new(spec) });
            }
            6 => {
                let services = self.services();
                let Some(id) = self.dice.pick(&services) else { return };
                if self.dice.chance(40) {
                    self.try_apply(Command::RemoveService { id });
                } else {
                    let version = self.bench.version(id);
                    self.try_apply(Command::RollBackService { id, version });
                }
            }
            7 | 8 => self.change_nodes(),
            9..=13 => self.nodes_report(),
            _ => self.round(),
        }
    }

    fn change_nodes(&mut self) {
        let nodes = self.nodes();
        let Some(id) = self.dice.pick(&nodes) else { return };
        match self.dice.below(6) {
            0 if self.next_node < 40 => {
                let number = self.next_node;
                self.next_node += 1;
                let mut node = new_node(number, Role::Worker);
                if self.dice.chance(20) {
                    // The same machine again, under a new id.
                    node.vtep = self.bench.store.nodes[&id].vtep;
                }
                self.try_apply(Command::AddNode(Box::new(node)));
                self.bench.node_state(number, NodeState::Ready);
            }
            1 => self
                .try_apply(Command::RemoveNode { id, force: self.bench.now_ms.is_multiple_of(3) }),
            2 | 3 => {
                let states =
                    [NodeState::Down, NodeState::Ready, NodeState::Ready, NodeState::Unknown];
                let state = self.dice.pick(&states).unwrap_or_default();
                let number = u8::try_from(id.bits()).unwrap();
                if state == NodeState::Down && self.dice.chance(50) {
                    // Its daemon alone is silent.
                    self.bench.node_status(number, state, false);
                } else {
                    self.bench.node_state(number, state);
                }
            }
            _ => {
                let all = [
                    Availability::Active,
                    Availability::Active,
                    Availability::Pause,
                    Availability::Drain,
                ];
                let node = self.bench.store.nodes[&id].clone();
                let mut spec = node.spec;
                spec.availability = self.dice.pick(&all).unwrap_or_default();
                let zone = self.dice.pick(&["a", "b"]).unwrap_or_default();
                spec.labels.insert("zone".into(), zone.into());
                self.try_apply(Command::UpdateNode { id, version: node.meta.version, spec });
            }
        }
    }

    /// Some tasks of reachable nodes go on, fail, or obey.
    fn nodes_report(&mut self) {
        for node in self.nodes() {
            if self.bench.store.nodes[&node].status.state == NodeState::Down {
                continue;
            }
            for assigned in assignments(&self.bench.store, node) {
                let task = &self.bench.store.tasks[&assigned.id];
                let state = task.status.state;
                let next = match self.dice.below(10) {
                    0 => TaskState::Failed,
                    1 if state < TaskState::Ready => TaskState::Rejected,
                    2 if state == TaskState::Running => TaskState::Complete,
                    3 => TaskState::Assigned,
                    _ if assigned.desired > TaskState::Running => TaskState::Shutdown,
                    _ => assigned.desired,
                };
                self.bench.report(assigned.id, next);
            }
        }
    }

    fn check(&mut self) {
        check_leases(&self.bench.store);
        check_words(&self.bench.store);
        check_room(&self.bench.store);
        for task in self.bench.store.tasks.values() {
            for lease in &task.leases {
                let owner = *self.endpoints.entry(lease.endpoint.get()).or_insert(task.id);
                assert_eq!(owner, task.id, "endpoint ids are never reused");
            }
        }
        self.follow.step(&self.bench.store, &mut self.dice);
    }

    /// All nodes are well and obey; time passes. Everything must come to run.
    fn heal(&mut self) {
        self.bench.mute = false;
        self.bench.memory.silent.clear();
        for id in self.nodes() {
            let node = self.bench.store.nodes[&id].clone();
            let mut spec = node.spec;
            spec.availability = Availability::Active;
            spec.labels.insert("zone".into(), "a".into());
            self.try_apply(Command::UpdateNode { id, version: node.meta.version, spec });
            self.bench.node_state(u8::try_from(id.bits()).unwrap(), NodeState::Ready);
        }
        for _ in 0..400 {
            self.bench.run();
            self.check();
            match self.bench.settle() {
                Some(wake) => self.bench.now_ms = self.bench.now_ms.max(wake),
                None => return,
            }
        }
        panic!("the cluster never rests");
    }

    fn check_converged(&self) {
        let store = &self.bench.store;
        for service in store.services.values() {
            let wanted: Vec<&Task> = store
                .tasks
                .values()
                .filter(|task| task.service == service.id && task.desired <= TaskState::Running)
                .collect();
            let count = match service.spec.mode {
                ServiceMode::Replicated { replicas } => usize::try_from(replicas).unwrap(),
                ServiceMode::Global => store.nodes.len(),
            };
            // An update goes on for as long as a task waits for room.
            let waits = wanted.iter().any(|task| lacks_room(task));
            assert!(waits || service.rolls().is_none(), "{service:#?}");
            assert_eq!(wanted.len(), count, "places of {}", service.spec.name);
            for task in wanted {
                let done = task.status.state.is_final()
                    && (task.spec.restart.condition != RestartCondition::Any
                        || task.spec.restart.max_attempts.is_some());
                let starved = task.status.state == TaskState::New
                    && task.status.err.starts_with("no free address on network");
                let runs = task.status.state == TaskState::Running;
                assert!(done || starved || runs || lacks_room(task), "{task:#?}");
                // An update that failed leaves the rest, and where it failed the old.
                let gave_up = service.rolls().is_none() && !service.update_failures.is_empty();
                assert!(gave_up || waits || !service.outdates(task), "{service:#?} {task:#?}");
            }
        }
        for task in store.tasks.values().filter(|task| task.desired > TaskState::Running) {
            assert!(task.status.state.is_final(), "{task:#?}");
        }
    }
}

/// Every lease has one holder that knows of it, and no task that ended holds any.
fn check_leases(store: &Store) {
    let mut vnis = BTreeSet::new();
    let mut endpoints = BTreeSet::new();
    let mut ports = BTreeSet::new();
    for network in store.networks.values() {
        assert!(vnis.insert(network.vni));
        for (address, holder) in &network.leases {
            let known = match holder {
                Holder::Gateway => *address == network.gateway,
                Holder::Vip(service) => {
                    store.services[service].vips.contains(&(network.id, *address))
                }
                Holder::Endpoint(task, endpoint) => store.tasks[task].leases.iter().any(|lease| {
                    lease.endpoint == *endpoint
                        && lease.address.ip() == *address
                        && lease.kind.network() == Some(network.id)
                }),
            };
            assert!(known, "{address} is held by {holder:?}, who knows nothing of it");
        }
    }
    for service in store.services.values() {
        for (network, vip) in &service.vips {
            assert_eq!(store.networks[network].leases[vip], Holder::Vip(service.id));
        }
        for port in &service.ports {
            assert!(port.published != 0 && ports.insert((port.protocol, port.published)));
        }
    }
    let mut local = 0;
    for task in store.tasks.values() {
        let state = task.status.state;
        assert!(task.leases.is_empty() || !state.is_final());
        for lease in &task.leases {
            assert!(endpoints.insert(lease.endpoint));
            let holder = Holder::Endpoint(task.id, lease.endpoint);
            match lease.kind {
                InterfaceKind::Overlay { network, .. }
                | InterfaceKind::IngressGateway { network } => {
                    assert_eq!(store.networks[&network].leases[&lease.address.ip()], holder);
                }
                InterfaceKind::LocalGateway => {
                    let node = task.node.expect("a node-local address is on a node");
                    assert_eq!(store.local_gateways[&node][&lease.address.ip()], task.id);
                    local += 1;
                }
            }
        }
        if state >= TaskState::Assigned && !state.is_final() {
            assert!(store.nodes.contains_key(&task.node.unwrap()));
            let overlays =
                task.leases.iter().filter(|l| matches!(l.kind, InterfaceKind::Overlay { .. }));
            assert_eq!(overlays.count(), task.networks.len());
        }
    }
    assert_eq!(store.local_gateways.values().map(BTreeMap::len).sum::<usize>(), local);
}

/// No node has more reserved than it has.
fn check_room(store: &Store) {
    let mut reserved: BTreeMap<NodeId, Amount> = BTreeMap::new();
    for task in store.tasks.values() {
        let state = task.status.state;
        if let Some(node) = task.node.filter(|_| state >= TaskState::Assigned && !state.is_final())
        {
            let sum = reserved.entry(node).or_default();
            *sum = sum.plus(task.spec.resources.reserved);
        }
    }
    for (node, sum) in reserved {
        assert_eq!(sum.min(NODE_CAPACITY), sum, "more is reserved than there is on {node}");
    }
}

/// Whether a task waits for room that no node has.
fn lacks_room(task: &Task) -> bool {
    task.status.state == TaskState::Pending
        && ["insufficient", "max replicas"].iter().any(|word| task.status.err.contains(word))
}

fn check_words(store: &Store) {
    for task in store.tasks.values() {
        assert!(!task.status.message.is_empty(), "{task:#?}");
        assert!(task.history.is_sorted_by(|a, b| a.0 < b.0), "{:?}", task.history);
        assert_eq!(task.history.last().map(|(state, _)| *state), Some(task.status.state));
        let live = task.desired <= TaskState::Running && !task.status.state.is_final();
        let twins = store.tasks.values().filter(|other| {
            live && other.id != task.id
                && other.replaces != Some(task.id)
                && task.replaces != Some(other.id)
                && other.service == task.service
                && (other.slot, other.slot.map_or(other.node, |_| None))
                    == (task.slot, task.slot.map_or(task.node, |_| None))
                && other.desired <= TaskState::Running
                && !other.status.state.is_final()
        });
        assert_eq!(twins.count(), 0, "a place has one live task: {task:#?}");
    }
}

fn snapshot(log: &RecordLog, wanted: &BTreeSet<Scope>) -> RecordSet {
    let mut set = RecordSet::default();
    set.apply(log.delta(Revision::MIN, &BTreeSet::new(), wanted));
    set
}

impl Follow {
    fn step(&mut self, store: &Store, dice: &mut Dice) {
        self.scopes.extend(store.networks.keys().map(|id| Scope::Network(*id)));
        let [prompt, late] = &mut self.logs;
        prompt.update(store);
        if dice.chance(30) {
            late.update(store);
        }
        if dice.chance(3) {
            // That manager starts anew.
            *late = RecordLog::with_tombstones(4);
            late.update(store);
        }
        let mut truth = RecordLog::default();
        truth.update(store);
        let everything = self.scopes.clone();
        assert_eq!(snapshot(&self.logs[0], &everything), snapshot(&truth, &everything));
        let index = dice.below(self.sets.len() as u64) as usize;
        let log = &self.logs[dice.below(2) as usize];
        let set = &mut self.sets[index];
        let wanted: BTreeSet<Scope> = if dice.chance(50) {
            let nodes: Vec<NodeId> = store.nodes.keys().copied().collect();
            dice.pick(&nodes).map(|node| subscription(store, node)).unwrap_or_default()
        } else {
            self.scopes.iter().filter(|_| dice.chance(60)).copied().collect()
        };
        let from = set.revision;
        let delta = log.delta(from, &set.scopes, &wanted);
        let behind = delta.to == from && delta.scopes != wanted;
        // A step may come twice.
        set.apply(delta.clone());
        set.apply(delta);
        assert!(set.revision >= from);
        let expected = snapshot(log, &wanted);
        if !behind && expected.revision == set.revision {
            assert_eq!(*set, expected);
        }
    }
}

#[test]
fn random_histories_keep_the_promises_and_converge() {
    for seed in seeds(SEEDS) {
        let _replay = Replay(seed);
        let mut sim = Sim::new(seed);
        let steps = 60 + sim.dice.below(120);
        for _ in 0..steps {
            sim.step();
            sim.check();
        }
        sim.heal();
        sim.check_converged();
        let bytes = rmp_serde::to_vec(&sim.bench.store).unwrap();
        assert_eq!(rmp_serde::from_slice::<Store>(&bytes).unwrap(), sim.bench.store);
    }
}

/// Tasks that connections are balanced to.
fn serving(bench: &Bench, id: ServiceId) -> usize {
    let tasks = bench.live(id);
    let ready = |task: &&&Task| {
        task.status.state == TaskState::Running && task.desired <= TaskState::Running
    };
    tasks.iter().filter(ready).count()
}

#[test]
fn updates_and_drains_take_no_more_away_than_they_may() {
    for seed in seeds(SEEDS / 5) {
        let _replay = Replay(seed);
        let mut dice = Dice::new(seed);
        let mut bench = Bench::with_nodes(4);
        let replicas = 1 + dice.below(6);
        let web = bench.create_service(1, service("web", replicas, &[]));
        bench.run();
        bench.mute = true;
        let drained = dice.chance(50).then(|| node_id(2 + u128::from(dice.below(3))));
        let order = if dice.chance(50) { UpdateOrder::StartFirst } else { UpdateOrder::StopFirst };
        let parallelism = 1 + dice.below(2);
        // One daemon may be dead: its task serves on, and nobody may wait for its end.
        let deaf = dice.chance(50).then_some(4);
        if let Some(number) = deaf {
            bench.node_status(number, NodeState::Down, false);
        }
        let begin_ms = bench.now_ms;
        let mut updated_ms = None;
        if let Some(id) = drained {
            let Node { meta, mut spec, .. } = bench.store.nodes[&id].clone();
            spec.availability = Availability::Drain;
            bench.apply(Command::UpdateNode { id, version: meta.version, spec }).unwrap();
        } else {
            bench
                .update_service(web, |spec| {
                    spec.task.force_update += 1;
                    spec.update = UpdatePolicy { parallelism, order, ..UpdatePolicy::default() };
                })
                .unwrap();
        }
        let down = match (drained, order) {
            (None, UpdateOrder::StopFirst) => parallelism,
            _ => 0,
        };
        for _ in 0..800 {
            bench.now_ms += dice.below(300);
            bench.round();
            for node in bench.store.nodes.keys() {
                if dice.chance(30) {
                    bench.memory.acked.insert(*node, bench.store.revision);
                }
            }
            let tasks: Vec<Task> = bench.live(web).into_iter().cloned().collect();
            for task in tasks.iter().filter(|task| task.status.state >= TaskState::Assigned) {
                let obeys = task.status.state < told(task) && !bench.is_deaf(task);
                if dice.chance(30) && obeys {
                    bench.report(task.id, told(task));
                }
            }
            let least = usize::try_from(replicas.saturating_sub(down)).unwrap();
            assert!(serving(&bench, web) >= least, "seed {seed}: {:#?}", bench.live(web));
            let update = bench.store.services[&web].update.as_ref().map(|update| update.state);
            if update == Some(UpdateState::Completed) {
                updated_ms.get_or_insert(bench.now_ms);
            }
        }
        assert_eq!(serving(&bench, web) as u64, replicas);
        if drained.is_none() {
            let took_ms = updated_ms.map(|at| at - begin_ms);
            assert!(took_ms.is_some_and(|took| took < 50_000), "seed {seed}: {took_ms:?}");
        }
        if let Some(number) = deaf {
            bench.mute = false;
            bench.node_state(number, NodeState::Ready);
            bench.run();
        }
        assert_eq!(bench.live(web).len() as u64, replicas, "seed {seed}: the old ones are gone");
        let service = &bench.store.services[&web];
        let state = service.update.as_ref().map(|update| update.state);
        assert_eq!(state, drained.is_none().then_some(UpdateState::Completed));
        for task in bench.live(web) {
            assert!(!service.outdates(task) && (drained.is_none() || task.node != drained));
        }
    }
}
