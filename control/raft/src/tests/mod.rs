//! Whole groups in one process, over a transport that can be cut.

mod cluster;
mod histories;
pub(crate) mod net;
mod suite;
