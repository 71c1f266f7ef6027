//! Map entries: the core's typed objects to the bytes of `mesh-ebpf-abi` and back.
//!
//! Decoding is checked by encoding again: bytes that we would not write ourselves come out as
//! [`Key::Unknown`] or [`Value::Unknown`], so that any corruption differs from what is desired.

#![allow(unsafe_code, reason = "structs of the BPF contract as bytes")]

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;
use mesh_dataplane::{
    AddressUse, Config, EndpointEntry, Key, LinkRef, MapId, NodeEntry, PortEntry, ServiceEntry,
    Value,
};
use mesh_ebpf_abi as abi;
use mesh_types::{
    ids::{EndpointId, NodeNumber},
    mac::Mac,
    net::Protocol,
    record::{narrow, wide},
};

/// Kernel indexes of links, both ways.
#[derive(Debug, Default, Clone)]
pub(crate) struct LinkTable {
    index_of: BTreeMap<LinkRef, u32>,
    link_of: BTreeMap<u32, LinkRef>,
}

impl LinkTable {
    pub(crate) fn insert(&mut self, link: LinkRef, index: u32) {
        self.index_of.insert(link, index);
        self.link_of.insert(index, link);
    }

    pub(crate) fn remove(&mut self, link: LinkRef) {
        if let Some(index) = self.index_of.remove(&link) {
            self.link_of.remove(&index);
        }
    }

    pub(crate) fn index(&self, link: LinkRef) -> Option<u32> {
        match link {
            LinkRef::Index(index) => Some(index),
            link => self.index_of.get(&link).copied(),
        }
    }

    /// Whether a link of this index is one of ours.
    pub(crate) fn is_ours(&self, index: u32) -> bool {
        self.link_of.contains_key(&index)
    }

    pub(crate) fn link(&self, index: u32) -> LinkRef {
        self.link_of.get(&index).copied().unwrap_or(LinkRef::Index(index))
    }
}

/// A struct of the contract.
///
/// # Safety
/// `repr(C)`, no padding, every bit pattern valid.
unsafe trait Plain: Copy {}
macro_rules! plain {
    ($($name:ty),*) => { $(
        // SAFETY: `mesh-ebpf-abi` asserts that these have no implicit padding; all fields are
        // integers or arrays of them.
        unsafe impl Plain for $name {}
    )* };
}
plain!(
    abi::AddrKey,
    abi::AddrValue,
    abi::Endpoint,
    abi::Port,
    abi::Node,
    abi::Service,
    abi::PublishedKey,
    abi::Published,
    abi::Config,
    abi::FlowKey,
    abi::FlowValue
);
// SAFETY: integers and arrays of bytes.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for abi::Addr {}

fn bytes<T: Plain>(value: &T) -> Vec<u8> {
    // SAFETY: `Plain` has no padding, so all bytes are initialised.
    unsafe { std::slice::from_raw_parts((value as *const T).cast::<u8>(), size_of::<T>()) }.to_vec()
}

fn parse<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is checked, the read is unaligned, every bit pattern is valid.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Key and value sizes of a map.
pub(crate) fn sizes(map: MapId) -> (usize, usize) {
    match map {
        MapId::Addresses => (size_of::<abi::AddrKey>(), size_of::<abi::AddrValue>()),
        MapId::Endpoints => (8, size_of::<abi::Endpoint>()),
        MapId::Ports => (4, size_of::<abi::Port>()),
        MapId::Nodes => (8, size_of::<abi::Node>()),
        MapId::Vteps => (16, 8),
        MapId::Services => (4, size_of::<abi::Service>()),
        MapId::Published => (size_of::<abi::PublishedKey>(), size_of::<abi::Published>()),
        MapId::LocalAddrs => (16, 4),
        MapId::Config => (4, size_of::<abi::Config>()),
    }
}

/// The map and the key bytes of an object; `None` if it is no map entry or names a link that does
/// not exist.
pub(crate) fn encode_key(key: &Key, links: &LinkTable) -> Option<(MapId, Vec<u8>)> {
    Some(match key {
        Key::MapAddress(vni, address) => {
            (MapId::Addresses, bytes(&abi::AddrKey { vni: *vni, addr: wide(*address) }))
        }
        Key::Endpoint(id) => (MapId::Endpoints, bytes(&id.get())),
        Key::Port(link) => (MapId::Ports, bytes(&links.index(*link)?)),
        Key::Node(number) => (MapId::Nodes, bytes(&number.get())),
        Key::Vtep(vtep) => (MapId::Vteps, bytes(&wide(*vtep))),
        Key::Service(index) => (MapId::Services, bytes(index)),
        Key::Published(protocol, port) => {
            let key =
                abi::PublishedKey { port_be: port.to_be(), protocol: protocol.number(), pad: 0 };
            (MapId::Published, bytes(&key))
        }
        Key::LocalAddr(address) => (MapId::LocalAddrs, bytes(&wide(*address))),
        Key::Config => (MapId::Config, bytes(&0u32)),
        Key::Unknown(map, key) => (*map, key.clone()),
        _ => return None,
    })
}

fn flag(on: bool, bit: u32) -> u32 {
    if on { bit } else { 0 }
}

/// The value bytes; `None` as for keys.
pub(crate) fn encode_value(value: &Value, links: &LinkTable) -> Option<Vec<u8>> {
    Some(match value {
        Value::Present => bytes(&1u32),
        Value::MapAddress(used) => {
            let (kind, service, endpoint) = match used {
                AddressUse::Endpoint(id) => (abi::ADDR_ENDPOINT, 0, id.get()),
                AddressUse::Vip(index) => (abi::ADDR_VIP, *index, 0),
                AddressUse::Gateway => (abi::ADDR_GATEWAY, 0, 0),
            };
            bytes(&abi::AddrValue { kind, service, endpoint })
        }
        Value::Endpoint(entry) => bytes(&abi::Endpoint {
            addr: wide(entry.address),
            vtep: wide(entry.vtep),
            next_hop: wide(entry.next_hop),
            node: entry.node.get(),
            vni: entry.vni,
            ifindex: entry.link.map_or(Some(0), |link| links.index(link))?,
            flags: flag(entry.ingress, abi::EP_INGRESS)
                | flag(entry.draining, abi::EP_DRAINING)
                | flag(entry.withdrawn, abi::EP_WITHDRAWN)
                | flag(entry.closed, abi::EP_CLOSED),
            pad: 0,
        }),
        Value::Port(port) => bytes(&abi::Port {
            addr: wide(port.address),
            endpoint: port.endpoint.get(),
            vni: port.vni,
            mtu: port.mtu,
            flags: flag(port.gateway, abi::PORT_GATEWAY) | flag(port.ingress, abi::PORT_INGRESS),
            pad: 0,
        }),
        Value::Node(node) => {
            bytes(&abi::Node { vtep: wide(node.vtep), next_hop: wide(node.next_hop) })
        }
        Value::Vtep(number) => bytes(&number.get()),
        Value::Service(entry) => bytes(&abi::Service {
            maglev_offset: entry.offset,
            maglev_len: entry.len,
            vip: entry.vip.map_or([0; 16], wide),
            vni: entry.vni,
            pad: 0,
        }),
        Value::Published { service, target } => {
            bytes(&abi::Published { service: *service, target_be: target.to_be(), pad: 0 })
        }
        Value::Config(config) => bytes(&encode_config(config, links)?),
        Value::Unknown(value) => value.clone(),
        _ => return None,
    })
}

fn encode_config(config: &Config, links: &LinkTable) -> Option<abi::Config> {
    Some(abi::Config {
        vtep: wide(config.vtep),
        node: config.node.get(),
        ingress_vni: config.ingress_vni,
        uplink_ifindex: config.uplink,
        vxlan_ifindex: links.index(config.vxlan)?,
        uplink_mtu: config.uplink_mtu,
        vxlan_port_be: config.vxlan_port.to_be(),
        uplink_mac: config.uplink_mac.0,
        flags: flag(config.via_device, abi::CONFIG_VIA_DEVICE)
            | flag(config.change_type, abi::CONFIG_CHANGE_TYPE),
        pad: 0,
        gateway_subnets: config.gateway_ranges.map(|range| range.map(subnet).unwrap_or_default()),
    })
}

fn subnet(range: IpNetwork) -> abi::Subnet {
    let mut mask = wide(range.mask());
    if range.is_ipv4() {
        mask[..12].fill(0xff);
    }
    abi::Subnet { addr: wide(range.network()), mask }
}

fn range_of(subnet: &abi::Subnet) -> Option<IpNetwork> {
    let ones = u128::from_be_bytes(subnet.mask).leading_ones() as u8;
    match narrow(subnet.addr) {
        std::net::IpAddr::V4(v4) => IpNetwork::new(v4.into(), ones.checked_sub(96)?).ok(),
        v6 if ones > 0 => IpNetwork::new(v6, ones).ok(),
        _ => None,
    }
}

/// The object of a map entry.
pub(crate) fn decode(map: MapId, key: &[u8], value: &[u8], links: &LinkTable) -> (Key, Value) {
    let typed = decode_key(map, key, links)
        .filter(|typed| encode_key(typed, links) == Some((map, key.to_vec())));
    let Some(typed) = typed else {
        return (Key::Unknown(map, key.to_vec()), Value::Unknown(value.to_vec()));
    };
    let decoded = decode_value(map, value, links)
        .filter(|decoded| encode_value(decoded, links).as_deref() == Some(value));
    (typed, decoded.unwrap_or_else(|| Value::Unknown(value.to_vec())))
}

fn protocol_of(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp].into_iter().find(|protocol| protocol.number() == number)
}

fn decode_key(map: MapId, key: &[u8], links: &LinkTable) -> Option<Key> {
    Some(match map {
        MapId::Addresses => {
            let key: abi::AddrKey = parse(key)?;
            Key::MapAddress(key.vni, narrow(key.addr))
        }
        MapId::Endpoints => Key::Endpoint(EndpointId::new(parse(key)?).ok()?),
        MapId::Ports => Key::Port(links.link(parse(key)?)),
        MapId::Nodes => Key::Node(NodeNumber::new(parse(key)?).ok()?),
        MapId::Vteps => Key::Vtep(narrow(parse(key)?)),
        MapId::Services => Key::Service(parse(key)?),
        MapId::Published => {
            let key: abi::PublishedKey = parse(key)?;
            Key::Published(protocol_of(key.protocol)?, u16::from_be(key.port_be))
        }
        MapId::LocalAddrs => Key::LocalAddr(narrow(parse(key)?)),
        MapId::Config => Key::Config,
    })
}

fn decode_value(map: MapId, value: &[u8], links: &LinkTable) -> Option<Value> {
    Some(match map {
        MapId::Addresses => {
            let value: abi::AddrValue = parse(value)?;
            Value::MapAddress(match value.kind {
                abi::ADDR_ENDPOINT => AddressUse::Endpoint(EndpointId::new(value.endpoint).ok()?),
                abi::ADDR_VIP => AddressUse::Vip(value.service),
                abi::ADDR_GATEWAY => AddressUse::Gateway,
                _ => return None,
            })
        }
        MapId::Endpoints => {
            let value: abi::Endpoint = parse(value)?;
            Value::Endpoint(EndpointEntry {
                address: narrow(value.addr),
                node: NodeNumber::new(value.node).ok()?,
                vtep: narrow(value.vtep),
                next_hop: narrow(value.next_hop),
                vni: value.vni,
                link: (value.ifindex != 0).then(|| links.link(value.ifindex)),
                ingress: value.flags & abi::EP_INGRESS != 0,
                draining: value.flags & abi::EP_DRAINING != 0,
                withdrawn: value.flags & abi::EP_WITHDRAWN != 0,
                closed: value.flags & abi::EP_CLOSED != 0,
            })
        }
        MapId::Ports => {
            let value: abi::Port = parse(value)?;
            Value::Port(PortEntry {
                address: narrow(value.addr),
                endpoint: EndpointId::new(value.endpoint).ok()?,
                vni: value.vni,
                mtu: value.mtu,
                gateway: value.flags & abi::PORT_GATEWAY != 0,
                ingress: value.flags & abi::PORT_INGRESS != 0,
            })
        }
        MapId::Nodes => {
            let value: abi::Node = parse(value)?;
            Value::Node(NodeEntry { vtep: narrow(value.vtep), next_hop: narrow(value.next_hop) })
        }
        MapId::Vteps => Value::Vtep(NodeNumber::new(parse(value)?).ok()?),
        MapId::Services => {
            let value: abi::Service = parse(value)?;
            Value::Service(ServiceEntry {
                offset: value.maglev_offset,
                len: value.maglev_len,
                vip: (value.vip != [0; 16]).then(|| narrow(value.vip)),
                vni: value.vni,
            })
        }
        MapId::Published => {
            let value: abi::Published = parse(value)?;
            Value::Published { service: value.service, target: u16::from_be(value.target_be) }
        }
        MapId::LocalAddrs => Value::Present,
        MapId::Config => {
            let value: abi::Config = parse(value)?;
            Value::Config(Box::new(Config {
                vtep: narrow(value.vtep),
                node: NodeNumber::new(value.node).ok()?,
                ingress_vni: value.ingress_vni,
                uplink: value.uplink_ifindex,
                vxlan: links.link(value.vxlan_ifindex),
                uplink_mtu: value.uplink_mtu,
                vxlan_port: u16::from_be(value.vxlan_port_be),
                uplink_mac: Mac(value.uplink_mac),
                via_device: value.flags & abi::CONFIG_VIA_DEVICE != 0,
                change_type: value.flags & abi::CONFIG_CHANGE_TYPE != 0,
                gateway_ranges: [
                    range_of(&value.gateway_subnets[0]),
                    range_of(&value.gateway_subnets[1]),
                ],
            }))
        }
    })
}

/// A flow's key, for the collector.
pub(crate) fn flow_key(key: &[u8]) -> Option<abi::FlowKey> {
    parse(key)
}

/// A flow's value, for the collector.
pub(crate) fn flow_value(value: &[u8]) -> Option<abi::FlowValue> {
    parse(value)
}

/// A flow's key as bytes.
pub(crate) fn flow_bytes(key: &abi::FlowKey) -> Vec<u8> {
    bytes(key)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn links() -> LinkTable {
        let mut links = LinkTable::default();
        links.insert(LinkRef::Vxlan, 7);
        links.insert(LinkRef::Veth(EndpointId::new(5).unwrap()), 9);
        links
    }

    /// The byte order and places that the programs read.
    #[test]
    fn golden_endpoint() {
        let value = Value::Endpoint(EndpointEntry {
            address: "10.0.0.5".parse().unwrap(),
            node: NodeNumber::new(3).unwrap(),
            vtep: "192.0.2.3".parse().unwrap(),
            next_hop: "192.0.2.254".parse().unwrap(),
            vni: 0x1388,
            link: Some(LinkRef::Veth(EndpointId::new(5).unwrap())),
            ingress: true,
            draining: false,
            withdrawn: false,
            closed: true,
        });
        let mut want = Vec::new();
        for address in [[10, 0, 0, 5], [192, 0, 2, 3], [192, 0, 2, 254]] {
            want.extend([0; 10]);
            want.extend([0xff, 0xff]);
            want.extend(address);
        }
        want.extend([3, 0, 0, 0, 0, 0, 0, 0, 0x88, 0x13, 0, 0, 9, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode_value(&value, &links()), Some(want));
    }

    #[test]
    fn ports_are_in_network_order() {
        let (map, key) = encode_key(&Key::Published(Protocol::Udp, 0x1f90), &links()).unwrap();
        assert_eq!((map, key), (MapId::Published, vec![0x1f, 0x90, 17, 0]));
    }

    #[test]
    fn a_link_that_does_not_exist_has_no_entry() {
        let gone = Key::Port(LinkRef::Veth(EndpointId::new(6).unwrap()));
        assert_eq!(encode_key(&gone, &links()), None);
    }

    #[test]
    fn config_round_trips() {
        let config = Config {
            vtep: "192.0.2.1".parse().unwrap(),
            node: NodeNumber::new(1).unwrap(),
            ingress_vni: 4096,
            uplink: 2,
            vxlan: LinkRef::Vxlan,
            uplink_mtu: 1500,
            vxlan_port: 4789,
            uplink_mac: Mac([2, 3, 4, 5, 6, 7]),
            via_device: true,
            change_type: false,
            gateway_ranges: [Some("172.30.0.0/20".parse().unwrap()), None],
        };
        let value = Value::Config(Box::new(config));
        let bytes = encode_value(&value, &links()).unwrap();
        assert_eq!(bytes.len(), sizes(MapId::Config).1);
        assert_eq!(decode(MapId::Config, &[0; 4], &bytes, &links()), (Key::Config, value));
    }

    proptest! {
        /// Whatever is in a map, decoding loses nothing: encoding gives the same bytes again.
        #[test]
        fn decoding_is_lossless(
            map in prop::sample::select(&MapId::ALL[..]), seed: [u8; 160], small: bool,
        ) {
            let (key, value) = sizes(map);
            // Small numbers are the ones that mean something.
            let bytes: Vec<u8> = seed.iter().map(|b| if small { b % 4 } else { *b }).collect();
            let (key, value) = (&bytes[..key], &bytes[key..key + value]);
            let (typed, decoded) = decode(map, key, value, &links());
            prop_assert_eq!(encode_key(&typed, &links()), Some((map, key.to_vec())));
            let again = encode_value(&decoded, &links());
            prop_assert!(again.as_deref() == Some(value), "{decoded:?}");
        }
    }
}
