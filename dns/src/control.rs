//! What meshd and the resolver say to each other, on a unix socket of the node.
//!
//! Frames: a 32-bit big-endian length and as many bytes of JSON. meshd sends [`Request`]s; the
//! resolver sends its whole [`Status`] at once and whenever it changed.

use std::{collections::BTreeMap, io};

use mesh_types::{Revision, TaskId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::snapshot::Snapshot;

/// The largest frame, in bytes: some 100,000 endpoints.
const MAX_FRAME: usize = 64 << 20;

/// What meshd asks of the resolver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Serve this from now on.
    Snapshot(Box<Snapshot>),
    /// Forget everything and end.
    Shutdown,
}

/// How the resolver does.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Its process id.
    pub pid: u32,
    /// How far the records are that it serves.
    pub revision: Revision,
    /// The tasks that it knows: `None` once their sockets are open, else why they are not (yet).
    pub tasks: BTreeMap<TaskId, Option<String>>,
}

/// Writes one frame.
///
/// # Errors
/// Of the stream; `InvalidData` for a frame beyond 64 MiB.
pub async fn write_frame(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &impl Serialize,
) -> io::Result<()> {
    let body = serde_json::to_vec(value).map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).ok().filter(|n| *n as usize <= MAX_FRAME);
    let Some(length) = length else { return Err(too_long(body.len())) };
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(&body).await?;
    stream.flush().await
}

/// Reads one frame; `None` at the end of the stream.
///
/// # Errors
/// Of the stream; `InvalidData` for a frame that is too long or that is not understood.
pub async fn read_frame<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(too_long(length));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn too_long(length: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a frame of {length} bytes is beyond the limit of {MAX_FRAME}"),
    )
}
