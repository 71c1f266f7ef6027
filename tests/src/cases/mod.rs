//! The cases, by what they are about. Each leaves services and networks to be cleared away.

pub mod churn;
pub mod cli;
pub mod cluster;
pub mod dns;
pub mod events;
pub mod gateway;
pub mod gossip;
pub mod heal;
pub mod join;
pub mod jumbo;
pub mod keys;
pub mod lab;
pub mod logging;
pub mod logs;
pub mod mesh;
pub mod metrics;
pub mod network;
pub mod node;
pub mod paths;
pub mod raft;
pub mod resources;
pub mod restart;
pub mod roles;
pub mod security;
pub mod service;
pub mod swarm;
pub mod trust;
pub mod vip;

/// A group of a module's functions: the name of a case is its function's.
macro_rules! group {
    ($name:literal: $($case:ident),* $(,)?) => {
        /// The cases of this module.
        pub const GROUP: crate::runner::Group = crate::runner::Group {
            name: $name,
            cases: &[$(crate::runner::Case { name: stringify!($case), run: $case }),*],
        };
    };
}
pub(crate) use group;
