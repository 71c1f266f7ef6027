//! The output of tasks: on their node between the files and the wire, on the manager between the
//! wire and the API.

use std::time::Duration;

use mesh_executor::logs::{LogEntry, LogReader, LogWanted, MergedLogs};
use mesh_types::TaskId;
use tokio::sync::mpsc;

use crate::{
    agent::{AgentHandle, AgentView},
    rpc::{
        frames::{FrameReader, FrameWriter},
        messages::{LOGS_TASKS_MAX, LogLine, LogsOutput, LogsRequest},
    },
};

/// Text of one message, in bytes.
const BATCH: usize = 64 << 10;
/// How often files that somebody follows are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// On the tasks' node.
///
/// # Errors
/// Why it cannot go on, for people.
pub(crate) async fn serve(
    agent: &AgentHandle,
    request: &LogsRequest,
    output: &FrameWriter<LogsOutput>,
) -> Result<(), String> {
    if request.tasks.len() > LOGS_TASKS_MAX {
        return Err(format!("output of at most {LOGS_TASKS_MAX} tasks is told at a time"));
    }
    let mut files = Vec::new();
    for (task, since_ns) in &request.tasks {
        let (since_ns, tail) = (*since_ns, request.tail);
        let wanted = LogWanted { stdout: request.stdout, stderr: request.stderr, since_ns, tail };
        files.push((*task, agent.logs(*task), wanted));
    }
    let mut logs = blocking(move || {
        let mut logs = MergedLogs::new();
        for (task, paths, wanted) in files {
            logs.add(task, LogReader::open(paths, wanted)?);
        }
        Ok(logs)
    })
    .await?;
    let mut told = false;
    loop {
        // Looked at before the files: what a task wrote before it ended is read then.
        let view = agent.snapshot();
        let read;
        (logs, read) = blocking(move || {
            let read = logs.read(BATCH)?;
            Ok((logs, read))
        })
        .await?;
        if !read.is_empty() {
            let lines = read.into_iter().map(line).collect();
            if output.send(&LogsOutput::Lines(lines)).await.is_err() {
                return Ok(());
            }
            continue;
        }
        if !std::mem::replace(&mut told, true) && output.send(&LogsOutput::Now).await.is_err() {
            return Ok(());
        }
        logs.retain(|task| may_write(&view, task));
        if !request.follow || logs.is_empty() {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = output.closed() => return Ok(()),
        }
    }
}

/// Whether a task of this node may still write something.
fn may_write(view: &AgentView, task: TaskId) -> bool {
    view.tasks.get(&task).is_some_and(|task| !task.status.state.is_final())
}

fn line((task, entry): (TaskId, LogEntry)) -> LogLine {
    let LogEntry { stderr, at_ns, text } = entry;
    LogLine { task, stderr, at_ns, text: text.into() }
}

/// Files may be on a slow disk: their reader must not hold up the runtime.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other).flatten();
    done.map_err(|error| format!("its output cannot be read: {error}"))
}

/// On the manager: the wire as a channel. Whatever breaks becomes the last message.
pub(crate) fn bridge(mut reader: FrameReader<LogsOutput>) -> mpsc::Receiver<LogsOutput> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                message = reader.next() => message,
                // Dropping the reader tells the node that nobody listens.
                () = sender.closed() => return,
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) => LogsOutput::Failed(error.to_string()),
            };
            let last = matches!(message, LogsOutput::Failed(_));
            if sender.send(message).await.is_err() || last {
                return;
            }
        }
    });
    receiver
}
