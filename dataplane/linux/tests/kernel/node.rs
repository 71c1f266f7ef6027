//! A node and its tasks for tests.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_linux::{Engine, EngineConfig, MapSizes, RawMap, netns};
use mesh_types::{
    ids::{EndpointId, NetworkId, NodeId, NodeNumber, ServiceId, TaskId, Vni},
    net::Mtu,
    record::{
        EndpointRecord, EndpointState, NetworkRecord, NodeRecord, Record, RecordSet, ServiceRecord,
    },
    spec::EndpointMode,
    task::InterfaceSpec,
};

use crate::host::{block_on, count, ip};

/// What a test does to a map.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Damage {
    /// Removes its first entry.
    Erase,
    /// Flips bits in its first entry's value.
    Clobber,
    /// Adds an entry of nonsense.
    Add,
}

/// One node with its tasks.
pub(crate) struct Node {
    prefix: String,
    tasks: Vec<String>,
    pub(crate) pins: PathBuf,
    pub(crate) clsact: bool,
}

pub(crate) const OVERLAY: NetworkId = NetworkId::from_bits(1);
pub(crate) const INGRESS: NetworkId = NetworkId::from_bits(2);
pub(crate) const WEB: ServiceId = ServiceId::from_bits(7);

pub(crate) fn endpoint(id: u64) -> EndpointId {
    EndpointId::new(id).unwrap()
}

pub(crate) fn node(number: u64) -> NodeNumber {
    NodeNumber::new(number).unwrap()
}

pub(crate) fn vni(value: u64) -> Vni {
    Vni::new(value).unwrap()
}

impl Node {
    /// Makes the node's namespace with an uplink 192.0.2.1/24, whose other end is inside too.
    pub(crate) fn new(test: &str) -> Self {
        let prefix = format!("mesh-{test}-{}", std::process::id());
        let pins = PathBuf::from(format!("/sys/fs/bpf/{prefix}"));
        mesh_linux::ensure_bpffs(&pins).expect("a bpffs");
        let node = Self { prefix, tasks: Vec::new(), pins, clsact: false };
        netns::create(&node.prefix).expect("a namespace");
        let name = &node.prefix;
        ip(&format!("-n {name} link set lo up"));
        ip(&format!("-n {name} link add up0 type veth peer name wire0"));
        ip(&format!("-n {name} addr add 192.0.2.1/24 dev up0"));
        ip(&format!("-n {name} link set up0 up"));
        ip(&format!("-n {name} link set wire0 up"));
        node
    }

    /// Runs the test on a thread inside the node's namespace.
    pub(crate) fn inside(&mut self, test: impl AsyncFnOnce(&mut Self) + Send) {
        let path = Path::new("/run/netns").join(&self.prefix);
        let netns = netns::Netns::open(&path).unwrap();
        netns
            .run(move || {
                block_on(test(self));
                Ok(())
            })
            .unwrap();
    }

    pub(crate) fn engine(&self) -> Engine {
        Engine::open(self.config()).unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn config(&self) -> EngineConfig {
        EngineConfig {
            node: node(1),
            vtep: "192.0.2.1".parse().unwrap(),
            uplink: None,
            pin_dir: self.pins.clone(),
            vxlan_port: 4789,
            via_device: false,
            force_clsact: self.clsact,
            gateway_range: "172.30.0.0/20".parse().unwrap(),
            maps: MapSizes {
                endpoints: 1024,
                services: 256,
                maglev: 16_384,
                flows: 1024,
                flows_new: 1024,
            },
        }
    }

    pub(crate) fn name(&self, task: &str) -> String {
        format!("{}-{task}", self.prefix)
    }

    /// A task's namespace.
    pub(crate) fn task(&mut self, task: &str) -> PathBuf {
        let name = self.name(task);
        self.tasks.push(name.clone());
        netns::create(&name).expect("a namespace")
    }

    /// An interface on the overlay network, 10.0.0.<id>.
    pub(crate) fn eth0(&self, id: u64) -> InterfaceSpec {
        InterfaceSpec {
            endpoint: endpoint(id),
            ifname: "eth0".to_owned(),
            address: format!("10.0.0.{id}/24").parse().unwrap(),
            vni: Some(vni(5000)),
            gateway: "10.0.0.254".parse().unwrap(),
            default_route: false,
            mtu: Mtu::ETHERNET,
        }
    }

    /// A node-local `gw0`, 172.30.0.<id>.
    pub(crate) fn gw0(&self, id: u64) -> InterfaceSpec {
        InterfaceSpec {
            endpoint: endpoint(id),
            ifname: "gw0".to_owned(),
            address: format!("172.30.0.{id}/20").parse().unwrap(),
            vni: None,
            gateway: "172.30.15.254".parse().unwrap(),
            default_route: true,
            mtu: Mtu::ETHERNET,
        }
    }

    /// Two nodes, two networks, a service with a VIP over endpoints 1 and 3 and one elsewhere.
    pub(crate) fn records(&self) -> Arc<RecordSet> {
        let mut set = RecordSet::default();
        for number in 1..=2 {
            let address: IpAddr = format!("192.0.2.{number}").parse().unwrap();
            set.insert(Record::Node(NodeRecord {
                id: NodeId::from_bits(number.into()),
                number: node(number),
                name: format!("n{number}"),
                vtep: address,
                address,
                manager: false,
            }));
        }
        for (id, name, number, subnet, gateway, ingress) in [
            (OVERLAY, "app", 5000, "10.0.0.0/24", "10.0.0.254", false),
            (INGRESS, "ingress", 4096, "10.255.0.0/24", "10.255.0.254", true),
        ] {
            set.insert(Record::Network(NetworkRecord {
                id,
                name: name.to_owned(),
                vni: vni(number),
                subnet: subnet.parse().unwrap(),
                gateway: gateway.parse().unwrap(),
                mtu: None,
                internal: false,
                ingress,
            }));
        }
        set.insert(Record::Service(ServiceRecord {
            network: OVERLAY,
            id: WEB,
            name: "web".to_owned(),
            aliases: Vec::new(),
            mode: EndpointMode::Vip,
            vip: Some("10.0.0.200".parse().unwrap()),
            ports: Vec::new(),
        }));
        for (id, on) in [(1, 1), (3, 1), (9, 2)] {
            set.insert(Record::Endpoint(EndpointRecord {
                id: endpoint(id),
                network: OVERLAY,
                node: node(on),
                address: format!("10.0.0.{id}").parse().unwrap(),
                task: TaskId::from_bits(id.into()),
                task_name: format!("web.{id}"),
                service: WEB,
                state: EndpointState::Ready,
            }));
        }
        Arc::new(set)
    }

    pub(crate) fn map(&self, name: &str) -> RawMap {
        let path = self.pins.join(format!("v{}/maps/{name}", mesh_ebpf_abi::SCHEMA));
        RawMap::open(&path).expect("a pinned map")
    }

    /// All entries of a map.
    pub(crate) fn dump(&self, name: &str) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.map(name).dump(100_000).unwrap().into_iter().collect()
    }

    /// Changes one entry of a map behind the engine's back.
    pub(crate) fn damage(&self, name: &str, damage: Damage) {
        let map = self.map(name);
        let first = self.dump(name).pop_first();
        match (damage, first) {
            (Damage::Erase, Some((key, _))) => map.delete(&key),
            (Damage::Clobber, Some((key, mut value))) => {
                value.iter_mut().for_each(|byte| *byte ^= 0x5a);
                map.put(&key, &value)
            }
            _ => {
                let (key, value) = map.sizes();
                map.put(&vec![0xee; key], &vec![0xee; value])
            }
        }
        .unwrap();
    }

    /// Nothing of ours is left in the node's namespace, and no pin.
    pub(crate) fn assert_clean(&self) {
        assert_eq!(count("ip -o link", "mv0"), 0);
        assert_eq!(count("ip -o link", "mesh-vxlan"), 0);
        assert_eq!(count("ip route show table main", "proto 109"), 0);
        assert_eq!(count("nft list tables", "ip mesh"), 0);
        assert_eq!(count("tc filter show dev up0 ingress", "from_uplink"), 0);
        assert!(!self.pins.exists(), "{} is left", self.pins.display());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for task in &self.tasks {
            let _ = netns::remove(task);
        }
        let _ = netns::remove(&self.prefix);
        let _ = fs::remove_dir_all(&self.pins);
    }
}
