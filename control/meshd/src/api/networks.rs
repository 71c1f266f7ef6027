//! `/networks`.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use jiff::{SignedDuration, Timestamp};
use mesh_api as api;
use mesh_control::{
    command::Command,
    model::{Role, Task},
    store::Store,
};
use mesh_types::{NetworkId, NodeId, spec::NetworkAttachment};
use serde::Deserialize;

use super::{
    ApiError, Shared,
    backend::SwarmState,
    convert::{
        self,
        network::{PREDEFINED, container_id},
    },
    find,
    logs::unix_ns,
    read,
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
        store
            .networks
            .values()
            .map(convert::network::network)
            .filter(|network| matches(&filters, network))
            .filter(|network| {
                filters.any("dangling", |wanted| {
                    let wanted = ["1", "true"].contains(&wanted);
                    network.id.parse().is_ok_and(|id| wanted != used(store, id))
                })
            })
            .collect()
    })?;
    Ok(Json(networks))
}

/// Whether a service joins a network, or a task is on it.
fn used(store: &Store, id: NetworkId) -> bool {
    let joins = |to: &[NetworkAttachment]| to.iter().any(|attachment| attachment.network == id);
    store.services.values().any(|service| joins(&service.spec.networks))
        || store.tasks.values().any(|task| !task.leases.is_empty() && joins(&task.networks))
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

/// `POST /networks/prune`: removes the networks that nothing uses. What comes to be used meanwhile
/// stays.
pub(super) async fn prune(
    State(backend): State<Shared>,
    params: Params,
) -> Result<Json<api::NetworksPruned>, ApiError> {
    let filters = params.filters(&["label", "label!", "until"])?;
    let until_ms = until_ms(&filters)?;
    let unused: Vec<(NetworkId, String)> = read(&backend, |store| {
        let networks = store.networks.values().filter(|network| {
            !network.spec.ingress
                && !used(store, network.id)
                && until_ms.is_none_or(|until| network.meta.created_ms < until)
                && filters.labels("label", &network.spec.labels)
                && filters.no_labels("label!", &network.spec.labels)
        });
        networks.map(|network| (network.id, network.spec.name.clone())).collect()
    })?;
    let mut pruned = api::NetworksPruned::default();
    for (id, name) in unused {
        match backend.propose(Command::RemoveNetwork { id }).await {
            Ok(_) => pruned.networks_deleted.push(name),
            // In use by now, or gone.
            Err(err) if [403, 404].contains(&err.status.as_u16()) => {}
            Err(err) => return Err(err),
        }
    }
    Ok(Json(pruned))
}

/// The filter `until`: one point in Unix time, or how long ago that was.
fn until_ms(filters: &Filters) -> Result<Option<u64>, ApiError> {
    let Some(values) = filters.values("until") else { return Ok(None) };
    let one = values.first().filter(|_| values.len() == 1);
    let text = one.ok_or_else(|| ApiError::bad_request("more than one until filter specified"))?;
    let at = point_in_time(text, Timestamp::now()).ok_or_else(|| {
        ApiError::bad_request(format!(
            "invalid until filter `{text}`: use 2026-01-02T15:04:05Z, Unix seconds, or a duration \
             like 10m for how long ago"
        ))
    })?;
    Ok(Some(u64::try_from(at.as_millisecond()).unwrap_or(0)))
}

fn point_in_time(text: &str, now: Timestamp) -> Option<Timestamp> {
    if let Some(nanos) = unix_ns(text) {
        return Timestamp::from_nanosecond(nanos.into()).ok();
    }
    let ago = || now.checked_sub(text.parse::<SignedDuration>().ok()?).ok();
    text.parse().ok().or_else(ago)
}

/// The part of the body of `connect` and `disconnect` that counts here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Attachment {
    container: String,
}

/// `POST /networks/{id}/connect`.
pub(super) async fn connect(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    refuse_attachment(&backend, &id, &body.parse()?, "add")
}

/// `POST /networks/{id}/disconnect`.
pub(super) async fn disconnect(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    refuse_attachment(&backend, &id, &body.parse()?, "rm")
}

/// There are no containers but those of tasks, and a task has the networks that its service has.
fn refuse_attachment(
    backend: &Shared,
    network: &str,
    Attachment { container }: &Attachment,
    flag: &str,
) -> Result<StatusCode, ApiError> {
    let refusal = read(backend, |store| {
        let network = &find::network(store, network)?.spec.name;
        let task = || find::task(store, container).map(|task| task.service_name.clone());
        let by_container = || {
            let is = |task: &&Task| container_id(task).starts_with(&container[..]);
            store.tasks.values().find(is).map(|task| task.service_name.clone())
        };
        let service = task().ok().or_else(|| by_container().filter(|_| !container.is_empty()));
        let Some(service) = service else {
            return Err(ApiError::not_found(format!("No such container: {container}")));
        };
        Ok(ApiError::new(
            StatusCode::FORBIDDEN,
            format!(
                "{container} is a task of service {service} and has the service's networks: use \
                 `service update --network-{flag} {network} {service}`"
            ),
        ))
    })??;
    Err(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_in_time_are_absolute_or_ago() {
        let now: Timestamp = "2026-01-02T15:04:05Z".parse().unwrap();
        let at = |text| point_in_time(text, now).map(|at| at.as_second() - now.as_second());
        assert_eq!(at("10m"), Some(-600));
        assert_eq!(at("1h30m"), Some(-5400));
        assert_eq!(at("2026-01-02T15:04:00Z"), Some(-5));
        assert_eq!(at("1767366245"), Some(0));
        for bad in ["", "yesterday", "10 parsecs"] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }
}
