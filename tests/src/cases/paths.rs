//! Ways between nodes that break, come back and flap, as the data-path probes judge them. Daemons
//! live all the time, and no case lasts as long as `reschedule-after`: tasks stay where they are.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use mesh_lab::DaemonSignal;

use super::group;
use crate::{
    cluster::{Cluster, WHOAMI},
    load::{Load, RATE, Report},
};

group!("paths": a_cut_node_gets_no_requests_until_it_is_back,
    a_node_cut_one_way_gets_no_requests, a_started_daemon_sends_nobody_to_a_dead_peer,
    a_flapping_link_does_not_flap_services);

/// What a probe's verdict may take until the last balancer follows it.
const SOON: Duration = Duration::from_secs(1);
/// The same of a first answer: an ARP request that was lost is repeated after a second
/// (`retrans_time_ms` in the kernel's arp(7)), and probes wait for it.
const BACK_SOON: Duration = Duration::from_millis(1500);

/// A task of `web` on each node; the load goes through all nodes but `cut`.
fn load_beside(c: &Cluster, cut: &str) -> Result<Load> {
    c.network("app")?;
    c.service("--name web --mode global --network app --publish 8080:80", WHOAMI)?;
    let others: Vec<_> =
        c.lab.nodes().iter().filter(|node| node.name != cut).map(|node| node.address).collect();
    let load = Load::through(c, &others, 8080, RATE)?;
    // Seen to pass, through the node that is cut, before anything is tried.
    thread::sleep(Duration::from_millis(500));
    Ok(load)
}

/// Cuts a node off from all others; from outside it stays reachable.
fn cut(c: &Cluster, name: &str, one_way: bool) -> Result<()> {
    let (alone, others): (Vec<_>, Vec<_>) =
        c.lab.nodes().iter().map(|node| node.name.clone()).partition(|node| node == name);
    c.lab.partition(&[alone, others], one_way)
}

fn ids(c: &Cluster) -> Result<BTreeSet<String>> {
    Ok(c.running("web")?.into_iter().map(|task| task.id).collect())
}

/// When the first request after `since` began that a task on `node` answered.
fn first_answer_of(report: &Report, node: &str, since: Duration) -> Option<Duration> {
    let by_it = |request: &&crate::load::Request| request.node.as_deref() == Some(node);
    report.requests.iter().filter(by_it).map(|r| r.start).find(|start| *start > since)
}

/// Out of every balancer in under a second, and back in at once.
fn cut_and_back(c: &Cluster, node: &str, one_way: bool) -> Result<()> {
    let load = load_beside(c, node)?;
    let before = ids(c)?;
    let at = load.elapsed();
    cut(c, node, one_way)?;
    thread::sleep(Duration::from_millis(2500));
    let healed = load.elapsed();
    c.lab.heal()?;
    let healing = load.elapsed() - healed;
    thread::sleep(Duration::from_millis(1500));
    let report = load.stop()?;
    println!("    {report}");
    let served = |from: Duration, to: Duration| {
        let at_node = |r: &&crate::load::Request| r.node.as_deref() == Some(node);
        let starts = report.requests.iter().filter(at_node).map(|request| request.start);
        starts.filter(|start| (from..to).contains(start)).count()
    };
    ensure!(served(Duration::ZERO, at) > 0, "{node} answered nothing before");
    ensure!(served(at + SOON, healed) == 0, "{node} still answers while it is cut");
    if let Some(last) = report.last_failure() {
        ensure!(last < at + SOON, "a request failed {:?} after the cut", last.saturating_sub(at));
    }
    let Some(first) = first_answer_of(&report, node, healed) else {
        anyhow::bail!("{node} answers nothing after it is back");
    };
    println!("    back after {:?} (of which healing {healing:?})", first - healed);
    ensure!(first < healed + healing + BACK_SOON, "back after {:?}", first - healed);
    ensure!(ids(c)? == before, "tasks moved");
    Ok(())
}

fn a_cut_node_gets_no_requests_until_it_is_back(c: &Cluster) -> Result<()> {
    cut_and_back(c, "w2", false)
}

/// Replies do not arrive, or requests do not: either way nobody is served there.
fn a_node_cut_one_way_gets_no_requests(c: &Cluster) -> Result<()> {
    cut_and_back(c, "m3", true)
}

/// A daemon that starts knows nothing of its peers yet: it must ask before it balances.
fn a_started_daemon_sends_nobody_to_a_dead_peer(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name web --mode global --network app --publish 8080:80", WHOAMI)?;
    let m2 = c.lab.node("m2")?.address;
    c.lab.crash("w2")?;
    let load = crate::cluster::eventually("m2 to leave w2 out", SOON * 5, || {
        // Ten requests alone may miss w2 by chance. Its daemon is missed later than its data path.
        c.wait_node("m2", "w2", "Down")?;
        for _ in 0..10 {
            let begin = Instant::now();
            c.fetch("client", &format!("http://{m2}:8080/"))?;
            ensure!(begin.elapsed() < SOON, "a request took {:?}", begin.elapsed());
        }
        Load::through(c, &[m2], 8080, RATE)
    });
    let Ok(load) = load else { return c.lab.start("w2").and(load.map(drop)) };
    let restarted = c.lab.end_daemon("m2", DaemonSignal::Kill).and_then(|()| c.lab.start("m2"));
    thread::sleep(Duration::from_millis(1500));
    let report = load.stop();
    c.lab.start("w2")?;
    restarted?;
    let report = report?;
    println!("    {report}");
    report.none_failed()?;
    // A SYN to a dead peer is sent again after a second.
    ensure!(report.max < SOON, "a request waited {:?}", report.max);
    c.wait_node("m1", "w2", "Ready")
}

fn a_flapping_link_does_not_flap_services(c: &Cluster) -> Result<()> {
    let load = load_beside(c, "w1")?;
    let before = ids(c)?;
    for _ in 0..6 {
        cut(c, "w1", false)?;
        thread::sleep(Duration::from_millis(800));
        c.lab.heal()?;
        thread::sleep(Duration::from_millis(700));
    }
    let end = load.elapsed();
    let report = load.stop()?;
    println!("    {report}");
    // How often it came back into the balancers, and went on to be missed there.
    let mut returns = 0;
    let mut last = Duration::ZERO;
    let starts: Vec<_> = report
        .requests
        .iter()
        .filter(|request| request.node.as_deref() == Some("w1"))
        .map(|request| request.start)
        .collect();
    for start in starts {
        returns += usize::from(start - last > Duration::from_millis(400));
        last = start;
    }
    println!("    six times cut, {returns} times back");
    ensure!(returns <= 3, "{returns} times back in the balancers");
    // Once it is known to flap, nobody is sent there to fail.
    if let Some(failure) = report.last_failure() {
        ensure!(failure < end / 2, "a request failed at {failure:?} of {end:?}");
    }
    ensure!(ids(c)? == before, "tasks moved");
    // It is trusted again once it has answered without a gap for long enough.
    let begin = Instant::now();
    crate::cluster::eventually("w1 to serve again", Duration::from_secs(20), || {
        let said = c.fetch("client", "http://192.0.2.22:8080/")?;
        ensure!(said["node"] == "w1", "{said}");
        Ok(())
    })?;
    println!("    trusted again after {:?}", begin.elapsed());
    Ok(())
}
