//! The engine: the node's kernel state, brought to what it should be, round after round.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use ipnetwork::IpNetwork;
use mesh_dataplane::{
    Attachment, Desired, Hook, Input, Key, NetnsId, Op, Options, Underlay, desired, plan,
};
use mesh_ebpf_abi::Counter;
use mesh_ebpf_core::flow;
use mesh_types::{
    ids::{EndpointId, NodeNumber},
    record::RecordSet,
    task::InterfaceSpec,
};
use serde::{Deserialize, Serialize};

use crate::{
    apply::Apply,
    bpf::{Bpf, MapSizes, versioned},
    codec,
    error::{Failure, OpError, OpenError},
    netlink::Socket,
    netns::{Netns, NetnsPath, on_thread},
    nft::Nft,
    observe::observe,
    preflight::{self, Features},
    underlay,
};

/// A node's data plane settings.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// This node's number.
    pub node: NodeNumber,
    /// This node's tunnel end: one of its addresses.
    pub vtep: IpAddr,
    /// The underlay link; `None`: the one that has `vtep`.
    pub uplink: Option<String>,
    /// Where maps and links are pinned: a directory on a bpffs, this node's alone.
    pub pin_dir: PathBuf,
    /// VXLAN's UDP port (4789).
    pub vxlan_port: u16,
    /// Encapsulate and strip through the kernel's VXLAN device instead of in BPF.
    pub via_device: bool,
    /// Attach by clsact filters even where tcx works: for tests of older kernels' way.
    pub force_clsact: bool,
    /// The range that node-local `gw0` addresses come from.
    pub gateway_range: IpNetwork,
    /// Sizes of the maps. Maps that are pinned already keep theirs.
    pub maps: MapSizes,
}

/// What was plugged in where. Keep it: an engine that starts must be given the leases that still
/// hold ([`Engine::restore`]) before its first round, which removes what nobody holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The namespace's path.
    pub path: PathBuf,
    /// Which namespace that was: a path may come to mean another.
    pub netns: NetnsId,
    /// Its interfaces.
    pub interfaces: Vec<InterfaceSpec>,
    /// It gets no new flows any more.
    #[serde(default)]
    pub closed: bool,
}

/// What one round did.
#[derive(Debug, Default)]
pub struct Report {
    /// Operations done, in order.
    pub applied: Vec<String>,
    /// How many of them repaired what someone else had changed: it was wanted in the last round
    /// too.
    pub healed: usize,
    /// What failed. The next round tries again.
    pub failures: Vec<Failure>,
    /// Attached namespaces that are gone, and with them their interfaces: detach their leases.
    pub gone: Vec<Lease>,
}

impl Report {
    fn broken(error: io::Error) -> Self {
        let message = format!("the round was cut off: {error}");
        Self { failures: vec![Failure { key: None, message }], ..Self::default() }
    }

    /// Whether the kernel is as desired.
    #[must_use]
    pub fn is_converged(&self) -> bool {
        self.failures.is_empty()
    }
}

/// Why interfaces could not be plugged in. Nothing of them is left.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The namespace cannot be opened.
    #[error("cannot open the network namespace {}: {source}", path.display())]
    Netns {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The request contradicts itself or another lease.
    #[error("{0}")]
    Invalid(String),
    /// The kernel refused.
    #[error("cannot plug into {}: {}", path.display(), reasons.join("; "))]
    Failed {
        /// The namespace's path.
        path: PathBuf,
        /// One sentence per failure.
        reasons: Vec<String>,
    },
}

/// The data plane of the node whose namespace the opening thread is in.
#[derive(Debug)]
pub struct Engine {
    home: Netns,
    config: EngineConfig,
    features: Features,
    socket: Socket,
    nft: Nft,
    bpf: Bpf,
    records: Arc<RecordSet>,
    withdrawn: BTreeSet<NodeNumber>,
    leases: Vec<Lease>,
    /// Given up, but their namespaces are still to be cleaned.
    leaving: Vec<Lease>,
    last: Option<Desired>,
    /// Of all rounds so far.
    healed: u64,
    /// Where the flow collector goes on.
    flow_cursor: Option<Vec<u8>>,
    /// Entries that it left there since it began anew.
    flows_seen: u64,
    /// Those of its last whole walk.
    flows: u64,
}

/// Entries that the flow collector looks at in one call.
const FLOW_STEPS: usize = 8192;

impl Engine {
    /// Checks the machine, then loads the programs over the maps that are pinned, if any. Nothing
    /// is attached before the first round.
    ///
    /// # Errors
    /// [`OpenError::Missing`] before anything is changed; else what failed.
    pub fn open(config: EngineConfig) -> Result<Self, OpenError> {
        let missing = preflight::preflight(&config.pin_dir);
        if !missing.is_empty() {
            return Err(OpenError::Missing(missing));
        }
        let (mut features, _) =
            preflight::probe().map_err(|missing| OpenError::Missing(vec![missing]))?;
        features.tcx &= !config.force_clsact;
        let io = |what: &str| {
            let what = what.to_owned();
            move |source| OpenError::Io { what, source }
        };
        let mut socket = Socket::route().map_err(io("cannot open rtnetlink"))?;
        let nft = Nft::open().map_err(io("cannot open nfnetlink"))?;
        let uplink = config.uplink.as_deref();
        underlay::read(&mut socket, uplink, config.vtep, std::iter::empty())
            .map_err(|error| OpenError::Uplink(error.to_string()))?
            .map_err(OpenError::Uplink)?;
        let bpf = Bpf::load(&config.pin_dir, &config.maps, features.tcx)?;
        let home = Netns::current().map_err(io("cannot open the node's network namespace"))?;
        Ok(Self {
            home,
            config,
            features,
            socket,
            nft,
            bpf,
            records: Arc::default(),
            withdrawn: BTreeSet::new(),
            leases: Vec::new(),
            leaving: Vec::new(),
            last: None,
            healed: 0,
            flow_cursor: None,
            flows_seen: 0,
            flows: 0,
        })
    }

    /// What the kernel offers and how it is used.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// Takes over leases of an earlier daemon.
    pub fn restore(&mut self, leases: Vec<Lease>) {
        self.leases = leases;
    }

    /// What is plugged in.
    #[must_use]
    pub fn leases(&self) -> &[Lease] {
        &self.leases
    }

    /// What the revision stream says, from the next round on.
    pub fn set_records(&mut self, records: Arc<RecordSet>) {
        self.records = records;
    }

    /// Nodes whose endpoints get no new flows, from the next round on.
    pub fn set_withdrawn(&mut self, nodes: BTreeSet<NodeNumber>) {
        self.withdrawn = nodes;
    }

    /// How many objects were repaired since this engine was opened: the sum of all
    /// [`Report::healed`], those of [`Engine::attach`] and [`Engine::detach`] too.
    #[must_use]
    pub fn healed(&self) -> u64 {
        self.healed
    }

    /// Reads the underlay.
    ///
    /// # Errors
    /// A sentence: the uplink is gone, or the kernel did not answer.
    pub fn underlay(&mut self) -> Result<Underlay, String> {
        let vteps = self.records.nodes.values().map(|node| node.vtep);
        let vteps = vteps.filter(|vtep| *vtep != self.config.vtep);
        underlay::read(&mut self.socket, self.config.uplink.as_deref(), self.config.vtep, vteps)
            .map_err(|error| format!("cannot read the underlay: {error}"))?
    }

    /// The node's own networks and routes, without ours: a subnet must overlap none.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn host_routes(&mut self) -> Result<BTreeSet<IpNetwork>, OpError> {
        underlay::host_routes(&mut self.socket)
    }

    /// What the kernel should hold now.
    ///
    /// # Errors
    /// As [`Engine::underlay`].
    pub fn desired(&mut self) -> Result<Desired, String> {
        let underlay = self.underlay()?;
        let live = |lease: &&Lease| is_alive(lease);
        let attachments: Vec<Attachment> = self
            .leases
            .iter()
            .filter(live)
            .map(|lease| Attachment {
                netns: lease.netns,
                interfaces: lease.interfaces.clone(),
                closed: lease.closed,
            })
            .collect();
        let capacity = u32::try_from(self.bpf.maglev.len()).unwrap_or(u32::MAX);
        let options = Options {
            vxlan_port: self.config.vxlan_port,
            via_device: self.config.via_device,
            change_type: self.features.change_type,
            gateway_range: self.config.gateway_range,
            maglev_capacity: capacity,
        };
        Ok(desired(&Input {
            node: self.config.node,
            records: &self.records,
            underlay: &underlay,
            attachments: &attachments,
            withdrawn: &self.withdrawn,
            options: &options,
            previous: self.last.as_ref(),
        }))
    }

    /// One round: computes what should be, observes, and applies the difference.
    ///
    /// Blocks its thread for some milliseconds of system calls.
    pub async fn round(&mut self) -> Report {
        blocking(|| self.round_now()).unwrap_or_else(Report::broken)
    }

    fn round_now(&mut self) -> Report {
        match self.desired() {
            Ok(desired) => self.reconcile_now(desired),
            Err(message) => {
                let failures = vec![Failure { key: None, message }];
                Report { failures, gone: self.gone(), ..Report::default() }
            }
        }
    }

    /// Brings the kernel to `desired`, continuing past failures.
    pub async fn reconcile(&mut self, desired: &Desired) -> Report {
        blocking(|| self.reconcile_now(desired.clone())).unwrap_or_else(Report::broken)
    }

    fn reconcile_now(&mut self, desired: Desired) -> Report {
        let mut report = Report { gone: self.gone(), ..Report::default() };
        let paths: BTreeMap<NetnsId, PathBuf> = self
            .leases
            .iter()
            .chain(&self.leaving)
            .filter(|lease| is_alive(lease))
            .map(|lease| (lease.netns, lease.path.clone()))
            .collect();
        match self.bpf.pin_again() {
            Ok(pins) => {
                report.healed += pins.len();
                report.applied.extend(pins.iter().map(|pin| format!("create pin {pin}")));
            }
            Err(error) => {
                let message = format!("cannot pin the maps: {error}");
                report.failures.push(Failure { key: None, message });
            }
        }
        let round =
            observe(&self.home, &mut self.socket, &self.bpf, &mut self.nft, &paths, &desired);
        let mut round = match round {
            Ok(round) => round,
            Err(error) => {
                let message = format!("cannot observe the kernel: {error}");
                report.failures.push(Failure { key: None, message });
                return report;
            }
        };
        let plan = plan(&desired, &round.observed);
        for refusal in &plan.refusals {
            report.failures.push(Failure { key: None, message: refusal.to_string() });
        }
        let mut apply = Apply {
            home: &self.home,
            socket: &mut self.socket,
            bpf: &self.bpf,
            nft: &mut self.nft,
            round: &mut round,
        };
        let done = apply.all(&plan.ops, &mut report.failures);
        self.account(&plan.ops, &done, &desired, &mut report);
        self.healed = self.healed.saturating_add(report.healed as u64);
        self.last = Some(desired);
        report
    }

    /// Fills in what was done, and how much of it was repair.
    fn account(&self, ops: &[Op], done: &[Key], desired: &Desired, report: &mut Report) {
        let done: BTreeSet<&Key> = done.iter().collect();
        for op in ops.iter().filter(|op| done.contains(op.key())) {
            report.applied.push(op.to_string());
            report.healed += usize::from(self.was_wanted(op.key(), desired));
        }
    }

    /// Whether the last round wanted of this object what this one wants: then a change repairs.
    fn was_wanted(&self, key: &Key, desired: &Desired) -> bool {
        let Some(last) = &self.last else { return false };
        match (last.objects.get(key), desired.objects.get(key)) {
            (Some(before), Some(now)) => before == now,
            // Of a service, or nobody's; or left by what went by itself, as a task that ended.
            (None, None) => {
                let stays = |key: &Key| desired.objects.contains_key(key);
                last.services == desired.services && last.objects.keys().all(stays)
            }
            _ => false,
        }
    }

    /// Leases whose namespace is gone.
    fn gone(&self) -> Vec<Lease> {
        self.leases.iter().filter(|lease| !is_alive(lease)).cloned().collect()
    }

    /// Plugs interfaces into a namespace. When it returns they exist, are up, and are programmed.
    /// The same call again changes nothing.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub async fn attach(
        &mut self,
        netns: &NetnsPath,
        interfaces: &[InterfaceSpec],
    ) -> Result<Lease, AttachError> {
        let failed = |error: io::Error| AttachError::Failed {
            path: netns.to_owned(),
            reasons: vec![error.to_string()],
        };
        blocking(|| self.attach_now(netns, interfaces)).map_err(failed)?
    }

    fn attach_now(
        &mut self,
        path: &Path,
        interfaces: &[InterfaceSpec],
    ) -> Result<Lease, AttachError> {
        let open = Netns::open(path);
        let failed = |source| AttachError::Netns { path: path.to_owned(), source };
        let netns = open.map_err(failed)?.id();
        let endpoints: BTreeSet<EndpointId> = interfaces.iter().map(|i| i.endpoint).collect();
        // A daemon that was restarted plugs all tasks again; what was closed stays so.
        let closed = self.leases.iter().any(|held| {
            let same = |interface: &InterfaceSpec| endpoints.contains(&interface.endpoint);
            held.closed && held.netns == netns && held.interfaces.iter().all(same)
        });
        let lease = Lease { path: path.to_owned(), netns, interfaces: interfaces.to_vec(), closed };
        self.check(&lease)?;
        let before = self.leases.clone();
        self.leases.retain(|held| held.netns != netns);
        self.leases.push(lease.clone());
        let report = self.round_now();
        let reasons: Vec<String> = report
            .failures
            .iter()
            .filter(|failure| match &failure.key {
                None => report.applied.is_empty(),
                Some(key) => concerns(key, netns, &endpoints),
            })
            .map(|failure| failure.message.clone())
            .collect();
        if reasons.is_empty() {
            return Ok(lease);
        }
        self.leases = before;
        self.leaving = vec![lease];
        self.round_now();
        self.leaving.clear();
        Err(AttachError::Failed { path: path.to_owned(), reasons })
    }

    fn check(&self, lease: &Lease) -> Result<(), AttachError> {
        let invalid = |text: String| Err(AttachError::Invalid(text));
        let mut names = BTreeSet::new();
        for interface in &lease.interfaces {
            let name = &interface.ifname;
            let good = !name.is_empty()
                && name.len() < 16
                && name != "lo"
                && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
            if !good {
                return invalid(format!("`{name}` is not a name for a network interface"));
            }
            if !names.insert(name) {
                return invalid(format!("two interfaces are named `{name}`"));
            }
            let elsewhere = self.leases.iter().find(|held| {
                held.netns != lease.netns
                    && is_alive(held)
                    && held.interfaces.iter().any(|i| i.endpoint == interface.endpoint)
            });
            if let Some(held) = elsewhere {
                let (id, path) = (interface.endpoint, held.path.display());
                return invalid(format!("endpoint {id} is plugged into {path}: detach that first"));
            }
        }
        Ok(())
    }

    /// Gives new flows of a lease's endpoints to others, whoever sends them; those that it has go
    /// on. For a task that is about to end. One that is not held changes nothing.
    pub async fn close(&mut self, lease: &Lease) -> Report {
        for held in self.leases.iter_mut().filter(|held| held.netns == lease.netns) {
            held.closed = true;
        }
        self.round().await
    }

    /// Unplugs what a lease holds. One that is not held changes nothing.
    pub async fn detach(&mut self, lease: &Lease) -> Report {
        let (left, kept) = std::mem::take(&mut self.leases)
            .into_iter()
            .partition(|held| held.netns == lease.netns);
        (self.leaving, self.leases) = (left, kept);
        let report = self.round().await;
        self.leaving.clear();
        report
    }

    /// All counters, summed over CPUs.
    #[must_use]
    pub fn counters(&self) -> Vec<(Counter, u64)> {
        self.bpf.counters()
    }

    /// What the program of a hook does with a frame that comes in by a link: its action
    /// (`TC_ACT_*`). The frame goes nowhere, but maps and counters change. For tests, from a thread
    /// in the node's namespace.
    ///
    /// # Errors
    /// The kernel refuses: fewer than 14 bytes or more than a page, no such link, no right.
    pub fn test_run(&self, hook: Hook, ifindex: u32, frame: &[u8]) -> io::Result<i32> {
        self.bpf.test_run(hook, ifindex, frame)
    }

    /// How many entries the flow table has, as the collector's last whole walk found it, and how
    /// many it has room for.
    #[must_use]
    pub fn flows(&self) -> (u64, u64) {
        (self.flows, self.bpf.flow_capacity.into())
    }

    /// Collects flows that ended: a slice of the table in each call, so that a call every second
    /// costs little. Returns how many entries it removed. `now_ns` is CLOCK_MONOTONIC.
    pub fn collect_flows(&mut self, now_ns: u64) -> usize {
        let table = &self.bpf.flows;
        let steps = FLOW_STEPS.max(self.bpf.flow_capacity as usize / 64);
        let mut removed = 0;
        for _ in 0..steps {
            let Ok(next) = table.next(self.flow_cursor.as_deref()) else { break };
            let previous = std::mem::replace(&mut self.flow_cursor, next);
            if previous.is_none() {
                self.flows_seen = 0;
            }
            if self.flow_cursor.is_none() {
                // Of the entry before the end nothing more will be said than that it was there.
                self.flows = self.flows_seen + u64::from(previous.is_some());
            }
            // The entry before the cursor is judged: once removed it cannot lead on.
            let Some(key) = previous.as_deref().and_then(codec::flow_key) else {
                if self.flow_cursor.is_none() {
                    break;
                }
                continue;
            };
            let read = |key: &_| {
                let value = table.get(&codec::flow_bytes(key)).ok()??;
                codec::flow_value(&value)
            };
            let Some(value) = read(&key) else { continue };
            let partner = flow::partner(&key, &value);
            let other = partner.as_ref().and_then(read);
            if !flow::expired(now_ns, &key, &value, other.as_ref()) {
                self.flows_seen += 1;
            } else {
                // The cursor may be the partner: then the walk begins anew, which is harmless.
                for key in std::iter::once(key).chain(partner.filter(|_| other.is_some())) {
                    let bytes = codec::flow_bytes(&key);
                    removed += usize::from(table.delete(&bytes).is_ok());
                    if self.flow_cursor.as_deref() == Some(bytes.as_slice()) {
                        self.flows_seen = 0;
                    }
                }
            }
            if self.flow_cursor.is_none() {
                break;
            }
        }
        removed
    }

    /// Removes everything that is ours: links, routes, the nft table, attachments, pins. (The
    /// node's `ip_forward` stays on: others may rely on it by now.)
    pub async fn teardown(mut self) -> Report {
        blocking(|| self.teardown_now()).unwrap_or_else(Report::broken)
    }

    fn teardown_now(&mut self) -> Report {
        let mut report = self.reconcile_now(Desired::default());
        if let Ok(underlay) = self.underlay() {
            // A filter of an earlier daemon is not known to be at this link.
            let uplink = Some(underlay.ifindex);
            let _ = self.bpf.detach(&mut self.socket, Hook::FromUplink, uplink);
        }
        let directory = versioned(&self.config.pin_dir);
        if let Err(error) = fs::remove_dir_all(&directory) {
            let message = format!("cannot remove {}: {error}", directory.display());
            report.failures.push(Failure { key: None, message });
        }
        // Another version's pins may be there; and the directory may be someone's mount point.
        let _ = fs::remove_dir(&self.config.pin_dir);
        report
    }
}

fn is_alive(lease: &Lease) -> bool {
    Netns::open(&lease.path).is_ok_and(|netns| netns.id() == lease.netns)
}

/// Whether an object is part of what a lease asked for.
fn concerns(key: &Key, netns: NetnsId, endpoints: &BTreeSet<EndpointId>) -> bool {
    use mesh_dataplane::Ns;
    match key {
        Key::Sysctl { ns: Ns::Task(of), .. } | Key::Loopback(of) | Key::DefaultRoute(of) => {
            *of == netns
        }
        Key::Hook(Hook::TaskLo(of)) => *of == netns,
        Key::Endpoint(endpoint) => endpoints.contains(endpoint),
        Key::HostRoute(_) => true,
        key => key.veth().is_some_and(|endpoint| endpoints.contains(&endpoint)),
    }
}

/// Runs system calls on a thread of their own, which may visit other namespaces; without holding
/// up other tasks, where the runtime knows how.
fn blocking<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    use tokio::runtime::{Handle, RuntimeFlavor};
    let work = || on_thread(|| Ok(work()));
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// CLOCK_MONOTONIC in nanoseconds, as BPF programs see it.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| {
        let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
}
