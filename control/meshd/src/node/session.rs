//! A node's session with a manager: records and assignments come down, statuses, acknowledged
//! revisions and signs of life go up. Any manager will do; with none reachable the node goes on
//! with what it has.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use mesh_control::{
    limit::{Allowance, Rate},
    model::NodeDescription,
};
use mesh_types::{
    NodeId, NodeNumber, Revision,
    record::{Delta, RecordSet},
};
use tokio::sync::watch;

use super::{clock, liveness::HEARTBEAT, persist};
use crate::{
    agent::{AgentHandle, StatusFeed},
    identity::Identity,
    options::Options,
    rpc::{
        CallError, Route, RpcClient, RpcErrorKind,
        messages::{
            ClusterKeys, ManagerAddress, NodeUpdate, ReportRequest, ReportResponse, SessionRequest,
        },
    },
    tls::Expect,
};

/// A manager that says nothing for this long is given up. It speaks once a second.
const SILENCE: Duration = Duration::from_secs(5);
/// Opening a session or reporting takes no longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Statuses in one report.
const STATUSES_MAX: usize = 512;
/// How often it says that it is shut out.
const TOLD: Rate = Rate { burst: 1, every: Duration::from_secs(60) };
/// Between rounds over all managers.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// What a session needs.
pub(crate) struct Session {
    /// This node.
    pub(crate) node: NodeId,
    /// Its certificate, which may be renewed.
    pub(crate) identity: watch::Receiver<Arc<Identity>>,
    /// For the state directory.
    pub(crate) options: Options,
    /// Calls managers.
    pub(crate) client: RpcClient,
    /// The records; this module alone writes them.
    pub(crate) records: watch::Sender<Arc<RecordSet>>,
    /// What changes with the cluster; this module alone writes it after the start.
    pub(crate) settings: watch::Sender<Arc<persist::Settings>>,
    /// Runs the tasks.
    pub(crate) agent: AgentHandle,
    /// What the node says of itself.
    pub(crate) description: watch::Receiver<NodeDescription>,
    /// How far the kernel is.
    pub(crate) applied: watch::Receiver<Revision>,
    /// Whose data path answers probes.
    pub(crate) reached: watch::Receiver<BTreeSet<NodeNumber>>,
}

impl Session {
    /// Runs until aborted.
    pub(crate) async fn run(mut self) {
        let (mut pause, mut told) = (PAUSE.0, Allowance::default());
        loop {
            for manager in self.candidates() {
                let began = clock::monotonic();
                let ended = self.with(manager).await;
                self.agent.set_managed(false);
                match ended {
                    Ok(()) => tracing::info!(address = %manager, "the session ended"),
                    Err(error) if is_removed(&error) => self.removed(),
                    Err(error) => {
                        let error = format!("{error:#}");
                        if is_of_another_root(&error) && told.take(TOLD, clock::monotonic()) {
                            tracing::error!(
                                address = %manager,
                                error,
                                "this node and the managers trust different root certificates: the \
                                 root was changed while this node was away, and the old one is \
                                 dropped. Its tasks go on. `node rm` it on a manager, `swarm leave \
                                 --force` here, and join again"
                            );
                        } else {
                            tracing::debug!(address = %manager, error, "no session");
                        }
                    }
                }
                if clock::monotonic().saturating_sub(began) > SILENCE {
                    pause = PAUSE.0;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// The cluster gives this node's addresses to others by now: its tasks must not go on. The rest
    /// stays until the operator lets the node leave.
    fn removed(&self) {
        if !self.agent.snapshot().tasks.is_empty() {
            tracing::error!(
                node = %self.node,
                "this node was removed from the cluster: its tasks end. `swarm leave` cleans up \
                 here; then it can join again"
            );
            self.agent.assign(Vec::new(), BTreeSet::new());
        }
    }

    /// Managers to try: this node itself first if it is one, then the others in an order of this
    /// node's own, so that workers spread.
    fn candidates(&self) -> Vec<SocketAddr> {
        let mut managers: Vec<ManagerAddress> = self.settings.borrow().managers.clone();
        let spread = |m: &ManagerAddress| m.node.bits() ^ self.node.bits();
        managers.sort_by_key(|m| (m.node != self.node, spread(m)));
        managers.into_iter().map(|m| m.address).collect()
    }

    async fn with(&mut self, manager: SocketAddr) -> Result<()> {
        let request = {
            let records = self.records.borrow();
            SessionRequest {
                revision: records.revision,
                scopes: records.scopes.clone(),
                description: self.description.borrow_and_update().clone(),
            }
        };
        let mut identity = self.identity.clone();
        let opened_with = identity.borrow_and_update().cert_pem.clone();
        let mut updates = self.client.session(manager, &request, PATIENCE).await?;
        let mut reporter = Reporter {
            client: self.client.clone(),
            manager,
            statuses: self.agent.statuses(),
            applied: self.applied.clone(),
            reached: self.reached.clone(),
            records: self.records.subscribe(),
            description: self.description.clone(),
        };
        let reports = tokio::spawn(async move { reporter.run().await });
        let _abort = AbortOnDrop(reports.abort_handle());
        tracing::info!(address = %manager, "session");
        let mut decided = clock::monotonic();
        loop {
            let update = tokio::select! {
                update = tokio::time::timeout(SILENCE, updates.next()) => {
                    update.context("the manager is silent")??
                }
                // The connection would be cut when the certificate that opened it is good no more.
                () = renewed(&mut identity, &opened_with) => return Ok(()),
            };
            let Some(update) = update else { return Ok(()) };
            let undecided = update.undecided;
            self.apply(update);
            // One that follows nobody can replace nothing that ends here.
            self.agent.set_managed(!undecided);
            if !undecided {
                decided = clock::monotonic();
            }
            // Others may be where the majority is.
            let given_up = clock::monotonic().saturating_sub(decided) >= SILENCE;
            let others = self.settings.borrow().managers.len() > 1;
            anyhow::ensure!(!(given_up && others), "the manager follows no leader");
            if reports.is_finished() {
                return reports.await.context("reporting")?;
            }
        }
    }

    /// Records first: the agent waits for those of its tasks' networks.
    fn apply(&self, update: NodeUpdate) {
        let NodeUpdate { delta, assignments, ended, managers, keys, data_path_port, .. } = update;
        self.apply_records(delta);
        if let Some(assignments) = assignments {
            self.agent.assign(assignments, ended);
        }
        let changed = self.settings.send_if_modified(|settings| {
            let mut new = (**settings).clone();
            if let Some(managers) = managers.filter(|managers| !managers.is_empty()) {
                new.managers = managers;
            }
            if let Some(ClusterKeys { roots, gossip }) = keys {
                (new.roots, new.gossip) = (roots, gossip);
            }
            new.data_path_port = data_path_port.unwrap_or(new.data_path_port);
            let changed = new != **settings;
            *settings = Arc::new(new);
            changed
        });
        if changed {
            let settings = Arc::clone(&self.settings.borrow());
            keep(|| persist::save_settings(&self.options.state_dir, &settings));
        }
    }

    fn apply_records(&self, delta: Delta) {
        let content =
            !(delta.upserts.is_empty() && delta.removals.is_empty() && delta.reset.is_empty());
        let changed = self.records.send_if_modified(|records| {
            if !content && records.revision >= delta.to && records.scopes == delta.scopes {
                return false;
            }
            let mut new = (**records).clone();
            new.apply(delta);
            *records = Arc::new(new);
            true
        });
        if changed && content {
            let records = Arc::clone(&self.records.borrow());
            keep(|| persist::save_records(&self.options.state_dir, &records));
        }
    }
}

/// Returns once a node has another certificate than this one.
async fn renewed(identity: &mut watch::Receiver<Arc<Identity>>, cert_pem: &str) {
    if identity.wait_for(|identity| identity.cert_pem != cert_pem).await.is_err() {
        std::future::pending().await
    }
}

/// Whether a manager said for good that this node is none of the cluster.
fn is_removed(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(CallError::Refused(refusal)) if refusal.kind == RpcErrorKind::NotFound
    )
}

/// Whether a handshake failed for the root of either side's certificate.
fn is_of_another_root(error: &str) -> bool {
    // As rustls shows the alert that it got, or its own verdict. Roots of one cluster have one
    // name, so mostly it is the signature that does not fit.
    let words = ["UnknownCA", "UnknownIssuer", "DecryptError", "BadSignature"];
    words.iter().any(|word| error.contains(word))
}

/// Keeps something on disk. That waits for the disk, so the runtime's other work moves away from
/// this thread: there are few of them, and raft's heartbeats must not wait too.
fn keep(save: impl FnOnce() -> Result<()>) {
    if let Err(error) = tokio::task::block_in_place(save) {
        tracing::error!(error = %format!("{error:#}"), "state is not kept; a restart without managers would miss it");
    }
}

struct Reporter {
    client: RpcClient,
    manager: SocketAddr,
    statuses: StatusFeed,
    applied: watch::Receiver<Revision>,
    reached: watch::Receiver<BTreeSet<NodeNumber>>,
    records: watch::Receiver<Arc<RecordSet>>,
    description: watch::Receiver<NodeDescription>,
}

impl Reporter {
    /// The store knows nodes by their ids.
    fn reached(&self) -> Vec<NodeId> {
        let records = self.records.borrow();
        let reached = self.reached.borrow();
        reached.iter().filter_map(|number| Some(records.nodes.get(number)?.id)).collect()
    }

    async fn run(&mut self) -> Result<()> {
        loop {
            let mut description = None;
            let statuses = tokio::select! {
                statuses = self.statuses.next() => {
                    let mut statuses = statuses.context("the agent ended")?;
                    // A report becomes one entry of the log. What is left comes again at once.
                    statuses.truncate(STATUSES_MAX);
                    statuses
                }
                changed = self.applied.changed() => {
                    changed.context("the data plane ended")?;
                    Vec::new()
                }
                changed = self.description.changed() => {
                    changed.context("the node's facts ended")?;
                    description = Some(self.description.borrow().clone());
                    Vec::new()
                }
                () = tokio::time::sleep(HEARTBEAT) => Vec::new(),
            };
            let reached = self.reached();
            let request = ReportRequest {
                statuses,
                acked: *self.applied.borrow_and_update(),
                reached,
                description,
                ..ReportRequest::default()
            };
            let _: ReportResponse = self
                .client
                .call(self.manager, Expect::Manager, Route::Report, &request, PATIENCE)
                .await?;
            self.statuses.confirm(request.statuses);
        }
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
