//! Executors: what runs a task on a node. One trait, one backend per [`Runtime`]; `process` runs a
//! host binary in the task's own namespaces, under a shim that outlives meshd.
//!
//! A task's life here: [`Executor::prepare`] makes its network namespace with nothing in it, so
//! that interfaces can be plugged before any of its code runs; [`Executor::start`] runs it;
//! [`Executor::wait`] tells how it ended; [`Executor::remove`] leaves nothing. When to do which is
//! decided elsewhere (meshd's agent).
//!
//! Read [`contract`] next: the directory that meshd and a shim share, versioned, since the two may
//! be of different releases.
//!
//! [`Runtime`]: mesh_types::spec::Runtime

pub mod cgroup;
pub mod contract;
pub mod logs;
#[cfg(fuzzing)]
pub mod fuzz {
    //! What `cargo xtask fuzz` calls.

    pub use crate::logs::fuzz_line as log_line;
}
mod process;
pub mod shim;
mod signal;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use mesh_types::{TaskId, task::TaskAssignment};
use thiserror::Error;
use tokio::net::unix::pipe;

pub use self::{
    contract::Exit,
    process::{ProcessConfig, ProcessExecutor},
    signal::{SIGTERM, parse_signal},
};

/// What runs tasks of one runtime. Every call may be repeated: it brings about a state rather than
/// an edge.
#[async_trait]
pub trait Executor: Send + Sync {
    /// Makes the task's network namespace and all that its start needs, and runs nothing yet. What
    /// an earlier attempt left is removed first.
    ///
    /// # Errors
    /// [`ExecutorError::Prepare`] and [`ExecutorError::Io`]; nothing is left then.
    async fn prepare(
        &self,
        task: &TaskAssignment,
        context: &TaskContext,
    ) -> Result<Prepared, ExecutorError>;

    /// Runs the task; its process id on the host.
    ///
    /// # Errors
    /// [`ExecutorError::Start`] with the reason for the user; the task has ended then.
    async fn start(&self, task: TaskId) -> Result<u32, ExecutorError>;

    /// Sends `signal` now and SIGKILL to all that is left of the task after `grace`. Returns at
    /// once; [`Self::wait`] tells when it has ended.
    ///
    /// # Errors
    /// [`ExecutorError::Lost`] if there is nothing to stop any more.
    async fn stop(&self, task: TaskId, signal: i32, grace: Duration) -> Result<(), ExecutorError>;

    /// Sends SIGKILL to all of the task.
    ///
    /// # Errors
    /// [`ExecutorError::Lost`] if there is nothing to kill any more.
    async fn kill(&self, task: TaskId) -> Result<(), ExecutorError>;

    /// Waits until the task has ended.
    ///
    /// # Errors
    /// [`ExecutorError::Lost`] if how it ended is not known.
    async fn wait(&self, task: TaskId) -> Result<Exit, ExecutorError>;

    /// Ends what is left of the task and removes every trace of it, its logs too. A task that is
    /// not there is fine.
    ///
    /// # Errors
    /// [`ExecutorError::Io`]; try again then.
    async fn remove(&self, task: TaskId) -> Result<(), ExecutorError>;

    /// What is there, after a restart of meshd.
    ///
    /// # Errors
    /// [`ExecutorError::Io`].
    async fn list(&self) -> Result<Vec<(TaskId, FoundState)>, ExecutorError>;

    /// Runs one more process in a running task. Whether it could be run at all is told by
    /// [`ExecControl::wait`], as [`ExecutorError::Exec`].
    ///
    /// # Errors
    /// [`ExecutorError::Exec`] with the reason for the user when the task is not here.
    async fn exec(&self, task: TaskId, spec: ExecSpec) -> Result<ExecSession, ExecutorError>;

    /// The task's output: json-file lines, oldest file first. The files may not exist.
    fn logs(&self, task: TaskId) -> [PathBuf; 2];
}

/// What a task is given besides its assignment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TaskContext {
    /// Its host name.
    pub hostname: String,
    /// Its `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// Lines of its `/etc/hosts` besides those of localhost.
    pub hosts: Vec<(IpAddr, String)>,
    /// `KEY=value`, below the user's own (`MESH_TASK` and the like).
    pub env: Vec<String>,
    /// Put in front of its PATH.
    pub path_dir: Option<PathBuf>,
}

/// A task that is ready to be plugged and started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Its network namespace.
    pub netns: PathBuf,
}

/// A task that was found after a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundState {
    /// Prepared, never started.
    Created {
        /// Its network namespace.
        netns: PathBuf,
    },
    /// It runs.
    Running {
        /// Its network namespace.
        netns: PathBuf,
        /// Its process id on the host.
        pid: u32,
    },
    /// It ended; its logs are there.
    Exited(Exit),
    /// Its shim is gone and left no record.
    Lost,
}

/// One more process to run in a task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecSpec {
    /// The argument vector.
    pub argv: Vec<String>,
    /// Added to the task's environment, `KEY=value`.
    pub env: Vec<String>,
    /// Working directory; that of the task if not given.
    pub dir: Option<PathBuf>,
}

/// A process that [`Executor::exec`] started. Dropping `control` kills it.
#[derive(Debug)]
pub struct ExecSession {
    /// Its standard input; drop it to end that.
    pub stdin: pipe::Sender,
    /// Its standard output.
    pub stdout: pipe::Receiver,
    /// Its standard error.
    pub stderr: pipe::Receiver,
    /// Its signals and its end.
    pub control: ExecControl,
}

/// Signals for, and the end of, a process that [`Executor::exec`] started.
#[derive(Debug)]
pub struct ExecControl {
    task: TaskId,
    conn: process::Conn,
}

impl ExecControl {
    /// Sends it a signal.
    ///
    /// # Errors
    /// [`ExecutorError::Lost`] when the shim is gone.
    pub async fn signal(&mut self, signal: i32) -> Result<(), ExecutorError> {
        self.conn.send(&contract::Request::Signal { signal }).await.map_err(|_| self.lost())
    }

    /// Waits for its end: the exit status, 128 + n for signal n. May be dropped and called again.
    ///
    /// # Errors
    /// [`ExecutorError::Exec`] if it never ran, [`ExecutorError::Lost`] when the shim is gone.
    pub async fn wait(&mut self) -> Result<i32, ExecutorError> {
        match self.conn.receive().await {
            Ok(Some(contract::Response::Exited { code })) => Ok(code),
            Ok(Some(contract::Response::Error { message })) => Err(ExecutorError::Exec(message)),
            Ok(Some(contract::Response::Status(_)) | None) | Err(_) => Err(self.lost()),
        }
    }

    fn lost(&self) -> ExecutorError {
        ExecutorError::Lost(self.task)
    }
}

/// Why an executor did not do it.
#[derive(Debug, Error)]
pub enum ExecutorError {
    /// This machine cannot run tasks; nothing was changed.
    #[error("the process executor cannot work here: {0}")]
    Unsupported(String),
    /// The task's namespaces could not be made.
    #[error("{0}")]
    Prepare(String),
    /// The task's program could not be run.
    #[error("{0}")]
    Start(String),
    /// The program of an `exec` could not be run.
    #[error("{0}")]
    Exec(String),
    /// The task's shim is gone and left no record.
    #[error(
        "task {0} was lost: its shim is gone and left no exit status (killed, or the machine restarted)"
    )]
    Lost(TaskId),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl ExecutorError {
    pub(crate) fn io(what: &str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { what: format!("{what} {}", path.display()), source }
    }
}
