//! What a member keeps on disk besides its identity, so that it goes on without any manager: how it
//! is reached, whom it knows, and the records that it holds.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context, Result};
use mesh_control::model::GossipKeys;
use mesh_executor::contract::write_atomic;
use mesh_types::record::RecordSet;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::rpc::messages::ManagerAddress;

/// How a member is reached and whom it knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// The advertised address with the managers' port.
    pub(crate) address: SocketAddr,
    /// Where its tunnels end.
    pub(crate) vtep: IpAddr,
    /// VXLAN's UDP port in this cluster.
    pub(crate) data_path_port: u16,
    /// Those of gossip.
    #[serde(flatten)]
    pub(crate) gossip: GossipKeys,
    /// The roots that the cluster trusts, PEM, as last heard; the last one signs.
    #[serde(default)]
    pub(crate) roots: Vec<String>,
    /// The managers, as last heard.
    pub(crate) managers: Vec<ManagerAddress>,
}

const SETTINGS: &str = "member.json";
const RECORDS: &str = "records.msgpack";

/// Reads the settings.
pub(crate) fn settings(dir: &Path) -> Result<Settings> {
    let path = dir.join(SETTINGS);
    let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
}

/// Keeps the settings.
pub(crate) fn save_settings(dir: &Path, settings: &Settings) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(settings)?;
    save(dir, SETTINGS, &bytes)
}

/// Reads the records; none if there are none, or if they cannot be read: a manager sends them anew.
pub(crate) fn records(dir: &Path) -> RecordSet {
    read_msgpack(&dir.join(RECORDS)).unwrap_or_default()
}

/// Keeps the records.
pub(crate) fn save_records(dir: &Path, records: &RecordSet) -> Result<()> {
    save(dir, RECORDS, &rmp_serde::to_vec_named(records)?)
}

/// Forgets all of it.
pub(crate) fn remove(dir: &Path) -> io::Result<()> {
    for file in [SETTINGS, RECORDS] {
        match fs::remove_file(dir.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn save(dir: &Path, file: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(file);
    write_atomic(&path, bytes).with_context(|| format!("writing {}", path.display()))
}

fn read_msgpack<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    match rmp_serde::from_slice(&bytes) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "kept state cannot be read; starting without");
            None
        }
    }
}
