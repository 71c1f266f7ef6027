//! `/networks`.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use mesh_api as api;
use mesh_control::{command::Command, model::Role};
use mesh_types::{NetworkId, NodeId};

use super::{
    ApiError, Shared,
    backend::SwarmState,
    convert::{self, network::PREDEFINED},
    find, read,
    request::{Body, Filters, Params},
};

/// This node, if it is a manager, and can show networks.
fn manager(backend: &Shared) -> Option<NodeId> {
    match backend.local().swarm {
        SwarmState::Active(member) if member.role == Role::Manager => Some(member.node),
        _ => None,
    }
}

/// `GET /networks`. A node that is no manager knows of none.
pub(super) async fn list(
    State(backend): State<Shared>,
    params: Params,
) -> Result<Json<Vec<api::Network>>, ApiError> {
    let known = ["id", "name", "driver", "label", "scope", "type", "dangling"];
    let filters = params.filters(&known)?;
    filters.only("type", &["custom", "builtin"])?;
    if manager(&backend).is_none() {
        return Ok(Json(Vec::new()));
    }
    let networks = read(&backend, |store| {
        let used = |id: NetworkId| {
            store.services.values().any(|service| {
                service.spec.networks.iter().any(|attachment| attachment.network == id)
            })
        };
        store
            .networks
            .values()
            .map(convert::network::network)
            .filter(|network| matches(&filters, network))
            .filter(|network| {
                filters.any("dangling", |wanted| {
                    let wanted = ["1", "true"].contains(&wanted);
                    network.id.parse().is_ok_and(|id| wanted != used(id))
                })
            })
            .collect()
    })?;
    Ok(Json(networks))
}

/// Names and ids match in part, as Docker does for networks.
fn matches(filters: &Filters, network: &api::Network) -> bool {
    filters.any("id", |id| network.id.contains(id))
        && filters.any("name", |name| network.name.contains(name))
        && filters.any("driver", |driver| network.driver == driver)
        && filters.any("scope", |scope| network.scope == scope)
        && filters.any("type", |kind| kind == "custom")
        && filters.labels("label", &network.labels)
}

/// `GET /networks/{id}`.
pub(super) async fn inspect(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    params: Params,
) -> Result<Json<api::Network>, ApiError> {
    let missing = || ApiError::not_found(format!("network {id} not found"));
    let Some(here) = manager(&backend) else { return Err(missing()) };
    if !["", "swarm", "global"].contains(&params.text("scope")) {
        return Err(missing());
    }
    let verbose = params.flag("verbose");
    read(&backend, |store| {
        let network = find::network(store, &id)?;
        Ok(Json(convert::network::inspected(store, network, Some(here), verbose)))
    })?
}

/// `POST /networks/create`.
pub(super) async fn create(
    State(backend): State<Shared>,
    body: Body,
) -> Result<(StatusCode, Json<api::NetworkCreated>), ApiError> {
    let spec = convert::network::spec(body.parse()?)?;
    if matches!(backend.local().swarm, SwarmState::Inactive) {
        // Docker's status for this one.
        return Err(ApiError { status: StatusCode::FORBIDDEN, ..ApiError::not_in_swarm() });
    }
    let id = NetworkId::from_bits(backend.fresh_id());
    backend.propose(Command::CreateNetwork { id, spec }).await.map_err(without_grpc)?;
    let created = api::NetworkCreated { id: id.to_string(), warning: String::new() };
    Ok((StatusCode::CREATED, Json(created)))
}

/// A network that exists is told by the engine itself in Docker, without the words of gRPC.
fn without_grpc(err: ApiError) -> ApiError {
    match err.message.strip_prefix("rpc error: code = AlreadyExists desc = ") {
        Some(message) => ApiError::new(err.status, message),
        None => err,
    }
}

/// `DELETE /networks/{id}`.
pub(super) async fn remove(
    State(backend): State<Shared>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    if PREDEFINED.contains(&id.as_str()) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            format!("{id} is a pre-defined network and cannot be removed"),
        ));
    }
    let id = read(&backend, |store| find::network(store, &id).map(|network| network.id))??;
    backend.propose(Command::RemoveNetwork { id }).await?;
    Ok(StatusCode::NO_CONTENT)
}
