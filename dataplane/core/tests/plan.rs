//! Desired states and plans against a model of the kernel.
//!
//! Golden tests show what typical changes come to. Property tests apply plans to the model, one
//! operation at a time, and check both the end (it is what was desired, and nothing is left to do)
//! and every step (no packet would find a reference that leads nowhere).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use mesh_dataplane::{
    AddressUse, Attachment, Desired, Hook, Input, Key, LinkRef, MapId, NetnsId, Ns, Observed, Op,
    Options, Program, SlotKey, Stray, Underlay, Value, desired, plan,
};
use mesh_types::{
    ids::{EndpointId, NetworkId, NodeId, NodeNumber, ServiceId, TaskId, Vni},
    mac::Mac,
    net::{Mtu, Protocol},
    record::{
        EndpointRecord, EndpointState, NetworkRecord, NodeRecord, Record, RecordSet, ServiceRecord,
    },
    spec::{EndpointMode, PortSpec},
    task::InterfaceSpec,
};
use proptest::prelude::*;

const OVERLAY: NetworkId = NetworkId::from_bits(1);
const INGRESS: NetworkId = NetworkId::from_bits(2);

fn endpoint(id: u64) -> EndpointId {
    EndpointId::new(id).unwrap()
}

fn number(id: u64) -> NodeNumber {
    NodeNumber::new(id).unwrap()
}

fn netns(ino: u64) -> NetnsId {
    NetnsId { dev: 4, ino }
}

/// What a test's cluster looks like.
#[derive(Debug, Clone, Default)]
struct World {
    nodes: BTreeSet<u64>,
    /// Endpoint: node, service, state; on the ingress network if the id is even.
    endpoints: BTreeMap<u64, (u64, u64, u8)>,
    services: BTreeSet<u64>,
    /// Namespace: endpoints plugged in.
    attached: BTreeMap<u64, BTreeSet<u64>>,
    mtu: u32,
    withdrawn: BTreeSet<u64>,
    /// Namespaces whose tasks are about to end.
    closed: BTreeSet<u64>,
}

impl World {
    fn records(&self) -> RecordSet {
        let mut set = RecordSet::default();
        for node in &self.nodes {
            let address = format!("192.0.2.{node}").parse().unwrap();
            set.insert(Record::Node(NodeRecord {
                id: NodeId::from_bits((*node).into()),
                number: number(*node),
                name: format!("n{node}"),
                vtep: address,
                address,
                manager: false,
            }));
        }
        for (id, vni, net, ingress) in [(OVERLAY, 5000, 0, false), (INGRESS, 4096, 255, true)] {
            set.insert(Record::Network(NetworkRecord {
                id,
                name: format!("net{vni}"),
                vni: Vni::new(vni).unwrap(),
                subnet: format!("10.{net}.0.0/16").parse().unwrap(),
                gateway: format!("10.{net}.255.254").parse().unwrap(),
                mtu: None,
                internal: false,
                ingress,
            }));
            for service in &self.services {
                let port = u16::try_from(8000 + service).unwrap();
                let port = PortSpec { protocol: Protocol::Tcp, target: 80, published: port };
                set.insert(Record::Service(ServiceRecord {
                    network: id,
                    id: ServiceId::from_bits((*service).into()),
                    name: format!("s{service}"),
                    aliases: Vec::new(),
                    mode: EndpointMode::Vip,
                    vip: (!ingress).then(|| format!("10.0.200.{service}").parse().unwrap()),
                    ports: if ingress { vec![port] } else { Vec::new() },
                }));
            }
        }
        for (id, (node, service, state)) in &self.endpoints {
            let ingress = id.is_multiple_of(2);
            set.insert(Record::Endpoint(EndpointRecord {
                id: endpoint(*id),
                network: if ingress { INGRESS } else { OVERLAY },
                node: number(*node),
                address: self.address(*id).parse().unwrap(),
                task: TaskId::from_bits((*id).into()),
                task_name: format!("t{id}"),
                service: ServiceId::from_bits((*service).into()),
                state: match state {
                    0 => EndpointState::Starting,
                    1 => EndpointState::Draining,
                    _ => EndpointState::Ready,
                },
            }));
        }
        set
    }

    fn address(&self, id: u64) -> String {
        format!("10.{}.0.{id}", if id.is_multiple_of(2) { 255 } else { 0 })
    }

    fn attachments(&self) -> Vec<Attachment> {
        let interface = |id: &u64| {
            let ingress = id.is_multiple_of(2);
            InterfaceSpec {
                endpoint: endpoint(*id),
                ifname: if ingress { "gw0".to_owned() } else { format!("eth{}", id % 3) },
                address: format!("{}/16", self.address(*id)).parse().unwrap(),
                vni: Some(Vni::new(if ingress { 4096 } else { 5000 }).unwrap()),
                gateway: if ingress { "10.255.255.254" } else { "10.0.255.254" }.parse().unwrap(),
                default_route: ingress,
                mtu: Mtu::ETHERNET,
            }
        };
        self.attached
            .iter()
            .map(|(ino, ids)| {
                let mut names = BTreeSet::new();
                let interfaces = ids.iter().map(interface);
                let interfaces = interfaces.filter(|i| names.insert(i.ifname.clone())).collect();
                Attachment { netns: netns(*ino), interfaces, closed: self.closed.contains(ino) }
            })
            .collect()
    }

    fn desired(&self) -> Desired {
        self.desired_after(None)
    }

    fn desired_after(&self, previous: Option<&Desired>) -> Desired {
        desired(&Input {
            node: number(1),
            records: &self.records(),
            underlay: &Underlay {
                ifindex: 2,
                name: "eth0".to_owned(),
                mtu: Mtu::new(self.mtu).unwrap(),
                mac: Mac([2, 0, 0, 0, 0, 9]),
                vtep: "192.0.2.1".parse().unwrap(),
                addresses: BTreeSet::from(["192.0.2.1".parse().unwrap()]),
                next_hops: BTreeMap::new(),
            },
            attachments: &self.attachments(),
            withdrawn: &self.withdrawn.iter().map(|id| number(*id)).collect(),
            options: &Options {
                vxlan_port: 4789,
                via_device: false,
                change_type: true,
                gateway_range: "172.30.0.1/20".parse().unwrap(),
                maglev_capacity: 65_536,
            },
            previous,
        })
    }
}

/// The kernel, as far as plans can tell.
#[derive(Debug, Clone, Default)]
struct Model(Observed);

impl Model {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Put { key: Key::Table(offset), value: Value::Table(table), .. } => {
                let (start, end) = (*offset as usize, *offset as usize + table.len());
                if self.0.maglev.len() < end {
                    self.0.maglev.resize(end, 0);
                }
                for (slot, id) in self.0.maglev[start..end].iter_mut().zip(table.iter()) {
                    *slot = id.get();
                }
            }
            Op::Put { key, value, .. } => {
                if let Key::Hook(Hook::FromTask(id)) | Key::Address(id, _) = key {
                    assert!(self.0.objects.contains_key(&Key::Veth(*id)), "{op}: no link");
                }
                self.0.objects.insert(key.clone(), value.clone());
            }
            Op::Delete { key, .. } => {
                self.0.objects.remove(key);
                if let Key::Veth(id) = key {
                    self.link_goes(*id);
                }
            }
        }
    }

    /// What the kernel removes with a link, and what then names nothing.
    fn link_goes(&mut self, id: EndpointId) {
        let stale = LinkRef::Index(1000 + u32::try_from(id.get()).unwrap());
        let old = std::mem::take(&mut self.0.objects);
        for (key, mut value) in old {
            let key = match key {
                Key::Port(LinkRef::Veth(of)) if of == id => Key::Port(stale),
                Key::Hook(_) => key,
                key if key.veth() == Some(id) => continue,
                key => key,
            };
            match &mut value {
                Value::DefaultRoute { endpoint, .. } if *endpoint == id => continue,
                Value::HostRoute(LinkRef::Veth(of)) if *of == id => continue,
                Value::Endpoint(entry) if entry.link == Some(LinkRef::Veth(id)) => {
                    entry.link = Some(stale);
                }
                Value::Hook(program) if *program == Program::Current(LinkRef::Veth(id)) => {
                    *program = Program::Stale;
                }
                _ => {}
            }
            self.0.objects.insert(key, value);
        }
    }

    fn table_of(&self, index: u32) -> Option<&[u64]> {
        let Some(Value::Service(entry)) = self.0.objects.get(&Key::Service(index)) else {
            return None;
        };
        self.0.maglev.get(entry.offset as usize..(entry.offset + entry.len) as usize)
    }

    /// What a packet follows leads somewhere.
    fn check_references(&self, after: &Op) {
        for (key, value) in &self.0.objects {
            match value {
                Value::MapAddress(AddressUse::Vip(index))
                | Value::Published { service: index, .. } => {
                    let table = self.table_of(*index);
                    let table = table.unwrap_or_else(|| panic!("after {after}: {key} is loose"));
                    for id in table {
                        let backend = Key::Endpoint(endpoint(*id));
                        assert!(self.0.objects.contains_key(&backend), "after {after}: {key}");
                    }
                }
                Value::Port(port) => {
                    let own = Key::Endpoint(port.endpoint);
                    assert!(self.0.objects.contains_key(&own), "after {after}: {key}");
                }
                _ => {}
            }
        }
    }

    fn is(&self, want: &Desired) {
        for (key, value) in &want.objects {
            assert_eq!(self.0.objects.get(key), Some(value), "{key}");
        }
        let mut slices: Vec<(u32, u32)> = Vec::new();
        for service in &want.services {
            let indexes: BTreeSet<u32> = service.keys.keys().map(|key| self.index(*key)).collect();
            assert_eq!(indexes.len(), 1, "one index for {}", service.name);
            let index = *indexes.first().unwrap();
            let table: Vec<u64> = service.table.iter().map(|id| id.get()).collect();
            assert_eq!(self.table_of(index), Some(&table[..]), "{}", service.name);
            if let Value::Service(entry) = &self.0.objects[&Key::Service(index)]
                && entry.len > 0
            {
                slices.push((entry.offset, entry.offset + entry.len));
            }
        }
        slices.sort_unstable();
        assert!(slices.windows(2).all(|pair| pair[0].1 <= pair[1].0), "overlap: {slices:?}");
        let rest = plan(want, &self.0);
        assert!(rest.ops.is_empty(), "left to do: {:?}", rest.ops);
    }

    fn index(&self, key: SlotKey) -> u32 {
        let key = match key {
            SlotKey::Vip(vni, address) => Key::MapAddress(vni, address),
            SlotKey::Published(protocol, port) => Key::Published(protocol, port),
        };
        match self.0.objects.get(&key) {
            Some(Value::MapAddress(AddressUse::Vip(index))) => *index,
            Some(Value::Published { service, .. }) => *service,
            other => panic!("{key}: {other:?}"),
        }
    }

    fn bring_to(&mut self, want: &Desired) {
        let plan = plan(want, &self.0);
        assert!(plan.refusals.is_empty());
        for op in &plan.ops {
            self.apply(op);
        }
    }
}

fn small() -> World {
    World {
        nodes: BTreeSet::from([1, 2]),
        endpoints: BTreeMap::from([(1, (1, 1, 2)), (2, (1, 1, 2)), (3, (2, 1, 2)), (4, (2, 1, 2))]),
        services: BTreeSet::from([1]),
        attached: BTreeMap::from([(100, BTreeSet::from([1, 2]))]),
        mtu: 1500,
        withdrawn: BTreeSet::new(),
        closed: BTreeSet::new(),
    }
}

fn text(ops: &[Op]) -> String {
    ops.iter().map(|op| format!("{op}\n")).collect()
}

/// From nothing to a node with one task: the whole of it, in order.
#[test]
fn golden_first_start() {
    assert_eq!(text(&plan(&small().desired(), &Observed::default()).ops), FIRST_START);
}

/// The differences that a cluster's life is made of.
#[test]
fn golden_changes() {
    let before = small();
    let mut model = Model::default();
    model.bring_to(&before.desired());
    let diff = |change: &dyn Fn(&mut World)| {
        let mut after = before.clone();
        change(&mut after);
        text(&plan(&after.desired(), &model.0).ops)
    };
    assert_eq!(diff(&|_| {}), "");
    assert_eq!(
        diff(&|world| {
            world.endpoints.insert(5, (2, 1, 2));
        }),
        "create ENDPOINTS[5]\ncreate MAGLEV[502..]\nchange SERVICES[0]\n\
         create ADDRESSES[5000, 10.0.0.5]\n"
    );
    assert_eq!(
        diff(&|world| {
            world.endpoints.insert(3, (2, 1, 1));
        }),
        "change ENDPOINTS[3]\ncreate MAGLEV[0..]\n"
    );
    assert_eq!(
        diff(&|world| {
            world.endpoints.remove(&3);
        }),
        "create MAGLEV[0..]\ndelete ADDRESSES[5000, 10.0.0.3]\ndelete ENDPOINTS[3]\n"
    );
    assert_eq!(
        diff(&|world| {
            world.attached.clear();
            world.endpoints.retain(|id, _| *id > 2);
        }),
        DETACHED
    );
    assert_eq!(
        diff(&|world| world.mtu = 9000),
        "change link mesh-vxlan\nchange link mv0000000001\nchange link mv0000000002\n\
         change CONFIG\nchange PORTS[mv0000000001]\nchange PORTS[mv0000000002]\n"
    );
}

/// A pair that was deleted by hand: its entry goes before another link can get its index.
#[test]
fn golden_vanished_link() {
    let want = small().desired();
    let mut model = Model::default();
    model.bring_to(&want);
    model.0.objects.remove(&Key::Veth(endpoint(1)));
    model.link_goes(endpoint(1));
    assert_eq!(text(&plan(&want, &model.0).ops), VANISHED);
}

#[test]
fn a_full_maglev_map_is_refused_by_name() {
    let mut want = small().desired();
    want.maglev_capacity = 300;
    let plan = plan(&want, &Observed::default());
    assert_eq!(plan.refusals.len(), 1);
    assert!(plan.refusals[0].to_string().starts_with("service s1: MAGLEV has no free slice"));
}

/// Where nobody seems reachable, everybody is tried.
#[test]
fn withdrawn_nodes_get_nothing_while_others_are_there() {
    let mut world = small();
    world.withdrawn = BTreeSet::from([2]);
    let one = world.desired();
    assert_eq!(one.services[0].backends, [endpoint(1)]);
    world.withdrawn = BTreeSet::from([1, 2]);
    assert_eq!(world.desired().services[0].backends, [endpoint(1), endpoint(3)]);
}

/// Whatever the records say of it: its own node knows first. Even if nobody else is left: who is
/// sent on from here would only be sent back.
#[test]
fn closed_endpoints_get_nothing_here_and_stay_plugged() {
    let mut world = small();
    let before = world.desired();
    world.closed = BTreeSet::from([100]);
    let after = world.desired();
    assert_eq!(after.services[0].backends, [endpoint(3)]);
    let changed: Vec<&Key> = after
        .objects
        .iter()
        .filter(|(key, value)| before.objects.get(key) != Some(value))
        .map(|(key, _)| key)
        .collect();
    assert_eq!(changed, [&Key::Endpoint(endpoint(1)), &Key::Endpoint(endpoint(2))]);
    assert!(before.objects.keys().eq(after.objects.keys()));
    world.endpoints.retain(|_, (node, ..)| *node == 1);
    assert!(world.desired().services[0].backends.is_empty());
}

fn worlds() -> impl Strategy<Value = World> {
    let endpoints = prop::collection::btree_map(1u64..16, (1u64..4, 1u64..4, 0u8..4), 0..14);
    let nodes = prop::collection::btree_set(1u64..4, 0..4);
    let services = prop::collection::btree_set(1u64..4, 0..4);
    let attached = prop::collection::btree_map(1u64..16, 100u64..103, 0..5);
    let withdrawn = prop::collection::btree_set(1u64..4, 0..2);
    let closed = prop::collection::btree_set(100u64..103, 0..2);
    (nodes, endpoints, services, attached, 1400u32..1402, withdrawn, closed).prop_map(
        |(nodes, endpoints, services, attached, mtu, withdrawn, closed)| {
            let mut by_netns: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
            for (id, ino) in attached {
                by_netns.entry(ino).or_default().insert(id);
            }
            World { nodes, endpoints, services, attached: by_netns, mtu, withdrawn, closed }
        },
    )
}

#[derive(Debug, Clone)]
enum Damage {
    Remove(prop::sample::Index),
    Change(prop::sample::Index),
    Add(u8),
    LoseLink(prop::sample::Index),
    Slot(prop::sample::Index),
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let one = prop_oneof![
        any::<prop::sample::Index>().prop_map(Damage::Remove),
        any::<prop::sample::Index>().prop_map(Damage::Change),
        any::<u8>().prop_map(Damage::Add),
        any::<prop::sample::Index>().prop_map(Damage::LoseLink),
        any::<prop::sample::Index>().prop_map(Damage::Slot),
    ];
    prop::collection::vec(one, 0..8)
}

fn harm(model: &mut Model, damage: &Damage) {
    let keys: Vec<Key> = model.0.objects.keys().cloned().collect();
    match damage {
        Damage::Remove(at) if !keys.is_empty() => {
            let key = at.get(&keys).clone();
            model.0.objects.remove(&key);
            if let Key::Veth(id) = key {
                model.link_goes(id);
            }
        }
        Damage::Change(at) if !keys.is_empty() => {
            let value = match at.get(&keys) {
                Key::Veth(_) | Key::Vxlan => return,
                Key::Hook(_) => Value::Hook(Program::Stale),
                _ => Value::Unknown(vec![7]),
            };
            model.0.objects.insert(at.get(&keys).clone(), value);
        }
        Damage::Add(byte) => {
            let key = match byte % 5 {
                4 => {
                    let (index, name) = ((*byte).into(), format!("stray{byte}"));
                    Key::Stray(Ns::Node, Stray::Link { index, name })
                }
                0 => Key::Unknown(MapId::Addresses, vec![*byte]),
                1 => Key::Port(LinkRef::Index((*byte).into())),
                2 => Key::Service((*byte).into()),
                _ => Key::Endpoint(endpoint(u64::from(*byte) + 1000)),
            };
            model.0.objects.insert(key, Value::Unknown(vec![*byte]));
        }
        Damage::LoseLink(at) => {
            let veths = keys.iter().filter_map(|key| match key {
                Key::Veth(id) => Some(*id),
                _ => None,
            });
            let veths: Vec<EndpointId> = veths.collect();
            if !veths.is_empty() {
                let id = *at.get(&veths);
                model.0.objects.remove(&Key::Veth(id));
                model.link_goes(id);
            }
        }
        Damage::Slot(at) if !model.0.maglev.is_empty() => {
            let at = at.index(model.0.maglev.len());
            model.0.maglev[at] ^= 1;
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// From any state to any other: it is reached, and at every step references hold.
    #[test]
    fn plans_arrive_and_are_safe_on_the_way(first in worlds(), second in worlds()) {
        let (one, two) = (first.desired(), second.desired());
        let mut model = Model::default();
        model.bring_to(&one);
        model.is(&one);
        for op in &plan(&two, &model.0).ops {
            model.apply(op);
            model.check_references(op);
        }
        model.is(&two);
    }

    /// Whatever was damaged, one plan repairs it.
    #[test]
    fn damage_heals(world in worlds(), damages in damages()) {
        let want = world.desired();
        let mut model = Model::default();
        model.bring_to(&want);
        for damage in &damages {
            harm(&mut model, damage);
        }
        model.bring_to(&want);
        model.is(&want);
    }

    /// A service's table does not move while its size stays.
    #[test]
    fn services_keep_their_slices(world in worlds(), others in worlds()) {
        let mut after = others;
        after.services.extend(&world.services);
        let (one, two) = (world.desired(), after.desired());
        let mut model = Model::default();
        model.bring_to(&one);
        let before = model.clone();
        model.bring_to(&two);
        for old in &one.services {
            let same = two.services.iter().find(|new| new.keys == old.keys);
            let new = same.expect("the service is still there");
            let key = *old.keys.keys().next().unwrap();
            prop_assert_eq!(before.index(key), model.index(key));
            if new.table.len() == old.table.len() {
                let slice = Key::Service(model.index(key));
                prop_assert_eq!(&before.0.objects[&slice], &model.0.objects[&slice]);
            }
        }
    }

    /// Reusing tables of an earlier result changes nothing.
    #[test]
    fn memory_is_only_a_shortcut(first in worlds(), second in worlds()) {
        let old = first.desired();
        prop_assert_eq!(second.desired_after(Some(&old)), second.desired());
    }
}

const FIRST_START: &str = "\
create sysctl net/ipv4/ip_forward
create sysctl net/ipv4/conf/all/rp_filter in netns:[100]
create link mesh-vxlan
create link mv0000000001
create link mv0000000002
create link lo in netns:[100]
create sysctl net/ipv4/conf/mv0000000001/rp_filter
create sysctl net/ipv6/conf/mv0000000001/disable_ipv6
create sysctl net/ipv4/conf/mv0000000002/rp_filter
create sysctl net/ipv6/conf/mv0000000002/disable_ipv6
create sysctl net/ipv4/conf/eth1/rp_filter in netns:[100]
create sysctl net/ipv6/conf/eth1/accept_ra in netns:[100]
create sysctl net/ipv6/conf/eth1/disable_ipv6 in netns:[100]
create sysctl net/ipv4/conf/gw0/rp_filter in netns:[100]
create sysctl net/ipv6/conf/gw0/accept_ra in netns:[100]
create sysctl net/ipv6/conf/gw0/disable_ipv6 in netns:[100]
create address 10.0.0.1/16 of endpoint 1
create address 10.255.0.2/16 of endpoint 2
create default route in netns:[100]
create route to 10.255.0.2
create neighbour 10.255.0.2 on mv0000000002
create nft table ip mesh
create NODES[1]
create NODES[2]
create VTEPS[192.0.2.1]
create VTEPS[192.0.2.2]
create LOCAL_ADDRS[192.0.2.1]
create CONFIG
create ENDPOINTS[1]
create ENDPOINTS[2]
create ENDPOINTS[3]
create ENDPOINTS[4]
create PORTS[mv0000000001]
create PORTS[mv0000000002]
create MAGLEV[0..]
create MAGLEV[251..]
create SERVICES[0]
create SERVICES[1]
create ADDRESSES[4096, 10.255.0.2]
create ADDRESSES[4096, 10.255.0.4]
create ADDRESSES[4096, 10.255.255.254]
create ADDRESSES[5000, 10.0.0.1]
create ADDRESSES[5000, 10.0.0.3]
create ADDRESSES[5000, 10.0.200.1]
create ADDRESSES[5000, 10.0.255.254]
create PUBLISHED[8001/tcp]
create program from_task on mv0000000001
create program from_task on mv0000000002
create program from_uplink
create program from_vxlan
create program task_lo in netns:[100]
";
const DETACHED: &str = "\
create MAGLEV[0..]
create MAGLEV[251..]
delete ADDRESSES[4096, 10.255.0.2]
delete ADDRESSES[5000, 10.0.0.1]
delete PORTS[mv0000000001]
delete PORTS[mv0000000002]
delete ENDPOINTS[1]
delete ENDPOINTS[2]
delete link mv0000000001
delete link mv0000000002
delete program from_task on mv0000000001
delete program from_task on mv0000000002
delete program task_lo in netns:[100]
";
const VANISHED: &str = "\
delete PORTS[1001]
create link mv0000000001
create sysctl net/ipv4/conf/mv0000000001/rp_filter
create sysctl net/ipv6/conf/mv0000000001/disable_ipv6
create sysctl net/ipv4/conf/eth1/rp_filter in netns:[100]
create sysctl net/ipv6/conf/eth1/accept_ra in netns:[100]
create sysctl net/ipv6/conf/eth1/disable_ipv6 in netns:[100]
create address 10.0.0.1/16 of endpoint 1
change ENDPOINTS[1]
create PORTS[mv0000000001]
change program from_task on mv0000000001
";
