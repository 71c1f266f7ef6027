//! Nodes.

use mesh_api as api;
use mesh_control::model::{Cluster, Node, NodeKeys, NodeSpec, NodeState, NodeStatus, Role};

use super::{cluster::availability, time, version};
use crate::api::{ApiError, backend::Leadership};

/// A node as clients see it.
pub(crate) fn node(
    node: &Node,
    cluster: Option<&Cluster>,
    leadership: Option<&Leadership>,
) -> api::Node {
    api::Node {
        id: node.id.to_string(),
        version: version(&node.meta),
        created_at: time(node.meta.created_ms),
        updated_at: time(node.meta.updated_ms),
        spec: api::NodeSpec {
            name: node.spec.name.clone().unwrap_or_default(),
            labels: node.spec.labels.clone(),
            role: node.spec.role.name().into(),
            availability: node.spec.availability.name().into(),
        },
        description: description(node, cluster),
        status: api::NodeStatus {
            state: node.status.state.name().into(),
            message: message(&node.status),
            addr: node.address.ip().to_string(),
        },
        manager_status: (node.spec.role == Role::Manager).then(|| manager(node, leadership)),
    }
}

/// A node that is down keeps its tasks until its data path is silent too: then it is lost.
fn message(status: &NodeStatus) -> String {
    match (status.state, status.lost) {
        (NodeState::Down, true) => format!("{} (lost: its tasks are replaced)", status.message),
        (NodeState::Down, false) => {
            format!("{} (not lost: its tasks stay where they are)", status.message)
        }
        _ => status.message.clone(),
    }
}

fn manager(node: &Node, leadership: Option<&Leadership>) -> api::ManagerStatus {
    let reachability = match leadership {
        None => "unknown",
        Some(known) if known.reachable.contains(&node.number) => "reachable",
        Some(_) => "unreachable",
    };
    api::ManagerStatus {
        leader: leadership.is_some_and(|known| known.leader == node.number),
        reachability: reachability.into(),
        addr: node.address.to_string(),
    }
}

fn description(node: &Node, cluster: Option<&Cluster>) -> api::NodeDescription {
    let about = &node.description;
    let plugin = api::Map::from([
        ("Type".to_owned(), "Network".to_owned()),
        ("Name".to_owned(), "overlay".to_owned()),
    ]);
    api::NodeDescription {
        hostname: about.hostname.clone(),
        platform: api::Platform { architecture: about.architecture.clone(), os: about.os.clone() },
        resources: api::Resources { nano_cpus: about.nano_cpus, memory_bytes: about.memory_bytes },
        engine: api::EngineDescription {
            engine_version: about.engine_version.clone(),
            plugins: vec![plugin],
        },
        tls_info: cluster.map(|cluster| tls_info(&about.keys, cluster)).unwrap_or_default(),
    }
}

/// What a node trusts and who signed its certificate, by its own word. One that has said nothing
/// yet is as the cluster was when it came.
fn tls_info(keys: &NodeKeys, cluster: &Cluster) -> api::TlsInfo {
    let current = cluster.ca_cert_pem.as_str();
    let next = cluster.ca_rotation.as_deref();
    let issuer = match (keys.issuer, next, cluster.ca_id) {
        (Some(issuer), Some(next), _) if issuer == next.id => next.cert_pem.as_str(),
        (Some(issuer), _, Some(known)) if issuer != known => "",
        _ => current,
    };
    let both = next.is_some_and(|next| keys.trusts.contains(&next.id));
    let trusted = match (both, next, cluster.ca_id) {
        (true, Some(next), _) => format!("{current}{}", next.cert_pem),
        // Still the one before, or that one too.
        (_, _, Some(known)) if keys.trusts.iter().any(|root| *root != known) => String::new(),
        _ => current.to_owned(),
    };
    super::cluster::tls_info(&trusted, issuer)
}

/// `POST /nodes/{id}/update`.
pub(crate) fn spec(sent: api::NodeSpec) -> Result<NodeSpec, ApiError> {
    let role = match sent.role.to_ascii_lowercase().as_str() {
        "worker" => Role::Worker,
        "manager" => Role::Manager,
        other => {
            return Err(ApiError::bad_request(format!(
                "invalid Role: \"{other}\": use worker or manager"
            )));
        }
    };
    if sent.availability.is_empty() {
        return Err(ApiError::bad_request(
            "invalid Availability: \"\": use active, pause or drain",
        ));
    }
    Ok(NodeSpec {
        name: (!sent.name.is_empty()).then_some(sent.name),
        labels: sent.labels,
        role,
        availability: availability(&sent.availability)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_of_the_tasks_of_a_silent_node_is_told() {
        let told = |state, lost| message(&NodeStatus { state, lost, message: "silent".into() });
        assert_eq!(told(NodeState::Down, true), "silent (lost: its tasks are replaced)");
        assert_eq!(
            told(NodeState::Down, false),
            "silent (not lost: its tasks stay where they are)"
        );
        assert_eq!(told(NodeState::Ready, false), "silent");
    }
}
