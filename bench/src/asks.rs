//! Questions at a steady rate from inside a task's network namespace, and which of them had no
//! answer: pings, and look-ups by the task's resolver. The rate is open: one that waits does not
//! hold back the next.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, connect, socket},
};

/// Questions per second.
const RATE: u32 = 100;
/// What has no answer by then is lost; a libc asks again after the same time.
const PATIENCE: Duration = Duration::from_secs(5);
/// The resolver of every task.
const RESOLVER: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 11), 53);
/// Tells our echo requests from those of others.
const ECHO_ID: u16 = 0x6d65;

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) enum Question {
    /// An ICMP echo request.
    Ping(Ipv4Addr),
    /// A name's IPv4 address.
    Lookup(String),
}

impl Question {
    fn open(&self) -> Result<UdpSocket> {
        match self {
            Self::Ping(to) => {
                let raw = socket(
                    AddressFamily::Inet,
                    SockType::Raw,
                    SockFlag::SOCK_CLOEXEC,
                    SockProtocol::Icmp,
                );
                let raw = raw.context("open a raw socket")?;
                let [a, b, c, d] = to.octets();
                connect(raw.as_raw_fd(), &SockaddrIn::new(a, b, c, d, 0))
                    .with_context(|| format!("connect to {to}"))?;
                // It sends and receives like one, and that is all that is asked of it.
                Ok(UdpSocket::from(raw))
            }
            Self::Lookup(_) => {
                let socket = UdpSocket::bind("127.0.0.1:0").context("open a UDP socket")?;
                socket.connect(RESOLVER).context("connect to the task's resolver")?;
                Ok(socket)
            }
        }
    }

    fn encode(&self, number: u16) -> Vec<u8> {
        match self {
            Self::Ping(_) => echo_request(number),
            Self::Lookup(name) => query(number, name),
        }
    }

    /// The number of the question that a packet answers, if it does.
    fn answered(&self, packet: &[u8]) -> Option<u16> {
        match self {
            Self::Ping(_) => echo_reply(packet),
            Self::Lookup(_) => good_answer(packet),
        }
    }
}

/// What became of the questions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answers {
    /// How many were asked.
    pub(crate) asked: usize,
    /// How many had no good answer.
    pub(crate) lost: usize,
    /// The longest wait for a good one.
    pub(crate) slowest: Duration,
}

/// Questions that go on until they are stopped, or dropped.
#[derive(Debug)]
pub(crate) struct Asks {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Answers>>>,
}

impl Asks {
    /// Begins to ask in the network namespace of process `pid`.
    pub(crate) fn start(pid: u64, question: Question) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        let netns = File::open(&path).with_context(|| format!("open {path}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = thread::Builder::new().name("asks".to_owned()).spawn(move || {
            // On this thread alone.
            setns(&netns, CloneFlags::CLONE_NEWNET).context("enter the task's namespace")?;
            ask(&question.open()?, &question, &flag)
        });
        Ok(Self { stop, thread: Some(thread.context("start a thread")?) })
    }

    /// Asks no more, waits for what is under way, and reports.
    pub(crate) fn stop(mut self) -> Result<Answers> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it runs")?;
        let answers = thread.join().map_err(|_| anyhow!("the thread that asks panicked"))??;
        ensure!(answers.asked > 0, "nothing was asked");
        Ok(answers)
    }
}

impl Drop for Asks {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn ask(socket: &UdpSocket, question: &Question, stop: &AtomicBool) -> Result<Answers> {
    let begin = Instant::now();
    let interval = Duration::from_secs(1) / RATE;
    // When each was asked; none once it is answered.
    let mut open: Vec<Option<Instant>> = Vec::new();
    let (mut slowest, mut buffer) = (Duration::ZERO, [0; 1500]);
    let mut last = begin;
    loop {
        let now = Instant::now();
        let due = begin + interval * u32::try_from(open.len()).context("too many questions")?;
        if stop.load(Ordering::Relaxed) {
            if open.iter().all(Option::is_none) || now >= last + PATIENCE {
                break;
            }
        } else if now >= due {
            let number = u16::try_from(open.len()).context("asked for too long")?;
            // One that is not even sent stays open, and so is lost.
            let _ = socket.send(&question.encode(number));
            open.push(Some(now));
            last = now;
            continue;
        }
        let wait = due.saturating_duration_since(now).clamp(Duration::from_millis(1), interval);
        socket.set_read_timeout(Some(wait)).context("set the time-out")?;
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let number = question.answered(buffer.get(..length).unwrap_or_default());
                let asked = number.and_then(|number| open.get_mut(usize::from(number)));
                if let Some(asked) = asked.and_then(Option::take) {
                    slowest = slowest.max(asked.elapsed());
                }
            }
            // Also a port unreachable that answers an earlier one: that one stays open.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("receive an answer"),
        }
    }
    let lost = open.iter().filter(|asked| asked.is_some()).count();
    Ok(Answers { asked: open.len(), lost, slowest })
}

/// RFC 792.
fn echo_request(number: u16) -> Vec<u8> {
    let mut packet = vec![8, 0, 0, 0];
    packet.extend(ECHO_ID.to_be_bytes());
    packet.extend(number.to_be_bytes());
    packet.extend([0x6d; 56]);
    let sum = checksum(&packet).to_be_bytes();
    packet[2..4].copy_from_slice(&sum);
    packet
}

/// RFC 1071.
fn checksum(packet: &[u8]) -> u16 {
    let words = packet
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default()));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

/// A raw socket gives the IPv4 header too.
fn echo_reply(packet: &[u8]) -> Option<u16> {
    let icmp = packet.get(usize::from(packet.first()? & 0xf) * 4..)?;
    let &[0, 0, _, _, id0, id1, n0, n1] = icmp.first_chunk::<8>()? else { return None };
    (u16::from_be_bytes([id0, id1]) == ECHO_ID).then(|| u16::from_be_bytes([n0, n1]))
}

/// RFC 1035: type A, class IN, recursion desired.
fn query(number: u16, name: &str) -> Vec<u8> {
    let mut packet = number.to_be_bytes().to_vec();
    packet.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        packet.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
        packet.extend(label.as_bytes());
    }
    packet.extend([0, 0, 1, 0, 1]);
    packet
}

/// An answer without an error and with an address.
fn good_answer(packet: &[u8]) -> Option<u16> {
    let &[id0, id1, flags, code, _, _, a0, a1, ..] = packet.first_chunk::<12>()?;
    let good = flags & 0x80 != 0 && code & 0xf == 0 && (a0, a1) != (0, 0);
    good.then(|| u16::from_be_bytes([id0, id1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_request_sums_to_nothing_and_its_reply_is_known() {
        let mut packet = echo_request(513);
        assert_eq!(checksum(&packet), 0);
        packet[0] = 0;
        let mut whole = vec![0x45; 20];
        whole.extend(&packet);
        assert_eq!(echo_reply(&whole), Some(513));
        whole[20] = 8;
        assert_eq!(echo_reply(&whole), None, "a request is no reply");
        assert_eq!(echo_reply(&whole[..24]), None);
    }

    #[test]
    fn only_an_address_is_a_good_answer() {
        let mut answer = query(7, "web.app");
        assert!(answer.ends_with(b"\x03web\x03app\0\0\x01\0\x01"));
        assert_eq!(good_answer(&answer), None, "a query");
        answer[2] |= 0x80;
        assert_eq!(good_answer(&answer), None, "no address");
        answer[7] = 1;
        assert_eq!(good_answer(&answer), Some(7));
        answer[3] = 2;
        assert_eq!(good_answer(&answer), None, "SERVFAIL");
    }

    /// Against a server that answers all but every fifth, and one of these wrongly.
    #[test]
    fn what_is_not_answered_is_lost() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let stop = AtomicBool::new(false);
        let answers = thread::scope(|scope| {
            let asker = scope.spawn(|| ask(&client, &Question::Lookup("web".into()), &stop));
            let mut buffer = [0; 512];
            for number in 0..20 {
                let (length, from) = server.recv_from(&mut buffer).unwrap();
                buffer[2] |= 0x80;
                buffer[7] = u8::from(number != 15);
                if number % 5 != 0 || number == 15 {
                    server.send_to(&buffer[..length], from).unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
            drop(server);
            asker.join().unwrap().unwrap()
        });
        assert_eq!(answers.lost, 4 + (answers.asked - 20), "{answers:?}");
    }
}
