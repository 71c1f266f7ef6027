//! Who may make which call: one table, which the listener holds every call against before it reads
//! the body. What it does not allow is refused.

use mesh_control::model::Role;

use super::Route;
use crate::{pki::Subject, tls::Peer};

/// What a call asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// What the certificate must say.
    pub caller: Caller,
    /// What must be known of it beside: a certificate is good for months, and its node may have
    /// been demoted or removed since.
    pub standing: Standing,
}

/// Who calls, by its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Nobody yet: it shows a key of its own.
    Joiner,
    /// A node of the cluster.
    Node,
    /// A manager.
    Manager,
}

/// What the node that is asked must know of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing.
    None,
    /// It is in the store: the caller asks a manager.
    Stored,
    /// The store does not deny it a voice in raft, or it still takes part there.
    Voice,
    /// It is a node, as this node was told.
    RecordedNode,
    /// It is a manager, as this node was told.
    RecordedManager,
}

impl Caller {
    /// Whether such a peer is one.
    #[must_use]
    pub fn is(self, peer: &Peer) -> bool {
        match (self, peer) {
            (Self::Joiner, Peer::Joiner(_)) | (Self::Node, Peer::Node(_)) => true,
            (Self::Manager, Peer::Node(Subject { role, .. })) => *role == Role::Manager,
            (Self::Joiner, Peer::Node(_)) | (Self::Node | Self::Manager, Peer::Joiner(_)) => false,
        }
    }
}

impl Route {
    /// Who may make it.
    #[must_use]
    pub const fn policy(self) -> Policy {
        let (caller, standing) = match self {
            Self::Join => (Caller::Joiner, Standing::None),
            Self::Raft(_) => (Caller::Manager, Standing::Voice),
            Self::Session | Self::Report | Self::Renew | Self::Leave => {
                (Caller::Node, Standing::Stored)
            }
            Self::AntiEntropy => (Caller::Node, Standing::RecordedNode),
            Self::Exec | Self::Logs | Self::Stats => (Caller::Manager, Standing::RecordedManager),
        };
        Policy { caller, standing }
    }
}
