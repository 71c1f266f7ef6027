//! Routes and quantities as values; the sockets for real, on the loopback.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpStream, UdpSocket},
    sync::mpsc as sync,
};

use super::*;

fn identity() -> Identity {
    Identity { task: "web.1.x".into(), service: "web".into(), node: "w1".into() }
}

/// Serves `kinds` on free ports of the loopback's wildcard; returns the ports. The server ends with
/// the returned handle.
struct Server {
    ports: Vec<u16>,
    stop: Option<watch::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(kinds: &'static [Kind]) -> Self {
        let (stop, stopped) = watch::channel(());
        let (told, ports) = sync::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async move {
                let (busy, mut idle) = mpsc::channel(1);
                let mut waiting = stopped.clone();
                let shared = Shared { identity: Arc::new(identity()), stopped, busy };
                for kind in kinds {
                    let port = free_port(*kind);
                    for address in wildcards(port) {
                        start(*kind, address, &shared, &http::Health::default()).unwrap();
                    }
                    told.send(port).unwrap();
                }
                drop(told);
                while waiting.changed().await.is_ok() {}
                drop(shared);
                timeout(DRAIN, idle.recv()).await.unwrap();
            });
        });
        Self { ports: ports.iter().collect(), stop: Some(stop), thread: Some(thread) }
    }

    fn stop(&mut self) {
        self.stop.take();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn free_port(kind: Kind) -> u16 {
    if kind == Kind::Udp {
        UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    } else {
        std::net::TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    }
}

#[test]
fn the_answer_is_fixed() {
    let client = "198.51.100.7:51234".parse().unwrap();
    let server = "10.0.0.5:80".parse().unwrap();
    assert_eq!(
        String::from_utf8(identity().answer(client, server, "tcp")).unwrap(),
        "{\"task\":\"web.1.x\",\"service\":\"web\",\"node\":\"w1\",\
         \"client\":\"198.51.100.7:51234\",\"server\":\"10.0.0.5:80\",\"protocol\":\"tcp\"}\n"
    );
}

#[test]
fn quantities() {
    assert_eq!(quantity::delay("2s"), Ok(Duration::from_secs(2)));
    assert_eq!(quantity::delay("150ms"), Ok(Duration::from_millis(150)));
    assert_eq!(quantity::delay("0.5"), Ok(Duration::from_millis(500)));
    assert_eq!(quantity::size("1MB"), Ok(1_000_000));
    assert_eq!(quantity::size("1MiB"), Ok(1 << 20));
    assert_eq!(quantity::size("1.5k"), Ok(1500));
    for bad in ["", "x", "-1s", "2h", "9999999999s", "1.2.3s", "NaN"] {
        assert!(quantity::delay(bad).is_err(), "{bad}");
    }
    for bad in ["", "MB", "-1", "1XB", "99999999GB"] {
        assert!(quantity::size(bad).is_err(), "{bad}");
    }
}

#[tokio::test]
async fn routes() {
    let health = http::Health::default();
    let (status, body) = http::route("GET", "/?size=100kB", &health).await;
    assert_eq!((status, body.len()), (200, 100_000));
    assert!(serde_json::from_str::<serde_json::Value>(&body).is_ok(), "padded JSON is JSON");
    assert_eq!(http::route("GET", "/?size=x", &health).await.0, 400);
    assert_eq!(http::route("GET", "/?delay=x", &health).await.0, 400);
    let from = std::time::Instant::now();
    assert_eq!(http::route("GET", "/?delay=60ms", &health).await.0, 200);
    assert!(from.elapsed() >= Duration::from_millis(60));
    assert_eq!(http::route("GET", "/health", &health).await.0, 200);
    assert_eq!(http::route("POST", "/health?ok=false", &health).await.0, 200);
    assert_eq!(http::route("GET", "/health", &health).await.0, 503);
    assert_eq!(http::route("POST", "/health?ok=maybe", &health).await.0, 400);
    assert_eq!(http::route("POST", "/health?ok=true", &health).await.0, 200);
    assert_eq!(http::route("GET", "/health", &health).await.0, 200);
    let (status, body) = http::route("GET", "/env", &health).await;
    let env: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, env["PATH"].is_string()), (200, true));
}

#[test]
fn http_over_both_families_sees_its_client() {
    let mut server = Server::start(&[Kind::Http]);
    for target in ["127.0.0.1", "127.0.0.2", "[::1]"] {
        let Ok(mut stream) = TcpStream::connect(format!("{target}:{}", server.ports[0])) else {
            assert_eq!(target, "[::1]", "this machine may lack IPv6, not IPv4");
            continue;
        };
        write!(stream, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let json: serde_json::Value =
            serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!(json["client"], stream.local_addr().unwrap().to_string());
        assert_eq!(json["server"], format!("{target}:{}", server.ports[0]));
        assert_eq!((&json["task"], &json["protocol"]), (&"web.1.x".into(), &"tcp".into()));
    }
    server.stop();
}

#[test]
fn tcp_says_who_it_is_and_echoes() {
    let mut server = Server::start(&[Kind::Tcp]);
    let mut stream = TcpStream::connect(("127.0.0.3", server.ports[0])).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let json: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(json["server"], format!("127.0.0.3:{}", server.ports[0]));
    stream.write_all(b"hello").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "hello");
    server.stop();
}

#[test]
fn udp_answers_from_the_address_that_was_asked() {
    let mut server = Server::start(&[Kind::Udp]);
    for (ours, target) in [("127.0.0.1", "127.0.0.9"), ("::1", "::1")] {
        let Ok(socket) = UdpSocket::bind((ours, 0)) else { continue };
        // Connected: an answer from elsewhere does not arrive.
        socket.connect((target, server.ports[0])).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send(b"").unwrap();
        let mut buffer = [0; 1000];
        let length = socket.recv(&mut buffer).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&buffer[..length]).unwrap();
        assert_eq!(json["server"], socket.peer_addr().unwrap().to_string());
        assert_eq!(json["client"], socket.local_addr().unwrap().to_string());
        assert_eq!(json["protocol"], "udp");
    }
    server.stop();
}

#[test]
fn a_request_under_way_is_finished_at_the_end() {
    let mut server = Server::start(&[Kind::Http]);
    let mut stream = TcpStream::connect(("127.0.0.1", server.ports[0])).unwrap();
    // An idle connection that is kept alive does not hold the end up.
    let idle = TcpStream::connect(("127.0.0.1", server.ports[0])).unwrap();
    write!(stream, "GET /?delay=300ms HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let from = std::time::Instant::now();
    // Until the request is surely under way: its connection was accepted before this one's answer.
    let mut probe = TcpStream::connect(("127.0.0.1", server.ports[0])).unwrap();
    write!(probe, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    probe.read_exact(&mut [0]).unwrap();
    server.stop();
    assert!(from.elapsed() < DRAIN, "{:?}", from.elapsed());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(idle);
}

#[test]
fn a_taken_port_is_named() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _guard = runtime.enter();
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), taken.local_addr().unwrap().port());
    let (_stop, stopped) = watch::channel(());
    let (busy, _idle) = mpsc::channel(1);
    let shared = Shared { identity: Arc::default(), stopped, busy };
    let error = start(Kind::Tcp, address, &shared, &http::Health::default()).unwrap_err();
    assert!(format!("{error:#}").contains(&format!("cannot listen on {address}/tcp")), "{error:#}");
}
