//! `mesh-bench`: measures mesh beside its peers, interleaved in one run, and writes the table.

mod work;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "mesh-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One workload, inside a namespace (used by the benchmarks themselves).
    #[command(hide = true)]
    Work(work::Work),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Work(work) => work::run(work),
    }
}
