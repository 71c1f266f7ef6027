//! A model cluster: the store, the leader's loops and nodes that obey, fail, vanish and come back,
//! over random histories with seeds. After every entry the invariants hold; in the end, once all is
//! well, everything runs. The revision stream is followed along on random paths.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::{
    NetworkId, NodeId, Revision, ServiceId, TaskId,
    record::{RecordSet, Scope},
    spec::{EndpointMode, RestartCondition, ServiceMode, ServiceSpec},
    task::{InterfaceKind, TaskState},
};

use crate::{
    command::Command,
    fixtures::{Bench, network, network_id, new_node, port, service, service_id},
    model::{Availability, Holder, NodeState, Role, Task},
    store::Store,
    stream::{RecordLog, assignments, subscription},
};

/// SplitMix64: enough chance for a test, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        let index = self.below(of.len().max(1) as u64) as usize;
        of.get(index).copied()
    }
}

/// Some seconds' worth, unoptimised.
const SEEDS: u64 = 200;

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
        let bench = Bench::with_nodes(3);
        let logs = [RecordLog::default(), RecordLog::with_tombstones(4)];
        let sets = vec![RecordSet::default(); 3];
        let follow = Follow { logs, sets, scopes: BTreeSet::from([Scope::Cluster]) };
        let (dice, endpoints) = (Dice(seed), BTreeMap::new());
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
        spec
    }

    fn step(&mut self) {
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
            6 if self.dice.chance(40) => {
                let services = self.services();
                let Some(id) = self.dice.pick(&services) else { return };
                self.try_apply(Command::RemoveService { id });
            }
            7 | 8 => self.change_nodes(),
            9..=13 => self.nodes_report(),
            _ => {
                self.bench.round();
            }
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
                self.bench.node_state(u8::try_from(id.bits()).unwrap(), state);
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
        for id in self.nodes() {
            let node = self.bench.store.nodes[&id].clone();
            let mut spec = node.spec;
            spec.availability = Availability::Active;
            self.try_apply(Command::UpdateNode { id, version: node.meta.version, spec });
            self.bench.node_state(u8::try_from(id.bits()).unwrap(), NodeState::Ready);
        }
        for _ in 0..100 {
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
            assert_eq!(wanted.len(), count, "places of {}", service.spec.name);
            for task in wanted {
                let done = task.status.state.is_final()
                    && (task.spec.restart.condition != RestartCondition::Any
                        || task.spec.restart.max_attempts.is_some());
                let starved = task.status.state == TaskState::New
                    && task.status.err.starts_with("no free address on network");
                let runs = task.status.state == TaskState::Running;
                assert!(done || starved || runs, "{task:#?}");
                assert_eq!(task.spec_version, service.spec_version, "{task:#?}");
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

fn check_words(store: &Store) {
    for task in store.tasks.values() {
        assert!(!task.status.message.is_empty(), "{task:#?}");
        assert!(task.history.is_sorted_by(|a, b| a.0 < b.0), "{:?}", task.history);
        assert_eq!(task.history.last().map(|(state, _)| *state), Some(task.status.state));
        let live = task.desired <= TaskState::Running && !task.status.state.is_final();
        let twins = store.tasks.values().filter(|other| {
            live && other.id != task.id
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
    for seed in 0..SEEDS {
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
