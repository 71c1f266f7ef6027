//! A lab as its users handle it: up, what is in it, its daemons and links.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    cluster, daemon,
    daemon::DaemonSignal,
    host::{self, DirLock, Places},
    http, machine, preflight,
    topology::{LabName, Member, Role, Topology},
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
}

impl Record {
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
        let record = Record { topology, meshctl, meshd, meshd_args };
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
        in_parallel(&nodes, |node| self.start_daemon(node))?;
        progress(&format!("{} daemons answer", nodes.len()));
        Ok(())
    }

    fn connect(&self, member: &Member) -> Result<()> {
        let router = machine::open_netns(&self.name, "router")?;
        let netns = machine::open_netns(&self.name, &member.name)?;
        wire::connect(&router, member, &netns, &self.record.topology)
    }

    fn start_daemon(&self, node: &Member) -> Result<()> {
        let state_dir = self.places.state_dir(&node.name);
        fs::create_dir_all(&state_dir).with_context(|| format!("make {}", state_dir.display()))?;
        daemon::spawn(&self.record, &self.name, &self.places, &node.name)?;
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

    /// All machines.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.record.topology.members()
    }

    /// The machines that run a daemon.
    #[must_use]
    pub fn nodes(&self) -> Vec<Member> {
        self.record.topology.nodes().collect()
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

    /// The command line of a node's daemon, to be executed in its machine.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn daemon_command(&self, node: &str) -> Result<Command> {
        Ok(daemon::command(&self.record, &self.places, &self.node(node)?))
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
        }
        if daemon::pid(&self.places, &node.name).is_none() {
            self.start_daemon(&node)?;
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
        ensure!(
            machine::init_pid(&self.places, &node.name).is_some(),
            "{} is down; `meshctl lab node {} start` brings it back",
            node.name,
            node.name
        );
        wire::set_port(&machine::open_netns(&self.name, "router")?, &node.name, up)
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
