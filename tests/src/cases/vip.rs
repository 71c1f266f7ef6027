//! Virtual addresses: requests to one address, spread over a service's tasks.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::group;
use crate::cluster::{Cluster, SOON, eventually, field};

group!("vip": tcp_is_spread, udp_is_answered, echo_is_answered, scaling_is_followed,
    a_task_reaches_itself_through_its_vip, dnsrr_has_no_vip, a_large_answer_arrives,
    a_flow_survives_scaling);

/// Who answered `count` requests of a task, by task name.
fn answers(c: &Cluster, task: &str, url: &str, count: usize) -> Result<BTreeMap<String, usize>> {
    let script =
        format!("for i in $(seq {count}); do curl -s --max-time 5 {url} || exit 1; echo; done");
    let said = c.task_sh(task, &script)?;
    let mut tasks = BTreeMap::new();
    for line in said.lines().filter(|line| !line.trim().is_empty()) {
        let answer: Value = serde_json::from_str(line).with_context(|| format!("{line:?}"))?;
        *tasks.entry(field(&answer, "task")?).or_default() += 1;
    }
    Ok(tasks)
}

fn tcp_is_spread(c: &Cluster) -> Result<()> {
    c.web("--replicas 5")?;
    c.shell()?;
    eventually("requests to be spread", SOON, || {
        let tasks = answers(c, "shell.1", "http://web/", 60)?;
        let total: usize = tasks.values().sum();
        ensure!(total == 60 && tasks.len() == 5, "{total} answers by {tasks:?}");
        Ok(())
    })?;
    let answer = c.fetch_in_task("shell.1", "http://web/")?;
    let shell = c.wait_running("shell", 1)?;
    let own = shell[0].addresses.get("app").context("shell has no address")?;
    let seen = field(&answer, "client")?;
    ensure!(seen.starts_with(&format!("{own}:")), "the task sees {seen}, not {own}");
    Ok(())
}

/// One datagram and its answer, by bash's own sockets.
fn ask_udp(c: &Cluster, task: &str, host: &str) -> Result<Value> {
    let script = format!(
        "exec 3<>/dev/udp/{host}/7; echo -n hello >&3; timeout 2 dd bs=4096 count=1 status=none <&3"
    );
    let said = c.task_sh(task, &script)?;
    serde_json::from_str(&said).with_context(|| format!("UDP answered {said:?}"))
}

fn udp_is_answered(c: &Cluster) -> Result<()> {
    c.web("--replicas 3")?;
    c.shell()?;
    let mut tasks = BTreeMap::new();
    for _ in 0..20 {
        let answer = eventually("an answer by UDP", SOON, || ask_udp(c, "shell.1", "web"))?;
        ensure!(field(&answer, "protocol")? == "udp", "{answer}");
        *tasks.entry(field(&answer, "task")?).or_insert(0) += 1;
    }
    ensure!(tasks.len() > 1, "all by {tasks:?}");
    Ok(())
}

fn echo_is_answered(c: &Cluster) -> Result<()> {
    c.web("--replicas 1")?;
    c.shell()?;
    eventually("the VIP to answer pings", SOON, || {
        c.in_task("shell.1", &["ping", "-c3", "-W1", "-i0.2", "web"])?.ok()
    })?;
    Ok(())
}

fn scaling_is_followed(c: &Cluster) -> Result<()> {
    c.web("--replicas 1")?;
    c.shell()?;
    for count in [4, 2, 5] {
        c.scale("web", count)?;
        eventually(&format!("{count} tasks to answer"), SOON, || {
            let tasks = answers(c, "shell.1", "http://web/", 40)?;
            ensure!(tasks.len() == count, "{tasks:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn a_task_reaches_itself_through_its_vip(c: &Cluster) -> Result<()> {
    c.web("--replicas 1")?;
    eventually("web.1 to reach web", SOON, || c.fetch_in_task("web.1", "http://web/"))?;
    Ok(())
}

fn dnsrr_has_no_vip(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service(
        "--name rr --replicas 3 --network app --endpoint-mode dnsrr",
        crate::cluster::WHOAMI,
    )?;
    c.shell()?;
    eventually("three addresses of rr", SOON, || {
        let all = c.in_task("shell.1", &["dig", "+short", "rr"])?.ok()?;
        let tasks = c.in_task("shell.1", &["dig", "+short", "tasks.rr"])?.ok()?;
        ensure!(all.lines().count() == 3, "{all:?}");
        let sorted = |text: &str| {
            let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        ensure!(sorted(&all) == sorted(&tasks), "{all:?} {tasks:?}");
        Ok(())
    })?;
    c.meshctl(
        "m1",
        "service create --name bad --endpoint-mode dnsrr --publish 8099:80 \
        --runtime process -- true",
    )?
    .refused(&["dnsrr"])
}

fn a_large_answer_arrives(c: &Cluster) -> Result<()> {
    c.web("--replicas 5")?;
    c.shell()?;
    // Through tasks here and elsewhere: segments merged and split again on the way.
    for _ in 0..10 {
        let length = eventually("20 MB to arrive", SOON, || {
            c.task_sh("shell.1", "curl -s --max-time 10 'http://web/?size=20MB' | wc -c")
        })?;
        ensure!(length.parse::<u64>().is_ok_and(|n| n >= 20_000_000), "{length} bytes came");
    }
    Ok(())
}

/// A connection keeps its task while others come and go.
fn a_flow_survives_scaling(c: &Cluster) -> Result<()> {
    c.web("--replicas 2")?;
    c.shell()?;
    let script = "exec 3<>/dev/tcp/web/7; read -r -u3 who; \
        for i in $(seq 40); do echo line$i >&3; read -r -t 3 -u3 back || exit 1; \
        [ \"$back\" = line$i ] || exit 2; sleep 0.1; done; echo done";
    std::thread::scope(|scope| {
        let flow = scope.spawn(|| c.task_sh("shell.1", script));
        for count in [5, 3, 6] {
            c.scale("web", count)?;
        }
        let said = flow.join().map_err(|_| anyhow::anyhow!("the flow panicked"))??;
        ensure!(said == "done", "{said:?}");
        Ok(())
    })
}
