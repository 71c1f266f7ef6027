//! The simulations, with many more seeds than a test run has time for.

use std::{
    ops::Range,
    process::Command,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use crate::shell::{cargo, visible};

/// A simulation.
struct Suite {
    name: &'static str,
    /// The part of the seeds asked for that it runs: 1 is all of them, 10 a tenth.
    share: u64,
    /// Seeds of one process: what is lost of a failing one, and what progress is told in.
    chunk: u64,
    /// Whether several processes may run at a time: not where real time counts.
    side_by_side: bool,
    /// What cargo is told to build.
    target: &'static [&'static str],
    /// The tests that are run of it.
    filter: &'static str,
    /// The environment that names the seeds.
    seeds: fn(&Range<u64>) -> Vec<(&'static str, String)>,
}

const SUITES: &[Suite] = &[
    Suite {
        name: "gossip",
        share: 1,
        chunk: 50,
        side_by_side: true,
        target: &["--test", "sim"],
        filter: "no_seed_diverges_or_kills",
        seeds: first_and_count,
    },
    Suite {
        name: "store",
        share: 1,
        chunk: 500,
        side_by_side: true,
        target: &["--lib"],
        filter: "sim::",
        seeds: first_and_count,
    },
    Suite {
        name: "raft",
        share: 10,
        chunk: 24,
        side_by_side: false,
        target: &["--lib"],
        filter: "histories_are_linearizable",
        seeds: |seeds| {
            vec![("MESH_RAFT_SEEDS", format!("{}-{}", seeds.start, seeds.end.saturating_sub(1)))]
        },
    },
];

fn first_and_count(seeds: &Range<u64>) -> Vec<(&'static str, String)> {
    let count = seeds.end.saturating_sub(seeds.start);
    vec![("MESH_SIM_SEED", seeds.start.to_string()), ("MESH_SIM_SEEDS", count.to_string())]
}

/// Runs the simulations (or the one of that name) with the seeds; says which fail and how to see
/// one of them again.
pub(crate) fn run(seeds: &Range<u64>, only: Option<&str>) -> Result<()> {
    let suites: Vec<_> =
        SUITES.iter().filter(|suite| only.is_none_or(|only| only == suite.name)).collect();
    let names: Vec<_> = SUITES.iter().map(|suite| suite.name).collect();
    ensure!(!suites.is_empty(), "no such simulation: there are {}", names.join(", "));
    let mut failures = 0;
    for suite in suites {
        failures += suite.run(seeds)?;
    }
    ensure!(failures == 0, "{failures} runs failed; the seeds and how to run them are above");
    Ok(())
}

impl Suite {
    /// How many processes failed.
    fn run(&self, seeds: &Range<u64>) -> Result<usize> {
        let count = (seeds.end - seeds.start).div_ceil(self.share);
        let end = seeds.start + count;
        let starts = (seeds.start..end).step_by(usize::try_from(self.chunk)?);
        let chunks: Vec<_> = starts.map(|at| at..end.min(at + self.chunk)).collect();
        let at_once = match self.side_by_side {
            true => thread::available_parallelism().map_or(1, usize::from),
            false => 1,
        };
        println!("{}: building", self.name);
        let build = ["test", "--workspace", "--quiet", "--no-run"];
        visible(cargo(&build).args(self.target))?;
        let begin = Instant::now();
        let queue = Mutex::new(chunks.into_iter());
        let done = Mutex::new((0, 0));
        let work = || -> Result<()> {
            loop {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(chunk) = next else { return Ok(()) };
                let complaint = self.try_seeds(&chunk)?;
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                done.0 += chunk.end - chunk.start;
                done.1 += usize::from(complaint.is_some());
                if let Some(complaint) = complaint {
                    println!("{complaint}");
                }
                let (took, failed) = (begin.elapsed().as_secs_f64(), done.1);
                let left = took / done.0 as f64 * (count - done.0) as f64;
                println!(
                    "{}: {} of {count} seeds in {took:.0} s, {failed} runs failed, {left:.0} s to go",
                    self.name, done.0
                );
            }
        };
        let results: Vec<Result<()>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
            let panicked = |_| Err(anyhow::anyhow!("a thread that runs seeds panicked"));
            threads.into_iter().map(|t| t.join().unwrap_or_else(panicked)).collect()
        });
        results.into_iter().collect::<Result<()>>()?;
        Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner).1)
    }

    /// What to tell of the seeds, if one of them fails.
    fn try_seeds(&self, seeds: &Range<u64>) -> Result<Option<String>> {
        let output = self.command(seeds).output().context("run cargo")?;
        if output.status.success() {
            // A test that was renamed would pass for ever.
            let said = String::from_utf8_lossy(&output.stdout);
            ensure!(said.contains(" ... ok"), "{}: no test ran: {said}", self.name);
            return Ok(None);
        }
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        let about = said.iter().flat_map(|text| text.lines()).filter(|l| l.contains("seed "));
        let about: Vec<_> = about.take(20).collect();
        Ok(Some(format!(
            "{}: a seed of {} to {} fails; all of them again: {}\n  {}",
            self.name,
            seeds.start,
            seeds.end.saturating_sub(1),
            self.line(seeds),
            about.join("\n  ")
        )))
    }

    fn command(&self, seeds: &Range<u64>) -> Command {
        let mut command = cargo(&["test", "--workspace"]);
        command.args(self.target).args(["--", self.filter]).envs((self.seeds)(seeds));
        // What is told of a seed is how to run it again.
        command.env("RUST_BACKTRACE", "0");
        command
    }

    /// The command as one types it.
    fn line(&self, seeds: &Range<u64>) -> String {
        let set = (self.seeds)(seeds).into_iter().map(|(name, value)| format!("{name}={value} "));
        let (set, target) = (set.collect::<String>(), self.target.join(" "));
        format!("{set}cargo test --workspace {target} -- {}", self.filter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_can_be_typed_again() {
        let line = |name: &str| {
            let suite = SUITES.iter().find(|suite| suite.name == name);
            suite.map(|suite| suite.line(&(3..5))).unwrap_or_default()
        };
        assert_eq!(
            line("gossip"),
            "MESH_SIM_SEED=3 MESH_SIM_SEEDS=2 cargo test --workspace --test sim -- \
             no_seed_diverges_or_kills"
        );
        assert!(line("raft").starts_with("MESH_RAFT_SEEDS=3-4 cargo test "));
    }
}
