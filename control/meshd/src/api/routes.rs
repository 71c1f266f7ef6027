//! All routes of the API in one table, with what each asks of the node and how large a body it
//! takes. The router is made of it, so there is no route beside it.

use axum::{
    Router,
    extract::{Request, State},
    handler::Handler,
    middleware::{self, Next},
    response::Response,
    routing::{MethodFilter, MethodRouter, on},
};
use mesh_api::BODY_BYTES_MAX;

use super::{
    ApiError, Shared, events, logs, networks, nodes, own, read,
    request::{BodyLimit, discard},
    services, swarm, system, tasks, usage,
};
use crate::metrics;

/// What a route asks of the node that it comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: answered from this node alone, and waits for no other.
    Nothing,
    /// Where there is a store, it is current: what any manager acknowledged before is seen. The
    /// handler has an answer of its own for nodes that are no managers.
    Store,
    /// A manager with a majority behind it, and its current store.
    Manager,
}

/// A route, beside its handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The method. `GET` comes with `HEAD`.
    pub method: &'static str,
    /// The path, as a pattern.
    pub path: &'static str,
    /// What it asks of the node.
    pub needs: Needs,
    /// The most that is read of a body, in bytes.
    pub body: usize,
}

struct Row {
    rule: Rule,
    handler: MethodRouter<Shared>,
}

/// For bodies that hold JSON; without one, nothing is read.
const JSON: usize = BODY_BYTES_MAX;

fn row<T: 'static>(
    (method, filter): (&'static str, MethodFilter),
    path: &'static str,
    (needs, body): (Needs, usize),
    handler: impl Handler<T, Shared>,
) -> Row {
    let rule = Rule { method, path, needs, body };
    Row { rule, handler: on(filter, handler) }
}

fn table() -> Vec<Row> {
    use Needs::{Manager, Nothing, Store};
    const GET: (&str, MethodFilter) = ("GET", MethodFilter::GET);
    const POST: (&str, MethodFilter) = ("POST", MethodFilter::POST);
    const DELETE: (&str, MethodFilter) = ("DELETE", MethodFilter::DELETE);
    vec![
        row(GET, "/_ping", (Nothing, 0), system::ping),
        row(GET, "/version", (Nothing, 0), system::version),
        row(GET, "/info", (Nothing, 0), system::info),
        // What this manager saw: it goes on without a majority.
        row(GET, "/events", (Nothing, 0), events::stream),
        row(GET, "/system/df", (Nothing, 0), usage::disk),
        row(GET, "/distribution/{*image}", (Nothing, 0), system::distribution),
        row(POST, "/swarm/init", (Nothing, JSON), swarm::init),
        row(POST, "/swarm/join", (Nothing, JSON), swarm::join),
        row(POST, "/swarm/leave", (Nothing, 0), swarm::leave),
        row(GET, "/swarm", (Manager, 0), swarm::inspect),
        row(POST, "/swarm/update", (Manager, JSON), swarm::update),
        row(GET, "/nodes", (Manager, 0), nodes::list),
        row(GET, "/nodes/{id}", (Manager, 0), nodes::inspect),
        row(DELETE, "/nodes/{id}", (Manager, 0), nodes::remove),
        row(POST, "/nodes/{id}/update", (Manager, JSON), nodes::update),
        // Docker shows networks of its own on nodes that are no managers.
        row(GET, "/networks", (Store, 0), networks::list),
        row(POST, "/networks/create", (Store, JSON), networks::create),
        row(POST, "/networks/prune", (Manager, 0), networks::prune),
        row(GET, "/networks/{id}", (Store, 0), networks::inspect),
        row(POST, "/networks/{id}/connect", (Manager, JSON), networks::connect),
        row(POST, "/networks/{id}/disconnect", (Manager, JSON), networks::disconnect),
        row(DELETE, "/networks/{id}", (Store, 0), networks::remove),
        row(GET, "/services", (Manager, 0), services::list),
        row(POST, "/services/create", (Manager, JSON), services::create),
        row(GET, "/services/{id}", (Manager, 0), services::inspect),
        row(DELETE, "/services/{id}", (Manager, 0), services::remove),
        row(POST, "/services/{id}/update", (Manager, JSON), services::update),
        row(GET, "/services/{id}/logs", (Manager, 0), logs::of_service),
        row(GET, "/tasks", (Manager, 0), tasks::list),
        row(GET, "/tasks/{id}", (Manager, 0), tasks::inspect),
        row(GET, "/tasks/{id}/logs", (Manager, 0), logs::of_task),
        row(GET, "/metrics", (Nothing, 0), metrics::server::answer),
        row(GET, "/mesh/status", (Nothing, 0), own::status),
        row(GET, "/mesh/node/stats", (Nothing, 0), own::stats),
        row(POST, "/mesh/task/{id}/exec", (Manager, JSON), own::exec),
        row(POST, "/mesh/gossip-key/rotate", (Manager, 0), own::rotate_gossip_key),
    ]
}

/// All routes.
pub fn rules() -> impl Iterator<Item = Rule> {
    table().into_iter().map(|row| row.rule)
}

pub(super) fn router(backend: &Shared) -> Router<Shared> {
    table().into_iter().fold(Router::new(), |router, Row { rule, handler }| {
        let state = (backend.clone(), rule);
        router.route(rule.path, handler.route_layer(middleware::from_fn_with_state(state, guard)))
    })
}

/// Holds a request against its rule, before its handler looks at it.
async fn guard(
    State((backend, rule)): State<(Shared, Rule)>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    request.extensions_mut().insert(BodyLimit(rule.body));
    if let Err(refusal) = admit(&backend, rule.needs).await {
        discard(request).await;
        return Err(refusal);
    }
    Ok(next.run(request).await)
}

/// Whether the node has what a route asks of it.
async fn admit(backend: &Shared, needs: Needs) -> Result<(), ApiError> {
    if needs != Needs::Nothing {
        backend.catch_up().await?;
    }
    if needs == Needs::Manager {
        read(backend, |_| ())?;
    }
    Ok(())
}
