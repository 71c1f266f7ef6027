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
//! | another name without a dot | does not exist | does not exist |
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

use crate::{
    answer::TTL_SECONDS,
    names::{NameIndex, Names, Records, ZoneIndex},
    snapshot::{Snapshot, TaskView},
    wire::{Key, labels, text},
};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// These addresses; none: the name exists, and has no address now.
    Addresses(Records<'a>),
    /// An internal name that does not exist for this task.
    NoSuchName,
    /// Not ours.
    Outside,
}

/// What an address stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reverse {
    /// This name.
    Name(String),
    /// An address of the cluster without a name for this task.
    NoSuchName,
    /// Not ours.
    Outside,
}

/// A network.
#[derive(Debug)]
struct Zone {
    /// Its name, as a [`Key`]; empty if it is none.
    name: Box<[u8]>,
    addresses: HashMap<IpAddr, NameIndex>,
}

/// What a task can see.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asker {
    zones: Vec<ZoneIndex>,
    /// Whether it may ask for outside names.
    pub(crate) forward: bool,
}

/// The snapshot, ready to be asked.
#[derive(Debug)]
pub struct Index {
    revision: Revision,
    names: Names,
    zones: Vec<Zone>,
    askers: HashMap<TaskId, Asker>,
    /// A task that nothing is known of.
    stranger: Asker,
    /// Subnets by their first address: they do not overlap.
    subnets: BTreeMap<[u8; 16], (IpNetwork, ZoneIndex)>,
}

impl Default for Index {
    fn default() -> Self {
        Self::new(&Snapshot::default())
    }
}

impl Index {
    /// Builds the index.
    #[must_use]
    pub fn new(snapshot: &Snapshot) -> Self {
        let mut zones = Vec::new();
        let mut numbers: HashMap<NetworkId, ZoneIndex> = HashMap::new();
        let mut subnets = BTreeMap::new();
        for (network, number) in snapshot.networks.iter().zip(0..) {
            let name = Key::from_text(&network.name);
            let name = name.as_ref().map_or(&[][..], Key::as_bytes).into();
            zones.push(Zone { name, addresses: HashMap::new() });
            numbers.insert(network.id, number);
            subnets.insert(wide(network.subnet.network()), (network.subnet, number));
        }
        let names =
            Builder { names: Names::new(TTL_SECONDS), zones: &mut zones, numbers: &numbers }
                .build(snapshot);
        let asker = |view: &TaskView| Asker {
            zones: view
                .networks
                .iter()
                .filter_map(|network| numbers.get(network))
                .copied()
                .collect(),
            forward: view.forward,
        };
        let askers = snapshot.tasks.iter().map(|view| (view.task, asker(view))).collect();
        let (revision, stranger) = (snapshot.revision, Asker::default());
        Self { revision, names, zones, askers, stranger, subnets }
    }

    /// How far the records are.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// What a task can see.
    pub(crate) fn asker(&self, task: TaskId) -> &Asker {
        self.askers.get(&task).unwrap_or(&self.stranger)
    }

    /// Looks a name up for a task.
    pub(crate) fn lookup(&self, asker: &Asker, key: &[u8]) -> Lookup<'_> {
        for zone in &asker.zones {
            if let Some(records) = self.names.find(*zone, key) {
                return Lookup::Addresses(records);
            }
        }
        // Longest suffix first: names of networks may have dots.
        for (at, _) in labels(key).skip(1) {
            let (host, suffix) = key.split_at(at);
            let named = |zone: &&ZoneIndex| self.zone_name(**zone) == suffix;
            if let Some(zone) = asker.zones.iter().find(named) {
                let found = self.names.find(*zone, host);
                return found.map_or(Lookup::NoSuchName, Lookup::Addresses);
            }
        }
        // SRV and the like: the attributes of an internal name are as internal as the name.
        if let Some(host) = host_of_attribute(key) {
            return match self.lookup(asker, host) {
                Lookup::Outside => Lookup::Outside,
                Lookup::Addresses(_) | Lookup::NoSuchName => Lookup::NoSuchName,
            };
        }
        if has_internal_form(key) || self.is_name_of_others(key) {
            return Lookup::NoSuchName;
        }
        Lookup::Outside
    }

    /// Whether some network has this name, without or with its own behind it.
    fn is_name_of_others(&self, key: &[u8]) -> bool {
        self.zones.iter().zip(0..).any(|(zone, number)| {
            let host = key.strip_suffix(&*zone.name).filter(|_| !zone.name.is_empty());
            self.names.find(number, key).is_some()
                || host.is_some_and(|host| self.names.find(number, host).is_some())
        })
    }

    fn zone_name(&self, zone: ZoneIndex) -> &[u8] {
        self.zones.get(zone as usize).map_or(&[], |zone| &zone.name)
    }

    /// Looks an address up for a task.
    pub(crate) fn reverse(&self, asker: &Asker, address: IpAddr) -> Reverse {
        let Some(number) = self.zone_of(address) else { return Reverse::Outside };
        let name = self
            .zones
            .get(number as usize)
            .filter(|_| asker.zones.contains(&number))
            .and_then(|zone| Some((zone, zone.addresses.get(&address)?)));
        let Some((zone, name)) = name else { return Reverse::NoSuchName };
        Reverse::Name(text(&[self.names.key(*name), &zone.name].concat()))
    }

    /// Whether an address belongs to a subnet of the cluster.
    #[must_use]
    pub fn is_internal_address(&self, address: IpAddr) -> bool {
        self.zone_of(address).is_some()
    }

    fn zone_of(&self, address: IpAddr) -> Option<ZoneIndex> {
        let (_, (subnet, zone)) = self.subnets.range(..=wide(address)).next_back()?;
        subnet.contains(address).then_some(*zone)
    }
}

/// What stands behind the labels that begin with `_`, if there are any.
fn host_of_attribute(key: &[u8]) -> Option<&[u8]> {
    let is_attribute = |(_, label): &(usize, &[u8])| label.starts_with(b"_");
    if !labels(key).next().as_ref().is_some_and(is_attribute) {
        return None;
    }
    labels(key).find(|label| !is_attribute(label)).map(|(at, _)| &key[at..])
}

/// Names that only mesh makes: single labels, `tasks.x` (two labels: `tasks.example.com` is
/// somebody's), and what ends in a task's id.
fn has_internal_form(key: &[u8]) -> bool {
    let count = labels(key).count();
    let tasks = count == 2 && labels(key).next().is_some_and(|(_, label)| label == b"tasks");
    let is_id =
        |label: &[u8]| std::str::from_utf8(label).is_ok_and(|l| l.parse::<TaskId>().is_ok());
    count == 1 || tasks || labels(key).last().is_some_and(|(_, label)| is_id(label))
}

/// Fills the table of names. The first to have a name keeps it: own names of services go before
/// aliases, whatever the order of the records.
struct Builder<'a> {
    names: Names,
    zones: &'a mut [Zone],
    numbers: &'a HashMap<NetworkId, ZoneIndex>,
}

/// The addresses of the ready tasks of each service on each network.
type Backends = HashMap<(NetworkId, ServiceId), Vec<IpAddr>>;

impl Builder<'_> {
    fn build(mut self, snapshot: &Snapshot) -> Names {
        let mut backends = Backends::new();
        for endpoint in &snapshot.endpoints {
            if endpoint.state == EndpointState::Ready {
                let tasks = backends.entry((endpoint.network, endpoint.service)).or_default();
                tasks.push(endpoint.address);
            }
        }
        let mut own = HashSet::new();
        for service in &snapshot.services {
            self.add_service(service, &backends);
            own.insert((service.network, service.name.to_ascii_lowercase()));
        }
        let mut aliases: BTreeMap<(NetworkId, String), Vec<&ServiceRecord>> = BTreeMap::new();
        for service in &snapshot.services {
            for alias in &service.aliases {
                let alias = (service.network, alias.to_ascii_lowercase());
                if !own.contains(&alias) {
                    aliases.entry(alias).or_default().push(service);
                }
            }
        }
        for ((network, alias), services) in aliases {
            self.add_alias(network, &alias, &services, &backends);
        }
        for endpoint in &snapshot.endpoints {
            self.add_task(endpoint);
        }
        self.names.shrink();
        self.names
    }

    fn add_service(&mut self, service: &ServiceRecord, backends: &Backends) {
        let Some(&zone) = self.numbers.get(&service.network) else { return };
        let tasks = tasks_of(service, backends);
        let Some(set) = self.names.add_set(tasks.iter().copied()) else { return };
        self.name(zone, &format!("tasks.{}", service.name), set);
        let set = match service.mode {
            EndpointMode::Vip => self.names.add_set(service.vip),
            EndpointMode::Dnsrr => Some(set),
        };
        let Some(name) = set.and_then(|set| self.name(zone, &service.name, set)) else { return };
        if let Some(vip) = service.vip {
            self.address(zone, vip, name);
        }
    }

    fn add_alias(
        &mut self,
        network: NetworkId,
        alias: &str,
        services: &[&ServiceRecord],
        backends: &Backends,
    ) {
        let Some(&zone) = self.numbers.get(&network) else { return };
        let tasks = |service: &&ServiceRecord| tasks_of(service, backends).to_vec();
        let addresses = |service: &&ServiceRecord| match service.mode {
            EndpointMode::Vip => service.vip.into_iter().collect(),
            EndpointMode::Dnsrr => tasks(service),
        };
        let all = [
            (format!("tasks.{alias}"), merged(services.iter().flat_map(tasks))),
            (alias.to_owned(), merged(services.iter().flat_map(addresses))),
        ];
        for (name, addresses) in all {
            if let Some(set) = self.names.add_set(addresses) {
                self.name(zone, &name, set);
            }
        }
    }

    fn add_task(&mut self, endpoint: &EndpointRecord) {
        let Some(&zone) = self.numbers.get(&endpoint.network) else { return };
        let Some(set) = self.names.add_set([endpoint.address]) else { return };
        if let Some(name) = self.name(zone, &endpoint.task_name, set) {
            self.address(zone, endpoint.address, name);
        }
        self.name(zone, &endpoint.task.to_string(), set);
        self.name(zone, &endpoint.task.short(), set);
    }

    fn name(&mut self, zone: ZoneIndex, name: &str, set: u32) -> Option<NameIndex> {
        // What no name can be, nobody asks for.
        self.names.add(zone, Key::from_text(name)?.as_bytes(), set)
    }

    fn address(&mut self, zone: ZoneIndex, address: IpAddr, name: NameIndex) {
        if let Some(zone) = self.zones.get_mut(zone as usize) {
            zone.addresses.entry(address).or_insert(name);
        }
    }
}

fn tasks_of<'a>(service: &ServiceRecord, backends: &'a Backends) -> &'a [IpAddr] {
    backends.get(&(service.network, service.id)).map_or(&[], Vec::as_slice)
}

fn merged(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut all: Vec<_> = addresses.collect();
    all.sort_unstable();
    all.dedup();
    all
}
