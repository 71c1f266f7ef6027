//! One operation of a plan, done to the kernel.

use std::{collections::BTreeSet, net::Ipv4Addr, os::fd::AsFd};

use ipnetwork::{IpNetwork, Ipv4Network};
use mesh_dataplane::{
    Hook, Key, LinkRef, NetnsId, Ns, Op, Program, Stray, Value, Veth,
    desired::LOOPBACK_IFINDEX,
    host_name,
    object::{LINK_ALIAS, VXLAN_NAME, Vxlan},
};
use mesh_types::{ids::EndpointId, mac::Mac};

use crate::{
    bpf::Bpf,
    bpf_sys::{self, TCX_INGRESS},
    codec,
    error::{Failure, OpError},
    netlink::Socket,
    netns::Netns,
    nft::Nft,
    observe::{Round, TaskNs, write_sysctl},
    rtnl::{self, LinkChange, VethEnd},
};

/// What operations work with.
#[derive(Debug)]
pub(crate) struct Apply<'a> {
    pub(crate) home: &'a Netns,
    pub(crate) socket: &'a mut Socket,
    pub(crate) bpf: &'a Bpf,
    pub(crate) nft: &'a mut Nft,
    pub(crate) round: &'a mut Round,
}

impl Apply<'_> {
    /// Does all operations, continuing past failures. Returns how many succeeded.
    pub(crate) fn all(&mut self, ops: &[Op], failures: &mut Vec<Failure>) -> Vec<Key> {
        let mut done = Vec::new();
        let mut broken: BTreeSet<EndpointId> = BTreeSet::new();
        for op in ops {
            let key = op.key();
            if key.veth().is_some_and(|veth| broken.contains(&veth)) {
                // The pair's own failure says it all.
                continue;
            }
            match self.one(op) {
                Ok(()) => done.push(key.clone()),
                Err(OpError::NoLink) if !broken.is_empty() => {}
                Err(error) => {
                    if let Key::Veth(endpoint) = key {
                        broken.insert(*endpoint);
                    }
                    let message = format!("cannot {op}: {error}");
                    failures.push(Failure { key: Some(key.clone()), message });
                }
            }
        }
        done
    }

    fn one(&mut self, op: &Op) -> Result<(), OpError> {
        match op {
            Op::Put { key, value, old } => self.put(key, value, old.as_ref()),
            Op::Delete { key, old } => self.delete(key, old),
        }
    }

    fn put(&mut self, key: &Key, value: &Value, old: Option<&Value>) -> Result<(), OpError> {
        match (key, value) {
            (Key::Sysctl { ns, path, .. }, Value::Sysctl(text)) => self.sysctl(*ns, path, text),
            (Key::Vxlan, Value::Vxlan(vxlan)) => self.vxlan(vxlan, old),
            (Key::Veth(endpoint), Value::Veth(veth)) => self.veth(*endpoint, veth, old),
            (Key::Loopback(netns), _) => {
                let change = LinkChange { up: Some(true), ..LinkChange::default() };
                let socket = &mut self.task(*netns)?.socket;
                rtnl::set_link(socket, LOOPBACK_IFINDEX, &change)?;
                address_anew(socket, LOOPBACK_IFINDEX, LOOPBACK_ADDRESS)
            }
            (Key::Address(endpoint, address), _) => {
                let (task, index) = self.task_link(*endpoint)?;
                address_anew(&mut task.socket, index, *address)
            }
            (Key::DefaultRoute(netns), Value::DefaultRoute { endpoint, gateway }) => {
                let task = self.task(*netns)?;
                let index = *task.index_of.get(endpoint).ok_or(OpError::NoLink)?;
                Ok(rtnl::add_route(&mut task.socket, None, Some(*gateway), index, true)?)
            }
            (Key::HostRoute(to), Value::HostRoute(link)) => {
                let index = self.index(*link)?;
                let to = Some(IpNetwork::from(*to));
                // Whoever made a route to this very address: it is a task's that is plugged in
                // here.
                Ok(rtnl::add_route(self.socket, to, None, index, true)?)
            }
            (Key::Neighbour(endpoint, address), Value::Neighbour(mac)) => {
                let index = self.index(LinkRef::Veth(*endpoint))?;
                Ok(rtnl::add_neighbour(self.socket, index, *address, *mac)?)
            }
            (Key::Nft, Value::Nft(body)) => self.nft.set(Some(body)),
            (Key::Table(offset), Value::Table(table)) => {
                let fits = self.bpf.maglev.write(*offset as usize, table.iter().map(|id| id.get()));
                if fits { Ok(()) } else { Err(OpError::MapFull) }
            }
            (Key::Hook(hook), Value::Hook(Program::Current(link))) => self.attach(*hook, *link),
            _ => self.put_entry(key, value),
        }
    }

    fn put_entry(&mut self, key: &Key, value: &Value) -> Result<(), OpError> {
        let links = &self.round.links;
        let (map, bytes) = codec::encode_key(key, links).ok_or(OpError::NoLink)?;
        let value = codec::encode_value(value, links).ok_or(OpError::NoLink)?;
        match self.bpf.map(map).put(&bytes, &value) {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Err(OpError::MapFull),
            other => Ok(other?),
        }
    }

    fn delete(&mut self, key: &Key, old: &Value) -> Result<(), OpError> {
        match key {
            Key::Sysctl { .. } | Key::Loopback(_) | Key::Table(_) => Ok(()),
            Key::Vxlan => {
                let index = self.index(LinkRef::Vxlan)?;
                self.round.links.remove(LinkRef::Vxlan);
                gone_is_fine(rtnl::delete_link(self.socket, index))
            }
            Key::Veth(endpoint) => {
                let index = self.index(LinkRef::Veth(*endpoint))?;
                self.round.links.remove(LinkRef::Veth(*endpoint));
                gone_is_fine(rtnl::delete_link(self.socket, index))
            }
            Key::Address(endpoint, address) => {
                let (task, index) = self.task_link(*endpoint)?;
                gone_is_fine(rtnl::delete_address(&mut task.socket, index, *address))
            }
            Key::DefaultRoute(netns) => {
                let Value::DefaultRoute { endpoint, gateway } = old else { return Ok(()) };
                let task = self.task(*netns)?;
                let Some(index) = task.index_of.get(endpoint) else { return Ok(()) };
                let gateway = Some(*gateway);
                gone_is_fine(rtnl::delete_route(&mut task.socket, None, gateway, *index, 0))
            }
            Key::HostRoute(to) => {
                let Value::HostRoute(link) = old else { return Ok(()) };
                let index = self.index(*link)?;
                let to = Some(IpNetwork::from(*to));
                gone_is_fine(rtnl::delete_route(self.socket, to, None, index, 0))
            }
            Key::Neighbour(endpoint, address) => {
                let index = self.index(LinkRef::Veth(*endpoint))?;
                gone_is_fine(rtnl::delete_neighbour(self.socket, index, *address))
            }
            Key::Nft => self.nft.set(None),
            Key::Hook(hook) => self.detach(*hook, old),
            Key::Config => self.clear_config(),
            Key::Stray(ns, stray) => self.delete_stray(*ns, stray),
            _ => {
                let (map, bytes) =
                    codec::encode_key(key, &self.round.links).ok_or(OpError::NoLink)?;
                Ok(self.bpf.map(map).delete(&bytes)?)
            }
        }
    }

    fn delete_stray(&mut self, ns: Ns, stray: &Stray) -> Result<(), OpError> {
        let socket = match ns {
            Ns::Node => &mut *self.socket,
            Ns::Task(netns) => &mut self.task(netns)?.socket,
        };
        gone_is_fine(match *stray {
            Stray::Link { index, .. } => rtnl::delete_link(socket, index),
            Stray::Address { index, address } => rtnl::delete_address(socket, index, address),
            Stray::Route { to, gateway, oif, metric } => {
                rtnl::delete_route(socket, to, gateway, oif.unwrap_or(0), metric)
            }
            Stray::Filter { index, parent, info, handle } => {
                rtnl::delete_filter_at(socket, index, parent, info, handle)
            }
            Stray::Tcx { index, program, link } => {
                return Ok(bpf_sys::detach_tcx(index, TCX_INGRESS, program, link)?);
            }
        })
    }

    /// An array's entry cannot be removed; all zeros says that there is none.
    fn clear_config(&mut self) -> Result<(), OpError> {
        let (_, size) = codec::sizes(mesh_dataplane::MapId::Config);
        let map = self.bpf.map(mesh_dataplane::MapId::Config);
        Ok(map.put(&0u32.to_ne_bytes(), &vec![0; size])?)
    }

    fn index(&self, link: LinkRef) -> Result<u32, OpError> {
        self.round.links.index(link).ok_or(OpError::NoLink)
    }

    fn task(&mut self, netns: NetnsId) -> Result<&mut TaskNs, OpError> {
        self.round.tasks.get_mut(&netns).ok_or(OpError::NoNetns)
    }

    fn task_link(&mut self, endpoint: EndpointId) -> Result<(&mut TaskNs, u32), OpError> {
        self.round
            .tasks
            .values_mut()
            .find_map(|task| {
                let index = *task.index_of.get(&endpoint)?;
                Some((task, index))
            })
            .ok_or(OpError::NoLink)
    }

    fn sysctl(&mut self, ns: Ns, path: &str, value: &str) -> Result<(), OpError> {
        match ns {
            Ns::Node => Ok(write_sysctl(path, value)?),
            Ns::Task(id) => {
                let home = self.home;
                Ok(self.task(id)?.netns.visit(home, || write_sysctl(path, value))?)
            }
        }
    }

    fn vxlan(&mut self, vxlan: &Vxlan, old: Option<&Value>) -> Result<(), OpError> {
        let Some(Value::Vxlan(_)) = old else {
            match rtnl::add_vxlan(self.socket, VXLAN_NAME, vxlan.port, vxlan.mtu.get()) {
                Err(error) if error.is(libc::EADDRINUSE) || error.is(libc::EEXIST) => {
                    return Err(OpError::PortTaken(vxlan.port));
                }
                other => other?,
            }
            let link = rtnl::link_named(self.socket, VXLAN_NAME)?.ok_or(OpError::NoLink)?;
            self.round.links.insert(LinkRef::Vxlan, link.index);
            let change = LinkChange { alias: Some(LINK_ALIAS), ..LinkChange::default() };
            return Ok(rtnl::set_link(self.socket, link.index, &change)?);
        };
        let index = self.index(LinkRef::Vxlan)?;
        let mtu = Some(vxlan.mtu.get());
        let (up, alias) = (Some(vxlan.up), Some(LINK_ALIAS));
        let change = LinkChange { up, mtu, alias, ..LinkChange::default() };
        Ok(rtnl::set_link(self.socket, index, &change)?)
    }

    fn veth(
        &mut self,
        endpoint: EndpointId,
        veth: &Veth,
        old: Option<&Value>,
    ) -> Result<(), OpError> {
        match old {
            Some(Value::Veth(old)) => self.change_veth(endpoint, veth, old),
            _ => self.add_veth(endpoint, veth),
        }
    }

    fn add_veth(&mut self, endpoint: EndpointId, veth: &Veth) -> Result<(), OpError> {
        let netns = veth.netns.ok_or(OpError::NoNetns)?;
        let name = host_name(endpoint);
        let task = self.round.tasks.get_mut(&netns).ok_or(OpError::NoNetns)?;
        let host = VethEnd { name: &name, mac: veth.host_mac, mtu: veth.host_mtu };
        let peer = VethEnd { name: &veth.ifname, mac: veth.mac, mtu: veth.mtu };
        rtnl::add_veth(self.socket, &host, &peer, task.netns.file().as_fd())?;
        let link = rtnl::link_named(self.socket, &name)?.ok_or(OpError::NoLink)?;
        self.round.links.insert(LinkRef::Veth(endpoint), link.index);
        let peer = link.peer.ok_or(OpError::NoLink)?;
        task.index_of.insert(endpoint, peer);
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        rtnl::set_link(&mut task.socket, peer, &up)?;
        let change = LinkChange { alias: Some(LINK_ALIAS), ..LinkChange::default() };
        Ok(rtnl::set_link(self.socket, link.index, &change)?)
    }

    fn change_veth(
        &mut self,
        endpoint: EndpointId,
        veth: &Veth,
        old: &Veth,
    ) -> Result<(), OpError> {
        let host = LinkChange {
            up: (old.host_up != veth.host_up).then_some(veth.host_up),
            mtu: (old.host_mtu != veth.host_mtu).then_some(veth.host_mtu),
            mac: changed(old.host_mac, veth.host_mac),
            alias: (!old.alias).then_some(LINK_ALIAS),
        };
        let index = self.index(LinkRef::Veth(endpoint))?;
        rtnl::set_link(self.socket, index, &host)?;
        let task = LinkChange {
            up: (old.up != veth.up).then_some(veth.up),
            mtu: (old.mtu != veth.mtu).then_some(veth.mtu),
            mac: changed(old.mac, veth.mac),
            alias: None,
        };
        let (ns, index) = self.task_link(endpoint)?;
        rtnl::set_link(&mut ns.socket, index, &task)?;
        Ok(())
    }

    fn attach(&mut self, hook: Hook, link: LinkRef) -> Result<(), OpError> {
        let (bpf, index) = (self.bpf, self.index(link)?);
        match hook {
            Hook::TaskLo(netns) => bpf.attach(&mut self.task(netns)?.socket, hook, index),
            _ => bpf.attach(self.socket, hook, index),
        }
    }

    fn detach(&mut self, hook: Hook, old: &Value) -> Result<(), OpError> {
        let bpf = self.bpf;
        let link = match (hook, old) {
            (Hook::FromTask(endpoint), _) => LinkRef::Veth(endpoint),
            (Hook::FromVxlan, _) => LinkRef::Vxlan,
            (_, Value::Hook(Program::Current(link))) => *link,
            (Hook::TaskLo(_), _) => LinkRef::Index(LOOPBACK_IFINDEX),
            _ => LinkRef::Index(0),
        };
        let index = self.round.links.index(link).filter(|index| *index != 0);
        match hook {
            // Gone with its namespace.
            Hook::TaskLo(netns) if !self.round.tasks.contains_key(&netns) => Ok(()),
            Hook::TaskLo(netns) => bpf.detach(&mut self.task(netns)?.socket, hook, index),
            _ => bpf.detach(self.socket, hook, index),
        }
    }
}

/// `lo`'s: the resolver is at an address in it.
const LOOPBACK_ADDRESS: IpNetwork = IpNetwork::V4(LOOPBACK);
const LOOPBACK: Ipv4Network = match Ipv4Network::new_checked(Ipv4Addr::LOCALHOST, 8) {
    Some(network) => network,
    None => panic!("8 is a prefix length"),
};

/// Gives a link an address together with the routes that the kernel makes for one. Adding an
/// address that is there would bring back no route.
fn address_anew(socket: &mut Socket, index: u32, address: IpNetwork) -> Result<(), OpError> {
    gone_is_fine(rtnl::delete_address(socket, index, address))?;
    Ok(rtnl::add_address(socket, index, address)?)
}

fn changed(old: Mac, new: Mac) -> Option<Mac> {
    (old != new).then_some(new)
}

/// What is to be removed and is gone already is no failure.
fn gone_is_fine(result: Result<(), crate::netlink::NetlinkError>) -> Result<(), OpError> {
    match result {
        Err(error)
            if [libc::ENODEV, libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL]
                .iter()
                .any(|errno| error.is(*errno)) =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}
