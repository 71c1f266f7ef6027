//! `/tasks`.

use serde::{Deserialize, Serialize};

use crate::{IpamConfig, Map, TaskTemplate, Version, is_default};

/// A task.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct Task {
    #[serde(rename = "ID")]
    pub id: String,
    pub version: Version,
    pub created_at: String,
    pub updated_at: String,
    pub labels: Map,
    pub spec: TaskTemplate,
    #[serde(rename = "ServiceID")]
    pub service_id: String,
    /// Absent for global services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u64>,
    /// Absent while no node is chosen.
    #[serde(rename = "NodeID", skip_serializing_if = "is_default")]
    pub node_id: String,
    pub status: TaskStatus,
    pub desired_state: String,
    /// Docker's spelling.
    #[serde(rename = "NetworksAttachments")]
    pub networks_attachments: Vec<NetworkAttachment>,
}

/// How far a task is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct TaskStatus {
    pub timestamp: String,
    pub state: String,
    pub message: String,
    #[serde(skip_serializing_if = "is_default")]
    pub err: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_status: Option<ContainerStatus>,
    /// `{}`: ports published on one node alone do not exist yet.
    pub port_status: Map,
}

/// The process of a task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct ContainerStatus {
    #[serde(rename = "ContainerID")]
    pub container_id: String,
    #[serde(rename = "PID")]
    pub pid: u32,
    pub exit_code: i32,
}

/// An interface of a task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetworkAttachment {
    /// Which network.
    pub network: NetworkRef,
    /// With prefix lengths.
    pub addresses: Vec<String>,
}

/// A network as a task refers to it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct NetworkRef {
    #[serde(rename = "ID")]
    pub id: String,
    pub version: Version,
    pub created_at: String,
    pub updated_at: String,
    pub spec: NetworkRefSpec,
    #[serde(rename = "IPAMOptions")]
    pub ipam_options: IpamOptions,
}

/// See [`NetworkRef`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct NetworkRefSpec {
    pub name: String,
    pub labels: Map,
    /// `{"Name":"overlay"}`.
    pub driver_configuration: Map,
    #[serde(skip_serializing_if = "is_default")]
    pub internal: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub attachable: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub ingress: bool,
    pub scope: String,
}

/// See [`NetworkRef`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct IpamOptions {
    pub configs: Vec<IpamConfig>,
}
