//! Maglev consistent hashing (Eisenbud et al., NSDI '16, section 3.4).
//!
//! Every node computes the same table from the same backends, so a flow that moves to another
//! ingress node (ECMP, a node's death) finds the same backend there. A backend that leaves moves
//! hardly any flow but its own.

use std::collections::BTreeSet;

use mesh_types::ids::EndpointId;

/// Table sizes, each with the number of backends up to which it is used. Primes, as the permutation
/// demands, and about 100 times the backends, which bounds imbalance to a few per cent (same paper,
/// section 5.3). The steps are wide since all flows may move when a service crosses one.
const TIERS: [(usize, u32); 5] =
    [(2, 251), (10, 1021), (80, 8191), (640, 65_521), (usize::MAX, 131_071)];

/// The length of the table for this many backends; 0 for none.
#[must_use]
pub fn table_len(backends: usize) -> u32 {
    if backends == 0 {
        return 0;
    }
    TIERS.iter().find(|(most, _)| backends <= *most).map_or(131_071, |(_, size)| *size)
}

/// The balancing table: slot -> backend. Depends on the *set* of backends and the seed alone.
///
/// More backends than slots (131,071) leave some without a slot.
#[must_use]
pub fn table(backends: &[EndpointId], seed: u64) -> Vec<EndpointId> {
    let backends: BTreeSet<EndpointId> = backends.iter().copied().collect();
    let size = u64::from(table_len(backends.len()));
    let mut slots: Vec<Option<EndpointId>> = vec![None; size as usize];
    let mut walks: Vec<Walk> = backends.iter().map(|id| Walk::new(*id, seed, size)).collect();
    let mut left = slots.len();
    'fill: loop {
        for walk in &mut walks {
            if left == 0 {
                break 'fill;
            }
            // A walk visits every slot once in `size` steps and `left > 0`, so it finds a free one.
            let slot = loop {
                let slot = &mut slots[walk.step(size)];
                if slot.is_none() {
                    break slot;
                }
            };
            *slot = Some(walk.id);
            left -= 1;
        }
        if walks.is_empty() {
            break;
        }
    }
    slots.into_iter().flatten().collect()
}

/// One backend's permutation of the slots: `(offset + j * skip) mod size`.
struct Walk {
    id: EndpointId,
    next: u64,
    skip: u64,
}

impl Walk {
    fn new(id: EndpointId, seed: u64, size: u64) -> Self {
        let offset = mix(id.get() ^ mix(seed)) % size;
        let skip = mix(id.get().wrapping_add(mix(seed ^ 0x9e37_79b9_7f4a_7c15))) % (size - 1) + 1;
        Self { id, next: offset, skip }
    }

    fn step(&mut self, size: u64) -> usize {
        let slot = self.next;
        self.next = (self.next + self.skip) % size;
        slot as usize
    }
}

/// The finaliser of SplitMix64 (Steele et al., OOPSLA '14): a fixed bijection that spreads the
/// consecutive ids that the store leases.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn ids(raw: impl IntoIterator<Item = u64>) -> Vec<EndpointId> {
        raw.into_iter().map(|id| EndpointId::new(id).unwrap()).collect()
    }

    #[test]
    fn no_backends_no_table() {
        assert!(table(&[], 7).is_empty());
    }

    /// Wire-visible: nodes of different versions must agree, so the function may never change.
    #[test]
    fn golden() {
        let got = table(&ids([1, 2, 3]), 42);
        assert_eq!(got.len(), 1021);
        let head: Vec<u64> = got[..16].iter().map(|id| id.get()).collect();
        assert_eq!(head, GOLDEN);
    }
    const GOLDEN: [u64; 16] = [2, 3, 1, 3, 2, 1, 2, 3, 3, 1, 2, 2, 1, 2, 3, 1];

    #[test]
    fn sizes_are_prime() {
        for (_, size) in TIERS {
            assert!((2..size).take_while(|d| d * d <= size).all(|d| size % d != 0), "{size}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn order_does_not_matter(
            raw in prop::collection::btree_set(1u64..1 << 40, 1..100), seed: u64, turn: usize,
        ) {
            let sorted = ids(raw);
            let mut turned = sorted.clone();
            turned.rotate_left(turn % sorted.len());
            turned.reverse();
            prop_assert_eq!(table(&sorted, seed), table(&turned, seed));
        }

        #[test]
        fn shares_are_even(first in 1u64..1 << 39, count in 1usize..80, seed: u64) {
            let backends = ids((0..count as u64).map(|i| first + i));
            let mut shares: BTreeMap<EndpointId, u64> = BTreeMap::new();
            for id in table(&backends, seed) {
                *shares.entry(id).or_default() += 1;
            }
            let (min, max) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            // Backends take turns, so shares differ by one slot at most.
            prop_assert!(shares.len() == count && max - min <= 1, "{shares:?}");
        }

        /// Of the flows of the backends that stay, few move: their slots' share that changes hands.
        #[test]
        fn a_leaving_backend_disturbs_few(
            first in 1u64..1 << 39, count in 12usize..80, gone: usize, seed: u64,
        ) {
            let backends = ids((0..count as u64).map(|i| first + i));
            let gone = backends[gone % count];
            let rest: Vec<EndpointId> = backends.iter().copied().filter(|b| *b != gone).collect();
            let (before, after) = (table(&backends, seed), table(&rest, seed));
            prop_assert_eq!(before.len(), after.len());
            let moved = before.iter().zip(&after).filter(|(b, a)| **b != gone && b != a).count();
            prop_assert!(moved * 100 <= before.len() * 10, "{moved} of {} moved", before.len());
        }
    }
}
