//! The cluster's keys and how they are replaced: step by step, each one only when every node has
//! done the one before, so that no node is ever without a key that another one uses. All of it is
//! in the store: whoever leads goes on with it.

use mesh_types::Epoch;

use super::{At, Store};
use crate::{
    command::{Command, Outcome, Rejection},
    model::{CaRotation, NextGossipKey, NodeKeys, RootId},
};

/// A node that is down has this long to come back and take part in the rotation of the root; later
/// it has to join again. (That is not so with the key of gossip: managers give it over TLS.)
const AWAY_MS: u64 = 60 * 60 * 1000;

impl Store {
    pub(super) fn rotate_ca(
        &mut self,
        at: At,
        forced: u64,
        rotation: &CaRotation,
    ) -> Result<Outcome, Rejection> {
        let Some(cluster) = &mut self.cluster else { return Ok(Outcome::Done) };
        // Signed by a root that was just dropped, it would be trusted by nobody who knows the next.
        if forced <= cluster.ca_forced || rotation.replaces != cluster.ca_cert_pem {
            return Err(Rejection::OutOfSequence);
        }
        cluster.ca_forced = forced;
        cluster.ca_rotation =
            Some(Box::new(CaRotation { started_ms: at.now_ms, ..rotation.clone() }));
        at.touch(&mut cluster.meta);
        Ok(Outcome::Done)
    }

    pub(super) fn finish_ca_rotation(&mut self, at: At, id: &RootId) -> Outcome {
        // Looked at again: a node may have joined since the leader did.
        if self.ca_rotated(at.now_ms) != Some(id) {
            return Outcome::Done;
        }
        if let Some(cluster) = &mut self.cluster
            && let Some(rotation) = cluster.ca_rotation.take()
        {
            cluster.ca_id = Some(rotation.id);
            cluster.ca_cert_pem = rotation.cert_pem;
            cluster.ca_key_pem = rotation.key_pem;
            at.touch(&mut cluster.meta);
        }
        Outcome::Done
    }

    pub(super) fn rotate_gossip_key(
        &mut self,
        at: At,
        key: [u8; 32],
    ) -> Result<Outcome, Rejection> {
        let Some(cluster) = &mut self.cluster else { return Ok(Outcome::Done) };
        if cluster.gossip_next.is_some() {
            return Err(Rejection::Precondition(
                "the gossip key is being rotated already: wait until that is done".into(),
            ));
        }
        cluster.gossip_next = Some(NextGossipKey { key, in_use: false });
        at.touch(&mut cluster.meta);
        Ok(Outcome::Done)
    }

    pub(super) fn advance_gossip_key(&mut self, at: At, epoch: Epoch, in_use: bool) -> Outcome {
        if self.gossip_step() != Some((epoch, in_use)) {
            return Outcome::Done;
        }
        if let Some(cluster) = &mut self.cluster {
            let next_epoch = cluster.gossip_keys().next_epoch();
            match &mut cluster.gossip_next {
                Some(next) if !next.in_use => next.in_use = true,
                _ => {
                    if let Some(next) = cluster.gossip_next.take() {
                        cluster.gossip_key = next.key;
                        cluster.gossip_epoch = next_epoch;
                    }
                }
            }
            at.touch(&mut cluster.meta);
        }
        Outcome::Done
    }

    /// The steps that are due, and when to look again if nothing changes until then.
    pub(crate) fn key_steps(&self, now_ms: u64) -> (Vec<Command>, Option<u64>) {
        let mut steps = Vec::new();
        if let Some(id) = self.ca_rotated(now_ms) {
            steps.push(Command::FinishCaRotation { id: *id });
        }
        if let Some((epoch, in_use)) = self.gossip_step() {
            steps.push(Command::AdvanceGossipKey { epoch, in_use });
        }
        let rotation = self.cluster.as_ref().and_then(|cluster| cluster.ca_rotation.as_ref());
        let away_until = rotation.map(|rotation| rotation.started_ms.saturating_add(AWAY_MS));
        (steps, away_until.filter(|until| *until > now_ms))
    }

    /// Whether all nodes are so far. Those that are down do not count, once they were `away` for
    /// long enough.
    fn all_have(&self, away: bool, done: impl Fn(&NodeKeys) -> bool) -> bool {
        self.nodes.values().all(|node| done(&node.description.keys) || (away && node.is_down()))
    }

    /// The new root, if the old one can be dropped.
    fn ca_rotated(&self, now_ms: u64) -> Option<&RootId> {
        let rotation = self.cluster.as_ref()?.ca_rotation.as_ref()?;
        let away = now_ms >= rotation.started_ms.saturating_add(AWAY_MS);
        let done = |keys: &NodeKeys| {
            keys.issuer == Some(rotation.id) && keys.trusts.contains(&rotation.id)
        };
        self.all_have(away, done).then_some(&rotation.id)
    }

    /// Where the rotation of the gossip key is, if it can go on: the generation that is being
    /// replaced, and whether the new key seals.
    fn gossip_step(&self) -> Option<(Epoch, bool)> {
        let keys = self.cluster.as_ref()?.gossip_keys();
        let NextGossipKey { in_use, .. } = keys.next?;
        let next = keys.next_epoch();
        let done =
            |node: &NodeKeys| node.opens.contains(&next) && (!in_use || node.seals == Some(next));
        self.all_have(true, done).then_some((keys.epoch, in_use))
    }
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
