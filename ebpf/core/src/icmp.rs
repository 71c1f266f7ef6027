//! ICMP: echo replies and "fragmentation needed" in place, errors about translated flows.

use crate::{
    checksum,
    hash::Tuple,
    wire::{IcmpHeader, Ipv4Header, PROTOCOL_ICMP},
};

/// Echo reply.
pub const ECHO_REPLY: u8 = 0;
/// Destination unreachable.
pub const UNREACHABLE: u8 = 3;
/// Echo request.
pub const ECHO: u8 = 8;
/// Time exceeded.
pub const TIME_EXCEEDED: u8 = 11;
/// Parameter problem.
pub const PARAMETER_PROBLEM: u8 = 12;
/// Of [`UNREACHABLE`]: fragmentation needed, DF set (RFC 1191 section 4).
pub const FRAGMENTATION_NEEDED: u8 = 4;

/// How many bytes of the packet an error quotes: its IP header and 8 more (RFC 792).
pub const QUOTE: usize = 28;
/// Length of the IP packet of an error.
pub const ERROR_LEN: u16 = 20 + 8 + 28;

/// Whether it is an error about another packet.
#[inline(always)]
#[must_use]
pub const fn is_error(kind: u8) -> bool {
    matches!(kind, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM)
}

/// The checksum of the reply to an echo request: only the type changes.
#[inline(always)]
#[must_use]
pub const fn echo_reply_checksum(request: &IcmpHeader) -> u16 {
    let from = u16::from_ne_bytes([request.kind, request.code]);
    let to = u16::from_ne_bytes([ECHO_REPLY, request.code]);
    checksum::update16(request.checksum, from, to)
}

/// "Fragmentation needed" to the sender of a packet, whose first bytes are `quote`.
#[inline(always)]
#[must_use]
pub const fn too_big(
    source: u32,
    sender: u32,
    mtu: u16,
    quote: &[u32; QUOTE / 4],
) -> (Ipv4Header, IcmpHeader) {
    let mut ip = Ipv4Header {
        version_ihl: 0x45,
        // Precedence 6, as RFC 1812 section 4.3.2.5 asks of routers' errors.
        tos: 0xc0,
        total_len_be: ERROR_LEN.to_be(),
        id_be: 0,
        frag_be: 0,
        ttl: 64,
        protocol: PROTOCOL_ICMP,
        checksum: 0,
        src: source,
        dst: sender,
    };
    ip.checksum = checksum::ipv4(&ip);
    let mut icmp = IcmpHeader {
        kind: UNREACHABLE,
        code: FRAGMENTATION_NEEDED,
        checksum: 0,
        id_be: 0,
        value_be: mtu.to_be(),
    };
    icmp.checksum = checksum::icmp(&icmp, checksum::sum_words(quote));
    (ip, icmp)
}

/// The tuple of the packet that an error quotes.
#[inline(always)]
#[must_use]
pub const fn quoted(ip: &Ipv4Header, sport_be: u16, dport_be: u16) -> Tuple {
    Tuple { src: ip.src, dst: ip.dst, sport_be, dport_be, protocol: ip.protocol }
}

/// The tuple of the packet that would answer this one.
#[inline(always)]
#[must_use]
pub const fn reversed(tuple: &Tuple) -> Tuple {
    Tuple {
        src: tuple.dst,
        dst: tuple.src,
        sport_be: tuple.dport_be,
        dport_be: tuple.sport_be,
        protocol: tuple.protocol,
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 over the bytes of a message that includes its checksum.
    fn verifies(bytes: &[u8]) -> bool {
        let sum: u32 = bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        (sum & 0xffff) + (sum >> 16) == 0xffff
    }

    proptest! {
        #[test]
        fn echo_replies_verify(id: u16, seq: u16, body: [u32; 6]) {
            let mut message =
                IcmpHeader { kind: ECHO, code: 0, checksum: 0, id_be: id, value_be: seq };
            let sum = checksum::sum_words(&body);
            message.checksum = checksum::icmp(&message, sum);
            message.checksum = echo_reply_checksum(&message);
            message.kind = ECHO_REPLY;
            let mut bytes: Vec<u8> = message.to_bytes().to_vec();
            body.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
            prop_assert!(verifies(&bytes));
        }

        #[test]
        fn errors_verify_and_say_the_mtu(source: u32, sender: u32, mtu: u16, quote: [u32; 7]) {
            let (ip, icmp) = too_big(source, sender, mtu, &quote);
            prop_assert!(ip.is_valid() && verifies(&ip.to_bytes()));
            prop_assert_eq!(u16::from_be(ip.total_len_be), ERROR_LEN);
            let mut bytes: Vec<u8> = icmp.to_bytes().to_vec();
            quote.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
            prop_assert!(verifies(&bytes));
            prop_assert_eq!((bytes[0], bytes[1]), (3, 4));
            prop_assert_eq!([bytes[6], bytes[7]], mtu.to_be_bytes());
            prop_assert_eq!(bytes.len() + 20, usize::from(ERROR_LEN));
        }

        #[test]
        fn reversing_twice_is_nothing(
            src: u32,
            dst: u32,
            sport_be: u16,
            dport_be: u16,
            protocol: u8,
        ) {
            let tuple = Tuple { src, dst, sport_be, dport_be, protocol };
            prop_assert_eq!(reversed(&reversed(&tuple)), tuple);
        }
    }
}
