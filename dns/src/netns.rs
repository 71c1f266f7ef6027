//! Sockets inside another network namespace.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

/// The address of the resolver in every task.
pub const RESOLVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// The port that the resolver listens on; a program on the task's `lo` rewrites port 53 to it, so
/// that the task may bind port 53 itself.
pub const RESOLVER_PORT: u16 = 10_053;

/// The two sockets of one task.
#[derive(Debug)]
pub(crate) struct TaskSockets {
    pub(crate) udp: UdpSocket,
    pub(crate) tcp: TcpListener,
}

/// Opens a task's sockets in its namespace.
///
/// A thread changes its namespace and ends; the sockets stay where they were made, whoever uses
/// them.
pub(crate) async fn open(netns: PathBuf) -> io::Result<TaskSockets> {
    inside(move || open_here(&netns)).await
}

/// Opens a socket in a task's namespace that is connected to a server of its choice.
pub(crate) async fn connect_udp(netns: PathBuf, server: SocketAddr) -> io::Result<UdpSocket> {
    inside(move || {
        enter(&netns)?;
        let any = if server.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })
    .await
}

/// The same over TCP.
pub(crate) async fn connect_tcp(
    netns: PathBuf,
    server: SocketAddr,
    within: Duration,
) -> io::Result<TcpStream> {
    inside(move || {
        enter(&netns)?;
        let stream = TcpStream::connect_timeout(&server, within)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    })
    .await
}

/// Runs this on a thread of its own: it changes the thread's namespace for good.
async fn inside<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().name("netns".to_owned()).stack_size(64 << 10).spawn(move || {
        // Nobody waits any more when the task is gone again: the sockets close.
        let _ = done.send(work());
    })?;
    result.await.unwrap_or_else(|_| Err(io::Error::other("the thread that opens sockets died")))
}

fn during(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn enter(netns: &Path) -> io::Result<()> {
    let namespace = File::open(netns).map_err(during("open the namespace"))?;
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| during("enter the namespace")(errno.into()))
}

fn open_here(netns: &Path) -> io::Result<TaskSockets> {
    enter(netns)?;
    let address = SocketAddr::V4(SocketAddrV4::new(RESOLVER_ADDRESS, RESOLVER_PORT));
    let udp = UdpSocket::bind(address).map_err(during("bind the UDP socket"))?;
    let tcp = TcpListener::bind(address).map_err(during("bind the TCP socket"))?;
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok(TaskSockets { udp, tcp })
}
