//! Forms the cluster of a lab through the API, as an operator would.

use std::{thread, time::Duration};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use crate::{
    host::{Places, wait_for},
    http,
    topology::{Member, Role},
};

/// The managers' port.
pub(crate) const MANAGER_PORT: u16 = 2377;
/// How long nodes may take to be Ready. The promise is 10 s; a loaded machine gets more.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// Makes a cluster of one on `first`.
pub(crate) fn init(places: &Places, first: &Member) -> Result<()> {
    let body = json!({
        "ListenAddr": format!("0.0.0.0:{MANAGER_PORT}"),
        "AdvertiseAddr": first.address.to_string(),
        "DataPathAddr": first.address.to_string(),
        "Spec": {},
    });
    http::call(&places.socket(&first.name), "POST", "/swarm/init", Some(&body))
        .with_context(|| format!("make a cluster on {}", first.name))?;
    Ok(())
}

/// Joins `nodes` to the cluster of `first`, all at once.
pub(crate) fn join(places: &Places, first: &Member, nodes: &[Member]) -> Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let swarm = http::call(&places.socket(&first.name), "GET", "/swarm", None)
        .with_context(|| format!("read the join tokens from {}", first.name))?;
    thread::scope(|scope| {
        let joins: Vec<_> = nodes
            .iter()
            .map(|node| scope.spawn(|| join_one(places, first, node, &swarm["JoinTokens"])))
            .collect();
        joins.into_iter().try_for_each(|j| j.join().map_err(|_| anyhow!("a join panicked"))?)
    })
}

fn join_one(places: &Places, first: &Member, node: &Member, tokens: &Value) -> Result<()> {
    let role = if node.role == Role::Manager { "Manager" } else { "Worker" };
    let body = json!({
        "ListenAddr": format!("0.0.0.0:{MANAGER_PORT}"),
        "AdvertiseAddr": node.address.to_string(),
        "DataPathAddr": node.address.to_string(),
        "RemoteAddrs": [format!("{}:{MANAGER_PORT}", first.address)],
        "JoinToken": tokens[role],
    });
    http::call(&places.socket(&node.name), "POST", "/swarm/join", Some(&body))
        .with_context(|| format!("join {} to the cluster of {}", node.name, first.name))?;
    Ok(())
}

/// A node of the cluster that `nodes` form whose word counts: a manager with a majority behind it.
pub(crate) fn find_manager<'a>(places: &Places, nodes: &'a [Member]) -> Option<&'a Member> {
    nodes.iter().find(|node| http::call(&places.socket(&node.name), "GET", "/nodes", None).is_ok())
}

/// Whether the node's daemon says that it is in a cluster.
pub(crate) fn is_in_one(places: &Places, node: &Member) -> bool {
    http::call(&places.socket(&node.name), "GET", "/info", None)
        .is_ok_and(|info| info["Swarm"]["LocalNodeState"] == "active")
}

/// Takes `node` out of the cluster that `manager` is of: it leaves if it can, then it is removed.
pub(crate) fn remove(places: &Places, manager: &Member, node: &Member, runs: bool) -> Result<()> {
    let id = id_of(places, manager, &node.name)?;
    if runs {
        http::call(&places.socket(&node.name), "POST", "/swarm/leave?force=true", None)
            .with_context(|| format!("make {} leave the cluster", node.name))?;
    }
    let Some(id) = id else { return Ok(()) };
    let path = format!("/nodes/{id}?force=true");
    let mut said = String::new();
    let removed =
        wait_for(&format!("{} to remove {}", manager.name, node.name), READY_DEADLINE, || {
            // While the quorum changes there may be no majority for a moment.
            if let Err(e) = http::call(&places.socket(&manager.name), "DELETE", &path, None) {
                said = format!("{e:#}");
            }
            Ok(matches!(id_of(places, manager, &node.name), Ok(None)))
        });
    removed.with_context(|| format!("the last that {} said: {said}", manager.name))
}

fn id_of(places: &Places, manager: &Member, name: &str) -> Result<Option<String>> {
    let listed = http::call(&places.socket(&manager.name), "GET", "/nodes", None)?;
    let listed = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    let node = listed.iter().find(|entry| entry["Description"]["Hostname"] == name);
    Ok(node.and_then(|entry| entry["ID"].as_str()).map(str::to_owned))
}

/// Waits until `first` lists every one of `nodes` as ready, managers as reachable.
pub(crate) fn wait_until_ready(places: &Places, first: &Member, nodes: &[Member]) -> Result<()> {
    let socket = places.socket(&first.name);
    let mut waiting: Vec<_> = nodes.iter().map(|node| &node.name).collect();
    let waited = wait_for("all nodes to be Ready", READY_DEADLINE, || {
        // While managers are added there may be no majority for a moment.
        let Ok(listed) = http::call(&socket, "GET", "/nodes", None) else { return Ok(false) };
        waiting = nodes.iter().filter(|node| !is_ready(&listed, node)).map(|n| &n.name).collect();
        Ok(waiting.is_empty())
    });
    waited.with_context(|| {
        format!("still not Ready: {waiting:?}; see their logs in {}", places.state.display())
    })
}

fn is_ready(listed: &Value, node: &Member) -> bool {
    let listed = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    listed.iter().any(|entry| {
        entry["Description"]["Hostname"] == node.name.as_str()
            && entry["Status"]["State"] == "ready"
            && (node.role != Role::Manager || entry["ManagerStatus"]["Reachability"] == "reachable")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Topology;

    #[test]
    fn a_manager_is_ready_once_it_is_reachable_too() {
        let nodes: Vec<_> = Topology { managers: 1, workers: 1, mtu: 1500 }.nodes().collect();
        let listed = json!([
            {"Description": {"Hostname": "m1"}, "Status": {"State": "ready"},
             "ManagerStatus": {"Reachability": "unknown"}},
            {"Description": {"Hostname": "w1"}, "Status": {"State": "ready"}},
        ]);
        assert!(!is_ready(&listed, &nodes[0]));
        assert!(is_ready(&listed, &nodes[1]));
        assert!(!is_ready(&json!([]), &nodes[1]));
        assert!(!is_ready(&Value::Null, &nodes[1]));
    }
}
