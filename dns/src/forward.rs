//! Outside names: the query goes to the node's own resolvers, byte for byte but for its id.
//!
//! Each query has a socket of its own, so port and id are both random (RFC 5452), connected, so
//! that the kernel drops what comes from elsewhere.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use hickory_proto::{
    op::{Header, MessageType, Query, ResponseCode},
    serialize::binary::{BinDecodable, BinDecoder},
};
use rand::RngExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use crate::{answer::Transport, netns};

/// How long one resolver is waited for.
pub const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(2);
/// How many of the node's resolvers are tried.
pub const MAX_UPSTREAMS: usize = 3;

/// Asks one resolver after the other, from the node's namespace or from another. `None` if none
/// gave an answer.
pub async fn forward(
    query: &[u8],
    upstreams: &[SocketAddr],
    transport: Transport,
    from: Option<&Path>,
) -> Option<Vec<u8>> {
    let mut refusal = None;
    for upstream in upstreams.iter().take(MAX_UPSTREAMS) {
        let asked = async {
            match transport {
                Transport::Udp => ask_udp(query, *upstream, from).await,
                Transport::Tcp => ask_tcp(query, *upstream, from).await,
            }
        };
        match timeout(UPSTREAM_TIMEOUT, asked).await {
            Ok(Ok((reply, ResponseCode::ServFail | ResponseCode::Refused))) => {
                // Another may know better; if none does, this is the answer.
                refusal.get_or_insert(reply);
            }
            Ok(Ok((reply, _))) => return Some(reply),
            Ok(Err(error)) => {
                tracing::debug!(address = %upstream, %error, "upstream resolver failed")
            }
            Err(_) => tracing::debug!(address = %upstream, "upstream resolver did not answer"),
        }
    }
    refusal
}

type Answer = (Vec<u8>, ResponseCode);

async fn ask_udp(query: &[u8], upstream: SocketAddr, from: Option<&Path>) -> io::Result<Answer> {
    let socket = match from {
        Some(netns) => UdpSocket::from_std(netns::connect_udp(netns.to_owned(), upstream).await?)?,
        None => {
            let local: SocketAddr = match upstream {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let socket = UdpSocket::bind(local).await?;
            socket.connect(upstream).await?;
            socket
        }
    };
    let asked = Asked::new(query)?;
    socket.send(&asked.query).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // What does not fit the question is a forgery or late: wait on.
        if let Some(answer) = asked.accept(&buffer[..length]) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(query: &[u8], upstream: SocketAddr, from: Option<&Path>) -> io::Result<Answer> {
    let mut stream = match from {
        Some(netns) => {
            let within = UPSTREAM_TIMEOUT;
            let stream = netns::connect_tcp(netns.to_owned(), upstream, within).await?;
            TcpStream::from_std(stream)?
        }
        None => TcpStream::connect(upstream).await?,
    };
    let asked = Asked::new(query)?;
    write_message(&mut stream, &asked.query).await?;
    loop {
        let reply = read_message(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if let Some(answer) = asked.accept(&reply) {
            return Ok(answer);
        }
    }
}

/// Reads one message of DNS over TCP (RFC 1035 section 4.2.2); `None` at the end of the stream.
pub(crate) async fn read_message(
    stream: &mut (impl AsyncReadExt + Unpin),
) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes one message of DNS over TCP, in one piece.
pub(crate) async fn write_message(
    stream: &mut (impl AsyncWriteExt + Unpin),
    message: &[u8],
) -> io::Result<()> {
    let length = u16::try_from(message.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a message beyond 65,535 bytes"))?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

/// A query on its way, and what its answer must look like.
struct Asked {
    query: Vec<u8>,
    client_id: [u8; 2],
    id: u16,
    question: Query,
}

impl Asked {
    fn new(query: &[u8]) -> io::Result<Self> {
        let question = question_of(query).map(|(_, question)| question);
        let (Some(question), Some(client_id)) = (question, query.first_chunk::<2>()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a query"));
        };
        let id: u16 = rand::rng().random();
        let mut query = query.to_vec();
        query[..2].copy_from_slice(&id.to_be_bytes());
        Ok(Self { query, client_id: *client_id, id, question })
    }

    /// The answer under the asker's id, if it is one to this query.
    fn accept(&self, reply: &[u8]) -> Option<Answer> {
        let (header, question) = question_of(reply)?;
        let fits = header.metadata.id == self.id
            && header.metadata.message_type == MessageType::Response
            && question == self.question;
        fits.then(|| {
            let mut reply = reply.to_vec();
            reply[..2].copy_from_slice(&self.client_id);
            (reply, header.metadata.response_code)
        })
    }
}

/// Header and question alone: the rest is for the asker to judge.
fn question_of(message: &[u8]) -> Option<(Header, Query)> {
    let mut decoder = BinDecoder::new(message);
    let header = Header::read(&mut decoder).ok()?;
    if header.counts.queries != 1 {
        return None;
    }
    let question = Query::read(&mut decoder).ok()?;
    Some((header, question))
}

/// An answer is taken if it is one, and goes out under the asker's number.
#[cfg(fuzzing)]
pub(crate) fn fuzz_accept(query: &[u8], reply: &[u8]) {
    let Ok(asked) = Asked::new(query) else { return };
    let mut reply = reply.to_vec();
    if let Some(id) = reply.get_mut(..2) {
        id.copy_from_slice(&asked.id.to_be_bytes());
    }
    if let Some((answer, _)) = asked.accept(&reply) {
        assert_eq!(answer[..2], query[..2], "the answer has the query's number");
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::Message,
        rr::{Name, RecordType},
    };
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 0x1234;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.to_vec().unwrap()
    }

    #[test]
    fn an_answer_must_fit_its_query() {
        let asked = Asked::new(&query("example.test.")).unwrap();
        let mut good = asked.query.clone();
        good[2] |= 0x80;
        let (reply, code) = asked.accept(&good).unwrap();
        assert_eq!((&reply[..2], code), (&[0x12, 0x34][..], ResponseCode::NoError));

        assert!(asked.accept(&asked.query).is_none(), "an echo is no answer");
        let mut other_id = good.clone();
        other_id[0] ^= 1;
        assert!(asked.accept(&other_id).is_none());
        let mut other_name = good.clone();
        other_name[14] ^= 1;
        assert!(asked.accept(&other_name).is_none());
        assert!(asked.accept(&good[..11]).is_none());
    }

    proptest! {
        #[test]
        fn garbage_is_no_answer(garbage in prop::collection::vec(any::<u8>(), 0..600)) {
            let asked = Asked::new(&query("example.test.")).unwrap();
            prop_assert!(asked.accept(&garbage).is_none());
        }
    }
}
