//! The leader's loops as one pure function over a store view.

use mesh_types::{ServiceId, NetworkId, TaskId};

use crate::{command::Command, store::Store};

/// What the loops ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// Proposals to make, in order.
    pub commands: Vec<Command>,
    /// Look again then at the latest, even if nothing changes (ms since the epoch).
    pub wake_at_ms: Option<u64>,
}

/// What the loops remember between rounds; lost with leadership, never needed for correctness.
#[derive(Debug, Default)]
pub struct LeaderMemory {
    /// Recent failures, for pacing and for ranking nodes.
    pub failures: std::collections::BTreeMap<ServiceId, Vec<(TaskId, u64)>>,
    /// Unused for now: networks with allocation trouble, to say it once.
    pub complained: std::collections::BTreeSet<NetworkId>,
}

/// One round. Level-triggered: called on every change of the store and at `wake_at_ms`; with nothing
/// left to do it returns no commands. `fresh` draws ids.
pub fn decide(
    store: &Store,
    memory: &mut LeaderMemory,
    now_ms: u64,
    fresh: &mut dyn FnMut() -> u128,
) -> Decision {
    let _ = (store, memory, now_ms, fresh);
    Decision::default()
}
