//! `meshctl lab`: the command line of the lab library. Its names and outputs are a contract with
//! scripts of others.
//!
//! It ignores `MESH_HOST` and `DOCKER_HOST`: a lab is always on this machine. Two commands are
//! hidden: `init` is what a machine of a lab runs as, `daemon` turns into its `meshd`. [`run`] must
//! be called before any thread is started, since only a process of one thread can change mount
//! namespaces.

use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use mesh_lab::{DaemonSignal, Impairment, Lab, LabName, Role, Row, Share, Topology, UpOptions};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::SignalFd,
};

/// What tells `meshctl` and `docker` which daemon to speak to.
const HOST_VARIABLES: [&str; 2] = ["MESH_HOST", "DOCKER_HOST"];

/// Whole clusters on this machine, in network namespaces.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// The lab's name; several run side by side.
    #[arg(long, global = true, default_value = "lab", value_name = "NAME")]
    name: LabName,
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Build a lab and wait until all its nodes are Ready
    Up(UpArgs),
    /// List the machines of a lab
    Ps {
        /// `table` or `json`
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Run a command inside a machine of the lab
    Exec {
        /// A node, `client` or `router`
        node: String,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Print what makes `meshctl` and `docker` on the host speak to a node
    Env {
        /// The node
        node: String,
    },
    /// Stop, start, restart or kill a node's daemon, or crash the whole node
    Node {
        /// The node
        node: String,
        /// What happens to it
        action: NodeAction,
    },
    /// Cut or restore a node's underlay link
    Link {
        /// The node
        node: String,
        #[command(subcommand)]
        action: LinkAction,
    },
    /// Split the underlay into groups
    ///
    /// Groups are lists such as `m1,w1`. Who is in no group reaches all and is reached by all;
    /// the client is behind the router, and is cut off with it if that is named. A partition takes
    /// the place of an earlier one.
    Partition {
        /// Two groups or more
        #[arg(required = true, value_name = "GROUP")]
        groups: Vec<String>,
        /// Only what the first group sends to the others is lost
        #[arg(long)]
        one_way: bool,
    },
    /// End a partition
    Heal,
    /// Capture a node's underlay traffic
    Capture {
        /// The node
        node: String,
        /// Write it to FILE; without it, to the standard output if that is no terminal
        #[arg(short, long, value_name = "FILE")]
        write: Option<PathBuf>,
    },
    /// Add a node to a running lab
    AddNode {
        /// A manager in place of a worker
        #[arg(long)]
        manager: bool,
    },
    /// Remove a node from a running lab
    RmNode {
        /// The node
        node: String,
    },
    /// Remove a lab and everything that it left
    Down {
        /// Every lab on this machine
        #[arg(long)]
        all: bool,
    },
    /// What a machine of a lab runs as
    #[command(hide = true)]
    Init { machine: String },
    /// Turns into the daemon of a node
    #[command(hide = true)]
    Daemon {
        node: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        extra: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct UpArgs {
    /// Managers, 1 to 9
    #[arg(long, default_value_t = 3, value_name = "N")]
    managers: u8,
    /// Workers, 0 to 79
    #[arg(long, default_value_t = 2, value_name = "N")]
    workers: u8,
    /// MTU of the underlay links
    #[arg(long, default_value_t = 1500, value_name = "BYTES")]
    mtu: u32,
    /// Start the daemons only, for trying `swarm init` and `swarm join` by hand
    #[arg(long)]
    no_cluster: bool,
    /// An argument added to every daemon's own (repeat it for more); those in the environment
    /// variable MESH_LAB_MESHD_ARGS, separated by blanks, come first
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    meshd_arg: Vec<String>,
}

/// In place of what was wrong with the link before; in each direction, by wire packet.
#[derive(Debug, Args)]
struct ImpairArgs {
    /// Packets dropped (5%)
    #[arg(long, value_name = "SHARE")]
    loss: Option<Share>,
    /// Packets come so much later (20ms)
    #[arg(long, value_name = "TIME", value_parser = mesh_lab::parse_delay)]
    delay: Option<Duration>,
    /// The delay varies by so much (5ms)
    #[arg(long, value_name = "TIME", value_parser = mesh_lab::parse_delay)]
    jitter: Option<Duration>,
    /// Packets that overtake the delayed ones (1%)
    #[arg(long, value_name = "SHARE")]
    reorder: Option<Share>,
    /// Packets that come twice (1%)
    #[arg(long, value_name = "SHARE")]
    duplicate: Option<Share>,
    /// Bits per second at most (100mbit)
    #[arg(long, value_name = "RATE", value_parser = mesh_lab::parse_rate)]
    rate: Option<u64>,
}

impl From<ImpairArgs> for Impairment {
    fn from(args: ImpairArgs) -> Self {
        let ImpairArgs { loss, delay, jitter, reorder, duplicate, rate } = args;
        Self { loss, delay, jitter, reorder, duplicate, rate }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum NodeAction {
    /// SIGTERM to the daemon; tasks run on
    Stop,
    /// Start the daemon, and a crashed node
    Start,
    /// Stop, then start
    Restart,
    /// SIGKILL to the daemon
    Kill,
    /// The sudden death of the machine; only its state directory stays
    Crash,
}

#[derive(Debug, Subcommand)]
enum LinkAction {
    /// Cut it
    Down,
    /// Restore it
    Up,
    /// Make it lossy, slow or narrow, in both directions
    Impair(ImpairArgs),
    /// End what `impair` began
    Clear,
}

/// Runs one `meshctl lab` command. `exec` does not come back: the process becomes the command.
pub(crate) fn run(args: LabArgs) -> Result<ExitCode> {
    let LabArgs { name, command } = args;
    match command {
        LabCommand::Up(args) => up(&name, args)?,
        LabCommand::Ps { format } => ps(&Lab::open(&name)?.ps(), format)?,
        LabCommand::Exec { node, command } => return exec(&name, &node, &command),
        LabCommand::Env { node } => {
            let lab = Lab::open(&name)?;
            let socket = lab.places().socket(&lab.node(&node)?.name);
            for variable in HOST_VARIABLES {
                say(&format!("export {variable}=unix://{}\n", socket.display()))?;
            }
        }
        LabCommand::Node { node, action } => node_action(&Lab::open(&name)?, &node, action)?,
        LabCommand::Link { node, action } => match action {
            LinkAction::Down => Lab::open(&name)?.set_link(&node, false)?,
            LinkAction::Up => Lab::open(&name)?.set_link(&node, true)?,
            LinkAction::Impair(args) => Lab::open(&name)?.impair(&node, args.into())?,
            LinkAction::Clear => Lab::open(&name)?.clear(&node)?,
        },
        LabCommand::Partition { groups, one_way } => {
            let names = |group: &String| group.split(',').map(str::to_owned).collect();
            let groups: Vec<_> = groups.iter().map(names).collect();
            Lab::open(&name)?.partition(&groups, one_way)?;
        }
        LabCommand::Heal => Lab::open(&name)?.heal()?,
        LabCommand::Capture { node, write } => capture(&Lab::open(&name)?, &node, write)?,
        LabCommand::AddNode { manager } => {
            let role = if manager { Role::Manager } else { Role::Worker };
            let node = Lab::open(&name)?.add_node(role)?;
            say(&format!("{}\n", node.name))?;
        }
        LabCommand::RmNode { node } => Lab::open(&name)?.remove_node(&node)?,
        LabCommand::Down { all: false } => down(&name)?,
        LabCommand::Down { all: true } => down_all()?,
        LabCommand::Init { machine } => mesh_lab::run_init(&name, &machine)?,
        LabCommand::Daemon { node, extra } => return Err(daemon(&name, &node, &extra)?),
    }
    Ok(ExitCode::SUCCESS)
}

/// Captures until Ctrl-C or SIGTERM, which then are no deaths but a word to stop.
fn capture(lab: &Lab, node: &str, file: Option<PathBuf>) -> Result<()> {
    if file.is_none() && io::stdout().is_terminal() {
        bail!(
            "pcap is nothing to read on a terminal: write it to a file with -w FILE, or pipe it \
             (… | tcpdump -nr -)"
        );
    }
    lab.node(node)?;
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("block signals")?;
    let stop = SignalFd::new(&signals).context("wait for signals")?;
    let mut out: Box<dyn Write + Send> = match &file {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
            Box::new(io::BufWriter::new(file))
        }
        None => Box::new(io::BufWriter::new(io::stdout())),
    };
    lab.capture(node, &mut out, stop.as_fd())
}

fn up(name: &LabName, args: UpArgs) -> Result<()> {
    let UpArgs { managers, workers, mtu, no_cluster, meshd_arg } = args;
    let from_environment = std::env::var("MESH_LAB_MESHD_ARGS").unwrap_or_default();
    let meshd_args = from_environment.split_whitespace().map(str::to_owned).chain(meshd_arg);
    let options = UpOptions {
        topology: Topology { managers, workers, mtu },
        cluster: !no_cluster,
        meshctl: this_binary()?,
        meshd_args: meshd_args.collect(),
    };
    let begin = Instant::now();
    let progress = |step: &str| {
        println!("{} {step:<58} {:>6.2} s", tick(), begin.elapsed().as_secs_f64());
    };
    Lab::up(name, options, &progress)?;
    let named = if name.as_str() == "lab" { String::new() } else { format!(" --name {name}") };
    println!(
        "lab {name} is up; `eval $(meshctl lab env m1{named})` points meshctl and docker at it"
    );
    Ok(())
}

fn tick() -> &'static str {
    if io::stdout().is_terminal() { "\x1b[32m✓\x1b[0m" } else { "✓" }
}

fn this_binary() -> Result<PathBuf> {
    std::env::current_exe().context("find this binary, beside which meshd is")
}

fn ps(rows: &[Row], format: Format) -> Result<()> {
    match format {
        Format::Json => {
            let text = serde_json::to_string_pretty(rows).context("print the machines")?;
            say(&format!("{text}\n"))
        }
        Format::Table => say(&table(rows)),
    }
}

/// Prints; a reader that has gone (`| head`) is no error.
fn say(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("print"),
        _ => Ok(()),
    }
}

fn table(rows: &[Row]) -> String {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let heads =
        ["NAME", "ROLE", "ADDRESS", "ADDRESS6", "NETNS", "PID", "STATE", "SOCKET", "STATE DIR"];
    let mut lines = vec![heads.map(str::to_owned)];
    lines.extend(rows.iter().map(|row| {
        [
            row.name.clone(),
            row.role.as_str().to_owned(),
            row.address.to_string(),
            row.address6.to_string(),
            row.netns.clone(),
            or_dash(row.pid.map(|pid| pid.to_string())),
            row.state.as_str().to_owned(),
            or_dash(row.socket.as_ref().map(|path| path.display().to_string())),
            or_dash(row.state_dir.as_ref().map(|path| path.display().to_string())),
        ]
    }));
    let widths: Vec<usize> = (0..heads.len())
        .map(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for line in &lines {
        let cells: Vec<_> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// Becomes `command` inside the machine: stdin, signals and the exit status are its own.
fn exec(name: &LabName, machine: &str, command: &[String]) -> Result<ExitCode> {
    /// What shells answer for a command that is not there, and for one that cannot be executed.
    const NOT_FOUND: u8 = 127;
    const NOT_EXECUTABLE: u8 = 126;
    let lab = Lab::open(name)?;
    let member = lab.member(machine)?;
    mesh_lab::enter(name, lab.places(), machine)?;
    let (program, arguments) = command.split_first().context("no command given")?;
    let mut process = Command::new(program);
    process.args(arguments).env("PATH", path_with(lab.meshctl().parent()));
    let host = format!("unix://{}", lab.places().socket(machine).display());
    for variable in HOST_VARIABLES {
        if member.role.is_node() {
            process.env(variable, &host);
        } else {
            process.env_remove(variable);
        }
    }
    let error = process.exec();
    eprintln!("meshctl: run {program} on {machine}: {error}");
    let missing = error.kind() == io::ErrorKind::NotFound;
    Ok(ExitCode::from(if missing { NOT_FOUND } else { NOT_EXECUTABLE }))
}

/// The PATH with meshctl's own directory at its end, so that a lab's machines know `meshctl`.
fn path_with(dir: Option<&std::path::Path>) -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::env::split_paths(&path).chain(dir.map(PathBuf::from));
    std::env::join_paths(all).unwrap_or(path)
}

/// Becomes the daemon of a node; only an error comes back.
fn daemon(name: &LabName, node: &str, extra: &[String]) -> Result<anyhow::Error> {
    let lab = Lab::open(name)?;
    let mut meshd = lab.daemon_command(node, extra)?;
    mesh_lab::enter(name, lab.places(), node)?;
    std::env::set_current_dir("/").context("go to /")?;
    let error = meshd.exec();
    Ok(anyhow::Error::new(error).context(format!("start {}", meshd.get_program().display())))
}

fn node_action(lab: &Lab, node: &str, action: NodeAction) -> Result<()> {
    match action {
        NodeAction::Stop => lab.end_daemon(node, DaemonSignal::Stop),
        NodeAction::Kill => lab.end_daemon(node, DaemonSignal::Kill),
        NodeAction::Start => lab.start(node),
        NodeAction::Restart => {
            lab.end_daemon(node, DaemonSignal::Stop)?;
            lab.start(node)
        }
        NodeAction::Crash => lab.crash(node),
    }
}

fn down(name: &LabName) -> Result<()> {
    if mesh_lab::down(name)? {
        println!("lab {name} is removed");
    } else {
        println!("lab {name}: nothing to remove");
    }
    Ok(())
}

fn down_all() -> Result<()> {
    let mut failed = Vec::new();
    for name in mesh_lab::known_labs()? {
        if let Err(e) = down(&name) {
            failed.push(format!("{e:#}"));
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}
