//! What crosses the API's socket: requests and answers of the Docker Engine API's swarm part, and of
//! our own additions under `/mesh/`. Plain serde types; absent, null and zero are told apart where
//! Docker's clients do. No logic, and no types of the store: the daemon converts by hand.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// The body of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What failed and what to do.
    pub message: String,
}
