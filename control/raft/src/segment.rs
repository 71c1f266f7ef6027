//! A file of the log: records one after the other, then zeros.
//!
//! ```text
//! 0   "meshlog1", index of the first record (8 bytes, little endian like all numbers here)
//! 16  length, !length, batch, !batch (4 bytes each); the sealed entry; 0xff up to a multiple of 16
//! …   more records; zeros to the end of the file
//! ```
//!
//! Records are written in batches, each synced before the next begins; `batch` is where a record's
//! batch begins. A header lies within one sector, and a sealed entry says itself whether it is
//! whole. So what a power cut tears can be told from what a disk damages: of a torn batch some
//! sector is still zero, and nothing that was written after it is there.

use std::ops::Range;

/// What a file begins with.
const MAGIC: &[u8; 8] = b"meshlog1";
/// Bytes before the first record.
pub(crate) const HEADER: usize = 16;
/// Bytes before a sealed entry. Records begin at multiples of it.
const RECORD: usize = 16;
/// What a disk writes as a whole, at least.
const SECTOR: usize = 512;

/// The file's own header.
pub(crate) fn header(first: u64) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..8].copy_from_slice(MAGIC);
    out[8..].copy_from_slice(&first.to_le_bytes());
    out
}

/// Bytes that a record of a sealed entry takes.
pub(crate) fn size(sealed: usize) -> usize {
    (RECORD + sealed).next_multiple_of(RECORD)
}

/// Appends a record to what will be written at `at`, in a batch that begins at `batch`. Returns
/// where its sealed entry will be.
pub(crate) fn put(out: &mut Vec<u8>, at: u32, batch: u32, sealed: &[u8]) -> Range<u32> {
    let length = sealed.len() as u32;
    for word in [length, !length, batch, !batch] {
        out.extend(word.to_le_bytes());
    }
    out.extend(sealed);
    out.resize(out.len().next_multiple_of(RECORD), 0xff);
    let from = at + RECORD as u32;
    from..from + length
}

/// What a file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Scan {
    /// Where the sealed entries are, from the file's first index on.
    pub(crate) records: Vec<Range<u32>>,
    /// Where the next record goes.
    pub(crate) end: usize,
    /// What follows there must be made zero before it is written to.
    pub(crate) torn: bool,
}

/// What is wrong with a file, at which byte.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// It does not begin as a file of the log with this first index does.
    NotALog,
    /// A record's header makes no sense.
    Header(usize),
    /// A record of this index does not open, and was not torn.
    Record(u64),
    /// The records end here, though later ones were written.
    Lost(usize),
}

/// Length and batch of the record whose header is at `at`; `None` if there is none.
fn record(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let (words, _) = bytes.get(at..at + RECORD)?.as_chunks::<4>();
    let [length, not_length, batch, not_batch] = *words else { return None };
    let [length, batch] = [length, batch].map(u32::from_le_bytes);
    let whole =
        u32::from_le_bytes(not_length) == !length && u32::from_le_bytes(not_batch) == !batch;
    whole.then_some((length as usize, batch as usize))
}

/// Reads a whole file. `opens` says whether an entry is one of this index, whole.
pub(crate) fn scan(
    bytes: &[u8],
    first: u64,
    mut opens: impl FnMut(u64, &[u8]) -> bool,
) -> Result<Scan, Damage> {
    if bytes.get(..HEADER) != Some(&header(first)) {
        return Err(Damage::NotALog);
    }
    let mut scan = Scan { end: HEADER, ..Scan::default() };
    let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    while let Some(head) = bytes.get(scan.end..scan.end + RECORD) {
        if is_zero(head) {
            break;
        }
        let Some((length, _)) = record(bytes, scan.end) else {
            return Err(Damage::Header(scan.end));
        };
        let from = scan.end + RECORD;
        let Some(sealed) = bytes.get(from..from + length) else {
            return Err(Damage::Header(scan.end));
        };
        let index = first + scan.records.len() as u64;
        if !opens(index, sealed) {
            let to = (scan.end + size(length)).min(bytes.len());
            if !sectors(scan.end..to).any(|part| is_zero(&bytes[part])) {
                return Err(Damage::Record(index));
            }
            break;
        }
        scan.records.push(from as u32..(from + length) as u32);
        scan.end += size(length);
    }
    let rest = bytes.get(scan.end..).unwrap_or_default();
    scan.torn = !is_zero(rest);
    if scan.torn {
        let later = (scan.end..bytes.len()).step_by(RECORD);
        let later = later.filter_map(|at| record(bytes, at));
        if later.into_iter().any(|(_, batch)| batch > scan.end) {
            return Err(Damage::Lost(scan.end));
        }
    }
    Ok(scan)
}

/// The parts of a range that are in one sector each.
fn sectors(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let first = range.start / SECTOR * SECTOR;
    (first..range.end)
        .step_by(SECTOR)
        .map(move |at| at.max(range.start)..(at + SECTOR).min(range.end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIRST: u64 = 7;

    /// An entry of an index that says itself whether it is whole, and has no zeros in a row.
    fn sealed(index: u64, length: usize) -> Vec<u8> {
        let bytes = (0..length as u64).map(|n| ((index * 31 + n * 17) % 251) as u8 + 1);
        bytes.collect()
    }

    fn opens(lengths: &[usize]) -> impl Fn(u64, &[u8]) -> bool {
        move |index, bytes| {
            let at = (index - FIRST) as usize;
            lengths.get(at).is_some_and(|length| bytes == sealed(index, *length))
        }
    }

    /// A file with batches of entries of these lengths, and where each batch ends.
    fn file(batches: &[Vec<usize>]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut ends, mut index) = (header(FIRST).to_vec(), Vec::new(), FIRST);
        for batch in batches {
            let begin = bytes.len() as u32;
            for length in batch {
                let at = bytes.len() as u32;
                put(&mut bytes, at, begin, &sealed(index, *length));
                index += 1;
            }
            ends.push(bytes.len());
        }
        bytes.resize(bytes.len() + 3 * SECTOR, 0);
        (bytes, ends)
    }

    fn batches() -> impl Strategy<Value = Vec<Vec<usize>>> {
        let length = prop_oneof![1..60usize, 400..1800usize];
        prop::collection::vec(prop::collection::vec(length, 1..5), 1..6)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(batches in batches()) {
            let (bytes, ends) = file(&batches);
            let lengths = batches.concat();
            let scan = scan(&bytes, FIRST, opens(&lengths)).unwrap();
            prop_assert_eq!(scan.records.len(), lengths.len());
            prop_assert_eq!(Some(&scan.end), ends.last());
            prop_assert!(!scan.torn);
            prop_assert_eq!(super::scan(&bytes, FIRST + 1, |_, _| true), Err(Damage::NotALog));
        }

        /// A power cut while the last batch is written: any of its sectors may be missing. All that
        /// was synced is there, what else is there is whole, and the rest is made anew.
        #[test]
        fn a_torn_batch_loses_nothing_older(batches in batches(), missing: u64) {
            let (mut bytes, ends) = file(&batches);
            let synced = ends.len().checked_sub(2).map_or(HEADER, |last| ends[last]);
            let older = batches[..batches.len() - 1].concat().len();
            for (n, part) in sectors(synced..ends[ends.len() - 1]).enumerate() {
                if missing >> (n % 64) & 1 == 1 {
                    bytes[part].fill(0);
                }
            }
            let lengths = batches.concat();
            let found = scan(&bytes, FIRST, opens(&lengths)).unwrap();
            prop_assert!((older..=lengths.len()).contains(&found.records.len()));
            prop_assert!(found.end >= synced);
            // As it is opened, and goes on.
            bytes[found.end..].fill(0);
            let again = scan(&bytes, FIRST, opens(&lengths)).unwrap();
            prop_assert_eq!(again, Scan { torn: false, ..found });
        }

        /// A flipped bit is never taken for the log's end.
        #[test]
        fn damage_is_seen(batches in batches(), at: prop::sample::Index, bit in 0..8u8) {
            let (mut bytes, ends) = file(&batches);
            bytes[at.index(ends[ends.len() - 1])] ^= 1 << bit;
            let lengths = batches.concat();
            // What only fills up says nothing.
            if let Ok(found) = scan(&bytes, FIRST, opens(&lengths)) {
                prop_assert_eq!(found.records.len(), lengths.len());
            }
        }

        /// Nor is a sector that a disk lost, if anything was written after it was synced.
        #[test]
        fn a_lost_sector_is_seen(batches in batches(), at: prop::sample::Index) {
            let (mut bytes, ends) = file(&batches);
            prop_assume!(ends.len() > 1);
            let synced = ends[ends.len() - 2];
            let parts: Vec<_> = sectors(HEADER..synced).collect();
            bytes[parts[at.index(parts.len())].clone()].fill(0);
            let lengths = batches.concat();
            prop_assert!(scan(&bytes, FIRST, opens(&lengths)).is_err());
        }

        #[test]
        fn garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..3000)) {
            let bytes = [&header(FIRST)[..], &garbage].concat();
            let _ = scan(&bytes, FIRST, |_, sealed| sealed.len() > 3);
        }
    }
}
