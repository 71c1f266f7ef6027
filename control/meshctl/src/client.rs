//! The HTTP client: one connection per request over the daemon's unix socket.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1,
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use mesh_api::{API_VERSION, DEFAULT_SOCKET, ErrorBody};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::net::UnixStream;

/// A daemon to speak to.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    /// What named it.
    source: &'static str,
}

/// What the daemon answered to a request that it did not do.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Error response from daemon: {}", self.message)
    }
}

impl std::error::Error for Refused {}

/// No body.
pub(crate) const NOTHING: Option<&()> = None;

/// How often an update is tried that others get in the way of.
const TRIES: u32 = 5;
/// Pause before the next try.
const AGAIN: Duration = Duration::from_millis(50);

/// Whether an update was refused because the object had changed since it was read.
fn is_out_of_sequence(err: &anyhow::Error) -> bool {
    err.downcast_ref::<Refused>()
        .is_some_and(|refused| refused.message.contains("update out of sequence"))
}

/// Whether the daemon refused because there is no such object.
pub(crate) fn is_missing(err: &anyhow::Error) -> bool {
    err.downcast_ref::<Refused>().is_some_and(|refused| refused.status == StatusCode::NOT_FOUND)
}

/// Where the daemon's address comes from: the first that is set.
const SOURCES: [&str; 2] = ["MESH_HOST", "DOCKER_HOST"];

/// The socket that a URL names; `source` said so.
fn socket(url: &str, source: &str) -> Result<PathBuf> {
    let (scheme, path) = url.split_once("://").unwrap_or(("", url));
    match scheme {
        "unix" if !path.is_empty() => Ok(path.into()),
        "tcp" | "http" | "https" | "ssh" | "npipe" | "fd" => bail!(crate::Usage(format!(
            "`{url}` ({source}): meshd serves its API on a unix socket alone, for who reaches it \
             rules the cluster; carry it over with `ssh -nNT -L \
             /tmp/mesh.sock:{DEFAULT_SOCKET} MACHINE` and use unix:///tmp/mesh.sock"
        ))),
        _ => bail!(crate::Usage(format!(
            "`{url}` ({source}) is no socket of a daemon: use unix://PATH"
        ))),
    }
}

impl Client {
    /// The daemon at `host`, else at MESH_HOST, DOCKER_HOST, or the default socket.
    pub(crate) fn new(host: Option<&str>) -> Result<Self> {
        let from = |name: &'static str| {
            std::env::var(name).ok().filter(|value| !value.is_empty()).map(|value| (value, name))
        };
        let given = host.map(|host| (host.to_owned(), "--host"));
        match given.or_else(|| SOURCES.into_iter().find_map(from)) {
            Some((url, source)) => Ok(Self { socket: socket(&url, source)?, source }),
            None => Ok(Self { socket: DEFAULT_SOCKET.into(), source: "the default" }),
        }
    }

    /// `GET` of a typed answer.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, NOTHING).await
    }

    /// `POST` with a typed answer.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        self.call(Method::POST, path, body).await
    }

    /// `POST` whose answer says nothing.
    pub(crate) async fn tell(&self, path: &str, body: Option<&impl Serialize>) -> Result<()> {
        self.send(Method::POST, path, body).await.map(drop)
    }

    /// Reads an object at `path`, has its spec edited and writes it back; again, if somebody else
    /// wrote it in between. Its id and the answer (null if there is none).
    pub(crate) async fn modify(
        &self,
        kind: &str,
        path: &str,
        query: &str,
        edit: impl Fn(&mut Value) -> Result<()>,
    ) -> Result<(String, Value)> {
        let mut tries = 0;
        loop {
            let mut object: Value = self.get(path).await?;
            let mut spec = object["Spec"].take();
            edit(&mut spec)?;
            let (Some(id), Some(version)) =
                (object["ID"].as_str(), object.pointer("/Version/Index").and_then(Value::as_u64))
            else {
                bail!("the daemon's answer to {path} has no id or version: is it another version?")
            };
            let update = format!("{kind}/{id}/update?version={version}&{query}");
            tries += 1;
            match self.send(Method::POST, &update, Some(&spec)).await {
                Ok(answer) => {
                    return Ok((
                        id.to_owned(),
                        serde_json::from_slice(&answer).unwrap_or_default(),
                    ));
                }
                Err(err) if tries < TRIES && is_out_of_sequence(&err) => {
                    // Whoever changed it may not be done yet.
                    tokio::time::sleep(AGAIN).await;
                }
                Err(err) => return Err(err),
            }
        }
    }

    /// `DELETE`.
    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        self.send(Method::DELETE, path, NOTHING).await.map(drop)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        let bytes = self.send(method, path, body).await?;
        serde_json::from_slice(&bytes).with_context(|| {
            format!("the daemon's answer to {path} is not understood: is it another version?")
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes> {
        let answer = self.request(method, path, body, false).await?;
        let status = answer.status();
        let bytes = answer.into_body().collect().await.with_context(|| self.broken())?.to_bytes();
        if status.is_success() { Ok(bytes) } else { Err(refused(status, &bytes).into()) }
    }

    /// `GET` whose answer comes bit by bit, for as long as it is read.
    pub(crate) async fn stream(&self, path: &str) -> Result<Incoming> {
        let answer = self.request(Method::GET, path, NOTHING, false).await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer.into_body());
        }
        let bytes = answer.into_body().collect().await.with_context(|| self.broken())?.to_bytes();
        Err(refused(status, &bytes).into())
    }

    /// `POST` that turns the connection into a stream.
    pub(crate) async fn upgrade(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<TokioIo<Upgraded>> {
        let answer = self.request(Method::POST, path, Some(body), true).await?;
        let status = answer.status();
        if status != StatusCode::SWITCHING_PROTOCOLS {
            let body = answer.into_body().collect().await.with_context(|| self.broken())?;
            return Err(refused(status, &body.to_bytes()).into());
        }
        let upgraded = hyper::upgrade::on(answer).await.with_context(|| self.broken())?;
        Ok(TokioIo::new(upgraded))
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        upgrade: bool,
    ) -> Result<http::Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.with_context(|| {
            format!(
                "cannot reach the daemon at unix://{} ({}): is meshd running there? (--host or \
                 MESH_HOST names another socket)",
                self.socket.display(),
                self.source
            )
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.with_context(|| self.broken())?;
        // It ends with the connection; errors show at the request.
        tokio::spawn(async move { connection.with_upgrades().await.ok() });
        let (major, minor) = API_VERSION;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("/v{major}.{minor}{path}"))
            .header(header::HOST, "mesh")
            .header(header::USER_AGENT, concat!("meshctl/", env!("CARGO_PKG_VERSION")));
        if upgrade {
            request = request.header(header::CONNECTION, "Upgrade").header(header::UPGRADE, "tcp");
        }
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                serde_json::to_vec(body).context("cannot write the request")?
            }
            None => Vec::new(),
        };
        let request =
            request.body(Full::new(Bytes::from(bytes))).context("cannot make a request")?;
        sender.send_request(request).await.with_context(|| self.broken())
    }

    fn broken(&self) -> String {
        format!("the connection to the daemon at unix://{} broke", self.socket.display())
    }
}

fn refused(status: StatusCode, body: &[u8]) -> Refused {
    let message = serde_json::from_slice::<ErrorBody>(body).map_or_else(
        |_| format!("{status}: {}", String::from_utf8_lossy(body).trim()),
        |body| body.message,
    );
    Refused { status, message }
}

/// A name as part of a path or a query (RFC 3986 section 2.1).
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// `?filters=…` from `--filter key=value` flags; empty without any.
pub(crate) fn filter_query(filters: &[String]) -> Result<String> {
    let mut map = std::collections::BTreeMap::<&str, Vec<&str>>::new();
    for filter in filters {
        let Some((key, value)) = filter.split_once('=') else {
            bail!(crate::Usage(format!(
                "invalid argument \"{filter}\" for --filter: use key=value"
            )));
        };
        map.entry(key.trim()).or_default().push(value.trim());
    }
    if map.is_empty() {
        return Ok(String::new());
    }
    let json = serde_json::to_string(&map).context("cannot write the filters")?;
    Ok(format!("filters={}", escape(&json)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_a_socket() {
        assert_eq!(socket("unix:///a/b.sock", "--host").unwrap(), PathBuf::from("/a/b.sock"));
        for (url, said) in [
            ("tcp://10.0.0.1:2375", "unix socket alone"),
            ("ssh://m1", "ssh -nNT -L"),
            ("unix://", "use unix://PATH"),
            ("/run/mesh.sock", "use unix://PATH"),
        ] {
            let err = socket(url, "DOCKER_HOST").unwrap_err();
            assert!(err.is::<crate::Usage>(), "{url}");
            let text = err.to_string();
            assert!(text.contains(said) && text.contains("DOCKER_HOST"), "{text}");
        }
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(escape("web.1-a_b~"), "web.1-a_b~");
        assert_eq!(escape("a/b c?ä"), "a%2Fb%20c%3F%C3%A4");
    }

    #[test]
    fn filters_of_one_key_come_together() {
        let filters = ["name=a".to_owned(), "name=b".to_owned(), "label=x=y".to_owned()];
        let json = r#"{"label":["x=y"],"name":["a","b"]}"#;
        assert_eq!(filter_query(&filters).unwrap(), format!("filters={}", escape(json)));
        assert!(filter_query(&["name".to_owned()]).is_err());
    }
}
