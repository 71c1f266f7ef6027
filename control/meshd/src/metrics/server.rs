//! The metrics on an address of their own, for scrapers without the API's socket. What is there is
//! no secret, and nothing can be changed from there; whoever reaches the address may look.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};

use super::CONTENT_TYPE;
use crate::api::Backend;

/// Connections at a time; others wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 16;
/// How long a request's head may take to come.
const HEAD_PATIENCE: Duration = Duration::from_secs(2);
/// How long a connection may take from its beginning to its end.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a request's head may have.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Opens the address.
///
/// # Errors
/// Those of the kernel, with the address.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot serve metrics on {address}: {error}"))
    })
}

/// Serves `GET /metrics`, and nothing else, until dropped.
pub async fn serve(listener: TcpListener, backend: Arc<dyn Backend>) {
    let router = Router::new().route("/metrics", get(answer)).with_state(backend);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // It is never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, say: that passes.
                tracing::debug!(%error, "a scraper's connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(HEAD_PATIENCE)
                .max_buf_size(HEAD_BYTES_MAX)
                .keep_alive(false);
            // What becomes of it is the scraper's to notice.
            let _ = timeout(PATIENCE, http.serve_connection(TokioIo::new(stream), service)).await;
            drop(place);
        });
    }
}

/// All metrics.
pub(crate) async fn answer(State(backend): State<Arc<dyn Backend>>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], backend.metrics().await).into_response()
}
