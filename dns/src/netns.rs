//! Sockets inside another network namespace.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket},
    path::{Path, PathBuf},
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
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().name("netns".to_owned()).stack_size(64 << 10).spawn(move || {
        // Nobody waits any more when the task is gone again: the sockets close.
        let _ = done.send(open_here(&netns));
    })?;
    result.await.unwrap_or_else(|_| Err(io::Error::other("the thread that opens sockets died")))
}

/// On a thread of its own: it changes the thread's namespace for good.
fn open_here(netns: &Path) -> io::Result<TaskSockets> {
    let during =
        |what: &'static str| move |e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
    let namespace = File::open(netns).map_err(during("open the namespace"))?;
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| during("enter the namespace")(errno.into()))?;
    let address = SocketAddr::V4(SocketAddrV4::new(RESOLVER_ADDRESS, RESOLVER_PORT));
    let udp = UdpSocket::bind(address).map_err(during("bind the UDP socket"))?;
    let tcp = TcpListener::bind(address).map_err(during("bind the TCP socket"))?;
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok(TaskSockets { udp, tcp })
}
