//! VIPs: translation where the client is. The backend sees the client's own address; its replies
//! get the VIP back when they are delivered to the client.

use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{
    ADDR_GATEWAY, ADDR_VIP, AddrKey, Config, Counter, EP_WITHDRAWN, Endpoint, FLOW_STATE_HAIRPIN,
    FLOW_VIP, FLOW_VIP_REPLY, FlowKey, FlowValue, Port, VIP_CLIENTS_CAPACITY,
};
use mesh_ebpf_core::{
    addr, flow, hash, icmp,
    mac::{self, Mac},
    wire::{EthHeader, IcmpHeader, Ipv4Header, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP},
};

use crate::{
    flows,
    maps::{ADDRESSES, ENDPOINTS, MAGLEV, SERVICES, VIP_CLIENTS, count, get},
    packet::{Ip, L3, L4, Verdict, Way, header, ifindex, oversize, read, to_link, to_peer},
    quote,
    translate::{self, End},
};

/// A packet to the gateway's MAC: to a VIP, or to nobody.
#[inline(always)]
pub fn from_client(
    ctx: &TcContext,
    config: &Config,
    port: &Port,
    ip: &mut Ip,
    way: &mut Way,
) -> Verdict {
    if !ip.has_l4 {
        return Err(Counter::DropProtocol);
    }
    match ip.tuple.protocol {
        PROTOCOL_TCP | PROTOCOL_UDP => {}
        PROTOCOL_ICMP if ip.icmp == [icmp::ECHO, 0] => return answer_echo(ctx, port, ip),
        _ => return Err(Counter::DropProtocol),
    }
    let now = flows::now();
    let (flags, hash) = (ip.tcp_flags, hash::flow(&ip.tuple));
    let key = ip.key(FLOW_VIP, port.vni);
    if let Some(entry) = flows::find(key, now) {
        let value = entry.value();
        let (id, hairpin) = (value.endpoint, value.state & FLOW_STATE_HAIRPIN != 0);
        let reply = flow::is_hairpin_reply(value.state);
        match get!(ENDPOINTS, &id) {
            // Its backend is gone: another one can at least refuse.
            None => entry.forget(key),
            Some(endpoint) => {
                if !entry.advance(key, reply, flags, now) {
                    // Void: decided anew.
                } else if endpoint.flags & EP_WITHDRAWN != 0 && entry.is_half_open(key) {
                    entry.forget(key);
                } else {
                    return forward(ctx, config, port, ip, way, id, endpoint, hairpin);
                }
            }
        }
    }
    let mut chosen = Choice { endpoint: 0, hairpin: false, error: Counter::DropNoBackend };
    let client = Client { endpoint: port.endpoint, ifindex: ifindex(ctx), hash, now };
    balance(key, &client, &mut chosen);
    if chosen.endpoint == 0 {
        return Err(chosen.error);
    }
    let endpoint = get!(ENDPOINTS, &chosen.endpoint).ok_or(Counter::DropNoBackend)?;
    forward(ctx, config, port, ip, way, chosen.endpoint, endpoint, chosen.hairpin)
}

struct Client {
    endpoint: u64,
    ifindex: u32,
    hash: u32,
    now: u64,
}

struct Choice {
    /// 0: none.
    endpoint: u64,
    hairpin: bool,
    error: Counter,
}

/// Chooses the backend of a new flow, and enters the flow.
#[inline(never)]
fn balance(key: &FlowKey, client: &Client, choice: &mut Choice) {
    let Some(found) = get!(ADDRESSES, &AddrKey { vni: key.vni, addr: key.dst }) else {
        choice.error = Counter::DropNoEndpoint;
        return;
    };
    if found.kind != ADDR_VIP {
        choice.error = Counter::DropNoEndpoint;
        return;
    }
    let Some(id) = pick(found.service, client.hash) else { return };
    let Some(endpoint) = get!(ENDPOINTS, &id) else { return };
    let hairpin = id == client.endpoint;
    let created = flows::create::<FLOW_VIP>(key, false, client.hash, |value| {
        *value = FlowValue {
            addr: addr::copy(&endpoint.addr),
            endpoint: id,
            node: 0,
            last_ns: client.now,
            port_be: key.dport_be,
            client_port_be: key.sport_be,
            state: if hairpin { FLOW_STATE_HAIRPIN } else { 0 },
            pad: 0,
        };
    });
    if let Err(error) = created {
        choice.error = error;
        return;
    }
    if let Some(seen) = VIP_CLIENTS.get_ptr_mut(client.ifindex % VIP_CLIENTS_CAPACITY) {
        // SAFETY: the entry lives as long as the map; all write the same.
        unsafe { *seen = 1 };
    }
    choice.endpoint = id;
    choice.hairpin = hairpin;
}

/// The backend in a service's table for a flow.
#[inline(always)]
pub fn pick(service: u32, hash: u32) -> Option<u64> {
    let service = get!(SERVICES, &service)?;
    if service.maglev_len == 0 {
        return None;
    }
    let slot = service.maglev_offset.wrapping_add(hash::slot(hash, service.maglev_len));
    MAGLEV.get(slot).copied().filter(|id| *id != 0)
}

/// Translates and sends a packet to its backend.
#[inline(always)]
fn forward(
    ctx: &TcContext,
    config: &Config,
    port: &Port,
    ip: &mut Ip,
    way: &mut Way,
    id: u64,
    endpoint: &Endpoint,
    hairpin: bool,
) -> Verdict {
    let vip = ip.tuple.dst;
    let (sport, dport) = (ip.tuple.sport_be, ip.tuple.dport_be);
    let backend = Mac::new(mac::ENDPOINT, id);
    if let Some(verdict) = oversize(ctx, ip, port.mtu) {
        return verdict;
    }
    translate::end(ctx, ip, End::Destination, addr::low(&endpoint.addr), dport)?;
    if hairpin {
        // The task must not see itself as the client: the answer would not come back here.
        translate::end(ctx, ip, End::Source, vip, sport)?;
        translate::ethernet(ctx, backend, Mac::GATEWAY)?;
        count(Counter::ToLocal);
        return to_peer(ctx, config, ifindex(ctx));
    }
    let client = Mac::new(mac::ENDPOINT, port.endpoint);
    translate::ethernet(ctx, backend, client)?;
    if endpoint.ifindex != 0 {
        return crate::from_task::to_local(ctx, config, port, ip, endpoint);
    }
    count(Counter::ToTunnel);
    way.lead(port.vni, backend, client, endpoint, ip)
}

/// Gives a reply to a VIP's client the VIP as its source. For a packet with Ethernet at 0, about to
/// be delivered to the link `client`.
#[inline(always)]
pub fn to_client(ctx: &TcContext, client: u32, vni: u32, ip: &mut Ip) -> Result<(), Counter> {
    // Endpoints that never called a VIP pay no look-up in the tables of flows.
    if VIP_CLIENTS.get(client % VIP_CLIENTS_CAPACITY).is_none_or(|seen| *seen == 0) || !ip.has_l4 {
        return Ok(());
    }
    match ip.tuple.protocol {
        PROTOCOL_TCP | PROTOCOL_UDP => {}
        PROTOCOL_ICMP if icmp::is_error(ip.icmp[0]) => {
            error_to_client(ctx, vni);
            return Ok(());
        }
        _ => return Ok(()),
    }
    let now = flows::now();
    let (flags, sport) = (ip.tcp_flags, ip.tuple.sport_be);
    let key = ip.key(FLOW_VIP_REPLY, vni);
    let Some(entry) = flows::find(key, now) else { return Ok(()) };
    let vip = addr::low(&entry.value().addr);
    entry.advance(key, true, flags, now);
    translate::end(ctx, ip, End::Source, vip, sport)?;
    gateway_source(ctx)
}

#[inline(always)]
fn gateway_source(ctx: &TcContext) -> Result<(), Counter> {
    let at = header::<EthHeader>(ctx, 0).ok_or(Counter::DropHelper)?;
    // SAFETY: within the packet, as just checked.
    unsafe { (*at).src = Mac::GATEWAY.words() };
    Ok(())
}

/// An ICMP error of a backend about a packet that the client sent to the VIP.
#[inline(never)]
fn error_to_client(ctx: &TcContext, vni: u32) {
    let Some(quoted) = quote::read(ctx) else { return };
    let key = flow::key(FLOW_VIP_REPLY, vni, &icmp::reversed(&quoted));
    let Some(entry) = flows::find(&key, flows::now()) else { return };
    let value = entry.value();
    let (vip, port_be) = (addr::low(&value.addr), value.port_be);
    let change = quote::Change {
        outer: End::Source,
        outer_addr: vip,
        quoted: End::Destination,
        quoted_addr: vip,
        quoted_port_be: port_be,
        client_port_be: value.client_port_be,
    };
    if quote::rewrite(ctx, &change).is_some() {
        let _ = gateway_source(ctx);
        count(Counter::IcmpRelayed);
    }
}

/// A VIP, and the gateway, answer ICMP echo.
#[inline(always)]
fn answer_echo(ctx: &TcContext, port: &Port, ip: &Ip) -> Verdict {
    let key = AddrKey { vni: port.vni, addr: addr::wide(ip.tuple.dst) };
    let known = get!(ADDRESSES, &key)
        .is_some_and(|found| found.kind == ADDR_VIP || found.kind == ADDR_GATEWAY);
    if !known {
        return Err(Counter::DropNoEndpoint);
    }
    let mut message: IcmpHeader = read(ctx, L4).ok_or(Counter::DropMalformed)?;
    message.checksum = icmp::echo_reply_checksum(&message);
    message.kind = icmp::ECHO_REPLY;
    let mut l3: Ipv4Header = read(ctx, L3).ok_or(Counter::DropMalformed)?;
    // Swapping the addresses leaves the header's sum as it is.
    (l3.src, l3.dst) = (l3.dst, l3.src);
    crate::packet::write(ctx, L4, message)?;
    crate::packet::write(ctx, L3, l3)?;
    translate::ethernet(ctx, Mac::new(mac::ENDPOINT, port.endpoint), Mac::GATEWAY)?;
    count(Counter::EchoAnswered);
    to_link(ifindex(ctx))
}
