//! The fast path says what the slow one says, hickory's messages being the judge.

use hickory_proto::{
    op::{Edns, Message, Query},
    rr::{DNSClass, Name, RecordType},
};
use proptest::prelude::*;

use super::*;
use crate::answer::{Decision, Transport, answer as slow, tests as sample};

fn fast(index: &Index, query: &[u8], turn: usize) -> Option<Vec<u8>> {
    let mut reply = [0; REPLY_MAX];
    let length = answer(index, index.asker(sample::asker()), query, turn, &mut reply)?;
    Some(reply[..length].to_vec())
}

/// Both ways' answers to a query; that of the fast way, if it has one, is the slow one's.
fn check(index: &Index, query: &[u8], turn: usize) -> Option<Message> {
    let fast = fast(index, query, turn)?;
    let slow = slow(index, sample::asker(), query, Transport::Udp, turn);
    let Decision::Reply(slow) = slow else { panic!("the slow way says {slow:?}") };
    let message = Message::from_vec(&fast).unwrap();
    assert_eq!(message, Message::from_vec(&slow).unwrap());
    let edns = Message::from_vec(query).unwrap().edns.map_or(512, |edns| edns.max_payload());
    assert!(fast.len() <= usize::from(edns.clamp(512, 1232)));
    Some(message)
}

fn query(name: &str, kind: RecordType, payload: Option<u16>) -> Message {
    let mut message = Message::query();
    let labels = name.split('.').filter(|label| !label.is_empty()).map(str::as_bytes);
    let mut name = Name::from_labels(labels).unwrap();
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message.edns = payload.map(|payload| {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        edns
    });
    message
}

/// `many` has 200 addresses of each kind.
fn index() -> Index {
    let mut snapshot = sample::snapshot();
    snapshot.services.push(sample::service(2, 16, "many", &[], None));
    for n in 1..=200_u64 {
        let id = 1000 + n;
        snapshot.endpoints.push(sample::endpoint(2, id, 16, "many", &format!("10.0.1.{n}")));
        snapshot.endpoints.push(sample::endpoint(2, 300 + id, 16, "many", &format!("fd00::{n}")));
    }
    snapshot.services[0].aliases.push("*.pages".to_owned());
    Index::new(&snapshot)
}

#[test]
fn what_is_ours_takes_the_fast_way() {
    let index = index();
    for (name, answers) in [
        ("web.", 1),
        ("WeB.FRONT.", 1),
        ("tasks.web.", 2),
        ("rr.back.end.", 2),
        ("idle.", 0),
        ("nosuch.front.", 0),
        ("nosuch.", 0),
        ("_http._tcp.web.", 0),
    ] {
        for payload in [None, Some(1232), Some(65_535), Some(0)] {
            let bytes = query(name, RecordType::A, payload).to_vec().unwrap();
            let reply = check(&index, &bytes, 1).unwrap_or_else(|| panic!("{name}: the slow way"));
            assert_eq!(reply.answers.len(), answers, "{name}");
        }
    }
    let none = query("web.", RecordType::AAAA, None).to_vec().unwrap();
    assert!(check(&index, &none, 1).unwrap().answers.is_empty());
}

#[test]
fn what_is_not_plain_takes_the_slow_way() {
    let index = index();
    let plain = query("web.", RecordType::A, None).to_vec().unwrap();
    let with = |at: usize, byte: u8| {
        let mut bytes = plain.clone();
        bytes[at] = byte;
        fast(&index, &bytes, 0)
    };
    assert!(fast(&index, &plain, 0).is_some());
    assert!(with(2, 0x80).is_none(), "a response");
    assert!(with(2, 0x28).is_none(), "an update");
    for count in [4, 5, 6, 7, 8, 9, 10, 11] {
        assert!(with(count, 2).is_none(), "counts");
    }
    assert!(with(12, 0xc0).is_none(), "a pointer");
    assert!(fast(&index, &[&plain[..], &[0]].concat(), 0).is_none(), "more than a question");
    assert!(fast(&index, &plain[..plain.len() - 1], 0).is_none(), "less than one");
    let mut chaos = query("web.", RecordType::A, None);
    chaos.queries[0].query_class = DNSClass::CH;
    assert!(fast(&index, &chaos.to_vec().unwrap(), 0).is_none());
    for (name, kind) in [
        ("web.", RecordType::MX),
        ("example.test.", RecordType::A),
        (".", RecordType::A),
        ("2.0.0.10.in-addr.arpa.", RecordType::A),
    ] {
        let bytes = query(name, kind, None).to_vec().unwrap();
        assert!(fast(&index, &bytes, 0).is_none(), "{name} {kind}");
    }
    let mut cookie = query("web.", RecordType::A, Some(1232));
    let option = hickory_proto::rr::rdata::opt::EdnsOption::Unknown(10, vec![0; 8]);
    cookie.edns.as_mut().unwrap().options_mut().insert(option);
    assert!(fast(&index, &cookie.to_vec().unwrap(), 0).is_none());
}

fn names() -> impl Strategy<Value = String> {
    prop_oneof![
        proptest::sample::select(vec![
            "web.",
            "web.front.",
            "www.",
            "shared.",
            "tasks.shared.",
            "rr.",
            "many.",
            "tasks.many.",
            "many.back.end.",
            "idle.",
            "secret.",
            "tasks.nosuch.",
            "_a._b.web.",
            "_a.",
            "web.1.",
            "front.",
            "a.pages.",
            "a.b.pages.front.",
            "localhost.",
            "back.end.",
            "x.back.end.",
            "example.test.",
            "web.example.test.",
            "arpa.",
        ])
        .prop_map(str::to_owned),
        "[a-zA-Z0-9_-]{1,63}\\.([a-z]{1,9}\\.){0,3}(front\\.|back\\.end\\.)?",
    ]
}

proptest! {
    #[test]
    fn both_ways_say_the_same(
        name in names(),
        upper in any::<u64>(),
        aaaa: bool,
        payload in prop_oneof![Just(None), any::<u16>().prop_map(Some)],
        flags: [u8; 2],
        id: u16,
        turn: usize,
    ) {
        let turned = |(at, letter): (usize, char)| match upper >> (at % 64) & 1 {
            0 => letter,
            _ => letter.to_ascii_uppercase(),
        };
        let name: String = name.chars().enumerate().map(turned).collect();
        let kind = if aaaa { RecordType::AAAA } else { RecordType::A };
        let mut bytes = query(&name, kind, payload).to_vec().unwrap();
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        bytes[2] = flags[0] & 0x07;
        bytes[3] = flags[1] & 0xf0;
        check(&index(), &bytes, turn);
    }

    #[test]
    fn garbage_takes_the_slow_way_or_is_right(
        mut garbage in prop::collection::vec(any::<u8>(), 0..600),
        question: bool,
        turn: usize,
    ) {
        if question && garbage.len() >= 12 {
            garbage[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        }
        check(&index(), &garbage, turn);
    }

    #[test]
    fn a_changed_byte_changes_both_ways(
        name in names(),
        payload in prop_oneof![Just(None), Just(Some(1232))],
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        turn: usize,
    ) {
        let mut bytes = query(&name, RecordType::A, payload).to_vec().unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        check(&index(), &bytes, turn);
    }
}
