//! Care about false death, after Lifeguard (Dadgar, Phillips, Currey, 2017), adapted to foca.
//!
//! foca declares a suspect dead when its timer ends without a higher incarnation heard. Under loss
//! that is too quick: the refutation may be lost where the member is well. So the timer is held
//! here, and a suspect is dead only if, over a whole window,
//! - it answered none of the questions that are put to it directly, many times per window;
//! - nothing else authentic came from it, whatever it was;
//! - and this node is itself in a state to judge: it was not stalled, and it heard from others.

use std::{collections::BTreeMap, time::Duration};

use foca::{Incarnation, Timer};
use mesh_types::NodeNumber;

use crate::member::Member;

/// How often a node that hears from nobody doubts itself before it judges others.
const MAX_DOUBTS: u8 = 3;

/// One member under suspicion by this node.
#[derive(Debug)]
pub(crate) struct Suspicion {
    pub(crate) member: Member,
    pub(crate) incarnation: Incarnation,
    /// foca's own timer: handed back, it means death.
    timer: Timer<Member>,
    since: Duration,
    next_ask: Duration,
    deadline: Duration,
    doubts: u8,
}

/// What to do about a suspect now.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Ask it whether it lives.
    Ask { suspect: Member, incarnation: Incarnation },
    /// It is dead: give foca its timer back.
    Dead(Timer<Member>),
}

/// All members under suspicion by this node, by number.
#[derive(Debug)]
pub(crate) struct Suspicions {
    window: Duration,
    ask_every: Duration,
    open: BTreeMap<NodeNumber, Suspicion>,
}

/// What this node heard lately.
pub(crate) struct Evidence<'a> {
    /// When something authentic last came from each member.
    pub(crate) heard: &'a BTreeMap<NodeNumber, Duration>,
    /// The active members.
    pub(crate) active: &'a [NodeNumber],
}

impl Suspicions {
    pub(crate) fn new(window: Duration, ask_every: Duration) -> Self {
        Self { window, ask_every, open: BTreeMap::new() }
    }

    /// Takes over foca's timer for a suspect. foca sends one for each failed probe: while one is
    /// open about the same life and incarnation, the others add nothing.
    pub(crate) fn open(&mut self, now: Duration, timer: Timer<Member>) {
        let Timer::ChangeSuspectToDown { member_id: member, incarnation, .. } = timer else {
            return;
        };
        let same = |s: &Suspicion| s.member == member && s.incarnation == incarnation;
        if self.open.get(&member.number).is_some_and(same) {
            return;
        }
        let deadline = now + self.window;
        self.open.insert(
            member.number,
            Suspicion {
                member,
                incarnation,
                timer,
                since: now,
                next_ask: now,
                deadline,
                doubts: 0,
            },
        );
    }

    /// Drops suspicions that `stands` no longer confirms.
    pub(crate) fn retain(&mut self, stands: impl Fn(&Suspicion) -> bool) {
        self.open.retain(|_, suspicion| stands(suspicion));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(crate) fn next_timer(&self) -> Option<Duration> {
        self.open.values().map(|s| s.next_ask.min(s.deadline)).min()
    }

    /// Starts every window anew: this node did not run for a while, so silence proves nothing.
    pub(crate) fn restart(&mut self, now: Duration) {
        for suspicion in self.open.values_mut() {
            suspicion.since = now;
            suspicion.next_ask = now;
            suspicion.deadline = now + self.window;
        }
    }

    /// What is due at `now`.
    pub(crate) fn judge(&mut self, now: Duration, evidence: &Evidence<'_>) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let mut dead = Vec::new();
        for (&number, suspicion) in &mut self.open {
            if now >= suspicion.deadline {
                let heard = evidence.heard.get(&number).is_some_and(|at| *at > suspicion.since);
                let deaf = evidence.deaf(number, now.saturating_sub(self.window));
                let doubtful = deaf && suspicion.doubts < MAX_DOUBTS;
                if !heard && !doubtful {
                    dead.push(number);
                    continue;
                }
                suspicion.doubts += u8::from(!heard);
                suspicion.since = now;
                suspicion.deadline = now + self.window;
            }
            if now >= suspicion.next_ask {
                suspicion.next_ask = now + self.ask_every;
                verdicts.push(Verdict::Ask {
                    suspect: suspicion.member,
                    incarnation: suspicion.incarnation,
                });
            }
        }
        verdicts.extend(
            dead.into_iter()
                .filter_map(|number| self.open.remove(&number))
                .map(|suspicion| Verdict::Dead(suspicion.timer)),
        );
        verdicts
    }
}

impl Evidence<'_> {
    /// There are others than `suspect`, and none of them was heard since `since`: the fault is
    /// probably here. A cluster of two cannot tell.
    fn deaf(&self, suspect: NodeNumber, since: Duration) -> bool {
        let mut others = self.active.iter().filter(|number| **number != suspect).peekable();
        others.peek().is_some()
            && others.all(|number| self.heard.get(number).is_none_or(|at| *at < since))
    }
}
