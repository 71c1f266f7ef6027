//! Listens for other nodes: handshake within five seconds, bounded connections, bounded bodies,
//! each call held against [`Route::policy`] before its body is read. A connection ends when the
//! certificate that opened it is good no more.

use std::{
    collections::HashMap,
    convert::Infallible,
    hash::Hash,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_control::limit::{Allowance, Rate};
use mesh_raft::RpcKind;
use mesh_types::NodeId;
use rustls_pki_types::CertificateDer;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Route, RpcError, RpcErrorKind, Standing,
    frames::{self, FRAME_LIMIT, FrameReader, FrameWriter},
    messages::{
        ExecInput, ExecOutput, ExecRequest, JoinRequest, JoinResponse, LogsOutput, LogsRequest,
        NodeUpdate, RenewRequest, RenewResponse, ReportRequest, ReportResponse, SessionRequest,
        StatsResponse,
    },
};
use crate::{
    pki::{self, PublicKey, Subject},
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
/// Connections at a time of one node: a cluster's nodes hold a few with each other, by what they
/// expect at the other end, and new ones beside them for a moment.
const MEMBER: usize = 16;
/// Of bodies that are read at a time on one connection, in KiB. Those of raft are managers' alone,
/// and do not wait.
const BODIES_KIB: u32 = 16 << 10;
/// Calls at a time on one connection.
const STREAMS: u32 = 256;
/// The same two of who wants to join.
const JOINER_KIB: u32 = 1 << 10;
const JOINER_STREAMS: u32 = 4;
/// A joiner has all that it needs within this time.
const JOINING: Duration = Duration::from_secs(60);
/// A certificate is judged again as often, for clocks may be set.
const JUDGE: Duration = Duration::from_secs(60);
/// Refusals that are logged; the others are only counted.
const LOGGED: Rate = Rate { burst: 20, every: Duration::from_secs(2) };

/// A node that asks to join.
#[derive(Debug, Clone)]
pub struct Joiner {
    /// The key that it showed: the one to sign.
    pub public_key: PublicKey,
    /// Where it called from.
    pub remote: SocketAddr,
}

/// Whom a node turned away, for its counters.
#[derive(Debug)]
pub struct Refusals {
    connections: AtomicU64,
    handshakes: AtomicU64,
    calls: AtomicU64,
    since: Instant,
    logged: Mutex<Allowance>,
}

impl Default for Refusals {
    fn default() -> Self {
        Self {
            connections: AtomicU64::new(0),
            handshakes: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            since: Instant::now(),
            logged: Mutex::default(),
        }
    }
}

impl Refusals {
    /// Connections beyond what is taken, those whose certificate is good for nothing or no more,
    /// and calls that their caller may not make.
    #[must_use]
    pub fn counters(&self) -> [(&'static str, u64); 3] {
        [
            ("rpc_connections_refused", self.connections.load(Ordering::Relaxed)),
            ("rpc_handshakes_refused", self.handshakes.load(Ordering::Relaxed)),
            ("rpc_calls_refused", self.calls.load(Ordering::Relaxed)),
        ]
    }

    /// Counts, and says whether to log it too: whoever is refused decides how often.
    fn count(&self, counter: &AtomicU64) -> bool {
        counter.fetch_add(1, Ordering::Relaxed);
        let now = self.since.elapsed();
        self.logged.lock().unwrap_or_else(PoisonError::into_inner).take(LOGGED, now)
    }
}

/// Answers other nodes. The caller's certificate was verified, and the call's [`Route::policy`]
/// allows it.
#[async_trait]
pub trait RpcHandler: Send + Sync + 'static {
    /// Refuses a caller that has not this standing here.
    async fn vouch(&self, from: Subject, standing: Standing) -> Result<(), RpcError>;

    /// Whether this is the address of a node of the cluster: its handshakes take no stranger's
    /// place.
    fn knows(&self, _: IpAddr) -> bool {
        false
    }

    /// Where refusals are counted.
    fn refusals(&self) -> &Refusals;

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
    tls: watch::Sender<ServerTls>,
    connections: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    strangers_each: Arc<Shares<IpAddr>>,
    members: Arc<Shares<NodeId>>,
}

/// How many places each has of those that all may take.
#[derive(Debug)]
struct Shares<K>(Mutex<HashMap<K, usize>>);

/// One of them; given back when dropped.
struct Share<K: Eq + Hash + Copy> {
    shares: Arc<Shares<K>>,
    key: K,
}

impl<K: Eq + Hash + Copy> Shares<K> {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::default()))
    }

    fn take(self: &Arc<Self>, key: K, most: usize) -> Option<Share<K>> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Share { shares: Arc::clone(self), key })
    }
}

impl<K: Eq + Hash + Copy> Drop for Share<K> {
    fn drop(&mut self) {
        let mut counts = self.shares.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
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
            tls: watch::Sender::new(tls),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            strangers_each: Shares::new(),
            members: Shares::new(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared), handler));
        Ok(Self { address, task, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A renewed certificate, for connections from now on. Those of nodes that are not trusted by
    /// it end.
    pub fn set_tls(&self, tls: ServerTls) {
        self.shared.tls.send_replace(tls);
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
        let Some(guest) = Guest::admit(&shared, remote.ip(), handler.knows(remote.ip())) else {
            let refusals = handler.refusals();
            if refusals.count(&refusals.connections) {
                tracing::warn!(address = %remote, "too many connections without a certificate: refused");
            }
            continue;
        };
        let (shared, handler) = (Arc::clone(&shared), Arc::clone(&handler));
        connections.spawn(async move {
            let ended = connection(stream, remote, guest, &shared, Arc::clone(&handler)).await;
            let refusals = handler.refusals();
            match ended {
                Ok(()) => {}
                Err(Ended::Refused(why)) if refusals.count(&refusals.handshakes) => {
                    tracing::warn!(address = %remote, reason = why, "a connection was refused");
                }
                Err(Ended::Refused(why) | Ended::Broken(why)) => {
                    tracing::debug!(address = %remote, reason = why, "a connection ended");
                }
            }
        });
    }
}

/// What limits count as one source: an address, or the least that an IPv6 site has (RFC 6177).
pub(crate) fn source(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// Why a connection ended before its other side did that.
enum Ended {
    /// The other side is not who it should be.
    Refused(String),
    /// The rest.
    Broken(String),
}

fn refused(why: impl std::fmt::Display) -> Ended {
    Ended::Refused(why.to_string())
}

fn broken(why: impl std::fmt::Display) -> Ended {
    Ended::Broken(why.to_string())
}

/// The place that a connection takes until its other side proved to be a member.
struct Guest {
    /// None if it comes from a node's address.
    _stranger: Option<(OwnedSemaphorePermit, Share<IpAddr>)>,
    connection: Option<OwnedSemaphorePermit>,
}

impl Guest {
    fn admit(shared: &Shared, ip: IpAddr, known: bool) -> Option<Self> {
        let connection = Arc::clone(&shared.connections).try_acquire_owned().ok()?;
        let stranger = if known {
            None
        } else {
            let stranger = Arc::clone(&shared.strangers).try_acquire_owned().ok()?;
            Some((stranger, shared.strangers_each.take(source(ip), STRANGERS_EACH)?))
        };
        Some(Self { _stranger: stranger, connection: Some(connection) })
    }
}

async fn connection(
    stream: TcpStream,
    remote: SocketAddr,
    mut guest: Guest,
    shared: &Shared,
    handler: Arc<dyn RpcHandler>,
) -> Result<(), Ended> {
    stream.set_nodelay(true).map_err(broken)?;
    let mut trust = shared.tls.subscribe();
    let tls = trust.borrow_and_update().clone();
    let acceptor = TlsAcceptor::from(Arc::clone(&tls.config));
    let stream = timeout(HANDSHAKE, acceptor.accept(stream))
        .await
        .map_err(|_| broken(format!("no handshake within {HANDSHAKE:?}")))?
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => refused(error),
            _ => broken(error),
        })?;
    let certs = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let certs: Vec<_> = certs.iter().map(|cert| cert.clone().into_owned()).collect();
    let peer = tls.peer(Some(&certs)).map_err(refused)?;
    // A member makes room for other strangers; a joiner keeps the place, and not for long.
    let (_place, patience) = match &peer {
        Peer::Node(subject) => {
            let share = shared.members.take(subject.node, MEMBER);
            let share = share.ok_or_else(|| {
                refused(format!("{peer} has more than {MEMBER} connections already"))
            })?;
            let connection = guest.connection.take();
            drop(guest);
            ((None, Some((share, connection))), None)
        }
        Peer::Joiner(_) => ((Some(guest), None), Some(JOINING)),
    };
    let peer = Arc::new(peer);
    // A joiner has one body to send, and nobody knows yet who it is.
    let (bodies, streams) = match &*peer {
        Peer::Joiner(_) => (JOINER_KIB, JOINER_STREAMS),
        Peer::Node(_) => (BODIES_KIB, STREAMS),
    };
    let bodies = Arc::new(Semaphore::new(bodies as usize));
    let service = service_fn(move |request| {
        let (peer, handler) = (Arc::clone(&peer), Arc::clone(&handler));
        let bodies = Arc::clone(&bodies);
        async move { Ok::<_, Infallible>(serve(request, &peer, remote, handler, &bodies).await) }
    });
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_concurrent_streams(streams)
        .max_header_list_size(16 << 10)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let served = builder.serve_connection(TokioIo::new(stream), service);
    let late = async {
        match patience {
            Some(patience) => tokio::time::sleep(patience).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        served = served => served.map_err(broken),
        why = lapsed(trust, &certs) => Err(refused(format!("a connection is cut: {why}"))),
        () = late => Err(broken("a joiner stayed too long")),
    }
}

/// Returns once a certificate is good no more, and says why.
async fn lapsed(
    mut trust: watch::Receiver<ServerTls>,
    certs: &[CertificateDer<'_>],
) -> rustls::Error {
    let end = certs.first().and_then(|leaf| Some(pki::validity(leaf).ok()?.1));
    loop {
        // A little later: the second that the certificate names is still its own.
        let left = end.map_or(JUDGE, |end| {
            let left = end.duration_since(SystemTime::now()).unwrap_or_default();
            left + Duration::from_millis(1100)
        });
        let judged = {
            let _ = timeout(left.min(JUDGE), trust.changed()).await;
            trust.borrow_and_update().peer(Some(certs))
        };
        if let Err(why) = judged {
            return why;
        }
    }
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

async fn serve(
    request: Request<Incoming>,
    peer: &Peer,
    remote: SocketAddr,
    handler: Arc<dyn RpcHandler>,
    bodies: &Semaphore,
) -> Answer {
    let path = request.uri().path();
    let named = Route::parse(path).filter(|_| request.method() == Method::POST);
    let route = match allowed(named, path, peer, &*handler).await {
        Ok(route) => route,
        Err(error) => {
            let refusals = handler.refusals();
            let final_word = matches!(error.kind, RpcErrorKind::Denied | RpcErrorKind::NotFound);
            if final_word && refusals.count(&refusals.calls) {
                tracing::warn!(%peer, address = %remote, route = path, %error, "a call was refused");
            }
            return refuse(&error);
        }
    };
    let body = request.into_body();
    let answered = match peer {
        Peer::Joiner(key) => {
            let from = Joiner { public_key: key.clone(), remote };
            joiner_call(route, from, (body, bodies), &*handler).await
        }
        Peer::Node(subject) => member_call(route, *subject, (body, bodies), handler).await,
    };
    answered.unwrap_or_else(|error| {
        tracing::debug!(%peer, %route, %error, "a call failed");
        refuse(&error)
    })
}

/// Holds a call against its policy.
async fn allowed(
    route: Option<Route>,
    path: &str,
    peer: &Peer,
    handler: &dyn RpcHandler,
) -> Result<Route, RpcError> {
    let Some(route) = route.filter(|route| route.policy().caller.is(peer)) else {
        return Err(RpcError::new(RpcErrorKind::Denied, format!("{peer} may not call {path}")));
    };
    if let Peer::Node(subject) = peer {
        handler.vouch(*subject, route.policy().standing).await?;
    }
    Ok(route)
}

async fn joiner_call(
    route: Route,
    from: Joiner,
    body: Unread<'_>,
    handler: &dyn RpcHandler,
) -> Result<Answer, RpcError> {
    let request = message(&read(body, route).await?)?;
    done(&handler.join(from, request).await?)
}

async fn member_call(
    route: Route,
    from: Subject,
    body: Unread<'_>,
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
            let mut reader = FrameReader::<ExecRequest>::new(body.0, route.body_limit());
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

/// A body, and what is left for those of its connection.
type Unread<'a> = (Incoming, &'a Semaphore);

async fn read((body, bodies): Unread<'_>, route: Route) -> Result<Bytes, RpcError> {
    let limit = route.body_limit().min(u32::MAX as usize);
    let room = match route {
        Route::Raft(_) => 0,
        _ => u32::try_from(limit >> 10).unwrap_or(u32::MAX).min(BODIES_KIB),
    };
    let whole = timeout(BODY, async {
        // It is never closed.
        let _room = bodies.acquire_many(room).await;
        Limited::new(body, limit).collect().await
    });
    let whole = whole.await;
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
