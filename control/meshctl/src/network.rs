//! `meshctl network`.

use std::io;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use mesh_api::{Ipam, IpamConfig, Network, NetworkCreate, NetworkCreated, NetworksPruned};

use crate::{
    client::{Client, NOTHING, escape, filter_query, is_missing},
    output::{InspectFormat, ListArgs, Table, fields, for_each, natural, objects, say, short},
    service::{inspect_all, key_values},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an overlay network
    Create(CreateArgs),
    /// List networks
    #[command(alias = "list", after_help = fields(FILTERS, &[COLUMNS, MORE]))]
    Ls(ListArgs),
    /// Show all that is known of networks
    Inspect {
        /// Names or ids
        #[arg(required = true)]
        networks: Vec<String>,
        /// With every service and task on them
        #[arg(short, long)]
        verbose: bool,
        #[command(flatten)]
        format: InspectFormat,
    },
    /// Remove all networks that nothing uses
    Prune {
        /// Only those that match: label=KEY, label!=KEY, or until=TIME for when they were made (may
        /// be repeated)
        #[arg(long, value_name = "KEY=VALUE")]
        filter: Vec<String>,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Remove networks
    #[command(alias = "remove")]
    Rm {
        /// Names or ids
        #[arg(required = true)]
        networks: Vec<String>,
        /// A network that does not exist is no error
        #[arg(short, long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Only overlay exists
    #[arg(short, long, default_value = "overlay")]
    driver: String,
    /// The subnet; leased from the cluster's pool if not given
    #[arg(long, default_value = "", hide_default_value = true, value_name = "CIDR")]
    subnet: String,
    /// The gateway inside the subnet; its first address if not given
    #[arg(long, default_value = "", hide_default_value = true, value_name = "IP")]
    gateway: String,
    /// Lease addresses from this part of the subnet only
    #[arg(long, default_value = "", hide_default_value = true, value_name = "CIDR")]
    ip_range: String,
    /// A driver option: `com.docker.network.driver.mtu=BYTES` (may be repeated)
    #[arg(short, long, value_name = "KEY=VALUE")]
    opt: Vec<String>,
    /// Plain containers and pods may attach
    #[arg(long)]
    attachable: bool,
    /// No way out of the network
    #[arg(long)]
    internal: bool,
    /// A label (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Its name
    name: String,
}

const COLUMNS: &[(&str, &str)] =
    &[("NETWORK ID", "ID"), ("NAME", "Name"), ("DRIVER", "Driver"), ("SCOPE", "Scope")];
const MORE: &[(&str, &str)] = &[
    ("CREATED AT", "CreatedAt"),
    ("INTERNAL", "Internal"),
    ("IPV4", "IPv4"),
    ("IPV6", "IPv6"),
    ("LABELS", "Labels"),
];
const FILTERS: &[&str] = &["dangling", "driver", "id", "label", "name", "scope", "type"];

pub(crate) async fn run(client: &Client, command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create(client, args).await,
        Command::Ls(args) => list(client, args).await,
        Command::Inspect { networks, verbose, format } => {
            let query = if verbose { "?verbose=true" } else { "" };
            let path = |name: &str| format!("/networks/{name}{query}");
            let (found, failed) = inspect_all(client, &networks, path).await;
            objects(&found, &format)?;
            failed
        }
        Command::Prune { filter, force } => prune(client, &filter, force).await,
        Command::Rm { networks, force } => {
            for_each(&networks, async |network| {
                match client.delete(&format!("/networks/{}", escape(&network))).await {
                    Err(err) if force && is_missing(&err) => Ok(()),
                    Err(err) => Err(err),
                    Ok(()) => say(network),
                }
            })
            .await
        }
    }
}

async fn create(client: &Client, args: CreateArgs) -> Result<()> {
    let config = IpamConfig {
        subnet: args.subnet,
        ip_range: args.ip_range,
        gateway: args.gateway,
        ..IpamConfig::default()
    };
    let config = if config == IpamConfig::default() { Vec::new() } else { vec![config] };
    let request = NetworkCreate {
        name: args.name,
        driver: args.driver,
        ipam: Ipam { driver: "default".into(), options: None, config },
        internal: args.internal,
        attachable: args.attachable,
        options: key_values(&args.opt).collect(),
        labels: key_values(&args.label).collect(),
        ..NetworkCreate::default()
    };
    let created: NetworkCreated = client.post("/networks/create", Some(&request)).await?;
    if !created.warning.is_empty() {
        eprintln!("{}", created.warning);
    }
    say(created.id)
}

async fn prune(client: &Client, filter: &[String], force: bool) -> Result<()> {
    let query = filter_query(filter)?;
    let question = "WARNING! This will remove all networks that nothing uses.\n\
                    Are you sure you want to continue? [y/N] ";
    if !force && !confirmed(question)? {
        bail!("nothing was removed");
    }
    let pruned: NetworksPruned = client.post(&format!("/networks/prune?{query}"), NOTHING).await?;
    if pruned.networks_deleted.is_empty() {
        return Ok(());
    }
    say(format!("Deleted Networks:\n{}\n", pruned.networks_deleted.join("\n")))
}

/// Whether who sits there says yes; the end of the input is a no.
fn confirmed(question: &str) -> Result<bool> {
    eprint!("{question}");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}

async fn list(client: &Client, args: ListArgs) -> Result<()> {
    let query = args.query(FILTERS, std::iter::empty())?;
    let mut networks: Vec<Network> = client.get(&format!("/networks?{query}")).await?;
    networks.sort_by_key(|network| natural(&network.name));
    let id = |network: &Network| {
        if args.no_trunc { network.id.clone() } else { short(&network.id) }
    };
    if args.ids_alone() {
        return networks.iter().try_for_each(|network| say(id(network)));
    }
    let mut table = Table::with_more(COLUMNS, MORE);
    for network in &networks {
        let labels: Vec<_> = network.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        // The stock CLI gives all of these as texts.
        let cells = [
            id(network),
            network.name.clone(),
            network.driver.clone(),
            network.scope.clone(),
            network.created.clone(),
            network.internal.to_string(),
            network.enable_ipv4.to_string(),
            network.enable_ipv6.to_string(),
            labels.join(","),
        ];
        table.labelled(cells.map(Into::into).into(), &network.labels);
    }
    table.print(&args.format)
}
