//! From records, attachments and underlay facts to the kernel state that this node should have.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnetwork::IpNetwork;
use mesh_types::{
    ids::{EndpointId, NodeNumber},
    mac::Mac,
    net::{Mtu, Protocol},
    record::{EndpointRecord, EndpointState, RecordSet, ServiceRecord},
    task::InterfaceSpec,
};

use crate::{
    maglev, nft,
    object::{
        AddressUse, Config, EndpointEntry, Hook, Key, LinkRef, NetnsId, NodeEntry, Ns, PortEntry,
        Program, Value, Veth, Vxlan, host_name,
    },
};

/// A network namespace and the interfaces that are plugged into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The namespace.
    pub netns: NetnsId,
    /// Its interfaces.
    pub interfaces: Vec<InterfaceSpec>,
    /// Its task is about to end: it keeps the flows that it has, and gets no new ones.
    pub closed: bool,
}

/// The underlay, as read from the kernel in this round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// The uplink's kernel index.
    pub ifindex: u32,
    /// The uplink's name.
    pub name: String,
    /// The uplink's MTU.
    pub mtu: Mtu,
    /// The uplink's MAC.
    pub mac: Mac,
    /// This node's tunnel end: one of its addresses.
    pub vtep: IpAddr,
    /// All addresses of the node on links that are not ours, without loopback: published ports
    /// answer on them.
    pub addresses: BTreeSet<IpAddr>,
    /// The next hop towards each known tunnel end. A missing one counts as on-link.
    pub next_hops: BTreeMap<IpAddr, IpAddr>,
}

/// A node's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// VXLAN's UDP port.
    pub vxlan_port: u16,
    /// Encapsulate and strip through the VXLAN device.
    pub via_device: bool,
    /// The kernel needs `bpf_skb_change_type` before `redirect_peer`.
    pub change_type: bool,
    /// The range that node-local `gw0` addresses come from.
    pub gateway_range: IpNetwork,
    /// Entries of `MAGLEV`.
    pub maglev_capacity: u32,
}

/// All that the desired state is a function of.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// This node.
    pub node: NodeNumber,
    /// What the revision stream said.
    pub records: &'a RecordSet,
    /// What the kernel says of the underlay.
    pub underlay: &'a Underlay,
    /// What is plugged in here.
    pub attachments: &'a [Attachment],
    /// Nodes that cannot be reached through the tunnel: their endpoints get no new flows while a
    /// service has others.
    pub withdrawn: &'a BTreeSet<NodeNumber>,
    /// The node's settings.
    pub options: &'a Options,
    /// The result of an earlier round, whose tables are reused where the backends are the same. It
    /// changes the cost, never the result.
    pub previous: Option<&'a Desired>,
}

/// The kernel state that this node should have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired {
    /// Everything but what depends on where the kernel holds which service.
    pub objects: BTreeMap<Key, Value>,
    /// Services, in a fixed order. The plan gives each its index and its slice of `MAGLEV`.
    pub services: Vec<Service>,
    /// Entries of `MAGLEV`.
    pub maglev_capacity: u32,
}

/// By what a service is recognised in the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SlotKey {
    /// A virtual address on a VNI.
    Vip(u32, IpAddr),
    /// A published port.
    Published(Protocol, u16),
}

/// A service to balance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name, for messages.
    pub name: String,
    /// Its virtual address or its published ports, with each port's target.
    pub keys: BTreeMap<SlotKey, u16>,
    /// The VNI of its backends.
    pub vni: u32,
    /// What tells its table from another service's with the same backends.
    pub seed: u64,
    /// Who gets new flows, sorted.
    pub backends: Vec<EndpointId>,
    /// The Maglev table over them.
    pub table: Arc<[EndpointId]>,
}

/// The desired state. Pure and total: records that contradict each other lose entries, no more.
#[must_use]
pub fn desired(input: &Input) -> Desired {
    let mut out = Builder {
        input,
        ingress_vni: input.records.ingress().map_or(0, |network| network.vni.get()),
        objects: BTreeMap::new(),
        local: BTreeSet::new(),
        closed: BTreeSet::new(),
    };
    out.node();
    for attachment in input.attachments {
        out.namespace(attachment);
    }
    out.cluster();
    for endpoint in input.records.endpoints.values() {
        out.endpoint(endpoint);
    }
    let services = out.services();
    Desired { objects: out.objects, services, maglev_capacity: input.options.maglev_capacity }
}

struct Builder<'a> {
    input: &'a Input<'a>,
    ingress_vni: u32,
    objects: BTreeMap<Key, Value>,
    /// Endpoints that are plugged in here.
    local: BTreeSet<EndpointId>,
    /// Those of them that get no new flows.
    closed: BTreeSet<EndpointId>,
}

impl Builder<'_> {
    fn put(&mut self, key: Key, value: Value) {
        self.objects.insert(key, value);
    }

    fn sysctl(&mut self, ns: Ns, veth: Option<EndpointId>, path: String, value: &str) {
        self.put(Key::Sysctl { ns, veth, path }, Value::Sysctl(value.to_owned()));
    }

    /// The node's own objects.
    fn node(&mut self) {
        let Input { underlay, options, records, .. } = self.input;
        let ingress = records.ingress().map(|network| network.subnet);
        let ranges: Vec<IpNetwork> =
            [Some(options.gateway_range), ingress].into_iter().flatten().collect();
        self.sysctl(Ns::Node, None, "net/ipv4/ip_forward".to_owned(), "1");
        self.put(
            Key::Vxlan,
            Value::Vxlan(Vxlan {
                port: options.vxlan_port,
                mtu: underlay.mtu.inside_vxlan_v4(),
                up: true,
                collects_metadata: true,
            }),
        );
        let table = nft::table(&ranges);
        if !table.is_empty() {
            self.put(Key::Nft, Value::Nft(table));
        }
        self.put(
            Key::Config,
            Value::Config(Box::new(Config {
                vtep: underlay.vtep,
                node: self.input.node,
                ingress_vni: self.ingress_vni,
                uplink: underlay.ifindex,
                vxlan: LinkRef::Vxlan,
                uplink_mtu: underlay.mtu.get(),
                vxlan_port: options.vxlan_port,
                uplink_mac: underlay.mac,
                via_device: options.via_device,
                change_type: options.change_type,
                gateway_ranges: [Some(options.gateway_range), ingress]
                    .map(|range| range.map(canonical)),
            })),
        );
        for address in &underlay.addresses {
            self.put(Key::LocalAddr(*address), Value::Present);
        }
        self.put(
            Key::Hook(Hook::FromUplink),
            Value::Hook(Program::Current(LinkRef::Index(underlay.ifindex))),
        );
        self.put(Key::Hook(Hook::FromVxlan), Value::Hook(Program::Current(LinkRef::Vxlan)));
    }

    /// One task's namespace.
    fn namespace(&mut self, attachment: &Attachment) {
        let netns = attachment.netns;
        let ns = Ns::Task(netns);
        self.put(Key::Loopback(netns), Value::Present);
        // `all` counts beside the interface's own value (the larger wins).
        self.sysctl(ns, None, "net/ipv4/conf/all/rp_filter".to_owned(), "0");
        // The index of `lo` is 1 in every namespace (net/core/dev.c, `dev_new_index`).
        self.put(
            Key::Hook(Hook::TaskLo(netns)),
            Value::Hook(Program::Current(LinkRef::Index(LOOPBACK_IFINDEX))),
        );
        for interface in &attachment.interfaces {
            self.interface(netns, interface, attachment.closed);
        }
    }

    fn interface(&mut self, netns: NetnsId, spec: &InterfaceSpec, closed: bool) {
        let id = spec.endpoint;
        if !self.local.insert(id) {
            return;
        }
        if closed {
            self.closed.insert(id);
        }
        let mtu = self.mtu(spec).get();
        self.put(
            Key::Veth(id),
            Value::Veth(Veth {
                netns: Some(netns),
                ifname: spec.ifname.clone(),
                mac: id.into(),
                host_mac: Mac::GATEWAY,
                mtu,
                host_mtu: mtu,
                up: true,
                host_up: true,
                alias: true,
            }),
        );
        let host = host_name(id);
        let (node, task) = (Ns::Node, Ns::Task(netns));
        self.sysctl(node, Some(id), format!("net/ipv6/conf/{host}/disable_ipv6"), "1");
        self.sysctl(node, Some(id), format!("net/ipv4/conf/{host}/rp_filter"), "0");
        let conf = |family: u8, name: &str| format!("net/ipv{family}/conf/{}/{name}", spec.ifname);
        self.sysctl(task, Some(id), conf(4, "rp_filter"), "0");
        self.sysctl(task, Some(id), conf(6, "accept_ra"), "0");
        if spec.address.is_ipv4() {
            self.sysctl(task, Some(id), conf(6, "disable_ipv6"), "1");
        }
        self.put(Key::Address(id, spec.address), Value::Present);
        let ingress = spec.default_route && spec.vni.map_or(0, |vni| vni.get()) == self.ingress_vni;
        let ingress = ingress && spec.vni.is_some();
        if spec.default_route {
            let route = Value::DefaultRoute { endpoint: id, gateway: spec.gateway };
            self.put(Key::DefaultRoute(netns), route);
            self.put(Key::HostRoute(spec.address.ip()), Value::HostRoute(LinkRef::Veth(id)));
            self.put(Key::Neighbour(id, spec.address.ip()), Value::Neighbour(id.into()));
        }
        let vni = spec.vni.map_or(0, |vni| vni.get());
        self.put(
            Key::Port(LinkRef::Veth(id)),
            Value::Port(PortEntry {
                address: spec.address.ip(),
                endpoint: id,
                vni,
                mtu,
                gateway: spec.default_route,
                ingress,
            }),
        );
        let vtep = self.input.underlay.vtep;
        self.put(
            Key::Endpoint(id),
            Value::Endpoint(EndpointEntry {
                address: spec.address.ip(),
                node: self.input.node,
                vtep,
                next_hop: vtep,
                vni,
                link: Some(LinkRef::Veth(id)),
                ingress,
                draining: false,
                withdrawn: false,
                closed,
            }),
        );
        self.put(Key::MapAddress(vni, spec.gateway), Value::MapAddress(AddressUse::Gateway));
        if spec.vni.is_some() {
            let used = Value::MapAddress(AddressUse::Endpoint(id));
            self.put(Key::MapAddress(vni, spec.address.ip()), used);
        }
        self.put(Key::Hook(Hook::FromTask(id)), Value::Hook(Program::Current(LinkRef::Veth(id))));
    }

    /// The least of what the task was given, what fits the tunnel and what the network's user set.
    /// `gw0` too goes through the tunnel: replies to published ports return to the ingress node.
    fn mtu(&self, spec: &InterfaceSpec) -> Mtu {
        let network = self.input.records.networks.values().find(|n| Some(n.vni) == spec.vni);
        let limits = [Some(spec.mtu), network.and_then(|network| network.mtu)];
        let tunnel = self.input.underlay.mtu.inside_vxlan_v4();
        limits.into_iter().flatten().fold(tunnel, Mtu::min)
    }

    /// Nodes and gateways.
    fn cluster(&mut self) {
        for node in self.input.records.nodes.values() {
            let own = node.number == self.input.node;
            let vtep = if own { self.input.underlay.vtep } else { node.vtep };
            let entry = NodeEntry { vtep, next_hop: self.next_hop(vtep) };
            self.put(Key::Node(node.number), Value::Node(entry));
            self.put(Key::Vtep(vtep), Value::Vtep(node.number));
        }
        for network in self.input.records.networks.values() {
            let key = Key::MapAddress(network.vni.get(), network.gateway);
            self.put(key, Value::MapAddress(AddressUse::Gateway));
        }
    }

    fn next_hop(&self, vtep: IpAddr) -> IpAddr {
        self.input.underlay.next_hops.get(&vtep).copied().unwrap_or(vtep)
    }

    fn endpoint(&mut self, record: &EndpointRecord) {
        let Some(network) = self.input.records.networks.get(&record.network) else { return };
        let draining = record.state == EndpointState::Draining;
        if self.local.contains(&record.id) {
            if let Some(Value::Endpoint(entry)) = self.objects.get_mut(&Key::Endpoint(record.id)) {
                entry.draining = draining;
            }
            return;
        }
        // Of this node, but not plugged in (yet, or any more): there is nothing to deliver to.
        let Some(node) = self.input.records.nodes.get(&record.node) else { return };
        if record.node == self.input.node {
            return;
        }
        self.put(
            Key::Endpoint(record.id),
            Value::Endpoint(EndpointEntry {
                address: record.address,
                node: record.node,
                vtep: node.vtep,
                next_hop: self.next_hop(node.vtep),
                vni: network.vni.get(),
                link: None,
                ingress: network.ingress,
                draining,
                withdrawn: self.input.withdrawn.contains(&record.node),
                closed: false,
            }),
        );
        let key = Key::MapAddress(network.vni.get(), record.address);
        self.put(key, Value::MapAddress(AddressUse::Endpoint(record.id)));
    }

    fn services(&self) -> Vec<Service> {
        let mut taken = BTreeSet::new();
        let mut services = Vec::new();
        for record in self.input.records.services.values() {
            let Some(network) = self.input.records.networks.get(&record.network) else { continue };
            let vni = network.vni.get();
            let keys: BTreeMap<SlotKey, u16> = if network.ingress {
                let port = |p: &mesh_types::spec::PortSpec| {
                    (SlotKey::Published(p.protocol, p.published), p.target)
                };
                record.ports.iter().map(port).filter(|(key, _)| taken.insert(*key)).collect()
            } else {
                let key = record.vip.map(|vip| (SlotKey::Vip(vni, vip), 0));
                key.into_iter().filter(|(key, _)| taken.insert(*key)).collect()
            };
            if !keys.is_empty() {
                services.push(self.service(record, keys, vni));
            }
        }
        services
    }

    fn service(&self, record: &ServiceRecord, keys: BTreeMap<SlotKey, u16>, vni: u32) -> Service {
        let ready: Vec<&EndpointRecord> = self
            .input
            .records
            .backends(record.network, record.id)
            .filter(|backend| backend.state == EndpointState::Ready)
            .filter(|backend| self.objects.contains_key(&Key::Endpoint(backend.id)))
            .filter(|backend| !self.closed.contains(&backend.id))
            .collect();
        let reachable = |backend: &&&EndpointRecord| !self.input.withdrawn.contains(&backend.node);
        let mut backends: Vec<EndpointId> =
            ready.iter().filter(reachable).map(|backend| backend.id).collect();
        if backends.is_empty() {
            // Nobody looks reachable: the finding may be wrong, a refusal surely is no help.
            backends = ready.iter().map(|backend| backend.id).collect();
        }
        let seed = (record.id.bits() >> 64) as u64 ^ record.id.bits() as u64;
        let table = self.table(&keys, &backends, seed);
        Service { name: record.name.clone(), keys, vni, seed, backends, table }
    }

    fn table(
        &self,
        keys: &BTreeMap<SlotKey, u16>,
        backends: &[EndpointId],
        seed: u64,
    ) -> Arc<[EndpointId]> {
        let same = |old: &&Service| old.seed == seed && old.backends == backends;
        let previous = self.input.previous.map_or(&[][..], |previous| &previous.services);
        // Services keep their order, so the search is over almost at once in the usual case.
        let first = keys.keys().next();
        match previous.iter().filter(|old| old.keys.keys().next() == first).find(same) {
            Some(old) => Arc::clone(&old.table),
            None => maglev::table(backends, seed).into(),
        }
    }
}

/// Without host bits, as the maps hold it.
fn canonical(range: IpNetwork) -> IpNetwork {
    IpNetwork::new(range.network(), range.prefix()).unwrap_or(range)
}

/// The index of `lo` in every namespace.
pub const LOOPBACK_IFINDEX: u32 = 1;
