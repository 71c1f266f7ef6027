//! What users feel when something fails or is changed: events of `mesh-bench trust`, each once.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Demo, LAB};

/// Events as the benchmark calls them, and the lines' claims. A crashed worker comes back without
/// tasks; the roll-out after it spreads them again.
pub(super) const EVENTS: [(&str, &str); 4] = [
    ("leader killed", "leader killed under load"),
    ("meshd killed and restarted", "meshd killed and restarted"),
    ("worker crashed", "worker crashed under load"),
    ("roll-out", "roll-out under load"),
];

impl Demo {
    /// What an event comes to; an error if a promise is broken.
    pub(super) fn survives(&self, event: &str) -> Result<String> {
        let mut child = Command::new(&self.bench)
            .args(["event", event, "--lab", LAB])
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", self.bench.display()))?;
        let steps = child.stderr.take().context("no standard error")?;
        let mut last = String::new();
        for step in BufReader::new(steps).lines() {
            last = step.context("read what goes on")?;
            self.progress(&last);
        }
        let mut said = String::new();
        let mut out = child.stdout.take().context("no standard output")?;
        out.read_to_string(&mut said).context("read the figures")?;
        let status = child.wait().context("wait for the event")?;
        ensure!(status.success(), "{last}");
        let said: Value = serde_json::from_str(&said).with_context(|| format!("{said:?}"))?;
        let figures = said["said"].as_str().context("no figures")?.to_owned();
        if said["met"] != true {
            bail!("{figures}");
        }
        Ok(figures)
    }
}
