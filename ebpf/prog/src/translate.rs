//! Rewriting addresses and ports, checksums included.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::TcContext,
};
use mesh_ebpf_abi::Counter;
use mesh_ebpf_core::{
    checksum,
    mac::Mac,
    wire::{EthHeader, Ipv4Header, PROTOCOL_TCP, Ports},
};

use crate::packet::{Ip, L3, L4, header};

/// Which end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// Rewrites one end of a TCP or UDP packet without options.
#[inline(always)]
pub fn end(ctx: &TcContext, ip: &mut Ip, end: End, addr: u32, port_be: u16) -> Result<(), Counter> {
    let source = u32::from(end == End::Source);
    if rewrite(ctx, source, addr, u32::from(port_be)) == 0 {
        return Err(Counter::DropHelper);
    }
    match end {
        End::Source => {
            ip.tuple.src = addr;
            ip.tuple.sport_be = port_be;
        }
        End::Destination => {
            ip.tuple.dst = addr;
            ip.tuple.dport_be = port_be;
        }
    }
    Ok(())
}

/// Rewrites one port of a TCP or UDP packet, if it differs.
#[inline(always)]
pub fn port(ctx: &TcContext, ip: &mut Ip, which: End, port_be: u16) -> Result<(), Counter> {
    let (from, addr) = match which {
        End::Source => (ip.tuple.sport_be, ip.tuple.src),
        End::Destination => (ip.tuple.dport_be, ip.tuple.dst),
    };
    if from == port_be { Ok(()) } else { end(ctx, ip, which, addr, port_be) }
}

/// Gives 0 if it fails.
#[inline(never)]
fn rewrite(ctx: &TcContext, source: u32, addr: u32, port_be: u32) -> u32 {
    let port_be = port_be as u16;
    let Some(at) = header::<(Ipv4Header, Ports)>(ctx, L3) else { return 0 };
    // SAFETY: within the packet, as just checked; see `packet::read` about alignment.
    let (l3, l4) = unsafe { &mut *at };
    let tcp = l3.protocol == PROTOCOL_TCP;
    let (from, from_port);
    if source != 0 {
        (from, from_port) = (l3.src, l4.sport_be);
        l3.src = addr;
        l4.sport_be = port_be;
    } else {
        (from, from_port) = (l3.dst, l4.dport_be);
        l3.dst = addr;
        l4.dport_be = port_be;
    }
    l3.checksum = checksum::update32(l3.checksum, from, addr);
    // Only the kernel knows whether the packet's checksum is whole or still to be completed. The
    // address is part of the pseudo-header, the port is not: with that flag on a port, a received
    // packet's checksum state would be spoilt.
    let (offset, flags) =
        if tcp { (L4 + 16, 0) } else { (L4 + 6, u64::from(BPF_F_MARK_MANGLED_0)) };
    if from != addr {
        let flags = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
        if ctx.l4_csum_replace(offset, u64::from(from), u64::from(addr), flags).is_err() {
            return 0;
        }
    }
    if from_port != port_be {
        let (from, to) = (u64::from(from_port), u64::from(port_be));
        if ctx.l4_csum_replace(offset, from, to, flags | 2).is_err() {
            return 0;
        }
    }
    1
}

/// Rewrites the Ethernet addresses.
#[inline(always)]
pub fn ethernet(ctx: &TcContext, dst: Mac, src: Mac) -> Result<(), Counter> {
    let at = header::<EthHeader>(ctx, 0).ok_or(Counter::DropHelper)?;
    // SAFETY: as above.
    let eth = unsafe { &mut *at };
    eth.dst = dst.words();
    eth.src = src.words();
    Ok(())
}
