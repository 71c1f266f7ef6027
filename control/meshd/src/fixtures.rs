//! What tests of connections between nodes share.

use std::time::{Duration, SystemTime};

use mesh_control::model::Role;
use mesh_types::{ClusterId, NodeId, NodeNumber};

use crate::{
    identity::Identity,
    pki::{self, Root, Subject},
};

/// A cluster's root, and what it signs.
pub(crate) struct Cluster {
    pub(crate) id: ClusterId,
    pub(crate) root: Root,
}

impl Cluster {
    pub(crate) fn new(id: u128) -> Self {
        let id = ClusterId::from_bits(id);
        Self { id, root: Root::generate(id, SystemTime::now()).unwrap() }
    }

    pub(crate) fn node(&self, n: u64, role: Role) -> Identity {
        self.node_since(n, role, SystemTime::now())
    }

    pub(crate) fn node_since(&self, n: u64, role: Role, since: SystemTime) -> Identity {
        let subject = Subject { node: NodeId::from_bits(u128::from(n)), role, cluster: self.id };
        let key_pem = pki::generate_key().unwrap();
        let public = pki::public_key(&key_pem).unwrap();
        let life = Duration::from_secs(7200);
        Identity {
            node: subject.node,
            number: NodeNumber::new(n).unwrap(),
            voter: NodeNumber::new(n).unwrap(),
            cluster: self.id,
            role,
            ca_pem: self.root.cert_pem.clone(),
            cert_pem: self.root.sign(subject, &public, life, since).unwrap(),
            key_pem,
            data_key: [n as u8; 32],
        }
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        self.root.digest().unwrap()
    }
}
