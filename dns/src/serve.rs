//! The loops that serve a task's sockets.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
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
/// TCP connections of one task.
const MAX_CONNECTIONS: usize = 64;
/// How long a TCP connection may be idle (RFC 7766 section 6.2.3: a few seconds).
const IDLE: Duration = Duration::from_secs(10);

/// What every query needs.
pub(crate) struct Shared {
    serving: ArcSwap<Serving>,
    /// Locked once for a batch, and never waited for: the process has one thread for its queries.
    buffers: Mutex<Buffers>,
    forwards: Arc<Semaphore>,
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
        })
    }

    /// Answers from this from now on.
    pub(crate) fn serve(&self, serving: Serving) {
        self.serving.store(Arc::new(serving));
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
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> usize {
        let mut buffers = self.buffers();
        buffers.turn = buffers.turn.wrapping_add(1);
        buffers.turn
    }

    async fn forward(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let serving = self.serving.load_full();
        match forward(query, &serving.upstreams, transport).await {
            Some(reply) => Some(reply),
            None => failure(query),
        }
    }
}

/// What cannot be answered at once.
type ToForward = (Vec<u8>, SocketAddr);

impl Buffers {
    /// Answers what waits at a socket; gives how many queries that were.
    fn answer_waiting(
        &mut self,
        serving: &Serving,
        task: TaskId,
        socket: &UdpSocket,
        to_forward: &mut Vec<ToForward>,
    ) -> io::Result<usize> {
        let count = self.batch.receive(task, socket)?;
        self.answer(serving, task, socket, to_forward);
        Ok(count)
    }

    fn answer(
        &mut self,
        serving: &Serving,
        task: TaskId,
        socket: &UdpSocket,
        to_forward: &mut Vec<ToForward>,
    ) {
        let index = &serving.index;
        let asker = index.asker(task);
        let Self { batch, turn, .. } = self;
        batch.each(|query, source, reply| {
            *turn = turn.wrapping_add(1);
            if let Some(length) = fast::answer(index, asker, query, *turn, reply) {
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
    }
}

async fn serve_udp(shared: Arc<Shared>, task: TaskId, open: Arc<Open>) {
    let socket = &open.udp;
    let mut forwards = JoinSet::new();
    let mut to_forward = Vec::new();
    {
        let mut buffers = shared.buffers();
        if let Some((_, batch)) = buffers.left_over.take_if(|(of, _)| *of == task) {
            buffers.batch = batch;
            buffers.answer(&shared.serving(), task, socket, &mut to_forward);
        }
    }
    loop {
        while forwards.try_join_next().is_some() {}
        for (query, from) in to_forward.drain(..) {
            // More than the limit are lost, as datagrams are.
            let Ok(permit) = Arc::clone(&shared.forwards).try_acquire_owned() else { break };
            let (shared, open) = (Arc::clone(&shared), Arc::clone(&open));
            forwards.spawn(async move {
                let _permit = permit;
                if let Some(reply) = shared.forward(&query, Transport::Udp).await {
                    let _ = open.udp.send_to(&reply, from).await;
                }
            });
        }
        let answered = match socket.readable().await {
            Ok(()) => socket.try_io(Interest::READABLE, || {
                let serving = shared.serving();
                shared.buffers().answer_waiting(&serving, task, socket, &mut to_forward)
            }),
            Err(error) => Err(error),
        };
        match answered {
            // There is more: first it is another task's turn.
            Ok(BATCH..) => yield_now().await,
            Ok(_) => {}
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
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
            continue;
        }
        match open.tcp.accept().await {
            Ok((stream, _)) => {
                connections.spawn(serve_stream(Arc::clone(&shared), task, stream));
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
                let Some(reply) = shared.forward(&query, Transport::Tcp).await else { return };
                reply
            }
        };
        if !matches!(timeout(IDLE, write_message(&mut stream, &reply)).await, Ok(Ok(()))) {
            return;
        }
    }
}
