//! Fuzzing: every parser is fed by libFuzzer, the BPF programs by a test of their own.
//!
//! libFuzzer is led by what the code under test covers, so our crates are compiled once more with
//! LLVM's coverage pass, by way of `RUSTC_WORKSPACE_WRAPPER`: other crates are taken as they are,
//! and the stable compiler will do.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    setup,
    shell::{cargo, output, visible},
};

/// The flags of cargo-fuzz, and `cfg(fuzzing)`.
const WRAPPER: &str = "#!/bin/sh
exec \"$@\" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \\
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \\
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
";
/// The target that is no parser: the programs in the kernel.
const PROGRAMS: &str = "programs";
/// How long that test goes on, in any run of it.
pub(crate) const PROGRAMS_SECONDS: &str = "MESH_FUZZ_SECONDS";
/// What a target may take, in MiB.
const MEMORY: u32 = 1024;
/// Seconds that one input may take.
const SLOW: u32 = 5;
/// Bytes of an input.
const LENGTH: u32 = 4096;

/// How long, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) each: Duration,
    /// At a time.
    pub(crate) jobs: usize,
    /// Only with what others leave of the processors.
    pub(crate) idle: bool,
}

/// The fuzzers, built.
#[derive(Debug)]
pub(crate) struct Fuzzers {
    binary: PathBuf,
    /// Of the parsers.
    names: Vec<String>,
}

/// Builds them.
pub(crate) fn build() -> Result<Fuzzers> {
    setup::install(setup::FUZZ)?;
    let wrapper = directory("")?.join("rustc-wrapper");
    fs::write(&wrapper, WRAPPER).with_context(|| format!("write {}", wrapper.display()))?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let mut build = cargo(&["build", "--quiet", "--workspace", "--features", "mesh-fuzz/engine"]);
    visible(
        build
            .args(["--bin", "mesh-fuzz"])
            .env("RUSTC_WORKSPACE_WRAPPER", &wrapper)
            .env("CARGO_INCREMENTAL", "0"),
    )?;
    // The next ordinary build puts another program of that name there.
    let binary = directory("")?.join("mesh-fuzz");
    fs::copy(target_directory().join("debug/mesh-fuzz"), &binary).context("keep mesh-fuzz")?;
    let names = output("env", &["MESH_FUZZ_TARGET=list", &binary.display().to_string()])?;
    Ok(Fuzzers { binary, names: names.lines().map(str::to_owned).collect() })
}

fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from)
}

/// A directory of ours below the target directory, absolute.
fn directory(name: &str) -> Result<PathBuf> {
    let path = std::path::absolute(target_directory().join("fuzz").join(name))?;
    fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

impl Fuzzers {
    /// Runs all, or the one of that name.
    pub(crate) fn run(&self, only: Option<&str>, plan: Plan) -> Result<()> {
        let chosen: Vec<_> = self
            .names
            .iter()
            .map(String::as_str)
            .chain([PROGRAMS])
            .filter(|name| only.is_none_or(|only| only == *name))
            .collect();
        ensure!(!chosen.is_empty(), "no such target: {} and {PROGRAMS}", self.names.join(", "));
        self.run_those(chosen, plan)
    }

    /// Runs those that are parsers.
    pub(crate) fn run_parsers(&self, plan: Plan) -> Result<()> {
        self.run_those(self.names.iter().map(String::as_str).collect(), plan)
    }

    /// Says which failed, and how to see it again.
    fn run_those(&self, chosen: Vec<&str>, plan: Plan) -> Result<()> {
        let (waiting, failed) = (Mutex::new(chosen.into_iter().rev()), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..plan.jobs {
                scope.spawn(|| {
                    loop {
                        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
                        let Some(name) = next else { break };
                        if let Err(error) = self.one(name, plan) {
                            println!("✗ {name}: {error:#}");
                            failed.lock().unwrap_or_else(PoisonError::into_inner).push(name);
                        }
                    }
                });
            }
        });
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        ensure!(failed.is_empty(), "{} of the fuzz targets failed; see above", failed.len());
        Ok(())
    }

    fn one(&self, name: &str, plan: Plan) -> Result<()> {
        let log = directory("")?.join(format!("{name}.log"));
        let words = fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut command = if name == PROGRAMS { programs(plan) } else { self.parser(name, plan)? };
        command.stdin(Stdio::null()).stdout(words.try_clone()?).stderr(words);
        let status = command.status().with_context(|| format!("run {command:?}"))?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        ensure!(
            status.success(),
            "{status}\n{}\n  again: {command:?} and the file that it names",
            tail(&said)
        );
        // `#1048576	DONE   cov: 873 ft: 2981 …`, or `… frames, …`
        let sum = said.lines().rev().find(|line| line.contains("DONE") || line.contains("frames"));
        println!("✓ {name:<14} {}", sum.unwrap_or_default().replace('\t', " "));
        Ok(())
    }

    fn parser(&self, name: &str, plan: Plan) -> Result<Command> {
        let kept = Path::new("tests/fuzz/corpus").join(name);
        let (found, seeds) = (directory("corpus")?.join(name), directory("seeds")?.join(name));
        for path in [&found, &seeds] {
            fs::create_dir_all(path)?;
        }
        let mut command = prioritised(&self.binary, plan);
        command
            .env("MESH_FUZZ_TARGET", name)
            .env("MESH_FUZZ_SEEDS", &seeds)
            .arg(format!("-max_total_time={}", plan.each.as_secs()))
            .arg(format!("-timeout={SLOW}"))
            .arg(format!("-rss_limit_mb={MEMORY}"))
            .arg(format!("-max_len={LENGTH}"))
            .arg(format!("-artifact_prefix={}/", directory("found")?.display()))
            .args([&found, &seeds]);
        if kept.is_dir() {
            command.arg(std::path::absolute(kept)?);
        }
        Ok(command)
    }
}

/// The test that runs frames through the programs.
fn programs(plan: Plan) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = prioritised(Path::new(&cargo), plan);
    command
        .args(["test", "--workspace", "--quiet", "--test", "kernel", "--", "storm", "--nocapture"])
        .env(PROGRAMS_SECONDS, plan.each.as_secs().to_string());
    command
}

fn prioritised(program: &Path, plan: Plan) -> Command {
    if !plan.idle {
        return Command::new(program);
    }
    let mut command = Command::new("chrt");
    command.args(["--idle", "0"]).arg(program);
    command
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
