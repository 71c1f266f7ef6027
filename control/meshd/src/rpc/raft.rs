//! Raft's calls over the RPC client.

use std::{net::SocketAddr, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use mesh_raft::{RpcKind, Transport, TransportError};
use mesh_types::NodeNumber;

use super::{CallError, Route, RpcClient};
use crate::tls::Expect;

/// Carries raft's calls. The other side must be a manager of the cluster; that it is the right one
/// is checked by raft itself, by number.
#[derive(Debug, Clone)]
pub struct RaftTransport {
    client: RpcClient,
}

impl RaftTransport {
    /// Over a client's connections.
    #[must_use]
    pub fn new(client: RpcClient) -> Self {
        Self { client }
    }
}

#[async_trait]
impl Transport for RaftTransport {
    async fn call(
        &self,
        _target: NodeNumber,
        address: SocketAddr,
        kind: RpcKind,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, TransportError> {
        let route = Route::Raft(kind);
        let answer = self.client.call_bytes(address, Expect::Manager, route, body, timeout).await;
        answer.map_err(|error| match error {
            CallError::Unreachable { .. } => TransportError::Unreachable(error.to_string()),
            CallError::Timeout { patience, .. } => TransportError::Timeout(patience),
            CallError::Broken { .. } | CallError::Refused(_) => {
                TransportError::Failed(error.to_string())
            }
        })
    }
}
