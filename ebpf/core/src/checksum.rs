//! The internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are of 16-bit words as they lie in memory: one's complement sums do not mind byte order.

use crate::wire::{IcmpHeader, Ipv4Header};

/// Folds a sum to 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u32) -> u16 {
    // Twice: the first may carry once more.
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    (sum & 0xffff).wrapping_add(sum >> 16) as u16
}

/// The sum of a 32-bit word's halves.
#[inline(always)]
#[must_use]
pub const fn sum32(word: u32) -> u32 {
    (word & 0xffff).wrapping_add(word >> 16)
}

/// The checksum after one 32-bit word changed: `HC' = ~(~HC + ~m + m')` (RFC 1624, equation 3).
#[inline(always)]
#[must_use]
pub const fn update32(checksum: u16, from: u32, to: u32) -> u16 {
    let sum = (!checksum) as u32;
    !fold(sum.wrapping_add(sum32(!from)).wrapping_add(sum32(to)))
}

/// The checksum after one 16-bit word changed.
#[inline(always)]
#[must_use]
pub const fn update16(checksum: u16, from: u16, to: u16) -> u16 {
    let sum = (!checksum) as u32;
    !fold(sum.wrapping_add((!from) as u32).wrapping_add(to as u32))
}

/// The checksum of an IPv4 header without options; its own field does not count.
#[inline(always)]
#[must_use]
pub const fn ipv4(header: &Ipv4Header) -> u16 {
    let sum = (u16::from_ne_bytes([header.version_ihl, header.tos]) as u32)
        .wrapping_add(header.total_len_be as u32)
        .wrapping_add(header.id_be as u32)
        .wrapping_add(header.frag_be as u32)
        .wrapping_add(u16::from_ne_bytes([header.ttl, header.protocol]) as u32)
        .wrapping_add(sum32(header.src))
        .wrapping_add(sum32(header.dst));
    !fold(sum)
}

/// The checksum of an ICMP message whose body has the given sum; its own field does not count.
#[inline(always)]
#[must_use]
pub const fn icmp(header: &IcmpHeader, body_sum: u32) -> u16 {
    let sum = (u16::from_ne_bytes([header.kind, header.code]) as u32)
        .wrapping_add(header.id_be as u32)
        .wrapping_add(header.value_be as u32)
        .wrapping_add(body_sum);
    !fold(sum)
}

/// The sum of an array of 32-bit words; `N` of at most 32,768 cannot overflow.
#[inline(always)]
#[must_use]
pub const fn sum_words<const N: usize>(words: &[u32; N]) -> u32 {
    let mut sum = 0u32;
    let mut rest: &[u32] = words;
    while let [word, tail @ ..] = rest {
        sum = sum.wrapping_add(sum32(*word));
        rest = tail;
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071, done the slow way.
    fn model(bytes: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    /// 0 and 0xffff are the same number in one's complement.
    fn same(a: u16, b: u16) -> bool {
        a == b || a ^ b == 0xffff && (a == 0 || b == 0)
    }

    proptest! {
        #[test]
        fn incremental_equals_recomputed(mut bytes in proptest::collection::vec(any::<u8>(), 8..64),
                                         at in 0usize..15, to: u32) {
            bytes.truncate(bytes.len() & !3);
            let at = at * 4 % bytes.len();
            let before = model(&bytes);
            let from = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            bytes[at..at + 4].copy_from_slice(&to.to_ne_bytes());
            let updated = update32(before, from, to);
            // The checksum over data with its complement verifies to zero, whichever zero it is.
            prop_assert!(same(updated, model(&bytes)), "{updated:04x} {:04x}", model(&bytes));

            let from = u16::from_ne_bytes([bytes[0], bytes[1]]);
            let to = (to >> 8) as u16;
            let before = model(&bytes);
            bytes[..2].copy_from_slice(&to.to_ne_bytes());
            prop_assert!(same(update16(before, from, to), model(&bytes)));
        }

        #[test]
        fn ipv4_equals_model(mut bytes: [u8; 20]) {
            let header = Ipv4Header::from_bytes(&bytes).unwrap();
            bytes[10] = 0;
            bytes[11] = 0;
            prop_assert_eq!(ipv4(&header), model(&bytes));
        }

        #[test]
        fn icmp_equals_model(mut bytes: [u8; 36]) {
            let header = IcmpHeader::from_bytes(&bytes).unwrap();
            bytes[2] = 0;
            bytes[3] = 0;
            let mut body = [0u32; 7];
            for (word, chunk) in body.iter_mut().zip(bytes[8..].chunks(4)) {
                *word = u32::from_ne_bytes(chunk.try_into().unwrap());
            }
            prop_assert_eq!(icmp(&header, sum_words(&body)), model(&bytes));
        }
    }
}
