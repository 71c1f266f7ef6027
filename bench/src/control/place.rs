//! Three namespaces on a bridge, a directory on the disk, and the members of both stores in them.

use std::{
    cell::RefCell,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::node;
use crate::shell::{Netns, sh};

const PREFIX: &str = "mbench-raft";
pub(super) const MEMBERS: u64 = 3;
/// How long a member may take to start, and a store to have a leader.
const START: Duration = Duration::from_secs(30);
/// The load that a leader dies under, and when it dies: past the load's first moments.
const UNDER: Duration = Duration::from_secs(6);
const DIES_AFTER: Duration = Duration::from_millis(1500);

/// A member, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member(pub(super) u64);

impl Member {
    /// Another one.
    pub(super) fn other(self) -> Self {
        Self(self.0 % MEMBERS + 1)
    }
}

pub(super) fn ip(number: u64) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, number as u8)
}

/// Namespaces and files; gone when dropped.
#[derive(Debug)]
pub(super) struct Place {
    dir: PathBuf,
}

impl Place {
    pub(super) fn make(disk: &Path) -> Result<Self> {
        let dir = disk.join(format!("{PREFIX}-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let place = Self { dir };
        place.remove_namespaces();
        sh(&format!("ip netns add {PREFIX}-bridge"))?;
        let bridge = Netns::named(&format!("{PREFIX}-bridge"));
        bridge.sh("ip link add b0 type bridge")?;
        bridge.sh("ip link set b0 up")?;
        for number in 1..=MEMBERS {
            sh(&format!("ip netns add {PREFIX}-{number}"))?;
            let netns = Self::netns(number);
            bridge.sh(&format!(
                "ip link add p{number} type veth peer name eth0 netns {PREFIX}-{number}"
            ))?;
            bridge.sh(&format!("ip link set p{number} master b0 up"))?;
            netns.sh(&format!("ip addr add {}/24 dev eth0", ip(number)))?;
            netns.sh("ip link set eth0 up")?;
            netns.sh("ip link set lo up")?;
        }
        Ok(place)
    }

    fn netns(number: u64) -> Netns {
        Netns::named(&format!("{PREFIX}-{number}"))
    }

    fn remove_namespaces(&self) {
        for name in (1..=MEMBERS).map(|number| number.to_string()).chain(["bridge".to_owned()]) {
            let _ = sh(&format!("ip netns del {PREFIX}-{name}"));
        }
    }

    fn dirs(&self, store: &str) -> Vec<PathBuf> {
        (1..=MEMBERS).map(|number| self.dir.join(format!("{store}-{number}"))).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.remove_namespaces();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A program inside a member's namespace.
fn inside(number: u64, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", Place::netns(number).0.display())).arg(program);
    command
}

/// What is measured.
pub(super) trait Store {
    /// Who leads, once somebody does.
    fn leader(&mut self) -> Result<Member>;
    /// Writers that ask a member, for a while; what they saw.
    fn load(&mut self, whom: Member, writers: usize, patience: Duration) -> Result<Value>;
    /// Kills the leader under writers that ask another; then starts it again. What they saw.
    fn kill_leader_under(&mut self, writers: usize) -> Result<Value>;
}

/// One of mesh's managers.
struct Manager {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Manager {
    fn start(number: u64, dir: &Path, resume: bool) -> Result<Self> {
        let mut command = inside(number, std::env::current_exe()?);
        command.args(["control-part", "node", "--number", &number.to_string(), "--dir"]).arg(dir);
        if resume {
            command.arg("--resume");
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = child.stdin.take().context("no standard input")?;
        let answers = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut manager = Self { child, orders, answers };
        let ready = manager.answer()?;
        ensure!(ready == "ready", "manager {number} says {ready:?}");
        Ok(manager)
    }

    fn say(&mut self, order: &str) -> Result<()> {
        Ok(writeln!(self.orders, "{order}")?)
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "a manager has ended");
        Ok(line.trim().to_owned())
    }

    fn ask(&mut self, order: &str) -> Result<String> {
        self.say(order)?;
        self.answer().with_context(|| format!("`{order}`"))
    }
}

/// mesh's managers.
pub(super) struct Mesh {
    dirs: Vec<PathBuf>,
    managers: Vec<Manager>,
}

impl Mesh {
    pub(super) fn start(place: &Place) -> Result<Self> {
        let dirs = place.dirs("mesh");
        node::certify(&dirs)?;
        let start = |(number, dir): (u64, &PathBuf)| Manager::start(number, dir, false);
        let managers = (1..).zip(&dirs).map(start).collect::<Result<_>>()?;
        let mut mesh = Self { dirs, managers };
        let first = mesh.manager(Member(1))?;
        first.ask("found")?;
        for number in 2..=MEMBERS {
            first.ask(&format!("add {number}"))?;
        }
        Ok(mesh)
    }

    fn manager(&mut self, of: Member) -> Result<&mut Manager> {
        self.managers.get_mut(of.0 as usize - 1).context("no such manager")
    }
}

impl Store for Rc<RefCell<Mesh>> {
    fn leader(&mut self) -> Result<Member> {
        let mut mesh = self.borrow_mut();
        until("mesh has no leader", || {
            let said: Result<Vec<_>> =
                mesh.managers.iter_mut().map(|manager| manager.ask("leader")).collect();
            let said = said?;
            let first = said.first().map_or("0", String::as_str);
            // All of them know: none is only starting.
            let agreed = first != "0" && said.iter().all(|of| of == first);
            Ok(if agreed { Some(Member(first.parse()?)) } else { None })
        })
    }

    fn load(&mut self, whom: Member, writers: usize, patience: Duration) -> Result<Value> {
        let mut mesh = self.borrow_mut();
        let order = format!("load {writers} {}", patience.as_millis());
        Ok(serde_json::from_str(&mesh.manager(whom)?.ask(&order)?)?)
    }

    fn kill_leader_under(&mut self, writers: usize) -> Result<Value> {
        let leader = self.leader()?;
        let mut mesh = self.borrow_mut();
        let order = format!("load {writers} {}", UNDER.as_millis());
        mesh.manager(leader.other())?.say(&order)?;
        std::thread::sleep(DIES_AFTER);
        mesh.manager(leader)?.child.kill()?;
        let seen = mesh.manager(leader.other())?.answer()?;
        mesh.manager(leader)?.child.wait()?;
        let again = Manager::start(leader.0, &mesh.dirs[leader.0 as usize - 1], true)?;
        *mesh.manager(leader)? = again;
        Ok(serde_json::from_str(&seen)?)
    }
}

/// etcd's members.
pub(super) struct Etcd {
    dirs: Vec<PathBuf>,
    members: Vec<Child>,
}

const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}

impl Etcd {
    pub(super) fn start(place: &Place) -> Result<Self> {
        let mut etcd = Self { dirs: place.dirs("etcd"), members: Vec::new() };
        for number in 1..=MEMBERS {
            let member = etcd.member(number)?;
            etcd.members.push(member);
        }
        Ok(etcd)
    }

    /// With the settings that it comes with.
    fn member(&self, number: u64) -> Result<Child> {
        let dir = &self.dirs[number as usize - 1];
        let log = fs::File::options().create(true).append(true).open(dir.with_extension("log"))?;
        let all: Vec<_> = (1..=MEMBERS).map(|n| format!("m{n}=http://{}:{PEERS}", ip(n))).collect();
        let (own, peer) =
            (format!("http://{}:{CLIENTS}", ip(number)), format!("http://{}:{PEERS}", ip(number)));
        inside(number, "etcd")
            .args(["--name", &format!("m{number}"), "--initial-cluster", &all.join(",")])
            .args(["--listen-client-urls", &own, "--advertise-client-urls", &own])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--log-level", "error", "--data-dir"])
            .arg(dir)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting etcd: `cargo xtask bench control` installs it")
    }

    fn write(whom: Member, writers: usize, patience: Duration) -> Result<Child> {
        let to = format!("{}:{CLIENTS}", ip(whom.0));
        Ok(inside(whom.0, std::env::current_exe()?)
            .args(["control-part", "etcd", "--to", &to, "--writers", &writers.to_string()])
            .args(["--millis", &patience.as_millis().to_string()])
            .stdout(Stdio::piped())
            .spawn()?)
    }
}

fn said(child: Child) -> Result<Value> {
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "the writers to etcd ended with {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

impl Store for Etcd {
    fn leader(&mut self) -> Result<Member> {
        until("etcd has no leader", || {
            let mut leaders = Vec::new();
            for number in 1..=MEMBERS {
                let url = format!("http://{}:{CLIENTS}/v3/maintenance/status", ip(number));
                let ask = format!("curl -s -m 1 -X POST {url} -d {{}}");
                let status = Place::netns(number).sh(&ask).unwrap_or_default();
                let status: Value = serde_json::from_str(&status).unwrap_or_default();
                let (own, leader) = (&status["header"]["member_id"], &status["leader"]);
                if leader.is_string() {
                    leaders.push((number, own == leader));
                }
            }
            let leads = leaders.iter().find(|(_, leads)| *leads).map(|(number, _)| Member(*number));
            Ok(leads.filter(|_| leaders.len() as u64 == MEMBERS))
        })
    }

    fn load(&mut self, whom: Member, writers: usize, patience: Duration) -> Result<Value> {
        said(Self::write(whom, writers, patience)?)
    }

    fn kill_leader_under(&mut self, writers: usize) -> Result<Value> {
        let leader = self.leader()?;
        let writing = Self::write(leader.other(), writers, UNDER)?;
        std::thread::sleep(DIES_AFTER);
        let member = &mut self.members[leader.0 as usize - 1];
        member.kill()?;
        member.wait()?;
        let seen = said(writing)?;
        self.members[leader.0 as usize - 1] = self.member(leader.0)?;
        Ok(seen)
    }
}

fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + START;
    while Instant::now() < deadline {
        if let Some(done) = attempt()? {
            return Ok(done);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("{what} within {START:?}")
}
