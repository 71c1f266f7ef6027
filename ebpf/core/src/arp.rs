//! ARP, answered in place.

use crate::{
    mac::Mac,
    wire::{ArpPacket, ETHERTYPE_ARP, ETHERTYPE_IPV4, EthHeader},
};

const REQUEST: u16 = 1;
const REPLY: u16 = 2;

/// Two words as one address.
#[inline(always)]
#[must_use]
pub const fn addr(words: [u16; 2]) -> u32 {
    let [a, b] = words;
    let ([a, b], [c, d]) = (a.to_ne_bytes(), b.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Whether it is ARP for IPv4 over Ethernet.
#[inline(always)]
#[must_use]
pub const fn is_valid(packet: &ArpPacket) -> bool {
    packet.hardware_be == 1_u16.to_be()
        && packet.protocol_be == ETHERTYPE_IPV4.to_be()
        && packet.hardware_len == 6
        && packet.protocol_len == 4
}

/// The address that is asked for; `None` if the packet asks nothing of anyone else: a reply, a
/// gratuitous request, a probe for its own address (RFC 5227 section 2.1.1).
#[inline(always)]
#[must_use]
pub const fn wanted(packet: &ArpPacket, own: u32) -> Option<u32> {
    let target = addr(packet.target_addr);
    if packet.operation_be != REQUEST.to_be() || target == own {
        return None;
    }
    Some(target)
}

/// The answer to a request: `mac` has the wanted address.
#[inline(always)]
#[must_use]
pub const fn reply(request: &ArpPacket, mac: Mac) -> (EthHeader, ArpPacket) {
    let eth = EthHeader {
        dst: request.sender_mac,
        src: mac.words(),
        ethertype_be: ETHERTYPE_ARP.to_be(),
    };
    let packet = ArpPacket {
        operation_be: REPLY.to_be(),
        sender_mac: mac.words(),
        sender_addr: request.target_addr,
        target_mac: request.sender_mac,
        target_addr: request.sender_addr,
        ..*request
    };
    (eth, packet)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mac;

    #[test]
    fn a_request_as_linux_sends_it() {
        let bytes =
            [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 7, 10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 10, 0, 0, 9];
        let request = ArpPacket::from_bytes(&bytes).unwrap();
        assert!(is_valid(&request));
        let own = u32::from_ne_bytes([10, 0, 0, 7]);
        assert_eq!(wanted(&request, own), Some(u32::from_ne_bytes([10, 0, 0, 9])));
        let (eth, answer) = reply(&request, Mac::new(mac::ENDPOINT, 9));
        assert_eq!(eth.to_bytes(), [2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 9, 8, 6]);
        assert_eq!(
            answer.to_bytes(),
            [0, 1, 8, 0, 6, 4, 0, 2, 2, 0, 0, 0, 0, 9, 10, 0, 0, 9, 2, 0, 0, 0, 0, 7, 10, 0, 0, 7]
        );
    }

    proptest! {
        #[test]
        fn answers_are_no_questions(bytes: [u8; 28], id: u64, own: u32) {
            let packet = ArpPacket::from_bytes(&bytes).unwrap();
            let (_, answer) = reply(&packet, Mac::new(mac::ENDPOINT, id));
            prop_assert_eq!(wanted(&answer, own), None);
            prop_assert_eq!(is_valid(&answer), is_valid(&packet));
            prop_assert_ne!(wanted(&packet, own), Some(own));
        }
    }
}
