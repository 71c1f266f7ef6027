//! `meshd`: the daemon, and the small processes that it starts of itself: the resolver, and a shim
//! for each task.

use std::{fs, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context, Result};
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use meshd::{
    api, config,
    dns_process::DnsArgs,
    log::{self, LogFormat},
    metrics,
    node::Node,
    options::Options,
    service,
};
use tokio::signal::unix::{SignalKind, signal};

/// The node daemon of mesh.
#[derive(Debug, Parser)]
#[command(name = "meshd", version, about, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    other: Option<Other>,
    /// A file that sets what flags and the environment do not; /etc/mesh/meshd.toml if not given,
    /// which may be missing.
    #[arg(long, env = "MESH_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

/// Beside the daemon: what looks at its configuration, and processes that it starts of itself.
#[derive(Debug, Subcommand)]
enum Other {
    /// Prints what metrics there are.
    Metrics,
    /// Shows and checks the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The resolver of this node's tasks.
    #[command(hide = true)]
    Dns(DnsArgs),
    /// Keeps one task: its namespaces, its output, its exit status.
    #[command(hide = true)]
    TaskShim {
        /// The task's directory.
        dir: PathBuf,
    },
}

/// What can be done with a configuration.
#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Says what would be in effect, and where each value comes from; exit status 1 if something is
    /// wrong. Takes the daemon's flags.
    Check {
        /// The file; /etc/mesh/meshd.toml if not given, which may be missing.
        #[arg(env = "MESH_CONFIG")]
        file: Option<PathBuf>,
        /// How it is shown.
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
        #[command(flatten)]
        options: Box<Options>,
    },
    /// Prints a file of all keys: what they are for, and their defaults.
    Example,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.other {
        // Forks, so it comes before anything that has threads.
        Some(Other::TaskShim { dir }) => mesh_executor::shim::main(&dir).map_err(Into::into),
        Some(Other::Dns(args)) => {
            log::start("info", LogFormat::Text);
            args.run().map_err(Into::into)
        }
        Some(Other::Metrics) => {
            print!("{}", metrics::table());
            Ok(())
        }
        Some(Other::Config(command)) => configuration(&matches, command),
        None => config::effective(&matches, cli.config.as_deref())
            .map_err(Into::into)
            .and_then(|effective| daemon(effective.options)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in format!("{error:#}").lines() {
                eprintln!("meshd: {line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn configuration(matches: &ArgMatches, command: ConfigCommand) -> Result<()> {
    match command {
        ConfigCommand::Example => print!("{}", config::example()),
        ConfigCommand::Check { file, format, options: _ } => {
            let given = ["config", "check"].iter().try_fold(matches, |matches, name| {
                matches.subcommand_matches(name).context("no subcommand")
            })?;
            let effective = config::effective(given, file.as_deref())?;
            service::socket_group(effective.options.socket_group.as_deref())?;
            match format {
                Format::Table => print!("{}", config::table(&effective.settings)),
                Format::Json => println!("{}", serde_json::to_string_pretty(&effective.settings)?),
            }
        }
    }
    Ok(())
}

fn daemon(options: Options) -> Result<()> {
    log::start(&options.log, options.log_format);
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "meshd makes namespaces, links and BPF programs: run it as root"
    );
    service::take_descriptors();
    tokio::runtime::Builder::new_multi_thread()
        // One would do for the work, and idle on a fifth less; with two, what holds up one for a
        // moment holds up neither probes nor raft.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(serve(options))
}

async fn serve(options: Options) -> Result<()> {
    let group = service::socket_group(options.socket_group.as_deref())?;
    let listener = service::listen(&options.socket, group)?;
    let socket = options.socket.clone();
    let metrics = match options.metrics_addr {
        Some(address) => Some(metrics::server::listen(address).await?),
        None => None,
    };
    let node = Node::start(options).await?;
    if let Some(listener) = metrics {
        tokio::spawn(metrics::server::serve(listener, Arc::clone(&node) as _));
    }
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "serving");
    tokio::spawn(log::tell_left_out());
    service::notify("READY=1");
    tokio::select! {
        served = api::serve(listener, api::Limits::default(), Arc::clone(&node) as _) => {
            served.context("serving the API")?;
        }
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    service::notify("STOPPING=1");
    // Tasks, the resolver, and everything in the kernel go on.
    tracing::info!("stopping; tasks and traffic go on");
    let _ = fs::remove_file(&socket);
    Ok(())
}
