//! What the kernel holds of ours, as the core's objects.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnetwork::IpNetwork;
use mesh_dataplane::{
    Desired, Hook, Key, LinkRef, MapId, NetnsId, Ns, Observed, Program, Stray, Value, Veth,
    desired::LOOPBACK_IFINDEX,
    object::{LINK_ALIAS, VXLAN_NAME, Vxlan, endpoint_of},
};
use mesh_types::{ids::EndpointId, mac::Mac, net::Mtu};

use crate::{
    bpf::{Bpf, parent_of},
    bpf_sys::{self, TCX_INGRESS, TcxInfo},
    codec::{self, LinkTable},
    error::OpError,
    netlink::Socket,
    netns::Netns,
    nft::Nft,
    rtnl::{self, Link, Route},
};

/// Most entries of a map that one round looks at. Larger maps are not healed beyond it.
const DUMP_LIMIT: usize = 1 << 20;

/// A task's namespace in this round.
#[derive(Debug)]
pub(crate) struct TaskNs {
    pub(crate) netns: Netns,
    /// Opened inside it.
    pub(crate) socket: Socket,
    /// Its veths: index there.
    pub(crate) index_of: BTreeMap<EndpointId, u32>,
}

/// The kernel as one round sees it: what is there, and the handles to change it.
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) links: LinkTable,
    pub(crate) tasks: BTreeMap<NetnsId, TaskNs>,
    pub(crate) observed: Observed,
}

/// Reads everything. `paths` are the namespaces of live attachments.
pub(crate) fn observe(
    home: &Netns,
    socket: &mut Socket,
    bpf: &Bpf,
    nft: &mut Nft,
    paths: &BTreeMap<NetnsId, PathBuf>,
    desired: &Desired,
) -> Result<Round, OpError> {
    let mut round = Round::default();
    let veths = round.node_links(socket, desired)?;
    for (id, path) in paths {
        // One that ended since it was looked at has nothing to observe.
        if let Ok(task) = open_task(home, *id, path) {
            round.tasks.insert(*id, task);
        }
    }
    for (endpoint, link) in &veths {
        round.put(Key::Veth(*endpoint), Value::Veth(unplugged(link)));
    }
    let tasks: Vec<NetnsId> = round.tasks.keys().copied().collect();
    for id in tasks {
        round.task_objects(home, id, &veths, desired)?;
    }
    round.node_objects(socket, nft, desired)?;
    round.hooks(socket, bpf)?;
    round.maps(bpf)?;
    Ok(round)
}

fn open_task(home: &Netns, id: NetnsId, path: &Path) -> Result<TaskNs, OpError> {
    let netns = Netns::open(path)?;
    if netns.id() != id {
        return Err(OpError::NoNetns);
    }
    let socket = netns.visit(home, Socket::route)?;
    Ok(TaskNs { netns, socket, index_of: BTreeMap::new() })
}

/// A pair whose task side is in no attached namespace.
fn unplugged(link: &Link) -> Veth {
    Veth {
        netns: None,
        ifname: String::new(),
        mac: Mac([0; 6]),
        host_mac: link.mac.unwrap_or(Mac([0; 6])),
        mtu: 0,
        host_mtu: link.mtu,
        up: false,
        host_up: link.works(),
        alias: link.alias == LINK_ALIAS,
    }
}

/// Ours are veths of our naming that carry our alias, or (made a moment before a crash) the
/// gateway's MAC.
fn our_veth(link: &Link) -> Option<EndpointId> {
    let ours = link.alias == LINK_ALIAS || link.mac == Some(Mac::GATEWAY);
    endpoint_of(&link.name).filter(|_| ours && link.kind == "veth")
}

/// One that lost our marks, at the very name that is wanted.
fn wanted_veth(link: &Link, desired: &Desired) -> Option<EndpointId> {
    let wanted = |endpoint: &EndpointId| desired.objects.contains_key(&Key::Veth(*endpoint));
    endpoint_of(&link.name).filter(|endpoint| link.kind == "veth" && wanted(endpoint))
}

/// Links of our kinds that carry our marks, and another name than we give: renamed by hand, or
/// copied. They would hold what ours need, a name in a task or a port.
fn is_stray(link: &Link) -> bool {
    link.alias == LINK_ALIAS
        && match link.kind.as_str() {
            "veth" => link.mac == Some(Mac::GATEWAY) && endpoint_of(&link.name).is_none(),
            "vxlan" => link.vxlan_metadata && link.name != VXLAN_NAME,
            _ => false,
        }
}

/// Whether an address does what it is for: what is sent to it arrives, its neighbours are reached.
/// The kernel makes the routes for that, and nobody makes them again.
fn has_routes(routes: &[Route], index: u32, address: IpNetwork) -> bool {
    let local = |route: &Route| route.is_local(index, address.ip());
    let on_link = |route: &Route| route.is_on_link(index, address);
    address.is_ipv6()
        || routes.iter().any(local) && (is_host(address) || routes.iter().any(on_link))
}

/// Whether `lo` has the address that 127.0.0.0/8 is local by.
fn has_loopback(addresses: &[(u32, IpNetwork)], routes: &[Route]) -> bool {
    let local = |index: u32, ip: IpAddr| routes.iter().any(|route| route.is_local(index, ip));
    addresses.iter().any(|(index, address)| {
        let (ip, network) = (address.ip(), address.network());
        *index == LOOPBACK_IFINDEX
            && (ip, address.prefix()) == (IpAddr::from([127, 0, 0, 1]), 8)
            && local(*index, ip)
            && local(*index, network)
    })
}

/// Whether a link is one of ours.
pub(crate) fn is_ours(link: &Link) -> bool {
    our_veth(link).is_some() || (link.name == VXLAN_NAME && link.kind == "vxlan")
}

impl Round {
    fn put(&mut self, key: Key, value: Value) {
        self.observed.objects.insert(key, value);
    }

    fn node_links(
        &mut self,
        socket: &mut Socket,
        desired: &Desired,
    ) -> Result<BTreeMap<EndpointId, Link>, OpError> {
        let mut veths = BTreeMap::new();
        for link in rtnl::links(socket)? {
            if link.name == VXLAN_NAME && link.kind == "vxlan" {
                self.links.insert(LinkRef::Vxlan, link.index);
                let value = Value::Vxlan(Vxlan {
                    port: link.vxlan_port.unwrap_or(0),
                    mtu: Mtu::new(link.mtu).unwrap_or(Mtu::MAX),
                    up: link.works() && link.alias == LINK_ALIAS,
                    collects_metadata: link.vxlan_metadata && !link.vxlan_learning,
                });
                self.put(Key::Vxlan, value);
            } else if let Some(endpoint) = our_veth(&link).or_else(|| wanted_veth(&link, desired)) {
                self.links.insert(LinkRef::Veth(endpoint), link.index);
                veths.insert(endpoint, link);
            } else if is_stray(&link) {
                let stray = Stray::Link { index: link.index, name: link.name };
                self.put(Key::Stray(Ns::Node, stray), Value::Present);
            }
        }
        Ok(veths)
    }

    fn task_objects(
        &mut self,
        home: &Netns,
        id: NetnsId,
        veths: &BTreeMap<EndpointId, Link>,
        desired: &Desired,
    ) -> Result<(), OpError> {
        let Some(mut task) = self.tasks.remove(&id) else { return Ok(()) };
        let links = rtnl::links(&mut task.socket)?;
        let addresses = rtnl::addresses(&mut task.socket)?;
        let routes = rtnl::routes(&mut task.socket)?;
        for link in &links {
            if link.flags & rtnl::IFF_LOOPBACK != 0 {
                if link.works() && has_loopback(&addresses, &routes) {
                    self.put(Key::Loopback(id), Value::Present);
                }
                continue;
            }
            // The pair's two ends name each other.
            let ours = veths.iter().find(|(_, host)| {
                link.kind == "veth"
                    && host.peer == Some(link.index)
                    && link.peer == Some(host.index)
            });
            let Some((endpoint, host)) = ours else { continue };
            task.index_of.insert(*endpoint, link.index);
            let veth = Veth {
                netns: Some(id),
                ifname: link.name.clone(),
                mac: link.mac.unwrap_or(Mac([0; 6])),
                mtu: link.mtu,
                up: link.works(),
                ..unplugged(host)
            };
            self.put(Key::Veth(*endpoint), Value::Veth(veth));
        }
        let endpoint_at: BTreeMap<u32, EndpointId> =
            task.index_of.iter().map(|(endpoint, index)| (*index, *endpoint)).collect();
        let mut broken = BTreeSet::new();
        for (index, address) in addresses {
            // Addresses that the task gave itself are its own affair (the source guard drops them).
            let key = endpoint_at.get(&index).map(|endpoint| Key::Address(*endpoint, address));
            if let Some(key) = key.filter(|key| desired.objects.contains_key(key)) {
                if has_routes(&routes, index, address) {
                    self.put(key, Value::Present);
                } else {
                    broken.insert(index);
                }
            }
        }
        let ours = |route: &&Route| route.is_main() && route.protocol == rtnl::ROUTE_PROTOCOL;
        for route in routes.iter().filter(ours) {
            let endpoint = route.oif.and_then(|oif| endpoint_at.get(&oif));
            match (endpoint, route.gateway) {
                (Some(endpoint), Some(gateway)) if is_default(route) => {
                    // With an address that is made anew it goes, too.
                    if route.oif.is_none_or(|oif| !broken.contains(&oif)) {
                        let value = Value::DefaultRoute { endpoint: *endpoint, gateway };
                        self.put(Key::DefaultRoute(id), value);
                    }
                }
                _ => self.put(Key::Stray(Ns::Task(id), stray_route(route)), Value::Present),
            }
        }
        let wanted = sysctls(desired, Ns::Task(id));
        if !wanted.is_empty() {
            let values = task.netns.visit(home, || Ok(read_sysctls(&wanted)))?;
            self.observed.objects.extend(values);
        }
        self.tasks.insert(id, task);
        Ok(())
    }

    fn node_objects(
        &mut self,
        socket: &mut Socket,
        nft: &mut Nft,
        desired: &Desired,
    ) -> Result<(), OpError> {
        self.observed.objects.extend(read_sysctls(&sysctls(desired, Ns::Node)));
        for route in rtnl::routes(socket)? {
            if !route.is_main() || route.protocol != rtnl::ROUTE_PROTOCOL {
                continue;
            }
            match (route.to, route.oif) {
                (Some(to), Some(oif))
                    if is_host(to) && route.metric == 0 && route.gateway.is_none() =>
                {
                    let link = self.links.link(oif);
                    self.put(Key::HostRoute(to.ip()), Value::HostRoute(link));
                }
                _ => self.put(Key::Stray(Ns::Node, stray_route(&route)), Value::Present),
            }
        }
        for (index, address) in rtnl::addresses(socket)? {
            let link_local = matches!(address.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local());
            if self.links.is_ours(index) && !link_local {
                let stray = Stray::Address { index, address };
                self.put(Key::Stray(Ns::Node, stray), Value::Present);
            }
        }
        for (index, address, mac) in rtnl::neighbours(socket)? {
            // Multicast and the like appear as permanent too on some kernels.
            if let LinkRef::Veth(endpoint) = self.links.link(index)
                && !is_multicast(address)
            {
                self.put(Key::Neighbour(endpoint, address), Value::Neighbour(mac));
            }
        }
        if let Some(table) = nft.observe()? {
            self.put(Key::Nft, table);
        }
        Ok(())
    }

    fn hooks(&mut self, socket: &mut Socket, bpf: &Bpf) -> Result<(), OpError> {
        let mut pinned = BTreeSet::new();
        for (hook, TcxInfo { link, program, ifindex }) in bpf.pinned()? {
            let current = ifindex != 0 && bpf.is_current(hook, program);
            let at = self.links.link(ifindex);
            let state = if current { Program::Current(at) } else { Program::Stale };
            self.put(Key::Hook(hook), Value::Hook(state));
            pinned.insert(link);
        }
        let tasks: Vec<NetnsId> = self.tasks.keys().copied().collect();
        for id in tasks {
            let Some(mut task) = self.tasks.remove(&id) else { continue };
            let at = LinkRef::Index(LOOPBACK_IFINDEX);
            self.filter(&mut task.socket, bpf, Hook::TaskLo(id), at, LOOPBACK_IFINDEX)?;
            self.tasks.insert(id, task);
        }
        for link in rtnl::links(socket)? {
            if bpf.tcx {
                for (program, by) in bpf_sys::attached(link.index, TCX_INGRESS)? {
                    if !pinned.contains(&by) && bpf.is_ours(program) {
                        let stray = Stray::Tcx { index: link.index, program, link: by };
                        self.put(Key::Stray(Ns::Node, stray), Value::Present);
                    }
                }
                continue;
            }
            let at = self.links.link(link.index);
            let hook = match at {
                LinkRef::Veth(endpoint) => Hook::FromTask(endpoint),
                LinkRef::Vxlan => Hook::FromVxlan,
                LinkRef::Index(_) => Hook::FromUplink,
            };
            self.filter(socket, bpf, hook, at, link.index)?;
        }
        Ok(())
    }

    /// Notes our filter at a link, if there is one.
    fn filter(
        &mut self,
        socket: &mut Socket,
        bpf: &Bpf,
        hook: Hook,
        at: LinkRef,
        index: u32,
    ) -> Result<(), OpError> {
        let ns = match hook {
            Hook::TaskLo(netns) => Ns::Task(netns),
            _ => Ns::Node,
        };
        for filter in rtnl::filters(socket, index, parent_of(hook))? {
            let current = filter.program.is_some_and(|program| bpf.is_current(hook, program));
            if filter.ours {
                let state = if current { Program::Current(at) } else { Program::Stale };
                self.put(Key::Hook(hook), Value::Hook(state));
            } else if current {
                let (info, handle) = (filter.info, filter.handle);
                let stray = Stray::Filter { index, parent: parent_of(hook), info, handle };
                self.put(Key::Stray(ns, stray), Value::Present);
            }
        }
        Ok(())
    }

    fn maps(&mut self, bpf: &Bpf) -> Result<(), OpError> {
        let mut used = 0;
        for map in MapId::ALL {
            for (key, value) in bpf.map(map).dump(DUMP_LIMIT)? {
                // An array always has its entry; all zeros is none.
                if map == MapId::Config && value.iter().all(|byte| *byte == 0) {
                    continue;
                }
                let (key, value) = codec::decode(map, &key, &value, &self.links);
                if let Value::Service(entry) = &value {
                    used = used.max(u64::from(entry.offset) + u64::from(entry.len));
                }
                self.put(key, value);
            }
        }
        self.observed.maglev = bpf.maglev.read(usize::try_from(used).unwrap_or(usize::MAX));
        Ok(())
    }
}

fn is_default(route: &Route) -> bool {
    route.to.is_none() && route.v4 && route.metric == 0
}

fn stray_route(route: &Route) -> Stray {
    let Route { to, gateway, oif, metric, .. } = *route;
    Stray::Route { to, gateway, oif, metric }
}

fn is_host(to: IpNetwork) -> bool {
    to.prefix() == if to.is_ipv4() { 32 } else { 128 }
}

fn is_multicast(address: IpAddr) -> bool {
    address.is_multicast() || address == IpAddr::from([255, 255, 255, 255])
}

fn sysctls(desired: &Desired, of: Ns) -> Vec<Key> {
    let is = |key: &&Key| matches!(key, Key::Sysctl { ns, .. } if *ns == of);
    desired.objects.keys().filter(is).cloned().collect()
}

/// Reads settings in the calling thread's namespace. One that is not there is left out.
fn read_sysctls(keys: &[Key]) -> Vec<(Key, Value)> {
    let read = |key: &Key| {
        let Key::Sysctl { path, .. } = key else { return None };
        let text = fs::read_to_string(sysctl_path(path)).ok()?;
        Some((key.clone(), Value::Sysctl(text.trim_end().to_owned())))
    };
    keys.iter().filter_map(read).collect()
}

pub(crate) fn sysctl_path(path: &str) -> PathBuf {
    Path::new("/proc/sys").join(path)
}

/// Writes a setting in the calling thread's namespace. A kernel without IPv6 has nothing to turn
/// off.
pub(crate) fn write_sysctl(path: &str, value: &str) -> io::Result<()> {
    match fs::write(sysctl_path(path), value) {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                && path.starts_with("net/ipv6")
                && !Path::new("/proc/sys/net/ipv6").exists() =>
        {
            Ok(())
        }
        other => other,
    }
}
