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

use crate::{
    index::{Asker, Index, Lookup, Reverse},
    names::MAX_ADDRESSES,
    wire::{HEADER_LEN, Key},
};

/// Seconds for which an answer about an internal name may be remembered, the answer that there is
/// none included (RFC 2308 section 5).
pub const TTL_SECONDS: u32 = 5;
/// UDP without EDNS carries this much (RFC 1035 section 4.2.1).
pub(crate) const UDP_BYTES: u16 = 512;
/// UDP with EDNS carries no more than this, whatever is asked for: a small question gives no large
/// answer, and what does not fit is asked for over TCP.
pub(crate) const UDP_BYTES_MAX: u16 = 1232;

/// What names of addresses end in.
pub(crate) const ARPA: &[u8] = b"\x04arpa";

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
    let asker = index.asker(task);
    match resolve(index, asker, question) {
        Found::Records(records) => reply.records(records, turn),
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
    NoSuchName,
    Outside,
}

fn resolve(index: &Index, asker: &Asker, question: &Query) -> Found {
    let Some(key) = Key::from_labels(question.name.iter()) else { return Found::Outside };
    if key.as_bytes().ends_with(ARPA) {
        return resolve_reverse(index, asker, question);
    }
    match index.lookup(asker, key.as_bytes()) {
        Lookup::Addresses(records) => Found::Records(
            records
                .addresses()
                .filter_map(|address| match (address, question.query_type) {
                    (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(RData::A(A(v4))),
                    (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => {
                        Some(RData::AAAA(AAAA(v6)))
                    }
                    _ => None,
                })
                .collect(),
        ),
        Lookup::NoSuchName => Found::NoSuchName,
        Lookup::Outside => Found::Outside,
    }
}

fn resolve_reverse(index: &Index, asker: &Asker, question: &Query) -> Found {
    let Ok(net) = question.name.parse_arpa_name() else { return Found::Outside };
    if net.prefix_len() < net.max_prefix_len() {
        // A name above addresses of ours exists, and has no records.
        let ours = index.is_internal_address(net.network());
        return if ours { Found::Records(Vec::new()) } else { Found::Outside };
    }
    match index.reverse(asker, net.addr()) {
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
        let Ok(whole) = reply.to_vec() else { return Decision::Drop };
        if whole.len() <= usize::from(limit) {
            return Decision::Reply(whole);
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
