//! What openraft is instantiated with, and the codec of everything that is stored or sent.

use std::{fmt, net::SocketAddr};

use mesh_control::command::{Command, Outcome, Proposal, Rejection};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

openraft::declare_raft_types!(
    /// `leader_id_std`: at most one leader per term, so that a term fences a leader's decisions.
    pub(crate) Types:
        D = Write,
        R = Reply,
        NodeId = u64,
        Node = Member,
        Term = u64,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type LogId = openraft::type_config::alias::LogIdOf<Types>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<Types>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<Types>;
pub(crate) type Membership = openraft::type_config::alias::StoredMembershipOf<Types>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<Types>;
pub(crate) type Snapshot = openraft::type_config::alias::SnapshotOf<Types, Vec<u8>>;

/// One write as the log holds it. The id makes retries harmless: a write whose answer was lost (its
/// leader died) is proposed again under the same id and applied once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Write {
    /// Drawn by the proposer.
    pub(crate) id: WriteId,
    /// What to apply.
    pub(crate) proposal: Proposal,
}

/// The identity of a write, 128 random bits.
pub(crate) type WriteId = [u8; 16];

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The name alone: commands carry secrets.
        let name = match &self.proposal.command {
            Command::Init(_) => "init",
            Command::AddNode(_) => "add-node",
            Command::UpdateNode { .. } => "update-node",
            Command::ReportNodes(_) => "report-nodes",
            Command::RemoveNode { .. } => "remove-node",
            Command::CreateNetwork { .. } => "create-network",
            Command::RemoveNetwork { .. } => "remove-network",
            Command::CreateService { .. } => "create-service",
            Command::UpdateService { .. } => "update-service",
            Command::RollBackService { .. } => "roll-back-service",
            Command::RemoveService { .. } => "remove-service",
            Command::ChangeTasks(_) => "change-tasks",
            Command::ReportTasks { .. } => "report-tasks",
            Command::RotateToken { .. } => "rotate-token",
            #[allow(unreachable_patterns, reason = "commands are added by others at any time")]
            _ => "command",
        };
        f.write_str(name)
    }
}

/// What applying an entry gave; `None` for entries that are raft's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reply(pub(crate) Option<Answer>);

/// What came of a write and at which log index it was applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) index: u64,
    pub(crate) result: Result<Outcome, Rejection>,
}

/// A member of the raft group: where its peers reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) address: SocketAddr,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.address, f)
    }
}

/// openraft's storage suite makes members out of nothing.
#[cfg(test)]
impl Default for Member {
    fn default() -> Self {
        Self { address: SocketAddr::from(([127, 0, 0, 1], 0)) }
    }
}

/// A value that could not be encoded or decoded.
#[derive(Debug, Error)]
pub enum CodecError {
    /// Not representable in msgpack.
    #[error("cannot encode: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
    /// Not what was expected.
    #[error("cannot decode: {0}")]
    Decode(#[from] rmp_serde::decode::Error),
}

/// Fields by name, so that a later version may add some.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    Ok(rmp_serde::to_vec_named(value)?)
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    Ok(rmp_serde::from_slice(bytes)?)
}
