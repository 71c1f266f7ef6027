//! Who gossips.

use std::net::SocketAddr;

use mesh_types::{NodeId, NodeNumber};

/// One life of a node's daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// What the node is known by: at most one member per number is alive.
    pub number: NodeNumber,
    /// Its id.
    pub id: NodeId,
    /// Where it listens.
    pub address: SocketAddr,
    /// Which life of it: a later one replaces an earlier one. A daemon starts with the wall clock
    /// in milliseconds; a member that finds itself declared dead goes on with the next number.
    pub bump: u64,
}

impl foca::Identity for Member {
    type Addr = NodeNumber;

    fn renew(&self) -> Option<Self> {
        Some(Self { bump: self.bump.checked_add(1)?, ..*self })
    }

    fn addr(&self) -> NodeNumber {
        self.number
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        // The fields after `bump` only make the order total, so that all nodes keep the same one.
        (self.bump, self.id, self.address) > (adversary.bump, adversary.id, adversary.address)
    }
}

/// A node that the store knows, and so may be a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Its id.
    pub id: NodeId,
    /// Where it is greeted while it is not a member.
    pub address: SocketAddr,
}

/// What is thought of an active member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It answers.
    Alive,
    /// It did not answer someone, and has not yet said that it lives.
    Suspect,
}

/// An active member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberView {
    /// Who.
    pub member: Member,
    /// How it does.
    pub health: Health,
}
