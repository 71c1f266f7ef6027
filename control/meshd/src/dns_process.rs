//! The resolver's process, seen from meshd: started if it is not there, found again if it is, told
//! every snapshot, started again if it dies. It outlives meshd on purpose.
//!
//! Duplicates of the sockets that it serves are kept here: while it is dead they stay bound, so
//! that what tasks ask waits for its successor, which is handed them. A meshd that starts gets them
//! from the resolver that it finds. So is the journal of what a resolver was about to answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::Args;
use mesh_dns::{
    control::{Counts, Request, Status, write_frame},
    handover::{self, PER_FRAME, Sockets, SocketsOf},
    server::RunConfig,
    snapshot::Snapshot,
};
use mesh_types::TaskId;
use thiserror::Error;
use tokio::{
    net::{UnixStream, unix::OwnedWriteHalf},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::metrics::list;

/// How soon a resolver that died is followed by another; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// A resolver that dies at once is started again no more often than this.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A connection that lasted this long was a good one: the next pause is short again.
const GOOD_CONNECTION: Duration = Duration::from_millis(500);
/// How often one that was started is looked for, until it has been missed for long.
const LOOK_MAX: Duration = Duration::from_millis(100);

/// What `meshd dns` is told on its command line.
#[derive(Debug, Clone, Args)]
pub struct DnsArgs {
    /// The unix socket on which meshd finds the resolver.
    #[arg(long, value_name = "PATH")]
    pub control_socket: PathBuf,
    /// Where the resolver keeps the last snapshot.
    #[arg(long, value_name = "PATH")]
    pub state_file: PathBuf,
}

impl DnsArgs {
    /// The body of `meshd dns`. Not to be called inside a runtime: it makes a small one of its own.
    ///
    /// # Errors
    /// As [`mesh_dns::server::run`].
    pub fn run(self) -> io::Result<()> {
        mesh_dns::server::run(&RunConfig {
            control_socket: self.control_socket,
            state_file: self.state_file,
        })
    }
}

/// Why a task has no resolver yet.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NotReady {
    /// The process did not answer.
    #[error("the resolver process is not running yet (its log: {log})")]
    NoProcess {
        /// Where it writes why.
        log: String,
    },
    /// It could not open the task's sockets.
    #[error("the resolver of task {task} is not ready: {reason}")]
    Sockets {
        /// Whose.
        task: TaskId,
        /// The last failure.
        reason: String,
    },
}

/// The resolver's process. Dropping this leaves it alone: it goes on serving.
#[derive(Debug)]
pub struct Resolver {
    paths: Paths,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    stop: watch::Sender<bool>,
    status: watch::Receiver<Option<Status>>,
    supervisor: JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct Paths {
    exe: PathBuf,
    socket: PathBuf,
    state: PathBuf,
    log: PathBuf,
}

impl Resolver {
    /// Starts to supervise the resolver, inside a tokio runtime. `exe` is meshd itself; the socket,
    /// the last snapshot and the log are in `dir`, which is made if it is missing.
    ///
    /// # Errors
    /// If `dir` cannot be made.
    pub fn start(exe: &Path, dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot make {}: {error}", dir.display()))
        })?;
        let paths = Paths {
            exe: exe.to_owned(),
            socket: dir.join("control.sock"),
            state: dir.join("last.json"),
            log: dir.join("log"),
        };
        let (snapshots, pushed) = watch::channel(None);
        let (publish, status) = watch::channel(None);
        let (stop, stopping) = watch::channel(false);
        let journal = handover::journal()
            .inspect_err(|error| tracing::warn!(%error, "no journal for the resolver"))
            .ok();
        let supervisor = Supervisor {
            paths: paths.clone(),
            pushed,
            publish,
            stopping,
            child: None,
            kept: Mutex::default(),
            journal,
        };
        let supervisor = tokio::spawn(supervisor.run());
        Ok(Self { paths, snapshots, stop, status, supervisor })
    }

    /// Serves this snapshot from now on. The latest counts: one that was not sent yet is skipped.
    pub fn push(&self, snapshot: Snapshot) {
        self.snapshots.send_replace(Some(Arc::new(snapshot)));
    }

    /// How the resolver does; `None` while it is not connected.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Option<Status>> {
        self.status.clone()
    }

    /// What became of the tasks' queries since the process began: names, numbers, and whether these
    /// were dropped. Zeros while it is not connected.
    #[must_use]
    pub fn counters(&self) -> [(&'static str, u64, bool); 6] {
        let Counts { queries, fast, forwarded, cached, crowded, limited } =
            self.status.borrow().as_ref().map_or_else(Counts::default, |status| status.counts);
        [
            ("dns_queries", queries, false),
            ("dns_answered_fast", fast, false),
            ("dns_forwarded", forwarded, false),
            ("dns_answered_from_cache", cached, false),
            ("dns_too_many_forwarded", crowded, true),
            ("dns_rate_limited", limited, true),
        ]
    }

    /// Waits until the task's sockets are open. The task must be in a snapshot that was pushed.
    ///
    /// # Errors
    /// [`NotReady`] with the last reason, when `within` is over.
    pub async fn wait_ready(&self, task: TaskId, within: Duration) -> Result<(), NotReady> {
        let mut status = self.status.clone();
        let ready = |status: &Option<Status>| {
            status.as_ref().is_some_and(|s| matches!(s.tasks.get(&task), Some(None)))
        };
        if let Ok(Ok(_)) = timeout(within, status.wait_for(ready)).await {
            return Ok(());
        }
        Err(match &*self.status.borrow() {
            None => NotReady::NoProcess { log: self.paths.log.display().to_string() },
            Some(status) => NotReady::Sockets {
                task,
                reason: match status.tasks.get(&task) {
                    Some(Some(reason)) => reason.clone(),
                    Some(None) | None => "it does not know the task yet".to_owned(),
                },
            },
        })
    }

    /// Ends the resolver for good, as when the node leaves its cluster. Tasks that still run have
    /// no resolver afterwards.
    pub async fn shutdown(&self) {
        self.stop.send_replace(true);
        // The supervisor holds the other end until it is done.
        let mut status = self.status.clone();
        while status.changed().await.is_ok() {}
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

struct Supervisor {
    paths: Paths,
    pushed: watch::Receiver<Option<Arc<Snapshot>>>,
    publish: watch::Sender<Option<Status>>,
    stopping: watch::Receiver<bool>,
    child: Option<Child>,
    kept: Mutex<Kept>,
    /// `None` if there is no memory for it: then what a resolver took off a queue dies with it.
    journal: Option<OwnedFd>,
}

/// Sockets of the resolver's.
#[derive(Debug, Default)]
struct Kept(BTreeMap<TaskId, Arc<Sockets>>);

impl Kept {
    /// Lets go of the sockets of tasks that are gone. Without a snapshot all may still be there: a
    /// meshd that has just started knows nothing.
    fn retain(&mut self, snapshot: Option<&Snapshot>) {
        let Some(snapshot) = snapshot else { return };
        let there: BTreeMap<_, _> =
            snapshot.tasks.iter().map(|view| (view.task, &view.netns)).collect();
        self.0
            .retain(|task, sockets| there.get(task).is_some_and(|netns| **netns == sockets.netns));
    }
}

/// How a conversation ended.
enum Ended {
    Lost(io::Error),
    Stopped,
}

impl Supervisor {
    async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        // A dead resolver's successor is started after the pause that its own life was worth.
        let mut spawn_at = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(&self.paths.socket).await {
                let since = Instant::now();
                let ended = self.converse(stream).await;
                self.publish.send_replace(None);
                match ended {
                    Ended::Stopped => return self.reap().await,
                    Ended::Lost(error) => {
                        list::DNS_LOST.count(&[]);
                        tracing::warn!(%error, "lost the resolver process");
                    }
                }
                if since.elapsed() >= GOOD_CONNECTION {
                    (pause, spawn_at) = (PAUSE_MIN, Instant::now());
                    continue;
                }
            } else if *self.stopping.borrow() && self.child.is_none() {
                return;
            } else if Instant::now() >= spawn_at && !self.is_child_running() {
                spawn_at = Instant::now() + pause;
                pause = (pause * 2).min(PAUSE_MAX);
                match self.spawn() {
                    Ok(child) => self.child = Some(child),
                    Err(error) => tracing::error!(%error, "cannot start the resolver process"),
                }
            }
            sleep((pause / 2).clamp(PAUSE_MIN, LOOK_MAX)).await;
        }
    }

    /// Whether the process that this meshd started still runs; collects its status if not.
    fn is_child_running(&mut self) -> bool {
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(None)) => true,
            Some(Ok(Some(status))) => {
                tracing::warn!(%status, log = %self.paths.log.display(), "the resolver process ended");
                self.child = None;
                false
            }
            Some(Err(_)) | None => {
                self.child = None;
                false
            }
        }
    }

    fn spawn(&self) -> io::Result<Child> {
        let Paths { exe, socket, state, log } = &self.paths;
        let log = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(log)?;
        // It makes itself a session of its own, so that no signal to meshd's group reaches it.
        Command::new(exe)
            .arg("dns")
            .arg("--control-socket")
            .arg(socket)
            .arg("--state-file")
            .arg(state)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| {
                io::Error::new(error.kind(), format!("{} dns: {error}", exe.display()))
            })
    }

    async fn reap(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = timeout(PAUSE_MAX, child.wait()).await;
        }
    }

    async fn converse(&mut self, stream: UnixStream) -> Ended {
        let (mut reader, mut writer) = stream.into_split();
        let (pushed, stopping, kept) = (&mut self.pushed, &mut self.stopping, &self.kept);
        let latest = pushed.clone();
        let journal = &self.journal;
        let (greeted, mut greeting) = watch::channel(None::<(bool, bool)>);
        let tell = async {
            // Before the first snapshot, for which it would open sockets of its own.
            let greeting = greeting.wait_for(Option::is_some).await.ok().and_then(|g| *g);
            let (takes_sockets, takes_journal) = greeting.unwrap_or_default();
            if takes_journal && let Some(journal) = journal {
                let fds = [journal.as_fd()];
                if let Err(error) = handover::send(&mut writer, &Request::Journal, &fds).await {
                    return Ended::Lost(error);
                }
            }
            if takes_sockets && let Err(error) = hand_over(&mut writer, kept).await {
                return Ended::Lost(error);
            }
            loop {
                let snapshot = pushed.borrow_and_update().clone();
                lock(kept).retain(snapshot.as_deref());
                if let Some(snapshot) = snapshot {
                    let request = Request::Snapshot(Box::new(Snapshot::clone(&snapshot)));
                    if let Err(error) = write_frame(&mut writer, &request).await {
                        return Ended::Lost(error);
                    }
                }
                tokio::select! {
                    Ok(()) = pushed.changed() => {}
                    Ok(()) = async { stopping.wait_for(|stop| *stop).await.map(drop) } => break,
                    // The handle is gone, and this task about to be aborted: say nothing more, for
                    // the resolver must outlive this meshd.
                    else => std::future::pending::<()>().await,
                }
            }
            if let Err(error) = write_frame(&mut writer, &Request::Shutdown).await {
                return Ended::Lost(error);
            }
            // It closes the connection when it ends; until then it is still there.
            std::future::pending().await
        };
        let publish = &self.publish;
        let listen = async {
            // Once for each task is enough; the counters have the rest.
            let mut said = BTreeSet::new();
            loop {
                let (mut status, fds) = match handover::receive::<Status>(&mut reader).await {
                    Ok(Some(told)) => told,
                    Ok(None) => return Ended::Lost(io::ErrorKind::UnexpectedEof.into()),
                    Err(error) => return Ended::Lost(error),
                };
                match Sockets::pair(std::mem::take(&mut status.sockets), fds) {
                    Ok(sockets) => {
                        let sockets = sockets.into_iter().map(|(task, s)| (task, Arc::new(s)));
                        let mut kept = lock(kept);
                        kept.0.extend(sockets);
                        // A task may be gone since they were sent.
                        kept.retain(latest.borrow().as_deref());
                    }
                    Err(error) => return Ended::Lost(error),
                }
                greeted.send_replace(Some((status.takes_sockets, status.takes_journal)));
                for (task, dropped) in &status.limited {
                    if said.insert(*task) {
                        tracing::warn!(
                            %task, dropped, "asks for names faster than --dns-rate-limit allows"
                        );
                    }
                }
                publish.send_replace(Some(status));
            }
        };
        let ended = tokio::select! {
            ended = tell => ended,
            ended = listen => ended,
        };
        if *self.stopping.borrow() { Ended::Stopped } else { ended }
    }
}

fn lock(kept: &Mutex<Kept>) -> std::sync::MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives a resolver the sockets that its predecessor left.
async fn hand_over(writer: &mut OwnedWriteHalf, kept: &Mutex<Kept>) -> io::Result<()> {
    let kept: Vec<_> = lock(kept).0.iter().map(|(task, s)| (*task, Arc::clone(s))).collect();
    for some in kept.chunks(PER_FRAME) {
        let of =
            |(task, s): &(TaskId, Arc<Sockets>)| SocketsOf { task: *task, netns: s.netns.clone() };
        let request = Request::Sockets(some.iter().map(of).collect());
        let fds: Vec<_> = some.iter().flat_map(|(_, sockets)| sockets.fds()).collect();
        handover::send(writer, &request, &fds).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, os::unix::fs::PermissionsExt as _, process};

    use mesh_dns::snapshot::{Policy, TaskView};
    use mesh_types::NetworkId;
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);
    const NETNS: &str = "h5-process";

    /// Not a test by itself: the resolver that the test below starts, in this same binary.
    #[test]
    fn child() {
        let (Ok(control_socket), Ok(state_file)) =
            (std::env::var("MESH_TEST_SOCKET"), std::env::var("MESH_TEST_STATE"))
        else {
            return;
        };
        let args = DnsArgs { control_socket: control_socket.into(), state_file: state_file.into() };
        args.run().unwrap();
    }

    /// A program that behaves as `meshd dns --control-socket S --state-file F`.
    fn stand_in(dir: &Path) -> PathBuf {
        let path = dir.join("meshd");
        let exe = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\nMESH_TEST_SOCKET=$3 MESH_TEST_STATE=$5 exec {} --exact \
             dns_process::tests::child --nocapture\n",
            exe.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    struct Cleanup(PathBuf);

    impl Cleanup {
        fn ip(args: &str) -> process::Output {
            process::Command::new("ip").args(args.split_whitespace()).output().unwrap()
        }
    }

    impl Drop for Cleanup {
        fn drop(&mut self) {
            Self::ip(&format!("netns del {NETNS}"));
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn snapshot(task: TaskId) -> Snapshot {
        Snapshot {
            tasks: vec![TaskView {
                task,
                netns: Path::new("/run/netns").join(NETNS),
                networks: vec![NetworkId::from_bits(1)],
                forward: true,
                servers: Vec::new(),
            }],
            upstreams: vec![(Ipv4Addr::LOCALHOST, 53).into()],
            policy: Policy::default(),
            ..Snapshot::default()
        }
    }

    async fn pid(resolver: &Resolver, wanted: impl Fn(u32) -> bool) -> u32 {
        let mut status = resolver.status();
        let found = status.wait_for(|s| s.as_ref().is_some_and(|s| wanted(s.pid)));
        timeout(LIMIT, found).await.unwrap().unwrap().as_ref().unwrap().pid
    }

    #[tokio::test]
    async fn it_is_started_found_again_replaced_and_ended() {
        let dir = std::env::temp_dir().join(format!("h5-process-{}", process::id()));
        let _cleanup = Cleanup(dir.clone());
        fs::create_dir_all(&dir).unwrap();
        Cleanup::ip(&format!("netns del {NETNS}"));
        assert!(Cleanup::ip(&format!("netns add {NETNS}")).status.success(), "needs root");
        Cleanup::ip(&format!("-n {NETNS} link set lo up"));
        let (exe, task) = (stand_in(&dir), TaskId::from_bits(1));

        let resolver = Resolver::start(&exe, &dir.join("dns")).unwrap();
        resolver.push(snapshot(task));
        resolver.wait_ready(task, LIMIT).await.unwrap();
        let first = pid(&resolver, |_| true).await;
        let unknown = resolver.wait_ready(TaskId::from_bits(2), Duration::from_millis(10)).await;
        assert!(unknown.unwrap_err().to_string().contains("does not know the task"));

        // Dead: another takes its place, and serves the same.
        kill(Pid::from_raw(first.cast_signed()), Signal::SIGKILL).unwrap();
        let second = pid(&resolver, |pid| pid != first).await;
        resolver.wait_ready(task, LIMIT).await.unwrap();

        // meshd restarts: the resolver is found again.
        drop(resolver);
        let resolver = Resolver::start(&exe, &dir.join("dns")).unwrap();
        assert_eq!(pid(&resolver, |_| true).await, second);
        resolver.wait_ready(task, LIMIT).await.unwrap();

        resolver.shutdown().await;
        let gone = Instant::now() + LIMIT;
        while dir.join("dns/control.sock").exists() {
            assert!(Instant::now() < gone, "it did not end");
            sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_resolver_that_cannot_start_is_said_to_be_missing() {
        let dir = std::env::temp_dir().join(format!("h5-missing-{}", process::id()));
        let resolver = Resolver::start(Path::new("/nonexistent/meshd"), &dir).unwrap();
        let error =
            resolver.wait_ready(TaskId::from_bits(1), Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, NotReady::NoProcess { .. }), "{error}");
        timeout(LIMIT, resolver.shutdown()).await.unwrap();
        let _ = fs::remove_dir_all(&dir);
    }
}
