//! Writes to etcd, by gRPC: one message in, one out, over HTTP/2 in clear.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use bytes::{BufMut as _, Bytes, BytesMut};
use clap::Args;
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::load;

/// Writers that share a connection.
const EACH: usize = 8;
/// etcd keeps a write that its dead leader had for seven seconds; a user's client would not.
const PATIENCE: Duration = Duration::from_millis(500);

/// Options of the writers.
#[derive(Debug, Args)]
pub(crate) struct Writer {
    /// Where etcd listens.
    #[arg(long)]
    to: SocketAddr,
    /// Writers.
    #[arg(long)]
    writers: usize,
    /// For how long.
    #[arg(long)]
    millis: u64,
}

impl Writer {
    pub(super) async fn run(self) -> Result<()> {
        let mut connections = Vec::new();
        for _ in 0..self.writers.div_ceil(EACH) {
            connections.push(connect(self.to).await?);
        }
        let to = self.to;
        let seen =
            load::drive(self.writers, Duration::from_millis(self.millis), move |n, count| {
                let connection = connections[n / EACH].clone();
                async move {
                    let put = put(to, connection, n, count);
                    match tokio::time::timeout(PATIENCE, put).await {
                        Ok(done) => done.map_err(|error| format!("{error:#}")),
                        Err(_) => Err("no answer in time".to_owned()),
                    }
                }
            });
        println!("{}", serde_json::to_string(&seen.await)?);
        Ok(())
    }
}

async fn connect(to: SocketAddr) -> Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    let (sender, connection) =
        Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// `etcdserverpb.KV/Put` of a key of the writer's own.
async fn put(
    to: SocketAddr,
    mut connection: SendRequest<Full<Bytes>>,
    writer: usize,
    count: usize,
) -> Result<()> {
    let message = put_request(&format!("writer-{writer}"), &load::value(writer, count));
    let uri = Uri::builder()
        .scheme("http")
        .authority(to.to_string())
        .path_and_query("/etcdserverpb.KV/Put")
        .build()?;
    let request = Request::post(uri)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(message))?;
    connection.ready().await?;
    let answer = connection.send_request(request).await?;
    let status = answer.headers().get("grpc-status").cloned();
    let body = answer.into_body().collect().await?;
    let status = status.or_else(|| body.trailers()?.get("grpc-status").cloned());
    let status = status.context("an answer without a status")?;
    anyhow::ensure!(status == "0", "status {status:?}");
    Ok(())
}

/// A gRPC frame with a `PutRequest`: key is field 1, value field 2, both of bytes.
fn put_request(key: &str, value: &str) -> Bytes {
    let mut body = BytesMut::new();
    for (field, text) in [(1u8, key), (2, value)] {
        body.put_u8(field << 3 | 2);
        let mut length = text.len();
        while length >= 0x80 {
            body.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        body.put_u8(length as u8);
        body.put_slice(text.as_bytes());
    }
    let mut frame = BytesMut::with_capacity(5 + body.len());
    frame.put_u8(0);
    frame.put_u32(body.len() as u32);
    frame.put_slice(&body);
    frame.freeze()
}
