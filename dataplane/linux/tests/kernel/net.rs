//! Servers and clients inside network namespaces.
//!
//! A server says its name and whom it talks to: `NAME ADDRESS:PORT`. Over TCP it then reads all
//! that comes and answers with the number of bytes (8 digits) and as many bytes.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket,
        sockopt::{ReuseAddr, SendTimeout},
    },
    time::TimeVal,
};

use crate::host::{inside, patience};

/// Sends a frame by a link of a namespace, as it is.
#[allow(unsafe_code, reason = "nix makes no address of a link")]
pub(crate) fn send_frame(netns: &str, link: &str, frame: &[u8]) {
    inside(netns, || {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None);
        let socket = socket.unwrap();
        // SAFETY: all zeros are an address.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = nix::net::if_::if_nametoindex(link).unwrap() as i32;
        to.sll_halen = 6;
        to.sll_addr[..6].copy_from_slice(&frame[..6]);
        // SAFETY: frame and address are as long as said and live through the call.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as libc::socklen_t,
            )
        };
        assert_eq!(usize::try_from(sent), Ok(frame.len()), "{}", io::Error::last_os_error());
    });
}

/// Below the ports that the kernel gives itself.
static NEXT_PORT: AtomicU16 = AtomicU16::new(16_000);

/// A port of a client's own. The kernel's choice falls upon a port of an earlier flow now and then,
/// and if both meet at one backend it sees another port in place of the later one's: this is right,
/// and not what most scenes are about.
pub(crate) fn own_port() -> u16 {
    NEXT_PORT.fetch_add(1, Ordering::Relaxed)
}

/// An answer: who gave it, and which client it saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) server: String,
    pub(crate) client: SocketAddr,
    /// The client's own address.
    pub(crate) own: SocketAddr,
}

impl Answer {
    fn parse(text: &str, own: SocketAddr) -> Self {
        let (server, client) = text.trim_end().split_once(' ').expect("an answer");
        Self { server: server.to_owned(), client: client.parse().unwrap(), own }
    }
}

/// TCP and UDP on one port of a namespace.
pub(crate) struct Server {
    netns: String,
    port: u16,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(name: &str, netns: &str, port: u16) -> Self {
        let any = (Ipv4Addr::UNSPECIFIED, port);
        let (tcp, udp) =
            inside(netns, || (TcpListener::bind(any).unwrap(), UdpSocket::bind(any).unwrap()));
        let stop = Arc::new(AtomicBool::new(false));
        let (name, stopped) = (name.to_owned(), Arc::clone(&stop));
        let tcp = {
            let (name, stopped) = (name.clone(), Arc::clone(&stopped));
            std::thread::spawn(move || serve_tcp(&tcp, &name, &stopped))
        };
        let udp = std::thread::spawn(move || serve_udp(&udp, &name, &stopped));
        Self { netns: netns.to_owned(), port, stop, threads: vec![tcp, udp] }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let at = (Ipv4Addr::LOCALHOST, self.port);
        inside(&self.netns, || {
            let _ = TcpStream::connect(at);
            let _ = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|s| s.send_to(b"", at));
        });
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(listener: &TcpListener, name: &str, stop: &AtomicBool) {
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let name = name.to_owned();
        std::thread::spawn(move || converse(stream, &name));
    }
}

fn converse(mut stream: TcpStream, name: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(patience()))?;
    let client = stream.peer_addr()?;
    stream.write_all(format!("{name} {client}\n").as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    stream.write_all(format!("{:08}", bytes.len()).as_bytes())?;
    stream.write_all(&bytes)
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::SeqCst) {
        if let Ok((_, client)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{name} {client}\n").as_bytes(), client);
        }
    }
}

/// A TCP connection from a namespace, greeted by its server.
pub(crate) struct Connection {
    stream: TcpStream,
    pub(crate) answer: Answer,
}

impl Connection {
    pub(crate) fn open(netns: &str, to: Ipv4Addr, port: u16) -> io::Result<Self> {
        Self::open_from(netns, own_port(), to, port)
    }

    /// From a port of the caller's choice.
    pub(crate) fn open_from(netns: &str, own: u16, to: Ipv4Addr, port: u16) -> io::Result<Self> {
        let to = SocketAddrV4::new(to, port);
        let mut stream =
            inside(netns, || connected(SockType::Stream, own, to).map(TcpStream::from))?;
        stream.set_read_timeout(Some(patience()))?;
        let mut line = Vec::new();
        let mut byte = [0];
        while byte != [b'\n'] {
            stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        let answer = Answer::parse(&String::from_utf8_lossy(&line), stream.local_addr()?);
        Ok(Self { stream, answer })
    }

    /// Sends so many bytes, and gets them back.
    pub(crate) fn exchange(mut self, len: usize) -> io::Result<()> {
        let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        self.stream.write_all(&bytes)?;
        self.stream.shutdown(Shutdown::Write)?;
        let mut back = Vec::new();
        self.stream.read_to_end(&mut back)?;
        let expected = [format!("{len:08}").as_bytes(), &bytes].concat();
        assert!(back == expected, "{} bytes came back of {len}", back.len());
        Ok(())
    }
}

/// A socket of the calling thread's namespace, from one of its ports, which sockets to other peers
/// may share.
fn connected(kind: SockType, own: u16, to: SocketAddrV4) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, ReuseAddr, &true)?;
    // It limits connecting too.
    let limit = TimeVal::new(patience().as_secs().cast_signed(), 0);
    setsockopt(&socket, SendTimeout, &limit)?;
    let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, own);
    bind(socket.as_raw_fd(), &SockaddrIn::from(any))?;
    connect(socket.as_raw_fd(), &SockaddrIn::from(to))?;
    Ok(socket)
}

/// Asks over TCP.
pub(crate) fn ask_tcp(netns: &str, to: Ipv4Addr, port: u16) -> Answer {
    let failed = |error| panic!("TCP from {netns} to {to}:{port}: {error}");
    let connection = Connection::open(netns, to, port).unwrap_or_else(failed);
    let answer = connection.answer.clone();
    connection.exchange(3).unwrap_or_else(|error| panic!("TCP from {netns} to {to}: {error}"));
    answer
}

/// A UDP socket in a namespace, connected: it hears of errors, and of its peer alone.
pub(crate) fn udp(netns: &str, to: Ipv4Addr, port: u16) -> UdpSocket {
    udp_from(netns, own_port(), to, port)
}

/// From a port of the caller's choice.
pub(crate) fn udp_from(netns: &str, own: u16, to: Ipv4Addr, port: u16) -> UdpSocket {
    let to = SocketAddrV4::new(to, port);
    let socket = inside(netns, || connected(SockType::Datagram, own, to).map(UdpSocket::from));
    let socket = socket.unwrap();
    socket.set_read_timeout(Some(patience())).unwrap();
    socket
}

/// Sends a datagram of so many bytes and waits for the answer.
pub(crate) fn exchange_udp(socket: &UdpSocket, len: usize) -> io::Result<Answer> {
    socket.send(&vec![b'x'; len])?;
    let mut buffer = [0; 2048];
    let got = socket.recv(&mut buffer)?;
    Ok(Answer::parse(&String::from_utf8_lossy(&buffer[..got]), socket.local_addr()?))
}

/// Asks over UDP again and again, as soon as it is answered: a packet that is lost is noticed.
pub(crate) struct Asking {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<usize>>,
}

impl Asking {
    pub(crate) fn start(socket: UdpSocket) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut answers = 0;
            while !stopped.load(Ordering::SeqCst) {
                exchange_udp(&socket, 5)?;
                answers += 1;
            }
            Ok(answers)
        });
        Self { stop, thread }
    }

    /// How many answers came. Panics if one did not.
    pub(crate) fn stop(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap().expect("every question is answered")
    }
}

/// Asks over UDP.
pub(crate) fn ask_udp(netns: &str, to: Ipv4Addr, port: u16) -> Answer {
    let socket = udp(netns, to, port);
    let failed = |error| panic!("UDP from {netns} to {to}:{port}: {error}");
    exchange_udp(&socket, 5).unwrap_or_else(failed)
}

/// Whether a datagram is waiting, or comes in a moment.
pub(crate) fn hears(socket: &UdpSocket, moment: Duration) -> Option<Vec<u8>> {
    socket.set_read_timeout(Some(moment)).unwrap();
    let mut buffer = [0; 2048];
    socket.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())
}

/// A state of TCP sockets (`include/net/tcp_states.h`): closed by both sides, as this one sees it.
pub(crate) const LAST_ACK: &str = "09";

/// How many TCP sockets of a namespace are in a state.
pub(crate) fn count_tcp(netns: &str, state: &str) -> usize {
    let table = inside(netns, || fs::read_to_string("/proc/thread-self/net/tcp")).unwrap();
    table.lines().filter(|line| line.split_whitespace().nth(3) == Some(state)).count()
}

/// How many resets a namespace has sent.
pub(crate) fn resets(netns: &str) -> u64 {
    let text = inside(netns, || fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (tcp.next().unwrap(), tcp.next().unwrap());
    let at = names.split(' ').position(|name| name == "OutRsts").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// A VXLAN packet's UDP payload (RFC 7348, section 5) that carries a UDP datagram.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Forged {
    pub(crate) vni: u32,
    /// Kind and number of the MACs.
    pub(crate) from: (u8, u8),
    pub(crate) to: (u8, u8),
    /// Addresses and ports.
    pub(crate) source: (Ipv4Addr, u16),
    pub(crate) target: (Ipv4Addr, u16),
    pub(crate) text: &'static str,
}

impl Forged {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = vec![8, 0, 0, 0];
        out.extend((self.vni << 8).to_be_bytes());
        for (kind, number) in [self.to, self.from] {
            out.extend([kind, 0, 0, 0, 0, number]);
        }
        out.extend([8, 0]);
        let udp_len = 8 + self.text.len() as u16;
        let mut ip = vec![0x45, 0];
        ip.extend((20 + udp_len).to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
        ip.extend(self.source.0.octets());
        ip.extend(self.target.0.octets());
        let words = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum = words.sum::<u32>();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        out.extend(ip);
        for word in [self.source.1, self.target.1, udp_len, 0] {
            out.extend(word.to_be_bytes());
        }
        out.extend(self.text.as_bytes());
        out
    }

    /// Sends it to a node's tunnel, from a namespace and one of its addresses.
    pub(crate) fn send(&self, netns: &str, from: Ipv4Addr, node: Ipv4Addr) {
        inside(netns, || {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.send_to(&self.bytes(), (node, 4789)).unwrap();
        });
    }
}
