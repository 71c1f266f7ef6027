//! Nothing that fails, and nothing that is changed, is felt by a user: 300 new connections per
//! second from outside, through all nodes, while the cluster is worked on.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_lab::DaemonSignal;

use super::group;
use crate::{
    cluster::{Cluster, SOON, eventually},
    load::{Load, RATE, Report},
};

group!("trust": scaling_fails_no_request, a_roll_out_fails_no_request,
    a_start_first_roll_out_fails_no_request, a_drained_node_fails_no_request,
    one_replica_moves_without_a_gap, a_dead_daemon_fails_no_request,
    a_late_node_fails_no_request, a_crashed_worker_gets_no_requests,
    a_dead_daemon_keeps_its_tasks, a_new_leader_writes_soon, a_minority_refuses_writes);

const WEB: &str = "--publish 8080:80 --stop-grace-period 5s";
/// A roll-out of few tasks, draining and all, on a busy machine.
const ROLL_OUT: Duration = Duration::from_secs(60);

/// Runs `change` under load. What went before is answered before it, and something after it too.
fn under_load(c: &Cluster, change: impl FnOnce() -> Result<()>) -> Result<Report> {
    let load = Load::start(c, 8080, RATE)?;
    pause();
    let changed = change();
    pause();
    let report = load.stop()?;
    changed?;
    println!("    {report}");
    Ok(report)
}

/// So that the load is seen to pass before and after what is tried.
fn pause() {
    thread::sleep(Duration::from_millis(500));
}

fn ids(c: &Cluster, service: &str) -> Result<BTreeSet<String>> {
    Ok(c.running(service)?.into_iter().map(|task| task.id).collect())
}

fn roll(c: &Cluster, node: &str, options: &str) -> Result<()> {
    let old = ids(c, "web")?;
    c.meshctl(node, &format!("service update --detach --force {options} web"))?.ok()?;
    c.wait_replaced("web", old.len(), &old, ROLL_OUT)
}

/// Scales, and waits until what is too many has ended.
fn scale(c: &Cluster, count: usize) -> Result<()> {
    c.scale("web", count)?;
    c.wait_replaced("web", count, &BTreeSet::new(), ROLL_OUT)
}

fn scaling_fails_no_request(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 3 {WEB}"))?;
    let report = under_load(c, || {
        for count in [6, 2] {
            scale(c, count)?;
        }
        Ok(())
    })?;
    report.none_failed()
}

fn a_roll_out_fails_no_request(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 4 {WEB}"))?;
    let begin = Instant::now();
    let options = "--update-order stop-first --update-parallelism 2 --update-delay 2s";
    let report = under_load(c, || roll(c, "m1", options))?;
    ensure!(begin.elapsed() > Duration::from_secs(2), "the delay was not kept");
    report.none_failed()
}

fn a_start_first_roll_out_fails_no_request(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 1 {WEB}"))?;
    let options = "--update-order start-first --update-parallelism 1";
    under_load(c, || roll(c, "m1", options))?.none_failed()
}

fn a_drained_node_fails_no_request(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 5 {WEB}"))?;
    let report = under_load(c, || {
        for node in ["w1", "w2"] {
            c.meshctl("m1", &format!("node update --availability drain {node}"))?.ok()?;
        }
        eventually("the drained nodes to be left", ROLL_OUT, || {
            let tasks = c.tasks("web")?;
            let alive: Vec<_> = tasks.iter().filter(|task| task.state == "running").collect();
            ensure!(alive.len() == 5, "{} run", alive.len());
            ensure!(alive.iter().all(|task| !task.node.starts_with('w')), "not left yet");
            Ok(())
        })
    });
    for node in ["w1", "w2"] {
        c.meshctl("m1", &format!("node update --availability active {node}"))?.ok()?;
    }
    report?.none_failed()
}

/// Complaint 6: draining the node of a single replica takes the service down.
fn one_replica_moves_without_a_gap(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 1 {WEB}"))?;
    let node = c.wait_running("web", 1)?.pop().context("no task")?.node;
    let report = under_load(c, || {
        let old = ids(c, "web")?;
        c.meshctl("m1", &format!("node update --availability drain {node}"))?.ok()?;
        c.wait_replaced("web", 1, &old, ROLL_OUT)
    });
    c.meshctl("m1", &format!("node update --availability active {node}"))?.ok()?;
    report?.none_failed()
}

/// Its node forwards from frozen tables, also to tasks that are gone.
fn a_dead_daemon_fails_no_request(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 4 {WEB}"))?;
    c.lab.end_daemon("w2", DaemonSignal::Kill)?;
    let report = under_load(c, || {
        scale(c, 6)?;
        scale(c, 3)?;
        let old = ids(c, "web")?;
        let there = c.running("web")?.iter().filter(|task| task.node == "w2").count();
        // What runs on the dead daemon's node cannot be told to end, and goes on.
        let options = "--update-order start-first --update-parallelism 1";
        c.meshctl("m1", &format!("service update --detach --force {options} web"))?.ok()?;
        eventually("new tasks beside the dead daemon's", ROLL_OUT, || {
            let mut tasks = c.tasks("web")?;
            tasks.retain(|task| task.state == "running");
            let fresh = tasks.iter().filter(|task| !old.contains(&task.id)).count();
            ensure!(
                fresh == 3 && tasks.len() == 3 + there,
                "{fresh} of {} new, {there} on w2",
                tasks.len()
            );
            Ok(())
        })
    });
    c.lab.start("w2")?;
    c.wait_node("m1", "w2", "Ready")?;
    report?.none_failed()
}

fn a_late_node_fails_no_request(c: &Cluster) -> Result<()> {
    c.lab.end_daemon("w2", DaemonSignal::Stop)?;
    c.lab.restart_daemon_with("w2", &["--fault-apply-late", "3000"])?;
    let report = c.web(&format!("--replicas 3 {WEB}")).and_then(|()| {
        // Its tables hear of the service three seconds late, too.
        eventually("the port on w2", SOON, || c.fetch("client", "http://192.0.2.22:8080/"))?;
        under_load(c, || {
            scale(c, 5)?;
            scale(c, 2)?;
            roll(c, "m1", "--update-order start-first")
        })
    });
    c.lab.end_daemon("w2", DaemonSignal::Stop)?;
    c.lab.start("w2")?;
    report?.none_failed()
}

/// Out of every balancer in under a second, as no other node's requests show.
fn a_crashed_worker_gets_no_requests(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 5 {WEB}"))?;
    let others: Vec<_> =
        c.lab.nodes().iter().filter(|node| node.name != "w1").map(|node| node.address).collect();
    let load = Load::through(c, &others, 8080, RATE)?;
    pause();
    let at = load.elapsed();
    c.lab.crash("w1")?;
    thread::sleep(Duration::from_secs(3));
    let report = load.stop();
    let moved = c.wait_running("web", 5);
    c.lab.start("w1")?;
    let report = report?;
    moved?;
    println!("    {report}");
    let last = report.last_failure().unwrap_or(at);
    println!(
        "    the last request that failed began {:?} after the crash",
        last.saturating_sub(at)
    );
    ensure!(last < at + Duration::from_secs(1), "{report}");
    c.wait_node("m1", "w1", "Ready")
}

/// Down in the list, and still in every balancer: its data path answers.
fn a_dead_daemon_keeps_its_tasks(c: &Cluster) -> Result<()> {
    c.web(&format!("--replicas 5 {WEB}"))?;
    let before = ids(c, "web")?;
    c.lab.end_daemon("w1", DaemonSignal::Kill)?;
    let report = under_load(c, || {
        c.wait_node("m1", "w1", "Down")?;
        // Longer than `reschedule-after`, counted from its silence.
        thread::sleep(Duration::from_secs(8));
        Ok(())
    });
    let after = ids(c, "web");
    c.lab.start("w1")?;
    let report = report?;
    report.none_failed()?;
    ensure!(after? == before, "tasks were moved away from a node whose daemon alone was dead");
    ensure!(report.last_answer_of("w1").is_some(), "no request went to w1");
    let last = report.last_answer_of("w1").unwrap_or_default();
    let end = report.requests.last().map(|request| request.start).unwrap_or_default();
    ensure!(end - last < Duration::from_secs(1), "w1 got its last request at {last:?} of {end:?}");
    c.wait_node("m1", "w1", "Ready")
}

/// Managers vote a moment after they joined. Only their leader knows who does.
pub(super) fn three_vote(c: &Cluster) -> Result<()> {
    eventually("three voters", SOON, || {
        let nodes = c.meshctl(&c.leader("m1")?, "node ls")?.ok()?;
        ensure!(nodes.matches("Reachable").count() == 2, "{nodes}");
        Ok(())
    })
}

fn a_new_leader_writes_soon(c: &Cluster) -> Result<()> {
    three_vote(c)?;
    let mut gaps = Vec::new();
    for round in 0..5 {
        let dead = c.leader("m1")?;
        let other = if dead == "m1" { "m2" } else { "m1" };
        c.lab.end_daemon(&dead, DaemonSignal::Kill)?;
        let begin = Instant::now();
        let wrote = eventually("a write", SOON, || {
            c.meshctl(other, &format!("network create --driver overlay after{round}"))?.ok()
        });
        gaps.push(begin.elapsed());
        c.lab.start(&dead)?;
        wrote?;
        c.wait_node(other, &dead, "Reachable")?;
        eventually("three managers that follow one", SOON, || c.leader("m1"))?;
    }
    gaps.sort();
    println!("    times without writes: median {:?}, worst {:?}", gaps[2], gaps[4]);
    ensure!(gaps[2] < Duration::from_secs(2), "{gaps:?}");
    Ok(())
}

/// A minority refuses writes with a reason; packets flow.
fn a_minority_refuses_writes(c: &Cluster) -> Result<()> {
    three_vote(c)?;
    c.web(&format!("--replicas 5 {WEB}"))?;
    let groups = [vec!["m1".to_owned()], ["m2", "m3", "w1", "w2"].map(str::to_owned).to_vec()];
    c.lab.partition(&groups, false)?;
    let begin = Instant::now();
    let wrote = eventually("a write by the majority", SOON, || {
        c.meshctl("m2", "network create --driver overlay majority")?.ok()
    });
    let gap = begin.elapsed();
    let refused = eventually("a refusal by the minority", SOON, || {
        // What it has may be old: it shows nothing either.
        c.meshctl("m1", "network ls")?.refused(&["leader"])?;
        c.meshctl("m1", "network create --driver overlay minority")?.refused(&["leader"])
    });
    let through = c.fetch("client", "http://192.0.2.11:8080/");
    c.lab.heal()?;
    wrote?;
    refused?;
    through?;
    println!("    the majority wrote after {gap:?}");
    ensure!(gap < Duration::from_secs(3), "{gap:?}");
    eventually("the minority to follow", SOON, || {
        let networks = c.meshctl("m1", "network ls")?.ok()?;
        ensure!(networks.contains("majority") && !networks.contains("minority"), "{networks}");
        Ok(())
    })
}
