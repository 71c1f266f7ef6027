//! Hints: what a node says before the store does, of its endpoints and of nodes that it watches.
//!
//! A hint withdraws or restores a record that its receiver already has from the store; without one
//! it means nothing, so a false or late hint never makes an endpoint. Who said it is the word of
//! whoever passed it on: all members hold the key. So whoever applies one of an endpoint must check
//! that the record's node is the hint's owner, and one of a data path makes its receivers look for
//! themselves, no more ([`probe`](crate::probe)).

use std::{collections::BTreeMap, time::Duration};

use mesh_types::{EndpointId, NodeNumber};

/// Hints that are kept of one owner. What goes is the same on all nodes, whatever came first.
pub const MAX_PER_OWNER: usize = 1024;
/// Members that a hint is told at a time.
pub(crate) const FANOUT: usize = 4;
/// Hints in one datagram: with the sender and the seal, well below 1,000 bytes.
pub(crate) const PER_DATAGRAM: usize = 32;
/// Datagrams' worth of hints that are told at a time.
const BATCHES: usize = 4;

/// How an endpoint or a data path does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HintState {
    /// It takes what comes.
    Ready,
    /// What it has goes on; it should get nothing new.
    Draining,
    /// Nobody answers there.
    Dead,
}

/// What a hint is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// An endpoint of the node that says it.
    Endpoint(EndpointId),
    /// The data path of another node, which the one that says it watches.
    DataPath(NodeNumber),
}

impl Subject {
    const FIRST: Self = Self::Endpoint(EndpointId::MIN);
    const LAST: Self = Self::DataPath(NodeNumber::MAX);
}

/// What a node says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hint {
    /// Of what.
    pub subject: Subject,
    /// Who says it.
    pub owner: NodeNumber,
    /// The higher one holds; of two the same, the worse state.
    pub generation: u64,
    /// What is said.
    pub state: HintState,
}

type Key = (NodeNumber, Subject);
type Value = (u64, HintState);

/// News that are still to be told.
#[derive(Debug, Clone, Copy)]
struct News {
    times: u8,
    due: Duration,
}

/// All hints known here. Any two tables that took in the same hints, in any order, are the same.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    known: BTreeMap<Key, Value>,
    news: BTreeMap<Key, News>,
}

fn hint(((owner, subject), (generation, state)): (&Key, &Value)) -> Hint {
    Hint { subject: *subject, owner: *owner, generation: *generation, state: *state }
}

impl Hints {
    /// Takes one in; says whether it is news, which are to be told `times` times from `now` on.
    pub(crate) fn learn(&mut self, now: Duration, new: Hint, times: u8) -> bool {
        let key = (new.owner, new.subject);
        let value = (new.generation, new.state);
        if self.known.get(&key).is_some_and(|old| *old >= value) {
            return false;
        }
        self.known.insert(key, value);
        let of_owner = (new.owner, Subject::FIRST)..=(new.owner, Subject::LAST);
        if self.known.range(of_owner.clone()).count() > MAX_PER_OWNER {
            let least = self.known.range(of_owner).min_by_key(|(key, value)| (*value, *key));
            if let Some(least) = least.map(|(key, _)| *key) {
                self.known.remove(&least);
                self.news.remove(&least);
                if least == key {
                    return false;
                }
            }
        }
        self.news.insert(key, News { times, due: now });
        true
    }

    /// Forgets those of and about nodes that `stays` does not name.
    pub(crate) fn retain(&mut self, stays: impl Fn(NodeNumber) -> bool) {
        let stays = |(owner, subject): &Key| {
            stays(*owner) && !matches!(subject, Subject::DataPath(peer) if !stays(*peer))
        };
        self.known.retain(|key, _| stays(key));
        self.news.retain(|key, _| stays(key));
    }

    /// The generation of what an owner said last.
    pub(crate) fn generation(&self, owner: NodeNumber, subject: Subject) -> Option<u64> {
        self.known.get(&(owner, subject)).map(|(generation, _)| *generation)
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = Hint> {
        self.known.iter().map(hint)
    }

    pub(crate) fn next_timer(&self) -> Option<Duration> {
        self.news.values().map(|news| news.due).min()
    }

    /// The news to tell at `now`, each list for one datagram; they are due again after `again`.
    pub(crate) fn tell(&mut self, now: Duration, again: Duration) -> Vec<Vec<Hint>> {
        let mut due: Vec<(u8, Key)> = self
            .news
            .iter()
            .filter(|(_, news)| news.due <= now)
            .map(|(key, news)| (news.times, *key))
            .collect();
        // The newest first; the rest waits for the next time.
        due.sort_by_key(|(times, key)| (std::cmp::Reverse(*times), *key));
        let later = due.split_off(due.len().min(BATCHES * PER_DATAGRAM));
        for (_, key) in &later {
            if let Some(news) = self.news.get_mut(key) {
                news.due = now + again;
            }
        }
        let mut told = Vec::new();
        for (times, key) in due {
            if times <= 1 {
                self.news.remove(&key);
            } else {
                self.news.insert(key, News { times: times - 1, due: now + again });
            }
            told.extend(self.known.get(&key).map(|value| hint((&key, value))));
        }
        told.chunks(PER_DATAGRAM).map(<[Hint]>::to_vec).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_hint() -> impl Strategy<Value = Hint> {
        (1u64..2000, any::<bool>(), 1u64..3, 0u64..6, 0..3usize).prop_map(
            |(number, endpoint, owner, generation, state)| Hint {
                subject: match endpoint {
                    true => Subject::Endpoint(EndpointId::new(number).unwrap()),
                    false => Subject::DataPath(NodeNumber::new(number).unwrap()),
                },
                owner: NodeNumber::new(owner).unwrap(),
                generation,
                state: [HintState::Ready, HintState::Draining, HintState::Dead][state],
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_order_of_hints_does_not_matter(
            hints in prop::collection::vec(any_hint(), 0..2500),
        ) {
            let (mut there, mut back) = (Hints::default(), Hints::default());
            for hint in &hints {
                there.learn(Duration::ZERO, *hint, 1);
            }
            for hint in hints.iter().rev() {
                back.learn(Duration::ZERO, *hint, 1);
            }
            prop_assert!(there.iter().eq(back.iter()));
            prop_assert!(there.iter().len() <= 2 * MAX_PER_OWNER);
        }
    }

    #[test]
    fn news_are_told_as_often_as_asked_and_then_no_more() {
        let mut hints = Hints::default();
        for endpoint in 1..=200 {
            let hint = Hint {
                subject: Subject::Endpoint(EndpointId::new(endpoint).unwrap()),
                owner: NodeNumber::MIN,
                generation: 1,
                state: HintState::Dead,
            };
            assert!(hints.learn(Duration::ZERO, hint, 3));
            assert!(!hints.learn(Duration::ZERO, hint, 3));
        }
        let mut told = BTreeMap::<Subject, u32>::new();
        while let Some(due) = hints.next_timer() {
            for batch in hints.tell(due, Duration::from_millis(100)) {
                assert!(batch.len() <= PER_DATAGRAM);
                batch.iter().for_each(|hint| *told.entry(hint.subject).or_default() += 1);
            }
        }
        assert_eq!(told.len(), 200);
        assert!(told.values().all(|times| *times == 3));
    }
}
