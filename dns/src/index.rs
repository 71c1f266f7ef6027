//! Names to addresses, built once per snapshot, so that a query costs a few look-ups.
//!
//! What is internal, and so never leaves the node (names are compared without case):
//!
//! | name | on a network that the task is attached to | otherwise |
//! |---|---|---|
//! | `service`, `alias` | the VIP, or the ready tasks' addresses with dnsrr | does not exist |
//! | `tasks.service`, `tasks.alias` | the ready tasks' addresses | does not exist |
//! | `service.slot.task`, the task's id, its first 12 characters | that task's address, ready or not | does not exist |
//! | any of these + `.network` | the same, on that network | does not exist |
//! | another name + `.network` | does not exist | asked outside |
//! | `_…` labels before an internal name | does not exist | does not exist |
//!
//! A name on several networks of a task is that of the first. Of a name's two meanings on one
//! network a service's own name goes before an alias; an alias of several services has all their
//! addresses.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

use ipnetwork::IpNetwork;
use mesh_types::{
    NetworkId, Revision, ServiceId, TaskId,
    record::{EndpointRecord, EndpointState, ServiceRecord, wide},
    spec::EndpointMode,
};

use crate::snapshot::Snapshot;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// These addresses; none: the name exists, and has no address now.
    Addresses(&'a [IpAddr]),
    /// An internal name that does not exist for this task.
    NoSuchName,
    /// Not ours.
    Outside,
}

/// What an address stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reverse<'a> {
    /// This name.
    Name(&'a str),
    /// An address of the cluster without a name for this task.
    NoSuchName,
    /// Not ours.
    Outside,
}

#[derive(Debug, Default)]
struct Zone {
    name: String,
    /// The services' own names.
    services: HashSet<String>,
    names: HashMap<String, Vec<IpAddr>>,
    addresses: HashMap<IpAddr, String>,
}

#[derive(Debug)]
struct Asker {
    networks: Vec<NetworkId>,
    forward: bool,
}

/// The snapshot, ready to be asked.
#[derive(Debug, Default)]
pub struct Index {
    revision: Revision,
    zones: HashMap<NetworkId, Zone>,
    askers: HashMap<TaskId, Asker>,
    /// Every name of every network, with and without the network's.
    internal: HashSet<String>,
    /// Subnets by their first address: they do not overlap.
    subnets: BTreeMap<[u8; 16], (IpNetwork, NetworkId)>,
}

impl Index {
    /// Builds the index.
    #[must_use]
    pub fn new(snapshot: &Snapshot) -> Self {
        let mut zones: HashMap<NetworkId, Zone> = HashMap::new();
        let mut subnets = BTreeMap::new();
        for network in &snapshot.networks {
            let zone = Zone { name: network.name.to_ascii_lowercase(), ..Zone::default() };
            zones.insert(network.id, zone);
            let first = wide(network.subnet.network());
            subnets.insert(first, (network.subnet, network.id));
        }
        let mut backends: HashMap<(NetworkId, ServiceId), Vec<IpAddr>> = HashMap::new();
        for endpoint in &snapshot.endpoints {
            if endpoint.state == EndpointState::Ready {
                backends
                    .entry((endpoint.network, endpoint.service))
                    .or_default()
                    .push(endpoint.address);
            }
            if let Some(zone) = zones.get_mut(&endpoint.network) {
                zone.add_task(endpoint);
            }
        }
        // Own names before aliases, whatever the order of the records.
        for aliases in [false, true] {
            for service in &snapshot.services {
                let Some(zone) = zones.get_mut(&service.network) else { continue };
                let tasks = backends.get(&(service.network, service.id));
                let tasks = tasks.map_or(&[][..], Vec::as_slice);
                if aliases {
                    zone.add_aliases(service, tasks)
                } else {
                    zone.add_service(service, tasks)
                }
            }
        }
        let internal = zones
            .values()
            .flat_map(|zone| {
                zone.names.keys().flat_map(|name| [name.clone(), format!("{name}.{}", zone.name)])
            })
            .collect();
        let askers = snapshot
            .tasks
            .iter()
            .map(|task| {
                (task.task, Asker { networks: task.networks.clone(), forward: task.forward })
            })
            .collect();
        Self { revision: snapshot.revision, zones, askers, internal, subnets }
    }

    /// How far the records are.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether the task may ask for outside names.
    #[must_use]
    pub fn may_forward(&self, task: TaskId) -> bool {
        self.askers.get(&task).is_some_and(|asker| asker.forward)
    }

    /// Looks a name up for a task: lower case, no dot at its end.
    #[must_use]
    pub fn lookup(&self, task: TaskId, name: &str) -> Lookup<'_> {
        let zones = self.zones_of(task);
        for zone in zones.clone() {
            if let Some(addresses) = zone.names.get(name) {
                return Lookup::Addresses(addresses);
            }
        }
        // Longest suffix first: names of networks may have dots.
        for (at, _) in name.match_indices('.') {
            let (host, suffix) = (&name[..at], &name[at + 1..]);
            if let Some(zone) = zones.clone().find(|zone| zone.name == suffix) {
                return match zone.names.get(host) {
                    Some(addresses) => Lookup::Addresses(addresses),
                    None => Lookup::NoSuchName,
                };
            }
        }
        // SRV and the like: the attributes of an internal name are as internal as the name.
        if name.starts_with('_') {
            return self.lookup_attribute(task, name);
        }
        if self.internal.contains(name) || has_internal_form(name) {
            return Lookup::NoSuchName;
        }
        Lookup::Outside
    }

    fn lookup_attribute(&self, task: TaskId, name: &str) -> Lookup<'_> {
        let mut host = name;
        while host.starts_with('_') {
            let Some((_, rest)) = host.split_once('.') else { return Lookup::Outside };
            host = rest;
        }
        match self.lookup(task, host) {
            Lookup::Outside => Lookup::Outside,
            Lookup::Addresses(_) | Lookup::NoSuchName => Lookup::NoSuchName,
        }
    }

    /// Looks an address up for a task.
    #[must_use]
    pub fn reverse(&self, task: TaskId, address: IpAddr) -> Reverse<'_> {
        let Some(network) = self.network_of(address) else { return Reverse::Outside };
        let attached =
            self.askers.get(&task).is_some_and(|asker| asker.networks.contains(&network));
        self.zones
            .get(&network)
            .filter(|_| attached)
            .and_then(|zone| zone.addresses.get(&address))
            .map_or(Reverse::NoSuchName, |name| Reverse::Name(name))
    }

    /// Whether an address belongs to a subnet of the cluster.
    #[must_use]
    pub fn is_internal_address(&self, address: IpAddr) -> bool {
        self.network_of(address).is_some()
    }

    fn network_of(&self, address: IpAddr) -> Option<NetworkId> {
        let (_, (subnet, network)) = self.subnets.range(..=wide(address)).next_back()?;
        subnet.contains(address).then_some(*network)
    }

    fn zones_of(&self, task: TaskId) -> impl Iterator<Item = &Zone> + Clone {
        let asker = self.askers.get(&task);
        asker
            .into_iter()
            .flat_map(|asker| &asker.networks)
            .filter_map(|network| self.zones.get(network))
    }
}

/// Names that only mesh makes: `tasks.x` (two labels: `tasks.example.com` is somebody's), and what
/// ends in a task's id.
fn has_internal_form(name: &str) -> bool {
    let tasks = name.strip_prefix("tasks.").is_some_and(|rest| !rest.contains('.'));
    let last = name.rsplit('.').next().unwrap_or(name);
    tasks || last.parse::<TaskId>().is_ok()
}

impl Zone {
    fn add_task(&mut self, endpoint: &EndpointRecord) {
        let names = [
            endpoint.task_name.to_ascii_lowercase(),
            endpoint.task.to_string(),
            endpoint.task.short(),
        ];
        let full = format!("{}.{}", names[0], self.name);
        for name in names {
            self.names.insert(name, vec![endpoint.address]);
        }
        self.addresses.insert(endpoint.address, full);
    }

    fn add_service(&mut self, service: &ServiceRecord, tasks: &[IpAddr]) {
        let name = service.name.to_ascii_lowercase();
        if let Some(vip) = service.vip {
            self.addresses.insert(vip, format!("{name}.{}", self.name));
        }
        self.names.insert(format!("tasks.{name}"), tasks.to_vec());
        self.names.insert(name.clone(), service_addresses(service, tasks));
        self.services.insert(name);
    }

    fn add_aliases(&mut self, service: &ServiceRecord, tasks: &[IpAddr]) {
        for alias in service.aliases.iter().map(|alias| alias.to_ascii_lowercase()) {
            if self.services.contains(&alias) {
                continue;
            }
            merge(self.names.entry(format!("tasks.{alias}")).or_default(), tasks);
            let addresses = service_addresses(service, tasks);
            merge(self.names.entry(alias).or_default(), &addresses);
        }
    }
}

fn service_addresses(service: &ServiceRecord, tasks: &[IpAddr]) -> Vec<IpAddr> {
    match service.mode {
        EndpointMode::Vip => service.vip.into_iter().collect(),
        EndpointMode::Dnsrr => tasks.to_vec(),
    }
}

fn merge(into: &mut Vec<IpAddr>, more: &[IpAddr]) {
    into.extend_from_slice(more);
    into.sort_unstable();
    into.dedup();
}
