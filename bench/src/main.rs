//! `mesh-bench`: measures mesh beside its peers, interleaved in one run, and what is felt when
//! something fails; writes the tables.

mod asks;
mod cluster;
mod control;
mod dns;
mod dns_servers;
mod overlay;
mod peers;
mod shell;
mod table;
mod trust;
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
    /// The clear overlay beside raw routing and Docker's path.
    Overlay(overlay::Overlay),
    /// The resolver beside unbound, nsd and dnsmasq.
    Dns(dns::Dns),
    /// Writes through raft beside etcd's.
    Control(control::Control),
    /// A manager, or writers to etcd (used by `control`).
    #[command(hide = true, subcommand)]
    ControlPart(control::Part),
    /// What users feel when something fails, or is changed, each many times.
    Trust(trust::Trust),
    /// One event of `trust` in a lab that is up (used by the demo).
    #[command(hide = true)]
    Event(trust::One),
    /// Builds the peers alone and checks that they carry packets.
    Peers,
    /// One workload, inside a namespace (used by the benchmarks themselves).
    #[command(hide = true)]
    Work(work::Work),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Overlay(options) => overlay::run(&options),
        Command::Dns(options) => dns::run(&options),
        Command::Control(options) => control::run(&options),
        Command::ControlPart(part) => control::part(part),
        Command::Trust(options) => trust::run(&options),
        Command::Event(options) => trust::one(&options),
        Command::Peers => {
            let peers = peers::Peers::build(1500)?;
            for path in [peers.raw(), peers.docker(), peers.routed_from_outside()] {
                let _server = path.server.serve(1, "--bind 0.0.0.0")?;
                let out = path.client.work(0, &format!("rr --to {} --secs 0.5", path.to))?;
                println!("{}: {out}", path.name);
            }
            Ok(())
        }
        Command::Work(work) => work::run(work),
    }
}
