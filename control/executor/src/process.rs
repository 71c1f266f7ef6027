//! The `process` executor: a host binary in the task's own namespaces. It starts one shim per task
//! (`meshd task-shim DIR`) and talks to it through its directory; it holds no state itself, so a
//! restarted meshd knows as much as the one before.

use std::{
    ffi::OsStr,
    fs,
    io::{self, IoSlice},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::DirBuilderExt, net::UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use async_trait::async_trait;
use mesh_types::{TaskId, task::TaskAssignment};
use nix::{
    fcntl::OFlag,
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
    unistd::pipe2,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixStream, unix::pipe},
    process::Command,
    time::timeout,
};

use crate::{
    ExecControl, ExecSession, ExecSpec, Executor, ExecutorError, Exit, FoundState, Prepared,
    TaskContext,
    cgroup::{self, Cgroup, Hierarchies, Plan},
    contract::{self, Request, Response, ShimSpec, ShimStatus, TaskDir},
    shim,
};

/// A shim that is not ready by then is given up.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer that the shim gives at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A program's exec may wait for a slow file system.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Processes die within this after SIGKILL, unless they hang in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// Behind the directory of meshctl: what Debian gives to root.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Settings of the process executor.
#[derive(Debug, Clone)]
pub struct ProcessConfig {
    /// Task directories are made below it.
    pub tasks_dir: PathBuf,
    /// Task cgroups are made below it; it must be on a cgroup2 file system and is made if absent.
    pub cgroup_parent: PathBuf,
    /// The program whose `task-shim DIR` runs [`shim::main`]; meshd itself, through
    /// `/proc/self/exe`, so that an upgrade that replaced the file on disk does no harm.
    pub shim_program: PathBuf,
    /// Output kept per task, in two files of at most this many bytes each. Below 64 KiB single
    /// lines may exceed it. Default 10 MiB.
    pub log_bytes_max: u64,
}

impl ProcessConfig {
    /// The defaults.
    #[must_use]
    pub fn new(tasks_dir: impl Into<PathBuf>, cgroup_parent: impl Into<PathBuf>) -> Self {
        Self {
            tasks_dir: tasks_dir.into(),
            cgroup_parent: cgroup_parent.into(),
            shim_program: "/proc/self/exe".into(),
            log_bytes_max: 10 << 20,
        }
    }
}

/// Runs host binaries as tasks.
#[derive(Debug)]
pub struct ProcessExecutor {
    config: ProcessConfig,
    hierarchies: Hierarchies,
}

impl ProcessExecutor {
    /// Checks that this machine can run tasks. Makes nothing yet.
    ///
    /// # Errors
    /// [`ExecutorError::Unsupported`] with what is missing and its remedy.
    pub fn new(config: ProcessConfig) -> Result<Self, ExecutorError> {
        let unsupported = |reason: &str| ExecutorError::Unsupported(reason.to_owned());
        if !nix::unistd::geteuid().is_root() {
            return Err(unsupported("making namespaces needs root: run meshd as root"));
        }
        if !config.cgroup_parent.is_absolute() {
            return Err(unsupported("the cgroup parent must be an absolute path"));
        }
        cgroup::check_parent(&config.cgroup_parent).map_err(ExecutorError::Unsupported)?;
        let hierarchies = Hierarchies::observe(&config.cgroup_parent).map_err(|error| {
            unsupported(&format!("cannot tell its cgroup controllers: {error}"))
        })?;
        Ok(Self { config, hierarchies })
    }

    fn dir(&self, task: TaskId) -> TaskDir {
        TaskDir::new(self.config.tasks_dir.join(task.to_string()))
    }

    fn cgroup(&self, task: TaskId) -> PathBuf {
        self.config.cgroup_parent.join(task.to_string())
    }

    /// Asks the shim one thing that it answers within `limit`.
    async fn ask(
        &self,
        task: TaskId,
        request: &Request,
        limit: Duration,
    ) -> Result<Response, ExecutorError> {
        let asked = async {
            let mut conn = Conn::open(&self.dir(task))?;
            conn.send(request).await?;
            conn.receive().await
        };
        match timeout(limit, asked).await {
            Ok(Ok(Some(response))) => Ok(response),
            Ok(Ok(None)) => Err(ExecutorError::Lost(task)),
            Ok(Err(error)) if is_gone(&error) => Err(ExecutorError::Lost(task)),
            Ok(Err(source)) => {
                Err(ExecutorError::io("ask the shim in", self.dir(task).path(), source))
            }
            Err(_) => {
                let source = io::ErrorKind::TimedOut.into();
                Err(ExecutorError::io("ask the shim in", self.dir(task).path(), source))
            }
        }
    }

    /// Asks for something whose answer is the task's status.
    async fn tell(&self, task: TaskId, request: &Request) -> Result<(), ExecutorError> {
        match self.ask(task, request, ANSWER_TIMEOUT).await? {
            Response::Error { message } => {
                let source = io::Error::other(message);
                Err(ExecutorError::io("ask the shim in", self.dir(task).path(), source))
            }
            Response::Status(_) | Response::Exited { .. } => Ok(()),
        }
    }

    fn recorded_exit(&self, task: TaskId) -> Result<Option<Exit>, ExecutorError> {
        let path = self.dir(task).exit();
        TaskDir::read_json(&path).map_err(|error| ExecutorError::io("read", &path, error))
    }

    fn netns(dir: &TaskDir) -> io::Result<PathBuf> {
        let pid = fs::read_to_string(dir.shim_pid())?;
        let pid: u32 = pid.trim().parse().map_err(io::Error::other)?;
        Ok(format!("/proc/{pid}/ns/net").into())
    }

    /// Writes the task directory and sets the task's limits. Waits for the disk.
    fn lay_out(
        dir: &TaskDir,
        spec: &ShimSpec,
        context: &TaskContext,
        limits: &Plan,
    ) -> Result<(), ExecutorError> {
        Self::write_dir(dir, spec, context)
            .map_err(|error| ExecutorError::io("write the task directory", dir.path(), error))?;
        limits
            .apply(&Cgroup::new(&spec.cgroup))
            .map_err(|error| ExecutorError::Prepare(format!("cannot set the limits: {error}")))
    }

    fn write_dir(dir: &TaskDir, spec: &ShimSpec, context: &TaskContext) -> io::Result<()> {
        if let Some(all) = dir.path().parent() {
            fs::create_dir_all(all)?;
        }
        fs::DirBuilder::new().mode(0o700).create(dir.path())?;
        fs::write(dir.version(), contract::VERSION.to_string())?;
        fs::create_dir(dir.etc())?;
        fs::write(dir.etc().join("resolv.conf"), &context.resolv_conf)?;
        fs::write(dir.etc().join("hostname"), format!("{}\n", context.hostname))?;
        fs::write(dir.etc().join("hosts"), hosts_file(context))?;
        contract::write_atomic(&dir.spec(), &serde_json::to_vec(spec)?)
    }

    /// Starts the shim and waits for its word.
    async fn start_shim(&self, dir: &TaskDir) -> Result<(), ExecutorError> {
        let program = &self.config.shim_program;
        let log = fs::File::create(dir.shim_log())
            .map_err(|error| ExecutorError::io("create", &dir.shim_log(), error))?;
        let mut child = Command::new(program)
            .arg("task-shim")
            .arg(dir.path())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|error| ExecutorError::io("start a shim with", program, error))?;
        let mut word = String::new();
        let read = async {
            if let Some(stdout) = &mut child.stdout {
                stdout.take(64 * 1024).read_to_string(&mut word).await?;
            }
            Ok::<(), io::Error>(())
        };
        let outcome = timeout(PREPARE_TIMEOUT, read).await;
        let ready = word == shim::READY;
        if !ready {
            let _ = child.start_kill();
        }
        // Collected whenever it ends; it is not our child any more after a restart of meshd.
        tokio::spawn(async move { child.wait().await });
        match outcome {
            Ok(Ok(())) if ready => Ok(()),
            Ok(Ok(())) if word.is_empty() => {
                let log = fs::read_to_string(dir.shim_log()).unwrap_or_default();
                Err(ExecutorError::Prepare(format!(
                    "the task's shim ended at once: {}",
                    log.trim()
                )))
            }
            Ok(Ok(())) => Err(ExecutorError::Prepare(word.trim().to_owned())),
            Ok(Err(error)) => Err(ExecutorError::Prepare(format!("the task's shim: {error}"))),
            Err(_) => Err(ExecutorError::Prepare(format!(
                "the task's shim was not ready after {} s",
                PREPARE_TIMEOUT.as_secs()
            ))),
        }
    }

    async fn found(&self, task: TaskId) -> Result<FoundState, ExecutorError> {
        if let Some(exit) = self.recorded_exit(task)? {
            return Ok(FoundState::Exited(exit));
        }
        let netns = |dir: &TaskDir| {
            Self::netns(dir).map_err(|error| ExecutorError::io("read", &dir.shim_pid(), error))
        };
        match self.ask(task, &Request::Status, ANSWER_TIMEOUT).await {
            Ok(Response::Status(ShimStatus::Created)) => {
                Ok(FoundState::Created { netns: netns(&self.dir(task))? })
            }
            Ok(Response::Status(ShimStatus::Running { pid })) => {
                Ok(FoundState::Running { netns: netns(&self.dir(task))?, pid })
            }
            Ok(Response::Status(ShimStatus::Exited { exit })) => Ok(FoundState::Exited(exit)),
            // On a busy machine it may be slow, or have too many callers. It is lost once its
            // process is gone, and not before: until then its files tell how far it is.
            _ if self.shim_lives(task) => {
                tracing::warn!(%task, "the shim does not answer; going by its files");
                let dir = self.dir(task);
                let pid = fs::read_to_string(dir.pid()).ok().and_then(|pid| pid.parse().ok());
                let netns = netns(&dir)?;
                Ok(match pid {
                    Some(pid) => FoundState::Running { netns, pid },
                    None => FoundState::Created { netns },
                })
            }
            // It may have written its record between our two looks.
            _ => Ok(self.recorded_exit(task)?.map_or(FoundState::Lost, FoundState::Exited)),
        }
    }

    /// Whether the shim's process is there: one of its number that serves this task's directory.
    fn shim_lives(&self, task: TaskId) -> bool {
        let dir = self.dir(task);
        let Ok(pid) = fs::read_to_string(dir.shim_pid()) else { return false };
        // A zombie's is empty.
        let arguments = fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
        let last = arguments.strip_suffix(b"\0").and_then(|all| all.rsplit(|b| *b == 0).next());
        let served = last.map(OsStr::from_bytes).and_then(|last| Path::new(last).file_name());
        served.is_some() && served == dir.path().file_name()
    }
}

#[async_trait]
impl Executor for ProcessExecutor {
    async fn prepare(
        &self,
        task: &TaskAssignment,
        context: &TaskContext,
    ) -> Result<Prepared, ExecutorError> {
        let argv: Vec<String> = task.spec.command.iter().chain(&task.spec.args).cloned().collect();
        if argv.is_empty() {
            let remedy = "give one after the options: -- COMMAND ARG…";
            return Err(ExecutorError::Prepare(format!("no command given; {remedy}")));
        }
        self.remove(task.id).await?;
        let (dir, cgroup) = (self.dir(task.id), self.cgroup(task.id));
        let limits = self.hierarchies.plan(&cgroup, &task.spec.resources.limits);
        let limits = limits.map_err(ExecutorError::Prepare)?;
        let spec = ShimSpec {
            id: task.id,
            argv,
            env: environment(&task.spec.env, context),
            dir: task.spec.dir.as_ref().map(PathBuf::from),
            hostname: context.hostname.clone(),
            cgroup,
            twins: limits.twins.clone(),
            log_bytes_max: self.config.log_bytes_max,
        };
        let written = {
            let (dir, context) = (dir.clone(), context.clone());
            let lay_out = move || Self::lay_out(&dir, &spec, &context, &limits);
            tokio::task::spawn_blocking(lay_out).await
        };
        let written = written.unwrap_or_else(|error| {
            Err(ExecutorError::io("write", dir.path(), io::Error::other(error)))
        });
        let made = match written {
            Ok(()) => self.start_shim(&dir).await,
            Err(error) => Err(error),
        };
        let netns = made.and_then(|()| {
            Self::netns(&dir).map_err(|error| ExecutorError::io("read", &dir.shim_pid(), error))
        });
        match netns {
            Ok(netns) => Ok(Prepared { netns }),
            Err(error) => {
                if let Err(more) = self.remove(task.id).await {
                    tracing::warn!(task = %task.id, error = %more, "cannot clean up after prepare");
                }
                Err(error)
            }
        }
    }

    async fn start(&self, task: TaskId) -> Result<u32, ExecutorError> {
        match self.ask(task, &Request::Start, START_TIMEOUT).await? {
            Response::Status(ShimStatus::Running { pid }) => Ok(pid),
            Response::Error { message } => Err(ExecutorError::Start(message)),
            Response::Status(ShimStatus::Exited { exit }) => Err(ExecutorError::Start(
                exit.error.unwrap_or_else(|| format!("it has ended already ({})", exit.code)),
            )),
            Response::Status(ShimStatus::Created) | Response::Exited { .. } => {
                Err(ExecutorError::Lost(task))
            }
        }
    }

    async fn stop(&self, task: TaskId, signal: i32, grace: Duration) -> Result<(), ExecutorError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.tell(task, &Request::Stop { signal, grace_ms }).await
    }

    async fn kill(&self, task: TaskId) -> Result<(), ExecutorError> {
        self.tell(task, &Request::Kill).await
    }

    async fn wait(&self, task: TaskId) -> Result<Exit, ExecutorError> {
        let waited = async {
            let mut conn = Conn::open(&self.dir(task))?;
            conn.send(&Request::Wait).await?;
            conn.receive().await
        };
        match waited.await {
            Ok(Some(Response::Status(ShimStatus::Exited { exit }))) => return Ok(exit),
            // It may have ended before we asked; then the record is there.
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                return Err(ExecutorError::io("ask the shim in", self.dir(task).path(), error));
            }
        }
        match self.recorded_exit(task)? {
            Some(exit) => Ok(exit),
            // It has too many callers; the next attempt may do better.
            None if self.shim_lives(task) => {
                let source = io::ErrorKind::ConnectionAborted.into();
                Err(ExecutorError::io("wait for the shim in", self.dir(task).path(), source))
            }
            // It may have written its record between our two looks.
            None => self.recorded_exit(task)?.ok_or(ExecutorError::Lost(task)),
        }
    }

    async fn remove(&self, task: TaskId) -> Result<(), ExecutorError> {
        let dir = self.dir(task);
        if let Ok(mut conn) = Conn::open(&dir)
            && conn.send(&Request::Quit).await.is_ok()
        {
            // It closes when the shim is gone; one that hangs is killed below.
            let _ = timeout(KILL_TIMEOUT, conn.receive()).await;
        }
        let path = self.cgroup(task);
        let destroyed = tokio::task::spawn_blocking({
            let (path, twins) = (path.clone(), self.hierarchies.twins(&path));
            move || Cgroup::new(path).destroy(&twins, KILL_TIMEOUT)
        });
        let destroyed = destroyed.await.map_err(io::Error::other).flatten();
        destroyed.map_err(|error| ExecutorError::io("remove the cgroup", &path, error))?;
        match fs::remove_dir_all(dir.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ExecutorError::io("remove", dir.path(), error))
            }
            _ => Ok(()),
        }
    }

    async fn list(&self) -> Result<Vec<(TaskId, FoundState)>, ExecutorError> {
        let tasks_dir = &self.config.tasks_dir;
        let entries = match fs::read_dir(tasks_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ExecutorError::io("read", tasks_dir, error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| ExecutorError::io("read", tasks_dir, error))?;
            // Other names are none of ours and left alone.
            let Some(task) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let state = self.found(task).await.unwrap_or_else(|error| {
                tracing::warn!(%task, %error, "cannot tell the state of a task; taken as lost");
                FoundState::Lost
            });
            found.push((task, state));
        }
        Ok(found)
    }

    async fn exec(&self, task: TaskId, spec: ExecSpec) -> Result<ExecSession, ExecutorError> {
        let dir = self.dir(task);
        let failed = |error: io::Error| {
            if is_gone(&error) {
                ExecutorError::Exec(format!("task {task} is not running on this node"))
            } else {
                ExecutorError::io("exec through the shim in", dir.path(), error)
            }
        };
        let pipes = || pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from);
        let (stdin, stdin_ours) = pipes().map_err(failed)?;
        let (stdout_ours, stdout) = pipes().map_err(failed)?;
        let (stderr_ours, stderr) = pipes().map_err(failed)?;
        let request = Request::Exec { argv: spec.argv, env: spec.env, dir: spec.dir };
        let conn = Conn::open_with_fds(&dir, &request, &[stdin, stdout, stderr]).map_err(failed)?;
        Ok(ExecSession {
            stdin: pipe::Sender::from_owned_fd(stdin_ours).map_err(failed)?,
            stdout: pipe::Receiver::from_owned_fd(stdout_ours).map_err(failed)?,
            stderr: pipe::Receiver::from_owned_fd(stderr_ours).map_err(failed)?,
            control: ExecControl { task, conn },
        })
    }

    fn logs(&self, task: TaskId) -> [PathBuf; 2] {
        let dir = self.dir(task);
        [dir.log_old(), dir.log()]
    }
}

/// Whether an error on the socket means that no shim is there.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe)
}

fn hosts_file(context: &TaskContext) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for (address, names) in &context.hosts {
        text.push_str(&format!("{address}\t{names}\n"));
    }
    text
}

/// The whole environment of a task: later entries replace earlier ones, and the directory of
/// meshctl stays in front of whatever PATH the user gave.
fn environment(user: &[String], context: &TaskContext) -> Vec<String> {
    let mut out: Vec<String> =
        vec![format!("PATH={PATH}"), "HOME=/root".into(), format!("HOSTNAME={}", context.hostname)];
    for entry in context.env.iter().chain(user) {
        // Docker's `KEY` without a value takes the client's; here there is none to take.
        let Some((key, _)) = entry.split_once('=') else { continue };
        let prefix = format!("{key}=");
        out.retain(|old| !old.starts_with(&prefix));
        out.push(entry.clone());
    }
    if let Some(dir) = &context.path_dir {
        for entry in &mut out {
            if let Some(path) = entry.strip_prefix("PATH=") {
                *entry = format!("PATH={}:{path}", dir.display());
            }
        }
    }
    out
}

/// A connection to a shim.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Conn {
    fn connect(dir: &TaskDir) -> io::Result<StdUnixStream> {
        let (_held, path) = dir.socket()?;
        // Local and immediate: a full backlog is an error rather than a wait, since the shim's
        // loop is never longer than a moment away.
        StdUnixStream::connect(path)
    }

    fn open(dir: &TaskDir) -> io::Result<Self> {
        Self::from_std(Self::connect(dir)?)
    }

    fn from_std(stream: StdUnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: BufReader::new(UnixStream::from_std(stream)?), line: Vec::new() })
    }

    fn open_with_fds(dir: &TaskDir, request: &Request, fds: &[OwnedFd]) -> io::Result<Self> {
        let stream = Self::connect(dir)?;
        let line = encode(request)?;
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let fd = stream.as_raw_fd();
        let sent =
            sendmsg::<()>(fd, &[IoSlice::new(&line)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        // A stream socket may take less than all at once.
        io::Write::write_all(&mut &stream, &line[sent..])?;
        Self::from_std(stream)
    }

    pub(crate) async fn send(&mut self, request: &Request) -> io::Result<()> {
        self.stream.write_all(&encode(request)?).await
    }

    /// The next answer; `None` when the shim closed the connection. Dropping the future loses
    /// nothing.
    pub(crate) async fn receive(&mut self) -> io::Result<Option<Response>> {
        while !self.line.ends_with(b"\n") {
            if self.stream.read_until(b'\n', &mut self.line).await? == 0 {
                return Ok(None);
            }
        }
        let line = std::mem::take(&mut self.line);
        Ok(Some(serde_json::from_slice(&line)?))
    }
}

fn encode(request: &Request) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(request)?;
    if line.len() >= contract::LINE_BYTES_MAX {
        let bound = contract::LINE_BYTES_MAX;
        return Err(io::Error::other(format!("arguments and environment exceed {bound} bytes")));
    }
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_environment_wins_but_keeps_meshctl_on_the_path() {
        let context = TaskContext {
            hostname: "h".into(),
            env: vec!["MESH_TASK=web.1".into(), "A=1".into()],
            path_dir: Some("/opt/mesh".into()),
            ..TaskContext::default()
        };
        let user = ["A=2".to_owned(), "PATH=/my/bin".to_owned(), "BARE".to_owned()];
        let env = environment(&user, &context);
        assert!(env.contains(&"A=2".to_owned()) && !env.contains(&"A=1".to_owned()));
        assert!(env.contains(&"PATH=/opt/mesh:/my/bin".to_owned()), "{env:?}");
        assert!(env.contains(&"MESH_TASK=web.1".to_owned()));
        assert_eq!(env.iter().filter(|entry| entry.starts_with("PATH=")).count(), 1);
        assert!(!env.iter().any(|entry| entry.starts_with("BARE")));
    }

    #[test]
    fn hosts_name_the_task() {
        let context = TaskContext {
            hosts: vec![("10.0.0.5".parse().unwrap(), "web".into())],
            ..TaskContext::default()
        };
        assert!(hosts_file(&context).ends_with("10.0.0.5\tweb\n"));
    }
}
