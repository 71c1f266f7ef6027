//! The inner format of a datagram, once it is opened.
//!
//! The first byte says what follows: a packet of foca, or one of the messages that mesh adds
//! ([`Message`]). Integers are big endian; a member is its number (8 bytes), id (16), bump (8),
//! address family (4 or 6), IP address (4 or 16 bytes) and port (2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::{Buf, BufMut, TryGetError};
use foca::{Codec, Header, Incarnation, Message as Swim, State};
use mesh_types::{EndpointId, NodeId, NodeNumber};
use thiserror::Error;

use crate::{
    hint::{Hint, HintState, Subject},
    member::Member,
};

const SWIM: u8 = 0;
const HELLO: u8 = 1;
const ASK: u8 = 2;
const LEAVING: u8 = 3;
const HINTS: u8 = 4;

/// A payload's meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A packet of foca, already looked through.
    Swim(Packet),
    /// "I am a member: take me in, and let me know you." Sent to addresses, for a joiner knows no
    /// more; answered by a SWIM announcement.
    Hello(Member),
    /// "I suspect this life of yours: say that you live." Lifeguard's buddy system: the suspect
    /// hears of it from the suspecting node itself, whatever became of the gossip.
    Ask {
        /// Who suspects.
        from: Member,
        /// Which life is suspected.
        suspect: Member,
        /// In which incarnation.
        incarnation: Incarnation,
    },
    /// "I go, on purpose."
    Leaving(Member),
    /// News of endpoints, passed on: not only the sender's own.
    Hints {
        /// Who passes them on.
        from: Member,
        /// Fewer than 256.
        hints: Vec<Hint>,
    },
}

/// A packet of foca, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// From, to, what.
    pub header: Header<Member>,
    /// What the sender says of others.
    pub updates: Vec<foca::Member<Member>>,
}

/// Why a payload means nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// It ends too early.
    #[error("the payload ends too early")]
    Short,
    /// It goes on after its end.
    #[error("{0} bytes too many at the payload's end")]
    Long(usize),
    /// A byte names no variant.
    #[error("{what} {value} is not known")]
    Unknown {
        /// Of what.
        what: &'static str,
        /// The byte.
        value: u8,
    },
    /// A number or id outside its range.
    #[error("{0}")]
    Number(#[from] mesh_types::IdParseError),
    /// No room to write.
    #[error("the datagram is full")]
    Full,
}

impl From<TryGetError> for DecodeError {
    fn from(_: TryGetError) -> Self {
        Self::Short
    }
}

impl Message {
    /// Writes the payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        match self {
            Self::Swim(packet) => {
                out.push(SWIM);
                packet.put(&mut out);
            }
            Self::Hello(member) => {
                out.push(HELLO);
                put_member(member, &mut out);
            }
            Self::Ask { from, suspect, incarnation } => {
                out.push(ASK);
                put_member(from, &mut out);
                put_member(suspect, &mut out);
                out.put_u16(*incarnation);
            }
            Self::Leaving(member) => {
                out.push(LEAVING);
                put_member(member, &mut out);
            }
            Self::Hints { from, hints } => {
                out.push(HINTS);
                put_member(from, &mut out);
                let count = u8::try_from(hints.len()).unwrap_or(u8::MAX);
                out.push(count);
                hints.iter().take(usize::from(count)).for_each(|hint| put_hint(hint, &mut out));
            }
        }
        out
    }

    /// Reads a payload, to its last byte.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut buf = payload;
        let message = match buf.try_get_u8()? {
            SWIM => Self::Swim(Packet::get(&mut buf)?),
            HELLO => Self::Hello(get_member(&mut buf)?),
            ASK => Self::Ask {
                from: get_member(&mut buf)?,
                suspect: get_member(&mut buf)?,
                incarnation: buf.try_get_u16()?,
            },
            LEAVING => Self::Leaving(get_member(&mut buf)?),
            HINTS => {
                let from = get_member(&mut buf)?;
                let count = buf.try_get_u8()?;
                let hints = (0..count).map(|_| get_hint(&mut buf)).collect::<Result<_, _>>()?;
                Self::Hints { from, hints }
            }
            value => return Err(DecodeError::Unknown { what: "message kind", value }),
        };
        if buf.is_empty() { Ok(message) } else { Err(DecodeError::Long(buf.len())) }
    }

    /// Marks a packet that foca made.
    #[must_use]
    pub fn swim(packet: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + packet.len());
        out.push(SWIM);
        out.extend_from_slice(packet);
        out
    }
}

impl Packet {
    /// The bytes as foca reads them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        self.put(&mut out);
        out
    }

    fn put(&self, out: &mut Vec<u8>) {
        put_header(&self.header, out);
        if carries_updates(&self.header.message) {
            // A datagram holds far fewer than 65,536 updates.
            out.put_u16(u16::try_from(self.updates.len()).unwrap_or(u16::MAX));
            for update in self.updates.iter().take(usize::from(u16::MAX)) {
                put_update(update, out);
            }
        }
    }

    fn get(buf: &mut &[u8]) -> Result<Self, DecodeError> {
        let header = get_header(buf)?;
        let mut updates = Vec::new();
        // foca leaves the count away when a packet has no room for it.
        if carries_updates(&header.message) && !buf.is_empty() {
            for _ in 0..buf.try_get_u16()? {
                updates.push(get_update(buf)?);
            }
        }
        Ok(Self { header, updates })
    }
}

fn carries_updates(message: &Swim<Member>) -> bool {
    !matches!(message, Swim::Announce | Swim::TurnUndead | Swim::Broadcast)
}

pub(crate) fn put_member(member: &Member, out: &mut Vec<u8>) {
    out.put_u64(member.number.get());
    out.put_u128(member.id.bits());
    out.put_u64(member.bump);
    match member.address.ip() {
        IpAddr::V4(ip) => {
            out.put_u8(4);
            out.put_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            out.put_u8(6);
            out.put_slice(&ip.octets());
        }
    }
    out.put_u16(member.address.port());
}

pub(crate) fn get_member(buf: &mut impl Buf) -> Result<Member, DecodeError> {
    let number = NodeNumber::new(buf.try_get_u64()?)?;
    let id = NodeId::from_bits(buf.try_get_u128()?);
    let bump = buf.try_get_u64()?;
    let ip = match buf.try_get_u8()? {
        4 => IpAddr::V4(Ipv4Addr::from_bits(buf.try_get_u32()?)),
        6 => IpAddr::V6(Ipv6Addr::from_bits(buf.try_get_u128()?)),
        value => return Err(DecodeError::Unknown { what: "address family", value }),
    };
    let port = buf.try_get_u16()?;
    Ok(Member { number, id, address: SocketAddr::new(ip, port), bump })
}

pub(crate) fn put_update(update: &foca::Member<Member>, out: &mut Vec<u8>) {
    put_member(update.id(), out);
    out.put_u16(update.incarnation());
    out.put_u8(match update.state() {
        State::Alive => 0,
        State::Suspect => 1,
        State::Down => 2,
    });
}

pub(crate) fn get_update(buf: &mut impl Buf) -> Result<foca::Member<Member>, DecodeError> {
    let member = get_member(buf)?;
    let incarnation = buf.try_get_u16()?;
    let state = match buf.try_get_u8()? {
        0 => State::Alive,
        1 => State::Suspect,
        2 => State::Down,
        value => return Err(DecodeError::Unknown { what: "member state", value }),
    };
    Ok(foca::Member::new(member, incarnation, state))
}

pub(crate) fn put_hint(hint: &Hint, out: &mut Vec<u8>) {
    match hint.subject {
        Subject::Endpoint(endpoint) => {
            out.put_u8(0);
            out.put_u64(endpoint.get());
        }
        Subject::DataPath(node) => {
            out.put_u8(1);
            out.put_u64(node.get());
        }
    }
    out.put_u64(hint.owner.get());
    out.put_u64(hint.generation);
    out.put_u8(match hint.state {
        HintState::Ready => 0,
        HintState::Draining => 1,
        HintState::Dead => 2,
    });
}

pub(crate) fn get_hint(buf: &mut impl Buf) -> Result<Hint, DecodeError> {
    let subject = match buf.try_get_u8()? {
        0 => Subject::Endpoint(EndpointId::new(buf.try_get_u64()?)?),
        1 => Subject::DataPath(NodeNumber::new(buf.try_get_u64()?)?),
        value => return Err(DecodeError::Unknown { what: "hint subject", value }),
    };
    let owner = NodeNumber::new(buf.try_get_u64()?)?;
    let generation = buf.try_get_u64()?;
    let state = match buf.try_get_u8()? {
        0 => HintState::Ready,
        1 => HintState::Draining,
        2 => HintState::Dead,
        value => return Err(DecodeError::Unknown { what: "hint state", value }),
    };
    Ok(Hint { subject, owner, generation, state })
}

fn put_header(header: &Header<Member>, out: &mut Vec<u8>) {
    put_member(&header.src, out);
    out.put_u16(header.src_incarnation);
    put_member(&header.dst, out);
    let (kind, probe) = match &header.message {
        Swim::Ping(probe) => (0, Some((*probe, None))),
        Swim::Ack(probe) => (1, Some((*probe, None))),
        Swim::PingReq { target, probe_number } => (2, Some((*probe_number, Some(target)))),
        Swim::IndirectPing { origin, probe_number } => (3, Some((*probe_number, Some(origin)))),
        Swim::IndirectAck { target, probe_number } => (4, Some((*probe_number, Some(target)))),
        Swim::ForwardedAck { origin, probe_number } => (5, Some((*probe_number, Some(origin)))),
        Swim::Announce => (6, None),
        Swim::Feed => (7, None),
        Swim::Gossip => (8, None),
        Swim::Broadcast => (9, None),
        Swim::TurnUndead => (10, None),
    };
    out.put_u8(kind);
    if let Some((probe, third)) = probe {
        out.put_u8(probe);
        if let Some(member) = third {
            put_member(member, out);
        }
    }
}

fn get_header(buf: &mut impl Buf) -> Result<Header<Member>, DecodeError> {
    let src = get_member(buf)?;
    let src_incarnation = buf.try_get_u16()?;
    let dst = get_member(buf)?;
    let message = match buf.try_get_u8()? {
        0 => Swim::Ping(buf.try_get_u8()?),
        1 => Swim::Ack(buf.try_get_u8()?),
        kind @ 2..=5 => {
            let probe_number = buf.try_get_u8()?;
            let third = get_member(buf)?;
            match kind {
                2 => Swim::PingReq { target: third, probe_number },
                3 => Swim::IndirectPing { origin: third, probe_number },
                4 => Swim::IndirectAck { target: third, probe_number },
                _ => Swim::ForwardedAck { origin: third, probe_number },
            }
        }
        6 => Swim::Announce,
        7 => Swim::Feed,
        8 => Swim::Gossip,
        9 => Swim::Broadcast,
        10 => Swim::TurnUndead,
        value => return Err(DecodeError::Unknown { what: "SWIM message", value }),
    };
    Ok(Header { src, src_incarnation, dst, message })
}

/// The same format, as foca asks for it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WireCodec;

fn put_whole(bytes: &[u8], mut buf: impl BufMut) -> Result<(), DecodeError> {
    if buf.remaining_mut() < bytes.len() {
        return Err(DecodeError::Full);
    }
    buf.put_slice(bytes);
    Ok(())
}

impl Codec<Member> for WireCodec {
    type Error = DecodeError;

    fn encode_header(
        &mut self,
        header: &Header<Member>,
        buf: impl BufMut,
    ) -> Result<(), DecodeError> {
        let mut out = Vec::with_capacity(128);
        put_header(header, &mut out);
        put_whole(&out, buf)
    }

    fn decode_header(&mut self, mut buf: impl Buf) -> Result<Header<Member>, DecodeError> {
        get_header(&mut buf)
    }

    fn encode_member(
        &mut self,
        member: &foca::Member<Member>,
        buf: impl BufMut,
    ) -> Result<(), DecodeError> {
        let mut out = Vec::with_capacity(64);
        put_update(member, &mut out);
        put_whole(&out, buf)
    }

    fn decode_member(&mut self, mut buf: impl Buf) -> Result<foca::Member<Member>, DecodeError> {
        get_update(&mut buf)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn hint() -> impl Strategy<Value = Hint> {
        let subject = prop_oneof![
            (1..=EndpointId::MAX.get())
                .prop_map(|endpoint| Subject::Endpoint(EndpointId::new(endpoint).unwrap())),
            (1..=NodeNumber::MAX.get())
                .prop_map(|node| Subject::DataPath(NodeNumber::new(node).unwrap())),
        ];
        (subject, 1..=NodeNumber::MAX.get(), any::<u64>(), 0..3usize).prop_map(
            |(subject, owner, generation, state)| Hint {
                subject,
                owner: NodeNumber::new(owner).unwrap(),
                generation,
                state: [HintState::Ready, HintState::Draining, HintState::Dead][state],
            },
        )
    }

    pub(crate) fn member() -> impl Strategy<Value = Member> {
        (1..=NodeNumber::MAX.get(), any::<u128>(), any::<SocketAddr>(), any::<u64>()).prop_map(
            |(number, id, address, bump)| Member {
                number: NodeNumber::new(number).unwrap(),
                id: NodeId::from_bits(id),
                // Flow label and scope do not travel.
                address: SocketAddr::new(address.ip(), address.port()),
                bump,
            },
        )
    }

    fn swim() -> impl Strategy<Value = Swim<Member>> {
        prop_oneof![
            any::<u8>().prop_map(Swim::Ping),
            any::<u8>().prop_map(Swim::Ack),
            (member(), any::<u8>())
                .prop_map(|(target, probe_number)| Swim::PingReq { target, probe_number }),
            (member(), any::<u8>())
                .prop_map(|(origin, probe_number)| Swim::IndirectPing { origin, probe_number }),
            (member(), any::<u8>())
                .prop_map(|(target, probe_number)| Swim::IndirectAck { target, probe_number }),
            (member(), any::<u8>())
                .prop_map(|(origin, probe_number)| Swim::ForwardedAck { origin, probe_number }),
            Just(Swim::Feed),
            Just(Swim::Gossip),
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        let update = (member(), any::<u16>(), 0..3).prop_map(|(member, incarnation, state)| {
            let state = [State::Alive, State::Suspect, State::Down][state as usize];
            foca::Member::new(member, incarnation, state)
        });
        let packet =
            (member(), any::<u16>(), member(), swim(), prop::collection::vec(update, 0..20))
                .prop_map(|(src, src_incarnation, dst, message, updates)| {
                    let header = Header { src, src_incarnation, dst, message };
                    Message::Swim(Packet { header, updates })
                });
        prop_oneof![
            packet,
            member().prop_map(Message::Hello),
            (member(), member(), any::<u16>()).prop_map(|(from, suspect, incarnation)| {
                Message::Ask { from, suspect, incarnation }
            }),
            member().prop_map(Message::Leaving),
            (member(), prop::collection::vec(hint(), 0..32))
                .prop_map(|(from, hints)| Message::Hints { from, hints }),
        ]
    }

    proptest! {
        #[test]
        fn messages_round_trip(message in message()) {
            prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
        }

        #[test]
        fn a_cut_message_is_refused(message in message(), at: prop::sample::Index) {
            let bytes = message.encode();
            let cut = &bytes[..at.index(bytes.len())];
            // The one part that may be missing as a whole is the count of updates.
            match (Message::decode(cut), &message) {
                (Err(_), _) => {}
                (Ok(Message::Swim(got)), Message::Swim(sent)) => {
                    prop_assert_eq!(&got.header, &sent.header);
                    prop_assert!(got.updates.is_empty());
                }
                (Ok(got), _) => prop_assert!(false, "read {:?}", got),
            }
        }

        #[test]
        fn garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..1400)) {
            let _ = Message::decode(&garbage);
        }
    }
}
