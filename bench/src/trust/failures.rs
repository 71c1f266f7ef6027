//! What fails: leaders, whole nodes, links, daemons, resolvers.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    cluster::eventually,
    load::{Outcome, Report},
};
use nix::{
    sys::signal::{Signal, kill as signal},
    unistd::Pid,
};
use serde_json::json;

use super::{
    bed::{Bed, NOTICED, REPLICAS, and_back, kill, last_astray, pause},
    figure::Figure,
};
use crate::asks::{Asks, Question};

/// How long a link stays cut: noticed by all, and not yet a reason to move tasks.
const CUT: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(90);

/// Requests that failed, without a promise: what was on its way to a dead node is lost.
fn failed(report: &Report) -> Figure {
    Figure::count("requests failed", report.failed.len(), report.requests.len())
}

/// Makes a network by `manager`'s API, as often as it takes, and forgets it again.
fn write(bed: &Bed, manager: &str) -> Result<Instant> {
    let mut attempts = 0;
    let written = eventually("a write", PATIENCE, || {
        attempts += 1;
        // A name of its own: one that was told to fail may have been written all the same.
        let body = json!({ "Name": format!("written-{attempts}"), "Driver": "overlay" });
        bed.lab().call(manager, "POST", "/networks/create", Some(&body))?;
        Ok(Instant::now())
    })?;
    for attempt in 1..=attempts {
        let path = format!("/networks/written-{attempt}");
        let _ = bed.lab().call(manager, "DELETE", &path, None);
    }
    Ok(written)
}

/// Some manager that is not `leader`.
fn other_manager(bed: &Bed, leader: &str) -> Result<String> {
    let others = bed.all_but(leader);
    others.into_iter().find(|name| name.starts_with('m')).context("no other manager")
}

pub(super) fn leader_killed(bed: &Bed) -> Result<Vec<Figure>> {
    bed.settle()?;
    let leader = bed.leader()?;
    let other = other_manager(bed, &leader)?;
    bed.step(&format!("killing the daemon of {leader}"));
    let load = bed.load()?;
    let gap = and_back(bed.lab(), &leader, || {
        let begin = kill(bed.lab(), &leader)?;
        let gap = write(bed, &other)? - begin;
        pause();
        Ok(gap)
    })?;
    let report = load.stop()?;
    Ok(vec![Figure::time("next write", gap).median_at_most(2.0), failed(&report).at_most(0.0)])
}

pub(super) fn leader_cut_off(bed: &Bed) -> Result<Vec<Figure>> {
    bed.settle()?;
    let leader = bed.leader()?;
    let other = other_manager(bed, &leader)?;
    bed.step(&format!("partitioning {leader} from all others"));
    let load = bed.load_past(&leader)?;
    let at = load.elapsed();
    let begin = Instant::now();
    bed.lab().partition(&[vec![leader.clone()], bed.all_but(&leader)], false)?;
    let written = write(bed, &other);
    pause();
    bed.lab().heal()?;
    let report = load.stop()?;
    Ok(vec![
        Figure::time("next write", written? - begin).median_at_most(3.0),
        Figure::time("no request goes to the other side", last_astray(&report, at, NOTICED))
            .at_most(1.0),
        failed(&report),
    ])
}

pub(super) fn worker_crashed(bed: &Bed) -> Result<Vec<Figure>> {
    const NODE: &str = "w1";
    bed.settle_spread()?;
    bed.step(&format!("crashing {NODE}"));
    let load = bed.load_past(NODE)?;
    let at = load.elapsed();
    let begin = Instant::now();
    let replaced = and_back(bed.lab(), NODE, || {
        bed.lab().crash(NODE)?;
        bed.step("waiting for its tasks to be replaced");
        let replaced = eventually("the tasks to be replaced", PATIENCE, || {
            let tasks = bed.cluster.running(super::bed::SERVICE)?;
            let alive = tasks.iter().filter(|task| task.node != NODE).count();
            ensure!(alive == REPLICAS, "{alive} run");
            Ok(begin.elapsed())
        })?;
        pause();
        Ok(replaced)
    })?;
    pause();
    let report = load.stop()?;
    let later = report.failed.iter().filter(|request| request.start > at + NOTICED).count();
    Ok(vec![
        Figure::time("no request goes there", last_astray(&report, at, NOTICED)).at_most(1.0),
        failed(&report),
        Figure::count("requests failed later, as tasks moved", later, report.requests.len())
            .at_most(0.0),
        Figure::time("replicas back", replaced),
    ])
}

pub(super) fn link_cut(bed: &Bed) -> Result<Vec<Figure>> {
    const NODE: &str = "w2";
    bed.settle_spread()?;
    bed.step(&format!("cutting the link of {NODE}"));
    let load = bed.load_past(NODE)?;
    let cut = load.elapsed();
    bed.lab().set_link(NODE, false)?;
    thread::sleep(CUT);
    let back = load.elapsed();
    bed.lab().set_link(NODE, true)?;
    bed.step("waiting for requests to go there again");
    thread::sleep(CUT);
    let report = load.stop()?;
    let there = |request: &&mesh_tests::load::Request| {
        request.node.as_deref() == Some(NODE)
            && request.outcome == Outcome::Ok
            && request.start > back
    };
    let first = report.requests.iter().find(there);
    let first = first.with_context(|| format!("no request went to {NODE} within {CUT:?}"))?;
    Ok(vec![
        Figure::time("no request goes there", last_astray(&report, cut, CUT)).at_most(1.0),
        failed(&report),
        Figure::time("link restored: requests go there again", first.start - back).at_most(1.0),
    ])
}

pub(super) fn daemon_killed(bed: &Bed) -> Result<Vec<Figure>> {
    const NODE: &str = "w1";
    bed.settle_spread()?;
    let (task, peer) = (bed.spot(NODE)?, bed.spot("w2")?);
    bed.step(&format!("killing the daemon of {NODE}, and starting it again"));
    let load = bed.load()?;
    let pings = Asks::start(task.pid, Question::Ping(peer.address))?;
    let lookups = Asks::start(task.pid, Question::Lookup(super::bed::SERVICE.to_owned()))?;
    pause();
    and_back(bed.lab(), NODE, || {
        kill(bed.lab(), NODE)?;
        pause();
        Ok(())
    })?;
    eventually("the daemon to be in the cluster again", PATIENCE, || {
        let said = bed.lab().call(NODE, "GET", "/info", None)?;
        ensure!(said["Swarm"]["LocalNodeState"] == "active", "{}", said["Swarm"]);
        Ok(())
    })?;
    // Rounds of the new daemon's own, which would undo what it does not know.
    thread::sleep(Duration::from_secs(2));
    let (pings, lookups) = (pings.stop()?, lookups.stop()?);
    let report = load.stop()?;
    ensure!(bed.spot(NODE)?.id == task.id, "the task on {NODE} was replaced");
    Ok(vec![
        Figure::count("pings between tasks lost", pings.lost, pings.asked).at_most(0.0),
        failed(&report).at_most(0.0),
        Figure::count("look-ups failed", lookups.lost, lookups.asked).at_most(0.0),
    ])
}

pub(super) fn resolver_killed(bed: &Bed) -> Result<Vec<Figure>> {
    const NODE: &str = "w1";
    bed.settle_spread()?;
    let task = bed.spot(NODE)?;
    let old = bed.resolver(NODE)?;
    bed.step(&format!("killing the resolver of {NODE}"));
    let lookups = Asks::start(task.pid, Question::Lookup(super::bed::SERVICE.to_owned()))?;
    pause();
    signal(Pid::from_raw(old), Signal::SIGKILL).context("kill the resolver")?;
    eventually("another resolver", PATIENCE, || {
        ensure!(bed.resolver(NODE)? != old, "it lives");
        Ok(())
    })?;
    thread::sleep(Duration::from_secs(1));
    let lookups = lookups.stop()?;
    Ok(vec![
        Figure::count("look-ups failed", lookups.lost, lookups.asked).at_most(0.0),
        Figure::time("the slowest look-up answered", lookups.slowest),
    ])
}
