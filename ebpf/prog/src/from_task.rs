//! `from_task`: what tasks send.

use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{
    ADDR_ENDPOINT, AddrKey, Config, Counter, PORT_GATEWAY, Port,
};
use mesh_ebpf_core::{
    addr, arp, guard,
    mac::{self, Mac},
    wire::{ArpPacket, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthHeader},
};

use crate::{
    maps::{ADDRESSES, ENDPOINTS, PORTS, config, count, get},
    packet::{
        self, Ip, L3, PASS, Verdict, header, ifindex, parse, parse_len, pull, read, segment,
        to_link, to_peer, to_remote, write,
    },
};

pub fn run(ctx: &TcContext) -> Verdict {
    let port = get!(PORTS, &ifindex(ctx)).ok_or(Counter::DropNoEndpoint)?;
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
    let ip = parse(ctx, L3)?;
    guard::source_addr(port, ip.tuple.src)?;
    let config = config()?;
    if port.flags & PORT_GATEWAY != 0 {
        count(Counter::ToHost);
        return Ok(PASS);
    }
    if dst.kind() != mac::ENDPOINT || dst.id() == 0 {
        return Err(Counter::DropNoEndpoint);
    }
    unicast(ctx, config, port, &ip, dst)
}

/// To an endpoint of the sender's network.
#[inline(always)]
fn unicast(ctx: &TcContext, config: &Config, port: &Port, ip: &Ip, dst: Mac) -> Verdict {
    let endpoint = get!(ENDPOINTS, &dst.id()).ok_or(Counter::DropNoEndpoint)?;
    guard::destination(endpoint, port.vni, ip.tuple.dst)?;
    if endpoint.ifindex != 0 {
        count(Counter::ToLocal);
        return to_peer(ctx, config, endpoint.ifindex);
    }
    let len = ctx.len().saturating_sub(L3 as u32);
    if !guard::fits(len, segment(ctx), u32::from(ip.headers), port.mtu) {
        return Err(Counter::DropTooBig);
    }
    count(Counter::ToTunnel);
    to_remote(ctx, config, port.vni, ip, dst, Mac::new(mac::ENDPOINT, port.endpoint), endpoint)
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
