//! The HTTP API: the Docker Engine API's swarm part, and our own additions under `/mesh/`.
//!
//! It owns the words and the forms that clients see; every decision is made behind [`Backend`].
//! [`routes`] has all routes there are, with what each asks of the node. Handlers come by object
//! (`swarm`, `nodes`, `networks`, `services`, `tasks`, `own`); what a JSON object and an object of
//! the store have to do with each other is in `convert`.

pub mod backend;
mod convert;
mod error;
pub mod events;
mod find;
#[cfg(fuzzing)]
pub mod fuzz;
mod listen;
mod logs;
mod networks;
mod nodes;
mod own;
mod request;
pub mod routes;
mod services;
mod swarm;
mod system;
mod tasks;
pub(crate) mod usage;

use std::{io, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request},
    http::{HeaderValue, Method, StatusCode, Uri, header, uri::PathAndQuery},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use mesh_api::{API_VERSION, MIN_API_VERSION};
use mesh_control::store::Store;
use tokio::net::UnixListener;

pub use backend::Backend;
pub use error::ApiError;
pub use listen::Limits;

use crate::metrics::list;

/// The handlers' state.
type Shared = Arc<dyn Backend>;

/// Serves the API until the listener fails. Drop the future to stop.
///
/// # Errors
/// Those of the listener.
pub async fn serve(
    listener: UnixListener,
    limits: Limits,
    backend: Arc<dyn Backend>,
) -> io::Result<()> {
    listen::serve(listener, limits, router(backend), strip_version).await
}

fn router(backend: Shared) -> Router {
    routes::router(&backend)
        .fallback(not_found)
        .method_not_allowed_fallback(not_found)
        .layer(middleware::from_fn_with_state(backend.clone(), finish))
        .with_state(backend)
}

/// Docker answers an unknown path and a wrong method alike.
async fn not_found() -> ApiError {
    ApiError::not_found("page not found")
}

/// The `/v1.NN` that a request's path began with.
#[derive(Debug, Clone)]
struct AskedVersion(String);

/// Takes `/v1.NN` off the path. It comes before routing, so it cannot be a layer of the router.
fn strip_version(mut request: Request) -> Request {
    let path = request.uri().path();
    let Some((version, rest)) = split_version(path) else { return request };
    let asked = AskedVersion(version.to_owned());
    let rest = match request.uri().query() {
        Some(query) => format!("{rest}?{query}"),
        None => rest.to_owned(),
    };
    let Ok(path_and_query) = PathAndQuery::try_from(rest) else { return request };
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = Some(path_and_query);
    let Ok(uri) = Uri::from_parts(parts) else { return request };
    *request.uri_mut() = uri;
    request.extensions_mut().insert(asked);
    request
}

/// `/v1.51/info` → `("1.51", "/info")`.
fn split_version(path: &str) -> Option<(&str, &str)> {
    let rest = path.strip_prefix("/v")?;
    let (version, _) = rest.split_once('/')?;
    let numeric = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let (major, minor) = version.split_once('.')?;
    (numeric(major) && numeric(minor)).then(|| (version, &rest[version.len()..]))
}

/// Why a version cannot be spoken.
fn refuse_version(version: &str) -> Option<Response> {
    let (major, minor) = version.split_once('.')?;
    // A number too long to parse is too new.
    let number = |text: &str| text.parse::<u32>().unwrap_or(u32::MAX);
    let asked = (number(major), number(minor));
    if asked > API_VERSION {
        let (major, minor) = API_VERSION;
        return Some(
            ApiError::bad_request(format!(
                "client version {version} is too new. Maximum supported API version is \
                 {major}.{minor}"
            ))
            .into_response(),
        );
    }
    if asked < MIN_API_VERSION {
        let (major, minor) = MIN_API_VERSION;
        // Plain text, as Docker does: clients that old know no JSON errors.
        let text = format!(
            "client version {version} is too old. Minimum supported API version is \
             {major}.{minor}, please upgrade your client to a newer version"
        );
        return Some((StatusCode::BAD_REQUEST, text).into_response());
    }
    None
}

/// Checks the version asked for, and puts on every answer what clients expect there.
async fn finish(
    axum::extract::State(_): axum::extract::State<Shared>,
    request: Request,
    next: Next,
) -> Response {
    let refusal =
        request.extensions().get::<AskedVersion>().and_then(|version| refuse_version(&version.0));
    let began = Instant::now();
    let method = method_name(request.method());
    // One of the router's, never what a client wrote.
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = match refusal {
        Some(refusal) => refusal,
        None => next.run(request).await,
    };
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    list::API_REQUESTS.count(&[method, route, response.status().as_str()]);
    list::API_SECONDS.observe_since(&[method], began);
    let headers = response.headers_mut();
    let (major, minor) = API_VERSION;
    if let Ok(version) = HeaderValue::from_str(&format!("{major}.{minor}")) {
        headers.insert("api-version", version);
    }
    headers.insert("docker-experimental", HeaderValue::from_static("false"));
    headers.insert("ostype", HeaderValue::from_static("linux"));
    headers.insert(
        header::SERVER,
        HeaderValue::from_static(concat!("Docker/", env!("CARGO_PKG_VERSION"), " (linux)")),
    );
    response
}

/// The word for a method in the metrics: clients may make up others.
fn method_name(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        _ => "other",
    }
}

/// Looks at the store.
fn read<T>(backend: &Shared, look: impl FnOnce(&Store) -> T) -> Result<T, ApiError> {
    let mut look = Some(look);
    let mut seen = None;
    backend.read(&mut |store| {
        if let Some(look) = look.take() {
            seen = Some(look(store));
        }
    })?;
    seen.ok_or_else(ApiError::no_leader)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_are_taken_off_the_path() {
        assert_eq!(split_version("/v1.51/info"), Some(("1.51", "/info")));
        assert_eq!(split_version("/v1.24/services/v1.2"), Some(("1.24", "/services/v1.2")));
        for path in ["/info", "/version", "/v1/info", "/v1.x/info", "/v1.51", "/v/x", "/"] {
            assert_eq!(split_version(path), None, "{path}");
        }
    }

    #[test]
    fn only_known_versions_pass() {
        assert!(refuse_version("1.24").is_none() && refuse_version("1.51").is_none());
        assert!(refuse_version("1.12").is_some() && refuse_version("1.52").is_some());
        assert!(refuse_version("99999999999.1").is_some());
    }

    proptest! {
        #[test]
        fn no_path_breaks_the_prefix(path in "/[ -~]{0,20}") {
            if let Some((version, rest)) = split_version(&path) {
                prop_assert!(rest.starts_with('/'));
                prop_assert_eq!(format!("/v{version}{rest}"), path);
            }
        }
    }
}
