//! Datagrams in batches: one system call brings many, one takes the answers away.
//!
//! What came is in memory that meshd may hold too (the *journal*, a memfd): a resolver that is
//! killed between the two calls leaves it there, and its successor answers it. Whoever answered
//! clears it; so a query is answered at least once.

#![allow(unsafe_code, reason = "recvmmsg(2), sendmmsg(2) and a mapping for their buffers")]

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr::NonNull,
};

use mesh_types::TaskId;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Datagrams at a time: with more the first answer waits longer, and calls get no cheaper.
pub(crate) const BATCH: usize = 64;
/// The longest query: larger datagrams than this are not to be expected (RFC 9715), and no query
/// needs them.
pub(crate) const QUERY_MAX: usize = 1232;
/// A query that is longer is cut here, and seen to be.
const SLOT: usize = QUERY_MAX + 8;
/// Bytes of a journal.
pub(crate) const JOURNAL_BYTES: usize = size_of::<Received>().next_multiple_of(4096);

/// Changes with [`Received`]: a resolver of another version may have written the journal.
const LAYOUT: u64 = 1;

/// What came, by slot. Of a journal everything may be garbage.
#[repr(C)]
struct Received {
    /// [`LAYOUT`], or the rest is not what it seems.
    layout: u64,
    /// Whose queries these are.
    task: [u64; 2],
    /// Lengths as `recvmmsg` writes them; zero: nothing to be answered.
    headers: [libc::mmsghdr; BATCH],
    vectors: [libc::iovec; BATCH],
    from: [libc::sockaddr_in6; BATCH],
    queries: [[u8; SLOT]; BATCH],
}

/// The buffers of all sockets: whoever serves a socket uses them from `receive` to `send` without
/// waiting for anything in between.
pub(crate) struct Batch {
    received: NonNull<Received>,
    count: usize,
    to_send: Box<ToSend>,
    sending: usize,
}

#[repr(C)]
struct ToSend {
    headers: [libc::mmsghdr; BATCH],
    vectors: [libc::iovec; BATCH],
    replies: [[u8; QUERY_MAX]; BATCH],
}

// SAFETY: the mapping belongs to this value alone, and pointers in it lead into it or into the
// value's own box.
unsafe impl Send for Batch {}

/// What becomes of a query.
pub(crate) enum Fate {
    /// The first bytes of the reply are to be sent back.
    Reply(usize),
    /// Nothing is said, or somebody else says it.
    Done,
}

impl Batch {
    /// Buffers of this process alone: they die with it.
    pub(crate) fn private() -> io::Result<Self> {
        let len = NonZeroUsize::MIN.saturating_add(JOURNAL_BYTES - 1);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, that nothing else knows.
        let at = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_PRIVATE) }?;
        Ok(Self::over(at.cast()))
    }

    /// Buffers in a journal, with what an earlier resolver left in it.
    pub(crate) fn shared(journal: BorrowedFd<'_>) -> io::Result<Self> {
        let size = nix::sys::stat::fstat(journal)?.st_size;
        if u64::try_from(size).unwrap_or(0) < JOURNAL_BYTES as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the journal has {size} bytes, not {JOURNAL_BYTES}"),
            ));
        }
        let len = NonZeroUsize::MIN.saturating_add(JOURNAL_BYTES - 1);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping. meshd holds the file only to hand it on.
        let at = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, journal, 0) }?;
        Ok(Self::over(at.cast()))
    }

    fn over(received: NonNull<Received>) -> Self {
        // SAFETY: all of it is integers, pointers and arrays of them, for which zero is a value.
        let to_send = unsafe { Box::<ToSend>::new_zeroed().assume_init() };
        let mut batch = Self { received, count: 0, to_send, sending: 0 };
        let received = batch.received();
        if received.layout != LAYOUT {
            received.layout = LAYOUT;
            for header in &mut received.headers {
                header.msg_len = 0;
            }
        }
        // Pointers of another process mean nothing here.
        for slot in 0..BATCH {
            received.vectors[slot].iov_base = received.queries[slot].as_mut_ptr().cast();
            received.vectors[slot].iov_len = SLOT;
            let header = &mut received.headers[slot];
            header.msg_hdr.msg_name = (&raw mut received.from[slot]).cast();
            header.msg_hdr.msg_iov = &raw mut received.vectors[slot];
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = std::ptr::null_mut();
            header.msg_hdr.msg_controllen = 0;
        }
        batch
    }

    fn received(&mut self) -> &mut Received {
        // SAFETY: mapped for as long as this value lives, zeroed at first, aligned to a page, and
        // every bit pattern of integers and pointers is a value.
        unsafe { self.received.as_mut() }
    }

    /// Takes what is there off a socket's queue, as much as there is room for.
    ///
    /// # Errors
    /// Of `recvmmsg`: `WouldBlock` if there is nothing.
    pub(crate) fn receive(&mut self, task: TaskId, socket: impl AsFd) -> io::Result<usize> {
        let bits = task.bits();
        let received = self.received();
        received.task = [(bits >> 64) as u64, bits as u64];
        for header in &mut received.headers {
            header.msg_len = 0;
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
        }
        let fd = socket.as_fd().as_raw_fd();
        let headers = received.headers.as_mut_ptr();
        // SAFETY: as many headers as are said, each with the buffers that `over` gave it.
        let count = unsafe {
            libc::recvmmsg(
                fd,
                headers,
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        self.count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        Ok(self.count)
    }

    /// What an earlier resolver left, if it left anything, is the batch now: gives whose it is.
    pub(crate) fn left_over(&mut self) -> Option<TaskId> {
        let received = self.received();
        let [high, low] = received.task;
        let last = received.headers.iter().rposition(|header| header.msg_len > 0)?;
        for header in &mut received.headers {
            let name = header.msg_hdr.msg_namelen as usize;
            if name > size_of::<libc::sockaddr_in6>() {
                header.msg_len = 0;
            }
        }
        self.count = last + 1;
        Some(TaskId::from_bits(u128::from(high) << 64 | u128::from(low)))
    }

    /// Decides about every query of the batch, in the order in which they came: the function gets
    /// the query (cut after [`QUERY_MAX`] bytes, if it is longer), whom it is from, and where to
    /// write the reply.
    pub(crate) fn each(
        &mut self,
        mut decide: impl FnMut(&[u8], &Source<'_>, &mut [u8; QUERY_MAX]) -> Fate,
    ) {
        // SAFETY: as in `received`; this value's other parts are not in the mapping.
        let received = unsafe { self.received.as_mut() };
        let to_send = &mut *self.to_send;
        self.sending = 0;
        for slot in 0..self.count.min(BATCH) {
            let (header, from) = (&received.headers[slot], &mut received.from[slot]);
            let len = (header.msg_len as usize).min(QUERY_MAX + 1);
            let query = received.queries[slot].get(..len).unwrap_or_default();
            let reply = &mut to_send.replies[self.sending];
            let fate = decide(query, &Source(from), reply);
            if let Fate::Reply(len) = fate {
                to_send.vectors[self.sending] = libc::iovec {
                    iov_base: reply.as_mut_ptr().cast(),
                    iov_len: len.min(QUERY_MAX),
                };
                let vector = &raw mut to_send.vectors[self.sending];
                let out = &mut to_send.headers[self.sending].msg_hdr;
                out.msg_name = std::ptr::from_mut(from).cast();
                out.msg_namelen = header.msg_hdr.msg_namelen;
                out.msg_iov = vector;
                out.msg_iovlen = 1;
                self.sending += 1;
            }
        }
    }

    /// Sends the replies, and is done with the batch. What cannot be sent is lost, as datagrams
    /// are.
    pub(crate) fn send(&mut self, socket: impl AsFd) {
        let fd = socket.as_fd().as_raw_fd();
        let mut next = 0;
        while next < self.sending {
            let headers = &mut self.to_send.headers[next..self.sending];
            let (at, count) = (headers.as_mut_ptr(), headers.len() as libc::c_uint);
            // SAFETY: as many headers as are said; `each` pointed them at buffers that live on.
            let sent = unsafe { libc::sendmmsg(fd, at, count, libc::MSG_DONTWAIT as _) };
            // The one at which it stopped is left away.
            next += usize::try_from(sent).unwrap_or(0).max(1);
        }
        self.forget();
    }

    /// Is done with the batch.
    pub(crate) fn forget(&mut self) {
        let count = self.count.min(BATCH);
        for header in &mut self.received().headers[..count] {
            header.msg_len = 0;
        }
        (self.count, self.sending) = (0, 0);
    }
}

/// Whom a datagram is from.
pub(crate) struct Source<'a>(&'a libc::sockaddr_in6);

impl Source<'_> {
    /// `None` for what is no internet address.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match i32::from(self.0.sin6_family) {
            libc::AF_INET => {
                // SAFETY: the kernel wrote a `sockaddr_in` where there is room for more; both begin
                // with the family, and every bit pattern of both is a value.
                let v4 = unsafe { &*std::ptr::from_ref(self.0).cast::<libc::sockaddr_in>() };
                let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
                Some((ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                let ip = Ipv6Addr::from(self.0.sin6_addr.s6_addr);
                Some((ip, u16::from_be(self.0.sin6_port)).into())
            }
            _ => None,
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // SAFETY: mapped by this value, with this length; nothing borrows it any more.
        let _ = unsafe { munmap(self.received.cast(), JOURNAL_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, time::Duration};

    use super::*;
    use crate::handover::journal;

    fn sockets() -> (UdpSocket, UdpSocket) {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        (server, client)
    }

    /// Says every query again, but for those that begin with 0.
    fn echo(batch: &mut Batch, from: SocketAddr) {
        batch.each(|query, source, reply| {
            assert_eq!(source.address(), Some(from));
            reply[..query.len()].copy_from_slice(query);
            if query[0] == 0 { Fate::Done } else { Fate::Reply(query.len()) }
        });
    }

    fn receive(client: &UdpSocket) -> Option<Vec<u8>> {
        let mut buffer = [0; 2048];
        let length = client.recv(&mut buffer).ok()?;
        Some(buffer[..length].to_vec())
    }

    #[test]
    fn each_query_gets_its_own_answer() {
        let (server, client) = sockets();
        let task = TaskId::from_bits(7);
        let mut batch = Batch::private().unwrap();
        let nothing = batch.receive(task, &server).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        for round in 1..=3_u8 {
            for number in 0..=BATCH as u8 {
                client.send(&[number, round]).unwrap();
            }
            assert_eq!(batch.receive(task, &server).unwrap(), BATCH);
            echo(&mut batch, client.local_addr().unwrap());
            batch.send(&server);
            for number in 1..BATCH as u8 {
                assert_eq!(receive(&client), Some(vec![number, round]));
            }
            // One more than a batch waits for the next one.
            assert_eq!(batch.receive(task, &server).unwrap(), 1);
            echo(&mut batch, client.local_addr().unwrap());
            batch.send(&server);
            assert_eq!(receive(&client), Some(vec![BATCH as u8, round]));
        }
        assert_eq!(receive(&client), None);
    }

    #[test]
    fn a_long_query_is_seen_to_be_long() {
        let (server, client) = sockets();
        let mut batch = Batch::private().unwrap();
        for length in [QUERY_MAX, QUERY_MAX + 1, 9000] {
            client.send(&vec![1; length]).unwrap();
        }
        assert_eq!(batch.receive(TaskId::from_bits(1), &server).unwrap(), 3);
        let mut lengths = Vec::new();
        batch.each(|query, _, _| {
            lengths.push(query.len());
            Fate::Done
        });
        assert_eq!(lengths, [QUERY_MAX, QUERY_MAX + 1, QUERY_MAX + 1]);
    }

    #[test]
    fn what_a_dead_resolver_took_is_answered_by_the_next() {
        let (server, client) = sockets();
        let (task, journal) = (TaskId::from_bits(u128::MAX - 5), journal().unwrap());
        let mut first = Batch::shared(journal.as_fd()).unwrap();
        assert_eq!(first.left_over(), None);
        for number in 1..=9 {
            client.send(&[number]).unwrap();
        }
        assert_eq!(first.receive(task, &server).unwrap(), 9);
        drop(first);

        let mut second = Batch::shared(journal.as_fd()).unwrap();
        assert_eq!(second.left_over(), Some(task));
        echo(&mut second, client.local_addr().unwrap());
        second.send(&server);
        for number in 1..=9 {
            assert_eq!(receive(&client), Some(vec![number]));
        }
        // It is answered, and that is known.
        drop(second);
        assert_eq!(Batch::shared(journal.as_fd()).unwrap().left_over(), None);
    }

    #[test]
    fn garbage_in_a_journal_does_no_harm() {
        let (server, client) = sockets();
        let journal = journal().unwrap();
        let mut batch = Batch::shared(journal.as_fd()).unwrap();
        {
            let received = batch.received();
            for header in &mut received.headers {
                header.msg_len = u32::MAX;
                header.msg_hdr.msg_namelen = u32::MAX;
            }
            received.headers[3].msg_hdr.msg_namelen = 28;
        }
        drop(batch);
        let mut batch = Batch::shared(journal.as_fd()).unwrap();
        assert!(batch.left_over().is_some());
        batch.each(|query, source, _| {
            assert!(query.len() <= QUERY_MAX + 1 && source.address().is_none());
            Fate::Reply(usize::MAX)
        });
        batch.send(&server);
        assert_eq!(receive(&client), None);
        let short = nix::sys::memfd::memfd_create("short", nix::sys::memfd::MFdFlags::empty());
        assert!(Batch::shared(short.unwrap().as_fd()).is_err());
    }
}
