//! The agent's state machine: what to do next with each task of this node.
//!
//! Level-triggered: it compares what a task's assignment asks for with what is known to exist, and
//! asks for the one step that brings them closer. At most one step per task is under way, beside
//! the watch for its end. No IO and no clock: assignments, outcomes of steps and the time come in,
//! [`Action`]s go out.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    time::Duration,
};

use mesh_executor::{Exit, FoundState, SIGTERM, parse_signal};
use mesh_types::{
    Protocol, TaskId,
    resources::Bytes,
    task::{InterfaceKind, TaskAssignment, TaskState, TaskStatus},
};

use super::{restarts::Restarts, sockets::Sockets};

/// Between SIGTERM and SIGKILL unless the service says otherwise (as in Swarm).
const GRACE: Duration = Duration::from_secs(10);
/// A step that must succeed in the end is tried again after at most this long.
const RETRY_MAX: Duration = Duration::from_secs(2);
/// A task whose published ports do not open for this long counts as running all the same: its
/// server may be slow, or none of ours to judge.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// The same for one that publishes none: then nobody says whether it is a server at all.
const OPEN_LIMIT_UNKNOWN: Duration = Duration::from_millis(500);
/// Between two looks at the sockets of a task that starts.
const LOOK_OPENING: Duration = Duration::from_millis(25);
/// Between two looks at the sockets of a task that is to end.
const LOOK_DRAINING: Duration = Duration::from_millis(100);
/// So many looks in a row must find no connection: packets may be on their way at the first.
const LOOKS_QUIET: u32 = 2;

/// One step for one task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Action {
    pub(super) task: TaskId,
    pub(super) step: Step,
    /// Wait this long first: the step failed before.
    pub(super) after: Duration,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Make its namespaces.
    Prepare(Box<TaskAssignment>),
    /// Plug its interfaces (again, after a restart of meshd: that may change nothing).
    Attach(Box<TaskAssignment>, PathBuf),
    Start,
    /// Tell its end by [`Outcome::Ended`] or [`Outcome::Lost`]; not a step in the sequence.
    Watch,
    /// Look at the sockets of its network namespace.
    Look(PathBuf),
    /// Give its new connections to others.
    Close,
    Stop {
        signal: i32,
        grace: Duration,
    },
    Detach,
    /// End what is left of it and remove all that is on disk.
    Remove,
    /// Nothing: the pause before it is started again.
    Pause,
}

/// How a step went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Prepared(PathBuf),
    Started(u32),
    /// Of a look, with how long it took from when it was asked for.
    Looked(Sockets, Duration),
    /// Of a step without a result: attach, close, stop, detach, remove.
    Done,
    /// Of any step, with the reason for the user.
    Failed(String),
    /// Of a watch.
    Ended(Exit),
    /// Of a watch.
    Lost(String),
}

/// A task as it is kept on disk, so that a restarted meshd goes on without a manager.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Kept {
    pub(super) assignment: TaskAssignment,
    pub(super) status: TaskStatus,
    #[serde(default)]
    pub(super) restarts: Restarts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    /// There is none. Something of an earlier attempt may be on disk.
    Absent,
    /// Namespaces stand, nothing runs.
    Created,
    Running,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plugged {
    No,
    /// Attempted, or known from before a restart alone.
    Maybe,
    Yes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Busy {
    Prepare,
    Attach,
    Start,
    Look,
    Close,
    Stop,
    Detach,
    Remove,
    Pause,
}

/// What the looks at a task's sockets came to so far. They are counted by the time that they took,
/// so that a clock that is set moves nothing.
#[derive(Debug, Default)]
struct Looks {
    waited: Duration,
    any: bool,
    /// So many in a row found no connection.
    quiet: u32,
}

#[derive(Debug)]
struct Task {
    /// `None`: it was found without one. One that has left the node's set keeps its last, with
    /// `Remove` as the desired state, so that it is stopped as its service says.
    assignment: Option<TaskAssignment>,
    /// It is in the node's set.
    named: bool,
    /// It ended, and its output is kept.
    kept: bool,
    process: Process,
    netns: Option<PathBuf>,
    plugged: Plugged,
    /// Something may be on disk.
    files: bool,
    busy: Option<Busy>,
    watched: bool,
    /// It was started, and is waited for until it listens.
    opening: Option<Looks>,
    /// It gets no new connections any more.
    closed: bool,
    /// It is to end, and its connections are waited for.
    draining: Option<Looks>,
    /// It was asked to end.
    stopping: bool,
    /// Its stop has been sent.
    stop_sent: bool,
    /// The step that failed last, and how often in a row.
    failed: Option<(Busy, u32)>,
    restarts: Restarts,
    /// It ended, is unplugged, and was paused for as long as its service says.
    paused: bool,
    /// What to report once its interfaces are gone, since its leases are given back then.
    end: Option<TaskStatus>,
    status: TaskStatus,
}

impl Task {
    fn new() -> Self {
        Self {
            assignment: None,
            named: false,
            kept: false,
            process: Process::Absent,
            netns: None,
            plugged: Plugged::No,
            files: false,
            busy: None,
            watched: false,
            opening: None,
            closed: false,
            draining: None,
            stopping: false,
            stop_sent: false,
            failed: None,
            restarts: Restarts::default(),
            paused: false,
            end: None,
            status: TaskStatus::default(),
        }
    }

    /// How far the assignment wants it to go, if it is to live at all.
    fn wanted(&self) -> Option<TaskState> {
        let desired = self.assignment.as_ref()?.desired;
        (desired <= TaskState::Running).then_some(desired)
    }

    /// All that is left of it is its output, which is kept.
    fn rests(&self) -> bool {
        self.kept && self.files && self.process == Process::Ended && self.busy.is_none()
    }

    /// Nothing of it needs to be kept.
    fn forgettable(&self) -> bool {
        !self.kept && self.assignment.as_ref().is_none_or(|a| a.desired == TaskState::Remove)
    }

    fn say(&mut self, now_ms: u64, state: TaskState, message: &str) {
        self.report(TaskStatus {
            state,
            since_ms: now_ms,
            message: message.to_owned(),
            pid: self.status.pid,
            ..TaskStatus::default()
        });
    }

    /// Takes a status over unless it would go back or says nothing new.
    fn report(&mut self, status: TaskStatus) {
        let same = TaskStatus { since_ms: self.status.since_ms, ..status.clone() } == self.status;
        if status.state >= self.status.state && !self.status.state.is_final() && !same {
            self.status = status;
        }
    }

    /// How long to wait before this step: not at all, unless it just failed or was taken.
    fn step_after(&self, step: Busy) -> Duration {
        match self.failed {
            _ if step == Busy::Look => self.look_after(),
            _ if step == Busy::Pause => {
                self.assignment.as_ref().map_or(Duration::ZERO, |a| a.spec.restart.delay)
            }
            Some((failed, times)) if failed == step => {
                RETRY_MAX.min(Duration::from_millis(100) * 2u32.pow(times.min(10)))
            }
            _ => Duration::ZERO,
        }
    }

    /// Counts a failure of a step that is tried again, and says why the task waits.
    fn failed_again(&mut self, step: Busy, reason: String) {
        let times = match self.failed {
            Some((failed, times)) if failed == step => times.saturating_add(1),
            _ => 1,
        };
        self.failed = Some((step, times));
        let mut status = self.status.clone();
        status.err = reason;
        self.report(status);
    }
}

/// The state machine of a node's tasks.
#[derive(Debug, Default)]
pub(super) struct Core {
    tasks: BTreeMap<TaskId, Task>,
    actions: VecDeque<Action>,
    /// A whole set has come. Before, what has no assignment is left alone: it may be ours, and only
    /// the file with the assignments was lost.
    assigned: bool,
    /// Something but looks happened since this was asked last.
    changed: bool,
    managers: Managers,
}

/// Whether there are managers that replace what ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Managers {
    /// They are told, and decide.
    #[default]
    There,
    /// Not heard, but perhaps only for a moment: who decides about what ends is open.
    Lost,
    /// Not there: what ends is started again here.
    Away,
}

impl Core {
    /// Goes on after a restart from what was kept and what was found; no manager was heard yet.
    pub(super) fn restore(now_ms: u64, kept: Vec<Kept>, found: Vec<(TaskId, FoundState)>) -> Self {
        let mut core = Self { changed: true, managers: Managers::Lost, ..Self::default() };
        for Kept { assignment, status, restarts } in kept {
            let mut task = Task::new();
            let id = assignment.id;
            task.assignment = Some(assignment);
            task.named = true;
            task.status = status;
            task.restarts = restarts;
            core.tasks.insert(id, task);
        }
        let mut found: BTreeMap<TaskId, FoundState> = found.into_iter().collect();
        for id in found.keys() {
            core.tasks.entry(*id).or_insert_with(Task::new);
        }
        for (id, task) in &mut core.tasks {
            task.restore(now_ms, found.remove(id));
        }
        let ids: Vec<TaskId> = core.tasks.keys().copied().collect();
        ids.into_iter().for_each(|id| core.advance(now_ms, id));
        core
    }

    /// The whole set of this node's tasks, and those of its ended ones whose output is kept.
    pub(super) fn handle_assign(
        &mut self,
        now_ms: u64,
        set: Vec<TaskAssignment>,
        ended: &BTreeSet<TaskId>,
    ) {
        self.assigned = true;
        self.changed = true;
        let mut set: BTreeMap<TaskId, TaskAssignment> =
            set.into_iter().map(|assignment| (assignment.id, assignment)).collect();
        for (id, task) in &mut self.tasks {
            task.named = set.contains_key(id);
            task.kept = ended.contains(id);
            if let Some(assignment) = set.remove(id) {
                task.assignment = Some(assignment);
            } else if let Some(assignment) = &mut task.assignment {
                assignment.desired = TaskState::Remove;
                // Managers know nothing of it any more, so its addresses may soon be another's.
                assignment.drain = Duration::ZERO;
            }
        }
        for (id, assignment) in set {
            let mut task = Task::new();
            task.assignment = Some(assignment);
            task.named = true;
            task.say(now_ms, TaskState::Accepted, "accepted");
            self.tasks.insert(id, task);
        }
        let ids: Vec<TaskId> = self.tasks.keys().copied().collect();
        ids.into_iter().for_each(|id| self.advance(now_ms, id));
    }

    /// Whether there are managers changed.
    pub(super) fn handle_managers(&mut self, now_ms: u64, managers: Managers) {
        self.managers = managers;
        self.changed = true;
        if managers == Managers::There {
            // From now on they decide.
            let paused = |task: &&mut Task| task.busy == Some(Busy::Pause);
            self.tasks.values_mut().filter(paused).for_each(|task| task.report_end(now_ms));
        }
        let ids: Vec<TaskId> = self.tasks.keys().copied().collect();
        ids.into_iter().for_each(|id| self.advance(now_ms, id));
    }

    /// How a step went.
    pub(super) fn handle_outcome(&mut self, now_ms: u64, id: TaskId, outcome: Outcome) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let look = matches!(outcome, Outcome::Looked(..)).then(|| task.status.clone());
        match outcome {
            Outcome::Ended(exit) => task.ended(now_ms, &exit),
            Outcome::Lost(reason) => task.lost(now_ms, reason),
            outcome => task.step_done(now_ms, outcome),
        }
        self.advance(now_ms, id);
        // There are many looks, and most tell nothing new.
        let status = self.tasks.get(&id).map(|task| &task.status);
        self.changed |= look.is_none() || look.as_ref() != status;
    }

    /// How a task is, or how its process ended.
    pub(super) fn status(&self, id: TaskId) -> Option<&TaskStatus> {
        let task = self.tasks.get(&id)?;
        Some(task.end.as_ref().unwrap_or(&task.status))
    }

    /// Whether there may be something new to keep or to publish since this was asked last.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The next thing to do.
    pub(super) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// What must survive a restart.
    pub(super) fn kept(&self) -> Vec<Kept> {
        let keep = |task: &Task| {
            Some(Kept {
                assignment: task.assignment.clone()?,
                status: task.status.clone(),
                restarts: task.restarts.clone(),
            })
        };
        self.tasks.values().filter_map(keep).collect()
    }

    /// The tasks that are in the node's set.
    pub(super) fn assigned_tasks(
        &self,
    ) -> impl Iterator<Item = (&TaskAssignment, &TaskStatus, Option<&PathBuf>)> {
        self.tasks
            .values()
            .filter(|task| task.named)
            .filter_map(|task| Some((task.assignment.as_ref()?, &task.status, task.netns.as_ref())))
    }

    /// How many tasks there are that are in no set any more, but not gone yet.
    pub(super) fn leaving(&self) -> usize {
        self.tasks.values().filter(|task| !task.named && !task.rests()).count()
    }

    /// Decides the next step of one task.
    fn advance(&mut self, now_ms: u64, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.process == Process::Running && !task.watched {
            task.watched = true;
            self.actions.push_back(Action { task: id, step: Step::Watch, after: Duration::ZERO });
        }
        if task.busy.is_some() || (task.assignment.is_none() && !self.assigned) {
            return;
        }
        if let Some((busy, step)) = task.next_step(now_ms, self.managers) {
            task.busy = Some(busy);
            let after = task.step_after(busy);
            self.actions.push_back(Action { task: id, step, after });
        } else if !task.named && !task.rests() && task.process != Process::Running {
            self.tasks.remove(&id);
        }
    }
}

impl Task {
    fn restore(&mut self, now_ms: u64, found: Option<FoundState>) {
        self.files = found.is_some();
        // Whoever plugs it knows nothing after a restart either.
        self.plugged = Plugged::Maybe;
        let started = self.status.state >= TaskState::Starting;
        if self.status.state.is_final() && self.assignment.is_some() {
            self.process = match found {
                Some(FoundState::Created { .. } | FoundState::Running { .. }) => Process::Created,
                _ => Process::Ended,
            };
            return;
        }
        match found {
            Some(FoundState::Created { netns }) => {
                self.process = Process::Created;
                self.netns = Some(netns);
            }
            Some(FoundState::Running { netns, pid }) => {
                self.process = Process::Running;
                self.netns = Some(netns);
                self.running(now_ms, pid);
            }
            Some(FoundState::Exited(exit)) => {
                self.stopping = self.wanted().is_none();
                self.ended(now_ms, &exit);
            }
            Some(FoundState::Lost) | None if started => {
                let reason = "task: lost while meshd was away (the machine restarted, or its shim \
                              was killed)";
                self.lost(now_ms, reason.to_owned());
            }
            Some(FoundState::Lost) | None => {}
        }
    }

    fn running(&mut self, now_ms: u64, pid: u32) {
        self.status.pid = Some(pid);
        let message = self.restarts.message();
        self.say(now_ms, TaskState::Running, &message);
    }

    /// Its process runs. Others may send to it once it listens.
    fn started(&mut self, now_ms: u64, pid: u32) {
        if self.open_limit() == Duration::ZERO {
            return self.running(now_ms, pid);
        }
        self.status.pid = Some(pid);
        self.opening = Some(Looks::default());
        self.say(now_ms, TaskState::Starting, "started; it does not listen yet");
    }

    /// How long to wait until it listens. Nobody connects to one that is on no network.
    fn open_limit(&self) -> Duration {
        let Some(assignment) = &self.assignment else { return Duration::ZERO };
        let overlay = |kind| matches!(kind, InterfaceKind::Overlay { .. });
        if !assignment.ports.is_empty() {
            OPEN_LIMIT
        } else if assignment.leases.iter().any(|lease| overlay(lease.kind)) {
            OPEN_LIMIT_UNKNOWN
        } else {
            Duration::ZERO
        }
    }

    /// After a restart of meshd: what was wrong with its network is over.
    fn attached_again(&mut self, now_ms: u64) {
        let message = self.status.message.clone();
        self.say(now_ms, TaskState::Running, &message);
    }

    fn drain_limit(&self) -> Duration {
        self.assignment.as_ref().map_or(Duration::ZERO, |assignment| assignment.drain)
    }

    /// The first look is taken at once.
    fn look_after(&self) -> Duration {
        match (&self.draining, &self.opening) {
            (Some(looks), _) if looks.any => {
                LOOK_DRAINING.min(self.drain_limit().saturating_sub(looks.waited))
            }
            (None, Some(looks)) if looks.any => LOOK_OPENING,
            _ => Duration::ZERO,
        }
    }

    /// Takes in a look at its sockets.
    fn looked(&mut self, now_ms: u64, sockets: &Sockets, took: Duration) {
        let looks = self.draining.as_mut().or(self.opening.as_mut());
        let Some(looks) = looks.filter(|_| self.process == Process::Running) else { return };
        let first = !std::mem::replace(&mut looks.any, true);
        let before = looks.waited;
        looks.waited = looks.waited.saturating_add(took);
        // Each status is written to disk here, and to the log of all managers.
        let tell = first || before.as_secs() != looks.waited.as_secs();
        if self.draining.is_some() {
            self.looked_draining(now_ms, sockets.open(), tell);
        } else {
            self.looked_opening(now_ms, sockets);
        }
    }

    fn looked_draining(&mut self, now_ms: u64, open: usize, tell: bool) {
        let Some(looks) = &mut self.draining else { return };
        looks.quiet = if open == 0 { looks.quiet.saturating_add(1) } else { 0 };
        if !tell {
            return;
        }
        let message = match open {
            0 => "draining: no connection open".to_owned(),
            1 => "draining: 1 connection open".to_owned(),
            _ => format!("draining: {open} connections open"),
        };
        self.say(now_ms, TaskState::Running, &message);
    }

    fn looked_opening(&mut self, now_ms: u64, sockets: &Sockets) {
        let waited = self.opening.as_ref().map_or(Duration::ZERO, |looks| looks.waited);
        let ports = self.assignment.as_ref().map(|assignment| assignment.ports.as_slice());
        let ports = ports.unwrap_or_default();
        let missing: Vec<String> = ports
            .iter()
            .filter(|port| !sockets.listening.contains(port))
            .map(|(protocol, port)| match protocol {
                Protocol::Tcp => format!("{port}/tcp"),
                Protocol::Udp => format!("{port}/udp"),
            })
            .collect();
        let open = missing.is_empty() && !(ports.is_empty() && sockets.listening.is_empty());
        if !open && waited < self.open_limit() {
            return;
        }
        self.opening = None;
        let message = if missing.is_empty() {
            self.restarts.message()
        } else {
            let ports = missing.join(", ");
            format!("{}; nothing listens on port {ports} yet", self.restarts.message())
        };
        self.say(now_ms, TaskState::Running, &message);
    }

    /// The one step that brings it closer to what is wanted; `None` if it is there.
    fn next_step(&mut self, now_ms: u64, managers: Managers) -> Option<(Busy, Step)> {
        match self.process {
            Process::Running => self.next_while_running(),
            Process::Created => self.next_before_start(now_ms),
            Process::Absent | Process::Ended => self.next_without_process(now_ms, managers),
        }
    }

    fn next_while_running(&mut self) -> Option<(Busy, Step)> {
        if self.wanted().is_none() {
            self.stopping = true;
            if self.stop_sent {
                return None;
            }
            if let Some(step) = self.next_while_draining() {
                return Some(step);
            }
            self.stop_sent = true;
            let spec = self.assignment.as_ref().map(|assignment| &assignment.spec);
            let signal = spec.and_then(|spec| parse_signal(spec.stop_signal.as_ref()?).ok());
            let grace = spec.and_then(|spec| spec.stop_grace_period).unwrap_or(GRACE);
            return Some((Busy::Stop, Step::Stop { signal: signal.unwrap_or(SIGTERM), grace }));
        }
        if self.plugged != Plugged::Yes {
            return self.attach();
        }
        self.opening.as_ref()?;
        Some((Busy::Look, Step::Look(self.netns.clone()?)))
    }

    /// What comes before it is told to stop: nobody sends it new connections any more, and those
    /// that are open may end by themselves.
    fn next_while_draining(&mut self) -> Option<(Busy, Step)> {
        let limit = self.drain_limit();
        // While it was not seen to listen, nothing was sent to it.
        if limit.is_zero() || self.opening.is_some() {
            return None;
        }
        // After a restart of meshd its interfaces must be kept until then. If that fails, whoever
        // is connected to it is cut off already.
        if self.plugged != Plugged::Yes {
            let failed = matches!(self.failed, Some((Busy::Attach, _)));
            return if failed { None } else { self.attach() };
        }
        // First, so that they come to an end at all: who did not hear that it ends (a node whose
        // daemon is dead) goes on sending to it.
        if !self.closed {
            return Some((Busy::Close, Step::Close));
        }
        let looks = self.draining.get_or_insert_default();
        if looks.waited >= limit || looks.quiet >= LOOKS_QUIET {
            return None;
        }
        Some((Busy::Look, Step::Look(self.netns.clone()?)))
    }

    fn next_before_start(&mut self, now_ms: u64) -> Option<(Busy, Step)> {
        let wanted = self.wanted().filter(|_| self.end.is_none() && !self.status.state.is_final());
        let Some(desired) = wanted else {
            // It never ran: nothing to stop, no output to keep.
            return Some((Busy::Remove, Step::Remove));
        };
        if self.plugged != Plugged::Yes {
            self.say(now_ms, TaskState::Preparing, "preparing network");
            return self.attach();
        }
        if desired < TaskState::Running {
            return None;
        }
        self.say(now_ms, TaskState::Starting, "starting");
        Some((Busy::Start, Step::Start))
    }

    fn next_without_process(&mut self, now_ms: u64, managers: Managers) -> Option<(Busy, Step)> {
        let undecided = managers != Managers::There && self.plugged == Plugged::No;
        if undecided && self.may_start_again(now_ms) {
            if managers == Managers::Lost {
                return None;
            }
            if !self.paused {
                self.paused = true;
                return Some((Busy::Pause, Step::Pause));
            }
            if let Some(assignment) = &self.assignment {
                self.restarts.count(&assignment.spec.restart, now_ms);
            }
            (self.end, self.process, self.netns) = (None, Process::Absent, None);
            (self.watched, self.paused, self.status.pid) = (false, false, None);
            let message = self.restarts.message();
            self.say(now_ms, TaskState::Running, &message);
        }
        let begins = self.process == Process::Absent
            && self.wanted().is_some()
            && self.end.is_none()
            && !self.status.state.is_final();
        if begins {
            let assignment = self.assignment.clone()?;
            self.files = true;
            self.say(now_ms, TaskState::Preparing, "preparing");
            return Some((Busy::Prepare, Step::Prepare(Box::new(assignment))));
        }
        if self.plugged != Plugged::No {
            if matches!(self.failed, Some((Busy::Detach, _))) {
                self.report_end(now_ms);
            }
            return Some((Busy::Detach, Step::Detach));
        }
        self.report_end(now_ms);
        // One that never ran has no output to keep.
        let useless = self.process == Process::Absent || self.forgettable();
        (useless && self.files).then_some((Busy::Remove, Step::Remove))
    }

    /// Whether it ended by itself and its service wants it back, as far as this node can tell.
    fn may_start_again(&self, now_ms: u64) -> bool {
        let (Some(end), Some(assignment)) = (&self.end, &self.assignment) else { return false };
        let policy = &assignment.spec.restart;
        let wanted = policy.wants_again(end.state) && !self.restarts.spent(policy, now_ms);
        wanted && !self.stopping && self.wanted() == Some(TaskState::Running)
    }

    fn attach(&mut self) -> Option<(Busy, Step)> {
        let assignment = Box::new(self.assignment.clone()?);
        let netns = self.netns.clone()?;
        self.plugged = Plugged::Maybe;
        Some((Busy::Attach, Step::Attach(assignment, netns)))
    }

    /// It is over: reports how. One that was told to go before it began was shut down.
    fn report_end(&mut self, now_ms: u64) {
        self.netns = None;
        match self.end.take() {
            Some(end) => self.report(end),
            None => self.report(self.finally(now_ms, TaskState::Shutdown, "shutdown", "")),
        }
    }

    fn finally(&self, now_ms: u64, state: TaskState, message: &str, err: &str) -> TaskStatus {
        TaskStatus {
            state,
            since_ms: now_ms,
            message: message.to_owned(),
            err: err.to_owned(),
            pid: None,
            exit_code: None,
        }
    }

    fn ended(&mut self, now_ms: u64, exit: &Exit) {
        self.process = Process::Ended;
        (self.opening, self.draining) = (None, None);
        self.failed = None;
        let (state, message, err) = match &exit.error {
            Some(reason) => (TaskState::Failed, "starting", reason.clone()),
            None if self.stopping => (TaskState::Shutdown, "shutdown", String::new()),
            None if exit.code == 0 => (TaskState::Complete, "finished", String::new()),
            None if exit.oom => {
                let err = format!("task: non-zero exit ({}): out of memory", exit.code);
                let memory = |assignment: &TaskAssignment| {
                    assignment.spec.resources.limits.amount.memory_bytes
                };
                let limit = self.assignment.as_ref().map_or(0, memory);
                let of =
                    if limit > 0 { format!(", limit {}", Bytes(limit)) } else { String::new() };
                (TaskState::Failed, "started", err + &of)
            }
            None => (TaskState::Failed, "started", format!("task: non-zero exit ({})", exit.code)),
        };
        let mut end = self.finally(now_ms, state, message, &err);
        end.exit_code = Some(exit.code);
        self.end = Some(end);
    }

    fn lost(&mut self, now_ms: u64, reason: String) {
        self.process = Process::Ended;
        (self.opening, self.draining) = (None, None);
        self.failed = None;
        self.end = Some(self.finally(now_ms, TaskState::Failed, "started", &reason));
    }

    /// Takes in how the step that was under way went.
    fn step_done(&mut self, now_ms: u64, outcome: Outcome) {
        let Some(busy) = self.busy.take() else { return };
        match outcome {
            Outcome::Failed(reason) => return self.step_failed(now_ms, busy, &reason),
            Outcome::Prepared(netns) => {
                self.process = Process::Created;
                self.netns = Some(netns);
            }
            Outcome::Started(pid) => {
                self.process = Process::Running;
                self.started(now_ms, pid);
            }
            Outcome::Looked(sockets, took) => self.looked(now_ms, &sockets, took),
            Outcome::Done | Outcome::Ended(_) | Outcome::Lost(_) => match busy {
                Busy::Attach => {
                    self.plugged = Plugged::Yes;
                    match self.process {
                        Process::Created => self.say(now_ms, TaskState::Ready, "prepared"),
                        Process::Running => self.attached_again(now_ms),
                        Process::Absent | Process::Ended => {}
                    }
                }
                Busy::Close => self.closed = true,
                Busy::Detach => self.plugged = Plugged::No,
                Busy::Remove => {
                    self.files = false;
                    if self.process == Process::Created {
                        self.process = Process::Absent;
                    }
                }
                Busy::Stop | Busy::Prepare | Busy::Start | Busy::Look | Busy::Pause => {}
            },
        }
        self.failed = None;
    }

    fn step_failed(&mut self, now_ms: u64, busy: Busy, reason: &str) {
        match busy {
            Busy::Prepare => {
                self.end = Some(self.finally(now_ms, TaskState::Rejected, "preparing", reason));
            }
            Busy::Attach if self.process == Process::Created => {
                let reason = format!("network: {reason}");
                self.end = Some(self.finally(now_ms, TaskState::Rejected, "preparing", &reason));
            }
            Busy::Start => {
                self.end = Some(self.finally(now_ms, TaskState::Failed, "starting", reason));
            }
            Busy::Pause => {}
            // Its connections and its end matter more than those that a dead daemon sends.
            Busy::Close => self.closed = true,
            // What cannot be looked at is not waited for.
            Busy::Look => self.looked(now_ms, &Sockets::default(), Duration::MAX),
            // These are tried again: what exists must be plugged, stopped, unplugged, removed.
            Busy::Attach => self.failed_again(busy, format!("network: {reason}")),
            Busy::Stop => {
                self.stop_sent = false;
                self.failed_again(busy, format!("stopping: {reason}"));
            }
            Busy::Detach => self.failed_again(busy, format!("detaching the network: {reason}")),
            Busy::Remove => self.failed_again(busy, format!("removing: {reason}")),
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
