//! `meshctl node`.

use anyhow::Result;
use clap::{Args, Subcommand};
use mesh_api::{Info, Node, NodeStats};

use crate::{
    client::{Client, escape, filter_query},
    output::{Format, InspectFormat, Table, for_each, natural, objects, say, title},
    service::{inspect_all, key_values},
    swarm::Availability,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List nodes
    #[command(alias = "list")]
    Ls(ListArgs),
    /// Show all that is known of nodes
    Inspect {
        /// Names or ids; `self` is the node that is asked
        #[arg(required = true)]
        nodes: Vec<String>,
        #[command(flatten)]
        format: InspectFormat,
    },
    /// Show the data plane's counters of a node, with the reason of each drop
    Stats {
        /// Name or id; the node that is asked if not given
        node: Option<String>,
        /// Only counters that are not zero
        #[arg(long)]
        nonzero: bool,
        /// How to print
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Change a node's availability or labels
    Update(UpdateArgs),
    /// Remove nodes that are down from the cluster
    #[command(alias = "remove")]
    Rm {
        /// Names or ids
        #[arg(required = true)]
        nodes: Vec<String>,
        /// Even nodes that are not down
        #[arg(short, long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// `id=`, `name=`, `role=`, `label=` (may be repeated)
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Whether it takes tasks
    #[arg(long, value_enum)]
    availability: Option<Availability>,
    /// Add or replace a label (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    label_add: Vec<String>,
    /// Remove a label (may be repeated)
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
    /// Name or id
    node: String,
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "ID"),
    ("HOSTNAME", "Hostname"),
    ("STATUS", "Status"),
    ("AVAILABILITY", "Availability"),
    ("MANAGER STATUS", "ManagerStatus"),
    ("ENGINE VERSION", "EngineVersion"),
];

pub(crate) async fn run(client: &Client, command: Command) -> Result<()> {
    match command {
        Command::Ls(args) => list(client, args).await,
        Command::Inspect { nodes, format } => inspect(client, nodes, &format).await,
        Command::Stats { node, nonzero, format } => stats(client, node, nonzero, format).await,
        Command::Update(args) => update(client, args).await,
        Command::Rm { nodes, force } => {
            let query = if force { "?force=1" } else { "" };
            for_each(&nodes, async |node| {
                client.delete(&format!("/nodes/{}{query}", escape(&node))).await?;
                say(node)
            })
            .await
        }
    }
}

async fn list(client: &Client, args: ListArgs) -> Result<()> {
    let query = filter_query(&args.filter)?;
    let mut nodes: Vec<Node> = client.get(&format!("/nodes?{query}")).await?;
    nodes.sort_by_key(|node| natural(&node.description.hostname));
    if args.quiet {
        return nodes.iter().try_for_each(|node| say(&node.id));
    }
    let info: Info = client.get("/info").await?;
    let mut table = Table::new(COLUMNS);
    for node in nodes {
        let mark =
            if args.format == Format::Table && node.id == info.swarm.node_id { " *" } else { "" };
        let manager = node.manager_status.map(|status| match status.leader {
            true => "Leader".to_owned(),
            false => title(&status.reachability),
        });
        table.row(vec![
            format!("{}{mark}", node.id),
            node.description.hostname,
            title(&node.status.state),
            title(&node.spec.availability),
            manager.unwrap_or_default(),
            node.description.engine.engine_version,
        ]);
    }
    table.print(args.format)
}

async fn inspect(client: &Client, nodes: Vec<String>, format: &InspectFormat) -> Result<()> {
    let mut names = Vec::new();
    for node in nodes {
        if node == "self" {
            let info: Info = client.get("/info").await?;
            names.push(info.swarm.node_id);
        } else {
            names.push(node);
        }
    }
    let (found, failed) = inspect_all(client, &names, |name| format!("/nodes/{name}")).await;
    objects(&found, format)?;
    failed
}

async fn stats(client: &Client, node: Option<String>, nonzero: bool, format: Format) -> Result<()> {
    let query = node.map(|node| format!("?node={}", escape(&node))).unwrap_or_default();
    let mut stats: NodeStats = client.get(&format!("/mesh/node/stats{query}")).await?;
    stats.counters.retain(|counter| !nonzero || counter.value > 0);
    let mut table = Table::new(&[("COUNTER", "Counter"), ("KIND", "Kind"), ("VALUE", "Value")]);
    if format == Format::Json {
        return stats.counters.iter().try_for_each(|counter| {
            let line = serde_json::json!({
                "Node": stats.hostname, "Counter": counter.name,
                "Kind": kind(counter.drop), "Value": counter.value,
            });
            say(line.to_string())
        });
    }
    for counter in stats.counters {
        table.row(vec![counter.name, kind(counter.drop).into(), counter.value.to_string()]);
    }
    table.print(format)
}

fn kind(drop: bool) -> &'static str {
    if drop { "drop" } else { "count" }
}

async fn update(client: &Client, args: UpdateArgs) -> Result<()> {
    let node: Node = client.get(&format!("/nodes/{}", escape(&args.node))).await?;
    let mut spec = node.spec;
    if let Some(availability) = args.availability {
        spec.availability = availability.word().into();
    }
    spec.labels.retain(|key, _| !args.label_rm.contains(key));
    spec.labels.extend(key_values(&args.label_add));
    let path = format!("/nodes/{}/update?version={}", node.id, node.version.index);
    client.tell(&path, Some(&spec)).await?;
    say(args.node)
}
