//! Errors as Docker's clients know them: a status and a sentence.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use mesh_api::ErrorBody;
use mesh_control::command::Rejection;

/// Why a request was not done: HTTP status and the words for the user. Clients search the words, so
/// those of Docker are kept where it has some.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What failed, on which object, why, and what to do.
    pub message: String,
}

impl ApiError {
    /// Any status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// 409.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 501: Docker has it, this daemon not yet. `what` names the flag or field.
    pub fn not_implemented(what: impl AsRef<str>) -> Self {
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            format!("{} is not implemented yet by mesh: leave it out", what.as_ref()),
        )
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// The node is in no cluster.
    #[must_use]
    pub fn not_in_swarm() -> Self {
        Self::unavailable(NOT_IN_SWARM)
    }

    /// The node is a worker.
    #[must_use]
    pub fn worker() -> Self {
        Self::unavailable(
            "This node is not a swarm manager. Worker nodes can't be used to view or modify \
             cluster state. Please run this command on a manager node or promote the current \
             node to a manager.",
        )
    }

    /// No leader with a majority behind it.
    #[must_use]
    pub fn no_leader() -> Self {
        Self::unavailable(NO_LEADER)
    }

    /// A write that got no answer in time: it may still happen.
    #[must_use]
    pub fn deadline_exceeded() -> Self {
        Self::internal("rpc error: code = DeadlineExceeded desc = context deadline exceeded")
    }

    /// Init or join of a member.
    #[must_use]
    pub fn already_in_swarm() -> Self {
        Self::unavailable(
            "This node is already part of a swarm. Use \"docker swarm leave\" to leave this swarm \
             and join another one.",
        )
    }

    /// Leave of a node that is in no cluster.
    #[must_use]
    pub fn not_part_of_swarm() -> Self {
        Self::unavailable("This node is not part of a swarm")
    }

    /// Leave of a manager without force.
    #[must_use]
    pub fn leave_as_manager(managers: usize, reachable: usize) -> Self {
        let start = "You are attempting to leave the swarm on a node that is participating as a \
                     manager. ";
        let middle = if managers <= 1 {
            "Removing the last manager erases all current state of the swarm. ".to_owned()
        } else {
            format!(
                "Removing this node leaves {} managers out of {} reachable. Demote it first, or \
                 make sure that the others keep a majority. ",
                reachable.saturating_sub(1),
                managers - 1,
            )
        };
        Self::unavailable(format!("{start}{middle}Use `--force` to ignore this message."))
    }

    /// A token that is malformed, or whose cluster or secret is another.
    #[must_use]
    pub fn invalid_token() -> Self {
        Self::internal("invalid join token")
    }
}

/// Docker's words for a node in no cluster.
pub(crate) const NOT_IN_SWARM: &str = concat!(
    "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to ",
    "connect this node to swarm and try again."
);

/// Docker's words for a cluster without a leader.
pub(crate) const NO_LEADER: &str = concat!(
    "The swarm does not have a leader. It's possible that too few managers are online. ",
    "Make sure more than half of the managers are online."
);

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let (status, code) = match rejection {
            Rejection::NotFound(_) => (StatusCode::NOT_FOUND, "NotFound"),
            Rejection::Exists(_) => (StatusCode::CONFLICT, "AlreadyExists"),
            Rejection::Invalid(_) => (StatusCode::BAD_REQUEST, "InvalidArgument"),
            Rejection::Precondition(_) => (StatusCode::BAD_REQUEST, "FailedPrecondition"),
            Rejection::Forbidden(_) => (StatusCode::FORBIDDEN, "PermissionDenied"),
            Rejection::OutOfSequence => (StatusCode::INTERNAL_SERVER_ERROR, "Unknown"),
            Rejection::Exhausted(_) => (StatusCode::BAD_REQUEST, "OutOfRange"),
        };
        Self::new(status, format!("rpc error: code = {code} desc = {rejection}"))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorBody { message: self.message })).into_response()
    }
}
