//! MAC addresses as wire format: the first byte is the kind, the other 40 bits name an endpoint or
//! a node (`mesh-types`, module `mac`, is the same for user space).

/// The 48 bits of an address, most significant byte first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub u64);

const ID_BITS: u32 = 40;
const ID_MASK: u64 = (1 << ID_BITS) - 1;

/// Kind of an endpoint's address; with id 0, of the gateway's.
pub const ENDPOINT: u8 = 0x02;
/// Kind of mesh forward: ingress node to the backend's `gw0` endpoint.
pub const MESH_FORWARD: u8 = 0x06;
/// Kind of mesh return: the backend's node to the ingress node.
pub const MESH_RETURN: u8 = 0x0a;

impl Mac {
    /// The gateway's, the same everywhere.
    pub const GATEWAY: Self = Self::new(ENDPOINT, 0);

    /// An address of ours; of `id` the low 40 bits count.
    #[inline(always)]
    #[must_use]
    pub const fn new(kind: u8, id: u64) -> Self {
        Self((kind as u64) << ID_BITS | id & ID_MASK)
    }

    /// From a header's words.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u16; 3]) -> Self {
        let [a, b, c] = words;
        Self(
            (u16::from_be(a) as u64) << 32
                | (u16::from_be(b) as u64) << 16
                | u16::from_be(c) as u64,
        )
    }

    /// For a header.
    #[inline(always)]
    #[must_use]
    pub const fn words(self) -> [u16; 3] {
        [((self.0 >> 32) as u16).to_be(), ((self.0 >> 16) as u16).to_be(), (self.0 as u16).to_be()]
    }

    /// The first byte.
    #[inline(always)]
    #[must_use]
    pub const fn kind(self) -> u8 {
        (self.0 >> ID_BITS) as u8
    }

    /// The other 40 bits.
    #[inline(always)]
    #[must_use]
    pub const fn id(self) -> u64 {
        self.0 & ID_MASK
    }

    /// Broadcast or multicast (IEEE 802-2014, 8.2).
    #[inline(always)]
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.kind() & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::EthHeader;

    #[test]
    fn wire_format_is_fixed() {
        let header = EthHeader {
            dst: Mac::new(MESH_FORWARD, 0x01_0203_0405).words(),
            src: Mac::GATEWAY.words(),
            ethertype_be: 0x0800_u16.to_be(),
        };
        assert_eq!(header.to_bytes(), [6, 1, 2, 3, 4, 5, 2, 0, 0, 0, 0, 0, 8, 0]);
    }

    proptest! {
        #[test]
        fn words_round_trip(bytes: [u8; 14]) {
            let header = EthHeader::from_bytes(&bytes).unwrap();
            let mac = Mac::from_words(header.dst);
            prop_assert_eq!(mac.words(), header.dst);
            prop_assert_eq!(mac.kind(), bytes[0]);
            prop_assert_eq!(mac.is_group(), bytes[0] & 1 == 1);
            prop_assert_eq!(Mac::new(mac.kind(), mac.id()), mac);
        }
    }
}
