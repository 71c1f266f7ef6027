//! `from_uplink` and `from_vxlan`: what tunnels bring.

use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{CONFIG_VIA_DEVICE, Config, Counter};
use mesh_ebpf_core::{
    addr, guard,
    mac::{self, Mac},
    tunnel,
    wire::{EthHeader, Ipv4Header, PROTOCOL_UDP},
};

use crate::{
    maps::{ENDPOINTS, VTEPS, config, count, get},
    packet::{
        ENCAP, Ip, L3, Outer, PASS, Verdict, header, is_ipv4, is_to_host, parse, parse_len, pull,
        read, strip, to_peer, tunnel_source, write,
    },
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

pub fn from_uplink(ctx: &TcContext) -> Verdict {
    // Nothing here is for us unless it is IPv4 that was sent to this host.
    let config = config()?;
    if !is_to_host(ctx) {
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
    if ours && config.flags & CONFIG_VIA_DEVICE == 0 {
        let vni = tunnel::vni(&outer.vxlan).ok_or(Counter::DropTunnelVni)?;
        pull(ctx, parse_len(L3 + ENCAP));
        let eth: EthHeader = read(ctx, ENCAP).ok_or(Counter::DropMalformed)?;
        let frame = Frame { eth, vni, vtep: outer.ip.src, tos: outer.ip.tos };
        return receive::<true>(ctx, config, &frame);
    }
    Ok(PASS)
}

pub fn from_vxlan(ctx: &TcContext) -> Verdict {
    let config = config()?;
    let (vtep, vni) = tunnel_source(ctx)?;
    pull(ctx, parse_len(L3));
    let eth: EthHeader = read(ctx, 0).ok_or(Counter::DropMalformed)?;
    receive::<false>(ctx, config, &Frame { eth, vni, vtep, tos: 0 })
}

/// A frame with its outer headers still on (`DIRECT`), or without.
#[inline(always)]
fn receive<const DIRECT: bool>(ctx: &TcContext, config: &Config, frame: &Frame) -> Verdict {
    if !is_ipv4(&frame.eth) {
        return Err(unknown(frame, Counter::DropEtherType));
    }
    let ip = parse(ctx, if DIRECT { L3 + ENCAP } else { L3 })?;
    let dst = Mac::from_words(frame.eth.dst);
    match dst.kind() {
        mac::ENDPOINT => unicast::<DIRECT>(ctx, config, frame, &ip, dst),
        _ => Err(unknown(frame, Counter::DropNoEndpoint)),
    }
}

/// From an endpoint elsewhere to one here.
#[inline(always)]
fn unicast<const DIRECT: bool>(
    ctx: &TcContext,
    config: &Config,
    frame: &Frame,
    ip: &Ip,
    dst: Mac,
) -> Verdict {
    let src = Mac::from_words(frame.eth.src);
    let Some(source) = get!(ENDPOINTS, &src.id()) else {
        return Err(unknown(frame, Counter::DropTunnelOwner));
    };
    if src.kind() != mac::ENDPOINT {
        return Err(unknown(frame, Counter::DropTunnelOwner));
    }
    guard::owner(source, frame.vni, ip.tuple.src, frame.vtep)
        .map_err(|reason| unknown(frame, reason))?;
    let endpoint = get!(ENDPOINTS, &dst.id()).ok_or(Counter::DropNoEndpoint)?;
    if endpoint.vni != frame.vni {
        return Err(Counter::DropTunnelVni);
    }
    guard::destination(endpoint, frame.vni, ip.tuple.dst)?;
    if endpoint.ifindex == 0 {
        return Err(Counter::DropNoEndpoint);
    }
    if DIRECT {
        strip(ctx, frame.eth)?;
        mark_congestion(ctx, frame.tos)?;
    }
    count(Counter::FromTunnel);
    to_peer(ctx, config, endpoint.ifindex)
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
fn mark_congestion(ctx: &TcContext, outer_tos: u8) -> Result<(), Counter> {
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
