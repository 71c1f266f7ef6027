//! The kernel state of a node as a flat set of keyed objects.
//!
//! Links that are ours are named, not numbered: their kernel indexes are not known before they
//! exist, and a re-created link gets another one. The shell translates both ways ([`LinkRef`]).

use std::{fmt, net::IpAddr, sync::Arc};

use ipnetwork::IpNetwork;
use mesh_types::{
    ids::{EndpointId, NodeNumber},
    mac::Mac,
    net::{Mtu, Protocol},
};
use serde::{Deserialize, Serialize};

/// The identity of a network namespace: device and inode of its `nsfs` file. Unique while the
/// namespace lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NetnsId {
    /// The device of `nsfs`.
    pub dev: u64,
    /// The namespace's inode.
    pub ino: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "netns:[{}]", self.ino)
    }
}

/// Where an object lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ns {
    /// The node's own namespace.
    Node,
    /// A task's.
    Task(NetnsId),
}

/// A link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkRef {
    /// The host side of this endpoint's veth.
    Veth(EndpointId),
    /// Our VXLAN device.
    Vxlan,
    /// A link that is not ours (the uplink), or one that is gone, by kernel index.
    Index(u32),
}

/// The host side's name of an endpoint's veth.
#[must_use]
pub fn host_name(endpoint: EndpointId) -> String {
    format!("mv{:010x}", endpoint.get())
}

/// The inverse of [`host_name`].
#[must_use]
pub fn endpoint_of(name: &str) -> Option<EndpointId> {
    let digits = name.strip_prefix("mv").filter(|digits| digits.len() == 10)?;
    let endpoint = EndpointId::new(u64::from_str_radix(digits, 16).ok()?).ok()?;
    (host_name(endpoint) == name).then_some(endpoint)
}

/// The VXLAN device's name.
pub const VXLAN_NAME: &str = "mesh-vxlan";
/// The alias that links of ours carry.
pub const LINK_ALIAS: &str = "mesh";

/// Where a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Ingress of a veth's host side.
    FromTask(EndpointId),
    /// Ingress of the underlay link.
    FromUplink,
    /// Ingress of the VXLAN device.
    FromVxlan,
    /// Egress of a task's `lo`.
    TaskLo(NetnsId),
}

/// What is attached at a [`Hook`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Program {
    /// The program of this hook, as loaded by this process, at this link.
    Current(LinkRef),
    /// Ours, but of an earlier process, or of a link that is gone.
    Stale,
}

/// The BPF maps whose contents are ours to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "documented in mesh-ebpf-abi, whose names these are")]
pub enum MapId {
    Addresses,
    Endpoints,
    Ports,
    Nodes,
    Vteps,
    Services,
    Published,
    LocalAddrs,
    Config,
}

impl MapId {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Addresses,
        Self::Endpoints,
        Self::Ports,
        Self::Nodes,
        Self::Vteps,
        Self::Services,
        Self::Published,
        Self::LocalAddrs,
        Self::Config,
    ];

    /// The map's name in the object.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Addresses => "ADDRESSES",
            Self::Endpoints => "ENDPOINTS",
            Self::Ports => "PORTS",
            Self::Nodes => "NODES",
            Self::Vteps => "VTEPS",
            Self::Services => "SERVICES",
            Self::Published => "PUBLISHED",
            Self::LocalAddrs => "LOCAL_ADDRS",
            Self::Config => "CONFIG",
        }
    }
}

/// Something that carries our mark, and is no object of ours: a copy, or one that was renamed.
/// Nothing but its removal is ever wanted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stray {
    /// A link of our kinds with our alias and another name than we give.
    Link {
        /// Its kernel index.
        index: u32,
        /// Its name.
        name: String,
    },
    /// An address on the node's side of a link of ours: there is none by design.
    Address {
        /// The link's kernel index.
        index: u32,
        /// The address.
        address: IpNetwork,
    },
    /// A route of our protocol that is not as we make them.
    Route {
        /// `None`: a default route.
        to: Option<IpNetwork>,
        /// The next hop.
        gateway: Option<IpAddr>,
        /// The link's kernel index.
        oif: Option<u32>,
        /// Its priority.
        metric: u32,
    },
    /// A filter that runs a program of ours at another place than ours.
    Filter {
        /// The link's kernel index.
        index: u32,
        /// The side of the link.
        parent: u32,
        /// Priority and protocol, as in `tcm_info`.
        info: u32,
        /// Its handle.
        handle: u32,
    },
    /// A program of ours that is attached by another tcx link than that of its hook, or by none.
    Tcx {
        /// The link's kernel index.
        index: u32,
        /// The program's number.
        program: u32,
        /// The tcx link's number; 0: none.
        link: u32,
    },
}

/// What an object is. One key, one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A setting under `/proc/sys`, of the namespace or of one link in it.
    Sysctl {
        /// Whose view of `/proc/sys/net`.
        ns: Ns,
        /// The veth that it belongs to, if it goes when the veth goes.
        veth: Option<EndpointId>,
        /// Below `/proc/sys/`.
        path: String,
    },
    /// The VXLAN device.
    Vxlan,
    /// A veth pair.
    Veth(EndpointId),
    /// A task's `lo`, up.
    Loopback(NetnsId),
    /// An address of a task's interface.
    Address(EndpointId, IpNetwork),
    /// A task's default route.
    DefaultRoute(NetnsId),
    /// The node's route to a `gw0`.
    HostRoute(IpAddr),
    /// The node's permanent neighbour entry for a `gw0`.
    Neighbour(EndpointId, IpAddr),
    /// Our nft table.
    Nft,
    /// `NODES`.
    Node(NodeNumber),
    /// `VTEPS`.
    Vtep(IpAddr),
    /// `LOCAL_ADDRS`.
    LocalAddr(IpAddr),
    /// `CONFIG`.
    Config,
    /// `ENDPOINTS`.
    Endpoint(EndpointId),
    /// `PORTS`.
    Port(LinkRef),
    /// A slice of `MAGLEV`, by its offset.
    Table(u32),
    /// `SERVICES`.
    Service(u32),
    /// `ADDRESSES`; VNI 0 is the node-local `gw0` range.
    MapAddress(u32, IpAddr),
    /// `PUBLISHED`.
    Published(Protocol, u16),
    /// An entry of a map whose key is none that we would write.
    Unknown(MapId, Vec<u8>),
    /// Marked as ours, but none that we would make.
    Stray(Ns, Stray),
    /// An attached program.
    Hook(Hook),
}

/// The state of an object. Each kind of key has its kind of value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// There, with nothing more to it ([`Key::Loopback`], [`Key::Address`], [`Key::LocalAddr`],
    /// [`Key::Stray`]).
    Present,
    /// [`Key::Sysctl`], without the line end.
    Sysctl(String),
    /// [`Key::Vxlan`].
    Vxlan(Vxlan),
    /// [`Key::Veth`].
    Veth(Veth),
    /// [`Key::DefaultRoute`].
    DefaultRoute {
        /// The `gw0` that it leaves by.
        endpoint: EndpointId,
        /// The next hop.
        gateway: IpAddr,
    },
    /// [`Key::HostRoute`].
    HostRoute(LinkRef),
    /// [`Key::Neighbour`].
    Neighbour(Mac),
    /// [`Key::Nft`]: the table's body. One that was changed behind our back is observed as empty.
    Nft(String),
    /// [`Key::Node`].
    Node(NodeEntry),
    /// [`Key::Vtep`].
    Vtep(NodeNumber),
    /// [`Key::Config`].
    Config(Box<Config>),
    /// [`Key::Endpoint`].
    Endpoint(EndpointEntry),
    /// [`Key::Port`].
    Port(PortEntry),
    /// [`Key::Table`].
    Table(Arc<[EndpointId]>),
    /// [`Key::Service`].
    Service(ServiceEntry),
    /// [`Key::MapAddress`].
    MapAddress(AddressUse),
    /// [`Key::Published`].
    Published {
        /// Index in `SERVICES`.
        service: u32,
        /// The task's port.
        target: u16,
    },
    /// Of a map entry: bytes that we would not write.
    Unknown(Vec<u8>),
    /// [`Key::Hook`].
    Hook(Program),
}

/// A VXLAN device with `collect_md`, no learning and no outer UDP checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// UDP port.
    pub port: u16,
    /// Of inner packets.
    pub mtu: Mtu,
    /// Administratively up, and known by our alias.
    pub up: bool,
    /// `collect_md`, no learning: what only making it anew can change.
    pub collects_metadata: bool,
}

/// A veth pair: host side in the node's namespace, the other in the task's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Veth {
    /// The task's namespace. `None` (observed only): the peer is in none that is attached.
    pub netns: Option<NetnsId>,
    /// The task side's name.
    pub ifname: String,
    /// The task side's MAC.
    pub mac: Mac,
    /// The host side's MAC: the gateway's, so that the host's stack takes frames sent to it.
    pub host_mac: Mac,
    /// The task side's MTU.
    pub mtu: u32,
    /// The host side's MTU.
    pub host_mtu: u32,
    /// The task side is up.
    pub up: bool,
    /// The host side is up.
    pub host_up: bool,
    /// The host side carries our alias.
    pub alias: bool,
}

impl Veth {
    /// Whether `self`, observed, can be turned into `other` without making the pair anew.
    #[must_use]
    pub fn can_become(&self, other: &Self) -> bool {
        self.netns == other.netns && self.ifname == other.ifname
    }
}

/// A value of `NODES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeEntry {
    /// The tunnel's end.
    pub vtep: IpAddr,
    /// The next hop towards it.
    pub next_hop: IpAddr,
}

/// A value of `ENDPOINTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointEntry {
    /// Its address.
    pub address: IpAddr,
    /// Its node.
    pub node: NodeNumber,
    /// Its node's tunnel end.
    pub vtep: IpAddr,
    /// The next hop towards that.
    pub next_hop: IpAddr,
    /// Its VNI; 0 on a node-local `gw0`.
    pub vni: u32,
    /// The host side's link, if it is on this node.
    pub link: Option<LinkRef>,
    /// It is a `gw0` on the ingress network.
    pub ingress: bool,
    /// No new flows.
    pub draining: bool,
    /// Its node cannot be reached: flows that saw no reply are decided anew.
    pub withdrawn: bool,
    /// On this node, and about to end: new flows are given to others, whoever sent them here.
    pub closed: bool,
}

/// A value of `PORTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortEntry {
    /// The only source address.
    pub address: IpAddr,
    /// The endpoint, and so the only source MAC.
    pub endpoint: EndpointId,
    /// Its VNI; 0 on a node-local `gw0`.
    pub vni: u32,
    /// The largest IP packet.
    pub mtu: u32,
    /// It is a `gw0`.
    pub gateway: bool,
    /// It is a `gw0` on the ingress network.
    pub ingress: bool,
}

/// A value of `SERVICES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Its slice of `MAGLEV`; length 0: no backend.
    pub offset: u32,
    /// The slice's length.
    pub len: u32,
    /// Its virtual address, if it has one.
    pub vip: Option<IpAddr>,
    /// The VNI of its backends.
    pub vni: u32,
}

/// A value of `ADDRESSES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressUse {
    /// An endpoint's.
    Endpoint(EndpointId),
    /// A service's, by index in `SERVICES`.
    Vip(u32),
    /// The network's gateway.
    Gateway,
}

/// The value of `CONFIG`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This node's tunnel end.
    pub vtep: IpAddr,
    /// This node.
    pub node: NodeNumber,
    /// The ingress network's VNI; 0: there is none.
    pub ingress_vni: u32,
    /// The underlay link.
    pub uplink: u32,
    /// The VXLAN device.
    pub vxlan: LinkRef,
    /// Bytes.
    pub uplink_mtu: u32,
    /// UDP port.
    pub vxlan_port: u16,
    /// The uplink's MAC.
    pub uplink_mac: Mac,
    /// Encapsulate through the VXLAN device.
    pub via_device: bool,
    /// `bpf_skb_change_type` before `redirect_peer` (kernels before 6.15).
    pub change_type: bool,
    /// The ranges of `gw0` addresses: node-local, ingress.
    pub gateway_ranges: [Option<IpNetwork>; 2],
}

impl Key {
    /// The veth that takes this object with it when it goes.
    #[must_use]
    pub fn veth(&self) -> Option<EndpointId> {
        match self {
            Self::Sysctl { veth, .. } => *veth,
            Self::Address(endpoint, _) | Self::Neighbour(endpoint, _) => Some(*endpoint),
            Self::Hook(Hook::FromTask(endpoint)) | Self::Veth(endpoint) => Some(*endpoint),
            Self::Port(LinkRef::Veth(endpoint)) => Some(*endpoint),
            _ => None,
        }
    }

    /// The endpoint whose pair this is.
    pub(crate) fn pair(&self) -> Option<EndpointId> {
        if let Self::Veth(endpoint) = self { Some(*endpoint) } else { None }
    }

    /// Whether it is a setting of something that is not ours: changed, never removed.
    pub(crate) fn is_setting(&self) -> bool {
        matches!(self, Self::Sysctl { .. } | Self::Loopback(_))
    }

    /// Where it stands in the order of creation: what others rely on comes first, what makes it
    /// reachable comes last.
    pub(crate) fn rank(&self) -> u8 {
        match self {
            Self::Sysctl { veth: None, .. } => 0,
            Self::Vxlan => 1,
            Self::Veth(_) => 2,
            Self::Loopback(_) => 3,
            Self::Sysctl { .. } => 4,
            Self::Address(..) => 5,
            Self::DefaultRoute(_) => 6,
            Self::HostRoute(_) => 7,
            Self::Neighbour(..) => 8,
            Self::Nft => 9,
            Self::Node(_) => 10,
            Self::Vtep(_) => 11,
            Self::LocalAddr(_) => 12,
            Self::Config => 13,
            Self::Endpoint(_) => 14,
            Self::Port(_) => 15,
            Self::Table(_) => 16,
            Self::Service(_) => 17,
            Self::MapAddress(..) => 18,
            Self::Published(..) => 19,
            Self::Unknown(..) => 20,
            Self::Hook(_) => 21,
            Self::Stray(..) => 22,
        }
    }

    /// Where it stands in the order of deletion. The reverse of creation, but for the programs on
    /// task links: a veth without its program would hand the task's frames to the host's stack,
    /// so link and program go together, when no map names them any more.
    pub(crate) fn delete_rank(&self) -> u8 {
        match self {
            Self::Hook(Hook::FromTask(_) | Hook::TaskLo(_)) => u8::MAX,
            other => 100 - other.rank(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl { ns: Ns::Node, path, .. } => write!(f, "sysctl {path}"),
            Self::Sysctl { ns: Ns::Task(ns), path, .. } => write!(f, "sysctl {path} in {ns}"),
            Self::Vxlan => write!(f, "link {VXLAN_NAME}"),
            Self::Veth(endpoint) => write!(f, "link {}", host_name(*endpoint)),
            Self::Loopback(ns) => write!(f, "link lo in {ns}"),
            Self::Address(endpoint, address) => {
                write!(f, "address {address} of endpoint {endpoint}")
            }
            Self::DefaultRoute(ns) => write!(f, "default route in {ns}"),
            Self::HostRoute(to) => write!(f, "route to {to}"),
            Self::Neighbour(endpoint, to) => {
                write!(f, "neighbour {to} on {}", host_name(*endpoint))
            }
            Self::Nft => write!(f, "nft table {} {}", crate::nft::TABLE.0, crate::nft::TABLE.1),
            Self::Node(node) => write!(f, "NODES[{node}]"),
            Self::Vtep(vtep) => write!(f, "VTEPS[{vtep}]"),
            Self::LocalAddr(address) => write!(f, "LOCAL_ADDRS[{address}]"),
            Self::Config => write!(f, "CONFIG"),
            Self::Endpoint(endpoint) => write!(f, "ENDPOINTS[{endpoint}]"),
            Self::Port(LinkRef::Veth(endpoint)) => write!(f, "PORTS[{}]", host_name(*endpoint)),
            Self::Port(LinkRef::Vxlan) => write!(f, "PORTS[{VXLAN_NAME}]"),
            Self::Port(LinkRef::Index(index)) => write!(f, "PORTS[{index}]"),
            Self::Table(offset) => write!(f, "MAGLEV[{offset}..]"),
            Self::Service(index) => write!(f, "SERVICES[{index}]"),
            Self::MapAddress(vni, address) => write!(f, "ADDRESSES[{vni}, {address}]"),
            Self::Published(protocol, port) => write!(f, "PUBLISHED[{port}/{protocol}]"),
            Self::Unknown(map, key) => write!(f, "{}[{key:02x?}]", map.name()),
            Self::Hook(Hook::FromTask(endpoint)) => {
                write!(f, "program from_task on {}", host_name(*endpoint))
            }
            Self::Hook(Hook::FromUplink) => write!(f, "program from_uplink"),
            Self::Hook(Hook::FromVxlan) => write!(f, "program from_vxlan"),
            Self::Hook(Hook::TaskLo(ns)) => write!(f, "program task_lo in {ns}"),
            Self::Stray(Ns::Node, stray) => write!(f, "stray {stray}"),
            Self::Stray(Ns::Task(ns), stray) => write!(f, "stray {stray} in {ns}"),
        }
    }
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link { name, .. } => write!(f, "link {name}"),
            Self::Address { index, address } => write!(f, "address {address} on link {index}"),
            Self::Route { to: Some(to), metric, .. } => write!(f, "route to {to} metric {metric}"),
            Self::Route { to: None, metric, .. } => write!(f, "default route metric {metric}"),
            Self::Filter { index, .. } => write!(f, "filter on link {index}"),
            Self::Tcx { index, program, .. } => write!(f, "program {program} on link {index}"),
        }
    }
}
