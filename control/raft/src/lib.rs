//! The replicated store: openraft behind three verbs, `propose`, `read_barrier`, `watch`.
//!
//! - [`Raft`] is the handle: it starts, forwards writes to the leader, waits until they are applied
//!   here, and says who leads.
//! - `disk` is what is kept (vote, snapshot, and `log`, which is written in batches), sealed record
//!   by record; `machine` the store in memory; `network` the calls between nodes over a
//!   [`Transport`] that the daemon gives.
//!
//! openraft is an implementation detail: no type of it crosses this seam.

#![forbid(unsafe_code)]

mod config;
mod disk;
mod forward;
#[cfg(fuzzing)]
pub mod fuzz;
mod handle;
mod leadership;
mod log;
mod machine;
mod network;
mod seal;
mod segment;
mod types;

pub use config::{Observe, RaftConfig, SNAPSHOT_ENTRIES, Timed, Timers};
pub use disk::DiskError;
pub use forward::{Applied, NO_LEADER, ProposeError, ReadError, VoterError};
pub use handle::{BootstrapError, Raft, ServeError, StartError};
pub use leadership::{Leadership, Progress};
pub use network::{RpcKind, Transport, TransportError, UnknownKind};
pub use seal::SealError;
pub use types::CodecError;

#[cfg(test)]
mod tests;
