//! `meshctl version` and `meshctl info`.

use anyhow::Result;
use clap::Args;
use mesh_api::{Status, VersionInfo};
use serde_json::{Value, json};

use crate::{
    client::Client,
    output::{ObjectFormat, object, say},
};

/// The flag of verbs that show one thing.
#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// `json`, or a Go template, instead of text
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<ObjectFormat>,
}

pub(crate) async fn version(client: &Client, args: FormatArgs) -> Result<()> {
    let own = env!("CARGO_PKG_VERSION");
    let (major, minor) = mesh_api::API_VERSION;
    let server: Result<VersionInfo> = client.get("/version").await;
    if let Some(format) = &args.format {
        let known = server.as_ref().ok().map(serde_json::to_value).transpose()?;
        let client = json!({"Version": own, "ApiVersion": format!("{major}.{minor}")});
        object(&json!({"Client": client, "Server": known}), format)?;
        return server.map(drop);
    }
    say(format!("Client:\n Version:       {own}\n API version:   {major}.{minor}\n"))?;
    let server = server?;
    say(format!(
        "Server:\n Version:       {}\n API version:   {} (minimum version {})\n \
         OS/Arch:       {}/{}\n Kernel:        {}",
        server.version,
        server.api_version,
        server.min_api_version,
        server.os,
        server.arch,
        server.kernel_version
    ))
}

pub(crate) async fn info(client: &Client, args: FormatArgs) -> Result<()> {
    let full: Value = client.get("/info").await?;
    if let Some(format) = &args.format {
        return object(&full, format);
    }
    let info: mesh_api::Info = serde_json::from_value(full)?;
    let mut lines = vec![
        format!("Name: {}", info.name),
        format!("Server Version: {}", info.server_version),
        format!("Kernel Version: {}", info.kernel_version),
        format!("Operating System: {}", info.operating_system),
        format!("Architecture: {}", info.architecture),
        format!("CPUs: {}", info.ncpu),
        format!("Total Memory: {:.2} GiB", info.mem_total as f64 / f64::from(1 << 30)),
        format!("State Directory: {}", info.docker_root_dir),
        format!("Tasks Running: {}", info.containers_running),
        format!("Swarm: {}", info.swarm.local_node_state),
    ];
    if !info.swarm.error.is_empty() {
        lines.push(format!(" Error: {}", info.swarm.error));
    }
    if !info.swarm.node_id.is_empty() {
        lines.push(format!(" NodeID: {}", info.swarm.node_id));
        lines.push(format!(" Is Manager: {}", info.swarm.control_available));
        lines.push(format!(" Node Address: {}", info.swarm.node_addr));
    }
    if let (Some(managers), Some(nodes)) = (info.swarm.managers, info.swarm.nodes) {
        let status: Status = client.get("/mesh/status").await?;
        lines.push(format!(" ClusterID: {}", status.cluster_id));
        lines.push(format!(" Managers: {managers}"));
        lines.push(format!(" Nodes: {nodes}"));
        lines.push(format!(" Leader: {}", status.leader_id));
        lines.push(format!(" Revision: {}", status.revision));
    }
    lines.push(" Manager Addresses:".to_owned());
    let managers = info.swarm.remote_managers.unwrap_or_default();
    if managers.is_empty() {
        lines.pop();
    }
    lines.extend(managers.iter().map(|manager| format!("  {}", manager.addr)));
    say(lines.join("\n"))
}
