//! `/services/{id}/logs` and `/tasks/{id}/logs`: the output of tasks from all nodes as one stream.
//!
//! What is there comes in the order of its times, whoever wrote it. Who follows then gets what is
//! new as it comes, from tasks that are made later too.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Path, State},
    http::header,
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, future::join_all};
use jiff::Timestamp;
use mesh_control::{model::Task, store::Store};
use mesh_types::{NodeId, ServiceId, TaskId};
use tokio::{sync::mpsc, time::interval};
use tokio_stream::wrappers::ReceiverStream;

use super::{ApiError, Shared, find, read, request::Params};
use crate::rpc::messages::{LOGS_TASKS_MAX, LogLine, LogsOutput, LogsRequest};

/// How often one who follows is looked for new tasks, and for nodes that were away.
const LOOK: Duration = Duration::from_millis(500);
/// The streams of Docker's frames.
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const SYSTEM_ERROR: u8 = 3;

/// What a client asked for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    stdout: bool,
    stderr: bool,
    since_ns: i64,
    tail: Option<u64>,
    follow: bool,
    timestamps: bool,
    details: bool,
}

/// Whose output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Of all tasks of a service, ended ones too.
    Service(ServiceId),
    /// Of the tasks that had, have and will have this slot.
    Slot(ServiceId, u64),
    /// Of this one.
    Task(TaskId),
}

impl Target {
    fn has(self, task: &Task) -> bool {
        match self {
            Self::Service(id) => task.service == id,
            Self::Slot(id, slot) => task.service == id && task.slot == Some(slot),
            Self::Task(id) => task.id == id,
        }
    }

    /// Whether no more tasks can come.
    fn is_over(self, store: &Store) -> bool {
        match self {
            Self::Service(id) | Self::Slot(id, _) => !store.services.contains_key(&id),
            Self::Task(_) => true,
        }
    }
}

/// A task whose node may have output of it.
#[derive(Debug, Clone, Copy)]
struct Placed {
    task: TaskId,
    service: ServiceId,
    node: NodeId,
    ended: bool,
}

fn placed(store: &Store, target: Target) -> Vec<Placed> {
    let of = store.tasks.values().filter(|task| target.has(task));
    of.filter_map(|task| {
        let ended = task.status.state.is_final();
        Some(Placed { task: task.id, service: task.service, node: task.node?, ended })
    })
    .collect()
}

/// `GET /services/{id}/logs`.
pub(super) async fn of_service(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    params: Params,
) -> Result<Response, ApiError> {
    let wanted = wanted(&params)?;
    let target = read(&backend, |store| {
        find::service(store, &id).map(|service| Target::Service(service.id))
    })??;
    start(backend, target, wanted)
}

/// `GET /tasks/{id}/logs`. `web.1` is a place: its earlier tasks count, and its later ones.
pub(super) async fn of_task(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    params: Params,
) -> Result<Response, ApiError> {
    let wanted = wanted(&params)?;
    let target = read(&backend, |store| {
        let task = find::task(store, &id)?;
        Ok::<_, ApiError>(match task.slot {
            Some(slot) if format!("{}.{slot}", task.service_name) == id => {
                Target::Slot(task.service, slot)
            }
            _ => Target::Task(task.id),
        })
    })??;
    start(backend, target, wanted)
}

fn wanted(params: &Params) -> Result<Wanted, ApiError> {
    let (stdout, stderr) = (params.flag("stdout"), params.flag("stderr"));
    if !stdout && !stderr {
        return Err(ApiError::bad_request(
            "Bad parameters: you must choose at least one stream (stdout, stderr)",
        ));
    }
    if !matches!(params.text("until"), "" | "0") {
        return Err(ApiError::not_implemented("the end of a service's logs (until)"));
    }
    let tail = match params.text("tail") {
        "" | "all" => None,
        text => Some(text.parse().map_err(|_| {
            ApiError::bad_request(format!(
                "invalid tail `{text}`: tail value must be a positive integer or \"all\""
            ))
        })?),
    };
    let since_ns = match params.text("since") {
        "" | "0" => i64::MIN,
        text => unix_ns(text).ok_or_else(|| {
            ApiError::bad_request(format!("invalid value for \"since\": `{text}` is no Unix time"))
        })?,
    };
    Ok(Wanted {
        stdout,
        stderr,
        since_ns,
        tail,
        follow: params.flag("follow"),
        timestamps: params.flag("timestamps"),
        details: params.flag("details"),
    })
}

/// `1795218673` or `1795218673.000000250` in nanoseconds. Digits after the point count as they
/// stand, with as many zeros as are missing at the end.
pub(super) fn unix_ns(text: &str) -> Option<i64> {
    let (seconds, rest) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(rest) || rest.len() > 9 || !digits(seconds.strip_prefix('-').unwrap_or(seconds)) {
        return None;
    }
    let nanos: i64 = format!("{rest:0<9}").parse().ok()?;
    seconds.parse::<i64>().ok()?.checked_mul(1_000_000_000)?.checked_add(nanos)
}

fn start(backend: Shared, target: Target, wanted: Wanted) -> Result<Response, ApiError> {
    let tasks = read(&backend, |store| placed(store, target))?;
    let (sender, receiver) = mpsc::channel(8);
    let out = Out { sender, wanted, about: BTreeMap::new() };
    tokio::spawn(Gather { backend, target, wanted, out }.run(tasks));
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    let kind = "application/vnd.docker.multiplexed-stream";
    Ok(([(header::CONTENT_TYPE, kind)], body).into_response())
}

/// Where lines go: to the client, as frames.
struct Out {
    sender: mpsc::Sender<Bytes>,
    wanted: Wanted,
    about: BTreeMap<TaskId, Placed>,
}

/// The client went away.
struct Gone;

impl Out {
    fn know(&mut self, tasks: &[Placed]) {
        self.about.extend(tasks.iter().map(|task| (task.task, *task)));
    }

    async fn lines(&self, lines: &[LogLine]) -> Result<(), Gone> {
        let mut out = BytesMut::new();
        for line in lines {
            let stream = if line.stderr { STDERR } else { STDOUT };
            let mut payload = Vec::with_capacity(line.text.len() + 64);
            if self.wanted.timestamps {
                let at = Timestamp::from_nanosecond(line.at_ns.into()).unwrap_or_default();
                payload.extend_from_slice(format!("{at:.9} ").as_bytes());
            }
            if self.wanted.details
                && let Some(about) = self.about.get(&line.task)
            {
                payload.extend_from_slice(context(about).as_bytes());
                payload.push(b' ');
            }
            payload.extend_from_slice(&line.text);
            frame(&mut out, stream, &payload);
        }
        self.send(out.freeze()).await
    }

    async fn warning(&self, text: &str) -> Result<(), Gone> {
        let mut out = BytesMut::new();
        frame(&mut out, SYSTEM_ERROR, text.as_bytes());
        self.send(out.freeze()).await
    }

    async fn send(&self, bytes: Bytes) -> Result<(), Gone> {
        self.sender.send(bytes).await.map_err(|_| Gone)
    }
}

/// How the CLI finds out whose line it is. Ids need no escaping.
fn context(about: &Placed) -> String {
    format!(
        "com.docker.swarm.node.id={},com.docker.swarm.service.id={},com.docker.swarm.task.id={}",
        about.node, about.service, about.task
    )
}

fn frame(out: &mut BytesMut, stream: u8, payload: &[u8]) {
    out.put_slice(&[stream, 0, 0, 0]);
    out.put_u32(u32::try_from(payload.len()).unwrap_or(u32::MAX));
    out.put_slice(payload);
}

/// Tasks of one node, and their output as it comes.
struct Source {
    tasks: Vec<Placed>,
    output: mpsc::Receiver<LogsOutput>,
    waiting: VecDeque<LogLine>,
    /// What was there is told, or there is nothing more.
    caught_up: bool,
    failed: Option<String>,
}

impl Source {
    /// Takes the next message; whether there was one.
    async fn next(&mut self) -> bool {
        match self.output.recv().await {
            Some(LogsOutput::Lines(lines)) => self.waiting.extend(lines),
            Some(LogsOutput::Now) => self.caught_up = true,
            Some(LogsOutput::Failed(why)) => self.failed = Some(why),
            None => {
                self.caught_up = true;
                return false;
            }
        }
        true
    }
}

struct Gather {
    backend: Shared,
    target: Target,
    wanted: Wanted,
    out: Out,
}

/// How far a task is that somebody follows.
#[derive(Debug, Clone, Copy)]
struct Followed {
    /// Its next line is not older.
    next_ns: i64,
    /// A stream of it is open.
    open: bool,
    /// It has ended, and all was told.
    done: bool,
}

/// From the streams of one who follows.
enum Followable {
    Lines(Vec<LogLine>),
    /// A stream ended: of these tasks, as they were when it began, and whether it broke.
    End(Vec<Placed>, bool),
}

impl Gather {
    async fn run(mut self, tasks: Vec<Placed>) {
        let gone = self.out.sender.clone();
        tokio::select! {
            _ = self.gather(tasks) => {}
            () = gone.closed() => {}
        }
    }

    async fn gather(&mut self, tasks: Vec<Placed>) -> Result<(), Gone> {
        self.out.know(&tasks);
        let since_ns = self.wanted.since_ns;
        let asked = tasks.iter().map(|task| (*task, since_ns)).collect();
        let mut sources = self.open(asked, self.wanted.tail).await;
        let mut next = BTreeMap::new();
        self.told_so_far(&mut sources, &mut next).await?;
        if self.wanted.follow {
            return self.follow(sources, next).await;
        }
        let missing: Vec<String> = sources.into_iter().filter_map(|source| source.failed).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let text = "warning: incomplete log stream. some logs could not be retrieved for the \
                    following reasons: ";
        self.out.warning(&format!("{text}{}", missing.join(", "))).await
    }

    /// One stream per node, as far as its tasks are few enough. One that cannot be had is a source
    /// that failed.
    async fn open(&self, tasks: Vec<(Placed, i64)>, tail: Option<u64>) -> Vec<Source> {
        let mut by_node: BTreeMap<NodeId, Vec<(Placed, i64)>> = BTreeMap::new();
        for (task, since_ns) in tasks {
            by_node.entry(task.node).or_default().push((task, since_ns));
        }
        let mut opening = Vec::new();
        for (node, tasks) in &by_node {
            for some in tasks.chunks(LOGS_TASKS_MAX) {
                opening.push(self.open_one(*node, some, tail));
            }
        }
        join_all(opening).await
    }

    async fn open_one(&self, node: NodeId, tasks: &[(Placed, i64)], tail: Option<u64>) -> Source {
        let request = LogsRequest {
            tasks: tasks.iter().map(|(task, since_ns)| (task.task, *since_ns)).collect(),
            tail,
            stdout: self.wanted.stdout,
            stderr: self.wanted.stderr,
            follow: self.wanted.follow,
        };
        let (output, failed) = match self.backend.task_logs(node, request).await {
            Ok(output) => (output, None),
            Err(error) => (mpsc::channel(1).1, Some(error.message)),
        };
        let tasks = tasks.iter().map(|(task, _)| *task).collect();
        Source { tasks, output, waiting: VecDeque::new(), caught_up: failed.is_some(), failed }
    }

    /// Tells what there is, in the order of its times.
    async fn told_so_far(
        &self,
        sources: &mut [Source],
        next: &mut BTreeMap<TaskId, i64>,
    ) -> Result<(), Gone> {
        let mut lines = Vec::new();
        loop {
            // Nobody's first line is known to be the first of all before everybody has one.
            for source in &mut *sources {
                while source.waiting.is_empty() && !source.caught_up {
                    if !lines.is_empty() {
                        self.out.lines(&std::mem::take(&mut lines)).await?;
                    }
                    source.next().await;
                }
            }
            let firsts = sources.iter_mut().filter(|source| !source.waiting.is_empty());
            let first = firsts.min_by_key(|source| source.waiting.front().map(|line| line.at_ns));
            let Some(line) = first.and_then(|source| source.waiting.pop_front()) else { break };
            next.insert(line.task, line.at_ns.saturating_add(1));
            lines.push(line);
            if lines.len() >= 256 {
                self.out.lines(&std::mem::take(&mut lines)).await?;
            }
        }
        if lines.is_empty() { Ok(()) } else { self.out.lines(&lines).await }
    }

    async fn follow(
        &mut self,
        sources: Vec<Source>,
        next: BTreeMap<TaskId, i64>,
    ) -> Result<(), Gone> {
        let (sender, mut news) = mpsc::channel(16);
        let mut followed: BTreeMap<TaskId, Followed> = BTreeMap::new();
        for source in sources {
            for task in &source.tasks {
                let next_ns = next.get(&task.task).copied().unwrap_or(self.wanted.since_ns);
                followed.insert(task.task, Followed { next_ns, open: true, done: false });
            }
            tokio::spawn(forward(source, sender.clone()));
        }
        let mut looks = interval(LOOK);
        loop {
            tokio::select! {
                Some(new) = news.recv() => match new {
                    Followable::Lines(lines) => {
                        for line in &lines {
                            if let Some(known) = followed.get_mut(&line.task) {
                                known.next_ns = line.at_ns.saturating_add(1);
                            }
                        }
                        self.out.lines(&lines).await?;
                    }
                    Followable::End(tasks, broke) => {
                        for task in tasks {
                            if let Some(known) = followed.get_mut(&task.task) {
                                known.open = false;
                                known.done = task.ended && !broke;
                            }
                        }
                    }
                },
                _ = looks.tick() => {
                    let target = self.target;
                    // Without a leader it goes on with what it has.
                    let Ok((tasks, over)) = read(&self.backend, |store| {
                        (placed(store, target), target.is_over(store))
                    }) else { continue };
                    let wanted = |task: &Placed| {
                        followed.get(&task.task).is_none_or(|known| !known.open && !known.done)
                    };
                    let new: Vec<Placed> = tasks.into_iter().filter(wanted).collect();
                    let open = followed.values().any(|known| known.open);
                    if over && !open && new.is_empty() {
                        return Ok(());
                    }
                    self.out.know(&new);
                    let mut asked = Vec::new();
                    for task in new {
                        let known = followed.entry(task.task).or_insert(Followed {
                            next_ns: self.wanted.since_ns, open: true, done: false,
                        });
                        known.open = true;
                        asked.push((task, known.next_ns));
                    }
                    for source in self.open(asked, None).await {
                        tokio::spawn(forward(source, sender.clone()));
                    }
                }
            }
        }
    }
}

/// Passes on what comes of a source until it ends.
async fn forward(mut source: Source, news: mpsc::Sender<Followable>) {
    loop {
        let lines = Vec::from(std::mem::take(&mut source.waiting));
        if !lines.is_empty() && news.send(Followable::Lines(lines)).await.is_err() {
            return;
        }
        let more = tokio::select! {
            more = source.next() => more,
            () = news.closed() => return,
        };
        if !more && source.waiting.is_empty() {
            break;
        }
    }
    let _ = news.send(Followable::End(source.tasks, source.failed.is_some())).await;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_unix_seconds_with_nanoseconds() {
        assert_eq!(unix_ns("1795218673"), Some(1_795_218_673_000_000_000));
        assert_eq!(unix_ns("1.000000250"), Some(1_000_000_250));
        assert_eq!(unix_ns("1.5"), Some(1_500_000_000));
        for bad in ["x", "", "1.x", "1.0000000001", "99999999999999", "1.-5", "--1", "1e3"] {
            assert_eq!(unix_ns(bad), None, "{bad}");
        }
    }

    #[test]
    fn frames_are_dockers() {
        let mut out = BytesMut::new();
        frame(&mut out, STDERR, b"hi\n");
        assert_eq!(&out[..], b"\x02\0\0\0\0\0\0\x03hi\n");
    }

    proptest! {
        #[test]
        fn no_time_panics(text in ".{0,40}") {
            let _ = unix_ns(&text);
        }

        #[test]
        fn all_written_times_are_read(
            seconds in 0i64..4_000_000_000, nanos in 0i64..1_000_000_000,
        ) {
            prop_assert_eq!(
                unix_ns(&format!("{seconds}.{nanos:09}")),
                Some(seconds * 1_000_000_000 + nanos)
            );
        }
    }
}
