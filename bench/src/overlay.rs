//! `mesh-bench overlay`: the figures of the clear overlay, beside raw routing and Docker's path.

use std::{collections::BTreeMap, fs, path::Path as FilePath};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::{
    cluster::{Cluster, PUBLISHED},
    peers::{Path, Peers},
};

/// Options of the benchmark.
#[derive(Debug, Args)]
pub(crate) struct Overlay {
    /// Rounds; every other one runs the paths in reverse order.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds per measurement.
    #[arg(long, default_value_t = 2.0)]
    secs: f64,
    /// Only measures whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Measure the fallback through the VXLAN device instead.
    #[arg(long)]
    via_device: bool,
    /// Where the table and the JSON go.
    #[arg(long, default_value = "bench/results")]
    out: std::path::PathBuf,
}

/// A measure: a workload, and the figure of its output that counts.
struct Measure {
    name: &'static str,
    unit: &'static str,
    figure: &'static str,
    scale: f64,
    mtu: u32,
    /// CPUs of client and server.
    cpus: (usize, usize),
    args: &'static str,
    window: Option<usize>,
    from_outside: bool,
    /// What the first mesh path is compared with, and the target ratio.
    targets: &'static [(&'static str, &'static str, f64)],
}

const MEASURES: &[Measure] = &[
    Measure {
        name: "UDP, 64 bytes",
        unit: "kpps received",
        figure: "received_pps",
        scale: 1e-3,
        mtu: 1500,
        cpus: (0, 1),
        args: "udp",
        window: None,
        from_outside: false,
        targets: &[("mesh", "docker path", 1.9), ("mesh", "raw routed", 0.95)],
    },
    Measure {
        name: "request/response, one core",
        unit: "µs p50",
        figure: "p50_us",
        scale: 1.0,
        mtu: 1500,
        cpus: (0, 0),
        args: "rr",
        window: None,
        from_outside: false,
        targets: &[("mesh", "docker path", -0.65), ("mesh", "raw routed", -1.05)],
    },
    Measure {
        name: "TCP x1, 256 KiB window, one core, MTU 1500",
        unit: "Gbit/s",
        figure: "gbit_s",
        scale: 1.0,
        mtu: 1500,
        cpus: (0, 0),
        args: "bulk --window 262144",
        window: Some(262_144),
        from_outside: false,
        targets: &[("mesh", "docker path", 1.25)],
    },
    Measure {
        name: "TCP x1, defaults",
        unit: "Gbit/s",
        figure: "gbit_s",
        scale: 1.0,
        mtu: 1500,
        cpus: (0, 1),
        args: "bulk",
        window: None,
        from_outside: false,
        targets: &[("mesh", "docker path", 1.0)],
    },
    Measure {
        name: "TCP x4, defaults",
        unit: "Gbit/s",
        figure: "gbit_s",
        scale: 1.0,
        mtu: 1500,
        cpus: (0, 1),
        args: "bulk --streams 4",
        window: None,
        from_outside: false,
        targets: &[("mesh", "docker path", 1.0)],
    },
    Measure {
        name: "new connections, task to task",
        unit: "k/s",
        figure: "per_s",
        scale: 1e-3,
        mtu: 1500,
        cpus: (0, 1),
        args: "conn",
        window: None,
        from_outside: false,
        targets: &[("mesh, VIP", "raw routed", 0.9)],
    },
    Measure {
        name: "new connections, from outside",
        unit: "k/s",
        figure: "per_s",
        scale: 1e-3,
        mtu: 1500,
        cpus: (0, 1),
        args: "conn",
        window: None,
        from_outside: true,
        targets: &[("mesh, published port", "routed, no balancer", 0.9)],
    },
    Measure {
        name: "TCP x1, 256 KiB window, one core, MTU 9000",
        unit: "Gbit/s",
        figure: "gbit_s",
        scale: 1.0,
        mtu: 9000,
        cpus: (0, 0),
        args: "bulk --window 262144",
        window: Some(262_144),
        from_outside: false,
        targets: &[("mesh", "docker path", 1.6)],
    },
];

/// Median, least and greatest of one path's rounds.
#[derive(Debug, Clone, Serialize)]
struct Figure {
    path: String,
    median: f64,
    min: f64,
    max: f64,
    rounds: Vec<f64>,
    stalled: u64,
    errors: u64,
}

#[derive(Debug, Serialize)]
struct Verdict {
    path: String,
    against: String,
    ratio: f64,
    target: f64,
    met: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    measure: String,
    unit: String,
    figures: Vec<Figure>,
    verdicts: Vec<Verdict>,
}

pub(crate) fn run(options: &Overlay) -> Result<()> {
    let wanted: Vec<&Measure> = MEASURES
        .iter()
        .filter(|m| options.only.as_ref().is_none_or(|only| m.name.contains(only.as_str())))
        .collect();
    let mut rows = Vec::new();
    for mtu in [1500, 9000] {
        let here: Vec<_> = wanted.iter().filter(|m| m.mtu == mtu).collect();
        if here.is_empty() {
            continue;
        }
        eprintln!("building a lab and its peers, underlay MTU {mtu} …");
        let peers = Peers::build(mtu)?;
        let cluster = Cluster::up(mtu, options.via_device)?;
        let [direct, vip, mesh] = cluster.paths()?;
        for measure in here {
            let paths = if measure.from_outside {
                vec![peers.routed_from_outside(), mesh.clone()]
            } else {
                vec![peers.raw(), peers.docker(), direct.clone(), vip.clone()]
            };
            rows.push(row(measure, &paths, options)?);
        }
    }
    let table = render(&rows, options);
    print!("{table}");
    write(&options.out, options.via_device, &table, &rows)
}

fn row(measure: &Measure, paths: &[Path], options: &Overlay) -> Result<Row> {
    let mut figures: Vec<Figure> = Vec::new();
    let mut all: BTreeMap<&str, (Vec<f64>, u64, u64)> = BTreeMap::new();
    for round in 0..options.rounds {
        let mut order: Vec<&Path> = paths.iter().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for path in order {
            eprintln!("{} · {} · round {}/{}", measure.name, path.name, round + 1, options.rounds);
            let out = once(measure, path, options.secs)
                .with_context(|| format!("{} over {}", measure.name, path.name))?;
            let entry = all.entry(path.name).or_default();
            entry.0.push(out[measure.figure].as_f64().unwrap_or(f64::NAN) * measure.scale);
            entry.1 += out["stalled"].as_u64().unwrap_or(0);
            entry.2 += out["errors"].as_u64().unwrap_or(0);
        }
    }
    for path in paths {
        if let Some((rounds, stalled, errors)) = all.remove(path.name) {
            let mut sorted = rounds.clone();
            sorted.sort_by(f64::total_cmp);
            figures.push(Figure {
                path: path.name.to_owned(),
                median: sorted[sorted.len() / 2],
                min: sorted[0],
                max: sorted[sorted.len() - 1],
                rounds,
                stalled,
                errors,
            });
        }
    }
    let median = |name: &str| figures.iter().find(|f| f.path == name).map(|f| f.median);
    let verdicts = measure
        .targets
        .iter()
        .filter_map(|(path, against, target)| {
            let ratio = median(path)? / median(against)?;
            // A negative target is a ceiling.
            let met = if *target < 0.0 { ratio <= -target } else { ratio >= *target };
            Some(Verdict {
                path: (*path).to_owned(),
                against: (*against).to_owned(),
                ratio,
                target: target.abs(),
                met,
            })
        })
        .collect();
    Ok(Row { measure: measure.name.into(), unit: measure.unit.into(), figures, verdicts })
}

fn once(measure: &Measure, path: &Path, secs: f64) -> Result<Value> {
    let window = measure.window.map(|w| format!(" --window {w}")).unwrap_or_default();
    let _server = path.server.serve(measure.cpus.1, &format!("--bind 0.0.0.0{window}"))?;
    let port = match (measure.args, measure.from_outside) {
        ("conn", true) if path.name.starts_with("mesh") => PUBLISHED,
        ("conn", _) => 7002,
        _ => 7000,
    };
    path.client.work(
        measure.cpus.0,
        &format!("{} --to {} --port {port} --secs {secs}", measure.args, path.to),
    )
}

fn render(rows: &[Row], options: &Overlay) -> String {
    use std::fmt::Write as _;
    let mut out = String::from("# Clear overlay, side by side\n\n");
    let _ = writeln!(
        out,
        "Medians (least–greatest) of {} interleaved rounds of {} s in one run, order reversed every \
         other round.{}\n",
        options.rounds,
        options.secs,
        if options.via_device { " Fallback through the VXLAN device." } else { "" }
    );
    out.push_str("| measure | path | median | range | stalled / errors |\n|---|---|---|---|---|\n");
    for row in rows {
        for figure in &row.figures {
            let _ = writeln!(
                out,
                "| {} ({}) | {} | {:.1} | {:.1}–{:.1} | {} / {} |",
                row.measure,
                row.unit,
                figure.path,
                figure.median,
                figure.min,
                figure.max,
                figure.stalled,
                figure.errors
            );
        }
    }
    out.push_str("\n| measure | ratio | is | target | |\n|---|---|---|---|---|\n");
    for row in rows {
        for v in &row.verdicts {
            let _ = writeln!(
                out,
                "| {} | {} / {} | {:.2} | {:.2} | {} |",
                row.measure,
                v.path,
                v.against,
                v.ratio,
                v.target,
                if v.met { "met" } else { "missed" }
            );
        }
    }
    out
}

fn write(dir: &FilePath, via_device: bool, table: &str, rows: &[Row]) -> Result<()> {
    fs::create_dir_all(dir)?;
    let stem = if via_device { "overlay-via-device" } else { "overlay" };
    fs::write(dir.join(format!("{stem}.md")), table)?;
    fs::write(dir.join(format!("{stem}.json")), serde_json::to_string_pretty(rows)? + "\n")?;
    Ok(())
}
