//! Who leads, as this node sees it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use mesh_types::NodeNumber;
use openraft::{Instant as _, RaftMetrics, ServerState};

use crate::types::{LogId, Types};

/// Who leads, as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leadership {
    /// This node leads and a majority answered it a moment ago. Leader loops run while this is so;
    /// what they propose after it ceased is refused or fenced by raft itself.
    pub me_leader: bool,
    /// The leader, with its address for other managers. `None` during elections, and when nothing
    /// was heard of it for a while.
    pub leader: Option<(NodeNumber, SocketAddr)>,
    /// The term. At most one node leads in a term.
    pub term: u64,
    /// The managers that vote.
    pub voters: BTreeMap<NodeNumber, SocketAddr>,
    /// Those that only follow, yet or still.
    pub learners: BTreeSet<NodeNumber>,
    /// A leader with a majority behind it is known: writes go through.
    pub has_quorum: bool,
    /// Voters that answered the leader lately, as the leader sees it; empty on followers.
    pub reachable: BTreeSet<NodeNumber>,
}

/// How far the log is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    /// The last entry here.
    pub last: u64,
    /// The last one that is in the store.
    pub applied: u64,
    /// The last one that is in the snapshot.
    pub snapshot: u64,
    /// On the leader: the last one that each other manager is known to have.
    pub others: BTreeMap<NodeNumber, u64>,
}

impl Progress {
    pub(crate) fn of(metrics: &RaftMetrics<Types>) -> Self {
        let index = |id: &Option<LogId>| id.as_ref().map_or(0, |id| id.index);
        let others = metrics.replication.iter().flatten().filter(|(id, _)| **id != metrics.id);
        Self {
            last: metrics.last_log_index.unwrap_or_default(),
            applied: index(&metrics.last_applied),
            snapshot: index(&metrics.snapshot),
            others: others
                .filter_map(|(id, known)| Some((NodeNumber::new(*id).ok()?, index(known))))
                .collect(),
        }
    }
}

/// When a leader was last heard of.
#[derive(Debug, Default)]
pub(crate) struct LastHeard(Mutex<Option<Instant>>);

impl LastHeard {
    pub(crate) fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn within(&self, patience: Duration) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some_and(|t| t.elapsed() < patience)
    }
}

/// `patience`: how old the last word of a leader or of a majority may be.
pub(crate) fn judge(
    metrics: &RaftMetrics<Types>,
    heard: &LastHeard,
    patience: Duration,
) -> Leadership {
    let membership = metrics.membership_config.membership();
    let member = |id: u64| Some((NodeNumber::new(id).ok()?, membership.get_node(&id)?.address));
    let voters: BTreeMap<_, _> = membership.voter_ids().filter_map(member).collect();
    let learners = membership.learner_ids().filter_map(|id| NodeNumber::new(id).ok()).collect();
    let leading = metrics.state == ServerState::Leader && metrics.running_state.is_ok();
    let has_quorum = if leading {
        voters.len() == 1 || metrics.last_quorum_acked.is_some_and(|at| at.elapsed() < patience)
    } else {
        metrics.current_leader.is_some_and(|id| id != metrics.id) && heard.within(patience)
    };
    let reachable = metrics
        .heartbeat
        .iter()
        .filter(|_| leading)
        .flatten()
        .filter(|(id, at)| **id == metrics.id || at.is_some_and(|at| at.elapsed() < patience))
        .filter_map(|(id, _)| NodeNumber::new(*id).ok())
        .collect();
    Leadership {
        me_leader: leading && has_quorum,
        leader: metrics.current_leader.filter(|_| has_quorum).and_then(member),
        term: metrics.current_term,
        voters,
        learners,
        has_quorum,
        reachable,
    }
}
