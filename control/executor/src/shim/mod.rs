//! The shim: one small process per task that outlives meshd. It holds the task's network namespace
//! from `prepare` on, is the parent of the task's init, writes its output, and records its end.
//!
//! Single-threaded, no async runtime: one `poll` loop over the socket, its connections, the output
//! pipes and a signalfd. The contract with meshd is [`crate::contract`].

mod child;
mod conn;
mod log;
mod sys;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{Pid, pipe2, setsid},
};

use self::{
    child::{Program, Stdio},
    conn::{Conn, Input},
    log::{LogFile, Splitter},
};
use crate::{
    cgroup::Cgroup,
    contract::{Exit, Request, Response, ShimSpec, ShimStatus, TaskDir, VERSION, write_atomic},
};

/// More connections than this at once are turned away: a bound, not a tuning knob.
const CONNECTIONS_MAX: usize = 64;

/// Written to standard output when the shim answers its socket; anything else is why it does not.
pub(crate) const READY: &str = "ready\n";

/// Runs the shim of the task directory `dir` to its end. The process must have one thread, and
/// standard output must be the pipe on which `prepare` waits.
///
/// # Errors
/// When it could not be set up; the reason has been written to standard output too.
pub fn main(dir: &Path) -> io::Result<()> {
    usual_descriptors();
    let dir = TaskDir::new(dir);
    match Shim::set_up(dir) {
        Ok(mut shim) => {
            io::stdout().write_all(READY.as_bytes())?;
            io::stdout().flush()?;
            // `prepare` reads to the end of the pipe.
            let log = OpenOptions::new().append(true).create(true).open(shim.dir.shim_log())?;
            sys::install_fd(log.as_raw_fd(), 1)?;
            shim.run();
            Ok(())
        }
        Err(error) => {
            let _ = writeln!(io::stdout(), "{error}");
            Err(error)
        }
    }
}

/// Programs that use select(2) break with descriptors beyond 1023, so the usual soft limit is that:
/// a daemon that has more does not hand it on.
fn usual_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft.min(1024), hard);
    }
}

enum Phase {
    Created,
    Running(Pid),
    Ended(Exit),
    /// Told to go without a record.
    Quit,
}

/// One output pipe of the task.
struct Output {
    stream: &'static str,
    pipe: File,
    splitter: Splitter,
}

struct Shim {
    dir: TaskDir,
    spec: ShimSpec,
    cgroup: Cgroup,
    phase: Phase,
    listener: UnixListener,
    signals: SignalFd,
    conns: Vec<Conn>,
    outputs: Vec<Output>,
    log: LogFile,
    kill_at: Option<Instant>,
}

fn what<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> io::Result<T> {
    result.map_err(|error| io::Error::other(format!("task shim: {what}: {error}")))
}

impl Shim {
    fn set_up(dir: TaskDir) -> io::Result<Self> {
        sys::set_name(c"mesh-shim");
        what("close inherited files", sys::close_from(3, false))?;
        // A session of its own: no terminal's Ctrl-C reaches it. It fails for a group leader, whose
        // group is its own anyway.
        let _ = setsid();
        let version = what("read version", fs::read_to_string(dir.version()))?;
        if version.trim() != VERSION.to_string() {
            return Err(io::Error::other(format!(
                "task shim: {} has version {}, this shim knows {VERSION}",
                dir.path().display(),
                version.trim()
            )));
        }
        let spec: ShimSpec = what("read spec.json", TaskDir::read_json(&dir.spec()))?
            .ok_or_else(|| io::Error::other("task shim: there is no spec.json"))?;
        let cgroup = Cgroup::new(&spec.cgroup);
        what("make the task's cgroup", cgroup.create())?;
        let procs = cgroup.shim().join("cgroup.procs");
        what("join the task's cgroup", fs::write(procs, "0"))?;
        what("make a network namespace", unshare(CloneFlags::CLONE_NEWNET))?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        what("block SIGCHLD", mask.thread_block())?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = what("make a signalfd", SignalFd::with_flags(&mask, flags))?;
        let log = LogFile::open(dir.log(), dir.log_old(), spec.log_bytes_max);
        let log = what("open the log", log)?;
        let (_held, socket) = what("open the directory", dir.socket())?;
        let listener = what("bind the socket", UnixListener::bind(socket))?;
        what("set up the socket", listener.set_nonblocking(true))?;
        let pid = std::process::id().to_string();
        what("write shim.pid", write_atomic(&dir.shim_pid(), pid.as_bytes()))?;
        Ok(Self {
            dir,
            spec,
            cgroup,
            phase: Phase::Created,
            listener,
            signals,
            conns: Vec::new(),
            outputs: Vec::new(),
            log,
            kill_at: None,
        })
    }

    /// Serves until the task has ended, then leaves the record and nothing else.
    fn run(&mut self) {
        while matches!(self.phase, Phase::Created | Phase::Running(_)) {
            self.turn();
        }
        if let Err(error) = Cgroup::kill(&self.cgroup.task()) {
            eprintln!("task shim: kill {}: {error}", self.spec.cgroup.display());
        }
        self.drain_outputs();
        // What an `exec` started dies with the task.
        for conn in self.conns.iter_mut().filter(|conn| conn.exec.is_some()) {
            conn.answer(&Response::Exited { code: 128 + libc::SIGKILL });
        }
        if let Phase::Ended(exit) = &self.phase {
            let record = serde_json::to_vec(exit).unwrap_or_default();
            if let Err(error) = write_atomic(&self.dir.exit(), &record) {
                eprintln!("task shim: write exit.json: {error}");
            }
            let response = Response::Status(ShimStatus::Exited { exit: exit.clone() });
            for conn in self.conns.iter_mut().filter(|conn| conn.waits) {
                conn.answer(&response);
            }
        }
    }

    /// One round of the loop: wait, then serve whoever is ready.
    fn turn(&mut self) {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.outputs.iter().map(|o| PollFd::new(o.pipe.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.conns.iter().map(|c| PollFd::new(c.as_fd(), PollFlags::POLLIN)));
        let timeout = self.kill_at.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now());
            // Rounded up: a poll that returns just before the deadline would spin.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        if poll(&mut fds, timeout).is_err() {
            return;
        }
        let ready: Vec<bool> =
            fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        drop(fds);
        let outputs = self.outputs.len();
        let (of_outputs, of_conns) = ready[2..].split_at(outputs);
        self.read_outputs(of_outputs);
        self.serve_conns(of_conns);
        if ready[1] {
            self.accept();
        }
        if ready[0] {
            self.reap();
        }
        if self.kill_at.is_some_and(|at| at <= Instant::now()) {
            self.kill_at = None;
            self.kill_task();
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.conns.len() < CONNECTIONS_MAX
                && let Ok(conn) = Conn::new(stream)
            {
                self.conns.push(conn);
            }
        }
    }

    fn serve_conns(&mut self, ready: &[bool]) {
        let mut conns = std::mem::take(&mut self.conns);
        let mut flags = ready.iter().copied().chain(std::iter::repeat(false));
        conns.retain_mut(|conn| {
            if !flags.next().unwrap_or(false) {
                return true;
            }
            loop {
                match conn.next() {
                    Input::Nothing => return true,
                    Input::Request(request, fds) => self.handle(conn, request, fds),
                    Input::Closed => {
                        // Nobody holds its streams or waits for its status any more.
                        if let Some(helper) = conn.exec {
                            let _ = sys::send_signal(helper, libc::SIGKILL);
                        }
                        return false;
                    }
                }
            }
        });
        self.conns.extend(conns);
    }

    fn handle(&mut self, conn: &mut Conn, request: Request, fds: Vec<OwnedFd>) {
        let response = match request {
            Request::Start => self.start().map(|()| self.status()),
            Request::Status => Ok(self.status()),
            Request::Wait => {
                conn.waits = true;
                return;
            }
            Request::Stop { signal, grace_ms } => {
                let at = Instant::now() + Duration::from_millis(grace_ms);
                // Asked again it may get shorter, never longer.
                self.kill_at = Some(self.kill_at.map_or(at, |old| old.min(at)));
                self.signal_task(signal).map(|()| self.status())
            }
            Request::Kill => {
                self.kill_task();
                Ok(self.status())
            }
            Request::Signal { signal } => match conn.exec {
                Some(helper) => {
                    let sent = sys::send_signal(helper, signal);
                    // Only `exec` answers on its connection.
                    return sent.unwrap_or_default();
                }
                None => self.signal_task(signal).map(|()| self.status()),
            },
            Request::Exec { argv, env, dir } => match self.exec(&argv, env, dir.as_deref(), fds) {
                Ok(helper) => {
                    conn.exec = Some(helper);
                    return;
                }
                Err(message) => Err(message),
            },
            Request::Quit => {
                self.phase = Phase::Quit;
                return;
            }
        };
        conn.answer(&response.unwrap_or_else(|message| Response::Error { message }));
    }

    fn status(&self) -> Response {
        Response::Status(match &self.phase {
            Phase::Created | Phase::Quit => ShimStatus::Created,
            Phase::Running(pid) => ShimStatus::Running { pid: pid.as_raw().cast_unsigned() },
            Phase::Ended(exit) => ShimStatus::Exited { exit: exit.clone() },
        })
    }

    /// Starts the task; a start that is asked for again changes nothing.
    fn start(&mut self) -> Result<(), String> {
        if !matches!(self.phase, Phase::Created) {
            return Ok(());
        }
        let null = || File::open("/dev/null").map(OwnedFd::from);
        let plain = |error: io::Error| format!("cannot make the task's streams: {error}");
        let (out_reader, stdout) = pipe2(OFlag::O_CLOEXEC).map_err(|e| plain(e.into()))?;
        let (err_reader, stderr) = pipe2(OFlag::O_CLOEXEC).map_err(|e| plain(e.into()))?;
        let stdin = null().map_err(plain)?;
        for (stream, reader) in [("stdout", out_reader), ("stderr", err_reader)] {
            nonblocking(&reader).map_err(plain)?;
            let (pipe, splitter) = (File::from(reader), Splitter::default());
            self.outputs.push(Output { stream, pipe, splitter });
        }
        let program = Program {
            argv: &self.spec.argv,
            env: &self.spec.env,
            dir: self.spec.dir.as_deref(),
            stdio: Stdio { stdin, stdout, stderr },
        };
        match child::start_task(&self.dir, &self.spec, &program) {
            Ok(pid) => {
                self.phase = Phase::Running(pid);
                write_atomic(&self.dir.pid(), pid.to_string().as_bytes())
                    .map_err(|error| format!("cannot write the pid file: {error}"))
            }
            Err(message) => {
                self.phase = Phase::Ended(self.ended(127, Some(message.clone())));
                Err(message)
            }
        }
    }

    fn exec(
        &self,
        argv: &[String],
        more_env: Vec<String>,
        dir: Option<&Path>,
        fds: Vec<OwnedFd>,
    ) -> Result<Pid, String> {
        let Phase::Running(init) = self.phase else {
            return Err("the task is not running".to_owned());
        };
        let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(fds)
            .map_err(|fds| format!("exec needs 3 descriptors, got {}", fds.len()))?;
        let mut env = self.spec.env.clone();
        for entry in more_env {
            let key = entry.split_inclusive('=').next().unwrap_or_default();
            env.retain(|old| !old.starts_with(key));
            env.push(entry);
        }
        let dir = dir.or(self.spec.dir.as_deref());
        let stdio = Stdio { stdin, stdout, stderr };
        child::start_exec(init, &self.spec, &Program { argv, env: &env, dir, stdio })
    }

    fn signal_task(&self, signal: i32) -> Result<(), String> {
        match self.phase {
            Phase::Running(pid) => sys::send_signal(pid, signal)
                .map_err(|error| format!("cannot send signal {signal}: {error}")),
            _ => Ok(()),
        }
    }

    /// SIGKILL to all of the task: the init, whose end takes its namespace along, and the cgroup,
    /// where processes of an `exec` may be.
    fn kill_task(&self) {
        if let Err(error) = Cgroup::kill(&self.cgroup.task()) {
            eprintln!("task shim: kill {}: {error}", self.spec.cgroup.display());
        }
        let _ = self.signal_task(libc::SIGKILL);
    }

    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        while let Some((pid, code)) = sys::reap() {
            match self.phase {
                Phase::Running(init) if init == pid => {
                    self.phase = Phase::Ended(self.ended(code, None));
                }
                _ => {
                    let conn = self.conns.iter_mut().find(|conn| conn.exec == Some(pid));
                    if let Some(conn) = conn {
                        conn.exec = None;
                        conn.answer(&Response::Exited { code });
                    }
                }
            }
        }
    }

    fn ended(&self, code: i32, error: Option<String>) -> Exit {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        Exit { code, oom: self.cgroup.oom_killed(&self.spec.twins), error, at_ms }
    }

    fn read_outputs(&mut self, ready: &[bool]) {
        let mut flags = ready.iter();
        let log = &mut self.log;
        self.outputs.retain_mut(|output| {
            !flags.next().is_some_and(|ready| *ready) || output.copy_once(log) != Copied::End
        });
    }

    /// Takes what is left in the pipes; their writers are dead by now.
    fn drain_outputs(&mut self) {
        for mut output in self.outputs.drain(..) {
            while output.copy_once(&mut self.log) == Copied::Some {}
            let Output { stream, splitter, .. } = &mut output;
            splitter.finish(|entry| self.log.write(stream, entry));
        }
    }
}

#[derive(PartialEq, Eq)]
enum Copied {
    Some,
    Nothing,
    End,
}

impl Output {
    fn copy_once(&mut self, log: &mut LogFile) -> Copied {
        let mut buffer = [0; 64 * 1024];
        match self.pipe.read(&mut buffer) {
            Ok(0) => {
                self.splitter.finish(|entry| log.write(self.stream, entry));
                Copied::End
            }
            Ok(length) => {
                let bytes = &buffer[..length];
                self.splitter.push(bytes, |entry| log.write(self.stream, entry));
                Copied::Some
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Copied::Nothing,
            Err(_) => Copied::End,
        }
    }
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}
