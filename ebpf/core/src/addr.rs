//! Addresses as map keys hold them: 16 bytes, IPv4 mapped (RFC 4291 section 2.5.5.2). An IPv4
//! address from a packet is a `u32` in network order.

use mesh_ebpf_abi::{Addr, Subnet};

/// Widens an IPv4 address.
#[inline(always)]
#[must_use]
pub const fn wide(v4: u32) -> Addr {
    // As one number, in memory order: an array of bytes becomes a call to `memset` for its zeros.
    let low = u32::from_be(v4) as u128;
    (0xffff << 32 | low).to_be_bytes()
}

/// The four words of an address. Written out so that no compare becomes a call to `memcmp`.
#[inline(always)]
const fn words(addr: &Addr) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *addr;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
        u32::from_ne_bytes([m, n, o, p]),
    ]
}

const MAPPED: u32 = 0xffff_u32.to_be();

/// Whether `addr` is this IPv4 address.
#[inline(always)]
#[must_use]
pub const fn is_v4(addr: &Addr, v4: u32) -> bool {
    let [a, b, c, d] = words(addr);
    a | b == 0 && c == MAPPED && d == v4
}

/// The IPv4 address in `addr`; meaningless if it is IPv6.
#[inline(always)]
#[must_use]
pub const fn low(addr: &Addr) -> u32 {
    let [_, _, _, d] = words(addr);
    d
}

/// A copy. In BPF, of an IPv4 address: copies of bytes between places that LLVM cannot tell apart
/// become calls to `memmove`, a loop in the packet path that the verifier walks step by step.
#[inline(always)]
#[must_use]
pub const fn copy(addr: &Addr) -> Addr {
    if cfg!(target_arch = "bpf") { wide(low(addr)) } else { *addr }
}

/// Whether an IPv4 address is in a range.
#[inline(always)]
#[must_use]
pub const fn contains(subnet: &Subnet, v4: u32) -> bool {
    let mask = low(&subnet.mask);
    mask != 0 && v4 & mask == low(&subnet.addr) & mask
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn wide_is_the_mapped_address(octets: [u8; 4]) {
            let v4 = u32::from_ne_bytes(octets);
            prop_assert_eq!(wide(v4), Ipv4Addr::from(octets).to_ipv6_mapped().octets());
            prop_assert_eq!(low(&wide(v4)), v4);
        }

        #[test]
        fn equality_is_that_of_the_std_types(addr: [u8; 16], octets: [u8; 4], mapped: bool) {
            let v4 = u32::from_ne_bytes(octets);
            let addr = if mapped { wide(v4) } else { addr };
            let expected = Ipv6Addr::from(addr).to_ipv4_mapped() == Some(Ipv4Addr::from(octets));
            prop_assert_eq!(is_v4(&addr, v4), expected);
        }

        #[test]
        fn ranges_match_prefixes(base: u32, prefix in 0u32..=32, probe: u32, inside: bool) {
            let mask = if prefix == 0 { 0 } else { u32::MAX << (32 - prefix) };
            let probe = if inside { base & mask | probe & !mask } else { probe };
            let subnet = Subnet { addr: wide(base.to_be()), mask: wide(mask.to_be()) };
            prop_assert_eq!(
                contains(&subnet, probe.to_be()),
                prefix != 0 && probe & mask == base & mask
            );
        }
    }
}
