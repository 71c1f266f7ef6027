//! What only the leader can do, asked for on any manager: it is done here if this node leads, else
//! forwarded, and tried again over a change of leaders until a deadline. Writes carry an id, so
//! trying again applies nothing twice.

use std::{future::Future, time::Duration};

use mesh_control::command::{Outcome, Rejection};
use mesh_types::{NodeNumber, Revision};
use openraft::{
    ChangeMembers, RaftMetrics, ReadPolicy, ServerState,
    async_runtime::watch::WatchReceiver as _,
    errors::{ChangeMembershipError, ClientWriteError, LinearizableReadError, RaftError},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;
use tokio::time::{Instant, timeout};

use crate::{
    config::Timed,
    handle::{Core, Inner},
    network::{RpcKind, call},
    types::{Answer, Member, Types, Write},
};

/// What Swarm's clients are told while there is no majority.
pub const NO_LEADER: &str = "rpc error: code = Unknown desc = The swarm does not have a leader. \
    It's possible that too few managers are online. \
    Make sure more than half of the managers are online.";

/// A write that is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Where in the log; this node's store is at least there.
    pub revision: Revision,
    /// What came of it.
    pub outcome: Outcome,
}

/// Why a write is not done.
#[derive(Debug, Error)]
pub enum ProposeError {
    /// The store refused it; nothing changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// No majority within the deadline. It may still be applied if it had reached a leader.
    #[error("{}", NO_LEADER)]
    NoLeader,
    /// It is done, but this manager did not catch up within the deadline: a read here may miss it.
    #[error("the change is done (revision {revision}), but this manager is behind")]
    Behind {
        /// Where in the log.
        revision: Revision,
    },
    /// Refused before raft: no entry may be that large.
    #[error("the change is too large: {bytes} bytes, at most {limit} are possible")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Raft stopped here: shut down, or its disk failed. A disk failure needs a restart of the
    /// daemon once the disk is well.
    #[error("the store of this manager stopped: {0}")]
    Stopped(String),
}

/// Why a read cannot be current.
#[derive(Debug, Error)]
pub enum ReadError {
    /// No majority within the deadline.
    #[error("{}", NO_LEADER)]
    NoLeader,
    /// As [`ProposeError::Stopped`].
    #[error("the store of this manager stopped: {0}")]
    Stopped(String),
}

/// Why the voters did not change.
#[derive(Debug, Error)]
pub enum VoterError {
    /// No majority within the deadline, or another change went on all the time.
    #[error("{}", NO_LEADER)]
    NoLeader,
    /// The new manager did not catch up in time: it is not reachable, or not running.
    #[error(
        "manager {0} did not catch up with the log in time; is its port 2377 reachable from the other managers?"
    )]
    Lagging(NodeNumber),
    /// The last voter cannot go.
    #[error("this is the last manager of the cluster")]
    Last,
    /// As [`ProposeError::Stopped`].
    #[error("the store of this manager stopped: {0}")]
    Stopped(String),
}

/// A change of the voters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum VoterChange {
    Add { id: u64, member: Member },
    Remove { id: u64 },
}

/// A leader's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Verdict<T> {
    /// Done.
    Done(T),
    /// Not by this node, or not now: ask again.
    Again,
    /// Never.
    Refused(Refusal),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Refusal {
    Lagging,
    Last,
    Stopped(String),
}

/// Why [`Inner::on_leader`] gave up.
pub(crate) enum GaveUp {
    NoLeader,
    Refused(Refusal),
}

enum Leader {
    Me,
    Other(u64, Member),
    Unknown,
}

fn leader(metrics: &RaftMetrics<Types>) -> Leader {
    match metrics.current_leader {
        Some(id) if id == metrics.id && metrics.state == ServerState::Leader => Leader::Me,
        Some(id) if id != metrics.id => match metrics.membership_config.get_node(&id) {
            Some(member) => Leader::Other(id, *member),
            None => Leader::Unknown,
        },
        _ => Leader::Unknown,
    }
}

/// How long to wait before the same leader is asked again.
const PAUSE: Duration = Duration::from_millis(100);

impl Inner {
    /// Has a request done by the leader, whoever that is, within `patience`.
    pub(crate) async fn on_leader<Req, Resp, Local, Fut>(
        &self,
        kind: RpcKind,
        request: &Req,
        patience: Duration,
        local: Local,
    ) -> Result<Resp, GaveUp>
    where
        Req: Serialize,
        Resp: DeserializeOwned,
        Local: Fn(Duration) -> Fut,
        Fut: Future<Output = Verdict<Resp>>,
    {
        let deadline = Instant::now() + patience;
        let mut metrics = self.core.metrics();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GaveUp::NoLeader);
            }
            let (now, asked) = {
                let metrics = metrics.borrow_watched();
                if let Err(fatal) = &metrics.running_state {
                    return Err(GaveUp::Refused(Refusal::Stopped(fatal.to_string())));
                }
                (leader(&metrics), metrics.current_leader)
            };
            let verdict = match now {
                Leader::Me => local(left).await,
                Leader::Other(id, member) => {
                    let called = call(&*self.transport, (id, member), kind, request, left);
                    tokio::select! {
                        answer = called => answer.unwrap_or_else(|error| {
                            tracing::debug!(%kind, number = id, %error, "forwarding failed");
                            Verdict::Again
                        }),
                        // The leader that was asked may be gone: ask its successor.
                        Ok(_) = metrics
                            .wait_until(|m| m.current_leader.is_some_and(|new| new != id)) =>
                        {
                            continue
                        }
                    }
                }
                Leader::Unknown => Verdict::Again,
            };
            match verdict {
                Verdict::Done(answer) => return Ok(answer),
                Verdict::Refused(refusal) => return Err(GaveUp::Refused(refusal)),
                Verdict::Again => {
                    let pause = PAUSE.min(deadline.saturating_duration_since(Instant::now()));
                    // Either way it is tried again.
                    let changed = metrics.wait_until(|m| m.current_leader != asked);
                    if let Ok(Err(_)) = timeout(pause, changed).await {
                        let why = "it was shut down".to_owned();
                        return Err(GaveUp::Refused(Refusal::Stopped(why)));
                    }
                }
            }
        }
    }

    /// A write by this node as the leader.
    pub(crate) async fn write_here(&self, write: Write, patience: Duration) -> Verdict<Answer> {
        let began = Instant::now();
        let written = timeout(patience, self.core.client_write(write)).await;
        (self.config.observe)(Timed::Write, began.elapsed());
        match written {
            Ok(Ok(done)) => match done.data.0 {
                Some(answer) => Verdict::Done(answer),
                None => stopped("a write was answered as raft's own entry"),
            },
            Ok(Err(RaftError::Fatal(fatal))) => stopped(fatal),
            Ok(Err(RaftError::APIError(_))) | Err(_) => Verdict::Again,
        }
    }

    /// The read index by this node as the leader: a majority confirms that it leads.
    pub(crate) async fn read_index_here(&self, patience: Duration) -> Verdict<u64> {
        match timeout(patience, self.core.get_read_linearizer(ReadPolicy::ReadIndex)).await {
            Ok(Ok(linearizer)) => Verdict::Done(linearizer.read_log_id().log_id().index),
            Ok(Err(RaftError::Fatal(fatal))) => stopped(fatal),
            Ok(Err(RaftError::APIError(
                LinearizableReadError::ForwardToLeader(_)
                | LinearizableReadError::QuorumNotEnough(_),
            )))
            | Err(_) => Verdict::Again,
        }
    }

    /// A change of the voters by this node as the leader: a learner first, then the joint change;
    /// one change at a time. Done already: nothing to do.
    pub(crate) async fn change_here(
        &self,
        change: VoterChange,
        patience: Duration,
    ) -> Verdict<u64> {
        let deadline = Instant::now() + patience;
        let Ok(_one_at_a_time) = timeout(patience, self.changing.lock()).await else {
            return Verdict::Again;
        };
        let left = || deadline.saturating_duration_since(Instant::now());
        match change {
            VoterChange::Add { id, member } => add(&self.core, id, member, left()).await,
            VoterChange::Remove { id } => remove(&self.core, id, left()).await,
        }
    }
}

fn stopped<T>(why: impl ToString) -> Verdict<T> {
    Verdict::Refused(Refusal::Stopped(why.to_string()))
}

async fn add(core: &Core, id: u64, member: Member, patience: Duration) -> Verdict<u64> {
    let membership = core.metrics().borrow_watched().membership_config.clone();
    let known = membership.get_node(&id).copied();
    let voter = membership.voter_ids().any(|voter| voter == id);
    if voter && known == Some(member) {
        return Verdict::Done(membership.log_id().map_or(0, |id| id.index));
    }
    if known.is_some_and(|known| known != member) {
        let moved = ChangeMembers::SetNodes(BTreeMap::from([(id, member)]));
        let done = change(core, moved, patience).await;
        if voter || !matches!(done, Verdict::Done(_)) {
            return done;
        }
    }
    let deadline = Instant::now() + patience;
    let learner = match timeout(patience, core.add_learner(id, member, false)).await {
        Ok(Ok(added)) => added.log_id.index,
        Ok(Err(error)) => return refuse(error),
        Err(_) => return Verdict::Again,
    };
    // It must have heard of that itself: one that is not there would be counted on as a voter, and
    // raft's own idea of "near the end of the log" takes none for that.
    let patience = deadline.saturating_duration_since(Instant::now());
    let mut metrics = core.metrics();
    let there = metrics.wait_until(|now| {
        let far = now.replication.as_ref().and_then(|all| *all.get(&id)?);
        now.state != ServerState::Leader || far.is_some_and(|far| far.index >= learner)
    });
    if !matches!(timeout(patience, there).await, Ok(Ok(_))) {
        return Verdict::Refused(Refusal::Lagging);
    }
    let patience = deadline.saturating_duration_since(Instant::now());
    change(core, ChangeMembers::AddVoterIds(BTreeSet::from([id])), patience).await
}

async fn remove(core: &Core, id: u64, patience: Duration) -> Verdict<u64> {
    let membership = core.metrics().borrow_watched().membership_config.clone();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    if voters == BTreeSet::from([id]) {
        return Verdict::Refused(Refusal::Last);
    }
    if voters.contains(&id) {
        return change(core, ChangeMembers::RemoveVoters(BTreeSet::from([id])), patience).await;
    }
    if membership.get_node(&id).is_some() {
        return change(core, ChangeMembers::RemoveNodes(BTreeSet::from([id])), patience).await;
    }
    Verdict::Done(membership.log_id().map_or(0, |id| id.index))
}

async fn change(
    core: &Core,
    change: ChangeMembers<u64, Member>,
    patience: Duration,
) -> Verdict<u64> {
    match timeout(patience, core.change_membership(change, false)).await {
        Ok(Ok(done)) => Verdict::Done(done.log_id.index),
        Ok(Err(error)) => refuse(error),
        Err(_) => Verdict::Again,
    }
}

fn refuse<T>(error: RaftError<Types, ClientWriteError<Types>>) -> Verdict<T> {
    match error {
        RaftError::Fatal(fatal) => stopped(fatal),
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            ChangeMembershipError::EmptyMembership(_),
        )) => Verdict::Refused(Refusal::Last),
        // Another change is going on, or this node leads no more.
        RaftError::APIError(error) => {
            tracing::debug!(%error, "the voters were not changed yet");
            Verdict::Again
        }
    }
}
