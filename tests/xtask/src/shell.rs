//! Running other programs: what they print, and what they say when they fail.

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// Runs a command and gives what it printed, trimmed; its own words are in the error.
pub(crate) fn output(program: impl AsRef<Path>, args: &[&str]) -> Result<String> {
    let program = program.as_ref();
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} {}: {} ({})", program.display(), args.join(" "), said.trim(), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs a command whose output the user sees.
pub(crate) fn visible(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// The cargo that runs this.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args);
    cargo
}

/// Builds, for release, all that the demo and the benchmarks run: the same selection for both, and
/// with the features of the whole workspace, so that none makes the other build again.
pub(crate) fn build_release() -> Result<()> {
    println!("building (release)");
    let binaries = ["--bin", "meshd", "--bin", "meshctl", "--bin", "mesh-bench"];
    visible(cargo(&["build", "--release", "--workspace"]).args(binaries))
}

/// Tries until it works; the last failure is the error.
pub(crate) fn eventually<T>(within: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
            Err(e) => return Err(e.context(format!("not within {within:?}"))),
            done => return done,
        }
    }
}

/// Fails, with the remedy, unless this runs as root.
pub(crate) fn require_root(what: &str) -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let root = uid.is_some_and(|ids| ids.split_whitespace().nth(1) == Some("0"));
    ensure!(root, "{what} needs root: it makes network namespaces and loads BPF programs");
    Ok(())
}

/// Whether a program is on the PATH.
pub(crate) fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    // Root's tools are not on everyone's PATH.
    let more = ["/usr/sbin", "/sbin"].map(Into::into);
    env::split_paths(&path).chain(more).any(|dir| dir.join(program).is_file())
}
