//! The daemons of a lab's nodes: starting, signalling, and telling whether one lives.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    host::{self, Places, wait_for},
    http,
    lab::Record,
    machine::live_pid,
    topology::{LabName, Member},
    wire::UPLINK,
};

/// A daemon that does not answer by then is not going to.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// A daemon told to stop has this long to write down what it must.
const STOP_DEADLINE: Duration = Duration::from_secs(20);
/// Entries of each connection tracking map: a lab has five of each on one machine.
const CONNTRACK_ENTRIES: &str = "65536";

/// How to end a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaemonSignal {
    /// SIGTERM: it shuts down, tasks run on.
    Stop,
    /// SIGKILL.
    Kill,
}

fn pid_file(places: &Places, node: &str) -> PathBuf {
    places.run.join(format!("{node}.pid"))
}

/// The daemon of a node, if it lives.
pub(crate) fn pid(places: &Places, node: &str) -> Option<Pid> {
    live_pid(&pid_file(places, node), &places.cgroup_of(node))
}

/// Starts a node's daemon inside its machine, without waiting for it.
pub(crate) fn spawn(
    record: &Record,
    lab: &LabName,
    places: &Places,
    node: &str,
    extra: &[&str],
) -> Result<()> {
    let path = places.log(node);
    let log = File::options().create(true).append(true).open(&path);
    let log = log.with_context(|| format!("open {}", path.display()))?;
    let child = Command::new(&record.meshctl)
        .args(["lab", "--name", lab.as_str(), "daemon", node])
        .args(extra)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("share the log")?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", record.meshctl.display()))?;
    // It enters the machine and then becomes meshd: the process stays the same.
    host::write_whole(&pid_file(places, node), &child.id().to_string())
}

/// The command that a node's daemon is.
pub(crate) fn command(
    record: &Record,
    places: &Places,
    node: &Member,
    extra: &[String],
) -> Command {
    let mut meshd = Command::new(&record.meshd);
    let path_dir = record.meshctl.parent().map(OsString::from).unwrap_or_default();
    meshd
        // A configuration of this host's own daemon is no business of a lab's.
        .args(["--config", "/dev/null"])
        .arg("--state-dir")
        .arg(places.state_dir(&node.name))
        .arg("--socket")
        .arg(places.socket(&node.name))
        .args(["--node-name", &node.name])
        .args(["--advertise-addr", &node.address.to_string()])
        .args(["--data-path-addr", &node.address.to_string()])
        .args(["--uplink", UPLINK])
        .arg("--pin-dir")
        .arg(places.pins_of(&node.name))
        .arg("--cgroup-parent")
        .arg(places.cgroup_of(&node.name))
        .arg("--path-dir")
        .arg(path_dir)
        .args(["--conntrack-entries", CONNTRACK_ENTRIES])
        .args(&record.meshd_args)
        .args(extra)
        .env_remove("MESH_HOST")
        .env_remove("DOCKER_HOST");
    meshd
}

/// Waits until a node's daemon answers on its socket.
pub(crate) fn wait_until_up(places: &Places, node: &str) -> Result<()> {
    let socket = places.socket(node);
    // Until it has joined its cgroup the process does not count as the daemon.
    let mut seen = false;
    let waited = wait_for(&format!("an answer of {node}'s daemon"), START_DEADLINE, || {
        let ping = http::send(&socket, "GET", "/_ping", b"", Duration::from_secs(5));
        if ping.is_ok_and(|answer| answer.status == 200) {
            return Ok(true);
        }
        match pid(places, node) {
            Some(_) => seen = true,
            None if seen || !starting(places, node) => bail!("{node}'s daemon has ended"),
            None => {}
        }
        Ok(false)
    });
    waited.with_context(|| {
        let path = places.log(node);
        format!("{node} does not start. The end of {}:\n{}", path.display(), tail(&path))
    })
}

/// Whether the process still is on its way into the machine.
fn starting(places: &Places, node: &str) -> bool {
    let text = fs::read_to_string(pid_file(places, node)).unwrap_or_default();
    let stat = fs::read_to_string(format!("/proc/{}/stat", text.trim())).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|s| !s.is_empty() && !s.starts_with(['Z', 'X']))
}

/// Ends a node's daemon and waits until it is gone. Without one there is nothing to do.
pub(crate) fn end(places: &Places, node: &str, how: DaemonSignal) -> Result<()> {
    let Some(daemon) = pid(places, node) else { return Ok(()) };
    let signal = match how {
        DaemonSignal::Stop => Signal::SIGTERM,
        DaemonSignal::Kill => Signal::SIGKILL,
    };
    kill(daemon, signal).with_context(|| format!("send {signal} to {node}'s daemon {daemon}"))?;
    let waited = wait_for(&format!("the end of {node}'s daemon {daemon}"), STOP_DEADLINE, || {
        Ok(pid(places, node).is_none())
    });
    waited.with_context(|| format!("`meshctl lab node {node} kill` ends it at once"))
}

/// The last lines of a log.
pub(crate) fn tail(path: &std::path::Path) -> String {
    const BYTES: u64 = 2000;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|e| format!("(not readable: {e})"))
}
