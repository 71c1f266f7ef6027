//! `meshctl node`.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use mesh_api::{Info, Node, NodeStats, TlsInfo};
use serde_json::{Value, json};

use crate::{
    client::{Client, escape},
    output::{
        self, Format, InspectFormat, ListArgs, Screen, Table, fields, for_each, natural, objects,
        say, title,
    },
    role::{self, Role},
    service::{
        inspect_all, key_values,
        ps::{self, TaskListArgs},
    },
    swarm::Availability,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List nodes
    #[command(alias = "list", after_help = fields(FILTERS, &[COLUMNS, MORE]))]
    Ls(ListArgs),
    /// Show all that is known of nodes
    Inspect {
        /// Names or ids; `self` is the node that is asked
        #[arg(required = true)]
        nodes: Vec<String>,
        /// For people
        #[arg(long, conflicts_with = "format")]
        pretty: bool,
        #[command(flatten)]
        format: InspectFormat,
    },
    /// Show the counters of a node's data plane and gossip, with the reason of each drop
    Stats {
        /// Name or id; the node that is asked if not given
        node: Option<String>,
        /// Only counters that are not zero
        #[arg(long)]
        nonzero: bool,
        /// `table`, `json` (an object per line), a Go template per line, or `table TEMPLATE`
        #[arg(long, default_value = "table", hide_default_value = true, value_name = "FORMAT")]
        format: Format,
    },
    /// Change a node's availability, role or labels
    Update(UpdateArgs),
    /// Make workers managers; their tasks run on
    Promote {
        /// Names or ids
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Make managers workers; their tasks run on
    Demote {
        /// Names or ids
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// List the tasks of nodes
    #[command(after_help = fields(ps::FILTERS, &[ps::COLUMNS]))]
    Ps {
        #[command(flatten)]
        list: TaskListArgs,
        /// Names or ids; `self`, or none: the node that is asked
        nodes: Vec<String>,
    },
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
pub(crate) struct UpdateArgs {
    /// Whether it takes tasks
    #[arg(long, value_enum)]
    availability: Option<Availability>,
    /// Whether it holds the cluster's state too
    #[arg(long, value_enum)]
    role: Option<Role>,
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
const MORE: &[(&str, &str)] = &[("TLS STATUS", "TLSStatus"), ("SELF", "Self")];
const FILTERS: &[&str] = &["id", "label", "membership", "name", "node.label", "role"];
const COUNTERS: &[(&str, &str)] = &[("COUNTER", "Counter"), ("KIND", "Kind"), ("VALUE", "Value")];

pub(crate) async fn run(client: &Client, command: Command) -> Result<()> {
    match command {
        Command::Ls(args) => list(client, args).await,
        Command::Inspect { nodes, pretty, format } => {
            let names = resolved(client, nodes).await?;
            let (found, failed) =
                inspect_all(client, &names, |name| format!("/nodes/{name}")).await;
            match pretty {
                true => output::pretty(&found, Screen::Node)?,
                false => objects(&found, &format)?,
            }
            failed
        }
        Command::Stats { node, nonzero, format } => stats(client, node, nonzero, format).await,
        Command::Update(args) => update(client, args).await,
        Command::Promote { nodes } => {
            role::change(client, &resolved(client, nodes).await?, Role::Manager).await
        }
        Command::Demote { nodes } => {
            role::change(client, &resolved(client, nodes).await?, Role::Worker).await
        }
        Command::Ps { list, mut nodes } => {
            if nodes.is_empty() {
                nodes.push("self".to_owned());
            }
            ps::of_nodes(client, &list, &resolved(client, nodes).await?).await
        }
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
    let query = args.query(FILTERS, std::iter::empty())?;
    let mut nodes: Vec<Node> = client.get(&format!("/nodes?{query}")).await?;
    nodes.sort_by_key(|node| natural(&node.description.hostname));
    if args.ids_alone() {
        return nodes.iter().try_for_each(|node| say(&node.id));
    }
    let info: Info = client.get("/info").await?;
    let trust = info.swarm.cluster.map(|cluster| cluster.tls_info).unwrap_or_default();
    let mut table = Table::with_more(COLUMNS, MORE);
    for node in nodes {
        let own = node.id == info.swarm.node_id;
        let mark = if own && args.format == Format::Table { " *" } else { "" };
        let manager = node.manager_status.map(|status| match status.leader {
            true => "Leader".to_owned(),
            false => title(&status.reachability),
        });
        table.values(vec![
            json!(format!("{}{mark}", node.id)),
            json!(node.description.hostname),
            json!(title(&node.status.state)),
            json!(title(&node.spec.availability)),
            json!(manager.unwrap_or_default()),
            json!(node.description.engine.engine_version),
            json!(tls_status(&node.description.tls_info, &trust)),
            json!(own),
        ]);
    }
    table.print(&args.format)
}

/// Whether a node trusts what its cluster does, in the stock CLI's words.
fn tls_status(node: &TlsInfo, cluster: &TlsInfo) -> &'static str {
    let unknown = TlsInfo::default();
    match () {
        () if *node == unknown || *cluster == unknown => "Unknown",
        () if node == cluster => "Ready",
        () => "Needs Rotation",
    }
}

/// With the id of the node that is asked in place of `self`.
async fn resolved(client: &Client, nodes: Vec<String>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for node in nodes {
        if node == "self" {
            let info: Info = client.get("/info").await?;
            names.push(info.swarm.node_id);
        } else {
            names.push(node);
        }
    }
    Ok(names)
}

async fn stats(client: &Client, node: Option<String>, nonzero: bool, format: Format) -> Result<()> {
    let query = node.map(|node| format!("?node={}", escape(&node))).unwrap_or_default();
    let mut stats: NodeStats = client.get(&format!("/mesh/node/stats{query}")).await?;
    stats.counters.retain(|counter| !nonzero || counter.value > 0);
    let mut table = Table::with_more(COUNTERS, &[("NODE", "Node")]);
    for counter in stats.counters {
        table.values(vec![
            json!(counter.name),
            json!(kind(counter.drop)),
            json!(counter.value),
            json!(stats.hostname),
        ]);
    }
    table.print(&format)
}

fn kind(drop: bool) -> &'static str {
    if drop { "drop" } else { "count" }
}

async fn update(client: &Client, args: UpdateArgs) -> Result<()> {
    let path = format!("/nodes/{}", escape(&args.node));
    client.modify("/nodes", &path, "", |spec| edit(spec, &args)).await?;
    say(args.node)
}

/// Makes of a spec what the flags say; fields unknown here survive.
fn edit(spec: &mut Value, args: &UpdateArgs) -> Result<()> {
    let Some(fields) = spec.as_object_mut() else { bail!("the node has no spec") };
    if let Some(availability) = args.availability {
        fields.insert("Availability".into(), json!(availability.word()));
    }
    if let Some(role) = args.role {
        fields.insert("Role".into(), json!(role.word()));
    }
    let labels = fields.entry("Labels").or_insert(Value::Null);
    if labels.is_null() {
        *labels = json!({});
    }
    let Some(labels) = labels.as_object_mut() else { bail!("the node's labels are no object") };
    for key in &args.label_rm {
        labels.remove(key);
    }
    labels.extend(key_values(&args.label_add).map(|(key, value)| (key, json!(value))));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_what_it_names_alone() {
        let args = UpdateArgs {
            availability: Some(Availability::Drain),
            role: Some(Role::Manager),
            label_add: vec!["zone=a".into(), "ssd".into()],
            label_rm: vec!["old".into(), "none".into()],
            node: "n1".into(),
        };
        let mut spec = json!({
            "Name": "x", "Role": "worker", "Availability": "active", "Unknown": [1],
            "Labels": {"old": "1", "kept": "2", "zone": "b"},
        });
        edit(&mut spec, &args).unwrap();
        let expected = json!({
            "Name": "x", "Role": "manager", "Availability": "drain", "Unknown": [1],
            "Labels": {"kept": "2", "zone": "a", "ssd": ""},
        });
        assert_eq!(spec, expected);
        let mut bare = json!({"Labels": null});
        edit(&mut bare, &args).unwrap();
        assert_eq!(bare["Labels"]["zone"], "a");
        assert!(edit(&mut Value::Null, &args).is_err());
    }
}
