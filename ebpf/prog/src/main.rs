//! The BPF programs of the data plane: shells around `mesh-ebpf-core`. See `../README.md` for what
//! each does with a packet, look-up by look-up.
//!
//! They keep to what Linux 6.1 has: no kfuncs, no later helpers. Loops are bounded, calls are few.

#![no_std]
#![no_main]

mod from_task;
mod maps;
mod packet;
mod tunnel;

use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    macros::classifier,
    programs::TcContext,
};

use crate::{maps::count, packet::Verdict};

/// Counts the drop if it is one.
#[inline(always)]
fn finish(verdict: Verdict) -> i32 {
    verdict.unwrap_or_else(|reason| {
        count(reason);
        TC_ACT_SHOT
    })
}

/// Ingress of a task veth's host side.
#[classifier]
pub fn from_task(ctx: TcContext) -> i32 {
    finish(from_task::run(&ctx))
}

/// Ingress of the underlay link.
#[classifier]
pub fn from_uplink(ctx: TcContext) -> i32 {
    finish(tunnel::from_uplink(&ctx))
}

/// Ingress of the VXLAN device.
#[classifier]
pub fn from_vxlan(ctx: TcContext) -> i32 {
    finish(tunnel::from_vxlan(&ctx))
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // No code path panics; if one did, the verifier would reject this loop.
    loop {}
}

/// The kernel checks this for some helpers; ours need none of those.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
