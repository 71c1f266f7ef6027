//! `task_lo`: port 53 of 127.0.0.11 to where the resolver listens, and back.

use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::RESOLVER_PORT;
use mesh_ebpf_core::wire::{EthHeader, PROTOCOL_TCP, PROTOCOL_UDP};

use crate::{
    packet::{L3, PASS, Verdict, is_ipv4, parse, parse_len, pull, read},
    translate::{self, End},
};

/// The resolver's address in every task.
const RESOLVER: u32 = u32::from_be_bytes([127, 0, 0, 11]).to_be();
const DNS: u16 = 53;

pub fn run(ctx: &TcContext) -> Verdict {
    pull(ctx, parse_len(L3));
    let Some(eth) = read::<EthHeader>(ctx, 0) else { return Ok(PASS) };
    if !is_ipv4(&eth) {
        return Ok(PASS);
    }
    // What is not understood is the task's own business: it never leaves its loopback.
    let Ok(mut ip) = parse(ctx, L3) else { return Ok(PASS) };
    if !ip.has_l4 || !matches!(ip.tuple.protocol, PROTOCOL_TCP | PROTOCOL_UDP) {
        return Ok(PASS);
    }
    if ip.tuple.dst == RESOLVER && ip.tuple.dport_be == DNS.to_be() {
        translate::port(ctx, &mut ip, End::Destination, RESOLVER_PORT.to_be())?;
    } else if ip.tuple.src == RESOLVER && ip.tuple.sport_be == RESOLVER_PORT.to_be() {
        translate::port(ctx, &mut ip, End::Source, DNS.to_be())?;
    }
    Ok(PASS)
}
