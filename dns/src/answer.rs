//! One query, one decision.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR, SOA, SRV},
    },
};
use mesh_types::TaskId;

use crate::{
    index::{Asker, Index, Lookup, Reverse, Target},
    names::MAX_ADDRESSES,
    reverse::{ARPA, ReverseName},
    wire::{HEADER_LEN, Key},
};

/// UDP without EDNS carries this much (RFC 1035 section 4.2.1).
pub(crate) const UDP_BYTES: u16 = 512;
/// UDP with EDNS carries no more than this, whatever is asked for: a small question gives no large
/// answer, and what does not fit is asked for over TCP.
pub(crate) const UDP_BYTES_MAX: u16 = 1232;

/// What names of this host end in (RFC 6761 section 6.3).
pub(crate) const LOCALHOST: &[u8] = b"\x09localhost";
/// More SRV records than this are no use to anyone; with them an answer fits a TCP message.
const MAX_TARGETS: usize = 256;

/// How the query came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// An answer that is too long is cut and marked so.
    Udp,
    /// An answer may have 65,535 bytes.
    Tcp,
}

/// What to do with a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Send this back.
    Reply(Vec<u8>),
    /// Ask the node's resolvers.
    Forward,
    /// Not a query: nothing to say, and nobody to say it to.
    Drop,
}

/// Decides about a query of a task. `turn` is a number that differs from query to query: it rotates
/// lists of addresses.
#[must_use]
pub fn answer(
    index: &Index,
    task: TaskId,
    query: &[u8],
    transport: Transport,
    turn: usize,
) -> Decision {
    let Some(header) = Header::read(query) else { return Decision::Drop };
    if header.is_response {
        return Decision::Drop;
    }
    if header.op_code != OpCode::Query {
        return Decision::Reply(header.error(ResponseCode::NotImp));
    }
    if header.questions != 1 {
        return Decision::Reply(header.error(ResponseCode::FormErr));
    }
    let Ok(message) = Message::from_vec(query) else {
        return Decision::Reply(header.error(ResponseCode::FormErr));
    };
    let [question] = message.queries.as_slice() else {
        return Decision::Reply(header.error(ResponseCode::FormErr));
    };
    let reply = Reply { message: &message, question, transport, index };
    if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return reply.empty(ResponseCode::BADVERS);
    }
    if !matches!(question.query_class, DNSClass::IN | DNSClass::ANY) {
        return reply.empty(ResponseCode::Refused);
    }
    let asker = index.asker(task);
    match resolve(index, asker, question) {
        Found::Records(records) => reply.records(records, turn),
        Found::Targets(targets) => reply.targets(targets, turn),
        Found::NoSuchName => reply.negative(ResponseCode::NXDomain),
        Found::Outside if asker.forward => Decision::Forward,
        Found::Outside => reply.empty(ResponseCode::Refused),
    }
}

/// The answer to a query that could not be forwarded.
#[must_use]
pub fn failure(query: &[u8]) -> Option<Vec<u8>> {
    Header::read(query).map(|header| match Message::from_vec(query) {
        Ok(message) if message.queries.len() == 1 => {
            let mut reply = Message::response(header.id, OpCode::Query);
            reply.metadata = Metadata::response_from_request(&message.metadata);
            reply.metadata.recursion_available = true;
            reply.metadata.response_code = ResponseCode::ServFail;
            reply.queries = message.queries;
            reply.to_vec().unwrap_or_else(|_| header.error(ResponseCode::ServFail))
        }
        _ => header.error(ResponseCode::ServFail),
    })
}

/// What can be read of a message that is otherwise broken.
struct Header {
    id: u16,
    is_response: bool,
    op_code: OpCode,
    recursion_desired: bool,
    questions: u16,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<HEADER_LEN>()?;
        let [id0, id1, flags, _, count0, count1, ..] = *header;
        Some(Self {
            id: u16::from_be_bytes([id0, id1]),
            is_response: flags & 0x80 != 0,
            op_code: OpCode::from_u8(flags >> 3 & 0xf),
            recursion_desired: flags & 1 != 0,
            questions: u16::from_be_bytes([count0, count1]),
        })
    }

    /// An error with nothing but a header, as for a query whose question cannot be read.
    fn error(&self, code: ResponseCode) -> Vec<u8> {
        let [id0, id1] = self.id.to_be_bytes();
        let flags = 0x80 | u8::from(self.op_code) << 3 | u8::from(self.recursion_desired);
        vec![id0, id1, flags, 0x80 | code.low(), 0, 0, 0, 0, 0, 0, 0, 0]
    }
}

enum Found {
    Records(Vec<RData>),
    Targets(Vec<Target>),
    NoSuchName,
    Outside,
}

fn resolve(index: &Index, asker: &Asker, question: &Query) -> Found {
    let Some(key) = Key::from_labels(question.name.iter()) else { return Found::Outside };
    let key = key.as_bytes();
    if key.ends_with(ARPA) {
        return resolve_reverse(index, asker, key, question.query_type);
    }
    if key.ends_with(LOCALHOST) {
        let both = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        return Found::Records(addresses(both.into_iter(), question.query_type));
    }
    if matches!(question.query_type, RecordType::SRV | RecordType::ANY)
        && let Some(targets) = index.targets(asker, key)
    {
        return Found::Targets(targets);
    }
    match index.lookup(asker, key) {
        Lookup::Addresses(records) => {
            Found::Records(addresses(records.addresses(), question.query_type))
        }
        // A resolver in the task asks about top-level domains, nobody about services like this.
        Lookup::NoSuchName if index.is_top_level(key) && is_about_zones(question.query_type) => {
            Found::Outside
        }
        Lookup::NoSuchName => Found::NoSuchName,
        Lookup::Outside => Found::Outside,
    }
}

fn is_about_zones(kind: RecordType) -> bool {
    matches!(kind, RecordType::NS | RecordType::SOA | RecordType::DS | RecordType::DNSKEY)
}

/// Those of the addresses that a question of this type is about.
fn addresses(all: impl Iterator<Item = IpAddr>, kind: RecordType) -> Vec<RData> {
    let wanted = |address| match (address, kind) {
        (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(RData::A(A(v4))),
        (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(AAAA(v6))),
        _ => None,
    };
    all.filter_map(wanted).collect()
}

fn resolve_reverse(index: &Index, asker: &Asker, key: &[u8], kind: RecordType) -> Found {
    let Some(of) = ReverseName::read(key) else { return Found::Outside };
    if of.is_whole()
        && let Reverse::Name(name) = index.reverse(asker, of.address)
    {
        let name = Name::from_ascii(format!("{name}."));
        let records = name.ok().filter(|_| matches!(kind, RecordType::PTR | RecordType::ANY));
        return Found::Records(records.map(|name| RData::PTR(PTR(name))).into_iter().collect());
    }
    if index.has_addresses(&of) {
        // A name above addresses of ours exists, and has no records.
        let is_above = !of.is_whole() && !of.is_below;
        // What is above everybody's is not ours alone.
        if is_above && !of.is_private() {
            return Found::Outside;
        }
        return if is_above { Found::Records(Vec::new()) } else { Found::NoSuchName };
    }
    if of.is_private() { Found::NoSuchName } else { Found::Outside }
}

struct Reply<'a> {
    message: &'a Message,
    question: &'a Query,
    transport: Transport,
    index: &'a Index,
}

impl Reply<'_> {
    fn start(&self, code: ResponseCode) -> Message {
        let mut reply = Message::response(self.message.metadata.id, OpCode::Query);
        reply.metadata = Metadata::response_from_request(&self.message.metadata);
        reply.metadata.message_type = MessageType::Response;
        reply.metadata.recursion_available = true;
        reply.metadata.response_code = code;
        reply.queries.push(self.question.clone());
        if self.message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_BYTES_MAX);
            reply.edns = Some(edns);
        }
        reply
    }

    fn records(&self, mut records: Vec<RData>, turn: usize) -> Decision {
        if records.is_empty() {
            return self.negative(ResponseCode::NoError);
        }
        let by = turn % records.len();
        records.rotate_left(by);
        records.truncate(MAX_ADDRESSES);
        let mut reply = self.start(ResponseCode::NoError);
        reply.metadata.authoritative = true;
        let name = &self.question.name;
        reply.answers = records
            .into_iter()
            .map(|data| Record::from_rdata(name.clone(), self.index.ttl(), data))
            .collect();
        self.finish(reply)
    }

    /// SRV records, and the addresses of their targets.
    fn targets(&self, mut targets: Vec<Target>, turn: usize) -> Decision {
        if targets.is_empty() {
            return self.negative(ResponseCode::NoError);
        }
        let by = turn % targets.len();
        targets.rotate_left(by);
        targets.truncate(MAX_TARGETS);
        let mut reply = self.start(ResponseCode::NoError);
        reply.metadata.authoritative = true;
        let ttl = self.index.ttl();
        for Target { name, port, addresses: all } in targets {
            let Ok(name) = Name::from_ascii(format!("{name}.")) else { continue };
            // All alike: any of them is as good as another.
            let data = RData::SRV(SRV::new(0, 0, port, name.clone()));
            reply.answers.push(Record::from_rdata(self.question.name.clone(), ttl, data));
            for data in addresses(all.into_iter(), RecordType::ANY) {
                reply.additionals.push(Record::from_rdata(name.clone(), ttl, data));
            }
        }
        self.finish(reply)
    }

    /// No such name, or no such records: with the SOA that says for how long (RFC 2308 section 2).
    fn negative(&self, code: ResponseCode) -> Decision {
        let mut reply = self.start(code);
        reply.metadata.authoritative = true;
        let zone = self.question.name.trim_to(1);
        let seconds = self.index.ttl();
        let ttl = seconds.cast_signed();
        let serial = (self.index.revision().get() & u64::from(u32::MAX)) as u32;
        let soa = SOA::new(zone.clone(), zone.clone(), serial, ttl, ttl, ttl, seconds);
        reply.authorities.push(Record::from_rdata(zone, seconds, RData::SOA(soa)));
        self.finish(reply)
    }

    fn empty(&self, code: ResponseCode) -> Decision {
        self.finish(self.start(code))
    }

    /// Writes the message within the size that the asker can take. Addresses that do not fit are
    /// left away and the message marked: the asker comes back over TCP, or makes do with what it
    /// got.
    fn finish(&self, mut reply: Message) -> Decision {
        let limit = match self.transport {
            Transport::Tcp => u16::MAX,
            Transport::Udp => self
                .message
                .edns
                .as_ref()
                .map_or(UDP_BYTES, |edns| edns.max_payload().clamp(UDP_BYTES, UDP_BYTES_MAX)),
        };
        let Ok(whole) = reply.to_vec() else { return Decision::Drop };
        if whole.len() <= usize::from(limit) {
            return Decision::Reply(whole);
        }
        if !reply.additionals.is_empty() {
            // They are a courtesy (RFC 2181 section 9).
            reply.additionals.clear();
            return self.finish(reply);
        }
        reply.metadata.truncation = true;
        let all = std::mem::take(&mut reply.answers);
        // The most answers that fit: between `fit` and `too_many`.
        let (mut fit, mut too_many) = (0, all.len());
        let mut best = reply.to_vec();
        while too_many - fit > 1 {
            let middle = fit + (too_many - fit) / 2;
            reply.answers = all[..middle].to_vec();
            match reply.to_vec() {
                Ok(bytes) if bytes.len() <= usize::from(limit) => {
                    (fit, best) = (middle, Ok(bytes));
                }
                _ => too_many = middle,
            }
        }
        best.map_or(Decision::Drop, Decision::Reply)
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
pub(crate) mod tests;
