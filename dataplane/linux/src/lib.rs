//! The Linux shell of the data plane: observes and changes kernel state.
//!
//! [`Engine`] is all that a daemon needs: give it records, plug namespaces in ([`Engine::attach`]),
//! and call [`Engine::round`] on every event and on a timer. It decides nothing: what should be is
//! `mesh_dataplane::desired`, how to get there `mesh_dataplane::plan`.
//!
//! The kernel is reached through rtnetlink ([`mod@netlink`], `rtnl`), `/proc/sys`, the `nft`
//! program, and bpf(2) by way of `aya` (`bpf`, `bpf_sys`). Everything that is not ours is left as
//! it is: ours are links named `mesh-vxlan` and `mv<10 hex digits>` that carry our alias, routes of
//! protocol 109, the table `ip mesh`, and what is pinned in our directory.

mod apply;
mod bpf;
mod bpf_sys;
mod codec;
mod engine;
mod error;
mod netlink;
pub mod netns;
mod nft;
mod observe;
mod preflight;
mod rtnl;
mod underlay;

pub use bpf::MapSizes;
pub use bpf_sys::RawMap;
pub use engine::{AttachError, Engine, EngineConfig, Lease, Report, monotonic_ns};
pub use error::{Failure, Missing, OpError, OpenError};
pub use netlink::NetlinkError;
pub use preflight::{Features, ensure_bpffs, preflight};
