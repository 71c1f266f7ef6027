//! Streams of messages within an HTTP body: a length of four bytes (big endian), then msgpack.

use std::marker::PhantomData;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    pin::Pin,
    task::{Context, Poll},
};
use thiserror::Error;
use tokio::sync::mpsc;

/// A message may have this much, in bytes, unless the reader says otherwise.
pub const FRAME_LIMIT: usize = 16 << 20;

/// Why a stream broke.
#[derive(Debug, Error)]
pub enum FrameError {
    /// Longer than the reader takes.
    #[error("a message of {length} bytes came, at most {limit} are taken")]
    TooLong {
        /// As announced.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// It ended within a message.
    #[error("the stream ended within a message")]
    Torn,
    /// Not what was expected.
    #[error("a message cannot be decoded: {0}")]
    Decode(#[from] rmp_serde::decode::Error),
    /// Not representable.
    #[error("a message cannot be encoded: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
    /// The connection.
    #[error("the stream broke: {0}")]
    Transport(String),
    /// The other side is gone.
    #[error("the other side closed the stream")]
    Closed,
}

/// One message with its length.
pub(crate) fn encode<T: Serialize>(message: &T) -> Result<Bytes, FrameError> {
    let body = rmp_serde::to_vec_named(message)?;
    let length = u32::try_from(body.len())
        .map_err(|_| FrameError::TooLong { length: body.len(), limit: u32::MAX as usize })?;
    let mut out = BytesMut::with_capacity(4 + body.len());
    out.put_u32(length);
    out.put_slice(&body);
    Ok(out.freeze())
}

/// Splits messages off a buffer that grows as bytes come.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    buffer: BytesMut,
}

impl Splitter {
    pub(crate) fn push(&mut self, data: &[u8]) {
        self.buffer.extend_from_slice(data);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The next whole message. The announced length is judged before anything is kept for it.
    pub(crate) fn next(&mut self, limit: usize) -> Result<Option<Bytes>, FrameError> {
        let Some(length) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > limit {
            return Err(FrameError::TooLong { length, limit });
        }
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        self.buffer.advance(4);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }
}

type Incoming = Pin<Box<dyn Body<Data = Bytes, Error = hyper::Error> + Send>>;

/// Reads messages from a body.
pub struct FrameReader<T> {
    body: Incoming,
    splitter: Splitter,
    limit: usize,
    of: PhantomData<fn() -> T>,
}

impl<T> std::fmt::Debug for FrameReader<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameReader").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl<T: DeserializeOwned> FrameReader<T> {
    pub(crate) fn new(body: hyper::body::Incoming, limit: usize) -> Self {
        let body: Incoming = Box::pin(body);
        Self { body, splitter: Splitter::default(), limit, of: PhantomData }
    }

    /// Goes on reading messages of another type.
    pub(crate) fn then<U>(self) -> FrameReader<U> {
        let Self { body, splitter, limit, .. } = self;
        FrameReader { body, splitter, limit, of: PhantomData }
    }

    /// The next message; `None` at the end. Safe to drop and call again (in a `select!`).
    ///
    /// # Errors
    /// [`FrameError`]; after one, the stream is of no use.
    pub async fn next(&mut self) -> Result<Option<T>, FrameError> {
        loop {
            if let Some(message) = self.splitter.next(self.limit)? {
                return Ok(Some(rmp_serde::from_slice(&message)?));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.splitter.push(data);
                    }
                }
                Some(Err(error)) => return Err(FrameError::Transport(error.to_string())),
                None if self.splitter.is_empty() => return Ok(None),
                None => return Err(FrameError::Torn),
            }
        }
    }
}

/// Sends messages into a body; the body ends when the writer is dropped. Waits while the other side
/// is slow.
#[derive(Debug)]
pub struct FrameWriter<T> {
    sender: mpsc::Sender<Bytes>,
    of: PhantomData<fn(T)>,
}

impl<T> Clone for FrameWriter<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), of: PhantomData }
    }
}

impl<T: Serialize> FrameWriter<T> {
    /// Sends one.
    ///
    /// # Errors
    /// [`FrameError::Closed`] once the other side is gone.
    pub async fn send(&self, message: &T) -> Result<(), FrameError> {
        self.sender.send(encode(message)?).await.map_err(|_| FrameError::Closed)
    }

    /// Goes on sending messages of another type.
    pub(crate) fn then<U>(self) -> FrameWriter<U> {
        FrameWriter { sender: self.sender, of: PhantomData }
    }

    /// Returns once the other side is gone.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// The body that a [`FrameWriter`] fills.
#[derive(Debug)]
pub(crate) struct FrameBody {
    receiver: mpsc::Receiver<Bytes>,
}

/// A few messages may wait: the flow control of HTTP/2 does the rest.
const WAITING: usize = 4;

pub(crate) fn channel<T>() -> (FrameWriter<T>, FrameBody) {
    let (sender, receiver) = mpsc::channel(WAITING);
    (FrameWriter { sender, of: PhantomData }, FrameBody { receiver })
}

impl Body for FrameBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.receiver.poll_recv(context).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_survive_any_cut_of_the_stream(
            messages: Vec<Vec<u8>>, cuts in proptest::collection::vec(1usize..40, 1..50),
        ) {
            let wire: Vec<u8> =
                messages.iter().flat_map(|m| encode(m).unwrap().to_vec()).collect();
            let (mut splitter, mut out, mut rest) = (Splitter::default(), Vec::new(), &wire[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                splitter.push(now);
                while let Some(message) = splitter.next(1 << 20).unwrap() {
                    out.push(rmp_serde::from_slice::<Vec<u8>>(&message).unwrap());
                }
                rest = later;
            }
            prop_assert_eq!(out, messages);
            prop_assert!(splitter.is_empty());
        }

        #[test]
        fn any_bytes_are_split_or_refused(bytes: Vec<u8>) {
            let mut splitter = Splitter::default();
            splitter.push(&bytes);
            while let Ok(Some(message)) = splitter.next(64) {
                prop_assert!(message.len() <= 64);
            }
        }
    }

    #[test]
    fn an_announced_length_beyond_the_limit_is_refused_at_once() {
        let mut splitter = Splitter::default();
        splitter.push(&u32::MAX.to_be_bytes());
        assert!(matches!(splitter.next(FRAME_LIMIT), Err(FrameError::TooLong { .. })));
    }
}
