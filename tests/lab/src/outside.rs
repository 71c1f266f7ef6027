//! The world outside, as the client plays it: a DNS server for the zone `example.test`, and small
//! servers that say which address a request came from, so that a task can prove that it got out.
//!
//! | port | answers |
//! |---|---|
//! | 53/udp, 53/tcp | DNS, see [`answer`] |
//! | 80/tcp | any HTTP request: `{"client":"…","server":"…","protocol":"tcp"}` |
//! | 7/tcp | a line of the same JSON, then an echo |
//! | 7/udp | each datagram with the same JSON |

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::topology::{CLIENT, CLIENT6};

/// The zone served.
pub const ZONE: &str = "example.test";
/// The name with so many addresses that its answer needs TCP.
pub const MANY: u8 = 40;
/// A connection that is silent for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// RFC 1035 section 4.2.1: the largest answer by UDP without EDNS.
const UDP_MAX: usize = 512;

type Server = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// The bound sockets; [`Self::serve`] answers on them.
#[derive(Debug)]
pub struct Outside {
    dns: UdpSocket,
    dns_tcp: TcpListener,
    http: TcpListener,
    echo: UdpSocket,
    echo_tcp: TcpListener,
}

impl Outside {
    /// Takes the ports.
    ///
    /// # Errors
    /// When one of them is taken.
    pub fn bind() -> Result<Self> {
        let udp =
            |port| UdpSocket::bind(&any(port)[..]).with_context(|| format!("bind UDP port {port}"));
        let tcp = |port| {
            TcpListener::bind(&any(port)[..]).with_context(|| format!("bind TCP port {port}"))
        };
        Ok(Self {
            dns: udp(53)?,
            dns_tcp: tcp(53)?,
            http: tcp(80)?,
            echo: udp(7)?,
            echo_tcp: tcp(7)?,
        })
    }

    /// Answers until the process ends.
    ///
    /// # Errors
    /// When a thread cannot be started or a socket breaks.
    pub fn serve(self) -> Result<()> {
        let Self { dns, dns_tcp, http, echo, echo_tcp } = self;
        let servers: [(&str, Server); 5] = [
            ("dns", Box::new(move || each_datagram(&dns, |query, _| answer(query, UDP_MAX)))),
            ("dns-tcp", Box::new(move || each_connection(&dns_tcp, serve_dns_tcp))),
            ("http", Box::new(move || each_connection(&http, serve_http))),
            ("echo", {
                let server = echo.local_addr().context("the echo port's address")?;
                Box::new(move || {
                    each_datagram(&echo, |_, from| Some(whoami(from, server, "udp").into_bytes()))
                })
            }),
            ("echo-tcp", Box::new(move || each_connection(&echo_tcp, serve_echo))),
        ];
        let mut threads = Vec::new();
        for (name, server) in servers {
            let thread = thread::Builder::new().name(name.to_owned()).spawn(server);
            threads.push((name, thread.with_context(|| format!("start the {name} server"))?));
        }
        for (name, thread) in threads {
            match thread.join() {
                Ok(ended) => ended.with_context(|| format!("the {name} server"))?,
                Err(_) => bail!("the {name} server panicked"),
            }
        }
        Ok(())
    }
}

/// Both families by one socket, or IPv4 alone on a kernel without IPv6.
fn any(port: u16) -> [SocketAddr; 2] {
    [SocketAddr::from(([0_u16; 8], port)), SocketAddr::from(([0_u8; 4], port))]
}

fn each_datagram(
    socket: &UdpSocket,
    answer: impl Fn(&[u8], SocketAddr) -> Option<Vec<u8>>,
) -> io::Result<()> {
    let mut buffer = [0; 65536];
    loop {
        // An earlier answer's ICMP error shows up here; the next client is not to blame for it.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        if let Some(answer) = answer(&buffer[..length], from) {
            let _ = socket.send_to(&answer, from);
        }
    }
}

fn each_connection(
    listener: &TcpListener,
    serve: fn(TcpStream) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        stream.set_read_timeout(Some(IDLE_MAX))?;
        stream.set_write_timeout(Some(IDLE_MAX))?;
        // A broken connection is its client's business.
        let _ = thread::Builder::new().spawn(move || drop(serve(stream)));
    }
}

fn whoami(client: SocketAddr, server: SocketAddr, protocol: &str) -> String {
    let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port()).to_string();
    json!({"client": plain(client), "server": plain(server), "protocol": protocol}).to_string()
}

fn serve_http(mut stream: TcpStream) -> io::Result<()> {
    /// A request's head is not longer.
    const HEAD_MAX: u64 = 16 << 10;
    let body = whoami(stream.peer_addr()?, stream.local_addr()?, "tcp");
    let mut reader = BufReader::new(stream.try_clone()?).take(HEAD_MAX);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 && !line.trim().is_empty() {
        line.clear();
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

fn serve_echo(mut stream: TcpStream) -> io::Result<()> {
    writeln!(stream, "{}", whoami(stream.peer_addr()?, stream.local_addr()?, "tcp"))?;
    let mut reader = stream.try_clone()?;
    io::copy(&mut reader, &mut stream).map(drop)
}

fn serve_dns_tcp(mut stream: TcpStream) -> io::Result<()> {
    loop {
        let mut length = [0; 2];
        if stream.read_exact(&mut length).is_err() {
            return Ok(());
        }
        let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut query)?;
        let Some(answer) = answer(&query, usize::from(u16::MAX)) else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&length.to_be_bytes())?;
        stream.write_all(&answer)?;
    }
}

/// Record types (RFC 1035 section 3.2.2, RFC 3596).
mod kind {
    pub(super) const A: u16 = 1;
    pub(super) const SOA: u16 = 6;
    pub(super) const AAAA: u16 = 28;
    pub(super) const ANY: u16 = 255;
}

/// Response codes (RFC 1035 section 4.1.1).
mod code {
    pub(super) const NO_ERROR: u8 = 0;
    pub(super) const FORMAT: u8 = 1;
    pub(super) const NO_SUCH_NAME: u8 = 3;
    pub(super) const NOT_IMPLEMENTED: u8 = 4;
    pub(super) const REFUSED: u8 = 5;
}

/// Addresses of a name in the zone; `None` if there is no such name.
fn addresses(name: &str) -> Option<Vec<IpAddr>> {
    let label = if name == ZONE { "" } else { name.strip_suffix(ZONE)?.strip_suffix('.')? };
    match label {
        "" | "www" => Some(vec![CLIENT.into(), CLIENT6.into()]),
        "v4only" => Some(vec![CLIENT.into()]),
        "v6only" => Some(vec![CLIENT6.into()]),
        "many" => Some((1..=MANY).map(|n| Ipv4Addr::new(198, 51, 100, 100 + n).into()).collect()),
        _ => None,
    }
}

struct Question {
    /// In lower case, no dot at the end.
    name: String,
    kind: u16,
    /// Where the question ends in the query.
    end: usize,
}

/// The first question; names in questions are not compressed.
fn question(query: &[u8]) -> Option<Question> {
    let mut at = 12;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        match length {
            0 => break,
            1..=63 => {
                labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_lowercase())
            }
            _ => return None,
        }
        at += length;
    }
    let kind = u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]);
    query.get(at + 3)?;
    Some(Question { name: labels.join("."), kind, end: at + 4 })
}

/// Answers one DNS query of at most one question, authoritative for [`ZONE`], refusing all else.
/// An answer longer than `size_max` is cut to nothing with the TC bit (RFC 2181 section 9).
/// `None` for what is no query at all.
#[must_use]
pub fn answer(query: &[u8], size_max: usize) -> Option<Vec<u8>> {
    let header: [u8; 12] = query.get(..12)?.try_into().ok()?;
    if header[2] & 0x80 != 0 {
        return None;
    }
    let opcode = header[2] >> 3 & 0xf;
    let one_question = header[4..6] == [0, 1];
    let asked = if one_question { question(query) } else { None };
    let (rcode, question_end, records) = match asked {
        _ if opcode != 0 => (code::NOT_IMPLEMENTED, 12, Vec::new()),
        None => (code::FORMAT, 12, Vec::new()),
        Some(q) if q.name != ZONE && !q.name.ends_with(&format!(".{ZONE}")) => {
            (code::REFUSED, q.end, Vec::new())
        }
        Some(q) => match addresses(&q.name) {
            None => (code::NO_SUCH_NAME, q.end, Vec::new()),
            Some(all) => (code::NO_ERROR, q.end, matching(&all, q.kind)),
        },
    };
    let negative = records.is_empty() && matches!(rcode, code::NO_ERROR | code::NO_SUCH_NAME);
    let mut out = Vec::from(&header[..2]);
    // QR, AA; RD as asked; no recursion here.
    out.extend([0x84 | header[2] & 0x79, rcode]);
    out.extend(if question_end > 12 { [0, 1] } else { [0, 0] });
    out.extend(u16::try_from(records.len()).ok()?.to_be_bytes());
    out.extend([0, u8::from(negative), 0, 0]);
    out.extend(&query[12..question_end]);
    let whole = records.concat();
    if out.len() + whole.len() > size_max {
        out[2] |= 0x02;
        out[6..8].fill(0);
        return Some(out);
    }
    out.extend(whole);
    if negative {
        out.extend(soa());
    }
    Some(out)
}

/// The records of one type among a name's addresses, each named by a pointer to the question.
fn matching(all: &[IpAddr], asked: u16) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    for address in all {
        let (kind, data) = match address {
            IpAddr::V4(v4) => (kind::A, v4.octets().to_vec()),
            IpAddr::V6(v6) => (kind::AAAA, v6.octets().to_vec()),
        };
        if asked == kind || asked == kind::ANY {
            records.push(record(&[0xc0, 12], kind, &data));
        }
    }
    records
}

/// Class IN, TTL 60 s.
fn record(name: &[u8], kind: u16, data: &[u8]) -> Vec<u8> {
    let mut out = name.to_vec();
    out.extend(kind.to_be_bytes());
    out.extend([0, 1, 0, 0, 0, 60]);
    // Never longer than an SOA of this zone.
    out.extend(u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend(data);
    out
}

/// For negative answers (RFC 2308 section 3): its minimum, 5 s, is how long they hold.
fn soa() -> Vec<u8> {
    let zone: Vec<u8> = ZONE
        .split('.')
        .flat_map(|label| {
            let length = u8::try_from(label.len()).unwrap_or(u8::MAX);
            [length].into_iter().chain(label.bytes())
        })
        .chain([0])
        .collect();
    let mut data = [zone.clone(), zone.clone()].concat();
    for number in [1_u32, 3600, 600, 86400, 5] {
        data.extend(number.to_be_bytes());
    }
    record(&zone, kind::SOA, &data)
}

/// Asks the server at `server` for nothing but to say who asks; for tests and demos outside labs.
///
/// # Errors
/// When the server does not answer.
pub fn ask_who(server: impl ToSocketAddrs) -> Result<String> {
    let stream = TcpStream::connect(server).context("connect")?;
    stream.set_read_timeout(Some(IDLE_MAX)).context("set the time-out")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("read")?;
    Ok(line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut out = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            out.push(u8::try_from(label.len()).unwrap());
            out.extend(label.as_bytes());
        }
        out.push(0);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1]);
        out
    }

    /// Id, response code, TC, answers, authorities.
    fn facts(name: &str, kind: u16, max: usize) -> (u16, u8, bool, u8, u8) {
        let a = answer(&query(name, kind), max).unwrap();
        (u16::from_be_bytes([a[0], a[1]]), a[3] & 0xf, a[2] & 2 != 0, a[7], a[9])
    }

    #[test]
    fn names_of_the_zone_in_any_case() {
        assert_eq!(facts("www.example.test", kind::A, 512), (0xabcd, 0, false, 1, 0));
        assert_eq!(facts("WWW.Example.TEST", kind::AAAA, 512), (0xabcd, 0, false, 1, 0));
        assert_eq!(facts("example.test", kind::ANY, 512), (0xabcd, 0, false, 2, 0));
        let a = answer(&query("www.example.test", kind::A), 512).unwrap();
        assert!(a.ends_with(&CLIENT.octets()));
    }

    #[test]
    fn no_data_no_name_and_not_our_zone_differ() {
        assert_eq!(facts("v4only.example.test", kind::AAAA, 512), (0xabcd, 0, false, 0, 1));
        assert_eq!(facts("nope.example.test", kind::A, 512), (0xabcd, 3, false, 0, 1));
        assert_eq!(facts("notexample.test", kind::A, 512), (0xabcd, 5, false, 0, 0));
        assert_eq!(facts("mesh.invalid", kind::A, 512), (0xabcd, 5, false, 0, 0));
    }

    #[test]
    fn a_long_answer_needs_tcp() {
        assert_eq!(facts("many.example.test", kind::A, UDP_MAX), (0xabcd, 0, true, 0, 0));
        assert_eq!(facts("many.example.test", kind::A, 65535), (0xabcd, 0, false, MANY, 0));
    }

    #[test]
    fn garbage_is_ignored_or_a_format_error() {
        assert_eq!(answer(b"", 512), None);
        assert_eq!(answer(&[0; 11], 512), None);
        let mut response = query("www.example.test", kind::A);
        response[2] |= 0x80;
        assert_eq!(answer(&response, 512), None);
        let whole = query("www.example.test", kind::A);
        for end in 12..whole.len() {
            assert_eq!(answer(&whole[..end], 512).unwrap()[3] & 0xf, code::FORMAT, "{end}");
        }
        let mut pointer = query("www.example.test", kind::A);
        pointer[12] = 0xc0;
        assert_eq!(answer(&pointer, 512).unwrap()[3] & 0xf, code::FORMAT);
        let mut update = whole;
        update[2] |= 5 << 3;
        assert_eq!(answer(&update, 512).unwrap()[3] & 0xf, code::NOT_IMPLEMENTED);
    }

    #[test]
    fn the_servers_say_who_asks() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        thread::spawn(move || each_connection(&listener, serve_echo));
        let said = ask_who(server).unwrap();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["server"], server.to_string());
        assert!(said["client"].as_str().unwrap().starts_with("127.0.0.1:"), "{said}");
    }
}
