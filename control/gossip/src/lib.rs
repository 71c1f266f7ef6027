//! Membership: SWIM (foca) with Lifeguard-style care about false death, as a sans-IO state machine,
//! and the sealed datagrams that it speaks.
//!
//! It owns no socket and no clock: bytes and the time come in through `handle_*`, datagrams and
//! events leave through `poll_*`. It says which daemons answer; it never says where an endpoint is
//! (that truth is the store's alone). Who may be a member is the store's word too:
//! [`Gossip::set_members`].
//!
//! Read [`Gossip`] first; [`seal`] is the outer format of a datagram, [`wire`] the inner one.

#![forbid(unsafe_code)]

mod core;
mod member;
pub mod seal;
mod suspicion;
pub mod wire;

pub use self::{
    core::{Config, Event, Gossip, Reject, Timings},
    member::{Expected, Health, Member, MemberView},
    seal::{GossipKey, Keyring},
};
