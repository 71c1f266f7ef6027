//! Both command lines: the same verbs, one API.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::group;
use crate::cluster::{Cluster, Ran, SOON, eventually, list};

group!("cli": the_stock_client_does_it_all, both_make_the_same, both_change_the_same,
    progress_until_converged,
    both_show_the_same, both_roll_back, updates_at_the_same_time_all_happen, tokens_and_nodes,
    formats, both_format_the_same, filters_and_formats_are_checked,
    status_shows_what_needs_a_look, waits_end_as_they_say, shells_learn_names,
    a_service_without_an_executor_is_refused, unknown_flags_are_refused_by_name,
    what_is_due_is_refused_to_docker_too, errors_say_what);

fn docker(c: &Cluster, line: &str) -> Result<String> {
    c.docker("m1", line)?.ok()
}

fn the_stock_client_does_it_all(c: &Cluster) -> Result<()> {
    docker(c, "version")?;
    ensure!(docker(c, "info")?.contains("Swarm: active"), "docker info");
    docker(c, "network create --driver overlay --subnet 10.81.0.0/24 --label a=b app")?;
    docker(
        c,
        "service create --quiet --name web --replicas 3 --publish 8080:80 --network app \
         --env A=B --container-label mesh.runtime=process host meshctl whoami --http 80",
    )?;
    c.wait_running("web", 3)?;
    let ls = docker(c, "service ls")?;
    ensure!(ls.contains("web") && ls.contains("3/3"), "{ls}");
    let ps = docker(c, "service ps web")?;
    ensure!(ps.contains("web.1") && ps.contains("Running"), "{ps}");
    docker(c, "service scale web=2")?;
    c.wait_running("web", 2)?;
    let shown: Value = serde_json::from_str(&docker(c, "service inspect web")?)?;
    ensure!(shown[0]["Spec"]["Mode"]["Replicated"]["Replicas"] == 2, "{shown}");
    ensure!(shown[0]["Endpoint"]["Ports"][0]["PublishedPort"] == 8080, "{shown}");
    ensure!(!list(&shown[0]["Endpoint"]["VirtualIPs"]).is_empty(), "{shown}");
    eventually("an answer", SOON, || c.fetch("client", "http://192.0.2.11:8080/"))?;
    docker(c, "service rm web")?;
    eventually("the network to go", SOON, || docker(c, "network rm app"))?;
    ensure!(!docker(c, "network ls")?.contains("app"));
    Ok(())
}

/// Every flag of the verbs that make things, through both clients, gives one and the same.
fn both_make_the_same(c: &Cluster) -> Result<()> {
    let network = "network create --driver overlay --attachable --internal --label a=b \
        --opt com.docker.network.driver.mtu=1400";
    let service = "service create --detach --quiet --replicas 2 --env A=B --label c=d \
        --container-label e=f --container-label mesh.runtime=process --hostname box \
        --restart-condition on-failure --restart-delay 3s --restart-max-attempts 4 \
        --restart-window 60s --stop-signal SIGINT --stop-grace-period 7s";
    let (mut networks, mut services) = (Vec::new(), Vec::new());
    for (index, ours) in [(0_u8, true), (1, false)] {
        let make = |line: &str| if ours { c.meshctl("m1", line) } else { c.docker("m1", line) };
        let range = format!(
            "--subnet 10.8{index}.0.0/16 --gateway 10.8{index}.0.9 --ip-range 10.8{index}.7.0/24"
        );
        make(&format!("{network} {range} net{index}"))?.ok()?;
        make(&format!(
            "{service} --name svc{index} --network net{index} --publish 810{index}:80/udp \
             host sleep 600"
        ))?
        .ok()?;
        make(&format!(
            "service create --detach --mode global --name all{index} --endpoint-mode dnsrr \
             --network net{index} --container-label mesh.runtime=process host sleep 600"
        ))?
        .ok()?;
        networks.push(c.api("GET", &format!("/networks/net{index}"))?);
        for name in ["svc", "all"] {
            services.push(c.api("GET", &format!("/services/{name}{index}"))?["Spec"].clone());
        }
    }
    for key in ["Driver", "Scope", "Internal", "Attachable", "Labels", "EnableIPv6"] {
        ensure!(networks[0][key] == networks[1][key], "{key}: {networks:?}");
    }
    ensure!(networks[0]["Internal"] == true && networks[0]["Labels"]["a"] == "b", "{networks:?}");
    // What differs on purpose has its number in it.
    let alike = |value: &Value, network: &Value| {
        let id = network["Id"].as_str().unwrap_or_default();
        value.to_string().replace(id, "NETWORK")
    };
    for kind in 0..2 {
        let ours =
            alike(&services[kind], &networks[0]).replace("svc0", "svc1").replace("all0", "all1");
        let stock = alike(&services[kind + 2], &networks[1]);
        let ours: Value =
            serde_json::from_str(&ours.replace("8100", "8101").replace("net0", "net1"))?;
        let stock: Value = serde_json::from_str(&stock)?;
        for part in ["Labels", "Mode", "EndpointSpec"] {
            ensure!(ours[part] == stock[part], "{part}:\n{}\n{}", ours[part], stock[part]);
        }
        let (ours, stock) = (&ours["TaskTemplate"], &stock["TaskTemplate"]);
        for part in ["RestartPolicy", "Networks"] {
            ensure!(ours[part] == stock[part], "{part}:\n{}\n{}", ours[part], stock[part]);
        }
        let (ours, stock) = (&ours["ContainerSpec"], &stock["ContainerSpec"]);
        for part in
            ["Labels", "Env", "Hostname", "StopSignal", "StopGracePeriod", "Args", "Command"]
        {
            ensure!(ours[part] == stock[part], "{part}:\n{}\n{}", ours[part], stock[part]);
        }
    }
    let policy = &services[0]["TaskTemplate"]["RestartPolicy"];
    ensure!(policy["Condition"] == "on-failure" && policy["MaxAttempts"] == 4, "{policy}");
    Ok(())
}

/// The flags of `service update` leave the same spec, whichever client is given them.
fn both_change_the_same(c: &Cluster) -> Result<()> {
    for network in ["old", "new"] {
        c.meshctl("m1", &format!("network create {network}"))?.ok()?;
    }
    let update = "service update --detach --entrypoint env --image host2:1 --hostname box \
        --workdir /tmp \
        --label-add a=2 --label-rm b --container-label-add d=4 --container-label-rm c \
        --network-add name=new,alias=other --network-rm old --publish-add 8131:81 \
        --publish-rm 80 --restart-condition on-failure --restart-delay 3s \
        --restart-max-attempts 4 --restart-window 60s --stop-signal SIGINT --stop-grace-period 7s";
    let mut specs = Vec::new();
    for program in ["meshctl", "docker"] {
        let create = "service create --detach --name svc --replicas 1 --label a=1 --label b=1 \
            --container-label c=1 --container-label mesh.runtime=process --network old \
            --publish 8130:80 host sleep 600";
        c.docker("m1", create)?.ok()?;
        let words: Vec<&str> = update.split_whitespace().chain(["svc"]).collect();
        c.client(program, "m1", &words)?.ok()?;
        let mut spec = c.api("GET", "/services/svc")?["Spec"].clone();
        let pretty = c.client(program, "m1", &["service", "inspect", "--pretty", "svc"])?.ok()?;
        for line in ["Service Mode:", "Image:", "host2", "PublishedPort = 8131"] {
            ensure!(pretty.contains(line), "{program} lacks {line}:\n{pretty}");
        }
        // Which of them is left out and which is 0 is each client's own.
        spec["TaskTemplate"]["ForceUpdate"] = Value::Null;
        specs.push(spec);
        c.meshctl("m1", "service rm svc")?.ok()?;
        c.meshctl("m1", "wait service svc --for removed -q")?.ok()?;
    }
    let (ours, stock) = (&specs[0], &specs[1]);
    ensure!(ours["Labels"] == stock["Labels"] && ours["Labels"]["a"] == "2", "{ours}\n{stock}");
    ensure!(ours["EndpointSpec"]["Ports"] == stock["EndpointSpec"]["Ports"], "{ours}\n{stock}");
    ensure!(ours["TaskTemplate"]["ContainerSpec"]["Command"][0] == "env", "{ours}");
    for part in ["Networks", "RestartPolicy", "ContainerSpec"] {
        let (ours, stock) = (&ours["TaskTemplate"][part], &stock["TaskTemplate"][part]);
        ensure!(ours == stock && !ours.is_null(), "{part}:\n{ours}\n{stock}");
    }
    Ok(())
}

fn progress_until_converged(c: &Cluster) -> Result<()> {
    let create = |name: &str| format!("service create --name {name} --replicas 3");
    let ours =
        c.meshctl("m1", &format!("{} --runtime process -- sleep 600", create("ours")))?.ok()?;
    let stock = c
        .docker(
            "m1",
            &format!("{} --container-label mesh.runtime=process host sleep 600", create("stock")),
        )?
        .ok()?;
    for said in [ours, stock] {
        ensure!(said.to_lowercase().contains("converged"), "no word of convergence: {said:?}");
    }
    ensure!(c.running("ours")?.len() == 3 && c.running("stock")?.len() == 3);
    Ok(())
}

fn both_show_the_same(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 8080:80")?;
    for object in ["service inspect web", "network inspect app", "node inspect w1"] {
        let json = |ran: Ran| -> Result<Value> { Ok(serde_json::from_str(&ran.ok()?)?) };
        let ours = json(c.meshctl("m1", object)?).with_context(|| object.to_owned())?;
        let stock = json(c.docker("m1", object)?).with_context(|| object.to_owned())?;
        for id in ["ID", "Id"] {
            ensure!(ours[0].get(id) == stock[0].get(id), "{object}: {ours} {stock}");
        }
    }
    Ok(())
}

/// Each says what it does, and takes back what the last update did: here each other's.
fn both_roll_back(c: &Cluster) -> Result<()> {
    let policy = "--update-parallelism 0 --update-monitor 1s --rollback-parallelism 0 \
                  --rollback-monitor 1s";
    c.service(&format!("--name web --replicas 2 --env A=1 {policy}"), crate::cluster::WHOAMI)?;
    let shown = || -> Result<(String, String)> {
        let service = c.api("GET", "/services/web")?;
        let env = service["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"].to_string();
        Ok((env, service["UpdateStatus"]["State"].as_str().unwrap_or_default().to_owned()))
    };
    c.meshctl("m1", "service rollback web")?.refused(&["does not have a previous spec"])?;
    c.docker("m1", "service rollback web")?.refused(&["does not have a previous spec"])?;
    docker(c, "service update --env-add A=2 web")?;
    eventually("the end of the update", SOON, || {
        ensure!(shown()? == (r#"["A=2"]"#.into(), "completed".into()), "{:?}", shown()?);
        Ok(())
    })?;
    for (ours, env) in [(true, r#"["A=1"]"#), (false, r#"["A=2"]"#)] {
        let line = "service rollback web";
        let said = if ours { c.meshctl("m2", line)? } else { c.docker("m2", line)? }.ok()?;
        ensure!(said.contains("rollback: manually requested rollback"), "{said}");
        // The stock client is silent where the manager finds it first, and may be done before.
        ensure!(said.contains("converged") || !ours, "{said}");
        eventually("the end of the rollback", SOON, || {
            ensure!(shown()? == (env.into(), "rollback_completed".into()), "{:?}", shown()?);
            Ok(())
        })?;
        for task in c.wait_running("web", 2)? {
            let value = c.task_sh(&task.name, "echo $A")?;
            ensure!(env.contains(&format!("A={value}")), "{}: A is {value}", task.name);
        }
    }
    c.meshctl("m1", "service update --rollback --force web")?.refused(&["--rollback"])
}

/// Whoever comes second looks again: no change is lost, and nobody is bothered.
fn updates_at_the_same_time_all_happen(c: &Cluster) -> Result<()> {
    c.service("--name web --replicas 1", "sleep infinity")?;
    let names = ["A", "B", "C", "D"];
    let update = |(n, name): (usize, &str)| {
        let manager = ["m1", "m2", "m3"][n % 3];
        c.meshctl(manager, &format!("service update --detach --env-add {name}=1 web"))?.ok()
    };
    let all: Result<Vec<_>> = std::thread::scope(|scope| {
        let running: Vec<_> =
            names.into_iter().enumerate().map(|one| scope.spawn(move || update(one))).collect();
        running.into_iter().map(|one| one.join().expect("an update does not panic")).collect()
    });
    all?;
    let service = c.api("GET", "/services/web")?;
    let env = service["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"].to_string();
    let missing: Vec<_> =
        names.into_iter().filter(|name| !env.contains(&format!("{name}=1"))).collect();
    ensure!(missing.is_empty(), "{missing:?} are lost: {env}");
    Ok(())
}

fn tokens_and_nodes(c: &Cluster) -> Result<()> {
    for role in ["worker", "manager"] {
        let line = format!("swarm join-token -q {role}");
        let (ours, stock) = (c.meshctl("m1", &line)?.ok()?, docker(c, &line)?);
        ensure!(ours == stock && ours.starts_with("SWMTKN-1-"), "{ours} {stock}");
    }
    for listed in [c.meshctl("m2", "node ls")?.ok()?, c.docker("m2", "node ls")?.ok()?] {
        for word in ["m1", "m3", "w2", "Ready", "Active", "Leader", "Reachable"] {
            ensure!(listed.contains(word), "node ls lacks {word}:\n{listed}");
        }
    }
    c.meshctl("m1", "node stats w1")?.ok()?;
    Ok(())
}

fn formats(c: &Cluster) -> Result<()> {
    c.web("--replicas 1")?;
    for line in ["node ls", "network ls", "service ls", "service ps web"] {
        let text = c.meshctl("m1", &format!("{line} --format json"))?.ok()?;
        // One object a line, as Docker prints them.
        for object in text.lines() {
            let json: Value =
                serde_json::from_str(object).with_context(|| format!("{line}: {text}"))?;
            ensure!(json.is_object(), "{line}: {json}");
        }
        ensure!(!text.is_empty(), "{line} --format json prints nothing");
        let table = c.meshctl("m1", line)?.ok()?;
        let head = table.lines().next().unwrap_or_default();
        ensure!(head == head.to_uppercase() && table.lines().count() > 1, "{line}:\n{table}");
    }
    Ok(())
}

/// The stock client's own fields and functions: letter by letter what it prints.
fn both_format_the_same(c: &Cluster) -> Result<()> {
    c.web("--replicas 2 --publish 8080:80 --label tier=front")?;
    let node = "{{.ID}} {{.Hostname}} {{.Status}} {{.Availability}} {{.ManagerStatus}} \
                {{.EngineVersion}} {{.TLSStatus}} {{if .Self}}*{{end}}";
    let network = "{{.ID}} {{.Name}} {{.Driver}} {{.Scope}} {{.Internal}} {{.IPv4}} {{.IPv6}} \
                   {{.Labels}}{{.Label \"a\"}}";
    for (line, format) in [
        ("node ls", node),
        ("node ls", r"table {{.Hostname}}\t{{upper .Status}}"),
        ("node ls --filter role=manager", "json"),
        ("node ls -q --filter name=m1", "table"),
        ("network ls", network),
        ("network ls --no-trunc", r"table {{.ID}}\t{{.Name}}"),
        ("network ls --filter driver=overlay -q", "table"),
        ("service ls", "{{.ID}} {{.Name}} {{.Mode}} {{.Replicas}} {{.Image}} {{.Ports}}"),
        ("service ls", r"table {{.Name}}\t{{.Replicas}}\t{{json .Mode}}"),
        ("service ls", "json"),
        ("service ls -q", "table"),
        ("service ps web", "{{.ID}} {{.Name}} {{.Image}} {{.Node}} {{.DesiredState}} {{.Error}}"),
        ("service ps web -q --no-trunc --filter desired-state=running", "table"),
        ("service ps web --no-resolve", "{{title .Node}}{{pad .Name 1 2}}{{truncate .ID 3}}"),
        (
            "service inspect web",
            "{{json .Spec.Labels}}{{range .Endpoint.Ports}}{{.TargetPort}}{{end}}",
        ),
        ("service inspect web", r#"{{index .Spec.Labels "tier"}}{{if .UpdateStatus}}x{{end}}"#),
        ("node inspect self", "{{.Description.Hostname}} {{.Spec.Role}} {{.ManagerStatus.Leader}}"),
        ("network inspect app", "{{.ID}} {{range .IPAM.Config}}{{.Subnet}}{{end}} {{.Scope}}"),
        ("info", "{{.Swarm.NodeID}} {{.Swarm.LocalNodeState}}"),
        ("version", "{{.Server.Version}} {{.Server.Os}} {{.Server.APIVersion}}"),
    ] {
        let words: Vec<&str> = line.split(' ').chain(["--format", format]).collect();
        let said = |program| -> Result<Vec<String>> {
            let said = c.client(program, "m1", &words)?.ok()?;
            // Go's JSON is fit for HTML. In which order things are listed is each client's own.
            let said = said.replace(r"\u003e", ">");
            let mut lines: Vec<_> = said.lines().map(|line| line.trim().to_owned()).collect();
            lines.sort();
            Ok(lines)
        };
        let (ours, stock) = (said("meshctl")?, said("docker")?);
        ensure!(ours == stock && !ours.is_empty(), "{words:?}:\n{ours:#?}\n{stock:#?}");
    }
    Ok(())
}

fn filters_and_formats_are_checked(c: &Cluster) -> Result<()> {
    c.service("--name web --replicas 2 --label tier=front", "sleep infinity")?;
    c.service("--name all --mode global", "sleep infinity")?;
    for (line, expected) in [
        ("service ls --filter label=tier=front", "web"),
        ("service ls --filter mode=global", "all"),
        ("service ls --filter name=we --filter name=al", "all web"),
    ] {
        let names = c.meshctl("m1", &format!("{line} --format {{{{.Name}}}}"))?.ok()?;
        ensure!(names.split_whitespace().collect::<Vec<_>>().join(" ") == expected, "{names}");
    }
    for (line, said) in [
        ("service ls --filter nmae=x", "did you mean `name`"),
        ("node ps m1 --filter bogus=x", "desired-state"),
        ("network ls --filter name", "key=value"),
        ("node ls --format {{.Hostnmae}}", "did you mean `.Hostname`"),
        ("service inspect web --format {{.Spec.Nmae}}", "did you mean `.Name`"),
        ("service ls --format {{jsn}}", "did you mean `json`"),
        ("service ls --format yaml", "use table, json"),
    ] {
        c.meshctl("m1", line)?.refused(&[said])?;
    }
    Ok(())
}

/// A service that fits on no node.
const LOST: &str = "service create --detach --name lost --constraint node.hostname==nowhere \
                    --runtime process -- sleep 600";

fn status_shows_what_needs_a_look(c: &Cluster) -> Result<()> {
    c.service("--name web --replicas 2", "sleep infinity")?;
    c.wait_running("web", 2)?;
    let status = || -> Result<Value> {
        Ok(serde_json::from_str(&c.meshctl("m2", "status --format json")?.ok()?)?)
    };
    eventually("nothing to complain about", SOON, || {
        let status = status()?;
        let quorum = &status["Quorum"];
        ensure!(quorum["Managers"] == 3 && quorum["Margin"] == 1, "{status}");
        ensure!(quorum["Leader"] != "" && list(&status["Nodes"]).len() == 5, "{status}");
        ensure!(list(&status["Warnings"]).is_empty(), "{status}");
        Ok(())
    })?;
    c.meshctl("m1", LOST)?.ok()?;
    eventually("a warning", SOON, || {
        let text = c.meshctl("m1", "status")?.ok()?;
        let warned = text.lines().any(|line| {
            line.starts_with("Warning: service lost: 0 of 1 tasks run: no suitable node")
        });
        ensure!(warned && text.contains("2/2") && !text.contains('\u{1b}'), "{text}");
        Ok(())
    })?;
    ensure!(c.meshctl("w1", "status")?.ok()?.contains("is a worker"));
    Ok(())
}

fn waits_end_as_they_say(c: &Cluster) -> Result<()> {
    let status = |line: &str| -> Result<i32> { Ok(c.meshctl("m1", line)?.status) };
    c.service("--name web --replicas 2", "sleep infinity")?;
    c.meshctl("m1", "wait service web --timeout 60s")?.ok()?;
    ensure!(c.running("web")?.len() == 2, "web has not converged");
    let late = c.meshctl("m1", "wait service web --for removed --timeout 300ms")?;
    ensure!(late.status == 124 && late.stderr.contains("it exists"), "{}", late.stderr);
    c.meshctl("m1", LOST)?.ok()?;
    eventually("the reason", SOON, || {
        let late = c.meshctl("m1", "wait service lost -q --timeout 1s")?;
        ensure!(late.status == 124 && late.stdout.is_empty(), "{}", late.stdout);
        ensure!(late.stderr.contains("no suitable node"), "{}", late.stderr);
        Ok(())
    })?;
    ensure!(status("wait service nope")? == 1 && status("wait service nope --for removed")? == 0);
    ensure!(status("wait service web --for bogus")? == 125);
    c.meshctl("m1", "service rm web")?.ok()?;
    c.meshctl("m1", "wait service web --for removed --timeout 60s")?.ok()?;
    c.meshctl("m1", "wait node m1 w1 w2 --timeout 60s")?.ok()?;
    c.meshctl("m1", "wait node m1 --for manager --timeout 60s")?.ok()?;
    ensure!(status("wait node w1 --for down --timeout 200ms")? == 124);
    Ok(())
}

fn shells_learn_names(c: &Cluster) -> Result<()> {
    c.service("--name webby --replicas 1", "sleep infinity")?;
    let meshctl = c.lab.meshctl().to_string_lossy();
    let ask = |words: &str, at: u32| -> Result<String> {
        let env = format!("MESHCTL_COMPLETE=fish _CLAP_COMPLETE_INDEX={at}");
        c.client("sh", "m1", &["-c", &format!("{env} {meshctl} -- meshctl {words}")])?.ok()
    };
    ensure!(ask("service inspect ''", 3)?.contains("webby"));
    ensure!(ask("node update ''", 3)?.contains("w2"));
    ensure!(ask("service ''", 2)?.contains("rollback"));
    for shell in ["bash", "zsh", "fish"] {
        let script = c.meshctl("m1", &format!("completion {shell}"))?.ok()?;
        ensure!(script.contains("MESHCTL_COMPLETE"), "{shell}: {script}");
    }
    let page = c.meshctl("m1", "man service create")?.ok()?;
    ensure!(page.contains(".SH SYNOPSIS") && page.contains("replicas"), "{page}");
    Ok(())
}

fn a_service_without_an_executor_is_refused(c: &Cluster) -> Result<()> {
    let create = "service create --name image nginx";
    c.docker("m1", create)?.refused(&["mesh.runtime=process"])?;
    c.meshctl("m1", create)?.refused(&["process"])
}

fn unknown_flags_are_refused_by_name(c: &Cluster) -> Result<()> {
    let create = |flag: &str| format!("service create --name x {flag} --runtime process -- true");
    for flag in ["--secret key", "--config file", "--mount type=bind,src=/a,dst=/b"] {
        let name = flag.split(' ').next().unwrap_or_default();
        c.meshctl("m1", &create(flag))?.refused(&[name])?;
    }
    let stock = "service create --name x --container-label mesh.runtime=process \
                 --mount type=tmpfs,dst=/b host true";
    c.docker("m1", stock)?.refused(&["mount"])?;
    c.meshctl("m1", "service inspect x")?.refused(&["x"])
}

/// Values for flags of `service create` that may not work yet; --log-opt alone is not even sent.
const VALUES: &[(&str, &str)] = &[
    ("--cap-add", "NET_ADMIN"),
    ("--cap-drop", "ALL"),
    ("--config", "nope"),
    ("--credential-spec", "file://x"),
    ("--dns", "192.0.2.1"),
    ("--dns-option", "ndots:2"),
    ("--dns-search", "example.test"),
    ("--entrypoint", "sh"),
    ("--generic-resource", "gpu=1"),
    ("--group", "1"),
    ("--health-cmd", "true"),
    ("--health-interval", "1s"),
    ("--health-retries", "2"),
    ("--health-start-interval", "1s"),
    ("--health-start-period", "1s"),
    ("--health-timeout", "1s"),
    ("--host", "a:192.0.2.1"),
    ("--init", ""),
    ("--isolation", "process"),
    ("--limit-cpu", "0.5"),
    ("--limit-memory", "64m"),
    ("--limit-pids", "10"),
    ("--log-driver", "syslog"),
    ("--mount", "type=tmpfs,dst=/x"),
    ("--no-healthcheck", ""),
    ("--oom-score-adj", "5"),
    ("--placement-pref", "spread=node.labels.zone"),
    ("--read-only", ""),
    ("--replicas-max-per-node", "1"),
    ("--reserve-cpu", "0.5"),
    ("--reserve-memory", "64m"),
    ("--secret", "nope"),
    ("--sysctl", "net.core.somaxconn=9"),
    ("--tty", ""),
    ("--ulimit", "nofile=9"),
    ("--user", "1"),
];

/// What the table has as due or refused is not taken and forgotten when the stock client sends it.
fn what_is_due_is_refused_to_docker_too(c: &Cluster) -> Result<()> {
    let table = include_str!("../../surface.txt");
    let verb = table.split("\n\n").flat_map(str::lines);
    let flags = verb
        .skip_while(|line| !line.starts_with("service create:"))
        .skip(1)
        .take_while(|line| line.starts_with("  "));
    let mut taken = Vec::new();
    for flag in flags.filter(|line| !line.starts_with("  works")) {
        let name = flag.split_whitespace().find(|word| word.starts_with("--")).unwrap_or_default();
        let name = name.trim_end_matches('=');
        let Some((_, value)) = VALUES.iter().find(|(flag, _)| *flag == name) else { continue };
        let line = format!(
            "service create --detach --name x {name} {value} --container-label \
             mesh.runtime=process host true"
        );
        if c.docker("m1", &line)?.status == 0 {
            taken.push(name);
            c.docker("m1", "service rm x")?.ok()?;
        }
    }
    ensure!(taken.is_empty(), "the daemon takes {taken:?} and does nothing with them");
    Ok(())
}

fn errors_say_what(c: &Cluster) -> Result<()> {
    for line in ["service rm nope", "service ps nope", "network rm nope", "node inspect nope"] {
        c.meshctl("m1", line)?.refused(&["nope"])?;
        c.docker("m1", line)?.refused(&["nope"])?;
    }
    c.meshctl("w1", "service create --name x --runtime process -- true")?.refused(&["manager"])
}
