//! The resolver of tasks: 127.0.0.11 in every task's network namespace.
//!
//! [`answer`] is the logic, without IO: a [`Snapshot`](snapshot::Snapshot) becomes an
//! [`Index`](index::Index), and a query of a task becomes a [`Decision`](answer::Decision).
//! What most queries ask has a way of its own, `fast`, which says the same sooner.
//!
//! [`server`] is the shell around it, the process `meshd dns`: sockets inside the tasks'
//! namespaces, served in batches, [`forward`]ing of outside names from the node's, and the
//! [`control`] socket on which meshd pushes snapshots. It goes on with its last snapshot while
//! meshd is away, and its sockets wait in meshd while it is away itself ([`handover`]).
//!
//! Which names are internal, and so never leave the node, is said in [`index`].

pub mod answer;
mod batch;
mod cache;
pub mod control;
mod fast;
pub mod forward;
#[cfg(fuzzing)]
pub mod fuzz;
pub mod handover;
pub mod index;
mod memory;
mod names;
pub mod netns;
mod reverse;
mod serve;
pub mod server;
pub mod snapshot;
mod wire;
