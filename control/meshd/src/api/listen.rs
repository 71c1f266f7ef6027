//! The API's socket: connections, headers and bodies have limits in number, size and time, so that
//! one client, slow or mad, takes nothing from the others.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request, response::Response};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_control::limit::{Allowance, Rate};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::Instant,
};
use tower::ServiceExt as _;

/// What a client may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// How long a connection may be without a whole request: idle, or slow.
    pub request: Duration,
    /// The most that the line and headers of a request may have, in bytes.
    pub headers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, request: Duration::from_secs(60), headers: 64 << 10 }
    }
}

/// The place that a connection takes. A request has it among its extensions: what goes on after the
/// answer (an upgraded connection) keeps it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// Refusals that are logged.
const LOGGED: Rate = Rate { burst: 5, every: Duration::from_secs(10) };

/// Serves until the listener fails.
pub(super) async fn serve(
    listener: UnixListener,
    limits: Limits,
    router: Router,
    prepare: fn(Request) -> Request,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(limits.connections));
    let (mut logged, start) = (Allowance::default(), Instant::now());
    // Dropping the set ends the connections with the listener.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: give connections time to end.
                tracing::warn!(%error, "cannot accept connections to the API");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&places).try_acquire_owned() else {
            if logged.take(LOGGED, start.elapsed()) {
                tracing::warn!(most = limits.connections, "too many connections to the API");
            }
            turn_away(&stream, limits.connections);
            continue;
        };
        let place = Place { _permit: Arc::new(permit) };
        let router = router.clone();
        connections.spawn(connection(stream, limits, place, router, prepare));
    }
}

async fn connection(
    stream: UnixStream,
    limits: Limits,
    place: Place,
    router: Router,
    prepare: fn(Request) -> Request,
) {
    let service = service_fn(move |request: http::Request<Incoming>| {
        let mut request = prepare(request.map(Body::new));
        request.extensions_mut().insert(place.clone());
        let answer = router.clone().oneshot(request);
        async move { answer.await as Result<Response, Infallible> }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.request)
        .max_buf_size(limits.headers)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the API broke");
    }
}

/// Says why, as far as that can be said at once.
fn turn_away(stream: &UnixStream, most: usize) {
    let body = format!("{{\"message\":\"too many connections to this daemon: at most {most}\"}}");
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.try_write(answer.as_bytes());
}
