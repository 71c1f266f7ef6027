//! The process `meshd dns`: one thread, all tasks of the node.
//!
//! It ends when it is told to, never because meshd did. A snapshot says which tasks there are;
//! their sockets are opened, and tried again until they are open, and closed when the task is gone.
//! Sockets that an earlier resolver served come from meshd, with what tasks asked meanwhile.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{self, Write as _},
    net::SocketAddr,
    os::fd::OwnedFd,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use mesh_types::TaskId;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use tokio::{
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

use crate::{
    control::{Request, Status},
    handover::{self, PER_FRAME, Sockets, SocketsOf},
    index::Index,
    memory,
    netns::{self, TaskSockets},
    serve::{self, Loops, Open, Serving, Shared},
    snapshot::Snapshot,
};

/// How soon sockets that could not be opened are tried again.
pub(crate) const RETRY: Duration = Duration::from_millis(100);
/// How often meshd is told what was counted.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// Snapshots are saved no more often than this.
const SAVE_EVERY: Duration = Duration::from_millis(500);

/// Where the resolver meets meshd.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// The unix socket that it listens on.
    pub control_socket: PathBuf,
    /// Where it keeps the last snapshot.
    pub state_file: PathBuf,
}

/// Runs the resolver until it is told to end, by [`Request::Shutdown`] or SIGTERM.
///
/// # Errors
/// If it cannot start: another one has the control socket, or a path cannot be written.
pub fn run(config: &RunConfig) -> io::Result<()> {
    // A session of its own: what ends meshd's must not end this. Fails when it has one already.
    let _ = nix::unistd::setsid();
    // Two sockets per task and one per forwarded query.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(config))
}

/// The body of [`run`], inside a runtime.
///
/// # Errors
/// As [`run`].
pub async fn serve(config: &RunConfig) -> io::Result<()> {
    let path = &config.control_socket;
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let _lock = lock(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(named)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(named)?;

    let mut resolver = Resolver::new(config.state_file.clone())?;
    if let Some(snapshot) = load(&config.state_file) {
        resolver.apply(Arc::new(snapshot)).await;
    }
    let ended = resolver.run(&listener).await;
    let _ = fs::remove_file(path);
    ended
}

/// Holds the lock that makes this the only resolver at its socket.
fn lock(control_socket: &Path) -> io::Result<Flock<fs::File>> {
    let path = control_socket.with_extension("lock");
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(named)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        named(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another resolver runs here ({errno}): end it first"),
        ))
    })
}

fn load(path: &Path) -> Option<Snapshot> {
    let bytes = fs::read(path).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| {
            let path = path.display();
            tracing::warn!(%path, %error, "last snapshot is unreadable; waiting for meshd's");
        })
        .ok()
}

/// Writes a file so that a reader finds the old or the new one, whole.
fn save(path: &Path, snapshot: &Snapshot) -> io::Result<()> {
    let new = path.with_extension("new");
    let file =
        fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
    let mut file = io::BufWriter::new(file);
    serde_json::to_writer(&mut file, snapshot)?;
    file.flush()?;
    fs::rename(&new, path)
}

struct Resolver {
    shared: Arc<Shared>,
    tasks: HashMap<TaskId, Listening>,
    /// What meshd kept over the death of an earlier resolver, until a snapshot says what for.
    handed: HashMap<TaskId, Sockets>,
    told: watch::Sender<Told>,
    opened: mpsc::UnboundedSender<Opened>,
    openings: mpsc::UnboundedReceiver<Opened>,
    state_file: PathBuf,
    unsaved: Option<(Instant, Arc<Snapshot>)>,
    saving: JoinSet<()>,
}

/// What meshd is told.
#[derive(Clone, Default)]
struct Told {
    status: Status,
    sockets: BTreeMap<TaskId, Arc<Open>>,
}

struct Opened {
    task: TaskId,
    netns: PathBuf,
    result: io::Result<TaskSockets>,
}

/// One task's sockets.
struct Listening {
    netns: PathBuf,
    state: Opening,
}

enum Opening {
    UnderWay,
    Open { open: Arc<Open>, _loops: Loops },
    Failed { error: String, retry: Instant },
}

impl From<(Arc<Open>, Loops)> for Opening {
    fn from((open, loops): (Arc<Open>, Loops)) -> Self {
        Self::Open { open, _loops: loops }
    }
}

/// A request, and what came with it.
enum Asked {
    Plain(Request),
    Sockets(Vec<(TaskId, Sockets)>),
    Journal(OwnedFd),
}

enum Step {
    Connected(io::Result<UnixStream>),
    Asked(Asked),
    Opened(Opened),
    Retry,
    Save,
    Count,
    End,
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

impl Resolver {
    fn new(state_file: PathBuf) -> io::Result<Self> {
        let (opened, openings) = mpsc::unbounded_channel();
        Ok(Self {
            shared: Arc::new(Shared::new()?),
            tasks: HashMap::new(),
            handed: HashMap::new(),
            told: watch::Sender::new(Told {
                status: Status {
                    pid: std::process::id(),
                    takes_sockets: true,
                    takes_journal: true,
                    ..Status::default()
                },
                sockets: BTreeMap::new(),
            }),
            opened,
            openings,
            state_file,
            unsaved: None,
            saving: JoinSet::new(),
        })
    }

    async fn run(&mut self, listener: &UnixListener) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let (ask, mut asked) = mpsc::channel(1);
        let mut connections = JoinSet::new();
        let mut count = interval(COUNT_EVERY);
        count.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let retry = self.next_retry();
            let save = self.unsaved.as_ref().filter(|_| self.saving.is_empty());
            let save = save.map(|(when, _)| *when);
            let step = tokio::select! {
                accepted = listener.accept() => Step::Connected(accepted.map(|(stream, _)| stream)),
                Some(request) = asked.recv() => Step::Asked(request),
                Some(opened) = self.openings.recv() => Step::Opened(opened),
                () = at(retry) => Step::Retry,
                () = at(save) => Step::Save,
                Some(_) = self.saving.join_next() => continue,
                _ = count.tick() => Step::Count,
                _ = terminate.recv() => Step::End,
            };
            while connections.try_join_next().is_some() {}
            match step {
                Step::Connected(Ok(stream)) => {
                    connections.spawn(converse(stream, ask.clone(), self.told.subscribe()));
                }
                Step::Connected(Err(error)) => {
                    tracing::warn!(%error, "control socket: accept failed");
                    sleep(RETRY).await;
                }
                Step::Asked(Asked::Sockets(sockets)) => self.adopt(sockets),
                Step::Asked(Asked::Plain(Request::Snapshot(snapshot))) => {
                    let snapshot = Arc::new(*snapshot);
                    self.apply(Arc::clone(&snapshot)).await;
                    // What no task of meshd's is served by now is nobody's.
                    self.handed.clear();
                    self.shared.settle_journal(|task| self.tasks.contains_key(&task));
                    let when = Instant::now() + SAVE_EVERY;
                    let when = self.unsaved.take().map_or(when, |(when, _)| when);
                    self.unsaved = Some((when, snapshot));
                }
                Step::Asked(Asked::Journal(journal)) => {
                    if let Err(error) = self.shared.take_journal(journal) {
                        tracing::warn!(%error, "no journal: a death of this process loses queries");
                    }
                }
                // They came without descriptors, and so say nothing.
                Step::Asked(Asked::Plain(Request::Sockets(_) | Request::Journal)) => {}
                Step::Asked(Asked::Plain(Request::Shutdown)) => {
                    while self.saving.join_next().await.is_some() {}
                    let _ = fs::remove_file(&self.state_file);
                    return Ok(());
                }
                Step::Opened(opened) => self.handle_opened(opened),
                Step::Retry => self.retry(),
                Step::Save => self.save(),
                Step::Count => self.report(),
                Step::End => {
                    while self.saving.join_next().await.is_some() {}
                    self.save();
                    while self.saving.join_next().await.is_some() {}
                    return Ok(());
                }
            }
        }
    }

    /// Serves a snapshot from now on.
    async fn apply(&mut self, snapshot: Arc<Snapshot>) {
        // A large one takes its time, in which queries are answered from the one before.
        let built = Arc::clone(&snapshot);
        let Ok(index) = spawn_blocking(move || Index::new(&built)).await else { return };
        // A resolver that asks itself never answers.
        let not_itself = |server: &&SocketAddr| server.ip() != netns::RESOLVER_ADDRESS;
        let upstreams = snapshot.upstreams.iter().filter(not_itself).copied().collect();
        let own_servers = snapshot.tasks.iter().filter(|view| !view.servers.is_empty());
        let own_servers = own_servers.map(|view| {
            let servers: Vec<_> = view.servers.iter().map(|ip| (*ip, 53).into()).collect();
            let servers = servers.iter().filter(not_itself).copied().collect();
            (view.task, (view.netns.clone(), servers))
        });
        let own_servers = own_servers.collect();
        let rate_limit = snapshot.policy.rate_limit;
        self.shared.serve(Serving { index, upstreams, own_servers, rate_limit });

        let wanted: HashMap<TaskId, PathBuf> =
            snapshot.tasks.iter().map(|view| (view.task, view.netns.clone())).collect();
        self.tasks.retain(|task, listening| wanted.get(task) == Some(&listening.netns));
        for (task, netns) in wanted {
            if !self.tasks.contains_key(&task) {
                self.open(task, netns);
            }
        }
        self.report();
    }

    /// Goes on with sockets that an earlier resolver had.
    fn adopt(&mut self, sockets: Vec<(TaskId, Sockets)>) {
        self.handed.extend(sockets);
        let waiting = |listening: &Listening| !matches!(listening.state, Opening::Open { .. });
        let waiting: Vec<_> = self
            .tasks
            .iter()
            .filter(|(task, listening)| self.handed.contains_key(task) && waiting(listening))
            .map(|(task, listening)| (*task, listening.netns.clone()))
            .collect();
        for (task, netns) in waiting {
            self.open(task, netns);
        }
        self.report();
    }

    fn open(&mut self, task: TaskId, netns: PathBuf) {
        let handed = self.handed.remove(&task).filter(|handed| handed.netns == netns);
        if let Some(Sockets { udp, tcp, .. }) = handed {
            let sockets = TaskSockets { udp: udp.into(), tcp: tcp.into() };
            match serve::start(&self.shared, task, &netns, sockets) {
                Ok(started) => {
                    let state = started.into();
                    self.tasks.insert(task, Listening { netns, state });
                    return;
                }
                Err(error) => tracing::warn!(%task, %error, "the sockets handed over are useless"),
            }
        }
        self.tasks.insert(task, Listening { netns: netns.clone(), state: Opening::UnderWay });
        let opened = self.opened.clone();
        tokio::spawn(async move {
            let result = netns::open(netns.clone()).await;
            let _ = opened.send(Opened { task, netns, result });
        });
    }

    fn handle_opened(&mut self, opened: Opened) {
        let Opened { task, netns, result } = opened;
        // Gone meanwhile, or there again in another namespace: these sockets close.
        // So they do if it was given others meanwhile.
        let waits = |known: &Listening| matches!(known.state, Opening::UnderWay);
        let listening =
            self.tasks.get_mut(&task).filter(|known| known.netns == netns && waits(known));
        let Some(listening) = listening else { return };
        let started = result.and_then(|sockets| serve::start(&self.shared, task, &netns, sockets));
        listening.state = match started {
            Ok(started) => started.into(),
            Err(error) => {
                tracing::debug!(%task, %error, "resolver sockets not open yet");
                Opening::Failed { error: error.to_string(), retry: Instant::now() + RETRY }
            }
        };
        self.report();
    }

    fn next_retry(&self) -> Option<Instant> {
        self.tasks
            .values()
            .filter_map(|listening| match listening.state {
                Opening::Failed { retry, .. } => Some(retry),
                Opening::UnderWay | Opening::Open { .. } => None,
            })
            .min()
    }

    fn retry(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self
            .tasks
            .iter()
            .filter(|(_, l)| matches!(l.state, Opening::Failed { retry, .. } if retry <= now))
            .map(|(task, listening)| (*task, listening.netns.clone()))
            .collect();
        for (task, netns) in due {
            self.open(task, netns);
        }
    }

    /// Begins to save the last snapshot, beside everything else: a slow disk delays no answer.
    fn save(&mut self) {
        let Some((_, snapshot)) = self.unsaved.take() else { return };
        let path = self.state_file.clone();
        self.saving.spawn_blocking(move || {
            if let Err(error) = save(&path, &snapshot) {
                let path = path.display();
                tracing::warn!(
                    %path, %error, "cannot save the snapshot: a restart would serve an old one"
                );
            }
            drop(snapshot);
            // Snapshots come and go whole, so that most of the heap is free again now.
            memory::trim();
        });
    }

    /// Tells meshd how it stands, if that changed.
    fn report(&self) {
        let revision = self.shared.serving().index.revision();
        let before = self.told.borrow().status.tasks.clone();
        let state = |task: &TaskId, listening: &Listening| match &listening.state {
            Opening::Open { .. } => None,
            Opening::Failed { error, .. } => Some(error.clone()),
            // While it is tried again, the last error says more than "opening".
            Opening::UnderWay => {
                Some(before.get(task).cloned().flatten().unwrap_or_else(|| "opening".to_owned()))
            }
        };
        let tasks = self.tasks.iter().map(|(task, l)| (*task, state(task, l))).collect();
        let sockets: BTreeMap<_, _> = self
            .tasks
            .iter()
            .filter_map(|(task, listening)| match &listening.state {
                Opening::Open { open, .. } => Some((*task, Arc::clone(open))),
                Opening::UnderWay | Opening::Failed { .. } => None,
            })
            .collect();
        let (counts, limited) = self.shared.counts();
        self.told.send_if_modified(|told| {
            let status = &mut told.status;
            let changed = status.revision != revision
                || status.tasks != tasks
                || (status.counts, &status.limited) != (counts, &limited);
            status.counts = counts;
            status.limited = limited;
            status.revision = revision;
            status.tasks = tasks;
            told.sockets = sockets;
            changed
        });
    }
}

/// Speaks with one meshd until it goes.
async fn converse(stream: UnixStream, ask: mpsc::Sender<Asked>, mut told: watch::Receiver<Told>) {
    let (mut reader, mut writer) = stream.into_split();
    let listen = async {
        loop {
            let asked = match handover::receive(&mut reader).await {
                Ok(Some((Request::Sockets(of), fds))) => Sockets::pair(of, fds).map(Asked::Sockets),
                Ok(Some((Request::Journal, fds))) => Ok(fds
                    .into_iter()
                    .next()
                    .map_or(Asked::Plain(Request::Journal), Asked::Journal)),
                Ok(Some((request, _))) => Ok(Asked::Plain(request)),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            match asked {
                Ok(asked) => {
                    if ask.send(asked).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "control socket: bad request; connection closed");
                    return;
                }
            }
        }
    };
    let tell = async {
        // What this meshd has by now. Weak: a task's sockets close when it goes.
        let mut sent: BTreeMap<TaskId, Weak<Open>> = BTreeMap::new();
        loop {
            let Told { status, sockets } = told.borrow_and_update().clone();
            sent.retain(|task, _| sockets.contains_key(task));
            let is_new = |(task, open): &(TaskId, Arc<Open>)| {
                sent.get(task).is_none_or(|sent| sent.as_ptr() != Arc::as_ptr(open))
            };
            let new: Vec<_> = sockets.into_iter().filter(is_new).collect();
            sent.extend(new.iter().map(|(task, open)| (*task, Arc::downgrade(open))));
            if tell(&mut writer, status, new).await.is_err() || told.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = listen => {}
        () = tell => {}
    }
}

/// Sends a status, and with it these tasks' sockets: in several frames if they are many.
async fn tell(
    writer: &mut OwnedWriteHalf,
    mut status: Status,
    sockets: Vec<(TaskId, Arc<Open>)>,
) -> io::Result<()> {
    let mut rest = &sockets[..];
    loop {
        let (now, later) = rest.split_at(rest.len().min(PER_FRAME));
        status.sockets = now
            .iter()
            .map(|(task, open)| SocketsOf { task: *task, netns: open.netns.clone() })
            .collect();
        let fds: Vec<_> = now.iter().flat_map(|(_, open)| open.fds()).collect();
        handover::send(writer, &status, &fds).await?;
        if later.is_empty() {
            return Ok(());
        }
        rest = later;
    }
}
