//! Calls to other nodes: one connection per peer and expectation, made on demand, shared by all
//! calls, made anew when it broke.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited, combinators::BoxBody};
use hyper::{body::Incoming, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;

use super::{
    Route, RpcError,
    frames::{self, FRAME_LIMIT, FrameReader, FrameWriter},
    messages::{
        ExecInput, ExecOutput, ExecRequest, JoinRequest, JoinResponse, LogsOutput, LogsRequest,
        NodeUpdate, SessionRequest,
    },
};
use crate::{
    pki,
    tls::{ClientTls, Expect, any_name},
};

/// The most that an answer may have, in bytes.
const ANSWER_LIMIT: usize = 64 << 20;
/// A connection attempt takes no longer; a peer's packets may be dropped without a word.
const CONNECT: Duration = Duration::from_secs(3);
/// After failed attempts, calls fail at once for this long: first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Why a call gave no answer.
#[derive(Debug, Error)]
pub enum CallError {
    /// The peer never got it: no connection, or the handshake failed.
    #[error("{peer} at {address} cannot be reached: {why}")]
    Unreachable {
        /// Whom.
        peer: Expect,
        /// Where.
        address: SocketAddr,
        /// Why.
        why: String,
    },
    /// The peer may or may not have acted on it.
    #[error("{route} to {address}: {why}")]
    Broken {
        /// What.
        route: Route,
        /// Where.
        address: SocketAddr,
        /// Why.
        why: String,
    },
    /// No answer in time; the peer may or may not have acted on it.
    #[error("{route} to {address}: no answer within {patience:?}")]
    Timeout {
        /// What.
        route: Route,
        /// Where.
        address: SocketAddr,
        /// How long.
        patience: Duration,
    },
    /// The peer said no.
    #[error(transparent)]
    Refused(#[from] RpcError),
}

type Body = BoxBody<Bytes, std::convert::Infallible>;
type Key = (SocketAddr, Expect);

/// One peer's connection. Locked while connecting, so that calls wait for one attempt and share it.
#[derive(Default)]
struct Slot {
    sender: Option<SendRequest<Body>>,
    failures: u32,
    failed: Option<(Instant, String)>,
}

/// Calls other nodes. Clones share the connections.
#[derive(Clone)]
pub struct RpcClient {
    shared: Arc<Shared>,
}

struct Shared {
    tls: RwLock<ClientTls>,
    slots: Mutex<HashMap<Key, Arc<tokio::sync::Mutex<Slot>>>>,
}

impl std::fmt::Debug for RpcClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RpcClient")
    }
}

fn unreachable(key: Key, why: impl std::fmt::Display) -> CallError {
    CallError::Unreachable { peer: key.1, address: key.0, why: why.to_string() }
}

impl RpcClient {
    /// Without connections yet.
    #[must_use]
    pub fn new(tls: ClientTls) -> Self {
        let shared = Shared { tls: RwLock::new(tls), slots: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// A renewed certificate: used for connections from now on, and the old ones are given up.
    pub fn set_tls(&self, tls: ClientTls) {
        *self.shared.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
        self.slots().clear();
    }

    /// Forgets a peer that is gone for good.
    pub fn forget(&self, address: SocketAddr) {
        self.slots().retain(|(at, _), _| *at != address);
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Arc<tokio::sync::Mutex<Slot>>>> {
        self.shared.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request, one answer.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call<Req: Serialize, Resp: DeserializeOwned>(
        &self,
        address: SocketAddr,
        expect: Expect,
        route: Route,
        request: &Req,
        patience: Duration,
    ) -> Result<Resp, CallError> {
        let broken = |why: &dyn std::fmt::Display| CallError::Broken {
            route,
            address,
            why: why.to_string(),
        };
        let body = rmp_serde::to_vec_named(request).map_err(|e| broken(&e))?;
        let answer = self.call_bytes(address, expect, route, body.into(), patience).await?;
        rmp_serde::from_slice(&answer).map_err(|e| broken(&e))
    }

    /// As [`RpcClient::call`], with bodies as they are.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call_bytes(
        &self,
        address: SocketAddr,
        expect: Expect,
        route: Route,
        body: Bytes,
        patience: Duration,
    ) -> Result<Bytes, CallError> {
        let deadline = Instant::now() + patience;
        let broken = |why: &dyn std::fmt::Display| CallError::Broken {
            route,
            address,
            why: why.to_string(),
        };
        let body = BoxBody::new(Full::new(body));
        let response = self.send((address, expect), route, body, deadline, patience).await?;
        let answer = Limited::new(response.into_body(), ANSWER_LIMIT).collect();
        let answer = timeout_at(deadline, answer).await;
        let answer = answer.map_err(|_| CallError::Timeout { route, address, patience })?;
        Ok(answer.map_err(|e| broken(&e))?.to_bytes())
    }

    /// Opens a session: a stream of updates that ends when either side drops it. `patience` is for
    /// the opening alone.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn session(
        &self,
        address: SocketAddr,
        request: &SessionRequest,
        patience: Duration,
    ) -> Result<FrameReader<NodeUpdate>, CallError> {
        let key = (address, Expect::Manager);
        self.stream(key, Route::Session, request, patience, SESSION_LIMIT).await
    }

    /// The output of tasks of a node: a stream that ends with it, or when either side drops it.
    /// `patience` is for its beginning alone.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn logs(
        &self,
        address: SocketAddr,
        expect: Expect,
        request: &LogsRequest,
        patience: Duration,
    ) -> Result<FrameReader<LogsOutput>, CallError> {
        self.stream((address, expect), Route::Logs, request, patience, FRAME_LIMIT).await
    }

    /// One request, answered by messages of at most `limit` bytes each.
    async fn stream<Req: Serialize, T: DeserializeOwned>(
        &self,
        key: Key,
        route: Route,
        request: &Req,
        patience: Duration,
        limit: usize,
    ) -> Result<FrameReader<T>, CallError> {
        let address = key.0;
        let deadline = Instant::now() + patience;
        let broken =
            |e: rmp_serde::encode::Error| CallError::Broken { route, address, why: e.to_string() };
        let body = rmp_serde::to_vec_named(request).map_err(broken)?;
        let body = BoxBody::new(Full::new(body.into()));
        let response = self.send(key, route, body, deadline, patience).await?;
        Ok(FrameReader::new(response.into_body(), limit))
    }

    /// Runs a command in a task on its node: messages both ways. Dropping the writer ends stdin
    /// and the session's input.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn exec(
        &self,
        address: SocketAddr,
        expect: Expect,
        request: &ExecRequest,
        patience: Duration,
    ) -> Result<(FrameWriter<ExecInput>, FrameReader<ExecOutput>), CallError> {
        let route = Route::Exec;
        let deadline = Instant::now() + patience;
        let (writer, body) = frames::channel::<ExecRequest>();
        let sent = writer.send(request).await;
        sent.map_err(|e| CallError::Broken { route, address, why: e.to_string() })?;
        let sent = self.send((address, expect), route, BoxBody::new(body), deadline, patience);
        let response = sent.await?;
        Ok((writer.then(), FrameReader::new(response.into_body(), FRAME_LIMIT)))
    }

    async fn send(
        &self,
        key: Key,
        route: Route,
        body: Body,
        deadline: Instant,
        patience: Duration,
    ) -> Result<Response<Incoming>, CallError> {
        let address = key.0;
        let late = || CallError::Timeout { route, address, patience };
        let mut sender = match timeout_at(deadline, self.connected(key)).await {
            Ok(sender) => sender?,
            Err(_) => return Err(unreachable(key, format!("no connection within {patience:?}"))),
        };
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("https://{address}{}", route.path()))
            .body(body)
            .map_err(|e| unreachable(key, e))?;
        let response = match timeout_at(deadline, sender.send_request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) if error.is_canceled() => return Err(unreachable(key, error)),
            Ok(Err(error)) => {
                return Err(CallError::Broken { route, address, why: chain(&error) });
            }
            Err(_) => return Err(late()),
        };
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let status = response.status();
        let refusal = Limited::new(response.into_body(), 64 << 10).collect();
        let refusal = timeout_at(deadline, refusal).await.map_err(|_| late())?;
        let refusal =
            refusal.ok().and_then(|body| rmp_serde::from_slice::<RpcError>(&body.to_bytes()).ok());
        Err(match refusal {
            Some(error) => CallError::Refused(error),
            None => CallError::Broken { route, address, why: format!("status {status}") },
        })
    }

    /// The peer's connection, made if there is none.
    async fn connected(&self, key: Key) -> Result<SendRequest<Body>, CallError> {
        let slot = Arc::clone(self.slots().entry(key).or_default());
        let mut slot = slot.lock_owned().await;
        if let Some(sender) = slot.sender.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        slot.sender = None;
        if let Some((since, why)) = &slot.failed {
            let pause = BACKOFF.0 * 2u32.saturating_pow(slot.failures.saturating_sub(1).min(8));
            if since.elapsed() < pause.min(BACKOFF.1) {
                return Err(unreachable(key, why));
            }
        }
        let tls = self.shared.tls.read().unwrap_or_else(PoisonError::into_inner).clone();
        // A task of its own: an impatient call (a heartbeat) gives up before a handshake is done on
        // a busy machine, the next one then finds the connection made.
        let attempt = tokio::spawn(async move {
            let why = match timeout(CONNECT, connect(&tls, key)).await {
                Ok(Ok(sender)) => {
                    *slot = Slot { sender: Some(sender.clone()), ..Slot::default() };
                    return Ok(sender);
                }
                Ok(Err(why)) => why,
                Err(_) => format!("no answer within {CONNECT:?}"),
            };
            slot.failures = slot.failures.saturating_add(1);
            slot.failed = Some((Instant::now(), why.clone()));
            Err(why)
        });
        let connected = attempt.await.map_err(|e| unreachable(key, e))?;
        connected.map_err(|why| unreachable(key, why))
    }
}

/// A whole cluster's records may come in one update.
const SESSION_LIMIT: usize = 256 << 20;

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

async fn connect(tls: &ClientTls, (address, expect): Key) -> Result<SendRequest<Body>, String> {
    let config = tls.config(expect).map_err(|e| e.to_string())?;
    let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let stream = TlsConnector::from(config).connect(any_name(), stream).await;
    let stream = stream.map_err(|e| e.to_string())?;
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(4))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| chain(&e))?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%address, error = chain(&error), "a connection broke");
        }
    });
    Ok(sender)
}

/// Asks a manager to admit this node. Returns what it answered, once the root in the answer is the
/// one that the token pins.
///
/// # Errors
/// [`CallError`].
pub async fn join(
    address: SocketAddr,
    key_pem: &str,
    root_digest: [u8; 32],
    request: &JoinRequest,
    patience: Duration,
) -> Result<JoinResponse, CallError> {
    let key = (address, Expect::Manager);
    let tls = ClientTls::joiner(key_pem, root_digest).map_err(|e| unreachable(key, e))?;
    let client = RpcClient::new(tls);
    let answer: JoinResponse =
        client.call(address, Expect::Manager, Route::Join, request, patience).await?;
    let broken = |why: String| CallError::Broken { route: Route::Join, address, why };
    let root = pki::parse_pem(&answer.ca_pem).map_err(|e| broken(e.to_string()))?;
    if pki::digest(&root) != root_digest {
        return Err(broken("the root certificate in the answer is not the token's".into()));
    }
    if !answer.keys.roots.contains(&answer.ca_pem) {
        return Err(broken("the answer trusts other roots than the token's".into()));
    }
    Ok(answer)
}
