//! The daemons' own log, in the form for machines.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("logging": lines_are_json_with_ids, nothing_secret_is_logged);

/// All lines of a node's log.
fn lines(c: &Cluster, node: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(c.lab.places().log(node))?;
    // The last line may be half written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line| serde_json::from_str(line).with_context(|| format!("{node}: {line}"));
    whole.lines().map(parse).collect()
}

fn is_id(value: &Value) -> bool {
    value.as_str().is_some_and(|id| {
        id.len() == 25 && id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    })
}

fn lines_are_json_with_ids(c: &Cluster) -> Result<()> {
    let create = "service create --detach --name bad --restart-condition none --runtime process";
    c.meshctl("m1", &format!("{create} -- false"))?.ok()?;
    let task = eventually("the task to fail", SOON, || {
        let failed = c.tasks("bad")?.into_iter().find(|task| task.state == "failed");
        failed.context("no failed task")
    })?;
    eventually("its end in its node's log", SOON, || {
        let lines = lines(c, &task.node)?;
        let line = lines.iter().find(|line| line["task"] == *task.id).context("no line")?;
        ensure!(line["message"] == "task ended" && line["level"] == "INFO", "{line}");
        ensure!(line["state"] == "failed" && is_id(&line["service"]), "{line}");
        ensure!(line["reason"].as_str().is_some_and(|r| r.contains("exit (1)")), "{line}");
        Ok(())
    })?;
    let admitted = lines(c, "m1")?.into_iter().filter(|l| l["message"] == "admitted a node");
    ensure!(admitted.count() >= 4);
    for node in ["m1", "m2", "m3", "w1", "w2"] {
        for line in lines(c, node)? {
            for field in ["timestamp", "level", "target", "message"] {
                ensure!(line[field].is_string(), "{node}: no {field}: {line}");
            }
            for id in ["node", "task", "service", "network", "cluster"] {
                ensure!(line.get(id).is_none_or(is_id), "{node}: {id} is no id: {line}");
            }
        }
    }
    Ok(())
}

fn nothing_secret_is_logged(c: &Cluster) -> Result<()> {
    let swarm = c.api("GET", "/swarm")?;
    let tokens = ["Worker", "Manager"].map(|role| swarm["JoinTokens"][role].as_str());
    for node in ["m1", "m2", "m3", "w1", "w2"] {
        let text = fs::read_to_string(c.lab.places().log(node))?;
        for token in tokens {
            let secret = token.and_then(|token| token.rsplit('-').next()).context("no token")?;
            ensure!(!text.contains(secret), "{node} logged a join token");
        }
        ensure!(!text.contains("PRIVATE KEY"), "{node} logged a key");
    }
    Ok(())
}
