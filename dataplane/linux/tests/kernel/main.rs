//! The engine and the programs against a real kernel: nodes, tasks and clients are network
//! namespaces, each test has its own. Needs root; without it the tests fail, since passing would
//! say what was not tried.
//!
//! `cargo xtask test` runs this executable in virtual machines too: with Linux 6.1, which has no
//! tcx, and 6.12. `MESH_TEST_VM` is set there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
mod engine;
mod host;
mod net;
mod node;
mod storm;
mod wire;
