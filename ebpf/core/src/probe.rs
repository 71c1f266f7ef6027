//! Probes of the data path (`mesh_dataplane::probe` has the format): which are answered, and how.

use mesh_ebpf_abi::Counter;

use crate::{
    checksum,
    mac::{self, Mac},
    wire::{EthHeader, Ipv4Header, ProbeHeader, UdpHeader, VxlanHeader},
};

/// IEEE 802 local experimental EtherType 1.
pub const ETHERTYPE: u16 = 0x88b5;
/// A request.
pub const REQUEST: u8 = 1;
/// A reply.
pub const REPLY: u8 = 2;
const MAGIC: [u16; 2] = [0x6d73_u16.to_be(), 0x6850_u16.to_be()];
/// The version.
pub const VERSION: u8 = 1;
/// UDP header and payload: VXLAN, Ethernet, and 32 bytes.
const UDP_LEN: u16 = 8 + 8 + 14 + 32;
const TTL: u8 = 64;

/// Bytes of a probe's headers, Ethernet to its own.
pub const HEADERS: usize = 14 + 20 + 8 + 8 + 14 + 8;

/// Whether this node answers: `own` is its number, `sender` the number of the node whose tunnel end
/// the outer source is.
///
/// # Errors
/// Why not.
#[inline(always)]
pub const fn check(
    vxlan: &VxlanHeader,
    inner: &EthHeader,
    udp: &UdpHeader,
    head: &ProbeHeader,
    own: u64,
    sender: u64,
) -> Result<(), Counter> {
    let [m0, m1] = head.magic;
    let [g0, g1] = MAGIC;
    let known = m0 == g0 && m1 == g1 && head.version == VERSION && head.kind == REQUEST;
    let network = match crate::tunnel::vni(vxlan) {
        Some(vni) => vni == 0,
        None => false,
    };
    let to = Mac::from_words(inner.dst).0 == Mac::new(mac::MESH_RETURN, own).0;
    let from = Mac::from_words(inner.src).0 == Mac::new(mac::MESH_RETURN, sender).0;
    let whole = udp.len_be == UDP_LEN.to_be();
    if known && network && to && from && whole { Ok(()) } else { Err(Counter::DropProbe) }
}

/// Time to live and header checksum of the answer, which is a fresh packet.
#[inline(always)]
#[must_use]
pub const fn fresh(ip: &Ipv4Header) -> (u8, u16) {
    let from = u16::from_ne_bytes([ip.ttl, ip.protocol]);
    let to = u16::from_ne_bytes([TTL, ip.protocol]);
    (TTL, checksum::update16(ip.checksum, from, to))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What `mesh_dataplane::probe` writes.
    fn request(to: u64, from: u64) -> std::vec::Vec<u8> {
        let mut out = std::vec![8, 0, 0, 0, 0, 0, 0, 0, 10];
        out.extend_from_slice(&to.to_be_bytes()[3..]);
        out.push(10);
        out.extend_from_slice(&from.to_be_bytes()[3..]);
        out.extend_from_slice(b"\x88\xb5mshP\x01\x01\0\0");
        out
    }

    fn judge(bytes: &[u8], own: u64, sender: u64) -> Result<(), Counter> {
        let udp = UdpHeader { len_be: 62_u16.to_be(), ..UdpHeader::default() };
        check(
            &VxlanHeader::from_bytes(bytes).unwrap(),
            &EthHeader::from_bytes(&bytes[8..]).unwrap(),
            &udp,
            &ProbeHeader::from_bytes(&bytes[22..]).unwrap(),
            own,
            sender,
        )
    }

    proptest! {
        #[test]
        fn only_a_request_of_the_sender_to_us_is_answered(own in 1u64..1 << 40,
                sender in 1u64..1 << 40, other in 1u64..1 << 40, at in 0usize..30, bit in 0u8..8) {
            let good = request(own, sender);
            prop_assert_eq!(judge(&good, own, sender), Ok(()));
            prop_assert_eq!(judge(&good, other, sender).is_ok(), other == own);
            prop_assert_eq!(judge(&good, own, other).is_ok(), other == sender);
            let mut bad = good;
            bad[at] ^= 1 << bit;
            // Reserved bits of VXLAN and of the probe are not looked at; the EtherType was.
            let ignored = (at < 4 && (at, bit) != (0, 3)) || [7, 20, 21, 28, 29].contains(&at);
            prop_assert_eq!(judge(&bad, own, sender).is_ok(), ignored);
        }

        #[test]
        fn the_answer_is_a_good_header(bytes: [u8; 20]) {
            let mut ip = Ipv4Header::from_bytes(&bytes).unwrap();
            ip.checksum = checksum::ipv4(&ip);
            (ip.ttl, ip.checksum) = fresh(&ip);
            prop_assert_eq!(ip.ttl, 64);
            // Equal up to the two zeros of one's complement.
            prop_assert_eq!(ip.checksum % 0xffff, checksum::ipv4(&ip) % 0xffff);
        }
    }
}
