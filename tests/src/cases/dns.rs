//! Names inside tasks.

use anyhow::{Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, eventually};

group!("dns": names_of_services_and_tasks, a_known_name_has_no_aaaa, an_unknown_name_is_nxdomain,
    other_networks_are_unknown, outside_names_are_forwarded, large_answers_go_by_tcp,
    resolv_conf_and_hosts, changes_show_soon, aliases_and_wildcards,
    ports_ids_and_addresses_have_names, own_servers_search_and_options, a_task_serves_port_53);

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

fn aliases_and_wildcards(c: &Cluster) -> Result<()> {
    c.network("app")?;
    let named = "--name web --network name=app,alias=db,alias=*.pages --replicas 2";
    c.service(named, crate::cluster::WHOAMI)?;
    c.service(
        "--name stack_rr --network name=app,alias=db2 --endpoint-mode dnsrr --replicas 2",
        crate::cluster::WHOAMI,
    )?;
    c.shell()?;
    let vip = eventually("web", SOON, || {
        let vip = dig(c, "+short web")?;
        ensure!(vip.lines().count() == 1, "{vip:?}");
        Ok(vip)
    })?;
    for name in ["db", "db.app", "a.pages", "b.a.pages.app"] {
        ensure!(dig(c, &format!("+short {name}"))? == vip, "{name} is not {vip}");
    }
    for name in ["tasks.db", "stack_rr", "db2", "tasks.stack_rr.app"] {
        eventually(&format!("two addresses of {name}"), SOON, || {
            let all = dig(c, &format!("+short {name}"))?;
            ensure!(all.lines().count() == 2, "{name}: {all:?}");
            Ok(())
        })?;
    }
    let create = "service create --detach --name bad --runtime process --network";
    c.meshctl("m1", &format!("{create} name=app,alias=a..b -- sleep 1"))?.refused(&["a..b"])
}

fn ports_ids_and_addresses_have_names(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 18053:80")?;
    c.shell()?;
    eventually("SRV records of both tasks", SOON, || {
        let all = dig(c, "+short SRV _http._tcp.web")?;
        ensure!(all.lines().count() == 2, "{all:?}");
        for line in all.lines() {
            let words: Vec<_> = line.split(' ').collect();
            ensure!(words.get(..3) == Some(&["0", "0", "80"]), "{line}");
            let target = words.get(3).copied().unwrap_or_default();
            ensure!(dig(c, &format!("+short {target}"))?.lines().count() == 1, "{target}");
        }
        Ok(())
    })?;
    let absent = dig(c, "SRV _81._tcp.web")?;
    ensure!(absent.contains("status: NXDOMAIN"), "{absent}");
    let tasks = c.wait_running("web", 2)?;
    let (id, address) = (&tasks[0].id, tasks[0].addresses.get("app").cloned().unwrap_or_default());
    for name in [id.as_str(), &id[..12]] {
        ensure!(dig(c, &format!("+short {name}"))? == address, "{name} is not {address}");
    }
    ensure!(dig(c, &format!("+short -x {address}"))? == format!("{}.{id}.app.", tasks[0].name));
    let vip = dig(c, "+short web")?;
    ensure!(dig(c, &format!("+short -x {vip}"))? == "web.app.");
    for address in ["192.168.77.1", "10.255.255.1"] {
        let answer = dig(c, &format!("-x {address}"))?;
        ensure!(answer.contains("status: NXDOMAIN"), "{address}: {answer}");
    }
    Ok(())
}

fn own_servers_search_and_options(c: &Cluster) -> Result<()> {
    c.network("app")?;
    let flags = "--dns 198.51.100.7 --dns-search example.test --dns-option timeout:3";
    c.service(&format!("--name shell --network app {flags}"), "sleep infinity")?;
    c.docker(
        "m1",
        &format!(
            "service create --detach --name stock --container-label mesh.runtime=process \
             --network app {flags} --dns-option ndots:2 process sleep infinity"
        ),
    )?
    .ok()?;
    let conf = c.task_sh("shell.1", "cat /etc/resolv.conf")?;
    let expected = "nameserver 127.0.0.11\nsearch example.test\noptions timeout:3 ndots:0";
    ensure!(conf == expected, "{conf:?}");
    eventually("a name in the search domain", SOON, || {
        let found = c.task_sh("shell.1", "getent ahostsv4 www")?;
        ensure!(found.starts_with("198.51.100.7"), "{found}");
        Ok(())
    })?;
    ensure!(dig(c, "+short stock")?.lines().count() == 1, "names of the cluster are found too");
    c.wait_running("stock", 1)?;
    let conf = c.task_sh("stock.1", "cat /etc/resolv.conf")?;
    ensure!(conf.ends_with("options timeout:3 ndots:2"), "{conf:?}");
    let service = c.api("GET", "/services/stock")?;
    let kept = &service["Spec"]["TaskTemplate"]["ContainerSpec"]["DNSConfig"];
    ensure!(kept["Nameservers"][0] == "198.51.100.7", "{kept}");
    let create = "service create --detach --name bad --runtime process";
    for (flags, word) in [
        ("--dns 127.0.0.53", "loopback"),
        ("--dns-option ndots:99", "ndots"),
        ("--dns-search a..b", "a..b"),
    ] {
        c.meshctl("m1", &format!("{create} {flags} -- sleep 1"))?.refused(&[word])?;
    }
    Ok(())
}

/// The resolver takes none of a task's ports: not even that of DNS.
fn a_task_serves_port_53(c: &Cluster) -> Result<()> {
    c.network("app")?;
    c.service("--name own --network app", "meshctl whoami --http 80 --tcp 53 --udp 53")?;
    c.shell()?;
    let tasks = c.wait_running("own", 1)?;
    let address = tasks[0].addresses.get("app").cloned().unwrap_or_default();
    eventually("the task's own port 53", SOON, || {
        let ask = format!("exec 3<>/dev/udp/{address}/53; echo -n hello >&3");
        let script = format!("{ask}; timeout 2 dd bs=4096 count=1 status=none <&3");
        let said = c.task_sh("shell.1", &script)?;
        ensure!(said.contains("own.1"), "{said:?}");
        Ok(())
    })?;
    let found = c.in_task("own.1", &["dig", "+short", "+time=2", "+tries=1", "shell"])?.ok()?;
    ensure!(found.lines().count() == 1, "its own resolver: {found:?}");
    Ok(())
}
