//! Whole groups in one process, over a transport that can be cut.

mod cluster;
mod histories;
mod net;
mod suite;
