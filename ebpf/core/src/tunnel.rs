//! VXLAN headers (RFC 7348 section 5), written and checked.

use crate::{
    checksum, hash,
    mac::Mac,
    wire::{ETHERTYPE_IPV4, EthHeader, IPV4_DF, Ipv4Header, PROTOCOL_UDP, UdpHeader, VxlanHeader},
};

/// The I flag: the VNI is valid. All other bits are reserved: sent as zero, ignored on receipt.
const FLAG_VNI: u32 = 0x0800_0000;
/// The outer time to live: that of a fresh packet, as the kernel's VXLAN device sets it.
const TTL: u8 = 64;
/// What UDP, VXLAN and the inner Ethernet add to an inner IP packet.
const INNER: u16 = 8 + 8 + 14;

/// What the outer headers need to know.
#[derive(Debug, Clone, Copy)]
pub struct Encap {
    /// Own VTEP, network order.
    pub src: u32,
    /// The other VTEP, network order.
    pub dst: u32,
    /// The network.
    pub vni: u32,
    /// VXLAN's port, network order.
    pub port_be: u16,
    /// The flow's hash.
    pub hash: u32,
    /// The inner packet's length, IP header and all (of a GSO packet: before segmentation).
    pub inner_len: u16,
    /// The inner packet's DSCP and ECN; ECN is copied (RFC 6040 section 4.1).
    pub inner_tos: u8,
}

/// The outer IP, UDP and VXLAN headers.
///
/// DF is set: the overlay's MTU is derived from the underlay's, so a packet that does not fit is an
/// error to be seen, not to be fragmented. With DF the IP id may be 0 (RFC 6864 section 4.1). The
/// UDP checksum is 0, as RFC 7348 recommends for IPv4.
#[inline(always)]
#[must_use]
pub const fn outer(encap: &Encap) -> (Ipv4Header, UdpHeader, VxlanHeader) {
    let udp_len = encap.inner_len.saturating_add(INNER);
    let mut ip = Ipv4Header {
        version_ihl: 0x45,
        tos: encap.inner_tos & ECN_MASK,
        total_len_be: udp_len.saturating_add(20).to_be(),
        id_be: 0,
        frag_be: IPV4_DF.to_be(),
        ttl: TTL,
        protocol: PROTOCOL_UDP,
        checksum: 0,
        src: encap.src,
        dst: encap.dst,
    };
    ip.checksum = checksum::ipv4(&ip);
    let udp = UdpHeader {
        sport_be: hash::source_port(encap.hash).to_be(),
        dport_be: encap.port_be,
        len_be: udp_len.to_be(),
        checksum: 0,
    };
    let vxlan = VxlanHeader { flags_be: FLAG_VNI.to_be(), vni_be: (encap.vni << 8).to_be() };
    (ip, udp, vxlan)
}

/// The inner Ethernet header of an IPv4 packet.
#[inline(always)]
#[must_use]
pub const fn ethernet(dst: Mac, src: Mac) -> EthHeader {
    EthHeader { dst: dst.words(), src: src.words(), ethertype_be: ETHERTYPE_IPV4.to_be() }
}

/// The VNI of a VXLAN header; `None` without the I flag.
#[inline(always)]
#[must_use]
pub const fn vni(header: &VxlanHeader) -> Option<u32> {
    if header.flags_be & FLAG_VNI.to_be() == 0 {
        return None;
    }
    Some(u32::from_be(header.vni_be) >> 8)
}

const ECN_MASK: u8 = 0b11;
const ECN_CE: u8 = 0b11;

/// The inner header after decapsulation, where it must change: congestion that the underlay marked
/// is passed on to a transport that understands it (RFC 6040 section 4.2).
#[inline(always)]
#[must_use]
pub const fn congestion(outer_tos: u8, inner: &Ipv4Header) -> Option<(u8, u16)> {
    let ecn = inner.tos & ECN_MASK;
    if outer_tos & ECN_MASK != ECN_CE || ecn == 0 || ecn == ECN_CE {
        return None;
    }
    let tos = inner.tos | ECN_CE;
    let from = u16::from_ne_bytes([inner.version_ihl, inner.tos]);
    let to = u16::from_ne_bytes([inner.version_ihl, tos]);
    Some((tos, checksum::update16(inner.checksum, from, to)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(src: u32, dst: u32, network in 0u32..1 << 24, hash: u32,
                                   inner_len in 20u16..65_000, inner_tos: u8) {
            let port_be = 4789_u16.to_be();
            let (ip, udp, vxlan) =
                outer(&Encap { src, dst, vni: network, port_be, hash, inner_len, inner_tos });
            prop_assert_eq!(vni(&vxlan), Some(network));
            prop_assert!(ip.is_valid() && ip.dont_fragment() && !ip.is_fragment());
            prop_assert_eq!(ip.checksum, checksum::ipv4(&ip));
            prop_assert_eq!(ip.tos, inner_tos & 3);
            let len = u16::from_be(ip.total_len_be);
            prop_assert_eq!(u32::from(len), u32::from(inner_len) + 50);
            prop_assert_eq!(u16::from_be(udp.len_be), len - 20);
            // The reserved bytes are zero.
            let bytes = vxlan.to_bytes();
            prop_assert_eq!((&bytes[..4], bytes[7]), (&[8, 0, 0, 0][..], 0));
        }

        #[test]
        fn the_flag_is_required(bytes: [u8; 8]) {
            let header = VxlanHeader::from_bytes(&bytes).unwrap();
            let expected = u32::from_be_bytes([0, bytes[4], bytes[5], bytes[6]]);
            prop_assert_eq!(vni(&header), (bytes[0] & 8 != 0).then_some(expected));
        }

        #[test]
        fn congestion_marks_survive(bytes: [u8; 20], outer_tos: u8) {
            let mut inner = Ipv4Header::from_bytes(&bytes).unwrap();
            inner.checksum = checksum::ipv4(&inner);
            let before = inner.tos;
            if let Some((tos, sum)) = congestion(outer_tos, &inner) {
                inner.tos = tos;
                inner.checksum = sum;
            }
            let marked = outer_tos & 3 == 3 && before & 3 != 0;
            prop_assert_eq!(inner.tos, if marked { before | 3 } else { before });
            // Equal up to the two zeros of one's complement.
            prop_assert_eq!(inner.checksum % 0xffff, checksum::ipv4(&inner) % 0xffff);
        }
    }
}
