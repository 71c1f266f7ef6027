//! Services: their tasks' life, and why one does not run.

use std::{collections::BTreeSet, thread, time::Duration};

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, Task, eventually};

group!("service": replicas_are_spread, global_is_one_per_node, the_environment_of_a_task,
    a_missing_command_fails_paced, restart_conditions, a_killed_task_is_replaced,
    a_crashed_nodes_tasks_move, duplicate_names_are_refused, bad_options_are_refused_by_name,
    stopping_is_asked_first, then_it_is_made, places_of_its_own, exec_is_the_command,
    whoami_does_as_it_is_told);

fn replicas_are_spread(c: &Cluster) -> Result<()> {
    c.service("--name spread --replicas 5", "sleep infinity")?;
    let nodes: BTreeSet<_> = c.wait_running("spread", 5)?.into_iter().map(|t| t.node).collect();
    ensure!(nodes.len() == 5, "five tasks on {nodes:?}");
    let ps = c.meshctl("m2", "service ps spread")?.ok()?;
    for word in ["spread.1", "spread.5", "w2", "Running"] {
        ensure!(ps.contains(word), "service ps lacks {word}:\n{ps}");
    }
    Ok(())
}

fn global_is_one_per_node(c: &Cluster) -> Result<()> {
    c.service("--name all --mode global", "sleep infinity")?;
    let nodes: BTreeSet<_> = c.wait_running("all", 5)?.into_iter().map(|t| t.node).collect();
    ensure!(nodes.len() == 5, "{nodes:?}");
    c.meshctl("m1", "service scale all=2")?.refused(&["all", "replicated"])
}

fn the_environment_of_a_task(c: &Cluster) -> Result<()> {
    c.service("--name env --replicas 1 --env COLOR=blue --hostname box", "sleep infinity")?;
    let task = c.wait_running("env", 1)?.pop().context("no task")?;
    let env = c.task_sh("env.1", "env; hostname")?;
    for line in ["COLOR=blue", "MESH_SERVICE=env", &format!("MESH_NODE={}", task.node), "box"] {
        ensure!(env.lines().any(|l| l == line), "no {line} in:\n{env}");
    }
    ensure!(env.contains("MESH_TASK=env.1."), "{env}");
    // Its own processes alone: an init, `sleep`, and this.
    let processes = c.task_sh("env.1", "cat /proc/[0-9]*/comm")?;
    ensure!(processes.lines().any(|name| name == "sleep"), "{processes}");
    ensure!(processes.lines().count() < 6, "it sees others' processes:\n{processes}");
    ensure!(c.task_sh("env.1", "which meshctl")?.ends_with("meshctl"));
    Ok(())
}

/// The bad input of the issue: a reason to read, restarts at their pace, no busy loop.
fn a_missing_command_fails_paced(c: &Cluster) -> Result<()> {
    let create = "service create --detach --name broken --replicas 1 --restart-delay 2s \
                  --runtime process -- no-such-command --at-all";
    c.meshctl("m1", create)?.ok()?;
    let failed = eventually("a failed task", SOON, || {
        let tasks = c.tasks("broken")?;
        tasks
            .into_iter()
            .find(|t| matches!(t.state.as_str(), "failed" | "rejected"))
            .context("none")
    })?;
    ensure!(failed.error.contains("no-such-command"), "the reason is {:?}", failed.error);
    let before = c.tasks("broken")?.len();
    // How often it is tried in a given time is the point here.
    thread::sleep(Duration::from_secs(6));
    let tried = c.tasks("broken")?.len().saturating_sub(before);
    ensure!((1..=4).contains(&tried), "{tried} restarts in 6 s with a delay of 2 s");
    let ps = c.meshctl("m1", "service ps --no-trunc broken")?.ok()?;
    ensure!(ps.contains("no-such-command"), "service ps gives no reason:\n{ps}");
    Ok(())
}

fn restart_conditions(c: &Cluster) -> Result<()> {
    let create = |name: &str, options: &str, script: &str| {
        let line = format!(
            "service create --detach --name {name} --restart-delay 100ms {options} \
             --runtime process -- {script}"
        );
        c.meshctl("m1", &line)?.ok()
    };
    create("never", "--restart-condition none", "false")?;
    create("unless-well", "--restart-condition on-failure", "true")?;
    create("thrice", "--restart-condition any --restart-max-attempts 2", "false")?;
    create("always", "--restart-condition any", "true")?;
    eventually("five tries of `always`", SOON, || {
        let tasks = c.tasks("always")?;
        ensure!(tasks.len() >= 5, "{} tries", tasks.len());
        Ok(())
    })?;
    let ended = |tasks: &[Task], state: &str| tasks.iter().filter(|t| t.state == state).count();
    let never = c.tasks("never")?;
    ensure!(never.len() == 1 && ended(&never, "failed") == 1, "never: {never:?}");
    let well = c.tasks("unless-well")?;
    ensure!(well.len() == 1 && ended(&well, "complete") == 1, "unless-well: {well:?}");
    eventually("three tries of `thrice`", SOON, || {
        let tasks = c.tasks("thrice")?;
        ensure!(ended(&tasks, "failed") == 3, "{tasks:?}");
        Ok(())
    })?;
    ensure!(c.tasks("thrice")?.len() == 3, "thrice: {:?}", c.tasks("thrice")?);
    Ok(())
}

fn a_killed_task_is_replaced(c: &Cluster) -> Result<()> {
    c.service("--name web --replicas 2 --restart-delay 100ms", crate::cluster::WHOAMI)?;
    let before = c.wait_running("web", 2)?;
    // Signals to the first process of a PID namespace count only from outside it, so from its node.
    let id = &before[0].id;
    let pid = pid_of(c, &before[0])?;
    c.on(&before[0].node, &["kill", "-KILL", &pid.to_string()])?.ok()?;
    eventually("another task in its place", SOON, || {
        let now = c.running("web")?;
        ensure!(now.len() == 2 && now.iter().all(|t| t.id != *id), "{now:?}");
        Ok(())
    })?;
    let dead = c.tasks("web")?.into_iter().find(|t| t.id == *id).context("no history")?;
    ensure!(dead.state == "failed" && !dead.error.is_empty(), "{dead:?}");
    Ok(())
}

fn a_crashed_nodes_tasks_move(c: &Cluster) -> Result<()> {
    c.service("--name web --replicas 5 --publish 8080:80", crate::cluster::WHOAMI)?;
    c.wait_running("web", 5)?;
    c.lab.crash("w2")?;
    let moved = eventually("five tasks without w2", Duration::from_secs(60), || {
        let running = c.running("web")?;
        ensure!(running.len() == 5 && running.iter().all(|t| t.node != "w2"), "{running:?}");
        Ok(())
    });
    c.lab.start("w2")?;
    moved?;
    eventually("w2 to answer for the service again", SOON, || {
        c.fetch("client", "http://192.0.2.22:8080/")
    })?;
    Ok(())
}

fn duplicate_names_are_refused(c: &Cluster) -> Result<()> {
    c.service("--name twin --replicas 1", "sleep infinity")?;
    let again = "service create --name twin --runtime process -- sleep 60";
    c.meshctl("m3", again)?.refused(&["twin"])
}

fn bad_options_are_refused_by_name(c: &Cluster) -> Result<()> {
    for (option, word) in [
        ("--replicas -1", "replicas"),
        ("--mode sideways", "mode"),
        ("--network nowhere", "nowhere"),
        ("--publish 99999:80", "99999"),
        ("--env =x", "env"),
        ("--restart-condition sometimes", "restart-condition"),
    ] {
        let line = format!("service create --name bad {option} --runtime process -- sleep 60");
        c.meshctl("m1", &line)?.refused(&[word])?;
    }
    c.meshctl("m1", "service create --name no/slash --runtime process -- sleep 60")?
        .refused(&["name"])?;
    c.meshctl("m1", "service inspect bad")?.refused(&["bad"])
}

/// The stop signal comes first, the kill only after the grace period.
fn stopping_is_asked_first(c: &Cluster) -> Result<()> {
    let heard = std::path::Path::new("/tmp/mesh-test-heard");
    let _ = std::fs::remove_file(heard);
    let script =
        format!("trap 'echo bye > {}; exit 0' USR1; while :; do sleep 0.1; done", heard.display());
    let options = ["--name", "polite", "--stop-signal", "SIGUSR1", "--stop-grace-period", "10s"];
    c.service_args(&options, &["bash", "-c", &script])?;
    c.wait_running("polite", 1)?;
    c.meshctl("m1", "service rm polite")?.ok()?;
    eventually("the signal to be heard", SOON, || {
        std::fs::read_to_string(heard).context("the task did not hear it")
    })?;
    std::fs::remove_file(heard).context("remove the note")
}

/// A task that will not hear is killed when the grace period is over, not before.
fn then_it_is_made(c: &Cluster) -> Result<()> {
    let options = ["--name", "deaf", "--stop-grace-period", "2s"];
    c.service_args(&options, &["bash", "-c", "trap '' TERM; while :; do sleep 0.1; done"])?;
    let task = c.wait_running("deaf", 1)?.pop().context("no task")?;
    let pid = pid_of(c, &task)?;
    let alive = || std::path::Path::new(&format!("/proc/{pid}")).exists();
    let begin = std::time::Instant::now();
    c.meshctl("m1", "service rm deaf")?.ok()?;
    eventually("the task to be gone", SOON, || {
        ensure!(!alive(), "it lives");
        Ok(())
    })?;
    let took = begin.elapsed();
    ensure!(took > Duration::from_millis(1900), "it was killed after {took:?}");
    ensure!(took < Duration::from_secs(6), "it was killed only after {took:?}");
    Ok(())
}

/// The host's pid of a task's first process.
fn pid_of(c: &Cluster, task: &Task) -> Result<u64> {
    let inspect = c.api("GET", &format!("/tasks/{}", task.id))?;
    inspect["Status"]["ContainerStatus"]["PID"].as_u64().context("no pid")
}

/// A task has namespaces and a cgroup of its own.
fn places_of_its_own(c: &Cluster) -> Result<()> {
    c.service("--name one --replicas 1", "sleep infinity")?;
    let task = c.wait_running("one", 1)?.pop().context("no task")?;
    let pid = pid_of(c, &task)?;
    let node = c.lab.ps().into_iter().find(|row| row.name == task.node).context("no such node")?;
    let daemon = node.pid.context("no daemon")?;
    for kind in ["net", "mnt", "pid", "uts", "ipc"] {
        let of = |pid: i64| std::fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        let (own, nodes) = (of(pid.try_into()?)?, of(daemon.into())?);
        ensure!(own != nodes, "the task is in its node's {kind} namespace");
    }
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let under = format!("/mesh/{}/{}/", c.lab.name(), task.node);
    ensure!(cgroup.contains(&under), "it is not under {under} but in {cgroup}");
    ensure!(c.task_sh("one.1", "ps -e -o comm= | sort -u | head -1")? != "meshd");
    Ok(())
}

fn whoami_does_as_it_is_told(c: &Cluster) -> Result<()> {
    c.service(
        "--name web --replicas 1 --env COLOR=blue --publish 8080:80",
        crate::cluster::WHOAMI,
    )?;
    let curl = |arguments: &str| {
        c.on("client", &["sh", "-c", &format!("curl -sS --max-time 8 {arguments}")])?.ok()
    };
    let base = "http://192.0.2.12:8080";
    eventually("an answer", SOON, || c.fetch("client", base))?;
    let answer = c.fetch("client", base)?;
    for key in ["task", "service", "node", "client", "server", "protocol"] {
        ensure!(answer[key].as_str().is_some_and(|text| !text.is_empty()), "no {key}: {answer}");
    }
    ensure!(curl(&format!("{base}/env"))?.contains("COLOR"), "/env lacks the environment");
    let took: f64 =
        curl(&format!("-o /dev/null -w '%{{time_total}}' '{base}/?delay=1s'"))?.parse()?;
    ensure!((1.0..3.0).contains(&took), "a delay of 1 s took {took} s");
    let health = || curl(&format!("-o /dev/null -w '%{{http_code}}' {base}/health"));
    ensure!(health()? == "200", "{}", health()?);
    curl(&format!("-X POST '{base}/health?ok=false'"))?;
    ensure!(health()? == "503", "{}", health()?);
    Ok(())
}

fn exec_is_the_command(c: &Cluster) -> Result<()> {
    c.service("--name box --replicas 3", "sleep infinity")?;
    for task in c.wait_running("box", 3)? {
        // By name and by id, from whichever manager.
        for (manager, name) in [("m1", &task.name), ("m3", &task.id)] {
            let said = c.meshctl(manager, &format!("task exec {name} -- sh -c env"))?.ok()?;
            ensure!(said.contains(&format!("MESH_NODE={}", task.node)), "{said}");
        }
    }
    ensure!(c.in_task("box.1", &["sh", "-c", "exit 7"])?.status == 7);
    c.in_task("box.9", &["true"])?.refused(&["box.9"])?;
    ensure!(c.in_task("box.1", &["no-such-command"])?.status != 0);
    Ok(())
}
