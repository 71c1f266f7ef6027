//! A synchronous netlink socket and the few encodings that rtnetlink needs.
//!
//! Own code instead of a crate, since one message must carry a veth's two ends, the peer's
//! namespace by descriptor and BPF filters, and since sockets are opened on threads that visit
//! other namespaces. Formats: `include/uapi/linux/netlink.h`; parsing checks every length.

#![allow(unsafe_code, reason = "system calls on sockets")]

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_MIN_TYPE: u16 = 0x10;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLMSGERR_ATTR_MSG: u16 = 1;
const HEADER: usize = 16;
/// The kernel fills dumps by up to 32 KiB a read (`netlink_dump`).
const RECEIVE: usize = 64 * 1024;
const DUMP_RETRIES: usize = 8;

/// What the kernel answered, with its own words where it has any (extended ACK).
#[derive(Debug, thiserror::Error)]
#[error("{source}{}{message}", if message.is_empty() { "" } else { ": " })]
pub struct NetlinkError {
    /// The error number.
    #[source]
    pub source: io::Error,
    /// The kernel's explanation; may be empty.
    pub message: String,
}

impl From<io::Error> for NetlinkError {
    fn from(source: io::Error) -> Self {
        Self { source, message: String::new() }
    }
}

impl NetlinkError {
    pub(crate) fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }
}

/// A request under construction.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    buffer: Vec<u8>,
}

impl Request {
    pub(crate) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut buffer = vec![0; HEADER];
        buffer[4..6].copy_from_slice(&kind.to_ne_bytes());
        buffer[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        buffer.extend_from_slice(fixed);
        let mut request = Self { buffer };
        request.align();
        request
    }

    fn align(&mut self) {
        self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
    }

    pub(crate) fn attr(mut self, kind: u16, payload: &[u8]) -> Self {
        self.push(kind, payload);
        self
    }

    pub(crate) fn u8(self, kind: u16, value: u8) -> Self {
        self.attr(kind, &[value])
    }

    pub(crate) fn u16_be(self, kind: u16, value: u16) -> Self {
        self.attr(kind, &value.to_be_bytes())
    }

    pub(crate) fn u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// A string with its terminating zero.
    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    fn push(&mut self, kind: u16, payload: &[u8]) {
        let len = (4 + payload.len()) as u16;
        self.buffer.extend_from_slice(&len.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(payload);
        self.align();
    }

    /// A nested attribute, begun with `fixed` bytes.
    pub(crate) fn nest(mut self, kind: u16, fixed: &[u8], fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.buffer.len();
        self.push(kind | NLA_F_NESTED, fixed);
        let mut filled = fill(self);
        let len = (filled.buffer.len() - start) as u16;
        filled.buffer[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        filled
    }

    fn finish(&mut self, sequence: u32, flags: u16) -> &[u8] {
        let len = self.buffer.len() as u32;
        let had = u16::from_ne_bytes([self.buffer[6], self.buffer[7]]);
        self.buffer[0..4].copy_from_slice(&len.to_ne_bytes());
        self.buffer[6..8].copy_from_slice(&(had | flags).to_ne_bytes());
        self.buffer[8..12].copy_from_slice(&sequence.to_ne_bytes());
        &self.buffer
    }
}

/// One message of an answer: what follows the netlink header.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) body: Vec<u8>,
}

/// A socket, bound to the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket of a netlink protocol (`NETLINK_ROUTE`, `NETLINK_NETFILTER`).
    pub(crate) fn open(protocol: i32) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no memory is passed; the descriptor is checked before it is owned.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is open and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let socket = Self { fd, sequence: 0, buffer: vec![0; RECEIVE] };
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            // Only better messages depend on these.
            let _ = socket.set(libc::SOL_NETLINK, option, &1i32.to_ne_bytes());
        }
        // The kernel answers before `send` returns; a missing answer is a bug, not a wait.
        let mut timeout = [0u8; 16];
        timeout[..8].copy_from_slice(&5i64.to_ne_bytes());
        socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout)?;
        Ok(socket)
    }

    /// A socket for links, addresses, routes and filters.
    pub(crate) fn route() -> io::Result<Self> {
        Self::open(libc::NETLINK_ROUTE)
    }

    fn set(&self, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
        // SAFETY: pointer and length describe `value`.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                value.as_ptr().cast(),
                value.len() as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn send(&mut self, request: &mut Request, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request.finish(self.sequence, flags);
        // SAFETY: pointer and length describe `bytes`.
        let sent =
            unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(self.sequence) }
    }

    fn receive(&mut self) -> io::Result<usize> {
        loop {
            // SAFETY: pointer and length describe `self.buffer`. MSG_TRUNC returns the true length.
            let got = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    self.buffer.as_mut_ptr().cast(),
                    self.buffer.len(),
                    libc::MSG_TRUNC,
                )
            };
            let Ok(got) = usize::try_from(got) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            if got > self.buffer.len() {
                return Err(io::Error::other("netlink answer larger than the buffer"));
            }
            return Ok(got);
        }
    }

    /// A request that changes something: waits for the acknowledgement.
    pub(crate) fn change(&mut self, mut request: Request) -> Result<(), NetlinkError> {
        let sequence = self.send(&mut request, NLM_F_ACK)?;
        self.collect(sequence, false).map(|_| ())
    }

    /// A request with one answer.
    pub(crate) fn get(&mut self, mut request: Request) -> Result<Option<Reply>, NetlinkError> {
        let sequence = self.send(&mut request, NLM_F_ACK)?;
        Ok(self.collect(sequence, false)?.0.into_iter().next())
    }

    /// A request for all objects of a kind.
    pub(crate) fn dump(&mut self, request: &Request) -> Result<Vec<Reply>, NetlinkError> {
        for _ in 0..DUMP_RETRIES {
            let sequence = self.send(&mut request.clone(), NLM_F_DUMP)?;
            let (replies, interrupted) = self.collect(sequence, true)?;
            if !interrupted {
                return Ok(replies);
            }
        }
        Err(io::Error::other("the objects kept changing during the dump").into())
    }

    fn collect(&mut self, sequence: u32, dump: bool) -> Result<(Vec<Reply>, bool), NetlinkError> {
        let mut replies = Vec::new();
        let mut interrupted = false;
        loop {
            let got = self.receive()?;
            let mut rest = &self.buffer[..got];
            while let Some((kind, flags, seq, body, next)) = split_message(rest) {
                rest = next;
                if seq != sequence {
                    continue;
                }
                interrupted |= flags & NLM_F_DUMP_INTR != 0;
                match kind {
                    NLMSG_DONE if dump => return Ok((replies, interrupted)),
                    NLMSG_ERROR => {
                        return match error_of(body) {
                            None => Ok((replies, interrupted)),
                            Some(error) => Err(error),
                        };
                    }
                    kind if kind >= NLMSG_MIN_TYPE => {
                        replies.push(Reply { body: body.to_vec() });
                    }
                    _ => {}
                }
            }
        }
    }
}

type Parts<'a> = (u16, u16, u32, &'a [u8], &'a [u8]);

/// The first message of `bytes`: type, flags, sequence, body, what follows.
fn split_message(bytes: &[u8]) -> Option<Parts<'_>> {
    let len = u32_at(bytes, 0)? as usize;
    let kind = u16_at(bytes, 4)?;
    let flags = u16_at(bytes, 6)?;
    let sequence = u32_at(bytes, 8)?;
    let body = bytes.get(HEADER..len)?;
    let next = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, flags, sequence, body, next))
}

fn error_of(body: &[u8]) -> Option<NetlinkError> {
    let code = u32_at(body, 0)? as i32;
    if code == 0 {
        return None;
    }
    // `struct nlmsgerr` is the code and the request's header; with CAP_ACK attributes follow.
    let message = attrs(body.get(4 + HEADER..).unwrap_or_default())
        .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
        .map(|(_, text)| text_of(text))
        .unwrap_or_default();
    Some(NetlinkError { source: io::Error::from_raw_os_error(-code), message })
}

/// The attributes in `bytes`, ending at the first malformed one.
pub(crate) fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let payload = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Text up to its terminating zero.
pub(crate) fn text_of(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes)
        .map(|text| text.to_string_lossy().into_owned())
        .unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nests_have_their_length() {
        let mut request = Request::new(16, 0, &[0; 4])
            .nest(18, &[], |r| r.text(1, "veth").nest(2, &[9, 9, 9, 9], |r| r.u32(3, 7)));
        let bytes = request.finish(1, 0).to_vec();
        let (_, _, _, body, rest) = split_message(&bytes).unwrap();
        assert!(rest.is_empty());
        let outer: Vec<_> = attrs(&body[4..]).collect();
        assert_eq!(outer.len(), 1);
        let inner: Vec<_> = attrs(outer[0].1).collect();
        assert_eq!(inner[0], (1, &b"veth\0"[..]));
        assert_eq!(inner[1].0, 2);
        assert_eq!(attrs(&inner[1].1[4..]).collect::<Vec<_>>(), [(3, &7u32.to_ne_bytes()[..])]);
    }

    proptest! {
        #[test]
        fn garbage_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            let mut budget = 100;
            while let Some((_, _, _, body, next)) = split_message(rest) {
                let _ = attrs(body).count();
                let _ = error_of(body);
                rest = next;
                budget -= 1;
                prop_assert!(budget > 0);
            }
        }
    }
}
