//! `from_task`: what tasks send.

use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{ADDR_ENDPOINT, AddrKey, Config, Counter, Endpoint, PORT_GATEWAY, Port};
use mesh_ebpf_core::{
    addr, arp, guard,
    mac::{self, Mac},
    wire::{ArpPacket, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthHeader},
};

use crate::{
    maps::{ADDRESSES, ENDPOINTS, PORTS, config, count, get},
    mesh,
    packet::{
        self, Ip, L3, Verdict, Way, header, ifindex, oversize, parse, parse_len, pull, read,
        to_link, to_peer, vlan, write,
    },
    vip,
};

#[inline(always)]
pub fn run(ctx: &TcContext, way: &mut Way) -> Verdict {
    let port = get!(PORTS, &ifindex(ctx)).ok_or(Counter::DropNoEndpoint)?;
    // Out of the underlay link the tag would choose a VLAN there.
    if vlan(ctx).is_some() {
        return Err(Counter::DropEtherType);
    }
    // An ARP packet has 42 bytes, and so has the shortest datagram: fewer headers are nothing.
    if header::<[u8; 42]>(ctx, 0).is_none() {
        pull(ctx, parse_len(L3));
    }
    let eth: EthHeader = read(ctx, 0).ok_or(Counter::DropMalformed)?;
    guard::source_mac(port, Mac::from_words(eth.src))?;
    if eth.ethertype_be == ETHERTYPE_ARP.to_be() {
        return answer_arp(ctx, port);
    }
    let dst = Mac::from_words(eth.dst);
    if dst.is_group() {
        return Err(Counter::DropMulticast);
    }
    if eth.ethertype_be != ETHERTYPE_IPV4.to_be() {
        let ipv6 = eth.ethertype_be == ETHERTYPE_IPV6.to_be();
        return Err(if ipv6 { Counter::DropIpv6 } else { Counter::DropEtherType });
    }
    let mut ip = parse(ctx, L3)?;
    guard::source_addr(port, ip.tuple.src)?;
    let config = config()?;
    if port.flags & PORT_GATEWAY != 0 {
        return mesh::from_gateway(ctx, config, port, &mut ip, way);
    }
    if dst == Mac::GATEWAY {
        return vip::from_client(ctx, config, port, &mut ip, way);
    }
    if dst.kind() != mac::ENDPOINT {
        return Err(Counter::DropNoEndpoint);
    }
    unicast(ctx, config, port, &mut ip, way, dst)
}

/// To an endpoint of the sender's network.
#[inline(always)]
fn unicast(
    ctx: &TcContext,
    config: &Config,
    port: &Port,
    ip: &mut Ip,
    way: &mut Way,
    dst: Mac,
) -> Verdict {
    let endpoint = get!(ENDPOINTS, &dst.id()).ok_or(Counter::DropNoEndpoint)?;
    guard::destination(endpoint, port.vni, ip.tuple.dst)?;
    if endpoint.ifindex != 0 {
        return to_local(ctx, config, port, ip, endpoint);
    }
    if let Some(verdict) = oversize(ctx, ip, port.mtu) {
        return verdict;
    }
    count(Counter::ToTunnel);
    let src = Mac::new(mac::ENDPOINT, port.endpoint);
    way.lead(port.vni, dst, src, endpoint, ip)
}

/// To an endpoint on this node.
#[inline(always)]
pub fn to_local(
    ctx: &TcContext,
    config: &Config,
    port: &Port,
    ip: &mut Ip,
    endpoint: &Endpoint,
) -> Verdict {
    count(Counter::ToLocal);
    vip::to_client(ctx, endpoint.ifindex, port.vni, ip)?;
    to_peer(ctx, config, endpoint.ifindex)
}

/// ARP is answered here, or not at all.
#[inline(always)]
fn answer_arp(ctx: &TcContext, port: &Port) -> Verdict {
    let request: ArpPacket = read(ctx, L3).ok_or(Counter::DropMalformed)?;
    if !arp::is_valid(&request) {
        return Err(Counter::DropMalformed);
    }
    // A probe (RFC 5227) has no sender address yet; it claims nothing.
    let sender = arp::addr(request.sender_addr);
    if sender != 0 {
        guard::source_addr(port, sender)?;
    }
    let own = addr::low(&port.addr);
    let wanted = arp::wanted(&request, own).ok_or(Counter::DropArp)?;
    let mac = if port.flags & PORT_GATEWAY != 0 {
        // Everything that this link leads to is behind the gateway.
        Mac::GATEWAY
    } else {
        let key = AddrKey { vni: port.vni, addr: addr::wide(wanted) };
        let found = get!(ADDRESSES, &key).ok_or(Counter::DropArp)?;
        if found.kind == ADDR_ENDPOINT {
            Mac::new(mac::ENDPOINT, found.endpoint)
        } else {
            Mac::GATEWAY
        }
    };
    let (eth, reply) = arp::reply(&request, mac);
    write(ctx, 0, eth)?;
    write(ctx, packet::L3, reply)?;
    count(Counter::ArpAnswered);
    to_link(ifindex(ctx))
}
