//! The routing mesh: published ports, late DNAT, and the way back.
//!
//! Forwarding between nodes leaves the time to live alone: to its client a published port is at the
//! node that it called, and neither direction can loop (`06` frames are delivered, dropped, or go
//! on once; `0a` frames leave the overlay).

use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{
    Config, Counter, EP_CLOSED, EP_INGRESS, EP_WITHDRAWN, Endpoint, FLOW_MESH, FLOW_MESH_REPLY,
    FLOW_SELF, FLOW_SELF_REPLY, FLOW_STATE_ALONE, FlowKey, FlowValue, NODE_PORTS, PORT_INGRESS,
    Port, Published, PublishedKey,
};
use mesh_ebpf_core::{
    addr, flow, guard, hash,
    hash::Tuple,
    icmp,
    mac::{self, Mac},
    wire::{PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, TCP_FIN, TCP_RST, TCP_SYN},
};

use crate::{
    flows,
    maps::{ENDPOINTS, LOCAL_ADDRS, NODES, PUBLISHED, VTEPS, count, get},
    packet::{self, ENCAP, Ip, PASS, TUNNEL, Verdict, Way, oversize, to_peer, to_route},
    quote,
    translate::{self, End},
    tunnel::Frame,
    vip::pick,
};

/// Where a flow goes.
pub struct Target {
    /// The backend; 0: none.
    endpoint: u64,
    /// Its port.
    port_be: u16,
    /// What stands for the client's port.
    client_port_be: u16,
    /// Why there is no backend.
    error: Counter,
}

/// What a new flow is judged by.
struct Arrival {
    published: Published,
    hash: u32,
    now: u64,
    /// The ingress node.
    node: u64,
    /// The backend that the ingress node chose; 0: we are the ingress node, and choose.
    endpoint: u64,
}

/// Whether this port of this node is published.
#[inline(always)]
pub fn published(protocol: u8, port_be: u16, node: u32) -> Option<&'static Published> {
    if !matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP) {
        return None;
    }
    let found = get!(PUBLISHED, &PublishedKey { port_be, protocol, pad: 0 })?;
    get!(LOCAL_ADDRS, &addr::wide(node))?;
    Some(found)
}

/// From a client to a published port of this node.
#[inline(always)]
pub fn ingress(
    ctx: &TcContext,
    config: &Config,
    ip: &mut Ip,
    way: &mut Way,
    published: &Published,
) -> Verdict {
    count(Counter::MeshIn);
    let (asked, key) = Asked::of(ip);
    let mut target = follow::<false>(&asked, key, 0);
    if target.endpoint == 0 {
        admit(key, &asked.arrival(published, config.node, 0), &mut target);
        if target.endpoint == 0 {
            return Err(target.error);
        }
    }
    let endpoint = get!(ENDPOINTS, &target.endpoint).ok_or(Counter::DropNoBackend)?;
    if endpoint.ifindex != 0 {
        return deliver(ctx, config, ip, &target, endpoint);
    }
    if let Some(verdict) = oversize(ctx, ip, config.uplink_mtu.saturating_sub(ENCAP as u32)) {
        return verdict;
    }
    let dst = Mac::new(mac::MESH_FORWARD, target.endpoint);
    let src = Mac::new(mac::MESH_RETURN, config.node);
    way.lead(config.ingress_vni, dst, src, endpoint, ip)
}

/// What a packet to a published port says of its flow, beside the key.
struct Asked {
    now: u64,
    /// TCP's flags.
    flags: u8,
    hash: u32,
    port: PublishedKey,
}

impl Asked {
    #[inline(always)]
    fn of(ip: &mut Ip) -> (Self, &FlowKey) {
        let Tuple { dport_be: port_be, protocol, .. } = ip.tuple;
        let port = PublishedKey { port_be, protocol, pad: 0 };
        let (now, hash) = (flows::now(), hash::flow(&ip.tuple));
        (Self { now, flags: ip.tcp_flags, hash, port }, ip.key(FLOW_MESH, 0))
    }

    #[inline(always)]
    fn arrival(&self, published: &Published, node: u64, endpoint: u64) -> Arrival {
        Arrival { published: *published, hash: self.hash, now: self.now, node, endpoint }
    }
}

/// The backend that the tables name for a flow, if that holds: it is known, not `gone`, and where
/// it is withdrawn it has answered. With `RELAYED`, replies of flows to other nodes pass elsewhere.
#[inline(always)]
fn follow<const RELAYED: bool>(asked: &Asked, key: &FlowKey, gone: u64) -> Target {
    let Some(entry) = flows::find(key, asked.now) else { return Target::NONE };
    let value = entry.value();
    let target = Target::of(value);
    let alone = RELAYED && value.state & FLOW_STATE_ALONE != 0;
    let backend = get!(ENDPOINTS, &target.endpoint).map_or(u32::MAX, |found| found.flags);
    if backend == u32::MAX || (RELAYED && target.endpoint == gone) {
        entry.forget(key);
        return Target::NONE;
    }
    let holds = if alone {
        entry.relay(asked.flags, asked.now)
    } else {
        entry.advance(key, false, asked.flags, asked.now)
    };
    if !holds {
        return Target::NONE;
    }
    if backend & EP_WITHDRAWN != 0 && entry.is_half_open(key) {
        entry.forget(key);
        return Target::NONE;
    }
    target
}

impl Target {
    const NONE: Self =
        Self { endpoint: 0, port_be: 0, client_port_be: 0, error: Counter::DropNoBackend };

    #[inline(always)]
    fn of(value: &FlowValue) -> Self {
        Self {
            endpoint: value.endpoint,
            port_be: value.port_be,
            client_port_be: value.client_port_be,
            error: Counter::DropNoBackend,
        }
    }
}

/// Decides a new flow, and enters it.
#[inline(never)]
fn admit(key: &FlowKey, arrival: &Arrival, target: &mut Target) {
    target.endpoint = 0;
    let id = if arrival.endpoint != 0 {
        arrival.endpoint
    } else {
        match pick(arrival.published.service, arrival.hash) {
            Some(id) => id,
            None => return,
        }
    };
    let Some(endpoint) = get!(ENDPOINTS, &id) else { return };
    let created = flows::create::<FLOW_MESH>(key, true, arrival.hash, |value| {
        *value = FlowValue {
            addr: addr::copy(&endpoint.addr),
            endpoint: id,
            node: arrival.node,
            last_ns: arrival.now,
            port_be: arrival.published.target_be,
            client_port_be: key.sport_be,
            state: if endpoint.ifindex == 0 { FLOW_STATE_ALONE } else { 0 },
            pad: 0,
        };
    });
    match created {
        Ok(value) => *target = Target::of(value),
        Err(error) => target.error = error,
    }
}

/// Late DNAT, and on to the task.
#[inline(always)]
fn deliver(
    ctx: &TcContext,
    config: &Config,
    ip: &mut Ip,
    target: &Target,
    endpoint: &Endpoint,
) -> Verdict {
    translate::end(ctx, ip, End::Destination, addr::low(&endpoint.addr), target.port_be)?;
    translate::port(ctx, ip, End::Source, target.client_port_be)?;
    translate::ethernet(ctx, Mac::new(mac::ENDPOINT, target.endpoint), Mac::GATEWAY)?;
    to_peer(ctx, config, endpoint.ifindex)
}

/// From an ingress node to a backend here: a frame of kind `06`.
#[inline(always)]
pub fn forwarded<const DIRECT: bool>(
    ctx: &TcContext,
    config: &Config,
    frame: &Frame,
    ip: &mut Ip,
    way: &mut Way,
    dst: Mac,
) -> Verdict {
    let sender = *get!(VTEPS, &addr::wide(frame.vtep)).ok_or(Counter::DropTunnelSource)?;
    let src = Mac::from_words(frame.eth.src);
    // The ingress node. Another one sends where it gave the packet to another backend.
    let node = src.id();
    let first = node == sender;
    if src.kind() != mac::MESH_RETURN || (!first && get!(NODES, &node).is_none()) {
        return Err(Counter::DropTunnelOwner);
    }
    if frame.vni != config.ingress_vni || frame.vni == 0 {
        return Err(Counter::DropTunnelVni);
    }
    let id = dst.id();
    let here = get!(ENDPOINTS, &id)
        .filter(|endpoint| endpoint.ifindex != 0 && endpoint.flags & EP_INGRESS != 0);
    let endpoint = match here {
        Some(endpoint) if endpoint.flags & EP_CLOSED == 0 || !first || keeps(ip, id) => endpoint,
        // Given to another one once, by the node that the ingress node chose.
        _ if !first => return Err(Counter::DropMesh),
        // By the VXLAN device, which clears the tunnel's marks: with them the kernel encapsulates
        // nothing again. These packets are few.
        _ if DIRECT => return Ok(PASS),
        here => match relay(ctx, config, ip, way, src, id) {
            Some(verdict) => return verdict,
            // Nobody else is there: it may serve yet.
            None => here.ok_or(Counter::DropMesh)?,
        },
    };
    if !ip.has_l4 {
        return Err(Counter::DropProtocol);
    }
    match ip.tuple.protocol {
        PROTOCOL_TCP | PROTOCOL_UDP => {}
        PROTOCOL_ICMP if icmp::is_error(ip.icmp[0]) => {
            if DIRECT {
                packet::strip(ctx, frame.eth)?;
            }
            return error_in(ctx, config);
        }
        _ => return Err(Counter::DropProtocol),
    }
    let (asked, key) = Asked::of(ip);
    let mut target = Target::NONE;
    if let Some(entry) = flows::find(key, asked.now) {
        target = Target::of(entry.value());
        if target.endpoint != id {
            // The ingress node chose anew: its word counts.
            entry.forget(key);
            target.endpoint = 0;
        } else if !entry.advance(key, false, asked.flags, asked.now) {
            target.endpoint = 0;
        }
    }
    if target.endpoint == 0 {
        let published = get!(PUBLISHED, &asked.port).ok_or(Counter::DropMesh)?;
        admit(key, &asked.arrival(published, node, id), &mut target);
        if target.endpoint == 0 {
            return Err(target.error);
        }
    }
    if DIRECT {
        packet::strip(ctx, frame.eth)?;
        crate::tunnel::mark_congestion(ctx, frame.tos)?;
    }
    count(Counter::FromTunnel);
    deliver(ctx, config, ip, &target, endpoint)
}

/// Whether a closed backend goes on with a packet: one of a flow that it has, or an error, which is
/// about such a flow.
#[inline(always)]
fn keeps(ip: &mut Ip, id: u64) -> bool {
    if !ip.has_l4 || !matches!(ip.tuple.protocol, PROTOCOL_TCP | PROTOCOL_UDP) {
        return true;
    }
    let flags = ip.tcp_flags;
    flows::find(ip.key(FLOW_MESH, 0), flows::now()).is_some_and(|entry| {
        let value = entry.value();
        value.endpoint == id && !flow::restarts(value.state, flags)
    })
}

/// Gives a packet whose backend is gone, or takes no new flows, to another one: by this node's
/// table, and by its memory from then on, since the table may change while the flow lives. `None`:
/// there is no other.
#[inline(always)]
fn relay(
    ctx: &TcContext,
    config: &Config,
    ip: &mut Ip,
    way: &mut Way,
    ingress: Mac,
    gone: u64,
) -> Option<Verdict> {
    if !ip.has_l4 || !matches!(ip.tuple.protocol, PROTOCOL_TCP | PROTOCOL_UDP) {
        return None;
    }
    let (asked, key) = Asked::of(ip);
    let mut target = follow::<true>(&asked, key, gone);
    if target.endpoint == 0 {
        let published = get!(PUBLISHED, &asked.port)?;
        admit(key, &asked.arrival(published, ingress.id(), 0), &mut target);
    }
    let endpoint = get!(ENDPOINTS, &target.endpoint)?;
    count(Counter::MeshRebalanced);
    if endpoint.ifindex != 0 {
        return Some(deliver(ctx, config, ip, &target, endpoint));
    }
    let dst = Mac::new(mac::MESH_FORWARD, target.endpoint);
    Some(way.lead(config.ingress_vni, dst, ingress, endpoint, ip))
}

/// What a task sends through its `gw0`: replies of published ports, calls to them, and what goes to
/// the world outside.
#[inline(always)]
pub fn from_gateway(
    ctx: &TcContext,
    config: &Config,
    port: &Port,
    ip: &mut Ip,
    way: &mut Way,
) -> Verdict {
    let with_ports = ip.has_l4 && matches!(ip.tuple.protocol, PROTOCOL_TCP | PROTOCOL_UDP);
    if with_ports {
        if port.flags & PORT_INGRESS != 0 {
            let now = flows::now();
            let flags = ip.tcp_flags;
            let key = ip.key(FLOW_MESH_REPLY, 0);
            if let Some(entry) = flows::find(key, now) {
                let value = entry.value();
                let reply = Reply {
                    addr: addr::low(&value.addr),
                    port_be: value.port_be,
                    client_port_be: value.client_port_be,
                    node: value.node,
                };
                entry.advance(key, true, flags, now);
                return reply_out(ctx, config, port, ip, way, &reply);
            }
        }
        if let Some(found) = published(ip.tuple.protocol, ip.tuple.dport_be, ip.tuple.dst) {
            // The task calls its own node.
            let mut client_port_be = 0;
            call_self(&ip.tuple, ip.tcp_flags.into(), port.endpoint, &mut client_port_be);
            if client_port_be == 0 {
                return Err(Counter::DropFlowTable);
            }
            let node = ip.tuple.dst;
            translate::end(ctx, ip, End::Source, node, client_port_be)?;
            return ingress(ctx, config, ip, way, found);
        }
    } else if port.flags & PORT_INGRESS != 0
        && ip.has_l4
        && icmp::is_error(ip.icmp[0])
        && ip.tuple.protocol == PROTOCOL_ICMP
    {
        let mut node = u64::MAX;
        error_out(ctx, &mut node);
        if node != u64::MAX {
            ip.tuple = packet::parse(ctx, packet::L3)?.tuple;
            return send_out(ctx, config, port, ip, way, node);
        }
    }
    if guard::is_gateway_peer(config, ip.tuple.dst) {
        return Err(Counter::DropGatewayPeer);
    }
    if is_node_port(config, ip) {
        return Err(Counter::DropNodePort);
    }
    count(Counter::ToHost);
    if !packet::is_to_host(ctx) {
        ctx.change_type(0).map_err(|_| Counter::DropHelper)?;
    }
    Ok(PASS)
}

/// Whether a packet is for a port that nodes keep for each other. Masqueraded as this node it would
/// pass for the node's own: a task could forge any frame of its neighbours.
#[inline(always)]
fn is_node_port(config: &Config, ip: &Ip) -> bool {
    let port = ip.tuple.dport_be;
    let suspect = match ip.tuple.protocol {
        // With options the ports are not where we look; no honest packet to a node has any.
        PROTOCOL_TCP | PROTOCOL_UDP if !ip.has_l4 => true,
        PROTOCOL_UDP if port == config.vxlan_port_be => true,
        PROTOCOL_TCP | PROTOCOL_UDP => NODE_PORTS.iter().any(|of| of.to_be() == port),
        _ => false,
    };
    let node = addr::wide(ip.tuple.dst);
    suspect && (get!(VTEPS, &node).is_some() || get!(LOCAL_ADDRS, &node).is_some())
}

struct Reply {
    addr: u32,
    port_be: u16,
    client_port_be: u16,
    node: u64,
}

/// A backend's reply: from the published port again, and to the client by the ingress node.
#[inline(always)]
fn reply_out(
    ctx: &TcContext,
    config: &Config,
    port: &Port,
    ip: &mut Ip,
    way: &mut Way,
    reply: &Reply,
) -> Verdict {
    if reply.node != config.node
        && let Some(verdict) = oversize(ctx, ip, port.mtu)
    {
        return verdict;
    }
    translate::end(ctx, ip, End::Source, reply.addr, reply.port_be)?;
    translate::port(ctx, ip, End::Destination, reply.client_port_be)?;
    send_out(ctx, config, port, ip, way, reply.node)
}

/// To the client by an ingress node.
#[inline(always)]
fn send_out(
    ctx: &TcContext,
    config: &Config,
    port: &Port,
    ip: &mut Ip,
    way: &mut Way,
    node: u64,
) -> Verdict {
    if node == config.node {
        return leave(ctx, config, ip);
    }
    let ingress = get!(NODES, &node).ok_or(Counter::DropNoNode)?;
    let dst = Mac::new(mac::MESH_RETURN, node);
    let src = Mac::new(mac::MESH_FORWARD, port.endpoint);
    let (vtep, next_hop) = (addr::low(&ingress.vtep), addr::low(&ingress.next_hop));
    count(Counter::ToTunnel);
    let (vni, hash) = (config.ingress_vni, hash::flow(&ip.tuple));
    *way = Way { vni, dst, src, vtep, next_hop, hash, tos: ip.tos };
    Ok(TUNNEL)
}

/// A reply leaves the cluster here, or is for a task here that called its own node.
#[inline(always)]
fn leave(ctx: &TcContext, config: &Config, ip: &mut Ip) -> Verdict {
    count(Counter::MeshOut);
    if ip.tuple.src != ip.tuple.dst {
        return to_route(config);
    }
    let now = flows::now();
    let flags = ip.tcp_flags;
    let key = ip.key(FLOW_SELF_REPLY, 0);
    let entry = flows::find(key, now).ok_or(Counter::DropMesh)?;
    let value = entry.value();
    let (client, port_be, id) = (addr::low(&value.addr), value.client_port_be, value.endpoint);
    entry.advance(key, true, flags, now);
    let endpoint = get!(ENDPOINTS, &id).ok_or(Counter::DropNoEndpoint)?;
    if endpoint.ifindex == 0 {
        return Err(Counter::DropNoEndpoint);
    }
    translate::end(ctx, ip, End::Destination, client, port_be)?;
    translate::ethernet(ctx, Mac::new(mac::ENDPOINT, id), Mac::GATEWAY)?;
    to_peer(ctx, config, endpoint.ifindex)
}

/// A task calls a published port of its own node: the node's address and a free port stand for the
/// task's, so that the backend's answers come back here, even if the backend is the task itself.
#[inline(never)]
fn call_self(tuple: &Tuple, flags: u32, endpoint: u64, client_port_be: &mut u16) {
    let now = flows::now();
    let key = flow::key(FLOW_SELF, 0, tuple);
    if let Some(entry) = flows::find(&key, now) {
        *client_port_be = entry.value().client_port_be;
        if entry.advance(&key, false, flags as u8, now) {
            return;
        }
    }
    let created = flows::create::<FLOW_SELF>(&key, true, hash::flow(tuple), |value| {
        *value = FlowValue {
            addr: addr::copy(&key.dst),
            endpoint,
            node: 0,
            last_ns: now,
            port_be: key.dport_be,
            client_port_be: key.sport_be,
            state: 0,
            pad: 0,
        };
    });
    *client_port_be = created.map_or(0, |value| value.client_port_be);
}

/// From a backend's node to this ingress node: a frame of kind `0a`. What is still to be segmented
/// comes through the VXLAN device (its receive path clears the tunnel's marks on the packet, as
/// forwarding needs); so do ICMP errors, which are few.
#[inline(always)]
pub fn returned<const DIRECT: bool>(
    ctx: &TcContext,
    config: &Config,
    frame: &Frame,
    ip: &mut Ip,
    dst: Mac,
) -> Verdict {
    let node = *get!(VTEPS, &addr::wide(frame.vtep)).ok_or(Counter::DropTunnelSource)?;
    if frame.vni != config.ingress_vni || frame.vni == 0 || dst.id() != config.node {
        return Err(Counter::DropTunnelVni);
    }
    let src = Mac::from_words(frame.eth.src);
    if src.kind() != mac::MESH_FORWARD {
        return Err(Counter::DropTunnelOwner);
    }
    // Who is not known may be newer than our records: they stand still while no manager is there.
    // A node of the cluster vouches for it, and it speaks of published ports alone.
    if let Some(source) = get!(ENDPOINTS, &src.id())
        && (source.flags & EP_INGRESS == 0 || source.node != node)
    {
        return Err(Counter::DropTunnelOwner);
    }
    if !ip.has_l4 {
        return Err(Counter::DropProtocol);
    }
    match ip.tuple.protocol {
        PROTOCOL_ICMP if icmp::is_error(ip.icmp[0]) => {
            if DIRECT {
                return Ok(PASS);
            }
            let quoted = quote::read(ctx).ok_or(Counter::DropMesh)?;
            published(quoted.protocol, quoted.dport_be, ip.tuple.src).ok_or(Counter::DropMesh)?;
            count(Counter::IcmpRelayed);
            return leave(ctx, config, ip);
        }
        PROTOCOL_TCP | PROTOCOL_UDP => {}
        _ => return Err(Counter::DropProtocol),
    }
    published(ip.tuple.protocol, ip.tuple.sport_be, ip.tuple.src).ok_or(Counter::DropMesh)?;
    // Of TCP only what changes the flow's state is worth a look-up.
    let handshake = ip.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST) != 0;
    if handshake || ip.tuple.protocol == PROTOCOL_UDP {
        let now = flows::now();
        let flags = ip.tcp_flags;
        let key = ip.reversed_key(FLOW_MESH, 0);
        if let Some(entry) = flows::find(key, now) {
            entry.advance(key, true, flags, now);
        }
    }
    if DIRECT {
        packet::strip(ctx, frame.eth)?;
        crate::tunnel::mark_congestion(ctx, frame.tos)?;
    }
    leave(ctx, config, ip)
}

/// An ICMP error from outside about a reply of a published port. `None`: it is none.
#[inline(always)]
pub fn error_from_client(
    ctx: &TcContext,
    config: &Config,
    ip: &Ip,
    way: &mut Way,
) -> Option<Verdict> {
    let quoted = quote::read(ctx)?;
    published(quoted.protocol, quoted.sport_be, quoted.src)?;
    if quoted.src != ip.tuple.dst {
        return None;
    }
    let key = flow::key(FLOW_MESH, 0, &icmp::reversed(&quoted));
    let id = flows::find(&key, flows::now())?.value().endpoint;
    let endpoint = get!(ENDPOINTS, &id)?;
    if endpoint.ifindex != 0 {
        return Some(error_in(ctx, config));
    }
    let dst = Mac::new(mac::MESH_FORWARD, id);
    let src = Mac::new(mac::MESH_RETURN, config.node);
    Some(way.lead(config.ingress_vni, dst, src, endpoint, ip))
}

/// An ICMP error about a reply, to the task that sent the reply.
#[inline(always)]
fn error_in(ctx: &TcContext, config: &Config) -> Verdict {
    let mut id = 0;
    translate_in(ctx, &mut id);
    let endpoint = get!(ENDPOINTS, &id).ok_or(Counter::DropMesh)?;
    if endpoint.ifindex == 0 {
        return Err(Counter::DropMesh);
    }
    translate::ethernet(ctx, Mac::new(mac::ENDPOINT, id), Mac::GATEWAY)?;
    count(Counter::IcmpRelayed);
    to_peer(ctx, config, endpoint.ifindex)
}

#[inline(never)]
fn translate_in(ctx: &TcContext, id: &mut u64) {
    let Some(quoted) = quote::read(ctx) else { return };
    let key = flow::key(FLOW_MESH, 0, &icmp::reversed(&quoted));
    let Some(entry) = flows::find(&key, flows::now()) else { return };
    let value = entry.value();
    let task = addr::low(&value.addr);
    let change = quote::Change {
        outer: End::Destination,
        outer_addr: task,
        quoted: End::Source,
        quoted_addr: task,
        quoted_port_be: value.port_be,
        client_port_be: value.client_port_be,
    };
    if quote::rewrite(ctx, &change).is_some() {
        *id = value.endpoint;
    }
}

/// An ICMP error of a task about a client's packet; `node` becomes the ingress node.
#[inline(never)]
fn error_out(ctx: &TcContext, node: &mut u64) {
    let Some(quoted) = quote::read(ctx) else { return };
    let key = flow::key(FLOW_MESH_REPLY, 0, &icmp::reversed(&quoted));
    let Some(entry) = flows::find(&key, flows::now()) else { return };
    let value = entry.value();
    let public = addr::low(&value.addr);
    let change = quote::Change {
        outer: End::Source,
        outer_addr: public,
        quoted: End::Destination,
        quoted_addr: public,
        quoted_port_be: value.port_be,
        client_port_be: value.client_port_be,
    };
    if quote::rewrite(ctx, &change).is_some() {
        count(Counter::IcmpRelayed);
        *node = value.node;
    }
}
