//! MAC addresses. In overlays they are wire format: the address says what the frame is.
//!
//! | first byte | other 40 bits | meaning |
//! |---|---|---|
//! | `02` | endpoint id | that endpoint (0: the gateway, the same on every node) |
//! | `06` | endpoint id | *mesh forward*: ingress node to the backend's `gw0` endpoint, late DNAT there |
//! | `0a` | node number | *mesh return*: backend node to the ingress node |
//!
//! All three have the locally administered bit set and the group bit clear (IEEE 802-2014, 8.2).

use core::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::ids::{EndpointId, NodeNumber};

/// A 48-bit Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

/// First byte of an endpoint's MAC.
pub const KIND_ENDPOINT: u8 = 0x02;
/// First byte of a mesh-forward MAC.
pub const KIND_MESH_FORWARD: u8 = 0x06;
/// First byte of a mesh-return MAC.
pub const KIND_MESH_RETURN: u8 = 0x0a;

/// What a MAC of ours says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MacKind {
    /// The gateway: what a task's ARP for its gateway or a VIP resolves to.
    Gateway,
    /// An endpoint.
    Endpoint(EndpointId),
    /// A frame from an ingress node to the node of this `gw0` endpoint.
    MeshForward(EndpointId),
    /// A frame from a backend's node to this ingress node.
    MeshReturn(NodeNumber),
}

impl Mac {
    /// The gateway's address, on every node and network.
    pub const GATEWAY: Self = Self([KIND_ENDPOINT, 0, 0, 0, 0, 0]);

    /// Decodes the kind; `None` for an address that is not of our format.
    #[must_use]
    pub fn kind(self) -> Option<MacKind> {
        let [kind, b0, b1, b2, b3, b4] = self.0;
        let low = u64::from_be_bytes([0, 0, 0, b0, b1, b2, b3, b4]);
        match kind {
            KIND_ENDPOINT if low == 0 => Some(MacKind::Gateway),
            KIND_ENDPOINT => EndpointId::new(low).ok().map(MacKind::Endpoint),
            KIND_MESH_FORWARD => EndpointId::new(low).ok().map(MacKind::MeshForward),
            KIND_MESH_RETURN => NodeNumber::new(low).ok().map(MacKind::MeshReturn),
            _ => None,
        }
    }
}

impl From<MacKind> for Mac {
    fn from(kind: MacKind) -> Self {
        let (first, low) = match kind {
            MacKind::Gateway => (KIND_ENDPOINT, 0),
            MacKind::Endpoint(id) => (KIND_ENDPOINT, id.get()),
            MacKind::MeshForward(id) => (KIND_MESH_FORWARD, id.get()),
            MacKind::MeshReturn(node) => (KIND_MESH_RETURN, node.get()),
        };
        let [_, _, _, b0, b1, b2, b3, b4] = low.to_be_bytes();
        Self([first, b0, b1, b2, b3, b4])
    }
}

impl From<EndpointId> for Mac {
    fn from(id: EndpointId) -> Self {
        MacKind::Endpoint(id).into()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({self})")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("`{text}` is not a MAC address: expected aa:bb:cc:dd:ee:ff");
        let mut out = [0u8; 6];
        let mut parts = text.split(':');
        for slot in &mut out {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(error)?;
            *slot = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(out)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wire_format_is_fixed() {
        let id = EndpointId::new(0x01_0203_0405).unwrap();
        assert_eq!(Mac::from(id).to_string(), "02:01:02:03:04:05");
        assert_eq!(Mac::from(MacKind::MeshForward(id)).to_string(), "06:01:02:03:04:05");
        let node = NodeNumber::new(7).unwrap();
        assert_eq!(Mac::from(MacKind::MeshReturn(node)).to_string(), "0a:00:00:00:00:07");
        assert_eq!(Mac::GATEWAY.kind(), Some(MacKind::Gateway));
        assert_eq!(Mac([6, 0, 0, 0, 0, 0]).kind(), None);
        assert_eq!(Mac([0x52, 0x54, 0, 1, 2, 3]).kind(), None);
    }

    proptest! {
        #[test]
        fn kinds_round_trip(bytes: [u8; 6]) {
            let mac = Mac(bytes);
            if let Some(kind) = mac.kind() {
                prop_assert_eq!(Mac::from(kind), mac);
            }
            prop_assert_eq!(mac.to_string().parse::<Mac>(), Ok(mac));
        }
    }
}
