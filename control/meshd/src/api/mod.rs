//! The HTTP API: the Docker Engine API's swarm part, and our own additions under `/mesh/`.
//!
//! It owns the words and the forms that clients see; every decision is made behind [`Backend`].

pub mod backend;
mod error;

pub use backend::Backend;
pub use error::ApiError;
