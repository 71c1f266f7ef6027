//! The search for an order that explains a history.

use std::{
    collections::HashSet,
    fmt::{self, Debug},
    hash::Hash,
};

use crate::{Action, Operation};

/// Configurations that are tried before the search gives up: some seconds, some 100 MB.
const TRIED_MAX: usize = 4_000_000;
/// Operations that a message shows.
const SHOWN_MAX: usize = 40;

/// Why a history is not accepted; its text shows the operations where it fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unexplained {
    /// No order explains it.
    Impossible(String),
    /// Too many orders are possible to try all of them: record shorter histories or fewer clients.
    GaveUp,
}

impl fmt::Display for Unexplained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Impossible(story) => f.write_str(story),
            Self::GaveUp => write!(f, "undecided after {TRIED_MAX} steps: the history is too long"),
        }
    }
}

impl std::error::Error for Unexplained {}

/// Looks for an order of `operations` on a register that held `initial`.
///
/// # Errors
/// [`Unexplained`].
pub fn check<V: Clone + Eq + Hash + Debug>(
    initial: V,
    operations: &[Operation<V>],
) -> Result<(), Unexplained> {
    let mut relevant: Vec<&Operation<V>> =
        operations.iter().filter(|operation| matters(operation, operations)).collect();
    relevant.sort_by_key(|operation| operation.called);
    Search::new(initial, &relevant).run()
}

/// An operation without an answer that nobody saw anything of may as well never have happened.
fn matters<V: Eq>(operation: &Operation<V>, all: &[Operation<V>]) -> bool {
    let (Action::Write(put) | Action::Swap { to: put, .. }) = &operation.action else {
        return operation.answered.is_some();
    };
    operation.answered.is_some()
        || all.iter().any(|other| match &other.action {
            Action::Read(seen) | Action::Swap { from: seen, .. } => seen == put,
            Action::Write(_) => false,
        })
}

/// The value after an action, if it is possible on `value`.
fn step<V: Clone + Eq>(value: &V, action: &Action<V>) -> Option<V> {
    match action {
        Action::Read(seen) => (seen == value).then(|| value.clone()),
        Action::Write(put) => Some(put.clone()),
        Action::Swap { from, to } => (from == value).then(|| to.clone()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Call(usize),
    Answer(usize),
}

/// Which operations are placed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Placed(Vec<u64>);

impl Placed {
    fn set(&mut self, operation: usize, placed: bool) {
        let bit = 1 << (operation % 64);
        if placed {
            self.0[operation / 64] |= bit;
        } else {
            self.0[operation / 64] &= !bit;
        }
    }

    fn has(&self, operation: usize) -> bool {
        self.0[operation / 64] & (1 << (operation % 64)) != 0
    }
}

/// Calls and answers that are not placed yet, as a list in the order of their times. An operation
/// may come next if its call is before the first answer in the list.
struct Search<'a, V> {
    operations: &'a [&'a Operation<V>],
    events: Vec<Event>,
    /// Where each operation's answer is in `events`.
    answer_of: Vec<Option<usize>>,
    /// Neighbours by position in `events`; the last position is the list's head and end.
    next: Vec<usize>,
    previous: Vec<usize>,
    placed: Placed,
    value: V,
}

impl<'a, V: Clone + Eq + Hash + Debug> Search<'a, V> {
    fn new(initial: V, operations: &'a [&'a Operation<V>]) -> Self {
        let mut timed = Vec::new();
        for (index, operation) in operations.iter().enumerate() {
            timed.push((operation.called, Event::Call(index)));
            timed.extend(operation.answered.map(|at| (at, Event::Answer(index))));
        }
        timed.sort_by_key(|(at, _)| *at);
        let events: Vec<Event> = timed.into_iter().map(|(_, event)| event).collect();
        let mut answer_of = vec![None; operations.len()];
        for (position, event) in events.iter().enumerate() {
            if let Event::Answer(operation) = event {
                answer_of[*operation] = Some(position);
            }
        }
        let places = events.len() + 1;
        Self {
            operations,
            answer_of,
            next: (0..places).map(|at| (at + 1) % places).collect(),
            previous: (0..places).map(|at| (at + places - 1) % places).collect(),
            placed: Placed(vec![0; operations.len().div_ceil(64)]),
            value: initial,
            events,
        }
    }

    fn head(&self) -> usize {
        self.events.len()
    }

    fn unlink(&mut self, at: usize) {
        let (previous, next) = (self.previous[at], self.next[at]);
        self.next[previous] = next;
        self.previous[next] = previous;
    }

    /// Undoes the last [`Self::unlink`] that is not undone yet.
    fn relink(&mut self, at: usize) {
        let (previous, next) = (self.previous[at], self.next[at]);
        self.next[previous] = at;
        self.previous[next] = at;
    }

    fn run(mut self) -> Result<(), Unexplained> {
        let mut required = self.answer_of.iter().flatten().count();
        // Where a call was placed, and the value before it.
        let mut path: Vec<(usize, V)> = Vec::new();
        let mut tried: HashSet<(Placed, V)> = HashSet::new();
        let mut furthest: (usize, Placed, V, usize) =
            (0, self.placed.clone(), self.value.clone(), self.next[self.head()]);
        let mut at = self.next[self.head()];
        while required > 0 {
            match self.events[at] {
                Event::Call(operation) => {
                    let after = step(&self.value, &self.operations[operation].action);
                    self.placed.set(operation, true);
                    let new = after.filter(|v| tried.insert((self.placed.clone(), v.clone())));
                    let Some(after) = new else {
                        self.placed.set(operation, false);
                        at = self.next[at];
                        continue;
                    };
                    if tried.len() > TRIED_MAX {
                        return Err(Unexplained::GaveUp);
                    }
                    path.push((at, std::mem::replace(&mut self.value, after)));
                    self.unlink(at);
                    if let Some(answer) = self.answer_of[operation] {
                        self.unlink(answer);
                        required -= 1;
                    }
                    at = self.next[self.head()];
                }
                Event::Answer(_) => {
                    if path.len() > furthest.0 || furthest.0 == 0 {
                        furthest = (path.len(), self.placed.clone(), self.value.clone(), at);
                    }
                    let Some((call, before)) = path.pop() else {
                        return Err(Unexplained::Impossible(self.story(&furthest)));
                    };
                    let Event::Call(operation) = self.events[call] else { continue };
                    self.value = before;
                    self.placed.set(operation, false);
                    if let Some(answer) = self.answer_of[operation] {
                        self.relink(answer);
                        required += 1;
                    }
                    self.relink(call);
                    at = self.next[call];
                }
            }
        }
        Ok(())
    }

    /// What stands where the best attempt ends.
    fn story(&self, furthest: &(usize, Placed, V, usize)) -> String {
        let (count, placed, value, stuck) = furthest;
        let mut story = format!(
            "no order explains the history: after {count} of {} operations the register holds \
             {value:?}, and none of these can come next:",
            self.operations.len()
        );
        let called_before = |operation: &usize| {
            self.events[..=*stuck].contains(&Event::Call(*operation)) && !placed.has(*operation)
        };
        let open: Vec<usize> = (0..self.operations.len()).filter(called_before).collect();
        for operation in open.iter().take(SHOWN_MAX) {
            let Operation { called, answered, action } = self.operations[*operation];
            let answered = answered.map_or_else(|| "never".to_owned(), |at| at.to_string());
            story += &format!("\n  {action:?}, called at {called}, answered {answered}");
        }
        if open.len() > SHOWN_MAX {
            story += &format!("\n  and {} more", open.len() - SHOWN_MAX);
        }
        story
    }
}

#[cfg(test)]
mod tests;
