//! The loops that serve a task's sockets.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, Guard};
use mesh_types::TaskId;
use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::{AbortHandle, JoinSet, yield_now},
    time::{sleep, timeout},
};

use crate::{
    answer::{Decision, Transport, answer, failure},
    batch::{BATCH, Batch, Fate, QUERY_MAX},
    cache::{Cache, CacheKey},
    control::Counts,
    fast,
    forward::{forward, read_message, write_message},
    index::Index,
    netns::TaskSockets,
    server::RETRY,
    wire::HEADER_LEN,
};

/// Queries under way to the node's resolvers, of all tasks. More are dropped: their askers ask
/// again.
const MAX_FORWARDS: usize = 1024;
/// Queries of one task under way, over UDP.
const MAX_FORWARDS_OF_TASK: usize = 256;
/// TCP connections of one task. One more ends the oldest.
const MAX_CONNECTIONS: usize = 64;
/// How long a TCP connection may be idle (RFC 7766 section 6.2.3: a few seconds).
const IDLE: Duration = Duration::from_secs(10);

/// What every query needs.
pub(crate) struct Shared {
    serving: ArcSwap<Serving>,
    /// This and the rest is locked once for a batch, and never waited for: the process has one
    /// thread for its queries.
    buffers: Mutex<Buffers>,
    forwards: Arc<Semaphore>,
    cache: Mutex<Cache>,
    counts: Mutex<Counts>,
    limited: Mutex<BTreeMap<TaskId, u64>>,
}

struct Buffers {
    batch: Batch,
    /// Counts queries, so that lists of addresses rotate.
    turn: usize,
    /// A journal with queries of this task that an earlier resolver left: the next batch, once they
    /// are answered.
    left_over: Option<(TaskId, Batch)>,
}

#[derive(Default)]
pub(crate) struct Serving {
    pub(crate) index: Index,
    pub(crate) upstreams: Vec<SocketAddr>,
    /// Tasks with servers of their own, which are asked from where they are.
    pub(crate) own_servers: HashMap<TaskId, (PathBuf, Vec<SocketAddr>)>,
    /// Queries a second of one task; 0: no limit.
    pub(crate) rate_limit: u32,
}

/// The sockets that the loops of one task serve.
pub(crate) struct Open {
    pub(crate) netns: PathBuf,
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Open {
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.udp.as_fd(), self.tcp.as_fd()]
    }
}

/// The loops that serve one task. They end with it.
pub(crate) struct Loops([AbortHandle; 2]);

impl Drop for Loops {
    fn drop(&mut self) {
        for handle in &self.0 {
            handle.abort();
        }
    }
}

pub(crate) fn start(
    shared: &Arc<Shared>,
    task: TaskId,
    netns: &Path,
    sockets: TaskSockets,
) -> io::Result<(Arc<Open>, Loops)> {
    let open = Arc::new(Open {
        netns: netns.to_owned(),
        udp: UdpSocket::from_std(sockets.udp)?,
        tcp: TcpListener::from_std(sockets.tcp)?,
    });
    let udp = tokio::spawn(serve_udp(Arc::clone(shared), task, Arc::clone(&open)));
    let tcp = tokio::spawn(serve_tcp(Arc::clone(shared), task, Arc::clone(&open)));
    Ok((open, Loops([udp.abort_handle(), tcp.abort_handle()])))
}

impl Shared {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            serving: ArcSwap::default(),
            buffers: Mutex::new(Buffers { batch: Batch::private()?, turn: 0, left_over: None }),
            forwards: Arc::new(Semaphore::new(MAX_FORWARDS)),
            cache: Mutex::default(),
            counts: Mutex::default(),
            limited: Mutex::default(),
        })
    }

    /// Answers from this from now on.
    pub(crate) fn serve(&self, serving: Serving) {
        let before = self.serving.swap(Arc::new(serving));
        let now = self.serving();
        // What others said is not what these would.
        if before.upstreams != now.upstreams || before.own_servers != now.own_servers {
            lock(&self.cache).clear();
        }
        lock(&self.limited).retain(|task, _| now.index.knows(*task));
    }

    /// What has been done so far.
    pub(crate) fn counts(&self) -> (Counts, BTreeMap<TaskId, u64>) {
        (*lock(&self.counts), lock(&self.limited).clone())
    }

    pub(crate) fn serving(&self) -> Guard<Arc<Serving>> {
        self.serving.load()
    }

    /// Keeps what comes in a journal from now on. What is in it waits for its task's sockets.
    pub(crate) fn take_journal(&self, journal: OwnedFd) -> io::Result<()> {
        let mut batch = Batch::shared(journal.as_fd())?;
        let mut buffers = self.buffers();
        match batch.left_over() {
            Some(task) => buffers.left_over = Some((task, batch)),
            None => buffers.batch = batch,
        }
        Ok(())
    }

    /// Gives up what is left over of a task that is not there any more.
    pub(crate) fn settle_journal(&self, is_there: impl Fn(TaskId) -> bool) {
        let mut buffers = self.buffers();
        if let Some((_, mut batch)) = buffers.left_over.take_if(|(task, _)| !is_there(*task)) {
            batch.forget();
            buffers.batch = batch;
        }
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        lock(&self.buffers)
    }

    fn count(&self, task: TaskId, done: &Done) {
        {
            let mut counts = lock(&self.counts);
            counts.queries += done.queries as u64;
            counts.fast += done.fast as u64;
            counts.limited += done.limited as u64;
        }
        if done.limited > 0 {
            *lock(&self.limited).entry(task).or_default() += done.limited as u64;
        }
    }

    fn turn(&self) -> usize {
        let mut buffers = self.buffers();
        buffers.turn = buffers.turn.wrapping_add(1);
        buffers.turn
    }

    async fn forward(&self, task: TaskId, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let serving = self.serving.load_full();
        let own = serving.own_servers.get(&task);
        let over_tcp = transport == Transport::Tcp;
        let key = CacheKey::new(own.map(|_| task), over_tcp, query);
        let remembered =
            key.as_ref().and_then(|key| lock(&self.cache).find(key, query, Instant::now()));
        if let Some(reply) = remembered {
            lock(&self.counts).cached += 1;
            return Some(reply);
        }
        lock(&self.counts).forwarded += 1;
        let reply = match own {
            Some((netns, servers)) => forward(query, servers, transport, Some(netns)).await,
            None => forward(query, &serving.upstreams, transport, None).await,
        };
        let Some(reply) = reply else { return failure(query) };
        // Others may be asked by now.
        if let Some(key) = key
            && Arc::ptr_eq(&serving, &self.serving())
        {
            lock(&self.cache).insert(key, query, &reply, Instant::now());
        }
        Some(reply)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a task may still ask: tokens, of which there are at most a second's worth.
#[derive(Debug)]
struct Allowance {
    tokens: f64,
    since: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { tokens: f64::INFINITY, since: now }
    }

    /// How many of `wanted` queries are answered.
    fn take(&mut self, wanted: usize, rate: u32, now: Instant) -> usize {
        if rate == 0 {
            return wanted;
        }
        let rate = f64::from(rate);
        let more = now.saturating_duration_since(self.since).as_secs_f64() * rate;
        self.since = now;
        self.tokens = (self.tokens + more).min(rate);
        let given = (wanted as f64).min(self.tokens.floor());
        self.tokens -= given;
        given as usize
    }
}

/// What cannot be answered at once.
type ToForward = (Vec<u8>, SocketAddr);

/// What came of a batch.
#[derive(Debug, Default)]
struct Done {
    queries: usize,
    fast: usize,
    limited: usize,
}

impl Buffers {
    /// Answers what waits at a socket.
    fn answer_waiting(
        &mut self,
        serving: &Serving,
        task: TaskId,
        socket: &UdpSocket,
        allowance: &mut Allowance,
        to_forward: &mut Vec<ToForward>,
    ) -> io::Result<Done> {
        let count = self.batch.receive(task, socket)?;
        let allowed = allowance.take(count, serving.rate_limit, Instant::now());
        Ok(self.answer(serving, task, socket, allowed, to_forward))
    }

    /// Answers the first queries of the batch that is there, as many as are allowed.
    fn answer(
        &mut self,
        serving: &Serving,
        task: TaskId,
        socket: &UdpSocket,
        allowed: usize,
        to_forward: &mut Vec<ToForward>,
    ) -> Done {
        let index = &serving.index;
        let asker = index.asker(task);
        let Self { batch, turn, .. } = self;
        let mut done = Done::default();
        batch.each(|query, source, reply| {
            *turn = turn.wrapping_add(1);
            done.queries += 1;
            if done.queries > allowed {
                done.limited += 1;
                return Fate::Done;
            }
            if let Some(length) = fast::answer(index, asker, query, *turn, reply) {
                done.fast += 1;
                return Fate::Reply(length);
            }
            // Of one that is too long the header is enough to say so.
            let query = if query.len() > QUERY_MAX { &query[..HEADER_LEN] } else { query };
            match answer(index, task, query, Transport::Udp, *turn) {
                Decision::Reply(bytes) => match reply.get_mut(..bytes.len()) {
                    Some(room) => {
                        room.copy_from_slice(&bytes);
                        Fate::Reply(bytes.len())
                    }
                    None => Fate::Done,
                },
                Decision::Drop => Fate::Done,
                Decision::Forward => {
                    to_forward.extend(source.address().map(|from| (query.to_vec(), from)));
                    Fate::Done
                }
            }
        });
        batch.send(socket);
        done
    }
}

async fn serve_udp(shared: Arc<Shared>, task: TaskId, open: Arc<Open>) {
    let socket = &open.udp;
    let mut forwards = JoinSet::new();
    let mut to_forward = Vec::new();
    let mut allowance = Allowance::new(Instant::now());
    {
        let mut buffers = shared.buffers();
        if let Some((_, batch)) = buffers.left_over.take_if(|(of, _)| *of == task) {
            buffers.batch = batch;
            buffers.answer(&shared.serving(), task, socket, usize::MAX, &mut to_forward);
        }
    }
    loop {
        while forwards.try_join_next().is_some() {}
        for (query, from) in to_forward.drain(..) {
            let permit = Arc::clone(&shared.forwards).try_acquire_owned();
            let (Ok(permit), true) = (permit, forwards.len() < MAX_FORWARDS_OF_TASK) else {
                // Lost, as datagrams are.
                lock(&shared.counts).crowded += 1;
                continue;
            };
            let (shared, open) = (Arc::clone(&shared), Arc::clone(&open));
            forwards.spawn(async move {
                let _permit = permit;
                if let Some(reply) = shared.forward(task, &query, Transport::Udp).await {
                    let _ = open.udp.send_to(&reply, from).await;
                }
            });
        }
        let mut done = Done::default();
        let received = match socket.readable().await {
            Ok(()) => socket.try_io(Interest::READABLE, || {
                let (serving, mut buffers) = (shared.serving(), shared.buffers());
                done = buffers.answer_waiting(
                    &serving,
                    task,
                    socket,
                    &mut allowance,
                    &mut to_forward,
                )?;
                // A batch that is not full was all that there was: no need to ask again.
                if done.queries < BATCH { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            }),
            Err(error) => Err(error),
        };
        shared.count(task, &done);
        match received {
            // There may be more: first it is another task's turn.
            Ok(()) => yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::debug!(%task, %error, "resolver socket: receive failed");
                sleep(RETRY).await;
            }
        }
    }
}

async fn serve_tcp(shared: Arc<Shared>, task: TaskId, open: Arc<Open>) {
    let mut connections = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        while connections.try_join_next().is_some() {}
        oldest_first.retain(|connection| !connection.is_finished());
        if connections.len() >= MAX_CONNECTIONS {
            // Idle ones must not keep others out.
            if let Some(oldest) = oldest_first.pop_front() {
                oldest.abort();
            }
            connections.join_next().await;
            continue;
        }
        match open.tcp.accept().await {
            Ok((stream, _)) => {
                oldest_first.push_back(connections.spawn(serve_stream(
                    Arc::clone(&shared),
                    task,
                    stream,
                )));
            }
            Err(error) => {
                tracing::debug!(%task, %error, "resolver socket: accept failed");
                sleep(RETRY).await;
            }
        }
    }
}

async fn serve_stream(shared: Arc<Shared>, task: TaskId, mut stream: TcpStream) {
    while let Ok(Ok(Some(query))) = timeout(IDLE, read_message(&mut stream)).await {
        let decision = {
            let serving = shared.serving();
            answer(&serving.index, task, &query, Transport::Tcp, shared.turn())
        };
        let reply = match decision {
            Decision::Reply(reply) => reply,
            Decision::Drop => return,
            Decision::Forward => {
                let Ok(_permit) = shared.forwards.acquire().await else { return };
                let Some(reply) = shared.forward(task, &query, Transport::Tcp).await else {
                    return;
                };
                reply
            }
        };
        if !matches!(timeout(IDLE, write_message(&mut stream, &reply)).await, Ok(Ok(()))) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_gets_its_share_and_no_more() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut allowance = Allowance::new(start);
        assert_eq!(allowance.take(500, 0, start), 500, "no limit");
        assert_eq!(allowance.take(80, 100, start), 80);
        assert_eq!(allowance.take(80, 100, start), 20, "a second's worth at once");
        assert_eq!(allowance.take(80, 100, after(5)), 0);
        assert_eq!(allowance.take(80, 100, after(500)), 50);
        assert_eq!(allowance.take(1000, 100, after(60_000)), 100, "nothing is saved up");
        assert_eq!(allowance.take(1, 100, start), 0, "a clock that goes back gives nothing");
    }
}
