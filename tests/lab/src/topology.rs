//! Names and addresses of a lab. They are a contract with scripts of others: see the table in
//! README.md.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The router's address on the underlay: everyone's default gateway there.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The same in IPv6.
pub const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
/// The router's address on the client's link.
pub const ROUTER_OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The same in IPv6.
pub const ROUTER_OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);
/// The client: a host outside the cluster, and the nodes' upstream resolver.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// The same in IPv6.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 7);
/// Prefix lengths of the two networks.
pub const PREFIX: u8 = 24;
/// Prefix lengths of the two networks in IPv6.
pub const PREFIX6: u8 = 64;

/// Managers are `.11` to `.19`.
pub const MANAGERS_MAX: u8 = 9;
/// Workers are `.21` to `.99`.
pub const WORKERS_MAX: u8 = 79;
/// Below it there is no IPv6 (RFC 8200 section 5).
pub const MTU_MIN: u32 = 1280;
/// What a veth takes at most.
pub const MTU_MAX: u32 = 65535;

/// A lab's name: it begins the names of its namespaces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// Longest name: a unix socket below a task's directory must stay within 108 bytes.
    pub const LENGTH_MAX: usize = 32;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The network namespace of one of the lab's machines, as `ip netns` shows it.
    #[must_use]
    pub fn netns(&self, member: &str) -> String {
        format!("{}-{member}", self.0)
    }

    /// The machine of this lab that a network namespace belongs to; the inverse of [`Self::netns`].
    #[must_use]
    pub fn member_of_netns<'a>(&self, netns: &'a str) -> Option<&'a str> {
        let member = netns.strip_prefix(self.as_str())?.strip_prefix('-')?;
        Role::of_name(member).map(|_| member)
    }
}

impl FromStr for LabName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        ensure!(
            (1..=Self::LENGTH_MAX).contains(&text.len())
                && text.starts_with(alphanumeric)
                && text.ends_with(alphanumeric)
                && text.chars().all(|c| alphanumeric(c) || c == '-'),
            "lab name {text:?}: use 1 to {} characters of a-z, 0-9 and -, with a letter or digit \
             at both ends",
            Self::LENGTH_MAX,
        );
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a machine is in the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A node in the raft quorum (`m1`).
    Manager,
    /// A node that only runs tasks (`w1`).
    Worker,
    /// The host outside the cluster.
    Client,
    /// The hop between client and underlay, and the underlay switch.
    Router,
}

impl Role {
    /// The role that a machine's name says, if it is a machine's name at all.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        let numbered = |rest: &str| {
            !rest.is_empty() && rest.len() <= 2 && rest.bytes().all(|b| b.is_ascii_digit())
        };
        match name {
            "client" => Some(Self::Client),
            "router" => Some(Self::Router),
            _ if name.strip_prefix('m').is_some_and(numbered) => Some(Self::Manager),
            _ if name.strip_prefix('w').is_some_and(numbered) => Some(Self::Worker),
            _ => None,
        }
    }

    /// Whether a daemon runs on machines of this role.
    #[must_use]
    pub fn is_node(self) -> bool {
        matches!(self, Self::Manager | Self::Worker)
    }

    /// The role as `lab ps` prints it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::Worker => "worker",
            Self::Client => "client",
            Self::Router => "router",
        }
    }
}

/// One machine of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name and hostname (`m1`, `client`).
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Its IPv4 address: on the underlay, or the client's.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address6: Ipv6Addr,
}

impl Member {
    /// The node of a name, `None` if it is no node's.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let role = Role::of_name(name).filter(|role| role.is_node())?;
        let number = name.get(1..)?.parse().ok()?;
        let max = if role == Role::Manager { MANAGERS_MAX } else { WORKERS_MAX };
        let member = Self::node(role, number);
        ((1..=max).contains(&number) && member.name == name).then_some(member)
    }

    fn node(role: Role, number: u8) -> Self {
        let (letter, base) = if role == Role::Manager { ('m', 10) } else { ('w', 20) };
        let host = base + number;
        // The v6 address shows the same digits as the v4 one: .11 is ::11.
        let digits = u16::from(host / 10) << 4 | u16::from(host % 10);
        Self {
            name: format!("{letter}{number}"),
            role,
            address: Ipv4Addr::new(192, 0, 2, host),
            address6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, digits),
        }
    }

    /// The MAC of its link, made of its address: a machine that crashed comes back with the same,
    /// so that its neighbours' tables stay true, as with a real card.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        let [a, b, c, d] = self.address.octets();
        // Locally administered, unicast, and of none of the kinds that mesh gives a meaning.
        [0xee, 0, a, b, c, d]
    }

    /// The default gateway, unless this is the router itself.
    #[must_use]
    pub fn gateway(&self) -> Option<(Ipv4Addr, Ipv6Addr)> {
        match self.role {
            Role::Manager | Role::Worker => Some((ROUTER, ROUTER6)),
            Role::Client => Some((ROUTER_OUTSIDE, ROUTER_OUTSIDE6)),
            Role::Router => None,
        }
    }
}

/// How big a lab is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Managers, 1 to [`MANAGERS_MAX`].
    pub managers: u8,
    /// Workers, 0 to [`WORKERS_MAX`].
    pub workers: u8,
    /// MTU of the underlay links, bytes of an IP packet.
    pub mtu: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Self { managers: 3, workers: 2, mtu: 1500 }
    }
}

impl Topology {
    /// Says which number is out of its range.
    ///
    /// # Errors
    /// When there is no manager, or more machines than addresses, or the MTU is out of range.
    pub fn check(&self) -> Result<()> {
        let Self { managers, workers, mtu } = *self;
        ensure!(
            (1..=MANAGERS_MAX).contains(&managers),
            "{managers} managers: a lab has 1 to {MANAGERS_MAX}"
        );
        ensure!(workers <= WORKERS_MAX, "{workers} workers: a lab has at most {WORKERS_MAX}");
        ensure!(
            (MTU_MIN..=MTU_MAX).contains(&mtu),
            "MTU {mtu}: an underlay link takes {MTU_MIN} to {MTU_MAX}"
        );
        Ok(())
    }

    /// The nodes: managers, then workers.
    pub fn nodes(&self) -> impl Iterator<Item = Member> {
        let managers = (1..=self.managers).map(|n| Member::node(Role::Manager, n));
        let workers = (1..=self.workers).map(|n| Member::node(Role::Worker, n));
        managers.chain(workers)
    }

    /// All machines: nodes, client, router.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.nodes().chain(outside()).collect()
    }
}

/// The machines that every lab has: client and router.
pub(crate) fn outside() -> impl Iterator<Item = Member> {
    let outside =
        [("client", Role::Client, CLIENT, CLIENT6), ("router", Role::Router, ROUTER, ROUTER6)];
    outside.into_iter().map(|(name, role, address, address6)| Member {
        name: name.to_owned(),
        role,
        address,
        address6,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_the_contract() {
        let members = Topology::default().members();
        let shown: Vec<_> =
            members.iter().map(|m| format!("{} {} {}", m.name, m.address, m.address6)).collect();
        assert_eq!(
            shown,
            [
                "m1 192.0.2.11 2001:db8:1::11",
                "m2 192.0.2.12 2001:db8:1::12",
                "m3 192.0.2.13 2001:db8:1::13",
                "w1 192.0.2.21 2001:db8:1::21",
                "w2 192.0.2.22 2001:db8:1::22",
                "client 198.51.100.7 2001:db8:2::7",
                "router 192.0.2.1 2001:db8:1::1",
            ]
        );
    }

    #[test]
    fn no_two_machines_share_an_address_in_the_largest_lab() {
        let largest = Topology { managers: MANAGERS_MAX, workers: WORKERS_MAX, mtu: MTU_MAX };
        largest.check().unwrap();
        let members = largest.members();
        for (i, a) in members.iter().enumerate() {
            assert_eq!(Role::of_name(&a.name), Some(a.role));
            assert_eq!(Member::named(&a.name).as_ref(), a.role.is_node().then_some(a));
            for b in &members[i + 1..] {
                assert!(a.address != b.address && a.address6 != b.address6, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn names_of_labs_do_not_catch_each_others_namespaces() {
        let lab: LabName = "lab".parse().unwrap();
        assert_eq!(lab.member_of_netns("lab-m1"), Some("m1"));
        assert_eq!(lab.member_of_netns("lab-client"), Some("client"));
        for foreign in ["lab-two-m1", "lab", "lab-", "lab-mx", "lab-m123", "other-m1", "laboratory"]
        {
            assert_eq!(lab.member_of_netns(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn bad_names_and_sizes_are_refused() {
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a b", &"a".repeat(33)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad:?}");
        }
        let of = |managers, workers, mtu| Topology { managers, workers, mtu }.check();
        assert!(of(0, 1, 1500).is_err());
        assert!(of(10, 1, 1500).is_err());
        assert!(of(1, 80, 1500).is_err());
        assert!(of(1, 0, 1279).is_err());
        assert!(of(1, 0, 65536).is_err());
        assert!(of(1, 0, 1280).is_ok());
    }
}
