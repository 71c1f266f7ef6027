//! Networks: a VNI, a subnet and a gateway are leased in the transaction that makes one.

use std::{collections::BTreeMap, net::IpAddr};

use ipnetwork::IpNetwork;
use mesh_types::{NetworkId, Vni, spec::NetworkSpec};

use super::{
    At, Store, names,
    subnets::{self, NODE_LOCAL_RANGE, bits},
};
use crate::{
    command::{Outcome, Rejection},
    model::{Holder, Network},
};

impl Store {
    pub(super) fn create_network(
        &mut self,
        at: At,
        id: NetworkId,
        spec: &NetworkSpec,
    ) -> Result<Outcome, Rejection> {
        names::check(&spec.name)?;
        if self.networks.contains_key(&id) {
            return Err(Rejection::Exists(format!("network with id {id} already exists")));
        }
        if self.networks.values().any(|other| names::same(&other.spec.name, &spec.name)) {
            return Err(Rejection::Exists(format!(
                "network with name {} already exists",
                spec.name
            )));
        }
        if let Some(other) = self.ingress().filter(|_| spec.ingress) {
            return Err(Rejection::Exists(format!(
                "ingress network ({}) is already present",
                other.id
            )));
        }
        let subnet = match spec.subnet {
            Some(subnet) => self.check_subnet(subnet)?,
            None if spec.gateway.is_some() || spec.ip_range.is_some() => {
                return Err(Rejection::Invalid(
                    "a gateway or an ip range needs a subnet: give --subnet too".into(),
                ));
            }
            None => self.lease_subnet()?,
        };
        let gateway = gateway_of(spec, subnet)?;
        check_range(spec, subnet)?;
        let vni = self.free_vni()?;
        let network = Network {
            id,
            meta: at.made(),
            spec: spec.clone(),
            vni,
            subnet,
            gateway,
            leases: BTreeMap::from([(gateway, Holder::Gateway)]),
            cursor: 0,
        };
        self.networks.insert(id, network);
        if let Some(cluster) = &mut self.cluster {
            cluster.next_vni = vni.next().unwrap_or(Vni::MIN);
        }
        Ok(Outcome::Done)
    }

    pub(super) fn remove_network(&mut self, id: NetworkId) -> Result<Outcome, Rejection> {
        let network = self
            .networks
            .get(&id)
            .ok_or_else(|| Rejection::NotFound(format!("network {id} not found")))?;
        let name = &network.spec.name;
        if network.spec.ingress {
            return Err(Rejection::Forbidden(format!(
                "network {name} carries the published ports and cannot be removed"
            )));
        }
        let services = self
            .services
            .values()
            .filter(|service| service.spec.networks.iter().any(|a| a.network == id))
            .map(|service| format!("service {}", service.spec.name));
        // A task outlives its service while it ends, and holds its address until it has.
        let tasks = self
            .tasks
            .values()
            .filter(|task| !task.status.state.is_final())
            .filter(|task| !self.services.contains_key(&task.service))
            .filter(|task| task.networks.iter().any(|a| a.network == id))
            .map(|task| format!("task {}", task.name()));
        let updated = self
            .tasks
            .values()
            .filter(|task| task.leases.iter().any(|lease| lease.kind.network() == Some(id)))
            .filter(|task| {
                self.services
                    .get(&task.service)
                    .is_some_and(|s| !s.spec.networks.iter().any(|a| a.network == id))
            })
            .map(|task| format!("task {}", task.name()));
        let users: Vec<String> = services.chain(tasks).chain(updated).collect();
        if !users.is_empty() {
            return Err(Rejection::Precondition(format!(
                "network {name} is in use by {}",
                few(&users)
            )));
        }
        self.networks.remove(&id);
        Ok(Outcome::Done)
    }

    /// A subnet that the user chose.
    fn check_subnet(&self, subnet: IpNetwork) -> Result<IpNetwork, Rejection> {
        let invalid = |text: String| Err(Rejection::Invalid(text));
        let longest = if subnet.is_ipv4() { 30 } else { 126 };
        if subnet.ip() != subnet.network() {
            let proper = subnets::address(subnet.ip(), bits(subnet.network()));
            return invalid(format!(
                "subnet {subnet} has host bits set: did you mean {proper}/{}?",
                subnet.prefix()
            ));
        }
        if subnet.prefix() == 0 || subnet.prefix() > longest {
            return invalid(format!("subnet {subnet} must have a prefix of 1..={longest} bits"));
        }
        if let Some(what) = subnets::not_unicast(subnet) {
            return invalid(format!("subnet {subnet} overlaps {what}: hosts cannot have those"));
        }
        // Docker's words for an overlap come first: clients look for them.
        const OVERLAP: &str = "Pool overlaps with other one on this address space";
        if let Some(other) = self.networks.values().find(|n| subnets::overlap(subnet, n.subnet)) {
            return invalid(format!(
                "{OVERLAP}: subnet {subnet} overlaps {} of network {}",
                other.subnet, other.spec.name
            ));
        }
        if subnets::overlap(subnet, NODE_LOCAL_RANGE) {
            return invalid(format!(
                "{OVERLAP}: subnet {subnet} overlaps {NODE_LOCAL_RANGE}, which every node uses for \
                 the way out of its tasks"
            ));
        }
        for node in self.nodes.values() {
            let mut routes = node.description.host_routes.iter().filter(|route| counts(route));
            if let Some(route) = routes.find(|route| subnets::overlap(subnet, **route)) {
                return invalid(format!(
                    "{OVERLAP}: subnet {subnet} overlaps {route}, a route of node {}",
                    node.name()
                ));
            }
        }
        Ok(subnet)
    }

    /// The first subnet of the pools that overlaps nothing known.
    fn lease_subnet(&self) -> Result<IpNetwork, Rejection> {
        let Some(cluster) = &self.cluster else {
            return Err(Rejection::Exhausted("there are no address pools".into()));
        };
        let routes = self.nodes.values().flat_map(|node| &node.description.host_routes);
        let taken: Vec<IpNetwork> = (self.networks.values().map(|network| network.subnet))
            .chain(routes.filter(|route| counts(route)).copied())
            .chain([NODE_LOCAL_RANGE])
            .collect();
        let spec = &cluster.spec;
        spec.address_pools
            .iter()
            .find_map(|pool| subnets::first_free(*pool, spec.subnet_len, &taken))
            .ok_or_else(|| {
                let pools: Vec<String> =
                    spec.address_pools.iter().map(ToString::to_string).collect();
                Rejection::Exhausted(format!(
                    "could not find an available subnet of /{} in {}: all overlap other networks \
                     or the nodes' own routes; give one with --subnet",
                    spec.subnet_len,
                    pools.join(", ")
                ))
            })
    }

    /// The next VNI that no network has.
    fn free_vni(&self) -> Result<Vni, Rejection> {
        let used: std::collections::BTreeSet<Vni> =
            self.networks.values().map(|network| network.vni).collect();
        let start = self.cluster.as_ref().map_or(Vni::MIN, |cluster| cluster.next_vni);
        std::iter::successors(Some(start), |vni| Some(vni.next().unwrap_or(Vni::MIN)))
            .take(used.len() + 1)
            .find(|vni| !used.contains(vni))
            .ok_or_else(|| Rejection::Exhausted("no VNI is left".into()))
    }
}

/// A default route overlaps everything and says nothing.
fn counts(route: &IpNetwork) -> bool {
    route.prefix() > 0
}

fn gateway_of(spec: &NetworkSpec, subnet: IpNetwork) -> Result<IpAddr, Rejection> {
    let outside = || Rejection::Invalid(format!("subnet {subnet} has no room for a gateway"));
    let (first, last) = subnets::hosts(subnet).ok_or_else(outside)?;
    match spec.gateway {
        None => Ok(subnets::address(subnet.ip(), first)),
        Some(gateway) => {
            let fits =
                gateway.is_ipv4() == subnet.is_ipv4() && (first..=last).contains(&bits(gateway));
            fits.then_some(gateway).ok_or_else(|| {
                Rejection::Invalid(format!(
                    "gateway {gateway} is not a host address of subnet {subnet}"
                ))
            })
        }
    }
}

fn check_range(spec: &NetworkSpec, subnet: IpNetwork) -> Result<(), Rejection> {
    match spec.ip_range {
        Some(range) if !subnets::within(range, subnet) => {
            Err(Rejection::Invalid(format!("ip range {range} does not lie in subnet {subnet}")))
        }
        _ => Ok(()),
    }
}

/// The first few of a list, with the number of those left out.
fn few(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
