//! A cluster for tests: nodes on one switch, a router behind it, and a client behind the router.
//!
//! ```text
//! client 198.51.100.7 ── router 198.51.100.1, 192.0.2.1 ── n1 192.0.2.11, n2 .12, n3 .13
//! ```

use std::{collections::BTreeMap, fs, net::Ipv4Addr, path::PathBuf, sync::Arc};

use mesh_ebpf_abi::Counter;
use mesh_linux::{Engine, EngineConfig, Lease, MapSizes, Report, netns};
use mesh_types::{
    ids::{NetworkId, NodeId, TaskId},
    net::{Mtu, Protocol},
    record::{
        EndpointRecord, EndpointState, NetworkRecord, NodeRecord, Record, RecordSet, ServiceRecord,
    },
    spec::{EndpointMode, PortSpec},
    task::InterfaceSpec,
};

use crate::{
    host::{block_on, inside, ip, sh},
    node::{INGRESS, OVERLAY, WEB, endpoint, node, vni},
};

pub(crate) const OVERLAY_VNI: u32 = 5000;
pub(crate) const INGRESS_VNI: u32 = 4096;
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 200);
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub(crate) const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// How a node sends and receives tunnel packets, and how its programs are attached.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mode {
    pub(crate) via_device: bool,
    pub(crate) clsact: bool,
}

/// A task of the cluster. Its overlay endpoint has number `id`, its `gw0` 100 + `id`.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) netns: String,
    /// The number of its node.
    pub(crate) on: u64,
    pub(crate) id: u64,
    pub(crate) address: Ipv4Addr,
    lease: Option<Lease>,
}

struct Member {
    number: u64,
    netns: String,
    pins: PathBuf,
    engine: Engine,
}

pub(crate) struct Cluster {
    prefix: String,
    members: Vec<Member>,
    tasks: BTreeMap<&'static str, Task>,
    records: RecordSet,
}

/// The underlay address of a node.
pub(crate) fn vtep(number: u64) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, 10 + u8::try_from(number).unwrap())
}

impl Cluster {
    /// Builds the underlay and starts a node per mode, numbered from 1.
    pub(crate) fn new(test: &str, modes: &[Mode]) -> Self {
        let prefix = format!("mesh-{test}-{}", std::process::id());
        let mut cluster = Self {
            prefix,
            members: Vec::new(),
            tasks: BTreeMap::new(),
            records: records(modes.len() as u64),
        };
        cluster.underlay();
        for (number, mode) in (1..).zip(modes) {
            cluster.start(number, *mode);
        }
        cluster
    }

    fn underlay(&self) {
        for name in ["router", "client"] {
            netns::create(&self.netns(name)).expect("a namespace");
            ip(&format!("-n {} link set lo up", self.netns(name)));
        }
        let (router, client) = (self.netns("router"), self.netns("client"));
        let script = format!(
            "set -e
            ip -n {router} link add switch type bridge
            ip -n {router} link set switch up
            ip -n {router} addr add {ROUTER}/24 dev switch
            ip netns exec {router} sysctl -qw net.ipv4.ip_forward=1
            ip -n {router} link add out0 type veth peer name eth0 netns {client}
            ip -n {router} addr add 198.51.100.1/24 dev out0
            ip -n {router} link set out0 up
            ip -n {client} addr add {CLIENT}/24 dev eth0
            ip -n {client} link set eth0 up
            ip -n {client} route add default via 198.51.100.1"
        );
        sh(&script);
    }

    fn start(&mut self, number: u64, mode: Mode) {
        let (name, router) = (self.netns(&format!("n{number}")), self.netns("router"));
        let pins = PathBuf::from(format!("/sys/fs/bpf/{name}"));
        mesh_linux::ensure_bpffs(&pins).expect("a bpffs");
        netns::create(&name).expect("a namespace");
        let address = vtep(number);
        let script = format!(
            "set -e
            ip -n {name} link set lo up
            ip -n {name} link add up0 type veth peer name p{number} netns {router}
            ip -n {router} link set p{number} master switch up
            ip -n {name} addr add {address}/24 dev up0
            ip -n {name} link set up0 up
            ip -n {name} route add default via {ROUTER}"
        );
        sh(&script);
        let config = EngineConfig {
            node: node(number),
            vtep: address.into(),
            uplink: None,
            pin_dir: pins.clone(),
            vxlan_port: 4789,
            via_device: mode.via_device,
            force_clsact: mode.clsact,
            gateway_range: "172.30.0.0/20".parse().unwrap(),
            maps: MapSizes {
                endpoints: 1024,
                services: 256,
                maglev: 16_384,
                flows: 4096,
                flows_new: 4096,
            },
        };
        let open = || Engine::open(config).unwrap_or_else(|error| panic!("{error}"));
        let engine = inside(&name, open);
        self.members.push(Member { number, netns: name, pins, engine });
    }

    /// The namespace of a node, a task, the client or the router.
    pub(crate) fn netns(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// Starts a task: `backend` ones are published and behind the VIP, others have a local `gw0`.
    pub(crate) fn add_task(&mut self, name: &'static str, on: u64, id: u64, backend: bool) {
        let netns = self.netns(name);
        let path = netns::create(&netns).expect("a namespace");
        // A test provokes more ICMP errors in a second than a host would send to one peer.
        ip(&format!("netns exec {netns} sysctl -qw net.ipv4.icmp_ratelimit=0"));
        let address = Ipv4Addr::new(10, 0, 0, u8::try_from(id).unwrap());
        let mut interfaces = vec![InterfaceSpec {
            endpoint: endpoint(id),
            ifname: "eth0".to_owned(),
            address: format!("{address}/24").parse().unwrap(),
            vni: Some(vni(OVERLAY_VNI.into())),
            gateway: "10.0.0.254".parse().unwrap(),
            default_route: false,
            mtu: Mtu::ETHERNET,
        }];
        let (gateway, gateway_vni, next) = if backend {
            (format!("10.255.0.{id}/24"), Some(vni(INGRESS_VNI.into())), "10.255.0.254")
        } else {
            (format!("172.30.0.{id}/20"), None, "172.30.15.254")
        };
        interfaces.push(InterfaceSpec {
            endpoint: endpoint(100 + id),
            ifname: "gw0".to_owned(),
            address: gateway.parse().unwrap(),
            vni: gateway_vni,
            gateway: next.parse().unwrap(),
            default_route: true,
            mtu: Mtu::ETHERNET,
        });
        let service = if backend { WEB } else { mesh_types::ids::ServiceId::from_bits(1) };
        let mut publish = |network: NetworkId, id: u64, address: std::net::IpAddr| {
            self.records.insert(Record::Endpoint(EndpointRecord {
                id: endpoint(id),
                network,
                node: node(on),
                address,
                task: TaskId::from_bits(id.into()),
                task_name: name.to_owned(),
                service,
                state: EndpointState::Ready,
            }));
        };
        publish(OVERLAY, id, address.into());
        if backend {
            publish(INGRESS, 100 + id, interfaces[1].address.ip());
        }
        let records = Arc::new(self.records.clone());
        let member = self.members.iter_mut().find(|member| member.number == on).unwrap();
        let lease = inside(&member.netns, || {
            member.engine.set_records(records);
            block_on(member.engine.attach(&path, &interfaces))
        });
        let lease = Some(lease.unwrap_or_else(|error| panic!("{error}")));
        self.tasks.insert(name, Task { netns, on, id, address, lease });
    }

    pub(crate) fn task(&self, name: &str) -> Task {
        self.tasks[name].clone()
    }

    /// Marks all endpoints of a task.
    pub(crate) fn set_state(&mut self, task: &str, state: EndpointState) {
        let id = self.tasks[task].id;
        for record in self.records.endpoints.values_mut() {
            if [id, 100 + id].contains(&record.id.get()) {
                record.state = state;
            }
        }
    }

    /// Tells a node which others it does not reach.
    pub(crate) fn set_withdrawn(&mut self, number: u64, others: &[u64]) {
        let member = self.members.iter_mut().find(|member| member.number == number).unwrap();
        member.engine.set_withdrawn(others.iter().map(|other| node(*other)).collect());
        self.round(number);
    }

    /// A round on one node, which must converge.
    pub(crate) fn round(&mut self, number: u64) -> Report {
        let records = Arc::new(self.records.clone());
        let member = self.members.iter_mut().find(|member| member.number == number).unwrap();
        let report = inside(&member.netns, || {
            member.engine.set_records(records);
            block_on(member.engine.round())
        });
        assert!(report.is_converged(), "n{number}: {:#?}", report.failures);
        report
    }

    /// A round on every node: all know all records then.
    pub(crate) fn settle(&mut self) {
        for number in 1..=self.members.len() as u64 {
            self.round(number);
        }
    }

    /// Runs `work` in a node's namespace, with its engine.
    pub(crate) fn on<T: Send>(&self, number: u64, work: impl FnOnce(&Engine) -> T + Send) -> T {
        let member = self.members.iter().find(|member| member.number == number).unwrap();
        inside(&member.netns, || work(&member.engine))
    }

    /// What a node counted.
    pub(crate) fn counted(&self, number: u64, counter: Counter) -> u64 {
        let member = self.members.iter().find(|member| member.number == number).unwrap();
        let all = member.engine.counters();
        all.into_iter().find(|(of, _)| *of == counter).map_or(0, |(_, count)| count)
    }

    /// All counters that are not zero, for messages.
    pub(crate) fn all_counters(&self) -> String {
        let of = |member: &Member| {
            let counters = member.engine.counters();
            let text: String = counters
                .iter()
                .filter(|(_, count)| *count > 0)
                .map(|(counter, count)| format!(" {}={count}", counter.name()))
                .collect();
            format!("n{}:{text}\n", member.number)
        };
        self.members.iter().map(of).collect()
    }

    /// Unplugs a task; its namespace stays.
    pub(crate) fn detach(&mut self, name: &str) {
        let task = self.tasks.get_mut(name).unwrap();
        let lease = task.lease.take().expect("it is plugged in");
        let member = self.members.iter_mut().find(|member| member.number == task.on).unwrap();
        let report = inside(&member.netns, || block_on(member.engine.detach(&lease)));
        assert!(report.is_converged(), "{:#?}", report.failures);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.all_counters());
        }
        for task in self.tasks.values() {
            let _ = netns::remove(&task.netns);
        }
        for member in self.members.drain(..) {
            drop(member.engine);
            let _ = netns::remove(&member.netns);
            let _ = fs::remove_dir_all(&member.pins);
        }
        for name in ["router", "client"] {
            let _ = netns::remove(&self.netns(name));
        }
    }
}

/// `count` nodes, two networks, and the service `web`: a VIP, and port 8080 published. Nobody
/// listens on the target of port 8081.
fn records(count: u64) -> RecordSet {
    let mut set = RecordSet::default();
    for number in 1..=count {
        set.insert(Record::Node(NodeRecord {
            id: NodeId::from_bits(number.into()),
            number: node(number),
            name: format!("n{number}"),
            vtep: vtep(number).into(),
            address: vtep(number).into(),
            manager: false,
        }));
    }
    for (id, name, number, subnet, gateway, ingress) in [
        (OVERLAY, "app", OVERLAY_VNI, "10.0.0.0/24", "10.0.0.254", false),
        (INGRESS, "ingress", INGRESS_VNI, "10.255.0.0/24", "10.255.0.254", true),
    ] {
        set.insert(Record::Network(NetworkRecord {
            id,
            name: name.to_owned(),
            vni: vni(number.into()),
            subnet: subnet.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
            mtu: None,
            internal: false,
            ingress,
        }));
    }
    let port = |protocol, published, target| PortSpec { protocol, target, published };
    let ports = vec![
        port(Protocol::Tcp, 8080, 80),
        port(Protocol::Udp, 8080, 80),
        port(Protocol::Tcp, 8081, 81),
        port(Protocol::Udp, 8081, 81),
    ];
    for (network, vip, ports) in [(OVERLAY, Some(VIP.into()), vec![]), (INGRESS, None, ports)] {
        set.insert(Record::Service(ServiceRecord {
            network,
            id: WEB,
            name: "web".to_owned(),
            aliases: Vec::new(),
            mode: EndpointMode::Vip,
            vip,
            ports,
        }));
    }
    set
}
