//! Looks up what is now, for the metrics: see [`crate::metrics`].

use std::{collections::BTreeMap, time::UNIX_EPOCH};

use mesh_control::{model::NodeState, store::Store};
use mesh_types::task::TaskState;

use super::{Node, State, manager::Manager, member::Member};
use crate::{
    api::backend::EngineFacts,
    api::usage,
    metrics::{self, Metric, list},
    pki,
    rpc::messages::CounterValue,
};

/// What is looked up: without its source it is not there, rather than as it last was.
const LOOKED_UP: &[&Metric] = &[
    &list::OVERLAY_PACKETS,
    &list::OVERLAY_DROPS,
    &list::OVERLAY_EVENTS,
    &list::OVERLAY_REVISION,
    &list::OVERLAY_RECORDS,
    &list::LB_FLOWS_NEW,
    &list::LB_REBALANCED,
    &list::LB_TABLE_FULL,
    &list::LB_FLOWS,
    &list::LB_FLOWS_MAX,
    &list::DNS_UP,
    &list::DNS_QUERIES,
    &list::DNS_ANSWERS,
    &list::DNS_DROPS,
    &list::GOSSIP_MEMBERS,
    &list::GOSSIP_SYNCS,
    &list::PROBE_PEERS,
    &list::RECONCILER_HEALED,
    &list::RAFT_TERM,
    &list::RAFT_LEADER,
    &list::RAFT_QUORUM,
    &list::RAFT_LEADER_NUMBER,
    &list::RAFT_MEMBERS,
    &list::RAFT_INDEX,
    &list::RAFT_LAG,
    &list::RAFT_STORE_BYTES,
    &list::REFUSED,
    &list::TASKS,
    &list::CERTIFICATE_EXPIRY,
    &list::ENGINE_CONTAINERS,
    &list::SWARM_NODE_INFO,
    &list::SWARM_LEADER,
    &list::SWARM_NODES,
    &list::SWARM_TASKS,
    &list::SWARM_SERVICES,
    &list::SWARM_NETWORKS,
];

/// All states that a task can be in.
const TASK_STATES: [TaskState; 14] = [
    TaskState::New,
    TaskState::Pending,
    TaskState::Assigned,
    TaskState::Accepted,
    TaskState::Preparing,
    TaskState::Ready,
    TaskState::Starting,
    TaskState::Running,
    TaskState::Complete,
    TaskState::Shutdown,
    TaskState::Failed,
    TaskState::Rejected,
    TaskState::Remove,
    TaskState::Orphaned,
];

impl Node {
    /// All metrics, those that are looked up as they are now.
    pub(super) async fn scrape(&self) -> String {
        // One at a time: another would clear what this one has looked up.
        let _scraping = self.scraping.lock().await;
        LOOKED_UP.iter().for_each(|metric| metric.clear());
        list::BUILD.set(&[env!("CARGO_PKG_VERSION")], 1);
        metrics::look_at_process();
        let (member, manager) = match self.state() {
            State::Active(member) => (Some(member.clone()), member.manager()),
            State::Inactive | State::Pending | State::Error(_) => (None, None),
        };
        let id = member.as_ref().map(|member| member.identity().node.to_string());
        engine(&self.engine, id.as_deref().unwrap_or_default());
        list::SWARM_NODE_MANAGER.set(&[], u64::from(manager.is_some()));
        if let Some(member) = member {
            look_at_member(&member).await;
        }
        if let Some(manager) = manager {
            look_at_manager(&manager);
            let bytes = usage::bytes(&self.options.raft_dir()).unwrap_or_default();
            list::RAFT_STORE_BYTES.set(&[], bytes);
        }
        metrics::text()
    }
}

fn engine(facts: &EngineFacts, id: &str) {
    let EngineFacts { kernel, operating_system, architecture, cpus, memory_bytes, .. } = facts;
    let version = env!("CARGO_PKG_VERSION");
    let info = [architecture, "", id, "", kernel, operating_system, "linux", "", version];
    list::ENGINE_INFO.clear();
    list::ENGINE_INFO.set(&info, 1);
    list::ENGINE_CPUS.set(&[], *cpus as u64);
    list::ENGINE_MEMORY.set(&[], *memory_bytes);
}

async fn look_at_member(member: &Member) {
    let identity = member.identity();
    let (cluster, node) = (identity.cluster.to_string(), identity.node.to_string());
    list::SWARM_NODE_INFO.set(&[&cluster, &node], 1);
    let validity = pki::parse_pem(&identity.cert_pem).and_then(|cert| pki::validity(&cert));
    if let Some(end) = validity.ok().and_then(|(_, end)| end.duration_since(UNIX_EPOCH).ok()) {
        list::CERTIFICATE_EXPIRY.set(&[], end.as_secs());
    }
    member.look();
    // A node that is starting has none yet.
    for CounterValue { name, value, is_drop } in member.handler.counters().await.unwrap_or_default()
    {
        let (metric, label) = place(&name, is_drop);
        let labels: &[&str] = if metric.labels().is_empty() { &[] } else { &[label] };
        metric.set(labels, value);
    }
    let view = member.agent.snapshot();
    let states = tally(view.tasks.values().map(|task| task.status.state));
    for (state, count) in &states {
        list::TASKS.set(&[state.name()], *count);
    }
    let ended = states.iter().filter(|(state, _)| state.is_final()).map(|(_, count)| count).sum();
    let running = states.get(&TaskState::Running).copied().unwrap_or_default();
    for (state, count) in [("running", running), ("paused", 0), ("stopped", ended)] {
        list::ENGINE_CONTAINERS.set(&[state], count);
    }
}

impl Member {
    /// Looks at its parts.
    fn look(&self) {
        list::DNS_UP.set(&[], u64::from(self.resolver.status().borrow().is_some()));
        let probes = &self.probes;
        for (state, peers) in [
            ("reached", &probes.reached),
            ("silent", &probes.silent),
            ("withdrawn", &probes.withdrawn),
        ] {
            list::PROBE_PEERS.set(&[state], peers.borrow().len() as u64);
        }
        let (flows, flows_max) = *self.dataplane.flows().borrow();
        list::LB_FLOWS.set(&[], flows);
        list::LB_FLOWS_MAX.set(&[], flows_max);
        list::OVERLAY_REVISION.set(&["kernel"], self.dataplane.applied().borrow().get());
        let Some(records) = self.handler.records.get().map(|records| records.borrow().clone())
        else {
            return;
        };
        list::OVERLAY_REVISION.set(&["told"], records.revision.get());
        for (kind, count) in [
            ("nodes", records.nodes.len()),
            ("networks", records.networks.len()),
            ("services", records.services.len()),
            ("endpoints", records.endpoints.len()),
        ] {
            list::OVERLAY_RECORDS.set(&[kind], count as u64);
        }
    }
}

fn look_at_manager(manager: &Manager) {
    let leadership = manager.raft.leadership().borrow().clone();
    let leader = leadership.leader.map_or(0, |(number, _)| number.get());
    list::RAFT_TERM.set(&[], leadership.term);
    list::RAFT_LEADER.set(&[], u64::from(leadership.me_leader));
    list::SWARM_LEADER.set(&[], u64::from(leadership.me_leader));
    list::RAFT_QUORUM.set(&[], u64::from(leadership.has_quorum));
    list::RAFT_LEADER_NUMBER.set(&[], leader);
    list::RAFT_MEMBERS.set(&["voter"], leadership.voters.len() as u64);
    list::RAFT_MEMBERS.set(&["learner"], leadership.learners.len() as u64);
    let progress = manager.raft.progress();
    for (of, index) in
        [("last", progress.last), ("applied", progress.applied), ("snapshot", progress.snapshot)]
    {
        list::RAFT_INDEX.set(&[of], index);
    }
    for (number, known) in &progress.others {
        let lag = progress.last.saturating_sub(*known);
        list::RAFT_LAG.set(&[&number.to_string()], lag);
    }
    manager.raft.read(look_at_store);
}

fn look_at_store(store: &Store) {
    let states = [NodeState::Unknown, NodeState::Down, NodeState::Ready, NodeState::Disconnected];
    for state in states {
        let count = store.nodes.values().filter(|node| node.status.state == state).count();
        list::SWARM_NODES.set(&[state.name()], count as u64);
    }
    for (state, count) in tally(store.tasks.values().map(|task| task.status.state)) {
        list::SWARM_TASKS.set(&[state.name()], count);
    }
    list::SWARM_SERVICES.set(&[], store.services.len() as u64);
    list::SWARM_NETWORKS.set(&[], store.networks.len() as u64);
}

/// How many tasks are in each state.
fn tally(states: impl Iterator<Item = TaskState>) -> BTreeMap<TaskState, u64> {
    let mut tally: BTreeMap<_, _> = TASK_STATES.iter().map(|state| (*state, 0)).collect();
    states.for_each(|state| *tally.entry(state).or_default() += 1);
    tally
}

/// Where a counter of the node's belongs.
fn place(name: &str, is_drop: bool) -> (&'static Metric, &str) {
    match name {
        "to_local" | "to_tunnel" | "from_tunnel" | "mesh_in" | "mesh_out" | "to_host" => {
            (&list::OVERLAY_PACKETS, name)
        }
        "flow_new" => (&list::LB_FLOWS_NEW, name),
        "flow_table_full" => (&list::LB_TABLE_FULL, name),
        "mesh_rebalanced" => (&list::LB_REBALANCED, name),
        "healed" => (&list::RECONCILER_HEALED, name),
        "anti_entropy_calls" => (&list::GOSSIP_SYNCS, "called"),
        "anti_entropy_failures" => (&list::GOSSIP_SYNCS, "failed"),
        "anti_entropy_answers" => (&list::GOSSIP_SYNCS, "answered"),
        "gossip_datagrams_dropped" => (&list::GOSSIP_DATAGRAMS, "rejected"),
        "gossip_members" => (&list::GOSSIP_MEMBERS, name),
        "rpc_connections_refused" => (&list::REFUSED, "connections"),
        "rpc_handshakes_refused" => (&list::REFUSED, "handshakes"),
        "rpc_calls_refused" => (&list::REFUSED, "calls"),
        "join_tokens_refused" => (&list::REFUSED, "join_tokens"),
        "join_tries_limited" => (&list::REFUSED, "join_tries"),
        "dns_queries" => (&list::DNS_QUERIES, name),
        "dns_answered_fast" => (&list::DNS_ANSWERS, "fast"),
        "dns_forwarded" => (&list::DNS_ANSWERS, "forwarded"),
        "dns_answered_from_cache" => (&list::DNS_ANSWERS, "cache"),
        "dns_too_many_forwarded" => (&list::DNS_DROPS, "too_many_forwarded"),
        "dns_rate_limited" => (&list::DNS_DROPS, "rate_limited"),
        _ if is_drop => (&list::OVERLAY_DROPS, name),
        _ => (&list::OVERLAY_EVENTS, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_a_place_with_the_labels_of_their_metric() {
        for (name, is_drop, metric, label) in [
            ("malformed", true, &list::OVERLAY_DROPS, "malformed"),
            ("to_tunnel", false, &list::OVERLAY_PACKETS, "to_tunnel"),
            ("arp_answered", false, &list::OVERLAY_EVENTS, "arp_answered"),
            ("dns_rate_limited", true, &list::DNS_DROPS, "rate_limited"),
        ] {
            let (found, as_label) = place(name, is_drop);
            assert_eq!((found.name(), as_label), (metric.name(), label));
        }
    }

    #[test]
    fn states_without_tasks_are_counted_too() {
        let tally = tally([TaskState::Failed, TaskState::Failed].into_iter());
        assert_eq!(tally[&TaskState::Failed], 2);
        assert_eq!(tally.values().sum::<u64>(), 2);
        assert_eq!(tally.len(), TASK_STATES.len());
    }
}
