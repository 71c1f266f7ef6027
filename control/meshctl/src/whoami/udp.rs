//! The UDP port: each datagram is answered with the JSON, from the address that it was sent to.
//!
//! A wildcard socket alone would answer from the address that the route back prefers, and would not
//! know its own: so the destination is read from the packet information, and given back as the
//! source (ip(7) `IP_PKTINFO`, RFC 3542 section 6).

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use nix::{
    libc::{in_addr, in_pktinfo, in6_pktinfo},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockType, SockaddrStorage, recvmsg, sendmsg,
        setsockopt, sockopt,
    },
};
use tokio::{io::Interest, net::UdpSocket};

use super::Shared;

/// The largest UDP payload.
const DATAGRAM_BYTES_MAX: usize = 65_535;

pub(super) fn bind(address: SocketAddr) -> io::Result<OwnedFd> {
    let fd = super::bound(address, SockType::Datagram)?;
    if address.is_ipv4() {
        setsockopt(&fd, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        setsockopt(&fd, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    Ok(fd)
}

pub(super) async fn serve(socket: UdpSocket, mut shared: Shared) {
    let Ok(port) = socket.local_addr().map(|address| address.port()) else { return };
    let fd = socket.as_raw_fd();
    loop {
        let received = tokio::select! {
            received = socket.async_io(Interest::READABLE, || receive(fd)) => received,
            () = shared.stop_asked() => return,
        };
        // An error is one that an earlier answer met (ICMP unreachable): nothing to do about it.
        let Ok(Some((client, info))) = received else { continue };
        let server = SocketAddr::new(info.local(), port);
        let answer = shared.identity.answer(client, server, "udp");
        let _ = socket.async_io(Interest::WRITABLE, || send(fd, &answer, client, info)).await;
    }
}

/// Where a datagram arrived.
#[derive(Debug, Clone, Copy)]
enum Info {
    V4(Ipv4Addr),
    /// With the index of its interface, which link-local addresses need.
    V6(in6_pktinfo),
}

impl Info {
    fn local(&self) -> IpAddr {
        match self {
            Self::V4(address) => (*address).into(),
            Self::V6(info) => Ipv6Addr::from(info.ipi6_addr.s6_addr).into(),
        }
    }
}

fn receive(fd: RawFd) -> io::Result<Option<(SocketAddr, Info)>> {
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(in6_pktinfo, in_pktinfo);
    let message =
        recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut control), MsgFlags::empty())?;
    let info = message.cmsgs()?.find_map(|part| match part {
        // The local address of the packet: for a broadcast, that of the interface.
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(Info::V4(Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr))))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Info::V6(info)),
        _ => None,
    });
    let client = message.address.as_ref().and_then(socket_address);
    Ok(client.zip(info))
}

fn send(fd: RawFd, answer: &[u8], client: SocketAddr, info: Info) -> io::Result<()> {
    let to = SockaddrStorage::from(client);
    let slices = [IoSlice::new(answer)];
    let flags = MsgFlags::empty();
    match info {
        Info::V4(address) => {
            let source = in_addr { s_addr: u32::from(address).to_be() };
            let none = in_addr { s_addr: 0 };
            let info = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: none };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &slices, &control, flags, Some(&to))?;
        }
        Info::V6(mut info) => {
            if !Ipv6Addr::from(info.ipi6_addr.s6_addr).is_unicast_link_local() {
                info.ipi6_ifindex = 0;
            }
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &slices, &control, flags, Some(&to))?;
        }
    }
    Ok(())
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4(SocketAddrV4::from(*v4)));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6)))
}
