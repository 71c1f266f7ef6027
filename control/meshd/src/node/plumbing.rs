//! Plugs tasks in: makes interface specs of leases, hands them to the data plane, tells the
//! resolver, and waits until both serve the task.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use mesh_dns::snapshot::{Policy, Snapshot, TaskView};
use mesh_types::{
    NetworkId, Revision, TaskId,
    net::Mtu,
    record::RecordSet,
    task::{EndpointLease, InterfaceKind, InterfaceSpec, TaskAssignment},
};
use tokio::sync::watch;

use super::dataplane;
use crate::{agent::Plumber, dns_process::Resolver};

/// How long the resolver may take to open a new task's sockets.
const RESOLVER_PATIENCE: Duration = Duration::from_secs(10);
/// How long the records of a task's networks may stay out. They come with the assignment.
const RECORDS_PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
pub(crate) struct Plumbing {
    records: watch::Receiver<Arc<RecordSet>>,
    dataplane: dataplane::Handle,
    resolver: Arc<Resolver>,
    upstreams: Vec<SocketAddr>,
    policy: Policy,
    plugged: Mutex<BTreeMap<TaskId, TaskView>>,
    resumed: watch::Sender<bool>,
}

impl Plumbing {
    pub(crate) fn new(
        records: watch::Receiver<Arc<RecordSet>>,
        dataplane: dataplane::Handle,
        resolver: Arc<Resolver>,
        upstreams: Vec<SocketAddr>,
        policy: Policy,
    ) -> Self {
        let (plugged, resumed) = (Mutex::default(), watch::Sender::new(false));
        Self { records, dataplane, resolver, upstreams, policy, plugged, resumed }
    }

    /// Goes on with the tasks that an earlier daemon plugged in. Nothing is plugged, unplugged or
    /// told before: the resolver would close the sockets of every task that it does not hear of.
    pub(crate) fn resume<'a>(&self, tasks: impl Iterator<Item = (&'a TaskAssignment, PathBuf)>) {
        let views = tasks.map(|(task, netns)| (task.id, task_view(task, netns)));
        self.lock().extend(views);
        self.resumed.send_replace(true);
    }

    async fn wait_resumed(&self) {
        // The sender is this value's own.
        let _ = self.resumed.subscribe().wait_for(|resumed| *resumed).await;
    }

    /// Tells the resolver what stands now. Whole, so that nothing is ever missing for long.
    pub(crate) fn push_names(&self) {
        let tasks: Vec<TaskView> = self.lock().values().cloned().collect();
        let records = Arc::clone(&self.records.borrow());
        // The kept records could not be read: what the resolver knows is better than nothing.
        if records.revision == Revision::MIN && !tasks.is_empty() {
            return;
        }
        let snapshot = Snapshot::new(&records, tasks, self.upstreams.clone(), self.policy);
        self.resolver.push(snapshot);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<TaskId, TaskView>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the records of all the task's networks.
    async fn records_for(&self, task: &TaskAssignment) -> Result<Arc<RecordSet>> {
        let wanted: Vec<NetworkId> = task.leases.iter().filter_map(|l| l.kind.network()).collect();
        let mut records = self.records.clone();
        let complete = records.wait_for(|set| wanted.iter().all(|n| set.networks.contains_key(n)));
        match tokio::time::timeout(RECORDS_PATIENCE, complete).await {
            Ok(Ok(set)) => Ok(Arc::clone(&set)),
            _ => anyhow::bail!(
                "this node has not heard of the task's networks after {} s: no manager reached?",
                RECORDS_PATIENCE.as_secs()
            ),
        }
    }
}

#[async_trait]
impl Plumber for Plumbing {
    async fn attach(&self, task: &TaskAssignment, netns: &Path) -> Result<()> {
        self.wait_resumed().await;
        let records = self.records_for(task).await?;
        let interfaces = interfaces(task, &records, self.dataplane.underlay_mtu())?;
        self.dataplane.attach(task.id, netns.to_owned(), interfaces).await?;
        let view = task_view(task, netns.to_owned());
        self.lock().insert(task.id, view);
        self.push_names();
        self.resolver
            .wait_ready(task.id, RESOLVER_PATIENCE)
            .await
            .context("the task has no resolver")
    }

    async fn close(&self, task: TaskId) -> Result<()> {
        self.wait_resumed().await;
        self.dataplane.close(task).await
    }

    async fn detach(&self, task: TaskId) -> Result<()> {
        self.wait_resumed().await;
        if self.lock().remove(&task).is_some() {
            self.push_names();
        }
        self.dataplane.detach(task).await
    }
}

fn task_view(task: &TaskAssignment, netns: PathBuf) -> TaskView {
    let overlay = |lease: &EndpointLease| match lease.kind {
        InterfaceKind::Overlay { network, .. } => Some(network),
        InterfaceKind::IngressGateway { .. } | InterfaceKind::LocalGateway => None,
    };
    TaskView {
        task: task.id,
        netns,
        networks: task.leases.iter().filter_map(overlay).collect(),
        // A task on internal networks alone must not reach the world through its resolver.
        forward: task.leases.iter().any(|lease| overlay(lease).is_none()),
        servers: task.spec.dns.servers.clone(),
    }
}

/// What the data plane needs of each lease.
fn interfaces(
    task: &TaskAssignment,
    records: &RecordSet,
    underlay: Mtu,
) -> Result<Vec<InterfaceSpec>> {
    let inside = underlay.inside_vxlan_v4();
    task.leases
        .iter()
        .map(|lease| {
            let network = match lease.kind.network() {
                Some(id) => Some(
                    records.networks.get(&id).with_context(|| format!("no network {id} here"))?,
                ),
                None => None,
            };
            let is_gateway = lease.kind.ifname() == "gw0";
            Ok(InterfaceSpec {
                endpoint: lease.endpoint,
                ifname: lease.kind.ifname(),
                address: lease.address,
                vni: network.map(|n| n.vni),
                gateway: network.map_or(mesh_control::store::NODE_LOCAL_GATEWAY, |n| n.gateway),
                default_route: is_gateway,
                mtu: network.and_then(|n| n.mtu).map_or(inside, |mtu| mtu.min(inside)),
            })
        })
        .collect()
}
