//! Tests of the cache: what is remembered, for how long, and under which question alone.

use std::net::Ipv4Addr;

use hickory_proto::{
    op::{Edns, Message, Query, ResponseCode},
    rr::{
        Name, RData, Record as Rr, RecordType,
        rdata::{A, SOA},
    },
};
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn query(text: &str, id: u16) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(text), RecordType::A));
    message.to_vec().unwrap()
}

/// The answer to a query, with what `fill` puts into it.
fn reply(to: &[u8], fill: impl Fn(&mut Message)) -> Vec<u8> {
    let asked = Message::from_vec(to).unwrap();
    let mut reply = Message::response(asked.metadata.id, asked.metadata.op_code);
    reply.queries = asked.queries;
    fill(&mut reply);
    reply.to_vec().unwrap()
}

fn with_address(ttl: u32) -> impl Fn(&mut Message) {
    move |message| {
        let data = RData::A(A(Ipv4Addr::new(203, 0, 113, 9)));
        let owner = message.queries[0].name.clone();
        message.add_answer(Rr::from_rdata(owner, ttl, data));
    }
}

fn with_soa(ttl: u32, minimum: u32, code: ResponseCode) -> impl Fn(&mut Message) {
    move |message| {
        message.metadata.response_code = code;
        let soa = SOA::new(name("test."), name("test."), 1, 1, 1, 1, minimum);
        message.authorities.push(Rr::from_rdata(name("test."), ttl, RData::SOA(soa)));
    }
}

/// For how many seconds a reply is remembered.
fn kept(fill: impl Fn(&mut Message)) -> u64 {
    let (query, now) = (query("www.example.test.", 7), Instant::now());
    let key = CacheKey::new(None, false, &query).unwrap();
    let mut cache = Cache::default();
    cache.insert(key.clone(), &query, &reply(&query, fill), now);
    let after =
        |seconds: &u64| cache.find(&key, &query, now + Duration::from_secs(*seconds)).is_none();
    (0..10_000).find(after).unwrap()
}

#[test]
fn answers_are_kept_as_long_as_they_may_be() {
    assert_eq!(kept(with_address(60)), 60);
    assert_eq!(kept(with_address(0)), 0);
    assert_eq!(kept(with_address(90_000)), 3600);
    assert_eq!(kept(with_address(1 << 31)), 0);
    assert_eq!(kept(with_soa(60, 30, ResponseCode::NXDomain)), 30);
    assert_eq!(kept(with_soa(20, 30, ResponseCode::NoError)), 20);
    assert_eq!(kept(with_soa(9000, 9000, ResponseCode::NXDomain)), 300);
    assert_eq!(kept(|_| {}), 0, "nobody says for how long there is nothing");
    assert_eq!(kept(with_soa(60, 30, ResponseCode::ServFail)), 0);
    assert_eq!(
        kept(|m| {
            with_address(60)(m);
            m.metadata.truncation = true;
        }),
        0
    );
    // The shortest counts.
    assert_eq!(
        kept(|m| {
            with_address(60)(m);
            with_address(9)(m);
        }),
        9
    );
}

#[test]
fn an_answer_grows_old_and_is_the_askers() {
    let (first, now) = (query("www.example.test.", 7), Instant::now());
    let key = CacheKey::new(None, false, &first).unwrap();
    let mut cache = Cache::default();
    cache.insert(key, &first, &reply(&first, with_address(60)), now);
    let second = query("WWW.example.TEST.", 9);
    let key = CacheKey::new(None, false, &second).unwrap();
    let found = cache.find(&key, &second, now + Duration::from_millis(21_900)).unwrap();
    assert_eq!(&found[12..12 + 18], &second[12..12 + 18], "its own letters");
    let found = Message::from_vec(&found).unwrap();
    assert_eq!((found.metadata.id, found.answers[0].ttl), (9, 39));
}

#[test]
fn another_question_has_another_answer() {
    let plain = query("www.example.test.", 7);
    let key = |query: &[u8]| CacheKey::new(None, false, query).unwrap();
    let mut edns = Message::from_vec(&plain).unwrap();
    edns.edns = Some(Edns::new());
    let with_edns = edns.to_vec().unwrap();
    edns.edns.as_mut().unwrap().set_dnssec_ok(true);
    let with_do = edns.to_vec().unwrap();
    let mut unrecursed = plain.clone();
    unrecursed[2] &= !1;
    let mut unchecked = plain.clone();
    unchecked[3] |= 0x10;
    let task = |n| CacheKey::new(Some(TaskId::from_bits(n)), false, &plain).unwrap();
    let all = [
        key(&plain),
        key(&query("example.test.", 7)),
        key(&with_edns),
        key(&with_do),
        key(&unrecursed),
        key(&unchecked),
        CacheKey::new(None, true, &plain).unwrap(),
        task(0),
        task(1),
    ];
    for (at, one) in all.iter().enumerate() {
        assert!(all[at + 1..].iter().all(|other| other != one), "{at}");
    }
    assert_eq!(key(&plain), key(&query("WWW.EXAMPLE.TEST.", 8)));
}

#[test]
fn an_answer_to_something_else_is_not_remembered() {
    let (asked, now) = (query("www.example.test.", 7), Instant::now());
    let key = CacheKey::new(None, false, &asked).unwrap();
    let mut cache = Cache::default();
    let other = query("xxx.example.test.", 7);
    cache.insert(key.clone(), &asked, &reply(&other, with_address(60)), now);
    // Records of other names beside the answer are given on, and never taken for answers.
    let poisoned = reply(&asked, |message| {
        with_address(60)(message);
        let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 66)));
        message.additionals.push(Rr::from_rdata(name("bank.test."), 900, data));
    });
    cache.insert(key.clone(), &asked, &poisoned, now);
    assert_eq!(cache.find(&key, &asked, now).unwrap()[2..], poisoned[2..]);
    let bank = query("bank.test.", 1);
    assert!(cache.find(&CacheKey::new(None, false, &bank).unwrap(), &bank, now).is_none());
    // A record that ends beyond the message.
    let whole = reply(&asked, with_address(60));
    let mut cache = Cache::default();
    cache.insert(key.clone(), &asked, &whole[..whole.len() - 1], now);
    assert!(cache.find(&key, &asked, now).is_none());
}

#[test]
fn it_is_bounded() {
    let now = Instant::now();
    let mut cache = Cache::default();
    for number in 0..ENTRIES_MAX + 500 {
        let query = query(&format!("n{number}.example.test."), 7);
        let key = CacheKey::new(None, false, &query).unwrap();
        for _ in 0..2 {
            cache.insert(key.clone(), &query, &reply(&query, with_address(60)), now);
        }
    }
    assert_eq!((cache.entries.len(), cache.order.len()), (ENTRIES_MAX, ENTRIES_MAX));
    let large = |message: &mut Message| (0..2000).for_each(|_| with_address(60)(message));
    for number in 0..200 {
        let query = query(&format!("large{number}.example.test."), 7);
        let key = CacheKey::new(None, true, &query).unwrap();
        cache.insert(key, &query, &reply(&query, large), now);
    }
    let bytes: usize = cache.entries.iter().map(|(key, entry)| entry.bytes(key)).sum();
    assert!(bytes == cache.bytes && bytes <= BYTES_MAX && cache.entries.len() == cache.order.len());
    cache.clear();
    assert_eq!((cache.entries.len(), cache.bytes), (0, 0));
}

proptest! {
    #[test]
    fn garbage_does_no_harm(
        garbage in prop::collection::vec(any::<u8>(), 0..300),
        counts: [u8; 3],
    ) {
        let (asked, now) = (query("a.test.", 7), Instant::now());
        let key = CacheKey::new(None, false, &asked).unwrap();
        let mut bytes = asked.clone();
        bytes[2] |= 0x80;
        (bytes[7], bytes[9], bytes[11]) = (counts[0] % 4, counts[1] % 4, counts[2] % 4);
        bytes.extend(garbage);
        let mut cache = Cache::default();
        cache.insert(key.clone(), &asked, &bytes, now);
        let _ = cache.find(&key, &asked, now + Duration::from_secs(1));
    }
}
