//! What strangers, former members and lying members send: dropped with a reason, and nobody's
//! membership changes by it. Three members over a network that loses nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use mesh_gossip::{
    Config, Expected, Gossip, GossipKey, Keyring, Member, Reject, Timings,
    seal::{OpenError, Sealer},
    wire::{Message, Packet},
};
use mesh_types::{ClusterId, Epoch, NodeId, NodeNumber};

const CLUSTER: ClusterId = ClusterId::from_bits(5);

fn member(number: u64) -> Member {
    Member {
        number: NodeNumber::new(number).unwrap(),
        id: NodeId::from_bits(number.into()),
        address: SocketAddr::from(([192, 0, 2, number as u8], 7946)),
        bump: 1,
    }
}

fn key(epoch: u64) -> GossipKey {
    GossipKey { epoch: Epoch::new(epoch).unwrap(), secret: [epoch as u8; 32] }
}

struct Net {
    now: Duration,
    all: Vec<Gossip>,
}

impl Net {
    /// Three members that know each other.
    fn new() -> Self {
        let now = Duration::from_secs(1);
        let expected: BTreeMap<_, _> = (1..=3)
            .map(member)
            .map(|of| (of.number, Expected { id: of.id, address: of.address }))
            .collect();
        let start = |number: u64| {
            let (identity, keys) = (member(number), Keyring::new(key(1)));
            let config = Config { identity, cluster: CLUSTER, keys, timings: Timings::LAN };
            let mut gossip = Gossip::new(config, now, [number as u8; 32]);
            gossip.set_members(now, expected.clone());
            gossip
        };
        let mut net = Self { now, all: (1..=3).map(start).collect() };
        net.run(Duration::from_secs(3));
        net.assert_whole();
        net
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(10);
            let mut sent = Vec::new();
            for gossip in &mut self.all {
                gossip.handle_timer(self.now);
                sent.extend(std::iter::from_fn(|| gossip.poll_transmit()));
            }
            for (to, datagram) in sent {
                let to = self.all.iter_mut().find(|of| of.identity().address == to);
                let _ = to.map(|to| to.handle_datagram(self.now, &datagram));
            }
        }
    }

    /// What the first one makes of a datagram.
    fn give(&mut self, datagram: &[u8]) -> Result<(), Reject> {
        self.all[0].handle_datagram(self.now, datagram)
    }

    fn view(&self, number: usize) -> Vec<NodeNumber> {
        let mut view: Vec<_> = self.all[number].members().map(|view| view.member.number).collect();
        view.sort_unstable();
        view
    }

    /// Each one has the two others as members, and no more.
    fn assert_whole(&self) {
        for at in 0..3 {
            let others: Vec<_> = (1..=3).filter(|n| *n != at as u64 + 1).collect();
            let others: Vec<_> = others.into_iter().map(|n| member(n).number).collect();
            assert_eq!(self.view(at), others, "member {}", at + 1);
        }
    }
}

fn sealer(keys: Keyring) -> Sealer {
    Sealer::new(CLUSTER, keys, [9; 16])
}

#[test]
fn what_no_member_sealed_is_dropped() {
    let mut net = Net::new();
    let hello = Message::Hello(member(3)).encode();
    let good = sealer(Keyring::new(key(1))).seal(&hello).unwrap();
    let mut flipped = good.clone();
    flipped[40] ^= 1;
    let other_secret = GossipKey { secret: [7; 32], ..key(1) };
    let foreign = Sealer::new(ClusterId::from_bits(6), Keyring::new(key(1)), [9; 16]);
    let cases = [
        (vec![0x5a; 300], "random bytes"),
        (vec![0x5a; 64 << 10], "64 KiB"),
        (Vec::new(), "nothing"),
        (flipped, "a flipped bit"),
        (sealer(Keyring::new(key(9))).seal(&hello).unwrap(), "a key that nobody has"),
        (sealer(Keyring::new(other_secret)).seal(&hello).unwrap(), "another secret"),
        ({ foreign }.seal(&hello).unwrap(), "another cluster"),
    ];
    for (datagram, what) in cases {
        let refused = net.give(&datagram);
        assert!(matches!(refused, Err(Reject::Sealed(_))), "{what}: {refused:?}");
    }
    assert_eq!(net.give(&good), Ok(()));
    assert_eq!(net.give(&good), Err(Reject::Sealed(OpenError::Replay)), "once more");
    net.run(Duration::from_secs(3));
    net.assert_whole();
}

/// A former member has the old key: it is of use until the rotation is over, and then no more.
#[test]
fn an_old_key_ends_with_the_rotation() {
    let mut net = Net::new();
    let hello = Message::Hello(member(3)).encode();
    let (old, new) = (key(1), key(2));
    let rings = [
        Keyring { primary: old.clone(), others: vec![new.clone()] },
        Keyring { primary: new.clone(), others: vec![old.clone()] },
        Keyring::new(new),
    ];
    let mut former = sealer(Keyring::new(old));
    for (step, ring) in rings.into_iter().enumerate() {
        for gossip in &mut net.all {
            gossip.set_keys(ring.clone());
            net.now += Duration::from_millis(1);
        }
        let taken = net.give(&former.seal(&hello).unwrap());
        match step {
            0 | 1 => assert_eq!(taken, Ok(()), "step {step}"),
            _ => assert_eq!(taken, Err(Reject::Sealed(OpenError::UnknownKey(1)))),
        }
        net.run(Duration::from_secs(3));
        net.assert_whole();
    }
}

/// Whoever has the key may lie about others: the others are asked, and say that they live.
#[test]
fn lies_of_a_member_take_out_nobody() {
    let mut net = Net::new();
    let mut liar = sealer(Keyring::new(key(1)));
    let swim = |update: foca::Member<Member>| {
        let header = foca::Header {
            src: member(2),
            src_incarnation: 0,
            dst: member(1),
            message: foca::Message::Gossip,
        };
        Message::Swim(Packet { header, updates: vec![update] })
    };
    let (own, other) = (member(1), member(3));
    let lies = [
        Message::Ask { from: member(2), suspect: own, incarnation: u16::MAX },
        Message::Ask { from: member(2), suspect: other, incarnation: u16::MAX },
        swim(foca::Member::new(own, u16::MAX, foca::State::Suspect)),
        swim(foca::Member::new(own, u16::MAX, foca::State::Down)),
        swim(foca::Member::new(other, u16::MAX, foca::State::Suspect)),
        swim(foca::Member::new(other, u16::MAX, foca::State::Down)),
    ];
    for lie in lies {
        let _ = net.give(&liar.seal(&lie.encode()).unwrap());
        net.run(Duration::from_secs(5));
        net.assert_whole();
    }
    // Nodes that the store does not know, or not so, are none.
    for unknown in [member(77), Member { id: NodeId::from_bits(99), ..member(3) }] {
        let refused = net.give(&liar.seal(&Message::Hello(unknown).encode()).unwrap());
        assert!(refused.is_err(), "{unknown:?}: {refused:?}");
    }
    let myself = net.give(&liar.seal(&Message::Hello(member(1)).encode()).unwrap());
    assert_eq!(myself, Err(Reject::OwnNumber));
    net.run(Duration::from_secs(3));
    net.assert_whole();
}
