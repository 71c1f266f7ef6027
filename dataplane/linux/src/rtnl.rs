//! Links, addresses, routes, neighbours and filters as rtnetlink says and sets them
//! (`include/uapi/linux/{rtnetlink,if_link,neighbour,pkt_sched,pkt_cls}.h`).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd},
};

use ipnetwork::IpNetwork;
use mesh_types::mac::Mac;

use crate::netlink::{
    NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkError, Request, Socket, attrs, text_of, u16_at,
    u32_at,
};

/// `rtm_protocol` of our routes, by which we know them again. Free in `rtnetlink.h` and in
/// iproute2's `rt_protos`.
pub(crate) const ROUTE_PROTOCOL: u8 = 109;
const RTPROT_KERNEL: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RT_TABLE_LOCAL: u8 = 255;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const NUD_PERMANENT: u16 = 0x80;
pub(crate) const IFF_UP: u32 = 1;
pub(crate) const IFF_LOOPBACK: u32 = 8;
const IFF_NOARP: u32 = 0x80;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_EXT_MASK: u16 = 29;
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_UDP_CSUM: u16 = 18;
const IFLA_VXLAN_UDP_ZERO_CSUM6_RX: u16 = 20;
const IFLA_VXLAN_COLLECT_METADATA: u16 = 25;

/// A link.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: String,
    pub(crate) kind: String,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: u32,
    pub(crate) flags: u32,
    /// A veth's peer, by index in the peer's namespace.
    pub(crate) peer: Option<u32>,
    /// The bridge or the like that it is a port of.
    pub(crate) master: Option<u32>,
    pub(crate) vxlan_port: Option<u16>,
    pub(crate) vxlan_metadata: bool,
    pub(crate) vxlan_learning: bool,
}

impl Link {
    /// Whether it does what links of ours do: up, resolving addresses, nobody's port.
    pub(crate) fn works(&self) -> bool {
        self.flags & (IFF_UP | IFF_NOARP) == IFF_UP && self.master.is_none()
    }
}

fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link { index: u32_at(body, 4)?, flags: u32_at(body, 8)?, ..Link::default() };
    for (kind, value) in attrs(body.get(16..)?) {
        match kind {
            IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
            IFLA_IFNAME => link.name = text_of(value),
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_LINK => link.peer = u32_at(value, 0),
            IFLA_MASTER => link.master = u32_at(value, 0).filter(|master| *master != 0),
            IFLA_IFALIAS => link.alias = text_of(value),
            IFLA_LINKINFO => parse_info(value, &mut link),
            _ => {}
        }
    }
    Some(link)
}

fn parse_info(info: &[u8], link: &mut Link) {
    for (kind, value) in attrs(info) {
        match kind {
            IFLA_INFO_KIND => link.kind = text_of(value),
            IFLA_INFO_DATA if link.kind == "vxlan" => {
                for (kind, value) in attrs(value) {
                    let on = value.first().is_some_and(|byte| *byte != 0);
                    match kind {
                        IFLA_VXLAN_PORT => link.vxlan_port = u16_at(value, 0).map(u16::from_be),
                        // A flag on newer kernels, a byte on older ones.
                        IFLA_VXLAN_COLLECT_METADATA => link.vxlan_metadata = on || value.is_empty(),
                        IFLA_VXLAN_LEARNING => link.vxlan_learning = on,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}

/// All links of the socket's namespace.
pub(crate) fn links(socket: &mut Socket) -> Result<Vec<Link>, NetlinkError> {
    let request = Request::new(libc::RTM_GETLINK, 0, &ifinfo(0, 0, 0))
        .u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    Ok(socket.dump(&request)?.iter().filter_map(|reply| parse_link(&reply.body)).collect())
}

/// One link by name.
pub(crate) fn link_named(socket: &mut Socket, name: &str) -> Result<Option<Link>, NetlinkError> {
    let request = Request::new(libc::RTM_GETLINK, 0, &ifinfo(0, 0, 0)).text(IFLA_IFNAME, name);
    match socket.get(request) {
        Ok(reply) => Ok(reply.and_then(|reply| parse_link(&reply.body))),
        Err(error) if error.is(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// How one end of a veth shall be.
#[derive(Debug)]
pub(crate) struct VethEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: Mac,
    pub(crate) mtu: u32,
}

/// Makes a veth pair with its peer in another namespace, the host's end up, in one message. (The
/// peer cannot be brought up by it: `veth_open` finds no partner yet, drivers/net/veth.c.)
pub(crate) fn add_veth(
    socket: &mut Socket,
    host: &VethEnd,
    task: &VethEnd,
    netns: BorrowedFd,
) -> Result<(), NetlinkError> {
    let end = |request: Request, end: &VethEnd| {
        request.text(IFLA_IFNAME, end.name).attr(IFLA_ADDRESS, &end.mac.0).u32(IFLA_MTU, end.mtu)
    };
    let up = ifinfo(0, IFF_UP, IFF_UP);
    let request = Request::new(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &up);
    let request = end(request, host).nest(IFLA_LINKINFO, &[], |request| {
        request.text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, &[], |request| {
            request.nest(VETH_INFO_PEER, &ifinfo(0, 0, 0), |request| {
                end(request, task).u32(IFLA_NET_NS_FD, netns.as_raw_fd() as u32)
            })
        })
    });
    socket.change(request)
}

/// Makes a veth pair within the namespace: for probing.
pub(crate) fn add_veth_here(socket: &mut Socket, a: &str, b: &str) -> Result<(), NetlinkError> {
    let request = Request::new(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &ifinfo(0, 0, 0))
        .text(IFLA_IFNAME, a)
        .nest(IFLA_LINKINFO, &[], |request| {
            request.text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, &[], |request| {
                request
                    .nest(VETH_INFO_PEER, &ifinfo(0, 0, 0), |request| request.text(IFLA_IFNAME, b))
            })
        });
    socket.change(request)
}

/// Makes a VXLAN device that takes VNI and remote from each packet's metadata.
pub(crate) fn add_vxlan(
    socket: &mut Socket,
    name: &str,
    port: u16,
    mtu: u32,
) -> Result<(), NetlinkError> {
    let up = ifinfo(0, IFF_UP, IFF_UP);
    let request = Request::new(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &up)
        .text(IFLA_IFNAME, name)
        .u32(IFLA_MTU, mtu)
        .nest(IFLA_LINKINFO, &[], |request| {
            request.text(IFLA_INFO_KIND, "vxlan").nest(IFLA_INFO_DATA, &[], |request| {
                request
                    .u8(IFLA_VXLAN_COLLECT_METADATA, 1)
                    .u8(IFLA_VXLAN_LEARNING, 0)
                    .u16_be(IFLA_VXLAN_PORT, port)
                    .u8(IFLA_VXLAN_UDP_CSUM, 0)
                    .u8(IFLA_VXLAN_UDP_ZERO_CSUM6_RX, 1)
            })
        });
    socket.change(request)
}

/// What to change on a link.
#[derive(Debug, Default)]
pub(crate) struct LinkChange<'a> {
    /// As [`Link::works`] says.
    pub(crate) up: Option<bool>,
    pub(crate) mtu: Option<u32>,
    pub(crate) mac: Option<Mac>,
    pub(crate) alias: Option<&'a str>,
}

pub(crate) fn set_link(
    socket: &mut Socket,
    index: u32,
    change: &LinkChange,
) -> Result<(), NetlinkError> {
    let (flags, mask) = match change.up {
        Some(up) => (if up { IFF_UP } else { 0 }, IFF_UP | IFF_NOARP),
        None => (0, 0),
    };
    let mut request = Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, flags, mask));
    if change.up.is_some() {
        request = request.u32(IFLA_MASTER, 0);
    }
    if let Some(mtu) = change.mtu {
        request = request.u32(IFLA_MTU, mtu);
    }
    if let Some(mac) = change.mac {
        request = request.attr(IFLA_ADDRESS, &mac.0);
    }
    if let Some(alias) = change.alias {
        request = request.attr(IFLA_IFALIAS, alias.as_bytes());
    }
    socket.change(request)
}

pub(crate) fn delete_link(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    socket.change(Request::new(libc::RTM_DELLINK, 0, &ifinfo(index, 0, 0)))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| Ipv6Addr::from(v6).into())
}

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const RT_SCOPE_HOST: u8 = 254;

fn ifaddr(index: u32, address: IpNetwork) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[0] = family(address.ip());
    bytes[1] = address.prefix();
    bytes[3] = if address.ip().is_loopback() { RT_SCOPE_HOST } else { 0 };
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes
}

/// All addresses, with the index of their link.
pub(crate) fn addresses(socket: &mut Socket) -> Result<Vec<(u32, IpNetwork)>, NetlinkError> {
    let replies = socket.dump(&Request::new(libc::RTM_GETADDR, 0, &[0; 8]))?;
    let parse = |body: &[u8]| {
        let (prefix, index) = (*body.get(1)?, u32_at(body, 4)?);
        let (mut local, mut peer) = (None, None);
        for (kind, value) in attrs(body.get(8..)?) {
            match kind {
                IFA_LOCAL => local = address_of(value),
                IFA_ADDRESS => peer = address_of(value),
                _ => {}
            }
        }
        Some((index, IpNetwork::new(local.or(peer)?, prefix).ok()?))
    };
    Ok(replies.iter().filter_map(|reply| parse(&reply.body)).collect())
}

pub(crate) fn add_address(
    socket: &mut Socket,
    index: u32,
    address: IpNetwork,
) -> Result<(), NetlinkError> {
    let ip = octets(address.ip());
    let request =
        Request::new(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &ifaddr(index, address))
            .attr(IFA_LOCAL, &ip)
            .attr(IFA_ADDRESS, &ip)
            .u32(IFA_FLAGS, IFA_F_NODAD);
    socket.change(request)
}

pub(crate) fn delete_address(
    socket: &mut Socket,
    index: u32,
    address: IpNetwork,
) -> Result<(), NetlinkError> {
    let request = Request::new(libc::RTM_DELADDR, 0, &ifaddr(index, address))
        .attr(IFA_LOCAL, &octets(address.ip()));
    socket.change(request)
}

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_TABLE: u16 = 15;

/// A route.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) table: u32,
    /// `rtm_type`.
    kind: u8,
    /// `None`: the default route.
    pub(crate) to: Option<IpNetwork>,
    pub(crate) oif: Option<u32>,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) protocol: u8,
    pub(crate) metric: u32,
    pub(crate) v4: bool,
}

fn rtmsg(family: u8, prefix: u8, scope: u8) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0] = family;
    bytes[1] = prefix;
    bytes[4] = RT_TABLE_MAIN;
    bytes[5] = ROUTE_PROTOCOL;
    bytes[6] = scope;
    bytes[7] = RTN_UNICAST;
    bytes
}

impl Route {
    /// Whether it is a unicast route of the main table.
    pub(crate) fn is_main(&self) -> bool {
        self.table == u32::from(RT_TABLE_MAIN) && self.kind == RTN_UNICAST
    }

    /// Whether it is what makes the link's own address an address of this host.
    pub(crate) fn is_local(&self, index: u32, address: IpAddr) -> bool {
        let to = self.to.is_some_and(|to| to.ip() == address);
        self.table == u32::from(RT_TABLE_LOCAL)
            && (self.kind, self.oif, to) == (RTN_LOCAL, Some(index), true)
    }

    /// Whether the kernel made it for an address of the link: the way to its neighbours.
    pub(crate) fn is_on_link(&self, index: u32, address: IpNetwork) -> bool {
        let network = (address.network(), address.prefix());
        self.is_main()
            && (self.protocol, self.oif) == (RTPROT_KERNEL, Some(index))
            && self.to.is_some_and(|to| (to.ip(), to.prefix()) == network)
    }
}

fn parse_route(body: &[u8]) -> Option<Route> {
    let (family, prefix) = (*body.first()?, *body.get(1)?);
    let mut route = Route {
        table: u32::from(*body.get(4)?),
        kind: *body.get(7)?,
        to: None,
        oif: None,
        gateway: None,
        protocol: *body.get(5)?,
        metric: 0,
        v4: i32::from(family) == libc::AF_INET,
    };
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            RTA_DST => route.to = Some(IpNetwork::new(address_of(value)?, prefix).ok()?),
            RTA_OIF => route.oif = u32_at(value, 0),
            RTA_GATEWAY => route.gateway = address_of(value),
            RTA_PRIORITY => route.metric = u32_at(value, 0)?,
            RTA_TABLE => route.table = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(route)
}

/// The routes of all tables.
pub(crate) fn routes(socket: &mut Socket) -> Result<Vec<Route>, NetlinkError> {
    let replies = socket.dump(&Request::new(libc::RTM_GETROUTE, 0, &[0; 12]))?;
    Ok(replies.iter().filter_map(|reply| parse_route(&reply.body)).collect())
}

/// The route that the kernel would take to an address.
pub(crate) fn route_to(socket: &mut Socket, to: IpAddr) -> Result<Option<Route>, NetlinkError> {
    let ip = octets(to);
    let mut head = [0; 12];
    head[0] = family(to);
    head[1] = (ip.len() * 8) as u8;
    let reply = socket.get(Request::new(libc::RTM_GETROUTE, 0, &head).attr(RTA_DST, &ip))?;
    Ok(reply.and_then(|reply| parse_route(&reply.body)).filter(|r| r.kind == RTN_UNICAST))
}

fn route_request(
    kind: u16,
    flags: u16,
    to: Option<IpNetwork>,
    gateway: Option<IpAddr>,
    oif: u32,
) -> Request {
    let family = to.map(|to| to.ip()).or(gateway).map_or(libc::AF_INET as u8, family);
    let scope = if gateway.is_some() { 0 } else { RT_SCOPE_LINK };
    let head = rtmsg(family, to.map_or(0, |to| to.prefix()), scope);
    let mut request = Request::new(kind, flags, &head).u32(RTA_OIF, oif);
    if let Some(to) = to {
        request = request.attr(RTA_DST, &octets(to.ip()));
    }
    if let Some(gateway) = gateway {
        request = request.attr(RTA_GATEWAY, &octets(gateway));
    }
    request
}

/// Adds a route of ours; `replace` where what is there at its place is ours, or in its stead.
pub(crate) fn add_route(
    socket: &mut Socket,
    to: Option<IpNetwork>,
    gateway: Option<IpAddr>,
    oif: u32,
    replace: bool,
) -> Result<(), NetlinkError> {
    let flags = NLM_F_CREATE | if replace { NLM_F_REPLACE } else { NLM_F_EXCL };
    socket.change(route_request(libc::RTM_NEWROUTE, flags, to, gateway, oif))
}

pub(crate) fn delete_route(
    socket: &mut Socket,
    to: Option<IpNetwork>,
    gateway: Option<IpAddr>,
    oif: u32,
    metric: u32,
) -> Result<(), NetlinkError> {
    let request = route_request(libc::RTM_DELROUTE, 0, to, gateway, oif);
    socket.change(request.u32(RTA_PRIORITY, metric))
}

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

fn ndmsg(address: IpAddr, index: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0] = family(address);
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    bytes
}

/// Permanent neighbour entries: link, address, MAC.
pub(crate) fn neighbours(socket: &mut Socket) -> Result<Vec<(u32, IpAddr, Mac)>, NetlinkError> {
    let replies = socket.dump(&Request::new(libc::RTM_GETNEIGH, 0, &[0; 12]))?;
    let parse = |body: &[u8]| {
        if u16_at(body, 8)? & NUD_PERMANENT == 0 {
            return None;
        }
        let (mut address, mut mac) = (None, None);
        for (kind, value) in attrs(body.get(12..)?) {
            match kind {
                NDA_DST => address = address_of(value),
                NDA_LLADDR => mac = value.try_into().ok().map(Mac),
                _ => {}
            }
        }
        Some((u32_at(body, 4)?, address?, mac?))
    };
    Ok(replies.iter().filter_map(|reply| parse(&reply.body)).collect())
}

pub(crate) fn add_neighbour(
    socket: &mut Socket,
    index: u32,
    address: IpAddr,
    mac: Mac,
) -> Result<(), NetlinkError> {
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    let request = Request::new(libc::RTM_NEWNEIGH, flags, &ndmsg(address, index))
        .attr(NDA_DST, &octets(address))
        .attr(NDA_LLADDR, &mac.0);
    socket.change(request)
}

pub(crate) fn delete_neighbour(
    socket: &mut Socket,
    index: u32,
    address: IpAddr,
) -> Result<(), NetlinkError> {
    let request =
        Request::new(libc::RTM_DELNEIGH, 0, &ndmsg(address, index)).attr(NDA_DST, &octets(address));
    socket.change(request)
}

const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// Parents of filters under clsact.
pub(crate) const INGRESS: u32 = 0xffff_fff2;
pub(crate) const EGRESS: u32 = 0xffff_fff3;
/// By priority and handle we know our filters again: nothing about them can be pinned.
const FILTER_PRIORITY: u32 = 0x6d65;
const FILTER_HANDLE: u32 = 1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TCA_BPF_ID: u16 = 11;

fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..20].copy_from_slice(&info.to_ne_bytes());
    bytes
}

fn filter_info() -> u32 {
    FILTER_PRIORITY << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

/// Adds the clsact queueing discipline; one that is there already will do.
pub(crate) fn add_clsact(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    let head = tcmsg(index, CLSACT_HANDLE, TC_H_CLSACT, 0);
    let request =
        Request::new(libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &head).text(TCA_KIND, "clsact");
    match socket.change(request) {
        Err(error) if error.is(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Adds our filter, or replaces its program in one step.
pub(crate) fn set_filter(
    socket: &mut Socket,
    index: u32,
    parent: u32,
    program: BorrowedFd,
    name: &str,
) -> Result<(), NetlinkError> {
    let head = tcmsg(index, FILTER_HANDLE, parent, filter_info());
    let request = Request::new(libc::RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, &head)
        .text(TCA_KIND, "bpf")
        .nest(TCA_OPTIONS, &[], |request| {
            request
                .u32(TCA_BPF_FD, program.as_raw_fd() as u32)
                .text(TCA_BPF_NAME, name)
                .u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
        });
    socket.change(request)
}

pub(crate) fn delete_filter(
    socket: &mut Socket,
    index: u32,
    parent: u32,
) -> Result<(), NetlinkError> {
    let head = tcmsg(index, FILTER_HANDLE, parent, filter_info());
    socket.change(Request::new(libc::RTM_DELTFILTER, 0, &head).text(TCA_KIND, "bpf"))
}

/// Removes a filter that is at another place than ours.
pub(crate) fn delete_filter_at(
    socket: &mut Socket,
    index: u32,
    parent: u32,
    info: u32,
    handle: u32,
) -> Result<(), NetlinkError> {
    let head = tcmsg(index, handle, parent, info);
    socket.change(Request::new(libc::RTM_DELTFILTER, 0, &head).text(TCA_KIND, "bpf"))
}

/// A BPF filter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filter {
    /// It is where ours is.
    pub(crate) ours: bool,
    /// `tcm_info`.
    pub(crate) info: u32,
    pub(crate) handle: u32,
    /// The id of its program.
    pub(crate) program: Option<u32>,
}

/// The BPF filters under a parent.
pub(crate) fn filters(
    socket: &mut Socket,
    index: u32,
    parent: u32,
) -> Result<Vec<Filter>, NetlinkError> {
    let request = Request::new(libc::RTM_GETTFILTER, 0, &tcmsg(index, 0, parent, 0));
    let replies = match socket.dump(&request) {
        Ok(replies) => replies,
        // No clsact here.
        Err(error) if error.is(libc::EINVAL) || error.is(libc::ENOENT) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let parse = |body: &[u8]| {
        let (handle, info) = (u32_at(body, 8)?, u32_at(body, 16)?);
        let options = attrs(body.get(20..)?).find(|(kind, _)| *kind == TCA_OPTIONS)?;
        let program = attrs(options.1).find(|(kind, _)| *kind == TCA_BPF_ID);
        let ours = info >> 16 == FILTER_PRIORITY && handle == FILTER_HANDLE;
        let program = program.and_then(|(_, id)| u32_at(id, 0));
        Some(Filter { ours, info, handle, program })
    };
    Ok(replies.iter().filter_map(|reply| parse(&reply.body)).collect())
}
