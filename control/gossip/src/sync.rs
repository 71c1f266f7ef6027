//! Anti-entropy: two members compare all that they know, over a stream between the two.
//!
//! The caller sends who it is and a digest. If the other's is the same, that was it. Otherwise the
//! other answers with its whole state, and the caller, if it still knows more, calls again with its
//! own. So two members that agree, which is what they mostly do, spend a hundred bytes.
//!
//! | | bytes |
//! |---|---|
//! | request | version (1), the caller as a member, digest (16), 0 or 1, the state if 1 |
//! | response | version (1), digest (16), 0 or 1, the state if 1 |
//! | state | count (4), members as in [`wire`](crate::wire); count (4), hints (26 each) |

use std::collections::BTreeSet;

use bytes::{Buf, BufMut};
use ring::digest::{Context, SHA256};

use crate::{
    hint::Hint,
    member::Member,
    wire::{DecodeError, get_hint, get_member, get_update, put_hint, put_member, put_update},
};

/// The version of the format.
const VERSION: u8 = 1;
/// The longest request or response, in bytes.
pub const MAX_SYNC: usize = 8 << 20;
/// What a member takes at most: with an IPv6 address.
const UPDATE_LEN: usize = 8 + 16 + 8 + 1 + 16 + 2 + 3;
const HINT_LEN: usize = 1 + 8 + 8 + 8 + 1;
/// Members in a state, at most. Twice what a cluster may have, for the dead.
const MAX_MEMBERS: usize = 20_000;
/// Hints in a state: as many as there is room for.
pub(crate) const MAX_HINTS: usize = (MAX_SYNC - 1024 - MAX_MEMBERS * UPDATE_LEN) / HINT_LEN;

pub(crate) type Digest = [u8; 16];

/// A call to make: its answer goes to [`Gossip::handle_sync_response`].
///
/// [`Gossip::handle_sync_response`]: crate::Gossip::handle_sync_response
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncCall {
    /// Whom.
    pub peer: Member,
    /// What to send.
    pub request: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) from: Member,
    pub(crate) digest: Digest,
    pub(crate) full: Option<Full>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) digest: Digest,
    pub(crate) full: Option<Full>,
}

/// All that a member knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Full {
    pub(crate) members: Vec<foca::Member<Member>>,
    pub(crate) hints: Vec<Hint>,
}

/// What two members must agree on: who is there, in which life, and the hints. Suspicions and the
/// dead differ all the time, and do no harm.
pub(crate) fn digest(active: &BTreeSet<Member>, hints: impl Iterator<Item = Hint>) -> Digest {
    let mut context = Context::new(&SHA256);
    let mut bytes = Vec::with_capacity(64);
    for member in active {
        bytes.clear();
        put_member(member, &mut bytes);
        context.update(&bytes);
    }
    // Between the two lists: no member begins with a number of zero.
    context.update(&[0; 8]);
    for hint in hints {
        bytes.clear();
        put_hint(&hint, &mut bytes);
        context.update(&bytes);
    }
    let whole = context.finish();
    let mut short = Digest::default();
    short.iter_mut().zip(whole.as_ref()).for_each(|(to, from)| *to = *from);
    short
}

impl Request {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        put_member(&self.from, &mut out);
        out.put_slice(&self.digest);
        put_full(self.full.as_ref(), &mut out);
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut buf = start(bytes)?;
        let from = get_member(&mut buf)?;
        let digest = get_digest(&mut buf)?;
        Ok(Self { from, digest, full: get_full(buf)? })
    }
}

impl Response {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.put_slice(&self.digest);
        put_full(self.full.as_ref(), &mut out);
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut buf = start(bytes)?;
        let digest = get_digest(&mut buf)?;
        Ok(Self { digest, full: get_full(buf)? })
    }
}

fn start(bytes: &[u8]) -> Result<&[u8], DecodeError> {
    if bytes.len() > MAX_SYNC {
        return Err(DecodeError::Long(bytes.len() - MAX_SYNC));
    }
    let mut buf = bytes;
    match buf.try_get_u8()? {
        VERSION => Ok(buf),
        value => Err(DecodeError::Unknown { what: "anti-entropy version", value }),
    }
}

fn get_digest(buf: &mut &[u8]) -> Result<Digest, DecodeError> {
    let mut digest = Digest::default();
    buf.try_copy_to_slice(&mut digest)?;
    Ok(digest)
}

fn put_full(full: Option<&Full>, out: &mut Vec<u8>) {
    let Some(full) = full else { return out.put_u8(0) };
    out.put_u8(1);
    let members = &full.members[..full.members.len().min(MAX_MEMBERS)];
    out.put_u32(u32::try_from(members.len()).unwrap_or(u32::MAX));
    members.iter().for_each(|member| put_update(member, out));
    let hints = &full.hints[..full.hints.len().min(MAX_HINTS)];
    out.put_u32(u32::try_from(hints.len()).unwrap_or(u32::MAX));
    hints.iter().for_each(|hint| put_hint(hint, out));
}

/// To the last byte.
fn get_full(mut buf: &[u8]) -> Result<Option<Full>, DecodeError> {
    let full = match buf.try_get_u8()? {
        0 => None,
        1 => {
            let mut full = Full::default();
            // Counts are not trusted with memory: each entry must be there.
            for _ in 0..buf.try_get_u32()? {
                full.members.push(get_update(&mut buf)?);
            }
            for _ in 0..buf.try_get_u32()? {
                full.hints.push(get_hint(&mut buf)?);
            }
            Some(full)
        }
        value => return Err(DecodeError::Unknown { what: "anti-entropy part", value }),
    };
    if buf.is_empty() { Ok(full) } else { Err(DecodeError::Long(buf.len())) }
}

#[cfg(test)]
mod tests {
    use foca::State;
    use proptest::prelude::*;

    use super::*;
    use crate::wire::tests::{hint, member};

    fn full() -> impl Strategy<Value = Full> {
        let update =
            (member(), any::<u16>(), 0..3usize).prop_map(|(member, incarnation, state)| {
                let state = [State::Alive, State::Suspect, State::Down][state];
                foca::Member::new(member, incarnation, state)
            });
        (prop::collection::vec(update, 0..20), prop::collection::vec(hint(), 0..20))
            .prop_map(|(members, hints)| Full { members, hints })
    }

    fn request() -> impl Strategy<Value = Request> {
        (member(), any::<Digest>(), prop::option::of(full()))
            .prop_map(|(from, digest, full)| Request { from, digest, full })
    }

    proptest! {
        #[test]
        fn requests_and_responses_round_trip(request in request()) {
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request.clone()));
            let response = Response { digest: request.digest, full: request.full };
            prop_assert_eq!(Response::decode(&response.encode()), Ok(response));
        }

        #[test]
        fn a_cut_or_longer_one_is_refused(request in request(), at: prop::sample::Index) {
            let mut bytes = request.encode();
            prop_assert!(Request::decode(&bytes[..at.index(bytes.len())]).is_err());
            bytes.push(0);
            prop_assert!(Request::decode(&bytes).is_err());
        }

        #[test]
        fn garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..1400)) {
            let _ = Request::decode(&garbage);
            let _ = Response::decode(&garbage);
        }
    }
}
