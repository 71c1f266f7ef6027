//! Packet logic of the data plane, pure: what the BPF programs in `ebpf/prog` decide and write,
//! as functions over header values. It compiles for `bpfel-unknown-none` and natively, where
//! property tests hold every function against a plain model.
//!
//! Nothing here touches maps, clocks or packet memory, allocates, indexes or panics. Headers are
//! plain structs in network order ([`wire`]); the programs overlay them on packet memory, tests
//! build them from bytes.

#![no_std]
#![forbid(unsafe_code)]
// Tests may: there a panic is a failure, here it would be a program that does not load.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::arithmetic_side_effects
    )
)]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod arp;
pub mod checksum;
pub mod flow;
pub mod guard;
pub mod hash;
pub mod icmp;
pub mod mac;
pub mod probe;
pub mod tunnel;
pub mod wire;
