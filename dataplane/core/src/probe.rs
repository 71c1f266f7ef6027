//! Probes of the data path: what a node asks a peer's BPF programs through the tunnel's port, and
//! what they answer without their daemon.
//!
//! A probe is the payload of a UDP datagram from a socket that is bound to the own tunnel end, to
//! the peer's tunnel end and VXLAN port. The answer comes from there to the socket's port. It looks
//! like any VXLAN frame, so it passes where the overlay's packets pass:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | VXLAN header: I flag, VNI [`VNI`] |
//! | 6, 6 | inner MACs: kind `0a` and the number of the node that is asked; of the one that asks |
//! | 2 | EtherType [`ETHERTYPE`] |
//! | 4, 1, 1, 2 | `mshP`; version 1; 1: request, 2: reply; zero |
//! | 8 | nonce, returned as it is |
//! | 16 | the sender's own, returned as they are |
//!
//! A reply has the two MACs exchanged. `ebpf/README.md` says what is answered and what is not.

use mesh_types::{
    ids::NodeNumber,
    mac::{Mac, MacKind},
};

/// No network has it, and it is a valid VNI to everybody else (RFC 7348 names no reserved ones).
pub const VNI: u32 = 0;
/// IEEE 802 local experimental EtherType 1 (IEEE 802-2014, table 4).
pub const ETHERTYPE: u16 = 0x88b5;
/// Bytes of a probe, VXLAN header and all.
pub const LEN: usize = 8 + 14 + 32;

const MAGIC: [u8; 4] = *b"mshP";
const VERSION: u8 = 1;
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
/// The I flag: the VNI is valid.
const FLAG_VNI: u8 = 0x08;

/// The question of node `own` to node `peer`.
#[must_use]
pub fn encode_request(own: NodeNumber, peer: NodeNumber, nonce: u64) -> [u8; LEN] {
    encode(peer, own, REQUEST, nonce)
}

/// Who answered, and which question (its nonce); `None`: no reply. That the question was asked, and
/// the datagram's source is that peer's tunnel end, is for the caller to see.
#[must_use]
pub fn decode_reply(datagram: &[u8]) -> Option<(NodeNumber, u64)> {
    decode(datagram, REPLY)
}

fn encode(dst: NodeNumber, src: NodeNumber, kind: u8, nonce: u64) -> [u8; LEN] {
    let [_, v0, v1, v2] = VNI.to_be_bytes();
    let (dst, src) = (Mac::from(MacKind::MeshReturn(dst)), Mac::from(MacKind::MeshReturn(src)));
    let mut out = [0; LEN];
    let parts: [&[u8]; 7] = [
        &[FLAG_VNI, 0, 0, 0, v0, v1, v2, 0],
        &dst.0,
        &src.0,
        &ETHERTYPE.to_be_bytes(),
        &MAGIC,
        &[VERSION, kind, 0, 0],
        &nonce.to_be_bytes(),
    ];
    for (to, from) in out.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    out
}

fn decode(datagram: &[u8], kind: u8) -> Option<(NodeNumber, u64)> {
    let datagram: &[u8; LEN] = datagram.try_into().ok()?;
    let (vxlan, rest) = datagram.split_first_chunk::<8>()?;
    let (dst, rest) = rest.split_first_chunk()?;
    let (src, rest) = rest.split_first_chunk()?;
    let (ethertype, rest) = rest.split_first_chunk()?;
    let (head, rest) = rest.split_first_chunk::<8>()?;
    let (nonce, _) = rest.split_first_chunk()?;
    let [flags, _, _, _, v0, v1, v2, _] = *vxlan;
    let [m0, m1, m2, m3, version, is, _, _] = *head;
    let ours = flags & FLAG_VNI != 0
        && u32::from_be_bytes([0, v0, v1, v2]) == VNI
        && u16::from_be_bytes(*ethertype) == ETHERTYPE
        && [m0, m1, m2, m3] == MAGIC
        && version == VERSION
        && is == kind;
    let (Some(MacKind::MeshReturn(_)), Some(MacKind::MeshReturn(src))) =
        (Mac(*dst).kind(), Mac(*src).kind())
    else {
        return None;
    };
    ours.then_some((src, u64::from_be_bytes(*nonce)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(number: u64) -> NodeNumber {
        NodeNumber::new(number).unwrap()
    }

    #[test]
    fn wire_format_is_fixed() {
        let request = encode_request(node(0x0102), node(0x03), 0x0405_0607_0809_0a0b);
        assert_eq!(request[..8], [8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(request[8..22], [10, 0, 0, 0, 0, 3, 10, 0, 0, 0, 1, 2, 0x88, 0xb5]);
        assert_eq!(request[22..30], *b"mshP\x01\x01\0\0");
        assert_eq!(request[30..38], [4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(request[38..], [0; 16]);
    }

    /// What the programs do to a request.
    fn reflected(mut request: [u8; LEN]) -> [u8; LEN] {
        let (dst, src) = request[8..20].split_at_mut(6);
        dst.swap_with_slice(src);
        request[27] = REPLY;
        request
    }

    proptest! {
        #[test]
        fn an_answer_is_understood_by_who_asked(own in 1u64..1 << 40, peer in 1u64..1 << 40,
                                                nonce: u64) {
            let (own, peer) = (node(own), node(peer));
            let request = encode_request(own, peer, nonce);
            let reply = reflected(request);
            prop_assert_eq!(decode_reply(&reply), Some((peer, nonce)));
            // A question is no answer.
            prop_assert_eq!(decode_reply(&request), None);
        }

        /// Every byte that has one value alone is looked at, and nothing panics.
        #[test]
        fn what_is_spoilt_is_refused(at in 0usize..28, to: u8, len in 0usize..LEN) {
            let reply = reflected(encode_request(node(1), node(2), 3));
            prop_assert_eq!(decode_reply(&reply[..len]), None);
            let mut spoilt = reply;
            spoilt[at] = to;
            let decoded = decode_reply(&spoilt);
            // Reserved bits are ignored (RFC 7348 section 5), and whom it is for is the socket's
            // matter; the source names who answered.
            if decoded == Some((node(2), 3)) {
                let ignored = [0..4, 7..8, 9..14].iter().any(|range| range.contains(&at));
                prop_assert!(to == reply[at] || ignored);
            } else if decoded.is_some() {
                prop_assert!((15..20).contains(&at));
            }
        }

        #[test]
        fn anything_may_arrive(bytes: Vec<u8>) {
            prop_assert_eq!(decode_reply(&bytes), None);
        }
    }
}
