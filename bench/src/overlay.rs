//! `mesh-bench overlay`: the figures of the clear overlay, beside raw routing and Docker's path.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::{
    cluster::{Cluster, PUBLISHED},
    peers::{Path, Peers},
    table::{self, Figure, Row, Verdict},
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
    let stem = if options.via_device { "overlay-via-device" } else { "overlay" };
    table::write(&options.out, stem, &heading(options), "stalled / errors", &rows)
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
            figures.push(Figure::new(path.name, rounds, stalled, errors));
        }
    }
    let verdicts = measure
        .targets
        .iter()
        .filter_map(|(path, against, target)| Verdict::of(&figures, path, against, *target));
    let verdicts = verdicts.collect();
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

/// What the table says above itself.
fn heading(options: &Overlay) -> String {
    format!(
        "# Clear overlay, side by side\n\nMedians (least–greatest) of {} interleaved rounds of {} s in \
         one run, order reversed every other round.{}\n",
        options.rounds,
        options.secs,
        if options.via_device { " Fallback through the VXLAN device." } else { "" }
    )
}
