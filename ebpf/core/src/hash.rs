//! The hash of a flow: the same on every node, so that a client whose packets move to another
//! ingress node keeps its backend.

/// Addresses and ports of a packet; IPv4 for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// Source, network order.
    pub src: u32,
    /// Destination, network order.
    pub dst: u32,
    /// Network order; 0 without ports.
    pub sport_be: u16,
    /// Network order; 0 without ports.
    pub dport_be: u16,
    /// IP protocol number.
    pub protocol: u8,
}

// 2^64 / golden ratio for the first round; then the finaliser of MurmurHash3 (fmix64).
const K0: u64 = 0x9e37_79b9_7f4a_7c15;
const K1: u64 = 0xff51_afd7_ed55_8ccd;
const K2: u64 = 0xc4ce_b9fe_1a85_ec53;

/// The flow's hash. Final: nodes of different versions balance one cluster.
#[inline(always)]
#[must_use]
pub const fn flow(tuple: &Tuple) -> u32 {
    let addresses = (u32::from_be(tuple.src) as u64) << 32 | u32::from_be(tuple.dst) as u64;
    // What varies most in the lowest bits: a product carries upwards only.
    let ports = (tuple.protocol as u64) << 32
        | (u16::from_be(tuple.dport_be) as u64) << 16
        | u16::from_be(tuple.sport_be) as u64;
    let mut h = addresses.wrapping_mul(K0);
    h ^= h >> 32;
    h = (h ^ ports).wrapping_mul(K1);
    h ^= h >> 33;
    h = h.wrapping_mul(K2);
    (h >> 32) as u32
}

/// A slot of a table of `len` entries, evenly (Lemire's multiply-shift); 0 if it is empty.
#[inline(always)]
#[must_use]
pub const fn slot(hash: u32, len: u32) -> u32 {
    ((hash as u64).wrapping_mul(len as u64) >> 32) as u32
}

/// The outer source port: entropy for ECMP and RSS, in the dynamic range (RFC 7348 section 5).
#[inline(always)]
#[must_use]
pub const fn source_port(hash: u32) -> u16 {
    49152 | (hash & 0x3fff) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuple(host: u32, port: u16) -> Tuple {
        Tuple {
            src: (0x0a00_0000 + host).to_be(),
            dst: 0x0a00_0002_u32.to_be(),
            sport_be: port.to_be(),
            dport_be: 80_u16.to_be(),
            protocol: 6,
        }
    }

    #[test]
    fn the_hash_is_fixed() {
        assert_eq!(flow(&tuple(5, 40_000)), GOLDEN);
    }
    const GOLDEN: u32 = 3_754_163_246;

    /// Consecutive ports and hosts, as clients use them, fill a small table evenly: chi-square of
    /// 64 slots stays below the 0.999 quantile of 63 degrees of freedom (103.4) in most trials.
    #[test]
    fn consecutive_flows_spread_evenly() {
        let mut bad = 0;
        for host in 0..64 {
            let mut slots = [0f64; 64];
            for port in 32_768..32_768 + 6400 {
                slots[slot(flow(&tuple(host, port)), 64) as usize] += 1.0;
            }
            let chi: f64 = slots.iter().map(|n| (n - 100.0) * (n - 100.0) / 100.0).sum();
            bad += u32::from(chi > 103.4);
        }
        assert!(bad <= 2, "{bad} of 64 hosts spread badly");
    }

    proptest! {
        #[test]
        fn slots_are_inside(hash: u32, len in 1u32..) {
            prop_assert!(slot(hash, len) < len);
            prop_assert!(source_port(hash) >= 49_152);
        }
    }
}
