//! The BPF programs of the data plane: shells around `mesh-ebpf-core`. See `../README.md` for what
//! each does with a packet, look-up by look-up.
//!
//! They keep to what Linux 6.1 has: no kfuncs, no later helpers. Loops are bounded, calls are few.

#![no_std]
#![no_main]

mod flows;
mod from_task;
mod maps;
mod mesh;
mod packet;
mod probe;
mod quote;
mod task_lo;
mod translate;
mod tunnel;
mod vip;

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};

use crate::{
    maps::{config, count},
    packet::{TUNNEL, Verdict, Way, encapsulate},
};

/// Goes the way that was decided, and counts the drop if it is one.
macro_rules! finish {
    ($ctx:expr, $decide:path) => {{
        #[inline(never)]
        fn decide(skb: *mut __sk_buff, way: &mut MaybeUninit<Way>) -> u32 {
            // SAFETY: only integers, written before `TUNNEL` is given and read after that alone.
            let way = unsafe { way.assume_init_mut() };
            encode($decide(&TcContext::new(skb), way))
        }
        let mut way = MaybeUninit::uninit();
        let code = decide($ctx.skb.skb, &mut way);
        let result = if code == TUNNEL as u32 {
            // SAFETY: as just said.
            leave($ctx.skb.skb, unsafe { way.assume_init_ref() })
        } else {
            code
        };
        if result >= DROP {
            count(result - DROP);
            return TC_ACT_SHOT;
        }
        result as i32
    }};
}

/// Into the tunnel.
#[inline(never)]
fn leave(skb: *mut __sk_buff, way: &Way) -> u32 {
    encode(config().and_then(|config| encapsulate(&TcContext::new(skb), config, way)))
}

/// A verdict in one register: BPF functions give no more.
#[inline(always)]
fn encode(verdict: Verdict) -> u32 {
    match verdict {
        Ok(action) => action as u32,
        Err(reason) => DROP + reason as u32,
    }
}
const DROP: u32 = 0x1000;

/// Ingress of a task veth's host side.
#[classifier]
pub fn from_task(ctx: TcContext) -> i32 {
    finish!(ctx, from_task::run)
}

/// Ingress of the underlay link.
#[classifier]
pub fn from_uplink(ctx: TcContext) -> i32 {
    finish!(ctx, tunnel::from_uplink)
}

/// Ingress of the VXLAN device.
#[classifier]
pub fn from_vxlan(ctx: TcContext) -> i32 {
    finish!(ctx, tunnel::from_vxlan)
}

/// Egress of a task's `lo`.
#[classifier]
pub fn task_lo(ctx: TcContext) -> i32 {
    let code = encode(task_lo::run(&ctx));
    if code >= DROP {
        count(code - DROP);
        return TC_ACT_SHOT;
    }
    code as i32
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
