//! What tasks write to their output, from all nodes.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually, run};

group!("logs": both_clients_show_the_output_of_all_nodes, one_task_alone, what_ended_is_still_told,
    who_follows_gets_successors_too, a_node_that_does_not_answer_is_named);

/// A command line that goes on; ended when dropped.
struct Following {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Following {
    fn start(c: &Cluster, program: &str, node: &str, line: &str) -> Result<Self> {
        let program =
            if program == "docker" { "docker".into() } else { c.lab.meshctl().to_owned() };
        let mut command = c.host_command(program, node);
        command.args(line.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start a client")?;
        let stdout = child.stdout.take().context("no output")?;
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = Arc::clone(&lines);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Self { child, lines })
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn wait_for(&self, words: &[&str]) -> Result<()> {
        eventually(&format!("a line with {words:?}"), SOON, || {
            let lines = self.lines();
            let has = |line: &String| words.iter().all(|word| line.contains(word));
            ensure!(lines.iter().any(has), "{lines:?}");
            Ok(())
        })
    }

    fn wait_end(mut self) -> Result<Vec<String>> {
        eventually("the client to end", SOON, || {
            let ended = self.child.try_wait()?.context("it goes on")?;
            ensure!(ended.success(), "{ended}");
            Ok(())
        })?;
        Ok(self.lines())
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Each task says who it is on both streams, and goes on.
fn talkers(c: &Cluster, options: &[&str]) -> Result<()> {
    let say = "echo one from $MESH_NODE; echo two from $MESH_NODE; echo oops >&2; sleep infinity";
    c.service_args(options, &["sh", "-c", say])
}

/// Waits until a service's whole output is there.
fn wait_lines(c: &Cluster, target: &str, count: usize) -> Result<()> {
    eventually(&format!("{count} lines of {target}"), SOON, || {
        let raw = c.meshctl("m1", &format!("service logs --raw {target}"))?.ok()?;
        ensure!(raw.lines().count() == count, "{raw}");
        Ok(())
    })
}

fn both_clients_show_the_output_of_all_nodes(c: &Cluster) -> Result<()> {
    talkers(c, &["--name", "all", "--mode", "global"])?;
    c.wait_running("all", 5)?;
    wait_lines(c, "all", 10)?;
    for (who, node) in [("docker", "m2"), ("meshctl", "m3")] {
        let logs = |options: &str| {
            let line = format!("service logs {options} all");
            if who == "docker" { c.docker(node, &line) } else { c.meshctl(node, &line) }
        };
        let all = logs("")?;
        ensure!(all.status == 0, "{who}: {}", all.stderr);
        for node in ["m1", "m2", "m3", "w1", "w2"] {
            let line = all.stdout.lines().find(|line| line.ends_with(&format!("one from {node}")));
            let line =
                line.with_context(|| format!("{who}: nothing of {node}:\n{}", all.stdout))?;
            ensure!(line.starts_with("all.") && line.contains(&format!("@{node}")), "{line}");
        }
        ensure!(all.stderr.lines().filter(|line| line.ends_with("| oops")).count() == 5);
        // Of each task the last line, whichever stream it was on.
        let last = logs("--tail 1")?;
        let count = last.stdout.lines().count() + last.stderr.lines().count();
        ensure!(count == 5, "{who} --tail 1: {last:?}");
        let raw = logs("--raw")?.ok()?;
        ensure!(raw.lines().all(|line| line.contains(" from ")) && !raw.contains('|'), "{raw}");
        let timed = logs("--timestamps --raw")?.ok()?;
        ensure!(timed.lines().all(|line| line.starts_with("20")), "{timed}");
        let mut sorted: Vec<_> = timed.lines().collect();
        sorted.sort_unstable();
        ensure!(sorted == timed.lines().collect::<Vec<_>>(), "{who}: out of order:\n{timed}");
        ensure!(logs("--since 2100-01-01T00:00:00Z")?.ok()?.is_empty(), "{who} --since");
        ensure!(!logs("--since 10m")?.ok()?.is_empty(), "{who} --since 10m");
        let details = logs("--details")?.ok()?;
        let told = details.contains("com.docker.swarm.node.id=");
        // The stock client takes out what it understands itself.
        ensure!(told == (who == "meshctl"), "{who} --details: {details}");
        logs("--tail some")?.refused(&["tail"])?;
    }
    c.docker("m1", "service logs nosuch")?.refused(&["no such", "nosuch"])?;
    c.meshctl("m1", "service logs nosuch")?.refused(&["no such", "nosuch"])
}

fn one_task_alone(c: &Cluster) -> Result<()> {
    talkers(c, &["--name", "pair", "--replicas", "2"])?;
    let tasks = c.wait_running("pair", 2)?;
    wait_lines(c, "pair", 4)?;
    for task in &tasks {
        let expected = format!("one from {0}\ntwo from {0}", task.node);
        for target in [&task.id, &task.name] {
            let line = format!("service logs --raw {target}");
            ensure!(c.docker("m3", &line)?.ok()? == expected, "docker {line}");
            ensure!(c.meshctl("m2", &line)?.ok()? == expected, "meshctl {line}");
        }
    }
    Ok(())
}

fn what_ended_is_still_told(c: &Cluster) -> Result<()> {
    let mut create = c.host_command(c.lab.meshctl().to_owned(), "m1");
    create.args(["service", "create", "--detach", "--name", "brief", "--runtime", "process"]);
    create.args(["--restart-condition", "none", "--", "sh", "-c", "echo last words; exit 3"]);
    run(create, b"")?.ok()?;
    eventually("its end", SOON, || {
        let tasks = c.tasks("brief")?;
        ensure!(tasks.iter().any(|task| task.state == "failed"), "{tasks:?}");
        Ok(())
    })?;
    let task = c.tasks("brief")?.pop().context("no task")?;
    for target in ["brief", "brief.1", &task.id] {
        let line = format!("service logs --raw {target}");
        ensure!(c.docker("m2", &line)?.ok()? == "last words", "docker {line}");
        ensure!(c.meshctl("m1", &line)?.ok()? == "last words", "meshctl {line}");
    }
    // Who follows what has ended does not wait for more.
    let line = format!("service logs --raw --follow {}", task.id);
    let lines = Following::start(c, "meshctl", "m1", &line)?.wait_end()?;
    ensure!(lines == ["last words"], "{lines:?}");
    Ok(())
}

fn who_follows_gets_successors_too(c: &Cluster) -> Result<()> {
    let options = ["--name", "tick", "--replicas", "1", "--restart-delay", "100ms"];
    let script = "echo begun as $MESH_TASK; read line < /tmp/mesh-tick-$MESH_TASK; echo $line";
    let script = format!("mkfifo /tmp/mesh-tick-$MESH_TASK; {script}");
    c.service_args(&options, &["sh", "-c", &script])?;
    let first = c.wait_running("tick", 1)?.pop().context("no task")?;
    let all = Following::start(c, "docker", "m2", "service logs --follow --raw tick")?;
    let place = Following::start(c, "meshctl", "m3", "service logs -f tick.1")?;
    all.wait_for(&["begun as", &first.id])?;
    place.wait_for(&["begun as", &first.id])?;
    let say = |id: &str| {
        let name = format!("/tmp/mesh-tick-tick.1.{id}");
        std::fs::write(&name, "good bye\n").and_then(|()| std::fs::remove_file(name))
    };
    say(&first.id)?;
    all.wait_for(&["good bye"])?;
    let second = eventually("a successor", SOON, || {
        c.running("tick")?.into_iter().find(|task| task.id != first.id).context("none yet")
    })?;
    all.wait_for(&["begun as", &second.id])?;
    place.wait_for(&["begun as", &second.id])?;
    c.meshctl("m1", "service rm tick")?.ok()?;
    let lines = place.wait_end()?;
    ensure!(lines.iter().filter(|line| line.contains("begun as")).count() == 2, "{lines:?}");
    all.wait_end()?;
    let _ = std::fs::remove_file(format!("/tmp/mesh-tick-tick.1.{}", second.id));
    Ok(())
}

fn a_node_that_does_not_answer_is_named(c: &Cluster) -> Result<()> {
    let options = ["--name", "all", "--mode", "global"];
    let script = "rm -f /tmp/mesh-more-$MESH_NODE; mkfifo /tmp/mesh-more-$MESH_NODE; \
        echo one from $MESH_NODE; while read line < /tmp/mesh-more-$MESH_NODE; do echo $line; done";
    c.service_args(&options, &["sh", "-c", script])?;
    c.wait_running("all", 5)?;
    wait_lines(c, "all", 5)?;
    let follow = Following::start(c, "docker", "m1", "service logs -f --raw all")?;
    follow.wait_for(&["one from w2"])?;
    c.lab.end_daemon("w2", mesh_lab::DaemonSignal::Kill)?;
    let told = told_of_w2(c);
    let said = std::fs::write("/tmp/mesh-more-w2", "meanwhile\n");
    c.lab.start("w2")?;
    told?;
    said?;
    wait_lines(c, "all", 6)?;
    // Its stream is taken up where it broke: nothing is missing, and nothing comes twice.
    follow.wait_for(&["meanwhile"])?;
    let lines = follow.lines();
    ensure!(lines.iter().filter(|line| line.contains("one from w2")).count() == 1, "{lines:?}");
    for node in ["m1", "m2", "m3", "w1", "w2"] {
        std::fs::remove_file(format!("/tmp/mesh-more-{node}"))?;
    }
    Ok(())
}

fn told_of_w2(c: &Cluster) -> Result<()> {
    for (who, said) in [
        ("docker", c.docker("m1", "service logs all")?),
        ("meshctl", c.meshctl("m2", "service logs all")?),
    ] {
        ensure!(said.stdout.contains("one from w1"), "{who}: {said:?}");
        ensure!(!said.stdout.contains("one from w2"), "{who}: {said:?}");
        said.refused(&["incomplete", "w2"])?;
    }
    Ok(())
}
