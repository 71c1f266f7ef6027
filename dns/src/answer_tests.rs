//! Tests of answers: what each kind of name gives, and that no question does harm.

use hickory_proto::{op::Message, rr::RData};
use mesh_types::{
    EndpointId, NetworkId, NodeNumber, Protocol, Revision, ServiceId, TaskId, Vni,
    record::{EndpointRecord, EndpointState, NetworkRecord, ServiceRecord},
    spec::{EndpointMode, PortSpec},
};
use proptest::prelude::*;

use super::*;
use crate::snapshot::{Policy, Snapshot, TaskView};

fn network(n: u128, name: &str, subnet: &str) -> NetworkRecord {
    NetworkRecord {
        id: NetworkId::from_bits(n),
        name: name.to_owned(),
        vni: Vni::MIN,
        subnet: subnet.parse().unwrap(),
        gateway: "10.0.0.1".parse().unwrap(),
        mtu: None,
        internal: false,
        ingress: false,
    }
}

pub(crate) fn service(
    net: u128,
    id: u128,
    name: &str,
    aliases: &[&str],
    vip: Option<&str>,
) -> ServiceRecord {
    ServiceRecord {
        network: NetworkId::from_bits(net),
        id: ServiceId::from_bits(id),
        name: name.to_owned(),
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        mode: if vip.is_some() { EndpointMode::Vip } else { EndpointMode::Dnsrr },
        vip: vip.map(|vip| vip.parse().unwrap()),
        ports: Vec::new(),
    }
}

pub(crate) fn endpoint(
    net: u128,
    id: u64,
    service: u128,
    name: &str,
    address: &str,
) -> EndpointRecord {
    let task = TaskId::from_bits(u128::from(id));
    EndpointRecord {
        id: EndpointId::new(id).unwrap(),
        network: NetworkId::from_bits(net),
        node: NodeNumber::MIN,
        address: address.parse().unwrap(),
        task,
        task_name: format!("{name}.{task}"),
        service: ServiceId::from_bits(service),
        state: EndpointState::Ready,
    }
}

/// The asker is attached to `front`, then `back`; `other` is foreign to it.
pub(crate) fn snapshot() -> Snapshot {
    let mut starting = endpoint(1, 3, 11, "web.3", "10.0.0.13");
    starting.state = EndpointState::Starting;
    Snapshot {
        revision: Revision::new(42).unwrap(),
        networks: vec![
            network(1, "front", "10.0.0.0/24"),
            network(2, "Back.end", "10.0.1.0/24"),
            network(3, "other", "10.0.2.0/24"),
        ],
        services: vec![
            service(1, 11, "web", &["www", "shared"], Some("10.0.0.2")),
            service(2, 11, "web", &[], Some("10.0.1.2")),
            service(1, 12, "API", &["shared", "web"], Some("10.0.0.3")),
            service(2, 13, "rr", &[], None),
            service(2, 14, "idle", &[], None),
            service(3, 15, "secret", &[], Some("10.0.2.2")),
        ],
        endpoints: vec![
            endpoint(1, 1, 11, "web.1", "10.0.0.11"),
            endpoint(1, 2, 11, "web.2", "10.0.0.12"),
            starting,
            endpoint(2, 4, 13, "rr.1", "10.0.1.21"),
            endpoint(2, 5, 13, "rr.2", "10.0.1.22"),
            endpoint(2, 6, 13, "rr.3", "fd00::6"),
        ],
        tasks: vec![
            TaskView {
                task: asker(),
                netns: "/run/netns/none".into(),
                networks: vec![NetworkId::from_bits(1), NetworkId::from_bits(2)],
                forward: true,
                servers: Vec::new(),
            },
            TaskView {
                task: inmate(),
                netns: "/run/netns/none".into(),
                networks: vec![NetworkId::from_bits(3)],
                forward: false,
                servers: Vec::new(),
            },
        ],
        upstreams: Vec::new(),
        policy: Policy::default(),
    }
}

pub(crate) fn asker() -> TaskId {
    TaskId::from_bits(1000)
}

fn inmate() -> TaskId {
    TaskId::from_bits(1001)
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn decide(task: TaskId, name: &str, kind: RecordType) -> Decision {
    let query = query(name, kind).to_vec().unwrap();
    answer(&Index::new(&snapshot()), task, &query, Transport::Udp, 0)
}

fn reply(decision: Decision) -> Message {
    let Decision::Reply(bytes) = decision else { panic!("no reply: {decision:?}") };
    Message::from_vec(&bytes).unwrap()
}

fn check(name: &str, expected: &[&str]) {
    let reply = reply(decide(asker(), name, RecordType::A));
    let addresses: Vec<_> = reply.answers.iter().map(|record| record.data.to_string()).collect();
    assert_eq!(addresses, expected, "{name}");
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError, "{name}");
    assert!(reply.answers.iter().all(|record| record.ttl == 5));
    assert!(reply.metadata.recursion_available && reply.metadata.authoritative);
}

fn check_missing(name: &str) {
    let reply = reply(decide(asker(), name, RecordType::A));
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{name}");
    assert!(matches!(reply.authorities[0].data, RData::SOA(_)), "{name}");
}

#[test]
fn names_of_services_and_tasks() {
    let id = TaskId::from_bits(1);
    check("web.", &["10.0.0.2"]);
    check("WEB.", &["10.0.0.2"]);
    check("web.front.", &["10.0.0.2"]);
    check("web.back.end.", &["10.0.1.2"]);
    check("api.", &["10.0.0.3"]);
    check("www.", &["10.0.0.2"]);
    check("www.front.", &["10.0.0.2"]);
    check("shared.", &["10.0.0.2", "10.0.0.3"]);
    check("tasks.web.", &["10.0.0.11", "10.0.0.12"]);
    check("tasks.www.front.", &["10.0.0.11", "10.0.0.12"]);
    check("rr.", &["10.0.1.21", "10.0.1.22"]);
    check(&format!("web.1.{id}."), &["10.0.0.11"]);
    check(&format!("web.1.{id}.front."), &["10.0.0.11"]);
    check(&format!("web.3.{}.", TaskId::from_bits(3)), &["10.0.0.13"]);
    check(&format!("{}.", id), &["10.0.0.11"]);
}

#[test]
fn internal_names_that_do_not_exist_are_denied_here() {
    check_missing("nosuch.front.");
    check_missing("nosuch.back.end.");
    check_missing("www.back.end.");
    check_missing("tasks.nosuch.");
    check_missing("secret.");
    check_missing("nosuch.");
    check_missing("web\\.front.");
    check_missing("secret.other.");
    check_missing("tasks.secret.other.");
    check_missing("a.b.front.");
    check_missing("_http._tcp.web.");
    check_missing("_http._tcp.secret.");
    check_missing("_http.front.");
    check_missing(&format!("web.9.{}.", TaskId::from_bits(9)));
    check_missing("b._dns-sd._udp.0.0.0.10.in-addr.arpa.");
    check_missing("1.168.192.in-addr.arpa.");
}

#[test]
fn the_rest_is_asked_outside() {
    for name in [
        "example.test.",
        "web.example.test.",
        "tasks.example.test.",
        "x.other.",
        "_http._tcp.example.test.",
        ".",
        "web\\.front.example.test.",
        "8.8.8.8.in-addr.arpa.",
    ] {
        assert_eq!(decide(asker(), name, RecordType::A), Decision::Forward, "{name}");
    }
}

#[test]
fn a_task_without_a_way_out_asks_nothing_outside() {
    let reply = reply(decide(inmate(), "example.test.", RecordType::A));
    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
    let unknown = TaskId::from_bits(77);
    assert!(matches!(decide(unknown, "example.test.", RecordType::A), Decision::Reply(_)));
}

#[test]
fn known_names_without_such_records_have_none() {
    for (name, kind) in [
        ("web.", RecordType::AAAA),
        ("web.", RecordType::MX),
        ("idle.", RecordType::A),
        ("tasks.idle.", RecordType::A),
    ] {
        let reply = reply(decide(asker(), name, kind));
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError, "{name}");
        assert!(reply.answers.is_empty());
        assert!(matches!(reply.authorities[0].data, RData::SOA(_)), "{name}");
        assert_eq!(reply.authorities[0].ttl, 5);
    }
    let v6 = reply(decide(asker(), "rr.", RecordType::AAAA));
    assert_eq!(v6.answers[0].data.to_string(), "fd00::6");
}

#[test]
fn addresses_have_names() {
    let pointer = |address: &str| {
        let reversed: Vec<_> = address.split('.').rev().collect();
        decide(asker(), &format!("{}.in-addr.arpa.", reversed.join(".")), RecordType::PTR)
    };
    let name = |address: &str| reply(pointer(address)).answers[0].data.to_string();
    assert_eq!(name("10.0.0.2"), "web.front.");
    assert_eq!(name("10.0.0.11"), format!("web.1.{}.front.", TaskId::from_bits(1)));
    // Ours without a name, and such as mean nothing outside: nobody else hears of them.
    for address in ["10.0.0.99", "10.0.2.2", "10.9.9.9", "192.168.1.1", "127.0.0.1"] {
        let reply = reply(pointer(address));
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{address}");
    }
    assert_eq!(pointer("192.0.2.1"), Decision::Forward);
}

/// Service 11, `web`, publishes two ports.
fn with_ports() -> Snapshot {
    let mut all = snapshot();
    let port = |target, protocol| PortSpec { protocol, target, published: 8000 };
    let mut published = service(4, 11, "web", &[], None);
    published.ports = vec![port(80, Protocol::Tcp), port(5000, Protocol::Udp)];
    all.services.push(published);
    all
}

#[test]
fn ports_of_services_have_srv_records() {
    let index = Index::new(&with_ports());
    let ask = |name: &str, kind| {
        let query = query(name, kind).to_vec().unwrap();
        reply(answer(&index, asker(), &query, Transport::Udp, 0))
    };
    for name in [
        "_80._tcp.web.",
        "_HTTP._tcp.web.front.",
        "_80._tcp.tasks.web.",
        "_80._tcp.www.",
        "_5000._udp.web.",
    ] {
        let reply = ask(name, RecordType::SRV);
        let mut targets: Vec<_> = reply
            .answers
            .iter()
            .map(|record| match &record.data {
                RData::SRV(srv) => (srv.target.to_ascii(), srv.port),
                other => panic!("{name}: {other:?}"),
            })
            .collect();
        targets.sort();
        let port = if name.contains("_udp") { 5000 } else { 80 };
        let target = |n| (format!("web.{n}.{}.front.", TaskId::from_bits(n)), port);
        assert_eq!(targets, [target(1), target(2)], "{name}: ready tasks alone");
        let mut addresses: Vec<_> =
            reply.additionals.iter().map(|record| record.data.to_string()).collect();
        addresses.sort();
        assert_eq!(addresses, ["10.0.0.11", "10.0.0.12"], "{name}");
        assert_eq!(ask(name, RecordType::A).metadata.response_code, ResponseCode::NoError);
    }
    for name in ["_81._tcp.web.", "_80._udp.web.", "_80._tcp.api.", "_80._tcp.secret."] {
        let reply = ask(name, RecordType::SRV);
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{name}");
    }
}

#[test]
fn many_srv_records_are_cut_over_udp() {
    let mut many = with_ports();
    many.endpoints =
        (1..=100).map(|n| endpoint(1, n, 11, "web.1", &format!("10.0.0.{n}"))).collect();
    let index = Index::new(&many);
    let query = query("_80._tcp.web.", RecordType::SRV).to_vec().unwrap();
    let cut = reply(answer(&index, asker(), &query, Transport::Udp, 0));
    assert!(cut.metadata.truncation && cut.additionals.is_empty() && !cut.answers.is_empty());
    let whole = reply(answer(&index, asker(), &query, Transport::Tcp, 0));
    assert_eq!((whole.answers.len(), whole.additionals.len()), (100, 100));
}

#[test]
fn an_alias_with_a_star_is_all_names_below() {
    let mut all = snapshot();
    all.services[0].aliases.push("*.pages".to_owned());
    all.services[2].aliases.push("own.pages".to_owned());
    let index = Index::new(&all);
    let ask = |name: &str| {
        let query = query(name, RecordType::A).to_vec().unwrap();
        let reply = reply(answer(&index, asker(), &query, Transport::Udp, 0));
        reply.answers.iter().map(|record| record.data.to_string()).collect::<Vec<_>>()
    };
    for name in ["a.pages.", "A.b.Pages.", "a.pages.front.", "*.pages."] {
        assert_eq!(ask(name), ["10.0.0.2"], "{name}");
    }
    assert_eq!(ask("own.pages."), ["10.0.0.3"]);
    for name in ["pages.", "pages.front.", "a.pages.back.end."] {
        assert!(ask(name).is_empty(), "{name}");
    }
}

/// A resolver in a task finds its way from the root; names of ours are no part of it.
#[test]
fn top_level_domains_are_asked_about() {
    for kind in [RecordType::NS, RecordType::DS, RecordType::SOA] {
        assert_eq!(decide(asker(), "com.", kind), Decision::Forward, "{kind}");
        for name in ["web.", "secret.", &format!("{}.", TaskId::from_bits(9))] {
            assert_ne!(decide(asker(), name, kind), Decision::Forward, "{name} {kind}");
        }
    }
    check_missing("com.");
}

#[test]
fn this_host_is_this_host() {
    for name in ["localhost.", "x.LocalHost."] {
        let v4 = reply(decide(asker(), name, RecordType::A));
        assert_eq!(v4.answers[0].data.to_string(), "127.0.0.1");
        let v6 = reply(decide(asker(), name, RecordType::AAAA));
        assert_eq!(v6.answers[0].data.to_string(), "::1");
    }
}

#[test]
fn the_ttl_is_the_operators() {
    let mut other = snapshot();
    other.policy.ttl = 77;
    let index = Index::new(&other);
    for (name, kind) in [
        ("web.", RecordType::A),
        ("web.", RecordType::ANY),
        ("2.0.0.10.in-addr.arpa.", RecordType::PTR),
    ] {
        let query = query(name, kind).to_vec().unwrap();
        let reply = reply(answer(&index, asker(), &query, Transport::Udp, 0));
        assert_eq!(reply.answers[0].ttl, 77);
    }
    let query = query("nosuch.", RecordType::A).to_vec().unwrap();
    let reply = reply(answer(&index, asker(), &query, Transport::Udp, 0));
    let RData::SOA(soa) = &reply.authorities[0].data else { panic!() };
    assert_eq!((reply.authorities[0].ttl, soa.minimum), (77, 77));
}

#[test]
fn a_task_with_its_own_servers_asks_them_from_where_it_is() {
    let mut own = snapshot();
    own.tasks[1].servers = vec!["10.0.2.9".parse().unwrap()];
    let query = query("example.test.", RecordType::A).to_vec().unwrap();
    let decision = answer(&Index::new(&own), inmate(), &query, Transport::Udp, 0);
    assert_eq!(decision, Decision::Forward);
}

#[test]
fn lists_rotate() {
    let index = Index::new(&snapshot());
    let bytes = query("rr.", RecordType::A).to_vec().unwrap();
    let first = |turn| {
        let decision = answer(&index, asker(), &bytes, Transport::Udp, turn);
        reply(decision).answers[0].data.to_string()
    };
    assert_ne!(first(0), first(1));
    assert_eq!(first(0), first(2));
}

#[test]
fn a_long_answer_is_cut_over_udp_and_whole_over_tcp() {
    let mut many = snapshot();
    many.endpoints =
        (1..=200).map(|n| endpoint(2, n, 13, "rr.1", &format!("10.0.1.{n}"))).collect();
    let index = Index::new(&many);
    let mut ask = query("rr.", RecordType::A);
    let mut get = |payload: Option<u16>, transport| {
        ask.edns = payload.map(|payload| {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            edns
        });
        let bytes = ask.to_vec().unwrap();
        let Decision::Reply(bytes) = answer(&index, asker(), &bytes, transport, 7) else {
            panic!("no reply")
        };
        (bytes.len(), Message::from_vec(&bytes).unwrap())
    };
    let (length, plain) = get(None, Transport::Udp);
    assert!(plain.metadata.truncation && length <= 512 && length > 480, "{length}");
    assert!(plain.edns.is_none());
    let (length, large) = get(Some(1232), Transport::Udp);
    assert!(large.metadata.truncation && length <= 1232 && large.edns.is_some());
    let (_, whole) = get(None, Transport::Tcp);
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 200);
}

#[test]
fn bad_queries_get_their_error() {
    let index = Index::default();
    let code = |bytes: &[u8]| match answer(&index, asker(), bytes, Transport::Udp, 0) {
        Decision::Reply(reply) => Message::from_vec(&reply).unwrap().metadata.response_code,
        other => panic!("{other:?}"),
    };
    let good = query("web.", RecordType::A).to_vec().unwrap();
    let mut two = good.clone();
    two[5] = 2;
    assert_eq!(code(&two), ResponseCode::FormErr);
    let mut none = good.clone();
    none[5] = 0;
    assert_eq!(code(&none), ResponseCode::FormErr);
    let mut update = good.clone();
    update[2] |= 5 << 3;
    assert_eq!(code(&update), ResponseCode::NotImp);
    assert_eq!(code(&good[..good.len() - 3]), ResponseCode::FormErr);
    let mut chaos = query("web.", RecordType::TXT);
    chaos.queries[0].query_class = DNSClass::CH;
    assert_eq!(code(&chaos.to_vec().unwrap()), ResponseCode::Refused);
    let mut new_edns = query("web.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    new_edns.edns = Some(edns);
    // 16 is BADVERS here, and BADSIG in another context (RFC 6895 section 2.3).
    assert_eq!(u16::from(code(&new_edns.to_vec().unwrap())), 16);

    let mut response = good.clone();
    response[2] |= 0x80;
    assert_eq!(answer(&index, asker(), &response, Transport::Udp, 0), Decision::Drop);
    assert_eq!(answer(&index, asker(), &good[..11], Transport::Udp, 0), Decision::Drop);
}

#[test]
fn a_failure_repeats_the_question() {
    let ask = query("example.test.", RecordType::A);
    let reply = Message::from_vec(&failure(&ask.to_vec().unwrap()).unwrap()).unwrap();
    assert_eq!(reply.metadata.id, ask.metadata.id);
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(reply.queries, ask.queries);
}

proptest! {
    #[test]
    fn garbage_never_panics_and_replies_parse(
        mut garbage in prop::collection::vec(any::<u8>(), 0..600),
        question: bool,
    ) {
        if question && garbage.len() >= 12 {
            // A likely header, so that the rest is looked at.
            garbage[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
        }
        let index = Index::new(&snapshot());
        if let Decision::Reply(reply) = answer(&index, asker(), &garbage, Transport::Udp, 3) {
            prop_assert!(reply.len() <= 1232);
            prop_assert_eq!(&reply[..2], &garbage[..2]);
            prop_assert!(Message::from_vec(&reply).is_ok());
        }
        let _ = failure(&garbage);
    }

    #[test]
    fn mutated_queries_never_panic(at: prop::sample::Index, byte: u8, tcp: bool) {
        let mut bytes = query("tasks.web.front.", RecordType::A).to_vec().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        let index = Index::new(&snapshot());
        if let Decision::Reply(reply) = answer(&index, asker(), &bytes, transport, 0) {
            prop_assert!(Message::from_vec(&reply).is_ok());
        }
    }

    #[test]
    fn what_is_under_an_attached_network_never_leaves(host in "[a-z0-9._-]{1,40}") {
        let index = Index::new(&snapshot());
        let Some(key) = Key::from_text(&format!("{host}.front")) else { return Ok(()) };
        let found = index.lookup(index.asker(asker()), key.as_bytes());
        prop_assert!(found != Lookup::Outside);
    }
}
