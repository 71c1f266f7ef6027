//! What the cluster does when nothing is asked of it: it heals its kernels, and idles.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_lab::Role;
use nix::unistd::{SysconfVar, sysconf};
use serde_json::Value;

use super::{
    bed::Bed,
    figure::{Figure, Unit},
};

/// How long idle daemons are watched.
const WATCH: Duration = Duration::from_secs(30);

/// Harms, and what holds when they are healed; lines of shell on the node.
const HARMS: [(&str, &str, &str); 4] = [
    ("nft ruleset flushed: healed", "nft flush ruleset", "nft list ruleset | grep -q masquerade"),
    (
        "entry of an eBPF map deleted: healed",
        "bpftool map delete pinned $MAP key $KEY",
        "bpftool map lookup pinned $MAP key $KEY >/dev/null 2>&1",
    ),
    (
        "VXLAN device deleted: healed",
        "ip link del $VXLAN",
        "ip link show up dev $VXLAN 2>/dev/null | grep -q UP",
    ),
    (
        "a task's link set down: healed",
        "ip link set $VETH down",
        "ip link show up dev $VETH 2>/dev/null | grep -q UP",
    ),
];

pub(super) fn kernel_harmed(bed: &Bed) -> Result<Vec<Figure>> {
    const NODE: &str = "w1";
    bed.settle_spread()?;
    let sh = |script: &str| bed.cluster.on(NODE, &["sh", "-c", script])?.ok();
    let pins = bed.lab().places().pins_of(NODE);
    let map = sh(&format!("find {} -name ENDPOINTS", pins.display()))?;
    let entries: Value = serde_json::from_str(&sh(&format!("bpftool -j map dump pinned {map}"))?)?;
    let key = entries[0]["key"].as_array().context("no entry in ENDPOINTS")?;
    let key: Vec<_> = key.iter().filter_map(Value::as_str).collect();
    let vxlan = sh("ip -br link show type vxlan | cut -d' ' -f1")?;
    let veth = sh("ip -br link show type veth | grep -o '^mv[0-9a-f]*' | head -n1")?;
    let names = format!("MAP={map}; KEY='{}'; VXLAN={vxlan}; VETH={veth};", key.join(" "));
    let mut figures = Vec::new();
    for (what, harm, healed) in HARMS {
        bed.step(what);
        sh(&format!("{names} {healed}")).with_context(|| format!("before {harm}"))?;
        let begin = Instant::now();
        let wait = format!("n=0; until {healed}; do n=$((n+1)); [ $n -lt 1000 ]; sleep 0.01; done");
        sh(&format!("set -e; {names} {harm}; {wait}")).with_context(|| harm.to_owned())?;
        figures.push(Figure::time(what, begin.elapsed()).at_most(2.0));
    }
    Ok(figures)
}

/// Processor time that a process used.
fn used(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("read a process's times")?;
    // After the name, which may hold anything: the state is field 3, the times are 14 and 15.
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: u64 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().context("a process's times"))
        .sum::<Result<_>>()?;
    let rate = sysconf(SysconfVar::CLK_TCK).ok().flatten().context("the length of a tick")?;
    Ok(Duration::from_secs(ticks) / u32::try_from(rate).context("the length of a tick")?)
}

fn resident(pid: i32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read its memory")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no VmRSS")?;
    Ok(kib.trim().parse::<f64>().context("VmRSS")? / 1024.0)
}

pub(super) fn idle(bed: &Bed) -> Result<Vec<Figure>> {
    bed.settle_spread()?;
    bed.step(&format!("watching idle daemons for {WATCH:?}"));
    let mut watched = Vec::new();
    for row in bed.lab().ps().into_iter().filter(|row| row.role.is_node()) {
        let pid = row.pid.with_context(|| format!("{} has no daemon", row.name))?;
        let (cpu, memory) = match row.role {
            Role::Manager => ("meshd of a manager: CPU", "meshd of a manager: RSS"),
            _ => ("meshd of a worker: CPU", "meshd of a worker: RSS"),
        };
        watched.push((pid, cpu, memory, 40.0));
        watched.push((bed.resolver(&row.name)?, "resolver: CPU", "resolver: RSS", 15.0));
    }
    let begin = Instant::now();
    let before = watched.iter().map(|(pid, ..)| used(*pid)).collect::<Result<Vec<_>>>()?;
    thread::sleep(WATCH);
    let mut figures = Vec::new();
    for ((pid, cpu, memory, most), before) in watched.into_iter().zip(before) {
        let after = used(pid)?;
        ensure!(after >= before, "another process has the number {pid} now");
        let share = (after - before).as_secs_f64() / begin.elapsed().as_secs_f64() * 100.0;
        figures.push(Figure::other(cpu, share, Unit::Percent).at_most(1.0));
        figures.push(Figure::other(memory, resident(pid)?, Unit::Mebibytes).at_most(most));
    }
    figures.sort_by_key(Figure::what);
    Ok(figures)
}
