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
//! `_PORT._tcp` and `_PORT._udp` before the name of a service are SRV records of its ready tasks,
//! if it publishes that port of theirs; some ports have names (`_http`). An alias `*.x` has all the
//! names under `x` that are not given otherwise.
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
    NetworkId, Protocol, Revision, ServiceId, TaskId,
    record::{EndpointRecord, EndpointState, ServiceRecord, wide},
    spec::{EndpointMode, PortSpec},
};

use crate::{
    names::{NameIndex, Names, Records, ZoneIndex},
    reverse::ReverseName,
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
    /// Whether there are aliases that begin with `*`.
    has_wildcards: bool,
}

/// What SRV records say of a service on a network.
#[derive(Debug)]
struct Offer {
    ports: Box<[(Protocol, u16)]>,
    /// The names of its ready tasks.
    tasks: Box<[NameIndex]>,
}

/// One way to a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// A task's name, with its network.
    pub(crate) name: String,
    pub(crate) port: u16,
    pub(crate) addresses: Vec<IpAddr>,
}

/// Where a name is.
enum Place {
    Name(ZoneIndex, NameIndex),
    /// It would be in a network of the task, and is not.
    Missing,
    Unknown,
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
    offers: HashMap<NameIndex, Offer>,
    ttl: u32,
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
            zones.push(Zone { name, addresses: HashMap::new(), has_wildcards: false });
            numbers.insert(network.id, number);
            subnets.insert(wide(network.subnet.network()), (network.subnet, number));
        }
        let ttl = snapshot.policy.ttl;
        let builder = Builder {
            names: Names::new(ttl),
            zones: &mut zones,
            numbers: &numbers,
            offers: HashMap::new(),
        };
        let (names, offers) = builder.build(snapshot);
        let asker = |view: &TaskView| Asker {
            zones: view
                .networks
                .iter()
                .filter_map(|network| numbers.get(network))
                .copied()
                .collect(),
            // Its own servers are asked from where it is.
            forward: view.forward || !view.servers.is_empty(),
        };
        let askers = snapshot.tasks.iter().map(|view| (view.task, asker(view))).collect();
        let (revision, stranger) = (snapshot.revision, Asker::default());
        Self { revision, names, zones, askers, stranger, subnets, offers, ttl }
    }

    /// How far the records are.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether this is a task of the node.
    pub(crate) fn knows(&self, task: TaskId) -> bool {
        self.askers.contains_key(&task)
    }

    /// How long an answer may be remembered, in seconds.
    pub(crate) fn ttl(&self) -> u32 {
        self.ttl
    }

    /// What a task can see.
    pub(crate) fn asker(&self, task: TaskId) -> &Asker {
        self.askers.get(&task).unwrap_or(&self.stranger)
    }

    /// Looks a name up for a task.
    pub(crate) fn lookup(&self, asker: &Asker, key: &[u8]) -> Lookup<'_> {
        match self.place(asker, key) {
            Place::Name(_, name) => return Lookup::Addresses(self.names.records(name)),
            // The name of an SRV record exists, and has no address.
            Place::Missing | Place::Unknown if self.offer(asker, key).is_some() => {
                return Lookup::Addresses(Records::default());
            }
            Place::Missing => return Lookup::NoSuchName,
            Place::Unknown => {}
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

    fn place(&self, asker: &Asker, key: &[u8]) -> Place {
        for zone in &asker.zones {
            if let Some(name) = self.find(*zone, key) {
                return Place::Name(*zone, name);
            }
        }
        // Longest suffix first: names of networks may have dots.
        for (at, _) in labels(key).skip(1) {
            let (host, suffix) = key.split_at(at);
            let named = |zone: &&ZoneIndex| self.zone_name(**zone) == suffix;
            if let Some(zone) = asker.zones.iter().find(named) {
                let found = self.find(*zone, host);
                return found.map_or(Place::Missing, |name| Place::Name(*zone, name));
            }
        }
        Place::Unknown
    }

    /// A name in a network: its own, else that of the closest wildcard above it (RFC 4592).
    fn find(&self, zone: ZoneIndex, key: &[u8]) -> Option<NameIndex> {
        let own = self.names.find(zone, key);
        if own.is_some() || !self.zones.get(zone as usize)?.has_wildcards {
            return own;
        }
        labels(key).skip(1).find_map(|(at, _)| {
            let above = labels(&key[at..]).map(|(_, label)| label);
            let wildcard = Key::from_labels(std::iter::once(&b"*"[..]).chain(above))?;
            self.names.find(zone, wildcard.as_bytes())
        })
    }

    /// The ways to the service and port that an SRV name is about. `None`: there is no such name.
    pub(crate) fn targets(&self, asker: &Asker, key: &[u8]) -> Option<Vec<Target>> {
        let (zone, port, offer) = self.offer(asker, key)?;
        let targets = offer.tasks.iter().map(|task| Target {
            name: text(&[self.names.key(*task), self.zone_name(zone)].concat()),
            port,
            addresses: self.names.records(*task).addresses().collect(),
        });
        Some(targets.collect())
    }

    fn offer(&self, asker: &Asker, key: &[u8]) -> Option<(ZoneIndex, u16, &Offer)> {
        let mut parts = labels(key);
        let (_, port) = parts.next()?;
        let (_, protocol) = parts.next()?;
        let (host_at, _) = parts.next()?;
        let protocol = match protocol {
            b"_tcp" => Protocol::Tcp,
            b"_udp" => Protocol::Udp,
            _ => return None,
        };
        let port = port_of(port.strip_prefix(b"_")?)?;
        let Place::Name(zone, name) = self.place(asker, &key[host_at..]) else { return None };
        let offer = self.offers.get(&name)?;
        offer.ports.contains(&(protocol, port)).then_some((zone, port, offer))
    }

    /// Whether this may be a top-level domain: no name of a service or a task.
    pub(crate) fn is_top_level(&self, key: &[u8]) -> bool {
        labels(key).count() == 1 && !has_task_id(key) && !self.is_name_of_others(key)
    }

    /// Whether some network has this name, without or with its own behind it.
    fn is_name_of_others(&self, key: &[u8]) -> bool {
        self.zones.iter().zip(0..).any(|(zone, number)| {
            let host = key.strip_suffix(&*zone.name).filter(|_| !zone.name.is_empty());
            self.find(number, key).is_some()
                || host.is_some_and(|host| self.find(number, host).is_some())
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

    /// Whether some of the addresses of a name are in a subnet of the cluster.
    pub(crate) fn has_addresses(&self, of: &ReverseName) -> bool {
        self.subnets.values().any(|(subnet, _)| of.overlaps(subnet))
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

/// A port as SRV names have it: its number, or a name that is known everywhere.
fn port_of(label: &[u8]) -> Option<u16> {
    let port = match label {
        b"http" => 80,
        b"https" => 443,
        b"domain" => 53,
        b"ldap" => 389,
        b"mqtt" => 1883,
        b"mysql" => 3306,
        b"postgresql" => 5432,
        b"amqp" => 5672,
        b"redis" => 6379,
        _ => return std::str::from_utf8(label).ok()?.parse().ok(),
    };
    Some(port)
}

/// Names that only mesh makes: single labels, `tasks.x` (two labels: `tasks.example.com` is
/// somebody's), and what ends in a task's id.
fn has_internal_form(key: &[u8]) -> bool {
    let count = labels(key).count();
    let tasks = count == 2 && labels(key).next().is_some_and(|(_, label)| label == b"tasks");
    count == 1 || tasks || has_task_id(key)
}

/// Whether a name ends in a task's id.
fn has_task_id(key: &[u8]) -> bool {
    let is_id =
        |label: &[u8]| std::str::from_utf8(label).is_ok_and(|l| l.parse::<TaskId>().is_ok());
    labels(key).last().is_some_and(|(_, label)| is_id(label))
}

/// Fills the table of names. The first to have a name keeps it: own names of services go before
/// aliases, whatever the order of the records.
struct Builder<'a> {
    names: Names,
    zones: &'a mut [Zone],
    numbers: &'a HashMap<NetworkId, ZoneIndex>,
    offers: HashMap<NameIndex, Offer>,
}

/// The addresses of the ready tasks of each service on each network.
type Backends = HashMap<(NetworkId, ServiceId), Vec<IpAddr>>;

impl Builder<'_> {
    fn build(mut self, snapshot: &Snapshot) -> (Names, HashMap<NameIndex, Offer>) {
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
        let mut tasks: HashMap<(NetworkId, ServiceId), Vec<NameIndex>> = HashMap::new();
        for endpoint in &snapshot.endpoints {
            let name = self.add_task(endpoint);
            if endpoint.state == EndpointState::Ready {
                tasks.entry((endpoint.network, endpoint.service)).or_default().extend(name);
            }
        }
        self.add_offers(snapshot, &tasks);
        self.names.shrink();
        (self.names, self.offers)
    }

    /// The ports of a service are in its record of the ingress network alone.
    fn add_offers(
        &mut self,
        snapshot: &Snapshot,
        tasks: &HashMap<(NetworkId, ServiceId), Vec<NameIndex>>,
    ) {
        let published = snapshot.services.iter().filter(|service| !service.ports.is_empty());
        let ports: HashMap<ServiceId, &[PortSpec]> =
            published.map(|service| (service.id, &service.ports[..])).collect();
        for service in &snapshot.services {
            let (Some(ports), Some(&zone)) =
                (ports.get(&service.id), self.numbers.get(&service.network))
            else {
                continue;
            };
            let own = [service.name.clone(), format!("tasks.{}", service.name)];
            for name in own.iter().chain(&service.aliases) {
                let name = Key::from_text(name);
                let name = name.and_then(|name| self.names.find(zone, name.as_bytes()));
                let ports = ports.iter().map(|port| (port.protocol, port.target)).collect();
                let tasks = tasks.get(&(service.network, service.id));
                let tasks = tasks.map_or(&[][..], Vec::as_slice).into();
                // Of services that share an alias the first is found.
                if let Some(name) = name {
                    self.offers.entry(name).or_insert(Offer { ports, tasks });
                }
            }
        }
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
        if alias.starts_with("*.")
            && let Some(zone) = self.zones.get_mut(zone as usize)
        {
            zone.has_wildcards = true;
        }
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

    fn add_task(&mut self, endpoint: &EndpointRecord) -> Option<NameIndex> {
        let &zone = self.numbers.get(&endpoint.network)?;
        let set = self.names.add_set([endpoint.address])?;
        let name = self.name(zone, &endpoint.task_name, set);
        if let Some(name) = name {
            self.address(zone, endpoint.address, name);
        }
        self.name(zone, &endpoint.task.to_string(), set);
        self.name(zone, &endpoint.task.short(), set);
        name
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
