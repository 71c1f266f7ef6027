//! Runs groups of cases against a lab, and takes the lab down whatever happens.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
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

/// The arguments that `cargo test` passes on: words that a case's name must contain one of, and
/// `--list`. Options of the usual harness are accepted and change nothing.
struct Arguments {
    list: bool,
    filters: Vec<String>,
    exact: bool,
}

impl Arguments {
    fn parse(arguments: impl Iterator<Item = String>) -> Self {
        let mut parsed = Self { list: false, filters: Vec::new(), exact: false };
        for argument in arguments {
            match argument.as_str() {
                "--list" => parsed.list = true,
                "--exact" => parsed.exact = true,
                option if option.starts_with('-') => {}
                _ => parsed.filters.push(argument),
            }
        }
        parsed
    }

    fn wants(&self, name: &str) -> bool {
        let hit = |filter: &String| if self.exact { name == filter } else { name.contains(filter) };
        self.filters.is_empty() || self.filters.iter().any(hit)
    }
}

/// Runs the plans as the command line says; failure if any case fails.
#[must_use]
pub fn run(plans: &[Plan]) -> ExitCode {
    let arguments = Arguments::parse(std::env::args().skip(1));
    if arguments.list {
        for (name, _) in plans.iter().flat_map(Plan::names) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if !mesh_lab::host::is_root() {
        println!("lab tests skipped: they need root, for network namespaces and BPF");
        return ExitCode::SUCCESS;
    }
    let begin = Instant::now();
    let (mut passed, mut failed) = (0_usize, Vec::new());
    for plan in plans {
        let wanted: Vec<_> = plan.names().filter(|(name, _)| arguments.wants(name)).collect();
        if wanted.is_empty() {
            continue;
        }
        match run_plan(plan, &wanted) {
            Ok(failures) => {
                passed += wanted.len() - failures.len();
                failed.extend(failures);
            }
            Err(e) => {
                println!("{}: {e:#}", plan.name);
                failed.extend(wanted.into_iter().map(|(name, _)| name));
            }
        }
    }
    let took = begin.elapsed().as_secs_f64();
    println!("\nlab tests: {passed} passed, {} failed in {took:.1} s", failed.len());
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

fn run_plan(plan: &Plan, wanted: &[(String, Case)]) -> Result<Vec<String>> {
    let meshctl = binaries().context("build what is tested")?;
    // Several working trees may test on one machine.
    let prefix = std::env::var("MESH_TESTS_LAB").unwrap_or_else(|_| "test".to_owned());
    let name: LabName = format!("{prefix}-{}", plan.name).parse()?;
    down(&name).context("clear away what an earlier run left")?;
    let options = UpOptions {
        topology: plan.topology,
        cluster: plan.cluster,
        meshctl,
        meshd_args: plan.meshd_args.iter().map(|&arg| arg.to_owned()).collect(),
    };
    let begin = Instant::now();
    let _own = OwnLab(name.clone());
    let lab = Lab::up(&name, options, &|step| println!("  {step}"))?;
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
        cluster.print_logs();
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

    #[test]
    fn filters_choose_by_part_of_a_name() {
        let parse = |args: &[&str]| Arguments::parse(args.iter().map(|&a| a.to_owned()));
        assert!(parse(&[]).wants("direct/dns/names"));
        assert!(parse(&["--quiet", "dns"]).wants("direct/dns/names"));
        assert!(!parse(&["mesh"]).wants("direct/dns/names"));
        assert!(parse(&["mesh", "names"]).wants("direct/dns/names"));
        assert!(!parse(&["--exact", "names"]).wants("direct/dns/names"));
        assert!(parse(&["--list"]).list);
    }
}
