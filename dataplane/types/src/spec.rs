//! What users ask for: network and service specs, already parsed and checked at the edge.

use core::time::Duration;
use std::{collections::BTreeMap, net::IpAddr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{
    ids::NetworkId,
    net::{Mtu, Protocol},
    resources::Resources,
    task::TaskState,
};

/// User labels, sorted so that equal sets are equal bytes.
pub type Labels = BTreeMap<String, String>;

/// What a user asks of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Unique in the cluster.
    pub name: String,
    /// User labels.
    pub labels: Labels,
    /// The subnet, or `None` to lease one from the cluster's pool.
    pub subnet: Option<IpNetwork>,
    /// The gateway address inside the subnet, or `None` for the first host.
    pub gateway: Option<IpAddr>,
    /// Addresses are leased from this part of the subnet only.
    pub ip_range: Option<IpNetwork>,
    /// MTU of the tasks' interfaces, or `None` to derive it from the underlay.
    pub mtu: Option<Mtu>,
    /// Plain containers and CNI pods may attach.
    pub attachable: bool,
    /// Tasks on internal networks alone have no way out.
    pub internal: bool,
    /// This is the network of published ports. One in a cluster.
    pub ingress: bool,
    /// Driver options as the user gave them, echoed by `inspect`.
    pub options: Labels,
}

/// What a user asks of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// Unique in the cluster.
    pub name: String,
    /// Labels of the service object.
    pub labels: Labels,
    /// How many tasks.
    pub mode: ServiceMode,
    /// What each task runs.
    pub task: TaskSpec,
    /// Networks that the tasks join, in the order of their interfaces.
    pub networks: Vec<NetworkAttachment>,
    /// How the service is reached by name.
    pub endpoint_mode: EndpointMode,
    /// Published ports.
    pub ports: Vec<PortSpec>,
    /// How tasks are replaced when the spec changes.
    pub update: UpdatePolicy,
    /// The same on the way back to the spec before.
    pub rollback: UpdatePolicy,
    /// The API's own JSON for this spec, echoed back byte-faithful by `inspect`. Never interpreted
    /// outside the API.
    pub raw: Option<String>,
}

/// How many tasks a service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceMode {
    /// A number of slots, anywhere.
    Replicated {
        /// How many.
        replicas: u64,
    },
    /// One task on each eligible node.
    Global,
}

/// One network that a service's tasks join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAttachment {
    /// Which.
    pub network: NetworkId,
    /// More names under which the service is found there.
    pub aliases: Vec<String>,
}

/// How a service's name resolves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum EndpointMode {
    /// To one virtual address per network.
    #[default]
    Vip,
    /// To the addresses of the tasks, in rotating order.
    Dnsrr,
}

/// A published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortSpec {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port that the task listens on.
    pub target: u16,
    /// The port on every node; 0 in a spec means "lease one of 30000–32767".
    pub published: u16,
}

/// What a task runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TaskSpec {
    /// The image's name; a mere label for the process runtime.
    pub image: String,
    /// Which executor runs it.
    pub runtime: Runtime,
    /// Overrides the image's entry point (Docker's `Command`).
    pub command: Vec<String>,
    /// Arguments; for the process runtime `command` + `args` is the argument vector.
    pub args: Vec<String>,
    /// `KEY=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub dir: Option<String>,
    /// Host name; the task's short id if not given.
    pub hostname: Option<String>,
    /// Labels of the container.
    pub labels: Labels,
    /// Signal that asks the task to end; SIGTERM if not given.
    pub stop_signal: Option<String>,
    /// Time between that signal and SIGKILL; 10 s if not given.
    pub stop_grace_period: Option<Duration>,
    /// What happens when a task ends.
    pub restart: RestartPolicy,
    /// Which nodes may run it: all of these must hold.
    pub constraints: Vec<Constraint>,
    /// Raised by `--force` to replace tasks whose spec is otherwise the same.
    pub force_update: u64,
    /// How it finds names.
    #[serde(default)]
    pub dns: DnsSpec,
    /// What it may take of its node, and what is kept for it there.
    #[serde(default)]
    pub resources: Resources,
    /// The tasks of its service are spread over the values of these labels, the first one first.
    #[serde(default)]
    pub spread: Vec<Spread>,
    /// How many tasks of its service one node may run; zero: no limit.
    #[serde(default)]
    pub max_per_node: u64,
}

/// How a task finds names.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DnsSpec {
    /// Servers for names outside the cluster, instead of the node's.
    pub servers: Vec<IpAddr>,
    /// Domains in which a name is looked for that is not found as it is.
    pub search: Vec<String>,
    /// Options of resolv.conf(5).
    pub options: Vec<String>,
}

/// How the tasks of a service are replaced, one batch after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdatePolicy {
    /// Tasks at a time; zero: all at once.
    pub parallelism: u64,
    /// Pause between a batch and the next.
    pub delay: Duration,
    /// What happens when too many of the new tasks fail.
    pub on_failure: FailureAction,
    /// A new task that fails within this time counts as failed.
    pub monitor: Duration,
    /// How many of the new tasks may fail, in millionths of all.
    pub max_failure_ppm: u32,
    /// Whether the old task ends before or after the new one takes traffic.
    pub order: UpdateOrder,
}

impl Default for UpdatePolicy {
    /// Swarm's defaults.
    fn default() -> Self {
        Self {
            parallelism: 1,
            delay: Duration::ZERO,
            on_failure: FailureAction::Pause,
            monitor: Duration::from_secs(5),
            max_failure_ppm: 0,
            order: UpdateOrder::StopFirst,
        }
    }
}

/// What happens to an update whose tasks fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureAction {
    /// It stops where it is until the user updates again.
    #[default]
    Pause,
    /// It goes on.
    Continue,
    /// The spec before comes back (of a rollback: as `Pause`).
    Rollback,
}

/// Whether the old task ends before or after the new one takes traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateOrder {
    /// First the old one ends.
    #[default]
    StopFirst,
    /// First the new one takes traffic.
    StartFirst,
}

/// A condition on nodes, as `--constraint` gives it: `node.labels.zone==a`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constraint {
    /// What of the node.
    pub key: ConstraintKey,
    /// Whether it must be equal (`==`) or must not (`!=`).
    pub equal: bool,
    /// To this. Ids and labels compare as they are, names and roles without case.
    pub value: String,
}

/// What of a node a [`Constraint`] looks at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConstraintKey {
    /// `node.id`
    Id,
    /// `node.hostname`
    Hostname,
    /// `node.role`
    Role,
    /// `node.labels.KEY`; a node without the label has the empty value.
    Label(String),
}

/// A label of nodes over whose values tasks are spread, as `--placement-pref` gives it:
/// `spread=node.labels.zone`. Nodes without it are together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    /// The label's key.
    pub label: String,
}

/// Which executor runs a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// A host binary in the task's namespaces.
    Process,
    /// An image, through an OCI runtime.
    #[default]
    Oci,
}

/// What happens when a task ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// When to replace it.
    pub condition: RestartCondition,
    /// Pause before the replacement starts.
    pub delay: Duration,
    /// Give up after this many; `None`: never.
    pub max_attempts: Option<u64>,
    /// Attempts are counted over this long; zero: since the slot was made.
    pub window: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            condition: RestartCondition::Any,
            delay: Duration::from_secs(5),
            max_attempts: None,
            window: Duration::ZERO,
        }
    }
}

impl RestartPolicy {
    /// Whether a task that ended like this is wanted again, attempts aside.
    #[must_use]
    pub fn wants_again(&self, end: TaskState) -> bool {
        match self.condition {
            RestartCondition::None => false,
            RestartCondition::OnFailure => end != TaskState::Complete,
            RestartCondition::Any => true,
        }
    }

    /// How many attempts there are; `None`: no limit. Zero is none, too, as in Swarm.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.max_attempts.filter(|most| *most > 0)
    }

    /// Whether so many attempts are all that there are.
    #[must_use]
    pub fn is_spent(&self, attempts: u64) -> bool {
        self.limit().is_some_and(|most| attempts >= most)
    }

    /// How long an attempt counts, in milliseconds; `None`: for ever.
    #[must_use]
    pub fn window_ms(&self) -> Option<u64> {
        let window = u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX);
        (window > 0).then_some(window)
    }
}

/// When an ended task is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartCondition {
    /// Never.
    None,
    /// After a failure.
    OnFailure,
    /// Always.
    Any,
}
