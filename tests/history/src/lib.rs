//! Whether what clients saw of a register can be explained by one operation after the other, each
//! at one moment between its call and its answer: linearizability.
//!
//! [`Recorder`] takes down what clients do, [`check`] judges it, by the search of Wing and Gong
//! with Lowe's memory of where it has been. A cluster with several registers is linearizable if
//! each of them is, so every register has a history of its own.

#![forbid(unsafe_code)]

mod dice;
mod record;
mod search;

pub use dice::Dice;
pub use record::Recorder;
pub use search::{Unexplained, check};

/// What a client did to a register. Values should be written once each: then a read names the write
/// that it saw, and the check misses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<V> {
    /// It saw this value.
    Read(V),
    /// It put this value.
    Write(V),
    /// It put `to` where `from` stood.
    Swap {
        /// What it saw before.
        from: V,
        /// What it put in its place.
        to: V,
    },
}

/// One operation that took effect, or may have. One that is known to have changed nothing and shown
/// nothing (a refusal) is no part of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation<V> {
    /// When it was called. Times count events of the recorder; no clock is involved.
    pub called: u64,
    /// When it was answered. `None`: it was not, and may take effect at any later time, or never.
    pub answered: Option<u64>,
    /// What it did.
    pub action: Action<V>,
}
