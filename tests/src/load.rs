//! Load from the lab's client: new connections at a steady rate, one request on each, through all
//! nodes in turn, and what became of every one of them.
//!
//! The rate is open: a request that hangs does not hold back the next. That is what users do, and
//! what shows a gap of some milliseconds.

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use crate::cluster::Cluster;

/// New connections per second, unless a test needs another rate.
pub const RATE: u32 = 300;
/// A request without a whole answer by then has failed.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Failures that a message lists; their number says the rest.
const LISTED_MAX: usize = 20;

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A whole answer with status 200.
    Ok,
    /// The connection was refused.
    Refused,
    /// The connection was reset, or ended before the answer was whole.
    Reset,
    /// No whole answer within [`PATIENCE`].
    Timeout,
    /// Another status, or another error.
    Other(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Refused => f.write_str("refused"),
            Self::Reset => f.write_str("reset"),
            Self::Timeout => f.write_str("timeout"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// One request.
#[derive(Debug, Clone)]
pub struct Request {
    /// When it began, since the load began.
    pub start: Duration,
    /// How long it took.
    pub latency: Duration,
    /// The node that it was sent to.
    pub through: Ipv4Addr,
    /// What became of it.
    pub outcome: Outcome,
    /// The name of the node whose task answered, if it said so.
    pub node: Option<String>,
    /// The task that answered, if it said so.
    pub task: Option<String>,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, latency, through, outcome, .. } = self;
        let (start, latency) = (start.as_secs_f64(), latency.as_secs_f64() * 1000.0);
        write!(f, "at {start:.3} s through {through}: {outcome} after {latency:.1} ms")
    }
}

/// What became of a load.
#[derive(Debug, Clone)]
pub struct Report {
    /// All requests, by when they began.
    pub requests: Vec<Request>,
    /// Those that failed.
    pub failed: Vec<Request>,
    /// Latency that half of the good ones did not exceed.
    pub p50: Duration,
    /// Latency that 99 of 100 good ones did not exceed.
    pub p99: Duration,
    /// The longest latency of a good one.
    pub max: Duration,
}

impl Report {
    fn of(mut requests: Vec<Request>) -> Self {
        requests.sort_by_key(|request| request.start);
        let (good, failed): (Vec<_>, Vec<_>) =
            requests.iter().partition(|request| request.outcome == Outcome::Ok);
        let mut latencies: Vec<_> = good.iter().map(|request| request.latency).collect();
        latencies.sort();
        let at = |percent: usize| {
            // The smallest that so many do not exceed.
            let rank = (latencies.len() * percent).div_ceil(100).saturating_sub(1);
            latencies.get(rank).copied().unwrap_or_default()
        };
        let (p50, p99, max) = (at(50), at(99), at(100));
        let failed = failed.into_iter().cloned().collect();
        Self { failed, p50, p99, max, requests }
    }

    /// That not one request failed, and that there were some.
    ///
    /// # Errors
    /// With the failures, when each began and how it ended.
    pub fn none_failed(&self) -> Result<()> {
        ensure!(!self.requests.is_empty(), "the load sent nothing");
        ensure!(self.failed.is_empty(), "{self}");
        Ok(())
    }

    /// When the last request began that a task on `node` answered; none if there was none.
    #[must_use]
    pub fn last_answer_of(&self, node: &str) -> Option<Duration> {
        let by_it = self.requests.iter().filter(|request| request.node.as_deref() == Some(node));
        by_it.map(|request| request.start).next_back()
    }

    /// When the last failed request began; none if none failed.
    #[must_use]
    pub fn last_failure(&self) -> Option<Duration> {
        self.failed.last().map(|request| request.start)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, failed, p50, p99, max } = self;
        let ms = |time: &Duration| time.as_secs_f64() * 1000.0;
        write!(
            f,
            "{} requests, {} failed; p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
            requests.len(),
            failed.len(),
            ms(p50),
            ms(p99),
            ms(max)
        )?;
        for request in failed.iter().take(LISTED_MAX) {
            write!(f, "\n      {request}")?;
        }
        let rest = failed.len().saturating_sub(LISTED_MAX);
        if rest > 0 { write!(f, "\n      and {rest} more") } else { Ok(()) }
    }
}

/// A load that goes on until it is stopped, or dropped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    begin: Instant,
    thread: Option<JoinHandle<Result<Vec<Request>>>>,
}

impl Load {
    /// Begins to fetch `/` from published port `port`, `rate` times a second, through all nodes of
    /// the lab in turn.
    ///
    /// # Errors
    /// When the client is not there.
    pub fn start(cluster: &Cluster, port: u16, rate: u32) -> Result<Self> {
        let nodes: Vec<_> = cluster.lab.nodes().iter().map(|node| node.address).collect();
        Self::through(cluster, &nodes, port, rate)
    }

    /// The same through the nodes at `addresses` alone: who kills a whole node does not send there.
    ///
    /// # Errors
    /// When the client is not there, and without addresses or a rate.
    pub fn through(
        cluster: &Cluster,
        addresses: &[Ipv4Addr],
        port: u16,
        rate: u32,
    ) -> Result<Self> {
        ensure!(!addresses.is_empty() && rate > 0, "a load needs addresses and a rate");
        let targets: Vec<_> = addresses.iter().map(|&ip| SocketAddrV4::new(ip, port)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (lab, flag) = (cluster.lab.clone(), Arc::clone(&stop));
        let (started, starts) = mpsc::channel();
        let thread = thread::Builder::new().name("load".to_owned()).spawn(move || {
            lab.inside("client", || {
                // On this thread alone: its sockets are the client's.
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let begin = Instant::now();
                // Who started the load is there as long as it runs.
                let _ = started.send(begin);
                runtime.block_on(generate(&targets, rate, begin, &flag))
            })
        });
        let thread = thread.context("start the load's thread")?;
        match starts.recv() {
            Ok(begin) => Ok(Self { stop, begin, thread: Some(thread) }),
            Err(_) => match join(thread) {
                Err(e) => Err(e.context("start a load from the client")),
                Ok(_) => Err(anyhow!("the load ended before it began")),
            },
        }
    }

    /// The time since the load began: what the requests' times count from.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Sends no more, waits for what is under way, and reports.
    ///
    /// # Errors
    /// When the load could not go on.
    pub fn stop(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the load runs")?;
        Ok(Report::of(join(thread)?))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn join(thread: JoinHandle<Result<Vec<Request>>>) -> Result<Vec<Request>> {
    thread.join().map_err(|_| anyhow!("the load panicked"))?
}

async fn generate(
    targets: &[SocketAddrV4],
    rate: u32,
    begin: Instant,
    stop: &AtomicBool,
) -> Result<Vec<Request>> {
    let mut under_way = JoinSet::new();
    let mut done = Vec::new();
    for (number, &target) in (0_u32..).zip(targets.iter().cycle()) {
        let due = begin + Duration::from_secs(1) * number / rate;
        tokio::time::sleep_until(due.into()).await;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        under_way.spawn(request(target, begin));
        while let Some(request) = under_way.try_join_next() {
            done.push(request.context("a request panicked")?);
        }
    }
    while let Some(request) = under_way.join_next().await {
        done.push(request.context("a request panicked")?);
    }
    Ok(done)
}

async fn request(target: SocketAddrV4, begin: Instant) -> Request {
    let start = Instant::now();
    let answer = tokio::time::timeout(PATIENCE, fetch(target)).await;
    let latency = start.elapsed();
    let (outcome, body) = match answer {
        Err(_) => (Outcome::Timeout, Value::Null),
        Ok(Err(e)) => (outcome_of(&e), Value::Null),
        Ok(Ok(raw)) => outcome_of_answer(&raw),
    };
    let name = |key: &str| body[key].as_str().filter(|name| !name.is_empty()).map(str::to_owned);
    Request {
        start: start - begin,
        latency,
        through: *target.ip(),
        outcome,
        node: name("node"),
        task: name("task"),
    }
}

async fn fetch(target: SocketAddrV4) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(target).await?;
    let head = format!("GET / HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).await?;
    Ok(raw)
}

fn outcome_of(error: &io::Error) -> Outcome {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Outcome::Refused,
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => Outcome::Reset,
        io::ErrorKind::TimedOut => Outcome::Timeout,
        _ => Outcome::Other(error.to_string()),
    }
}

/// The outcome, and the answer's JSON if it is some.
fn outcome_of_answer(raw: &[u8]) -> (Outcome, Value) {
    match mesh_lab::http::parse(raw) {
        // Cut off: the connection ended in order, the answer did not.
        Err(_) => (Outcome::Reset, Value::Null),
        Ok(answer) if answer.status != 200 => {
            (Outcome::Other(format!("status {}", answer.status)), Value::Null)
        }
        Ok(answer) => (Outcome::Ok, answer.json().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(start: u64, latency: u64, outcome: Outcome) -> Request {
        Request {
            start: Duration::from_millis(start),
            latency: Duration::from_millis(latency),
            through: Ipv4Addr::LOCALHOST,
            outcome,
            node: Some("w1".to_owned()),
            task: None,
        }
    }

    #[test]
    fn the_report_counts_orders_and_ranks() {
        let mut requests: Vec<_> = (1..=100).map(|n| sample(n, n, Outcome::Ok)).collect();
        requests.insert(0, sample(2000, 9, Outcome::Reset));
        let report = Report::of(requests);
        let ms = Duration::from_millis;
        assert_eq!((report.p50, report.p99, report.max), (ms(50), ms(99), ms(100)));
        assert_eq!(report.last_failure(), Some(ms(2000)));
        assert_eq!(report.last_answer_of("w1"), Some(ms(2000)));
        assert_eq!(report.last_answer_of("w2"), None);
        let said = report.none_failed().unwrap_err().to_string();
        assert!(said.contains("101 requests, 1 failed"), "{said}");
        assert!(said.contains("at 2.000 s through 127.0.0.1: reset after 9.0 ms"), "{said}");
        assert!(Report::of(Vec::new()).none_failed().is_err());
    }

    #[test]
    fn an_answer_that_is_cut_off_is_a_reset() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{\"node\":\"w1\"}";
        assert_eq!(outcome_of_answer(whole).0, Outcome::Ok);
        assert_eq!(outcome_of_answer(whole).1["node"], "w1");
        for end in 0..whole.len() {
            assert_eq!(outcome_of_answer(&whole[..end]).0, Outcome::Reset, "{end}");
        }
        let refusal = outcome_of_answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(refusal.0, Outcome::Other("status 503".to_owned()));
    }

    /// Against a server that answers, one that resets, and a port where nothing listens.
    #[test]
    fn what_goes_wrong_is_told_apart() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let std::net::SocketAddr::V4(target) = listener.local_addr().unwrap() else {
                panic!("an IPv4 socket")
            };
            let (asked, ()) = tokio::join!(request(target, Instant::now()), async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 512];
                assert!(stream.read(&mut head).await.unwrap() > 0);
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
                stream.write_all(answer).await.unwrap();
            });
            assert_eq!(asked.outcome, Outcome::Ok);
            let (asked, ()) = tokio::join!(request(target, Instant::now()), async {
                // Unread data makes the kernel end it with a reset.
                let (stream, _) = listener.accept().await.unwrap();
                stream.readable().await.unwrap();
            });
            assert_eq!(asked.outcome, Outcome::Reset);
            drop(listener);
            assert_eq!(request(target, Instant::now()).await.outcome, Outcome::Refused);
        });
    }
}
