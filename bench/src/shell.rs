//! Running commands in namespaces, and cleaning up after them.

use std::{
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Runs a command line (split at blanks) and returns its standard output.
pub(crate) fn sh(line: &str) -> Result<String> {
    let output = command(line)?.output().with_context(|| format!("running `{line}`"))?;
    checked(line, &output)
}

fn checked(line: &str, output: &Output) -> Result<String> {
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}` ended with {}: {}", output.status, stderr.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn command(line: &str) -> Result<Command> {
    let mut words = line.split_whitespace();
    let program = words.next().context("an empty command line")?;
    let mut command = Command::new(program);
    command.args(words);
    Ok(command)
}

/// A network namespace as `nsenter --net=` takes it.
#[derive(Debug, Clone)]
pub(crate) struct Netns(pub(crate) PathBuf);

impl Netns {
    /// A namespace that `ip netns` knows.
    pub(crate) fn named(name: &str) -> Self {
        Self(PathBuf::from("/run/netns").join(name))
    }

    fn line(&self, rest: &str) -> String {
        format!("nsenter --net={} {rest}", self.0.display())
    }

    /// Runs a command line inside.
    pub(crate) fn sh(&self, rest: &str) -> Result<String> {
        sh(&self.line(rest))
    }

    /// Runs a workload of this very program inside and parses what it prints.
    pub(crate) fn work(&self, cpu: usize, args: &str) -> Result<Value> {
        let exe = std::env::current_exe()?;
        let out = self.sh(&format!("{} work --cpu {cpu} {args}", exe.display()))?;
        serde_json::from_str(&out).with_context(|| format!("output of `{args}`: {out}"))
    }

    /// Starts a workload server inside; it ends with the returned guard.
    pub(crate) fn serve(&self, cpu: usize, args: &str) -> Result<Server> {
        let exe = std::env::current_exe()?;
        let line = self.line(&format!("{} work --cpu {cpu} serve {args}", exe.display()));
        let mut child = command(&line)?.stdout(Stdio::piped()).spawn()?;
        let mut ready = String::new();
        let stdout = child.stdout.take().context("the server has no standard output")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut ready)?;
        ensure!(ready.contains("ready"), "the workload server `{line}` did not start");
        Ok(Server(child))
    }
}

/// A server under way; killed when dropped.
#[derive(Debug)]
pub(crate) struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
