//! The control plane without IO: the typed store, what changes it, and what follows from it.
//!
//! - [`model`]: the objects. [`command`]: the one way to change them. [`store`]: applies commands,
//!   deterministically: every manager that applies the same log holds the same store.
//! - [`leader`]: orchestrators, allocator retries, scheduler, restart: pure functions from a store
//!   view (and leader memory) to commands.
//! - [`stream`]: the revision stream and assignments, derived from the store.
//! - [`events`]: what happened, for those who watch.
//! - [`token`]: join tokens. [`limit`]: how often something may be done.
//!
//! Nothing here reads a clock, draws random numbers on its own, or does IO: time and fresh ids come
//! in with the command, leases are taken inside [`store::Store::apply`], so that no allocation is
//! ever rebuilt from memory.

#![forbid(unsafe_code)]

pub mod command;
pub mod events;
pub mod leader;
pub mod limit;
pub mod model;
pub mod store;
pub mod stream;
pub mod token;

#[cfg(any(test, fuzzing))]
#[cfg_attr(not(test), allow(dead_code, reason = "fuzzers need little of it"))]
#[allow(clippy::unwrap_used, reason = "for tests and fuzzers alone")]
mod fixtures;
#[cfg(fuzzing)]
pub mod fuzz;
#[cfg(test)]
mod sim;
