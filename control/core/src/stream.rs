//! The revision stream and the assignments, derived from the store.

use std::collections::BTreeSet;

use mesh_types::{
    NodeId, Revision,
    record::{Delta, Scope},
    task::TaskAssignment,
};

use crate::store::Store;

/// The records that a store implies, each with the revision of its last change, and tombstones.
/// Every manager keeps one and feeds it after each applied entry.
#[derive(Debug, Default)]
pub struct RecordLog {}

impl RecordLog {
    /// Brings the log up to the store.
    pub fn update(&mut self, store: &Store) {
        let _ = store;
    }

    /// The step that brings a node from `from`, holding `held`, up to date on `wanted`.
    #[must_use]
    pub fn delta(&self, from: Revision, held: &BTreeSet<Scope>, wanted: &BTreeSet<Scope>) -> Delta {
        let _ = (from, held, wanted);
        Delta::default()
    }
}

/// The scopes that a node subscribes to: the cluster, the ingress network, its tasks' networks.
#[must_use]
pub fn subscription(store: &Store, node: NodeId) -> BTreeSet<Scope> {
    let _ = (store, node);
    BTreeSet::from([Scope::Cluster])
}

/// The whole set of tasks that a node should have.
#[must_use]
pub fn assignments(store: &Store, node: NodeId) -> Vec<TaskAssignment> {
    let _ = (store, node);
    Vec::new()
}
