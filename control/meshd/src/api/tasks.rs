//! `/tasks`.

use std::collections::BTreeSet;

use axum::{
    Json,
    extract::{Path, State},
};
use mesh_api as api;
use mesh_control::{model::Task, store::Store};

use super::{
    ApiError, Shared, convert, find, read,
    request::{Filters, Params},
};

/// `GET /tasks`.
pub(super) async fn list(
    State(backend): State<Shared>,
    params: Params,
) -> Result<Json<Vec<api::Task>>, ApiError> {
    let filters = params.filters(&[
        "id",
        "name",
        "service",
        "node",
        "label",
        "desired-state",
        "_up-to-date",
        "runtime",
    ])?;
    filters.only("desired-state", &["running", "shutdown", "accepted"])?;
    filters.only("_up-to-date", &["true", "false", "1", "0"])?;
    read(&backend, |store| {
        let services = resolve(&filters, "service", |name| {
            find::service(store, name).map(|service| service.id)
        })?;
        let nodes = resolve(&filters, "node", |name| find::node(store, name).map(|node| node.id))?;
        let tasks = store.tasks.values().filter(|task| {
            services.as_ref().is_none_or(|ids| ids.contains(&task.service))
                && nodes.as_ref().is_none_or(|ids| task.node.is_some_and(|id| ids.contains(&id)))
                && matches(&filters, store, task)
        });
        Ok(Json(tasks.map(|task| convert::task::task(store, task)).collect()))
    })?
}

/// The ids of named objects. An unknown name is an error, not an empty list.
fn resolve<T: Ord>(
    filters: &Filters,
    key: &str,
    find: impl Fn(&str) -> Result<T, ApiError>,
) -> Result<Option<BTreeSet<T>>, ApiError> {
    filters.values(key).map(|names| names.iter().map(|name| find(name)).collect()).transpose()
}

fn matches(filters: &Filters, store: &Store, task: &Task) -> bool {
    filters.any("id", |id| task.id.to_string().starts_with(id))
        && filters.any("name", |name| task.name().starts_with(name))
        && filters.any("desired-state", |state| {
            // `Ready` is on its way to running: it has waited for its restart delay.
            let desired = match task.desired.name() {
                "ready" => "running",
                "remove" => "shutdown",
                other => other,
            };
            state == desired
        })
        && filters.any("_up-to-date", |wanted| {
            convert::task::up_to_date(store, task) == ["true", "1"].contains(&wanted)
        })
        && filters.any("runtime", |runtime| runtime == "container")
        && filters.labels("label", &task.spec.labels)
}

/// `GET /tasks/{id}`.
pub(super) async fn inspect(
    State(backend): State<Shared>,
    Path(id): Path<String>,
) -> Result<Json<api::Task>, ApiError> {
    read(&backend, |store| Ok(Json(convert::task::task(store, find::task(store, &id)?))))?
}
