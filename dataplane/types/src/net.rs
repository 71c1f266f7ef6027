//! Ports, protocols and sizes on the wire.

use core::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Transport protocols that can be published and balanced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP (RFC 9293).
    Tcp,
    /// UDP (RFC 768).
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            other => Err(format!("protocol `{other}` is not supported: use tcp or udp")),
        }
    }
}

/// The largest IP packet that a link carries, in bytes, without its link-layer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u32);

impl Mtu {
    /// IPv6 links carry at least this (RFC 8200 section 5).
    pub const MIN: Self = Self(1280);
    /// An IPv4 packet cannot be longer.
    pub const MAX: Self = Self(65_535);
    /// Ethernet's.
    pub const ETHERNET: Self = Self(1500);
    /// Outer IPv4 (20), UDP (8), VXLAN (8) and inner Ethernet (14) headers.
    pub const VXLAN_OVERHEAD_V4: u32 = 50;

    /// Checks the range 68..=65535: 68 is the least that IPv4 allows (RFC 791).
    ///
    /// # Errors
    /// A sentence that names the value and the range.
    pub fn new(bytes: u32) -> Result<Self, String> {
        if (68..=Self::MAX.0).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(format!("MTU {bytes} is out of range 68..=65535"))
        }
    }

    /// Bytes.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// What is left inside a VXLAN tunnel over IPv4.
    #[must_use]
    pub const fn inside_vxlan_v4(self) -> Self {
        Self(self.0.saturating_sub(Self::VXLAN_OVERHEAD_V4))
    }
}

impl TryFrom<u32> for Mtu {
    type Error = String;
    fn try_from(bytes: u32) -> Result<Self, String> {
        Self::new(bytes)
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
