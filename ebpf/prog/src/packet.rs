//! Packet memory: bounds, parsing, rewriting, redirecting.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
        BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ZERO_CSUM_TX, TC_ACT_OK,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
    },
    bpf_f_adj_room_encap_l2,
    helpers::generated as bpf,
    programs::TcContext,
};
use mesh_ebpf_abi::{CONFIG_CHANGE_TYPE, CONFIG_VIA_DEVICE, Config, Counter, ENCAP_LEN_V4, Endpoint};
use mesh_ebpf_core::{
    addr, hash,
    hash::Tuple,
    mac::Mac,
    tunnel::{self, Encap},
    wire::{
        ETHERTYPE_IPV4, EthHeader, Ipv4Header, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, Ports,
        TcpHeader, UdpHeader, VxlanHeader,
    },
};

/// What a program decides: an action, or the reason of a drop.
pub type Verdict = Result<i32, Counter>;

/// On to the stack.
pub const PASS: i32 = TC_ACT_OK;
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
    pub total_len: u16,
    /// Bytes of IP and transport headers.
    pub headers: u16,
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
        total_len: u16::from_be(ip.total_len_be),
        headers: ip.header_len(),
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

/// Into the tunnel to an endpoint's node.
#[inline(always)]
pub fn to_tunnel(
    ctx: &TcContext,
    config: &Config,
    vni: u32,
    ip: &Ip,
    dst: Mac,
    src: Mac,
    vtep: u32,
    next_hop: u32,
) -> Verdict {
    if config.flags & CONFIG_VIA_DEVICE != 0 {
        write(ctx, 0, tunnel::ethernet(dst, src))?;
        return via_device(ctx, config, vni, vtep);
    }
    let (outer, udp, vxlan) = tunnel::outer(&Encap {
        src: addr::low(&config.vtep),
        dst: vtep,
        vni,
        port_be: config.vxlan_port_be,
        hash: hash::flow(&ip.tuple),
        inner_len: (ctx.len() as u16).wrapping_sub(L3 as u16),
        inner_tos: ip.tos,
    });
    let flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64
        | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
        | BPF_F_ADJ_ROOM_ENCAP_L2_ETH as u64
        | BPF_F_ADJ_ROOM_FIXED_GSO as u64
        | bpf_f_adj_room_encap_l2(EthHeader::LEN as u64);
    ctx.adjust_room(ENCAP as i32, BPF_ADJ_ROOM_MAC, flags).map_err(|_| Counter::DropHelper)?;
    write(ctx, L3 + ENCAP - EthHeader::LEN, tunnel::ethernet(dst, src))?;
    write(ctx, L3, outer)?;
    write(ctx, L4, udp)?;
    write(ctx, L4 + UdpHeader::LEN, vxlan)?;
    let mut params = bpf_redir_neigh {
        nh_family: AF_INET,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [next_hop, 0, 0, 0] },
    };
    // SAFETY: the parameters live across the call, and their size is given.
    let action = unsafe {
        bpf::bpf_redirect_neigh(
            config.uplink_ifindex,
            &raw mut params,
            size_of::<bpf_redir_neigh>() as i32,
            0,
        )
    };
    Ok(action as i32)
}

/// `struct bpf_tunnel_key` with the source address that 6.0 added (include/uapi/linux/bpf.h).
#[repr(C)]
pub struct TunnelKey {
    pub id: u32,
    /// Host order.
    pub remote: [u32; 4],
    pub tos: u8,
    pub ttl: u8,
    pub ext: u16,
    pub label: u32,
    /// Host order.
    pub local: [u32; 4],
}

/// Encapsulation by the VXLAN device: the fallback.
#[inline(always)]
fn via_device(ctx: &TcContext, config: &Config, vni: u32, vtep: u32) -> Verdict {
    let mut key = TunnelKey {
        id: vni,
        remote: [u32::from_be(vtep), 0, 0, 0],
        tos: 0,
        ttl: 64,
        ext: 0,
        label: 0,
        local: [u32::from_be(addr::low(&config.vtep)), 0, 0, 0],
    };
    // SAFETY: the key lives across the call, and its size is given.
    let result = unsafe {
        bpf::bpf_skb_set_tunnel_key(
            skb(ctx),
            (&raw mut key).cast(),
            size_of::<TunnelKey>() as u32,
            u64::from(BPF_F_ZERO_CSUM_TX) | BPF_F_DONT_FRAGMENT,
        )
    };
    if result != 0 {
        return Err(Counter::DropHelper);
    }
    to_link(config.vxlan_ifindex)
}

/// Who sent a packet that the VXLAN device received: the outer source and the VNI.
#[inline(always)]
pub fn tunnel_source(ctx: &TcContext) -> Result<(u32, u32), Counter> {
    let mut key = TunnelKey { id: 0, remote: [0; 4], tos: 0, ttl: 0, ext: 0, label: 0, local: [0; 4] };
    // SAFETY: as above.
    let result = unsafe {
        bpf::bpf_skb_get_tunnel_key(
            skb(ctx),
            (&raw mut key).cast(),
            size_of::<TunnelKey>() as u32,
            0,
        )
    };
    if result != 0 {
        return Err(Counter::DropTunnelSource);
    }
    let [remote, ..] = key.remote;
    Ok((remote.to_be(), key.id))
}

/// The outer headers of a tunnel packet that came in directly.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Outer {
    pub ip: Ipv4Header,
    pub udp: UdpHeader,
    pub vxlan: VxlanHeader,
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

/// To an endpoint elsewhere.
#[inline(always)]
pub fn to_remote(
    ctx: &TcContext,
    config: &Config,
    vni: u32,
    ip: &Ip,
    dst: Mac,
    src: Mac,
    endpoint: &Endpoint,
) -> Verdict {
    if endpoint.node == config.node {
        // Ours, and its link is not there (yet, or any more).
        return Err(Counter::DropNoEndpoint);
    }
    let (vtep, next_hop) = (addr::low(&endpoint.vtep), addr::low(&endpoint.next_hop));
    if vtep == 0 {
        return Err(Counter::DropNoNode);
    }
    to_tunnel(ctx, config, vni, ip, dst, src, vtep, next_hop)
}
