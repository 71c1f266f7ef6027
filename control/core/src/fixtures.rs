//! Small specs and a store to try them on.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use mesh_types::{
    ClusterId, NetworkId, NodeId, Protocol, Revision, ServiceId, TaskId,
    resources::Amount,
    spec::{
        EndpointMode, NetworkAttachment, NetworkSpec, PortSpec, RestartPolicy, ServiceMode,
        ServiceSpec, TaskSpec, UpdatePolicy,
    },
    task::{TaskState, TaskStatus},
};

use crate::{
    command::{Command, InitCluster, NewNode, NodeReport, Outcome, Proposal, Rejection},
    leader::{LeaderMemory, decide},
    model::{
        ClusterSpec, Node, NodeDescription, NodeSpec, NodeState, NodeStatus, Role, Service, Stop,
        Task,
    },
    store::Store,
};

/// What each node has.
pub(crate) const NODE_CAPACITY: Amount = Amount { nano_cpus: 4_000_000_000, memory_bytes: 8 << 30 };

pub(crate) fn node_id(number: u128) -> NodeId {
    NodeId::from_bits(number)
}

pub(crate) fn network_id(number: u128) -> NetworkId {
    NetworkId::from_bits(1000 + number)
}

pub(crate) fn service_id(number: u128) -> ServiceId {
    ServiceId::from_bits(2000 + number)
}

pub(crate) fn new_node(number: u8, role: Role) -> NewNode {
    let address = IpAddr::from([192, 0, 2, number]);
    NewNode {
        id: node_id(u128::from(number)),
        spec: NodeSpec { role, ..NodeSpec::default() },
        description: NodeDescription {
            hostname: format!("n{number}"),
            host_routes: ["192.0.2.0/24".parse().unwrap()].into(),
            nano_cpus: NODE_CAPACITY.nano_cpus,
            memory_bytes: NODE_CAPACITY.memory_bytes,
            ..NodeDescription::default()
        },
        address: (address, 2377).into(),
        vtep: address,
    }
}

pub(crate) fn init() -> InitCluster {
    InitCluster {
        id: ClusterId::from_bits(1),
        spec: ClusterSpec::default(),
        ca_cert_pem: String::new(),
        ca_key_pem: String::new(),
        worker_secret: [1; 16],
        manager_secret: [2; 16],
        gossip_key: [3; 32],
        ingress: network_id(0),
        first: new_node(1, Role::Manager),
    }
}

pub(crate) fn network(name: &str, subnet: Option<&str>) -> NetworkSpec {
    NetworkSpec {
        name: name.into(),
        labels: BTreeMap::new(),
        subnet: subnet.map(|text| text.parse().unwrap()),
        gateway: None,
        ip_range: None,
        mtu: None,
        attachable: false,
        internal: false,
        ingress: false,
        options: BTreeMap::new(),
    }
}

pub(crate) fn service(name: &str, replicas: u64, networks: &[NetworkId]) -> ServiceSpec {
    ServiceSpec {
        name: name.into(),
        labels: BTreeMap::new(),
        mode: ServiceMode::Replicated { replicas },
        task: TaskSpec {
            command: vec!["server".into()],
            restart: RestartPolicy { delay: Duration::from_secs(5), ..RestartPolicy::default() },
            ..TaskSpec::default()
        },
        networks: networks
            .iter()
            .map(|id| NetworkAttachment { network: *id, aliases: Vec::new() })
            .collect(),
        endpoint_mode: EndpointMode::Vip,
        ports: Vec::new(),
        update: UpdatePolicy::default(),
        rollback: UpdatePolicy::default(),
        raw: None,
    }
}

pub(crate) fn port(published: u16) -> PortSpec {
    PortSpec { protocol: Protocol::Tcp, target: 80, published }
}

/// How far a task's node is told to bring it.
pub(crate) fn told(task: &Task) -> TaskState {
    match task.stop {
        Stop::Draining { .. } => TaskState::Running,
        Stop::No | Stop::Released => task.desired.min(TaskState::Shutdown),
    }
}

/// A store with a clock, driven by hand.
#[derive(Debug, Default)]
pub(crate) struct Bench {
    pub(crate) store: Store,
    pub(crate) now_ms: u64,
    pub(crate) memory: LeaderMemory,
    /// Nodes acknowledge nothing by themselves.
    pub(crate) mute: bool,
    ids: u128,
}

impl Bench {
    /// A cluster with that many nodes, all ready; the first is its manager.
    pub(crate) fn with_nodes(count: u8) -> Self {
        let mut bench = Self { now_ms: 1_000_000, ..Self::default() };
        bench.apply(Command::Init(Box::new(init()))).unwrap();
        for number in 2..=count {
            bench.apply(Command::AddNode(Box::new(new_node(number, Role::Worker)))).unwrap();
        }
        for number in 1..=count {
            bench.node_state(number, NodeState::Ready);
        }
        bench
    }

    /// Applies; a rejected command must leave no trace.
    pub(crate) fn apply(&mut self, command: Command) -> Result<Outcome, Rejection> {
        let mut before = self.store.clone();
        let revision = self.store.revision.next().unwrap();
        let outcome = self.store.apply(revision, &Proposal { now_ms: self.now_ms, command });
        if outcome.is_err() {
            before.revision = revision;
            assert_eq!(before, self.store, "a rejected command left a trace");
        }
        outcome
    }

    pub(crate) fn node_state(&mut self, number: u8, state: NodeState) {
        self.node_status(number, state, state == NodeState::Down);
    }

    pub(crate) fn node_status(&mut self, number: u8, state: NodeState, lost: bool) {
        let id = node_id(u128::from(number));
        let report = NodeReport {
            id,
            status: Some(NodeStatus { state, lost, ..NodeStatus::default() }),
            description: None,
        };
        self.apply(Command::ReportNodes(vec![report])).unwrap();
    }

    pub(crate) fn create_network(&mut self, number: u128, spec: NetworkSpec) -> NetworkId {
        let id = network_id(number);
        self.apply(Command::CreateNetwork { id, spec }).unwrap();
        id
    }

    pub(crate) fn create_service(&mut self, number: u128, spec: ServiceSpec) -> ServiceId {
        let id = service_id(number);
        self.apply(Command::CreateService { id, spec: Box::new(spec) }).unwrap();
        id
    }

    pub(crate) fn update_service(
        &mut self,
        id: ServiceId,
        change: impl FnOnce(&mut ServiceSpec),
    ) -> Result<Outcome, Rejection> {
        let Service { meta, mut spec, .. } = self.store.services[&id].clone();
        change(&mut spec);
        self.apply(Command::UpdateService { id, version: meta.version, spec: Box::new(spec) })
    }

    /// One round; `false`: there was nothing to do. Also says when to look again.
    pub(crate) fn round(&mut self) -> (bool, Option<u64>) {
        if !self.mute {
            let all = self.store.nodes.keys();
            self.memory.acked = all.map(|node| (*node, self.store.revision)).collect();
        }
        let ids = &mut self.ids;
        let mut fresh = || {
            *ids += 1;
            // Ids do not come in order.
            ids.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
        };
        let decision = decide(&self.store, &mut self.memory, self.now_ms, &mut fresh);
        let busy = !decision.commands.is_empty();
        for command in decision.commands {
            self.apply(command).unwrap();
        }
        (busy, decision.wake_at_ms)
    }

    /// Rounds until there is nothing to do, which must come soon.
    pub(crate) fn settle(&mut self) -> Option<u64> {
        for _ in 0..8 {
            let (busy, wake) = self.round();
            if !busy {
                return wake;
            }
        }
        let last = decide(&self.store, &mut self.memory, self.now_ms, &mut || 0);
        panic!("decide does not come to rest: {last:?}");
    }

    pub(crate) fn report(&mut self, task: TaskId, state: TaskState) {
        let Some(node) = self.store.tasks.get(&task).and_then(|task| task.node) else { return };
        let status = TaskStatus { state, since_ms: self.now_ms, ..TaskStatus::default() };
        self.apply(Command::ReportTasks { node, statuses: vec![(task, status)] }).unwrap();
    }

    /// Nodes that are not down do at once what they are told, until all rests.
    pub(crate) fn run(&mut self) {
        for _ in 0..200 {
            self.settle();
            let reports: Vec<(TaskId, TaskState)> = self
                .store
                .tasks
                .values()
                .filter(|task| task.status.state >= TaskState::Assigned)
                .filter(|task| !task.status.state.is_final())
                .filter(|task| !self.is_deaf(task))
                .filter_map(|task| {
                    let goal = told(task);
                    (task.status.state < goal).then_some((task.id, goal))
                })
                .collect();
            if reports.is_empty() {
                return;
            }
            for (task, state) in reports {
                self.report(task, state);
            }
        }
        panic!("the cluster does not come to rest");
    }

    /// Whether a task's node hears nothing now.
    pub(crate) fn is_deaf(&self, task: &Task) -> bool {
        task.node.and_then(|id| self.store.nodes.get(&id)).is_none_or(Node::is_down)
    }

    /// The tasks of a service that are not over.
    pub(crate) fn live(&self, service: ServiceId) -> Vec<&Task> {
        self.store
            .tasks
            .values()
            .filter(|task| task.service == service && !task.status.state.is_final())
            .collect()
    }

    pub(crate) fn running(&self, service: ServiceId) -> usize {
        self.live(service).iter().filter(|task| task.status.state == TaskState::Running).count()
    }

    pub(crate) fn version(&self, service: ServiceId) -> Revision {
        self.store.services[&service].meta.version
    }
}
