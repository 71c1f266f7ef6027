//! A plain HTTP/1.1 client over the test's unix socket.

use std::path::Path;

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use mesh_api::Frame;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

/// An answer, read whole.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

async fn connect(dir: &Path) -> http1::SendRequest<Full<Bytes>> {
    let stream = UnixStream::connect(dir.join("sock")).await.unwrap();
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    sender
}

pub(crate) async fn send(
    dir: &Path,
    method: &str,
    path: &str,
    content_type: &str,
    body: Vec<u8>,
) -> Answer {
    let mut sender = connect(dir).await;
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, "mesh");
    if !content_type.is_empty() {
        request = request.header(header::CONTENT_TYPE, content_type);
    }
    let answer = sender.send_request(request.body(Full::from(body)).unwrap()).await.unwrap();
    let (parts, body) = answer.into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    Answer { status: parts.status.as_u16(), headers: parts.headers, body }
}

/// Runs an exec; each item of `input` is one frame for its standard input. Returns all frames that
/// came back.
pub(crate) async fn exec(
    dir: &Path,
    path: &str,
    body: Value,
    input: &[&[u8]],
) -> Vec<(u8, Vec<u8>)> {
    let mut sender = connect(dir).await;
    let request = Request::post(path)
        .header(header::HOST, "mesh")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "tcp")
        .body(Full::from(body.to_string()))
        .unwrap();
    let answer = sender.send_request(request).await.unwrap();
    assert_eq!(answer.status(), 101);
    let mut stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    for payload in input {
        let frame = Frame { kind: mesh_api::FrameKind::Stdin, payload: payload.to_vec() };
        stream.write_all(&frame.encode()).await.unwrap();
    }
    let mut frames = Vec::new();
    let mut header = [0; Frame::HEADER_LEN];
    while stream.read_exact(&mut header).await.is_ok() {
        let (kind, length) = Frame::decode_header(header).unwrap();
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await.unwrap();
        frames.push((kind as u8, payload));
    }
    frames
}
