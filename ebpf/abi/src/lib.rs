//! Keys and values of the BPF maps: the contract between the programs in `ebpf/prog` and the loader
//! in `mesh-linux`. Both sides compile this very file.
//!
//! Final are the *keys*: addresses are 16 bytes wide (IPv4 mapped) and scoped by VNI; endpoints and
//! nodes go by their cluster-unique numbers. Values may grow.
//!
//! Byte order: fields named `*_be` are in network order, all others in host order. Every struct is
//! `repr(C)` without implicit padding (asserted below), so that the kernel's byte-wise compare of
//! keys is an equality of values.

#![no_std]
#![forbid(unsafe_code)]

use core::mem::size_of;

/// Bumped when a map's layout changes: pins live under a directory of this name.
pub const SCHEMA: u32 = 1;

/// VXLAN's UDP port (RFC 7348).
pub const VXLAN_PORT: u16 = 4789;
/// The nodes' ports beside the tunnel's, no business of tasks: of managers, and of gossip.
pub const NODE_PORTS: [u16; 2] = [2377, 7946];
/// Where the resolver listens on 127.0.0.11 in every task; the program on the task's `lo` rewrites
/// port 53 to it, so that a task may bind 0.0.0.0:53 itself.
pub const RESOLVER_PORT: u16 = 10_053;
/// Bytes that the clear overlay adds: outer IPv4, UDP, VXLAN, inner Ethernet.
pub const ENCAP_LEN_V4: u32 = 20 + 8 + 8 + 14;

/// An address, IPv4 mapped into IPv6.
pub type Addr = [u8; 16];

/// Key of [`map::ADDRESSES`]: an address on a network.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddrKey {
    /// The network.
    pub vni: u32,
    /// The address.
    pub addr: Addr,
}

/// What an address on a network is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddrValue {
    /// [`ADDR_ENDPOINT`], [`ADDR_VIP`] or [`ADDR_GATEWAY`].
    pub kind: u32,
    /// For a VIP: its index in [`map::SERVICES`].
    pub service: u32,
    /// For an endpoint: its id.
    pub endpoint: u64,
}
/// The address of an endpoint.
pub const ADDR_ENDPOINT: u32 = 1;
/// A service's virtual address.
pub const ADDR_VIP: u32 = 2;
/// The network's gateway.
pub const ADDR_GATEWAY: u32 = 3;

/// Value of [`map::ENDPOINTS`], keyed by endpoint id (u64).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub addr: Addr,
    /// The tunnel's end of its node ([`Node::vtep`] of `node`; this node's own for a local one).
    /// Copied here so that the packet path saves a look-up, on send and in the owner check.
    pub vtep: Addr,
    /// The next hop towards `vtep` ([`Node::next_hop`]; unused for a local endpoint).
    pub next_hop: Addr,
    /// The number of the node that it is on.
    pub node: u64,
    /// Its network; 0 on a node-local `gw0`.
    pub vni: u32,
    /// The host side's link, if it is on this node; else 0.
    pub ifindex: u32,
    /// `EP_*`.
    pub flags: u32,
    /// Must be zero.
    pub pad: u32,
}
/// The endpoint is a `gw0` on the ingress network.
pub const EP_INGRESS: u32 = 1;
/// No new flows (its task drains, or its record is a tombstone).
pub const EP_DRAINING: u32 = 2;
/// Its node cannot be reached through the tunnel: flows that saw no reply are decided anew.
pub const EP_WITHDRAWN: u32 = 4;
/// Its task is about to end here: flows that it has go on to it, new ones are given to others,
/// whoever chose it. Of endpoints on this node alone.
pub const EP_CLOSED: u32 = 8;

/// Value of [`map::PORTS`], keyed by the ifindex (u32) of a task veth's host side: who may send
/// here.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// The only source address that may be used.
    pub addr: Addr,
    /// The endpoint, and so the only source MAC that may be used.
    pub endpoint: u64,
    /// Its network; 0 on a node-local `gw0`.
    pub vni: u32,
    /// The largest IP packet on this network, in bytes.
    pub mtu: u32,
    /// `PORT_*`.
    pub flags: u32,
    /// Must be zero.
    pub pad: u32,
}
/// This is a `gw0`: what is no mesh reply goes on to the host's own routing and masquerade.
pub const PORT_GATEWAY: u32 = 1;
/// This is a `gw0` on the ingress network.
pub const PORT_INGRESS: u32 = 2;

/// Value of [`map::NODES`], keyed by node number (u64).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// The tunnel's end.
    pub vtep: Addr,
    /// The next hop towards it (equal to `vtep` when on-link).
    pub next_hop: Addr,
}

/// Value of [`map::SERVICES`], keyed by index (u32).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    /// Where its table begins in [`map::MAGLEV`].
    pub maglev_offset: u32,
    /// The length of its table; 0: no backend.
    pub maglev_len: u32,
    /// Its virtual address (unused for a published port).
    pub vip: Addr,
    /// The network of its backends.
    pub vni: u32,
    /// Must be zero.
    pub pad: u32,
}

/// Key of [`map::PUBLISHED`]: a port on every node.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublishedKey {
    /// Network order.
    pub port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Must be zero.
    pub pad: u8,
}

/// Value of [`map::PUBLISHED`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Index in [`map::SERVICES`].
    pub service: u32,
    /// The task's port, network order.
    pub target_be: u16,
    /// Must be zero.
    pub pad: u16,
}

/// The node's own settings: the one entry of [`map::CONFIG`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// This node's tunnel end.
    pub vtep: Addr,
    /// This node's number.
    pub node: u64,
    /// The ingress network's VNI; 0: none.
    pub ingress_vni: u32,
    /// The underlay link.
    pub uplink_ifindex: u32,
    /// The VXLAN device.
    pub vxlan_ifindex: u32,
    /// The underlay's MTU, bytes.
    pub uplink_mtu: u32,
    /// VXLAN's port, network order.
    pub vxlan_port_be: u16,
    /// The uplink's MAC.
    pub uplink_mac: [u8; 6],
    /// `CONFIG_*`.
    pub flags: u32,
    /// Must be zero.
    pub pad: u32,
    /// The ranges that `gw0` addresses come from: the node-local one and the ingress network's. A
    /// task's `gw0` reaches no address in them but through a published port.
    pub gateway_subnets: [Subnet; 2],
}

/// A range of addresses. A mask of zeros matches nothing.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Subnet {
    /// The network address, IPv4 mapped.
    pub addr: Addr,
    /// The mask; of an IPv4 range the first 12 bytes are `ff`.
    pub mask: Addr,
}

/// Encapsulate and strip through the VXLAN device instead of directly (the fallback).
pub const CONFIG_VIA_DEVICE: u32 = 1;
/// `bpf_skb_change_type` before `redirect_peer` (kernels before 6.15).
pub const CONFIG_CHANGE_TYPE: u32 = 2;

/// Key of the connection-tracking maps ([`map::FLOWS`], [`map::FLOWS_NEW`]): one direction of a
/// flow, as seen at one kind of place.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// The network; 0: the underlay.
    pub vni: u32,
    /// Network order.
    pub sport_be: u16,
    /// Network order.
    pub dport_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// `FLOW_*`: which hook's view this is.
    pub kind: u8,
    /// Must be zero.
    pub pad: u16,
}
/// Task to VIP, as the task sends it. A hairpin's replies are of this kind too.
pub const FLOW_VIP: u8 = 1;
/// Backend to task: the replies of [`FLOW_VIP`], as they arrive at the client's node.
pub const FLOW_VIP_REPLY: u8 = 2;
/// Client to a published port of a node: at the ingress node, and at the backend's.
pub const FLOW_MESH: u8 = 3;
/// `gw0` to client: the replies of [`FLOW_MESH`], as the backend sends them.
pub const FLOW_MESH_REPLY: u8 = 4;
/// `gw0` of a client task to a published port of its own node.
pub const FLOW_SELF: u8 = 5;
/// Published port of this node to this node: the replies of [`FLOW_SELF`].
pub const FLOW_SELF_REPLY: u8 = 6;

/// Value of the connection-tracking maps: the decision that was taken for the flow, and its state.
///
/// The entries of a flow's two directions (*partners*) carry each other's keys: see
/// `mesh_ebpf_core::flow::partner`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowValue {
    /// What replaces the destination (forward) or the source (reply).
    pub addr: Addr,
    /// Forward: the backend's endpoint. [`FLOW_SELF_REPLY`]: the client's.
    pub endpoint: u64,
    /// [`FLOW_MESH_REPLY`]: the number of the ingress node.
    pub node: u64,
    /// When the last packet passed, to the second: CLOCK_MONOTONIC, nanoseconds.
    pub last_ns: u64,
    /// What replaces the destination port (forward) or the source port (reply); network order.
    pub port_be: u16,
    /// The client's port on the other side of the translation; network order.
    pub client_port_be: u16,
    /// `FLOW_STATE_*`.
    pub state: u16,
    /// Must be zero.
    pub pad: u16,
}
/// A reply was seen (on the reply's entry; on the forward one where it has no partner).
pub const FLOW_STATE_REPLIED: u16 = 1;
/// The client sent FIN.
pub const FLOW_STATE_FIN: u16 = 2;
/// The backend sent FIN.
pub const FLOW_STATE_FIN_REPLY: u16 = 4;
/// Client and backend are one task: both addresses are translated.
pub const FLOW_STATE_HAIRPIN: u16 = 8;
/// The flow has one entry only (the ingress node of a backend elsewhere).
pub const FLOW_STATE_ALONE: u16 = 16;

/// Of a hairpin's two entries, the one of the replies.
pub const FLOW_STATE_HAIRPIN_REPLY: u16 = 32;

/// Entries of [`map::VIP_CLIENTS`].
pub const VIP_CLIENTS_CAPACITY: u32 = 8192;

/// Names of the maps, as in the object and under the pin directory.
pub mod map {
    /// hash: `AddrKey` -> `AddrValue`.
    pub const ADDRESSES: &str = "ADDRESSES";
    /// hash: endpoint id `u64` -> `Endpoint`.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// hash: ifindex `u32` -> `Port`.
    pub const PORTS: &str = "PORTS";
    /// hash: node number `u64` -> `Node`.
    pub const NODES: &str = "NODES";
    /// hash: VTEP `Addr` -> node number `u64`; the tunnel's source check.
    pub const VTEPS: &str = "VTEPS";
    /// hash: index `u32` -> `Service`.
    pub const SERVICES: &str = "SERVICES";
    /// hash: `PublishedKey` -> `Published`.
    pub const PUBLISHED: &str = "PUBLISHED";
    /// array, mmapable: endpoint ids (`u64`), in slices that `SERVICES` names.
    pub const MAGLEV: &str = "MAGLEV";
    /// hash: the node's own addresses `Addr` -> `u32` (1).
    pub const LOCAL_ADDRS: &str = "LOCAL_ADDRS";
    /// array of one `Config`.
    pub const CONFIG: &str = "CONFIG";
    /// per-CPU array: `Counter` -> `u64`.
    pub const COUNTERS: &str = "COUNTERS";
    /// hash: `FlowKey` -> `FlowValue`; established flows. The programs' own; user space collects
    /// what `mesh_ebpf_core::flow::expired` says.
    pub const FLOWS: &str = "FLOWS";
    /// LRU hash: `FlowKey` -> `FlowValue`; half-open and closing flows. The programs' own.
    pub const FLOWS_NEW: &str = "FLOWS_NEW";
    /// array: ifindex of a task's veth, modulo its capacity -> `u64`; not zero once that task
    /// talked to a VIP. The programs' own.
    pub const VIP_CLIENTS: &str = "VIP_CLIENTS";
}

/// Names of the programs in the object.
pub mod prog {
    /// Ingress of a task veth's host side: what tasks send.
    pub const FROM_TASK: &str = "from_task";
    /// Ingress of the underlay link: tunnels and the routing mesh.
    pub const FROM_UPLINK: &str = "from_uplink";
    /// Ingress of the VXLAN device: fallback and mesh returns.
    pub const FROM_VXLAN: &str = "from_vxlan";
    /// Egress of a task's `lo`: port 53 to the resolver and back.
    pub const TASK_LO: &str = "task_lo";
}

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $value:literal, $name:literal;)*) => {
        /// What the programs count, by index in [`map::COUNTERS`]. From [`Counter::FIRST_DROP`] on
        /// they are reasons for which a packet was dropped.
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Counter { $($(#[$doc])* $variant = $value,)* }

        impl Counter {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The label in metrics and `meshctl node stats`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

counters! {
    /// Packets from tasks to endpoints on this node.
    ToLocal = 0, "to_local";
    /// Packets from tasks into the tunnel.
    ToTunnel = 1, "to_tunnel";
    /// Packets from the tunnel to endpoints here.
    FromTunnel = 2, "from_tunnel";
    /// Packets of published ports that came in here.
    MeshIn = 3, "mesh_in";
    /// Replies of published ports that left here.
    MeshOut = 4, "mesh_out";
    /// Packets of tasks handed to the host's routing.
    ToHost = 5, "to_host";
    /// ARP requests answered in place.
    ArpAnswered = 6, "arp_answered";
    /// ICMP echo requests to VIPs answered in place.
    EchoAnswered = 7, "echo_answered";
    /// New flows balanced.
    FlowNew = 8, "flow_new";
    /// ICMP "fragmentation needed" sent.
    TooBigSent = 9, "too_big_sent";
    /// Packets of flows that found the table of established ones full: they go on among the
    /// half-open ones, where others may push them out.
    FlowTableFull = 10, "flow_table_full";
    /// ICMP errors translated and passed on.
    IcmpRelayed = 11, "icmp_relayed";
    /// Probes of other nodes answered in place.
    ProbeReflected = 12, "probe_reflected";
    /// Packets of published ports whose backend is gone from here, given to another.
    MeshRebalanced = 13, "mesh_rebalanced";
    /// Not understood: too short, bad header.
    DropMalformed = 32, "malformed";
    /// Source MAC is not the endpoint's.
    DropSourceMac = 33, "source_mac";
    /// Source address is not the endpoint's.
    DropSourceAddr = 34, "source_address";
    /// Neither IPv4, IPv6 nor ARP.
    DropEtherType = 35, "ethertype";
    /// Broadcast or multicast, which this network does not carry.
    DropMulticast = 36, "multicast";
    /// No such endpoint on this network.
    DropNoEndpoint = 37, "no_endpoint";
    /// The endpoint's node is not known.
    DropNoNode = 38, "no_node";
    /// A service without a live backend.
    DropNoBackend = 39, "no_backend";
    /// The tunnel's outer source is no node of the cluster.
    DropTunnelSource = 40, "tunnel_source";
    /// The tunnel's outer source does not own the inner source.
    DropTunnelOwner = 41, "tunnel_owner";
    /// The VXLAN header is not one of ours, or names another network than the endpoint's.
    DropTunnelVni = 42, "tunnel_vni";
    /// Larger than the path, with DF unset (with DF the sender gets an ICMP error).
    DropTooBig = 43, "too_big";
    /// An IP fragment.
    DropFragment = 44, "fragment";
    /// Connection tracking could not take a new flow.
    DropFlowTable = 45, "flow_insert";
    /// A protocol that cannot be balanced.
    DropProtocol = 46, "protocol";
    /// A mesh frame for a port or endpoint that is not published here.
    DropMesh = 47, "mesh_unpublished";
    /// A kernel helper failed (out of memory, neighbour missing).
    DropHelper = 48, "helper_failed";
    /// ICMP time to live exceeded.
    DropTtl = 49, "ttl";
    /// From a task's `gw0` to another task's `gw0`: not a path.
    DropGatewayPeer = 50, "gateway_peer";
    /// IPv6, which is not carried yet.
    DropIpv6 = 51, "ipv6";
    /// An ARP request for an address that nobody has here, or an ARP reply that nobody asked for.
    DropArp = 52, "arp";
    /// A probe that is none of ours: bad format, or for or from another node than it says.
    DropProbe = 53, "probe";
    /// A task's packet to a node's own ports: the tunnel's, where it would pass for the node's.
    DropNodePort = 54, "node_port";
}

impl Counter {
    /// The first index that is a drop.
    pub const FIRST_DROP: u32 = 32;
    /// Entries of the map.
    pub const CAPACITY: u32 = 64;

    /// Whether it counts drops.
    #[must_use]
    pub const fn is_drop(self) -> bool {
        self as u32 >= Self::FIRST_DROP
    }
}

const _: () = {
    assert!(size_of::<AddrKey>() == 20);
    assert!(size_of::<AddrValue>() == 16);
    assert!(size_of::<Endpoint>() == 72);
    assert!(size_of::<Port>() == 40);
    assert!(size_of::<Node>() == 32);
    assert!(size_of::<Service>() == 32);
    assert!(size_of::<PublishedKey>() == 4);
    assert!(size_of::<Published>() == 8);
    assert!(size_of::<Config>() == 120);
    assert!(size_of::<FlowKey>() == 44);
    assert!(size_of::<FlowValue>() == 48);
};
