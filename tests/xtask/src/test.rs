//! Every test there is, in the order in which failures are cheapest to hear of.

use std::{
    cell::{Cell, OnceCell},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{
    fuzz, setup,
    shell::{build_release, cargo, require_root, visible},
    vm,
};

/// The integration test that runs in other kernels too: that of mesh-linux.
const VM_TEST: &str = "kernel";

/// How parsers are fuzzed in a test run.
const FUZZED: fuzz::Plan = fuzz::Plan { each: Duration::from_secs(30), jobs: 1, idle: true };

/// One part of a test run, and how it went.
struct Part {
    name: &'static str,
    took: Duration,
    result: Result<()>,
}

/// Sets up, runs everything (or what `filter` names) and sums up. A part that fails does not keep
/// the next from running. Every part takes the whole workspace: the features of dependencies follow
/// from the packages that are chosen, and each other choice builds some of them once more.
pub(crate) fn run(filter: Option<&str>, with_vms: bool) -> Result<()> {
    require_root("`cargo xtask test`")?;
    setup::install(setup::ALL)?;
    let mut parts = Vec::new();
    let mut part = |name, work: &dyn Fn() -> Result<()>| {
        println!("\n== {name}");
        let begin = Instant::now();
        let result = work();
        if let Err(e) = &result {
            println!("{name}: {e:#}");
        }
        parts.push(Part { name, took: begin.elapsed(), result });
    };
    if filter.is_none() {
        part("format", &|| visible(&mut cargo(&["fmt", "--all", "--check"])));
        part("lints", &|| {
            visible(&mut cargo(&[
                "clippy",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ]))
        });
    }
    part("unit, property and namespace tests", &|| {
        let mut tests = with(&["test", "--workspace", "--quiet", "--no-fail-fast"], filter);
        tests.env("MESH_TESTS_NO_LABS", "1");
        if filter.is_none() {
            tests.env(fuzz::PROGRAMS_SECONDS, FUZZED.each.as_secs().to_string());
        }
        visible(&mut tests)
    });
    let labs = || visible(&mut with(&["test", "--workspace", "--test", "lab"], filter));
    if filter.is_some() {
        part("labs", &labs);
    } else {
        let fuzzers = OnceCell::new();
        part("fuzzers (built)", &|| {
            let _ = fuzzers.set(fuzz::build()?);
            Ok(())
        });
        // Labs wait much: what they leave of the processors goes to the fuzzers.
        thread::scope(|scope| {
            let fuzzers = fuzzers.into_inner();
            let fuzzed = scope.spawn(|| fuzzers.map_or(Ok(()), |all| all.run_parsers(FUZZED)));
            part("labs", &labs);
            let fuzzed = Cell::new(Some(fuzzed));
            part("fuzzers (beside the labs)", &|| {
                let result = fuzzed.take().map(thread::ScopedJoinHandle::join);
                result
                    .context("joined once")?
                    .map_err(|_| anyhow!("the fuzzers' thread panicked"))?
            });
        });
    }
    if with_vms {
        part("other kernels", &|| vm::run(VM_TEST, filter));
    }
    sum_up(&parts)
}

fn with(args: &[&str], filter: Option<&str>) -> Command {
    let mut command = cargo(args);
    match filter {
        Some(filter) => command.args(["--", filter]),
        // What everything is tested of is mostly built from nothing, and then this is quicker.
        None => command.env("CARGO_INCREMENTAL", "0"),
    };
    command
}

fn sum_up(parts: &[Part]) -> Result<()> {
    println!("\n== summary");
    for Part { name, took, result } in parts {
        let mark = if result.is_ok() { "✓" } else { "✗" };
        println!("{mark} {name:<40} {:>7.1} s", took.as_secs_f64());
    }
    let total: Duration = parts.iter().map(|part| part.took).sum();
    let failed = parts.iter().filter(|part| part.result.is_err()).count();
    println!("  {:<40} {:>7.1} s", "all", total.as_secs_f64());
    if failed > 0 {
        bail!("{failed} of {} parts failed", parts.len());
    }
    Ok(())
}

/// Builds everything and runs one benchmark.
pub(crate) fn bench(name: &str, arguments: &[String]) -> Result<()> {
    require_root("a benchmark")?;
    setup::install(setup::ALL)?;
    setup::install_peers(name)?;
    build_release()?;
    let run = ["run", "--release", "--quiet", "--workspace", "--bin", "mesh-bench", "--", name];
    visible(cargo(&run).args(arguments))
}
