//! What users ask for: network and service specs, already parsed and checked at the edge.

use core::time::Duration;
use std::{collections::BTreeMap, net::IpAddr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{
    ids::NetworkId,
    net::{Mtu, Protocol},
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
    /// Raised by `--force` to replace tasks whose spec is otherwise the same.
    pub force_update: u64,
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
