//! The headers that we read and write, laid out as on the wire.
//!
//! Fields hold the bytes as they are in the packet: those named `*_be`, and addresses, are in
//! network order. Checksums need no order (RFC 1071 section 2 B).

/// Conversion of one field from and to its bytes.
trait Field: Sized {
    fn get(bytes: &mut &[u8]) -> Option<Self>;
    fn put(&self, out: &mut &mut [u8]);
}

macro_rules! integer_fields {
    ($($ty:ty),*) => {$(
        impl Field for $ty {
            fn get(bytes: &mut &[u8]) -> Option<Self> {
                let (head, rest) = bytes.split_first_chunk()?;
                *bytes = rest;
                Some(Self::from_ne_bytes(*head))
            }
            fn put(&self, out: &mut &mut [u8]) {
                if let Some((head, rest)) = core::mem::take(out).split_first_chunk_mut() {
                    *head = self.to_ne_bytes();
                    *out = rest;
                }
            }
        }
    )*};
}
integer_fields!(u8, u16, u32);

impl<const N: usize> Field for [u16; N] {
    fn get(bytes: &mut &[u8]) -> Option<Self> {
        let mut out = [0; N];
        for word in &mut out {
            *word = u16::get(bytes)?;
        }
        Some(out)
    }
    fn put(&self, out: &mut &mut [u8]) {
        for word in self {
            word.put(out);
        }
    }
}

macro_rules! headers {
    ($($(#[$doc:meta])* $name:ident, $len:literal {
        $($(#[$field_doc:meta])* $field:ident: $ty:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty,)* }

        impl $name {
            /// Its length on the wire, bytes.
            pub const LEN: usize = $len;

            /// Reads it from the front of `bytes`; `None` when they are too few.
            #[must_use]
            pub fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
                Some(Self { $($field: Field::get(&mut bytes)?,)* })
            }

            /// Its bytes.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; $len] {
                let mut out = [0; $len];
                let mut rest: &mut [u8] = &mut out;
                $(self.$field.put(&mut rest);)*
                out
            }
        }
        const _: () = assert!(size_of::<$name>() == $len);
    )*};
}

headers! {
    /// Ethernet (IEEE 802.3).
    EthHeader, 14 {
        /// Destination: see [`crate::mac`].
        dst: [u16; 3],
        /// Source.
        src: [u16; 3],
        /// What follows: `ETHERTYPE_*`.
        ethertype_be: u16,
    }
    /// IPv4 without options (RFC 791 section 3.1).
    Ipv4Header, 20 {
        /// Version, and header length in words of 4 bytes.
        version_ihl: u8,
        /// DSCP and ECN.
        tos: u8,
        /// Header and payload, bytes.
        total_len_be: u16,
        /// Identification.
        id_be: u16,
        /// Flags and fragment offset.
        frag_be: u16,
        /// Time to live.
        ttl: u8,
        /// What follows: `PROTOCOL_*`.
        protocol: u8,
        /// Header checksum.
        checksum: u16,
        /// Source.
        src: u32,
        /// Destination.
        dst: u32,
    }
    /// IPv6 (RFC 8200 section 3).
    Ipv6Header, 40 {
        /// Version, traffic class, flow label.
        version_class_flow_be: u32,
        /// Bytes that follow.
        payload_len_be: u16,
        /// What follows.
        next_header: u8,
        /// Hop limit.
        hop_limit: u8,
        /// Source.
        src: [u16; 8],
        /// Destination.
        dst: [u16; 8],
    }
    /// The ports that begin TCP, UDP and SCTP.
    Ports, 4 {
        /// Source.
        sport_be: u16,
        /// Destination.
        dport_be: u16,
    }
    /// UDP (RFC 768).
    UdpHeader, 8 {
        /// Source port.
        sport_be: u16,
        /// Destination port.
        dport_be: u16,
        /// Header and payload, bytes.
        len_be: u16,
        /// Checksum; 0: none (IPv4 only).
        checksum: u16,
    }
    /// TCP without options (RFC 9293 section 3.1).
    TcpHeader, 20 {
        /// Source port.
        sport_be: u16,
        /// Destination port.
        dport_be: u16,
        /// Sequence number.
        seq_be: u32,
        /// Acknowledgement number.
        ack_be: u32,
        /// Header length in words of 4 bytes, in the upper half.
        data_offset: u8,
        /// `TCP_*`.
        flags: u8,
        /// Window.
        window_be: u16,
        /// Checksum.
        checksum: u16,
        /// Urgent pointer.
        urgent_be: u16,
    }
    /// ICMP (RFC 792) and the word that follows its checksum.
    IcmpHeader, 8 {
        /// `ICMP_*`.
        kind: u8,
        /// What exactly.
        code: u8,
        /// Over the whole message.
        checksum: u16,
        /// Echo: the identifier. Errors: unused.
        id_be: u16,
        /// Echo: the sequence number. Fragmentation needed: the MTU (RFC 1191 section 4).
        value_be: u16,
    }
    /// VXLAN (RFC 7348 section 5).
    VxlanHeader, 8 {
        /// The I flag and reserved bits.
        flags_be: u32,
        /// The network, in the upper 24 bits.
        vni_be: u32,
    }
    /// What begins a probe of the data path: see [`crate::probe`].
    ProbeHeader, 8 {
        /// `mshP`.
        magic: [u16; 2],
        /// 1.
        version: u8,
        /// Request or reply.
        kind: u8,
        /// Sent as zero.
        reserved: u16,
    }
    /// ARP for IPv4 over Ethernet (RFC 826).
    ArpPacket, 28 {
        /// Hardware: 1.
        hardware_be: u16,
        /// Protocol: that of IPv4.
        protocol_be: u16,
        /// Length of a hardware address: 6.
        hardware_len: u8,
        /// Length of a protocol address: 4.
        protocol_len: u8,
        /// 1: request, 2: reply.
        operation_be: u16,
        /// The sender's MAC.
        sender_mac: [u16; 3],
        /// The sender's address.
        sender_addr: [u16; 2],
        /// The MAC that is asked for.
        target_mac: [u16; 3],
        /// The address that is asked for.
        target_addr: [u16; 2],
    }
}

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// IP protocol number of ICMP.
pub const PROTOCOL_ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;

/// TCP flag: no more data from the sender.
pub const TCP_FIN: u8 = 0x01;
/// TCP flag: synchronise sequence numbers.
pub const TCP_SYN: u8 = 0x02;
/// TCP flag: reset.
pub const TCP_RST: u8 = 0x04;
/// TCP flag: the acknowledgement number is valid.
pub const TCP_ACK: u8 = 0x10;

/// IPv4: don't fragment.
pub const IPV4_DF: u16 = 0x4000;
/// IPv4: more fragments, or the offset.
const IPV4_FRAGMENT: u16 = 0x3fff;

impl Ipv4Header {
    /// Whether version, header length and total length make sense together.
    #[inline(always)]
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.version_ihl >= 0x45
            && self.version_ihl <= 0x4f
            && u16::from_be(self.total_len_be) >= self.header_len()
    }

    /// Whether it carries options: then what follows is not at a fixed place.
    #[inline(always)]
    #[must_use]
    pub const fn has_options(&self) -> bool {
        self.version_ihl != 0x45
    }

    /// Header length, bytes.
    #[inline(always)]
    #[must_use]
    pub const fn header_len(&self) -> u16 {
        // At most 15 words of 4 bytes.
        ((self.version_ihl & 0x0f) as u16).wrapping_mul(4)
    }

    /// Whether it is a fragment, the first included.
    #[inline(always)]
    #[must_use]
    pub const fn is_fragment(&self) -> bool {
        self.frag_be & IPV4_FRAGMENT.to_be() != 0
    }

    /// Whether the sender wants an error instead of fragmentation.
    #[inline(always)]
    #[must_use]
    pub const fn dont_fragment(&self) -> bool {
        self.frag_be & IPV4_DF.to_be() != 0
    }
}

impl Ipv6Header {
    /// Whether its version is 6.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        u32::from_be(self.version_class_flow_be) >> 28 == 6
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Reading and writing are inverse, and short input is refused, whatever the bytes.
        #[test]
        fn headers_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            macro_rules! check {
                ($($header:ty),*) => {$(
                    match <$header>::from_bytes(&bytes) {
                        Some(header) => prop_assert_eq!(
                            Some(&header.to_bytes()[..]), bytes.get(..<$header>::LEN)),
                        None => prop_assert!(bytes.len() < <$header>::LEN),
                    }
                )*};
            }
            check!(EthHeader, Ipv4Header, Ipv6Header, Ports, UdpHeader, TcpHeader, IcmpHeader,
                VxlanHeader, ProbeHeader, ArpPacket);
        }

        #[test]
        fn ipv4_predicates_match_rfc_791(bytes: [u8; 20]) {
            let header = Ipv4Header::from_bytes(&bytes).unwrap();
            let words = bytes[0] & 15;
            let total = u16::from_be_bytes([bytes[2], bytes[3]]);
            prop_assert_eq!(
                header.is_valid(),
                bytes[0] >> 4 == 4 && words >= 5 && total >= u16::from(words) * 4
            );
            prop_assert_eq!(header.dont_fragment(), bytes[6] & 0x40 != 0);
            let offset = u16::from_be_bytes([bytes[6] & 0x1f, bytes[7]]);
            prop_assert_eq!(header.is_fragment(), bytes[6] & 0x20 != 0 || offset != 0);
        }
    }

    #[test]
    fn ipv6_version() {
        let mut bytes = [0; 40];
        bytes[0] = 0x60;
        assert!(Ipv6Header::from_bytes(&bytes).unwrap().is_valid());
        bytes[0] = 0x45;
        assert!(!Ipv6Header::from_bytes(&bytes).unwrap().is_valid());
    }
}
