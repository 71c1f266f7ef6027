//! Typed identifiers. Two ids of different kinds never mix.

use core::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdParseError {
    /// Not 25 characters of `[0-9a-z]` that encode at most 128 bits.
    #[error("`{0}` is not an id: expected 25 characters of 0-9 and a-z")]
    Malformed(String),
    /// A number outside its range.
    #[error("{what} {value} is out of range {min}..={max}")]
    OutOfRange {
        /// The name of the id's kind.
        what: &'static str,
        /// The value that was given.
        value: u64,
        /// The smallest value allowed.
        min: u64,
        /// The largest value allowed.
        max: u64,
    },
}

const BASE36: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
/// 36^25 > 2^128 > 36^24: every 128-bit id has exactly 25 digits when padded, as Swarm's have.
const ID_LEN: usize = 25;

fn encode_base36(mut value: u128) -> [u8; ID_LEN] {
    let mut out = [b'0'; ID_LEN];
    for slot in out.iter_mut().rev() {
        *slot = BASE36[(value % 36) as usize];
        value /= 36;
    }
    out
}

fn decode_base36(text: &str) -> Option<u128> {
    if text.len() != ID_LEN {
        return None;
    }
    text.bytes().try_fold(0u128, |acc, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'z' => byte - b'a' + 10,
            _ => return None,
        };
        acc.checked_mul(36)?.checked_add(u128::from(digit))
    })
}

macro_rules! long_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// 128 random bits, written as 25 characters of base 36 (the form of Swarm's ids).
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            /// Makes an id from random bits that the caller drew (cores draw none themselves).
            #[must_use]
            pub const fn from_bits(bits: u128) -> Self {
                Self(bits)
            }

            /// The id's 128 bits.
            #[must_use]
            pub const fn bits(self) -> u128 {
                self.0
            }

            /// The first 12 characters, as tables print ids.
            #[must_use]
            pub fn short(self) -> String {
                self.to_string()[..12].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let digits = encode_base36(self.0);
                // The alphabet is ASCII, so this cannot fail.
                f.pad(core::str::from_utf8(&digits).unwrap_or_default())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdParseError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                decode_base36(text)
                    .map(Self)
                    .ok_or_else(|| IdParseError::Malformed(text.to_owned()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("an id of 25 base-36 characters")
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }
    };
}

long_id!(
    /// A cluster.
    ClusterId
);
long_id!(
    /// A node: the operator's name for a machine's membership. A node that leaves and joins again
    /// gets a new one.
    NodeId
);
long_id!(
    /// A network.
    NetworkId
);
long_id!(
    /// A service.
    ServiceId
);
long_id!(
    /// A task: one run of one slot. A restart is a new task.
    TaskId
);

macro_rules! small_id {
    ($(#[$doc:meta])* $name:ident, $repr:ty, $what:literal, $min:expr, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name($repr);

        impl $name {
            /// The smallest value.
            pub const MIN: Self = Self($min);
            /// The largest value.
            pub const MAX: Self = Self($max);

            /// Checks the range.
            ///
            /// # Errors
            /// [`IdParseError::OutOfRange`] outside `MIN..=MAX`.
            pub fn new(value: u64) -> Result<Self, IdParseError> {
                let (min, max) = ($min as u64, $max as u64);
                if (min..=max).contains(&value) {
                    Ok(Self(value as $repr))
                } else {
                    Err(IdParseError::OutOfRange { what: $what, value, min, max })
                }
            }

            /// The number itself.
            #[must_use]
            pub const fn get(self) -> $repr {
                self.0
            }

            /// The next id, or `None` at the end of the range. Ids of this kind are handed out in
            /// order by the store and never reused.
            #[must_use]
            pub fn next(self) -> Option<Self> {
                (self.0 < $max).then(|| Self(self.0 + 1))
            }
        }

        impl TryFrom<u64> for $name {
            type Error = IdParseError;
            fn try_from(value: u64) -> Result<Self, IdParseError> {
                Self::new(value)
            }
        }

        impl From<$name> for u64 {
            fn from(id: $name) -> Self {
                Self::from(id.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

/// 40 bits: what fits a MAC address beside its kind byte.
const MAX_40: u64 = (1 << 40) - 1;

small_id!(
    /// An endpoint: one interface of one task on one network. 40 bits, leased by the store, unique
    /// in the cluster and never reused, so the MAC made from it names one network and one node for
    /// ever. Zero is not an endpoint: it is the gateway's MAC on every node.
    EndpointId, u64, "endpoint id", 1, MAX_40
);
small_id!(
    /// A node's number: 40 bits, leased by the store and never reused. It is the node's raft id,
    /// its index in BPF maps, and the low bytes of mesh-return MACs.
    NodeNumber, u64, "node number", 1, MAX_40
);
small_id!(
    /// A VXLAN network identifier, 24 bits (RFC 7348 section 5). Below 4096 is left alone, since
    /// other systems keep VLAN ids there.
    Vni, u32, "VNI", 4096, (1 << 24) - 1
);
small_id!(
    /// An ESP security parameters index (RFC 4303 section 2.1). Below 256 is reserved.
    Spi, u32, "SPI", 256, u32::MAX
);
small_id!(
    /// The generation of a key.
    Epoch, u64, "epoch", 0, u64::MAX
);
small_id!(
    /// A revision of the store: the raft log index of the last entry applied. The one number that
    /// says how far a node is.
    Revision, u64, "revision", 0, u64::MAX
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn long_ids_have_25_characters() {
        assert_eq!(NodeId::from_bits(0).to_string(), "0".repeat(25));
        assert_eq!(NodeId::from_bits(u128::MAX).to_string(), "f5lxx1zz5pnorynqglhzmsp33");
    }

    #[test]
    fn an_id_beyond_128_bits_is_refused() {
        assert!("f5lxx1zz5pnorynqglhzmsp34".parse::<TaskId>().is_err());
        assert!("zzzzzzzzzzzzzzzzzzzzzzzzz".parse::<TaskId>().is_err());
        assert!("F5lxx1zz5pnorynqglhzmsp33".parse::<TaskId>().is_err());
    }

    #[test]
    fn small_ids_hold_their_range() {
        assert!(EndpointId::new(0).is_err());
        assert!(EndpointId::new(1 << 40).is_err());
        assert!(Vni::new(4095).is_err());
        assert_eq!(Vni::MAX.next(), None);
        assert!(serde_json::from_str::<Vni>("16777216").is_err());
    }

    proptest! {
        #[test]
        fn long_ids_round_trip(bits: u128) {
            let id = ServiceId::from_bits(bits);
            prop_assert_eq!(id.to_string().parse::<ServiceId>(), Ok(id));
            let packed = rmp_serde::to_vec(&id).unwrap();
            prop_assert_eq!(rmp_serde::from_slice::<ServiceId>(&packed).unwrap(), id);
        }
    }
}
