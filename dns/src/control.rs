//! What meshd and the resolver say to each other, on a unix socket of the node.
//!
//! Frames: a 32-bit big-endian length and as many bytes of JSON. meshd sends [`Request`]s; the
//! resolver sends its whole [`Status`] at once and whenever it changed. Sockets go with frames of
//! both, see [`handover`](crate::handover).

use std::{collections::BTreeMap, io};

use mesh_types::{Revision, TaskId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{handover::SocketsOf, snapshot::Snapshot};

/// The largest frame, in bytes: some 100,000 endpoints.
pub(crate) const MAX_FRAME: usize = 64 << 20;

/// What meshd asks of the resolver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Serve this from now on.
    Snapshot(Box<Snapshot>),
    /// These tasks' sockets come with this frame: serve them instead of opening others. Only for a
    /// resolver that [takes](Status::takes_sockets) them.
    Sockets(Vec<SocketsOf>),
    /// With this frame comes a [journal](crate::handover::journal). Only for a resolver that
    /// [takes](Status::takes_journal) it.
    Journal,
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
    /// What it has done so far.
    pub counts: Counts,
    /// Of each task that asked for more than its share: how many of its queries were dropped.
    pub limited: BTreeMap<TaskId, u64>,
    /// Whether it knows [`Request::Sockets`].
    pub takes_sockets: bool,
    /// Whether it knows [`Request::Journal`].
    pub takes_journal: bool,
    /// Tasks whose sockets come with this frame: each once on a connection.
    pub sockets: Vec<SocketsOf>,
}

/// What became of queries, since the process began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// All that came.
    pub queries: u64,
    /// Answered on the hot path.
    pub fast: u64,
    /// Asked of other servers.
    pub forwarded: u64,
    /// Answered from what other servers said before.
    pub cached: u64,
    /// Dropped since too many were under way to other servers.
    pub crowded: u64,
    /// Dropped since their task asked for more than its share.
    pub limited: u64,
}

/// Writes one frame.
///
/// # Errors
/// Of the stream; `InvalidData` for a frame beyond 64 MiB.
pub async fn write_frame(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &impl Serialize,
) -> io::Result<()> {
    stream.write_all(&encode(value)?).await?;
    stream.flush().await
}

/// A frame, length and body.
pub(crate) fn encode(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, value).map_err(io::Error::other)?;
    let length = frame.len() - 4;
    let header = u32::try_from(length).ok().filter(|n| *n as usize <= MAX_FRAME);
    let header = header.ok_or_else(|| too_long(length))?.to_be_bytes();
    frame[..4].copy_from_slice(&header);
    Ok(frame)
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

pub(crate) fn too_long(length: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a frame of {length} bytes is beyond the limit of {MAX_FRAME}"),
    )
}
