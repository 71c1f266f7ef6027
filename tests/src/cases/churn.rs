//! Whoever dies when, and whatever is taken away or comes back: in the end the nodes hold what
//! should be, nothing else, and no address has two owners.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_history::Dice;
use mesh_lab::DaemonSignal;

use super::group;
use crate::{
    cluster::{Cluster, SOON, WHOAMI, eventually, field, list, row_of, text},
    load::{Load, RATE},
};

group!("churn": fifty_kills_leak_nothing, a_removed_node_comes_back_with_its_old_state,
    a_removed_node_comes_back_wiped, leader_kills_and_partitions_keep_one_owner);

/// How often a daemon is killed.
const KILLS: usize = 50;
/// A task that ends all the time, and is started again.
const BRIEF: &str = "sleep 1";
/// How long a cluster may take to settle when nobody harms it any more.
const SETTLED: Duration = Duration::from_secs(40);

/// Dice from `MESH_TESTS_SEED`, or new ones; the seed is printed in any case.
fn dice() -> Result<Dice> {
    let given = env::var("MESH_TESTS_SEED").ok().map(|seed| seed.parse());
    let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(1, |now| now.subsec_nanos().into());
    let seed = given.transpose().context("MESH_TESTS_SEED is no number")?.unwrap_or_else(now);
    println!("    MESH_TESTS_SEED={seed} tries this again");
    Ok(Dice::new(seed))
}

/// Prints what a node holds of tasks, without what differs from time to time: `D` is its state
/// directory, `G` its cgroup, `PINS` its pins.
const HELD: &str = r#"
echo links; ip -br link | grep -oE '^(mv|mesh-)[0-9a-z]*' | sort
echo namespaces; ip netns list-id | wc -l
echo routes; ip -4 route show proto 109
echo neighbours; ip neigh show nud permanent | grep mv
echo nft; nft -s list ruleset
for m in ADDRESSES ENDPOINTS PORTS NODES VTEPS SERVICES PUBLISHED LOCAL_ADDRS; do
    echo $m
    bpftool -j map dump pinned $PINS/v1/maps/$m | sed 's/},{"key"/}\n{"key"/g' | tr -d '[]' | sort
done
echo pins; ls $PINS/v1/maps $PINS/v1/links
echo cgroups; (cd $G && find . -type d | sort)
echo processes; for p in $(find $G -name cgroup.procs | xargs cat); do
    tr '\0' ' ' 2> /dev/null < /proc/$p/cmdline | cut -d' ' -f1-2; echo
done 2> /dev/null | grep -E 'meshd|whoami|sleep|sh -c .sleep' | sort
echo files; (cd $D && find . -not -path './raft*' -not -path './*.new' -not -path ./tasks \
    -not -name leases.json -not -name agent.json | sort)
grep -oE '"ino":[0-9]+' $D/leases.json 2> /dev/null; true
"#;

/// Of each node, what [`HELD`] prints.
fn held(c: &Cluster) -> Result<BTreeMap<String, String>> {
    let places = c.lab.places();
    let of = |node: mesh_lab::Member| {
        let (state, cgroup) = (places.state_dir(&node.name), places.cgroup_of(&node.name));
        let pins = places.pins_of(&node.name);
        let words = format!("D={} G={} PINS={}", state.display(), cgroup.display(), pins.display());
        let said = c.on(&node.name, &["sh", "-c", &format!("{words}; {HELD}")])?.ok()?;
        Ok((node.name, said))
    };
    c.lab.nodes().into_iter().map(of).collect()
}

fn same(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Result<()> {
    for (node, before) in before {
        let now = now.get(node).with_context(|| format!("{node} is gone"))?;
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        let (old, new) = (lines(before), lines(now));
        let gone: Vec<_> = old.difference(&new).collect();
        let more: Vec<_> = new.difference(&old).collect();
        ensure!(before == now, "{node}: gone {gone:#?}, more {more:#?}");
    }
    Ok(())
}

/// Who has which address, as the kernels say: the local entries of every node's endpoint map, and
/// the interfaces in its tasks. Fails if two nodes, or two tasks, have one. Addresses that every
/// node has for itself are left out.
///
/// # Errors
/// When an address has two owners, or a kernel cannot be read.
pub fn one_owner(c: &Cluster) -> Result<usize> {
    let mut owner: BTreeMap<String, String> = BTreeMap::new();
    for node in c.lab.nodes() {
        let (places, name) = (c.lab.places(), &node.name);
        let script = format!(
            "bpftool -j map dump pinned {}/v1/maps/ENDPOINTS; echo; for d in {}/tasks/*/; do \
             nsenter -t $(cat $d/shim.pid) -n ip -o -4 addr 2> /dev/null | \
             sed \"s|^|$d |\"; done; true",
            places.pins_of(name).display(),
            places.state_dir(name).display(),
        );
        let said = c.on(name, &["sh", "-c", &script])?.ok()?;
        let (map, interfaces) = said.split_once('\n').unwrap_or((&said, ""));
        let mut found: Vec<(String, String)> = Vec::new();
        for entry in list(&serde_json::from_str(map).context("bpftool's JSON")?) {
            let value = bytes(&entry["value"])?;
            let key = bytes(&entry["key"])?;
            // Address 0..16, VNI at 56, link at 60 (`mesh_ebpf_abi::Endpoint`).
            let (vni, link) = (number(&value, 56)?, number(&value, 60)?);
            if vni != 0 && link != 0 {
                let address = format!("{}.{}.{}.{}", value[12], value[13], value[14], value[15]);
                found.push((format!("map {vni} {address}"), format!("{name}, endpoint {key:?}")));
            }
        }
        for line in interfaces.lines().filter(|line| !line.is_empty()) {
            let mut words = line.split_whitespace();
            let (task, address) = (words.next().unwrap_or_default(), words.nth(3));
            let address = address.context("ip prints addresses")?;
            if !["127.", "100.127."].iter().any(|own| address.starts_with(own)) {
                found.push((format!("interface {address}"), format!("{name}, {task}")));
            }
        }
        for (what, who) in found {
            if let Some(other) = owner.insert(what.clone(), who.clone()) {
                bail!("{what} is {other}'s and {who}'s");
            }
        }
    }
    Ok(owner.len())
}

fn bytes(value: &serde_json::Value) -> Result<Vec<u8>> {
    let hex = |byte: &serde_json::Value| {
        let digits = byte.as_str().and_then(|text| text.strip_prefix("0x"));
        u8::from_str_radix(digits.context("a byte in hex")?, 16).context("a byte")
    };
    list(value).iter().map(hex).collect()
}

fn number(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes.get(at..at + 4).context("a shorter entry than the contract's")?;
    Ok(u32::from_ne_bytes(word.try_into()?))
}

/// One thing that a user does. It may be refused: daemons are dying.
fn act(c: &Cluster, dice: &mut Dice, number: u64) -> Result<()> {
    let first = usize::try_from(dice.below(3))?;
    let service = format!("s{}", dice.below(4));
    let network = format!("n{}", dice.below(2));
    let line = match dice.below(12) {
        0 | 8 => format!("network create --driver overlay {network}"),
        1 => format!("service rm {service}"),
        2 => format!("network rm {network}"),
        3 => format!("service scale --detach {service}={}", 1 + dice.below(5)),
        4 => format!("service update --detach --env-add N={number} {service}"),
        5 => format!("service update --detach --force --update-order start-first {service}"),
        _ => {
            let (replicas, port) = (1 + dice.below(4), 8100 + dice.below(4));
            let command = if dice.below(3) == 0 { BRIEF } else { WHOAMI };
            format!(
                "service create --detach --quiet --runtime process --name {service} --replicas \
                 {replicas} --network {network} --publish {port}:80 --restart-delay 200ms \
                 --stop-grace-period 1s -- {command}"
            )
        }
    };
    let managers = ["m1", "m2", "m3"].into_iter().cycle().skip(first).take(3);
    let mut result = Ok(());
    for manager in managers {
        result = c.meshctl(manager, &line)?.ok().map(drop);
        // Another one answers while that is dead.
        if !matches!(&result, Err(e) if e.to_string().contains("Connection refused")) {
            break;
        }
    }
    result
}

/// Kills daemons at random moments, each of which is started again at once, and may be killed
/// while it starts. A manager only when two things were `done` since the last one was: without
/// a majority all the time nothing would come and go.
fn kill_at_random(c: &Cluster, dice: &mut Dice, done: &AtomicUsize) -> Result<()> {
    let nodes = c.lab.nodes();
    let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
    let mut done_then = 0;
    thread::scope(|scope| {
        for _ in 0..KILLS {
            thread::sleep(Duration::from_millis(dice.below(500)));
            let (node, killed) = eventually("a daemon that lives", SOON, || {
                let name = dice.pick(&names).context("no nodes")?;
                let done = done.load(Ordering::Relaxed);
                let manager = name.starts_with('m');
                ensure!(!manager || done > done_then + 1, "a manager was killed before");
                let rows = c.lab.ps();
                let row = rows.iter().find(|row| row.name == name).context("no such node")?;
                let pid = row.pid.context("it is dead")?;
                // Without the lab's lock, which is held while a daemon starts.
                c.on("router", &["kill", "-KILL", &pid.to_string()])?.ok()?;
                done_then = if manager { done } else { done_then };
                Ok((name, pid))
            })?;
            scope.spawn(move || {
                // One that is dying still counts as running, and would not be started.
                let _ = eventually("its end", SOON, || {
                    let same = |row: &mesh_lab::Row| row.name == node && row.pid == Some(killed);
                    ensure!(!c.lab.ps().iter().any(same), "{killed} is still there");
                    Ok(())
                });
                // It may be killed before it answers.
                let _ = c.lab.start(node);
            });
        }
        Ok(())
    })
}

/// What runs is what should: every service has its tasks, and no node has another.
fn converged(c: &Cluster) -> Result<()> {
    let services = c.api("GET", "/services?status=true")?;
    let mut wanted: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let tasks = c.api("GET", "/tasks")?;
    let nodes = c.api("GET", "/nodes")?;
    let name_of = |id: &str| {
        let node = list(&nodes).iter().find(|node| node["ID"] == id);
        node.and_then(|node| text(&node["Description"]["Hostname"])).unwrap_or_default()
    };
    for service in list(&services) {
        let (spec, id) = (&service["Spec"], field(service, "ID")?);
        let replicas = spec["Mode"]["Replicated"]["Replicas"].as_u64().context("no replicas")?;
        let of = |task: &&serde_json::Value| task["ServiceID"] == id.as_str();
        let live: Vec<_> =
            list(&tasks).iter().filter(of).filter(|t| t["DesiredState"] == "running").collect();
        ensure!(live.len() as u64 == replicas, "{}: {} of {replicas}", spec["Name"], live.len());
        let brief = spec.to_string().contains("sleep");
        for task in live {
            let running = task["Status"]["State"] == "running";
            ensure!(running || brief, "{}: {}", spec["Name"], task["Status"]);
            if !brief {
                let node = name_of(&field(task, "NodeID")?);
                wanted.entry(node).or_default().insert(field(task, "ID")?);
            }
        }
    }
    for node in c.lab.nodes() {
        let dir = c.lab.places().state_dir(&node.name).join("tasks");
        let wanted = wanted.remove(&node.name).unwrap_or_default();
        let there = alive(&dir)?;
        let missing: Vec<_> = wanted.difference(&there).collect();
        ensure!(missing.is_empty(), "{} lacks {missing:?}", node.name);
        for extra in there.difference(&wanted) {
            // Of the services whose tasks end all the time.
            let known = list(&tasks).iter().any(|task| task["ID"] == extra.as_str());
            ensure!(known, "{} runs {extra}, which nobody knows", node.name);
        }
    }
    Ok(())
}

/// The tasks of a node whose process runs.
fn alive(tasks: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let Ok(entries) = fs::read_dir(tasks) else { return Ok(found) };
    for entry in entries {
        let entry = entry?;
        let pid = fs::read_to_string(entry.path().join("pid")).unwrap_or_default();
        if !pid.is_empty() && Path::new("/proc").join(pid.trim()).exists() {
            found.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

fn fifty_kills_leak_nothing(c: &Cluster) -> Result<()> {
    let mut dice = dice()?;
    let before = eventually("nodes that hold nothing", SOON, || {
        let before = held(c)?;
        let clean = |held: &String| !held.lines().any(|line| line.starts_with("mv"));
        ensure!(before.values().all(clean), "{before:#?}");
        Ok(before)
    })?;
    let (done, acts) = (AtomicBool::new(false), AtomicUsize::new(0));
    let begin = Instant::now();
    let killed = thread::scope(|scope| {
        let mut user = Dice::new(dice.below(u64::MAX));
        let (done, acts) = (&done, &acts);
        scope.spawn(move || {
            let mut refusals = BTreeMap::new();
            for number in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                match act(c, &mut user, number) {
                    Ok(()) => {
                        acts.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(e) => {
                        let why = format!("{e:#}").split(':').next_back().unwrap_or("").to_owned();
                        *refusals.entry(why).or_insert(0) += 1;
                    }
                }
            }
            println!("    refused: {refusals:?}");
        });
        let killed = kill_at_random(c, &mut dice, acts);
        done.store(true, Ordering::Relaxed);
        killed
    });
    println!(
        "    {KILLS} kills in {:.1?}, while {} things were made, changed and removed",
        begin.elapsed(),
        acts.load(Ordering::Relaxed)
    );
    killed?;
    ensure!(acts.load(Ordering::Relaxed) > KILLS / 3, "too little was done meanwhile");
    for node in c.lab.nodes() {
        c.lab.start(&node.name)?;
    }
    let begin = Instant::now();
    eventually("all that should run to run", SETTLED, || converged(c))?;
    println!("    settled after {:.1?}, {} addresses", begin.elapsed(), one_owner(c)?);
    c.network("last")?;
    c.service("--name last --replicas 5 --network last --publish 8080:80", WHOAMI)?;
    for node in c.lab.nodes() {
        let url = format!("http://{}:8080/", node.address);
        eventually(&url, SOON, || c.fetch("client", &url))?;
    }
    c.empty()?;
    eventually("nothing to be left", SETTLED, || same(&before, &held(c)?))
}

fn owners_stay_single(c: &Cluster, during: impl FnOnce() -> Result<()>) -> Result<()> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut looks = 0;
            while !done.load(Ordering::Relaxed) {
                one_owner(c)?;
                looks += 1;
            }
            Ok::<_, anyhow::Error>(looks)
        });
        let result = during();
        done.store(true, Ordering::Relaxed);
        let looks = watch.join().map_err(|_| anyhow::anyhow!("the watch panicked"))?;
        result?;
        let looks = looks?;
        ensure!(looks > 0, "nobody looked");
        println!("    {looks} looks at all kernels, {} addresses", one_owner(c)?);
        Ok(())
    })
}

fn leader(c: &Cluster) -> Result<String> {
    let nodes =
        ["m1", "m2", "m3"].iter().find_map(|ask| c.lab.call(ask, "GET", "/nodes", None).ok());
    let nodes = nodes.context("no manager answers")?;
    let leads = |node: &&serde_json::Value| node["ManagerStatus"]["Leader"] == true;
    let leader = list(&nodes).iter().find(leads).context("nobody leads")?;
    field(&leader["Description"], "Hostname")
}

/// Tasks come and go all the while.
fn leader_kills_and_partitions_keep_one_owner(c: &Cluster) -> Result<()> {
    c.web("--replicas 5 --publish 8080:80 --stop-grace-period 1s")?;
    owners_stay_single(c, || {
        for round in 0_usize..2 {
            let dead = leader(c)?;
            let other = if dead == "m1" { "m2" } else { "m1" };
            let order = |count: usize| {
                eventually("a write", SOON, || {
                    c.meshctl(other, &format!("service scale --detach web={count}"))?.ok()
                })
            };
            order(8 - round)?;
            c.lab.end_daemon(&dead, DaemonSignal::Kill)?;
            let wrote = order(3 + round);
            c.lab.start(&dead)?;
            wrote?;
        }
        let groups = [["m1", "w1"].to_vec(), ["m2", "m3", "w2"].to_vec()];
        let groups = groups.map(|group| group.into_iter().map(str::to_owned).collect::<Vec<_>>());
        c.lab.partition(&groups, false)?;
        let wrote = eventually("a write by the majority", SOON, || {
            c.meshctl("m2", "service scale --detach web=9")?.ok()
        })
        // Tasks of silent nodes are replaced while those run on behind the partition.
        .and_then(|_| {
            eventually("the majority to run nine", SETTLED, || {
                let tasks = c.lab.call("m2", "GET", "/tasks", None)?;
                let nodes = c.lab.call("m2", "GET", "/nodes", None)?;
                let here = |id: &serde_json::Value| {
                    let node = list(&nodes).iter().find(|node| node["ID"] == *id);
                    node.is_some_and(|node| node["Status"]["State"] == "ready")
                };
                let runs = |t: &&serde_json::Value| {
                    t["Status"]["State"] == "running"
                        && t["DesiredState"] == "running"
                        && here(&t["NodeID"])
                };
                let count = list(&tasks).iter().filter(runs).count();
                ensure!(count == 9, "{count} run");
                Ok(())
            })
        });
        c.lab.heal()?;
        wrote
    })?;
    c.wait_running("web", 9)?;
    eventually("all that should run to run", SETTLED, || converged(c))?;
    one_owner(c).map(drop)
}

fn state_of(c: &Cluster, node: &str) -> Result<String> {
    field(&c.lab.call(node, "GET", "/info", None)?["Swarm"], "LocalNodeState")
}

fn join(c: &Cluster, node: &str) -> Result<()> {
    let token = c.meshctl("m1", "swarm join-token -q worker")?.ok()?;
    c.meshctl(node, &format!("swarm join --token {token} 192.0.2.11:2377"))?.ok()?;
    eventually(&format!("{node} to be ready"), SOON, || {
        let nodes = c.meshctl("m1", "node ls")?.ok()?;
        ensure!(row_of(&nodes, node).contains("Ready"), "{nodes}");
        Ok(())
    })
}

/// Takes `w2` out while its daemon is dead and its tasks run on, and fills the small network anew,
/// so that its tasks' addresses are others'. Returns those addresses.
fn remove_w2(c: &Cluster) -> Result<BTreeSet<String>> {
    // Thirteen addresses for tasks: a gateway and a virtual address take two of fifteen less one.
    c.network("--subnet 10.66.0.0/28 small")?;
    c.service("--name web --replicas 8 --network small --publish 8080:80", WHOAMI)?;
    let old: BTreeSet<String> = c
        .wait_running("web", 8)?
        .into_iter()
        .filter(|task| task.node == "w2")
        .filter_map(|task| task.addresses.get("small").cloned())
        .collect();
    ensure!(!old.is_empty(), "no task is on w2");
    c.lab.end_daemon("w2", DaemonSignal::Kill)?;
    c.meshctl("m1", "node rm --force w2")?.ok()?;
    eventually("its addresses to be others'", SETTLED, || {
        c.scale("web", 8)?;
        c.scale("web", 12)?;
        let tasks = c.running("web")?;
        let now: BTreeSet<_> = tasks.iter().filter_map(|t| t.addresses.get("small")).collect();
        ensure!(tasks.iter().all(|task| task.node != "w2"), "w2 still has a task");
        ensure!(old.iter().all(|address| now.contains(address)), "{old:?} of {now:?}");
        Ok(())
    })?;
    Ok(old)
}

/// Its tasks ended, its kernel empty of them, and nobody was ever answered by them.
fn a_removed_node_comes_back_with_its_old_state(c: &Cluster) -> Result<()> {
    let tried = remove_w2(c).and_then(|old| comes_back(c, &old));
    // For the next case, whatever became of this one.
    c.lab.start("w2")?;
    if state_of(c, "w2")? != "inactive" {
        c.meshctl("w2", "swarm leave --force")?.ok()?;
    }
    ensure!(state_of(c, "w2")? == "inactive", "{}", state_of(c, "w2")?);
    join(c, "w2").and(tried)
}

fn comes_back(c: &Cluster, old: &BTreeSet<String>) -> Result<()> {
    let w2 = c.lab.member("w2")?.address;
    let others: Vec<_> =
        c.lab.nodes().iter().map(|node| node.address).filter(|address| *address != w2).collect();
    // Its stale tasks run, and could send; nobody takes it.
    let tasks = c.lab.places().state_dir("w2").join("tasks");
    ensure!(!alive(&tasks)?.is_empty(), "the stale tasks have ended already: nothing is tried");
    let load = Load::through(c, &others, 8080, RATE)?;
    c.lab.start("w2")?;
    let begin = Instant::now();
    let ended = eventually("its old tasks to end", SOON, || {
        let left = alive(&tasks)?;
        ensure!(left.is_empty(), "{left:?}");
        let links = c.on("w2", &["sh", "-c", "ip -br link | grep -c ^mv; true"])?.ok()?;
        ensure!(links == "0", "{links} links");
        Ok(())
    });
    let took = begin.elapsed();
    let report = load.stop()?;
    ended?;
    println!("    {} stale addresses gone {took:?} after the start; {report}", old.len());
    report.none_failed()?;
    ensure!(report.last_answer_of("w2").is_none(), "a stale task on w2 answered");
    one_owner(c)?;
    let log = fs::read_to_string(c.lab.places().log("w2"))?;
    ensure!(log.contains("removed from the cluster"), "its log does not say why");
    Ok(())
}

fn a_removed_node_comes_back_wiped(c: &Cluster) -> Result<()> {
    remove_w2(c)?;
    c.lab.crash("w2")?;
    fs::remove_dir_all(c.lab.places().state_dir("w2"))?;
    c.lab.start("w2")?;
    ensure!(state_of(c, "w2")? == "inactive", "it remembers: {}", state_of(c, "w2")?);
    join(c, "w2")?;
    c.network("app")?;
    c.service("--name each --mode global --network app --publish 8081:80", WHOAMI)?;
    ensure!(c.wait_running("each", 5)?.iter().any(|task| task.node == "w2"));
    eventually("an answer through w2", SOON, || c.fetch("client", "http://192.0.2.22:8081/"))?;
    one_owner(c).map(drop)
}
