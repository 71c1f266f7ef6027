//! Membership: SWIM (foca) with Lifeguard-style care about false death, as a sans-IO state machine,
//! and the sealed datagrams that it speaks.
//!
//! It owns no socket and no clock: bytes and the time come in through `handle_*`, datagrams and
//! events leave through `poll_*`. It says which daemons answer, and passes on what nodes say of
//! their endpoints and of each other's data paths ([`hint`], [`probe`]); it never says where an
//! endpoint is (that truth is the store's alone). Who may be a member is the store's word too:
//! [`Gossip::set_members`].
//!
//! Nothing depends on a datagram arriving: now and then each member compares all that it knows with
//! another, over a stream ([`Gossip::poll_sync`]).
//!
//! Read [`Gossip`] first; [`seal`] is the outer format of a datagram, [`wire`] the inner one.

#![forbid(unsafe_code)]

mod core;
pub mod hint;
mod member;
pub mod probe;
pub mod seal;
mod suspicion;
mod sync;
pub mod wire;

pub use self::{
    core::{Config, Event, Gossip, Reject, Timings},
    hint::{Hint, HintState, Subject},
    member::{Expected, Health, Member, MemberView},
    seal::{GossipKey, Keyring},
    sync::{MAX_SYNC, SyncCall},
};
