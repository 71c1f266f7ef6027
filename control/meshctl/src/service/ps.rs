//! `meshctl service ps`.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use clap::Args;
use jiff::Timestamp;
use mesh_api::{Node, Service, Task};

use super::{image_name, spec_of};
use crate::{
    client::{Client, escape},
    output::{ListArgs, Table, ago, error_text, natural, say, short, title},
};

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    #[command(flatten)]
    list: TaskListArgs,
    /// Names or ids
    #[arg(required = true)]
    services: Vec<String>,
}

/// How tasks are listed.
#[derive(Debug, Args)]
pub(crate) struct TaskListArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Print ids of nodes and services instead of their names
    #[arg(long)]
    no_resolve: bool,
}

pub(crate) const COLUMNS: &[(&str, &str)] = &[
    ("ID", "ID"),
    ("NAME", "Name"),
    ("IMAGE", "Image"),
    ("NODE", "Node"),
    ("DESIRED STATE", "DesiredState"),
    ("CURRENT STATE", "CurrentState"),
    ("ERROR", "Error"),
    ("PORTS", "Ports"),
];
pub(crate) const FILTERS: &[&str] =
    &["desired-state", "id", "label", "name", "node", "runtime", "service"];
/// Errors longer than this are cut unless `--no-trunc` is given.
const ERROR_LEN: usize = 30;

pub(super) async fn run(client: &Client, args: PsArgs) -> Result<()> {
    let mut names = BTreeMap::new();
    let mut missing = None;
    for needle in &args.services {
        let path = format!("/services/{}?insertDefaults=false", escape(needle));
        match client.get::<Service>(&path).await {
            Ok(service) => {
                names.insert(service.id.clone(), spec_of(&service)?.name);
            }
            Err(err) => {
                eprintln!("{}", error_text(&err));
                missing = Some(needle);
            }
        }
    }
    if !names.is_empty() {
        let of = names.keys().map(|id| format!("service={id}"));
        print(client, &args.list, &names, of).await?;
    }
    match missing {
        Some(needle) => bail!("no such service: {needle}"),
        None => Ok(()),
    }
}

/// The tasks of nodes, of all their services.
pub(crate) async fn of_nodes(client: &Client, args: &TaskListArgs, nodes: &[String]) -> Result<()> {
    let services: Vec<Service> = client.get("/services").await?;
    let names = services
        .into_iter()
        .map(|service| Ok((service.id.clone(), spec_of(&service)?.name)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    print(client, args, &names, nodes.iter().map(|node| format!("node={node}"))).await
}

async fn print(
    client: &Client,
    args: &TaskListArgs,
    services: &BTreeMap<String, String>,
    of: impl Iterator<Item = String>,
) -> Result<()> {
    let query = args.list.query(FILTERS, of)?;
    let tasks: Vec<Task> = client.get(&format!("/tasks?{query}")).await?;
    let nodes: Vec<Node> = if args.no_resolve { Vec::new() } else { client.get("/nodes").await? };
    let nodes: BTreeMap<String, String> =
        nodes.into_iter().map(|node| (node.id, node.description.hostname)).collect();
    let nobody = BTreeMap::new();
    let services = if args.no_resolve { &nobody } else { services };
    let rows = ordered(tasks, services);
    let id = |task: &Task| if args.list.no_trunc { task.id.clone() } else { short(&task.id) };
    if args.list.ids_alone() {
        return rows.iter().try_for_each(|(_, task)| say(id(task)));
    }
    let now = Timestamp::now();
    let mut table = Table::new(COLUMNS);
    for (name, task) in &rows {
        let image = task.spec.container_spec.as_ref().map_or("", |container| &container.image);
        table.row(vec![
            id(task),
            name.clone(),
            image_name(image),
            nodes.get(&task.node_id).unwrap_or(&task.node_id).clone(),
            title(&task.desired_state),
            format!(
                "{} {} ago",
                title(&task.status.state),
                lower(&ago(&task.status.timestamp, now))
            ),
            error(&task.status.err, args.list.no_trunc),
            String::new(),
        ]);
    }
    table.print(&args.list.format)
}

/// `Running less than a second ago`, `Running about a minute ago`.
fn lower(words: &str) -> String {
    let mut letters = words.chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

fn error(err: &str, whole: bool) -> String {
    if err.is_empty() {
        return String::new();
    }
    if whole || err.chars().count() <= ERROR_LEN {
        return format!("\"{err}\"");
    }
    format!("\"{}…\"", err.chars().take(ERROR_LEN - 1).collect::<String>())
}

/// Tasks by service and slot, the newest of a slot first; its earlier ones are marked `\_`.
fn ordered(tasks: Vec<Task>, services: &BTreeMap<String, String>) -> Vec<(String, Task)> {
    let place = |task: &Task| {
        let service = services.get(&task.service_id).unwrap_or(&task.service_id);
        let slot = match task.slot {
            Some(slot) => slot.to_string(),
            // As in the stock CLI; the node's name has a column of its own.
            None => task.node_id.clone(),
        };
        format!("{service}.{slot}")
    };
    let mut rows: Vec<_> = tasks.into_iter().map(|task| (place(&task), task)).collect();
    rows.sort_by(|(a_place, a), (b_place, b)| {
        natural(a_place)
            .cmp(&natural(b_place))
            .then_with(|| b.created_at.cmp(&a.created_at))
            .then_with(|| a.desired_state.cmp(&b.desired_state))
    });
    let mut last = String::new();
    for (name, _) in &mut rows {
        if *name == last {
            *name = format!(" \\_ {name}");
        } else {
            last.clone_from(name);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slots_history_follows_its_newest_task() {
        let task = |slot, created: &str| Task {
            service_id: "s".into(),
            slot: Some(slot),
            created_at: created.into(),
            ..Task::default()
        };
        let tasks = vec![task(10, "2"), task(2, "1"), task(2, "3"), task(1, "1")];
        let services = BTreeMap::from([("s".to_owned(), "web".to_owned())]);
        let rows = ordered(tasks, &services);
        let shown: Vec<_> = rows.iter().map(|(name, t)| (&name[..], &t.created_at[..])).collect();
        let expected = [("web.1", "1"), ("web.2", "3"), (" \\_ web.2", "1"), ("web.10", "2")];
        assert_eq!(shown, expected);
    }

    #[test]
    fn errors_are_quoted_and_cut() {
        assert_eq!(error("", false), "");
        assert_eq!(error("task: non-zero exit (3)", false), "\"task: non-zero exit (3)\"");
        let long = "no suitable node (no node is ready)";
        assert_eq!(error(long, false), "\"no suitable node (no node is …\"");
        assert_eq!(error(long, true), format!("\"{long}\""));
    }
}
