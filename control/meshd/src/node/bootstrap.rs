//! How a node becomes a member: `swarm init` and `swarm join`. Everything that can be refused is
//! refused before anything is kept; what keeps a membership is the identity, written last.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_control::{
    command::{Command, InitCluster, NewNode},
    model::{GossipKeys, NodeSpec, Role},
    token::JoinToken,
};
use mesh_raft::Raft;
use mesh_types::{ClusterId, NetworkId, NodeId, NodeNumber};

use super::{
    clock, facts,
    member::{self, MANAGER_PORT, Member},
    persist::{self, Settings},
};
use crate::{
    api::{
        ApiError,
        backend::{EngineFacts, InitRequest, JoinRequest, NodeAddress},
    },
    identity::{self, Identity},
    options::Options,
    pki::{self, Root, Subject},
    rpc::{CallError, RpcClient, RpcErrorKind, client, messages},
    tls::ClientTls,
};

/// How long one manager may take to admit this node.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);

fn internal(error: impl std::fmt::Display) -> ApiError {
    ApiError::internal(format!("{error:#}"))
}

/// Makes a cluster of this node alone.
pub(crate) async fn init(
    options: &Options,
    engine: &EngineFacts,
    request: InitRequest,
) -> Result<Arc<Member>, ApiError> {
    let ip = match advertised(options, request.advertise.as_ref())? {
        Some(ip) => ip,
        None => only_address()?,
    };
    let vtep = data_path(options, request.data_path.as_ref())?.unwrap_or(ip);
    preflight(options)?;
    member::forget(options).map_err(internal)?;

    let address = SocketAddr::new(ip, MANAGER_PORT);
    let now = SystemTime::now();
    let (cluster, node) = (ClusterId::from_bits(rand::random()), NodeId::from_bits(rand::random()));
    let root = Root::generate(cluster, now).map_err(internal)?;
    let key_pem = pki::generate_key().map_err(internal)?;
    let subject = Subject { node, role: Role::Manager, cluster };
    let life = Duration::from_secs(request.spec.certificate_secs);
    let public = pki::public_key(&key_pem).map_err(internal)?;
    let identity = Identity {
        node,
        // The store gives the first manager this number.
        number: NodeNumber::MIN,
        voter: NodeNumber::MIN,
        cluster,
        role: Role::Manager,
        ca_pem: root.cert_pem.clone(),
        cert_pem: root.sign(subject, &public, life, now).map_err(internal)?,
        key_pem,
        data_key: identity::fresh_data_key().map_err(internal)?,
    };
    let settings = Settings {
        address,
        vtep,
        data_path_port: request.spec.data_path_port,
        gossip: GossipKeys { key: rand::random(), epoch: GossipKeys::first(), next: None },
        roots: vec![root.cert_pem.clone()],
        managers: vec![messages::ManagerAddress { node, number: NodeNumber::MIN, address }],
    };
    let first = NewNode {
        id: node,
        spec: NodeSpec {
            role: Role::Manager,
            availability: request.availability,
            ..NodeSpec::default()
        },
        description: facts::describe(engine),
        address,
        vtep,
    };
    let command = Command::Init(Box::new(InitCluster {
        id: cluster,
        spec: request.spec,
        ca_cert_pem: root.cert_pem,
        ca_key_pem: root.key_pem.to_string(),
        worker_secret: rand::random(),
        manager_secret: rand::random(),
        gossip_key: settings.gossip.key,
        ingress: NetworkId::from_bits(rand::random()),
        first,
    }));
    let client = RpcClient::new(ClientTls::member(&identity).map_err(internal)?);
    let raft = member::start_raft(options, &identity, address, &client, false).await;
    let raft = raft.map_err(internal)?;
    raft.bootstrap().await.map_err(internal)?;
    let proposal = mesh_control::command::Proposal { now_ms: clock::wall_ms(), command };
    if let Err(error) = raft.propose(proposal).await {
        raft.shutdown().await;
        let _ = member::forget(options);
        return Err(match error {
            mesh_raft::ProposeError::Rejected(rejection) => rejection.into(),
            other => internal(other),
        });
    }
    keep(options, &identity, &settings)?;
    tracing::info!(%cluster, %node, %address, "made a cluster");
    begin(options, engine, identity, settings, Some((raft, client))).await
}

/// Joins a cluster.
pub(crate) async fn join(
    options: &Options,
    engine: &EngineFacts,
    request: JoinRequest,
) -> Result<Arc<Member>, ApiError> {
    let token: JoinToken = request.token.parse().map_err(|_| ApiError::invalid_token())?;
    let advertise = advertised(options, request.advertise.as_ref())?;
    let vtep = data_path(options, request.data_path.as_ref())?;
    preflight(options)?;
    member::forget(options).map_err(internal)?;

    let key_pem = pki::generate_key().map_err(internal)?;
    let any = IpAddr::from([0, 0, 0, 0]);
    let call = messages::JoinRequest {
        token: request.token,
        description: facts::describe(engine),
        address: SocketAddr::new(advertise.unwrap_or(any), MANAGER_PORT),
        vtep,
        availability: request.availability,
    };
    let answer = admitted(&request.remotes, &key_pem, token, &call).await?;
    let identity = Identity {
        node: answer.node,
        number: answer.number,
        voter: answer.number,
        cluster: pki::subject(&pki::parse_pem(&answer.cert_pem).map_err(internal)?)
            .map_err(internal)?
            .cluster,
        role: answer.role,
        // The token's among them: the answer was held against that.
        ca_pem: answer.keys.roots.concat(),
        cert_pem: answer.cert_pem,
        key_pem,
        data_key: identity::fresh_data_key().map_err(internal)?,
    };
    let settings = Settings {
        address: answer.address,
        vtep: vtep.unwrap_or(answer.address.ip()),
        data_path_port: answer.data_path_port,
        gossip: answer.keys.gossip,
        roots: answer.keys.roots,
        managers: answer.managers,
    };
    // Before the identity is kept: a manager that has one and no store has lost it.
    let raft = match identity.role {
        Role::Worker => None,
        Role::Manager => {
            let client = RpcClient::new(ClientTls::member(&identity).map_err(internal)?);
            let address = settings.address;
            let raft = member::start_raft(options, &identity, address, &client, false).await;
            Some((raft.map_err(internal)?, client))
        }
    };
    keep(options, &identity, &settings)?;
    let role = identity.role.name();
    tracing::info!(node = %identity.node, role, "joined");
    begin(options, engine, identity, settings, raft).await
}

/// Brings the new member up. One that cannot come up is none: the next start must not find it.
async fn begin(
    options: &Options,
    engine: &EngineFacts,
    identity: Identity,
    settings: Settings,
    raft: Option<(Raft, RpcClient)>,
) -> Result<Arc<Member>, ApiError> {
    let started = Member::start(options, engine, identity, settings, raft).await;
    started.map_err(|error| match member::forget(options) {
        Ok(()) => internal(error),
        Err(more) => internal(format!("{error:#}; and {more:#}")),
    })
}

/// Tries one manager after the other.
async fn admitted(
    remotes: &[String],
    key_pem: &str,
    token: JoinToken,
    call: &messages::JoinRequest,
) -> Result<messages::JoinResponse, ApiError> {
    let mut last = None;
    for remote in remotes {
        let with_port = match remote.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, MANAGER_PORT).to_string(),
            Err(_) if remote.contains(':') => remote.clone(),
            Err(_) => format!("{remote}:{MANAGER_PORT}"),
        };
        let addresses = tokio::net::lookup_host(&with_port).await.map_err(|error| {
            ApiError::bad_request(format!("cannot resolve the manager `{remote}`: {error}"))
        })?;
        for address in addresses {
            match client::join(address, key_pem, token.digest, call, JOIN_PATIENCE).await {
                Ok(answer) => return Ok(answer),
                // A manager's own word about the token is final. One that starts, or has no
                // majority, said nothing about it.
                Err(CallError::Refused(error)) if error.kind != RpcErrorKind::Unavailable => {
                    return Err(ApiError::internal(error.message));
                }
                Err(error) => last = Some(error),
            }
        }
    }
    Err(match last {
        Some(error) => ApiError::internal(format!("could not join: {error}")),
        None => ApiError::bad_request("no manager to join: give at least one address"),
    })
}

fn keep(options: &Options, identity: &Identity, settings: &Settings) -> Result<(), ApiError> {
    persist::save_settings(&options.state_dir, settings).map_err(internal)?;
    identity.save(&options.state_dir).map_err(internal)
}

/// The kernel must be able to, before anything changes.
fn preflight(options: &Options) -> Result<(), ApiError> {
    let missing = mesh_linux::preflight(&options.pin_dir);
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().map(|m| format!("{} ({})", m.what, m.remedy)).collect();
    Err(ApiError::internal(format!("this machine cannot be a node: {}", list.join("; "))))
}

fn advertised(options: &Options, given: Option<&NodeAddress>) -> Result<Option<IpAddr>, ApiError> {
    given.map_or(Ok(options.advertise_addr), |address| resolve(address).map(Some))
}

fn data_path(options: &Options, given: Option<&NodeAddress>) -> Result<Option<IpAddr>, ApiError> {
    given.map_or(Ok(options.data_path_addr), |address| resolve(address).map(Some))
}

/// Addresses of this host by link, without loopback and link-local ones.
fn host_addresses() -> Result<BTreeSet<(String, IpAddr)>, ApiError> {
    let all = nix::ifaddrs::getifaddrs().map_err(internal)?;
    Ok(all
        .filter_map(|entry| {
            let address = entry.address?;
            let ip: IpAddr = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => v4.ip().into(),
                (_, Some(v6)) => v6.ip().into(),
                _ => return None,
            };
            let usable = match ip {
                IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
                IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
            };
            usable.then_some((entry.interface_name, ip))
        })
        .collect())
}

fn resolve(address: &NodeAddress) -> Result<IpAddr, ApiError> {
    let addresses = host_addresses()?;
    match address {
        NodeAddress::Ip(ip) if addresses.iter().any(|(_, a)| a == ip) => Ok(*ip),
        NodeAddress::Ip(ip) => Err(ApiError::bad_request(format!(
            "must specify a listening address: {ip} is not an address of this host"
        ))),
        NodeAddress::Link(link) => {
            let mut on_link = addresses.iter().filter(|(l, _)| l == link).map(|(_, ip)| *ip);
            // IPv4 sorts before IPv6, so it is preferred where a link has both.
            on_link.next().ok_or_else(|| {
                ApiError::bad_request(format!("interface {link} has no usable address"))
            })
        }
    }
}

/// The host's only IPv4 address; with several, the user must choose.
fn only_address() -> Result<IpAddr, ApiError> {
    let addresses = host_addresses()?;
    let v4: Vec<&(String, IpAddr)> = addresses.iter().filter(|(_, ip)| ip.is_ipv4()).collect();
    match v4.as_slice() {
        [(_, ip)] => Ok(*ip),
        [] => Err(ApiError::bad_request(
            "could not find the system's IP address - specify one with --advertise-addr",
        )),
        several => {
            let list: Vec<String> =
                several.iter().map(|(link, ip)| format!("{ip} on {link}")).collect();
            Err(ApiError::bad_request(format!(
                "could not choose an IP address to advertise since this system has multiple \
                 addresses ({}) - specify one with --advertise-addr",
                list.join(", ")
            )))
        }
    }
}
