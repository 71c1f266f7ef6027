//! Calls between nodes: HTTP/2 over mutual TLS, msgpack bodies with named fields.
//!
//! - [`Route`]: all calls there are, who may make them ([`policy`]), how large their bodies may be.
//!   A new call does not compile without an answer to these.
//! - [`messages`]: what they carry. [`frames`]: the streams of messages within a body.
//! - [`server`]: listens, judges the caller, hands typed requests to an [`RpcHandler`].
//! - [`client`]: one pooled connection per peer. [`raft`]: raft's transport over it.

pub mod client;
pub mod frames;
#[cfg(fuzzing)]
pub mod fuzz;
pub mod messages;
pub mod policy;
pub mod raft;
pub mod server;

use std::fmt;

use mesh_raft::RpcKind;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use client::{CallError, RpcClient};
pub use policy::{Caller, Policy, Standing};
pub use raft::RaftTransport;
pub use server::{Joiner, Refusals, RpcHandler, RpcServer};

/// The calls between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// A new node asks to be admitted.
    Join,
    /// Raft among managers.
    Raft(RpcKind),
    /// A node's session with a manager: assignments and records come down.
    Session,
    /// What a node reports: task statuses, its acknowledged revision, its description.
    Report,
    /// A command in a task, for its node to run.
    Exec,
    /// A node asks for a certificate of its role, as the store has it, for a new key.
    Renew,
    /// The output of tasks, from their node.
    Logs,
    /// A node's counters.
    Stats,
    /// A node says that it leaves the cluster.
    Leave,
    /// Full state for gossip.
    AntiEntropy,
}

const MIB: usize = 1 << 20;

impl Route {
    /// Its path.
    #[must_use]
    pub fn path(self) -> String {
        match self {
            Self::Join => "/join".into(),
            Self::Raft(kind) => format!("/raft/{kind}"),
            Self::Session => "/session".into(),
            Self::Report => "/report".into(),
            Self::Exec => "/exec".into(),
            Self::Renew => "/renew".into(),
            Self::Logs => "/logs".into(),
            Self::Stats => "/stats".into(),
            Self::Leave => "/leave".into(),
            Self::AntiEntropy => "/antientropy".into(),
        }
    }

    /// The call of a path.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        Some(match path {
            "/join" => Self::Join,
            "/session" => Self::Session,
            "/report" => Self::Report,
            "/exec" => Self::Exec,
            "/renew" => Self::Renew,
            "/logs" => Self::Logs,
            "/stats" => Self::Stats,
            "/leave" => Self::Leave,
            "/antientropy" => Self::AntiEntropy,
            _ => Self::Raft(path.strip_prefix("/raft/")?.parse().ok()?),
        })
    }

    /// The most that a request's body may have, in bytes. For [`Route::Exec`]: of each message.
    #[must_use]
    pub fn body_limit(self) -> usize {
        match self {
            Self::Raft(RpcKind::Snapshot) => 256 * MIB,
            Self::Raft(_) => 16 * MIB,
            Self::AntiEntropy => mesh_gossip::MAX_SYNC,
            Self::Report => 4 * MIB,
            Self::Join | Self::Session | Self::Exec | Self::Renew | Self::Logs => MIB,
            Self::Stats | Self::Leave => MIB,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

/// What a handler answers instead of a result; it crosses the wire as it is.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct RpcError {
    /// What the caller may do about it.
    pub kind: RpcErrorKind,
    /// For people.
    pub message: String,
}

/// What a caller may do about an [`RpcError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RpcErrorKind {
    /// The caller may not do this, now or later.
    Denied,
    /// The request is wrong.
    Invalid,
    /// There is no such thing here.
    NotFound,
    /// Not at this time: no leader, starting, overloaded. Ask another manager, or later.
    Unavailable,
    /// Something failed that should not.
    Internal,
}

impl RpcError {
    /// Makes one.
    #[must_use]
    pub fn new(kind: RpcErrorKind, message: impl fmt::Display) -> Self {
        Self { kind, message: message.to_string() }
    }

    fn status(&self) -> http::StatusCode {
        match self.kind {
            RpcErrorKind::Denied => http::StatusCode::FORBIDDEN,
            RpcErrorKind::Invalid => http::StatusCode::BAD_REQUEST,
            RpcErrorKind::NotFound => http::StatusCode::NOT_FOUND,
            RpcErrorKind::Unavailable => http::StatusCode::SERVICE_UNAVAILABLE,
            RpcErrorKind::Internal => http::StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
