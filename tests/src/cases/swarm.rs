//! The cluster's own settings.

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("swarm": settings_change_and_count, settings_that_mean_nothing_here_are_refused,
    both_clients_show_the_root);

fn settings_change_and_count(c: &Cluster) -> Result<()> {
    let history = |c: &Cluster| -> Result<i64> {
        let swarm = c.lab.call("m2", "GET", "/swarm", None)?;
        swarm["Spec"]["Orchestration"]["TaskHistoryRetentionLimit"].as_i64().context("no limit")
    };
    ensure!(history(c)? == 5);
    ensure!(c.docker("m1", "swarm update --task-history-limit 1")?.ok()? == "Swarm updated.");
    ensure!(history(c)? == 1);
    let create = "service create --detach --name brief --restart-delay 100ms --runtime process \
                  -- false";
    c.meshctl("m1", create)?.ok()?;
    eventually("five tries, of which the history keeps one", SOON, || {
        let tasks = c.tasks("brief")?;
        let ended = tasks.iter().filter(|task| task.desired == "shutdown").count();
        let newest = tasks.first().context("no task")?;
        let tried = c.api("GET", &format!("/tasks/{}", newest.id))?;
        let since = tried["Version"]["Index"].as_u64().unwrap_or_default();
        ensure!(ended <= 2, "{ended} ended ones are kept");
        let first = c.api("GET", "/services/brief")?["Version"]["Index"].as_u64();
        ensure!(since > first.unwrap_or_default() + 20, "too few tries to tell");
        Ok(())
    })?;
    let line = "swarm update --task-history-limit 5 --cert-expiry 720h --reschedule-after 20s";
    ensure!(c.meshctl("m3", line)?.ok()? == "Swarm updated.");
    let swarm = c.api("GET", "/swarm")?;
    let spec = &swarm["Spec"];
    ensure!(spec["CAConfig"]["NodeCertExpiry"] == 720 * 3600 * 1_000_000_000_u64, "{spec}");
    // The stock client does not know it, and leaves it as it is.
    c.docker("m1", "swarm update --cert-expiry 2160h")?.ok()?;
    let swarm = c.api("GET", "/swarm")?;
    let after = &swarm["Spec"]["Orchestration"]["RescheduleAfter"];
    ensure!(*after == 20_000_000_000_u64, "{after}");
    c.meshctl("m1", "swarm update --reschedule-after 15s")?.ok().map(drop)
}

fn settings_that_mean_nothing_here_are_refused(c: &Cluster) -> Result<()> {
    for (flag, word) in [
        ("--autolock", "autolock"),
        ("--dispatcher-heartbeat 10s", "dispatcher-heartbeat"),
        ("--external-ca protocol=cfssl,url=https://192.0.2.9", "external-ca"),
        ("--max-snapshots 3", "max-snapshots"),
        ("--snapshot-interval 100", "snapshot-interval"),
        ("--cert-expiry 1s", "certificate expiry"),
    ] {
        c.docker("m1", &format!("swarm update {flag}"))?.refused(&[word])?;
        c.meshctl("m1", &format!("swarm update {flag}"))?.refused(&[word])?;
    }
    c.meshctl("m1", "swarm update")?.refused(&["nothing to change"])
}

fn both_clients_show_the_root(c: &Cluster) -> Result<()> {
    let (theirs, ours) = (c.docker("m1", "swarm ca")?.ok()?, c.meshctl("m2", "swarm ca")?.ok()?);
    ensure!(theirs.starts_with("-----BEGIN CERTIFICATE-----"), "{theirs}");
    ensure!(theirs.trim() == ours.trim(), "{theirs}\n{ours}");
    Ok(())
}
