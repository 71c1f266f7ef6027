//! Our own additions under `/mesh/`.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// `GET /mesh/node/stats[?node=…]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeStats {
    /// Whose.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// Its name.
    pub hostname: String,
    /// Sorted by name.
    pub counters: Vec<Counter>,
}

/// A counter of the data plane.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Counter {
    /// For drops, the reason.
    pub name: String,
    /// Packets or events since the programs were loaded.
    pub value: u64,
    /// It counts dropped packets.
    pub drop: bool,
}

/// `GET /mesh/status`: this node and the cluster in one look.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// `inactive`, `pending`, `active` or `error`.
    pub state: String,
    /// Why, with `error`.
    pub error: String,
    /// This node.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// The cluster.
    #[serde(rename = "ClusterID")]
    pub cluster_id: String,
    /// `worker` or `manager`.
    pub role: String,
    /// The leader's node id; empty while there is none, and on workers.
    #[serde(rename = "LeaderID")]
    pub leader_id: String,
    /// The store's revision here; 0 on workers.
    pub revision: u64,
    /// All nodes; empty on workers.
    pub nodes: Vec<StatusNode>,
    /// The key that seals gossip; of generation 0 on workers.
    pub gossip_key: GossipKey,
}

/// How far the key of gossip is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GossipKey {
    /// Its generation.
    pub epoch: u64,
    /// The next one is on its way to all nodes.
    pub rotating: bool,
}

/// See [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "as in the Engine API's node")]
pub struct StatusNode {
    #[serde(rename = "ID")]
    pub id: String,
    pub number: u64,
    pub name: String,
    pub role: String,
    pub state: String,
    pub addr: String,
}

/// `POST /mesh/task/{id}/exec` with `Upgrade: tcp`. After the 101 both sides send [`Frame`]s.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ExecRequest {
    /// Program and arguments.
    pub cmd: Vec<String>,
    /// `KEY=value`, on top of the task's own.
    pub env: Vec<String>,
    /// Working directory; empty: the task's own.
    pub working_dir: String,
}

/// What a frame of an exec stream carries. 0–3 are those of Docker's multiplexed stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// To the process; an empty one is the end of its input.
    Stdin = 0,
    /// From the process.
    Stdout = 1,
    /// From the process.
    Stderr = 2,
    /// How it ended will not be known; the payload says why. The last frame.
    Failed = 3,
    /// The exit status, 4 bytes big endian. The last frame.
    Exit = 4,
    /// A signal for the process, 4 bytes big endian.
    Signal = 5,
}

/// One frame: `[kind, 0, 0, 0, length as u32 big endian]`, then the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: FrameKind,
    /// At most [`Frame::PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame. The stream cannot be read on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// An unknown kind.
    #[error("frame of unknown kind {0} in the exec stream")]
    Kind(u8),
    /// Too long.
    #[error("frame of {0} bytes in the exec stream: more than {max}", max = Frame::PAYLOAD_MAX)]
    Length(u32),
}

impl Frame {
    /// Bytes before the payload.
    pub const HEADER_LEN: usize = 8;
    /// The longest payload.
    pub const PAYLOAD_MAX: u32 = 1 << 20;

    /// A frame with a number as payload.
    #[must_use]
    pub fn number(kind: FrameKind, value: i32) -> Self {
        Self { kind, payload: value.to_be_bytes().to_vec() }
    }

    /// The payload as a number, if it is one.
    #[must_use]
    pub fn as_number(&self) -> Option<i32> {
        self.payload.as_slice().try_into().ok().map(i32::from_be_bytes)
    }

    /// The frame's bytes. Payloads are cut by their makers; a longer one is a bug.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        assert!(length <= Self::PAYLOAD_MAX, "payload of {length} bytes in one frame");
        let mut bytes = Vec::with_capacity(Self::HEADER_LEN + self.payload.len());
        bytes.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// Kind and payload length of a header.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn decode_header(header: [u8; Self::HEADER_LEN]) -> Result<(FrameKind, usize), FrameError> {
        let kind = match header[0] {
            0 => FrameKind::Stdin,
            1 => FrameKind::Stdout,
            2 => FrameKind::Stderr,
            3 => FrameKind::Failed,
            4 => FrameKind::Exit,
            5 => FrameKind::Signal,
            other => return Err(FrameError::Kind(other)),
        };
        let length = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        if length > Self::PAYLOAD_MAX {
            return Err(FrameError::Length(length));
        }
        Ok((kind, length as usize))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_round_trip(kind in 0u8..6, payload: Vec<u8>) {
            let (kind, _) = Frame::decode_header([kind, 0, 0, 0, 0, 0, 0, 0]).unwrap();
            let frame = Frame { kind, payload };
            let bytes = frame.encode();
            let (header, payload) = bytes.split_at(Frame::HEADER_LEN);
            let (kind, length) = Frame::decode_header(header.try_into().unwrap()).unwrap();
            prop_assert_eq!((kind, length), (frame.kind, frame.payload.len()));
            prop_assert_eq!(payload, &frame.payload[..]);
        }

        #[test]
        fn any_header_is_a_frame_or_an_error(header: [u8; 8]) {
            if let Ok((_, length)) = Frame::decode_header(header) {
                prop_assert!(length <= Frame::PAYLOAD_MAX as usize);
            }
        }
    }
}
