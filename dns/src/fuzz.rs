//! What `cargo xtask fuzz` calls.

use std::time::Instant;

use hickory_proto::op::Message;
use mesh_types::{
    EndpointId, NetworkId, NodeNumber, Protocol, ServiceId, TaskId, Vni,
    record::{EndpointRecord, EndpointState, NetworkRecord, ServiceRecord},
    spec::{EndpointMode, PortSpec},
};

use crate::{
    answer::{Decision, Transport, answer, failure},
    cache::{Cache, CacheKey},
    fast::{self, REPLY_MAX},
    forward::fuzz_accept,
    index::Index,
    reverse::ReverseName,
    snapshot::{Snapshot, TaskView},
    wire::Key,
};

/// Two networks with services of each kind, one that is foreign to task 1000, and task 1001, which
/// may not ask outside.
#[must_use]
pub fn snapshot() -> Snapshot {
    let network = |n: u128, name: &str| NetworkRecord {
        id: NetworkId::from_bits(n),
        name: name.to_owned(),
        vni: Vni::MIN,
        subnet: format!("10.0.{n}.0/24").parse().expect("a subnet"),
        gateway: [10, 0, n as u8, 254].into(),
        mtu: None,
        internal: false,
        ingress: false,
    };
    let service = |net: u128, id: u128, name: &str, vip: bool| ServiceRecord {
        network: NetworkId::from_bits(net),
        id: ServiceId::from_bits(id),
        name: name.to_owned(),
        aliases: vec![format!("{name}-too"), "*.pages".to_owned()],
        mode: if vip { EndpointMode::Vip } else { EndpointMode::Dnsrr },
        vip: vip.then(|| [10, 0, net as u8, id as u8].into()),
        ports: vec![PortSpec { protocol: Protocol::Tcp, target: 80, published: 8080 }],
    };
    let endpoint = |net: u128, id: u64, service: u128, name: &str| EndpointRecord {
        id: EndpointId::new(id).expect("an id"),
        network: NetworkId::from_bits(net),
        node: NodeNumber::MIN,
        address: [10, 0, net as u8, 100 + id as u8].into(),
        task: TaskId::from_bits(id.into()),
        task_name: format!("{name}.{id}.x"),
        service: ServiceId::from_bits(service),
        state: EndpointState::Ready,
    };
    let task = |id: u128, networks: &[u128], forward: bool| TaskView {
        task: TaskId::from_bits(id),
        netns: "/run/netns/none".into(),
        networks: networks.iter().map(|n| NetworkId::from_bits(*n)).collect(),
        forward,
        servers: Vec::new(),
    };
    // More addresses than a reply over UDP has room for.
    let many = (10..80).map(|id| endpoint(2, id, 14, "many"));
    Snapshot {
        networks: vec![network(1, "front"), network(2, "Back.end"), network(3, "other")],
        services: vec![
            service(1, 11, "web", true),
            service(2, 11, "web", true),
            service(2, 13, "rr", false),
            service(2, 14, "many", false),
            service(3, 15, "secret", true),
        ],
        endpoints: [
            endpoint(1, 1, 11, "web"),
            endpoint(2, 4, 13, "rr"),
            endpoint(3, 5, 15, "secret"),
        ]
        .into_iter()
        .chain(many)
        .collect(),
        tasks: vec![task(1000, &[1, 2], true), task(1001, &[3], false)],
        ..Snapshot::default()
    }
}

/// A query of a task: every way decides, replies are messages with its number that fit, and the
/// fast way says what the slow one says.
pub fn query(index: &Index, task: TaskId, query: &[u8]) {
    let message_of = |bytes: &[u8]| {
        let message = Message::from_vec(bytes).expect("a reply is a message");
        assert_eq!(bytes[..2], query[..2], "a reply has the query's number");
        message
    };
    let turn = query.len();
    let mut bytes = [0; REPLY_MAX];
    let quick = fast::answer(index, index.asker(task), query, turn, &mut bytes);
    let slow = answer(index, task, query, Transport::Udp, turn);
    if let Decision::Reply(slow) = &slow {
        let message = message_of(slow);
        assert!(slow.len() <= REPLY_MAX, "{} bytes over UDP", slow.len());
        if let Some(length) = quick {
            assert_eq!(message, message_of(&bytes[..length]));
        }
    } else {
        assert_eq!(quick, None, "the slow way says {slow:?}");
    }
    if let Decision::Reply(whole) = answer(index, task, query, Transport::Tcp, turn) {
        message_of(&whole);
        assert!(whole.len() <= usize::from(u16::MAX));
    }
    if let Some(reply) = failure(query) {
        message_of(&reply);
    }
}

/// What an outside resolver answers to a query: taken or not, kept or not, and given again with
/// the number of whoever asks.
pub fn upstream(query: &[u8], reply: &[u8]) {
    fuzz_accept(query, reply);
    let now = Instant::now();
    let Some(key) = CacheKey::new(None, false, query) else { return };
    let mut cache = Cache::default();
    cache.insert(key.clone(), query, reply, now);
    if let Some(again) = cache.find(&key, query, now) {
        assert_eq!(again[..2], query[..2], "a kept reply has the query's number");
    }
}

/// A name, backwards or not.
pub fn name(labels: &[u8]) {
    if let Some(key) = Key::from_labels(labels.split(|byte| *byte == b'.')) {
        let _ = ReverseName::read(key.as_bytes());
    }
}
