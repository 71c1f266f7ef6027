//! The process executor with real processes. Needs root and a cgroup2 file system.
//!
//! The binary has its own `main`, because it plays meshd's part: `THIS task-shim DIR` is the shim,
//! which must have one thread, and `THIS hold DIR` is a daemon that is killed. Without arguments it
//! runs every test whose name holds the first argument, one after the other.
#![allow(
    clippy::unwrap_used,
    reason = "a test without libtest: clippy does not see that it is one"
)]

use std::{
    collections::BTreeSet,
    fs,
    future::Future,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use mesh_executor::{
    ExecSpec, Executor, ExecutorError, FoundState, ProcessConfig, ProcessExecutor, TaskContext,
};
use mesh_types::{
    NodeId, ServiceId, TaskId,
    resources::{Amount, Limits},
    spec::TaskSpec,
    task::{TaskAssignment, TaskState},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const DEADLINE: Duration = Duration::from_secs(10);

type Test = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

macro_rules! tests {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), || Box::pin($name()))),*] };
}

const TESTS: &[Test] = &tests![
    a_task_lives_and_ends,
    nothing_runs_before_start,
    exit_codes_and_signals,
    the_grace_period_ends_with_a_kill,
    a_handler_may_finish_within_the_grace_period,
    a_missing_program_is_a_start_error,
    other_reasons_not_to_start,
    the_task_sees_its_own_etc,
    the_host_keeps_its_etc,
    environment_and_directory,
    namespaces_are_its_own,
    orphans_are_reaped_and_killed,
    the_shim_outlives_the_daemon,
    a_killed_shim_takes_its_task_along,
    a_silent_shim_is_not_lost,
    exec_joins_the_task,
    exec_signals_and_hangup,
    exec_errors,
    output_is_kept,
    garbage_on_the_socket_does_no_harm,
    prepare_replaces_what_is_left,
    remove_ends_a_running_task,
    many_at_once,
    unsupported_is_said_first,
    memory_is_limited,
    processes_are_limited,
    cpu_time_is_limited,
    limits_go_with_the_task,
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("task-shim") => {
            let done = mesh_executor::shim::main(Path::new(&args[2]));
            std::process::exit(i32::from(done.is_err()));
        }
        Some("hold") => hold(Path::new(&args[2])),
        filter => run(filter.filter(|text| !text.starts_with('-'))),
    }
}

fn run(filter: Option<&str>) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: these tests need root");
        return;
    }
    let before = World::look();
    let mut failed = Vec::new();
    for (name, test) in TESTS.iter().filter(|(name, _)| filter.is_none_or(|f| name.contains(f))) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async { tokio::time::timeout(6 * DEADLINE, test()).await.unwrap() });
        }));
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        if outcome.is_err() {
            failed.push(*name);
        }
    }
    if failed.is_empty() {
        before.assert_unchanged();
        println!("test nothing_leaks ... ok");
    }
    for parent in twins(&cgroup_parent()).into_iter().chain([cgroup_parent()]) {
        let _ = fs::remove_dir(parent);
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// What could leak.
struct World {
    mounts: String,
    cgroups: BTreeSet<PathBuf>,
}

impl World {
    fn look() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let parents = twins(&cgroup_parent()).into_iter().chain([cgroup_parent()]);
        let below = |parent| fs::read_dir(parent).into_iter().flatten().flatten();
        let cgroups = parents.flat_map(below).map(|entry| entry.path());
        let cgroups = cgroups.filter(|path| path.is_dir()).collect();
        Self { mounts, cgroups }
    }

    fn assert_unchanged(&self) {
        let now = Self::look();
        assert_eq!(self.cgroups, now.cgroups, "cgroups leaked");
        assert_eq!(self.mounts, now.mounts, "mounts leaked");
        let mine = std::process::id().to_string();
        let leaked: Vec<String> = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok())
            .filter(|line| line.contains("task-shim") && line.contains(&format!("-{mine}-")))
            .collect();
        assert!(leaked.is_empty(), "processes leaked: {leaked:?}");
    }
}

fn cgroup_parent() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let root = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields[2] == "cgroup2")
        .map(|fields| PathBuf::from(fields[1]))
        .expect("a cgroup2 file system is mounted");
    root.join("mesh-executor-test")
}

/// Where a cgroup has version 1 hierarchies beside it.
fn twins(cgroup: &Path) -> Vec<PathBuf> {
    mesh_executor::cgroup::Hierarchies::observe(&cgroup_parent()).unwrap().twins(cgroup)
}

fn config(dir: &Path) -> ProcessConfig {
    ProcessConfig {
        shim_program: std::env::current_exe().unwrap(),
        ..ProcessConfig::new(dir.join("tasks"), cgroup_parent())
    }
}

/// One executor in a directory of its own, and one task.
struct Fixture {
    dir: PathBuf,
    executor: ProcessExecutor,
    task: TaskAssignment,
    context: TaskContext,
}

impl Fixture {
    fn new(argv: &[&str]) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Longer than `sun_path`, on purpose.
        let name = format!("mesh-executor-{}-{number}-{}", std::process::id(), "x".repeat(60));
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        let executor = ProcessExecutor::new(config(&dir)).unwrap();
        let bits = u128::from(std::process::id()) << 64 | u128::from(number);
        let context = TaskContext {
            hostname: "box".into(),
            resolv_conf: "nameserver 127.0.0.11\n".into(),
            hosts: vec![("10.0.0.5".parse().unwrap(), "box".into())],
            env: vec!["MESH_NODE=n1".into()],
            path_dir: Some("/opt/mesh-test".into()),
        };
        Self { dir, executor, task: assignment(bits, argv), context }
    }

    fn sh(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    fn id(&self) -> TaskId {
        self.task.id
    }

    async fn prepare(&self) -> PathBuf {
        self.executor.prepare(&self.task, &self.context).await.unwrap().netns
    }

    async fn start(&self) -> u32 {
        self.prepare().await;
        self.executor.start(self.id()).await.unwrap()
    }

    async fn code(&self) -> i32 {
        self.executor.wait(self.id()).await.unwrap().code
    }

    /// Runs it to its end and returns its output.
    async fn run(&self) -> String {
        self.start().await;
        self.code().await;
        self.output()
    }

    fn output(&self) -> String {
        let mut out = String::new();
        for path in self.executor.logs(self.id()) {
            for line in fs::read_to_string(path).unwrap_or_default().lines() {
                let entry: serde_json::Value = serde_json::from_str(line).unwrap();
                out.push_str(entry["log"].as_str().unwrap());
            }
        }
        out
    }

    async fn until_output(&self, text: &str) {
        until(&format!("output `{text}`"), || self.output().contains(text)).await;
    }

    async fn exec(&self, argv: &[&str], input: &[u8]) -> (i32, String, String) {
        let spec = ExecSpec { argv: strings(argv), ..ExecSpec::default() };
        let mut session = self.executor.exec(self.id(), spec).await.unwrap();
        session.stdin.write_all(input).await.unwrap();
        drop(session.stdin);
        let (mut out, mut err) = (String::new(), String::new());
        session.stdout.read_to_string(&mut out).await.unwrap();
        session.stderr.read_to_string(&mut err).await.unwrap();
        (session.control.wait().await.unwrap(), out, err)
    }

    async fn end(self) {
        self.executor.remove(self.id()).await.unwrap();
        assert!(!self.dir.join("tasks").join(self.id().to_string()).exists());
        let cgroup = cgroup_parent().join(self.id().to_string());
        assert!(!cgroup.exists() && twins(&cgroup).iter().all(|twin| !twin.exists()));
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn assignment(bits: u128, argv: &[&str]) -> TaskAssignment {
    TaskAssignment {
        id: TaskId::from_bits(bits),
        name: "web.1.x".into(),
        service: ServiceId::from_bits(1),
        service_name: "web".into(),
        slot: Some(1),
        node: NodeId::from_bits(1),
        spec: TaskSpec { args: strings(argv), ..TaskSpec::default() },
        leases: Vec::new(),
        desired: TaskState::Running,
        drain: Duration::ZERO,
        ports: Vec::new(),
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn alive(pid: u32) -> bool {
    // A zombie has no memory map of its own any more.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

async fn a_task_lives_and_ends() {
    let fixture = Fixture::sh("echo hello; exit 0");
    let found = |list: Vec<(TaskId, FoundState)>| list.into_iter().next().unwrap().1;
    let netns = fixture.prepare().await;
    assert_eq!(
        found(fixture.executor.list().await.unwrap()),
        FoundState::Created { netns: netns.clone() }
    );
    fixture.executor.start(fixture.id()).await.unwrap();
    let exit = fixture.executor.wait(fixture.id()).await.unwrap();
    assert_eq!((exit.code, exit.oom, exit.error.clone()), (0, false, None));
    assert!(exit.at_ms > 1_600_000_000_000);
    assert_eq!(fixture.output(), "hello\n");
    assert_eq!(found(fixture.executor.list().await.unwrap()), FoundState::Exited(exit));
    // The shim goes with the task, and the namespace with the shim.
    until("the shim's end", || !netns.exists()).await;
    fixture.end().await;
}

async fn nothing_runs_before_start() {
    let fixture = Fixture::sh("echo started");
    let netns = fixture.prepare().await;
    assert_ne!(fs::read_link(&netns).unwrap(), fs::read_link("/proc/self/ns/net").unwrap());
    assert_eq!(fixture.output(), "");
    // Interfaces can be plugged now: the loopback is there, and down.
    let target = format!("--net={}", netns.display());
    let links =
        std::process::Command::new("nsenter").args([&target, "ip", "-o", "link"]).output().unwrap();
    let links = String::from_utf8(links.stdout).unwrap();
    assert!(links.contains("lo:") && links.contains("state DOWN"), "{links}");
    fixture.end().await;
}

async fn exit_codes_and_signals() {
    for (script, code) in [("exit 3", 3), ("kill -KILL $$", 137), ("kill -TERM $$", 143)] {
        let fixture = Fixture::sh(script);
        fixture.start().await;
        assert_eq!(fixture.code().await, code, "{script}");
        fixture.end().await;
    }
    // SIGTERM reaches a program that does not handle it, though it is alone in its namespace.
    let fixture = Fixture::new(&["sleep", "1000"]);
    fixture.start().await;
    fixture.executor.stop(fixture.id(), 15, DEADLINE).await.unwrap();
    assert_eq!(fixture.code().await, 143);
    fixture.end().await;
    let fixture = Fixture::new(&["sleep", "1000"]);
    fixture.start().await;
    fixture.executor.kill(fixture.id()).await.unwrap();
    assert_eq!(fixture.code().await, 137);
    fixture.end().await;
}

async fn the_grace_period_ends_with_a_kill() {
    let fixture = Fixture::sh("trap '' TERM; echo ready; while :; do sleep 0.1; done");
    fixture.start().await;
    fixture.until_output("ready").await;
    let from = Instant::now();
    fixture.executor.stop(fixture.id(), 15, Duration::from_millis(300)).await.unwrap();
    assert_eq!(fixture.code().await, 137);
    let took = from.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(3), "{took:?}");
    fixture.end().await;
}

async fn a_handler_may_finish_within_the_grace_period() {
    let fixture =
        Fixture::sh("trap 'echo bye; exit 7' QUIT; echo ready; while :; do sleep 0.05; done");
    fixture.start().await;
    fixture.until_output("ready").await;
    fixture.executor.stop(fixture.id(), 3, DEADLINE).await.unwrap();
    assert_eq!(fixture.code().await, 7);
    assert!(fixture.output().ends_with("bye\n"));
    fixture.end().await;
}

async fn start_error(fixture: &Fixture) -> String {
    fixture.prepare().await;
    match fixture.executor.start(fixture.id()).await {
        Err(ExecutorError::Start(message)) => message,
        other => panic!("expected a start error, got {other:?}"),
    }
}

async fn a_missing_program_is_a_start_error() {
    let fixture = Fixture::new(&["nosuch"]);
    let message = start_error(&fixture).await;
    assert_eq!(message, "exec: \"nosuch\": executable file not found in $PATH");
    let exit = fixture.executor.wait(fixture.id()).await.unwrap();
    assert_eq!((exit.code, exit.error), (127, Some(message)));
    fixture.end().await;
}

async fn other_reasons_not_to_start() {
    let fixture = Fixture::new(&["/etc/passwd"]);
    assert!(start_error(&fixture).await.contains("permission denied"));
    fixture.end().await;
    let fixture = Fixture::new(&["/no/such"]);
    assert!(start_error(&fixture).await.contains("no such file or directory"));
    fixture.end().await;
    let mut fixture = Fixture::new(&["true"]);
    fixture.task.spec.dir = Some("/no/dir".into());
    assert!(start_error(&fixture).await.contains("working directory \"/no/dir\""));
    fixture.end().await;
    let fixture = Fixture::new(&[]);
    let refused = fixture.executor.prepare(&fixture.task, &fixture.context).await;
    assert!(refused.unwrap_err().to_string().contains("no command given"));
    fixture.end().await;
}

async fn the_task_sees_its_own_etc() {
    let fixture = Fixture::sh("cat /etc/resolv.conf /etc/hosts /etc/hostname; hostname");
    let output = fixture.run().await;
    assert!(output.starts_with("nameserver 127.0.0.11\n"), "{output}");
    assert!(output.contains("10.0.0.5\tbox\n") && output.contains("127.0.0.1\tlocalhost"));
    assert!(output.ends_with("box\nbox\n"), "{output}");
    fixture.end().await;
}

async fn the_host_keeps_its_etc() {
    let before = fs::read("/etc/hosts").unwrap_or_default();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let fixture = Fixture::sh("echo 10.9.9.9 bad >> /etc/hosts; mount -t tmpfs x /mnt; echo done");
    let output = fixture.run().await;
    // Its two streams come in any order.
    assert!(output.lines().any(|line| line == "done"), "{output}");
    assert_eq!(fs::read("/etc/hosts").unwrap_or_default(), before);
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), host);
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains("x /mnt tmpfs"));
    fixture.end().await;
}

async fn environment_and_directory() {
    let mut fixture = Fixture::sh("env; echo PWD=$(pwd); ls /proc/self/fd");
    fixture.task.spec.env = vec!["COLOUR=blue and green".into()];
    fixture.task.spec.dir = Some("/usr".into());
    let output = fixture.run().await;
    for line in ["COLOUR=blue and green", "MESH_NODE=n1", "HOSTNAME=box", "PWD=/usr"] {
        assert!(output.lines().any(|have| have == line), "no {line} in {output}");
    }
    assert!(output.contains("PATH=/opt/mesh-test:/usr/local/sbin"), "{output}");
    assert!(!output.contains("CARGO"), "meshd's environment leaks: {output}");
    // Standard streams, and the directory that ls itself reads.
    assert!(output.ends_with("0\n1\n2\n3\n"), "descriptors leak: {output}");
    fixture.end().await;
}

async fn namespaces_are_its_own() {
    let kinds = ["net", "mnt", "pid", "uts", "ipc", "cgroup"];
    let script = "for n in net mnt pid uts ipc cgroup; do readlink /proc/self/ns/$n; done; \
        ls -d /proc/[0-9]* | wc -l; ls /sys/class/net; cat /proc/self/cgroup | grep ^0; echo $PPID; exec sleep 1000";
    let fixture = Fixture::sh(script);
    let pid = fixture.start().await;
    fixture.until_output("0::").await;
    fixture.until_output("\n1\n").await;
    let output = fixture.output();
    let lines: Vec<&str> = output.lines().collect();
    for (kind, line) in kinds.iter().zip(&lines) {
        let host = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(&host.to_string_lossy(), line, "{kind} is shared with the host");
    }
    // Its init, the shell, `ls` and perhaps `wc`: nothing of the host's.
    assert!(lines[6].trim().parse::<u32>().unwrap() <= 5, "{output}");
    assert_eq!(lines[7], "lo", "{output}");
    assert_eq!(lines[8], "0::/", "{output}");
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(cgroup.contains(&format!("/{}/task", fixture.id())), "{cgroup}");
    fixture.end().await;
}

async fn orphans_are_reaped_and_killed() {
    // An orphan that ends is reaped by the init; one that stays dies with the task.
    let script = "(sleep 0.05 &) ; setsid sleep 1000 & echo ready; read x";
    let fixture = Fixture::sh(&format!("{script} < /dev/null; exec sleep 1000"));
    let pid = fixture.start().await;
    fixture.until_output("ready").await;
    let tasks = cgroup_parent().join(fixture.id().to_string()).join("task/cgroup.procs");
    let members = || -> Vec<u32> {
        let text = fs::read_to_string(&tasks).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    until("init, sleep and orphan", || members().len() == 3).await;
    let all = members();
    assert!(all.contains(&pid));
    fixture.executor.stop(fixture.id(), 15, DEADLINE).await.unwrap();
    assert_eq!(fixture.code().await, 143);
    until("the orphans' end", || all.iter().all(|pid| !alive(*pid))).await;
    fixture.end().await;
}

/// The daemon that is going to be killed: starts a task in `dir` and says so.
fn hold(dir: &Path) -> ! {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let executor = ProcessExecutor::new(config(dir)).unwrap();
        let script =
            "echo ready; while [ ! -e /tmp/mesh-executor-go ]; do sleep 0.05; done; exit 9";
        let script = script.replace("/tmp/mesh-executor-go", &dir.join("go").to_string_lossy());
        let bits: u128 = fs::read_to_string(dir.join("bits")).unwrap().parse().unwrap();
        let task = assignment(bits, &["sh", "-c", &script]);
        executor.prepare(&task, &TaskContext::default()).await.unwrap();
        let pid = executor.start(task.id).await.unwrap();
        fs::write(dir.join("holding.new"), pid.to_string()).unwrap();
        fs::rename(dir.join("holding.new"), dir.join("holding")).unwrap();
        std::future::pending::<()>().await;
    });
    unreachable!()
}

async fn the_shim_outlives_the_daemon() {
    let fixture = Fixture::sh("");
    fs::write(fixture.dir.join("bits"), fixture.id().bits().to_string()).unwrap();
    let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
        .arg("hold")
        .arg(&fixture.dir)
        .spawn()
        .unwrap();
    let holding = fixture.dir.join("holding");
    until("the daemon's task", || holding.exists()).await;
    let pid: u32 = fs::read_to_string(&holding).unwrap().parse().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let list = fixture.executor.list().await.unwrap();
    assert!(
        matches!(&list[..], [(id, FoundState::Running { pid: found, .. })]
            if *id == fixture.id() && *found == pid),
        "{list:?}"
    );
    let (code, out, _) = fixture.exec(&["echo", "still"], b"").await;
    assert_eq!((code, out.as_str()), (0, "still\n"));
    // It ends while no daemon waits for it; its status is kept.
    fs::write(fixture.dir.join("go"), "").unwrap();
    until("the task's end", || !alive(pid)).await;
    assert_eq!(fixture.code().await, 9);
    assert_eq!(fixture.output(), "ready\n");
    fixture.end().await;
}

async fn a_killed_shim_takes_its_task_along() {
    let fixture = Fixture::new(&["sleep", "1000"]);
    let pid = fixture.start().await;
    let dir = fixture.dir.join("tasks").join(fixture.id().to_string());
    let shim: i32 = fs::read_to_string(dir.join("shim.pid")).unwrap().parse().unwrap();
    let signal = nix::sys::signal::Signal::SIGKILL;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), signal).unwrap();
    until("the task's end", || !alive(pid)).await;
    let lost = fixture.executor.wait(fixture.id()).await;
    assert!(matches!(lost, Err(ExecutorError::Lost(_))), "{lost:?}");
    let list = fixture.executor.list().await.unwrap();
    assert_eq!(list, [(fixture.id(), FoundState::Lost)]);
    fixture.end().await;
}

async fn a_silent_shim_is_not_lost() {
    use nix::sys::signal::{Signal, kill};
    let fixture = Fixture::sh("sleep 1000");
    let netns = fixture.prepare().await;
    let shim = fixture.dir.join("tasks").join(fixture.id().to_string()).join("shim.pid");
    let shim = nix::unistd::Pid::from_raw(fs::read_to_string(shim).unwrap().parse().unwrap());
    let found = |list: Vec<(TaskId, FoundState)>| list.into_iter().next().unwrap().1;
    // As on a machine that has no time for it.
    kill(shim, Signal::SIGSTOP).unwrap();
    let state = found(fixture.executor.list().await.unwrap());
    assert_eq!(state, FoundState::Created { netns: netns.clone() });
    kill(shim, Signal::SIGCONT).unwrap();
    let pid = fixture.executor.start(fixture.id()).await.unwrap();
    kill(shim, Signal::SIGSTOP).unwrap();
    assert_eq!(found(fixture.executor.list().await.unwrap()), FoundState::Running { netns, pid });
    kill(shim, Signal::SIGKILL).unwrap();
    until("the task's end", || !alive(pid)).await;
    assert_eq!(found(fixture.executor.list().await.unwrap()), FoundState::Lost);
    fixture.end().await;
}

async fn exec_joins_the_task() {
    let mut fixture = Fixture::sh("echo ready; exec sleep 1000");
    fixture.task.spec.env = vec!["COLOUR=blue".into()];
    let pid = fixture.start().await;
    for kind in ["net", "mnt", "pid", "uts", "ipc", "cgroup"] {
        let (code, out, err) =
            fixture.exec(&["readlink", &format!("/proc/self/ns/{kind}")], b"").await;
        assert_eq!((code, err.as_str()), (0, ""));
        let task = fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_eq!(out.trim(), task.to_string_lossy(), "{kind}");
    }
    let script = "cat; echo $COLOUR >&2; hostname; exit 5";
    let (code, out, err) = fixture.exec(&["sh", "-c", script], b"from stdin\n").await;
    assert_eq!((code, out.as_str(), err.as_str()), (5, "from stdin\nbox\n", "blue\n"));
    let spec = ExecSpec {
        argv: strings(&["sh", "-c", "echo $COLOUR; pwd"]),
        env: vec!["COLOUR=red".into()],
        dir: Some("/usr".into()),
    };
    let mut session = fixture.executor.exec(fixture.id(), spec).await.unwrap();
    let mut out = String::new();
    session.stdout.read_to_string(&mut out).await.unwrap();
    assert_eq!(out, "red\n/usr\n");
    assert_eq!(session.control.wait().await.unwrap(), 0);
    // Much more than a pipe holds, in both directions at once.
    let mut session = fixture
        .executor
        .exec(fixture.id(), ExecSpec { argv: strings(&["cat"]), ..ExecSpec::default() })
        .await
        .unwrap();
    let data = vec![b'x'; 1 << 20];
    let (mut stdin, mut stdout) = (session.stdin, session.stdout);
    let sent = data.len();
    let writer = tokio::spawn(async move { stdin.write_all(&data).await });
    let mut back = Vec::new();
    stdout.read_to_end(&mut back).await.unwrap();
    writer.await.unwrap().unwrap();
    assert_eq!(back.len(), sent);
    assert_eq!(session.control.wait().await.unwrap(), 0);
    fixture.end().await;
}

async fn exec_signals_and_hangup() {
    let fixture = Fixture::new(&["sleep", "1000"]);
    fixture.start().await;
    let script = "trap 'exit 42' INT; echo $$; while :; do sleep 0.05; done";
    let spec = ExecSpec { argv: strings(&["sh", "-c", script]), ..ExecSpec::default() };
    let mut session = fixture.executor.exec(fixture.id(), spec.clone()).await.unwrap();
    let mut byte = [0];
    session.stdout.read_exact(&mut byte).await.unwrap();
    session.control.signal(2).await.unwrap();
    assert_eq!(session.control.wait().await.unwrap(), 42);
    // A client that goes away takes its process along.
    let mut session = fixture.executor.exec(fixture.id(), spec).await.unwrap();
    session.stdout.read_exact(&mut byte).await.unwrap();
    let procs = cgroup_parent().join(fixture.id().to_string()).join("task/cgroup.procs");
    let count = || fs::read_to_string(&procs).unwrap().lines().count();
    assert!(count() > 2);
    drop(session);
    until("the end of the exec", || count() == 2).await;
    fixture.end().await;
}

async fn exec_errors() {
    let fixture = Fixture::new(&["sleep", "1000"]);
    let id = fixture.id();
    let spec = |argv: &[&str]| ExecSpec { argv: strings(argv), ..ExecSpec::default() };
    let absent = fixture.executor.exec(id, spec(&["true"])).await.unwrap_err();
    assert!(absent.to_string().contains("not running on this node"), "{absent}");
    fixture.prepare().await;
    let mut early = fixture.executor.exec(id, spec(&["true"])).await.unwrap();
    assert!(early.control.wait().await.unwrap_err().to_string().contains("not running"));
    fixture.executor.start(id).await.unwrap();
    let mut missing = fixture.executor.exec(id, spec(&["nosuch"])).await.unwrap();
    let message = missing.control.wait().await.unwrap_err().to_string();
    assert_eq!(message, "exec: \"nosuch\": executable file not found in $PATH");
    let huge = "x".repeat(300 * 1024);
    assert!(fixture.executor.exec(id, spec(&["echo", &huge])).await.is_err());
    // The task does not mind.
    assert_eq!(fixture.exec(&["true"], b"").await.0, 0);
    fixture.end().await;
}

async fn output_is_kept() {
    let fixture = Fixture::sh("echo out; echo err >&2; printf 'no newline'");
    fixture.start().await;
    fixture.code().await;
    let [_, log] = fixture.executor.logs(fixture.id());
    let text = fs::read_to_string(log).unwrap();
    let entries: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |stream: &str, log: &str| {
        entries.iter().any(|entry| entry["stream"] == stream && entry["log"] == log)
    };
    assert!(has("stdout", "out\n") && has("stderr", "err\n") && has("stdout", "no newline"));
    assert!(entries.iter().all(|entry| entry["time"].as_str().unwrap().ends_with('Z')));
    fixture.end().await;
    // A flood stays bounded, its end is there, and the task is not held up.
    let mut fixture = Fixture::sh("seq 1 200000");
    let limits = ProcessConfig { log_bytes_max: 100_000, ..config(&fixture.dir) };
    fixture.executor = ProcessExecutor::new(limits).unwrap();
    let output = fixture.run().await;
    assert!(output.ends_with("200000\n"));
    for path in fixture.executor.logs(fixture.id()) {
        assert!(fs::metadata(path).unwrap().len() <= 100_000);
    }
    fixture.end().await;
}

async fn garbage_on_the_socket_does_no_harm() {
    use std::io::{Read, Write};
    let fixture = Fixture::new(&["sleep", "1000"]);
    fixture.start().await;
    let dir = fixture.dir.join("tasks").join(fixture.id().to_string());
    let connect = || {
        let (_held, path) = mesh_executor::contract::TaskDir::new(&dir).socket().unwrap();
        std::os::unix::net::UnixStream::connect(path).unwrap()
    };
    for garbage in ["hello\n", "{\"cmd\":\"nosuch\"}\n", "[]\n", "\0\n"] {
        let mut stream = connect();
        stream.write_all(garbage.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("error"), "{garbage:?}: {answer}");
    }
    let mut endless = connect();
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);
    let half = connect();
    (&half).write_all(b"{\"cmd\":").unwrap();
    assert_eq!(fixture.exec(&["true"], b"").await.0, 0);
    fixture.end().await;
}

async fn prepare_replaces_what_is_left() {
    let fixture = Fixture::new(&["sleep", "1000"]);
    let pid = fixture.start().await;
    fixture.prepare().await;
    until("the old one's end", || !alive(pid)).await;
    let list = fixture.executor.list().await.unwrap();
    assert!(matches!(&list[..], [(_, FoundState::Created { .. })]), "{list:?}");
    fixture.end().await;
}

async fn remove_ends_a_running_task() {
    let fixture = Fixture::sh("trap '' TERM INT; setsid sleep 1000 & while :; do sleep 1; done");
    let pid = fixture.start().await;
    fixture.executor.remove(fixture.id()).await.unwrap();
    until("the task's end", || !alive(pid)).await;
    fixture.executor.remove(fixture.id()).await.unwrap();
    fixture.end().await;
}

async fn many_at_once() {
    let fixtures: Vec<Fixture> = (0..40).map(|_| Fixture::new(&["sleep", "1000"])).collect();
    let lives = fixtures.into_iter().map(|fixture| {
        tokio::spawn(async move {
            fixture.start().await;
            assert_eq!(fixture.exec(&["true"], b"").await.0, 0);
            fixture.executor.stop(fixture.id(), 15, DEADLINE).await.unwrap();
            assert_eq!(fixture.code().await, 143);
            fixture.end().await;
        })
    });
    for life in lives.collect::<Vec<_>>() {
        life.await.unwrap();
    }
}

async fn unsupported_is_said_first() {
    let dir = std::env::temp_dir().join("mesh-executor-none");
    let config = ProcessConfig::new(&dir, "/tmp/no-cgroup");
    let error = ProcessExecutor::new(config).unwrap_err().to_string();
    assert!(error.contains("cgroup2"), "{error}");
    assert!(!dir.exists());
}

const HOG: &str = "head -c 200m /dev/zero | tail";

impl Fixture {
    fn limited(script: &str, limit: impl FnOnce(&mut Limits)) -> Self {
        let mut fixture = Self::sh(script);
        limit(&mut fixture.task.spec.resources.limits);
        fixture
    }
}

async fn memory_is_limited() {
    let fixture = Fixture::limited(HOG, |limits| limits.amount.memory_bytes = 32 << 20);
    fixture.start().await;
    let exit = fixture.executor.wait(fixture.id()).await.unwrap();
    assert_eq!((exit.code, exit.oom), (137, true));
    fixture.end().await;
    // What an exec starts counts too, and the shim does not.
    let fixture = Fixture::limited("sleep 1000", |limits| limits.amount.memory_bytes = 32 << 20);
    fixture.start().await;
    assert_eq!(fixture.exec(&["sh", "-c", HOG], b"").await.0, 137);
    assert_eq!(fixture.exec(&["true"], b"").await.0, 0);
    fixture.end().await;
}

async fn processes_are_limited() {
    let script = "sleep 1000 & sleep 1000 & echo two; sleep 1000 & echo three";
    let fixture = Fixture::limited(script, |limits| limits.pids = 3);
    let output = fixture.run().await;
    assert!(output.starts_with("two\n") && output.contains("ork"), "{output}");
    assert!(!output.contains("three"), "{output}");
    fixture.end().await;
    let fixture = Fixture::limited("exec echo alone", |limits| limits.pids = 1);
    assert_eq!(fixture.run().await, "alone\n");
    fixture.end().await;
}

async fn cpu_time_is_limited() {
    const SPENT: Duration = Duration::from_millis(300);
    let spin = "while :; do :; done";
    let fixture = Fixture::limited(spin, |limits| limits.amount.nano_cpus = 200_000_000);
    let pid = fixture.start().await;
    // The init's only child is the shell.
    let children = format!("/proc/{pid}/task/{pid}/children");
    let shell = fs::read_to_string(children).unwrap().trim().to_owned();
    let spent = || {
        let stat = fs::read_to_string(format!("/proc/{shell}/stat")).unwrap();
        let times = stat.rsplit(") ").next().unwrap().split(' ').skip(11).take(2);
        let ticks: u64 = times.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    };
    let (begin, before) = (Instant::now(), spent());
    until("some CPU time", || spent() >= before + SPENT).await;
    // A fifth of a CPU: 1.5 s, but for what is given out in whole periods.
    assert!(begin.elapsed() > 4 * SPENT, "{SPENT:?} in {:?}", begin.elapsed());
    fixture.end().await;
}

async fn limits_go_with_the_task() {
    let fixture = Fixture::limited("sleep 1000", |limits| {
        *limits =
            Limits { amount: Amount { nano_cpus: 1_000_000, memory_bytes: 64 << 20 }, pids: 100 };
    });
    let pid = fixture.start().await;
    let shim = fixture.dir.join("tasks").join(fixture.id().to_string()).join("shim.pid");
    let shim: i32 = fs::read_to_string(shim).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::SIGKILL).unwrap();
    until("the task's end", || !alive(pid)).await;
    fixture.end().await;
    // What cannot be set is no task, and leaves nothing.
    let fixture = Fixture::limited("true", |limits| limits.amount.nano_cpus = u64::MAX);
    let error = fixture.executor.prepare(&fixture.task, &fixture.context).await.unwrap_err();
    assert!(error.to_string().starts_with("cannot set the limits: /"), "{error}");
    fixture.end().await;
}
