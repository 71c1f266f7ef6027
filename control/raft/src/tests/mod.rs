//! Whole groups in one process, over a transport that can be cut.

mod cluster;
mod net;
mod suite;
