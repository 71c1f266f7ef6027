//! The cluster object: made once, with its ingress network and first manager.

use std::collections::BTreeMap;

use mesh_types::{EndpointId, NodeNumber, Revision, Vni, spec::NetworkSpec};

use super::{At, Store, nodes::node_of};
use crate::{
    command::{InitCluster, Outcome, Rejection},
    model::{Cluster, ClusterSpec, GossipKeys, Role},
};

impl Store {
    pub(super) fn init(&mut self, at: At, init: &InitCluster) -> Result<Outcome, Rejection> {
        if self.cluster.is_some() {
            // In the words that Docker's clients know.
            return Err(Rejection::Precondition(
                "This node is already part of a swarm. Use \"docker swarm leave\" to leave this \
                 swarm and join another one."
                    .into(),
            ));
        }
        check_spec(init)?;
        if init.first.spec.role != Role::Manager {
            return Err(Rejection::Invalid("the first node must be a manager".into()));
        }
        let cluster = Cluster {
            id: init.id,
            meta: at.made(),
            spec: init.spec.clone(),
            ca_cert_pem: init.ca_cert_pem.clone(),
            ca_key_pem: init.ca_key_pem.clone(),
            worker_secret: init.worker_secret,
            manager_secret: init.manager_secret,
            ca_id: None,
            ca_rotation: None,
            ca_forced: 0,
            gossip_key: init.gossip_key,
            gossip_epoch: GossipKeys::first(),
            gossip_next: None,
            next_endpoint: EndpointId::MIN,
            next_node: NodeNumber::MIN,
            next_vni: Vni::MIN,
            removed_managers: Vec::new(),
        };
        // Built aside: should the ingress network find no subnet, nothing was written.
        let mut store = Self {
            revision: at.revision,
            cluster: Some(cluster),
            nodes: BTreeMap::from([(init.first.id, node_of(at, &init.first, NodeNumber::MIN))]),
            ..Self::default()
        };
        if let Some(cluster) = &mut store.cluster {
            cluster.next_node = NodeNumber::MIN.next().unwrap_or(NodeNumber::MAX);
        }
        store.create_network(at, init.ingress, &ingress_spec())?;
        *self = store;
        Ok(Outcome::Node(NodeNumber::MIN))
    }

    pub(super) fn update_cluster(
        &mut self,
        at: At,
        version: Revision,
        spec: &ClusterSpec,
    ) -> Result<Outcome, Rejection> {
        let Some(cluster) = &mut self.cluster else { return Ok(Outcome::Done) };
        if cluster.meta.version != version {
            return Err(Rejection::OutOfSequence);
        }
        let made =
            |spec: &ClusterSpec| (spec.address_pools.clone(), spec.subnet_len, spec.data_path_port);
        if made(&cluster.spec) != made(spec) {
            return Err(Rejection::Invalid(
                "address pools and the data path port are chosen when a cluster is made, and stay"
                    .into(),
            ));
        }
        cluster.spec = spec.clone();
        at.touch(&mut cluster.meta);
        Ok(Outcome::Done)
    }

    pub(super) fn rotate_token(
        &mut self,
        at: At,
        role: Role,
        secret: [u8; 16],
    ) -> Result<Outcome, Rejection> {
        if let Some(cluster) = &mut self.cluster {
            match role {
                Role::Worker => cluster.worker_secret = secret,
                Role::Manager => cluster.manager_secret = secret,
            }
            at.touch(&mut cluster.meta);
        }
        Ok(Outcome::Done)
    }
}

fn ingress_spec() -> NetworkSpec {
    NetworkSpec {
        name: "ingress".into(),
        labels: BTreeMap::new(),
        subnet: None,
        gateway: None,
        ip_range: None,
        mtu: None,
        attachable: false,
        internal: false,
        ingress: true,
        options: BTreeMap::new(),
    }
}

fn check_spec(init: &InitCluster) -> Result<(), Rejection> {
    let spec = &init.spec;
    if !(1024..=49151).contains(&spec.data_path_port) {
        return Err(Rejection::Invalid(format!(
            "data path port {} is out of range 1024..=49151",
            spec.data_path_port
        )));
    }
    if spec.address_pools.is_empty() {
        return Err(Rejection::Invalid("at least one address pool is needed".into()));
    }
    for pool in &spec.address_pools {
        // Two bits for hosts are the least that holds a gateway and a task.
        let longest = if pool.is_ipv4() { 30 } else { 126 };
        if !(pool.prefix()..=longest).contains(&spec.subnet_len) {
            return Err(Rejection::Invalid(format!(
                "a subnet of /{} does not fit address pool {pool}: choose a mask length between \
                 {} and {longest}",
                spec.subnet_len,
                pool.prefix()
            )));
        }
    }
    Ok(())
}
