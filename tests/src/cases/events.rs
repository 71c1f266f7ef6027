//! What happens is told to those who watch, by either command line, on any manager.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("events": what_happens_is_told_as_it_happens, the_past_is_remembered_and_has_an_end,
    watching_ends_with_the_managers_office, networks_that_nothing_uses_are_pruned,
    what_is_no_container_is_refused_with_the_remedy, disk_use_and_facts_are_told);

/// A client that watches; what it said so far.
struct Watch {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Watch {
    fn start(c: &Cluster, client: &str, node: &str, line: &str) -> Result<Self> {
        let program = if client == "meshctl" { c.lab.meshctl().to_owned() } else { client.into() };
        let mut command = c.host_command(program, node);
        command.args(line.split_whitespace()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start it")?;
        let out = child.stdout.take().context("no output")?;
        let said = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&said);
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if let Ok(mut said) = kept.lock() {
                    said.push(line);
                }
            }
        });
        Ok(Self { child, said })
    }

    fn said(&self) -> Vec<String> {
        self.said.lock().map(|said| said.clone()).unwrap_or_default()
    }

    /// Waits for a line that has all of these words.
    fn hears(&self, words: &[&str]) -> Result<()> {
        eventually(&format!("an event with {words:?}"), SOON, || {
            let said = self.said();
            let has = |line: &String| words.iter().all(|word| line.contains(word));
            ensure!(said.iter().any(has), "{said:#?}");
            Ok(())
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes networks until a watcher hears of one: from then on it misses nothing.
fn tuned_in(c: &Cluster, watch: &Watch, name: &str) -> Result<()> {
    let mut number = 0;
    eventually("the first event", SOON, || {
        number += 1;
        c.network(&format!("{name}{number}"))?;
        ensure!(watch.said().iter().any(|line| line.contains(name)), "{:?}", watch.said());
        Ok(())
    })
}

fn what_happens_is_told_as_it_happens(c: &Cluster) -> Result<()> {
    let stock = Watch::start(c, "docker", "m2", "events")?;
    let own =
        Watch::start(c, "meshctl", "m3", "events --filter type=service --filter type=network")?;
    let tasks = Watch::start(
        c,
        "meshctl",
        "m1",
        "events --filter type=task --filter type=network --format json",
    )?;
    for watch in [&stock, &own, &tasks] {
        tuned_in(c, watch, "tune")?;
    }
    c.service("--name web --replicas 1", "sleep infinity")?;
    c.scale("web", 2)?;
    c.meshctl("m1", "node update --availability pause w1")?.ok()?;
    c.meshctl("m1", "node update --availability active w1")?.ok()?;
    c.meshctl("m1", "service rm web")?.ok()?;
    for watch in [&stock, &own] {
        watch.hears(&["service create", "name=web"])?;
        watch.hears(&["service update", "replicas.old=1", "replicas.new=2"])?;
        watch.hears(&["service remove", "name=web"])?;
    }
    stock.hears(&["node update", "name=w1", "availability.new=pause"])?;
    ensure!(!own.said().iter().any(|line| line.contains(" node ")), "{:?}", own.said());
    ensure!(!stock.said().iter().any(|line| line.contains(" task ")), "{:?}", stock.said());
    tasks.hears(&[r#""Type":"task""#, r#""state.new":"running""#, r#""name":"web.2."#])?;
    Ok(())
}

fn the_past_is_remembered_and_has_an_end(c: &Cluster) -> Result<()> {
    c.network("before")?;
    for (client, node) in [("meshctl", "m1"), ("docker", "m1"), ("meshctl", "m3")] {
        eventually("the past", SOON, || {
            let begin = Instant::now();
            let line = ["events", "--since", "1m", "--until", "0s", "--filter", "network=before"];
            let said = c.client(client, node, &line)?.ok()?;
            ensure!(said.contains("network create"), "{client} on {node}: {said:?}");
            ensure!(said.lines().count() == 1, "{said}");
            ensure!(begin.elapsed() < Duration::from_secs(5), "it did not end by itself");
            Ok(())
        })?;
    }
    for (line, words) in [
        ("events --filter colour=red", "invalid filter"),
        ("events --since yesterday", "yesterday"),
    ] {
        c.meshctl("m1", line)?.refused(&[words])?;
        c.docker("m1", line)?.refused(&[words])?;
    }
    c.meshctl("w1", "events")?.refused(&["manager"])
}

fn watching_ends_with_the_managers_office(c: &Cluster) -> Result<()> {
    let mut watch = Watch::start(c, "meshctl", "m3", "events")?;
    tuned_in(c, &watch, "office")?;
    c.meshctl("m1", "node demote m3")?.ok()?;
    let ended =
        eventually("the stream to end", SOON, || watch.child.try_wait()?.context("it goes on"));
    c.meshctl("m1", "node promote m3")?.ok()?;
    c.wait_node("m1", "m3", "Reachable")?;
    ended.map(drop)
}

fn networks_that_nothing_uses_are_pruned(c: &Cluster) -> Result<()> {
    let names =
        |c: &Cluster| -> Result<String> { c.meshctl("m1", "network ls --format {{.Name}}")?.ok() };
    c.network("used")?;
    c.network("idle")?;
    c.network("--label keep=yes kept")?;
    c.service("--name web --network used", "sleep infinity")?;
    c.meshctl("m1", "network prune")?.refused(&["nothing was removed"])?;
    let old = c.meshctl("m1", "network prune --force --filter until=10m")?.ok()?;
    ensure!(old.is_empty() && names(c)?.contains("idle"), "{old}");
    let said = c.meshctl("m1", "network prune --force --filter label!=keep")?.ok()?;
    ensure!(said.contains("Deleted Networks:") && said.contains("idle"), "{said}");
    let left = names(c)?;
    ensure!(left.contains("used") && left.contains("kept") && left.contains("ingress"), "{left}");
    let said = c.docker("m1", "network prune --force")?.ok()?;
    ensure!(said.contains("kept") && !said.contains("used"), "{said}");
    ensure!(names(c)?.contains("used"), "{}", names(c)?);
    Ok(())
}

fn what_is_no_container_is_refused_with_the_remedy(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name web --replicas 1", "sleep infinity")?;
    let remedy = "service update --network-add app web";
    c.docker("m1", "network connect app web.1")?.refused(&["a task of service web", remedy])?;
    c.docker("m1", "network disconnect app web.1")?.refused(&["--network-rm app web"])?;
    c.docker("m1", "network connect app nobody")?.refused(&["no such container: nobody"])?;
    c.docker("m1", "network connect nowhere web.1")?.refused(&["network nowhere not found"])?;
    c.meshctl("m1", "network connect app web.1")?.refused(&["network-add"])
}

fn disk_use_and_facts_are_told(c: &Cluster) -> Result<()> {
    c.service("--name all --mode global", "sleep infinity")?;
    for node in ["m1", "w1"] {
        let said = c.docker(node, "system df")?.ok()?;
        let row = |kind: &str| said.lines().find(|line| line.starts_with(kind)).unwrap_or_default();
        ensure!(row("Containers").contains(" 1 "), "{node}: {said}");
        ensure!(row("Local Volumes").contains('2'), "{node}: {said}");
        let said = c.docker(node, "system df -v")?.ok()?;
        ensure!(said.contains("raft") && said.contains("state"), "{node}: {said}");
        let info = c.docker(node, "info")?;
        ensure!(!info.stdout.contains("WARNING") && !info.stderr.contains("WARNING"), "{info:?}");
        let managers = if node == "m1" { "Managers: 3" } else { "Is Manager: false" };
        ensure!(info.stdout.contains(managers), "{}", info.stdout);
    }
    Ok(())
}
