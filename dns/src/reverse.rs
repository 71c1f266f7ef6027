//! Names of addresses: `in-addr.arpa` (RFC 1035 section 3.5) and `ip6.arpa` (RFC 3596).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use crate::wire::labels;

/// What names of addresses end in.
pub(crate) const ARPA: &[u8] = b"\x04arpa";

/// The addresses that a name is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReverseName {
    /// The first of them.
    pub(crate) address: IpAddr,
    /// How many of its bits the name gives.
    pub(crate) bits: u8,
    /// Whether there are labels before the numbers: the name is below that of the addresses.
    pub(crate) is_below: bool,
}

impl ReverseName {
    /// Reads a key. `None` for names that are not about addresses.
    pub(crate) fn read(key: &[u8]) -> Option<Self> {
        let all: Vec<&[u8]> = labels(key).map(|(_, label)| label).collect();
        let (family, rest) = match all.as_slice() {
            [rest @ .., family, b"arpa"] => (*family, rest),
            _ => return None,
        };
        let mut octets = [0; 16];
        let mut count = 0;
        let (most, bits) = match family {
            b"in-addr" => (4, 8),
            b"ip6" => (32, 4),
            _ => return None,
        };
        for label in rest.iter().rev().take(most) {
            let Some(number) = number(label, bits) else { break };
            match bits {
                8 => octets[count] = number,
                _ => octets[count / 2] |= if count % 2 == 0 { number << 4 } else { number },
            }
            count += 1;
        }
        let address = match bits {
            8 => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
            _ => IpAddr::V6(Ipv6Addr::from(octets)),
        };
        Some(Self { address, bits: count as u8 * bits, is_below: rest.len() > count })
    }

    /// Whether the name is that of one address.
    pub(crate) fn is_whole(&self) -> bool {
        !self.is_below && self.bits == if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// Whether some of the addresses, or all, are in a subnet.
    pub(crate) fn overlaps(&self, subnet: &IpNetwork) -> bool {
        let own = IpNetwork::new(self.address, self.bits);
        own.is_ok_and(|own| own.contains(subnet.network()) || subnet.contains(self.address))
    }

    /// Whether these are addresses that mean nothing outside (RFC 6303, RFC 7793): nobody else is
    /// asked for their names.
    pub(crate) fn is_private(&self) -> bool {
        match self.address {
            IpAddr::V4(address) => match address.octets() {
                [0 | 10 | 127, ..] => self.bits >= 8,
                [172, 16..=31, ..] | [192, 168, ..] | [169, 254, ..] | [100, 64..=127, ..] => {
                    self.bits >= 16
                }
                _ => false,
            },
            IpAddr::V6(address) => match address.octets() {
                [0xfc | 0xfd, ..] => self.bits >= 8,
                [0xfe, second, ..] => self.bits >= 12 && second & 0xc0 == 0x80,
                _ => self.bits == 128 && (address.is_loopback() || address.is_unspecified()),
            },
        }
    }
}

/// A label as the number that it is in such names: decimal octets, or one hexadecimal digit.
fn number(label: &[u8], bits: u8) -> Option<u8> {
    let text = std::str::from_utf8(label).ok()?;
    match bits {
        8 if text.len() > 1 && text.starts_with('0') => None,
        8 if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        4 if text.len() == 1 => u8::from_str_radix(text, 16).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Key;

    fn read(name: &str) -> Option<ReverseName> {
        ReverseName::read(Key::from_text(name).unwrap().as_bytes())
    }

    fn check(name: &str, address: &str, bits: u8, is_below: bool) {
        let address = address.parse().unwrap();
        assert_eq!(read(name), Some(ReverseName { address, bits, is_below }), "{name}");
    }

    #[test]
    fn names_of_addresses_are_read() {
        check("4.3.2.1.in-addr.arpa", "1.2.3.4", 32, false);
        check("2.1.IN-ADDR.arpa", "1.2.0.0", 16, false);
        check("in-addr.arpa", "0.0.0.0", 0, false);
        check("b._dns-sd._udp.0.0.10.in-addr.arpa", "10.0.0.0", 24, true);
        check("5.4.3.2.1.in-addr.arpa", "1.2.3.4", 32, true);
        check("256.1.in-addr.arpa", "1.0.0.0", 8, true);
        check("01.in-addr.arpa", "0.0.0.0", 0, true);
        check("+1.in-addr.arpa", "0.0.0.0", 0, true);
        check("8.b.d.0.1.0.0.2.ip6.arpa", "2001:db8::", 32, false);
        let whole = format!("1.{}d.f.ip6.arpa", "0.".repeat(29));
        check(&whole, "fd00::1", 128, false);
        assert!(read(&whole).unwrap().is_whole());
        assert!(!read("2.1.in-addr.arpa").unwrap().is_whole());
        assert_eq!(read("1.in-addr.arpa.test"), None);
        assert_eq!(read("home.arpa"), None);
        assert_eq!(read("arpa"), None);
    }

    #[test]
    fn private_addresses_are_known() {
        for name in [
            "1.0.0.10.in-addr.arpa",
            "10.in-addr.arpa",
            "16.172.in-addr.arpa",
            "x.31.172.in-addr.arpa",
            "168.192.in-addr.arpa",
            "1.0.0.127.in-addr.arpa",
            "254.169.in-addr.arpa",
            "64.100.in-addr.arpa",
            "d.f.ip6.arpa",
            "9.e.f.ip6.arpa",
        ] {
            assert!(read(name).unwrap().is_private(), "{name}");
        }
        for name in [
            "8.8.8.8.in-addr.arpa",
            "172.in-addr.arpa",
            "32.172.in-addr.arpa",
            "192.in-addr.arpa",
            "in-addr.arpa",
            "ip6.arpa",
            "f.ip6.arpa",
            "e.f.ip6.arpa",
            "c.e.f.ip6.arpa",
            "63.100.in-addr.arpa",
        ] {
            assert!(!read(name).unwrap().is_private(), "{name}");
        }
    }

    #[test]
    fn names_above_a_subnet_overlap_it() {
        let subnet = "10.0.5.0/24".parse().unwrap();
        for (name, expected) in [
            ("10.in-addr.arpa", true),
            ("0.10.in-addr.arpa", true),
            ("5.0.10.in-addr.arpa", true),
            ("9.5.0.10.in-addr.arpa", true),
            ("6.0.10.in-addr.arpa", false),
            ("11.in-addr.arpa", false),
        ] {
            assert_eq!(read(name).unwrap().overlaps(&subnet), expected, "{name}");
        }
    }
}
