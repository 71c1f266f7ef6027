//! A request to a daemon's unix socket: one per connection, bodies whole in memory. That is all
//! that a lab needs, and it needs it without a runtime.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Largest answer that is read.
const ANSWER_MAX: u64 = 64 << 20;

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body, decoded.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; an empty one is null.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn json(&self) -> Result<Value> {
        if self.body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&self.body)
            .with_context(|| format!("not JSON: {:?}", String::from_utf8_lossy(&self.body)))
    }

    /// The daemon's own words for what went wrong.
    #[must_use]
    pub fn message(&self) -> String {
        let message = self.json().ok().and_then(|v| v["message"].as_str().map(str::to_owned));
        message.unwrap_or_else(|| String::from_utf8_lossy(&self.body).trim().to_owned())
    }
}

/// Sends one request with a raw body and waits for the whole answer.
///
/// # Errors
/// When the daemon is not there, or silent for `patience`, or does not speak HTTP.
pub fn send(
    socket: &Path,
    method: &str,
    path: &str,
    body: &[u8],
    patience: Duration,
) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("connect to the daemon at {}", socket.display()))?;
    stream.set_read_timeout(Some(patience)).context("set the time-out")?;
    stream.set_write_timeout(Some(patience)).context("set the time-out")?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).with_context(|| format!("send {method} {path}"))?;
    // A daemon that refuses a body early closes before it has read all of it, and still answers.
    let sent = stream.write_all(body);
    let mut raw = Vec::new();
    match (stream.take(ANSWER_MAX).read_to_end(&mut raw), sent) {
        (Ok(_), Ok(())) => {}
        _ if !raw.is_empty() => {}
        (Err(e), _) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            bail!("{method} {path}: no answer from {} within {patience:?}", socket.display())
        }
        (Err(e), _) | (_, Err(e)) => return Err(e).with_context(|| format!("{method} {path}")),
    }
    parse(&raw).with_context(|| format!("answer to {method} {path}"))
}

/// Sends one request with JSON and fails on any status but 2xx, in the daemon's words.
///
/// # Errors
/// As [`send`], and when the daemon refuses.
pub fn call(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    let text = body.map(Value::to_string).unwrap_or_default();
    let answer = send(socket, method, path, text.as_bytes(), Duration::from_secs(60))?;
    ensure!(
        (200..300).contains(&answer.status),
        "{method} {path}: {} ({})",
        answer.message(),
        answer.status
    );
    answer.json()
}

/// Reads a whole answer.
///
/// # Errors
/// When it is not HTTP, or ends early.
pub fn parse(raw: &[u8]) -> Result<Answer> {
    let end = raw.windows(4).position(|w| w == b"\r\n\r\n").context("no end of headers")?;
    let head = std::str::from_utf8(&raw[..end]).context("headers are not text")?;
    let mut body = &raw[end + 4..];
    let mut lines = head.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("no HTTP status in {status_line:?}"))?;
    let mut chunked = false;
    for line in lines {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.trim();
        if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.eq_ignore_ascii_case("chunked");
        } else if name.eq_ignore_ascii_case("content-length") {
            let length: usize = value.parse().context("content-length")?;
            body = body.get(..length).context("the answer ends early")?;
        }
    }
    let body = if chunked { join_chunks(body)? } else { body.to_vec() };
    Ok(Answer { status, body })
}

/// RFC 9112 section 7.1, without trailers.
fn join_chunks(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n").context("a chunk without size")?;
        let size = std::str::from_utf8(&rest[..end]).context("chunk size")?;
        let size = size.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).with_context(|| format!("size {size:?}"))?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Ok(body);
        }
        body.extend_from_slice(rest.get(..size).context("the answer ends in a chunk")?);
        rest = rest.get(size + 2..).context("the answer ends after a chunk")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_length_chunks_and_neither() {
        let length = parse(b"HTTP/1.1 201 Created\r\nContent-Length: 4\r\n\r\nnullXX").unwrap();
        assert_eq!((length.status, length.body.as_slice()), (201, b"null".as_slice()));
        let chunks = parse(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
        );
        assert_eq!(chunks.unwrap().body, b"abcde");
        assert_eq!(parse(b"HTTP/1.0 204 No Content\r\n\r\n").unwrap().body, b"");
    }

    #[test]
    fn broken_answers_are_errors() {
        for raw in [
            &b"HTTP/1.1 200 OK\r\n"[..],
            b"SMTP 200\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nabc",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc",
        ] {
            assert!(parse(raw).is_err(), "{:?}", String::from_utf8_lossy(raw));
        }
    }

    #[test]
    fn the_daemons_words_come_through() {
        let refusal = Answer { status: 409, body: br#"{"message":"name in use"}"#.to_vec() };
        assert_eq!(refusal.message(), "name in use");
        let bare = Answer { status: 500, body: b"oops\n".to_vec() };
        assert_eq!(bare.message(), "oops");
    }
}
