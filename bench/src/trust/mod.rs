//! `mesh-bench trust`: what users feel when something fails, or is changed, under 300 new
//! connections a second; each event many times, beside its target.

mod bed;
mod changes;
mod failures;
mod figure;
mod upkeep;

use std::{fs, path::PathBuf, thread, time::Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use mesh_lab::{Lab, LabName, Topology, UpOptions, down};
use serde_json::json;

use bed::{Bed, REPLICAS};
use figure::{Figure, Table};

/// The lab's name.
const LAB: &str = "trust";

/// Options of the benchmark.
#[derive(Debug, Args)]
pub(crate) struct Trust {
    /// How often each event happens.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// Only events whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Where the table and the JSON go.
    #[arg(long, default_value = "bench/results")]
    out: PathBuf,
}

/// Options of one event.
#[derive(Debug, Args)]
pub(crate) struct One {
    /// The event; without it, the names of all.
    name: Option<String>,
    /// A lab that is up, with service `web` of five tasks on network `app`, published on 8080.
    #[arg(long)]
    lab: LabName,
}

/// Something that happens to a cluster.
struct Event {
    name: &'static str,
    /// Once, not in every round: it says the same each time.
    once: bool,
    run: fn(&Bed) -> Result<Vec<Figure>>,
}

const fn event(name: &'static str, run: fn(&Bed) -> Result<Vec<Figure>>) -> Event {
    Event { name, once: false, run }
}

/// In this order a round has to spread tasks again only twice.
const EVENTS: &[Event] = &[
    event("leader killed", failures::leader_killed),
    event("leader cut off", failures::leader_cut_off),
    event("meshd killed and restarted", failures::daemon_killed),
    event("resolver killed", failures::resolver_killed),
    event("kernel state harmed", upkeep::kernel_harmed),
    event("worker's link cut for 3 s", failures::link_cut),
    event("worker crashed", failures::worker_crashed),
    event("roll-out", changes::roll_out),
    event("scaled 5 → 8 → 2 → 5", changes::scale),
    event("node drained", changes::drain),
    Event { name: "idle, 30 s", once: true, run: upkeep::idle },
];

/// One event in a lab that is up: what it came to as JSON, what goes on meanwhile as lines of
/// standard error.
pub(crate) fn one(options: &One) -> Result<()> {
    let names: Vec<_> = EVENTS.iter().map(|event| event.name).collect();
    let event = EVENTS.iter().find(|event| options.name.as_deref() == Some(event.name));
    let Some(event) = event else { bail!("the events are: {}", names.join(", ")) };
    let (said, met) = match (event.run)(&Bed::of(Lab::open(&options.lab)?)) {
        Ok(figures) => {
            let said: Vec<_> = figures.iter().map(Figure::to_string).collect();
            (said.join(", "), figures.iter().all(Figure::met))
        }
        Err(e) => (format!("{e:#}"), false),
    };
    println!("{}", json!({ "said": said, "met": met }));
    Ok(())
}

/// A lab that is gone when dropped.
struct Guard(LabName);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(e) = down(&self.0) {
            eprintln!("the lab {} stays: {e:#}", self.0);
        }
    }
}

pub(crate) fn run(options: &Trust) -> Result<()> {
    let wanted = |event: &&Event| options.only.as_ref().is_none_or(|o| event.name.contains(o));
    let events: Vec<_> = EVENTS.iter().filter(wanted).collect();
    let name: LabName = LAB.parse()?;
    down(&name)?;
    let _guard = Guard(name.clone());
    let up = UpOptions {
        topology: Topology { managers: 3, workers: 2, mtu: 1500 },
        cluster: true,
        meshctl: std::env::current_exe()?.with_file_name("meshctl"),
        meshd_args: Vec::new(),
    };
    let bed = Bed::of(Lab::up(&name, up, &|step| eprintln!("{step}"))?);
    bed.furnish()?;
    let (begin, before) = (Instant::now(), load_average());
    let (mut table, mut broken) = (Table::default(), Vec::new());
    for round in 1..=options.rounds {
        let last = round == options.rounds;
        for event in events.iter().filter(|event| last || !event.once) {
            eprintln!("== round {round} of {} · {}", options.rounds, event.name);
            match (event.run)(&bed) {
                Ok(figures) => {
                    figures.iter().for_each(|figure| eprintln!("   {figure}"));
                    table.add(event.name, &figures);
                }
                // The others' figures are worth having; this is told at the end, and not forgotten.
                Err(e) => {
                    let said = format!("round {round}, {}: {e:#}", event.name);
                    eprintln!("   ✗ {said}");
                    broken.push(said);
                }
            }
        }
    }
    let minutes = begin.elapsed().as_secs_f64() / 60.0;
    let conditions = format!(
        "{} cores, Linux {}; load average {before} before the first round, {} after the last",
        thread::available_parallelism().map_or(0, usize::from),
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        load_average(),
    );
    let text = render(options.rounds, minutes, &conditions, &table, &broken);
    print!("{text}");
    fs::create_dir_all(&options.out).context("make the directory of results")?;
    fs::write(options.out.join("trust.md"), text).context("write trust.md")?;
    let record = json!({
        "conditions": conditions,
        "rounds": options.rounds,
        "rows": table,
        "broken": broken,
    });
    let record = serde_json::to_string_pretty(&record)? + "\n";
    fs::write(options.out.join("trust.json"), record).context("write trust.json")
}

/// Of the last minute: what else was at work on the machine is part of the figures.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn render(
    rounds: usize,
    minutes: f64,
    conditions: &str,
    table: &Table,
    broken: &[String],
) -> String {
    let missed = match table.missed() {
        0 => "All targets are met.".to_owned(),
        missed => format!("{missed} targets are missed."),
    };
    let mut text = format!(
        "# What is felt when something fails\n\n\
         Medians and worsts of {rounds} rounds, {minutes:.0} minutes in one run ({conditions}), \
         in a lab of three managers and two workers. Load: 300 new connections a second from \
         the client outside, through all nodes in turn (past a node that is taken away whole), \
         to a service of {REPLICAS} tasks, one on each node; 100 pings and 100 look-ups a second \
         from a task. *No request goes there*: the last one that failed, or whose first packet \
         was lost, began so long after. {missed}\n\n{}",
        table.markdown()
    );
    for e in broken {
        text.push_str(&format!("\n✗ {e}\n"));
    }
    text
}
