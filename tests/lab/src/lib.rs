//! Labs: whole clusters on one machine, every node a network namespace with a `meshd` of its own.
//!
//! A *machine* is a cgroup, an init process that holds its network, mount and UTS namespaces, and
//! one link to the router's namespace, where a bridge is the underlay switch. Nodes, the client
//! outside the cluster and the router are all machines; nodes also run a daemon. Nothing of a lab
//! lives in the host's own namespaces: links are made in the router's namespace and handed on from
//! there, so a lab that dies half-way leaves no link behind.
//!
//! Everything that a lab makes is named after it, and `down` goes by these names, not by what was
//! recorded: that is why it also clears a lab whose `up` was killed.
//!
//! Read [`topology`] for names and addresses, then [`Lab`].

mod capture;
mod cluster;
mod daemon;
mod down;
mod faults;
pub mod host;
pub mod http;
mod init;
mod lab;
mod machine;
pub mod outside;
mod preflight;
pub mod topology;
mod wire;

pub use daemon::DaemonSignal;
pub use down::{down, known_labs};
pub use faults::{Impairment, Share, parse_delay, parse_rate};
pub use init::run_init;
pub use lab::{Lab, NodeState, Row, UpOptions};
pub use machine::enter;
pub use topology::{LabName, Member, Role, Topology};
