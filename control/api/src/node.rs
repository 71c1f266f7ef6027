//! `/nodes`.

use serde::{Deserialize, Serialize};

use crate::{Map, Version, is_default};

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct Node {
    #[serde(rename = "ID")]
    pub id: String,
    pub version: Version,
    pub created_at: String,
    pub updated_at: String,
    pub spec: NodeSpec,
    pub description: NodeDescription,
    pub status: NodeStatus,
    /// Absent for workers: clients tell managers by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manager_status: Option<ManagerStatus>,
}

/// What the operator set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct NodeSpec {
    #[serde(skip_serializing_if = "is_default")]
    pub name: String,
    pub labels: Map,
    /// `worker` or `manager`.
    pub role: String,
    /// `active`, `pause` or `drain`.
    pub availability: String,
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct NodeDescription {
    pub hostname: String,
    pub platform: Platform,
    pub resources: Resources,
    pub engine: EngineDescription,
    #[serde(rename = "TLSInfo")]
    pub tls_info: TlsInfo,
}

/// See [`NodeDescription`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct Platform {
    pub architecture: String,
    #[serde(rename = "OS")]
    pub os: String,
}

/// See [`NodeDescription`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct Resources {
    #[serde(rename = "NanoCPUs")]
    pub nano_cpus: u64,
    pub memory_bytes: u64,
}

/// See [`NodeDescription`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct EngineDescription {
    pub engine_version: String,
    /// `{"Type":"Network","Name":"overlay"}`.
    pub plugins: Vec<Map>,
}

/// The cluster's root of trust.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TlsInfo {
    /// The root certificate, PEM.
    pub trust_root: String,
    /// Its subject: base64 of DER.
    pub cert_issuer_subject: String,
    /// Its public key: base64 of DER.
    pub cert_issuer_public_key: String,
}

/// Whether a node is alive.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeStatus {
    /// `unknown`, `down`, `ready` or `disconnected`.
    pub state: String,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "is_default")]
    pub message: String,
    /// The advertised address without its port.
    pub addr: String,
}

/// A manager's part in raft.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ManagerStatus {
    /// It leads. Told when false too, for templates of ours that ask.
    pub leader: bool,
    /// `unknown`, `unreachable` or `reachable`.
    pub reachability: String,
    /// Address and port for other managers.
    pub addr: String,
}
