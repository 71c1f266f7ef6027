//! What the probes must and must not believe.

use proptest::prelude::*;

use super::*;

fn number(n: u64) -> NodeNumber {
    NodeNumber::new(n).unwrap()
}

fn end(n: u64) -> IpAddr {
    IpAddr::from([192, 0, (n >> 8) as u8, n as u8])
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn nodes(count: u64) -> BTreeMap<NodeNumber, IpAddr> {
    (1..=count).map(|n| (number(n), end(n))).collect()
}

/// A pair of nodes; `up` says when the link between them carries packets.
struct Pair {
    probes: Probes,
    now: Duration,
    next: u64,
    round_trip: Duration,
    flying: Vec<(Duration, u64)>,
}

impl Pair {
    fn new(round_trip: Duration) -> Self {
        let mut probes = Probes::new(number(1), Limits::DEFAULT);
        probes.set_nodes(ms(1000), &nodes(2));
        Self { probes, now: ms(1000), next: 0, round_trip, flying: Vec::new() }
    }

    /// Ten milliseconds at a time; how often the peer went from good to withdrawn.
    fn run(&mut self, duration: Duration, up: impl Fn(Duration) -> bool) -> usize {
        let until = self.now + duration;
        let mut failures = 0;
        while self.now < until {
            let before = self.out();
            let now = self.now;
            let (arrived, flying) =
                std::mem::take(&mut self.flying).into_iter().partition(|(at, _)| *at <= now);
            self.flying = flying;
            for (_, nonce) in arrived {
                self.probes.answered(now, number(2), end(2), nonce);
            }
            if now.as_millis().is_multiple_of(100) {
                let next = &mut self.next;
                let mut nonce = || {
                    *next += 1;
                    *next
                };
                for (_, _, nonce) in self.probes.tick(now, &mut nonce) {
                    if up(now) {
                        self.flying.push((now + self.round_trip, nonce));
                    }
                }
            }
            failures += usize::from(self.out() && !before);
            self.now += ms(10);
        }
        failures
    }

    fn out(&self) -> bool {
        !self.probes.withdrawn().is_empty()
    }
}

#[test]
fn silence_withdraws_within_half_a_second_and_an_answer_restores_at_once() {
    let mut pair = Pair::new(ms(10));
    assert_eq!(pair.run(ms(5000), |_| true), 0);
    assert!(pair.probes.reached(pair.now).contains(&number(2)));
    assert_eq!(pair.run(ms(500), |_| false), 1);
    assert!(pair.probes.reached(pair.now).is_empty());
    pair.run(ms(120), |_| true);
    assert!(!pair.out());
}

#[test]
fn a_long_way_is_no_silence() {
    let mut pair = Pair::new(ms(280));
    assert_eq!(pair.run(ms(5000), |_| true), 0);
    assert_eq!(pair.run(ms(900), |_| false), 1);
}

#[test]
fn a_flapping_link_does_not_flap_the_peer() {
    let mut pair = Pair::new(ms(10));
    pair.run(ms(1000), |_| true);
    // A second up, a second down, for a minute.
    let start = pair.now;
    let failures = pair.run(ms(60_000), |now| (now - start).as_secs().is_multiple_of(2));
    assert!(failures <= 3, "{failures}");
    pair.run(ms(20_000), |_| true);
    assert!(!pair.out());
}

#[test]
fn one_that_slept_blames_nobody() {
    let mut pair = Pair::new(ms(10));
    pair.run(ms(1000), |_| true);
    pair.now += ms(30_000);
    assert_eq!(pair.run(ms(2000), |_| true), 0);
}

#[test]
fn only_answers_to_own_probes_count() {
    let mut probes = Probes::new(number(1), Limits::DEFAULT);
    probes.set_nodes(ms(0), &nodes(2));
    let sent = probes.tick(ms(100), &mut || 7);
    assert_eq!(sent.len(), 1);
    probes.answered(ms(110), number(2), end(2), 8);
    probes.answered(ms(110), number(2), end(3), 7);
    assert!(probes.reached(ms(110)).is_empty());
    probes.answered(ms(110), number(2), end(2), 7);
    assert_eq!(probes.reached(ms(110)), BTreeSet::from([number(2)]));
}

#[test]
fn in_a_large_cluster_everybody_is_watched_by_enough() {
    let nodes = nodes(300);
    let mut watchers: BTreeMap<NodeNumber, usize> = BTreeMap::new();
    for own in nodes.keys() {
        let watched = watched(*own, &nodes, &Limits::DEFAULT);
        assert!(watched.len() < 60, "{}", watched.len());
        for peer in watched {
            *watchers.entry(peer).or_default() += 1;
        }
    }
    assert_eq!(watchers.len(), 300);
    assert!(watchers.values().all(|count| *count >= 8));
}

/// Small numbers, so that shares can be had with few nodes.
const FEW: Limits = Limits { peers: 2, watchers: 4, quorum: 2 };

/// A node of a cluster of twelve that does not watch the peer, and those that do.
fn stranger() -> (Probes, NodeNumber, Vec<NodeNumber>) {
    let nodes = nodes(12);
    let peer = number(5);
    let watchers = watchers(peer, &nodes, &FEW);
    let own = nodes.keys().find(|own| **own != peer && !watchers.contains(own)).unwrap();
    let mut probes = Probes::new(*own, FEW);
    probes.set_nodes(ms(1000), &nodes);
    (probes, peer, watchers.into_iter().collect())
}

fn accuse(peer: NodeNumber, by: &[NodeNumber]) -> BTreeMap<NodeNumber, BTreeSet<NodeNumber>> {
    BTreeMap::from([(peer, by.iter().copied().collect())])
}

/// Runs ten milliseconds at a time; `answers` says who does, a moment later. Whom it probed, how
/// often.
fn run(
    probes: &mut Probes,
    from: Duration,
    to: Duration,
    answers: impl Fn(NodeNumber) -> bool,
) -> BTreeMap<NodeNumber, usize> {
    let mut probed = BTreeMap::new();
    let mut nonce = from.as_millis() as u64 * 1000;
    for at in (from.as_millis()..to.as_millis()).step_by(100) {
        let now = ms(at as u64);
        let sent = probes.tick(now, &mut || {
            nonce += 1;
            nonce
        });
        for (peer, vtep, nonce) in sent {
            *probed.entry(peer).or_default() += 1;
            if answers(peer) {
                probes.answered(now + ms(2), peer, vtep, nonce);
            }
        }
    }
    probed
}

#[test]
fn enough_watchers_make_others_look_for_themselves() {
    let (mut probes, peer, watchers) = stranger();
    let strangers: Vec<_> =
        (1..=12).map(number).filter(|n| *n != peer && !watchers.contains(n)).collect();
    // One watcher is not enough, and others are not asked.
    for by in [vec![watchers[0]], strangers] {
        probes.set_accused(ms(1000), &accuse(peer, &by));
        assert!(!run(&mut probes, ms(1000), ms(1500), |_| true).contains_key(&peer), "{by:?}");
    }
    probes.set_accused(ms(2000), &accuse(peer, &watchers[..2]));
    let probed = run(&mut probes, ms(2000), ms(2400), |p| p != peer);
    assert_eq!(probed[&peer], 4);
    assert_eq!(probes.withdrawn(), BTreeSet::from([peer]));
    // It is no watcher's word.
    assert!(probes.silent().is_empty());
}

#[test]
fn own_answers_win_over_all_that_others_say() {
    let (mut probes, peer, watchers) = stranger();
    probes.set_accused(ms(1000), &accuse(peer, &watchers));
    run(&mut probes, ms(1000), ms(5000), |_| true);
    assert!(probes.withdrawn().is_empty() && probes.reached(ms(5000)).contains(&peer));
    run(&mut probes, ms(5000), ms(5500), |p| p != peer);
    assert_eq!(probes.withdrawn(), BTreeSet::from([peer]));
    // Nor does their word restore it.
    probes.set_accused(ms(5500), &BTreeMap::new());
    run(&mut probes, ms(5500), ms(6000), |p| p != peer);
    assert_eq!(probes.withdrawn(), BTreeSet::from([peer]));
    run(&mut probes, ms(6000), ms(6200), |_| true);
    assert!(probes.withdrawn().is_empty());
    // It is its watchers' again when it can be known not to flap.
    run(&mut probes, ms(6200), ms(36_000), |_| true);
    assert!(!run(&mut probes, ms(36_000), ms(37_000), |_| true).contains_key(&peer));
}

#[test]
fn a_flapping_link_is_seen_by_those_who_do_not_watch_it() {
    let (mut probes, peer, watchers) = stranger();
    let mut failures = 0;
    // Its watchers speak of each second that it is away, and take it back in each that it is there.
    for second in 1..60 {
        let up = second % 2 == 0;
        let by = if up { &[] } else { &watchers[..] };
        probes.set_accused(ms(second * 1000), &accuse(peer, by));
        let before = probes.withdrawn().contains(&peer);
        run(&mut probes, ms(second * 1000), ms(second * 1000 + 1000), |p| up || p != peer);
        failures += usize::from(probes.withdrawn().contains(&peer) && !before);
    }
    assert!((1..=3).contains(&failures), "{failures}");
}

#[test]
fn the_dead_are_probed_rarely_until_their_watchers_see_them() {
    let (mut probes, peer, watchers) = stranger();
    probes.set_accused(ms(1000), &accuse(peer, &watchers));
    run(&mut probes, ms(1000), ms(7000), |p| p != peer);
    let probed = run(&mut probes, ms(7000), ms(17_000), |p| p != peer);
    assert!((9..=11).contains(&probed[&peer]), "{probed:?}");
    probes.set_accused(ms(17_000), &accuse(peer, &watchers[..1]));
    run(&mut probes, ms(17_000), ms(17_100), |_| true);
    assert!(probes.withdrawn().is_empty());
}

proptest! {
    /// Whatever is said by whomever, in whatever name: a peer that answers stays in.
    #[test]
    fn no_word_takes_out_a_peer_that_answers(
        words in prop::collection::vec(prop::collection::btree_map(
            (1u64..=12).prop_map(number),
            prop::collection::btree_set((1u64..=14).prop_map(number), 0..14),
            0..12,
        ), 1..12),
        own in (1u64..=12).prop_map(number),
    ) {
        let mut probes = Probes::new(own, FEW);
        probes.set_nodes(ms(0), &nodes(12));
        for (round, accusations) in words.iter().enumerate() {
            let now = ms(round as u64 * 700);
            probes.set_accused(now, accusations);
            run(&mut probes, now, now + ms(700), |_| true);
            prop_assert!(probes.withdrawn().is_empty());
        }
    }
}

/// A daemon that starts has heard nobody's accusations: it finds the dead itself, once.
#[test]
fn who_starts_looks_at_everybody() {
    let (_, dead, watchers) = stranger();
    let own = (1..=12).map(number).find(|own| *own != dead && !watchers.contains(own)).unwrap();
    let mut probes = Probes::new(own, FEW).of_everybody();
    assert!(probes.judged(), "there is nobody");
    probes.set_nodes(ms(1000), &nodes(12));
    assert!(!probes.judged());
    let probed = run(&mut probes, ms(1000), ms(1600), |peer| peer != dead);
    assert_eq!(probed.len(), 11);
    assert!(probes.judged());
    assert_eq!(probes.withdrawn(), BTreeSet::from([dead]));
    // From then on it looks at its share, and at the one that it found dead.
    let probed = run(&mut probes, ms(1600), ms(2600), |peer| peer != dead);
    let share = watched(own, &nodes(12), &FEW);
    assert!(probed.keys().all(|peer| *peer == dead || share.contains(peer)), "{probed:?}");
}
