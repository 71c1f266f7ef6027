//! Addresses of networks and the leases of tasks: chosen here as pure values, taken by the caller.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use mesh_types::{
    EndpointId, NodeId, TaskId,
    task::{EndpointLease, InterfaceKind},
};

use super::{
    Store,
    subnets::{self, NODE_LOCAL_RANGE, bits},
};
use crate::model::{Holder, Network, Task};

impl Network {
    /// The numbers that may be leased: those of `ip_range` if one is given, else of the subnet.
    fn range(&self) -> Option<(u128, u128)> {
        let (first, last) = subnets::hosts(self.subnet)?;
        let Some(part) = self.spec.ip_range else { return Some((first, last)) };
        let (low, high) = subnets::span(part);
        (first.max(low) <= last.min(high)).then(|| (first.max(low), last.min(high)))
    }

    /// How many addresses can be leased to tasks and VIPs, and how many of them are.
    #[must_use]
    pub fn usage(&self) -> (u128, u128) {
        let Some((first, last)) = self.range() else { return (0, 0) };
        let gateway = u128::from((first..=last).contains(&bits(self.gateway)));
        let low = subnets::address(self.gateway, first);
        let high = subnets::address(self.gateway, last);
        let held = self.leases.range(low..=high).count() as u128;
        (last - first + 1 - gateway, held.saturating_sub(gateway))
    }

    /// The next free address from the cursor on, around the end of the range once. `None`: full.
    pub(super) fn free_address(&self) -> Option<IpAddr> {
        let (first, last) = self.range()?;
        if self.spec.ip_range.is_none() && self.leases.len() as u128 > last - first {
            return None;
        }
        let from = self.cursor.clamp(first, last);
        self.gap(from, last).or_else(|| self.gap(first, from))
    }

    /// The first number of `from..=to` that nobody holds.
    fn gap(&self, from: u128, to: u128) -> Option<IpAddr> {
        let at = |number| subnets::address(self.gateway, number);
        let mut next = from;
        for held in self.leases.range(at(from)..=at(to)).map(|(address, _)| bits(*address)) {
            if held > next {
                break;
            }
            next = held.checked_add(1)?;
        }
        (next <= to).then(|| at(next))
    }

    /// Takes an address that [`Self::free_address`] chose.
    pub(super) fn lease(&mut self, address: IpAddr, holder: Holder) {
        let before = self.leases.insert(address, holder);
        assert!(before.is_none(), "{address} on network {} has two owners", self.spec.name);
        self.cursor = bits(address).saturating_add(1);
    }

    /// Why [`Self::free_address`] found none.
    pub(super) fn full(&self) -> String {
        let (all, held) = self.usage();
        let part = self.spec.ip_range.unwrap_or(self.subnet);
        format!("no free address on network {} ({part}): {held} of {all} in use", self.spec.name)
    }

    /// An address of this network with its prefix length.
    fn with_prefix(&self, address: IpAddr) -> Result<IpNetwork, String> {
        IpNetwork::new(address, self.subnet.prefix()).map_err(|error| error.to_string())
    }
}

impl Store {
    /// The leases that a task needs before it can be scheduled: one per network that it joins, and
    /// `gw0` on the ingress network if its service publishes ports. Nothing is taken yet.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn choose_leases(&self, task: &Task) -> Result<Vec<EndpointLease>, String> {
        let mut endpoint = self.next_endpoint();
        let mut leases = Vec::new();
        let overlays = task.networks.iter().enumerate().map(|(index, attachment)| {
            let index = u8::try_from(index).unwrap_or(u8::MAX);
            InterfaceKind::Overlay { network: attachment.network, index }
        });
        let gateway = if task.published {
            let ingress = self.ingress().ok_or("there is no ingress network for its ports")?;
            Some(InterfaceKind::IngressGateway { network: ingress.id })
        } else {
            None
        };
        for kind in overlays.chain(gateway) {
            let network = kind
                .network()
                .and_then(|id| self.networks.get(&id))
                .ok_or("a network that it joins was removed")?;
            let address = network.free_address().ok_or_else(|| network.full())?;
            let id = endpoint.ok_or(NO_ENDPOINT)?;
            endpoint = id.next().filter(|next| *next < EndpointId::MAX);
            let address = network.with_prefix(address)?;
            leases.push(EndpointLease { endpoint: id, kind, address });
        }
        Ok(leases)
    }

    /// The `gw0` of a task with no published port: on the range that every node has for itself.
    /// `Ok(None)`: it has another way out, or must have none.
    ///
    /// # Errors
    /// Why not, for people.
    pub(super) fn choose_local_gateway(
        &self,
        task: &Task,
        node: NodeId,
    ) -> Result<Option<EndpointLease>, String> {
        if task.published || !self.has_way_out(task) {
            return Ok(None);
        }
        let endpoint = self.next_endpoint().ok_or(NO_ENDPOINT)?;
        let (first, last) =
            subnets::hosts(NODE_LOCAL_RANGE).ok_or("the node-local range is empty")?;
        // The gateway has the first; endpoint ids only grow, so beginning at theirs reuses late.
        let (first, size) = (first + 1, last - first);
        let used = self.local_gateways.get(&node);
        let address = (0..size)
            .map(|step| first + (u128::from(endpoint.get()) + step) % size)
            .map(|number| subnets::address(NODE_LOCAL_RANGE.network(), number))
            .find(|address| used.is_none_or(|used| !used.contains_key(address)))
            .ok_or_else(|| {
                format!("no free address in {NODE_LOCAL_RANGE} on node {}", self.node_name(node))
            })?;
        let address = IpNetwork::new(address, NODE_LOCAL_RANGE.prefix())
            .map_err(|error| error.to_string())?;
        Ok(Some(EndpointLease { endpoint, kind: InterfaceKind::LocalGateway, address }))
    }

    /// The next endpoint id. The last of the 2^40 is never leased: it marks the end.
    fn next_endpoint(&self) -> Option<EndpointId> {
        let next = self.cluster.as_ref()?.next_endpoint;
        (next < EndpointId::MAX).then_some(next)
    }

    /// A task may send to the outside unless all of its networks are internal.
    fn has_way_out(&self, task: &Task) -> bool {
        task.networks.is_empty()
            || task.networks.iter().any(|attachment| {
                self.networks.get(&attachment.network).is_some_and(|net| !net.spec.internal)
            })
    }

    /// Takes what [`Self::choose_leases`] or [`Self::choose_local_gateway`] chose.
    pub(super) fn take_leases(
        &mut self,
        id: TaskId,
        node: Option<NodeId>,
        leases: Vec<EndpointLease>,
    ) {
        for lease in &leases {
            if let Some(cluster) = &mut self.cluster {
                cluster.next_endpoint = lease.endpoint.next().unwrap_or(EndpointId::MAX);
            }
            match (lease.kind.network(), node) {
                (Some(network), _) => {
                    if let Some(network) = self.networks.get_mut(&network) {
                        network.lease(lease.address.ip(), Holder::Endpoint(id, lease.endpoint));
                    }
                }
                (None, Some(node)) => {
                    let used = self.local_gateways.entry(node).or_default();
                    let before = used.insert(lease.address.ip(), id);
                    assert!(before.is_none(), "{} on node {node} has two owners", lease.address);
                }
                (None, None) => unreachable!("node-local addresses are leased with the node"),
            }
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            task.leases.extend(leases);
        }
    }

    /// Gives back all that a task holds.
    pub(super) fn release_leases(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let node = task.node;
        for lease in std::mem::take(&mut task.leases) {
            match (lease.kind.network(), node) {
                (Some(network), _) => {
                    if let Some(network) = self.networks.get_mut(&network) {
                        network.leases.remove(&lease.address.ip());
                    }
                }
                (None, Some(node)) => {
                    if let Some(used) = self.local_gateways.get_mut(&node) {
                        used.remove(&lease.address.ip());
                        if used.is_empty() {
                            self.local_gateways.remove(&node);
                        }
                    }
                }
                (None, None) => {}
            }
        }
    }
}

const NO_ENDPOINT: &str = "no endpoint id is left";
