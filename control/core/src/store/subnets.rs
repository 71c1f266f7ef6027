//! Arithmetic on subnets and addresses, IPv4 and IPv6 alike: addresses as 128-bit numbers beside
//! their family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network};

/// The range of node-local `gw0` addresses: the same on every node, never on a wire.
pub const NODE_LOCAL_RANGE: IpNetwork =
    IpNetwork::V4(match Ipv4Network::new_checked(Ipv4Addr::new(100, 127, 0, 0), 16) {
        Some(range) => range,
        None => panic!("100.127.0.0/16 is a network"),
    });

/// The gateway of [`NODE_LOCAL_RANGE`].
pub const NODE_LOCAL_GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 127, 0, 1));

/// An address as a number.
#[must_use]
pub(crate) fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The address of that number in the family of `like`. Numbers come from ranges of that family.
#[must_use]
pub(crate) fn address(like: IpAddr, bits: u128) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(bits as u32)),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(bits)),
    }
}

/// First and last number of a subnet.
#[must_use]
pub(crate) fn span(net: IpNetwork) -> (u128, u128) {
    (bits(net.network()), bits(net.broadcast()))
}

/// First and last number that hosts may have: in IPv4 neither the network's own address nor the
/// broadcast address (RFC 1122 section 3.2.1.3); in IPv6 not the subnet-router anycast address
/// (RFC 4291 section 2.6.1). `None` if nothing is left.
#[must_use]
pub(crate) fn hosts(net: IpNetwork) -> Option<(u128, u128)> {
    let (first, last) = span(net);
    let last = if net.is_ipv4() { last.checked_sub(1)? } else { last };
    let first = first.checked_add(1)?;
    (first <= last).then_some((first, last))
}

/// Whether two subnets share an address.
#[must_use]
pub(crate) fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    let ((a0, a1), (b0, b1)) = (span(a), span(b));
    a.is_ipv4() == b.is_ipv4() && a0 <= b1 && b0 <= a1
}

/// The addresses that no host may have, as in the registries of RFC 6890 and RFC 5771.
const NOT_UNICAST: [(&str, &str); 7] = [
    ("0.0.0.0/8", "\"this network\""),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/3", "multicast and reserved"),
    ("::/127", "loopback"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// Which of the addresses that cannot be a host's are in a subnet, if any.
#[must_use]
pub(crate) fn not_unicast(net: IpNetwork) -> Option<String> {
    NOT_UNICAST.iter().find_map(|(range, what)| {
        let range: IpNetwork = range.parse().ok()?;
        overlap(net, range).then(|| format!("the {what} addresses {range}"))
    })
}

/// Whether `inner` lies in `outer` as a whole.
#[must_use]
pub(crate) fn within(inner: IpNetwork, outer: IpNetwork) -> bool {
    let ((i0, i1), (o0, o1)) = (span(inner), span(outer));
    inner.is_ipv4() == outer.is_ipv4() && o0 <= i0 && i1 <= o1
}

/// The first subnet of `prefix` bits in `pool` that overlaps none of `taken`. Each obstacle is
/// jumped over as a whole, so the cost is the square of their number, whatever the pool's size.
#[must_use]
pub(crate) fn first_free(pool: IpNetwork, prefix: u8, taken: &[IpNetwork]) -> Option<IpNetwork> {
    let width = if pool.is_ipv4() { 32 } else { 128 };
    if prefix < pool.prefix() || prefix > width {
        return None;
    }
    let (mut start, end) = span(pool);
    let size = 1u128.checked_shl(u32::from(width - prefix))?;
    loop {
        if start.checked_add(size - 1)? > end {
            return None;
        }
        let candidate = IpNetwork::new(address(pool.network(), start), prefix).ok()?;
        let Some(obstacle) = taken.iter().find(|other| overlap(candidate, **other)) else {
            return Some(candidate);
        };
        let beyond = span(*obstacle).1.max(start + (size - 1)).checked_add(1)?;
        // Subnets begin at multiples of their size.
        start = beyond.checked_next_multiple_of(size)?;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_free_subnet_jumps_over_obstacles() {
        let pool = net("10.0.0.0/8");
        assert_eq!(first_free(pool, 24, &[]), Some(net("10.0.0.0/24")));
        assert_eq!(
            first_free(pool, 24, &[net("10.0.0.0/16"), net("10.1.0.128/25")]),
            Some(net("10.1.1.0/24"))
        );
        assert_eq!(first_free(pool, 24, &[net("10.0.0.0/8")]), None);
        assert_eq!(first_free(pool, 7, &[]), None);
        assert_eq!(first_free(net("255.255.255.0/24"), 24, &[net("255.255.255.9/32")]), None);
        assert_eq!(
            first_free(net("fd00::/48"), 64, &[net("fd00::/64")]),
            Some(net("fd00:0:0:1::/64"))
        );
    }

    #[test]
    fn only_hosts_addresses_are_unicast() {
        for bad in [
            "0.0.0.0/24",
            "127.0.0.0/8",
            "169.254.1.0/24",
            "224.0.0.0/8",
            "240.0.0.0/24",
            "128.0.0.0/1",
            "ff02::/64",
            "::/64",
            "fe80::/64",
        ] {
            assert!(not_unicast(net(bad)).is_some(), "{bad}");
        }
        for good in ["10.0.0.0/8", "100.64.0.0/10", "126.0.0.0/8", "223.255.255.0/24", "fd00::/8"] {
            assert_eq!(not_unicast(net(good)), None);
        }
    }

    #[test]
    fn hosts_leave_out_what_is_not_assignable() {
        let (first, last) = hosts(net("10.0.1.0/29")).unwrap();
        assert_eq!(last - first + 1, 6);
        assert_eq!(hosts(net("10.0.1.0/32")), None);
        assert_eq!(hosts(net("10.0.1.0/31")), None);
    }

    proptest! {
        #[test]
        fn a_free_subnet_is_free_and_the_first(
            obstacles in prop::collection::vec((0u32..4096, 20u8..=30), 0..12)
        ) {
            let pool = net("10.0.0.0/20");
            let taken: Vec<IpNetwork> = obstacles
                .into_iter()
                .map(|(offset, prefix)| {
                    let address = Ipv4Addr::from(0x0a00_0000 + offset);
                    IpNetwork::new(IpAddr::V4(address), prefix).unwrap()
                })
                .collect();
            let model = (0..16u32)
                .map(|i| Ipv4Addr::from(0x0a00_0000 + i * 256))
                .map(|first| IpNetwork::new(IpAddr::V4(first), 24).unwrap())
                .find(|net| !taken.iter().any(|t| overlap(*net, *t)));
            prop_assert_eq!(first_free(pool, 24, &taken), model);
        }
    }
}
