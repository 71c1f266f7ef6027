//! The directory of a task: the contract between meshd and a shim, which may be of different
//! versions, since a shim lives as long as its task and meshd is upgraded meanwhile.
//!
//! | file | written by | holds |
//! |---|---|---|
//! | `version` | meshd, first | `1`: the version of this contract |
//! | `spec.json` | meshd | [`ShimSpec`] |
//! | `etc/` | meshd | `resolv.conf`, `hosts`, `hostname` as the task sees them |
//! | `shim.pid` | shim | its process id; `/proc/<it>/ns/net` is the task's network namespace |
//! | `sock` | shim | a unix stream socket; one JSON line per [`Request`], one per [`Response`] |
//! | `pid` | shim, at start | the process id of the task's init on the host |
//! | `exit.json` | shim, by rename | [`Exit`]; once it is there, the task has ended |
//! | `log.json`, `log.json.1` | shim | output: lines of `{"log","stream","time"}`, newest file first |
//! | `shim.log` | shim | what went wrong in the shim itself |
//!
//! The shim answers `sock` from the end of `prepare` until the task has ended; then it leaves
//! `exit.json` and goes. A directory with neither a listening socket nor `exit.json` is that of a
//! task that was lost (its shim was killed, or the machine restarted).

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use mesh_types::TaskId;
use serde::{Deserialize, Serialize};

/// The version that this code writes and understands.
pub const VERSION: u32 = 1;

/// The longest line on the socket, in bytes: room for an argument vector and an environment.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// The paths in a task's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskDir(PathBuf);

impl TaskDir {
    /// The directory at `path`, which need not exist.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The contract's version.
    #[must_use]
    pub fn version(&self) -> PathBuf {
        self.0.join("version")
    }

    /// What to run.
    #[must_use]
    pub fn spec(&self) -> PathBuf {
        self.0.join("spec.json")
    }

    /// The files laid over the task's `/etc`.
    #[must_use]
    pub fn etc(&self) -> PathBuf {
        self.0.join("etc")
    }

    /// The shim's process id.
    #[must_use]
    pub fn shim_pid(&self) -> PathBuf {
        self.0.join("shim.pid")
    }

    /// The process id of the task's init.
    #[must_use]
    pub fn pid(&self) -> PathBuf {
        self.0.join("pid")
    }

    /// How the task ended.
    #[must_use]
    pub fn exit(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// The shim's own complaints.
    #[must_use]
    pub fn shim_log(&self) -> PathBuf {
        self.0.join("shim.log")
    }

    /// The task's output, newest part.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("log.json")
    }

    /// The task's output, the part before [`Self::log`].
    #[must_use]
    pub fn log_old(&self) -> PathBuf {
        self.0.join("log.json.1")
    }

    /// A path to the socket that fits `sun_path` (108 bytes, unix(7)) however long the directory's
    /// own path is. It is valid as long as the descriptor beside it.
    ///
    /// # Errors
    /// When the directory cannot be opened.
    pub fn socket(&self) -> io::Result<(OwnedFd, PathBuf)> {
        let dir = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&self.0)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/sock", dir.as_raw_fd()));
        Ok((dir.into(), path))
    }

    /// Reads a JSON file of this directory; `None` if it is not there.
    ///
    /// # Errors
    /// When it cannot be read or is not what it should be.
    pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Replaces a file so that a reader finds the old or the new content, never a part: also after a
/// power cut, hence the `fsync` before the rename and that of the directory after it.
///
/// # Errors
/// Those of the file system.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// What a shim runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimSpec {
    /// The task.
    pub id: TaskId,
    /// The argument vector; the first is looked up in the environment's PATH.
    pub argv: Vec<String>,
    /// The whole environment, `KEY=value`.
    pub env: Vec<String>,
    /// Working directory; `/` if not given.
    pub dir: Option<PathBuf>,
    /// Host name.
    pub hostname: String,
    /// The task's cgroup (v2): the shim lives in `shim` below it, the task in `task`.
    pub cgroup: PathBuf,
    /// The task's cgroups (v1) on other hierarchies, which hold it to its limits. The shim is in
    /// none of them.
    #[serde(default)]
    pub twins: Vec<PathBuf>,
    /// Output is kept in two files of at most this many bytes each.
    pub log_bytes_max: u64,
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The exit status; 128 + n if signal n ended it.
    pub code: i32,
    /// The kernel's out-of-memory killer struck in the task's cgroup.
    pub oom: bool,
    /// Why it never started, if it did not.
    pub error: Option<String>,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// What meshd asks of a shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Request {
    /// Start the process. Answered with [`Response::Status`] or [`Response::Error`].
    Start,
    /// Send `signal` now, and SIGKILL to all of the task after `grace_ms`, also if meshd is gone by
    /// then. Answered at once with [`Response::Status`].
    Stop {
        /// The signal's number.
        signal: i32,
        /// Milliseconds between that signal and SIGKILL.
        grace_ms: u64,
    },
    /// SIGKILL to all of the task. Answered at once with [`Response::Status`].
    Kill,
    /// Send a signal: to the process of the `exec` that this connection made, else to the task.
    Signal {
        /// The signal's number.
        signal: i32,
    },
    /// Answered at once with [`Response::Status`].
    Status,
    /// Answered with [`Response::Status`] when the task has ended.
    Wait,
    /// Run one more process in the task, with the three descriptors sent along (`SCM_RIGHTS`) as
    /// its standard streams. Answered with [`Response::Exited`] or [`Response::Error`]. When the
    /// connection closes before, that process is killed.
    Exec {
        /// The argument vector.
        argv: Vec<String>,
        /// Added to the task's environment.
        env: Vec<String>,
        /// Working directory; that of the task if not given.
        dir: Option<PathBuf>,
    },
    /// Kill all of the task and end the shim. The connection closes when that is done.
    Quit,
}

/// What a shim answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The state of the task.
    Status(ShimStatus),
    /// The process of an `exec` ended.
    Exited {
        /// Its exit status; 128 + n if signal n ended it.
        code: i32,
    },
    /// It was not done.
    Error {
        /// Why.
        message: String,
    },
}

/// How far a task is, as its shim knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ShimStatus {
    /// The network namespace stands, no process yet.
    Created,
    /// It runs.
    Running {
        /// The process id of the task's init on the host.
        pid: u32,
    },
    /// It ended.
    Exited {
        /// How.
        exit: Exit,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_format_is_fixed() {
        // Shims of older versions are on the other side: these bytes may only gain fields.
        let line = |request: &Request| serde_json::to_string(request).unwrap();
        assert_eq!(line(&Request::Start), r#"{"cmd":"start"}"#);
        assert_eq!(
            line(&Request::Stop { signal: 15, grace_ms: 10_000 }),
            r#"{"cmd":"stop","signal":15,"grace_ms":10000}"#
        );
        let running = Response::Status(ShimStatus::Running { pid: 7 });
        assert_eq!(
            serde_json::to_string(&running).unwrap(),
            r#"{"status":{"state":"running","pid":7}}"#
        );
    }

    #[test]
    fn an_atomic_write_replaces_and_leaves_nothing_beside() {
        let dir = std::env::temp_dir().join(format!("mesh-contract-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("exit.json");
        write_atomic(&path, b"1").unwrap();
        write_atomic(&path, b"22").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"22");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::remove_dir_all(&dir).unwrap();
    }
}
