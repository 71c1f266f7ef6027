//! Aim: whoever calls gets as far as the table of calls says, by his certificate and by what the
//! store says of him now. Method: a real listener, a store of one manager, callers of every kind.

use std::{net::SocketAddr, path::PathBuf, time::SystemTime};

use mesh_control::{
    command::{Command, InitCluster, NewNode, Proposal},
    model::{Availability, ClusterSpec, NodeDescription, NodeSpec},
    token::JoinToken,
};
use mesh_raft::{Raft, RaftConfig};
use mesh_types::{NetworkId, NodeNumber};

use super::*;
use crate::{
    fixtures::Cluster,
    identity::Identity,
    node::manager::tests::Nobody,
    rpc::{CallError, Route, RpcClient, RpcServer, client, tests::all_routes},
    tls::{ClientTls, Expect, ServerTls},
};

const PATIENCE: Duration = Duration::from_secs(10);

/// A manager, number 1, that answers.
struct Bench {
    cluster: Cluster,
    handler: Arc<Handler>,
    manager: Arc<Manager>,
    server: RpcServer,
    dir: PathBuf,
}

const SECRETS: ([u8; 16], [u8; 16]) = ([1; 16], [2; 16]);

impl Bench {
    async fn start(name: &str) -> Self {
        let cluster = Cluster::new(1);
        let dir = std::env::temp_dir().join(format!("meshd-handler-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let handler = Arc::new(Handler::default());
        let identity = cluster.node(1, Role::Manager);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let tls = ServerTls::new(&identity).unwrap();
        let server = RpcServer::bind(any, tls, Arc::clone(&handler) as _).await.unwrap();
        let config = RaftConfig::new(dir.clone(), NodeNumber::MIN, server.address(), [1; 32]);
        let raft = Raft::start(config, Arc::new(Nobody)).await.unwrap();
        raft.bootstrap().await.unwrap();
        let manager = Manager::new(raft);
        handler.set_manager(Some(Arc::clone(&manager)));
        let bench = Self { cluster, handler, manager, server, dir };
        bench
            .propose(Command::Init(Box::new(InitCluster {
                id: bench.cluster.id,
                spec: ClusterSpec::default(),
                ca_cert_pem: bench.cluster.root.cert_pem.clone(),
                ca_key_pem: bench.cluster.root.key_pem.to_string(),
                worker_secret: SECRETS.0,
                manager_secret: SECRETS.1,
                gossip_key: [3; 32],
                ingress: NetworkId::from_bits(1),
                first: new_node(1, Role::Manager),
            })))
            .await;
        bench
    }

    async fn propose(&self, command: Command) {
        let proposal = Proposal { now_ms: 1, command };
        self.manager.raft.propose(proposal).await.unwrap();
    }

    async fn add(&self, n: u64, role: Role) -> RpcClient {
        self.propose(Command::AddNode(Box::new(new_node(n, role)))).await;
        client(&self.cluster.node(n, role))
    }

    async fn remove(&self, n: u64) {
        let id = NodeId::from_bits(u128::from(n));
        self.propose(Command::RemoveNode { id, force: true }).await;
    }

    /// What a session would have brought: the nodes and their roles.
    fn record(&self) {
        let mut records = RecordSet::default();
        self.manager.raft.read(|store| {
            for node in store.nodes.values() {
                let record = NodeRecord {
                    id: node.id,
                    number: node.number,
                    name: String::new(),
                    vtep: node.vtep,
                    address: node.vtep,
                    manager: node.spec.role == Role::Manager,
                };
                records.nodes.insert(node.number, record);
            }
        });
        let _ = self.handler.records.set(watch::channel(Arc::new(records)).1);
    }

    async fn call(&self, caller: &RpcClient, route: Route) -> Answer {
        let (at, body) = (self.server.address(), Bytes::from_static(b"\x80"));
        match caller.call_bytes(at, Expect::Member, route, body, PATIENCE).await {
            Err(CallError::Refused(error)) => match error.kind {
                RpcErrorKind::Denied => Answer::Denied,
                RpcErrorKind::NotFound => Answer::Gone,
                // Let through: what it said makes no sense, or parts of this node are not there.
                _ => Answer::Heard,
            },
            Err(CallError::Unreachable { .. } | CallError::Broken { .. }) => Answer::Cut,
            Err(other) => panic!("{route}: {other}"),
            Ok(_) => Answer::Heard,
        }
    }

    fn counter(&self, name: &str) -> u64 {
        let all = self.handler.refusals.counters().into_iter();
        let found = all.chain(self.handler.door.counters()).find(|(known, _)| *known == name);
        found.unwrap().1
    }

    async fn join(&self, token: &str) -> Result<JoinResponse, CallError> {
        let key = pki::generate_key().unwrap();
        let request = JoinRequest {
            token: token.to_owned(),
            description: NodeDescription::default(),
            address: SocketAddr::from(([0, 0, 0, 0], 2377)),
            vtep: None,
            availability: Availability::Active,
        };
        client::join(self.server.address(), &key, self.cluster.digest(), &request, PATIENCE).await
    }

    async fn stop(self) {
        self.manager.raft.shutdown().await;
        std::fs::remove_dir_all(&self.dir).unwrap();
    }
}

fn new_node(n: u64, role: Role) -> NewNode {
    let address = [192, 0, 2, n as u8];
    NewNode {
        id: NodeId::from_bits(u128::from(n)),
        spec: NodeSpec { role, ..NodeSpec::default() },
        description: NodeDescription::default(),
        address: (address, 2377).into(),
        vtep: address.into(),
    }
}

fn client(identity: &Identity) -> RpcClient {
    RpcClient::new(ClientTls::member(identity).unwrap())
}

type Expected<'a> = &'a dyn Fn(Route) -> Answer;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Heard,
    Denied,
    Gone,
    Cut,
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_gets_as_far_as_certificate_and_store_say() {
    let bench = Bench::start("table").await;
    let worker = bench.add(2, Role::Worker).await;
    let manager = bench.add(3, Role::Manager).await;
    let demoted = bench.add(4, Role::Manager).await;
    let node = bench.manager.raft.read(|store| store.nodes[&NodeId::from_bits(4)].clone());
    let spec = NodeSpec { role: Role::Worker, ..node.spec };
    bench.propose(Command::UpdateNode { id: node.id, version: node.meta.version, spec }).await;
    let removed_manager = bench.add(5, Role::Manager).await;
    let removed_worker = bench.add(6, Role::Worker).await;
    bench.remove(5).await;
    bench.remove(6).await;
    bench.record();
    let long_ago = SystemTime::now() - Duration::from_secs(30 * 24 * 3600);
    let expired = client(&bench.cluster.node_since(3, Role::Manager, long_ago));
    // Of another root, with the names of this cluster.
    let mut stranger = Cluster::new(1).node(3, Role::Manager);
    stranger.ca_pem.clone_from(&bench.cluster.root.cert_pem);
    let stranger = client(&stranger);
    let mixed = Cluster { root: bench.cluster.root.clone(), ..Cluster::new(2) };
    let mut mixed = mixed.node(3, Role::Manager);
    mixed.cluster = bench.cluster.id;
    let mixed = client(&mixed);
    let key = pki::generate_key().unwrap();
    let joiner = RpcClient::new(ClientTls::joiner(&key, bench.cluster.digest()).unwrap());

    let of_node = |route| {
        let open = [Route::Session, Route::Report, Route::Renew, Route::Leave, Route::AntiEntropy];
        if open.contains(&route) { Answer::Heard } else { Answer::Denied }
    };
    let of_manager = |route| if route == Route::Join { Answer::Denied } else { Answer::Heard };
    let of_joiner = |route| if route == Route::Join { Answer::Heard } else { Answer::Denied };
    let of_removed = |route| match route {
        Route::Session | Route::Report | Route::Renew | Route::Leave => Answer::Gone,
        _ => Answer::Denied,
    };
    let nobody = |_| Answer::Cut;
    let callers: [(&str, RpcClient, Expected<'_>); 9] = [
        ("worker", worker, &of_node),
        ("manager", manager.clone(), &of_manager),
        ("demoted manager", demoted, &of_node),
        ("removed manager", removed_manager, &of_removed),
        ("removed worker", removed_worker, &of_removed),
        ("expired manager", expired, &nobody),
        ("stranger", stranger, &nobody),
        ("node of another cluster", mixed, &nobody),
        ("joiner", joiner, &of_joiner),
    ];
    for (who, caller, expected) in callers {
        for route in all_routes() {
            let before = bench.counter("rpc_calls_refused");
            assert_eq!(bench.call(&caller, route).await, expected(route), "{who}: {route}");
            let counted = bench.counter("rpc_calls_refused") - before;
            let refused = [Answer::Denied, Answer::Gone].contains(&expected(route));
            assert_eq!(counted, u64::from(refused), "{who}: {route}");
        }
    }
    assert!(bench.counter("rpc_handshakes_refused") >= 3);
    // All that did no harm.
    assert_eq!(bench.call(&manager, Route::Session).await, Answer::Heard);
    assert_eq!(bench.manager.raft.read(|store| store.nodes.len()), 4);
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_says_of_itself_has_an_end() {
    let bench = Bench::start("words").await;
    let worker = bench.add(2, Role::Worker).await;
    let report = async |description: NodeDescription| {
        let request = ReportRequest { description: Some(description), ..ReportRequest::default() };
        let at = bench.server.address();
        let said: Result<ReportResponse, _> =
            worker.call(at, Expect::Manager, Route::Report, &request, PATIENCE).await;
        said
    };
    let named = |length| NodeDescription { hostname: "a".repeat(length), ..Default::default() };
    report(named(64)).await.unwrap();
    let before = bench.manager.raft.read(|store| store.nodes.clone());
    for description in [
        named(1 << 20),
        NodeDescription { os: "a".repeat(300), ..named(1) },
        NodeDescription {
            host_routes: (0..20_000u32)
                .map(|n| ipnetwork::Ipv4Network::from(std::net::Ipv4Addr::from_bits(n)).into())
                .collect(),
            ..named(1)
        },
    ] {
        match report(description).await {
            Err(CallError::Refused(error)) => assert_eq!(error.kind, RpcErrorKind::Invalid),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bench.manager.raft.read(|store| store.nodes.clone()), before);
    // Of tasks that are none of its own it has nothing to say.
    let status = TaskStatus { err: "x".repeat(1 << 16), ..TaskStatus::default() };
    let statuses = vec![(TaskId::from_bits(1), status)];
    let kept = bench.manager.raft.read(|store| own(store, NodeId::from_bits(2), statuses));
    assert_eq!(kept, Vec::new());
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_is_wrong_in_one_way_and_not_often() {
    let bench = Bench::start("tokens").await;
    let root = pki::parse_pem(&bench.cluster.root.cert_pem).unwrap();
    let token = |secret| JoinToken::new(&root, secret).to_string();
    let old = token(SECRETS.0);
    bench.propose(Command::RotateToken { role: Role::Worker, secret: [7; 16] }).await;
    let other = Cluster::new(2);
    let foreign = pki::parse_pem(&other.root.cert_pem).unwrap();
    let wrong = [
        old.clone(),
        token([9; 16]),
        token([7; 16])[..80].to_owned(),
        JoinToken::new(&foreign, [7; 16]).to_string(),
        String::new(),
        "SWMTKN-1-x-y".to_owned(),
    ];
    for token in &wrong {
        match bench.join(token).await {
            Err(CallError::Refused(error)) => {
                assert_eq!(
                    (error.kind, &*error.message),
                    (RpcErrorKind::Denied, "invalid join token")
                );
            }
            other => panic!("{token}: {other:?}"),
        }
    }
    assert_eq!(bench.counter("join_tokens_refused"), 6);
    // The right one is taken in between, as the role that it is for.
    assert_eq!(bench.join(&token([7; 16])).await.unwrap().role, Role::Worker);
    assert_eq!(bench.join(&token(SECRETS.1)).await.unwrap().role, Role::Manager);
    // One who goes on guessing is not looked at any more, for a while.
    let mut limited = 0;
    for _ in 0..10 {
        match bench.join(&old).await {
            Err(CallError::Refused(error)) if error.kind == RpcErrorKind::Unavailable => {
                assert!(error.message.contains("too many attempts"), "{error}");
                limited += 1;
            }
            Err(CallError::Refused(error)) => assert_eq!(error.message, "invalid join token"),
            other => panic!("{other:?}"),
        }
    }
    assert!(limited >= 5, "{limited} of 10 were limited");
    assert_eq!(bench.counter("join_tries_limited"), limited);
    assert_eq!(bench.manager.raft.read(|store| store.nodes.len()), 3);
    bench.stop().await;
}
