//! Aim: nobody gets further than the table of calls allows, and what is allowed works. Method: real
//! listeners and clients on the loopback, with identities of two clusters.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use mesh_control::model::{Availability, NodeDescription, Role};
use mesh_raft::{Raft, RaftConfig, RpcKind};
use mesh_types::{NodeId, NodeNumber, Revision, TaskId, record::Delta};
use rustls_pki_types::pem::PemObject;
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{
    CallError, Joiner, RaftTransport, Refusals, Route, RpcClient, RpcError, RpcErrorKind,
    RpcHandler, RpcServer, Standing, client,
    frames::{FrameReader, FrameWriter},
    messages::{
        ExecInput, ExecOutput, ExecRequest, JoinRequest, JoinResponse, LogLine, LogsOutput,
        LogsRequest, NodeUpdate, RenewRequest, RenewResponse, ReportRequest, ReportResponse,
        SessionRequest, StatsResponse,
    },
};
use crate::{
    fixtures::Cluster,
    identity::Identity,
    pki::{self, Subject},
    tls::{ClientTls, Expect, Peer, ServerTls},
};

const PATIENCE: Duration = Duration::from_secs(10);

/// Answers everything, and counts.
#[derive(Default)]
struct Echo {
    calls: AtomicUsize,
    refusals: Refusals,
    joiner: std::sync::Mutex<Option<Joiner>>,
    raft: tokio::sync::OnceCell<Raft>,
}

impl Echo {
    fn count(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl RpcHandler for Echo {
    async fn vouch(&self, _: Subject, _: Standing) -> Result<(), RpcError> {
        Ok(())
    }

    fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    async fn join(&self, from: Joiner, request: JoinRequest) -> Result<JoinResponse, RpcError> {
        self.count();
        let _ = request;
        *self.joiner.lock().unwrap() = Some(from);
        Err(RpcError::new(RpcErrorKind::Denied, "invalid join token"))
    }

    async fn raft(&self, _: Subject, kind: RpcKind, body: Bytes) -> Result<Bytes, RpcError> {
        self.count();
        let Some(raft) = self.raft.get() else { return Ok(body) };
        raft.serve(kind, body).await.map_err(|e| RpcError::new(RpcErrorKind::Unavailable, e))
    }

    async fn session(
        &self,
        from: Subject,
        request: SessionRequest,
    ) -> Result<BoxStream<'static, NodeUpdate>, RpcError> {
        self.count();
        let _ = from;
        let first = request.revision.get();
        Ok(futures::stream::iter(first..first + 100)
            .map(|n| NodeUpdate {
                delta: Delta { to: Revision::new(n).unwrap(), ..Delta::default() },
                ..NodeUpdate::default()
            })
            .boxed())
    }

    async fn report(&self, _: Subject, request: ReportRequest) -> Result<ReportResponse, RpcError> {
        self.count();
        Ok(ReportResponse { revision: request.acked })
    }

    async fn exec(
        &self,
        _: Subject,
        request: ExecRequest,
        mut input: FrameReader<ExecInput>,
        output: FrameWriter<ExecOutput>,
    ) {
        self.count();
        output.send(&ExecOutput::Started).await.unwrap();
        while let Ok(Some(message)) = input.next().await {
            match message {
                ExecInput::Stdin(data) => output.send(&ExecOutput::Stdout(data)).await.unwrap(),
                ExecInput::StdinEnd => break,
                _ => {}
            }
        }
        let code = i32::try_from(request.argv.len()).unwrap();
        output.send(&ExecOutput::Exit(code)).await.unwrap();
    }

    async fn renew(&self, from: Subject, _: RenewRequest) -> Result<RenewResponse, RpcError> {
        self.count();
        let voter = NodeNumber::MIN;
        Ok(RenewResponse { role: from.role, voter, cert_pem: String::new() })
    }

    async fn logs(&self, _: Subject, request: LogsRequest, output: FrameWriter<LogsOutput>) {
        self.count();
        for (task, at_ns) in request.tasks {
            let line = LogLine { task, stderr: false, at_ns, text: Bytes::from_static(b"x\n") };
            output.send(&LogsOutput::Lines(vec![line])).await.unwrap();
        }
    }

    async fn stats(&self, _: Subject) -> Result<StatsResponse, RpcError> {
        self.count();
        Ok(StatsResponse::default())
    }

    async fn leave(&self, _: Subject) -> Result<(), RpcError> {
        self.count();
        Ok(())
    }

    async fn anti_entropy(&self, _: Subject, body: Bytes) -> Result<Bytes, RpcError> {
        self.count();
        Ok(body)
    }
}

async fn listen(identity: &Identity) -> (RpcServer, Arc<Echo>) {
    let echo = Arc::new(Echo::default());
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let tls = ServerTls::new(identity).unwrap();
    (RpcServer::bind(any, tls, Arc::clone(&echo) as _).await.unwrap(), echo)
}

fn client(identity: &Identity) -> RpcClient {
    RpcClient::new(ClientTls::member(identity).unwrap())
}

async fn raw(
    client: &RpcClient,
    to: SocketAddr,
    expect: Expect,
    route: Route,
) -> Result<Bytes, CallError> {
    client.call_bytes(to, expect, route, Bytes::from_static(b"\x80"), PATIENCE).await
}

/// All of them: one that is new does not compile without a place here.
pub(crate) fn all_routes() -> Vec<Route> {
    let next = |route| match route {
        Route::Join => Some(Route::Session),
        Route::Session => Some(Route::Report),
        Route::Report => Some(Route::Exec),
        Route::Exec => Some(Route::Renew),
        Route::Renew => Some(Route::Logs),
        Route::Logs => Some(Route::Stats),
        Route::Stats => Some(Route::Leave),
        Route::Leave => Some(Route::AntiEntropy),
        Route::AntiEntropy => Some(Route::Raft(RpcKind::ALL[0])),
        Route::Raft(kind) => {
            let at = RpcKind::ALL.iter().position(|other| *other == kind).unwrap();
            RpcKind::ALL.get(at + 1).copied().map(Route::Raft)
        }
    };
    std::iter::successors(Some(Route::Join), |route| next(*route)).collect()
}

fn join_request() -> JoinRequest {
    JoinRequest {
        token: "SWMTKN-1-x-y".into(),
        description: NodeDescription::default(),
        address: SocketAddr::from(([0, 0, 0, 0], 2377)),
        vtep: None,
        availability: Availability::Active,
    }
}

fn denied(answer: &Result<Bytes, CallError>) -> bool {
    matches!(answer, Err(CallError::Refused(e)) if e.kind == RpcErrorKind::Denied)
}

fn cut(answer: &Result<Bytes, CallError>) -> bool {
    // With TLS 1.3 a client may finish its side of the handshake before it is refused.
    matches!(answer, Err(CallError::Unreachable { .. } | CallError::Broken { .. }))
}

#[test]
fn every_route_has_a_path_and_finds_back() {
    for route in all_routes() {
        assert_eq!(Route::parse(&route.path()), Some(route));
    }
    for path in ["/", "/raft/", "/raft/erase", "/joins", "/JOIN", "/session/", ""] {
        assert_eq!(Route::parse(path), None, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_gets_to_no_managers_call() {
    let cluster = Cluster::new(1);
    let (server, echo) = listen(&cluster.node(1, Role::Manager)).await;
    let worker = client(&cluster.node(2, Role::Worker));
    for route in all_routes() {
        let answer = raw(&worker, server.address(), Expect::Manager, route).await;
        let open = matches!(
            route,
            Route::Session | Route::Report | Route::Renew | Route::Leave | Route::AntiEntropy
        );
        assert_eq!(denied(&answer), !open, "{route}: {answer:?}");
    }
    let served = echo.calls.load(Ordering::SeqCst);
    let manager = client(&cluster.node(3, Role::Manager));
    for route in RpcKind::ALL.map(Route::Raft) {
        raw(&manager, server.address(), Expect::Manager, route).await.unwrap();
    }
    assert_eq!(echo.calls.load(Ordering::SeqCst), served + RpcKind::ALL.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_gets_to_join_alone_and_only_where_its_token_is_from() {
    let cluster = Cluster::new(1);
    let (server, echo) = listen(&cluster.node(1, Role::Manager)).await;
    let key = pki::generate_key().unwrap();
    let joiner = RpcClient::new(ClientTls::joiner(&key, cluster.digest()).unwrap());
    for route in all_routes() {
        if route != Route::Join {
            let answer = raw(&joiner, server.address(), Expect::Manager, route).await;
            assert!(denied(&answer), "{route}: {answer:?}");
        }
    }
    assert_eq!(echo.calls.load(Ordering::SeqCst), 0);
    let at = server.address();
    let answer = client::join(at, &key, cluster.digest(), &join_request(), PATIENCE).await;
    assert!(matches!(answer, Err(CallError::Refused(e)) if e.message == "invalid join token"));
    assert_eq!(echo.calls.load(Ordering::SeqCst), 1);
    // Another cluster's token: the connection is refused before the token is told.
    let other = Cluster::new(2).digest();
    let answer = client::join(at, &key, other, &join_request(), PATIENCE).await;
    assert!(matches!(answer, Err(CallError::Unreachable { .. })), "{answer:?}");
    assert_eq!(echo.calls.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_does_not_tell_its_token_to_a_worker() {
    let cluster = Cluster::new(1);
    let (server, _) = listen(&cluster.node(1, Role::Worker)).await;
    let key = pki::generate_key().unwrap();
    let answer =
        client::join(server.address(), &key, cluster.digest(), &join_request(), PATIENCE).await;
    assert!(matches!(answer, Err(CallError::Unreachable { .. })), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_clusters_nodes_are_strangers_both_ways() {
    let (ours, theirs) = (Cluster::new(1), Cluster::new(2));
    let (server, echo) = listen(&ours.node(1, Role::Manager)).await;
    // They do not trust us.
    let them = theirs.node(2, Role::Manager);
    assert!(cut(&raw(&client(&them), server.address(), Expect::Member, Route::Report).await));
    // Nor we them, even if they trust our root.
    let mut liar = theirs.node(2, Role::Manager);
    liar.ca_pem.clone_from(&ours.root.cert_pem);
    liar.cluster = ours.id;
    let answer = raw(&client(&liar), server.address(), Expect::Member, Route::Report).await;
    assert!(cut(&answer), "{answer:?}");
    // Our root, but it says another cluster.
    let mixed = Cluster { id: theirs.id, root: ours.root.clone() };
    let mut mixed = mixed.node(3, Role::Manager);
    mixed.cluster = ours.id;
    let answer = raw(&client(&mixed), server.address(), Expect::Member, Route::Report).await;
    assert!(cut(&answer), "{answer:?}");
    assert_eq!(echo.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_refused_both_ways() {
    let cluster = Cluster::new(1);
    let long_ago = SystemTime::now() - Duration::from_secs(30 * 24 * 3600);
    let (server, echo) = listen(&cluster.node(1, Role::Manager)).await;
    let old = client(&cluster.node_since(2, Role::Manager, long_ago));
    let answer = raw(&old, server.address(), Expect::Member, Route::Report).await;
    assert!(cut(&answer), "{answer:?}");
    assert_eq!(echo.calls.load(Ordering::SeqCst), 0);
    assert_eq!(echo.refusals.counters()[1], ("rpc_handshakes_refused", 1));
    let (server, echo) = listen(&cluster.node_since(3, Role::Manager, long_ago)).await;
    let fresh = client(&cluster.node(4, Role::Manager));
    assert!(cut(&raw(&fresh, server.address(), Expect::Member, Route::Report).await));
    assert_eq!(echo.calls.load(Ordering::SeqCst), 0);
}

/// Waits for the end of a stream that is never told anything more.
async fn ends(client: &RpcClient, to: SocketAddr, change: impl FnOnce()) {
    let request = ExecRequest {
        task: TaskId::from_bits(1),
        argv: vec!["cat".into()],
        env: vec![],
        dir: None,
        user: None,
        tty: None,
        stdin: true,
    };
    let (_input, mut output) = client.exec(to, Expect::Member, &request, PATIENCE).await.unwrap();
    assert_eq!(output.next().await.unwrap(), Some(ExecOutput::Started));
    change();
    let end = timeout(PATIENCE, output.next()).await.expect("the stream goes on");
    assert!(end.is_err(), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_with_the_certificate_that_opened_it() {
    let cluster = Cluster::new(1);
    let identity = cluster.node(1, Role::Manager);
    let (server, echo) = listen(&identity).await;
    // Two hours of life: this one has some seconds left.
    let since = SystemTime::now() - Duration::from_secs(7200 - 3);
    let old = client(&cluster.node_since(2, Role::Manager, since));
    let healthy = client(&cluster.node(3, Role::Manager));
    ends(&old, server.address(), || {}).await;
    let answer = raw(&old, server.address(), Expect::Member, Route::AntiEntropy).await;
    assert!(cut(&answer), "{answer:?}");
    assert!(echo.refusals.counters()[1].1 > 0);
    raw(&healthy, server.address(), Expect::Member, Route::AntiEntropy).await.unwrap();

    // And with the trust in the root that signed it.
    let other = Cluster::new(1);
    let renewed = other.node(1, Role::Manager);
    let refused = echo.refusals.counters()[1].1;
    ends(&healthy, server.address(), || server.set_tls(ServerTls::new(&renewed).unwrap())).await;
    assert_eq!(echo.refusals.counters()[1].1, refused + 1);
}

/// The four stages of a node while a root takes the place of another: it knows of nothing, it
/// trusts both, it has a certificate of the new one, it has dropped the old one.
fn stages(old: &Cluster, new: &Cluster, n: u64) -> [Identity; 4] {
    let cross = old.root.cross_sign(&new.root, old.id, SystemTime::now()).unwrap();
    let both = format!("{}{}", old.root.cert_pem, new.root.cert_pem);
    let before = old.node(n, Role::Manager);
    let told = Identity { ca_pem: both.clone(), ..before.clone() };
    let mut after = new.node(n, Role::Manager);
    after.cert_pem.push_str(&cross);
    let renewed = Identity { ca_pem: both, ..after.clone() };
    [before, told, renewed, after]
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_understand_each_other_while_a_root_takes_anothers_place() {
    let (old, new) = (Cluster::new(1), Cluster::new(1));
    let (old_id, new_id) = (old.digest(), new.digest());
    let key = pki::generate_key().unwrap();
    for (theirs, server) in stages(&old, &new, 1).iter().enumerate() {
        let (trusts, issuer) = server.roots();
        assert_eq!(issuer, Some(if theirs < 2 { old_id } else { new_id }), "{theirs}");
        assert_eq!(trusts.contains(&old_id), theirs < 3, "{theirs}");
        assert_eq!(trusts.contains(&new_id), theirs > 0, "{theirs}");
        let (server, echo) = listen(server).await;
        for (ours, me) in stages(&old, &new, 2).iter().enumerate() {
            let answer =
                raw(&client(me), server.address(), Expect::Manager, Route::AntiEntropy).await;
            // Once one dropped the old root, a certificate of it is good for nothing there.
            let apart = ours.max(theirs) == 3 && ours.min(theirs) < 2;
            assert_eq!(answer.is_ok(), !apart, "{ours} to {theirs}: {answer:?}");
            assert_eq!(cut(&answer), apart, "{ours} to {theirs}: {answer:?}");
        }
        // So are join tokens: they pin a root that the listener has.
        for (token, root) in [(0, old_id), (3, new_id)] {
            echo.calls.store(0, Ordering::SeqCst);
            let request = join_request();
            let answer = client::join(server.address(), &key, root, &request, PATIENCE).await;
            assert!(answer.is_err());
            let told = echo.calls.load(Ordering::SeqCst) == 1;
            let fits = if token == 0 { theirs < 3 } else { theirs >= 2 };
            assert_eq!(told, fits, "token {token} to {theirs}: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_what_a_joiner_shows_the_key_alone_is_taken() {
    use rcgen::{CertificateParams, DnType, IsCa, KeyPair, SanType};
    let cluster = Cluster::new(1);
    let (server, echo) = listen(&cluster.node(1, Role::Manager)).await;
    // The names of a manager of this cluster, other names, and the right to sign.
    let mut params = CertificateParams::new(["elsewhere".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, NodeId::from_bits(1).to_string());
    params.distinguished_name.push(DnType::OrganizationalUnitName, pki::unit(Role::Manager));
    params.distinguished_name.push(DnType::OrganizationName, cluster.id.to_string());
    params.subject_alt_names.push(SanType::IpAddress([192, 0, 2, 1].into()));
    let show = |key: KeyPair| {
        let cert = params.self_signed(&key).unwrap();
        ClientTls::showing(&cert.pem(), &key.serialize_pem(), cluster.digest()).unwrap()
    };
    let p256 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let key = pki::PublicKey::of_pair(&p256);
    let joiner = RpcClient::new(show(p256));
    for route in all_routes() {
        let answer = raw(&joiner, server.address(), Expect::Manager, route).await;
        assert_eq!(denied(&answer), route != Route::Join, "{route}: {answer:?}");
    }
    let _: Result<JoinResponse, _> = joiner
        .call(server.address(), Expect::Manager, Route::Join, &join_request(), PATIENCE)
        .await;
    let shown = echo.joiner.lock().unwrap().clone().unwrap();
    assert_eq!(shown.public_key, key);
    // What is signed for it says nothing of what it asked for.
    let subject = Subject { node: NodeId::from_bits(9), role: Role::Worker, cluster: cluster.id };
    let life = Duration::from_secs(7200);
    let pem = cluster.root.sign(subject, &shown.public_key, life, SystemTime::now()).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    let cert = pem.parse_x509().unwrap();
    assert_eq!(pki::subject(&pem.contents.clone().into()).unwrap(), subject);
    assert!(!cert.is_ca());
    let names = cert.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1);
    let usage = cert.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());

    // Keys of another kind are shown to nobody's profit.
    for kind in [&rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384] {
        let joiner = RpcClient::new(show(KeyPair::generate_for(kind).unwrap()));
        let answer = raw(&joiner, server.address(), Expect::Manager, Route::Join).await;
        assert!(cut(&answer), "{answer:?}");
    }
    assert!(pki::PublicKey::from_der(RSA_512).is_err(), "RSA");
}

/// SubjectPublicKeyInfo of an RSA key of 512 bits (RFC 3279 section 2.3.1), of a modulus of ones.
const RSA_512: &[u8] = &{
    let mut der = [0xff; 94];
    let head = [
        0x30, 0x5c, 0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01,
        0x05, 0x00, 0x03, 0x4b, 0x00, 0x30, 0x48, 0x02, 0x41, 0x00,
    ];
    let tail = [0x02, 0x03, 0x01, 0x00, 0x01];
    let mut n = 0;
    while n < head.len() {
        der[n] = head[n];
        n += 1;
    }
    n = 0;
    while n < tail.len() {
        der[der.len() - tail.len() + n] = tail[n];
        n += 1;
    }
    der
};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reaches_whom_it_expects_or_nobody() {
    let cluster = Cluster::new(1);
    let (server, _) = listen(&cluster.node(1, Role::Worker)).await;
    let me = client(&cluster.node(2, Role::Manager));
    for (expect, fits) in [
        (Expect::Member, true),
        (Expect::Node(NodeId::from_bits(1)), true),
        (Expect::Node(NodeId::from_bits(3)), false),
        (Expect::Manager, false),
    ] {
        let answer = raw(&me, server.address(), expect, Route::AntiEntropy).await;
        assert_eq!(answer.is_ok(), fits, "{expect}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_1_2_and_no_certificate_are_refused() {
    let cluster = Cluster::new(1);
    let (server, echo) = listen(&cluster.node(35, Role::Manager)).await;
    let me = cluster.node(2, Role::Manager);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(pki::parse_pem(&me.ca_pem).unwrap()).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::from_pem_slice(me.key_pem.as_bytes()).unwrap();
    let builder = |version| {
        rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots.clone())
    };
    let certs = vec![pki::parse_pem(&me.cert_pem).unwrap()];
    let old = builder(&rustls::version::TLS12).with_client_auth_cert(certs, key).unwrap();
    let bare = builder(&rustls::version::TLS13).with_no_client_auth();
    for (config, alert) in [(old, "ProtocolVersion"), (bare, "CertificateRequired")] {
        let stream = TcpStream::connect(server.address()).await.unwrap();
        // 35 is `z`: with a letter in it, an id is a DNS name.
        let name = NodeId::from_bits(35).to_string().try_into().unwrap();
        let connected =
            tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        let error = match connected {
            Err(error) => error,
            // TLS 1.3: the refusal comes with the first read.
            Ok(mut stream) => stream.read_u8().await.unwrap_err(),
        };
        assert!(error.to_string().contains(alert), "{alert}: {error}");
    }
    assert_eq!(echo.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_stream_and_commands_talk_both_ways() {
    let cluster = Cluster::new(1);
    let (server, _) = listen(&cluster.node(1, Role::Manager)).await;
    let me = client(&cluster.node(2, Role::Manager));
    let request = SessionRequest { revision: Revision::new(7).unwrap(), ..Default::default() };
    let mut updates = me.session(server.address(), &request, PATIENCE).await.unwrap();
    for n in 7..107 {
        assert_eq!(updates.next().await.unwrap().unwrap().delta.to.get(), n);
    }
    assert!(updates.next().await.unwrap().is_none());

    let to = Expect::Node(NodeId::from_bits(1));
    let tasks = (1..4).map(|n| (TaskId::from_bits(n), 7)).collect();
    let request = LogsRequest { tasks, ..LogsRequest::default() };
    let mut lines = me.logs(server.address(), to, &request, PATIENCE).await.unwrap();
    for n in 1..4 {
        let Some(LogsOutput::Lines(line)) = lines.next().await.unwrap() else { panic!("no {n}") };
        assert_eq!((line[0].task, &line[0].text[..]), (TaskId::from_bits(n), &b"x\n"[..]));
    }
    assert!(lines.next().await.unwrap().is_none());

    let command = ExecRequest {
        task: TaskId::from_bits(1),
        argv: vec!["cat".into()],
        env: vec![],
        dir: None,
        user: None,
        tty: None,
        stdin: true,
    };
    let (input, mut output) = me.exec(server.address(), to, &command, PATIENCE).await.unwrap();
    assert_eq!(output.next().await.unwrap(), Some(ExecOutput::Started));
    for n in 0..50u8 {
        let data = Bytes::from(vec![n; 10_000]);
        input.send(&ExecInput::Stdin(data.clone())).await.unwrap();
        assert_eq!(output.next().await.unwrap(), Some(ExecOutput::Stdout(data)));
    }
    input.send(&ExecInput::StdinEnd).await.unwrap();
    assert_eq!(output.next().await.unwrap(), Some(ExecOutput::Exit(1)));
    assert_eq!(output.next().await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_or_malformed_body_is_refused() {
    let cluster = Cluster::new(1);
    let (server, echo) = listen(&cluster.node(1, Role::Manager)).await;
    let me = client(&cluster.node(2, Role::Manager));
    for body in [vec![0; Route::Session.body_limit() + 1], b"{}".to_vec(), Vec::new()] {
        let length = body.len();
        let answer = me
            .call_bytes(server.address(), Expect::Manager, Route::Session, body.into(), PATIENCE)
            .await;
        let invalid =
            matches!(&answer, Err(CallError::Refused(e)) if e.kind == RpcErrorKind::Invalid);
        // An oversized body may meet a closed stream before the answer is read.
        let broken = length > 10 && matches!(&answer, Err(CallError::Broken { .. }));
        assert!(invalid || broken, "{length} bytes: {answer:?}");
    }
    assert_eq!(echo.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_cut_and_many_leave_room_for_members() {
    let cluster = Cluster::new(1);
    let (server, _) = listen(&cluster.node(1, Role::Manager)).await;
    let start = Instant::now();
    let mut silent = TcpStream::connect(server.address()).await.unwrap();
    let end = timeout(Duration::from_secs(8), silent.read(&mut [0; 16])).await;
    assert!(matches!(end, Ok(Ok(0) | Err(_))), "{end:?}");
    assert!(start.elapsed() > Duration::from_secs(4));
    // Members that are in already are not touched by a flood of strangers from one address.
    let me = client(&cluster.node(2, Role::Manager));
    raw(&me, server.address(), Expect::Manager, Route::AntiEntropy).await.unwrap();
    let mut flood = Vec::new();
    for _ in 0..200 {
        flood.push(TcpStream::connect(server.address()).await.unwrap());
    }
    raw(&me, server.address(), Expect::Manager, Route::AntiEntropy).await.unwrap();
    drop(flood);
    // And new ones get in once it is over.
    let other = client(&cluster.node(3, Role::Manager));
    let deadline = Instant::now() + PATIENCE;
    while raw(&other, server.address(), Expect::Manager, Route::AntiEntropy).await.is_err() {
        assert!(Instant::now() < deadline, "the flood's places are not given back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// One node, however many certificates it has had, takes no more than its share.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_very_many_connections_takes_none_from_the_others() {
    let cluster = Cluster::new(1);
    let (server, echo) = listen(&cluster.node(1, Role::Manager)).await;
    let greedy = cluster.node(2, Role::Worker);
    let mut held = Vec::new();
    let refused = loop {
        let one = client(&greedy);
        match raw(&one, server.address(), Expect::Manager, Route::AntiEntropy).await {
            Ok(_) => held.push(one),
            Err(error) => break error,
        }
        assert!(held.len() < 1000, "there is no end");
    };
    assert!(cut(&Err(refused)));
    assert!(held.len() >= 16, "only {}", held.len());
    assert!(echo.refusals.counters()[1].1 > 0);
    let other = client(&cluster.node(3, Role::Worker));
    raw(&other, server.address(), Expect::Manager, Route::AntiEntropy).await.unwrap();
    // With one given back there is room for one.
    held.clear();
    let deadline = Instant::now() + PATIENCE;
    let again = client(&greedy);
    while raw(&again, server.address(), Expect::Manager, Route::AntiEntropy).await.is_err() {
        assert!(Instant::now() < deadline, "its places are not given back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_finds_a_peer_that_came_back() {
    let cluster = Cluster::new(1);
    let identity = cluster.node(1, Role::Manager);
    let (server, _) = listen(&identity).await;
    let at = server.address();
    let me = client(&cluster.node(2, Role::Worker));
    raw(&me, at, Expect::Manager, Route::AntiEntropy).await.unwrap();
    drop(server);
    let deadline = Instant::now() + PATIENCE;
    while raw(&me, at, Expect::Manager, Route::AntiEntropy).await.is_ok() {
        assert!(Instant::now() < deadline, "the listener is still there");
    }
    let tls = ServerTls::new(&identity).unwrap();
    let _server = RpcServer::bind(at, tls, Arc::new(Echo::default())).await.unwrap();
    while let Err(error) = raw(&me, at, Expect::Manager, Route::AntiEntropy).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn raft_runs_over_it() {
    let cluster = Cluster::new(1);
    let dir = std::env::temp_dir().join(format!("meshd-rpc-raft-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    let (mut servers, mut rafts) = (Vec::new(), Vec::new());
    for n in 1..=3 {
        let identity = cluster.node(n, Role::Manager);
        let (server, echo) = listen(&identity).await;
        let path = dir.join(n.to_string());
        let config = RaftConfig::new(path, identity.number, server.address(), identity.data_key);
        let transport = Arc::new(RaftTransport::new(client(&identity)));
        let raft = Raft::start(config, transport).await.unwrap();
        echo.raft.set(raft.clone()).unwrap();
        servers.push(server);
        rafts.push((identity.number, raft));
    }
    rafts[0].1.bootstrap().await.unwrap();
    for n in 1..3 {
        rafts[0].1.add_voter(rafts[n].0, servers[n].address()).await.unwrap();
    }
    let mut last = Revision::MIN;
    for (_, raft) in &rafts {
        let revision = raft.read_barrier().await.unwrap();
        assert!(revision >= last && raft.read(|store| store.revision) >= revision);
        last = revision;
    }
    assert_eq!(rafts[2].1.leadership().borrow().voters.len(), 3);
    for (_, raft) in rafts {
        raft.shutdown().await;
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn peers_say_who_they_are() {
    let cluster = Cluster::new(1);
    let identity = cluster.node(1, Role::Worker);
    let tls = ServerTls::new(&identity).unwrap();
    let cert = pki::parse_pem(&identity.cert_pem).unwrap();
    assert_eq!(tls.peer(Some(&[cert])), Ok(Peer::Node(identity.subject())));
    assert!(tls.peer(None).is_err());
}
