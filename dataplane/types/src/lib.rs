//! The nouns of mesh: typed ids, addresses, specs, and the records of the revision stream.
//!
//! Everything here is a plain value: no IO, no clock, no randomness. Parsing happens once, at the
//! edge, into these types; the limits live in their constructors. Every other crate depends on this
//! one, and it depends on none of them.
//!
//! Read [`ids`] first, then [`record`] (what flows to every node) and [`spec`] (what users ask
//! for).

#![forbid(unsafe_code)]

pub mod ids;
pub mod mac;
pub mod net;
pub mod placement;
pub mod record;
pub mod resources;
pub mod spec;
pub mod task;

pub use ids::{
    ClusterId, EndpointId, Epoch, IdParseError, NetworkId, NodeId, NodeNumber, Revision, ServiceId,
    Spi, TaskId, Vni,
};
pub use mac::{Mac, MacKind};
pub use net::{Mtu, Protocol};
pub use placement::{ConstraintParseError, SpreadParseError};
