//! `from_uplink` and `from_vxlan`: what tunnels bring.

use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{CONFIG_VIA_DEVICE, Config, Counter, Endpoint};
use mesh_ebpf_core::{
    addr, guard, icmp,
    mac::{self, Mac},
    probe, tunnel,
    wire::{EthHeader, Ipv4Header, PROTOCOL_ICMP, PROTOCOL_UDP},
};

use crate::{
    maps::{ENDPOINTS, LOCAL_ADDRS, VTEPS, config, count, get},
    mesh,
    packet::{
        ENCAP, Ip, L3, Outer, PASS, Verdict, Way, header, is_ipv4, is_to_host, parse, parse_len,
        pull, read, segment, strip, to_peer, tunnel_source, vlan, write,
    },
    vip,
};

/// A frame that a tunnel brought.
pub struct Frame {
    pub eth: EthHeader,
    pub vni: u32,
    /// The outer source.
    pub vtep: u32,
    /// The outer header's DSCP and ECN; 0 where the device took care of them.
    pub tos: u8,
}

#[inline(always)]
pub fn from_uplink(ctx: &TcContext, way: &mut Way) -> Verdict {
    // Nothing here is for us unless it is IPv4 that was sent to this host.
    let config = config()?;
    // What has a tag is for another link than this one; 0 is a priority alone (IEEE 802.1Q).
    if !is_to_host(ctx) || vlan(ctx).is_some_and(|id| id != 0) {
        return Ok(PASS);
    }
    if header::<[u8; 42]>(ctx, 0).is_none() {
        pull(ctx, parse_len(L3 + ENCAP));
    }
    let Some(eth) = read::<EthHeader>(ctx, 0) else { return Ok(PASS) };
    if !is_ipv4(&eth) {
        return Ok(PASS);
    }
    let Some(outer) = read::<Outer>(ctx, L3) else { return Ok(PASS) };
    let ours = outer.ip.protocol == PROTOCOL_UDP
        && outer.udp.dport_be == config.vxlan_port_be
        && !outer.ip.has_options()
        && !outer.ip.is_fragment()
        && guard::is_vtep(config, outer.ip.dst);
    if ours {
        pull(ctx, parse_len(L3 + ENCAP));
        let vxlan = read(ctx, L3 + size_of::<Outer>()).ok_or(Counter::DropMalformed)?;
        let eth: EthHeader = read(ctx, ENCAP).ok_or(Counter::DropMalformed)?;
        if eth.ethertype_be == probe::ETHERTYPE.to_be() {
            return crate::probe::reflect(ctx, config);
        }
        if config.flags & CONFIG_VIA_DEVICE != 0 {
            return Ok(PASS);
        }
        let vni = tunnel::vni(&vxlan).ok_or(Counter::DropTunnelVni)?;
        let frame = Frame { eth, vni, vtep: outer.ip.src, tos: outer.ip.tos };
        return receive::<true>(ctx, config, &frame, way);
    }
    mesh_ingress(ctx, config, &outer, way)
}

/// What is no tunnel packet: published ports, else the host's own.
#[inline(always)]
fn mesh_ingress(ctx: &TcContext, config: &Config, outer: &Outer, way: &mut Way) -> Verdict {
    if outer.ip.protocol == PROTOCOL_ICMP {
        let Ok(ip) = parse(ctx, L3) else { return Ok(PASS) };
        if ip.has_l4 && icmp::is_error(ip.icmp[0]) {
            return mesh::error_from_client(ctx, config, &ip, way).unwrap_or(Ok(PASS));
        }
        return Ok(PASS);
    }
    // Later fragments have no ports to look at: the stack drops them, as it never gets the first.
    let later = outer.ip.frag_be & 0x1fff_u16.to_be() != 0;
    let options = outer.ip.has_options();
    let tunnel = outer.ip.protocol == PROTOCOL_UDP
        && (options || (!later && outer.udp.dport_be == config.vxlan_port_be));
    if tunnel && is_odd_tunnel(outer.ip.src, outer.ip.dst, u32::from(options)) != 0 {
        return Err(Counter::DropMalformed);
    }
    if options || later {
        return Ok(PASS);
    }
    let Some(published) = mesh::published(outer.ip.protocol, outer.udp.dport_be, outer.ip.dst)
    else {
        return Ok(PASS);
    };
    pull(ctx, parse_len(L3));
    let mut ip = parse(ctx, L3)?;
    mesh::ingress(ctx, config, &mut ip, way, published)
}

/// Whether what may be a tunnel's packet has a form that no node sends: to another of our addresses
/// than the tunnel's end, in fragments, or with options, behind which its port is not looked for.
/// The stack would hand it to the VXLAN device.
#[inline(never)]
fn is_odd_tunnel(src: u32, dst: u32, options: u32) -> u32 {
    let from_node = options == 0 || get!(VTEPS, &addr::wide(src)).is_some();
    u32::from(from_node && get!(LOCAL_ADDRS, &addr::wide(dst)).is_some())
}

#[inline(always)]
pub fn from_vxlan(ctx: &TcContext, way: &mut Way) -> Verdict {
    let config = config()?;
    let (vtep, vni) = tunnel_source(ctx)?;
    if vlan(ctx).is_some() {
        return Err(Counter::DropEtherType);
    }
    pull(ctx, parse_len(L3));
    let eth: EthHeader = read(ctx, 0).ok_or(Counter::DropMalformed)?;
    receive::<false>(ctx, config, &Frame { eth, vni, vtep, tos: 0 }, way)
}

/// A frame with its outer headers still on (`DIRECT`), or without.
#[inline(always)]
fn receive<const DIRECT: bool>(
    ctx: &TcContext,
    config: &Config,
    frame: &Frame,
    way: &mut Way,
) -> Verdict {
    if !is_ipv4(&frame.eth) {
        return Err(unknown(frame, Counter::DropEtherType));
    }
    let dst = Mac::from_words(frame.eth.dst);
    if DIRECT && dst.kind() == mac::MESH_RETURN && segment(ctx) != 0 {
        // For the VXLAN device, and `from_vxlan` there: stripping leaves the tunnel's mark on what
        // is still to be segmented, and this packet is forwarded again.
        return Ok(PASS);
    }
    let mut ip = parse(ctx, if DIRECT { L3 + ENCAP } else { L3 })?;
    match dst.kind() {
        mac::ENDPOINT => unicast::<DIRECT>(ctx, config, frame, &mut ip, dst),
        mac::MESH_FORWARD => mesh::forwarded::<DIRECT>(ctx, config, frame, &mut ip, way, dst),
        mac::MESH_RETURN => mesh::returned::<DIRECT>(ctx, config, frame, &mut ip, dst),
        _ => Err(unknown(frame, Counter::DropNoEndpoint)),
    }
}

/// From an endpoint elsewhere to one here.
#[inline(always)]
fn unicast<const DIRECT: bool>(
    ctx: &TcContext,
    config: &Config,
    frame: &Frame,
    ip: &mut Ip,
    dst: Mac,
) -> Verdict {
    let endpoint = allowed(frame, ip, dst).map_err(|reason| unknown(frame, reason))?;
    if DIRECT {
        strip(ctx, frame.eth)?;
        mark_congestion(ctx, frame.tos)?;
    }
    count(Counter::FromTunnel);
    vip::to_client(ctx, endpoint.ifindex, frame.vni, ip)?;
    to_peer(ctx, config, endpoint.ifindex)
}

/// The endpoint here that the packet is for, if its sender may send to it.
#[inline(always)]
fn allowed(frame: &Frame, ip: &Ip, dst: Mac) -> Result<&'static Endpoint, Counter> {
    let endpoint = get!(ENDPOINTS, &dst.id()).ok_or(Counter::DropNoEndpoint)?;
    if endpoint.vni != frame.vni {
        return Err(Counter::DropTunnelVni);
    }
    let src = Mac::from_words(frame.eth.src);
    if src.kind() != mac::ENDPOINT {
        return Err(Counter::DropTunnelOwner);
    }
    let source = get!(ENDPOINTS, &src.id()).ok_or(Counter::DropTunnelOwner)?;
    guard::owner(source, frame.vni, ip.tuple.src, frame.vtep)?;
    guard::destination(endpoint, frame.vni, ip.tuple.dst)?;
    if endpoint.ifindex == 0 {
        return Err(Counter::DropNoEndpoint);
    }
    Ok(endpoint)
}

/// The reason of a drop, unless a better one is that the sender is no node of the cluster.
#[inline(never)]
fn unknown(frame: &Frame, reason: Counter) -> Counter {
    if get!(VTEPS, &addr::wide(frame.vtep)).is_none() {
        return Counter::DropTunnelSource;
    }
    reason
}

/// Passes congestion that the underlay marked on to the inner packet.
#[inline(always)]
pub fn mark_congestion(ctx: &TcContext, outer_tos: u8) -> Result<(), Counter> {
    if outer_tos & 3 != 3 {
        return Ok(());
    }
    let mut ip: Ipv4Header = read(ctx, L3).ok_or(Counter::DropHelper)?;
    if let Some((tos, checksum)) = tunnel::congestion(outer_tos, &ip) {
        ip.tos = tos;
        ip.checksum = checksum;
        write(ctx, L3, ip)?;
    }
    Ok(())
}
