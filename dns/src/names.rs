//! A table of names that is built once and then only read: everything in a few blocks, with the
//! answers encoded beforehand.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
};

use hashbrown::HashTable;

use crate::wire::{CLASS_IN, TYPE_A, TYPE_AAAA};

/// An A record whose name is a pointer to the question's (RFC 1035 section 4.1.4).
pub(crate) const A_LEN: usize = 16;
/// The same with an AAAA record.
pub(crate) const AAAA_LEN: usize = 28;
/// More addresses than this are no use to anyone; with them an answer fits a TCP message.
pub(crate) const MAX_ADDRESSES: usize = 2048;

/// A zone's number.
pub(crate) type ZoneIndex = u32;

/// The addresses of a name, as records whose names point to the question's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Records<'a> {
    /// A records.
    pub(crate) a: &'a [u8],
    /// AAAA records.
    pub(crate) aaaa: &'a [u8],
}

impl Records<'_> {
    /// The addresses, IPv4 first.
    pub(crate) fn addresses(self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.a.as_chunks::<A_LEN>().0.iter();
        let v6 = self.aaaa.as_chunks::<AAAA_LEN>().0.iter();
        let v4 = v4.filter_map(|record| record.last_chunk::<4>().map(|a| IpAddr::from(*a)));
        v4.chain(v6.filter_map(|record| record.last_chunk::<16>().map(|a| IpAddr::from(*a))))
    }
}

/// Where the addresses of some names are: a task has several names, and one set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Set {
    a: (u32, u16),
    aaaa: (u32, u16),
}

/// The number of a name in its table.
pub(crate) type NameIndex = u32;

#[derive(Debug, Clone, Copy)]
struct Entry {
    at: u32,
    zone: ZoneIndex,
    set: u32,
    len: u8,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Names {
    hasher: RandomState,
    table: HashTable<NameIndex>,
    entries: Vec<Entry>,
    keys: Vec<u8>,
    sets: Vec<Set>,
    a: Vec<u8>,
    aaaa: Vec<u8>,
    ttl: u32,
}

impl Names {
    /// A table without names; records of its sets get this TTL.
    pub(crate) fn new(ttl: u32) -> Self {
        Self {
            hasher: RandomState::new(),
            table: HashTable::new(),
            entries: Vec::new(),
            keys: Vec::new(),
            sets: Vec::new(),
            a: Vec::new(),
            aaaa: Vec::new(),
            ttl,
        }
    }

    /// Gives back what it has too much: nothing is added from now on.
    pub(crate) fn shrink(&mut self) {
        self.entries.shrink_to_fit();
        self.keys.shrink_to_fit();
        self.sets.shrink_to_fit();
        self.a.shrink_to_fit();
        self.aaaa.shrink_to_fit();
    }

    /// Encodes addresses. `None` only when 32 bits do not count them all.
    pub(crate) fn add_set(&mut self, addresses: impl IntoIterator<Item = IpAddr>) -> Option<u32> {
        let (a, aaaa) = (self.a.len(), self.aaaa.len());
        let (mut v4, mut v6) = (0, 0);
        for address in addresses.into_iter().take(MAX_ADDRESSES) {
            match address {
                IpAddr::V4(address) => {
                    encode(&mut self.a, TYPE_A, self.ttl, &address.octets());
                    v4 += 1;
                }
                IpAddr::V6(address) => {
                    encode(&mut self.aaaa, TYPE_AAAA, self.ttl, &address.octets());
                    v6 += 1;
                }
            }
        }
        let number = u32::try_from(self.sets.len()).ok()?;
        let set = Set { a: (u32::try_from(a).ok()?, v4), aaaa: (u32::try_from(aaaa).ok()?, v6) };
        self.sets.push(set);
        Some(number)
    }

    /// Names a set, unless its zone has the name already.
    pub(crate) fn add(&mut self, zone: ZoneIndex, key: &[u8], set: u32) -> Option<NameIndex> {
        if self.find(zone, key).is_some() {
            return None;
        }
        let number = u32::try_from(self.entries.len()).ok()?;
        let at = u32::try_from(self.keys.len()).ok()?;
        let len = u8::try_from(key.len()).ok()?;
        self.keys.extend_from_slice(key);
        self.entries.push(Entry { at, zone, set, len });
        let Self { hasher, table, entries, keys, .. } = self;
        table.insert_unique(hasher.hash_one((zone, key)), number, |index| {
            let (zone, key) = name(entries, keys, *index);
            hasher.hash_one((zone, key))
        });
        Some(number)
    }

    /// Finds a name.
    pub(crate) fn find(&self, zone: ZoneIndex, key: &[u8]) -> Option<NameIndex> {
        let hash = self.hasher.hash_one((zone, key));
        let same = |index: &NameIndex| name(&self.entries, &self.keys, *index) == (zone, key);
        self.table.find(hash, same).copied()
    }

    /// The addresses of a name.
    pub(crate) fn records(&self, name: NameIndex) -> Records<'_> {
        let set = self.entries.get(name as usize).and_then(|e| self.sets.get(e.set as usize));
        set.map_or(Records::default(), |Set { a, aaaa }| Records {
            a: part(&self.a, *a, A_LEN),
            aaaa: part(&self.aaaa, *aaaa, AAAA_LEN),
        })
    }

    /// The key of a name.
    pub(crate) fn key(&self, index: NameIndex) -> &[u8] {
        name(&self.entries, &self.keys, index).1
    }
}

/// Tables are small: an index beyond them is nobody's.
fn name<'a>(entries: &[Entry], keys: &'a [u8], index: NameIndex) -> (ZoneIndex, &'a [u8]) {
    let Some(entry) = entries.get(index as usize) else { return (ZoneIndex::MAX, &[]) };
    let at = entry.at as usize;
    (entry.zone, keys.get(at..at + usize::from(entry.len)).unwrap_or_default())
}

fn part(records: &[u8], (at, count): (u32, u16), len: usize) -> &[u8] {
    let at = at as usize;
    records.get(at..at + usize::from(count) * len).unwrap_or_default()
}

fn encode(records: &mut Vec<u8>, kind: u16, ttl: u32, data: &[u8]) {
    // The name is the question's, right behind the header.
    records.extend([0xc0, 12]);
    records.extend(kind.to_be_bytes());
    records.extend(CLASS_IN.to_be_bytes());
    records.extend(ttl.to_be_bytes());
    records.extend([0, data.len() as u8]);
    records.extend(data);
}
