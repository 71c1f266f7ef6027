//! `meshctl whoami`: the small server that tests and users put behind services. It says who
//! answered and whom it saw, over HTTP, TCP and UDP.

mod http;
mod quantity;
mod tcp;
mod udp;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::timeout,
};

/// Requests under way may take this long after SIGTERM.
const DRAIN: Duration = Duration::from_secs(2);

/// A small server that says who answered, and to whom. Without options: HTTP on port 80, TCP and
/// UDP on port 7; with options, what they name alone.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct WhoamiArgs {
    /// Serve HTTP: `/`, `/?delay=2s`, `/?size=1MB`, `/env`, `/health` (`POST /health?ok=false`
    /// turns it to 503). May be repeated.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub http: Vec<u16>,
    /// Serve TCP: one line of JSON, then an echo. May be repeated.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub tcp: Vec<u16>,
    /// Serve UDP: each datagram is answered with the JSON. May be repeated.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub udp: Vec<u16>,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When a port cannot be bound.
pub(crate) fn run(mut args: WhoamiArgs) -> anyhow::Result<()> {
    if args.http.is_empty() && args.tcp.is_empty() && args.udp.is_empty() {
        args = WhoamiArgs { http: vec![80], tcp: vec![7], udp: vec![7] };
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(serve(&args));
    runtime.shutdown_background();
    served
}

async fn serve(args: &WhoamiArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = watch::channel(());
    let (busy, mut idle) = mpsc::channel::<()>(1);
    let shared = Shared { identity: Arc::new(Identity::from_env()), stopped, busy };
    let health = http::Health::default();
    for (kind, ports) in [(Kind::Http, &args.http), (Kind::Tcp, &args.tcp), (Kind::Udp, &args.udp)]
    {
        for port in ports {
            for address in wildcards(*port) {
                start(kind, address, &shared, &health)?;
            }
        }
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    drop(stop);
    drop(shared);
    // It yields `None` when the last connection has let go of its sender.
    let _ = timeout(DRAIN, idle.recv()).await;
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Http,
    Tcp,
    Udp,
}

/// Binds one socket and serves it. A machine without IPv6 goes without.
fn start(
    kind: Kind,
    address: SocketAddr,
    shared: &Shared,
    health: &http::Health,
) -> anyhow::Result<()> {
    let bound = if kind == Kind::Udp { udp::bind(address) } else { listen_on(address) };
    let fd = match bound {
        Ok(fd) => fd,
        Err(error) if address.is_ipv6() && error.raw_os_error() != Some(nix::libc::EADDRINUSE) => {
            return Ok(());
        }
        Err(error) => {
            let name = if kind == Kind::Udp { "udp" } else { "tcp" };
            return Err(error).with_context(|| format!("cannot listen on {address}/{name}"));
        }
    };
    let shared = shared.clone();
    if kind == Kind::Udp {
        let socket = tokio::net::UdpSocket::from_std(fd.into())?;
        tokio::spawn(udp::serve(socket, shared));
        return Ok(());
    }
    let listener = tokio::net::TcpListener::from_std(fd.into())?;
    match kind {
        Kind::Http => drop(tokio::spawn(http::serve(listener, shared, health.clone()))),
        _ => drop(tokio::spawn(tcp::serve(listener, shared))),
    }
    Ok(())
}

/// What every server holds.
#[derive(Debug, Clone)]
struct Shared {
    identity: Arc<Identity>,
    /// Closes when the server is to end.
    stopped: watch::Receiver<()>,
    /// Never sent on: who still holds it is still waited for then.
    #[expect(dead_code, reason = "it counts by being there")]
    busy: mpsc::Sender<()>,
}

impl Shared {
    async fn stop_asked(&mut self) {
        while self.stopped.changed().await.is_ok() {}
    }
}

/// Who this is, as the executor told it.
#[derive(Debug, Clone, Default)]
struct Identity {
    task: String,
    service: String,
    node: String,
}

impl Identity {
    fn from_env() -> Self {
        let of = |name| std::env::var(name).unwrap_or_default();
        Self { task: of("MESH_TASK"), service: of("MESH_SERVICE"), node: of("MESH_NODE") }
    }

    /// The answer, as one line. Its keys and their order are fixed: scripts rely on them.
    fn answer(&self, client: SocketAddr, server: SocketAddr, protocol: &str) -> Vec<u8> {
        #[derive(Serialize)]
        struct Answer<'a> {
            task: &'a str,
            service: &'a str,
            node: &'a str,
            client: SocketAddr,
            server: SocketAddr,
            protocol: &'a str,
        }
        let Self { task, service, node } = self;
        let answer = Answer { task, service, node, client, server, protocol };
        // A struct of strings always has a JSON form.
        let mut line = serde_json::to_vec(&answer).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

/// Both families, each on a socket of its own, so that an IPv4 client is never seen as mapped.
fn wildcards(port: u16) -> [SocketAddr; 2] {
    [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)]
        .map(|address| SocketAddr::new(address, port))
}

/// A bound, non-blocking socket.
fn bound(address: SocketAddr, kind: SockType) -> std::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, kind, flags, None)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    if kind == SockType::Stream {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(fd)
}

fn listen_on(address: SocketAddr) -> std::io::Result<OwnedFd> {
    let fd = bound(address, SockType::Stream)?;
    // The most that the kernel allows (net.core.somaxconn): connection-rate benchmarks end here.
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd)
}

#[cfg(test)]
mod tests;
