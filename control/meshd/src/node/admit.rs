//! The door for new nodes: who shows the right token is admitted, and nobody has many tries.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use mesh_control::{
    command::{Command, NewNode, Outcome},
    limit::{Allowances, Exceeded, Rate},
    model::{Cluster, NodeSpec, Role},
    token::JoinToken,
};
use mesh_types::NodeId;

use super::{
    clock,
    handler::{addresses, denied, not_proposed, unavailable},
    manager::Manager,
};
use crate::{
    pki::{self, PublicKey, Root, Subject},
    rpc::{
        Joiner, RpcError, RpcErrorKind,
        messages::{ClusterKeys, JoinRequest, JoinResponse},
        server::source,
    },
};

/// Wrong tokens that one source may show.
const EACH: Rate = Rate { burst: 10, every: Duration::from_secs(5) };
/// Wrong tokens of all sources that are looked at twice, which costs the leader a round.
const ALL: Rate = Rate { burst: 100, every: Duration::from_millis(200) };

/// Admits nodes.
pub(super) struct Door {
    tries: Mutex<Allowances<IpAddr>>,
    refused: AtomicU64,
    limited: AtomicU64,
}

impl Default for Door {
    fn default() -> Self {
        Self {
            tries: Mutex::new(Allowances::new(EACH, ALL)),
            refused: AtomicU64::new(0),
            limited: AtomicU64::new(0),
        }
    }
}

/// What is wrong with a token: for this node's log. Its bearer is told nothing of it.
type Wrong = &'static str;

/// What the bearer of a token may become.
fn judge(token: &str, cluster: &Cluster) -> Result<Role, Wrong> {
    let token: JoinToken = token.parse().map_err(|_| "it is no token")?;
    let root = pki::parse_pem(&cluster.ca_cert_pem).map_err(|_| "the root cannot be read")?;
    // Both are always judged, so the time says nothing either.
    match (token.role(cluster), token.pins(&root)) {
        (Ok(role), true) => Ok(role),
        (_, false) => Err("its root is another one: it is of another cluster, or out of date"),
        (Err(_), true) => Err("its secret is none of this cluster, or was rotated"),
    }
}

/// A node's certificate, signed by the root that signs now. While it takes another one's place, its
/// own comes along, signed by that one.
pub(super) fn sign(
    cluster: &Cluster,
    node: NodeId,
    role: Role,
    key: &PublicKey,
) -> Result<String, RpcError> {
    let (cert, key_pem, cross) = match &cluster.ca_rotation {
        Some(next) => (&next.cert_pem, &next.key_pem, next.cross_pem.as_str()),
        None => (&cluster.ca_cert_pem, &cluster.ca_key_pem, ""),
    };
    let root = Root { cert_pem: cert.clone(), key_pem: key_pem.clone().into() };
    let subject = Subject { node, role, cluster: cluster.id };
    let life = Duration::from_secs(cluster.spec.certificate_secs);
    let signed = root.sign(subject, key, life, SystemTime::now());
    let leaf = signed.map_err(|error| RpcError::new(RpcErrorKind::Internal, error))?;
    Ok(leaf + cross)
}

impl Door {
    /// Tokens that were wrong, and tries that were too many.
    pub(super) fn counters(&self) -> [(&'static str, u64); 2] {
        [
            ("join_tokens_refused", self.refused.load(Ordering::Relaxed)),
            ("join_tries_limited", self.limited.load(Ordering::Relaxed)),
        ]
    }

    fn too_many(&self, exceeded: Exceeded) -> RpcError {
        self.limited.fetch_add(1, Ordering::Relaxed);
        let (Exceeded::Source(wait) | Exceeded::Total(wait)) = exceeded;
        unavailable(format!(
            "too many attempts to join with a wrong token: try again in {} s",
            wait.as_secs() + 1
        ))
    }

    fn tries<T>(&self, f: impl FnOnce(&mut Allowances<IpAddr>) -> T) -> T {
        f(&mut self.tries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The cluster, and what a token's bearer may become there. A wrong token uses up a try; so
    /// guessing has an end for each source, and a flood of guesses from many takes nothing from
    /// those whose token is right.
    async fn judge(
        &self,
        manager: &Manager,
        remote: SocketAddr,
        token: &str,
    ) -> Result<(Cluster, Role), RpcError> {
        let source = source(remote.ip());
        let cluster = || {
            let cluster = manager.raft.read(|store| store.cluster.clone());
            cluster.ok_or_else(|| unavailable("the cluster is not initialised yet"))
        };
        // Cheaply first, by what this manager knows.
        let wrong = cluster().is_ok_and(|cluster| judge(token, &cluster).is_err());
        if wrong {
            self.tries(|tries| tries.take(source, clock::monotonic()))
                .map_err(|exceeded| self.too_many(exceeded))?;
        }
        // Neither must rest on an old view: the token may just have been rotated.
        manager.raft.read_barrier().await.map_err(unavailable)?;
        let cluster = cluster()?;
        match judge(token, &cluster) {
            Ok(role) => Ok((cluster, role)),
            Err(why) => {
                if !wrong {
                    // It was right a moment ago.
                    let _ = self.tries(|tries| tries.take(source, clock::monotonic()));
                }
                self.refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    address = %remote,
                    reason = why,
                    "refused to admit a node: its token is wrong"
                );
                Err(denied("invalid join token"))
            }
        }
    }

    /// Checks a token and admits its bearer.
    pub(super) async fn admit(
        &self,
        manager: &Manager,
        from: &Joiner,
        request: JoinRequest,
    ) -> Result<JoinResponse, RpcError> {
        let (cluster, role) = self.judge(manager, from.remote, &request.token).await?;
        let invalid = |why| RpcError::new(RpcErrorKind::Invalid, why);
        request.description.check().map_err(invalid)?;
        let node = NodeId::from_bits(rand::random());
        let address = match request.address.ip() {
            ip if ip.is_unspecified() => SocketAddr::new(from.remote.ip(), request.address.port()),
            _ => request.address,
        };
        let cert_pem = sign(&cluster, node, role, &from.public_key)?;
        let new = NewNode {
            id: node,
            spec: NodeSpec { role, availability: request.availability, ..NodeSpec::default() },
            description: request.description,
            address,
            vtep: request.vtep.unwrap_or(address.ip()),
        };
        let outcome = manager.propose(Command::AddNode(Box::new(new))).await;
        let Outcome::Node(number) = outcome.map_err(|error| not_proposed(&error))? else {
            return Err(RpcError::new(RpcErrorKind::Internal, "the store gave the node no number"));
        };
        tracing::info!(%node, %number, role = role.name(), %address, "admitted a node");
        Ok(JoinResponse {
            node,
            number,
            role,
            cert_pem,
            keys: ClusterKeys::of(&cluster),
            ca_pem: cluster.ca_cert_pem,
            managers: addresses(manager),
            address,
            data_path_port: cluster.spec.data_path_port,
        })
    }
}
