//! Listens for other nodes: handshake within five seconds, bounded connections, bounded bodies,
//! each call checked against [`Route::allows`] before its body is read.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_raft::RpcKind;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Route, RpcError, RpcErrorKind,
    frames::{self, FRAME_LIMIT, FrameReader, FrameWriter},
    messages::{
        ExecInput, ExecOutput, ExecRequest, JoinRequest, JoinResponse, LogsOutput, LogsRequest,
        NodeUpdate, RenewRequest, RenewResponse, ReportRequest, ReportResponse, SessionRequest,
        StatsResponse,
    },
};
use crate::{
    pki::{PublicKey, Subject},
    tls::{Peer, ServerTls},
};

/// Handshakes that take longer are cut.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A body must be there within this time.
const BODY: Duration = Duration::from_secs(30);
/// Connections at a time, of everybody. A cluster's nodes hold one or two each.
const CONNECTIONS: usize = 4096;
/// Connections at a time without a certificate of the cluster, and handshakes not yet done.
const STRANGERS: usize = 128;
/// Of these from one address.
const STRANGERS_EACH: usize = 32;
/// Calls at a time on one connection.
const STREAMS: u32 = 256;

/// A node that asks to join.
#[derive(Debug, Clone)]
pub struct Joiner {
    /// The key that it showed: the one to sign.
    pub public_key: PublicKey,
    /// Where it called from.
    pub remote: SocketAddr,
}

/// Answers other nodes. The caller's certificate was verified and its role allows the call; what
/// the store says about the caller by now (demoted, removed) is for the handler to check.
#[async_trait]
pub trait RpcHandler: Send + Sync + 'static {
    /// Admits a node.
    async fn join(&self, from: Joiner, request: JoinRequest) -> Result<JoinResponse, RpcError>;

    /// Raft; [`mesh_raft::Raft::serve`].
    async fn raft(&self, from: Subject, kind: RpcKind, body: Bytes) -> Result<Bytes, RpcError>;

    /// A node's session. It ends when the stream does; the stream is dropped when the node is gone.
    async fn session(
        &self,
        from: Subject,
        request: SessionRequest,
    ) -> Result<BoxStream<'static, NodeUpdate>, RpcError>;

    /// What a node reports.
    async fn report(
        &self,
        from: Subject,
        request: ReportRequest,
    ) -> Result<ReportResponse, RpcError>;

    /// Runs a command in a task here. The last message is `Exit` or `Failed`.
    async fn exec(
        &self,
        from: Subject,
        request: ExecRequest,
        input: FrameReader<ExecInput>,
        output: FrameWriter<ExecOutput>,
    );

    /// Signs a node's new key, for the role that the store says.
    async fn renew(&self, from: Subject, request: RenewRequest) -> Result<RenewResponse, RpcError>;

    /// Sends the output of tasks of this node; it ends when the writer is dropped.
    async fn logs(&self, from: Subject, request: LogsRequest, output: FrameWriter<LogsOutput>);

    /// The counters of this node's data plane.
    async fn stats(&self, from: Subject) -> Result<StatsResponse, RpcError>;

    /// The caller leaves the cluster.
    async fn leave(&self, from: Subject) -> Result<(), RpcError>;

    /// Full state of gossip, both ways.
    async fn anti_entropy(&self, from: Subject, body: Bytes) -> Result<Bytes, RpcError>;
}

/// A listener; closed when dropped, with all its connections.
#[derive(Debug)]
pub struct RpcServer {
    address: SocketAddr,
    task: JoinHandle<()>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tls: std::sync::RwLock<ServerTls>,
    connections: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    strangers_each: Mutex<HashMap<IpAddr, usize>>,
}

impl RpcServer {
    /// Listens.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn bind(
        address: SocketAddr,
        tls: ServerTls,
        handler: Arc<dyn RpcHandler>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await.map_err(|error| {
            let text = format!("cannot listen for other nodes on {address}: {error}");
            std::io::Error::new(error.kind(), text)
        })?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            tls: std::sync::RwLock::new(tls),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            strangers_each: Mutex::default(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared), handler));
        Ok(Self { address, task, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A renewed certificate, for connections from now on.
    pub fn set_tls(&self, tls: ServerTls) {
        *self.shared.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
    }
}

impl Drop for RpcServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, handler: Arc<dyn RpcHandler>) {
    // Dropping the set ends the connections with the listener.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: give connections time to end.
                tracing::warn!(%error, "cannot accept connections of other nodes");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(guest) = Guest::admit(&shared, remote.ip()) else {
            tracing::debug!(%remote, "too many connections: refused");
            continue;
        };
        let (shared, handler) = (Arc::clone(&shared), Arc::clone(&handler));
        connections.spawn(async move {
            if let Err(error) = connection(stream, remote, guest, &shared, handler).await {
                tracing::debug!(%remote, error, "connection refused or broken");
            }
        });
    }
}

/// The place that a connection takes until its other side proved to be a member.
struct Guest {
    shared: Arc<Shared>,
    ip: IpAddr,
    _stranger: OwnedSemaphorePermit,
    connection: Option<OwnedSemaphorePermit>,
}

impl Guest {
    fn admit(shared: &Arc<Shared>, ip: IpAddr) -> Option<Self> {
        let connection = Arc::clone(&shared.connections).try_acquire_owned().ok()?;
        let stranger = Arc::clone(&shared.strangers).try_acquire_owned().ok()?;
        let mut each = shared.strangers_each.lock().unwrap_or_else(PoisonError::into_inner);
        let count = each.entry(ip).or_default();
        if *count >= STRANGERS_EACH {
            return None;
        }
        *count += 1;
        drop(each);
        let (shared, connection) = (Arc::clone(shared), Some(connection));
        Some(Self { shared, ip, _stranger: stranger, connection })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut each = self.shared.strangers_each.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = each.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                each.remove(&self.ip);
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    remote: SocketAddr,
    mut guest: Guest,
    shared: &Shared,
    handler: Arc<dyn RpcHandler>,
) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    stream.set_nodelay(true).map_err(|e| text(&e))?;
    let tls = shared.tls.read().unwrap_or_else(PoisonError::into_inner).clone();
    let acceptor = TlsAcceptor::from(Arc::clone(&tls.config));
    let stream = timeout(HANDSHAKE, acceptor.accept(stream))
        .await
        .map_err(|_| format!("no handshake within {HANDSHAKE:?}"))?
        .map_err(|e| text(&e))?;
    let peer = tls.peer(stream.get_ref().1.peer_certificates()).map_err(|e| text(&e))?;
    // A member makes room for other strangers; a joiner keeps the place, and not for long.
    let (_place, patience) = match &peer {
        Peer::Node(_) => {
            let connection = guest.connection.take();
            drop(guest);
            ((None, connection), None)
        }
        Peer::Joiner(_) => ((Some(guest), None), Some(Duration::from_secs(60))),
    };
    let peer = Arc::new(peer);
    let service = service_fn(move |request| {
        let (peer, handler) = (Arc::clone(&peer), Arc::clone(&handler));
        async move { Ok::<_, Infallible>(serve(request, &peer, remote, handler).await) }
    });
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(16 << 10)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let served = builder.serve_connection(TokioIo::new(stream), service);
    match patience {
        None => served.await.map_err(|e| text(&e)),
        Some(patience) => timeout(patience, served)
            .await
            .map_err(|_| "a joiner stayed too long".to_owned())?
            .map_err(|e| text(&e)),
    }
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

async fn serve(
    request: Request<Incoming>,
    peer: &Peer,
    remote: SocketAddr,
    handler: Arc<dyn RpcHandler>,
) -> Answer {
    let path = request.uri().path();
    let route = match Route::parse(path) {
        Some(route) if request.method() == Method::POST && route.allows(peer) => route,
        _ => {
            tracing::warn!(%peer, %remote, path, "a call was refused");
            let why = format!("{peer} may not call {path}");
            return refuse(&RpcError::new(RpcErrorKind::Denied, why));
        }
    };
    let body = request.into_body();
    let answered = match peer {
        Peer::Joiner(key) => {
            let from = Joiner { public_key: key.clone(), remote };
            joiner_call(route, from, body, &*handler).await
        }
        Peer::Node(subject) => member_call(route, *subject, body, handler).await,
    };
    answered.unwrap_or_else(|error| {
        tracing::debug!(%peer, %route, %error, "a call failed");
        refuse(&error)
    })
}

async fn joiner_call(
    route: Route,
    from: Joiner,
    body: Incoming,
    handler: &dyn RpcHandler,
) -> Result<Answer, RpcError> {
    let request = message(&read(body, route).await?)?;
    done(&handler.join(from, request).await?)
}

async fn member_call(
    route: Route,
    from: Subject,
    body: Incoming,
    handler: Arc<dyn RpcHandler>,
) -> Result<Answer, RpcError> {
    match route {
        Route::Join => Err(RpcError::new(RpcErrorKind::Denied, "this node is in the cluster")),
        Route::Raft(kind) => {
            let body = read(body, route).await?;
            Ok(bytes(StatusCode::OK, handler.raft(from, kind, body).await?))
        }
        Route::AntiEntropy => {
            let body = read(body, route).await?;
            Ok(bytes(StatusCode::OK, handler.anti_entropy(from, body).await?))
        }
        Route::Stats => done(&handler.stats(from).await?),
        Route::Leave => done(&handler.leave(from).await?),
        Route::Report => {
            let request = message(&read(body, route).await?)?;
            done(&handler.report(from, request).await?)
        }
        Route::Session => {
            let request = message(&read(body, route).await?)?;
            let mut updates = handler.session(from, request).await?;
            let (writer, body) = frames::channel();
            tokio::spawn(async move {
                loop {
                    let update = tokio::select! {
                        update = updates.next() => update,
                        () = writer.closed() => break,
                    };
                    let Some(update) = update else { break };
                    if let Err(error) = writer.send(&update).await {
                        tracing::debug!(node = %from.node, %error, "a session ended");
                        break;
                    }
                }
            });
            Ok(Response::new(BoxBody::new(body)))
        }
        Route::Renew => {
            let request = message(&read(body, route).await?)?;
            done(&handler.renew(from, request).await?)
        }
        Route::Logs => {
            let request = message(&read(body, route).await?)?;
            let (writer, body) = frames::channel();
            tokio::spawn(async move { handler.logs(from, request, writer).await });
            Ok(Response::new(BoxBody::new(body)))
        }
        Route::Exec => {
            let mut reader = FrameReader::<ExecRequest>::new(body, route.body_limit());
            let request = timeout(BODY, reader.next()).await;
            let request = request
                .map_err(|_| invalid("no request came in time"))?
                .map_err(invalid)?
                .ok_or_else(|| invalid("no request came"))?;
            let (writer, body) = frames::channel();
            tokio::spawn(async move {
                handler.exec(from, request, reader.then(), writer).await;
            });
            Ok(Response::new(BoxBody::new(body)))
        }
    }
}

fn invalid(why: impl std::fmt::Display) -> RpcError {
    RpcError::new(RpcErrorKind::Invalid, why)
}

async fn read(body: Incoming, route: Route) -> Result<Bytes, RpcError> {
    let limit = route.body_limit().min(u32::MAX as usize);
    let whole = timeout(BODY, Limited::new(body, limit).collect()).await;
    let whole = whole.map_err(|_| invalid(format!("{route}: the body did not come in time")))?;
    Ok(whole.map_err(|e| invalid(format!("{route}: {e}")))?.to_bytes())
}

fn message<T: DeserializeOwned>(body: &[u8]) -> Result<T, RpcError> {
    rmp_serde::from_slice(body).map_err(invalid)
}

fn done<T: Serialize>(message: &T) -> Result<Answer, RpcError> {
    let body = rmp_serde::to_vec_named(message);
    let body = body.map_err(|e| RpcError::new(RpcErrorKind::Internal, e))?;
    Ok(bytes(StatusCode::OK, body.into()))
}

fn bytes(status: StatusCode, body: Bytes) -> Answer {
    let mut answer = Response::new(BoxBody::new(Full::new(body)));
    *answer.status_mut() = status;
    answer
}

fn refuse(error: &RpcError) -> Answer {
    // Two fields of plain text always encode.
    let body = rmp_serde::to_vec_named(error).unwrap_or_default();
    bytes(error.status(), body.into())
}

const _: () = assert!(FRAME_LIMIT < u32::MAX as usize);
