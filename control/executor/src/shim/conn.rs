//! One connection on a shim's socket: bytes and descriptors in, bounded lines out.

use std::{
    io::{self, IoSliceMut, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
    unistd::Pid,
};

use super::sys;
use crate::contract::{LINE_BYTES_MAX, Request, Response};

/// A peer that does not read its answer for this long loses it: the shim never waits for meshd.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// What a connection has for us.
pub(super) enum Input {
    Nothing,
    Request(Request, Vec<OwnedFd>),
    Closed,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    stream: UnixStream,
    pending: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// It asked to be told of the task's end.
    pub(super) waits: bool,
    /// The helper of the process that it started.
    pub(super) exec: Option<Pid>,
}

impl Conn {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        // Reads carry MSG_DONTWAIT; writes block for a bounded time.
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self { stream, pending: Vec::new(), fds: Vec::new(), waits: false, exec: None })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The next request. A line that is too long or no request closes the connection.
    pub(super) fn next(&mut self) -> Input {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return match serde_json::from_slice(&line) {
                    Ok(request) => Input::Request(request, std::mem::take(&mut self.fds)),
                    Err(error) => self.refuse(&format!("not a request: {error}")),
                };
            }
            if self.pending.len() > LINE_BYTES_MAX {
                return self.refuse(&format!("a request exceeds {LINE_BYTES_MAX} bytes"));
            }
            match self.receive() {
                Ok(0) => return Input::Closed,
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Input::Nothing,
                Err(Errno::EINTR) => {}
                Err(_) => return Input::Closed,
            }
        }
    }

    fn refuse(&mut self, message: &str) -> Input {
        self.answer(&Response::Error { message: message.to_owned() });
        Input::Closed
    }

    fn receive(&mut self) -> Result<usize, Errno> {
        let mut buffer = [0; 16 * 1024];
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let mut control = nix::cmsg_space!([std::os::fd::RawFd; 3]);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let fd = self.stream.as_raw_fd();
        let message = recvmsg::<()>(fd, &mut slices, Some(&mut control), flags)?;
        let length = message.bytes;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                self.fds.extend(sys::adopt_fds(&fds));
            }
        }
        self.pending.extend_from_slice(&buffer[..length]);
        Ok(length)
    }

    /// Sends one line. Who is gone or does not read misses it.
    pub(super) fn answer(&mut self, response: &Response) {
        let Ok(mut line) = serde_json::to_vec(response) else { return };
        line.push(b'\n');
        let _ = self.stream.write_all(&line);
    }
}
