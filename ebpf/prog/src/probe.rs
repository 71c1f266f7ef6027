//! Probes of other nodes, answered here: they learn that the data path to this node works, whether
//! its daemon runs or not.

use aya_ebpf::{bindings::BPF_F_MARK_MANGLED_0, programs::TcContext};
use mesh_ebpf_abi::{Config, Counter};
use mesh_ebpf_core::{
    addr, probe,
    wire::{EthHeader, ProbeHeader, VxlanHeader},
};

use crate::{
    maps::{VTEPS, count, get},
    packet::{ENCAP, L3, L4, Outer, Verdict, header, ifindex, to_link},
};

/// Sends a probe back where it came from. The link that it came in by is the way, since the other
/// node is one hop away by it.
#[inline(always)]
pub fn reflect(ctx: &TcContext, config: &Config) -> Verdict {
    let mut reason = Counter::DropProbe;
    if turn(ctx, config.node, &mut reason) == 0 {
        return Err(reason);
    }
    count(Counter::ProbeReflected);
    to_link(ifindex(ctx))
}

/// Makes a request its answer. Gives 0 if it is none of ours: a call of its own, for its stack.
#[inline(never)]
fn turn(ctx: &TcContext, own: u64, reason: &mut Counter) -> u32 {
    match answer(ctx, own) {
        Ok(()) => 1,
        Err(error) => {
            *reason = error;
            0
        }
    }
}

#[inline(always)]
fn answer(ctx: &TcContext, own: u64) -> Result<(), Counter> {
    let start = header::<[u8; probe::HEADERS]>(ctx, 0).ok_or(Counter::DropProbe)?.cast::<u8>();
    // SAFETY: all five end within the bytes that were just checked, and none overlaps another; see
    // `packet::read` about alignment.
    let (eth, outer, vxlan, inner, head) = unsafe {
        (
            &mut *start.cast::<EthHeader>(),
            &mut *start.add(L3).cast::<Outer>(),
            &*start.add(L3 + size_of::<Outer>()).cast::<VxlanHeader>(),
            &mut *start.add(ENCAP).cast::<EthHeader>(),
            &mut *start.add(ENCAP + EthHeader::LEN).cast::<ProbeHeader>(),
        )
    };
    let sender = *get!(VTEPS, &addr::wide(outer.ip.src)).ok_or(Counter::DropTunnelSource)?;
    probe::check(vxlan, inner, &outer.udp, head, own, sender)?;
    // What changes places leaves the checksums as they are.
    (eth.dst, eth.src) = (eth.src, eth.dst);
    (inner.dst, inner.src) = (inner.src, inner.dst);
    (outer.udp.sport_be, outer.udp.dport_be) = (outer.udp.dport_be, outer.udp.sport_be);
    (outer.ip.src, outer.ip.dst) = (outer.ip.dst, outer.ip.src);
    (outer.ip.ttl, outer.ip.checksum) = probe::fresh(&outer.ip);
    head.kind = probe::REPLY;
    // The kernel knows whether UDP's checksum is still to be completed.
    let words = |kind| u64::from(u16::from_ne_bytes([probe::VERSION, kind]));
    let flags = u64::from(BPF_F_MARK_MANGLED_0) | 2;
    ctx.l4_csum_replace(L4 + 6, words(probe::REQUEST), words(probe::REPLY), flags)
        .map_err(|_| Counter::DropHelper)
}
