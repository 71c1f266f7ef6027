//! The hot path: addresses of names of ours over UDP, answered from the query's and the index's
//! bytes without a message in between.
//!
//! It says what [`answer`](crate::answer) would say, or nothing; a property test holds the two
//! against each other.

use crate::{
    answer::{LOCALHOST, UDP_BYTES, UDP_BYTES_MAX},
    index::{Asker, Index, Lookup},
    names::{A_LEN, AAAA_LEN, Records},
    reverse::ARPA,
    wire::{
        CLASS_IN, HEADER_LEN, OPT_LEN, PlainQuery, TYPE_A, TYPE_AAAA, TYPE_OPT, TYPE_SOA, labels,
    },
};

/// The longest reply.
pub(crate) const REPLY_MAX: usize = UDP_BYTES_MAX as usize;

const NO_ERROR: u8 = 0;
const NX_DOMAIN: u8 = 3;
const AUTHORITATIVE: u8 = 0x04;
const TRUNCATED: u8 = 0x02;
const RECURSION_DESIRED: u8 = 0x01;
const RESPONSE: u8 = 0x80;
const RECURSION_AVAILABLE: u8 = 0x80;
const CHECKING_DISABLED: u8 = 0x10;

/// Writes the reply to a query, and returns its length. `None`: this takes the slow way. `turn` is
/// as in [`answer`](crate::answer::answer).
pub(crate) fn answer(
    index: &Index,
    asker: &Asker,
    query: &[u8],
    turn: usize,
    reply: &mut [u8; REPLY_MAX],
) -> Option<usize> {
    let plain = PlainQuery::read(query)?;
    let key = plain.key.as_bytes();
    if !matches!(plain.kind, TYPE_A | TYPE_AAAA) || key.is_empty() {
        return None;
    }
    if key.ends_with(ARPA) || key.ends_with(LOCALHOST) {
        return None;
    }
    let mut reply = Reply { bytes: reply, len: 0 };
    let limit = plain.payload.map_or(UDP_BYTES, |size| size.clamp(UDP_BYTES, UDP_BYTES_MAX));
    let header = Header { query, has_opt: plain.payload.is_some() };
    match index.lookup(asker, key) {
        Lookup::Addresses(Records { a, aaaa }) => {
            let (records, len) = if plain.kind == TYPE_A { (a, A_LEN) } else { (aaaa, AAAA_LEN) };
            if records.is_empty() {
                header.write(&mut reply, NO_ERROR, 0, [0, 1])?;
                reply.put(plain.question)?;
                reply.put_soa(key, index)?;
            } else {
                let used = HEADER_LEN + plain.question.len() + header.opt_len();
                let room = usize::from(limit).saturating_sub(used) / len;
                let count = records.len() / len;
                let (shown, flags) = match count <= room {
                    true => (count, 0),
                    false => (room, TRUNCATED),
                };
                header.write(&mut reply, NO_ERROR, flags, [shown, 0])?;
                reply.put(plain.question)?;
                let first = turn % count;
                let (before, after) = records.split_at(first * len);
                let (head, tail) = (shown.min(count - first), shown.saturating_sub(count - first));
                reply.put(after.get(..head * len)?)?;
                reply.put(before.get(..tail * len)?)?;
            }
        }
        Lookup::NoSuchName => {
            header.write(&mut reply, NX_DOMAIN, 0, [0, 1])?;
            reply.put(plain.question)?;
            reply.put_soa(key, index)?;
        }
        Lookup::Outside => return None,
    }
    if header.has_opt {
        reply.put_opt()?;
    }
    Some(reply.len)
}

struct Header<'a> {
    query: &'a [u8],
    has_opt: bool,
}

impl Header<'_> {
    fn opt_len(&self) -> usize {
        if self.has_opt { OPT_LEN } else { 0 }
    }

    /// `counts`: answers and authorities.
    fn write(&self, to: &mut Reply<'_>, code: u8, flags: u8, counts: [usize; 2]) -> Option<()> {
        let [id0, id1, asked0, asked1, ..] = *self.query else { return None };
        let flags0 = RESPONSE | AUTHORITATIVE | flags | asked0 & RECURSION_DESIRED;
        let flags1 = RECURSION_AVAILABLE | asked1 & CHECKING_DISABLED | code;
        let [answers, authorities] = counts.map(|n| (n as u16).to_be_bytes());
        to.put(&[id0, id1, flags0, flags1, 0, 1])?;
        to.put(&answers)?;
        to.put(&authorities)?;
        to.put(&[0, u8::from(self.has_opt)])
    }
}

struct Reply<'a> {
    bytes: &'a mut [u8; REPLY_MAX],
    len: usize,
}

impl Reply<'_> {
    /// `None` if it does not fit, which takes the slow way.
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.len + bytes.len();
        self.bytes.get_mut(self.len..end)?.copy_from_slice(bytes);
        self.len = end;
        Some(())
    }

    /// The SOA of a negative answer: that of the name's last label (RFC 2308 section 2), all of
    /// its names pointers into the question.
    fn put_soa(&mut self, key: &[u8], index: &Index) -> Option<()> {
        let at = HEADER_LEN + labels(key).last()?.0;
        let zone = (0xc000 | at as u16).to_be_bytes();
        let ttl = index.ttl().to_be_bytes();
        let serial = ((index.revision().get() & u64::from(u32::MAX)) as u32).to_be_bytes();
        self.put(&zone)?;
        self.put(&TYPE_SOA.to_be_bytes())?;
        self.put(&CLASS_IN.to_be_bytes())?;
        self.put(&ttl)?;
        self.put(&[0, 24])?;
        self.put(&zone)?;
        self.put(&zone)?;
        for number in [serial, ttl, ttl, ttl, ttl] {
            self.put(&number)?;
        }
        Some(())
    }

    fn put_opt(&mut self) -> Option<()> {
        self.put(&[0])?;
        self.put(&TYPE_OPT.to_be_bytes())?;
        self.put(&UDP_BYTES_MAX.to_be_bytes())?;
        self.put(&[0; 6])
    }
}

#[cfg(test)]
#[path = "fast_tests.rs"]
mod tests;
