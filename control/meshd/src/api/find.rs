//! Look-up of objects as users name them: by id, then by name, then by a prefix of the id.

use axum::http::StatusCode;
use mesh_control::{
    model::{Network, Node, Service, Task},
    store::Store,
};

use super::ApiError;

pub(super) fn node<'a>(store: &'a Store, needle: &str) -> Result<&'a Node, ApiError> {
    pick("node", needle, store.nodes.values().map(|n| (n.id.to_string(), n.name().to_owned(), n)))
}

pub(super) fn network<'a>(store: &'a Store, needle: &str) -> Result<&'a Network, ApiError> {
    let all = store.networks.values();
    pick("network", needle, all.map(|n| (n.id.to_string(), n.spec.name.clone(), n)))
}

pub(super) fn service<'a>(store: &'a Store, needle: &str) -> Result<&'a Service, ApiError> {
    let all = store.services.values();
    pick("service", needle, all.map(|s| (s.id.to_string(), s.spec.name.clone(), s)))
}

/// A task's name is `<service>.<slot>.<id>`; `<service>.<slot>` finds the slot's newest task.
pub(super) fn task<'a>(store: &'a Store, needle: &str) -> Result<&'a Task, ApiError> {
    let all = store.tasks.values();
    let found = pick("task", needle, all.map(|t| (t.id.to_string(), t.name(), t)));
    if let Err(ApiError { status: StatusCode::NOT_FOUND, .. }) = found {
        let newest = store
            .tasks
            .values()
            .filter(|task| {
                task.slot.is_some_and(|slot| format!("{}.{slot}", task.service_name) == needle)
            })
            .max_by_key(|task| (!task.status.state.is_final(), task.meta.created_ms, task.id));
        return newest.map_or(found, Ok);
    }
    found
}

fn pick<'a, T>(
    kind: &str,
    needle: &str,
    objects: impl Iterator<Item = (String, String, &'a T)>,
) -> Result<&'a T, ApiError> {
    let (mut named, mut prefixed) = (Vec::new(), Vec::new());
    for (id, name, object) in objects {
        if id == needle {
            return Ok(object);
        }
        if name == needle {
            named.push(object);
        } else if !needle.is_empty() && id.starts_with(needle) {
            prefixed.push(object);
        }
    }
    let candidates = if named.is_empty() { prefixed } else { named };
    match candidates.as_slice() {
        [] => Err(ApiError::not_found(format!("{kind} {needle} not found"))),
        [one] => Ok(one),
        many => Err(ApiError::bad_request(format!(
            "{kind} {needle} is ambiguous ({} matches found)",
            many.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_wins_over_name_and_name_over_prefix() {
        let objects = [("ab1", "x"), ("ab2", "ab1"), ("cd3", "ab")];
        let find = |needle| {
            pick("thing", needle, objects.iter().map(|o| (o.0.to_owned(), o.1.to_owned(), o)))
                .map(|object| object.0)
                .map_err(|err| err.message)
        };
        assert_eq!(find("ab1"), Ok("ab1"));
        assert_eq!(find("ab"), Ok("cd3"));
        assert_eq!(find("c"), Ok("cd3"));
        assert_eq!(find("a").unwrap_err(), "thing a is ambiguous (2 matches found)");
        assert_eq!(find("").unwrap_err(), "thing  not found");
    }
}
