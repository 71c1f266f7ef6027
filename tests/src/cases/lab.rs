//! The lab itself: what its commands do, and that it leaves nothing. In a lab without a cluster.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use mesh_lab::{LabName, NodeState};
use serde_json::Value;

use super::group;
use crate::{
    cluster::{Cluster, SOON, eventually, field, list, run},
    load::{Load, Outcome, RATE},
};

group!("lab": ps_as_the_contract_says, exec_is_the_command, env_points_at_the_node, links_are_cut,
    daemons_and_machines_end_and_return, the_world_outside, a_taken_name_is_refused,
    without_root_nothing_changes, nothing_is_left, killed_half_way,
    partitions_cut_one_way_and_both, links_lose_and_are_slow, a_capture_holds_what_was_sent,
    nodes_come_and_go,
    a_load_is_the_clients_and_tells_what_failed);

fn lab_command(c: &Cluster, line: &str) -> Result<crate::cluster::Ran> {
    c.meshctl("m1", &format!("lab --name {} {line}", c.lab.name()))
}

/// The name of another lab of this case's own: labs of other runs may be on the machine too.
fn beside(c: &Cluster, what: &str) -> String {
    format!("{}-{what}", c.lab.name())
}

fn ps_as_the_contract_says(c: &Cluster) -> Result<()> {
    let rows = lab_command(c, "ps --format json")?.ok()?;
    let rows: Value = serde_json::from_str(&rows).context("ps prints JSON")?;
    let name = c.lab.name();
    let m1 = &list(&rows)[0];
    for (key, value) in [
        ("name", "m1".to_owned()),
        ("role", "manager".to_owned()),
        ("address", "192.0.2.11".to_owned()),
        ("address6", "2001:db8:1::11".to_owned()),
        ("netns", format!("{name}-m1")),
        ("state", "running".to_owned()),
    ] {
        ensure!(field(m1, key)? == value, "{key} of {m1} is not {value}");
    }
    let pid = m1["pid"].as_u64().context("m1 has a pid")?;
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    ensure!(command.contains("meshd"), "pid {pid} is {command:?}");
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(cgroup.contains(&format!("/mesh/{name}/m1")), "pid {pid} is in {cgroup}");
    for key in ["socket", "state_dir"] {
        ensure!(Path::new(&field(m1, key)?).exists(), "{key} of {m1} does not exist");
    }
    for outside in ["client", "router"] {
        let row = list(&rows).iter().find(|row| row["name"] == outside).context("missing")?;
        for key in ["pid", "socket", "state_dir"] {
            ensure!(row.get(key).is_some_and(Value::is_null), "{key} of {row}");
        }
    }
    Ok(())
}

fn exec_is_the_command(c: &Cluster) -> Result<()> {
    let socket = c.lab.places().socket("m1");
    let said = c.on("m1", &["sh", "-c", "hostname; echo $MESH_HOST $DOCKER_HOST"])?.ok()?;
    let host = format!("unix://{}", socket.display());
    ensure!(said == format!("m1\n{host} {host}"), "{said:?}");
    let said = c.on("client", &["sh", "-c", "hostname; echo [$MESH_HOST$DOCKER_HOST]"])?.ok()?;
    ensure!(said == "client\n[]", "{said:?}");
    let echo = run(c.lab.exec("router", &["cat"]), b"through stdin")?.ok()?;
    ensure!(echo == "through stdin", "{echo:?}");
    ensure!(c.on("m1", &["sh", "-c", "exit 42"])?.status == 42);
    ensure!(c.on("m1", &["no-such-command"])?.status == 127);
    ensure!(c.on("m1", &["sh", "-c", "kill -TERM $$"])?.status == 128 + 15);
    c.on("m9", &["true"])?.refused(&["m9", "m1"])?;
    // A signal to exec is one to the command.
    let mut sleeper = c.lab.exec("m1", &["sleep", "600"]).stdin(Stdio::null()).spawn()?;
    eventually("exec to have become the command", SOON, || {
        let name = fs::read_to_string(format!("/proc/{}/comm", sleeper.id()))?;
        ensure!(name.trim() == "sleep", "it is {name:?}");
        Ok(())
    })?;
    run(shell(&format!("kill -TERM {}", sleeper.id())), b"")?.ok()?;
    let status = sleeper.wait()?;
    ensure!(std::os::unix::process::ExitStatusExt::signal(&status) == Some(15), "{status}");
    Ok(())
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

fn env_points_at_the_node(c: &Cluster) -> Result<()> {
    let socket = c.lab.places().socket("w1");
    let said = lab_command(c, "env w1")?.ok()?;
    let line = |name: &str| format!("export {name}=unix://{}", socket.display());
    ensure!(said == format!("{}\n{}", line("MESH_HOST"), line("DOCKER_HOST")), "{said:?}");
    lab_command(c, "env client")?.refused(&["client"])
}

fn links_are_cut(c: &Cluster) -> Result<()> {
    let ping = || c.on("m1", &["ping", "-c1", "-W1", "192.0.2.21"]);
    ping()?.ok()?;
    lab_command(c, "link w1 down")?.ok()?;
    ensure!(ping()?.status != 0, "w1 answers with its link down");
    lab_command(c, "link w1 up")?.ok()?;
    eventually("w1 to answer again", SOON, || ping()?.ok())?;
    c.on("m1", &["ping", "-6", "-c1", "-W2", "2001:db8:1::21"])?.ok().map(drop)
}

fn state_of(c: &Cluster, node: &str) -> Option<NodeState> {
    c.lab.ps().into_iter().find(|row| row.name == node).map(|row| row.state)
}

fn daemons_and_machines_end_and_return(c: &Cluster) -> Result<()> {
    for (action, state) in [
        ("stop", NodeState::Stopped),
        ("start", NodeState::Running),
        ("kill", NodeState::Stopped),
        ("restart", NodeState::Running),
        ("crash", NodeState::Crashed),
        ("crash", NodeState::Crashed),
        ("start", NodeState::Running),
        ("start", NodeState::Running),
    ] {
        lab_command(c, &format!("node w1 {action}"))?.ok()?;
        ensure!(state_of(c, "w1") == Some(state), "after {action}: {:?}", state_of(c, "w1"));
        if state == NodeState::Crashed {
            ensure!(c.lab.places().state_dir("w1").exists(), "a crash took the state directory");
            ensure!(!c.lab.places().cgroup_of("w1").exists(), "a crash left the cgroup");
        }
    }
    c.on("m1", &["ping", "-c1", "-W2", "192.0.2.21"])?.ok()?;
    lab_command(c, "node client stop")?.refused(&["client"])
}

fn the_world_outside(c: &Cluster) -> Result<()> {
    let dig = |words: &[&str]| c.on("m1", &[&["dig", "+short"], words].concat())?.ok();
    ensure!(dig(&["www.example.test"])? == "198.51.100.7");
    ensure!(dig(&["-t", "AAAA", "www.example.test"])? == "2001:db8:2::7");
    ensure!(dig(&["many.example.test"])?.lines().count() == 40, "a truncated answer goes by TCP");
    let seen = c.fetch("w1", "http://198.51.100.7/")?;
    ensure!(field(&seen, "client")?.starts_with("192.0.2.21:"), "{seen}");
    let seen = c.fetch("w1", "http://[2001:db8:2::7]/")?;
    ensure!(field(&seen, "client")?.starts_with("[2001:db8:1::21]:"), "{seen}");
    Ok(())
}

fn a_taken_name_is_refused(c: &Cluster) -> Result<()> {
    lab_command(c, "up --no-cluster")?.refused(&["exists already", "down"])?;
    c.meshctl("m1", "lab --name No! up")?.refused(&["name"])?;
    let none = beside(c, "none");
    c.meshctl("m1", &format!("lab --name {none} ps"))?.refused(&[&none, "up"])?;
    c.meshctl("m1", &format!("lab --name {none} up --managers 0"))?.refused(&["managers"])
}

fn without_root_nothing_changes(c: &Cluster) -> Result<()> {
    // The build directory may not be open to everyone; the binary may be copied.
    let name = beside(c, "nobody");
    let copy = std::env::temp_dir().join(format!("{name}-meshctl"));
    fs::copy(c.lab.meshctl(), &copy).context("copy meshctl")?;
    let mut up = Command::new(&copy);
    up.args(["lab", "up", "--name", &name]).uid(65534).gid(65534);
    let ran = run(up, b"");
    fs::remove_file(copy).context("remove the copy")?;
    ran?.refused(&["root", "nothing was changed"])?;
    ensure!(!Path::new("/run/mesh-lab").join(&name).exists());
    ensure!(!Path::new("/var/lib/mesh-lab").join(&name).exists());
    Ok(())
}

/// All that a lab of this name could have left on the host.
fn traces(name: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for root in [
        "/run/mesh-lab",
        "/var/lib/mesh-lab",
        "/sys/fs/cgroup/mesh",
        "/sys/fs/cgroup/unified/mesh",
        "/sys/fs/bpf/mesh",
    ] {
        let path = Path::new(root).join(name);
        if path.exists() {
            found.push(path.display().to_string());
        }
    }
    for (what, command) in [
        ("namespace", "ip netns"),
        ("link", "ip -o link"),
        ("mount", "cat /proc/self/mounts"),
        ("process", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"),
        ("nft", "nft list tables"),
    ] {
        let listed = run(shell(command), b"")?.stdout;
        if listed.contains(name) {
            found.push(format!("{what} ({command})"));
        }
    }
    Ok(found)
}

/// The ids of a lab's pinned maps, and of the programs that use them.
fn bpf_of(name: &str) -> Result<(Vec<u64>, Vec<u64>)> {
    let pins = run(shell(&format!("find /sys/fs/bpf/mesh/{name} -path '*/maps/*' -type f")), b"")?;
    let id = |pin: &str| -> Result<u64> {
        let shown = run(shell(&format!("bpftool -j map show pinned {pin}")), b"")?.ok()?;
        serde_json::from_str::<Value>(&shown)?["id"].as_u64().context("a map without id")
    };
    let maps = pins.ok()?.lines().map(id).collect::<Result<Vec<_>>>()?;
    let all: Value = serde_json::from_str(&run(shell("bpftool -j prog show"), b"")?.ok()?)?;
    let uses = |program: &&Value| {
        list(&program["map_ids"]).iter().filter_map(Value::as_u64).any(|id| maps.contains(&id))
    };
    let programs = list(&all).iter().filter(uses).filter_map(|p| p["id"].as_u64()).collect();
    Ok((maps, programs))
}

fn nothing_is_left(c: &Cluster) -> Result<()> {
    let name = &beside(c, "leaves");
    let links = run(shell("ip -br link | cut -d' ' -f1"), b"")?.ok()?;
    let lab = |line: &str| c.meshctl("m1", &format!("lab --name {name} {line}"));
    lab("up --managers 1 --workers 1")?.ok()?;
    ensure!(!traces(name)?.is_empty(), "the search finds nothing even of a lab that is up");
    // A command that outlives its session goes too.
    let mut stray = Command::new(c.lab.meshctl());
    stray.args(["lab", "--name", name, "exec", "w1", "--", "sh", "-c"]);
    stray.arg(format!("setsid sh -c ': {name}; sleep 86399' >/dev/null 2>&1 &"));
    run(stray, b"")?.ok()?;
    // A task on each node, published: what it takes in programs, maps and links.
    let manager: LabName = name.parse()?;
    let socket = mesh_lab::Lab::open(&manager)?.places().socket("m1");
    let mut create = Command::new(c.lab.meshctl());
    create.env("MESH_HOST", format!("unix://{}", socket.display()));
    create.args(["service", "create", "--name", "each", "--mode", "global", "--publish", "80:80"]);
    create.args(["--runtime", "process", "--", "sleep", "infinity"]);
    run(create, b"")?.ok()?;
    let (maps, programs) = bpf_of(name)?;
    ensure!(maps.len() >= 2 && programs.len() >= 4, "maps {maps:?}, programs {programs:?}");
    lab("down")?.ok()?;
    let left = traces(name)?;
    ensure!(left.is_empty(), "left over: {left:?}");
    // The kernel frees them after a grace period.
    eventually("the kernel to have freed programs and maps", SOON, || {
        for (kind, ids) in [("map", &maps), ("prog", &programs)] {
            for id in ids {
                let shown = run(shell(&format!("bpftool {kind} show id {id}")), b"")?;
                ensure!(shown.status != 0, "{kind} {id} is left: {}", shown.stdout.trim());
            }
        }
        Ok(())
    })?;
    let links_now = run(shell("ip -br link | cut -d' ' -f1"), b"")?.ok()?;
    ensure!(links == links_now, "links before {links:?}, now {links_now:?}");
    // Safe to repeat.
    lab("down")?.ok().map(drop)
}

/// `up` is killed at moments that go through all of it.
fn killed_half_way(c: &Cluster) -> Result<()> {
    let name: LabName = beside(c, "killed").parse()?;
    for milliseconds in [3, 8, 15, 25, 40, 70, 150, 400] {
        let mut up = Command::new(c.lab.meshctl());
        up.args(["lab", "up", "--managers", "1", "--workers", "1", "--name", name.as_str()]);
        let mut up = up.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        // The moment is the point here, not a condition to wait for.
        thread::sleep(Duration::from_millis(milliseconds));
        up.kill()?;
        up.wait()?;
        mesh_lab::down(&name)?;
        // A machine's init that had not joined its cgroup yet ends by itself.
        eventually("nothing to be left", SOON, || {
            let left = traces(name.as_str())?;
            ensure!(left.is_empty(), "killed after {milliseconds} ms it left {left:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// How many of `count` datagrams from `from` come to `to`, by the underlay.
fn arriving(c: &Cluster, from: &str, to: &str, count: usize) -> Result<usize> {
    const PORT: u16 = 9999;
    let address = c.lab.member(to)?.address;
    let socket = c.lab.inside(to, || {
        let socket = UdpSocket::bind(("0.0.0.0", PORT)).context("bind")?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(socket)
    })?;
    let receiver = thread::spawn(move || {
        let mut buffer = [0; 64];
        let mut seen = 0;
        // Silence for half a second is the end.
        while seen < count && socket.recv(&mut buffer).is_ok() {
            seen += 1;
        }
        seen
    });
    c.lab.inside(from, || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..count {
            // A cut neighbour shows as an error at times: the datagram is lost, as it should be.
            let _ = socket.send_to(b"datagram", (address, PORT));
            // Slower than the receiver's queue fills.
            thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    })?;
    receiver.join().map_err(|_| anyhow!("the receiver panicked"))
}

fn partitions_cut_one_way_and_both(c: &Cluster) -> Result<()> {
    // Neighbours are known, so that what is lost is the datagram and no question for its MAC.
    let all = |from: &str, to: &str| -> Result<()> {
        eventually(&format!("{to} to hear {from}"), SOON, || {
            let came = arriving(c, from, to, 5)?;
            ensure!(came == 5, "{came} of 5 datagrams from {from} to {to}");
            Ok(())
        })
    };
    let none = |from: &str, to: &str| -> Result<()> {
        let came = arriving(c, from, to, 5)?;
        ensure!(came == 0, "{came} of 5 datagrams from {from} to {to}, which are apart");
        Ok(())
    };
    all("m1", "w1")?;
    all("w1", "m1")?;
    let before = c.on("router", &["nft", "list", "ruleset"])?.ok()?;
    lab_command(c, "partition m1 w1 --one-way")?.ok()?;
    none("m1", "w1")?;
    all("w1", "m1")?;
    lab_command(c, "partition m1 w1")?.ok()?;
    none("m1", "w1")?;
    none("w1", "m1")?;
    let arp = c.on("m1", &["sh", "-c", "ip neigh flush dev eth0; ping -c1 -W1 192.0.2.21"])?;
    ensure!(arp.status != 0, "m1 pings w1, which is apart");
    for node in ["m1", "w1"] {
        all("client", node)?;
        all(node, "client")?;
        all("router", node)?;
    }
    // A machine that was away is still apart.
    lab_command(c, "node w1 crash")?.ok()?;
    lab_command(c, "node w1 start")?.ok()?;
    none("m1", "w1")?;
    // It takes the place of the one before.
    lab_command(c, "partition client w1")?.ok()?;
    all("m1", "w1")?;
    none("client", "w1")?;
    none("w1", "client")?;
    all("client", "m1")?;
    for (bad, word) in [("m1 m9", "m9"), ("m1,w1", "two groups"), ("m1 w1,m1", "twice")] {
        lab_command(c, &format!("partition {bad}"))?.refused(&[word])?;
    }
    none("client", "w1")?;
    lab_command(c, "heal")?.ok()?;
    all("client", "w1")?;
    all("m1", "w1")?;
    let after = c.on("router", &["nft", "list", "ruleset"])?.ok()?;
    ensure!(before == after, "the rules after heal are {after:?}, before it {before:?}");
    lab_command(c, "heal")?.ok().map(drop)
}

fn offloads(c: &Cluster) -> Result<String> {
    c.on("w1", &["sh", "-c", "ethtool -k eth0; tc qdisc show dev eth0"])?.ok()
}

/// How long a megabyte by TCP takes.
fn megabyte(c: &Cluster, from: &str, to: &str) -> Result<Duration> {
    const BYTES: usize = 1_000_000;
    let address = c.lab.member(from)?.address;
    let listener = c.lab.inside(from, || Ok(TcpListener::bind((address, 9998))?))?;
    let sender = thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept().context("accept")?;
        stream.write_all(&vec![7; BYTES]).context("send")
    });
    let begin = Instant::now();
    let mut stream = c.lab.inside(to, || Ok(TcpStream::connect((address, 9998))?))?;
    stream.set_read_timeout(Some(SOON))?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).context("receive")?;
    let took = begin.elapsed();
    sender.join().map_err(|_| anyhow!("the sender panicked"))??;
    ensure!(bytes.len() == BYTES, "{} bytes came", bytes.len());
    Ok(took)
}

fn links_lose_and_are_slow(c: &Cluster) -> Result<()> {
    const SENT: usize = 2000;
    let before = offloads(c)?;
    lab_command(c, "link w1 impair --loss 20%")?.ok()?;
    ensure!(offloads(c)? != before, "offloads are on while the link is impaired");
    for (from, to) in [("m1", "w1"), ("w1", "m1")] {
        let came = arriving(c, from, to, SENT)?;
        // 1600 ± 18 (one standard deviation); ten of them are never seen.
        ensure!((1420..=1780).contains(&came), "{came} of {SENT} at 20 % loss, {from} to {to}");
    }
    // 8 Mbit/s: a megabyte takes a second.
    lab_command(c, "link w1 impair --rate 8mbit")?.ok()?;
    let took = megabyte(c, "w1", "m1")?;
    ensure!(took >= Duration::from_millis(800), "1 MB at 8 Mbit/s took {took:?}");
    let netem = c.on("router", &["modinfo", "sch_netem"])?.status == 0;
    let delay = lab_command(c, "link w1 impair --delay 20ms")?;
    if delay.status != 0 && !netem {
        delay.refused(&["netem", "nothing was changed"])?;
    }
    lab_command(c, "link w1 impair")?.refused(&["--loss"])?;
    lab_command(c, "link w1 impair --loss 5")?.refused(&["5%"])?;
    lab_command(c, "link w1 clear")?.ok()?;
    let after = offloads(c)?;
    ensure!(before == after, "after clear: {after}");
    ensure!(arriving(c, "m1", "w1", 200)? == 200, "a link that was cleared loses packets");
    Ok(())
}

fn a_capture_holds_what_was_sent(c: &Cluster) -> Result<()> {
    let file = std::env::temp_dir().join(format!("{}.pcap", c.lab.name()));
    let mut capture = Command::new(c.lab.meshctl());
    capture.args(["lab", "--name", c.lab.name().as_str(), "capture", "w1", "-w"]).arg(&file);
    let mut capture = capture.spawn()?;
    eventually("the capture to begin", SOON, || {
        ensure!(fs::metadata(&file)?.len() >= 24, "no header yet");
        Ok(())
    })?;
    c.on("m1", &["ping", "-c1", "-W2", "-p", "6d657368", "192.0.2.21"])?.ok()?;
    run(shell(&format!("kill -INT {}", capture.id())), b"")?.ok()?;
    let status = capture.wait()?;
    let bytes = fs::read(&file).context("read the capture")?;
    fs::remove_file(&file).context("remove the capture")?;
    ensure!(status.success(), "capture ended with {status}");
    let (mut rest, mut pings) = (bytes.get(24..).context("no header")?, 0);
    while let Some((head, more)) = rest.split_at_checked(16) {
        let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        let (packet, more) = more.split_at_checked(length).context("a packet is cut off")?;
        let icmp = packet.get(12..14) == Some(&[8, 0]) && packet.get(23) == Some(&1);
        pings += usize::from(icmp && packet.windows(8).any(|w| w == b"meshmesh"));
        rest = more;
    }
    ensure!(rest.is_empty() && pings == 2, "{pings} packets of a ping, {} bytes rest", rest.len());
    lab_command(c, "capture m9 -w /dev/null")?.refused(&["m9"])
}

fn nodes_come_and_go(c: &Cluster) -> Result<()> {
    let name: LabName = beside(c, "grows").parse()?;
    let lab = |line: &str| c.meshctl("m1", &format!("lab --name {name} {line}"));
    let down = || lab("down")?.ok();
    lab("up --managers 1 --workers 0")?.ok()?;
    let result = (|| -> Result<()> {
        lab("rm-node m1")?.refused(&["last manager", "down"])?;
        ensure!(lab("add-node")?.ok()? == "w1");
        ensure!(lab("add-node --manager")?.ok()? == "m2");
        let lab_now = mesh_lab::Lab::open(&name)?;
        let listed = |node: &str| -> Result<Vec<String>> {
            let nodes = lab_now.call("m1", "GET", "/nodes", None)?;
            let has = |n: &&Value| n["Description"]["Hostname"] == node;
            list(&nodes).iter().filter(has).map(|n| field(&n["Status"], "State")).collect()
        };
        for node in ["w1", "m2"] {
            ensure!(listed(node)? == ["ready"], "{node} is {:?}", listed(node)?);
        }
        run(lab_now.exec("m1", &["ping", "-c1", "-W2", "w1"]), b"")?.ok()?;
        for node in ["m2", "w1"] {
            lab(&format!("rm-node {node}"))?.ok()?;
            ensure!(listed(node)?.is_empty(), "{node} is still in the cluster");
            let trace = format!("{name}-{node}");
            let namespaces = run(shell("ip netns"), b"")?.ok()?;
            ensure!(!namespaces.contains(&trace), "namespace {trace} is left");
            for left in [
                lab_now.places().state_dir(node),
                lab_now.places().cgroup_of(node),
                lab_now.places().pins_of(node),
                lab_now.places().socket(node),
            ] {
                ensure!(!left.exists(), "{} is left", left.display());
            }
        }
        ensure!(lab("add-node")?.ok()? == "w1", "a free name is not used again");
        Ok(())
    })();
    let cleaned = down();
    result?;
    cleaned?;
    let left = traces(name.as_str())?;
    ensure!(left.is_empty(), "left over: {left:?}");
    Ok(())
}

/// The client's own servers are all that there is to ask in a lab without a cluster.
fn a_load_is_the_clients_and_tells_what_failed(c: &Cluster) -> Result<()> {
    let for_a_second = |port| -> Result<_> {
        let load = Load::through(c, &[mesh_lab::topology::CLIENT], port, RATE)?;
        // A second's worth of load is what is measured, not a condition to wait for.
        thread::sleep(Duration::from_secs(1));
        load.stop()
    };
    let good = for_a_second(80)?;
    good.none_failed()?;
    let sent = good.requests.len();
    ensure!((200..=400).contains(&sent), "{sent} requests in a second, asked for {RATE}");
    let bad = for_a_second(81)?;
    ensure!(bad.failed.len() == bad.requests.len() && !bad.failed.is_empty(), "{bad}");
    ensure!(bad.failed.iter().all(|request| request.outcome == Outcome::Refused), "{bad}");
    Ok(())
}
