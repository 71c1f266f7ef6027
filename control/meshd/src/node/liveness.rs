//! Who is alive, as the leader sees it: a pure function of when each node was last heard.
//!
//! Nodes report at least once a second to the manager that serves their session; other managers
//! pass what they heard on to the leader. A new leader gives every node a fresh start, so that a
//! change of leader declares nobody dead.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mesh_control::{
    command::NodeReport,
    model::{NodeState, NodeStatus},
    store::Store,
};
use mesh_types::NodeId;

/// How often nodes report when they have nothing to say.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);
/// A node silent for this long is down. Its tasks are replaced once its data path is silent too,
/// for as long as the cluster's `reschedule_after_secs` says.
pub(crate) const DOWN_AFTER: Duration = Duration::from_secs(10);

/// Nobody waits for the acknowledgement of a node that is silent for this long.
const SILENT: Duration = Duration::from_secs(2);

/// A node that was never heard counts as last heard this long ago: not ready, not down yet.
const UNHEARD: Duration = Duration::from_secs(3);

/// The reason of a node that left. It comes back under another id or not at all, so what is still
/// heard of it for a moment makes it ready no more.
pub(crate) const LEFT: &str = "the node left the cluster";
/// Whoever looks rarer than this slept meanwhile, and heard nobody for that alone.
const SLEPT: Duration = Duration::from_secs(3);

/// When each node was last heard. Time is a [`Duration`] since some moment at least [`DOWN_AFTER`]
/// before the daemon's start.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    heard: BTreeMap<NodeId, Duration>,
    /// When somebody's probe last reached its data path.
    reached: BTreeMap<NodeId, Duration>,
    pulse: Option<Duration>,
    /// Since when it listens: from what was heard before, silence says nothing.
    since: Option<Duration>,
}

impl Liveness {
    /// Time passes here too; called at least twice a second. After a gap (a paused machine, a
    /// stopped process) everybody starts afresh: their silence was this node's own.
    pub(crate) fn pulse(&mut self, now: Duration) {
        let before = self.pulse.replace(now);
        if before.is_some_and(|before| now.saturating_sub(before) > SLEPT) {
            self.since = Some(now);
            let at = now.saturating_sub(UNHEARD);
            for heard in self.heard.values_mut().chain(self.reached.values_mut()) {
                *heard = (*heard).max(at);
            }
        }
    }

    /// Everybody started afresh a moment ago. A new leader hears most nodes through other managers,
    /// and only from now on.
    pub(crate) fn listening(&self, now: Duration) -> bool {
        self.since.is_some_and(|at| now.saturating_sub(at) < SILENT)
    }

    /// A node was heard, here or by another manager.
    pub(crate) fn heard(&mut self, node: NodeId, now: Duration) {
        self.pulse(now);
        let at = self.heard.entry(node).or_default();
        *at = (*at).max(now);
    }

    /// A node answered a data-path probe of somebody whose report is fresh.
    pub(crate) fn reached(&mut self, node: NodeId, now: Duration) {
        let at = self.reached.entry(node).or_default();
        *at = (*at).max(now);
    }

    /// Nodes reached within the last `window`.
    pub(crate) fn recently_reached(&self, now: Duration, window: Duration) -> Vec<NodeId> {
        recent(&self.reached, now, window)
    }

    /// Nodes not heard for two seconds: others are better for new tasks, and nobody waits for their
    /// acknowledgements unless this manager is [listening](Self::listening).
    pub(crate) fn silent(&self, store: &Store, now: Duration) -> BTreeSet<NodeId> {
        let heard = self.recent(now, SILENT).into_iter().collect();
        store.nodes.keys().copied().collect::<BTreeSet<_>>().difference(&heard).copied().collect()
    }

    /// Nodes heard within the last `window`: what a manager passes on to the leader.
    pub(crate) fn recent(&self, now: Duration, window: Duration) -> Vec<NodeId> {
        recent(&self.heard, now, window)
    }

    /// This manager became the leader: everybody starts afresh.
    pub(crate) fn lead(&mut self, store: &Store, now: Duration) {
        self.since = Some(now);
        let at = now.saturating_sub(UNHEARD);
        for node in store.nodes.keys() {
            for seen in [&mut self.heard, &mut self.reached] {
                let entry = seen.entry(*node).or_default();
                *entry = (*entry).max(at);
            }
        }
    }

    /// The verdicts that differ from the store's.
    pub(crate) fn verdicts(&mut self, store: &Store, now: Duration) -> Vec<NodeReport> {
        self.pulse(now);
        self.heard.retain(|node, _| store.nodes.contains_key(node));
        self.reached.retain(|node, _| store.nodes.contains_key(node));
        let reschedule_after = store
            .cluster
            .as_ref()
            .map_or(DOWN_AFTER, |cluster| Duration::from_secs(cluster.spec.reschedule_after_secs));
        let mut reports = Vec::new();
        for (id, node) in &store.nodes {
            let unheard = now.saturating_sub(UNHEARD);
            let silent = now.saturating_sub(*self.heard.entry(*id).or_insert(unheard));
            let status = &node.status;
            let reached = self.reached.get(id).copied().unwrap_or(unheard);
            let dead = silent.min(now.saturating_sub(reached)) >= reschedule_after;
            let (state, message, lost) = match status.state {
                NodeState::Down if status.message == LEFT => continue,
                NodeState::Ready if silent >= DOWN_AFTER => (
                    NodeState::Down,
                    format!("heartbeat failure: not heard for {} s", silent.as_secs()),
                    dead,
                ),
                NodeState::Unknown | NodeState::Down | NodeState::Disconnected
                    if silent < HEARTBEAT * 2 =>
                {
                    (NodeState::Ready, String::new(), false)
                }
                NodeState::Unknown if silent >= DOWN_AFTER => {
                    (NodeState::Down, "not heard since it joined".to_owned(), dead)
                }
                NodeState::Down if dead && !status.lost => {
                    (NodeState::Down, status.message.clone(), true)
                }
                _ => continue,
            };
            let status = Some(NodeStatus { state, message, lost });
            reports.push(NodeReport { id: *id, status, description: None });
        }
        reports
    }
}

fn recent(seen: &BTreeMap<NodeId, Duration>, now: Duration, window: Duration) -> Vec<NodeId> {
    let fresh = |at: Duration| now.saturating_sub(at) <= window;
    seen.iter().filter(|(_, at)| fresh(**at)).map(|(node, _)| *node).collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use mesh_control::{
        command::{Command, InitCluster, NewNode, Proposal},
        model::{ClusterSpec, NodeDescription, NodeSpec, Role},
    };
    use mesh_types::{ClusterId, NetworkId};

    use super::*;

    const NODE: NodeId = NodeId::from_bits(7);

    fn at(secs: u64) -> Duration {
        Duration::from_secs(3600 + secs)
    }

    fn store() -> Store {
        let ip = IpAddr::from([192, 0, 2, 1]);
        let init = InitCluster {
            id: ClusterId::from_bits(1),
            spec: ClusterSpec::default(),
            ca_cert_pem: String::new(),
            ca_key_pem: String::new(),
            worker_secret: [1; 16],
            manager_secret: [2; 16],
            gossip_key: [3; 32],
            ingress: NetworkId::from_bits(1),
            first: NewNode {
                id: NODE,
                spec: NodeSpec { role: Role::Manager, ..NodeSpec::default() },
                description: NodeDescription::default(),
                address: (ip, 2377).into(),
                vtep: ip,
            },
        };
        let mut store = Store::default();
        apply(&mut store, Command::Init(Box::new(init)));
        store
    }

    fn apply(store: &mut Store, command: Command) {
        let revision = store.revision.next().unwrap();
        store.apply(revision, &Proposal { now_ms: 0, command }).unwrap();
    }

    /// Looks twice a second, as the daemon does; the states that it went through.
    fn watch(
        liveness: &mut Liveness,
        store: &mut Store,
        secs: std::ops::Range<u64>,
    ) -> Vec<NodeState> {
        let mut seen = Vec::new();
        for half in secs.start * 2..secs.end * 2 {
            let reports = liveness.verdicts(store, at(0) + Duration::from_millis(500 * half));
            seen.extend(
                reports
                    .iter()
                    .filter_map(|r| r.status.as_ref())
                    .filter(|s| !s.lost)
                    .map(|s| s.state),
            );
            apply(store, Command::ReportNodes(reports));
        }
        seen
    }

    #[test]
    fn silence_makes_a_node_down() {
        let (mut liveness, mut store) = (Liveness::default(), store());
        liveness.heard(NODE, at(0));
        assert_eq!(watch(&mut liveness, &mut store, 0..9), [NodeState::Ready]);
        assert_eq!(watch(&mut liveness, &mut store, 9..12), [NodeState::Down]);
        liveness.heard(NODE, at(12));
        assert_eq!(watch(&mut liveness, &mut store, 12..13), [NodeState::Ready]);
    }

    #[test]
    fn a_node_is_lost_when_its_data_path_is_silent_too() {
        let (mut liveness, mut store) = (Liveness::default(), store());
        let lost = |store: &Store| store.nodes[&NODE].status.lost;
        liveness.heard(NODE, at(0));
        watch(&mut liveness, &mut store, 0..14);
        assert!(!lost(&store));
        // Its daemon alone is silent: probes go on to be answered.
        for second in 14..40 {
            liveness.reached(NODE, at(second));
            watch(&mut liveness, &mut store, second..second + 1);
            assert!(!lost(&store));
        }
        watch(&mut liveness, &mut store, 40..53);
        assert!(!lost(&store));
        watch(&mut liveness, &mut store, 53..56);
        assert!(lost(&store));
        liveness.heard(NODE, at(56));
        assert_eq!(watch(&mut liveness, &mut store, 56..57), [NodeState::Ready]);
        assert!(!lost(&store));
    }

    #[test]
    fn a_manager_that_slept_blames_nobody() {
        let (mut liveness, mut store) = (Liveness::default(), store());
        liveness.heard(NODE, at(0));
        assert_eq!(watch(&mut liveness, &mut store, 0..2), [NodeState::Ready]);
        // The process was stopped for half a minute; it looks before it hears anybody.
        assert_eq!(watch(&mut liveness, &mut store, 32..36), []);
        // Silent all the same once it is awake: that counts.
        assert_eq!(watch(&mut liveness, &mut store, 36..42), [NodeState::Down]);
    }

    #[test]
    fn a_new_leader_listens_before_it_goes_on_without_anybody() {
        let (mut liveness, store) = (Liveness::default(), store());
        assert!(!liveness.listening(at(9)));
        liveness.lead(&store, at(10));
        // No place for new tasks, but its acknowledgement is waited for.
        assert!(liveness.silent(&store, at(11)).contains(&NODE) && liveness.listening(at(11)));
        assert!(!liveness.listening(at(12)));
    }

    #[test]
    fn a_node_that_left_is_not_ready_again() {
        let (mut liveness, mut store) = (Liveness::default(), store());
        liveness.heard(NODE, at(0));
        assert_eq!(watch(&mut liveness, &mut store, 0..1), [NodeState::Ready]);
        let status = NodeStatus { state: NodeState::Down, message: LEFT.to_owned(), lost: true };
        let left = NodeReport { id: NODE, status: Some(status), description: None };
        apply(&mut store, Command::ReportNodes(vec![left]));
        liveness.heard(NODE, at(1));
        assert_eq!(watch(&mut liveness, &mut store, 1..20), []);
    }
}
