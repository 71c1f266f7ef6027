//! Who may send what: the checks on a task's own packets and on those that tunnels bring.

use mesh_ebpf_abi::{Addr, Config, Counter, Endpoint, Port};

use crate::{
    addr,
    mac::{self, Mac},
};

/// A task may send from its endpoint's MAC only.
#[inline(always)]
pub const fn source_mac(port: &Port, source: Mac) -> Result<(), Counter> {
    if source.0 == Mac::new(mac::ENDPOINT, port.endpoint).0 {
        Ok(())
    } else {
        Err(Counter::DropSourceMac)
    }
}

/// A task may send from its endpoint's address only.
#[inline(always)]
pub const fn source_addr(port: &Port, source: u32) -> Result<(), Counter> {
    if addr::is_v4(&port.addr, source) { Ok(()) } else { Err(Counter::DropSourceAddr) }
}

/// The destination endpoint must be on the sender's network and have the packet's address: else a
/// MAC would lead out of the network.
#[inline(always)]
pub const fn destination(endpoint: &Endpoint, vni: u32, dst: u32) -> Result<(), Counter> {
    if endpoint.vni == vni && addr::is_v4(&endpoint.addr, dst) {
        Ok(())
    } else {
        Err(Counter::DropNoEndpoint)
    }
}

/// The tunnel's outer source must be the node of the inner source, which must be an endpoint of
/// this network with this address.
#[inline(always)]
pub const fn owner(source: &Endpoint, vni: u32, src: u32, outer: u32) -> Result<(), Counter> {
    if source.vni == vni && addr::is_v4(&source.addr, src) && addr::is_v4(&source.vtep, outer) {
        Ok(())
    } else {
        Err(Counter::DropTunnelOwner)
    }
}

/// Whether an address is one that only `gw0` links have.
#[inline(always)]
#[must_use]
pub const fn is_gateway_peer(config: &Config, dst: u32) -> bool {
    let [local, ingress] = &config.gateway_subnets;
    addr::contains(local, dst) || addr::contains(ingress, dst)
}

/// Whether a packet of this size fits: by its own length, or by that of its segments.
///
/// `len` is the whole IP packet; `segment` the payload of one segment (`gso_size`; 0: no GSO),
/// `headers` the bytes of IP and transport headers before it.
#[inline(always)]
#[must_use]
pub const fn fits(len: u32, segment: u32, headers: u32, mtu: u32) -> bool {
    if segment == 0 { len <= mtu } else { segment.saturating_add(headers) <= mtu }
}

/// Whether two addresses are equal, word by word.
#[inline(always)]
#[must_use]
pub const fn is_vtep(config: &Config, outer_dst: u32) -> bool {
    let vtep: &Addr = &config.vtep;
    addr::is_v4(vtep, outer_dst)
}

#[cfg(test)]
mod tests {
    use mesh_ebpf_abi::Subnet;
    use proptest::prelude::*;

    use super::*;
    use crate::addr::wide;

    fn endpoint(vni: u32, address: u32, vtep: u32) -> Endpoint {
        Endpoint {
            addr: wide(address),
            vtep: wide(vtep),
            next_hop: wide(vtep),
            node: 1,
            vni,
            ifindex: 0,
            flags: 0,
            pad: 0,
        }
    }

    proptest! {
        /// Only the endpoint's own pair passes; every other single change is refused.
        #[test]
        fn a_task_is_held_to_its_own(id in 1u64..1 << 40, address: u32, other_id: u64, other: u32) {
            let addr = wide(address);
            let port = Port { addr, endpoint: id, vni: 1, mtu: 1450, flags: 0, pad: 0 };
            let other_mac = Mac(other_id & 0xffff_ffff_ffff);
            prop_assert_eq!(source_mac(&port, Mac::new(mac::ENDPOINT, id)), Ok(()));
            prop_assert_eq!(
                source_mac(&port, other_mac).is_ok(),
                other_mac == Mac::new(mac::ENDPOINT, id)
            );
            prop_assert_eq!(source_addr(&port, address), Ok(()));
            prop_assert_eq!(source_addr(&port, other).is_ok(), other == address);
        }

        #[test]
        fn endpoints_are_found_on_their_network_only(
            vni: u32,
            other_vni: u32,
            a: u32,
            b: u32,
            v: u32,
            w: u32,
        ) {
            let ep = endpoint(vni, a, v);
            prop_assert_eq!(destination(&ep, other_vni, b).is_ok(), vni == other_vni && a == b);
            prop_assert_eq!(destination(&ep, vni, a), Ok(()));
            prop_assert_eq!(owner(&ep, vni, a, v), Ok(()));
            prop_assert_eq!(owner(&ep, vni, a, w).is_ok(), v == w);
            prop_assert_eq!(owner(&ep, vni, b, v).is_ok(), a == b);
        }

        #[test]
        fn sizes(
            len in 0u32..70_000,
            segment in 0u32..70_000,
            headers in 0u32..120,
            mtu in 68u32..9000,
        ) {
            let largest = if segment == 0 { len } else { segment + headers };
            prop_assert_eq!(fits(len, segment, headers, mtu), largest <= mtu);
        }
    }

    #[test]
    fn gateway_ranges() {
        let range = |base: [u8; 4]| Subnet {
            addr: wide(u32::from_ne_bytes(base)),
            mask: wide(u32::from_ne_bytes([255, 255, 0, 0])),
        };
        let mut config = Config {
            gateway_subnets: [range([172, 18, 0, 0]), Subnet::default()],
            ..Config::default()
        };
        assert!(is_gateway_peer(&config, u32::from_ne_bytes([172, 18, 3, 4])));
        assert!(!is_gateway_peer(&config, u32::from_ne_bytes([8, 8, 8, 8])));
        config.gateway_subnets[1] = range([10, 255, 0, 0]);
        assert!(is_gateway_peer(&config, u32::from_ne_bytes([10, 255, 0, 1])));
    }
}
