//! Who is alive, as the leader sees it: a pure function of when each node was last heard.
//!
//! Nodes report at least once a second to the manager that serves their session; other managers
//! pass what they heard on to the leader. A new leader gives every node a fresh start, so that a
//! change of leader declares nobody dead.

use std::{collections::BTreeMap, time::Duration};

use mesh_control::{command::NodeReport, model::NodeState, store::Store};
use mesh_types::NodeId;

/// How often nodes report when they have nothing to say.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);
/// A node silent for this long is down and its tasks are replaced.
pub(crate) const DOWN_AFTER: Duration = Duration::from_secs(10);

/// A node that was never heard counts as last heard this long ago: not ready, not down yet.
const UNHEARD: Duration = Duration::from_secs(3);

/// When each node was last heard. Time is a [`Duration`] since some moment at least [`DOWN_AFTER`]
/// before the daemon's start.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    heard: BTreeMap<NodeId, Duration>,
}

impl Liveness {
    /// A node was heard, here or by another manager.
    pub(crate) fn heard(&mut self, node: NodeId, now: Duration) {
        let at = self.heard.entry(node).or_default();
        *at = (*at).max(now);
    }

    /// Nodes heard within the last `window`: what a manager passes on to the leader.
    pub(crate) fn recent(&self, now: Duration, window: Duration) -> Vec<NodeId> {
        self.heard
            .iter()
            .filter(|(_, at)| now.saturating_sub(**at) <= window)
            .map(|(node, _)| *node)
            .collect()
    }

    /// This manager became the leader: everybody starts afresh.
    pub(crate) fn lead(&mut self, store: &Store, now: Duration) {
        let at = now.saturating_sub(UNHEARD);
        for node in store.nodes.keys() {
            let entry = self.heard.entry(*node).or_default();
            *entry = (*entry).max(at);
        }
    }

    /// The verdicts that differ from the store's.
    pub(crate) fn verdicts(&mut self, store: &Store, now: Duration) -> Vec<NodeReport> {
        self.heard.retain(|node, _| store.nodes.contains_key(node));
        let mut reports = Vec::new();
        for (id, node) in &store.nodes {
            let unheard = now.saturating_sub(UNHEARD);
            let silent = now.saturating_sub(*self.heard.entry(*id).or_insert(unheard));
            let verdict = match node.status.state {
                NodeState::Ready if silent >= DOWN_AFTER => (
                    NodeState::Down,
                    format!("heartbeat failure: not heard for {} s", silent.as_secs()),
                ),
                NodeState::Unknown | NodeState::Down | NodeState::Disconnected
                    if silent < HEARTBEAT * 2 =>
                {
                    (NodeState::Ready, String::new())
                }
                NodeState::Unknown if silent >= DOWN_AFTER => {
                    (NodeState::Down, "not heard since it joined".to_owned())
                }
                _ => continue,
            };
            reports.push(NodeReport { id: *id, state: Some(verdict), description: None });
        }
        reports
    }
}
