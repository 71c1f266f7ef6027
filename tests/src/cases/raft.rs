//! Managers that die, are cut off, come back and lose their disks: five of them, without workers.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use mesh_history::{Action, Dice, Recorder, check};
use mesh_lab::{DaemonSignal, http};
use serde_json::{Value, json};

use super::group;
use crate::cluster::{Cluster, SOON, eventually, field, list, row_of};

group!("raft": a_leader_is_cut_off, a_leader_is_heard_but_does_not_hear,
    a_leader_hears_but_is_not_heard, a_manager_that_comes_back_unseats_nobody,
    two_of_five_die_at_once, what_clients_see_is_linearizable, a_lost_disk_is_no_vote,
    a_manager_removed_while_cut_off_ends_its_tasks);

const MANAGERS: [&str; 5] = ["m1", "m2", "m3", "m4", "m5"];
/// The promise after a partition.
const AFTER_A_CUT: Duration = Duration::from_secs(3);

fn but(node: &str) -> Vec<String> {
    MANAGERS.iter().filter(|&&other| other != node).map(|&other| other.to_owned()).collect()
}

/// Makes a network through one of `nodes`, whichever does it; how long that took.
fn written(c: &Cluster, nodes: &[String], name: &str) -> Result<Duration> {
    let begin = Instant::now();
    let mut turn = nodes.iter().cycle();
    eventually("a write", SOON, || {
        let node = turn.next().context("nobody to ask")?;
        let made = c.meshctl(node, &format!("network create --driver overlay {name}"))?;
        // An earlier try was done, though its answer was lost.
        if made.stderr.contains("already exists") { Ok(()) } else { made.ok().map(drop) }
    })?;
    Ok(begin.elapsed())
}

fn all_reachable(c: &Cluster) -> Result<()> {
    eventually("five managers that follow one", SOON, || {
        for asked in MANAGERS {
            let nodes = c.meshctl(asked, "node ls")?.ok()?;
            let reachable = nodes.matches("Reachable").count();
            ensure!(nodes.contains("Leader") && reachable == 4, "{asked} says\n{nodes}");
        }
        Ok(())
    })
}

/// Cuts the leader off in some way; the others write again soon, and all is well when it is over.
fn cut(
    c: &Cluster,
    how: impl Fn(Vec<String>, Vec<String>) -> (Vec<Vec<String>>, bool),
) -> Result<()> {
    all_reachable(c)?;
    let leader = c.leader("m1")?;
    let others = but(&leader);
    let (groups, one_way) = how(vec![leader.clone()], others.clone());
    c.lab.partition(&groups, one_way)?;
    let gap = written(c, &others, "after-the-cut");
    c.lab.heal()?;
    let gap = gap?;
    println!("    the others wrote after {gap:?}");
    ensure!(gap < AFTER_A_CUT, "{gap:?}");
    all_reachable(c)?;
    c.meshctl(&leader, "network inspect after-the-cut")?.ok().map(drop)
}

fn a_leader_is_cut_off(c: &Cluster) -> Result<()> {
    cut(c, |leader, others| (vec![leader, others], false))
}

fn a_leader_is_heard_but_does_not_hear(c: &Cluster) -> Result<()> {
    cut(c, |leader, others| (vec![others, leader], true))
}

fn a_leader_hears_but_is_not_heard(c: &Cluster) -> Result<()> {
    cut(c, |leader, others| (vec![leader, others], true))
}

/// How often a manager began to lead, by the managers' logs: once a term.
fn terms_begun(c: &Cluster) -> Result<usize> {
    let mut begun = 0;
    for manager in MANAGERS {
        let log = fs::read_to_string(c.lab.places().log(manager)).context("read a log")?;
        begun += log.lines().filter(|line| line.contains("leading")).count();
    }
    Ok(begun)
}

/// It stood for election all the time that it was away, and nobody heard of it.
fn a_manager_that_comes_back_unseats_nobody(c: &Cluster) -> Result<()> {
    all_reachable(c)?;
    let leader = c.leader("m1")?;
    let before = terms_begun(c)?;
    ensure!(before > 0, "the logs do not tell who leads");
    let away = if leader == "m5" { "m4" } else { "m5" };
    c.lab.partition(&[vec![away.to_owned()], but(away)], false)?;
    let noticed =
        eventually("it to notice", SOON, || c.meshctl(away, "network ls")?.refused(&["leader"]));
    // Several election time-outs more.
    thread::sleep(Duration::from_secs(4));
    c.lab.heal()?;
    noticed?;
    // Every tenth of a second, over several election time-outs.
    let mut longest = Duration::ZERO;
    for write in 0..15 {
        longest = longest.max(written(c, std::slice::from_ref(&leader), &format!("n{write}"))?);
        thread::sleep(Duration::from_millis(100));
    }
    all_reachable(c)?;
    println!("    back; the longest write took {longest:?}");
    ensure!(c.leader("m1")? == leader && terms_begun(c)? == before, "the leader was unseated");
    Ok(())
}

fn two_of_five_die_at_once(c: &Cluster) -> Result<()> {
    all_reachable(c)?;
    let leader = c.leader("m1")?;
    let second = if leader == "m2" { "m3" } else { "m2" };
    c.lab.end_daemon(&leader, DaemonSignal::Kill)?;
    c.lab.end_daemon(second, DaemonSignal::Kill)?;
    let mut others = but(&leader);
    others.retain(|other| other != second);
    let gap = written(c, &others, "by-three");
    c.lab.start(&leader)?;
    c.lab.start(second)?;
    let gap = gap?;
    println!("    three of five wrote after {gap:?}");
    ensure!(gap < AFTER_A_CUT, "{gap:?}");
    all_reachable(c)?;
    for back in [leader.as_str(), second] {
        c.meshctl(back, "network inspect by-three")?.ok()?;
    }
    Ok(())
}

/// One label of one service, which clients read and swap through all managers.
struct Register {
    history: Recorder<u64>,
    name: String,
}

/// The value of a register and its service's version and spec, as a manager shows them.
fn look(c: &Cluster, manager: &str, name: &str) -> Result<(u64, u64, Value)> {
    let service = c.lab.call(manager, "GET", &format!("/services/{name}"), None)?;
    let value = service["Spec"]["Labels"]["value"].as_str().unwrap_or("0");
    let value = value.parse().with_context(|| format!("{service}"))?;
    let version = service["Version"]["Index"].as_u64().context("no version")?;
    Ok((value, version, service["Spec"].clone()))
}

impl Register {
    fn read(&self, c: &Cluster, manager: &str) -> Option<(u64, u64, Value)> {
        let called = self.history.call();
        let seen = look(c, manager, &self.name).ok()?;
        self.history.answered(called, Action::Read(seen.0));
        Some(seen)
    }

    /// Puts a value in the place of what was seen, on some manager: perhaps another.
    fn swap(&self, c: &Cluster, manager: &str, seen: (u64, u64, Value), to: u64) {
        let (from, version, mut spec) = seen;
        spec["Labels"] = json!({ "value": to.to_string() });
        let path = format!("/services/{}/update?version={version}", self.name);
        let socket = c.lab.places().socket(manager);
        let called = self.history.call();
        let swap = Action::Swap { from, to };
        match http::send(&socket, "POST", &path, spec.to_string().as_bytes(), SOON) {
            Ok(answer) if answer.status == 200 => self.history.answered(called, swap),
            Ok(answer) if answer.message().contains("update out of sequence") => {}
            // Perhaps it is done, perhaps it comes yet.
            _ => self.history.unanswered(called, swap),
        }
    }
}

const REGISTERS: usize = 3;
const CLIENTS: u64 = 9;

fn client(c: &Cluster, registers: &[Register], number: u64, stop: &AtomicBool) {
    let mut dice = Dice::new(number);
    let mut value = number << 32;
    while !stop.load(Ordering::Relaxed) {
        let register = &registers[dice.below(REGISTERS as u64) as usize];
        let mut manager = || dice.pick(&MANAGERS).unwrap_or("m1");
        let (reads, writes) = (manager(), manager());
        if let Some(seen) = register.read(c, reads) {
            value += 1;
            register.swap(c, writes, seen, value);
        }
        thread::sleep(Duration::from_millis(dice.below(40)));
    }
}

/// Leaders are killed and cut off in every way while clients write.
fn trouble(c: &Cluster) -> Result<()> {
    let pause = || thread::sleep(Duration::from_millis(1500));
    let leader = || {
        eventually("a leader", SOON, || {
            let told = |manager: &&str| c.leader(manager).ok();
            MANAGERS.iter().find_map(told).context("nobody knows one")
        })
    };
    for round in 0..2 {
        let dead = leader()?;
        c.lab.end_daemon(&dead, DaemonSignal::Kill)?;
        pause();
        c.lab.start(&dead)?;
        let cut = leader()?;
        let (alone, others) = (vec![cut.clone()], but(&cut));
        let (groups, one_way) = match round {
            0 => ([alone, others], true),
            _ => ([others, alone], true),
        };
        c.lab.partition(&groups, one_way)?;
        pause();
        c.lab.heal()?;
        let cut = leader()?;
        let mut others = but(&cut);
        let with = others.pop().context("five managers")?;
        c.lab.partition(&[vec![cut, with], others], false)?;
        pause();
        c.lab.heal()?;
    }
    Ok(())
}

fn what_clients_see_is_linearizable(c: &Cluster) -> Result<()> {
    all_reachable(c)?;
    let names = (0..REGISTERS).map(|n| format!("register{n}"));
    let registers: Vec<_> =
        names.map(|name| Register { name, history: Recorder::default() }).collect();
    for Register { name, .. } in &registers {
        let create = "service create --detach --quiet --runtime process --replicas 0";
        c.meshctl("m1", &format!("{create} --name {name} -- sleep infinity"))?.ok()?;
    }
    let stop = AtomicBool::new(false);
    let troubled = thread::scope(|scope| {
        for number in 1..=CLIENTS {
            let (registers, stop) = (&registers, &stop);
            scope.spawn(move || client(c, registers, number, stop));
        }
        let troubled = trouble(c).and_then(|()| all_reachable(c));
        stop.store(true, Ordering::Relaxed);
        troubled
    });
    // Whatever failed: the next case finds the network whole.
    c.lab.heal()?;
    troubled?;
    for Register { name, history } in registers {
        for manager in MANAGERS {
            let called = history.call();
            history.answered(called, Action::Read(look(c, manager, &name)?.0));
        }
        let operations = history.into_operations();
        let answered = operations.iter().filter(|o| o.answered.is_some()).count();
        let lost = operations.len() - answered;
        println!("    {name}: {answered} operations answered, {lost} not");
        ensure!(answered > 30, "too few to say anything: {answered}");
        check(0, &operations).map_err(|error| anyhow!("{name}: {error}"))?;
    }
    Ok(())
}

/// The ids of the nodes of this name, and what `node ls` says of each.
fn named(c: &Cluster, name: &str) -> Result<Vec<(String, String)>> {
    let nodes = c.lab.call("m1", "GET", "/nodes", None)?;
    let mine = list(&nodes).iter().filter(|node| node["Description"]["Hostname"] == name);
    mine.map(|node| Ok((field(node, "ID")?, field(&node["Status"], "State")?))).collect()
}

/// A manager whose store is gone refuses to go on; wiped and removed, it joins again and votes.
fn a_lost_disk_is_no_vote(c: &Cluster) -> Result<()> {
    all_reachable(c)?;
    let lost = if c.leader("m1")? == "m5" { "m4" } else { "m5" };
    let state = c.lab.places().state_dir(lost);
    c.lab.end_daemon(lost, DaemonSignal::Kill)?;
    let store = find(&state, "raft.redb")?;
    fs::remove_file(&store).with_context(|| format!("remove {}", store.display()))?;
    c.lab.start(lost)?;
    let info = c.lab.call(lost, "GET", "/info", None)?;
    let why = field(&info["Swarm"], "Error")?;
    ensure!(why.contains("raft.redb is gone") && why.contains("leave --force"), "{why}");
    c.meshctl(lost, "node ls")?.refused(&["cannot take up its membership"])?;
    ensure!(!store.exists(), "a store was made in the place of the lost one");
    // As if the machine was set up anew: nothing of it is left, and it joins under its old name.
    c.lab.end_daemon(lost, DaemonSignal::Kill)?;
    fs::remove_dir_all(&state).context("wipe the node")?;
    c.lab.start(lost)?;
    let token = c.meshctl("m1", "swarm join-token -q manager")?.ok()?;
    let before = named(c, lost)?;
    // Who has the address of a node that is up is taken for an impostor.
    c.wait_node("m1", lost, "Down")?;
    c.meshctl(lost, &format!("swarm join --token {token} 192.0.2.11:2377"))?.ok()?;
    let (old, _) = before.first().context("it was never there")?;
    let refused = c.meshctl("m1", &format!("node rm {old}"))?;
    if refused.status != 0 {
        c.meshctl("m1", &format!("node rm --force {old}"))?.ok()?;
    }
    eventually("one node of that name", SOON, || {
        let now = named(c, lost)?;
        ensure!(now.len() == 1 && now[0].0 != *old && now[0].1 == "ready", "{now:?}");
        Ok(())
    })?;
    all_reachable(c)?;
    // It votes: with it and two others there is a majority.
    let mut dead = but(lost);
    dead.truncate(2);
    let rest: Vec<_> =
        MANAGERS.iter().map(|&m| m.to_owned()).filter(|m| !dead.contains(m)).collect();
    for manager in &dead {
        c.lab.end_daemon(manager, DaemonSignal::Kill)?;
    }
    let gap = written(c, &rest, "with-its-vote");
    for manager in &dead {
        c.lab.start(manager)?;
    }
    gap?;
    all_reachable(c)?;
    let nodes = c.meshctl(lost, "node ls")?.ok()?;
    ensure!(!row_of(&nodes, lost).is_empty(), "{nodes}");
    c.meshctl(lost, "network inspect with-its-vote")?.ok().map(drop)
}

/// Its addresses may be others' by now, and its own store never hears of that.
fn a_manager_removed_while_cut_off_ends_its_tasks(c: &Cluster) -> Result<()> {
    all_reachable(c)?;
    let away = if c.leader("m1")? == "m5" { "m4" } else { "m5" };
    c.service(&format!("--name stays --constraint node.hostname=={away}"), "sleep infinity")?;
    let task = c.wait_running("stays", 1)?.pop().context("no task")?;
    let inspect = c.lab.call("m1", "GET", &format!("/tasks/{}", task.id), None)?;
    let pid = inspect["Status"]["ContainerStatus"]["PID"].as_u64().context("no pid")?;
    c.lab.partition(&[vec![away.to_owned()], but(away)], false)?;
    let removed = eventually("it to be removed", SOON, || {
        c.meshctl("m1", &format!("node rm --force {away}"))?.ok()
    });
    // Started anew, it turns to itself first.
    c.lab.end_daemon(away, DaemonSignal::Kill)?;
    c.lab.start(away)?;
    let up = eventually("it to be up", SOON, || c.meshctl(away, "node ls")?.refused(&["leader"]));
    let runs = std::path::Path::new(&format!("/proc/{pid}")).exists();
    c.lab.heal()?;
    removed?;
    up?;
    ensure!(runs, "its task ended before it could know");
    let ended = eventually("its task to end", SOON, || {
        ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid} lives");
        Ok(())
    });
    // And to stay so, whomever it asks next: its own store still has the task.
    let begin = Instant::now();
    let mut again = 0;
    while begin.elapsed() < Duration::from_secs(3) {
        let info = c.lab.call(away, "GET", "/info", None)?;
        again = again.max(info["ContainersRunning"].as_u64().context("no count")?);
        thread::sleep(Duration::from_millis(100));
    }
    c.meshctl(away, "swarm leave --force")?.ok()?;
    let token = c.meshctl("m1", "swarm join-token -q manager")?.ok()?;
    c.meshctl(away, &format!("swarm join --token {token} 192.0.2.11:2377"))?.ok()?;
    ended?;
    ensure!(again == 0, "it was started again");
    all_reachable(c)
}

/// A file under a directory.
fn find(dir: &std::path::Path, name: &str) -> Result<std::path::PathBuf> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|file| file == name) {
            return Ok(path);
        }
        if path.is_dir()
            && let Ok(found) = find(&path, name)
        {
            return Ok(found);
        }
    }
    Err(anyhow!("no {name} under {}", dir.display()))
}
