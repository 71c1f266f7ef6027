//! Runs groups of cases against a lab, and takes the lab down whatever happens.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use mesh_lab::{Lab, LabName, Topology, UpOptions, down};

use crate::cluster::{Cluster, binaries};

/// One thing that must hold.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What, in words.
    pub name: &'static str,
    /// Tries it.
    pub run: fn(&Cluster) -> Result<()>,
}

/// Cases that belong together.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// The first part of its cases' names.
    pub name: &'static str,
    /// Its cases, in order.
    pub cases: &'static [Case],
}

/// A lab, and what runs in it.
#[derive(Debug)]
pub struct Plan {
    /// The first part of all names in it, and of the lab's.
    pub name: &'static str,
    /// How big the lab is.
    pub topology: Topology,
    /// Whether its cluster is formed before the first case.
    pub cluster: bool,
    /// Arguments added to every daemon's own.
    pub meshd_args: &'static [&'static str],
    /// Whether it runs when no other does: its cases measure time.
    pub alone: bool,
    /// What runs.
    pub groups: &'static [Group],
}

impl Plan {
    fn names(&self) -> impl Iterator<Item = (String, Case)> {
        self.groups.iter().flat_map(|group| {
            group.cases.iter().map(|case| {
                (format!("{}/{}/{}", self.name, group.name, case.name.replace(' ', "-")), *case)
            })
        })
    }
}

/// The arguments that `cargo test` passes on: words that a case's name must contain one of,
/// `--list`, and `--test-threads`, which is how many plans run side by side. Other options of the
/// usual harness are accepted and change nothing.
struct Arguments {
    list: bool,
    filters: Vec<String>,
    exact: bool,
    side_by_side: usize,
}

/// Plans mostly wait, but a machine of two cores has no room for the clusters of three.
const SIDE_BY_SIDE: usize = 2;

impl Arguments {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut parsed =
            Self { list: false, filters: Vec::new(), exact: false, side_by_side: SIDE_BY_SIDE };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => parsed.list = true,
                "--exact" => parsed.exact = true,
                "--test-threads" => parsed.side_by_side = threads(arguments.next().as_deref())?,
                option if option.starts_with("--test-threads=") => {
                    parsed.side_by_side = threads(option.split_once('=').map(|(_, n)| n))?;
                }
                option if option.starts_with('-') => {}
                _ => parsed.filters.push(argument),
            }
        }
        Ok(parsed)
    }

    fn wants(&self, name: &str) -> bool {
        let hit = |filter: &String| if self.exact { name == filter } else { name.contains(filter) };
        self.filters.is_empty() || self.filters.iter().any(hit)
    }
}

fn threads(number: Option<&str>) -> Result<usize> {
    let number = number.and_then(|n| n.parse().ok()).filter(|n| *n > 0);
    number.context("--test-threads takes a number from 1")
}

/// A plan's cases that are to run.
struct Job<'a> {
    plan: &'a Plan,
    cases: Vec<(String, Case)>,
}

/// How a plan went.
struct Done {
    name: &'static str,
    passed: usize,
    failed: Vec<String>,
    took: Duration,
}

/// Runs the plans as the command line says; failure if any case fails.
#[must_use]
pub fn run(plans: &[Plan]) -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(e) => {
            eprintln!("{e:#}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.list {
        for (name, _) in plans.iter().flat_map(Plan::names) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if std::env::var_os("MESH_TESTS_NO_LABS").is_some() {
        println!("lab tests left out, as MESH_TESTS_NO_LABS says");
        return ExitCode::SUCCESS;
    }
    if !mesh_lab::host::is_root() {
        println!("lab tests skipped: they need root, for network namespaces and BPF");
        return ExitCode::SUCCESS;
    }
    let begin = Instant::now();
    let wanted = |plan| {
        let cases = Plan::names(plan).filter(|(name, _)| arguments.wants(name)).collect();
        Job { plan, cases }
    };
    let jobs: Vec<_> = plans.iter().map(wanted).filter(|job| !job.cases.is_empty()).collect();
    if jobs.is_empty() {
        return sum_up(&[], begin.elapsed());
    }
    let meshctl = match binaries().context("build what is tested") {
        Ok(meshctl) => meshctl,
        Err(e) => {
            eprintln!("{e:#}");
            return ExitCode::FAILURE;
        }
    };
    let (alone, together): (Vec<_>, Vec<_>) = jobs.iter().partition(|job| job.plan.alone);
    let mut done = side_by_side(&together, arguments.side_by_side, &meshctl);
    done.extend(alone.into_iter().map(|job| run_job(job, &meshctl)));
    sum_up(&done, begin.elapsed())
}

/// Runs jobs on so many threads, each taking the next one.
fn side_by_side(jobs: &[&Job<'_>], at_once: usize, meshctl: &Path) -> Vec<Done> {
    let next = AtomicUsize::new(0);
    let work = || {
        let take = || jobs.get(next.fetch_add(1, Ordering::Relaxed));
        std::iter::from_fn(take).map(|job| run_job(job, meshctl)).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once.min(jobs.len())).map(|_| scope.spawn(work)).collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.flatten().collect()
    })
}

fn run_job(job: &Job<'_>, meshctl: &Path) -> Done {
    let Job { plan, cases } = job;
    let (took, result) = timed(|| run_plan(plan, cases, meshctl));
    let failed = result.unwrap_or_else(|e| {
        println!("{}: {e:#}", plan.name);
        cases.iter().map(|(name, _)| name.clone()).collect()
    });
    Done { name: plan.name, passed: cases.len() - failed.len(), failed, took }
}

fn sum_up(done: &[Done], took: Duration) -> ExitCode {
    println!();
    for Done { name, passed, failed, took } in done {
        let (failed, took) = (failed.len(), took.as_secs_f64());
        println!("plan {name}: {passed} passed, {failed} failed in {took:.1} s");
    }
    let passed: usize = done.iter().map(|plan| plan.passed).sum();
    let failed: Vec<_> = done.iter().flat_map(|plan| &plan.failed).collect();
    let took = took.as_secs_f64();
    println!("lab tests: {passed} passed, {} failed in {took:.1} s", failed.len());
    for name in &failed {
        println!("    {name}");
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A lab that goes with this.
struct OwnLab(LabName);

impl Drop for OwnLab {
    fn drop(&mut self) {
        if std::env::var_os("MESH_TESTS_KEEP").is_some() {
            println!("lab {} is kept; `meshctl lab down --name {}` removes it", self.0, self.0);
            return;
        }
        if let Err(e) = down(&self.0) {
            println!("{e:#}");
        }
    }
}

/// Runs a plan's cases in a lab of its own, and says which failed.
fn run_plan(plan: &Plan, wanted: &[(String, Case)], meshctl: &Path) -> Result<Vec<String>> {
    // Several working trees may test on one machine.
    let prefix = std::env::var("MESH_TESTS_LAB").unwrap_or_else(|_| "test".to_owned());
    let name: LabName = format!("{prefix}-{}", plan.name).parse()?;
    down(&name).context("clear away what an earlier run left")?;
    let options = UpOptions {
        topology: plan.topology,
        cluster: plan.cluster,
        meshctl: meshctl.to_owned(),
        meshd_args: plan.meshd_args.iter().map(|&arg| arg.to_owned()).collect(),
    };
    let begin = Instant::now();
    let _own = OwnLab(name.clone());
    let lab = Lab::up(&name, options, &|step| println!("  {}: {step}", plan.name))?;
    let cluster = Cluster::new(lab, begin.elapsed());
    let mut failed = Vec::new();
    for (name, case) in wanted {
        let (took, result) = timed(|| run_case(&cluster, *case));
        match result {
            Ok(()) => println!("test {name} ... ok ({:.1} s)", took.as_secs_f64()),
            Err(e) => {
                println!("test {name} ... FAILED ({:.1} s)\n    {e:#}", took.as_secs_f64());
                failed.push(name.clone());
            }
        }
    }
    if !failed.is_empty() {
        println!("{}", cluster.logs());
    }
    Ok(failed)
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let begin = Instant::now();
    let result = work();
    (begin.elapsed(), result)
}

fn run_case(cluster: &Cluster, case: Case) -> Result<()> {
    let result = catch_unwind(AssertUnwindSafe(|| (case.run)(cluster)))
        .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", said(&*panic))));
    // What the case made goes in any event; a failure of that counts only if nothing else failed.
    let cleaned = cluster.empty().context("clean up after the case");
    result.and(cleaned)
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Arguments> {
        Arguments::parse(args.iter().map(|&a| a.to_owned()))
    }

    #[test]
    fn filters_choose_by_part_of_a_name() -> Result<()> {
        assert!(parse(&[])?.wants("direct/dns/names"));
        assert!(parse(&["--quiet", "dns"])?.wants("direct/dns/names"));
        assert!(!parse(&["mesh"])?.wants("direct/dns/names"));
        assert!(parse(&["mesh", "names"])?.wants("direct/dns/names"));
        assert!(!parse(&["--exact", "names"])?.wants("direct/dns/names"));
        assert!(parse(&["--list"])?.list);
        Ok(())
    }

    #[test]
    fn threads_are_plans_side_by_side() -> Result<()> {
        assert_eq!(parse(&[])?.side_by_side, SIDE_BY_SIDE);
        assert_eq!(parse(&["--test-threads=3"])?.side_by_side, 3);
        let two = parse(&["--test-threads", "1", "dns"])?;
        assert_eq!((two.side_by_side, two.filters.len()), (1, 1));
        assert!(parse(&["--test-threads"]).is_err() && parse(&["--test-threads=0"]).is_err());
        Ok(())
    }
}
