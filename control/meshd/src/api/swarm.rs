//! `/swarm`.

use axum::{Json, extract::State};
use mesh_api as api;
use mesh_control::{command::Command, model::Role};

use super::{
    ApiError, Shared, convert, read,
    request::{Body, Params},
};

/// `GET /swarm`.
pub(super) async fn inspect(State(backend): State<Shared>) -> Result<Json<api::Swarm>, ApiError> {
    let tokens = backend.join_tokens()?;
    let swarm = read(&backend, |store| {
        store.cluster.as_ref().map(|cluster| convert::cluster::swarm(cluster, Some(tokens)))
    })?;
    swarm.map(Json).ok_or_else(ApiError::no_leader)
}

/// `POST /swarm/init`: answers the node's id as a JSON string.
pub(super) async fn init(
    State(backend): State<Shared>,
    body: Body,
) -> Result<Json<String>, ApiError> {
    let request = convert::cluster::init(body.parse()?)?;
    let node = backend.init(request).await?;
    Ok(Json(node.to_string()))
}

/// `POST /swarm/join`.
pub(super) async fn join(State(backend): State<Shared>, body: Body) -> Result<(), ApiError> {
    let request = convert::cluster::join(body.parse()?)?;
    backend.join(request).await
}

/// `POST /swarm/leave`.
pub(super) async fn leave(State(backend): State<Shared>, params: Params) -> Result<(), ApiError> {
    backend.leave(params.flag("force")).await
}

/// `POST /swarm/update`: settings, and other join tokens.
pub(super) async fn update(
    State(backend): State<Shared>,
    params: Params,
    body: Body,
) -> Result<(), ApiError> {
    let version = params.version("swarm")?;
    if params.flag("rotateManagerUnlockKey") {
        return Err(ApiError::not_implemented(
            "swarm unlock-key --rotate (rotateManagerUnlockKey)",
        ));
    }
    let sent: api::ClusterSpec = body.parse()?;
    let (current, spec, forced) = read(&backend, |store| {
        let cluster = store.cluster.as_ref();
        cluster.map(|cluster| (cluster.meta.version, cluster.spec.clone(), cluster.ca_forced))
    })?
    .ok_or_else(ApiError::no_leader)?;
    let rotate_ca = Some(sent.ca_config.force_rotate).filter(|wanted| *wanted > forced);
    if current.get() != version {
        return Err(mesh_control::command::Rejection::OutOfSequence.into());
    }
    // A body without a spec, as simple clients send to rotate tokens, changes nothing.
    if sent != api::ClusterSpec::default() {
        let new = convert::cluster::update(sent, &spec)?;
        if new != spec {
            let spec = Box::new(new);
            backend.propose(Command::UpdateCluster { version: current, spec }).await?;
        }
    }
    if let Some(wanted) = rotate_ca {
        backend.rotate_ca(wanted).await?;
    }
    for (flag, role) in [("rotateWorkerToken", Role::Worker), ("rotateManagerToken", Role::Manager)]
    {
        if params.flag(flag) {
            let secret = backend.fresh_id().to_be_bytes();
            backend.propose(Command::RotateToken { role, secret }).await?;
        }
    }
    Ok(())
}
