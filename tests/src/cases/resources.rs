//! What tasks may take and what is kept for them: limits that the kernel holds them to, room that
//! the scheduler counts, and what both say.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_lab::DaemonSignal;

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("resources": what_takes_too_much_memory_is_killed_and_says_so, processes_stop_at_their_limit,
    cpu_time_is_held, limits_outlive_the_daemon_and_go_with_the_task,
    what_is_reserved_is_kept_and_a_task_waits, spread_over_labels_and_not_too_many_on_a_node,
    nonsense_is_refused_before_anything_changes, both_clients_show_and_change_them);

/// A shell's way to fill memory.
const HOG: &str = "head -c 200m /dev/zero | tail";

fn what_takes_too_much_memory_is_killed_and_says_so(c: &Cluster) -> Result<()> {
    let words = ["service", "create", "--detach", "--name", "hog", "--runtime", "process"];
    let limited = ["--limit-memory", "32m", "--restart-delay", "100ms", "--", "sh", "-c", HOG];
    c.client("meshctl", "m1", &[&words[..], &limited[..]].concat())?.ok()?;
    eventually("two tries", SOON, || {
        let tasks = c.tasks("hog")?;
        let failed: Vec<_> = tasks.iter().filter(|task| task.state == "failed").collect();
        ensure!(failed.len() >= 2, "{tasks:?}");
        let reason = "task: non-zero exit (137): out of memory, limit 32MiB";
        ensure!(failed.iter().all(|task| task.error == reason), "{failed:?}");
        Ok(())
    })?;
    for client in ["meshctl", "docker"] {
        let shown = c.client(client, "m2", &["service", "ps", "--no-trunc", "hog"])?.ok()?;
        ensure!(shown.contains("out of memory, limit 32MiB"), "{client}: {shown}");
    }
    Ok(())
}

fn processes_stop_at_their_limit(c: &Cluster) -> Result<()> {
    c.service("--name few --limit-pids 5", "sleep infinity")?;
    let fork = |count| {
        let script = format!("for i in $(seq {count}); do sleep 1 & done; wait");
        c.in_task("few.1", &["sh", "-c", &script])
    };
    fork(1)?.ok()?;
    fork(9)?.refused(&["cannot fork"])?;
    ensure!(c.running("few")?.len() == 1, "the task itself goes on");
    Ok(())
}

/// CPU time of a process, by its ticks.
fn spent(pid: &str) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit(") ").next().context("no fields")?.split(' ').skip(11).take(2);
    let ticks = fields.map(|field| Ok(field.parse::<u64>()?)).sum::<Result<u64>>()?;
    Ok(Duration::from_millis(ticks * 10))
}

fn cpu_time_is_held(c: &Cluster) -> Result<()> {
    const MEASURED: Duration = Duration::from_millis(400);
    let stock = ["service", "create", "--detach", "--name", "spin", "--limit-cpu", "0.2"];
    let rest = ["--container-label", "mesh.runtime=process", "host"];
    let command = ["sh", "-c", "while :; do :; done"];
    c.client("docker", "m1", &[&stock[..], &rest[..], &command[..]].concat())?.ok()?;
    let task = c.wait_running("spin", 1)?.pop().context("no task")?;
    let pid = pid_of(c, &task.node, &task.id)?;
    let shell = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let (begin, before) = (Instant::now(), spent(shell.trim())?);
    eventually("some CPU time", SOON, || {
        let spent = spent(shell.trim())?.saturating_sub(before);
        ensure!(spent >= MEASURED, "{spent:?}");
        Ok(())
    })?;
    let took = begin.elapsed();
    // A fifth of a CPU needs five times as long, but for what is given out in whole periods.
    ensure!(took > 4 * MEASURED, "{MEASURED:?} of CPU time in {took:?}");
    Ok(())
}

fn pid_of(c: &Cluster, node: &str, task: &str) -> Result<String> {
    let dir = c.lab.places().state_dir(node).join("tasks").join(task);
    Ok(fs::read_to_string(dir.join("pid"))?.trim().to_owned())
}

/// The cgroups of a task, on whatever hierarchies.
fn cgroups(c: &Cluster, node: &str, task: &str) -> Vec<String> {
    let below = Path::new("mesh").join(c.lab.name().as_str()).join(node).join(task);
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let all = hierarchies.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(&below));
    all.filter(|cgroup| cgroup.exists()).map(|cgroup| cgroup.display().to_string()).collect()
}

fn limits_outlive_the_daemon_and_go_with_the_task(c: &Cluster) -> Result<()> {
    let limits = "--limit-memory 48m --limit-cpu 1.5 --limit-pids 50";
    c.service(&format!("--name kept {limits} --constraint node.hostname==w1"), "sleep infinity")?;
    let task = c.wait_running("kept", 1)?.pop().context("no task")?;
    let before = pid_of(c, "w1", &task.id)?;
    ensure!(!cgroups(c, "w1", &task.id).is_empty(), "it has no cgroup");
    c.lab.end_daemon("w1", DaemonSignal::Kill)?;
    c.lab.start("w1")?;
    c.wait_node("m1", "w1", "Ready")?;
    ensure!(pid_of(c, "w1", &task.id)? == before && c.running("kept")?[0].id == task.id);
    let hog = eventually("an exec in the task", SOON, || {
        let ran = c.in_task("kept.1", &["sh", "-c", HOG])?;
        ensure!(ran.status != 1, "{ran:?}");
        Ok(ran)
    })?;
    ensure!(hog.status == 137, "the limit is gone: {hog:?}");
    c.meshctl("m1", "service rm kept")?.ok()?;
    eventually("all its cgroups to go", SOON, || {
        let left = cgroups(c, "w1", &task.id);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

fn what_is_reserved_is_kept_and_a_task_waits(c: &Cluster) -> Result<()> {
    let node = c.api("GET", "/nodes/m1")?;
    let has = &node["Description"]["Resources"];
    let cpus = std::thread::available_parallelism()?.get();
    ensure!(has["NanoCPUs"] == cpus as u64 * 1_000_000_000, "{has} of {cpus} CPUs");
    let memory = has["MemoryBytes"].as_u64().context("no memory")?;
    let total = fs::read_to_string("/proc/meminfo")?;
    let total = total.split_whitespace().nth(1).context("no total")?.parse::<u64>()?;
    ensure!(memory == total * 1024, "{memory} of {total} KiB");

    let create = |name: &str, options: &str| {
        let line = format!(
            "service create --detach --name {name} {options} --runtime process -- sleep infinity"
        );
        c.meshctl("m1", &line)?.ok()
    };
    create("full", &format!("--replicas 6 --reserve-cpu {cpus}"))?;
    c.wait_running("full", 5)?;
    create("more", &format!("--reserve-cpu 0.5 --reserve-memory {}", memory / 2))?;
    create("huge", &format!("--reserve-memory {}", memory + 1))?;
    for (service, reason) in [
        ("full", "no suitable node (insufficient CPUs on 5 nodes)"),
        ("more", "no suitable node (insufficient CPUs on 5 nodes)"),
        ("huge", "no suitable node (insufficient memory on 5 nodes)"),
    ] {
        eventually(&format!("{service} to say why it waits"), SOON, || {
            let tasks = c.tasks(service)?;
            let waits = |task: &&crate::cluster::Task| task.state == "pending";
            let waiting = tasks.iter().find(waits).with_context(|| format!("{tasks:?}"))?;
            ensure!(waiting.error == reason, "{waiting:?}");
            Ok(())
        })?;
    }
    for client in ["meshctl", "docker"] {
        let shown = c.client(client, "m3", &["service", "ps", "--no-trunc", "more"])?.ok()?;
        ensure!(shown.contains("insufficient CPUs on 5 nodes"), "{client}: {shown}");
    }
    // Room is made: one waits no longer, the other still has none.
    c.meshctl("m1", "service scale --detach full=4")?.ok()?;
    c.wait_running("more", 1)?;
    ensure!(c.running("huge")?.is_empty());
    c.meshctl("m1", "service update --detach --reserve-memory 0 huge")?.ok()?;
    c.wait_running("huge", 1)?;
    Ok(())
}

fn spread_over_labels_and_not_too_many_on_a_node(c: &Cluster) -> Result<()> {
    c.meshctl("m1", "node update --label-add room=a w2")?.ok()?;
    let tried = (|| {
        let spread = "--replicas 6 --placement-pref spread=node.labels.room";
        c.service(&format!("--name even {spread}"), "sleep infinity")?;
        let tasks = c.wait_running("even", 6)?;
        let there = tasks.iter().filter(|task| task.node == "w2").count();
        ensure!(there == 3, "{there} of 6 tasks in room a: {tasks:?}");
        let line = "service create --detach --name most --replicas 6 --replicas-max-per-node 1 \
                    --container-label mesh.runtime=process host sleep infinity";
        c.docker("m1", line)?.ok()?;
        c.wait_running("most", 5)?;
        let listed = c.meshctl("m1", "service ls --filter name=most")?.ok()?;
        ensure!(listed.contains("5/6 (max 1 per node)"), "{listed}");
        let shown = c.docker("m1", "service ps --no-trunc most")?.ok()?;
        ensure!(shown.contains("max replicas per node reached on 5 nodes"), "{shown}");
        Ok(())
    })();
    c.meshctl("m1", "node update --label-rm room w2")?.ok()?;
    tried
}

fn nonsense_is_refused_before_anything_changes(c: &Cluster) -> Result<()> {
    for (flag, words) in [
        ("--limit-cpu 0.0000000001", "precise"),
        ("--limit-cpu 0.0001", "at least 0.001"),
        ("--limit-memory 1m", "at least 4mib"),
        ("--reserve-memory 12parsecs", "12parsecs"),
        ("--limit-pids -3", "-3"),
        ("--placement-pref zone", "zone"),
        ("--placement-pref spread=node.ip", "node.ip"),
    ] {
        let line = format!("service create --detach --name bad {flag} --runtime process -- true");
        c.meshctl("m1", &line)?.refused(&[words])?;
        let label = "--container-label mesh.runtime=process";
        let line = format!("service create --detach --name bad {flag} {label} host true");
        c.docker("m1", &line)?.refused(&[words])?;
    }
    c.meshctl("m1", "service inspect bad")?.refused(&["bad"])
}

fn both_clients_show_and_change_them(c: &Cluster) -> Result<()> {
    let given = "--limit-cpu 0.5 --limit-memory 64m --limit-pids 20 --reserve-cpu 0.25 \
                 --reserve-memory 8m --placement-pref spread=node.labels.x";
    c.service(&format!("--name all {given}"), "sleep infinity")?;
    let expected = |cpu: &str, memory: &str| {
        vec![
            " Limits:".to_owned(),
            format!("CPU: {cpu}"),
            format!("Memory: {memory}"),
            "Reservations:".to_owned(),
            "CPU: 0.25".to_owned(),
            "Memory: 8MiB".to_owned(),
            "spread=node.labels.x".to_owned(),
        ]
    };
    let shows = |client: &str, expected: &[String]| -> Result<()> {
        let shown = c.client(client, "m2", &["service", "inspect", "--pretty", "all"])?.ok()?;
        let shown: Vec<_> =
            shown.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).collect();
        let shown = shown.into_iter().map(|words| words.join(" ")).collect::<Vec<_>>().join("\n");
        for line in expected {
            ensure!(shown.contains(line.trim()), "{client}: no {line:?} in\n{shown}");
        }
        Ok(())
    };
    shows("meshctl", &expected("0.5", "64MiB"))?;
    shows("docker", &expected("0.5", "64MiB"))?;
    let task = c.wait_running("all", 1)?.pop().context("no task")?;
    let resources = &c.api("GET", &format!("/tasks/{}", task.id))?["Spec"]["Resources"];
    ensure!(resources["Limits"]["Pids"] == 20, "{resources}");
    // The other client changes some, and leaves the rest.
    c.docker("m1", "service update --detach --limit-memory 96m --limit-cpu 1 all")?.ok()?;
    eventually("the new limits", SOON, || {
        let now = c.running("all")?.pop().context("no task")?;
        ensure!(now.id != task.id, "the old task");
        Ok(())
    })?;
    shows("meshctl", &expected("1", "96MiB"))?;
    shows("docker", &expected("1", "96MiB"))
}
