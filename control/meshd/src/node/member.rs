//! A node that is in a cluster: all the parts around its records, and the order in which they come
//! up and go down.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use bytes::Bytes;
use mesh_control::model::{GossipKeys, NodeDescription, NodeKeys, Role};
use mesh_dns::snapshot::Policy;
use mesh_executor::{Executor, ProcessConfig, ProcessExecutor};
use mesh_gossip::{Expected, GossipKey, Keyring, Member as Peer, Timings, probe::Limits};
use mesh_raft::{Raft, RaftConfig, Timed};
use mesh_types::{NodeNumber, record::RecordSet};
use tokio::{sync::watch, task::AbortHandle};

use super::{
    dataplane, facts,
    handler::Handler,
    manager::{AsyncForward, Hearsay, Manager},
    persist::{self, Settings},
    plumbing::Plumbing,
    probe,
    role::{self, ManagerParts},
    session::Session,
};
use crate::{
    agent::{Agent, AgentConfig, AgentHandle},
    api::backend::EngineFacts,
    dns_process::Resolver,
    gossip::{Compare, GOSSIP_PORT, Shell, ShellConfig},
    identity::Identity,
    metrics::list,
    options::Options,
    rpc::{
        RaftTransport, Route, RpcClient, RpcServer,
        messages::{ReportRequest, ReportResponse},
    },
    tls::{ClientTls, Expect, ServerTls},
};

/// The port of managers, Swarm's.
pub(crate) const MANAGER_PORT: u16 = 2377;
/// How long the other managers may take to agree that a leaving one votes no more.
const VOTE_PATIENCE: Duration = Duration::from_secs(5);
/// How long tasks may take to end when the node leaves.
const LEAVE_PATIENCE: Duration = Duration::from_secs(30);
/// How long the managers may take to end them, before the node does it on its own.
const RELEASE_PATIENCE: Duration = Duration::from_secs(15);
/// How long another member may take to compare notes: all that a large cluster knows may travel.
const COMPARE_PATIENCE: Duration = Duration::from_secs(10);

/// A node that is in a cluster.
pub(crate) struct Member {
    /// Who it is; see [`Member::identity`].
    pub(super) identity: watch::Sender<Arc<Identity>>,
    /// How it is reached and whom it knows.
    pub(crate) settings: watch::Receiver<Arc<Settings>>,
    /// Calls other nodes.
    pub(crate) client: RpcClient,
    /// Runs its tasks.
    pub(crate) agent: AgentHandle,
    /// Its kernel.
    pub(crate) dataplane: dataplane::Handle,
    /// What it answers other nodes.
    pub(crate) handler: Arc<Handler>,
    pub(super) resolver: Arc<Resolver>,
    gossip: Arc<Mutex<Option<Shell>>>,
    pub(super) options: Options,
    tasks: Tasks,
    pub(super) probes: probe::Handle,
    /// Listens for the calls that every node answers.
    pub(super) server: RpcServer,
    parts: Mutex<Option<ManagerParts>>,
    /// Held while it changes its role; true once it leaves.
    pub(super) leaving: tokio::sync::Mutex<bool>,
}

/// What runs beside; ended when dropped, also by a start that fails half-way.
#[derive(Default)]
struct Tasks(Vec<AbortHandle>);

impl Tasks {
    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.push(tokio::spawn(task).abort_handle());
    }

    fn end(&self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts a manager's raft on its directory. `resume`: the identity was kept, which comes after the
/// store's first start.
pub(crate) async fn start_raft(
    options: &Options,
    identity: &Identity,
    address: SocketAddr,
    client: &RpcClient,
    resume: bool,
) -> Result<Raft> {
    let mut config =
        RaftConfig::new(options.raft_dir(), identity.voter, address, identity.data_key);
    config.resume = resume;
    config.observe = |timed, took| {
        let metric = match timed {
            Timed::Write => &list::SWARM_TRANSACTION,
            Timed::Apply => &list::SWARM_WRITE,
            Timed::Snapshot => &list::SWARM_SNAPSHOT,
        };
        metric.observe(&[], took);
    };
    let transport = Arc::new(RaftTransport::new(client.clone()));
    Raft::start(config, transport).await.context("starting the store")
}

/// Everything of an address family.
pub(super) fn any(like: IpAddr, port: u16) -> SocketAddr {
    match like {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, port).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, port).into(),
    }
}

impl Member {
    /// Brings all parts up. `raft`: already started, by `swarm init` and `swarm join`.
    pub(crate) async fn start(
        options: &Options,
        engine: &EngineFacts,
        identity: Identity,
        settings: Settings,
        raft: Option<(Raft, RpcClient)>,
    ) -> Result<Arc<Self>> {
        let (raft, client) = match raft {
            Some((raft, client)) => (Some(raft), client),
            None => (None, RpcClient::new(ClientTls::member(&identity)?)),
        };
        let handler = Arc::new(Handler::default());
        let tls = ServerTls::new(&identity)?;
        let advertised = settings.address;
        let listen = |port| {
            RpcServer::bind(any(advertised.ip(), port), tls.clone(), Arc::clone(&handler) as _)
        };
        let server = listen(GOSSIP_PORT).await?;
        let managers_server = match identity.role {
            Role::Manager => Some(listen(advertised.port()).await?),
            Role::Worker => {
                // Of a demotion that a crash cut short.
                remove_store(options)?;
                None
            }
        };
        // Here, for a port that another program has must be found out before the kernel is touched.
        let gossip = start_gossip(&identity, &settings, client.clone())?;
        let _ = handler.gossip.set(gossip.answers());
        let mut tasks = Tasks::default();
        let parts = match managers_server {
            None => None,
            Some(server) => {
                let raft = match raft {
                    Some(raft) => raft,
                    None => start_raft(options, &identity, advertised, &client, true).await?,
                };
                Some(role::lead(&handler, &client, Manager::new(raft), server))
            }
        };
        let (records, watched) = watch::channel(Arc::new(persist::records(&options.state_dir)));
        let _ = handler.records.set(watched.clone());
        let facts = dataplane::Facts {
            node: identity.number,
            vtep: settings.vtep,
            vxlan_port: settings.data_path_port,
        };
        let probes = probe::start(
            facts.node,
            limits(options),
            (facts.vtep, facts.vxlan_port),
            watched.clone(),
            gossip.accusations(),
        )?;
        probes.judged().await;
        let withdrawn = probes.withdrawn.clone();
        let applied_from = match options.fault_apply_late {
            0 => watched.clone(),
            late => delayed(watched.clone(), Duration::from_millis(late), &mut tasks),
        };
        let dataplane = dataplane::start(options, facts, applied_from, withdrawn).await?;
        let _ = handler.dataplane.set(dataplane.clone());
        let resolver = Arc::new(Resolver::start(
            &std::env::current_exe().context("finding meshd's own executable")?,
            &options.state_dir.join("dns"),
        )?);
        let _ = handler.resolver.set(Arc::clone(&resolver));
        let plumbing = Arc::new(Plumbing::new(
            watched.clone(),
            dataplane.clone(),
            Arc::clone(&resolver),
            upstreams(),
            Policy { ttl: options.dns_ttl, rate_limit: options.dns_rate_limit },
        ));
        let agent = start_agent(options, engine, Arc::clone(&plumbing)).await?;
        let found = agent.snapshot();
        plumbing
            .resume(found.tasks.values().filter_map(|t| Some((&t.assignment, t.netns.clone()?))));
        let _ = handler.agent.set(agent.clone());
        tasks.spawn(names(watched.clone(), plumbing));
        gossip.update_members(expected(&watched.borrow()));
        let identity = watch::Sender::new(Arc::new(identity));
        let held = watch::Sender::new(settings.gossip);
        let keys = Keys { identity: identity.subscribe(), gossip: held.subscribe() };
        let base = NodeDescription { keys: keys.held(), ..facts::describe(engine) };
        let (description, described) = watch::channel(base);
        tasks.spawn(describe(keys, dataplane.clone(), description));
        let (settings, settings_watched) = watch::channel(Arc::new(settings));
        let session = Session {
            node: identity.borrow().node,
            identity: identity.subscribe(),
            options: options.clone(),
            client: client.clone(),
            records,
            settings,
            agent: agent.clone(),
            description: described,
            applied: dataplane.applied(),
            reached: probes.reached.clone(),
        };
        tasks.spawn(session.run());
        let member = Self {
            identity,
            settings: settings_watched,
            client,
            agent,
            dataplane,
            handler,
            resolver,
            gossip: Arc::new(Mutex::new(Some(gossip))),
            options: options.clone(),
            tasks,
            probes,
            server,
            parts: Mutex::new(parts),
            leaving: tokio::sync::Mutex::new(false),
        };
        let silent = member.probes.silent.clone();
        member.follow(watched, |shell, records| shell.update_members(expected(records)));
        member.follow(silent, |shell, silent| shell.set_silent(silent.clone()));
        member.follow(member.settings.clone(), move |shell, settings| {
            shell.set_keys(keyring(&settings.gossip));
            held.send_replace(settings.gossip);
        });
        let member = Arc::new(member);
        tokio::spawn(role::keep(Arc::downgrade(&member), member.settings.clone()));
        Ok(member)
    }

    /// Who it is now: its role and certificate change.
    pub(crate) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity.borrow())
    }

    /// What makes it a manager, if it is one.
    pub(super) fn parts(&self) -> MutexGuard<'_, Option<ManagerParts>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its share of the control plane, if it is a manager.
    pub(crate) fn manager(&self) -> Option<Arc<Manager>> {
        self.parts().as_ref().map(|parts| Arc::clone(&parts.manager))
    }

    /// Tells gossip of every change of a value, until it ends.
    fn follow<T: Send + Sync + 'static>(
        &self,
        mut value: watch::Receiver<T>,
        tell: impl Fn(&Shell, &T) + Send + 'static,
    ) {
        let gossip = Arc::clone(&self.gossip);
        tokio::spawn(async move {
            while value.changed().await.is_ok() {
                let new = value.borrow_and_update();
                match gossip.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                    Some(shell) => tell(shell, &new),
                    None => return,
                }
            }
        });
    }

    /// Nodes that answer gossip now, this one included.
    pub(crate) fn alive(&self) -> BTreeSet<NodeNumber> {
        let gossip = self.gossip.lock().unwrap_or_else(PoisonError::into_inner);
        let mut alive: BTreeSet<NodeNumber> = gossip
            .as_ref()
            .map(|shell| shell.members().borrow().keys().copied().collect())
            .unwrap_or_default();
        drop(gossip);
        alive.insert(self.identity().number);
        alive
    }

    /// Leaves: ends the tasks, takes all kernel state away, forgets the cluster. Goes on past
    /// failures and returns the first: the node is out either way.
    pub(crate) async fn leave(self: Arc<Self>) -> Result<()> {
        *self.leaving.lock().await = true;
        let mut first = None;
        let mut note = |what: &str, result: Result<()>| {
            if let Err(error) = result {
                tracing::warn!(step = what, error = %format!("{error:#}"), "leaving went wrong");
                first.get_or_insert(error.context(what.to_owned()));
            }
        };
        if self.tell_others().await {
            // They take the tasks away, and hear of each end while the session lasts: else the
            // tasks' addresses would be held until the node is removed.
            self.agent.released(RELEASE_PATIENCE).await;
            note("giving the vote back", self.give_vote_back().await);
        }
        self.tasks.end();
        note("ending tasks", self.agent.stop_all(LEAVE_PATIENCE).await);
        let gossip = self.gossip.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(gossip) = gossip {
            gossip.leave().await;
        }
        note("taking down the data plane", self.dataplane.teardown().await);
        let parts = self.parts().take();
        if let Some(parts) = parts {
            parts.manager.raft.shutdown().await;
        }
        self.resolver.shutdown().await;
        note("forgetting the cluster", forget(&self.options));
        first.map_or(Ok(()), Err)
    }

    /// The managers that stay must not need this one's vote: of two, one alone is no majority.
    async fn give_vote_back(&self) -> Result<()> {
        let Some(manager) = self.manager() else { return Ok(()) };
        let removed = manager.raft.remove_voter(manager.raft.number());
        tokio::time::timeout(VOTE_PATIENCE, removed)
            .await
            .context("no majority agreed in time: `node rm --force` this node on a manager")??;
        Ok(())
    }

    /// So that the others need not wait for silence. Best effort: they find out in any case.
    /// Whether one was told.
    async fn tell_others(&self) -> bool {
        let managers = self.settings.borrow().managers.clone();
        let own = self.identity().node;
        for manager in managers.into_iter().filter(|m| m.node != own) {
            let told: Result<(), _> = self
                .client
                .call(
                    manager.address,
                    Expect::Node(manager.node),
                    Route::Leave,
                    &(),
                    Duration::from_secs(3),
                )
                .await;
            match told {
                Ok(()) => return true,
                Err(error) => {
                    tracing::debug!(node = %manager.node, %error, "could not tell a manager");
                }
            }
        }
        false
    }
}

/// Takes away what is left of a membership that cannot be taken up: its tasks and their resolver
/// outlived the daemon, and so did all in the kernel. Forgets it last: what still runs would be
/// found by nobody once its files are gone.
pub(crate) async fn sweep(options: &Options) -> Result<()> {
    let executor = ProcessExecutor::new(ProcessConfig::new(options.tasks_dir(), options.cgroup()))?;
    for (task, _) in executor.list().await? {
        executor.remove(task).await?;
    }
    let dns = options.state_dir.join("dns");
    if dns.exists() {
        let exe = std::env::current_exe().context("finding meshd's own executable")?;
        Resolver::start(&exe, &dns)?.shutdown().await;
    }
    let identity = Identity::load(&options.state_dir);
    if let (Ok(Some(identity)), Ok(settings)) = (identity, persist::settings(&options.state_dir)) {
        let facts = dataplane::Facts {
            node: identity.number,
            vtep: settings.vtep,
            vxlan_port: settings.data_path_port,
        };
        let (_records, watched) = watch::channel(Arc::new(RecordSet::default()));
        let (_probes, withdrawn) = watch::channel(BTreeSet::new());
        dataplane::start(options, facts, watched, withdrawn).await?.teardown().await?;
    }
    forget(options)
}

/// Removes what a manager keeps on disk beside its identity.
pub(super) fn remove_store(options: &Options) -> Result<()> {
    let dir = options.raft_dir();
    match std::fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes what a member keeps on disk.
pub(crate) fn forget(options: &Options) -> Result<()> {
    Identity::remove(&options.state_dir)?;
    persist::remove(&options.state_dir)?;
    for path in [options.raft_dir(), options.state_dir.join("dns"), options.tasks_dir()] {
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
    }
    let _ = std::fs::remove_file(options.state_dir.join("agent.json"));
    Ok(())
}

pub(super) struct Forward {
    pub(super) client: RpcClient,
}

impl AsyncForward for Forward {
    async fn forward(&self, _leader: NodeNumber, address: SocketAddr, hearsay: Hearsay) {
        let Hearsay { heard, reached, acks } = hearsay;
        if heard.is_empty() && reached.is_empty() {
            return;
        }
        let request = ReportRequest { heard, reached, acks, ..ReportRequest::default() };
        let sent: Result<ReportResponse, _> = self
            .client
            .call(address, Expect::Manager, Route::Report, &request, Duration::from_secs(1))
            .await;
        if let Err(error) = sent {
            tracing::debug!(%error, "could not pass on who is alive");
        }
    }
}

async fn start_agent(
    options: &Options,
    engine: &EngineFacts,
    plumbing: Arc<Plumbing>,
) -> Result<AgentHandle> {
    let executor = ProcessExecutor::new(ProcessConfig::new(options.tasks_dir(), options.cgroup()))?;
    let config = AgentConfig {
        state_dir: options.state_dir.clone(),
        node_name: engine.hostname.clone(),
        path_dir: options.path_prefix(),
        resolv_conf: AgentConfig::RESOLV_CONF.to_owned(),
    };
    Agent::start(config, Arc::new(executor), plumbing).await
}

/// Compares notes over mutual TLS.
struct Comparer(RpcClient);

#[async_trait]
impl Compare for Comparer {
    async fn compare(&self, member: &Peer, request: Bytes) -> Result<Bytes, String> {
        let (address, expect) = (member.address, Expect::Node(member.id));
        let answer =
            self.0.call_bytes(address, expect, Route::AntiEntropy, request, COMPARE_PATIENCE).await;
        // The next call goes to another one: in a large cluster, connections to all would be kept.
        self.0.forget(address);
        answer.map_err(|error| error.to_string())
    }
}

fn start_gossip(identity: &Identity, settings: &Settings, client: RpcClient) -> Result<Shell> {
    let config = ShellConfig {
        number: identity.number,
        id: identity.node,
        cluster: identity.cluster,
        address: SocketAddr::new(settings.address.ip(), GOSSIP_PORT),
        keys: keyring(&settings.gossip),
        timings: Timings::LAN,
    };
    Shell::start(config, Comparer(client)).context("starting gossip on UDP port 7946")
}

/// All open; the one in use seals.
fn keyring(keys: &GossipKeys) -> Keyring {
    let current = GossipKey { epoch: keys.epoch, secret: keys.key };
    let Some(next) = keys.next else { return Keyring::new(current) };
    let new = GossipKey { epoch: keys.next_epoch(), secret: next.key };
    if next.in_use {
        Keyring { primary: new, others: vec![current] }
    } else {
        Keyring { primary: current, others: vec![new] }
    }
}

/// Who probes whom.
fn limits(options: &Options) -> Limits {
    match options.fault_watchers {
        0 => Limits::DEFAULT,
        watchers => Limits { peers: 0, watchers, quorum: Limits::DEFAULT.quorum.min(watchers) },
    }
}

/// The nodes that the store knows.
fn expected(records: &RecordSet) -> BTreeMap<NodeNumber, Expected> {
    let gossip = |ip| SocketAddr::new(ip, GOSSIP_PORT);
    records
        .nodes
        .values()
        .map(|n| (n.number, Expected { id: n.id, address: gossip(n.address) }))
        .collect()
}

/// The same values, each this much later.
fn delayed<T: Clone + Send + Sync + 'static>(
    mut source: watch::Receiver<T>,
    late: Duration,
    tasks: &mut Tasks,
) -> watch::Receiver<T> {
    let (sender, receiver) = watch::channel(source.borrow_and_update().clone());
    let (queue, mut queued) = tokio::sync::mpsc::unbounded_channel();
    tasks.spawn(async move {
        while source.changed().await.is_ok() {
            let value = source.borrow_and_update().clone();
            let _ = queue.send((tokio::time::Instant::now() + late, value));
        }
    });
    tasks.spawn(async move {
        while let Some((due, value)) = queued.recv().await {
            tokio::time::sleep_until(due).await;
            sender.send_replace(value);
        }
        // Its end would be taken for the end of the records.
        std::future::pending::<()>().await;
    });
    receiver
}

/// Tells the resolver of every change of the records.
async fn names(mut records: watch::Receiver<Arc<RecordSet>>, plumbing: Arc<Plumbing>) {
    loop {
        records.borrow_and_update();
        plumbing.push_names();
        if records.changed().await.is_err() {
            return;
        }
    }
}

/// The cluster's keys, as this node has them.
struct Keys {
    identity: watch::Receiver<Arc<Identity>>,
    gossip: watch::Receiver<GossipKeys>,
}

impl Keys {
    fn held(&self) -> NodeKeys {
        let (trusts, issuer) = self.identity.borrow().roots();
        let gossip = *self.gossip.borrow();
        let next = gossip.next.map(|_| gossip.next_epoch());
        NodeKeys {
            issuer,
            trusts,
            opens: std::iter::once(gossip.epoch).chain(next).collect(),
            seals: Some(gossip.sealing()),
        }
    }
}

/// Keeps the description true: the host's own addresses and routes come and go, keys are replaced.
async fn describe(
    mut keys: Keys,
    dataplane: dataplane::Handle,
    description: watch::Sender<NodeDescription>,
) {
    let mut routes = dataplane.host_routes();
    loop {
        keys.identity.borrow_and_update();
        keys.gossip.borrow_and_update();
        let host_routes = routes.borrow_and_update().clone();
        let held = keys.held();
        description.send_if_modified(|current| {
            let new = NodeDescription { host_routes, keys: held, ..current.clone() };
            let changed = *current != new;
            *current = new;
            changed
        });
        let changed = tokio::select! {
            changed = routes.changed() => changed,
            changed = keys.identity.changed() => changed,
            changed = keys.gossip.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// The node's own resolvers (resolv.conf(5)), which get what is not the cluster's.
fn upstreams() -> Vec<SocketAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .filter(|(key, _)| *key == "nameserver")
        .filter_map(|(_, value)| value.trim().parse::<IpAddr>().ok())
        .map(|ip| SocketAddr::new(ip, 53))
        .collect()
}
