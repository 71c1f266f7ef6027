//! A lab as its users handle it: up, what is in it, its daemons and links.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    capture, cluster, daemon,
    daemon::DaemonSignal,
    faults::{Faults, Impairment, Partition},
    host::{self, DirLock, Places},
    http, init, machine, preflight,
    topology::{self, LabName, MANAGERS_MAX, Member, Role, Topology, WORKERS_MAX},
    wire,
};

/// What `up` is asked for.
#[derive(Debug, Clone)]
pub struct UpOptions {
    /// How many machines, and the underlay's MTU.
    pub topology: Topology,
    /// Whether to form a cluster, or leave that to the user.
    pub cluster: bool,
    /// The `meshctl` that machines are run by; `meshd` is beside it.
    pub meshctl: PathBuf,
    /// Arguments added to every daemon's own.
    pub meshd_args: Vec<String>,
}

/// What is remembered of a lab. All else is found by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) topology: Topology,
    pub(crate) meshctl: PathBuf,
    pub(crate) meshd: PathBuf,
    pub(crate) meshd_args: Vec<String>,
    /// Names of the nodes that there are now.
    nodes: Vec<String>,
    #[serde(default)]
    pub(crate) faults: Faults,
}

impl Record {
    pub(crate) fn nodes(&self) -> impl Iterator<Item = Member> {
        self.nodes.iter().filter_map(|name| Member::named(name))
    }

    pub(crate) fn members(&self) -> Vec<Member> {
        self.nodes().chain(topology::outside()).collect()
    }

    pub(crate) fn read(places: &Places) -> Result<Self> {
        let path = places.record();
        let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
    }

    fn write(&self, places: &Places) -> Result<()> {
        host::write_whole(&places.record(), &serde_json::to_string_pretty(self)?)
    }
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// The daemon lives (client and router: the machine does).
    Running,
    /// The machine is up, its daemon is not.
    Stopped,
    /// The machine itself is gone.
    Crashed,
}

impl NodeState {
    /// The state as `lab ps` prints it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        }
    }
}

/// One machine in `lab ps`; the field names are a contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its name and hostname.
    pub name: String,
    /// What it is in the lab.
    pub role: Role,
    /// IPv4 address.
    pub address: std::net::Ipv4Addr,
    /// IPv6 address.
    pub address6: std::net::Ipv6Addr,
    /// Its network namespace.
    pub netns: String,
    /// The daemon, if it lives; none for client and router.
    pub pid: Option<i32>,
    /// What it is doing.
    pub state: NodeState,
    /// The API's socket; none for client and router.
    pub socket: Option<PathBuf>,
    /// The daemon's state directory; none for client and router.
    pub state_dir: Option<PathBuf>,
}

/// A lab that is up, or partly so.
#[derive(Debug, Clone)]
pub struct Lab {
    name: LabName,
    places: Places,
    record: Record,
}

impl Lab {
    /// Builds a lab and waits until its nodes are Ready; `progress` hears of every step done.
    ///
    /// A lab that fails to come up is left as it is, for a look at its logs; `down` clears it.
    ///
    /// # Errors
    /// Before anything was changed: without root, on a machine that lacks something, with a name
    /// that is taken. Later: with the step that failed, and the end of the log of its daemon.
    pub fn up(name: &LabName, options: UpOptions, progress: &dyn Fn(&str)) -> Result<Self> {
        let UpOptions { topology, cluster, meshctl, meshd_args } = options;
        topology.check()?;
        let meshd = meshctl.with_file_name("meshd");
        preflight::check(&meshd)?;
        let places = Places::of(name)?;
        ensure!(
            !places.record().exists(),
            "lab {name} exists already; `meshctl lab ps --name {name}` shows it, `meshctl lab \
             down --name {name}` removes it"
        );
        let Some(_lock) = DirLock::try_now(&places.run)? else {
            bail!("another `meshctl lab` is at work on lab {name}; try again when it is done");
        };
        let nodes = topology.nodes().map(|node| node.name).collect();
        let faults = Faults::default();
        let record = Record { topology, meshctl, meshd, meshd_args, nodes, faults };
        record.write(&places)?;
        let lab = Self { name: name.clone(), places, record };
        lab.build(progress)?;
        if cluster {
            lab.form_cluster(progress)?;
        }
        Ok(lab)
    }

    /// A lab that is there.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn open(name: &LabName) -> Result<Self> {
        let places = Places::of(name)?;
        ensure!(
            places.record().exists(),
            "there is no lab {name}; `meshctl lab up --name {name}` makes it"
        );
        let record = Record::read(&places)?;
        Ok(Self { name: name.clone(), places, record })
    }

    fn build(&self, progress: &dyn Fn(&str)) -> Result<()> {
        let Topology { mtu, .. } = self.record.topology;
        host::prepare_mounts()?;
        fs::create_dir_all(&self.places.state)
            .with_context(|| format!("make {}", self.places.state.display()))?;
        let members = self.members();
        in_parallel(&members, |m| {
            machine::boot(&self.record.meshctl, &self.name, &self.places, &m.name)
        })?;
        progress(&format!("{} machines: {}", members.len(), names(&members)));

        let router = machine::open_netns(&self.name, "router")?;
        wire::set_up_router(&router)?;
        for member in members.iter().filter(|m| m.role != Role::Router) {
            self.connect(member)?;
        }
        progress(&format!("underlay 192.0.2.0/24, 2001:db8:1::/64, MTU {mtu}"));

        let nodes = self.nodes();
        in_parallel(&nodes, |node| self.start_daemon(node, &[]))?;
        progress(&format!("{} daemons answer", nodes.len()));
        Ok(())
    }

    fn connect(&self, member: &Member) -> Result<()> {
        let router = machine::open_netns(&self.name, "router")?;
        let netns = machine::open_netns(&self.name, &member.name)?;
        wire::connect(&router, member, &netns, &self.record.topology)
    }

    fn start_daemon(&self, node: &Member, extra: &[&str]) -> Result<()> {
        let state_dir = self.places.state_dir(&node.name);
        fs::create_dir_all(&state_dir).with_context(|| format!("make {}", state_dir.display()))?;
        daemon::spawn(&self.record, &self.name, &self.places, &node.name, extra)?;
        daemon::wait_until_up(&self.places, &node.name)
    }

    fn form_cluster(&self, progress: &dyn Fn(&str)) -> Result<()> {
        let nodes = self.nodes();
        let (first, others) = nodes.split_first().context("a lab has at least one manager")?;
        cluster::init(&self.places, first)?;
        progress(&format!("cluster on {}", first.name));
        cluster::join(&self.places, first, others)?;
        if !others.is_empty() {
            progress(&format!("joined: {}", names(others)));
        }
        cluster::wait_until_ready(&self.places, first, &nodes)?;
        progress(&format!("{} nodes Ready", nodes.len()));
        Ok(())
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &LabName {
        &self.name
    }

    /// Where the lab keeps its things.
    #[must_use]
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// The size it was built with.
    #[must_use]
    pub fn topology(&self) -> Topology {
        self.record.topology
    }

    /// What is remembered of it now: another process may have made it grow or shrink.
    fn record_now(&self) -> Record {
        Record::read(&self.places).unwrap_or_else(|_| self.record.clone())
    }

    /// All machines that there are now.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.record_now().members()
    }

    /// The machines that run a daemon.
    #[must_use]
    pub fn nodes(&self) -> Vec<Member> {
        self.record_now().nodes().collect()
    }

    /// A machine by name.
    ///
    /// # Errors
    /// When the lab has no such machine.
    pub fn member(&self, name: &str) -> Result<Member> {
        let members = self.members();
        let list = names(&members);
        members
            .into_iter()
            .find(|m| m.name == name)
            .ok_or_else(|| anyhow!("lab {} has no machine {name:?}; it has {list}", self.name))
    }

    /// A machine with a daemon, by name.
    ///
    /// # Errors
    /// When the lab has no such node, or it is client or router.
    pub fn node(&self, name: &str) -> Result<Member> {
        let member = self.member(name)?;
        ensure!(member.role.is_node(), "{name} is no node of the cluster: it runs no daemon");
        Ok(member)
    }

    /// What every machine is and does.
    #[must_use]
    pub fn ps(&self) -> Vec<Row> {
        self.members().into_iter().map(|member| self.row(member)).collect()
    }

    fn row(&self, member: Member) -> Row {
        let Member { name, role, address, address6 } = member;
        let node = role.is_node();
        let pid = if node { daemon::pid(&self.places, &name) } else { None };
        let state = match machine::init_pid(&self.places, &name) {
            None => NodeState::Crashed,
            Some(_) if node && pid.is_none() => NodeState::Stopped,
            Some(_) => NodeState::Running,
        };
        Row {
            netns: self.name.netns(&name),
            socket: node.then(|| self.places.socket(&name)),
            state_dir: node.then(|| self.places.state_dir(&name)),
            pid: pid.map(nix::unistd::Pid::as_raw),
            name,
            role,
            address,
            address6,
            state,
        }
    }

    /// Asks a node's API.
    ///
    /// # Errors
    /// As [`http::call`].
    pub fn call(
        &self,
        node: &str,
        method: &str,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<serde_json::Value> {
        http::call(&self.places.socket(node), method, path, body)
    }

    /// A command that runs in a machine, as `meshctl lab exec` does.
    #[must_use]
    pub fn exec(&self, member: &str, command: &[&str]) -> Command {
        let mut exec = Command::new(&self.record.meshctl);
        exec.args(["lab", "--name", self.name.as_str(), "exec", member, "--"]).args(command);
        exec
    }

    /// Runs `work` on a thread inside a machine's network namespace: what it opens, it opens there.
    ///
    /// # Errors
    /// When there is no such machine, or it is down, and those of `work`.
    pub fn inside<T: Send>(
        &self,
        member: &str,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let netns = machine::open_netns(&self.name, &self.member(member)?.name)?;
        wire::on_thread_in(&netns, work)
    }

    /// The same inside the network namespace at `path`: a task's, say.
    ///
    /// # Errors
    /// When there is no such namespace, and those of `work`.
    pub fn inside_netns<T: Send>(
        path: &Path,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let netns = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
        wire::on_thread_in(&netns, work)
    }

    /// The command line of a node's daemon, to be executed in its machine.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn daemon_command(&self, node: &str, extra: &[String]) -> Result<Command> {
        Ok(daemon::command(&self.record, &self.places, &self.node(node)?, extra))
    }

    /// Ends a node's daemon if it runs, and starts it with arguments added to its own, this once.
    ///
    /// # Errors
    /// When there is no such node, its machine is down, or the daemon does not answer in time.
    pub fn restart_daemon_with(&self, node: &str, extra_args: &[&str]) -> Result<()> {
        let node = self.node(node)?;
        let _lock = DirLock::wait(&self.places.run)?;
        self.must_be_up(&node)?;
        daemon::end(&self.places, &node.name, DaemonSignal::Stop)?;
        self.start_daemon(&node, extra_args)
    }

    fn must_be_up(&self, node: &Member) -> Result<()> {
        let Member { name, .. } = node;
        ensure!(
            machine::init_pid(&self.places, name).is_some(),
            "{name} is down; `meshctl lab node {name} start` brings it back"
        );
        Ok(())
    }

    /// Ends a node's daemon; its tasks run on.
    ///
    /// # Errors
    /// When there is no such node, or the daemon does not end in time.
    pub fn end_daemon(&self, node: &str, how: DaemonSignal) -> Result<()> {
        let node = self.node(node)?;
        let _lock = DirLock::wait(&self.places.run)?;
        daemon::end(&self.places, &node.name, how)
    }

    /// Starts a node's daemon, and before it the machine if that is gone. One that runs is left.
    ///
    /// # Errors
    /// When there is no such node, or the daemon does not answer in time.
    pub fn start(&self, node: &str) -> Result<()> {
        let node = self.node(node)?;
        let _lock = DirLock::wait(&self.places.run)?;
        if machine::init_pid(&self.places, &node.name).is_none() {
            self.clear_machine(&node)?;
            machine::boot(&self.record.meshctl, &self.name, &self.places, &node.name)?;
            self.connect(&node)?;
            let (router, netns) = self.ends(&node.name)?;
            self.record_now().faults.impair_link(&router, &netns, &node.name)?;
        }
        if daemon::pid(&self.places, &node.name).is_none() {
            self.start_daemon(&node, &[])?;
        }
        Ok(())
    }

    /// The sudden death of a machine; only its disk, the state directory, stays.
    ///
    /// # Errors
    /// When there is no such node, or something of it will not go.
    pub fn crash(&self, node: &str) -> Result<()> {
        let node = self.node(node)?;
        let _lock = DirLock::wait(&self.places.run)?;
        self.clear_machine(&node)
    }

    /// The link first: nothing that the dying machine does in its last moment gets out.
    fn clear_machine(&self, node: &Member) -> Result<()> {
        if host::netns_path(&self.name.netns(&node.name)).exists() {
            let router = machine::open_netns(&self.name, "router")?;
            if let Err(e) = wire::remove_port(&router, &node.name) {
                // A crash of a crashed node: its link is gone.
                ensure!(machine::init_pid(&self.places, &node.name).is_none(), "{e:#}");
            }
        }
        crate::down::remove_machine(&self.name, &self.places, &node.name)?;
        let socket = self.places.socket(&node.name);
        match fs::remove_file(&socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("remove {}", socket.display()))
            }
            _ => Ok(()),
        }
    }

    /// Cuts or restores a node's underlay link.
    ///
    /// # Errors
    /// When there is no such node, or its machine is down.
    pub fn set_link(&self, node: &str, up: bool) -> Result<()> {
        let node = self.node(node)?;
        let _lock = DirLock::wait(&self.places.run)?;
        self.must_be_up(&node)?;
        wire::set_port(&machine::open_netns(&self.name, "router")?, &node.name, up)
    }

    /// The namespaces of the two ends of a node's link: the switch's, the node's.
    fn ends(&self, node: &str) -> Result<(fs::File, fs::File)> {
        Ok((machine::open_netns(&self.name, "router")?, machine::open_netns(&self.name, node)?))
    }

    /// Splits the underlay into groups of machines that do not reach each other; with `one_way`
    /// only what the first group sends to the others is lost. It takes the place of an earlier
    /// partition. A machine in no group reaches all and is reached by all; the client is behind
    /// the router and is cut off with it, if that is named.
    ///
    /// # Errors
    /// Before anything was changed: with fewer than two groups, and names that are unknown or
    /// twice there.
    pub fn partition(&self, groups: &[Vec<String>], one_way: bool) -> Result<()> {
        let _lock = DirLock::wait(&self.places.run)?;
        let mut record = Record::read(&self.places)?;
        record.faults.partition = Some(Partition::new(groups, one_way, &record.members())?);
        self.apply_faults(&record)
    }

    /// Ends a partition; without one there is nothing to do. Impaired links stay so.
    ///
    /// # Errors
    /// When the switch will not change.
    pub fn heal(&self) -> Result<()> {
        let _lock = DirLock::wait(&self.places.run)?;
        let mut record = Record::read(&self.places)?;
        record.faults.partition = None;
        self.apply_faults(&record)
    }

    /// Makes the switch do as the record says, and remembers it.
    fn apply_faults(&self, record: &Record) -> Result<()> {
        record.faults.apply(&machine::open_netns(&self.name, "router")?)?;
        record.write(&self.places)
    }

    /// Makes a node's link bad, in place of what was wrong with it before.
    ///
    /// # Errors
    /// Before anything was changed: when there is no such node, its machine is down, or this
    /// machine cannot do what is asked.
    pub fn impair(&self, node: &str, impairment: Impairment) -> Result<()> {
        let node = self.node(node)?;
        impairment.check()?;
        let _lock = DirLock::wait(&self.places.run)?;
        self.must_be_up(&node)?;
        let mut record = Record::read(&self.places)?;
        let (router, netns) = self.ends(&node.name)?;
        record.faults.impaired.insert(node.name.clone(), impairment);
        record.faults.impair_link(&router, &netns, &node.name)?;
        self.apply_faults(&record)
    }

    /// Makes a node's link good again.
    ///
    /// # Errors
    /// When there is no such node, or its machine is down.
    pub fn clear(&self, node: &str) -> Result<()> {
        let node = self.node(node)?;
        let _lock = DirLock::wait(&self.places.run)?;
        self.must_be_up(&node)?;
        let mut record = Record::read(&self.places)?;
        let (router, netns) = self.ends(&node.name)?;
        record.faults.clear_link(&router, &netns, &node.name)?;
        self.apply_faults(&record)
    }

    /// Writes what a node's underlay link carries to `out` as pcap, until `stop` is readable.
    ///
    /// # Errors
    /// When there is no such node, its machine is down, or `out` takes no more.
    pub fn capture(
        &self,
        node: &str,
        out: &mut (dyn Write + Send),
        stop: std::os::fd::BorrowedFd<'_>,
    ) -> Result<()> {
        let node = self.node(node)?;
        self.must_be_up(&node)?;
        let netns = machine::open_netns(&self.name, &node.name)?;
        wire::on_thread_in(&netns, || capture::run(wire::UPLINK, out, stop))
            .with_context(|| format!("capture on {}", node.name))
    }

    /// Adds the next node that is free. If the lab has a cluster the node joins it, and is waited
    /// for until it is Ready.
    ///
    /// # Errors
    /// When the lab is full, the cluster has no majority, or the node does not come up.
    pub fn add_node(&self, role: Role) -> Result<Member> {
        let (letter, max) = match role {
            Role::Manager => ('m', MANAGERS_MAX),
            Role::Worker => ('w', WORKERS_MAX),
            Role::Client | Role::Router => bail!("a lab has one client and one router"),
        };
        let _lock = DirLock::wait(&self.places.run)?;
        let mut record = Record::read(&self.places)?;
        let others: Vec<_> = record.nodes().collect();
        let free = (1..=max).map(|number| format!("{letter}{number}"));
        let node = free
            .filter(|name| !record.nodes.contains(name))
            .find_map(|name| Member::named(&name))
            .with_context(|| format!("lab {} has {max} {letter}s, and takes no more", self.name))?;
        let in_cluster = others.iter().any(|other| cluster::is_in_one(&self.places, other));
        let manager = cluster::find_manager(&self.places, &others);
        ensure!(
            manager.is_some() || !in_cluster,
            "no manager of lab {} has a majority behind it, so nobody can join. Nothing was changed",
            self.name
        );
        record.nodes.push(node.name.clone());
        record.nodes.sort_by_key(|name| Member::named(name).map(|node| node.address));
        record.write(&self.places)?;
        init::update_hosts(&self.places, &record.members())?;
        machine::boot(&self.record.meshctl, &self.name, &self.places, &node.name)?;
        self.connect(&node)?;
        self.start_daemon(&node, &[])?;
        if let Some(manager) = manager {
            cluster::join(&self.places, manager, std::slice::from_ref(&node))?;
            cluster::wait_until_ready(&self.places, manager, std::slice::from_ref(&node))?;
        }
        Ok(node)
    }

    /// Takes a node out of the cluster, then out of the lab, with all that it has.
    ///
    /// # Errors
    /// Before anything was changed: when there is no such node, it is the last manager, or no other
    /// manager can remove it. Later: when the node does not leave, or something of it will not go.
    pub fn remove_node(&self, node: &str) -> Result<()> {
        let node = self.node(node)?;
        let _lock = DirLock::wait(&self.places.run)?;
        let mut record = Record::read(&self.places)?;
        let others: Vec<_> = record.nodes().filter(|other| *other != node).collect();
        ensure!(
            others.iter().any(|other| other.role == Role::Manager),
            "{} is the last manager of lab {}; `meshctl lab down` removes the whole lab",
            node.name,
            self.name
        );
        let in_cluster = std::iter::once(&node).chain(&others);
        if in_cluster.into_iter().any(|one| cluster::is_in_one(&self.places, one)) {
            let manager = cluster::find_manager(&self.places, &others).with_context(|| {
                format!("no other manager can remove {}. Nothing was changed", node.name)
            })?;
            let runs = cluster::is_in_one(&self.places, &node);
            cluster::remove(&self.places, manager, &node, runs)?;
        }
        self.clear_machine(&node)?;
        let state = self.places.state_dir(&node.name);
        if state.exists() {
            fs::remove_dir_all(&state).with_context(|| format!("remove {}", state.display()))?;
        }
        for dir in [&self.places.run, &self.places.state] {
            let prefix = format!("{}.", node.name);
            for file in host::list(dir)?.iter().filter(|file| file.starts_with(&prefix)) {
                let path = dir.join(file);
                fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            }
        }
        record.nodes.retain(|name| *name != node.name);
        record.faults.forget(&node.name);
        self.apply_faults(&record)?;
        init::update_hosts(&self.places, &record.members())
    }

    /// The `meshctl` that this lab's machines are run by.
    #[must_use]
    pub fn meshctl(&self) -> &Path {
        &self.record.meshctl
    }
}

fn names(members: &[Member]) -> String {
    members.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// Does `work` for all members at once; the first error counts.
fn in_parallel(members: &[Member], work: impl Fn(&Member) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let workers: Vec<_> = members.iter().map(|m| scope.spawn(|| work(m))).collect();
        workers.into_iter().try_for_each(|w| w.join().map_err(|_| anyhow!("a step panicked"))?)
    })
}
