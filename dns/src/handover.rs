//! Sockets that outlive the process that serves them.
//!
//! meshd and the resolver both hold every socket of every task. While one of them is away the
//! other's duplicates keep the sockets bound: the kernel queues what tasks ask, and whoever comes
//! next takes the sockets over with the queue in them. The descriptors go with the first byte of a
//! frame of [`control`](crate::control) (`SCM_RIGHTS`, unix(7)), a UDP socket and a TCP listener
//! for each task that the frame names, in its order. An end that knows nothing of this reads the
//! frame just as well, and the kernel closes what it was sent.
//!
//! What a resolver has taken off a queue and not answered yet is in a [`journal`], which meshd
//! makes and gives to one resolver after the other.

#![allow(unsafe_code, reason = "owning the descriptors that a message brought")]

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use mesh_types::TaskId;
use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
    unistd::ftruncate,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::{
    batch::JOURNAL_BYTES,
    control::{self, MAX_FRAME},
};

/// Tasks whose sockets go with one frame. The kernel passes 253 descriptors at once.
pub const PER_FRAME: usize = 100;
const FDS_MAX: usize = 253;

/// Makes a journal: memory for the queries that a resolver is about to answer.
///
/// # Errors
/// Of `memfd_create` and `ftruncate`.
pub fn journal() -> io::Result<OwnedFd> {
    let journal = memfd_create("mesh-dns-journal", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&journal, JOURNAL_BYTES as i64)?;
    Ok(journal)
}

/// Whose sockets come with a frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketsOf {
    /// The task.
    pub task: TaskId,
    /// Its network namespace, in which they are.
    pub netns: PathBuf,
}

/// Both sockets of one task.
#[derive(Debug)]
pub struct Sockets {
    /// Its network namespace, in which they are.
    pub netns: PathBuf,
    /// The UDP socket.
    pub udp: OwnedFd,
    /// The TCP listener.
    pub tcp: OwnedFd,
}

impl Sockets {
    /// Their descriptors, in the order in which they are sent.
    #[must_use]
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.udp.as_fd(), self.tcp.as_fd()]
    }

    /// What came with a frame, by task.
    ///
    /// # Errors
    /// `InvalidData` if these are not two for each task.
    pub fn pair(of: Vec<SocketsOf>, fds: Vec<OwnedFd>) -> io::Result<Vec<(TaskId, Self)>> {
        if fds.len() != 2 * of.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} descriptors came for the sockets of {} tasks", fds.len(), of.len()),
            ));
        }
        let mut fds = fds.into_iter();
        let mut two = || fds.next().zip(fds.next());
        let paired = of.into_iter().filter_map(|SocketsOf { task, netns }| {
            let (udp, tcp) = two()?;
            Some((task, Self { netns, udp, tcp }))
        });
        Ok(paired.collect())
    }
}

/// Writes one frame, as [`control::write_frame`], and descriptors with it.
///
/// # Errors
/// As [`control::write_frame`].
pub async fn send(
    stream: &mut OwnedWriteHalf,
    value: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let frame = control::encode(value)?;
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let socket: &UnixStream = stream.as_ref();
    let sent = socket
        .async_io(Interest::WRITABLE, || {
            let rights = [ControlMessage::ScmRights(&numbers)];
            let rights = if numbers.is_empty() { &[] } else { &rights[..] };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let fd = socket.as_raw_fd();
            sendmsg::<()>(fd, &[IoSlice::new(&frame)], rights, flags, None).map_err(io::Error::from)
        })
        .await?;
    stream.write_all(frame.get(sent..).unwrap_or_default()).await
}

/// Reads one frame, as [`control::read_frame`], and the descriptors that came with it.
///
/// # Errors
/// As [`control::read_frame`].
pub async fn receive<T: DeserializeOwned>(
    stream: &mut OwnedReadHalf,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let (mut header, mut got, mut fds) = ([0; 4], 0, Vec::new());
    // Exactly the header, so that no other frame's descriptors are taken for this one's.
    while got < header.len() {
        let socket: &UnixStream = stream.as_ref();
        let rest = &mut header[got..];
        let read =
            socket.async_io(Interest::READABLE, || receive_some(socket, rest, &mut fds)).await?;
        if read == 0 {
            return Ok(None);
        }
        got += read;
    }
    let length = u32::from_be_bytes(header) as usize;
    if length > MAX_FRAME {
        return Err(control::too_long(length));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    serde_json::from_slice(&body)
        .map(|value| Some((value, fds)))
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn receive_some(socket: &UnixStream, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut slices = [IoSliceMut::new(into)];
    let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just made these descriptors for this message, and nothing
            // else in this process knows their numbers.
            fds.extend(numbers.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
        }
    }
    Ok(message.bytes)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn sockets() -> Sockets {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Sockets { netns: "/n".into(), udp: udp.into(), tcp: tcp.into() }
    }

    #[tokio::test]
    async fn descriptors_stay_with_their_frame() {
        let (left, right) = UnixStream::pair().unwrap();
        let (mut reader, _a) = left.into_split();
        let (_b, mut writer) = right.into_split();
        let many: Vec<_> = (0..PER_FRAME).map(|_| sockets()).collect();
        let fds: Vec<_> = many.iter().flat_map(Sockets::fds).collect();
        send(&mut writer, &1, &[]).await.unwrap();
        send(&mut writer, &2, &fds).await.unwrap();
        control::write_frame(&mut writer, &3).await.unwrap();
        send(&mut writer, &4, &fds[..2]).await.unwrap();
        for (number, count) in [(1, 0), (2, fds.len()), (3, 0), (4, 2)] {
            let (value, fds) = receive::<i32>(&mut reader).await.unwrap().unwrap();
            assert_eq!((value, fds.len()), (number, count));
        }
        // Whoever knows nothing of descriptors reads on.
        send(&mut writer, &5, &fds).await.unwrap();
        send(&mut writer, &6, &[]).await.unwrap();
        drop(writer);
        for number in [5, 6] {
            assert_eq!(control::read_frame::<i32>(&mut reader).await.unwrap(), Some(number));
        }
    }

    #[test]
    fn two_descriptors_for_each_task() {
        let of = |n| SocketsOf { task: TaskId::from_bits(n), netns: "/n".into() };
        let fds = || {
            let Sockets { udp, tcp, .. } = sockets();
            vec![udp, tcp]
        };
        assert_eq!(Sockets::pair(vec![of(1)], fds()).unwrap().len(), 1);
        assert!(Sockets::pair(vec![of(1), of(2)], fds()).is_err());
        assert!(Sockets::pair(Vec::new(), fds()).is_err());
    }
}
