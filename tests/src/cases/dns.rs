//! Names inside tasks.

use anyhow::{Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("dns": names_of_services_and_tasks, a_known_name_has_no_aaaa, an_unknown_name_is_nxdomain,
    other_networks_are_unknown, outside_names_are_forwarded, large_answers_go_by_tcp,
    resolv_conf_and_hosts, changes_show_soon);

fn dig(c: &Cluster, words: &str) -> Result<String> {
    let words: Vec<_> =
        ["dig", "+time=2", "+tries=1"].into_iter().chain(words.split(' ')).collect();
    c.in_task("shell.1", &words)?.ok()
}

/// Network `app`, service `web` of three tasks, and `shell.1`, whose resolver knows them.
fn set_up(c: &Cluster) -> Result<()> {
    c.web("--replicas 3")?;
    c.shell()?;
    eventually("tasks.web to have three addresses", SOON, || {
        let tasks = dig(c, "+short tasks.web")?;
        ensure!(tasks.lines().count() == 3, "{tasks:?}");
        Ok(())
    })
}

fn names_of_services_and_tasks(c: &Cluster) -> Result<()> {
    set_up(c)?;
    let vip = dig(c, "+short web")?;
    ensure!(vip.lines().count() == 1, "{vip:?}");
    for name in ["web.app", "WEB", "web."] {
        ensure!(dig(c, &format!("+short {name}"))? == vip, "{name} is not {vip}");
    }
    let mut addresses = Vec::new();
    for task in c.wait_running("web", 3)? {
        let address = task.addresses.get("app").cloned().unwrap_or_default();
        // Docker's name of a task's container.
        let name = format!("{}.{}", task.name, task.id);
        ensure!(dig(c, &format!("+short {name}"))? == address, "{name} is not {address}");
        addresses.push(address);
    }
    let mut listed: Vec<_> = dig(c, "+short tasks.web")?.lines().map(str::to_owned).collect();
    listed.sort();
    addresses.sort();
    ensure!(listed == addresses, "tasks.web is {listed:?}, not {addresses:?}");
    let by_tcp = dig(c, "+tcp +short web")?;
    ensure!(by_tcp == vip, "by TCP it is {by_tcp:?}");
    c.in_task("shell.1", &["getent", "hosts", "web"])?.ok().map(drop)
}

fn a_known_name_has_no_aaaa(c: &Cluster) -> Result<()> {
    set_up(c)?;
    let answer = dig(c, "web AAAA")?;
    ensure!(answer.contains("status: NOERROR") && answer.contains("ANSWER: 0"), "{answer}");
    Ok(())
}

fn an_unknown_name_is_nxdomain(c: &Cluster) -> Result<()> {
    set_up(c)?;
    for name in ["nope.app", "tasks.nope.app"] {
        let answer = dig(c, name)?;
        ensure!(answer.contains("status: NXDOMAIN"), "{name}: {answer}");
    }
    Ok(())
}

fn other_networks_are_unknown(c: &Cluster) -> Result<()> {
    set_up(c)?;
    c.network("apart")?;
    c.service("--name hidden --replicas 1 --network apart", "sleep infinity")?;
    for name in ["hidden", "tasks.hidden", "hidden.apart"] {
        let answer = dig(c, &format!("+short {name}"))?;
        ensure!(answer.is_empty(), "{name} is {answer:?}");
    }
    Ok(())
}

fn outside_names_are_forwarded(c: &Cluster) -> Result<()> {
    set_up(c)?;
    eventually("an outside name", SOON, || {
        let address = dig(c, "+short www.example.test")?;
        ensure!(address == "198.51.100.7", "{address:?}");
        Ok(())
    })?;
    ensure!(dig(c, "+short www.example.test AAAA")? == "2001:db8:2::7");
    let missing = dig(c, "nope.example.test")?;
    ensure!(missing.contains("status: NXDOMAIN"), "{missing}");
    let no_data = dig(c, "v4only.example.test AAAA")?;
    ensure!(no_data.contains("status: NOERROR") && no_data.contains("ANSWER: 0"), "{no_data}");
    Ok(())
}

fn large_answers_go_by_tcp(c: &Cluster) -> Result<()> {
    set_up(c)?;
    let many =
        eventually("the many addresses", SOON, || dig(c, "+short +noedns many.example.test"))?;
    ensure!(many.lines().count() == 40, "{} addresses", many.lines().count());
    Ok(())
}

fn resolv_conf_and_hosts(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name shell --replicas 1 --network app --hostname box", "sleep infinity")?;
    let conf = c.task_sh("shell.1", "cat /etc/resolv.conf")?;
    ensure!(conf.lines().any(|line| line.trim() == "nameserver 127.0.0.11"), "{conf}");
    ensure!(c.task_sh("shell.1", "hostname")? == "box");
    let own = c.task_sh("shell.1", "getent hosts box")?;
    let tasks = c.wait_running("shell", 1)?;
    let address = tasks[0].addresses.get("app").cloned().unwrap_or_default();
    ensure!(own.starts_with(&address), "box is {own:?}, not {address}");
    Ok(())
}

fn changes_show_soon(c: &Cluster) -> Result<()> {
    set_up(c)?;
    for count in [5, 1] {
        c.scale("web", count)?;
        eventually(&format!("{count} addresses of tasks.web"), SOON, || {
            let tasks = dig(c, "+short tasks.web")?;
            ensure!(tasks.lines().count() == count, "{tasks:?}");
            Ok(())
        })?;
    }
    c.meshctl("m1", "service rm web")?.ok()?;
    eventually("the name to go", SOON, || {
        let answer = dig(c, "+short web")?;
        ensure!(answer.is_empty(), "{answer:?}");
        Ok(())
    })
}
