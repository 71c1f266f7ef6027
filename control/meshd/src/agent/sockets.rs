//! What a network namespace listens on, and the connections to it, as its processes' `/proc` tells.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use mesh_types::Protocol;

/// The sockets of a network namespace that other machines may reach.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sockets {
    /// Ports that something listens on, at another address than those of the loopback alone: there
    /// the node's resolver listens in every task.
    pub listening: BTreeSet<(Protocol, u16)>,
    /// The local port of each TCP connection that is being opened, open, or not yet closed by both
    /// sides; those that wait to be accepted too.
    pub connections: Vec<u16>,
}

impl Sockets {
    /// Those of the namespace `netns`, which must be a path like `/proc/7/ns/net`.
    ///
    /// # Errors
    /// When its process is gone.
    pub fn of(netns: &Path) -> io::Result<Self> {
        let process = netns.parent().and_then(Path::parent).ok_or(io::ErrorKind::InvalidInput)?;
        let mut sockets = Self::default();
        for (name, protocol) in [
            ("tcp", Protocol::Tcp),
            ("tcp6", Protocol::Tcp),
            ("udp", Protocol::Udp),
            ("udp6", Protocol::Udp),
        ] {
            match std::fs::read_to_string(process.join("net").join(name)) {
                Ok(table) => sockets.add(&table, protocol),
                // A machine without IPv6 has no such files.
                Err(error) if error.kind() == io::ErrorKind::NotFound && name.ends_with('6') => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sockets)
    }

    /// How many connections there are to what it listens on. Those that it opened itself are none.
    #[must_use]
    pub fn open(&self) -> usize {
        let served = |port: &&u16| self.listening.contains(&(Protocol::Tcp, **port));
        self.connections.iter().filter(served).count()
    }

    fn add(&mut self, table: &str, protocol: Protocol) {
        for line in table.lines().skip(1) {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let (Some(local), _, Some(state)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let Some((address, port)) = parse(local) else { continue };
            // The states are those of include/net/tcp_states.h.
            match (protocol, state) {
                // UDP: not connected to anybody, so it takes from anyone.
                (Protocol::Tcp, "0A") | (Protocol::Udp, "07") if !address.is_loopback() => {
                    self.listening.insert((protocol, port));
                }
                // All but SYN_SENT, and those where the other side has acknowledged all:
                // FIN_WAIT2, TIME_WAIT, CLOSE. What is still to be sent dies with the namespace.
                (Protocol::Tcp, "01" | "03" | "04" | "08" | "09" | "0B" | "0C") => {
                    self.connections.push(port);
                }
                _ => {}
            }
        }
    }
}

/// `0100007F:0050`: the address as words in the machine's order, the port.
fn parse(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = address.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let mut octets = [0; 16];
            octets.iter_mut().zip(words.as_flattened()).for_each(|(to, from)| *to = *from);
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn tables_are_read_as_the_kernel_writes_them() {
        let mut sockets = Sockets::default();
        let head = "  sl  local_address rem_address   st tx_queue rx_queue\n";
        let tcp = "   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000
   1: 0100007F:2328 00000000:0000 0A 00000000:00000000 00:00000000
   2: 0500000A:0050 0600000A:BF5E 01 00000000:00000000 00:00000000
   3: 0500000A:0050 0600000A:BF5F 03 00000000:00000000 00:00000000
   4: 0500000A:0050 0600000A:BF60 06 00000000:00000000 00:00000000
   5: 0500000A:C001 0700000A:0050 01 00000000:00000000 00:00000000
   6: nonsense
";
        let tcp6 = "   0: 00000000000000000000000000000000:01BB 0:0 0A 0
   1: 00000000000000000000000001000000:1F90 0:0 0A 0
   2: 0000000000000000FFFF00000500000A:01BB 0:0 01 0
";
        // The resolver of the task.
        let udp = "   0: 0B00007F:0035 00000000:0000 07 00000000:00000000
   1: 00000000:0007 00000000:0000 07 00000000:00000000
";
        sockets.add(&format!("{head}{tcp}"), Protocol::Tcp);
        sockets.add(&format!("{head}{tcp6}"), Protocol::Tcp);
        sockets.add(&format!("{head}{udp}"), Protocol::Udp);
        let listening = [(Protocol::Tcp, 80), (Protocol::Tcp, 443), (Protocol::Udp, 7)];
        assert_eq!(sockets.listening, BTreeSet::from(listening));
        assert_eq!(sockets.connections, [80, 80, 0xC001, 443]);
        assert_eq!(sockets.open(), 3, "its own connection to port 80 elsewhere is none");
    }

    #[test]
    fn the_own_namespace_is_seen() {
        let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // Not accepted, and counted all the same.
        let _client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let sockets = Sockets::of(Path::new("/proc/self/ns/net")).unwrap();
        assert!(sockets.listening.contains(&(Protocol::Tcp, port)), "{sockets:?}");
        assert!(sockets.connections.contains(&port), "{sockets:?}");
        drop(listener);
        let sockets = Sockets::of(Path::new("/proc/self/ns/net")).unwrap();
        assert!(!sockets.listening.contains(&(Protocol::Tcp, port)), "{sockets:?}");
    }
}
