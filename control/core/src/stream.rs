//! The revision stream and the assignments, derived from the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mesh_types::{
    NodeId, NodeNumber, Protocol, Revision, TaskId,
    record::{
        Delta, EndpointRecord, EndpointState, NetworkRecord, NodeRecord, Record, RecordKey, Scope,
        ServiceRecord,
    },
    spec::PortSpec,
    task::{TaskAssignment, TaskState},
};

use crate::{
    model::{Network, Node, Role, Service, Stop, Task},
    store::Store,
};

/// What a task's open connections get to end before the task is told to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Tombstones (and gaps) kept; a node that is further behind than the oldest gets its scopes anew.
const TOMBSTONES: usize = 65_536;

/// The records that a store implies, each with the revision of its last change, and tombstones.
/// Every manager keeps one and feeds it after each applied entry, or after several: then their
/// changes count as of the last. What came and went in between was never seen, so a node that
/// another manager had brought to a revision in between gets its scopes anew.
///
/// A log that begins with a store at revision R (a manager that started, or installed a snapshot)
/// knows nothing about removals before R: nodes from before R get their scopes anew.
#[derive(Debug)]
pub struct RecordLog {
    /// The store's revision at the last update.
    revision: Revision,
    /// Removals at or before this revision are forgotten.
    floor: Revision,
    /// Whether any store was seen.
    begun: bool,
    records: BTreeMap<RecordKey, (Revision, Record)>,
    changed: BTreeSet<(Revision, RecordKey)>,
    tombstones: BTreeMap<RecordKey, Revision>,
    buried: BTreeSet<(Revision, RecordKey)>,
    /// Revisions that were skipped: strictly between key and value.
    gaps: BTreeMap<Revision, Revision>,
    /// The records of each object; which of them to derive again is told by the objects' versions.
    sources: BTreeMap<Source, Vec<RecordKey>>,
    limit: usize,
}

/// An object that records are derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Node(NodeId),
    Network(mesh_types::NetworkId),
    Service(mesh_types::ServiceId),
    Task(TaskId),
}

impl Default for RecordLog {
    fn default() -> Self {
        Self {
            revision: Revision::MIN,
            floor: Revision::MIN,
            begun: false,
            records: BTreeMap::new(),
            changed: BTreeSet::new(),
            tombstones: BTreeMap::new(),
            buried: BTreeSet::new(),
            gaps: BTreeMap::new(),
            sources: BTreeMap::new(),
            limit: TOMBSTONES,
        }
    }
}

impl RecordLog {
    /// Brings the log up to the store. Costs one comparison of numbers per object of the store;
    /// records are derived only of objects that changed.
    pub fn update(&mut self, store: &Store) {
        if self.begun && store.revision <= self.revision {
            return;
        }
        let since = self.begun.then_some(self.revision);
        if !self.begun {
            self.begun = true;
            self.floor = store.revision;
        } else if self.revision.next() != Some(store.revision) {
            self.gaps.insert(self.revision, store.revision);
        }
        self.revision = store.revision;
        let fresh = |version: Revision| since.is_none_or(|since| version > since);
        let nodes_differ = self.nodes_differ(store);
        self.bury_missing(store);
        // Where a machine joined again under a new id, its newest membership owns its tunnel's end.
        // Any change of any node may shift that, and nodes are few.
        if store.nodes.values().any(|node| fresh(node.meta.version)) || nodes_differ {
            let mut newest: BTreeMap<std::net::IpAddr, NodeNumber> = BTreeMap::new();
            for node in store.nodes.values() {
                let number = newest.entry(node.vtep).or_insert(node.number);
                *number = (*number).max(node.number);
            }
            for node in store.nodes.values() {
                let current = newest.get(&node.vtep) == Some(&node.number);
                let record = current.then(|| node_record(node));
                self.derive(Source::Node(node.id), record.into_iter().collect());
            }
        }
        for network in store.networks.values().filter(|network| fresh(network.meta.version)) {
            self.derive(Source::Network(network.id), vec![network_record(network)]);
        }
        for service in store.services.values().filter(|service| fresh(service.meta.version)) {
            self.derive(Source::Service(service.id), service_records(store, service));
        }
        for task in store.tasks.values().filter(|task| fresh(task.meta.version)) {
            self.derive(Source::Task(task.id), endpoint_records(store, task));
        }
        self.compact();
    }

    /// The step that brings a node from `from`, holding `held`, up to date on `wanted`.
    ///
    /// A node that is ahead of this manager gets nothing new: not even scopes, whose records would
    /// be older than the revision that it claims.
    #[must_use]
    pub fn delta(&self, from: Revision, held: &BTreeSet<Scope>, wanted: &BTreeSet<Scope>) -> Delta {
        if from > self.revision {
            let scopes = held.intersection(wanted).copied().collect();
            return Delta { to: from, scopes, ..Delta::default() };
        }
        let skipped = self.gaps.range(..from).next_back().is_some_and(|(_, end)| from < *end);
        let reset: BTreeSet<Scope> = if from < self.floor || skipped {
            wanted.clone()
        } else {
            wanted.difference(held).copied().collect()
        };
        let kept = |key: &RecordKey| wanted.contains(&key.scope()) && !reset.contains(&key.scope());
        let after = from.next().map(|next| (next, FIRST_KEY));
        let mut upserts: Vec<Record> = Vec::new();
        for scope in &reset {
            upserts.extend(self.of_scope(*scope).cloned());
        }
        let mut removals = Vec::new();
        if let Some(after) = after {
            let changed = self.changed.range(after..).map(|(_, key)| key);
            upserts.extend(
                changed
                    .filter(|key| kept(key))
                    .filter_map(|key| self.records.get(key))
                    .map(|(_, record)| record.clone()),
            );
            let buried = self.buried.range(after..).map(|(_, key)| *key);
            removals.extend(buried.filter(|key| kept(key)));
        }
        Delta { to: self.revision, reset, scopes: wanted.clone(), upserts, removals }
    }

    fn of_scope(&self, scope: Scope) -> impl Iterator<Item = &Record> {
        use mesh_types::{EndpointId, NetworkId, ServiceId};
        let all = u128::MAX;
        let ranges = match scope {
            Scope::Cluster => [
                RecordKey::Node(NodeNumber::MIN)..=RecordKey::Node(NodeNumber::MAX),
                RecordKey::Network(NetworkId::from_bits(0))
                    ..=RecordKey::Network(NetworkId::from_bits(all)),
            ],
            Scope::Network(id) => [
                RecordKey::Service(id, ServiceId::from_bits(0))
                    ..=RecordKey::Service(id, ServiceId::from_bits(all)),
                RecordKey::Endpoint(id, EndpointId::MIN)..=RecordKey::Endpoint(id, EndpointId::MAX),
            ],
        };
        ranges
            .into_iter()
            .flat_map(|range| self.records.range(range))
            .map(|(_, (_, record))| record)
    }

    /// A node that went may leave its tunnel's end to another.
    fn nodes_differ(&self, store: &Store) -> bool {
        let known = self.sources.keys().filter(|source| matches!(source, Source::Node(_))).count();
        known != store.nodes.len()
    }

    /// Removes the records of objects that are gone.
    fn bury_missing(&mut self, store: &Store) {
        let gone: Vec<Source> = self
            .sources
            .keys()
            .filter(|source| match source {
                Source::Node(id) => !store.nodes.contains_key(id),
                Source::Network(id) => !store.networks.contains_key(id),
                Source::Service(id) => !store.services.contains_key(id),
                Source::Task(id) => !store.tasks.contains_key(id),
            })
            .copied()
            .collect();
        for source in gone {
            self.derive(source, Vec::new());
            self.sources.remove(&source);
        }
    }

    /// Replaces the records of one object.
    fn derive(&mut self, source: Source, records: Vec<Record>) {
        let keys: Vec<RecordKey> = records.iter().map(Record::key).collect();
        let before = self.sources.insert(source, keys.clone()).unwrap_or_default();
        for key in before.into_iter().filter(|key| !keys.contains(key)) {
            self.remove(key);
        }
        for record in records {
            self.insert(record);
        }
    }

    fn insert(&mut self, record: Record) {
        let key = record.key();
        if let Some((revision, known)) = self.records.get(&key) {
            if *known == record {
                return;
            }
            self.changed.remove(&(*revision, key));
        }
        if let Some(revision) = self.tombstones.remove(&key) {
            self.buried.remove(&(revision, key));
        }
        self.changed.insert((self.revision, key));
        self.records.insert(key, (self.revision, record));
    }

    fn remove(&mut self, key: RecordKey) {
        let Some((revision, _)) = self.records.remove(&key) else { return };
        self.changed.remove(&(revision, key));
        self.tombstones.insert(key, self.revision);
        self.buried.insert((self.revision, key));
    }

    fn compact(&mut self) {
        while self.buried.len() > self.limit {
            let Some((revision, key)) = self.buried.pop_first() else { break };
            self.tombstones.remove(&key);
            self.floor = self.floor.max(revision);
        }
        while self.gaps.len() > self.limit {
            let Some((_, end)) = self.gaps.pop_first() else { break };
            self.floor = self.floor.max(end);
        }
    }
}

/// Sorts before every other key.
const FIRST_KEY: RecordKey = RecordKey::Node(NodeNumber::MIN);

fn node_record(node: &Node) -> Record {
    Record::Node(NodeRecord {
        id: node.id,
        number: node.number,
        name: node.name().to_owned(),
        vtep: node.vtep,
        address: node.address.ip(),
        manager: node.spec.role == Role::Manager,
    })
}

fn network_record(network: &Network) -> Record {
    Record::Network(NetworkRecord {
        id: network.id,
        name: network.spec.name.clone(),
        vni: network.vni,
        subnet: network.subnet,
        gateway: network.gateway,
        mtu: network.spec.mtu,
        internal: network.spec.internal,
        ingress: network.spec.ingress,
    })
}

fn service_records(store: &Store, service: &Service) -> Vec<Record> {
    let record = |network, aliases: &[String], ports: &[PortSpec]| {
        let vip = service.vips.iter().find(|(id, _)| *id == network).map(|(_, vip)| *vip);
        Record::Service(ServiceRecord {
            network,
            id: service.id,
            name: service.spec.name.clone(),
            aliases: aliases.to_vec(),
            mode: service.spec.endpoint_mode,
            vip,
            ports: ports.to_vec(),
        })
    };
    let mut records: Vec<Record> = service
        .spec
        .networks
        .iter()
        .map(|attachment| record(attachment.network, &attachment.aliases, &[]))
        .collect();
    if let Some(ingress) = store.ingress().filter(|_| !service.ports.is_empty()) {
        records.push(record(ingress.id, &[], &service.ports));
    }
    records
}

/// The endpoints of a task exist from its assignment until it ended.
fn endpoint_records(store: &Store, task: &Task) -> Vec<Record> {
    let Some(node) = placed(task).and_then(|node| store.nodes.get(&node)) else {
        return Vec::new();
    };
    let state = if task.desired > TaskState::Running {
        EndpointState::Draining
    } else if task.status.state == TaskState::Running {
        EndpointState::Ready
    } else {
        EndpointState::Starting
    };
    task.leases
        .iter()
        .filter_map(|lease| {
            Some(Record::Endpoint(EndpointRecord {
                id: lease.endpoint,
                network: lease.kind.network()?,
                node: node.number,
                address: lease.address.ip(),
                task: task.id,
                task_name: task.name(),
                service: task.service,
                state,
            }))
        })
        .collect()
}

/// The node that a task is on: from its assignment until it ended.
fn placed(task: &Task) -> Option<NodeId> {
    let there = task.status.state >= TaskState::Assigned && !task.status.state.is_final();
    task.node.filter(|_| there)
}

/// The scopes that a node subscribes to: the cluster, the ingress network, its tasks' networks.
/// Costs a walk over all tasks.
#[must_use]
pub fn subscription(store: &Store, node: NodeId) -> BTreeSet<Scope> {
    let mut scopes = BTreeSet::from([Scope::Cluster]);
    scopes.extend(store.ingress().map(|network| Scope::Network(network.id)));
    for task in store.tasks.values().filter(|task| placed(task) == Some(node)) {
        scopes.extend(task.leases.iter().filter_map(|l| l.kind.network()).map(Scope::Network));
    }
    scopes
}

/// The whole set of tasks that a node should have: also those that it is to end. A task leaves the
/// set once it ended. Costs a walk over all tasks.
#[must_use]
pub fn assignments(store: &Store, node: NodeId) -> Vec<TaskAssignment> {
    store
        .tasks
        .values()
        .filter(|task| placed(task) == Some(node))
        .map(|task| TaskAssignment {
            id: task.id,
            name: task.name(),
            service: task.service,
            service_name: task.service_name.clone(),
            slot: task.slot,
            node,
            spec: task.spec.clone(),
            leases: task.leases.clone(),
            // It runs on until whoever balances to it knows that it drains.
            desired: match task.stop {
                Stop::Draining { .. } => task.desired.min(TaskState::Running),
                Stop::No | Stop::Released => task.desired,
            },
            drain: if store.services.contains_key(&task.service) { DRAIN } else { Duration::ZERO },
            ports: targets(store, task),
        })
        .collect()
}

/// The tasks of a node that ended and are not forgotten yet: it keeps their output.
#[must_use]
pub fn ended(store: &Store, node: NodeId) -> BTreeSet<TaskId> {
    let of = store.tasks.values().filter(|task| {
        task.node == Some(node) && task.status.state.is_final() && task.desired < TaskState::Remove
    });
    of.map(|task| task.id).collect()
}

/// The published ports of a task's service, as the task listens on them.
fn targets(store: &Store, task: &Task) -> Vec<(Protocol, u16)> {
    let ports = store.services.get(&task.service).map(|service| service.ports.as_slice());
    ports.unwrap_or_default().iter().map(|port| (port.protocol, port.target)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    impl RecordLog {
        /// A log that forgets removals early, to be tested.
        pub(crate) fn with_tombstones(limit: usize) -> Self {
            Self { limit, ..Self::default() }
        }
    }

    #[test]
    fn a_node_that_is_ahead_gets_nothing_new() {
        let mut log = RecordLog::default();
        log.update(&Store::default());
        let ahead = Revision::new(7).unwrap();
        let held = BTreeSet::from([Scope::Cluster]);
        let wanted =
            BTreeSet::from([Scope::Cluster, Scope::Network(mesh_types::NetworkId::from_bits(1))]);
        let delta = log.delta(ahead, &held, &wanted);
        assert_eq!(delta, Delta { to: ahead, scopes: held, ..Delta::default() });
    }
}
