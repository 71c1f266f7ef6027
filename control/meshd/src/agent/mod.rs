//! The node's agent: runs the tasks that managers assign to this node, and reports how they fare.
//!
//! `Core` decides (pure), this module does: it carries out steps through an [`Executor`] and a
//! [`Plumber`], one task never waiting for another, and feeds the outcomes back. It keeps the last
//! assignments on disk and takes running tasks over when meshd starts, so that a worker goes on
//! without any manager.

mod core;
mod report;
mod resolv;
mod restarts;
mod sockets;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use async_trait::async_trait;
use mesh_executor::{
    ExecSession, ExecSpec, Executor, ExecutorError, TaskContext, contract::write_atomic,
    parse_signal,
};
use mesh_types::{
    TaskId,
    spec::Runtime,
    task::{TaskAssignment, TaskStatus},
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use self::core::{Action, Core, Kept, Managers, Outcome, Step};
pub use self::{report::StatusFeed, sockets::Sockets};
use crate::metrics::list;

/// Every step has a deadline, so that no task hangs in a state without a reason.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a watch that failed for another reason than the task's end waits before it goes on.
const WATCH_RETRY: Duration = Duration::from_secs(1);
/// Without a session for this long, the node restarts its tasks itself.
const ALONE_AFTER: Duration = Duration::from_secs(5);

/// Plugs tasks into their networks.
#[async_trait]
pub trait Plumber: Send + Sync {
    /// Plugs the interfaces of `task.leases` into `netns` and returns when they carry traffic and
    /// names resolve. Called again for a running task after meshd was restarted: what stands must
    /// stay as it is then.
    ///
    /// # Errors
    /// The reason for the user; a task that does not run yet is rejected with it.
    async fn attach(&self, task: &TaskAssignment, netns: &Path) -> anyhow::Result<()>;

    /// Gives new connections of a task that is about to end to others, whoever sends them to it;
    /// those that it has go on.
    ///
    /// # Errors
    /// It ends all the same then.
    async fn close(&self, task: TaskId) -> anyhow::Result<()>;

    /// Unplugs a task, whose namespace may be gone already. One that was never plugged is fine.
    ///
    /// # Errors
    /// It is tried again then.
    async fn detach(&self, task: TaskId) -> anyhow::Result<()>;

    /// What the task's namespace listens on, and who is connected to that.
    ///
    /// # Errors
    /// When its process is gone.
    fn sockets(&self, netns: &Path) -> std::io::Result<Sockets> {
        Sockets::of(netns)
    }
}

/// Settings of the agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The assignments are kept in `agent.json` here.
    pub state_dir: PathBuf,
    /// `MESH_NODE` of the tasks.
    pub node_name: String,
    /// Put in front of the tasks' PATH: the directory of meshctl.
    pub path_dir: Option<PathBuf>,
    /// The tasks' `/etc/resolv.conf`.
    pub resolv_conf: String,
}

impl AgentConfig {
    /// The usual `resolv.conf`: the node's resolver, and names without a dot asked as they are.
    pub const RESOLV_CONF: &str = "nameserver 127.0.0.11\noptions ndots:0\n";

    fn file(&self) -> PathBuf {
        self.state_dir.join("agent.json")
    }
}

/// A task of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskView {
    /// What it should be.
    pub assignment: TaskAssignment,
    /// How it fares.
    pub status: TaskStatus,
    /// Its network namespace, while it has one.
    pub netns: Option<PathBuf>,
}

/// The tasks of this node at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentView {
    /// Those that are assigned.
    pub tasks: BTreeMap<TaskId, TaskView>,
    /// How many others are still being removed.
    pub leaving: usize,
}

/// Starts agents.
#[derive(Debug)]
pub struct Agent;

/// A running agent. When the last handle is dropped it stops; the tasks run on.
#[derive(Clone)]
pub struct AgentHandle {
    inputs: mpsc::UnboundedSender<Input>,
    view: watch::Receiver<Arc<AgentView>>,
    executor: Arc<dyn Executor>,
    managed: Arc<watch::Sender<bool>>,
}

impl std::fmt::Debug for AgentHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentHandle").field("view", &self.view).finish_non_exhaustive()
    }
}

enum Input {
    Assign(Vec<TaskAssignment>, BTreeSet<TaskId>),
    Outcome(TaskId, Outcome),
    Managers(Managers),
}

impl Agent {
    /// Takes over what runs, goes on with the assignments that were kept, and serves the handle.
    ///
    /// # Errors
    /// When the kept assignments cannot be read or running tasks cannot be listed: nothing has been
    /// touched then, and tasks run on.
    pub async fn start(
        config: AgentConfig,
        executor: Arc<dyn Executor>,
        plumber: Arc<dyn Plumber>,
    ) -> anyhow::Result<AgentHandle> {
        let kept = load(&config.file())?;
        let found = executor.list().await.context("cannot list this node's tasks")?;
        let core = Core::restore(now_ms(), kept, found);
        let (inputs, receiver) = mpsc::unbounded_channel();
        let (publisher, view) = watch::channel(Arc::new(view_of(&core)));
        let driver = Driver {
            hands: Arc::new(Hands { config, executor: Arc::clone(&executor), plumber }),
            core,
            saved: Vec::new(),
            // Weak, so that the driver ends with the last handle.
            inputs: inputs.downgrade(),
            publisher,
        };
        tokio::spawn(driver.run(receiver));
        // No session yet, which is no news until it stays so.
        let (managed, changes) = watch::channel(false);
        tokio::spawn(tell_managers(changes, inputs.downgrade()));
        Ok(AgentHandle { inputs, view, executor, managed: Arc::new(managed) })
    }
}

/// Passes on whether there are managers: at once when they are lost or back, late that they are
/// away. As after a start, they are lost until the first of them is reached.
async fn tell_managers(
    mut managed: watch::Receiver<bool>,
    inputs: mpsc::WeakUnboundedSender<Input>,
) {
    let tell = |managers| match inputs.upgrade() {
        Some(inputs) => inputs.send(Input::Managers(managers)).is_ok(),
        None => false,
    };
    loop {
        if !tell(Managers::Lost) {
            return;
        }
        let back = timeout(ALONE_AFTER, managed.wait_for(|managed| *managed));
        match back.await.map(|back| back.is_ok()) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => {
                tracing::info!("no manager decides: tasks that end are started again here");
                if !tell(Managers::Away) || managed.wait_for(|managed| *managed).await.is_err() {
                    return;
                }
                tracing::info!("managers decide again about tasks that end");
            }
        }
        if !tell(Managers::There) || managed.wait_for(|managed| !managed).await.is_err() {
            return;
        }
    }
}

impl AgentHandle {
    /// Whether this node has a session with a manager that follows a leader. When it had none for a
    /// while, tasks that end are started again here, as their services say, until there is one.
    pub fn set_managed(&self, managed: bool) {
        self.managed.send_if_modified(|old| std::mem::replace(old, managed) != managed);
    }

    /// Gives the agent the whole set of this node's tasks. What is not in it is stopped and
    /// removed; of those in `ended` the output is kept.
    pub fn assign(&self, set: Vec<TaskAssignment>, ended: BTreeSet<TaskId>) {
        // The driver lives as long as a handle does.
        let _ = self.inputs.send(Input::Assign(set, ended));
    }

    /// The statuses to report to a manager.
    #[must_use]
    pub fn statuses(&self) -> StatusFeed {
        StatusFeed::new(self.view.clone())
    }

    /// The tasks of this node now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<AgentView> {
        Arc::clone(&self.view.borrow())
    }

    /// Follows the tasks of this node.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<AgentView>> {
        self.view.clone()
    }

    /// Runs one more process in a task of this node.
    ///
    /// # Errors
    /// See [`Executor::exec`].
    pub async fn exec(&self, task: TaskId, spec: ExecSpec) -> Result<ExecSession, ExecutorError> {
        self.executor.exec(task, spec).await
    }

    /// The files with a task's output, oldest first; they may not exist.
    #[must_use]
    pub fn logs(&self, task: TaskId) -> [PathBuf; 2] {
        self.executor.logs(task)
    }

    /// Waits until the managers have taken all tasks away, at most for `limit`.
    pub async fn released(&self, limit: Duration) {
        let mut view = self.view.clone();
        let gone = view.wait_for(|view| view.tasks.is_empty() && view.leaving == 0);
        // Whatever is left then is ended by `stop_all`.
        let _ = timeout(limit, gone).await;
    }

    /// Stops and removes all tasks, for `swarm leave`.
    ///
    /// # Errors
    /// When some are still there after `limit`.
    pub async fn stop_all(&self, limit: Duration) -> anyhow::Result<()> {
        self.assign(Vec::new(), BTreeSet::new());
        let mut view = self.view.clone();
        let gone = view.wait_for(|view| view.tasks.is_empty() && view.leaving == 0);
        let in_time = timeout(limit, gone).await.is_ok();
        let left = self.view.borrow().leaving;
        anyhow::ensure!(in_time, "{left} tasks are still ending after {} s", limit.as_secs());
        Ok(())
    }
}

/// The loop around the core.
struct Driver {
    hands: Arc<Hands>,
    core: Core,
    saved: Vec<Kept>,
    inputs: mpsc::WeakUnboundedSender<Input>,
    publisher: watch::Sender<Arc<AgentView>>,
}

impl Driver {
    async fn run(mut self, mut receiver: mpsc::UnboundedReceiver<Input>) {
        loop {
            if self.core.take_changed() {
                // Kept before it is acted upon: a restart must know every task that has begun.
                self.save().await;
                self.publisher.send_if_modified(|view| {
                    let new = view_of(&self.core);
                    let changed = **view != new;
                    *view = Arc::new(new);
                    changed
                });
            }
            while let Some(action) = self.core.poll_action() {
                self.spawn(action);
            }
            let Some(input) = receiver.recv().await else { return };
            self.handle(input);
            // What came meanwhile goes into the same save.
            while let Ok(input) = receiver.try_recv() {
                self.handle(input);
            }
        }
    }

    fn handle(&mut self, input: Input) {
        match input {
            Input::Assign(set, ended) => self.core.handle_assign(now_ms(), set, &ended),
            Input::Managers(managers) => self.core.handle_managers(now_ms(), managers),
            Input::Outcome(task, outcome) => {
                let ended = matches!(outcome, Outcome::Ended(_) | Outcome::Lost(_));
                self.core.handle_outcome(now_ms(), task, outcome);
                if ended {
                    self.tell_end(task);
                }
            }
        }
    }

    /// Counts and logs how a task's process ended.
    fn tell_end(&self, task: TaskId) {
        let Some(status) = self.core.status(task) else { return };
        let service = self.publisher.borrow().tasks.get(&task).map(|view| view.assignment.service);
        let service = service.map(tracing::field::display);
        let state = status.state.name();
        list::TASK_EXITS.count(&[state]);
        tracing::info!(%task, service, state, reason = status.err, "task ended");
    }

    fn spawn(&self, action: Action) {
        let hands = Arc::clone(&self.hands);
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let began = Instant::now();
            sleep(action.after).await;
            let mut outcome = hands.carry_out(action.task, action.step).await;
            if let Outcome::Looked(_, took) = &mut outcome {
                *took = began.elapsed();
            }
            if let Some(inputs) = inputs.upgrade() {
                let _ = inputs.send(Input::Outcome(action.task, outcome));
            }
        });
    }

    async fn save(&mut self) {
        let kept = self.core.kept();
        if kept == self.saved {
            return;
        }
        let path = self.hands.config.file();
        let written = match serde_json::to_vec(&kept) {
            Ok(bytes) => {
                let path = path.clone();
                let write = move || write_atomic(&path, &bytes);
                tokio::task::spawn_blocking(write).await.map_err(anyhow::Error::from)
            }
            Err(error) => Err(error.into()),
        };
        match written.and_then(|written| written.map_err(anyhow::Error::from)) {
            Ok(()) => self.saved = kept,
            // Tried again at the next change. Tasks go on: they matter more than a later restart.
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "cannot keep the assignments");
            }
        }
    }
}

/// What carries out steps.
struct Hands {
    config: AgentConfig,
    executor: Arc<dyn Executor>,
    plumber: Arc<dyn Plumber>,
}

impl Hands {
    async fn carry_out(&self, task: TaskId, step: Step) -> Outcome {
        if step == Step::Watch {
            return self.watch(task).await;
        }
        if let Step::Look(netns) = step {
            let plumber = Arc::clone(&self.plumber);
            // Its process may end at any time: then it has no sockets.
            let looked = tokio::task::spawn_blocking(move || plumber.sockets(&netns).ok()).await;
            return Outcome::Looked(looked.ok().flatten().unwrap_or_default(), Duration::ZERO);
        }
        let name = step.name();
        tracing::debug!(%task, step = name, "task step");
        let outcome = timeout(STEP_TIMEOUT, self.attempt(task, step)).await;
        let outcome = outcome.unwrap_or_else(|_| {
            Err(anyhow::anyhow!("{name} did not finish within {} s", STEP_TIMEOUT.as_secs()))
        });
        let result = if outcome.is_ok() { "done" } else { "failed" };
        list::TASK_STEPS.count(&[&name.replace(' ', "_"), result]);
        outcome.unwrap_or_else(|error| {
            let reason = format!("{error:#}");
            tracing::warn!(%task, step = name, reason, "task step failed");
            Outcome::Failed(reason)
        })
    }

    async fn attempt(&self, task: TaskId, step: Step) -> anyhow::Result<Outcome> {
        match step {
            Step::Prepare(assignment) => {
                check(&assignment)?;
                let context = context(&self.config, &assignment);
                let prepared = self.executor.prepare(&assignment, &context).await?;
                return Ok(Outcome::Prepared(prepared.netns));
            }
            Step::Start => return Ok(Outcome::Started(self.executor.start(task).await?)),
            Step::Attach(assignment, netns) => self.plumber.attach(&assignment, &netns).await?,
            Step::Close => self.plumber.close(task).await?,
            Step::Detach => self.plumber.detach(task).await?,
            Step::Stop { signal, grace } => self.executor.stop(task, signal, grace).await?,
            Step::Remove => self.executor.remove(task).await?,
            Step::Watch | Step::Look(_) | Step::Pause => {}
        }
        Ok(Outcome::Done)
    }

    async fn watch(&self, task: TaskId) -> Outcome {
        loop {
            match self.executor.wait(task).await {
                Ok(exit) => return Outcome::Ended(exit),
                Err(error @ ExecutorError::Lost(_)) => return Outcome::Lost(format!("{error}")),
                Err(error) => {
                    tracing::warn!(%task, %error, "cannot watch a task; trying again");
                    sleep(WATCH_RETRY).await;
                }
            }
        }
    }
}

impl Step {
    fn name(&self) -> &'static str {
        match self {
            Self::Prepare(_) => "preparing",
            Self::Attach(..) => "attaching the network",
            Self::Start => "starting",
            Self::Watch => "watching",
            Self::Look(_) => "looking at the sockets",
            Self::Stop { .. } => "stopping",
            Self::Close => "closing to new connections",
            Self::Detach => "detaching the network",
            Self::Remove => "removing",
            Self::Pause => "pausing",
        }
    }
}

/// What the API should have refused already.
fn check(assignment: &TaskAssignment) -> anyhow::Result<()> {
    anyhow::ensure!(
        assignment.spec.runtime == Runtime::Process,
        "this node has no executor for images yet: create the service with --runtime process (or \
         --container-label mesh.runtime=process)"
    );
    if let Some(signal) = &assignment.spec.stop_signal {
        parse_signal(signal).map_err(anyhow::Error::msg).context("stop signal")?;
    }
    Ok(())
}

fn context(config: &AgentConfig, task: &TaskAssignment) -> TaskContext {
    let hostname = task.spec.hostname.clone().unwrap_or_else(|| task.id.short());
    let hosts =
        task.leases.iter().map(|lease| (lease.address.ip(), hostname.clone())).collect::<Vec<_>>();
    TaskContext {
        hosts,
        hostname,
        resolv_conf: resolv::resolv_conf(&config.resolv_conf, &task.spec.dns),
        env: vec![
            format!("MESH_TASK={}", task.name),
            format!("MESH_TASK_ID={}", task.id),
            format!("MESH_SERVICE={}", task.service_name),
            format!("MESH_NODE={}", config.node_name),
        ],
        path_dir: config.path_dir.clone(),
    }
}

fn view_of(core: &Core) -> AgentView {
    let tasks = core.assigned_tasks().map(|(assignment, status, netns)| {
        let view = TaskView {
            assignment: assignment.clone(),
            status: status.clone(),
            netns: netns.cloned(),
        };
        (assignment.id, view)
    });
    AgentView { tasks: tasks.collect(), leaving: core.leaving() }
}

fn load(path: &Path) -> anyhow::Result<Vec<Kept>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
            let path = path.display();
            format!("{path} is damaged: move it away, and tasks are taken over from a manager")
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
