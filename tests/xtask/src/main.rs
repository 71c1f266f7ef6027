//! `cargo xtask`: the automation of this repository. It depends on no crate of the workspace, since
//! it installs what the others need to build.

mod demo;
mod ebpf;
mod fuzz;
mod nightly;
mod peer;
mod setup;
mod shell;
mod test;
mod vm;

use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Set-up, demo, tests and benchmarks of mesh.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring up five nodes on this machine and prove what they do, line by line
    Demo {
        /// Leave the lab up, and print what to try in it
        #[arg(long)]
        keep: bool,
    },
    /// Set up and run every test there is
    Test {
        /// Run only tests whose name contains it (no lints then)
        filter: Option<String>,
        /// Leave out the tests that boot other kernels in virtual machines
        #[arg(long)]
        no_vm: bool,
    },
    /// Run a benchmark: `overlay`, `dns`, `control` beside their peers, `trust` while things fail
    Bench {
        /// The benchmark
        name: String,
        /// Arguments of the benchmark
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run the simulations with many more seeds than `test` has time for
    ///
    /// Gossip and store run all seeds, one process per core; raft, whose clock is the real one, a
    /// tenth of them. A seed that fails is printed with the command that runs it again.
    Nightly {
        /// How many seeds
        #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
        seeds: u64,
        /// The first of them
        #[arg(long, default_value_t = 1)]
        first: u64,
        /// Only one simulation: gossip, store or raft
        name: Option<String>,
    },
    /// Feed every parser, and the BPF programs, with what nobody should send
    ///
    /// What fails is kept in target/fuzz/found; put it into tests/fuzz/corpus/TARGET once mended,
    /// where each run begins with it.
    Fuzz {
        /// Only one target
        target: Option<String>,
        /// How long each runs
        #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
        /// How many at a time
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
        jobs: u16,
    },
    /// Rebuild the BPF object with the pinned tools
    Ebpf {
        /// Fail if the committed object is not what the source gives, and change nothing
        #[arg(long)]
        check: bool,
    },
    /// Install the system packages that demo, tests and benchmarks use
    Setup,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    // It may be called from anywhere in the tree; every path here is relative to the root.
    std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))?;
    match cli.command {
        Command::Demo { keep } => demo::run(keep),
        Command::Test { filter, no_vm } => test::run(filter.as_deref(), !no_vm),
        Command::Bench { name, arguments } => test::bench(&name, &arguments),
        Command::Nightly { seeds, first, name } => {
            nightly::run(&(first..first.saturating_add(seeds)), name.as_deref())
        }
        Command::Fuzz { target, seconds, jobs } => {
            let each = Duration::from_secs(seconds);
            let plan = fuzz::Plan { each, jobs: jobs.into(), idle: false };
            fuzz::build()?.run(target.as_deref(), plan)
        }
        Command::Ebpf { check } => ebpf::run(check),
        Command::Setup => setup::install(setup::ALL),
    }
}
