//! Drives the kernel: one thread of its own around the engine. A round after every change of the
//! records, with every attachment, and once a second in any case. The revision is acknowledged
//! when a round over its records left nothing undone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use ipnetwork::IpNetwork;
use mesh_control::store::NODE_LOCAL_RANGE;
use mesh_executor::contract::write_atomic;
use mesh_linux::{Engine, EngineConfig, Lease, MapSizes, Report, monotonic_ns};
use mesh_types::{NodeNumber, Revision, TaskId, net::Mtu, record::RecordSet, task::InterfaceSpec};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};

use crate::{metrics::list, options::Options, rpc::messages::CounterValue};

/// A round in any case: what was corrupted heals within this time, twice over.
const TICK: Duration = Duration::from_secs(1);
/// After a round that left something undone the next ones come sooner: what stood in the way (a
/// program that the kernel is still letting go of, say) is often gone in a moment.
const RETRY: Duration = Duration::from_millis(100);
/// Rounds in a row that come so soon.
const RETRIES_MAX: u32 = 5;
/// Which leases hold, for the next daemon.
const LEASES: &str = "leases.json";

/// What the engine needs to know of its node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts {
    /// Its number.
    pub(crate) node: NodeNumber,
    /// Where its tunnels end.
    pub(crate) vtep: IpAddr,
    /// VXLAN's UDP port.
    pub(crate) vxlan_port: u16,
}

enum Request {
    Attach {
        task: TaskId,
        netns: PathBuf,
        interfaces: Vec<InterfaceSpec>,
        done: oneshot::Sender<Result<()>>,
    },
    Close {
        task: TaskId,
        done: oneshot::Sender<Result<()>>,
    },
    Detach {
        task: TaskId,
        done: oneshot::Sender<Result<()>>,
    },
    Counters {
        done: oneshot::Sender<Vec<CounterValue>>,
    },
    Teardown {
        done: oneshot::Sender<Result<()>>,
    },
}

/// The driver, for the rest of the node.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    requests: mpsc::Sender<Request>,
    applied: watch::Receiver<Revision>,
    host_routes: watch::Receiver<BTreeSet<IpNetwork>>,
    underlay_mtu: watch::Receiver<Mtu>,
    flows: watch::Receiver<(u64, u64)>,
}

impl Handle {
    /// How far the kernel is.
    pub(crate) fn applied(&self) -> watch::Receiver<Revision> {
        self.applied.clone()
    }

    /// The host's own addresses and routes.
    pub(crate) fn host_routes(&self) -> watch::Receiver<BTreeSet<IpNetwork>> {
        self.host_routes.clone()
    }

    /// Entries of the flow table, and how many it has room for.
    pub(crate) fn flows(&self) -> &watch::Receiver<(u64, u64)> {
        &self.flows
    }

    /// The MTU of the underlay now.
    pub(crate) fn underlay_mtu(&self) -> Mtu {
        *self.underlay_mtu.borrow()
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T> {
        let (done, answer) = oneshot::channel();
        let stopped = || anyhow!("the data plane driver has stopped");
        self.requests.send(make(done)).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())
    }

    /// Plugs a task in. When it returns its interfaces carry traffic.
    pub(crate) async fn attach(
        &self,
        task: TaskId,
        netns: PathBuf,
        interfaces: Vec<InterfaceSpec>,
    ) -> Result<()> {
        self.ask(|done| Request::Attach { task, netns, interfaces, done }).await?
    }

    /// Gives new flows of a task to others from now on. One that is not plugged in is fine.
    pub(crate) async fn close(&self, task: TaskId) -> Result<()> {
        self.ask(|done| Request::Close { task, done }).await?
    }

    /// Unplugs a task. One that is not plugged in is fine.
    pub(crate) async fn detach(&self, task: TaskId) -> Result<()> {
        self.ask(|done| Request::Detach { task, done }).await?
    }

    /// The counters of the programs.
    pub(crate) async fn counters(&self) -> Result<Vec<CounterValue>> {
        self.ask(|done| Request::Counters { done }).await
    }

    /// Removes everything of ours from the kernel; the driver ends.
    pub(crate) async fn teardown(&self) -> Result<()> {
        self.ask(|done| Request::Teardown { done }).await?
    }
}

/// Opens the engine and starts driving it.
///
/// # Errors
/// What the machine lacks, before anything is changed.
pub(crate) async fn start(
    options: &Options,
    facts: Facts,
    records: watch::Receiver<Arc<RecordSet>>,
    withdrawn: watch::Receiver<BTreeSet<NodeNumber>>,
) -> Result<Handle> {
    let config = EngineConfig {
        node: facts.node,
        vtep: facts.vtep,
        uplink: options.uplink.clone(),
        pin_dir: options.pin_dir.clone(),
        vxlan_port: facts.vxlan_port,
        via_device: options.vxlan_via_device,
        force_clsact: false,
        gateway_range: NODE_LOCAL_RANGE,
        maps: MapSizes { flows: options.conntrack_entries, ..MapSizes::default() },
    };
    let leases_file = options.state_dir.join(LEASES);
    let (requests, received) = mpsc::channel(64);
    let (applied, applied_watched) = watch::channel(Revision::MIN);
    let (host_routes, host_routes_watched) = watch::channel(BTreeSet::new());
    let (mtu, mtu_watched) = watch::channel(Mtu::ETHERNET);
    let (flows, flows_watched) = watch::channel((0, 0));
    let (opened, open) = oneshot::channel();
    std::thread::Builder::new()
        .name("dataplane".into())
        .spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_time().build()
            {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = opened.send(Err(error.into()));
                    return;
                }
            };
            let engine = match open_engine(config) {
                Ok(engine) => engine,
                Err(error) => {
                    let _ = opened.send(Err(error));
                    return;
                }
            };
            let mut driver = Driver {
                engine,
                leases: read_leases(&leases_file),
                leases_file,
                records,
                withdrawn,
                applied,
                host_routes,
                mtu,
                flows,
                complaints: BTreeMap::new(),
                undone: 0,
            };
            driver.engine.restore(driver.leases.values().cloned().collect());
            runtime.block_on(async move {
                driver.look();
                let _ = opened.send(Ok(()));
                driver.run(received).await;
            });
        })
        .context("starting the data plane's thread")?;
    open.await.context("the data plane's thread died")??;
    Ok(Handle {
        requests,
        applied: applied_watched,
        host_routes: host_routes_watched,
        underlay_mtu: mtu_watched,
        flows: flows_watched,
    })
}

fn open_engine(config: EngineConfig) -> Result<Engine> {
    mesh_linux::ensure_bpffs(&config.pin_dir)
        .with_context(|| format!("no bpffs for {}", config.pin_dir.display()))?;
    Engine::open(config).context("opening the data plane")
}

fn read_leases(path: &std::path::Path) -> BTreeMap<TaskId, Lease> {
    let Ok(bytes) = std::fs::read(path) else { return BTreeMap::new() };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        // The agent attaches every running task again, so this costs a moment of traffic at most.
        tracing::error!(path = %path.display(), %error, "kept leases cannot be read");
        BTreeMap::new()
    })
}

struct Driver {
    engine: Engine,
    leases: BTreeMap<TaskId, Lease>,
    leases_file: PathBuf,
    records: watch::Receiver<Arc<RecordSet>>,
    /// Nodes whose data path is silent.
    withdrawn: watch::Receiver<BTreeSet<NodeNumber>>,
    applied: watch::Sender<Revision>,
    host_routes: watch::Sender<BTreeSet<IpNetwork>>,
    mtu: watch::Sender<Mtu>,
    /// Entries of the flow table and their maximum.
    flows: watch::Sender<(u64, u64)>,
    /// What failed and since when, so that the log says a thing once.
    complaints: BTreeMap<String, Instant>,
    /// Rounds in a row that left something undone.
    undone: u32,
}

impl Driver {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                request = requests.recv() => match request {
                    None => return,
                    Some(Request::Teardown { done }) => {
                        let _ = done.send(self.teardown().await);
                        return;
                    }
                    Some(request) => self.serve(request).await,
                },
                // Who writes the records ends before the driver does: a teardown still comes then.
                Ok(()) = self.records.changed() => self.round().await,
                Ok(()) = self.withdrawn.changed() => self.round().await,
                _ = tick.tick() => {
                    self.look();
                    self.round().await;
                    self.collect();
                }
            }
            if (1..=RETRIES_MAX).contains(&self.undone) {
                tick.reset_after(RETRY);
            }
        }
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Attach { task, netns, interfaces, done } => {
                let _ = done.send(self.attach(task, netns, interfaces).await);
            }
            Request::Close { task, done } => {
                let _ = done.send(self.close(task).await);
            }
            Request::Detach { task, done } => {
                if let Some(lease) = self.leases.remove(&task) {
                    let report = self.engine.detach(&lease).await;
                    self.judge(report);
                    self.keep_leases();
                }
                let _ = done.send(Ok(()));
            }
            Request::Counters { done } => {
                let counters =
                    self.engine.counters().into_iter().map(|(counter, value)| CounterValue {
                        name: counter.name().to_owned(),
                        value,
                        is_drop: counter.is_drop(),
                    });
                // Not the programs' own: what was changed by hand, and came back.
                let healed = CounterValue {
                    name: "healed".to_owned(),
                    value: self.engine.healed(),
                    is_drop: false,
                };
                let _ = done.send(counters.chain([healed]).collect());
            }
            Request::Teardown { .. } => {}
        }
    }

    async fn attach(
        &mut self,
        task: TaskId,
        netns: PathBuf,
        interfaces: Vec<InterfaceSpec>,
    ) -> Result<()> {
        if self.is_blind() {
            let held = self.leases.get(&task);
            // Plugged in by an earlier daemon, and nothing was taken away since.
            if held.is_some_and(|held| held.path == netns && held.interfaces == interfaces) {
                return Ok(());
            }
            anyhow::bail!("this node's records are lost, and no manager has sent them anew yet");
        }
        let records = Arc::clone(&self.records.borrow());
        self.engine.set_records(records);
        // It programs everything, like a round.
        self.engine.set_withdrawn(self.withdrawn.borrow().clone());
        let lease = self.engine.attach(&netns, &interfaces).await?;
        self.leases.insert(task, lease);
        self.keep_leases();
        Ok(())
    }

    async fn close(&mut self, task: TaskId) -> Result<()> {
        let Some(lease) = self.leases.get_mut(&task) else { return Ok(()) };
        lease.closed = true;
        let lease = lease.clone();
        let report = self.engine.close(&lease).await;
        self.keep_leases();
        anyhow::ensure!(self.judge(report), "the kernel is not as desired; see the log");
        Ok(())
    }

    fn keep_leases(&self) {
        let kept = serde_json::to_vec(&self.leases)
            .map_err(anyhow::Error::from)
            .and_then(|bytes| Ok(write_atomic(&self.leases_file, &bytes)?));
        if let Err(error) = kept {
            tracing::error!(path = %self.leases_file.display(), error = %format!("{error:#}"), "leases are not kept");
        }
    }

    /// Reads what the host is like.
    fn look(&mut self) {
        match self.engine.underlay() {
            Ok(underlay) => {
                self.mtu
                    .send_if_modified(|mtu| std::mem::replace(mtu, underlay.mtu) != underlay.mtu);
            }
            Err(why) => self.complain(format!("the underlay: {why}")),
        }
        match self.engine.host_routes() {
            Ok(routes) => {
                self.host_routes.send_if_modified(|known| {
                    let changed = *known != routes;
                    *known = routes;
                    changed
                });
            }
            Err(error) => self.complain(format!("the host's routes: {error}")),
        }
    }

    /// There are tasks, and no records: the kept ones could not be read. What the kernel holds is
    /// better than nothing until a manager sends them.
    fn is_blind(&self) -> bool {
        !self.leases.is_empty() && self.records.borrow().revision == Revision::MIN
    }

    async fn round(&mut self) {
        if self.is_blind() {
            self.complain(
                "the kept records are lost: nothing heals until managers send them".into(),
            );
            return;
        }
        let records = Arc::clone(&self.records.borrow_and_update());
        let revision = records.revision;
        self.engine.set_records(records);
        self.engine.set_withdrawn(self.withdrawn.borrow_and_update().clone());
        let began = std::time::Instant::now();
        let report = self.engine.round().await;
        let converged = self.judge(report);
        list::RECONCILER_SECONDS.observe_since(&["dataplane"], began);
        list::RECONCILER_ROUNDS.count(&["dataplane", if converged { "done" } else { "undone" }]);
        self.undone = if converged { 0 } else { self.undone.saturating_add(1) };
        if converged {
            self.applied
                .send_if_modified(|applied| std::mem::replace(applied, revision) != revision);
        }
    }

    /// Logs what a round did; whether it left nothing undone.
    fn judge(&mut self, report: Report) -> bool {
        if report.healed > 0 {
            tracing::warn!(
                healed = report.healed,
                objects = report.applied.join("; "),
                "healed kernel state that someone else had changed"
            );
        }
        let converged = report.is_converged();
        for failure in report.failures {
            self.complain(failure.message);
        }
        self.complaints.retain(|_, since| since.elapsed() < Duration::from_secs(60));
        converged
    }

    fn complain(&mut self, what: String) {
        self.complaints.entry(what).or_insert_with_key(|what| {
            tracing::warn!(reason = %what, "kernel state is not as desired");
            Instant::now()
        });
    }

    fn collect(&mut self) {
        self.engine.collect_flows(monotonic_ns());
        self.flows.send_replace(self.engine.flows());
    }

    async fn teardown(self) -> Result<()> {
        let report = self.engine.teardown().await;
        let _ = std::fs::remove_file(&self.leases_file);
        let failures: Vec<String> = report.failures.into_iter().map(|f| f.message).collect();
        anyhow::ensure!(failures.is_empty(), "left in the kernel: {}", failures.join("; "));
        Ok(())
    }
}
