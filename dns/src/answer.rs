//! One query, one decision.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR, SOA},
    },
};
use mesh_types::TaskId;

use crate::index::{Index, Lookup, Reverse};

/// Seconds for which an answer about an internal name may be remembered, the answer that there is
/// none included (RFC 2308 section 5).
pub const TTL_SECONDS: u32 = 5;
/// UDP without EDNS carries this much (RFC 1035 section 4.2.1).
const UDP_BYTES: u16 = 512;
/// UDP with EDNS carries no more than this, whatever is asked for: tasks ask over their loopback.
const UDP_BYTES_MAX: u16 = 4096;
/// More addresses than this are no use to anyone; with them an answer fits a TCP message.
const MAX_ADDRESSES: usize = 2048;
/// An AAAA record whose name is a pointer (RFC 1035 section 4.1.4).
const ANSWER_BYTES_MAX: usize = 28;
const HEADER_LEN: usize = 12;

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
    let reply = Reply { message: &message, question, transport, serial: index.revision().get() };
    if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return reply.empty(ResponseCode::BADVERS);
    }
    if !matches!(question.query_class, DNSClass::IN | DNSClass::ANY) {
        return reply.empty(ResponseCode::Refused);
    }
    match resolve(index, task, question) {
        Found::Records(records) => reply.records(records, turn),
        Found::NoSuchName => reply.negative(ResponseCode::NXDomain),
        Found::Outside if index.may_forward(task) => Decision::Forward,
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
    NoSuchName,
    Outside,
}

fn resolve(index: &Index, task: TaskId, question: &Query) -> Found {
    let Some(name) = key(&question.name) else { return Found::Outside };
    if name.ends_with(".arpa") {
        return resolve_reverse(index, task, question);
    }
    match index.lookup(task, &name) {
        Lookup::Addresses(addresses) => Found::Records(
            addresses
                .iter()
                .filter_map(|address| match (address, question.query_type) {
                    (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(RData::A(A(*v4))),
                    (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => {
                        Some(RData::AAAA(AAAA(*v6)))
                    }
                    _ => None,
                })
                .collect(),
        ),
        Lookup::NoSuchName => Found::NoSuchName,
        Lookup::Outside => Found::Outside,
    }
}

fn resolve_reverse(index: &Index, task: TaskId, question: &Query) -> Found {
    let Ok(net) = question.name.parse_arpa_name() else { return Found::Outside };
    if net.prefix_len() < net.max_prefix_len() {
        // A name above addresses of ours exists, and has no records.
        let ours = index.is_internal_address(net.network());
        return if ours { Found::Records(Vec::new()) } else { Found::Outside };
    }
    match index.reverse(task, net.addr()) {
        Reverse::Name(name) => Found::Records(
            Name::from_ascii(format!("{name}."))
                .ok()
                .filter(|_| matches!(question.query_type, RecordType::PTR | RecordType::ANY))
                .map(|name| RData::PTR(PTR(name)))
                .into_iter()
                .collect(),
        ),
        Reverse::NoSuchName => Found::NoSuchName,
        Reverse::Outside => Found::Outside,
    }
}

/// A name as the index has it. `None` for names that no service can have: a label with a dot in it
/// must not be taken for two.
fn key(name: &Name) -> Option<String> {
    let mut key = String::with_capacity(64);
    for label in name.iter() {
        let text = std::str::from_utf8(label).ok().filter(|text| !text.contains('.'))?;
        if !key.is_empty() {
            key.push('.');
        }
        key.push_str(text);
    }
    key.make_ascii_lowercase();
    (!key.is_empty()).then_some(key)
}

struct Reply<'a> {
    message: &'a Message,
    question: &'a Query,
    transport: Transport,
    serial: u64,
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
            .map(|data| Record::from_rdata(name.clone(), TTL_SECONDS, data))
            .collect();
        self.finish(reply)
    }

    /// No such name, or no such records: with the SOA that says for how long (RFC 2308 section 2).
    fn negative(&self, code: ResponseCode) -> Decision {
        let mut reply = self.start(code);
        reply.metadata.authoritative = true;
        let zone = self.question.name.trim_to(1);
        let ttl = TTL_SECONDS.cast_signed();
        let serial = (self.serial & u64::from(u32::MAX)) as u32;
        let soa = SOA::new(zone.clone(), zone.clone(), serial, ttl, ttl, ttl, TTL_SECONDS);
        reply.authorities.push(Record::from_rdata(zone, TTL_SECONDS, RData::SOA(soa)));
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
        loop {
            let Ok(bytes) = reply.to_vec() else { return Decision::Drop };
            let excess = bytes.len().saturating_sub(usize::from(limit));
            if excess == 0 || reply.answers.is_empty() {
                return Decision::Reply(bytes);
            }
            let keep = reply.answers.len().saturating_sub(excess.div_ceil(ANSWER_BYTES_MAX));
            reply.answers.truncate(keep);
            reply.metadata.truncation = true;
        }
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
