//! `/nodes`.

use std::collections::BTreeSet;

use axum::{
    Json,
    extract::{Path, State},
};
use mesh_api as api;
use mesh_control::{
    command::{Command, Rejection},
    model::{Node, Role},
    store::Store,
};
use mesh_types::{NodeNumber, Revision};

use super::{
    ApiError, Shared, convert, find, read,
    request::{Body, Params},
};

/// `GET /nodes`.
pub(super) async fn list(
    State(backend): State<Shared>,
    params: Params,
) -> Result<Json<Vec<api::Node>>, ApiError> {
    let filters = params.filters(&["id", "name", "role", "membership", "label", "node.label"])?;
    filters.only("role", &["worker", "manager"])?;
    filters.only("membership", &["accepted", "pending"])?;
    let leadership = backend.leadership();
    let nodes = read(&backend, |store| {
        let cluster = store.cluster.as_ref();
        let keep = |node: &&Node| {
            filters.any("id", |id| node.id.to_string().starts_with(id))
                && filters.any("name", |name| node.name().starts_with(name))
                && filters.any("role", |role| role == node.spec.role.name())
                && filters.any("membership", |membership| membership == "accepted")
                && filters.labels("label", &node.spec.labels)
                && filters.labels("node.label", &node.spec.labels)
        };
        store
            .nodes
            .values()
            .filter(keep)
            .map(|node| convert::node::node(node, cluster, leadership.as_ref()))
            .collect()
    })?;
    Ok(Json(nodes))
}

/// `GET /nodes/{id}`.
pub(super) async fn inspect(
    State(backend): State<Shared>,
    Path(id): Path<String>,
) -> Result<Json<api::Node>, ApiError> {
    let leadership = backend.leadership();
    read(&backend, |store| {
        let node = find::node(store, &id)?;
        Ok(Json(convert::node::node(node, store.cluster.as_ref(), leadership.as_ref())))
    })?
}

/// `POST /nodes/{id}/update`.
pub(super) async fn update(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    params: Params,
    body: Body,
) -> Result<(), ApiError> {
    let version = params.version("node")?;
    let version = Revision::new(version).map_err(|err| ApiError::bad_request(err.to_string()))?;
    let sent: api::NodeSpec = body.parse()?;
    let spec = convert::node::spec(sent)?;
    let reachable = backend.leadership().map(|known| known.reachable).unwrap_or_default();
    let id = read(&backend, |store| {
        let node = find::node(store, &id)?;
        let demoted = node.spec.role == Role::Manager && spec.role == Role::Worker;
        if demoted && !keeps_quorum(store, node, &reachable) {
            return Err(ApiError::from(Rejection::Precondition(
                "can't remove member from the raft: this would result in a loss of quorum".into(),
            )));
        }
        Ok(node.id)
    })??;
    backend.propose(Command::UpdateNode { id, version, spec }).await?;
    Ok(())
}

/// Whether a majority of the managers that stay answers. Without any it is the last one: the store
/// has another word for that.
fn keeps_quorum(store: &Store, without: &Node, reachable: &BTreeSet<NodeNumber>) -> bool {
    let stay = |node: &&Node| node.spec.role == Role::Manager && node.id != without.id;
    let stay: Vec<&Node> = store.nodes.values().filter(stay).collect();
    let answer = stay.iter().filter(|node| reachable.contains(&node.number)).count();
    stay.is_empty() || answer > stay.len() / 2
}

/// `DELETE /nodes/{id}`.
pub(super) async fn remove(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    params: Params,
) -> Result<(), ApiError> {
    let id = read(&backend, |store| find::node(store, &id).map(|node| node.id))??;
    backend.propose(Command::RemoveNode { id, force: params.flag("force") }).await?;
    Ok(())
}
