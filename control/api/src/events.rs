//! `GET /events`.

use serde::{Deserialize, Serialize};

use crate::Map;

/// Something that happened, one JSON line each.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct Event {
    /// `service`, `node`, `network` or `task`; `daemon` for what is about the stream itself.
    #[serde(rename = "Type")]
    pub kind: String,
    /// `create`, `update` or `remove`.
    pub action: String,
    pub actor: Actor,
    /// `swarm`, or `local` for the daemon's own.
    #[serde(rename = "scope")]
    pub scope: String,
    /// Unix seconds.
    #[serde(rename = "time")]
    pub time: i64,
    #[serde(rename = "timeNano")]
    pub time_nano: i64,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "the Engine API's own fields")]
pub struct Actor {
    #[serde(rename = "ID")]
    pub id: String,
    /// Its name, and what changed: `replicas.old`, `replicas.new`.
    pub attributes: Map,
}
