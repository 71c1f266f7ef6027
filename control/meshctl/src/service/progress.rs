//! Waiting until a service's tasks run, with progress: lines when piped, bars on a terminal. What
//! counts as converged is what the stock CLI counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal as _,
    time::Duration,
};

use anyhow::{Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mesh_api::{Node, Service, Task, UpdateStatus};
use tokio::time::Instant;

use super::WaitArgs;
use crate::{
    client::{Client, filter_query},
    output::{natural, say},
};

/// Between looks.
const POLL: Duration = Duration::from_millis(200);
/// Tasks have to stay up this long, unless the service says how long.
const MONITOR: Duration = Duration::from_secs(5);
/// More tasks than this are shown as one sum.
const LINES_MAX: usize = 20;
/// States on the way to running, in order.
const STATES: [&str; 9] = [
    "new",
    "pending",
    "assigned",
    "accepted",
    "preparing",
    "ready",
    "starting",
    "running",
    "complete",
];

/// One look at a service.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Tasks that have to run.
    wanted: usize,
    /// Tasks that do.
    running: usize,
    /// State and error of each place (slot or node).
    places: BTreeMap<Place, (String, String)>,
}

impl View {
    /// Whether the tasks that have to run do.
    pub(crate) fn converged(&self) -> bool {
        self.running == self.wanted
    }

    /// How far it is, with the first that has a problem.
    pub(crate) fn told(&self) -> String {
        let problem = self.places.iter().find(|(_, (_, err))| !err.is_empty());
        let problem = problem.map(|(place, (_, err))| format!(" ({}: {err})", place.1));
        format!("{} of {} tasks run{}", self.running, self.wanted, problem.unwrap_or_default())
    }
}

/// A slot's number or a node's name, in natural order.
type Place = (Vec<(String, u64)>, String);

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The tasks of the spec as it was sent.
    Update,
    /// Those of the spec before.
    Rollback,
}

/// Waits until the service has converged and stays so, unless told not to. Ctrl-C ends the wait,
/// not the service.
pub(super) async fn wait(client: &Client, id: &str, goal: Goal, how: WaitArgs) -> Result<()> {
    if how.detach {
        return Ok(());
    }
    tokio::select! {
        result = converge(client, id, goal, how.quiet) => result,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("Operation continuing in background.");
            eprintln!("Use `meshctl service ps {id}` to check progress.");
            Ok(())
        }
    }
}

async fn converge(client: &Client, id: &str, goal: Goal, quiet: bool) -> Result<()> {
    let mut show = Show::new(quiet);
    let mut stable_since: Option<Instant> = None;
    loop {
        let service: Service = client.get(&format!("/services/{id}?insertDefaults=false")).await?;
        let view = look(client, &service).await?;
        let update = Update::of(service.update_status.as_ref(), goal)?;
        show.update(service.update_status.as_ref())?;
        show.view(&view)?;
        let converged = view.running == view.wanted && (view.wanted > 0 || !is_global(&service));
        if converged && update != Update::Going {
            // A complete update has watched its tasks itself.
            let done = update == Update::Complete && stable_since.is_none();
            let monitor = if done { Duration::ZERO } else { monitor(&service) };
            let since = *stable_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= monitor {
                return show.converged(id);
            }
            if !monitor.is_zero() {
                show.verify(monitor)?;
            }
        } else if stable_since.take().is_some() {
            show.line("verify: Detected task failure".to_owned())?;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What the leader says of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Update {
    /// Nothing: tasks alone tell.
    Unknown,
    /// Tasks are being replaced.
    Going,
    /// All are.
    Complete,
}

impl Update {
    /// An update that ended otherwise than wanted is an error.
    fn of(status: Option<&UpdateStatus>, goal: Goal) -> Result<Self> {
        let Some(status) = status else { return Ok(Self::Unknown) };
        match status.state.as_str() {
            "updating" | "rollback_started" => Ok(Self::Going),
            "completed" => Ok(Self::Complete),
            "rollback_completed" if goal == Goal::Rollback => Ok(Self::Complete),
            "rollback_completed" => bail!("service rolled back: {}", status.message),
            "rollback_paused" => bail!("service rollback paused: {}", status.message),
            "paused" => bail!("service update paused: {}", status.message),
            _ => Ok(Self::Unknown),
        }
    }
}

fn is_global(service: &Service) -> bool {
    service.spec.pointer("/Mode/Global").is_some_and(|mode| !mode.is_null())
}

fn monitor(service: &Service) -> Duration {
    let nanos = service.spec.pointer("/UpdateConfig/Monitor").and_then(serde_json::Value::as_u64);
    nanos.filter(|nanos| *nanos > 0).map_or(MONITOR, Duration::from_nanos)
}

/// The tasks of a service's spec as they are now.
pub(crate) async fn look(client: &Client, service: &Service) -> Result<View> {
    let filters = [format!("service={}", service.id), "_up-to-date=true".to_owned()];
    let tasks: Vec<Task> = client.get(&format!("/tasks?{}", filter_query(&filters)?)).await?;
    let nodes: Vec<Node> = client.get("/nodes").await?;
    let replicas =
        service.spec.pointer("/Mode/Replicated/Replicas").and_then(serde_json::Value::as_u64);
    Ok(view(tasks, &nodes, replicas))
}

/// One task per place counts: that which is wanted most, then that which is least far. Tasks on
/// nodes that are down count for nothing.
fn view(tasks: Vec<Task>, nodes: &[Node], replicas: Option<u64>) -> View {
    let up: BTreeSet<&str> =
        nodes.iter().filter(|node| node.status.state != "down").map(|node| &node.id[..]).collect();
    let rank = |state: &str| STATES.iter().position(|known| *known == state).unwrap_or(usize::MAX);
    let running_rank = rank("running");
    let mut chosen: BTreeMap<Place, Task> = BTreeMap::new();
    for task in tasks {
        if !task.node_id.is_empty() && !up.contains(&task.node_id[..]) {
            continue;
        }
        let name = match task.slot {
            Some(slot) => slot.to_string(),
            None => nodes
                .iter()
                .find(|node| node.id == task.node_id)
                .map_or_else(|| task.node_id.clone(), |node| node.description.hostname.clone()),
        };
        let key = |task: &Task| (rank(&task.desired_state), rank(&task.status.state));
        let place = (natural(&name), name);
        if chosen.get(&place).is_none_or(|other| key(&task) < key(other)) {
            chosen.insert(place, task);
        }
    }
    chosen.retain(|_, task| rank(&task.desired_state) <= running_rank);
    let running = chosen.values().filter(|task| task.status.state == "running").count();
    let wanted =
        replicas.map_or(chosen.len(), |replicas| usize::try_from(replicas).unwrap_or(usize::MAX));
    let places = chosen
        .into_iter()
        .map(|(place, task)| (place, (task.status.state, task.status.err)))
        .collect();
    View { wanted, running, places }
}

/// Where progress goes.
struct Show {
    quiet: bool,
    bars: Option<Bars>,
    last: Option<View>,
    verifying: bool,
    rolling_back: bool,
}

struct Bars {
    all: MultiProgress,
    overall: ProgressBar,
    places: BTreeMap<Place, ProgressBar>,
}

impl Show {
    fn new(quiet: bool) -> Self {
        let bars = (!quiet && std::io::stdout().is_terminal()).then(|| {
            let all = MultiProgress::new();
            let overall = all.add(ProgressBar::new(0));
            overall.set_style(plain("overall progress: {pos} out of {len} tasks"));
            Bars { all, overall, places: BTreeMap::new() }
        });
        Self { quiet, bars, last: None, verifying: false, rolling_back: false }
    }

    fn line(&self, text: String) -> Result<()> {
        match &self.bars {
            _ if self.quiet => Ok(()),
            // The terminal may be gone; the service is not.
            Some(bars) => {
                let _ = bars.all.println(text);
                Ok(())
            }
            None => say(text),
        }
    }

    fn update(&mut self, status: Option<&UpdateStatus>) -> Result<()> {
        match status {
            Some(status) if status.state == "rollback_started" => {
                if std::mem::replace(&mut self.rolling_back, true) {
                    return Ok(());
                }
                self.line(format!("rollback: {}", status.message))
            }
            _ => Ok(()),
        }
    }

    fn view(&mut self, view: &View) -> Result<()> {
        if self.quiet || self.last.as_ref() == Some(view) {
            return Ok(());
        }
        match &mut self.bars {
            Some(bars) => bars.update(view),
            None => self.print(view)?,
        }
        self.last = Some(View { places: view.places.clone(), ..*view });
        Ok(())
    }

    /// What changed since the last look.
    fn print(&self, view: &View) -> Result<()> {
        let last = self.last.as_ref();
        if last.is_none_or(|last| (last.running, last.wanted) != (view.running, view.wanted)) {
            self.line(format!("overall progress: {} out of {} tasks", view.running, view.wanted))?;
        }
        if view.places.len() > LINES_MAX {
            return Ok(());
        }
        for (place, now) in &view.places {
            if last.and_then(|last| last.places.get(place)) != Some(now) {
                self.line(format!("{}: {}", label(place, view), told(now)))?;
            }
        }
        Ok(())
    }

    fn verify(&mut self, monitor: Duration) -> Result<()> {
        if std::mem::replace(&mut self.verifying, true) {
            return Ok(());
        }
        self.line(format!(
            "verify: Waiting {} seconds to verify that tasks are stable...",
            monitor.as_secs_f64()
        ))
    }

    fn converged(&self, id: &str) -> Result<()> {
        if let Some(bars) = &self.bars {
            bars.places.values().chain([&bars.overall]).for_each(ProgressBar::abandon);
        }
        self.line(format!("verify: Service {id} converged"))
    }
}

impl Bars {
    fn update(&mut self, view: &View) {
        self.overall.set_length(view.wanted as u64);
        self.overall.set_position(view.running as u64);
        if view.places.len() > LINES_MAX {
            return;
        }
        let gone: Vec<_> =
            self.places.keys().filter(|place| !view.places.contains_key(*place)).cloned().collect();
        for place in gone {
            if let Some(bar) = self.places.remove(&place) {
                self.all.remove(&bar);
            }
        }
        for (place, now) in &view.places {
            let bar = self.places.entry(place.clone()).or_insert_with(|| {
                let bar = self.all.add(ProgressBar::new(STATES.len() as u64 - 1));
                bar.set_style(plain("{prefix}: [{bar:36.=>}] {msg}"));
                bar
            });
            let rank = STATES.iter().position(|known| *known == now.0).unwrap_or(0);
            bar.set_prefix(label(place, view));
            bar.set_position(rank as u64 + 1);
            bar.set_message(told(now));
        }
    }
}

/// `2/3` for a slot, the name for a node.
fn label(place: &Place, view: &View) -> String {
    let name = &place.1;
    if name.parse::<u64>().is_ok() { format!("{name}/{}", view.wanted) } else { name.clone() }
}

fn told((state, err): &(String, String)) -> String {
    if err.is_empty() { state.clone() } else { format!("{state}: {err}") }
}

/// The templates are constants; one that did not parse would show indicatif's own.
fn plain(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str, state: &str) -> Node {
        let mut node = Node { id: id.into(), ..Node::default() };
        node.status.state = state.into();
        node.description.hostname = format!("host-{id}");
        node
    }

    fn task(slot: Option<u64>, node: &str, desired: &str, state: &str) -> Task {
        let mut task =
            Task { slot, node_id: node.into(), desired_state: desired.into(), ..Task::default() };
        task.status.state = state.into();
        task
    }

    #[test]
    fn one_task_per_slot_counts_and_none_of_a_dead_node() {
        let nodes = [node("a", "ready"), node("b", "down")];
        let tasks = vec![
            task(Some(1), "a", "running", "running"),
            task(Some(1), "a", "shutdown", "failed"),
            task(Some(2), "b", "running", "running"),
            task(Some(3), "", "running", "pending"),
            task(Some(4), "a", "shutdown", "running"),
        ];
        let seen = view(tasks, &nodes, Some(3));
        assert_eq!((seen.running, seen.wanted), (1, 3));
        let names: Vec<_> = seen.places.keys().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["1", "3"]);
    }

    #[test]
    fn global_services_want_the_tasks_that_there_are() {
        let nodes = [node("a", "ready"), node("b", "ready")];
        let tasks =
            vec![task(None, "a", "running", "running"), task(None, "b", "running", "starting")];
        let seen = view(tasks, &nodes, None);
        assert_eq!((seen.running, seen.wanted), (1, 2));
        assert_eq!(seen.places.keys().next().map(|(_, name)| name.as_str()), Some("host-a"));
    }

    #[test]
    fn the_leaders_word_ends_the_wait() {
        let of = |state: &str, goal| {
            let status = UpdateStatus {
                state: state.into(),
                message: "m".into(),
                ..UpdateStatus::default()
            };
            Update::of(Some(&status), goal).map_err(|err| err.to_string())
        };
        assert_eq!(Update::of(None, Goal::Update).unwrap(), Update::Unknown);
        assert_eq!(of("updating", Goal::Update), Ok(Update::Going));
        assert_eq!(of("completed", Goal::Update), Ok(Update::Complete));
        assert_eq!(of("paused", Goal::Update), Err("service update paused: m".into()));
        assert_eq!(of("rollback_started", Goal::Update), Ok(Update::Going));
        assert_eq!(of("rollback_completed", Goal::Update), Err("service rolled back: m".into()));
        assert_eq!(of("rollback_completed", Goal::Rollback), Ok(Update::Complete));
        assert_eq!(of("rollback_paused", Goal::Rollback), Err("service rollback paused: m".into()));
    }
}
