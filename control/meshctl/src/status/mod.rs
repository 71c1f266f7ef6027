//! `meshctl status`: the cluster on one screen. What it says of what it has read is in `report`.

mod report;

use anyhow::Result;
use clap::Args;
use mesh_api::{Info, Network, Node, Service, Task};

use crate::{
    client::Client,
    output::{ObjectFormat, object, on_stdout, say},
};

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// `json`, or a Go template, instead of text
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<ObjectFormat>,
    /// Every node, service and network, however many there are
    #[arg(short, long)]
    all: bool,
}

pub(crate) async fn run(client: &Client, args: StatusArgs) -> Result<()> {
    let report = report::report(&read(client).await?);
    match &args.format {
        Some(format) => object(&report, format),
        None => say(report.text(args.all, on_stdout())),
    }
}

/// What there is to know. A worker knows of itself alone.
#[derive(Debug, Default)]
struct Seen {
    info: Info,
    nodes: Vec<Node>,
    services: Vec<Service>,
    networks: Vec<Network>,
    tasks: Vec<Task>,
}

async fn read(client: &Client) -> Result<Seen> {
    let info: Info = client.get("/info").await?;
    if !info.swarm.control_available {
        return Ok(Seen { info, ..Seen::default() });
    }
    Ok(Seen {
        nodes: client.get("/nodes").await?,
        services: client.get("/services?status=true").await?,
        networks: client.get("/networks").await?,
        tasks: client.get("/tasks").await?,
        info,
    })
}
