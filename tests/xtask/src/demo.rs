//! The demo: five nodes on this machine, and a line of proof for each thing that they do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{IsTerminal, Write, stdout},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    peer::{self, BridgeVxlan},
    setup,
    shell::{cargo, eventually, output, require_root, visible},
};

const LAB: &str = "demo";
const NODES: [(&str, &str); 5] = [
    ("m1", "192.0.2.11"),
    ("m2", "192.0.2.12"),
    ("m3", "192.0.2.13"),
    ("w1", "192.0.2.21"),
    ("w2", "192.0.2.22"),
];
const CLIENT: &str = "198.51.100.7";
const REPLICAS: usize = 5;
const REQUESTS: usize = 50;
/// Interleaved rounds of the throughput line, and the length of each.
const ROUNDS: usize = 3;
const ROUND_SECONDS: &str = "2";
/// How long a fresh service may take until its name, VIP and ports work everywhere.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the demo; an error if any line of it fails.
pub(crate) fn run(keep: bool) -> Result<()> {
    require_root("the demo")?;
    setup::install(setup::DEMO)?;
    println!("building (release)");
    visible(&mut cargo(&["build", "--release", "-p", "meshd", "-p", "meshctl"]))?;
    let demo = Demo { meshctl: fs::canonicalize(release_dir())?.join("meshctl"), failed: 0 };
    demo.play(keep)
}

/// Where cargo puts release binaries.
fn release_dir() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    target.join("release")
}

struct Demo {
    meshctl: PathBuf,
    failed: u32,
}

impl Demo {
    fn play(mut self, keep: bool) -> Result<()> {
        self.ctl(&["lab", "down", "--name", LAB])?;
        let before = Traces::now()?;
        let begin = Instant::now();
        println!();
        let up = visible(Command::new(&self.meshctl).args(["lab", "up", "--name", LAB]));
        if let Err(e) = up {
            println!(
                "\nlogs: /var/lib/mesh-lab/{LAB}/*.log; `meshctl lab down --name {LAB}` clears"
            );
            return Err(e);
        }
        let took = begin.elapsed();
        println!();
        self.line("nodes Ready", |demo| demo.nodes_ready(took));
        self.line("network `app`, service `web`", Self::create);
        self.line("a name inside a task is a VIP", Self::name_resolves);
        self.line("requests to the VIP are spread", Self::spread);
        self.line("every node answers the client", Self::mesh);
        self.line("a task reaches the world outside", Self::outside);
        self.line("overlay beside bridge+VXLAN, TCP", Self::throughput);
        if keep {
            self.print_what_to_try();
        } else {
            self.line("the lab is gone without a trace", |demo| demo.gone(&before));
        }
        ensure!(
            self.failed == 0,
            "{} lines failed; `--keep` leaves the lab for a look",
            self.failed
        );
        Ok(())
    }

    /// One line of proof: progress while it works, then the figure.
    fn line(&mut self, claim: &str, prove: impl FnOnce(&Self) -> Result<String>) {
        let terminal = stdout().is_terminal();
        if terminal {
            print!("… {claim}");
            let _ = stdout().flush();
        }
        let back = if terminal { "\r\x1b[K" } else { "" };
        match prove(self) {
            Ok(figure) => println!("{back}✓ {claim:<36} {figure}"),
            Err(e) => {
                self.failed += 1;
                println!("{back}✗ {claim:<36} {e:#}");
            }
        }
    }

    fn ctl(&self, args: &[&str]) -> Result<String> {
        output(&self.meshctl, args)
    }

    /// Runs a command inside a machine of the lab.
    fn on(&self, machine: &str, command: &[&str]) -> Result<String> {
        let head = ["lab", "exec", "--name", LAB, machine, "--"];
        self.ctl(&[&head, command].concat())
    }

    /// Runs a command inside a task, as seen from m1.
    fn in_task(&self, task: &str, command: &[&str]) -> Result<String> {
        self.on("m1", &[&["meshctl", "task", "exec", task, "--"], command].concat())
    }

    fn nodes_ready(&self, took: Duration) -> Result<String> {
        let socket = format!("/run/mesh-lab/{LAB}/m1.sock");
        let listed = output("curl", &["-sfS", "--unix-socket", &socket, "http://mesh/nodes"])?;
        let nodes: Value = serde_json::from_str(&listed).context("the list of nodes")?;
        let ready = nodes.as_array().map_or(0, |list| {
            list.iter().filter(|node| node["Status"]["State"] == "ready").count()
        });
        ensure!(ready == NODES.len(), "{ready} of {}", NODES.len());
        ensure!(took < Duration::from_secs(10), "{ready}, but only after {took:.1?}");
        Ok(format!("{ready} of {} in {:.1} s", NODES.len(), took.as_secs_f64()))
    }

    fn create(&self) -> Result<String> {
        let begin = Instant::now();
        self.on("m1", &["meshctl", "network", "create", "--driver", "overlay", "app"])?;
        let replicas = REPLICAS.to_string();
        self.service(
            &["--name", "web", "--replicas", &replicas, "--publish", "8080:80"],
            &["meshctl", "whoami", "--http", "80"],
        )?;
        self.service(&["--name", "iperf", "--replicas", "1"], &["iperf3", "-s"])?;
        Ok(format!("{REPLICAS} replicas run after {:.1} s", begin.elapsed().as_secs_f64()))
    }

    fn service(&self, options: &[&str], command: &[&str]) -> Result<()> {
        let head =
            ["meshctl", "service", "create", "-q", "--runtime", "process", "--network", "app"];
        self.on("m1", &[&head, options, &["--"], command].concat()).map(drop)
    }

    fn name_resolves(&self) -> Result<String> {
        eventually(PATIENCE, || {
            let vip = self.in_task("iperf.1", &["dig", "+short", "+time=1", "web"])?;
            let tasks = self.in_task("iperf.1", &["dig", "+short", "+time=1", "tasks.web"])?;
            let tasks: BTreeSet<_> = tasks.lines().collect();
            ensure!(vip.lines().count() == 1, "`web` is {vip:?}, not one address");
            ensure!(!tasks.contains(vip.as_str()), "`web` is {vip}, the address of a task");
            ensure!(tasks.len() == REPLICAS, "`tasks.web` has {} addresses", tasks.len());
            Ok(format!("web is {vip}; tasks.web is {} other addresses", tasks.len()))
        })
    }

    fn spread(&self) -> Result<String> {
        let script = format!(
            "for i in $(seq {REQUESTS}); do curl -s --max-time 5 http://web/ || exit 1; echo; done"
        );
        let answers = eventually(PATIENCE, || self.in_task("iperf.1", &["sh", "-c", &script]))?;
        let mut tasks = BTreeMap::<String, usize>::new();
        let mut nodes = BTreeSet::new();
        for line in answers.lines().filter(|line| !line.trim().is_empty()) {
            let answer: Value = serde_json::from_str(line).with_context(|| format!("{line:?}"))?;
            *tasks.entry(text(&answer, "task")?).or_default() += 1;
            nodes.insert(text(&answer, "node")?);
        }
        let answered: usize = tasks.values().sum();
        ensure!(answered == REQUESTS, "{answered} of {REQUESTS} requests answered");
        ensure!(tasks.len() > 1 && nodes.len() > 1, "all by {tasks:?} on {nodes:?}");
        let counts: Vec<_> = tasks.values().map(usize::to_string).collect();
        Ok(format!(
            "{answered} by {} tasks on {} nodes: {}",
            tasks.len(),
            nodes.len(),
            counts.join(" ")
        ))
    }

    fn mesh(&self) -> Result<String> {
        let mut slowest = Duration::ZERO;
        for (node, address) in NODES {
            let url = format!("http://{address}:8080/");
            let answer = eventually(PATIENCE, || {
                let begin = Instant::now();
                let said = self.on("client", &["curl", "-sS", "--max-time", "5", &url]);
                let said = said.with_context(|| format!("through {node}"))?;
                slowest = slowest.max(begin.elapsed());
                serde_json::from_str::<Value>(&said).with_context(|| format!("{said:?}"))
            })?;
            let seen = text(&answer, "client")?;
            ensure!(
                seen.starts_with(&format!("{CLIENT}:")),
                "through {node} the client is seen as {seen}, not {CLIENT}"
            );
        }
        let ms = slowest.as_millis();
        Ok(format!("through {n} of {n} nodes, seen as {CLIENT}, at most {ms} ms", n = NODES.len()))
    }

    fn outside(&self) -> Result<String> {
        let url = "http://www.example.test/";
        let said = eventually(PATIENCE, || {
            self.in_task("iperf.1", &["curl", "-sS", "-4", "--max-time", "5", url])
        })?;
        let answer: Value = serde_json::from_str(&said).with_context(|| format!("{said:?}"))?;
        let seen = text(&answer, "client")?;
        let address = seen.rsplit_once(':').map_or(seen.as_str(), |(address, _)| address);
        let node = NODES.iter().find(|(_, a)| *a == address);
        let (node, _) =
            node.with_context(|| format!("seen there as {address}, which is no node"))?;
        Ok(format!("www.example.test by name; seen there as {address}, node {node}"))
    }

    /// The server's node, and a client task elsewhere; peers in turn, medians.
    fn throughput(&self) -> Result<String> {
        let node_of = |task: &str| self.in_task(task, &["sh", "-c", "echo $MESH_NODE"]);
        let server_node = node_of("iperf.1")?;
        let client = (1..=REPLICAS)
            .map(|n| format!("web.{n}"))
            .find(|task| node_of(task).is_ok_and(|node| node != server_node));
        let client = client.context("no task of web is on another node than the server")?;
        let bridge = BridgeVxlan::build(LAB)?;
        let _server = Background::start("ip", &["netns", "exec", &bridge.task(1), "iperf3", "-s"])?;
        let bridge_client = bridge.task(0);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(gbits(eventually(PATIENCE, || {
                self.in_task(&client, &["iperf3", "-J", "-t", ROUND_SECONDS, "-c", "tasks.iperf"])
            })?)?);
            theirs.push(gbits(eventually(PATIENCE, || {
                let head = ["netns", "exec", &bridge_client];
                output(
                    "ip",
                    &[&head[..], &["iperf3", "-J", "-t", ROUND_SECONDS, "-c", peer::SERVER]]
                        .concat(),
                )
            })?)?);
        }
        let (ours, theirs) = (median(ours), median(theirs));
        Ok(format!("{ours:.1} against {theirs:.1} Gbit/s, {:.2} times", ours / theirs))
    }

    fn gone(&self, before: &Traces) -> Result<String> {
        let begin = Instant::now();
        self.ctl(&["lab", "down", "--name", LAB])?;
        let left = Traces::now()?.beyond(before);
        ensure!(left.is_empty(), "left over: {}", left.join(", "));
        Ok(format!(
            "in {:.1} s: namespaces, links, mounts, cgroups, pins, processes, files",
            begin.elapsed().as_secs_f64()
        ))
    }

    fn print_what_to_try(&self) {
        let ctl = self.meshctl.display();
        println!(
            "\nThe lab is up. Try:\n  \
             alias meshctl={ctl}\n  \
             meshctl lab ps --name {LAB}\n  \
             eval $(meshctl lab env m1 --name {LAB})     # meshctl and docker speak to m1\n  \
             meshctl service ls; docker service ps web\n  \
             meshctl service scale web=8\n  \
             meshctl task exec web.1 -- dig tasks.web\n  \
             meshctl lab exec --name {LAB} client -- curl -s http://192.0.2.22:8080/\n  \
             meshctl lab node w1 crash --name {LAB}; meshctl node ls\n  \
             meshctl node stats\n  \
             meshctl lab down --name {LAB}"
        );
    }
}

fn text(answer: &Value, field: &str) -> Result<String> {
    let text = answer[field].as_str().with_context(|| format!("no {field:?} in {answer}"))?;
    Ok(text.to_owned())
}

/// What iperf3 says was received.
fn gbits(report: String) -> Result<f64> {
    let report: Value = serde_json::from_str(&report).context("iperf3's report")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3: {}", report["error"]))? / 1e9)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A process that ends with this.
struct Background(Child);

impl Background {
    fn start(program: &str, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("start {program}"))?))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a lab could leave on the host, as lines to compare.
struct Traces(BTreeSet<String>);

impl Traces {
    fn now() -> Result<Self> {
        let mut lines = BTreeSet::new();
        for (kind, program, args) in [
            ("link", "ip", &["-br", "link"][..]),
            ("route", "ip", &["route", "show", "table", "all"]),
            ("rule", "ip", &["rule"]),
            ("namespace", "ip", &["netns"]),
            ("nft", "nft", &["list", "tables"]),
        ] {
            let listed = output(program, args)?;
            // Counters of a link's state are no trace; its name is.
            let name = |line: &str| if kind == "link" { first_word(line) } else { line.to_owned() };
            lines.extend(listed.lines().map(|line| format!("{kind} {}", name(line))));
        }
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            lines.insert(format!("mount {}", line.split(' ').nth(4).unwrap_or_default()));
        }
        for root in ["/sys/fs/cgroup/mesh", "/sys/fs/cgroup/unified/mesh", "/sys/fs/bpf/mesh"] {
            lines.extend(directories(Path::new(root)));
        }
        for path in ["/run/mesh-lab", "/var/lib/mesh-lab"].map(|root| Path::new(root).join(LAB)) {
            if path.exists() {
                lines.insert(format!("files {}", path.display()));
            }
        }
        lines.extend(processes()?);
        Ok(Self(lines))
    }

    fn beyond(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn first_word(line: &str) -> String {
    line.split_whitespace().next().unwrap_or_default().to_owned()
}

fn directories(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let below = entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| p.is_dir());
    let mut all = vec![format!("directory {}", root.display())];
    all.extend(below.flat_map(|path| directories(&path)));
    all
}

/// Processes that have to do with the lab, by their command line.
fn processes() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.filter_map(Result::ok) {
        let Ok(command) = fs::read(entry.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(&format!("/mesh-lab/{LAB}/")) {
            found.push(format!("process {}", command.trim()));
        }
    }
    Ok(found)
}
