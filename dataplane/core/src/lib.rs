//! The pure half of the data plane: what a node's kernel should hold, and how to get there.
//!
//! - [`desired`](fn@desired::desired): records, attachments and underlay facts -> [`Desired`].
//! - [`plan`](fn@plan::plan): [`Desired`] against [`Observed`] -> the [`Op`]s that lead from one to
//!   the other, in an order that is safe while packets flow.
//! - [`maglev`]: the balancing tables, equal on every node.
//! - [`probe`]: questions that a peer's programs answer, daemon or not.
//!
//! Nothing here touches a kernel, reads a clock or draws randomness; `mesh-linux` observes and
//! applies. Everything is ordered (`BTreeMap`), so equal inputs give equal bytes.

pub mod desired;
pub mod maglev;
pub mod nft;
pub mod object;
pub mod plan;
pub mod probe;
mod slots;

pub use desired::{Attachment, Desired, Input, Options, Service, SlotKey, Underlay, desired};
pub use object::{
    AddressUse, Config, EndpointEntry, Hook, Key, LinkRef, MapId, NetnsId, NodeEntry, Ns,
    PortEntry, Program, ServiceEntry, Stray, Value, Veth, host_name,
};
pub use plan::{Observed, Op, Plan, Refusal, plan};
