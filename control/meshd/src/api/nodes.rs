//! `/nodes`.

use axum::{
    Json,
    extract::{Path, State},
};
use mesh_api as api;
use mesh_control::command::Command;
use mesh_types::Revision;

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
        let keep = |node: &&mesh_control::model::Node| {
            filters.any("id", |id| node.id.to_string().starts_with(id))
                && filters.any("name", |name| node.name().starts_with(name))
                && filters.any("role", |role| role == convert::node::role(node.spec.role))
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
    let (id, spec) = read(&backend, |store| {
        let node = find::node(store, &id)?;
        Ok::<_, ApiError>((node.id, convert::node::spec(sent, &node.spec)?))
    })??;
    backend.propose(Command::UpdateNode { id, version, spec }).await?;
    Ok(())
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
