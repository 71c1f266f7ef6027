//! What is fuzzed: each target takes any bytes, and panics if they do harm.

use std::{collections::BTreeMap, net::SocketAddr, sync::LazyLock, time::Duration};

use mesh_control::{command::Command, store::Store, token::JoinToken};
use mesh_dns::index::Index;
use mesh_gossip::{Config, Expected, Gossip, GossipKey, Keyring, Member, Timings, seal::Sealer};
use mesh_types::{ClusterId, Epoch, NodeId, NodeNumber, TaskId};

/// One of them.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&[u8]),
    /// Good input, for the fuzzer to begin with.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them. `cargo xtask fuzz` knows their names.
pub(crate) const TARGETS: &[Target] = &[
    Target { name: "gossip", run: gossip, seeds: gossip_seeds },
    Target { name: "raft", run: mesh_raft::fuzz::call, seeds: mesh_raft::fuzz::examples },
    Target { name: "commands", run: commands, seeds: command_seeds },
    Target { name: "rpc", run: meshd::rpc::fuzz::message, seeds: meshd::rpc::fuzz::examples },
    Target { name: "frames", run: meshd::rpc::fuzz::frames, seeds: frame_seeds },
    Target { name: "api", run: api, seeds: api_seeds },
    Target { name: "config", run: config, seeds: config_seeds },
    Target { name: "text", run: text, seeds: text_seeds },
    Target { name: "dns-query", run: dns_query, seeds: dns_seeds },
    Target { name: "dns-upstream", run: dns_upstream, seeds: upstream_seeds },
    Target { name: "template", run: template, seeds: template_seeds },
    Target { name: "log", run: mesh_executor::fuzz::log_line, seeds: log_seeds },
];

fn text_of(seeds: &[&str]) -> Vec<Vec<u8>> {
    seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect()
}

/// Parts, each behind its length in one byte.
fn parts(mut data: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some((length, rest)) = data.split_first() {
        let (part, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        parts.push(part);
        data = rest;
    }
    parts
}

fn joined(parts: &[Vec<u8>]) -> Vec<u8> {
    let part = |part: &Vec<u8>| [&[part.len() as u8], &part[..]].concat();
    parts.iter().flat_map(part).collect()
}

fn member(number: u64) -> Member {
    Member {
        number: NodeNumber::new(number).expect("a number"),
        id: NodeId::from_bits(number.into()),
        address: SocketAddr::from(([192, 0, 2, number as u8], 7946)),
        bump: 1,
    }
}

fn keys() -> Keyring {
    Keyring::new(GossipKey { epoch: Epoch::new(1).expect("an epoch"), secret: [7; 32] })
}

const CLUSTER: ClusterId = ClusterId::from_bits(5);
const MEMBERS: std::ops::RangeInclusive<u64> = 1..=3;

/// Datagrams to a member, as they come and sealed by another one, and calls to compare notes.
/// Whatever they say, only those that the store knows are members.
fn gossip(data: &[u8]) {
    let identity = member(1);
    let config = Config { identity, cluster: CLUSTER, keys: keys(), timings: Timings::LAN };
    let mut now = Duration::from_secs(1);
    let mut gossip = Gossip::new(config, now, [1; 32]);
    let expected: BTreeMap<_, _> = MEMBERS
        .map(member)
        .map(|of| (of.number, Expected { id: of.id, address: of.address }))
        .collect();
    gossip.set_members(now, expected.clone());
    let mut sealer = Sealer::new(CLUSTER, keys(), [3; 16]);
    for (n, part) in parts(data).into_iter().enumerate() {
        now += Duration::from_millis(20);
        match n % 4 {
            0 => drop(gossip.handle_datagram(now, part)),
            1 => drop(gossip.handle_sync(now, NodeId::from_bits(2), part)),
            _ => {
                let sealed = sealer.seal(part).expect("one byte says how long it is");
                let _ = gossip.handle_datagram(now, &sealed);
            }
        }
        gossip.handle_timer(now);
        while gossip.poll_transmit().is_some() {}
        while gossip.poll_event().is_some() {}
    }
    for view in gossip.members() {
        let of = expected.get(&view.member.number).expect("nobody else is a member");
        assert_eq!(of.id, view.member.id);
    }
}

/// What three members say to each other.
fn gossip_seeds() -> Vec<Vec<u8>> {
    let mut now = Duration::from_secs(1);
    let mut all: Vec<_> = MEMBERS
        .map(|number| {
            let config = Config {
                identity: member(number),
                cluster: CLUSTER,
                keys: keys(),
                timings: Timings::LAN,
            };
            let mut gossip = Gossip::new(config, now, [number as u8; 32]);
            let expected = MEMBERS.map(member);
            gossip.set_members(
                now,
                expected
                    .map(|of| (of.number, Expected { id: of.id, address: of.address }))
                    .collect(),
            );
            gossip
        })
        .collect();
    let (mut seeds, mut opener) = (Vec::new(), Sealer::new(CLUSTER, keys(), [9; 16]));
    for _ in 0..40 {
        now += Duration::from_millis(50);
        let mut sent = Vec::new();
        for gossip in &mut all {
            gossip.handle_timer(now);
            while let Some(datagram) = gossip.poll_transmit() {
                sent.push(datagram);
            }
            while let Some(call) = gossip.poll_sync() {
                seeds.push(joined(&[Vec::new(), call.request]));
            }
        }
        for (to, datagram) in sent {
            if let Ok(plain) = opener.open(&datagram) {
                seeds.push(joined(&[datagram.clone(), Vec::new(), plain]));
            }
            if let Some(gossip) = all.iter_mut().find(|of| of.identity().address == to) {
                let _ = gossip.handle_datagram(now, &datagram);
            }
        }
    }
    seeds.truncate(200);
    seeds
}

/// Commands one after the other, as they are in the log.
fn commands(data: &[u8]) {
    let mut rest = data;
    let next = std::iter::from_fn(|| {
        let mut reader = rest;
        let command: Command = rmp_serde::from_read(&mut reader).ok()?;
        rest = reader;
        Some(command)
    });
    mesh_control::fuzz::commands(next.take(16));
}

fn command_seeds() -> Vec<Vec<u8>> {
    let named = |commands: Vec<Command>| {
        commands
            .iter()
            .flat_map(|command| rmp_serde::to_vec_named(command).expect("it encodes"))
            .collect()
    };
    mesh_control::fuzz::examples().into_iter().map(named).collect()
}

fn frame_seeds() -> Vec<Vec<u8>> {
    vec![[&[3, 0, 0, 0, 2][..], b"ab", &[0, 0, 0, 0], &[0, 0, 1, 1]].concat()]
}

fn api(data: &[u8]) {
    static STORE: LazyLock<Store> = LazyLock::new(Store::default);
    meshd::api::fuzz::body(&STORE, data);
}

fn api_seeds() -> Vec<Vec<u8>> {
    let of = |kind: u8, text: &str| [&[kind], text.as_bytes()].concat();
    vec![
        of(0, include_str!("../seeds/service.json")),
        of(1, include_str!("../seeds/network.json")),
        of(2, r#"{"Name":"n","Role":"worker","Availability":"drain","Labels":{"a":"b"}}"#),
        of(3, include_str!("../seeds/init.json")),
        of(4, r#"{"JoinToken":"SWMTKN-1-x","RemoteAddrs":["192.0.2.1:2377"],"AdvertiseAddr":""}"#),
    ]
}

fn config(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        meshd::config::fuzz(text);
    }
}

/// The example, with its keys set.
fn config_seeds() -> Vec<Vec<u8>> {
    let example = include_str!("../../../dist/meshd.toml");
    let keys = example.lines().filter_map(|line| line.strip_prefix("#").or(Some(line)));
    let keys: Vec<_> = keys.map(str::trim).filter(|line| line.contains(" = ")).collect();
    keys.iter().map(|key| key.as_bytes().to_vec()).chain([keys.join("\n").into_bytes()]).collect()
}

/// Small grammars, the first byte says which.
fn text(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    match kind % 4 {
        0 => {
            if let Ok(token) = text.parse::<JoinToken>() {
                assert_eq!(token.to_string(), text, "a token has one spelling");
            }
        }
        1 => meshd::api::fuzz::filters(text),
        2 => meshd::rpc::fuzz::path(text),
        _ => mesh_dns::fuzz::name(text.as_bytes()),
    }
}

fn text_seeds() -> Vec<Vec<u8>> {
    let token = JoinToken::new(b"a root", [9; 16]).to_string();
    text_of(&[
        &format!("0{token}"),
        r#"1{"label":{"a=b":true},"name":["web"]}"#,
        "2/raft/append",
        "34.3.2.1.in-addr.arpa",
    ])
    .into_iter()
    .map(|mut seed| {
        seed[0] -= b'0';
        seed
    })
    .collect()
}

fn index() -> &'static Index {
    static INDEX: LazyLock<Index> = LazyLock::new(|| Index::new(&mesh_dns::fuzz::snapshot()));
    &INDEX
}

fn dns_query(data: &[u8]) {
    // Two that are attached, and a stranger.
    for task in [1000, 1001, 7].map(TaskId::from_bits) {
        mesh_dns::fuzz::query(index(), task, data);
    }
}

/// A query as dig sends it.
fn query(name: &str, kind: u8, edns: bool) -> Vec<u8> {
    let mut query = vec![0x12, 0x34, 1, 0x20, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)];
    for label in name.split('.').filter(|label| !label.is_empty()) {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, kind, 0, 1]);
    if edns {
        query.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    }
    query
}

fn dns_seeds() -> Vec<Vec<u8>> {
    let names = ["web", "tasks.web.front", "_80._tcp.web", "11.0.0.10.in-addr.arpa", "a.pages", ""];
    let kinds = [1, 28, 12, 33, 255, 6];
    names.iter().flat_map(|name| kinds.map(|kind| query(name, kind, kind != 28))).collect()
}

fn dns_upstream(data: &[u8]) {
    if let [query, reply, ..] = parts(data)[..] {
        mesh_dns::fuzz::upstream(query, reply);
    }
}

fn upstream_seeds() -> Vec<Vec<u8>> {
    let query = query("example.com", 1, true);
    let mut reply = query[..query.len() - 11].to_vec();
    reply[2] = 0x81;
    reply[7] = 1;
    reply[11] = 0;
    reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
    vec![joined(&[query, reply])]
}

fn template(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        meshctl::fuzz::template(text);
    }
}

fn template_seeds() -> Vec<Vec<u8>> {
    text_of(&[
        "table {{.ID}}\\t{{.Name}}",
        r#"{{range $i, $p := .Ports}}{{if gt $i 0}}, {{end}}{{$p | upper}}{{else}}-{{end}}"#,
        r#"{{with .Spec}}{{json .Labels}}{{index .Labels "x"}}{{end}}{{/* x */}}"#,
        r#"{{define "t"}}{{.}}{{end}}{{template "t" .Name}}{{printf "%5.2f|%-8q" 1.5 .ID}}"#,
        r#"{{truncate .ID 2}}{{pad .Name 1 2}}{{join .Ports "/"}}{{.Label "a"}}"#,
    ])
}

fn log_seeds() -> Vec<Vec<u8>> {
    text_of(&[r#"{"log":"a line\n","stream":"stderr","time":"2026-01-02T03:04:05.678Z"}"#])
}
