//! `meshctl service logs`.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use http::StatusCode;
use http_body_util::BodyExt as _;
use mesh_api::{Node, Service, Task};

use super::spec_of;
use crate::{
    client::{Client, Refused, escape},
    output::short,
    since::since,
};

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on with what is new, from tasks that come later too
    #[arg(short, long)]
    follow: bool,
    /// Of what is there, only so many last lines of each task
    #[arg(short = 'n', long, default_value = "all", value_name = "N", value_parser = tail)]
    tail: String,
    /// Only what is newer: a time, or a duration like 10m for how long ago
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<String>,
    /// Each line with its time
    #[arg(short, long)]
    timestamps: bool,
    /// The lines as they are, without saying whose
    #[arg(long)]
    raw: bool,
    /// Each line with the ids of its node, service and task
    #[arg(long)]
    details: bool,
    /// Ids of services and nodes instead of their names
    #[arg(long)]
    no_resolve: bool,
    /// Tasks without their ids
    #[arg(long)]
    no_task_ids: bool,
    /// Whole ids
    #[arg(long)]
    no_trunc: bool,
    /// A service, or a task: its id, its name, or `SERVICE.SLOT`
    #[arg(value_name = "SERVICE|TASK")]
    target: String,
}

fn tail(text: &str) -> Result<String, String> {
    if text == "all" || text.parse::<u64>().is_ok() {
        Ok(text.to_owned())
    } else {
        Err(format!("`{text}` is no number of lines: use a number, or `all`"))
    }
}

pub(super) async fn run(client: &Client, args: LogsArgs) -> Result<()> {
    let target = escape(&args.target);
    let service = client.get::<Service>(&format!("/services/{target}?insertDefaults=false")).await;
    let (kind, width) = match service {
        Ok(service) => ("services", width(&spec_of(&service)?.mode)),
        Err(err) if is_missing(&err) => {
            let task = client.get::<Task>(&format!("/tasks/{target}")).await;
            if let Err(err) = task {
                if is_missing(&err) {
                    bail!("no such task or service: {}", args.target);
                }
                return Err(err);
            }
            ("tasks", 0)
        }
        Err(err) => return Err(err),
    };
    let query = [
        ("stdout", "1"),
        ("stderr", "1"),
        ("tail", args.tail.as_str()),
        ("since", args.since.as_deref().unwrap_or_default()),
        ("follow", if args.follow { "1" } else { "" }),
        ("timestamps", if args.timestamps { "1" } else { "" }),
        ("details", if args.raw { "" } else { "1" }),
    ];
    let query = query.iter().filter(|(_, value)| !value.is_empty());
    let query: Vec<String> = query.map(|(key, value)| format!("{key}={value}")).collect();
    let mut body = client.stream(&format!("/{kind}/{target}/logs?{}", query.join("&"))).await?;
    let mut printer = Printer { client, args: &args, width, names: BTreeMap::new() };
    let mut frames = Frames::default();
    while let Some(part) = body.frame().await {
        let part = part.context("the stream of the daemon broke")?;
        if let Some(data) = part.data_ref() {
            frames.push(data);
        }
        while let Some((stream, payload)) = frames.next() {
            printer.print(stream, &payload).await?;
        }
    }
    Ok(())
}

fn is_missing(err: &anyhow::Error) -> bool {
    err.downcast_ref::<Refused>().is_some_and(|refused| refused.status == StatusCode::NOT_FOUND)
}

/// Digits of the highest slot, so that lines stand under each other.
fn width(mode: &mesh_api::ServiceMode) -> usize {
    let replicas = mode.replicated.as_ref().and_then(|mode| mode.replicas);
    replicas.map_or(0, |replicas| replicas.to_string().len())
}

/// Splits Docker's frames off what comes: stream, three zeros, length, payload.
#[derive(Debug, Default)]
struct Frames(Vec<u8>);

impl Frames {
    fn push(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
    }

    fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        let [stream, _, _, _, length @ ..] = *self.0.first_chunk::<8>()?;
        let end = 8 + usize::try_from(u32::from_be_bytes(length)).ok()?;
        let payload = self.0.get(8..end)?.to_vec();
        self.0.drain(..end);
        Some((stream, payload))
    }
}

struct Printer<'a> {
    client: &'a Client,
    args: &'a LogsArgs,
    width: usize,
    /// What stands before a task's lines, by its ids as the daemon tells them.
    names: BTreeMap<String, String>,
}

impl Printer<'_> {
    async fn print(&mut self, stream: u8, payload: &[u8]) -> Result<()> {
        if stream > 2 {
            bail!("error from daemon in stream: {}", String::from_utf8_lossy(payload).trim_end());
        }
        let line = if self.args.raw { payload.to_vec() } else { self.attributed(payload).await? };
        let written = if stream == 2 {
            write(&mut io::stderr().lock(), &line)
        } else {
            write(&mut io::stdout().lock(), &line)
        };
        match written {
            // Whoever read it has gone, as `head` does.
            Err(err) if err.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            other => other.context("cannot print"),
        }
    }

    /// `[time ]ids text` as `[time ]web.1.id@node    | [ids ]text`.
    async fn attributed(&mut self, payload: &[u8]) -> Result<Vec<u8>> {
        let (time, rest) = if self.args.timestamps { word(payload)? } else { (&[][..], payload) };
        let (ids, text) = word(rest)?;
        let ids = String::from_utf8_lossy(ids).into_owned();
        if !self.names.contains_key(&ids) {
            let name = self.name(&ids).await?;
            self.names.insert(ids.clone(), name);
        }
        let mut line = Vec::new();
        if !time.is_empty() {
            line.extend_from_slice(time);
            line.push(b' ');
        }
        line.extend_from_slice(self.names.get(&ids).map_or("", String::as_str).as_bytes());
        line.extend_from_slice(b"    | ");
        if self.args.details {
            line.extend_from_slice(ids.as_bytes());
            line.push(b' ');
        }
        line.extend_from_slice(text);
        Ok(line)
    }

    async fn name(&self, ids: &str) -> Result<String> {
        let id = |kind: &str| {
            let key = format!("com.docker.swarm.{kind}.id=");
            let found = ids.split(',').find_map(|pair| pair.strip_prefix(&key));
            found.with_context(|| format!("the daemon does not say whose a line is: missing {key}"))
        };
        let (node, service, task) = (id("node")?, id("service")?, id("task")?);
        // What is gone meanwhile goes by its id.
        let known: Option<Task> = self.client.get(&format!("/tasks/{task}")).await.ok();
        let slot = known.and_then(|task| task.slot);
        let (mut service_name, mut node_name) = (service.to_owned(), node.to_owned());
        if !self.args.no_resolve {
            if let Ok(service) = self.client.get(&format!("/services/{service}")).await {
                service_name = spec_of(&service)?.name;
            }
            if let Ok(node) = self.client.get::<Node>(&format!("/nodes/{node}")).await {
                node_name = node.description.hostname;
            }
        }
        let place = slot.map_or_else(|| node_name.clone(), |slot| slot.to_string());
        let padding = " ".repeat(self.width.saturating_sub(place.len()));
        let id = match (self.args.no_task_ids, self.args.no_trunc) {
            (true, _) => String::new(),
            (false, true) => format!(".{task}"),
            (false, false) => format!(".{}", short(task)),
        };
        Ok(format!("{service_name}.{place}{id}@{node_name}{padding}"))
    }
}

fn word(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == b' ');
    let end = end.context("a line of the daemon is not understood: is it another version?")?;
    Ok((&bytes[..end], &bytes[end + 1..]))
}

fn write(out: &mut impl Write, line: &[u8]) -> io::Result<()> {
    out.write_all(line)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_whole_however_they_come() {
        let wire = b"\x01\0\0\0\0\0\0\x02a\n\x02\0\0\0\0\0\0\x00\x01\0\0\0\0\0\0\x01b";
        for cut in 0..wire.len() {
            let (mut frames, mut found) = (Frames::default(), Vec::new());
            for part in [&wire[..cut], &wire[cut..]] {
                frames.push(part);
                while let Some(frame) = frames.next() {
                    found.push(frame);
                }
            }
            let expected = [(1, b"a\n".to_vec()), (2, Vec::new()), (1, b"b".to_vec())];
            assert_eq!(found, expected, "cut at {cut}");
        }
    }

    #[test]
    fn a_tail_is_a_number_or_all() {
        assert!(tail("all").is_ok() && tail("0").is_ok());
        assert!(tail("-1").is_err() && tail("some").is_err());
    }

    #[test]
    fn lines_stand_under_each_other() {
        let replicas = |n| mesh_api::ServiceMode {
            replicated: Some(mesh_api::ReplicatedMode { replicas: Some(n) }),
            global: None,
        };
        assert_eq!(width(&replicas(9)), 1);
        assert_eq!(width(&replicas(10)), 2);
    }
}
