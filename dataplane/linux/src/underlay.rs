//! Facts about the underlay and about the host's own routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnetwork::IpNetwork;
use mesh_dataplane::Underlay;
use mesh_types::{mac::Mac, net::Mtu};

use crate::{
    error::OpError,
    netlink::Socket,
    observe::is_ours,
    rtnl::{self, Link},
};

/// Reads the underlay. `name` is the uplink's; without it the link that has `vtep`.
pub(crate) fn read(
    socket: &mut Socket,
    name: Option<&str>,
    vtep: IpAddr,
    vteps: impl Iterator<Item = IpAddr>,
) -> Result<Result<Underlay, String>, OpError> {
    let links = rtnl::links(socket)?;
    let addresses = rtnl::addresses(socket)?;
    let uplink = match name {
        Some(name) => links.iter().find(|link| link.name == name),
        None => {
            let index = addresses.iter().find(|(_, a)| a.ip() == vtep).map(|(index, _)| *index);
            links.iter().find(|link| Some(link.index) == index)
        }
    };
    let Some(uplink) = uplink else {
        return Ok(Err(match name {
            Some(name) => format!("there is no link {name}: name another with --uplink"),
            None => format!("no link has the address {vtep}: check --data-path-addr"),
        }));
    };
    let next_hops = next_hops(socket, vteps);
    Ok(Ok(Underlay {
        ifindex: uplink.index,
        name: uplink.name.clone(),
        mtu: Mtu::new(uplink.mtu).unwrap_or(Mtu::MAX),
        mac: uplink.mac.unwrap_or(Mac([0; 6])),
        vtep,
        addresses: own_addresses(&links, &addresses),
        next_hops,
    }))
}

/// The node's addresses that peers and clients may know it by.
fn own_addresses(links: &[Link], addresses: &[(u32, IpNetwork)]) -> BTreeSet<IpAddr> {
    let ours: BTreeSet<u32> =
        links.iter().filter(|link| is_ours(link)).map(|link| link.index).collect();
    addresses
        .iter()
        .filter(|(index, _)| !ours.contains(index))
        .map(|(_, address)| address.ip())
        .filter(|ip| !ip.is_loopback() && !is_link_local(*ip))
        .collect()
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Where packets to each tunnel end go first. Ends without a route are left out: they count as
/// on-link, and neighbour discovery fails for them as it must.
fn next_hops(socket: &mut Socket, vteps: impl Iterator<Item = IpAddr>) -> BTreeMap<IpAddr, IpAddr> {
    let mut found = BTreeMap::new();
    for vtep in vteps {
        if let Ok(Some(route)) = rtnl::route_to(socket, vtep) {
            found.insert(vtep, route.gateway.unwrap_or(vtep));
        }
    }
    found
}

/// The node's own networks and routes, without ours and without the default route: what a new
/// network's subnet must not overlap.
pub(crate) fn host_routes(socket: &mut Socket) -> Result<BTreeSet<IpNetwork>, OpError> {
    let links = rtnl::links(socket)?;
    let ours: BTreeSet<u32> =
        links.iter().filter(|link| is_ours(link)).map(|link| link.index).collect();
    let mut found = BTreeSet::new();
    for (index, address) in rtnl::addresses(socket)? {
        if !ours.contains(&index) && !is_link_local(address.ip()) {
            found.extend(IpNetwork::new(address.network(), address.prefix()));
        }
    }
    for route in rtnl::routes(socket)? {
        let foreign = route.is_main()
            && route.protocol != rtnl::ROUTE_PROTOCOL
            && route.oif.is_none_or(|oif| !ours.contains(&oif));
        if let Some(to) = route.to.filter(|to| foreign && !is_link_local(to.ip())) {
            found.insert(to);
        }
    }
    Ok(found)
}
