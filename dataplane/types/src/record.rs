//! The revision stream: the numbered log of records that managers derive from the store and nodes
//! apply. Each record is the whole truth about its key at its revision; a removal is a tombstone.
//!
//! A node subscribes to the networks that it has tasks on, to the ingress network, and to the
//! cluster scope (nodes, networks). It resumes from its last [`Revision`] with any manager, since
//! every manager derives the same stream from the same log.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{EndpointId, NetworkId, NodeId, NodeNumber, Revision, ServiceId, TaskId, Vni},
    net::Mtu,
    spec::{EndpointMode, PortSpec},
};

/// An address with the prefix length of its subnet (`10.0.0.5/24`).
pub type Address = IpNetwork;

/// Who needs a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// Every node.
    Cluster,
    /// The nodes with tasks on this network (for the ingress network: every node).
    Network(NetworkId),
}

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RecordKey {
    /// A node.
    Node(NodeNumber),
    /// A network.
    Network(NetworkId),
    /// A service as seen on one network.
    Service(NetworkId, ServiceId),
    /// An endpoint.
    Endpoint(NetworkId, EndpointId),
}

impl RecordKey {
    /// Who needs it.
    #[must_use]
    pub fn scope(self) -> Scope {
        match self {
            Self::Node(_) | Self::Network(_) => Scope::Cluster,
            Self::Service(network, _) | Self::Endpoint(network, _) => Scope::Network(network),
        }
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// A node.
    Node(NodeRecord),
    /// A network.
    Network(NetworkRecord),
    /// A service as seen on one network.
    Service(ServiceRecord),
    /// An endpoint.
    Endpoint(EndpointRecord),
}

impl Record {
    /// What it is about.
    #[must_use]
    pub fn key(&self) -> RecordKey {
        match self {
            Self::Node(node) => RecordKey::Node(node.number),
            Self::Network(network) => RecordKey::Network(network.id),
            Self::Service(service) => RecordKey::Service(service.network, service.id),
            Self::Endpoint(endpoint) => RecordKey::Endpoint(endpoint.network, endpoint.id),
        }
    }
}

/// A node as others need to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its id.
    pub id: NodeId,
    /// Its number: BPF maps, raft, mesh-return MACs.
    pub number: NodeNumber,
    /// Its host name.
    pub name: String,
    /// The underlay address that tunnels end at (`--data-path-addr`).
    pub vtep: IpAddr,
    /// The address that it is reached at by other nodes' daemons (`--advertise-addr`).
    pub address: IpAddr,
    /// Whether it is a manager.
    pub manager: bool,
}

/// A network as nodes need to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Its id.
    pub id: NetworkId,
    /// Its name.
    pub name: String,
    /// Its VNI.
    pub vni: Vni,
    /// Its subnet.
    pub subnet: IpNetwork,
    /// The gateway's address.
    pub gateway: IpAddr,
    /// The user's MTU, if one was given.
    pub mtu: Option<Mtu>,
    /// No way out.
    pub internal: bool,
    /// The network of published ports.
    pub ingress: bool,
}

/// A service as seen on one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// The network.
    pub network: NetworkId,
    /// The service.
    pub id: ServiceId,
    /// Its name.
    pub name: String,
    /// More names of it on this network.
    pub aliases: Vec<String>,
    /// How its name resolves.
    pub mode: EndpointMode,
    /// Its virtual address on this network (`None` with dnsrr and on the ingress network).
    pub vip: Option<IpAddr>,
    /// Its published ports; filled in on the ingress network alone.
    pub ports: Vec<PortSpec>,
}

/// An endpoint: one interface of one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// Its id, and so its MAC.
    pub id: EndpointId,
    /// Its network.
    pub network: NetworkId,
    /// The node that it is on.
    pub node: NodeNumber,
    /// Its address.
    pub address: IpAddr,
    /// Its task.
    pub task: TaskId,
    /// Its task's name.
    pub task_name: String,
    /// Its service.
    pub service: ServiceId,
    /// Whether new flows go to it.
    pub state: EndpointState,
}

/// Whether new flows go to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EndpointState {
    /// Reachable, not yet balanced to.
    Starting,
    /// Balanced to.
    Ready,
    /// Old flows go on; no new ones.
    Draining,
}

/// A step of the stream.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Delta {
    /// The revision that the receiver is at once it applied this.
    pub to: Revision,
    /// Scopes whose records the receiver must replace as a whole (first subscription, or its
    /// revision was compacted). Their records are all in `upserts`.
    pub reset: BTreeSet<Scope>,
    /// Scopes that the receiver is subscribed to from now on; it forgets all others.
    pub scopes: BTreeSet<Scope>,
    /// New and changed records.
    pub upserts: Vec<Record>,
    /// Records that are gone.
    pub removals: Vec<RecordKey>,
}

impl Default for Revision {
    fn default() -> Self {
        Self::MIN
    }
}

/// The records that a node holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RecordSet {
    /// How far it is.
    pub revision: Revision,
    /// Nodes, by number.
    pub nodes: BTreeMap<NodeNumber, NodeRecord>,
    /// Networks.
    pub networks: BTreeMap<NetworkId, NetworkRecord>,
    /// Services, by network.
    pub services: BTreeMap<(NetworkId, ServiceId), ServiceRecord>,
    /// Endpoints, by network.
    pub endpoints: BTreeMap<(NetworkId, EndpointId), EndpointRecord>,
    /// What it is subscribed to.
    pub scopes: BTreeSet<Scope>,
}

impl RecordSet {
    /// Applies one step. Applying a step twice changes nothing more.
    pub fn apply(&mut self, delta: Delta) {
        for scope in &delta.reset {
            self.forget(*scope);
        }
        let gone: Vec<Scope> = self.scopes.difference(&delta.scopes).copied().collect();
        for scope in gone {
            self.forget(scope);
        }
        self.scopes = delta.scopes;
        for key in delta.removals {
            self.remove(key);
        }
        for record in delta.upserts {
            self.insert(record);
        }
        self.revision = self.revision.max(delta.to);
    }

    /// Inserts or replaces one record.
    pub fn insert(&mut self, record: Record) {
        match record {
            Record::Node(node) => {
                self.nodes.insert(node.number, node);
            }
            Record::Network(network) => {
                self.networks.insert(network.id, network);
            }
            Record::Service(service) => {
                self.services.insert((service.network, service.id), service);
            }
            Record::Endpoint(endpoint) => {
                self.endpoints.insert((endpoint.network, endpoint.id), endpoint);
            }
        }
    }

    /// Removes one record.
    pub fn remove(&mut self, key: RecordKey) {
        match key {
            RecordKey::Node(number) => {
                self.nodes.remove(&number);
            }
            RecordKey::Network(network) => {
                self.networks.remove(&network);
            }
            RecordKey::Service(network, service) => {
                self.services.remove(&(network, service));
            }
            RecordKey::Endpoint(network, endpoint) => {
                self.endpoints.remove(&(network, endpoint));
            }
        }
    }

    fn forget(&mut self, scope: Scope) {
        match scope {
            Scope::Cluster => {
                self.nodes.clear();
                self.networks.clear();
            }
            Scope::Network(network) => {
                self.services.retain(|(n, _), _| *n != network);
                self.endpoints.retain(|(n, _), _| *n != network);
            }
        }
    }

    /// The ingress network, once there is one.
    #[must_use]
    pub fn ingress(&self) -> Option<&NetworkRecord> {
        self.networks.values().find(|network| network.ingress)
    }

    /// The endpoints of one service on one network.
    pub fn backends(
        &self,
        network: NetworkId,
        service: ServiceId,
    ) -> impl Iterator<Item = &EndpointRecord> {
        self.endpoints
            .range((network, EndpointId::MIN)..=(network, EndpointId::MAX))
            .map(|(_, endpoint)| endpoint)
            .filter(move |endpoint| endpoint.service == service)
    }
}

/// An address as BPF map keys hold it: 16 bytes, IPv4 mapped (RFC 4291 section 2.5.5.2).
#[must_use]
pub fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The inverse of [`wide`].
#[must_use]
pub fn narrow(bytes: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(bytes).to_canonical()
}
