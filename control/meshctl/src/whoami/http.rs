//! The HTTP port.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use super::{Shared, quantity, tcp};

/// Whether `/health` says so. One for all ports of the process.
#[derive(Debug, Clone)]
pub(super) struct Health(Arc<AtomicBool>);

impl Default for Health {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

pub(super) async fn serve(listener: TcpListener, mut shared: Shared, health: Health) {
    loop {
        tokio::select! {
            // Whoever has connected already is served before the end.
            biased;
            stream = tcp::accept(&listener) => {
                tokio::spawn(converse(stream, shared.clone(), health.clone()));
            }
            () = shared.stop_asked() => return,
        }
    }
}

async fn converse(stream: TcpStream, mut shared: Shared, health: Health) {
    let (Ok(client), Ok(server)) = (stream.peer_addr(), stream.local_addr()) else { return };
    let identity = Arc::clone(&shared.identity);
    let service = service_fn(move |request: Request<Incoming>| {
        let (identity, health) = (Arc::clone(&identity), health.clone());
        async move {
            let json = identity.answer(client, server, "tcp");
            Ok::<_, Infallible>(answer(&request, json, &health).await)
        }
    });
    let conn = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::pin!(conn);
    tokio::select! {
        // A request that is there already is under way.
        biased;
        _ = conn.as_mut() => return,
        () = shared.stop_asked() => conn.as_mut().graceful_shutdown(),
    }
    // The request under way is finished, and no other is taken.
    let _ = conn.await;
}

async fn answer<B>(request: &Request<B>, json: Vec<u8>, health: &Health) -> Response<Padded> {
    let query = request.uri().query();
    match (request.uri().path(), request.method()) {
        ("/health", &Method::POST) => {
            let ok = match quantity::parameter(query, "ok") {
                Some("true") | None => true,
                Some("false") => false,
                Some(other) => return bad_request(format!("ok is true or false, not `{other}`\n")),
            };
            health.0.store(ok, Ordering::Relaxed);
            text(StatusCode::OK, format!("health is {ok} now\n"))
        }
        ("/health", _) if health.0.load(Ordering::Relaxed) => text(StatusCode::OK, "ok\n".into()),
        ("/health", _) => text(StatusCode::SERVICE_UNAVAILABLE, "unhealthy\n".into()),
        ("/env", _) => {
            let env: BTreeMap<String, String> = std::env::vars_os()
                .map(|(k, v)| (k.to_string_lossy().into_owned(), v.to_string_lossy().into_owned()))
                .collect();
            let mut body = serde_json::to_vec(&env).unwrap_or_default();
            body.push(b'\n');
            with_json(Padded::new(body, 0))
        }
        _ => {
            let size = quantity::parameter(query, "size").map(quantity::size).transpose();
            let delay = quantity::parameter(query, "delay").map(quantity::delay).transpose();
            match (size, delay) {
                (Ok(size), Ok(delay)) => {
                    tokio::time::sleep(delay.unwrap_or_default()).await;
                    with_json(Padded::new(json, size.unwrap_or_default()))
                }
                (Err(message), _) | (_, Err(message)) => bad_request(message),
            }
        }
    }
}

fn with_json(body: Padded) -> Response<Padded> {
    typed(StatusCode::OK, "application/json", body)
}

fn bad_request(message: String) -> Response<Padded> {
    text(StatusCode::BAD_REQUEST, message)
}

fn text(status: StatusCode, message: String) -> Response<Padded> {
    typed(status, "text/plain", Padded::new(message.into_bytes(), 0))
}

fn typed(status: StatusCode, kind: &'static str, body: Padded) -> Response<Padded> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

/// Spaces behind a JSON text leave it that JSON text.
static PADDING: [u8; 64 * 1024] = [b' '; 64 * 1024];

/// A text, padded to a size without holding it in memory.
#[derive(Debug)]
struct Padded {
    text: Option<Bytes>,
    padding: u64,
}

impl Padded {
    fn new(text: Vec<u8>, size: u64) -> Self {
        let padding = size.saturating_sub(text.len() as u64);
        Self { text: Some(text.into()), padding }
    }
}

impl Body for Padded {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let chunk = self.text.take().or_else(|| {
            let length = self.padding.min(PADDING.len() as u64);
            self.padding -= length;
            (length > 0).then(|| Bytes::from_static(&PADDING[..length as usize]))
        });
        Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.text.is_none() && self.padding == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.padding + self.text.as_ref().map_or(0, |t| t.len() as u64))
    }
}

/// For tests: the client and server addresses do not matter to the routes.
#[cfg(test)]
pub(super) async fn route(method: &str, uri: &str, health: &Health) -> (u16, String) {
    use http_body_util::BodyExt;
    let request = Request::builder().method(method).uri(uri).body(()).unwrap();
    let any: std::net::SocketAddr = "192.0.2.1:1".parse().unwrap();
    let json = super::Identity::default().answer(any, any, "tcp");
    let response = answer(&request, json, health).await;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}
