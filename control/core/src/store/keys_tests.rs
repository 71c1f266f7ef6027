//! Aim: while keys are replaced, every two nodes that are there understand each other at every
//! moment, whatever comes in between, and in the end nothing of the old is left. Method: random
//! histories of nodes that hear late, renew late, report late, go away and come back, with
//! rotations begun anew, nodes that join and leave, and leaders whose commands come late.

use std::collections::{BTreeMap, BTreeSet};

use mesh_history::Dice;
use mesh_types::{Epoch, NodeId};

use super::AWAY_MS;
use crate::{
    command::{Command, NodeReport},
    fixtures::{Bench, new_node, node_id},
    model::{CaRotation, GossipKeys, NodeDescription, NodeKeys, NodeState, Role, RootId},
};

/// What a node holds.
#[derive(Debug, Clone, Default)]
struct Held {
    issuer: RootId,
    /// Who signed the key of its issuer, besides itself.
    cross: Option<RootId>,
    trusts: BTreeSet<RootId>,
    gossip: Option<GossipKeys>,
    /// It has to be told first: it was away, or is new.
    behind: bool,
    /// It was away while the root was changed.
    lost: bool,
}

impl Held {
    fn keys(&self) -> NodeKeys {
        let gossip = self.gossip.unwrap();
        let next = gossip.next.map(|_| gossip.next_epoch());
        NodeKeys {
            issuer: Some(self.issuer),
            trusts: self.trusts.clone(),
            opens: std::iter::once(gossip.epoch).chain(next).collect(),
            seals: Some(gossip.sealing()),
        }
    }

    fn trusts(&self, other: &Self) -> bool {
        self.trusts.contains(&other.issuer)
            || other.cross.is_some_and(|signer| self.trusts.contains(&signer))
    }

    fn opens(&self, other: &Self) -> bool {
        self.keys().opens.contains(&other.keys().seals.unwrap())
    }
}

struct Sim {
    bench: Bench,
    dice: Dice,
    nodes: BTreeMap<NodeId, Held>,
    next_node: u8,
    next_root: u8,
    /// Of an older leader, still to come.
    late: Vec<Command>,
    finished: u32,
}

fn root(n: u8) -> RootId {
    [n; 32]
}

impl Sim {
    fn new(seed: u64) -> Self {
        let bench = Bench::with_nodes(3);
        let mut sim = Self {
            bench,
            dice: Dice::new(seed),
            nodes: BTreeMap::new(),
            next_node: 4,
            next_root: 1,
            late: Vec::new(),
            finished: 0,
        };
        for n in 1..=3 {
            sim.nodes.insert(node_id(n), sim.joined());
        }
        sim
    }

    /// The root that stands, the one on its way.
    fn roots(&self) -> (RootId, Option<RootId>) {
        let cluster = self.bench.store.cluster.as_ref().unwrap();
        let rotation = cluster.ca_rotation.as_ref().map(|rotation| rotation.id);
        (cluster.ca_id.unwrap_or(root(0)), rotation)
    }

    /// What a node gets that is admitted now.
    fn joined(&self) -> Held {
        let (current, next) = self.roots();
        Held {
            issuer: next.unwrap_or(current),
            cross: next.map(|_| current),
            trusts: std::iter::once(current).chain(next).collect(),
            gossip: Some(self.bench.store.cluster.as_ref().unwrap().gossip_keys()),
            behind: false,
            lost: false,
        }
    }

    fn up(&self, id: NodeId) -> bool {
        self.bench.store.nodes.get(&id).is_some_and(|node| !node.is_down())
    }

    fn set_state(&mut self, id: NodeId, state: NodeState) {
        self.bench.node_state(u8::try_from(id.bits()).unwrap(), state);
    }

    fn pick(&mut self) -> NodeId {
        let ids: Vec<_> = self.nodes.keys().copied().collect();
        ids[self.dice.below(ids.len() as u64) as usize]
    }

    fn apply(&mut self, command: Command) {
        let before = self.roots();
        let _ = self.bench.apply(command);
        let after = self.roots();
        if before.0 == after.0 {
            return;
        }
        self.finished += 1;
        // The old root is dropped: who is there needs it no more, and who was away is told to join.
        for (id, held) in &mut self.nodes {
            let there = self.bench.store.nodes.get(id).is_some_and(|node| !node.is_down());
            let ready = held.issuer == after.0 && held.trusts.contains(&after.0);
            assert!(ready || !there, "{id} was there, and is locked out: {held:?}");
            held.lost |= !ready;
        }
    }

    fn begin(&mut self) {
        let forced = self.bench.store.cluster.as_ref().unwrap().ca_forced + 1;
        let id = root(self.next_root);
        self.next_root += 1;
        let rotation = CaRotation {
            id,
            cert_pem: String::new(),
            key_pem: String::new(),
            cross_pem: String::new(),
            replaces: String::new(),
            started_ms: 0,
        };
        self.apply(Command::RotateCa { forced, rotation: Box::new(rotation) });
    }

    /// One of the things that a node does by itself, in any order and any time later.
    fn act(&mut self, id: NodeId) {
        if !self.up(id) || self.nodes[&id].lost {
            return;
        }
        let fresh = self.joined();
        let what = self.dice.below(4);
        let held = self.nodes.get_mut(&id).unwrap();
        match what {
            // A session tells it what to trust and how to gossip.
            0 => {
                (held.trusts, held.gossip) = (fresh.trusts, fresh.gossip);
                held.behind = false;
            }
            // A certificate is signed. Only who heard that there is another root asks for it.
            1 if held.trusts == fresh.trusts => {
                (held.issuer, held.cross) = (fresh.issuer, fresh.cross);
            }
            2 => {
                let description = NodeDescription { keys: held.keys(), ..Default::default() };
                let report = NodeReport { id, status: None, description: Some(description) };
                self.apply(Command::ReportNodes(vec![report]));
            }
            _ => {}
        }
    }

    fn step(&mut self) {
        self.bench.now_ms += self.dice.below(5) * 1000;
        let id = self.pick();
        match self.dice.below(40) {
            0 => self.begin(),
            1 => {
                let key = [self.dice.below(255) as u8; 32];
                let _ = self.bench.apply(Command::RotateGossipKey { key });
            }
            2 if self.next_node < 200 => {
                let n = self.next_node;
                self.next_node += 1;
                // Its certificate is signed before it is in the store.
                let held = self.joined();
                if self.dice.chance(50) {
                    self.step();
                }
                self.apply(Command::AddNode(Box::new(new_node(n, Role::Worker))));
                self.nodes.insert(node_id(u128::from(n)), Held { behind: true, ..held });
            }
            3 if id != node_id(1) && self.up(id) => self.set_state(id, NodeState::Down),
            4 if !self.up(id) && !self.nodes[&id].lost => {
                self.set_state(id, NodeState::Ready);
                self.nodes.get_mut(&id).unwrap().behind = true;
            }
            5 if id != node_id(1) && self.nodes.len() > 3 => {
                self.apply(Command::RemoveNode { id, force: true });
                self.nodes.remove(&id);
            }
            6 if self.dice.chance(10) => self.bench.now_ms += AWAY_MS,
            7 => {
                let late = std::mem::take(&mut self.late);
                late.into_iter().for_each(|command| self.apply(command));
            }
            8..=14 => self.lead(),
            _ => self.act(id),
        }
        self.check();
    }

    fn lead(&mut self) {
        let (steps, _) = self.bench.store.key_steps(self.bench.now_ms);
        for step in steps {
            self.late.push(step.clone());
            self.apply(step);
        }
    }

    fn check(&self) {
        let there = || self.nodes.iter().filter(|(id, held)| self.up(**id) && !held.lost);
        for (a, one) in there() {
            for (b, other) in there() {
                assert!(one.trusts(other), "{a} refuses {b}: {one:?} {other:?}");
                // Who is behind hears a manager first, over TLS.
                if !one.behind && !other.behind {
                    assert!(one.opens(other), "{a} cannot hear {b}: {one:?} {other:?}");
                }
            }
        }
    }

    /// All come back, hear and do what is asked: then it is over soon.
    fn end(&mut self) {
        let ids: Vec<_> = self.nodes.keys().copied().collect();
        for id in &ids {
            if !self.up(*id) && !self.nodes[id].lost {
                self.set_state(*id, NodeState::Ready);
                self.nodes.get_mut(id).unwrap().behind = true;
            } else if self.nodes[id].lost {
                self.apply(Command::RemoveNode { id: *id, force: true });
                self.nodes.remove(id);
            }
        }
        for _ in 0..400 {
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                self.act(id);
            }
            self.lead();
            self.check();
        }
        let cluster = self.bench.store.cluster.clone().unwrap();
        assert!(cluster.ca_rotation.is_none() && cluster.gossip_next.is_none(), "{cluster:?}");
        let current = BTreeSet::from([self.roots().0]);
        for (id, held) in &self.nodes {
            assert_eq!((&held.trusts, held.issuer), (&current, self.roots().0), "{id}");
            assert_eq!(held.gossip, Some(cluster.gossip_keys()), "{id}");
        }
    }
}

#[test]
fn every_two_nodes_understand_each_other_while_keys_change() {
    let mut finished = 0;
    for seed in 0..300 {
        let mut sim = Sim::new(seed);
        for _ in 0..300 {
            sim.step();
        }
        sim.end();
        finished += sim.finished;
    }
    assert!(finished > 100, "only {finished} rotations came to their end");
}

#[test]
fn the_next_root_waits_for_all_and_for_those_that_are_away_an_hour() {
    let mut sim = Sim::new(1);
    sim.begin();
    let new = root(1);
    let rotation = |sim: &Sim| sim.bench.store.cluster.as_ref().unwrap().ca_rotation.is_some();
    let take = |sim: &mut Sim, n: u128| {
        let keys =
            NodeKeys { issuer: Some(new), trusts: [root(0), new].into(), ..NodeKeys::default() };
        let description = NodeDescription { keys, ..Default::default() };
        let id = node_id(n);
        sim.nodes.get_mut(&id).unwrap().issuer = new;
        sim.nodes.get_mut(&id).unwrap().trusts = [root(0), new].into();
        let report = NodeReport { id, status: None, description: Some(description) };
        sim.apply(Command::ReportNodes(vec![report]));
        sim.lead();
    };
    take(&mut sim, 1);
    take(&mut sim, 2);
    sim.set_state(node_id(3), NodeState::Down);
    sim.lead();
    assert!(rotation(&sim), "one that is down for a moment is waited for");
    let (_, wake) = sim.bench.store.key_steps(sim.bench.now_ms);
    sim.bench.now_ms = wake.unwrap() - 1;
    sim.lead();
    assert!(rotation(&sim));
    sim.bench.now_ms += 1;
    sim.lead();
    assert!(!rotation(&sim), "one that is away keeps the old root for ever");
    let cluster = sim.bench.store.cluster.as_ref().unwrap();
    assert_eq!(cluster.ca_id, Some(new));
    // Asked for once: the same number again is no other wish.
    let rotation = CaRotation {
        id: root(9),
        cert_pem: String::new(),
        key_pem: String::new(),
        cross_pem: String::new(),
        replaces: String::new(),
        started_ms: 0,
    };
    let again = Command::RotateCa { forced: 1, rotation: Box::new(rotation) };
    assert!(sim.bench.apply(again).is_err());
}

#[test]
fn the_key_of_gossip_is_installed_used_and_then_alone() {
    let mut sim = Sim::new(1);
    sim.bench.apply(Command::RotateGossipKey { key: [7; 32] }).unwrap();
    assert!(sim.bench.apply(Command::RotateGossipKey { key: [8; 32] }).is_err());
    let second = Epoch::MIN.next().unwrap();
    let report = |sim: &mut Sim, n: u128, opens: &[Epoch], seals| {
        let opens = opens.iter().copied().collect();
        let keys = NodeKeys { opens, seals: Some(seals), ..NodeKeys::default() };
        let description = NodeDescription { keys, ..Default::default() };
        let report = NodeReport { id: node_id(n), status: None, description: Some(description) };
        sim.bench.apply(Command::ReportNodes(vec![report])).unwrap();
        sim.lead();
        sim.bench.store.cluster.as_ref().unwrap().gossip_keys()
    };
    // One that is down is told when it is back.
    sim.set_state(node_id(3), NodeState::Down);
    assert_eq!(report(&mut sim, 1, &[Epoch::MIN, second], Epoch::MIN).sealing(), Epoch::MIN);
    assert_eq!(report(&mut sim, 2, &[Epoch::MIN, second], Epoch::MIN).sealing(), second);
    assert_eq!(report(&mut sim, 1, &[Epoch::MIN, second], second).epoch, Epoch::MIN);
    let keys = report(&mut sim, 2, &[Epoch::MIN, second], second);
    assert_eq!((keys.key, keys.epoch, keys.next), ([7; 32], second, None));
}
