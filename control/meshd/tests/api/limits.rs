//! What clients may not do: the table of routes walked, and connections that take too much.

use std::time::Duration;

use meshd::api::{
    Limits,
    routes::{Needs, rules},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, timeout},
};

use crate::{Server, fake, http, message};

const PATIENCE: Duration = Duration::from_secs(10);

/// A path that a pattern stands for.
fn path(pattern: &str) -> String {
    pattern.replace("{id}", "x").replace("{*image}", "x/json") + "?version=1"
}

#[tokio::test]
async fn every_route_keeps_its_rule() {
    let outside = Server::start("rules-outside");
    let worker = Server::start("rules-worker");
    let token = json!({"RemoteAddrs": ["192.0.2.11:2377"], "JoinToken": fake::TOKEN});
    assert_eq!(worker.post("/swarm/join", token).await.0, 200);
    let leaderless = Server::manager("rules-leaderless").await;
    leaderless.fake.set_leaderless(true);
    let manager = Server::manager("rules-manager").await;
    let (_, before) = manager.get("/swarm").await;
    for rule in rules().filter(|rule| rule.needs == Needs::Manager) {
        // Nonsense: who may not ask is refused before that is looked at.
        let ask = async |server: &Server| {
            let (status, answer) =
                server.json(rule.method, &path(rule.path), Some(json!("no object"))).await;
            assert_eq!(status, 503, "{rule:?}: {answer}");
            message(&answer).to_owned()
        };
        let words = ask(&outside).await;
        assert!(words.starts_with("This node is not a swarm manager. Use"), "{rule:?}: {words}");
        let words = ask(&worker).await;
        assert!(words.contains("Worker nodes can't be used to view"), "{rule:?}: {words}");
        let words = ask(&leaderless).await;
        assert!(words.starts_with("The swarm does not have a leader."), "{rule:?}: {words}");
    }
    for rule in rules().filter(|rule| rule.body > 0) {
        let big = vec![b' '; rule.body + 1];
        let answer =
            http::send(&manager.dir, rule.method, &path(rule.path), "application/json", big).await;
        assert_eq!(answer.status, 413, "{rule:?}: {}", answer.text());
        let (_, answer) =
            manager.json(rule.method, &path(rule.path), Some(json!("no object"))).await;
        assert!(message(&answer).contains("invalid JSON"), "{rule:?}: {answer}");
    }
    // What a route takes no body for is not read.
    let taken = rules().filter(|rule| rule.method == "POST" && rule.body == 0);
    let taken: Vec<_> = taken.map(|rule| rule.path).collect();
    assert_eq!(taken, ["/swarm/leave", "/networks/prune", "/mesh/gossip-key/rotate"]);
    for method in ["PUT", "PATCH", "CONNECT", "TRACE", "OPTIONS"] {
        for rule in rules() {
            let (status, _) = manager.json(method, &path(rule.path), None).await;
            assert!([404, 400].contains(&status), "{method} {}: {status}", rule.path);
        }
    }
    assert_eq!(manager.get("/swarm").await.1, before);
}

/// Sends bytes, and reads all that comes until the other side closes.
async fn raw(server: &Server, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(server.dir.join("sock")).await.unwrap();
    // The other side may close before all is sent.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it goes on");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn nonsense_is_answered_or_cut() {
    let limits = Limits { request: Duration::from_secs(2), ..Limits::default() };
    let server = Server::limited("nonsense", limits);
    server.post("/swarm/init", json!({})).await;
    // The buffer is looked at when it is full, so a little more may pass.
    let long = "a".repeat(limits.headers * 4);
    for (bytes, status) in [
        (format!("GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n"), "431"),
        (format!("GET /_ping HTTP/1.1\r\nHost: x\r\nX: {long}\r\n\r\n"), "431"),
        (format!("GET /_ping HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000)), "431"),
        ("GET /_ping HTTP/3.0\r\n\r\n".to_owned(), "400"),
        ("\0\u{1}\r\n\r\n".to_owned(), "400"),
        ("POST /swarm/join HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = raw(&server, bytes.as_bytes()).await;
        let line = answer.lines().next().unwrap_or_default();
        assert!(line.contains(status), "{:.40}: {line}", bytes);
    }
    // Paths that leave their place name nothing; an object's name is never a file's.
    for path in ["/../etc/passwd", "/v1.51/../../info", "/services/..%2f..%2fetc", "//info"] {
        let (status, answer) = server.get(path).await;
        assert_eq!(status, 404, "{path}: {answer}");
    }
    // Unknown fields are ignored, as Docker does; ones that nest too deep are not followed.
    let deep = format!("{{\"X\":{}{}}}", "[".repeat(2000), "]".repeat(2000));
    let (path, json) = ("/services/create", "application/json");
    let answer = http::send(&server.dir, "POST", path, json, deep.into_bytes()).await;
    assert_eq!(answer.status, 400);
    let mut service = crate::web("web");
    service["NoSuchField"] = json!({"a": [1, 2, 3]});
    assert_eq!(server.post("/services/create", service).await.0, 201);
}

#[tokio::test]
async fn slow_and_many_clients_are_bounded() {
    let limits =
        Limits { connections: 40, request: Duration::from_millis(800), ..Limits::default() };
    let server = Server::limited("bounded", limits);
    let sock = server.dir.join("sock");
    // One byte at a time, for ever.
    let began = Instant::now();
    let mut slow = UnixStream::connect(&sock).await.unwrap();
    let cut = async {
        while slow.write_all(b"G").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, cut).await.expect("a slow request goes on for ever");
    assert!(began.elapsed() >= limits.request / 2);
    // Many that say nothing: who comes then is told, and has room again once they are cut.
    let mut silent = Vec::new();
    for _ in 0..limits.connections {
        silent.push(UnixStream::connect(&sock).await.unwrap());
    }
    let answer = raw(&server, b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert!(message(&body).contains("too many connections"), "{body}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let close = b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        if raw(&server, close).await.starts_with("HTTP/1.1 200") {
            break;
        }
        assert!(Instant::now() < deadline, "silent connections keep their places");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
