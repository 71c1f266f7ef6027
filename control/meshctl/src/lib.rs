//! `meshctl`: the operator's command line, a client of the same API as the stock `docker` CLI, and
//! the entry to labs.
//!
//! Exit status: 0; 1 when the daemon refused or cannot be reached; 124 when `wait` ran out of time;
//! 125 for a bad command line; `task exec` and `lab exec` pass on that of the command.

mod client;
mod complete;
mod events;
#[cfg(fuzzing)]
pub mod fuzz;
mod lab;
mod network;
mod node;
mod output;
mod role;
mod service;
mod settings;
mod since;
mod status;
mod swarm;
mod system;
mod task;
mod unknown;
mod wait;
mod whoami;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{
    ArgAction, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    builder::BoolishValueParser, error::ErrorKind,
};

use client::Client;

/// Docker's status for a command line that makes no sense.
const USAGE: u8 = 125;

/// That of timeout(1).
const TIMED_OUT: u8 = 124;

/// Operate a mesh cluster.
///
/// The daemon that is spoken to: --host, else MESH_HOST, else DOCKER_HOST, else
/// unix:///run/mesh/mesh.sock. Each is `unix://PATH`.
///
/// Exit status: 0; 1 when the daemon refused or cannot be reached; 124 when `wait` ran out of time;
/// 125 for a bad command line; `task exec` and `lab exec` pass on that of the command. Colours are
/// for terminals, and not where NO_COLOR is set.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, about, max_term_width = 100, disable_help_subcommand = true)]
#[command(args_override_self = true)]
struct Cli {
    /// The daemon's socket; else that in MESH_HOST, in DOCKER_HOST, or unix:///run/mesh/mesh.sock
    #[arg(short = 'H', long, value_name = "URL")]
    host: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the versions of meshctl and of the daemon
    Version(system::FormatArgs),
    /// Show what the daemon knows of itself and its cluster
    Info(system::FormatArgs),
    /// Make, join and leave clusters
    #[command(subcommand)]
    Swarm(swarm::Command),
    /// Look at nodes and change them
    #[command(subcommand)]
    Node(node::Command),
    /// Make and remove overlay networks
    #[command(subcommand)]
    Network(network::Command),
    /// Run and scale services
    #[command(subcommand)]
    Service(service::Command),
    /// Show what happens in the cluster, as it happens
    ///
    /// Services, nodes and networks that come, change and go. What becomes of tasks is shown with
    /// `--filter type=task`.
    Events(events::EventsArgs),
    /// Show the cluster on one screen: quorum, nodes, services, networks, warnings
    Status(status::StatusArgs),
    #[command(subcommand)]
    Wait(wait::Command),
    /// Reach into tasks
    #[command(subcommand)]
    Task(task::Command),
    /// Build whole clusters on this machine
    Lab(lab::LabArgs),
    /// Answer requests with who was asked: the workload of tests
    Whoami(whoami::WhoamiArgs),
    /// Print the script that completes verbs, flags and names in a shell
    Completion {
        /// Which; run its output in the shell's start-up file
        shell: complete::Shell,
    },
    /// Print a manual page: `meshctl man service create | man -l -`
    Man(complete::ManArgs),
}

/// The program.
pub fn main() -> ExitCode {
    complete::answer_shell(Cli::command);
    let raw: Vec<String> = std::env::args().collect();
    let cli = match parse(&raw) {
        Ok(cli) => cli,
        Err(err) => return usage(&err, &raw),
    };
    match run(cli, &raw) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("{}", output::error_text(&err));
            ExitCode::from(match () {
                () if err.is::<Usage>() => USAGE,
                () if err.is::<wait::TimedOut>() => TIMED_OUT,
                () => 1,
            })
        }
    }
}

/// The command line; as in the stock CLI, `--detach=false` is another word for leaving it out.
fn parse(raw: &[String]) -> Result<Cli, clap::Error> {
    match Cli::try_parse_from(raw) {
        Err(err) if err.kind() == ErrorKind::TooManyValues => {
            // The other reading has worse help: it is for those who need it.
            let matches = with_valued_switches(Cli::command()).try_get_matches_from(raw);
            matches.and_then(|matches| Cli::from_arg_matches(&matches)).map_err(|_| err)
        }
        parsed => parsed,
    }
}

fn with_valued_switches(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| match arg.get_action() {
        ArgAction::SetTrue => arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_value("false")
            .default_missing_value("true")
            .value_parser(BoolishValueParser::new()),
        _ => arg,
    });
    command.mut_subcommands(with_valued_switches)
}

/// A command line that clap accepts and that makes no sense all the same.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

fn usage(err: &clap::Error, raw: &[String]) -> ExitCode {
    match unknown::explain(err, raw) {
        Some(text) => eprintln!("error: {text}"),
        // Nothing can be done about a terminal that is gone.
        None => drop(err.print()),
    }
    if err.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS }
}

/// Labs and whoami start before any runtime: a process with threads cannot change namespaces.
fn run(cli: Cli, raw: &[String]) -> Result<ExitCode> {
    let command = match cli.command {
        Command::Lab(args) => return lab::run(args),
        Command::Whoami(args) => return whoami::run(args).map(|()| ExitCode::SUCCESS),
        Command::Completion { shell } => {
            return complete::script(shell).map(|()| ExitCode::SUCCESS);
        }
        Command::Man(args) => {
            return complete::man(&args, Cli::command()).map(|()| ExitCode::SUCCESS);
        }
        other => other,
    };
    let client = Client::new(cli.host.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(async {
        match command {
            Command::Version(args) => system::version(&client, args).await,
            Command::Info(args) => system::info(&client, args).await,
            Command::Swarm(command) => swarm::run(&client, command).await,
            Command::Node(command) => node::run(&client, command).await,
            Command::Network(command) => network::run(&client, command).await,
            Command::Service(command) => service::run(&client, command, raw).await,
            Command::Task(command) => return task::run(&client, command).await,
            Command::Events(args) => events::run(&client, args).await,
            Command::Status(args) => status::run(&client, args).await,
            Command::Wait(command) => wait::run(&client, command).await,
            Command::Lab(_) | Command::Whoami(_) | Command::Completion { .. } | Command::Man(_) => {
                unreachable!("handled above")
            }
        }
        .map(|()| ExitCode::SUCCESS)
    });
    // A read of standard input may still block a thread.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        with_valued_switches(Cli::command()).debug_assert();
    }

    #[test]
    fn switches_take_values_and_flags_are_given_again() {
        let parsed = |line: &str| parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let quiet = |line: &str| match parsed(line).unwrap().command {
            Command::Node(node::Command::Ls(args)) => args.quiet,
            _ => panic!("{line}"),
        };
        assert!(quiet("meshctl node ls --quiet=true"));
        assert!(quiet("meshctl node ls -q -q --filter name=x --filter id=y"));
        assert!(!quiet("meshctl node ls --quiet=false"));
        assert!(!quiet("meshctl node ls --quiet --quiet=0"));
        let err = parsed("meshctl node ls --quiet=maybe").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::TooManyValues);
    }
}
