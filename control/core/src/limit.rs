//! How often something may be done, by each source and by all together.

use std::{collections::BTreeMap, time::Duration};

/// So many in a row, and one more each time that this long has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// In a row.
    pub burst: u32,
    /// For one more.
    pub every: Duration,
}

/// What is left of a rate (the generic cell rate algorithm, ITU-T I.371: one time says it all).
/// Times are since any fixed moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allowance {
    /// When all of the burst is there again.
    full_at: Duration,
}

impl Allowance {
    /// How long until one more is allowed.
    #[must_use]
    pub fn wait(&self, rate: Rate, now: Duration) -> Duration {
        let after = self.full_at.max(now) + rate.every;
        after.saturating_sub(now + rate.every * rate.burst)
    }

    /// Takes one, if it is allowed.
    pub fn take(&mut self, rate: Rate, now: Duration) -> bool {
        let allowed = self.wait(rate, now).is_zero();
        if allowed {
            self.full_at = self.full_at.max(now) + rate.every;
        }
        allowed
    }
}

/// Why there is nothing left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    /// This source had its share, and has to wait this long.
    Source(Duration),
    /// All together had theirs, and this one has to wait this long.
    Total(Duration),
}

/// A rate for each source, and one for all of them.
#[derive(Debug)]
pub struct Allowances<S> {
    each: Rate,
    all: Rate,
    sources: BTreeMap<S, Allowance>,
    total: Allowance,
}

impl<S: Ord + Copy> Allowances<S> {
    /// Nothing is used up yet.
    #[must_use]
    pub fn new(each: Rate, all: Rate) -> Self {
        Self { each, all, sources: BTreeMap::new(), total: Allowance::default() }
    }

    /// Whether this source has something left of its own share.
    ///
    /// # Errors
    /// [`Exceeded::Source`].
    pub fn check(&self, source: S, now: Duration) -> Result<(), Exceeded> {
        let wait = self.sources.get(&source).copied().unwrap_or_default().wait(self.each, now);
        if wait.is_zero() { Ok(()) } else { Err(Exceeded::Source(wait)) }
    }

    /// Takes one of both.
    ///
    /// # Errors
    /// [`Exceeded`]; nothing is taken then.
    pub fn take(&mut self, source: S, now: Duration) -> Result<(), Exceeded> {
        self.check(source, now)?;
        if !self.total.take(self.all, now) {
            return Err(Exceeded::Total(self.total.wait(self.all, now)));
        }
        // What is full again need not be remembered. So there are never more than the total allows
        // in the time that one source takes to recover.
        self.sources.retain(|_, left| left.full_at > now);
        self.sources.entry(source).or_default().take(self.each, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const RATE: Rate = Rate { burst: 3, every: SECOND };

    #[test]
    fn a_burst_then_one_each_time() {
        let mut left = Allowance::default();
        let mut at = |seconds: u64| left.take(RATE, SECOND * u32::try_from(seconds).unwrap());
        assert!(at(10) && at(10) && at(10));
        assert!(!at(10));
        assert!(at(11) && !at(11));
        assert!(at(99) && at(99) && at(99) && !at(99));
        assert_eq!(left.wait(RATE, SECOND * 99), SECOND);
    }

    #[test]
    fn one_source_takes_nothing_from_another_but_all_have_an_end() {
        let all = Rate { burst: 5, every: SECOND };
        let mut allowances = Allowances::new(RATE, all);
        let now = SECOND;
        for _ in 0..3 {
            assert_eq!(allowances.take(1, now), Ok(()));
        }
        assert_eq!(allowances.take(1, now), Err(Exceeded::Source(SECOND)));
        assert_eq!(allowances.check(2, now), Ok(()));
        assert_eq!((allowances.take(2, now), allowances.take(3, now)), (Ok(()), Ok(())));
        assert_eq!(allowances.take(4, now), Err(Exceeded::Total(SECOND)));
        assert_eq!(allowances.take(4, now + SECOND), Ok(()));
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_never_many_sources(
            steps in prop::collection::vec((0u64..300, 0u8..200), 1..300)
        ) {
            let all = Rate { burst: 10, every: SECOND / 5 };
            let mut allowances = Allowances::new(RATE, all);
            let (mut now, mut taken) = (Duration::ZERO, 0u32);
            for (millis, source) in steps {
                now += Duration::from_millis(millis);
                taken += u32::from(allowances.take(source, now).is_ok());
                prop_assert!(all.every * taken.saturating_sub(all.burst) <= now);
                // Three seconds are 15 of the total's, beside its burst.
                prop_assert!(allowances.sources.len() <= 25);
            }
        }
    }
}
