//! Our own additions under `/mesh/`.

use std::io;

use axum::{
    Json,
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use mesh_api::{self as api, Frame, FrameKind};
use mesh_control::{command::Command, model::Role};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};

use super::{
    ApiError, Shared,
    backend::{ExecInput, ExecOutput, ExecRequest, ExecSession, SwarmState},
    find,
    listen::Place,
    read,
    request::{Body, Params},
};

/// `GET /mesh/status`: also on workers and outside a cluster.
pub(super) async fn status(State(backend): State<Shared>) -> Result<Json<api::Status>, ApiError> {
    let mut status =
        api::Status { version: env!("CARGO_PKG_VERSION").into(), ..api::Status::default() };
    let member = match backend.local().swarm {
        SwarmState::Inactive => {
            status.state = "inactive".into();
            return Ok(Json(status));
        }
        SwarmState::Pending => {
            status.state = "pending".into();
            return Ok(Json(status));
        }
        SwarmState::Error(why) => {
            status.state = "error".into();
            status.error = why;
            return Ok(Json(status));
        }
        SwarmState::Active(member) => member,
    };
    status.state = "active".into();
    status.node_id = member.node.to_string();
    status.cluster_id = member.cluster.to_string();
    status.role = member.role.name().into();
    if member.role == Role::Worker {
        return Ok(Json(status));
    }
    let leader = backend.leadership().map(|known| known.leader);
    let seen = read(&backend, |store| {
        let mut nodes: Vec<_> = store.nodes.values().collect();
        nodes.sort_by_key(|node| node.number);
        let of = |node: &&mesh_control::model::Node| api::StatusNode {
            id: node.id.to_string(),
            number: node.number.get(),
            name: node.name().to_owned(),
            role: node.spec.role.name().into(),
            state: node.status.state.name().into(),
            addr: node.address.ip().to_string(),
        };
        let leads = nodes.iter().find(|node| Some(node.number) == leader);
        let leader = leads.map(|node| node.id.to_string()).unwrap_or_default();
        let gossip_key = store.cluster.as_ref().map(|cluster| {
            let keys = cluster.gossip_keys();
            api::GossipKey { epoch: keys.epoch.get(), rotating: keys.next.is_some() }
        });
        let nodes = nodes.iter().map(of).collect();
        api::Status {
            revision: store.revision.get(),
            leader_id: leader,
            nodes,
            gossip_key: gossip_key.unwrap_or_default(),
            ..status.clone()
        }
    });
    match seen {
        Ok(seen) => Ok(Json(seen)),
        Err(err) => Ok(Json(api::Status { error: err.message, ..status })),
    }
}

/// `GET /mesh/node/stats[?node=…]`. Any node tells its own; managers those of all.
pub(super) async fn stats(
    State(backend): State<Shared>,
    params: Params,
) -> Result<Json<api::NodeStats>, ApiError> {
    let node = match params.text("node") {
        "" | "self" => None,
        name => Some(read(&backend, |store| find::node(store, name).map(|node| node.id))??),
    };
    let stats = backend.node_stats(node).await?;
    let counters = stats.counters.into_iter();
    Ok(Json(api::NodeStats {
        node_id: stats.node.to_string(),
        hostname: stats.hostname,
        counters: counters
            .map(|c| api::Counter { name: c.name, value: c.value, drop: c.is_drop })
            .collect(),
    }))
}

/// `POST /mesh/gossip-key/rotate`: begins; `GET /mesh/status` tells how far it is.
pub(super) async fn rotate_gossip_key(State(backend): State<Shared>) -> Result<(), ApiError> {
    let mut key = [0; 32];
    let (first, second) = key.split_at_mut(16);
    first.copy_from_slice(&backend.fresh_id().to_be_bytes());
    second.copy_from_slice(&backend.fresh_id().to_be_bytes());
    backend.propose(Command::RotateGossipKey { key }).await.map(drop)
}

/// `POST /mesh/task/{id}/exec`: an upgraded connection that carries [`Frame`]s.
pub(super) async fn exec(
    State(backend): State<Shared>,
    Path(id): Path<String>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let upgradable = request.headers().contains_key(header::UPGRADE);
    let upgrade = hyper::upgrade::on(&mut request);
    let place = request.extensions().get::<Place>().cloned();
    let body = <Body as axum::extract::FromRequest<()>>::from_request(request, &()).await?;
    let asked: api::ExecRequest = body.parse()?;
    if asked.cmd.first().is_none_or(String::is_empty) {
        return Err(ApiError::bad_request("no command given: Cmd is empty"));
    }
    if !upgradable {
        return Err(ApiError::bad_request(
            "exec needs a connection of its own: send `Connection: Upgrade` and `Upgrade: tcp`",
        ));
    }
    let task = read(&backend, |store| find::task(store, &id).map(|task| task.id))??;
    let dir = (!asked.working_dir.is_empty()).then_some(asked.working_dir);
    let session =
        backend.task_exec(task, ExecRequest { argv: asked.cmd, env: asked.env, dir }).await?;
    tokio::spawn(async move {
        let _place = place;
        match upgrade.await {
            Ok(stream) => relay(TokioIo::new(stream), session).await,
            Err(error) => tracing::debug!(%error, "exec: the client went away before the upgrade"),
        }
    });
    let headers = [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "tcp"),
        (header::CONTENT_TYPE, "application/vnd.docker.multiplexed-stream"),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Carries an exec until the process has ended or the client is gone; then the session is dropped,
/// which kills a process that still runs.
async fn relay(stream: impl AsyncRead + AsyncWrite, session: ExecSession) {
    let (reader, mut writer) = tokio::io::split(stream);
    let ExecSession { input, mut output } = session;
    let outward = async {
        while let Some(item) = output.recv().await {
            let last = matches!(item, ExecOutput::Exit(_) | ExecOutput::Failed(_));
            write_output(&mut writer, item).await?;
            if last {
                break;
            }
        }
        writer.shutdown().await
    };
    let result = tokio::select! {
        result = outward => result,
        result = read_input(reader, input) => result,
    };
    if let Err(error) = result {
        tracing::debug!(%error, "exec: stream ended");
    }
}

async fn write_output(writer: &mut (impl AsyncWrite + Unpin), item: ExecOutput) -> io::Result<()> {
    let (kind, bytes) = match item {
        ExecOutput::Stdout(bytes) => (FrameKind::Stdout, bytes),
        ExecOutput::Stderr(bytes) => (FrameKind::Stderr, bytes),
        ExecOutput::Failed(why) => (FrameKind::Failed, Bytes::from(why)),
        ExecOutput::Exit(status) => {
            return writer.write_all(&Frame::number(FrameKind::Exit, status).encode()).await;
        }
    };
    for chunk in bytes.chunks(Frame::PAYLOAD_MAX as usize) {
        writer.write_all(&Frame { kind, payload: chunk.to_vec() }.encode()).await?;
    }
    Ok(())
}

/// Returns when the client has gone; the end of standard input alone does not end it.
async fn read_input(
    mut reader: impl AsyncRead + Unpin,
    input: mpsc::Sender<ExecInput>,
) -> io::Result<()> {
    loop {
        let mut header = [0; Frame::HEADER_LEN];
        reader.read_exact(&mut header).await?;
        let (kind, length) = Frame::decode_header(header).map_err(io::Error::other)?;
        let mut payload = vec![0; length];
        reader.read_exact(&mut payload).await?;
        let item = match kind {
            FrameKind::Stdin if payload.is_empty() => ExecInput::Eof,
            FrameKind::Stdin => ExecInput::Stdin(Bytes::from(payload)),
            FrameKind::Signal => match (Frame { kind, payload }).as_number() {
                Some(signal) => ExecInput::Signal(signal),
                None => return Err(io::Error::other("a signal frame needs 4 bytes")),
            },
            other => return Err(io::Error::other(format!("client sent a {other:?} frame"))),
        };
        if input.send(item).await.is_err() {
            // The process takes no more input; its output still counts.
            std::future::pending::<()>().await;
        }
    }
}
