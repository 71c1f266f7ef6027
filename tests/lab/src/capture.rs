//! Writes what a link carries as pcap: a packet socket and a file header are all it takes, so a
//! capture needs no program that may not be installed.

use std::{
    io::{ErrorKind, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
        sockopt,
    },
};

/// Largest packet that is kept whole: what a link hands on before it is segmented.
const PACKET_MAX: usize = 256 << 10;
/// What the kernel holds for us while we write, bytes.
const BUFFER: usize = 16 << 20;
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;

/// The header of a pcap file with microseconds, as draft-ietf-opsawg-pcap has it.
fn header() -> [u8; 24] {
    let mut out = [0; 24];
    out[..4].copy_from_slice(&0xa1b2_c3d4_u32.to_le_bytes());
    out[4..6].copy_from_slice(&2_u16.to_le_bytes());
    out[6..8].copy_from_slice(&4_u16.to_le_bytes());
    out[16..20].copy_from_slice(&u32::try_from(PACKET_MAX).unwrap_or(u32::MAX).to_le_bytes());
    out[20..].copy_from_slice(&ETHERNET.to_le_bytes());
    out
}

/// The header of one packet.
fn packet_header(at: SystemTime, length: usize) -> [u8; 16] {
    let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    // Seconds are unsigned in the format, and last until 2106.
    let seconds = u32::try_from(at.as_secs()).unwrap_or(u32::MAX);
    let mut out = [0; 16];
    for (field, value) in [seconds, at.subsec_micros(), length, length].into_iter().enumerate() {
        out[field * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }
    out
}

/// Captures on `link` of the calling thread's namespace until `stop` is readable, or the reader of
/// `out` is gone.
pub(crate) fn run(link: &str, out: &mut (dyn Write + Send), stop: BorrowedFd<'_>) -> Result<()> {
    let index = usize::try_from(if_nametoindex(link).with_context(|| format!("find {link}"))?)?;
    let packets = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::EthAll,
    )
    .context("open a packet socket")?;
    setsockopt(&packets, sockopt::RcvBufForce, &BUFFER).context("widen the socket's buffer")?;
    let written = write_all(&packets, index, out, stop);
    match written {
        // `| head` has seen enough.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("write the capture"),
    }
}

fn write_all(
    packets: &impl AsFd,
    index: usize,
    out: &mut (dyn Write + Send),
    stop: BorrowedFd<'_>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; PACKET_MAX];
    out.write_all(&header())?;
    loop {
        // Nothing waits: what came so far is there to be read.
        out.flush()?;
        let mut ready =
            [PollFd::new(packets.as_fd(), PollFlags::POLLIN), PollFd::new(stop, PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let stopped = ready[1].any().unwrap_or(true);
        // What is in the socket by now came before the end.
        loop {
            let socket = packets.as_fd().as_raw_fd();
            match recvfrom::<LinkAddr>(socket, &mut buffer) {
                Ok((length, Some(from))) if from.ifindex() == index => {
                    out.write_all(&packet_header(SystemTime::now(), length))?;
                    out.write_all(&buffer[..length])?;
                }
                Ok(_) => {}
                Err(Errno::EAGAIN) => break,
                // The link went down, or a signal: it may come up again.
                Err(Errno::ENETDOWN | Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if stopped {
            return out.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn headers_are_as_the_format_says() {
        let header = header();
        assert_eq!(header[..8], [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0]);
        assert_eq!(header[16..], [0, 0, 4, 0, 1, 0, 0, 0]);
        let at = UNIX_EPOCH + Duration::new(1, 2_000);
        let packet = packet_header(at, 60);
        assert_eq!(packet, [1, 0, 0, 0, 2, 0, 0, 0, 60, 0, 0, 0, 60, 0, 0, 0]);
    }
}
