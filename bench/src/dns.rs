//! `mesh-bench dns`: addresses of services among ten thousand, beside servers that do nothing else.
//!
//! dnsperf on one CPU, the server with one worker on the other, all in one namespace. The tasks'
//! port rewriting is not part of it: it is the servers that are compared.

use std::{fmt::Write as _, fs, io::BufRead as _, path::Path};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    dns_servers::{MESH, Place, Server, name},
    shell::sh,
    table::{self, Figure, Row, Verdict},
};

const CLIENT_CPU: usize = 0;
const SERVER_CPU: usize = 1;
/// The peer that the targets are about, and whose half load the times are taken at.
const UNBOUND: &str = "unbound";
const NSD: &str = "nsd";

/// Options of the benchmark.
#[derive(Debug, Args)]
pub(crate) struct Dns {
    /// Rounds; every other one runs the servers in reverse order.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds per measurement.
    #[arg(long, default_value_t = 3)]
    secs: u64,
    /// Names that are served.
    #[arg(long, default_value_t = 10_000)]
    names: usize,
    /// Where the table and the JSON go.
    #[arg(long, default_value = "bench/results")]
    out: std::path::PathBuf,
}

/// What dnsperf says of one run.
struct Run {
    per_second: f64,
    lost: u64,
    /// Answers that were no address.
    wrong: u64,
}

pub(crate) fn run(options: &Dns) -> Result<()> {
    ensure!((2..=30_000).contains(&options.names), "--names is 2 to 30000");
    ensure!(options.rounds > 0 && options.secs > 0, "--rounds and --secs are at least 1");
    let place = Place::make()?;
    let questions = place.path("questions");
    fs::write(&questions, questions_in_disorder(options.names))?;
    let servers = Server::start_all(&place, options.names, SERVER_CPU)?;

    let mut load = Measured::of(&servers);
    in_turns(&servers, options.rounds, |at, round| {
        let server = &servers[at];
        eprintln!("queries per second · {} · round {}", server.name, round + 1);
        let run = dnsperf(&place, server, &questions, options.secs, None)?;
        load.add(at, run.per_second / 1e3, &run);
        Ok(())
    })?;
    let mut load = load.row("A of a service's name", "k queries/s", &servers);
    load.verdicts.extend(Verdict::of(&load.figures, MESH, UNBOUND, 1.1));
    load.verdicts.extend(Verdict::of(&load.figures, MESH, NSD, 0.95));

    // The same load for all, or a faster server would be measured under more.
    let unbound = servers.iter().position(|server| server.name == UNBOUND);
    let half = unbound.map_or(0.0, |at| load.figures[at].median * 1e3 / 2.0) as u64;
    let mut rows = vec![load];
    let (mut median, mut late) = (Measured::of(&servers), Measured::of(&servers));
    in_turns(&servers, options.rounds, |at, round| {
        let server = &servers[at];
        eprintln!("time to the answer at {half}/s · {} · round {}", server.name, round + 1);
        let times = place.path("times");
        let run = dnsperf(&place, server, &questions, options.secs, Some((half, &times)))?;
        let [p50, p99] = percentiles(&times)?;
        median.add(at, p50, &run);
        late.add(at, p99, &run);
        Ok(())
    })?;
    rows.push(median.row("median time at half of unbound's load", "µs", &servers));
    let mut late = late.row("p99 at half of unbound's load", "µs", &servers);
    late.verdicts.extend(Verdict::of(&late.figures, MESH, UNBOUND, -1.0));
    rows.push(late);

    let mut memory = Measured::of(&servers);
    for (at, server) in servers.iter().enumerate() {
        memory.rounds[at].0.push(server.resident_mib()?);
    }
    let mut memory = memory.row("resident memory afterwards", "MiB", &servers);
    memory.verdicts.extend(Verdict::below(&memory.figures, MESH, 15.0, "MiB"));
    rows.push(memory);

    let heading = format!(
        "# Names, side by side\n\nMedians (least–greatest) of {} interleaved rounds of {} s in one \
         run, order reversed every other round. {} names; dnsperf with 8 sockets and 200 queries \
         under way on one CPU, each server with one worker on the other. mesh has a service with a \
         virtual address and a task for each name, the others an A record.\n",
        options.rounds, options.secs, options.names
    );
    table::write(&options.out, "dns", &heading, "lost / wrong", &rows)
}

/// Calls for every server in every round.
fn in_turns(
    servers: &[Server],
    rounds: usize,
    mut measure: impl FnMut(usize, usize) -> Result<()>,
) -> Result<()> {
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..servers.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            measure(at, round).with_context(|| format!("measuring {}", servers[at].name))?;
        }
    }
    Ok(())
}

/// Rounds, lost and wrong answers of each server.
struct Measured {
    rounds: Vec<(Vec<f64>, u64, u64)>,
}

impl Measured {
    fn of(servers: &[Server]) -> Self {
        Self { rounds: vec![(Vec::new(), 0, 0); servers.len()] }
    }

    fn add(&mut self, at: usize, figure: f64, run: &Run) {
        let (rounds, lost, wrong) = &mut self.rounds[at];
        rounds.push(figure);
        *lost += run.lost;
        *wrong += run.wrong;
    }

    fn row(self, measure: &str, unit: &str, servers: &[Server]) -> Row {
        let figures = servers
            .iter()
            .zip(self.rounds)
            .map(|(server, (rounds, lost, wrong))| Figure::new(server.name, rounds, lost, wrong))
            .collect();
        Row { measure: measure.into(), unit: unit.into(), figures, verdicts: Vec::new() }
    }
}

/// Every name some times, in an order that no cache likes.
fn questions_in_disorder(names: usize) -> String {
    let mut text = String::new();
    let mut number = 1_u64;
    for _ in 0..names * 8 {
        // Knuth's multiplier; the upper bits are the good ones.
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (name, _) = name((number >> 33) as usize % names);
        let _ = writeln!(text, "{name}.app A");
    }
    text
}

/// One run against one server; with a rate at which queries are sent, and a file for a line about
/// each answer.
fn dnsperf(
    place: &Place,
    server: &Server,
    questions: &Path,
    secs: u64,
    timed: Option<(u64, &Path)>,
) -> Result<Run> {
    let (rate, to) = match timed {
        Some((rate, to)) => (format!(" -v -Q {rate}"), to.to_owned()),
        None => (String::new(), place.path("summary")),
    };
    // A shell for the redirection: the lines must not go through this process, which has no CPU of
    // its own.
    let script = place.path("dnsperf.sh");
    let line = format!(
        "exec taskset -c {CLIENT_CPU} dnsperf -s {} -p {} -d {} -l {secs} -c 8 -q 200{rate} >{} 2>&1\n",
        server.address,
        server.port,
        questions.display(),
        to.display()
    );
    fs::write(&script, line)?;
    sh(&format!("nsenter --net={} sh {}", place.netns.0.display(), script.display()))?;
    let summary = summary_of(&to)?;
    let number = |key: &str| {
        let line = summary.iter().find_map(|line| line.trim().strip_prefix(key));
        let word = line.and_then(|line| line.split_whitespace().next());
        word.and_then(|word| word.parse::<f64>().ok())
    };
    let per_second = number("Queries per second:").context("dnsperf says no rate")?;
    let lost = number("Queries lost:").unwrap_or(0.0) as u64;
    let completed = number("Queries completed:").unwrap_or(0.0) as u64;
    let codes = summary.iter().find_map(|line| line.trim().strip_prefix("Response codes:"));
    let good = codes.and_then(|codes| codes.trim().strip_prefix("NOERROR"));
    let good = good.and_then(|good| good.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    Ok(Run { per_second, lost, wrong: completed.saturating_sub(good) })
}

/// What dnsperf says at the end.
fn summary_of(path: &Path) -> Result<Vec<String>> {
    let file = std::io::BufReader::new(fs::File::open(path)?);
    let lines = file.lines().map_while(Result::ok).filter(|line| !line.starts_with('>'));
    Ok(lines.collect())
}

/// The median and the 99th percentile of what dnsperf wrote, in µs.
fn percentiles(path: &Path) -> Result<[f64; 2]> {
    let file = std::io::BufReader::new(fs::File::open(path)?);
    let mut times: Vec<f64> = file
        .lines()
        .map_while(Result::ok)
        .filter(|line| line.starts_with("> NOERROR"))
        .filter_map(|line| line.split_whitespace().last()?.parse::<f64>().ok())
        .map(|seconds| seconds * 1e6)
        .collect();
    ensure!(times.len() > 100, "dnsperf timed {} answers only", times.len());
    times.sort_by(f64::total_cmp);
    Ok([50, 99].map(|percent| times[times.len() * percent / 100]))
}
