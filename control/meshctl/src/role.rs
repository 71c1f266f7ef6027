//! `meshctl node promote` and `node demote`.

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::{
    client::{Client, escape},
    output::{for_each, say},
};

/// A node's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Holds the cluster's state too
    Manager,
    /// Runs tasks
    Worker,
}

impl Role {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::Worker => "worker",
        }
    }
}

/// Gives nodes a role, unless they have it.
pub(crate) async fn change(client: &Client, nodes: &[String], role: Role) -> Result<()> {
    for_each(nodes, async |node| {
        let path = format!("/nodes/{}", escape(&node));
        let now: Value = client.get(&path).await?;
        if now["Spec"]["Role"] == role.word() {
            return say(format!("Node {node} is already a {}.", role.word()));
        }
        client.modify("/nodes", &path, "", |spec| set(spec, role)).await?;
        say(match role {
            Role::Manager => format!("Node {node} promoted to a manager in the swarm."),
            Role::Worker => format!("Manager {node} demoted in the swarm."),
        })
    })
    .await
}

/// Puts a role into a spec.
fn set(spec: &mut Value, role: Role) -> Result<()> {
    let Some(fields) = spec.as_object_mut() else { bail!("the node has no spec") };
    fields.insert("Role".into(), json!(role.word()));
    Ok(())
}
