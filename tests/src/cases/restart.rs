//! Daemons and resolvers die and come back, and nobody notices: no packet, connection or lookup is
//! lost, and no task.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::PathBuf,
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use mesh_lab::{DaemonSignal, Lab};

use super::group;
use crate::{
    cluster::{Cluster, SOON, Task, WHOAMI, eventually, list},
    load::{Load, PATIENCE, RATE},
};

group!("restart": a_killed_daemon_is_not_felt, an_upgraded_daemon_is_not_felt,
    lost_records_are_not_felt, an_end_without_a_daemon_is_reported,
    a_killed_resolver_fails_no_lookup);

const NODE: &str = "w1";

/// Work that goes on until it is told to stop.
struct Going<T> {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<T>>>,
}

impl<T: Send + 'static> Going<T> {
    fn start(work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        Self { stop, thread: Some(thread::spawn(move || work(&flag))) }
    }

    fn stop(mut self) -> Result<T> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it runs")?;
        thread.join().map_err(|_| anyhow!("it panicked"))?
    }
}

impl<T> Drop for Going<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What was tried, and how long the slowest of it took.
#[derive(Debug)]
struct Tally {
    done: usize,
    longest: Duration,
}

/// Asks the task's resolver for a service again and again; the first failure ends it.
fn lookups(netns: PathBuf) -> Going<Tally> {
    Going::start(move |stop| {
        Lab::inside_netns(&netns, || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect("127.0.0.11:53")?;
            socket.set_read_timeout(Some(PATIENCE))?;
            let mut tally = Tally { done: 0, longest: Duration::ZERO };
            while !stop.load(Ordering::Relaxed) {
                let id = u16::try_from(tally.done % 60_000)?.to_be_bytes();
                let begin = Instant::now();
                // One question, recursion desired: `each`, A, IN.
                let mut query = id.to_vec();
                query.extend(
                    b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04each\x00\x00\x01\x00\x01",
                );
                socket.send(&query).with_context(|| format!("lookup {}", tally.done))?;
                let mut answer = [0; 512];
                let length = socket.recv(&mut answer).with_context(|| {
                    format!("lookup {} after {:?}", tally.done, begin.elapsed())
                })?;
                let good = length > 12 && answer[..2] == id && answer[3] & 15 == 0 && answer[7] > 0;
                ensure!(good, "lookup {} was answered with {:?}", tally.done, &answer[..length]);
                tally.done += 1;
                tally.longest = tally.longest.max(begin.elapsed());
                thread::sleep(Duration::from_millis(2));
            }
            Ok(tally)
        })
    })
}

/// One connection from outside to the node's published echo port, used a hundred times a second.
fn stream(c: &Cluster, to: SocketAddr) -> Going<Tally> {
    let lab = c.lab.clone();
    Going::start(move |stop| {
        lab.inside("client", || {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte)?;
            }
            let mut tally = Tally { done: 0, longest: Duration::ZERO };
            while !stop.load(Ordering::Relaxed) {
                let begin = Instant::now();
                let sent = tally.done.to_be_bytes();
                let mut back = [0; 8];
                stream
                    .write_all(&sent)
                    .and_then(|()| stream.read_exact(&mut back))
                    .with_context(|| format!("echo {} after {:?}", tally.done, begin.elapsed()))?;
                ensure!(back == sent, "echo {} came back as {back:?}", tally.done);
                tally.done += 1;
                tally.longest = tally.longest.max(begin.elapsed());
                thread::sleep(Duration::from_millis(10));
            }
            Ok(tally)
        })
    })
}

/// A hundred pings a second, until its standard input ends.
struct Pings(Child);

impl Pings {
    fn start(c: &Cluster, netns: &std::path::Path, to: &str) -> Result<Self> {
        let script = format!(
            "nsenter --net={} ping -q -i 0.01 {to} & read _; kill -INT $!; wait $!; true",
            netns.display()
        );
        let mut command = c.lab.exec(NODE, &["sh", "-c", &script]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        Ok(Self(child.context("start ping")?))
    }

    /// How many were sent; all must have come back.
    fn stop(mut self) -> Result<usize> {
        if let Some(mut stdin) = self.0.stdin.take() {
            stdin.write_all(b"\n")?;
        }
        let mut said = String::new();
        if let Some(stdout) = &mut self.0.stdout {
            stdout.read_to_string(&mut said)?;
        }
        self.0.wait()?;
        let summary = said.lines().find(|line| line.contains("packets transmitted"));
        let summary = summary.with_context(|| format!("ping said {said:?}"))?;
        let numbers: Vec<usize> =
            summary.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match numbers[..] {
            [sent, received, ..] if sent > 0 && sent == received => Ok(sent),
            _ => bail!("{summary}"),
        }
    }
}

impl Drop for Pings {
    fn drop(&mut self) {
        // Its input ends with it, and so does ping.
        let _ = self.0.stdin.take();
        let _ = self.0.wait();
    }
}

/// The processes of all tasks: task, process id, and when that began.
fn processes(c: &Cluster) -> Result<Vec<(String, String, String)>> {
    let mut found = Vec::new();
    for task in c.tasks("each")? {
        let pid = fs::read_to_string(task_dir(c, &task).join("pid"))
            .with_context(|| format!("{} on {} has no process", task.name, task.node))?;
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
            .with_context(|| format!("process {pid} of {} on {}", task.name, task.node))?;
        let began = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(19));
        found.push((task.id, pid, began.unwrap_or_default().to_owned()));
    }
    found.sort();
    Ok(found)
}

fn task_dir(c: &Cluster, task: &Task) -> PathBuf {
    c.lab.places().state_dir(&task.node).join("tasks").join(&task.id)
}

/// A task's network namespace: that of its shim, which outlives every daemon.
pub(super) fn netns(c: &Cluster, task: &Task) -> Result<PathBuf> {
    let pid = fs::read_to_string(task_dir(c, task).join("shim.pid"))?;
    Ok(format!("/proc/{}/ns/net", pid.trim()).into())
}

/// All kinds of traffic through `NODE`, with something done to its daemon meanwhile.
fn not_felt(c: &Cluster, harm: impl Fn() -> Result<()>) -> Result<()> {
    c.network("app")?;
    c.service(
        "--name each --mode global --network app --publish 8080:80 --publish 8007:7",
        WHOAMI,
    )?;
    let tasks = c.wait_running("each", 5)?;
    let on = |node: &str| tasks.iter().find(|task| task.node == node).context("no task there");
    let (here, there) = (on(NODE)?, on("w2")?);
    let address = c.lab.member(NODE)?.address;
    let before = processes(c)?;

    let netns = netns(c, here)?;
    let load = Load::through(c, &[address], 8080, RATE)?;
    let pings = Pings::start(c, &netns, there.addresses.get("app").context("no address")?)?;
    let lookups = lookups(netns);
    let stream = stream(c, SocketAddr::from((address, 8007)));
    for _ in 0..3 {
        harm()?;
    }
    let (pings, stream, lookups, load) = (pings.stop(), stream.stop(), lookups.stop(), load.stop());
    let (pings, stream) = (pings.context("pings")?, stream.context("the connection")?);
    let (lookups, load) = (lookups.context("lookups")?, load?);
    println!("    {load}; {pings} pings, {stream:?} on one connection, {lookups:?} lookups");
    load.none_failed()?;
    ensure!(stream.done > 0 && lookups.done > 0, "nothing was tried");
    eventually("the node to be ready", SOON, || ready(c))?;
    ensure!(processes(c)? == before, "before: {before:?}, now: {:?}", processes(c)?);
    ensure!(c.wait_running("each", 5)?.len() == 5);
    Ok(())
}

fn ready(c: &Cluster) -> Result<()> {
    let nodes = c.api("GET", "/nodes")?;
    let this = |node: &&serde_json::Value| node["Description"]["Hostname"] == NODE;
    let node = list(&nodes).iter().find(this).context("it is gone")?;
    ensure!(node["Status"]["State"] == "ready", "{}", node["Status"]);
    Ok(())
}

fn a_killed_daemon_is_not_felt(c: &Cluster) -> Result<()> {
    not_felt(c, || {
        c.lab.end_daemon(NODE, DaemonSignal::Kill)?;
        c.lab.start(NODE)?;
        eventually("the node to be ready", SOON, || ready(c))
    })
}

fn an_upgraded_daemon_is_not_felt(c: &Cluster) -> Result<()> {
    not_felt(c, || {
        c.lab.end_daemon(NODE, DaemonSignal::Stop)?;
        c.lab.start(NODE)?;
        eventually("the node to be ready", SOON, || ready(c))
    })
}

/// What the kernel and the resolver hold stays until a manager sends the records anew.
fn lost_records_are_not_felt(c: &Cluster) -> Result<()> {
    const CUT: &str = "add table inet cut; \
        add chain inet cut out { type filter hook output priority 0; }; \
        add rule inet cut out tcp dport 2377 drop";
    /// Some rounds of the new daemon's.
    const ALONE: Duration = Duration::from_secs(4);
    let harmed = std::cell::Cell::new(false);
    not_felt(c, || {
        if harmed.replace(true) {
            return Ok(());
        }
        c.on(NODE, &["nft", CUT])?.ok()?;
        c.lab.end_daemon(NODE, DaemonSignal::Kill)?;
        fs::write(c.lab.places().state_dir(NODE).join("records.msgpack"), b"lost")?;
        c.lab.start(NODE)?;
        thread::sleep(ALONE);
        c.on(NODE, &["nft", "delete table inet cut"])?.ok()?;
        eventually("the node to be ready", SOON, || ready(c))
    })
}

/// Its exit status waits in its directory.
fn an_end_without_a_daemon_is_reported(c: &Cluster) -> Result<()> {
    let options =
        ["--name", "brief", "--restart-condition", "none", "--constraint", "node.hostname==w1"];
    let script = "trap 'exit 7' TERM; while :; do sleep 0.05; done";
    c.service_args(&options, &["sh", "-c", script])?;
    let task = c.wait_running("brief", 1)?.pop().context("no task")?;
    let dir = task_dir(c, &task);
    let pid = fs::read_to_string(dir.join("pid"))?;
    c.lab.end_daemon(NODE, DaemonSignal::Kill)?;
    let ended = c.on(NODE, &["kill", "-TERM", pid.trim()])?.ok().and_then(|_| {
        eventually("the task to end", SOON, || {
            ensure!(dir.join("exit.json").exists());
            Ok(())
        })
    });
    c.lab.start(NODE)?;
    ended?;
    eventually("its exit status", SOON, || {
        let seen = c.api("GET", &format!("/tasks/{}", task.id))?;
        let status = &seen["Status"];
        ensure!(status["State"] == "failed", "{status}");
        ensure!(status["ContainerStatus"]["ExitCode"] == 7, "{status}");
        Ok(())
    })?;
    let shown = c.meshctl("m1", "service ps --no-trunc brief")?.ok()?;
    ensure!(shown.contains("exit (7)"), "{shown}");
    Ok(())
}

/// The process id of the node's resolver: the one that is told to listen on the node's socket.
fn resolver(c: &Cluster) -> Result<String> {
    let socket = c.lab.places().state_dir(NODE).join("dns/control.sock");
    let socket = socket.display().to_string();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = arguments.split(|byte| *byte == 0);
        if words.nth(1) == Some(b"dns") && words.any(|word| word == socket.as_bytes()) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("no resolver serves {socket}")
}

/// Questions wait in the kernel for its successor.
fn a_killed_resolver_fails_no_lookup(c: &Cluster) -> Result<()> {
    let killed = std::cell::Cell::new(0);
    not_felt(c, || {
        for _ in 0..2 {
            let old = resolver(c)?;
            c.on(NODE, &["kill", "-KILL", &old])?.ok()?;
            killed.set(killed.get() + 1);
            eventually("another resolver", SOON, || {
                ensure!(resolver(c)? != old);
                Ok(())
            })?;
        }
        Ok(())
    })?;
    ensure!(killed.get() == 6);
    Ok(())
}
