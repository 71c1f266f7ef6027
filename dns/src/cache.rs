//! Answers from outside, remembered for as long as they may be (RFC 1035 section 7.4, RFC 2308).
//!
//! An answer is found again by its whole question alone, so records about other names that came
//! with it are never taken for answers (RFC 5452 section 6).

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_types::TaskId;

use crate::wire::{HEADER_LEN, PlainQuery, TYPE_OPT, TYPE_SOA};

/// Answers that are remembered, at most.
const ENTRIES_MAX: usize = 4096;
/// Bytes of all of them, at most.
const BYTES_MAX: usize = 2 << 20;
/// What an entry takes beside its bytes, about.
const ENTRY_BYTES: usize = 128;
/// No answer is remembered for longer, whatever its TTL.
const POSITIVE_MAX: u32 = 3600;
/// That there is none, neither.
const NEGATIVE_MAX: u32 = 300;

const NO_ERROR: u8 = 0;
const NX_DOMAIN: u8 = 3;
const TRUNCATED: u8 = 0x02;
/// Recursion desired, in the third byte of a header.
const ASKED_0: u8 = 0x01;
/// Authentic data and checking disabled, in the fourth.
const ASKED_1: u8 = 0x30;

/// Who was asked, what, and how: another answer is due where any of it differs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct CacheKey(Arc<[u8]>);

impl CacheKey {
    /// `None` for queries that are asked anew each time. `of` is the task whose own servers are
    /// asked, instead of the node's.
    pub(crate) fn new(of: Option<TaskId>, over_tcp: bool, query: &[u8]) -> Option<Self> {
        let plain = PlainQuery::read(query)?;
        let &[_, _, asked0, asked1, ..] = query else { return None };
        let opt = query.get(HEADER_LEN + plain.question.len()..)?;
        let mut key = vec![u8::from(over_tcp), asked0 & ASKED_0, asked1 & ASKED_1];
        key.extend(of.map_or([0; 16], |task| task.bits().to_be_bytes()));
        key.push(u8::from(of.is_some()));
        key.extend(opt);
        key.extend(plain.question.to_ascii_lowercase());
        Some(Self(key.into()))
    }
}

#[derive(Debug)]
struct Entry {
    reply: Vec<u8>,
    /// Where its TTLs are.
    ttls: Vec<usize>,
    since: Instant,
    until: Instant,
}

impl Entry {
    fn bytes(&self, key: &CacheKey) -> usize {
        ENTRY_BYTES + key.0.len() + self.reply.len() + self.ttls.len() * size_of::<usize>()
    }
}

/// See the module. Oldest out first.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    entries: HashMap<CacheKey, Entry>,
    order: VecDeque<CacheKey>,
    bytes: usize,
}

impl Cache {
    /// The answer to a query, as it would be given now.
    pub(crate) fn find(&self, key: &CacheKey, query: &[u8], now: Instant) -> Option<Vec<u8>> {
        let entry = self.entries.get(key).filter(|entry| now < entry.until)?;
        let mut reply = entry.reply.clone();
        let age = u32::try_from(now.saturating_duration_since(entry.since).as_secs()).ok()?;
        for at in &entry.ttls {
            let field = reply.get_mut(*at..)?.first_chunk_mut::<4>()?;
            *field = u32::from_be_bytes(*field).saturating_sub(age).to_be_bytes();
        }
        // The asker's own id and letters.
        reply.get_mut(..2)?.copy_from_slice(query.get(..2)?);
        let question = PlainQuery::read(query)?.question;
        let to = reply.get_mut(HEADER_LEN..HEADER_LEN + question.len())?;
        to.copy_from_slice(question);
        Some(reply)
    }

    /// Remembers an answer, if it may be.
    pub(crate) fn insert(&mut self, key: CacheKey, query: &[u8], reply: &[u8], now: Instant) {
        let Some(entry) = entry(query, reply, now) else { return };
        let bytes = entry.bytes(&key);
        if bytes > BYTES_MAX / 4 {
            return;
        }
        match self.entries.insert(key.clone(), entry) {
            Some(old) => self.bytes -= old.bytes(&key),
            None => self.order.push_back(key),
        }
        self.bytes += bytes;
        while self.entries.len() > ENTRIES_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some(entry) = self.entries.remove(&oldest) {
                self.bytes -= entry.bytes(&oldest);
            }
        }
    }

    /// Forgets everything: others are asked from now on.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

fn entry(query: &[u8], reply: &[u8], now: Instant) -> Option<Entry> {
    let question = PlainQuery::read(query)?.question;
    let header = reply.first_chunk::<HEADER_LEN>()?;
    let same = reply.get(HEADER_LEN..HEADER_LEN + question.len())?;
    let code = header[3] & 0x0f;
    let whole = header[2] & TRUNCATED == 0 && matches!(code, NO_ERROR | NX_DOMAIN);
    if !whole || !same.eq_ignore_ascii_case(question) {
        return None;
    }
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let [answers, authorities, additionals] = [6, 8, 10].map(count);
    let mut at = HEADER_LEN + question.len();
    let (mut ttls, mut least, mut negative) = (Vec::new(), POSITIVE_MAX, None);
    let all = usize::from(answers) + usize::from(authorities) + usize::from(additionals);
    for number in 0..all {
        let record = Record::read(reply, at)?;
        at = record.end;
        if record.kind == TYPE_OPT {
            continue;
        }
        ttls.push(record.ttl_at);
        if number < usize::from(answers) {
            least = least.min(record.ttl);
        } else if record.kind == TYPE_SOA && negative.is_none() {
            // Its last number (RFC 2308 section 4).
            let minimum = reply.get(..record.end)?.last_chunk::<4>()?;
            negative = Some(record.ttl.min(u32::from_be_bytes(*minimum)).min(NEGATIVE_MAX));
        }
    }
    if answers == 0 || code == NX_DOMAIN {
        // Without an SOA nobody says for how long (RFC 2308 section 5).
        least = least.min(negative?);
    }
    let until = now + Duration::from_secs(u64::from(least));
    (least > 0).then(|| Entry { reply: reply.to_vec(), ttls, since: now, until })
}

struct Record {
    kind: u16,
    ttl: u32,
    ttl_at: usize,
    end: usize,
}

impl Record {
    fn read(message: &[u8], at: usize) -> Option<Self> {
        let at = skip_name(message, at)?;
        let &[k0, k1, _, _, t0, t1, t2, t3, l0, l1] = message.get(at..)?.first_chunk::<10>()?;
        let end = at + 10 + usize::from(u16::from_be_bytes([l0, l1]));
        let ttl = u32::from_be_bytes([t0, t1, t2, t3]);
        // A TTL with the uppermost bit is zero (RFC 2181 section 8).
        let ttl = if ttl >> 31 == 0 { ttl } else { 0 };
        let kind = u16::from_be_bytes([k0, k1]);
        (end <= message.len()).then_some(Self { kind, ttl, ttl_at: at + 4, end })
    }
}

/// Where a name ends. Pointers are not followed.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
