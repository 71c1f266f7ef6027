//! Packet memory: bounds, parsing, rewriting, redirecting.

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
        BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ZERO_CSUM_TX, TC_ACT_OK,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    bpf_f_adj_room_encap_l2,
    helpers::generated as bpf,
    programs::TcContext,
};
use mesh_ebpf_abi::{
    CONFIG_CHANGE_TYPE, CONFIG_VIA_DEVICE, Config, Counter, ENCAP_LEN_V4, Endpoint, FlowKey,
};
use mesh_ebpf_core::{
    addr, flow, guard, hash,
    hash::Tuple,
    icmp,
    mac::Mac,
    tunnel::{self, Encap},
    wire::{
        ETHERTYPE_IPV4, EthHeader, IcmpHeader, Ipv4Header, PROTOCOL_ICMP, PROTOCOL_TCP,
        PROTOCOL_UDP, Ports, TcpHeader, UdpHeader,
    },
};

use crate::maps::count;

/// What a program decides: an action (of the classifier, or what a redirecting helper gave), or the
/// reason of a drop.
pub type Verdict = Result<i32, Counter>;

/// On to the stack.
pub const PASS: i32 = TC_ACT_OK;
/// Into the tunnel, by the [`Way`] that was filled in. Only [`encapsulate`] at the end of a program
/// does that: its stack and the verifier's steps are spent once.
pub const TUNNEL: i32 = 0x100;
/// Length of the Ethernet header, and so the place of IP.
pub const L3: usize = EthHeader::LEN;
/// The place of what follows IPv4 without options.
pub const L4: usize = L3 + Ipv4Header::LEN;
/// From the outer IP header to the inner one.
pub const ENCAP: usize = ENCAP_LEN_V4 as usize;

const PACKET_HOST: u32 = 0;
const AF_INET: u32 = 2;
const BPF_F_DONT_FRAGMENT: u64 = 4;

/// The header at `offset`, if the linear part of the packet reaches that far.
///
/// The pointer is good until a helper changes the packet; the verifier holds us to that.
#[inline(always)]
pub fn header<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data();
    if start + offset + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some((start + offset) as *mut T)
}

/// Reads the header at `offset`.
#[inline(always)]
pub fn read<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    // SAFETY: within the packet, as just checked; any bytes are valid for a header of integers. BPF
    // has no alignment of its own to respect, and the verifier rejects what the machine cannot do.
    header(ctx, offset).map(|at: *mut T| unsafe { *at })
}

/// Writes the header at `offset`.
#[inline(always)]
pub fn write<T>(ctx: &TcContext, offset: usize, value: T) -> Result<(), Counter> {
    let at = header::<T>(ctx, offset).ok_or(Counter::DropHelper)?;
    // SAFETY: within the packet, as just checked.
    unsafe { *at = value };
    Ok(())
}

/// Makes the first `len` bytes linear, or as many as there are.
#[inline(always)]
pub fn pull(ctx: &TcContext, len: usize) {
    if ctx.data() + len > ctx.data_end() {
        let len = (len as u32).min(ctx.len());
        // A failure shows as a header that is not there.
        let _ = ctx.pull_data(len);
    }
}

#[inline(always)]
pub fn skb(ctx: &TcContext) -> *mut __sk_buff {
    ctx.as_ptr().cast()
}

/// The link that the packet came in by.
#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for the program's run.
    unsafe { (*skb(ctx)).ifindex }
}

/// The VLAN tag that the packet came with, which the kernel takes off a frame before any program
/// sees it (`skb_vlan_untag`) and puts back on wherever the packet leaves.
#[inline(always)]
pub fn vlan(ctx: &TcContext) -> Option<u32> {
    // SAFETY: as above.
    let (present, tci) = unsafe { ((*skb(ctx)).vlan_present, (*skb(ctx)).vlan_tci) };
    if present != 0 { Some(tci & 0xfff) } else { None }
}

/// Whether the packet was sent to this host's MAC.
#[inline(always)]
pub fn is_to_host(ctx: &TcContext) -> bool {
    // SAFETY: as above.
    unsafe { (*skb(ctx)).pkt_type == PACKET_HOST }
}

/// Payload bytes of a segment; 0 without GSO.
#[inline(always)]
pub fn segment(ctx: &TcContext) -> u32 {
    // SAFETY: as above.
    unsafe { (*skb(ctx)).gso_size }
}

/// What the programs need of an IPv4 packet.
#[derive(Clone, Copy)]
pub struct Ip {
    pub tuple: Tuple,
    pub tos: u8,
    /// TCP's flags; 0 for other protocols.
    pub tcp_flags: u8,
    /// ICMP's type and code; 0 for other protocols.
    pub icmp: [u8; 2],
    pub dont_fragment: bool,
    /// Ports, flags and type above were read: no options are in the way.
    pub has_l4: bool,
    /// Bytes of IP and transport headers.
    pub headers: u16,
    /// Room for the key of the look-up at hand: one for all, since the stack has no more.
    slot: MaybeUninit<FlowKey>,
}

impl Ip {
    /// The key of the packet's flow.
    #[inline(always)]
    pub fn key(&mut self, kind: u8, vni: u32) -> &FlowKey {
        self.slot.write(flow::key(kind, vni, &self.tuple))
    }

    /// The key of the flow that this packet answers.
    #[inline(always)]
    pub fn reversed_key(&mut self, kind: u8, vni: u32) -> &FlowKey {
        self.slot.write(flow::key(kind, vni, &icmp::reversed(&self.tuple)))
    }
}

/// Parses the IPv4 packet at `offset`, of which at least 28 bytes must be linear.
#[inline(always)]
pub fn parse(ctx: &TcContext, offset: usize) -> Result<Ip, Counter> {
    let ip: &Ipv4Header = match header::<[u32; 7]>(ctx, offset) {
        // SAFETY: 28 bytes were checked, of which these are the first 20.
        Some(at) => unsafe { &*at.cast() },
        None => return Err(Counter::DropMalformed),
    };
    if !ip.is_valid() {
        return Err(Counter::DropMalformed);
    }
    if ip.is_fragment() {
        return Err(Counter::DropFragment);
    }
    let mut parsed = Ip {
        tuple: Tuple { src: ip.src, dst: ip.dst, sport_be: 0, dport_be: 0, protocol: ip.protocol },
        tos: ip.tos,
        tcp_flags: 0,
        icmp: [0; 2],
        dont_fragment: ip.dont_fragment(),
        has_l4: false,
        headers: ip.header_len(),
        slot: MaybeUninit::uninit(),
    };
    if ip.has_options() {
        return Ok(parsed);
    }
    let l4 = offset + Ipv4Header::LEN;
    match ip.protocol {
        PROTOCOL_TCP => {
            let tcp: TcpHeader = read(ctx, l4).ok_or(Counter::DropMalformed)?;
            parsed.tuple.sport_be = tcp.sport_be;
            parsed.tuple.dport_be = tcp.dport_be;
            parsed.tcp_flags = tcp.flags;
            parsed.headers += u16::from(tcp.data_offset >> 4) * 4;
            parsed.has_l4 = true;
        }
        PROTOCOL_UDP => {
            let ports: Ports = read(ctx, l4).ok_or(Counter::DropMalformed)?;
            parsed.tuple.sport_be = ports.sport_be;
            parsed.tuple.dport_be = ports.dport_be;
            parsed.headers += UdpHeader::LEN as u16;
            parsed.has_l4 = true;
        }
        PROTOCOL_ICMP => {
            parsed.icmp = read(ctx, l4).ok_or(Counter::DropMalformed)?;
            parsed.has_l4 = true;
        }
        _ => {}
    }
    Ok(parsed)
}

/// Bytes that [`parse`] at `offset` may need linear.
pub const fn parse_len(offset: usize) -> usize {
    offset + Ipv4Header::LEN + TcpHeader::LEN
}

/// To another link's peer, in another network namespace.
#[inline(always)]
pub fn to_peer(ctx: &TcContext, config: &Config, ifindex: u32) -> Verdict {
    // Before 6.15 the packet keeps its type, and the peer's IP layer drops what is "for another
    // host": a frame of another MAC than the link's it came in by.
    if config.flags & CONFIG_CHANGE_TYPE != 0 && !is_to_host(ctx) {
        ctx.change_type(PACKET_HOST).map_err(|_| Counter::DropHelper)?;
    }
    // SAFETY: no memory is handed over.
    Ok(unsafe { bpf::bpf_redirect_peer(ifindex, 0) } as i32)
}

/// Out of the link itself.
#[inline(always)]
pub fn to_link(ifindex: u32) -> Verdict {
    // SAFETY: no memory is handed over.
    Ok(unsafe { bpf::bpf_redirect(ifindex, 0) } as i32)
}

/// Out of the underlay link, to wherever the kernel's own routes lead.
#[inline(always)]
pub fn to_route(config: &Config) -> Verdict {
    // SAFETY: without parameters the kernel looks the route up itself.
    let action =
        unsafe { bpf::bpf_redirect_neigh(config.uplink_ifindex, core::ptr::null_mut(), 0, 0) };
    Ok(action as i32)
}

/// The way to another node.
pub struct Way {
    pub vni: u32,
    /// Of the inner Ethernet header.
    pub dst: Mac,
    /// Of the inner Ethernet header.
    pub src: Mac,
    pub vtep: u32,
    pub next_hop: u32,
    /// The inner flow's hash.
    pub hash: u32,
    /// The inner DSCP and ECN.
    pub tos: u8,
}

impl Way {
    /// To an endpoint's node.
    #[inline(always)]
    pub fn lead(&mut self, vni: u32, dst: Mac, src: Mac, endpoint: &Endpoint, ip: &Ip) -> Verdict {
        let (vtep, next_hop) = (addr::low(&endpoint.vtep), addr::low(&endpoint.next_hop));
        let hash = hash::flow(&ip.tuple);
        *self = Self { vni, dst, src, vtep, next_hop, hash, tos: ip.tos };
        Ok(TUNNEL)
    }
}

/// Into the tunnel to another node.
#[inline(always)]
pub fn encapsulate(ctx: &TcContext, config: &Config, way: &Way) -> Verdict {
    let local = addr::low(&config.vtep);
    if way.vtep == local {
        // An endpoint of ours whose link is not there (yet, or any more).
        return Err(Counter::DropNoEndpoint);
    }
    if way.vtep == 0 {
        return Err(Counter::DropNoNode);
    }
    if config.flags & CONFIG_VIA_DEVICE != 0 {
        write(ctx, 0, tunnel::ethernet(way.dst, way.src))?;
        if set_tunnel_key(ctx, way.vni, way.vtep, local) == 0 {
            return Err(Counter::DropHelper);
        }
        // SAFETY: no memory is handed over.
        return Ok(unsafe { bpf::bpf_redirect(config.vxlan_ifindex, 0) } as i32);
    }
    let (outer, udp, vxlan) = tunnel::outer(&Encap {
        src: local,
        dst: way.vtep,
        vni: way.vni,
        port_be: config.vxlan_port_be,
        hash: way.hash,
        inner_len: (ctx.len() as u16).wrapping_sub(L3 as u16),
        inner_tos: way.tos,
    });
    let flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64
        | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
        | BPF_F_ADJ_ROOM_ENCAP_L2_ETH as u64
        | BPF_F_ADJ_ROOM_FIXED_GSO as u64
        | bpf_f_adj_room_encap_l2(EthHeader::LEN as u64);
    ctx.adjust_room(ENCAP as i32, BPF_ADJ_ROOM_MAC, flags).map_err(|_| Counter::DropHelper)?;
    write(ctx, L3 + ENCAP - EthHeader::LEN, tunnel::ethernet(way.dst, way.src))?;
    write(ctx, L3, outer)?;
    write(ctx, L4, udp)?;
    write(ctx, L4 + UdpHeader::LEN, vxlan)?;
    let mut params =
        NextHop { family: AF_INET, addr: way.next_hop, rest_low: 0, rest_high: 0, last: 0 };
    // SAFETY: the parameters live across the call, and their size is given.
    let action = unsafe {
        bpf::bpf_redirect_neigh(
            config.uplink_ifindex,
            (&raw mut params).cast(),
            size_of::<NextHop>() as i32,
            0,
        )
    };
    Ok(action as i32)
}

/// `None`: the packet fits. Else it is dropped, and its sender told where it asked to be.
#[inline(always)]
pub fn oversize(ctx: &TcContext, ip: &Ip, mtu: u32) -> Option<Verdict> {
    let len = ctx.len().saturating_sub(L3 as u32);
    if guard::fits(len, segment(ctx), u32::from(ip.headers), mtu) {
        return None;
    }
    if !ip.dont_fragment {
        return Some(Err(Counter::DropTooBig));
    }
    if too_big(ctx, mtu) == 0 {
        return Some(Err(Counter::DropHelper));
    }
    count(Counter::TooBigSent);
    Some(to_link(ifindex(ctx)))
}

/// Turns a packet into the error about it, addressed to its sender as if from its destination.
/// Gives 0 if that fails.
#[inline(never)]
fn too_big(ctx: &TcContext, mtu: u32) -> u32 {
    u32::from(write_too_big(ctx, mtu).is_some())
}

#[inline(always)]
fn write_too_big(ctx: &TcContext, mtu: u32) -> Option<()> {
    let eth: EthHeader = read(ctx, 0)?;
    let quote: [u32; icmp::QUOTE / 4] = read(ctx, L3)?;
    let [_, _, _, src, dst, ..] = quote;
    let len = L3 as u32 + u32::from(icmp::ERROR_LEN);
    // SAFETY: takes the context and plain numbers.
    if unsafe { bpf::bpf_skb_change_tail(skb(ctx), len, 0) } != 0 {
        return None;
    }
    pull(ctx, len as usize);
    let (ip, message) = icmp::too_big(dst, src, mtu as u16, &quote);
    write(ctx, L4 + IcmpHeader::LEN, quote).ok()?;
    write(ctx, L4, message).ok()?;
    write(ctx, L3, ip).ok()?;
    write(ctx, 0, EthHeader { dst: eth.src, src: eth.dst, ..eth }).ok()
}

/// Tells the VXLAN device, our fallback, where to. Gives 0 if that fails.
#[inline(never)]
fn set_tunnel_key(ctx: &TcContext, vni: u32, vtep: u32, local: u32) -> u32 {
    let mut key = MaybeUninit::<TunnelKey>::uninit();
    let at: *mut u32 = key.as_mut_ptr().cast();
    let ttl = u32::from_ne_bytes([0, 64, 0, 0]);
    // SAFETY: these are the key's eleven words. Volatile, since LLVM would clear those that are
    // zero with a call to `memset`. The key lives across the call, and its size is given.
    let result = unsafe {
        at.write_volatile(vni);
        at.add(1).write_volatile(u32::from_be(vtep));
        at.add(2).write_volatile(0);
        at.add(3).write_volatile(0);
        at.add(4).write_volatile(0);
        at.add(5).write_volatile(ttl);
        at.add(6).write_volatile(0);
        at.add(7).write_volatile(u32::from_be(local));
        at.add(8).write_volatile(0);
        at.add(9).write_volatile(0);
        at.add(10).write_volatile(0);
        bpf::bpf_skb_set_tunnel_key(
            skb(ctx),
            at.cast(),
            size_of::<TunnelKey>() as u32,
            u64::from(BPF_F_ZERO_CSUM_TX) | BPF_F_DONT_FRAGMENT,
        )
    };
    u32::from(result == 0)
}

/// Who sent a packet that the VXLAN device received: the outer source and the VNI.
#[inline(always)]
pub fn tunnel_source(ctx: &TcContext) -> Result<(u32, u32), Counter> {
    let mut key = MaybeUninit::<TunnelKey>::uninit();
    // SAFETY: the helper fills the key, whose size is given, or clears it and fails.
    let (result, key) = unsafe {
        let at = key.as_mut_ptr();
        let size = size_of::<TunnelKey>() as u32;
        (bpf::bpf_skb_get_tunnel_key(skb(ctx), at.cast(), size, 0), key.assume_init_ref())
    };
    if result != 0 {
        return Err(Counter::DropTunnelSource);
    }
    Ok((key.remote.to_be(), key.id))
}

/// `struct bpf_redir_neigh` of include/uapi/linux/bpf.h.
#[repr(C)]
struct NextHop {
    family: u32,
    addr: u32,
    rest_low: u32,
    rest_high: u32,
    last: u32,
}

/// `struct bpf_tunnel_key` of include/uapi/linux/bpf.h, with the source address that 6.0 added.
#[repr(C)]
struct TunnelKey {
    id: u32,
    /// Host order.
    remote: u32,
    /// The rest of an IPv6 address; TOS, TTL, flags; label; the source, host order, and its rest.
    others: [u32; 9],
}
const _: () = assert!(size_of::<TunnelKey>() == 44 && size_of::<NextHop>() == 20);

/// The first headers of a packet from the underlay. The ports are where UDP and TCP have them.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Outer {
    pub ip: Ipv4Header,
    pub udp: UdpHeader,
}

/// Removes the outer headers; the Ethernet header becomes `eth`.
#[inline(always)]
pub fn strip(ctx: &TcContext, eth: EthHeader) -> Result<(), Counter> {
    ctx.adjust_room(-(ENCAP as i32), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO as u64)
        .map_err(|_| Counter::DropHelper)?;
    write(ctx, 0, eth)
}

/// Whether the frame carries IPv4.
#[inline(always)]
pub fn is_ipv4(eth: &EthHeader) -> bool {
    eth.ethertype_be == ETHERTYPE_IPV4.to_be()
}
