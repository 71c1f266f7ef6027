//! `/services`.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use mesh_api as api;
use mesh_control::{
    command::{Command, Outcome},
    model::Service,
};
use mesh_types::{Revision, ServiceId, spec::ServiceMode};

use super::{
    ApiError, Shared,
    convert::{self, spec::service_spec},
    find, read,
    request::{Body, Filters, Params},
};

/// `GET /services`.
pub(super) async fn list(
    State(backend): State<Shared>,
    params: Params,
) -> Result<Json<Vec<api::Service>>, ApiError> {
    let filters = params.filters(&["id", "name", "label", "mode", "runtime"])?;
    filters.only("mode", &["replicated", "global", "replicated-job", "global-job"])?;
    let (defaults, status) = (params.flag("insertDefaults"), params.flag("status"));
    let services = read(&backend, |store| {
        store
            .services
            .values()
            .filter(|service| matches(&filters, service))
            .map(|service| convert::service::service(store, service, defaults, status))
            .collect()
    })?;
    Ok(Json(services))
}

fn matches(filters: &Filters, service: &Service) -> bool {
    let mode = match service.spec.mode {
        ServiceMode::Replicated { .. } => "replicated",
        ServiceMode::Global => "global",
    };
    filters.any("id", |id| service.id.to_string().starts_with(id))
        && filters.any("name", |name| service.spec.name.starts_with(name))
        && filters.any("mode", |wanted| wanted == mode)
        && filters.any("runtime", |runtime| runtime == "container")
        && filters.labels("label", &service.spec.labels)
}

/// `GET /services/{id}`.
pub(super) async fn inspect(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    params: Params,
) -> Result<Json<api::Service>, ApiError> {
    let defaults = params.flag("insertDefaults");
    read(&backend, |store| {
        let service = find::service(store, &id)?;
        Ok(Json(convert::service::service(store, service, defaults, false)))
    })?
}

fn warnings(outcome: Outcome) -> Option<Vec<String>> {
    match outcome {
        Outcome::Warnings(warnings) if !warnings.is_empty() => Some(warnings),
        _ => None,
    }
}

/// `POST /services/create`.
pub(super) async fn create(
    State(backend): State<Shared>,
    body: Body,
) -> Result<(StatusCode, Json<api::ServiceCreated>), ApiError> {
    let sent = body.value()?;
    let spec = read(&backend, |store| service_spec(store, sent))??;
    let id = ServiceId::from_bits(backend.fresh_id());
    let outcome = backend.propose(Command::CreateService { id, spec: Box::new(spec) }).await?;
    let created = api::ServiceCreated { id: id.to_string(), warnings: warnings(outcome) };
    Ok((StatusCode::CREATED, Json(created)))
}

/// `POST /services/{id}/update`.
pub(super) async fn update(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    params: Params,
    body: Body,
) -> Result<Json<serde_json::Value>, ApiError> {
    let version = params.version("service")?;
    let version = Revision::new(version).map_err(|err| ApiError::bad_request(err.to_string()))?;
    let rollback = match params.text("rollback") {
        "" => false,
        "previous" => true,
        other => {
            return Err(ApiError::bad_request(format!("unrecognized rollback option {other}")));
        }
    };
    // With `rollback` the body does not count.
    let sent = if rollback { None } else { Some(body.value()?) };
    let command = read(&backend, |store| {
        let id = find::service(store, &id)?.id;
        Ok::<_, ApiError>(match sent {
            None => Command::RollBackService { id, version },
            Some(sent) => {
                let spec = Box::new(service_spec(store, sent)?);
                Command::UpdateService { id, version, spec }
            }
        })
    })??;
    let outcome = backend.propose(command).await?;
    Ok(Json(serde_json::json!({ "Warnings": warnings(outcome) })))
}

/// `DELETE /services/{id}`.
pub(super) async fn remove(
    State(backend): State<Shared>,
    Path(id): Path<String>,
) -> Result<(), ApiError> {
    let id = read(&backend, |store| find::service(store, &id).map(|service| service.id))??;
    backend.propose(Command::RemoveService { id }).await?;
    Ok(())
}
