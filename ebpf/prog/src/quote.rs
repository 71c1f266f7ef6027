//! ICMP errors about translated flows: the packet that they quote, and translating both headers.

use aya_ebpf::programs::TcContext;
use mesh_ebpf_core::{
    checksum,
    hash::Tuple,
    icmp,
    wire::{IcmpHeader, Ipv4Header, PROTOCOL_TCP, PROTOCOL_UDP, Ports},
};

use crate::{
    packet::{L3, L4, header, pull},
    translate::End,
};

/// The quoted IP header.
const QUOTED: usize = L4 + IcmpHeader::LEN;

/// An ICMP error, as far as we translate it.
#[repr(C)]
struct Error {
    ip: Ipv4Header,
    icmp: IcmpHeader,
    quoted: Ipv4Header,
    ports: Ports,
}

/// The tuple of the quoted packet; `None` if it is none of TCP or UDP without options, whole or the
/// first fragment.
#[inline(always)]
pub fn read(ctx: &TcContext) -> Option<Tuple> {
    pull(ctx, QUOTED + icmp::QUOTE);
    let at = header::<Error>(ctx, L3)?;
    // SAFETY: within the packet, as just checked; see `packet::read` about alignment.
    let error = unsafe { &*at };
    let quoted = &error.quoted;
    let known = matches!(quoted.protocol, PROTOCOL_TCP | PROTOCOL_UDP);
    if quoted.has_options() || quoted.is_fragment() || !known {
        return None;
    }
    Some(icmp::quoted(quoted, error.ports.sport_be, error.ports.dport_be))
}

/// What an error's translation changes.
pub struct Change {
    /// Which end of the error itself.
    pub outer: End,
    pub outer_addr: u32,
    /// Which end of the quoted packet is the service's; the other is the client's.
    pub quoted: End,
    pub quoted_addr: u32,
    pub quoted_port_be: u16,
    pub client_port_be: u16,
}

/// Translates an error.
///
/// Both IP headers keep their sums, so the ICMP checksum changes by the ports alone. A checksum in
/// the quoted transport header is data here; hosts do not check it.
#[inline(always)]
pub fn rewrite(ctx: &TcContext, change: &Change) -> Option<()> {
    let at = header::<Error>(ctx, L3)?;
    // SAFETY: as above.
    let error = unsafe { &mut *at };
    let ip = &mut error.ip;
    let from = if change.outer == End::Source { ip.src } else { ip.dst };
    ip.checksum = checksum::update32(ip.checksum, from, change.outer_addr);
    if change.outer == End::Source {
        ip.src = change.outer_addr;
    } else {
        ip.dst = change.outer_addr;
    }
    let source = change.quoted == End::Source;
    let quoted = &mut error.quoted;
    let from = if source { quoted.src } else { quoted.dst };
    quoted.checksum = checksum::update32(quoted.checksum, from, change.quoted_addr);
    let (sport, dport) = if source {
        quoted.src = change.quoted_addr;
        (change.quoted_port_be, change.client_port_be)
    } else {
        quoted.dst = change.quoted_addr;
        (change.client_port_be, change.quoted_port_be)
    };
    let sum = checksum::update16(error.icmp.checksum, error.ports.sport_be, sport);
    error.icmp.checksum = checksum::update16(sum, error.ports.dport_be, dport);
    error.ports = Ports { sport_be: sport, dport_be: dport };
    Some(())
}
