//! `mesh-bench control`: writes through raft beside etcd's, and how long there are none after the
//! leader's death.
//!
//! Three managers each, in namespaces on one bridge, their files on one disk, both syncing each
//! write to it before it counts. mesh's are managers without the rest of the daemon: the store on
//! raft on redb, and its calls over mutual TLS.

mod etcd;
mod load;
mod node;
mod place;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use serde_json::Value;

use self::place::{Member, Place, Store};
use crate::table::{self, Figure, Row, Verdict};

/// The paths of the table.
const MESH: &str = "mesh";
const FORWARDED: &str = "mesh, through a follower";
const ETCD: &str = "etcd";
/// Writers under way while the leader dies.
const WRITERS: usize = 8;

/// A store's rates and median times, by round, and how many of its writes failed.
type Round = (Vec<f64>, Vec<f64>, u64);

/// Options of the benchmark.
#[derive(Debug, Args)]
pub(crate) struct Control {
    /// Rounds of writes; every other one in reverse order.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds per measurement.
    #[arg(long, default_value_t = 4)]
    secs: u64,
    /// How often the leader is killed.
    #[arg(long, default_value_t = 10)]
    deaths: usize,
    /// Where both keep their files: a directory on the disk to be measured.
    #[arg(long, default_value = "/var/tmp")]
    disk: PathBuf,
    /// Where the table and the JSON go.
    #[arg(long, default_value = "bench/results")]
    out: PathBuf,
}

/// Parts of the benchmark, in processes of their own.
#[derive(Debug, Subcommand)]
pub(crate) enum Part {
    /// One manager; takes orders on its standard input.
    Node(node::Node),
    /// Writes to etcd.
    Etcd(etcd::Writer),
}

pub(crate) fn part(part: Part) -> Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().context("starting the runtime")?;
    match part {
        Part::Node(node) => runtime.block_on(node.run()),
        Part::Etcd(writer) => runtime.block_on(writer.run()),
    }
}

/// Whom a measurement asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Leader,
    Follower,
}

pub(crate) fn run(options: &Control) -> Result<()> {
    ensure!(options.rounds > 0 && options.secs > 0, "--rounds and --secs are at least 1");
    let place = Place::make(&options.disk)?;
    let stores: [(&str, At, Box<dyn Store>); 3] = {
        let mesh = std::rc::Rc::new(std::cell::RefCell::new(place::Mesh::start(&place)?));
        let etcd = place::Etcd::start(&place)?;
        [
            (MESH, At::Leader, Box::new(std::rc::Rc::clone(&mesh))),
            (FORWARDED, At::Follower, Box::new(mesh)),
            (ETCD, At::Leader, Box::new(etcd)),
        ]
    };
    let mut stores = stores;
    let mut rows = Vec::new();
    for clients in [1, 64] {
        let mut rounds = vec![(Vec::new(), Vec::new(), 0); stores.len()];
        for round in 0..options.rounds {
            let mut order: Vec<usize> = (0..stores.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for at in order {
                let (name, whom, store) = &mut stores[at];
                eprintln!("{clients} clients · {name} · round {}", round + 1);
                let whom = member(&mut **store, *whom)?;
                let done = store.load(whom, clients, Duration::from_secs(options.secs))?;
                rounds[at].0.push(number(&done, "per_second")?);
                rounds[at].1.push(number(&done, "p50_us")?);
                rounds[at].2 += number(&done, "failed")? as u64;
            }
        }
        let names = stores.iter().map(|(name, ..)| *name);
        let of = |pick: fn(&Round) -> Vec<f64>| -> Vec<Figure> {
            let figure = |(name, round)| Figure::new(name, pick(round), 0, round.2);
            names.clone().zip(&rounds).map(figure).collect()
        };
        let who = if clients == 1 { "1 client".to_owned() } else { format!("{clients} clients") };
        rows.push(judged(format!("writes, {who}"), "per second", of(|round| round.0.clone()), 1.0));
        rows.push(judged(
            format!("p50 of a write, {who}"),
            "µs",
            of(|round| round.1.clone()),
            -1.0,
        ));
    }
    let mut gaps = vec![(Vec::new(), 0); stores.len()];
    for death in 0..options.deaths {
        for (at, (name, whom, store)) in stores.iter_mut().enumerate() {
            // A leader that is dead answers nobody: all are asked through a follower.
            if (*name, *whom) == (MESH, At::Leader) {
                continue;
            }
            eprintln!("the leader dies · {name} · {}", death + 1);
            let done = store.kill_leader_under(WRITERS)?;
            gaps[at].0.push(number(&done, "longest_gap_ms")?);
            gaps[at].1 += number(&done, "failed")? as u64;
        }
    }
    let figures = stores.iter().zip(gaps).filter(|(_, (rounds, _))| !rounds.is_empty()).map(
        |((name, ..), (rounds, failed))| {
            let name = if *name == FORWARDED { MESH } else { *name };
            Figure::new(name, rounds, 0, failed)
        },
    );
    rows.push(judged(
        "without writes after the leader's death".into(),
        "ms",
        figures.collect(),
        -1.0,
    ));
    let heading = format!(
        "# Writes through raft, side by side\n\nMedians (least–greatest) of {} interleaved rounds \
         of {} s in one run, order reversed every other round; three members each in namespaces \
         of this machine, files on one disk, each write synced. Values of {} bytes. mesh: \
         `propose` in \
         the leader's process, or in a follower's, which forwards it over TLS. etcd: gRPC, in \
         clear, to the leader. The leader was killed (SIGKILL) {} times under {WRITERS} writers \
         that ask a follower; what is shown is the longest time without a write.\n",
        options.rounds,
        options.secs,
        load::VALUE,
        options.deaths
    );
    table::write(&options.out, "control", &heading, "- / failed", &rows)
}

fn judged(measure: String, unit: &str, figures: Vec<Figure>, target: f64) -> Row {
    let verdicts = Verdict::of(&figures, MESH, ETCD, target).into_iter().collect();
    Row { measure, unit: unit.to_owned(), figures, verdicts }
}

fn number(of: &Value, key: &str) -> Result<f64> {
    of[key].as_f64().with_context(|| format!("no `{key}` in {of}"))
}

fn member(store: &mut dyn Store, whom: At) -> Result<Member> {
    let leader = store.leader()?;
    Ok(match whom {
        At::Leader => leader,
        At::Follower => leader.other(),
    })
}
