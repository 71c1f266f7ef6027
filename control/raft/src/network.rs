//! What raft nodes say to each other, over a transport that the daemon gives.

use std::{fmt, future::Future, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use mesh_types::NodeNumber;
use openraft::{
    RaftNetworkFactory, RaftNetworkV2,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable},
    network::{RPCOption, RPCTypes},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
        TransferLeaderResponse, VoteRequest, VoteResponse,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{
    disk::bytes_field,
    types::{CodecError, Member, Snapshot, SnapshotMeta, Types, Vote, decode, encode},
};

/// The kinds of calls between raft nodes. All of them are for managers alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RpcKind {
    /// Log entries and heartbeats.
    Append,
    /// A vote.
    Vote,
    /// Whether a vote would be granted; changes nothing.
    PreVote,
    /// A whole snapshot; the one call with a large body.
    Snapshot,
    /// A hand-over of leadership.
    TransferLeader,
    /// A write forwarded to the leader.
    Propose,
    /// The leader's read index.
    ReadIndex,
    /// A change of the voters forwarded to the leader.
    ChangeVoters,
}

impl RpcKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Append,
        Self::Vote,
        Self::PreVote,
        Self::Snapshot,
        Self::TransferLeader,
        Self::Propose,
        Self::ReadIndex,
        Self::ChangeVoters,
    ];

    /// Its name in paths (`/raft/append`).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::Vote => "vote",
            Self::PreVote => "pre-vote",
            Self::Snapshot => "snapshot",
            Self::TransferLeader => "transfer-leader",
            Self::Propose => "propose",
            Self::ReadIndex => "read-index",
            Self::ChangeVoters => "change-voters",
        }
    }
}

impl fmt::Display for RpcKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RpcKind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| UnknownKind(name.to_owned()))
    }
}

/// There is no such kind of call.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is no raft call")]
pub struct UnknownKind(String);

/// Why a call gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TransportError {
    /// The peer never got it.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The peer may or may not have acted on it.
    #[error("{0}")]
    Failed(String),
    /// No answer in time; the peer may or may not have acted on it.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// Carries calls to other raft nodes: [`Raft::serve`](crate::Raft::serve) answers them there.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// One call. `address` is the target's as the group's membership has it.
    async fn call(
        &self,
        target: NodeNumber,
        address: SocketAddr,
        kind: RpcKind,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, TransportError>;
}

/// The body of every call. The number guards against an address that another node has by now.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Envelope<T> {
    pub(crate) to: u64,
    pub(crate) body: T,
}

/// The body of [`RpcKind::Snapshot`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotRequest {
    pub(crate) vote: Vote,
    pub(crate) meta: SnapshotMeta,
    #[serde(with = "bytes_field")]
    pub(crate) data: Vec<u8>,
}

/// Why [`call`] failed.
#[derive(Debug, Error)]
pub(crate) enum CallError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Encodes, calls, decodes.
pub(crate) async fn call<Req: Serialize, Resp: DeserializeOwned>(
    transport: &dyn Transport,
    (target, member): (u64, Member),
    kind: RpcKind,
    request: &Req,
    timeout: Duration,
) -> Result<Resp, CallError> {
    let number = NodeNumber::new(target)
        .map_err(|e| TransportError::Unreachable(format!("raft node {target}: {e}")))?;
    let body = encode(&Envelope { to: target, body: request })?;
    let call = transport.call(number, member.address, kind, body.into(), timeout);
    // The transport keeps the time; this holds it to that.
    let answer = match tokio::time::timeout(timeout, call).await {
        Ok(answer) => answer?,
        Err(_) => return Err(TransportError::Timeout(timeout).into()),
    };
    Ok(decode(&answer)?)
}

#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) number: u64,
    pub(crate) transport: Arc<dyn Transport>,
}

/// One peer.
pub(crate) struct Peer {
    network: Network,
    target: u64,
    member: Member,
}

impl Peer {
    async fn call<Req: Serialize, Resp: DeserializeOwned>(
        &self,
        kind: RpcKind,
        request: &Req,
        timeout: Duration,
    ) -> Result<Resp, RPCError<Types>> {
        let target = (self.target, self.member);
        call(&*self.network.transport, target, kind, request, timeout).await.map_err(|e| match e {
            CallError::Transport(TransportError::Unreachable(_)) => {
                RPCError::Unreachable(Unreachable::new(&e))
            }
            CallError::Transport(TransportError::Timeout(timeout)) => RPCError::Timeout(Timeout {
                action: action(kind),
                id: self.network.number,
                target: self.target,
                timeout,
            }),
            e => RPCError::Network(NetworkError::new(&e)),
        })
    }
}

fn action(kind: RpcKind) -> RPCTypes {
    match kind {
        RpcKind::Vote | RpcKind::PreVote => RPCTypes::Vote,
        RpcKind::Snapshot => RPCTypes::InstallSnapshot,
        RpcKind::TransferLeader => RPCTypes::TransferLeader,
        _ => RPCTypes::AppendEntries,
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, member: &Member) -> Peer {
        Peer { network: self.clone(), target, member: *member }
    }
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        // openraft gives a heartbeat no longer than that; entries wait for the peer's disk.
        let timeout = if request.entries.is_empty() {
            option.hard_ttl()
        } else {
            option.hard_ttl().max(Duration::from_secs(2))
        };
        self.call(RpcKind::Append, &request, timeout).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::Vote, &request, option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::PreVote, &request, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let request = SnapshotRequest { vote, meta: snapshot.meta, data: snapshot.snapshot };
        tokio::select! {
            answer = self.call(RpcKind::Snapshot, &request, option.hard_ttl()) => Ok(answer?),
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::TransferLeader, &request, option.hard_ttl()).await
    }
}
