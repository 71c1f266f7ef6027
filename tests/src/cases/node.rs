//! What operators do to nodes: labels, constraints, availability, leaving, removing, joining again;
//! and workers that have no manager for a while.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Context, Result, ensure};
use mesh_lab::DaemonSignal;
use serde_json::Value;

use super::{group, trust::three_vote};
use crate::cluster::{Cluster, Ran, SOON, WHOAMI, eventually, field, row_of};

group!("node": constraints_choose_nodes, a_paused_node_takes_no_more, a_node_leaves_and_comes_back,
    workers_go_on_without_managers, workers_go_on_without_a_majority,
    a_worker_leaves_a_manager_without_a_leader);

/// Where the tasks of a service run, once `count` do.
fn places(c: &Cluster, service: &str, count: usize) -> Result<BTreeSet<String>> {
    Ok(c.wait_running(service, count)?.into_iter().map(|task| task.node).collect())
}

fn moved(c: &Cluster, service: &str, to: &str) -> Result<()> {
    eventually(&format!("{service} to be on {to}"), SOON, || {
        let running = c.running(service)?;
        ensure!(running.len() == 1 && running[0].node == to, "{running:?}");
        Ok(())
    })
}

/// Every key, by both clients.
fn constraints_choose_nodes(c: &Cluster) -> Result<()> {
    c.meshctl("m1", "node update --label-add zone=a --label-add disk=ssd w1")?.ok()?;
    c.docker("m1", "node update --label-add zone=b w2")?.ok()?;
    let shown: Value = serde_json::from_str(&c.docker("m1", "node inspect w1")?.ok()?)?;
    ensure!(shown[0]["Spec"]["Labels"]["zone"] == "a", "{shown}");
    let w1 = field(&shown[0], "ID")?;
    let managers = BTreeSet::from(["m1", "m2", "m3"].map(str::to_owned));
    let only = |node: &str| BTreeSet::from([node.to_owned()]);
    let cases = [
        ("name", "node.hostname==w2", 2, only("w2")),
        ("id", &format!("node.id=={w1}"), 2, only("w1")),
        ("role", "node.role==manager", 3, managers),
        ("label", "node.labels.zone==a", 2, only("w1")),
        ("unlike", "node.role!=manager", 2, ["w1", "w2"].map(str::to_owned).into()),
    ];
    let create = |name: &str, constraint: &str, count: usize| {
        format!(
            "service create --detach --name {name} --replicas {count} --constraint {constraint}"
        )
    };
    for (name, constraint, count, _) in &cases {
        let line = create(&format!("our-{name}"), constraint, *count);
        c.meshctl("m1", &format!("{line} --runtime process -- sleep infinity"))?.ok()?;
        let line = create(&format!("stock-{name}"), constraint, *count);
        let runtime = "--container-label mesh.runtime=process host sleep infinity";
        c.docker("m1", &format!("{line} {runtime}"))?.ok()?;
    }
    for (name, constraint, count, nodes) in cases {
        for service in [format!("our-{name}"), format!("stock-{name}")] {
            let there = places(c, &service, count)?;
            ensure!(there == nodes, "{service} ({constraint}) runs on {there:?}");
        }
    }
    // One that no longer holds moves its tasks, and one that cannot hold is explained.
    c.service(
        "--name picky --replicas 1 --constraint node.labels.zone==b --stop-grace-period 1s",
        WHOAMI,
    )?;
    moved(c, "picky", "w2")?;
    c.docker("m1", "node update --label-rm zone w2")?.ok()?;
    c.meshctl("m1", "node update --label-add zone=b w1")?.ok()?;
    moved(c, "picky", "w1")?;
    let only_w2 = "--constraint-rm node.labels.zone==b --constraint-add node.hostname==w2";
    c.meshctl("m1", &format!("service update --detach {only_w2} picky"))?.ok()?;
    moved(c, "picky", "w2")?;
    let nowhere = create("nowhere", "node.labels.zone==z", 1);
    c.meshctl("m1", &format!("{nowhere} --runtime process -- sleep infinity"))?.ok()?;
    eventually("the reason", SOON, || {
        for said in [
            c.meshctl("m1", "service ps --no-trunc nowhere")?.ok()?,
            c.docker("m1", "service ps --no-trunc nowhere")?.ok()?,
        ] {
            ensure!(said.contains("no suitable node"), "{said}");
        }
        Ok(())
    })?;
    c.meshctl("m1", "node update --label-rm zone --label-rm disk w1")?.ok().map(drop)
}

fn a_paused_node_takes_no_more(c: &Cluster) -> Result<()> {
    c.service("--name web --replicas 5", "sleep infinity")?;
    let before = c.wait_running("web", 5)?;
    let there = before.iter().find(|task| task.node == "w1").context("w1 has no task")?;
    c.docker("m1", "node update --availability pause w1")?.ok()?;
    let paused = c.scale("web", 9).and_then(|tasks| {
        let on_w1: Vec<_> = tasks.iter().filter(|task| task.node == "w1").collect();
        ensure!(on_w1.len() == 1 && on_w1[0].id == there.id, "{on_w1:?}");
        let ls = c.meshctl("m1", "node ls")?.ok()?;
        ensure!(row_of(&ls, "w1").contains("Pause"), "{ls}");
        let shown = |ran: Result<Ran>| ran.and_then(Ran::ok);
        for said in [shown(c.meshctl("m1", "node ps w1")), shown(c.docker("m1", "node ps w1"))] {
            let said = said?;
            ensure!(said.contains(&there.name) && said.contains("Running"), "{said}");
            ensure!(said.matches("web.").count() == 1, "others' tasks are listed: {said}");
        }
        Ok(())
    });
    c.meshctl("m1", "node update --availability active w1")?.ok()?;
    paused
}

fn a_node_leaves_and_comes_back(c: &Cluster) -> Result<()> {
    c.service("--name web --replicas 5 --publish 8080:80 --stop-grace-period 1s", WHOAMI)?;
    c.wait_running("web", 5)?;
    c.meshctl("m1", "node rm w2")?.refused(&["not down"])?;
    c.docker("m1", "node rm w2")?.refused(&["not down"])?;
    c.docker("w2", "swarm leave")?.ok()?;
    c.wait_node("m1", "w2", "Down")?;
    eventually("five tasks elsewhere", SOON, || {
        let running = c.running("web")?;
        ensure!(running.len() == 5 && running.iter().all(|t| t.node != "w2"), "{running:?}");
        Ok(())
    })?;
    let gone = c.docker("m1", "node rm w2")?.ok();
    let token = c.docker("m1", "swarm join-token -q worker")?.ok()?;
    c.meshctl("w2", &format!("swarm join --token {token} 192.0.2.12:2377"))?.ok()?;
    gone?;
    c.wait_node("m1", "w2", "Ready")?;
    // It takes tasks, and requests.
    let tasks = c.scale("web", 9)?;
    ensure!(tasks.iter().any(|task| task.node == "w2"), "{tasks:?}");
    eventually("an answer by w2", SOON, || c.fetch("client", "http://192.0.2.22:8080/")).map(drop)
}

fn workers_go_on_without_managers(c: &Cluster) -> Result<()> {
    goes_on_without(c, &["m1", "m2", "m3"], || Ok(()))
}

/// One that is left answers, and decides nothing.
fn workers_go_on_without_a_majority(c: &Cluster) -> Result<()> {
    let log = c.lab.places().log("w1");
    let alone = || -> Result<usize> {
        let log = std::fs::read_to_string(&log).context("read a log")?;
        Ok(log.matches("no manager decides").count())
    };
    let before = alone()?;
    goes_on_without(c, &["m2", "m3"], || {
        // What ends before is told to the one that is left, who may yet have it done.
        eventually("w1 to know", SOON, || {
            ensure!(alone()? > before, "it takes the manager for one that decides");
            Ok(())
        })
    })
}

/// Names resolve, requests are answered, what fails is started again; and the managers that come
/// back find all of it as it is.
fn goes_on_without(
    c: &Cluster,
    managers: &[&str],
    known: impl FnOnce() -> Result<()>,
) -> Result<()> {
    c.web("--mode global --constraint node.hostname==w1 --publish 8080:80 --restart-delay 100ms")?;
    let before = c.wait_running("web", 1)?.pop().context("no task")?;
    let port = "http://192.0.2.21:8080/";
    eventually("an answer", SOON, || c.fetch("client", port))?;
    let inspect = c.api("GET", &format!("/tasks/{}", before.id))?;
    let pid = inspect["Status"]["ContainerStatus"]["PID"].as_u64().context("no pid")?.to_string();
    for manager in managers {
        c.lab.end_daemon(manager, DaemonSignal::Kill)?;
    }
    let alone = (|| {
        let looked = ["nsenter", "-t", &pid, "-n", "-m", "getent", "ahostsv4", "tasks.web"];
        let found = c.on("w1", &looked)?.ok()?;
        let address = before.addresses.get("app").context("it is not on app")?;
        ensure!(found.contains(address), "tasks.web is {found}, not {address}");
        known()?;
        c.on("w1", &["kill", "-KILL", &pid])?.ok()?;
        eventually("it to be started again", SOON, || {
            ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid} lives");
            c.fetch("client", port)
        })
    })();
    for manager in managers {
        c.lab.start(manager)?;
    }
    alone?;
    eventually("the managers to take over what there is", SOON, || {
        let now = c.running("web")?;
        ensure!(now.len() == 1 && now[0].id == before.id, "{now:?}");
        let task = c.api("GET", &format!("/tasks/{}", before.id))?;
        let message = field(&task["Status"], "Message")?;
        ensure!(message.contains("while no manager was reached"), "{message}");
        c.wait_node("m1", "w1", "Ready")
    })?;
    c.fetch("client", port)?;
    c.meshctl("m1", "service update --detach --force web")?.ok()?;
    eventually("a new task in its place", SOON, || {
        let now = c.running("web")?;
        ensure!(now.len() == 1 && now[0].id != before.id, "{now:?}");
        Ok(())
    })
}

/// It is in a session with one that is cut off from the others, and reaches all.
fn a_worker_leaves_a_manager_without_a_leader(c: &Cluster) -> Result<()> {
    three_vote(c)?;
    let log = std::fs::read_to_string(c.lab.places().log("w1")).context("read a log")?;
    let (_, last) = log.rsplit_once(" session address=192.0.2.1").context("no session")?;
    let cut = format!("m{}", last.chars().next().context("a cut line")?);
    let managers = ["m1", "m2", "m3"].map(str::to_owned);
    let (cut, others): (Vec<_>, Vec<_>) = managers.into_iter().partition(|name| *name == cut);
    let other = others.first().context("all managers are cut off")?.clone();
    c.lab.partition(&[cut, others], false)?;
    let begin = Instant::now();
    let runs = eventually("a task of w1 by the majority", SOON, || {
        let create = "service create --detach --name there --replicas 1 --runtime process \
                      --constraint node.hostname==w1 -- sleep infinity";
        let made = c.meshctl(&other, create)?;
        ensure!(made.stderr.contains("already exists") || made.ok().is_ok(), "not yet");
        let tasks = c.meshctl(&other, "service ps there")?.ok()?;
        // What it should be, and what it is.
        ensure!(tasks.matches("Running").count() == 2, "{tasks}");
        Ok(())
    });
    c.lab.heal()?;
    runs?;
    println!("    w1 ran a task of the majority after {:?}", begin.elapsed());
    c.wait_node("m1", "w1", "Ready")
}
