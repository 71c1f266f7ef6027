//! The node daemon. It alone owns a runtime, sockets, TLS and clocks; what it decides, it decides
//! with the sans-IO crates below it.
//!
//! Read `node` first: a node is inactive or a member, and a member is a set of tasks around the
//! revision stream.

pub mod agent;
pub mod api;
pub mod config;
pub mod dns_process;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod gossip;
pub mod identity;
pub mod log;
pub mod metrics;
pub mod node;
pub mod options;
pub mod pki;
pub mod rpc;
pub mod service;
pub mod tls;
