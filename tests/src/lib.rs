//! End-to-end tests of mesh in labs: what users do, through the command lines that they have.
//!
//! All cases of a plan share one lab, one after the other, and leave it empty behind them. The
//! groups of the data plane run twice: as built, and with the VXLAN device as forced fallback. The
//! binary `lab` (`tests/lab.rs`) is its own test harness: a lab must be taken down at the end.

pub mod cases;
pub mod cluster;
pub mod load;
pub mod runner;
