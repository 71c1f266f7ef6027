//! `meshd`: the daemon, and the small processes that it starts of itself: the resolver, and a shim
//! for each task.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use meshd::{api, dns_process::DnsArgs, node::Node, options::Options};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};
use tracing_subscriber::EnvFilter;

/// The node daemon of mesh.
#[derive(Debug, Parser)]
#[command(name = "meshd", version, about, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    helper: Option<Helper>,
    #[command(flatten)]
    options: Options,
}

/// Processes that the daemon starts of itself.
#[derive(Debug, Subcommand)]
enum Helper {
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

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.helper {
        // Forks, so it comes before anything that has threads.
        Some(Helper::TaskShim { dir }) => mesh_executor::shim::main(&dir).map_err(Into::into),
        Some(Helper::Dns(args)) => {
            log("info");
            args.run().map_err(Into::into)
        }
        None => daemon(cli.options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meshd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log(filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}

fn daemon(options: Options) -> Result<()> {
    EnvFilter::try_new(&options.log)
        .with_context(|| format!("`{}` is not a log filter", options.log))?;
    log(&options.log);
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "meshd makes namespaces, links and BPF programs: run it as root"
    );
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
    let listener = listen(&options.socket)?;
    let socket = options.socket.clone();
    let node = Node::start(options).await?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "serving");
    tokio::select! {
        served = api::serve(listener, api::Limits::default(), Arc::clone(&node) as _) => {
            served.context("serving the API")?;
        }
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    // Tasks, the resolver, and everything in the kernel go on.
    tracing::info!("stopping; tasks and traffic go on");
    let _ = fs::remove_file(&socket);
    Ok(())
}

/// A daemon that was killed has its socket until the last of its threads is gone.
const OLD_DAEMON_PATIENCE: Duration = Duration::from_secs(2);

/// Binds the API's socket, for root and the group of the daemon. A socket that an earlier daemon
/// left is replaced; one that somebody answers on is not.
fn listen(path: &Path) -> Result<UnixListener> {
    let parent = path.parent().context("the socket's path has no directory")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    let patient_until = Instant::now() + OLD_DAEMON_PATIENCE;
    while std::os::unix::net::UnixStream::connect(path).is_ok() {
        if Instant::now() >= patient_until {
            anyhow::bail!("another daemon serves {}: stop it first", path.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}
