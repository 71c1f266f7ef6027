//! Known good and known bad histories, and many random ones.

use super::*;
use crate::Dice;

use Action::{Read, Swap, Write};

fn op(called: u64, answered: u64, action: Action<u32>) -> Operation<u32> {
    Operation { called, answered: Some(answered), action }
}

fn lost(called: u64, action: Action<u32>) -> Operation<u32> {
    Operation { called, answered: None, action }
}

#[test]
fn good_histories() {
    let cases: [(&str, Vec<Operation<u32>>); 9] = [
        ("nothing", vec![]),
        ("one after the other", vec![op(0, 1, Write(1)), op(2, 3, Read(1)), op(4, 5, Write(2))]),
        (
            "a read beside a write sees either",
            vec![op(0, 9, Write(1)), op(1, 2, Read(0)), op(3, 4, Read(1))],
        ),
        (
            "a lost write is seen late",
            vec![lost(0, Write(1)), op(1, 2, Read(0)), op(5, 6, Read(1))],
        ),
        ("a lost write is never seen", vec![lost(0, Write(1)), op(1, 2, Read(0))]),
        (
            "a lost write between two others",
            vec![lost(0, Write(7)), op(1, 2, Write(1)), op(3, 4, Read(7)), op(5, 6, Write(2))],
        ),
        (
            "writes beside each other in either order",
            vec![op(0, 5, Write(1)), op(1, 4, Write(2)), op(6, 7, Read(1)), op(8, 9, Read(1))],
        ),
        (
            "swaps follow each other",
            vec![
                op(0, 9, Swap { from: 1, to: 2 }),
                op(1, 8, Swap { from: 0, to: 1 }),
                op(10, 11, Read(2)),
            ],
        ),
        (
            "a lost swap that another stands on",
            vec![lost(0, Swap { from: 0, to: 1 }), op(3, 4, Swap { from: 1, to: 2 })],
        ),
    ];
    for (name, history) in cases {
        assert_eq!(check(0, &history), Ok(()), "{name}");
    }
}

#[test]
fn bad_histories() {
    let cases: [(&str, Vec<Operation<u32>>); 9] = [
        ("a stale read", vec![op(0, 1, Write(1)), op(2, 3, Read(0))]),
        (
            "an acknowledged write is lost",
            vec![op(0, 1, Write(1)), op(2, 3, Write(2)), op(4, 5, Read(1))],
        ),
        ("back in time", vec![op(0, 9, Write(1)), op(1, 2, Read(1)), op(3, 4, Read(0))]),
        ("out of nowhere", vec![op(0, 1, Read(5))]),
        ("seen before it was called", vec![op(0, 1, Read(1)), op(2, 3, Write(1))]),
        ("a lost write is seen before it was called", vec![op(0, 1, Read(1)), lost(2, Write(1))]),
        (
            "two swaps of one value",
            vec![op(0, 9, Swap { from: 0, to: 1 }), op(1, 8, Swap { from: 0, to: 2 })],
        ),
        (
            "a lost write takes effect once",
            vec![
                lost(0, Write(7)),
                op(1, 2, Read(7)),
                op(3, 4, Write(1)),
                op(5, 6, Read(1)),
                op(7, 8, Read(7)),
            ],
        ),
        (
            "readers do not agree on the order",
            vec![
                op(0, 20, Write(1)),
                op(1, 21, Write(2)),
                op(2, 3, Read(1)),
                op(4, 5, Read(2)),
                op(6, 7, Read(1)),
            ],
        ),
    ];
    for (name, history) in cases {
        let said = check(0, &history).expect_err(name).to_string();
        assert!(said.contains("no order explains"), "{name}: {said}");
    }
}

#[test]
fn the_message_shows_where_it_fails() {
    let history = [op(0, 1, Write(1)), op(2, 3, Write(2)), op(4, 5, Read(1)), op(6, 7, Read(2))];
    assert_eq!(
        check(0, &history).unwrap_err().to_string(),
        "no order explains the history: after 2 of 4 operations the register holds 2, and none of \
         these can come next:\n  Read(1), called at 4, answered 5"
    );
}

/// What clients of a real register may have seen: each operation takes effect at one moment, which
/// is widened to an interval; some answers are lost.
fn random(dice: &mut Dice, count: u32) -> Vec<Operation<u32>> {
    let mut value = 0;
    let mut history = Vec::new();
    for number in 1..=count {
        let moment = u64::from(number) * 100;
        let (called, answered) = (moment - dice.below(400).min(moment), moment + dice.below(400));
        let put = number;
        let action = match dice.below(4) {
            0 => Write(put),
            1 => Swap { from: value, to: put },
            _ => Read(value),
        };
        let lost = dice.below(10) == 0 && !matches!(action, Read(_));
        if !lost || dice.below(2) == 0 {
            value = step(&value, &action).unwrap_or(value);
        }
        let answered = (!lost).then_some(answered);
        history.push(Operation { called, answered, action });
    }
    history
}

#[test]
fn what_a_register_does_is_explained_and_what_it_does_not_is_not() {
    for seed in 0..60 {
        let mut dice = Dice::new(seed);
        let mut history = random(&mut dice, 120);
        assert_eq!(check(0, &history), Ok(()), "seed {seed}");
        // The last value, read much later, is explained; any other is not.
        let last = history.iter().rev().find_map(|operation| match operation.action {
            Read(value) => Some(value),
            _ => None,
        });
        let stale = last.unwrap_or_default();
        history.push(op(100_000, 100_001, Write(1_000)));
        history.push(op(100_002, 100_003, Read(stale)));
        // Unless what put it went without an answer, and so may come last.
        let puts = |o: &Operation<u32>| match o.action {
            Write(put) | Swap { to: put, .. } => put == stale,
            Read(_) => false,
        };
        if !history.iter().any(|o| o.answered.is_none() && puts(o)) {
            assert!(check(0, &history).is_err(), "seed {seed}");
        }
    }
}
