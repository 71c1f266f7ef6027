//! The workloads: small programs that run inside a task's or host's namespace, print one JSON
//! object, and end. Client and server are pinned by the caller (`--cpu`).
//!
//! - *udp*: a 64-byte payload by `sendmmsg(32)` over 8 flows; counted where it is received.
//! - *rr*: a 1-byte TCP ping-pong; percentiles of the round trip.
//! - *bulk*: one or more TCP streams, optionally with a fixed window.
//! - *conn*: connect, 1 byte, 1 byte back, reset; 64 at a time.
#![allow(unsafe_code, reason = "sendmmsg, recvmmsg and SO_LINGER are system calls of libc")]

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{setsockopt, sockopt},
    unistd::Pid,
};
use serde_json::{Value, json};

/// One workload.
#[derive(Debug, Args)]
pub(crate) struct Work {
    /// Run on this CPU alone.
    #[arg(long)]
    cpu: Option<usize>,
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, Subcommand)]
enum Kind {
    /// Serves rr (port), bulk (port + 1), conn (port + 2), counts UDP (port + 3), until killed.
    Serve {
        #[arg(long)]
        bind: IpAddr,
        #[arg(long, default_value_t = 7000)]
        port: u16,
        /// Receive window of bulk connections, bytes.
        #[arg(long)]
        window: Option<usize>,
    },
    /// Sends UDP and asks the server how much of it came.
    Udp {
        #[arg(long)]
        to: IpAddr,
        #[arg(long, default_value_t = 7000)]
        port: u16,
        #[arg(long, default_value_t = 2.0)]
        secs: f64,
    },
    /// Request and response.
    Rr {
        #[arg(long)]
        to: IpAddr,
        #[arg(long, default_value_t = 7000)]
        port: u16,
        #[arg(long, default_value_t = 2.0)]
        secs: f64,
    },
    /// Bulk TCP.
    Bulk {
        #[arg(long)]
        to: IpAddr,
        #[arg(long, default_value_t = 7000)]
        port: u16,
        #[arg(long, default_value_t = 2.0)]
        secs: f64,
        #[arg(long, default_value_t = 1)]
        streams: usize,
        #[arg(long)]
        window: Option<usize>,
    },
    /// New connections.
    Conn {
        #[arg(long)]
        to: IpAddr,
        /// The very port to connect to.
        #[arg(long, default_value_t = 7002)]
        port: u16,
        #[arg(long, default_value_t = 2.0)]
        secs: f64,
    },
}

const UDP_PAYLOAD: usize = 64;
const BATCH: usize = 32;
const FLOWS: usize = 8;
const CHUNK: usize = 128 * 1024;
const SLOTS: usize = 64;

pub(crate) fn run(work: Work) -> Result<()> {
    if let Some(cpu) = work.cpu {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set).context("pinning to a CPU")?;
    }
    let result = match work.kind {
        Kind::Serve { bind, port, window } => return serve(bind, port, window),
        Kind::Udp { to, port, secs } => udp(to, port, Duration::from_secs_f64(secs))?,
        Kind::Rr { to, port, secs } => rr(to, port, Duration::from_secs_f64(secs))?,
        Kind::Bulk { to, port, secs, streams, window } => {
            bulk(to, port, Duration::from_secs_f64(secs), streams, window)?
        }
        Kind::Conn { to, port, secs } => {
            conn::run(SocketAddr::new(to, port), Duration::from_secs_f64(secs), SLOTS)?
        }
    };
    println!("{result}");
    Ok(())
}

fn serve(bind: IpAddr, port: u16, window: Option<usize>) -> Result<()> {
    let rr = TcpListener::bind((bind, port)).with_context(|| format!("binding {bind}:{port}"))?;
    let sink = TcpListener::bind((bind, port + 1))?;
    if let Some(window) = window {
        setsockopt(&sink, sockopt::RcvBuf, &(window / 2))?;
    }
    let conns = TcpListener::bind((bind, port + 2))?;
    // SAFETY: listen(2) on a listening socket only changes its backlog; the fd is ours.
    unsafe { libc::listen(conns.as_raw_fd(), 4096) };
    let udp = UdpSocket::bind((bind, port + 3))?;
    setsockopt(&udp, sockopt::RcvBufForce, &(8 << 20))?;
    let counts = UdpSocket::bind((bind, port + 4))?;
    let received = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&received);
    std::thread::spawn(move || count_datagrams(&udp, &counter));
    std::thread::spawn(move || answer_counts(&counts, &received));
    std::thread::spawn(move || {
        for stream in sink.incoming().flatten() {
            std::thread::spawn(move || drain(stream));
        }
    });
    std::thread::spawn(move || conn::serve(&conns));
    println!("{{\"ready\":true}}");
    std::io::stdout().flush()?;
    for stream in rr.incoming().flatten() {
        std::thread::spawn(move || echo_bytes(stream));
    }
    Ok(())
}

fn drain(mut stream: TcpStream) {
    let mut buffer = vec![0u8; CHUNK];
    while matches!(stream.read(&mut buffer), Ok(n) if n > 0) {}
}

fn echo_bytes(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut byte = [0u8; 1];
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}

/// Counts datagrams by `recvmmsg`, never looking at them.
fn count_datagrams(socket: &UdpSocket, counter: &AtomicU64) {
    let mut buffers = vec![[0u8; 128]; BATCH];
    let mut iovecs: Vec<libc::iovec> = buffers
        .iter_mut()
        .map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() })
        .collect();
    // SAFETY: mmsghdr is plain data for which all zeroes is a valid value.
    let mut headers: Vec<libc::mmsghdr> =
        (0..BATCH).map(|_| unsafe { std::mem::zeroed() }).collect();
    for (header, iov) in headers.iter_mut().zip(iovecs.iter_mut()) {
        header.msg_hdr.msg_iov = iov;
        header.msg_hdr.msg_iovlen = 1;
    }
    loop {
        // SAFETY: headers point at iovecs, iovecs at buffers; all three outlive the call.
        let n = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut(),
            )
        };
        if n < 0 {
            return;
        }
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

fn answer_counts(socket: &UdpSocket, counter: &AtomicU64) {
    let mut buffer = [0u8; 8];
    while let Ok((_, from)) = socket.recv_from(&mut buffer) {
        let _ = socket.send_to(&counter.load(Ordering::Relaxed).to_be_bytes(), from);
    }
}

/// Asks the server how many datagrams it has counted. Lost questions are asked again.
fn ask_count(socket: &UdpSocket) -> Result<u64> {
    let mut answer = [0u8; 8];
    for _ in 0..50 {
        socket.send(b"count")?;
        if socket.recv(&mut answer).is_ok() {
            return Ok(u64::from_be_bytes(answer));
        }
    }
    anyhow::bail!("the server did not answer how many datagrams it received")
}

fn udp(to: IpAddr, port: u16, time: Duration) -> Result<Value> {
    let any: SocketAddr = "0.0.0.0:0".parse()?;
    let control = UdpSocket::bind(any)?;
    control.connect((to, port + 4))?;
    control.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut sockets = Vec::new();
    for _ in 0..FLOWS {
        let socket = UdpSocket::bind(any)?;
        socket.connect((to, port + 3))?;
        sockets.push(socket);
    }
    let payload = [0x5au8; UDP_PAYLOAD];
    let mut iov =
        libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
    // SAFETY: mmsghdr is plain data for which all zeroes is a valid value.
    let mut headers: Vec<libc::mmsghdr> =
        (0..BATCH).map(|_| unsafe { std::mem::zeroed() }).collect();
    for header in &mut headers {
        header.msg_hdr.msg_iov = &raw mut iov;
        header.msg_hdr.msg_iovlen = 1;
    }
    let before = ask_count(&control)?;
    let start = Instant::now();
    let mut sent = 0u64;
    while start.elapsed() < time {
        for socket in &sockets {
            // SAFETY: every header points at `iov`, which points at `payload`; both outlive the
            // call, and the kernel only reads them.
            let n = unsafe {
                libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), BATCH as u32, 0)
            };
            sent += u64::try_from(n).unwrap_or(0);
        }
    }
    let elapsed = start.elapsed().as_secs_f64();
    let received = settled_count(&control)? - before;
    Ok(json!({
        "sent_pps": sent as f64 / elapsed,
        "received_pps": received as f64 / elapsed,
    }))
}

/// The server's count once it no longer moves.
fn settled_count(control: &UdpSocket) -> Result<u64> {
    let mut last = ask_count(control)?;
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(10));
        let now = ask_count(control)?;
        if now == last {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

fn rr(to: IpAddr, port: u16, time: Duration) -> Result<Value> {
    let mut stream = TcpStream::connect((to, port)).with_context(|| format!("{to}:{port}"))?;
    stream.set_nodelay(true)?;
    let mut byte = [7u8];
    let mut times = Vec::with_capacity(1 << 20);
    let start = Instant::now();
    while start.elapsed() < time {
        let begin = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        times.push(begin.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    ensure!(!times.is_empty(), "no round trip ended in time");
    let at = |q: f64| times[((times.len() - 1) as f64 * q) as usize] as f64 / 1000.0;
    Ok(
        json!({ "p50_us": at(0.5), "p99_us": at(0.99), "per_s": times.len() as f64 / time.as_secs_f64() }),
    )
}

fn bulk(
    to: IpAddr,
    port: u16,
    time: Duration,
    streams: usize,
    window: Option<usize>,
) -> Result<Value> {
    let stop = Arc::new(AtomicBool::new(false));
    let total = Arc::new(AtomicU64::new(0));
    let mut threads = Vec::new();
    for _ in 0..streams {
        let mut stream = TcpStream::connect((to, port + 1))?;
        if let Some(window) = window {
            setsockopt(&stream, sockopt::SndBuf, &(window / 2))?;
        }
        let (stop, total) = (Arc::clone(&stop), Arc::clone(&total));
        threads.push(std::thread::spawn(move || {
            let chunk = vec![0u8; CHUNK];
            while !stop.load(Ordering::Relaxed) && stream.write_all(&chunk).is_ok() {
                total.fetch_add(CHUNK as u64, Ordering::Relaxed);
            }
        }));
    }
    // The first half second is slow start.
    std::thread::sleep(Duration::from_millis(500));
    let (before, start) = (total.load(Ordering::Relaxed), Instant::now());
    std::thread::sleep(time);
    let bytes = total.load(Ordering::Relaxed) - before;
    let elapsed = start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        let _ = thread.join();
    }
    Ok(json!({ "gbit_s": bytes as f64 * 8.0 / elapsed / 1e9 }))
}

mod conn {
    //! Connections by the second, on one epoll loop at each end.

    use std::{
        collections::HashMap,
        io::ErrorKind,
        os::fd::{AsFd, OwnedFd, RawFd},
    };

    use nix::sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, connect, recv, send,
            socket,
        },
    };

    use super::*;

    /// Accepts, reads a byte, writes a byte, waits for the end.
    pub(super) fn serve(listener: &TcpListener) {
        if let Err(error) = serve_loop(listener) {
            eprintln!("connection server: {error:#}");
        }
    }

    fn serve_loop(listener: &TcpListener) -> Result<()> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new(EpollCreateFlags::empty())?;
        epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        let mut streams: HashMap<RawFd, TcpStream> = HashMap::new();
        let mut events = [EpollEvent::empty(); 256];
        loop {
            let n = epoll.wait(&mut events, EpollTimeout::NONE)?;
            for event in &events[..n] {
                if event.data() == 0 {
                    while let Ok((stream, _)) = listener.accept() {
                        stream.set_nonblocking(true)?;
                        let fd = stream.as_raw_fd();
                        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, fd as u64))?;
                        streams.insert(fd, stream);
                    }
                    continue;
                }
                let fd = event.data() as RawFd;
                let Some(stream) = streams.get_mut(&fd) else { continue };
                let mut byte = [0u8; 1];
                let alive = match stream.read(&mut byte) {
                    Ok(1) => stream.write(&byte).is_ok(),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => true,
                    _ => false,
                };
                if !alive {
                    streams.remove(&fd);
                }
            }
        }
    }

    struct Slot {
        fd: OwnedFd,
        begun: Instant,
        sent: bool,
    }

    fn open(to: SocketAddr, epoll: &Epoll, index: usize) -> Result<Slot> {
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)?;
        // Close by reset: no TIME_WAIT, so that ports do not run out.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&fd, sockopt::Linger, &linger)?;
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
            Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => {}
            Err(error) => return Err(error).with_context(|| format!("connecting to {to}")),
        }
        epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLOUT, index as u64))?;
        Ok(Slot { fd, begun: Instant::now(), sent: false })
    }

    /// Keeps `slots` connections under way. A slot that gets no answer within 3 s is *stalled*:
    /// counted apart, since a balancer that loses half a flow shows it so and not as an error.
    pub(super) fn run(to: SocketAddr, time: Duration, slots: usize) -> Result<Value> {
        const STALL: Duration = Duration::from_secs(3);
        let epoll = Epoll::new(EpollCreateFlags::empty())?;
        let mut open_slots = (0..slots).map(|i| open(to, &epoll, i)).collect::<Result<Vec<_>>>()?;
        let (mut done, mut errors, mut stalled) = (0u64, 0u64, 0u64);
        let mut times = Vec::with_capacity(1 << 18);
        let mut events = [EpollEvent::empty(); 128];
        let start = Instant::now();
        while start.elapsed() < time {
            let n = epoll.wait(&mut events, EpollTimeout::from(100u16))?;
            for event in &events[..n] {
                let index = event.data() as usize;
                let slot = &mut open_slots[index];
                if !slot.sent {
                    if send(slot.fd.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL).is_ok() {
                        slot.sent = true;
                        let mut event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
                        epoll.modify(&slot.fd, &mut event)?;
                        continue;
                    }
                    errors += 1;
                } else {
                    let mut byte = [0u8; 1];
                    match recv(slot.fd.as_raw_fd(), &mut byte, MsgFlags::empty()) {
                        Ok(1) => {
                            done += 1;
                            times.push(slot.begun.elapsed().as_nanos() as u64);
                        }
                        _ => errors += 1,
                    }
                }
                open_slots[index] = open(to, &epoll, index)?;
            }
            for (index, slot) in open_slots.iter_mut().enumerate() {
                if slot.begun.elapsed() > STALL {
                    stalled += 1;
                    *slot = open(to, &epoll, index)?;
                }
            }
        }
        let elapsed = start.elapsed().as_secs_f64();
        times.sort_unstable();
        let at = |q: f64| {
            times.get(((times.len().max(1) - 1) as f64 * q) as usize).map(|t| *t as f64 / 1e6)
        };
        Ok(json!({
            "per_s": done as f64 / elapsed,
            "errors": errors,
            "stalled": stalled,
            "p50_ms": at(0.5),
            "p99_ms": at(0.99),
        }))
    }
}
