//! What cases do to a cluster: both command lines, commands in tasks and machines, the API, and
//! waiting for what must become true.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_lab::{Lab, http};
use serde_json::Value;

/// How long things that happen at once may take on a loaded machine.
pub const SOON: Duration = Duration::from_secs(20);

/// A lab and the tools to handle its cluster.
#[derive(Debug)]
pub struct Cluster {
    /// The lab.
    pub lab: Lab,
    /// How long it took to come up.
    pub up_took: Duration,
}

/// What a command did.
#[derive(Debug, Clone)]
pub struct Ran {
    command: String,
    /// Its exit status; 128 + n when signal n ended it.
    pub status: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained.
    pub stderr: String,
}

impl Ran {
    /// What it printed, trimmed.
    ///
    /// # Errors
    /// When it failed.
    pub fn ok(self) -> Result<String> {
        let Self { command, status, stdout, stderr } = self;
        ensure!(status == 0, "{command}: exit {status}: {}{}", stderr.trim(), stdout.trim());
        Ok(stdout.trim().to_owned())
    }

    /// Checks that it failed, and that its complaint holds all of `words` in any case.
    ///
    /// # Errors
    /// When it did not, or does not.
    pub fn refused(self, words: &[&str]) -> Result<()> {
        let Self { command, status, stdout, stderr } = self;
        ensure!(status != 0, "{command}: not refused; it printed {stdout:?}");
        let said = stderr.to_lowercase();
        for word in words {
            ensure!(said.contains(&word.to_lowercase()), "{command}: {stderr:?} lacks {word:?}");
        }
        Ok(())
    }
}

/// Runs a command to its end.
///
/// # Errors
/// When it cannot be started.
pub fn run(mut command: Command, stdin: &[u8]) -> Result<Ran> {
    let shown = format!("{command:?}").replace('"', "");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {shown}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A command that does not read its input is no failure.
        let _ = pipe.write_all(stdin);
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {shown}"))?;
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status).unwrap_or(0);
    Ok(Ran {
        command: shown,
        status: output.status.code().unwrap_or(128 + signal),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// A task, as the API shows it.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its id.
    pub id: String,
    /// `web.1`; a global service's has its node's id for the number.
    pub name: String,
    /// Its node's name, empty while none is chosen.
    pub node: String,
    /// `running`, `failed`, …
    pub state: String,
    /// What it should be.
    pub desired: String,
    /// Why it failed.
    pub error: String,
    /// Its addresses, without prefix lengths, by network.
    pub addresses: BTreeMap<String, String>,
}

/// Builds the binaries under test, so that none of an earlier build is tested, and gives the path
/// of `meshctl`. `MESH_BIN_DIR` names a directory of finished ones instead.
///
/// # Errors
/// When they do not build.
pub fn binaries() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("MESH_BIN_DIR") {
        return Ok(PathBuf::from(dir).join("meshctl"));
    }
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // This is target/PROFILE/deps/lab-….
    let exe = env::current_exe().context("find this test")?;
    let dir = exe.ancestors().nth(2).context("this test is not in a target directory")?;
    let mut build = Command::new(cargo);
    // A test among the targets, else cargo leaves the features out that only tests ask for of
    // dependencies, and builds meshd a second time without them.
    build.args(["build", "--quiet", "--workspace", "--test", "lab"]);
    build.args(["--bin", "meshd", "--bin", "meshctl"]);
    if dir.ends_with("release") {
        build.arg("--release");
    }
    let status = build.status().context("run cargo")?;
    ensure!(status.success(), "meshd and meshctl do not build");
    Ok(dir.join("meshctl"))
}

/// Tries until it works.
///
/// # Errors
/// The last failure, when time is up.
pub fn eventually<T>(
    what: &str,
    within: Duration,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            Err(e) => return Err(e.context(format!("{what}: not within {within:?}"))),
            done => return done,
        }
    }
}

impl Cluster {
    /// The cluster of a lab that took `up_took` to come up.
    #[must_use]
    pub fn new(lab: Lab, up_took: Duration) -> Self {
        Self { lab, up_took }
    }

    pub(crate) fn host_command(&self, program: PathBuf, node: &str) -> Command {
        let mut command = Command::new(program);
        let host = format!("unix://{}", self.lab.places().socket(node).display());
        command.env("MESH_HOST", &host).env("DOCKER_HOST", &host);
        command
    }

    /// Runs `meshctl` against a node; `line` is split at blanks.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn meshctl(&self, node: &str, line: &str) -> Result<Ran> {
        let mut command = self.host_command(self.lab.meshctl().to_owned(), node);
        command.args(line.split_whitespace());
        run(command, b"")
    }

    /// Runs the stock `docker` against a node.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn docker(&self, node: &str, line: &str) -> Result<Ran> {
        let mut command = self.host_command("docker".into(), node);
        command.args(line.split_whitespace());
        run(command, b"")
    }

    /// Runs `meshctl` or `docker` against a node, with words that hold blanks.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn client(&self, program: &str, node: &str, words: &[&str]) -> Result<Ran> {
        let meshctl = (program == "meshctl").then(|| self.lab.meshctl().to_owned());
        let mut command = self.host_command(meshctl.unwrap_or_else(|| program.into()), node);
        command.args(words);
        run(command, b"")
    }

    /// Runs a command in a task, as seen from `m1`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn in_task(&self, task: &str, command: &[&str]) -> Result<Ran> {
        let mut exec = self.host_command(self.lab.meshctl().to_owned(), "m1");
        exec.args(["task", "exec", task, "--"]).args(command);
        run(exec, b"")
    }

    /// Runs a line of shell in a task.
    ///
    /// # Errors
    /// When it cannot be started, or fails.
    pub fn task_sh(&self, task: &str, script: &str) -> Result<String> {
        self.in_task(task, &["bash", "-c", script])?.ok()
    }

    /// Runs a command in a machine.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn on(&self, machine: &str, command: &[&str]) -> Result<Ran> {
        run(self.lab.exec(machine, command), b"")
    }

    /// Fetches from a machine, and gives the JSON that `whoami` answers.
    ///
    /// # Errors
    /// When there is no answer, or none of that kind.
    pub fn fetch(&self, machine: &str, url: &str) -> Result<Value> {
        let said = self.on(machine, &["curl", "-sS", "--max-time", "5", url])?.ok()?;
        serde_json::from_str(&said).with_context(|| format!("{url} answered {said:?}"))
    }

    /// The same from a task.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub fn fetch_in_task(&self, task: &str, url: &str) -> Result<Value> {
        let said = self.in_task(task, &["curl", "-sS", "--max-time", "5", url])?.ok()?;
        serde_json::from_str(&said).with_context(|| format!("{url} answered {said:?}"))
    }

    /// Asks the API of `m1`.
    ///
    /// # Errors
    /// When it refuses.
    pub fn api(&self, method: &str, path: &str) -> Result<Value> {
        self.lab.call("m1", method, path, None)
    }

    /// Sends `m1` a body as it is.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn raw(&self, method: &str, path: &str, body: &[u8]) -> Result<http::Answer> {
        http::send(&self.lab.places().socket("m1"), method, path, body, SOON)
    }

    /// Names of the nodes by id.
    ///
    /// # Errors
    /// When the API refuses.
    pub fn node_names(&self) -> Result<BTreeMap<String, String>> {
        let nodes = self.api("GET", "/nodes")?;
        let name =
            |node: &Value| Some((text(&node["ID"])?, text(&node["Description"]["Hostname"])?));
        Ok(list(&nodes).iter().filter_map(name).collect())
    }

    /// Which manager leads, by the word of `ask`.
    ///
    /// # Errors
    /// When the API refuses, or nobody leads.
    pub fn leader(&self, ask: &str) -> Result<String> {
        let nodes = self.lab.call(ask, "GET", "/nodes", None)?;
        let leads = |node: &&Value| node["ManagerStatus"]["Leader"] == true;
        let leader = list(&nodes).iter().find(leads).context("nobody leads")?;
        field(&leader["Description"], "Hostname")
    }

    /// Waits until `node ls` on `ask` has this word in a node's row: `Ready`, `Down`, `Reachable`.
    ///
    /// # Errors
    /// When it has not in time.
    pub fn wait_node(&self, ask: &str, node: &str, word: &str) -> Result<()> {
        eventually(&format!("{node} to be {word}"), SOON, || {
            let nodes = self.meshctl(ask, "node ls")?.ok()?;
            ensure!(row_of(&nodes, node).contains(word), "{nodes}");
            Ok(())
        })
    }

    /// All tasks of a service, also past ones, newest first.
    ///
    /// # Errors
    /// When there is no such service.
    pub fn tasks(&self, service: &str) -> Result<Vec<Task>> {
        let id = self.api("GET", &format!("/services/{service}"))?;
        let id = text(&id["ID"]).context("a service without id")?;
        let names = self.node_names()?;
        let tasks = self.api("GET", "/tasks")?;
        let mut tasks: Vec<_> =
            list(&tasks).iter().filter(|task| task["ServiceID"] == *id).collect();
        tasks.sort_by_key(|task| std::cmp::Reverse(text(&task["CreatedAt"])));
        Ok(tasks.into_iter().map(|task| to_task(service, task, &names)).collect())
    }

    /// Its tasks that run and should.
    ///
    /// # Errors
    /// When there is no such service.
    pub fn running(&self, service: &str) -> Result<Vec<Task>> {
        let mut tasks = self.tasks(service)?;
        tasks.retain(|task| task.state == "running" && task.desired == "running");
        tasks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(tasks)
    }

    /// Waits until exactly `count` tasks of a service run.
    ///
    /// # Errors
    /// When they do not in time.
    pub fn wait_running(&self, service: &str, count: usize) -> Result<Vec<Task>> {
        eventually(&format!("{count} running tasks of {service}"), SOON, || {
            let tasks = self.running(service)?;
            let all = self.tasks(service)?;
            let states: Vec<_> = all.iter().map(|t| (&t.name, &t.state, &t.error)).collect();
            ensure!(tasks.len() == count, "{} run: {states:?}", tasks.len());
            Ok(tasks)
        })
    }

    /// Waits until exactly `count` tasks of a service run that are none of `old`, and all others
    /// have ended.
    ///
    /// # Errors
    /// When it is not so in time.
    pub fn wait_replaced(
        &self,
        service: &str,
        count: usize,
        old: &BTreeSet<String>,
        within: Duration,
    ) -> Result<()> {
        eventually(&format!("{service} to be replaced"), within, || {
            let tasks = self.tasks(service)?;
            let alive: Vec<_> = tasks.iter().filter(|task| task.state == "running").collect();
            let fresh = alive.iter().filter(|task| !old.contains(&task.id)).count();
            let states: Vec<_> = tasks.iter().map(|t| (&t.name, &t.state, &t.error)).collect();
            let alive = alive.len();
            ensure!(fresh == count && alive == count, "{fresh} new of {alive}: {states:?}");
            Ok(())
        })
    }

    /// Creates an overlay network with meshctl.
    ///
    /// # Errors
    /// When it is refused.
    pub fn network(&self, options_and_name: &str) -> Result<String> {
        self.meshctl("m1", &format!("network create --driver overlay {options_and_name}"))?.ok()
    }

    /// Creates a process service with meshctl and waits until all its tasks run. Not by
    /// `service create` itself, which watches for five more seconds whether they stay.
    ///
    /// # Errors
    /// When it is refused or its tasks do not run.
    pub fn service(&self, options: &str, command: &str) -> Result<()> {
        self.service_args(
            &options.split_whitespace().collect::<Vec<_>>(),
            &command.split_whitespace().collect::<Vec<_>>(),
        )
    }

    /// The same with words that hold blanks.
    ///
    /// # Errors
    /// As [`Self::service`].
    pub fn service_args(&self, options: &[&str], command: &[&str]) -> Result<()> {
        let mut create = self.host_command(self.lab.meshctl().to_owned(), "m1");
        create.args(["service", "create", "--detach", "--quiet", "--runtime", "process"]);
        create.args(options).arg("--").args(command);
        let id = run(create, b"")?.ok()?;
        eventually(&format!("all tasks of {options:?} to run"), SOON, || {
            let services = self.api("GET", "/services?status=true")?;
            let service = list(&services).iter().find(|service| service["ID"] == id.as_str());
            let status = &service.context("it is not listed")?["ServiceStatus"];
            let [run, want] = ["RunningTasks", "DesiredTasks"].map(|key| status[key].as_u64());
            ensure!(run.is_some() && run == want && run != Some(0), "{status}");
            Ok(())
        })
    }

    /// Changes how many tasks a service has, and waits until that many run.
    ///
    /// # Errors
    /// When it is refused or they do not run.
    pub fn scale(&self, service: &str, count: usize) -> Result<Vec<Task>> {
        self.meshctl("m1", &format!("service scale --detach {service}={count}"))?.ok()?;
        self.wait_running(service, count)
    }

    /// Network `app` with service `web`: whoami on HTTP 80, TCP 7 and UDP 7.
    ///
    /// # Errors
    /// When either is refused.
    pub fn web(&self, options: &str) -> Result<()> {
        self.network("app")?;
        self.service(&format!("--name web --network app {options}"), WHOAMI)
    }

    /// A service `shell` of one task on network `app`, for commands in it: `shell.1`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn shell(&self) -> Result<()> {
        self.service("--name shell --replicas 1 --network app", "sleep infinity")
    }

    /// A counter of a node's data plane.
    ///
    /// # Errors
    /// When there is no such counter.
    pub fn counter(&self, node: &str, name: &str) -> Result<u64> {
        let stats = self.lab.call(node, "GET", "/mesh/node/stats", None)?;
        let counters = list(&stats["Counters"]);
        let counter = counters.iter().find(|counter| counter["Name"] == name);
        counter
            .and_then(|counter| counter["Value"].as_u64())
            .with_context(|| format!("{node} has no counter {name:?}: {stats}"))
    }

    /// Removes all services and networks that users made.
    ///
    /// # Errors
    /// When something will not go.
    pub fn empty(&self) -> Result<()> {
        let Ok(services) = self.api("GET", "/services") else {
            // Not in a cluster.
            return Ok(());
        };
        for service in list(&services) {
            let id = text(&service["ID"]).context("a service without id")?;
            self.api("DELETE", &format!("/services/{id}"))?;
        }
        eventually("all user networks to go", SOON, || {
            let networks = self.api("GET", "/networks")?;
            let ours = |n: &&Value| n["Scope"] == "swarm" && n["Ingress"] != true;
            for network in list(&networks).iter().filter(ours) {
                let id = text(&network["Id"]).context("a network without id")?;
                self.api("DELETE", &format!("/networks/{id}"))?;
            }
            Ok(())
        })
    }

    /// The end of every daemon's log.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut shown = String::new();
        for node in self.lab.nodes() {
            let path = self.lab.places().log(&node.name);
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            shown.push_str(&format!("-- {}\n", path.display()));
            for line in &lines[lines.len().saturating_sub(15)..] {
                shown.push_str(&format!("   {line}\n"));
            }
        }
        shown
    }
}

/// The command of a service that answers with who it is.
pub const WHOAMI: &str = "meshctl whoami --http 80 --tcp 7 --udp 7";

fn to_task(service: &str, task: &Value, nodes: &BTreeMap<String, String>) -> Task {
    let node_id = text(&task["NodeID"]).unwrap_or_default();
    let number = task["Slot"].as_u64().map_or_else(|| node_id.clone(), |slot| slot.to_string());
    let attached = list(&task["NetworksAttachments"]).iter().filter_map(|attachment| {
        let address = text(&attachment["Addresses"][0])?;
        let address = address.split('/').next()?.to_owned();
        Some((text(&attachment["Network"]["Spec"]["Name"])?, address))
    });
    Task {
        id: text(&task["ID"]).unwrap_or_default(),
        name: format!("{service}.{number}"),
        node: nodes.get(&node_id).cloned().unwrap_or_default(),
        state: text(&task["Status"]["State"]).unwrap_or_default(),
        desired: text(&task["DesiredState"]).unwrap_or_default(),
        error: text(&task["Status"]["Err"]).unwrap_or_default(),
        addresses: attached.collect(),
    }
}

/// The row of a table that has `word` in a column of its own; ids hold any letters.
#[must_use]
pub fn row_of<'a>(table: &'a str, word: &str) -> &'a str {
    let has = |line: &&str| line.split_whitespace().any(|column| column == word);
    table.lines().find(has).unwrap_or_default()
}

/// The elements of an array; none of anything else.
#[must_use]
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// A string of a JSON value.
#[must_use]
pub fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// A field that must be text.
///
/// # Errors
/// When it is not.
pub fn field(value: &Value, name: &str) -> Result<String> {
    text(&value[name]).with_context(|| format!("no {name:?} in {value}"))
}

/// The address in `address:port`.
///
/// # Errors
/// When there is no port.
pub fn host_of(socket: &str) -> Result<&str> {
    match socket.rsplit_once(':') {
        Some((host, _)) => Ok(host),
        None => bail!("{socket:?} is no address with a port"),
    }
}
