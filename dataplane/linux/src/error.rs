//! What can go wrong with one object, and with opening the engine.

use std::{io, path::PathBuf};

use mesh_dataplane::Key;

use crate::netlink::NetlinkError;

/// Why one operation failed. The object is named by the [`Failure`] around it.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The kernel refused a netlink request.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// `nft` refused our table.
    #[error("nft: {0}")]
    Nft(String),
    /// A link that the object needs is missing; it has a failure of its own or vanished just now.
    #[error("its link does not exist")]
    NoLink,
    /// The task's namespace is gone or not attached.
    #[error("its network namespace is gone")]
    NoNetns,
    /// Another VXLAN device or socket of the namespace has the port.
    #[error("UDP port {0} is taken: remove what holds it, or choose another data path port")]
    PortTaken(u16),
    /// The map has no room.
    #[error("the map is full: raise its size in the node's options")]
    MapFull,
}

/// An operation that failed. The next round tries again.
#[derive(Debug)]
pub struct Failure {
    /// What it was about; `None`: something that no operation can achieve.
    pub key: Option<Key>,
    /// What was tried, on what, and why it failed.
    pub message: String,
}

/// Why the engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// This machine lacks something. Nothing was changed.
    #[error("this machine cannot run the data plane:{}", list(.0))]
    Missing(Vec<Missing>),
    /// No link has the underlay address, or the one that was named does not exist.
    #[error("no uplink: {0}")]
    Uplink(String),
    /// Programs and maps could not be loaded.
    #[error("cannot load the BPF programs: {0}")]
    Load(String),
    /// The maps that an earlier daemon left do not fit.
    #[error(
        "the pinned map {} has another layout (key and value of {found:?} bytes, expected \
         {expected:?}): remove the directory {} and start again; established flows are lost",
        path.display(), path.parent().unwrap_or(path).display()
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Key and value sizes found.
        found: (usize, usize),
        /// Key and value sizes expected.
        expected: (usize, usize),
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// Something that the machine lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

fn list(missing: &[Missing]) -> String {
    missing.iter().map(|m| format!("\n  - {}: {}", m.what, m.remedy)).collect()
}
