//! `meshctl wait`: until services or nodes are as a script needs them.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use mesh_api::{Node, Service, Task};
use tokio::time::Instant;

use crate::{
    client::{Client, escape, is_missing},
    output::say,
    service::{duration, progress},
};

/// Between looks.
const POLL: Duration = Duration::from_millis(200);

/// Wait until objects are as asked.
///
/// Exit status: 0 when all are; 124 when not all were within --timeout; 1 when they will not be
/// without more changes (an update that stopped, an object that does not exist), or when the
/// daemon cannot be reached; 125 for a bad command line.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Wait for services
    Service(ServiceArgs),
    /// Wait for nodes
    Node(NodeArgs),
}

#[derive(Debug, Args)]
struct Patience {
    /// Give up after this long; 0: never
    #[arg(long, value_parser = duration, default_value = "5m", value_name = "DURATION")]
    timeout: u64,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ServiceArgs {
    /// How they have to be
    #[arg(long = "for", value_enum, default_value = "converged", value_name = "CONDITION")]
    condition: ServiceCondition,
    #[command(flatten)]
    patience: Patience,
    /// Names or ids
    #[arg(required = true)]
    services: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// How they have to be
    #[arg(long = "for", value_enum, default_value = "ready", value_name = "CONDITION")]
    condition: NodeCondition,
    #[command(flatten)]
    patience: Patience,
    /// Names or ids
    #[arg(required = true)]
    nodes: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ServiceCondition {
    /// All tasks of its spec run, and no update is under way
    Converged,
    /// The same, and the last update was not rolled back
    Updated,
    /// It does not exist, and none of its tasks runs
    Removed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NodeCondition {
    /// It is reachable
    Ready,
    /// It is not
    Down,
    /// It takes no tasks and runs none
    Drained,
    /// It is a manager that other managers reach
    Manager,
    /// It is a worker
    Worker,
    /// It is not in the cluster
    Removed,
}

/// Not within the time given: exit status 124, as of timeout(1).
#[derive(Debug)]
pub(crate) struct TimedOut(String);

impl std::fmt::Display for TimedOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TimedOut {}

/// What a look has found.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    Done,
    /// What is missing.
    NotYet(String),
}

pub(crate) async fn run(client: &Client, command: Command) -> Result<()> {
    match command {
        Command::Service(args) => {
            let deadline = Deadline::new(args.patience.timeout);
            for name in &args.services {
                let mut id = None;
                let look = async || service(client, name, args.condition, &mut id).await;
                until(&format!("service {name}"), &args.patience, deadline, look).await?;
            }
        }
        Command::Node(args) => {
            let deadline = Deadline::new(args.patience.timeout);
            for name in &args.nodes {
                let look = async || node(client, name, args.condition).await;
                until(&format!("node {name}"), &args.patience, deadline, look).await?;
            }
        }
    }
    Ok(())
}

/// When patience ends, if it does.
#[derive(Debug, Clone, Copy)]
struct Deadline(Option<Instant>);

impl Deadline {
    fn new(nanos: u64) -> Self {
        Self((nanos > 0).then(|| Instant::now() + Duration::from_nanos(nanos)))
    }

    fn is_over(self) -> bool {
        self.0.is_some_and(|end| Instant::now() >= end)
    }
}

async fn until(
    what: &str,
    patience: &Patience,
    deadline: Deadline,
    mut look: impl AsyncFnMut() -> Result<Look>,
) -> Result<()> {
    let mut last = String::new();
    loop {
        let missing = match look().await {
            Ok(Look::Done) if patience.quiet => return Ok(()),
            Ok(Look::Done) => return say(format!("{what}: done")),
            Ok(Look::NotYet(missing)) => missing,
            // A manager that was there is away for a moment: another leads soon.
            Err(err) if !last.is_empty() && may_pass(&err) => format!("{err:#}"),
            Err(err) => return Err(err),
        };
        if missing != last && !patience.quiet {
            say(format!("{what}: {missing}"))?;
        }
        last = missing;
        if deadline.is_over() {
            let waited = Duration::from_nanos(patience.timeout).as_secs_f64();
            bail!(TimedOut(format!("{what} is not there after {waited} s: {last}")));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether a look that failed is worth another.
fn may_pass(err: &anyhow::Error) -> bool {
    match err.downcast_ref::<crate::client::Refused>() {
        Some(refused) => refused.status.is_server_error(),
        None => !err.is::<Stopped>(),
    }
}

/// An update that stopped short: nothing changes any more.
#[derive(Debug)]
struct Stopped(String);

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Stopped {}

async fn service(
    client: &Client,
    name: &str,
    condition: ServiceCondition,
    id: &mut Option<String>,
) -> Result<Look> {
    let path = format!("/services/{}?insertDefaults=false", escape(name));
    let found: Service = match client.get(&path).await {
        Err(err) if condition == ServiceCondition::Removed && is_missing(&err) => {
            return match id {
                Some(id) => gone(client, id).await,
                None => Ok(Look::Done),
            };
        }
        found => found?,
    };
    if condition == ServiceCondition::Removed {
        *id = Some(found.id);
        return Ok(Look::NotYet("it exists".to_owned()));
    }
    let update = found.update_status.clone().unwrap_or_default();
    let stopped = update.state.ends_with("paused")
        || condition == ServiceCondition::Updated && update.state.starts_with("rollback");
    if stopped {
        bail!(Stopped(format!("the update of {name} is {}: {}", update.state, update.message)));
    }
    let view = progress::look(client, &found).await?;
    Ok(match &update.state[..] {
        "updating" | "rollback_started" => {
            Look::NotYet(format!("{}, {}", update.state, view.told()))
        }
        _ if view.converged() => Look::Done,
        _ => Look::NotYet(view.told()),
    })
}

/// Whether the tasks of a service that is gone have ended.
async fn gone(client: &Client, id: &str) -> Result<Look> {
    let tasks: Vec<Task> = client.get("/tasks").await?;
    let on = tasks.iter().filter(|task| task.service_id == id && is_on(task)).count();
    Ok(if on == 0 { Look::Done } else { Look::NotYet(format!("{on} of its tasks end")) })
}

fn is_on(task: &Task) -> bool {
    !matches!(
        &task.status.state[..],
        "complete" | "shutdown" | "failed" | "rejected" | "remove" | "orphaned"
    )
}

async fn node(client: &Client, name: &str, condition: NodeCondition) -> Result<Look> {
    let found: Node = match client.get(&format!("/nodes/{}", escape(name))).await {
        Err(err) if condition == NodeCondition::Removed && is_missing(&err) => {
            return Ok(Look::Done);
        }
        found => found?,
    };
    let tasks: Vec<Task> = match condition {
        NodeCondition::Drained => client.get("/tasks").await?,
        _ => Vec::new(),
    };
    Ok(judged(&found, &tasks, condition))
}

fn judged(node: &Node, tasks: &[Task], condition: NodeCondition) -> Look {
    let reached = node.manager_status.as_ref().map(|status| &status.reachability[..]);
    let running = tasks.iter().filter(|task| task.node_id == node.id && is_on(task)).count();
    let (done, missing) = match condition {
        NodeCondition::Ready => {
            (node.status.state == "ready", format!("it is {}", node.status.state))
        }
        NodeCondition::Down => {
            (node.status.state == "down", format!("it is {}", node.status.state))
        }
        NodeCondition::Drained if node.spec.availability != "drain" => {
            (false, format!("its availability is {}", node.spec.availability))
        }
        NodeCondition::Drained => (running == 0, format!("it runs {running} tasks")),
        NodeCondition::Manager => {
            let reached = reached.unwrap_or("no manager");
            (reached == "reachable", format!("it is {reached}"))
        }
        NodeCondition::Worker => {
            (reached.is_none() && node.spec.role == "worker", "it is a manager".to_owned())
        }
        NodeCondition::Removed => (false, "it is in the cluster".to_owned()),
    };
    if done { Look::Done } else { Look::NotYet(missing) }
}

#[cfg(test)]
mod tests {
    use mesh_api::ManagerStatus;

    use super::*;

    fn node(state: &str, availability: &str) -> Node {
        let mut node = Node { id: "n1".into(), ..Node::default() };
        node.status.state = state.into();
        node.spec.availability = availability.into();
        node.spec.role = "worker".into();
        node
    }

    fn task(node: &str, state: &str) -> Task {
        let mut task = Task { node_id: node.into(), ..Task::default() };
        task.status.state = state.into();
        task
    }

    fn missing(look: Look) -> String {
        match look {
            Look::Done => "done".to_owned(),
            Look::NotYet(missing) => missing,
        }
    }

    #[test]
    fn nodes_are_judged_by_the_condition() {
        use NodeCondition as C;
        let judge =
            |node: &Node, tasks: &[Task], condition| missing(judged(node, tasks, condition));
        assert_eq!(judge(&node("ready", "active"), &[], C::Ready), "done");
        assert_eq!(judge(&node("ready", "active"), &[], C::Down), "it is ready");
        assert_eq!(judge(&node("down", "active"), &[], C::Down), "done");
        let tasks = [task("n1", "running"), task("n1", "shutdown"), task("n2", "running")];
        let drained = node("ready", "drain");
        assert_eq!(judge(&node("ready", "active"), &[], C::Drained), "its availability is active");
        assert_eq!(judge(&drained, &tasks, C::Drained), "it runs 1 tasks");
        assert_eq!(judge(&drained, &tasks[1..], C::Drained), "done");
        assert_eq!(judge(&drained, &[], C::Removed), "it is in the cluster");
        assert_eq!(judge(&drained, &[], C::Worker), "done");
        assert_eq!(judge(&drained, &[], C::Manager), "it is no manager");
        let mut manager = drained;
        let status = ManagerStatus { reachability: "reachable".into(), ..ManagerStatus::default() };
        manager.manager_status = Some(status);
        assert_eq!(judge(&manager, &[], C::Manager), "done");
        assert_eq!(judge(&manager, &[], C::Worker), "it is a manager");
    }

    #[test]
    fn what_cannot_change_is_not_waited_for() {
        assert!(!may_pass(&Stopped(String::new()).into()));
        assert!(may_pass(&anyhow::anyhow!("the connection broke")));
        let refused =
            |status| may_pass(&crate::client::Refused { status, message: String::new() }.into());
        assert!(refused(http::StatusCode::SERVICE_UNAVAILABLE));
        assert!(!refused(http::StatusCode::NOT_FOUND));
    }
}
