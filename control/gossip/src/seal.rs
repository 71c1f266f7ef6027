//! The outer format of a datagram: sealed under the cluster's gossip key.
//!
//! | bytes | what |
//! |---|---|
//! | 1 | format version (1) |
//! | 4 | epoch of the key, low 32 bits, big endian |
//! | 16 | salt: drawn by the sender when it started |
//! | 8 | counter of the sender since then, big endian |
//! | n + 16 | ChaCha20-Poly1305 (RFC 8439) of the payload |
//!
//! All nodes share one key, so random 96-bit nonces under it would meet their birthday bound in a
//! busy week. Instead each start of a sender has a key of its own, HKDF-SHA256 (RFC 5869) of the
//! cluster's key with the salt, and counts its nonces. The header and the cluster's id are
//! authenticated. The counter also tells replays.

use std::{collections::BTreeMap, fmt};

use mesh_types::{ClusterId, Epoch};
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, Salt},
};
use thiserror::Error;

/// The version of the format.
pub const VERSION: u8 = 1;
/// What sealing adds to a payload, in bytes.
pub const OVERHEAD: usize = HEADER_LEN + TAG_LEN;
/// The largest datagram, in bytes: below every underlay's MTU with its IP and UDP headers.
pub const MAX_DATAGRAM: usize = 1400;

const SALT_LEN: usize = 16;
const HEADER_LEN: usize = 1 + 4 + SALT_LEN + 8;
const TAG_LEN: usize = 16;
/// Senders whose derived key is remembered: each start of a node makes one.
const MAX_SENDERS: usize = 4096;
/// How far behind the newest counter a datagram may come.
const WINDOW: u64 = 128;

/// A key of the gossip.
#[derive(Clone, PartialEq, Eq)]
pub struct GossipKey {
    /// Its generation.
    pub epoch: Epoch,
    /// The secret itself.
    pub secret: [u8; 32],
}

impl fmt::Debug for GossipKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GossipKey").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// The keys in use: one seals, all open. Rotation installs the new key as one of `others` on every
/// node, then makes it the primary, then drops the old one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyring {
    /// Seals.
    pub primary: GossipKey,
    /// Open too.
    pub others: Vec<GossipKey>,
}

impl Keyring {
    /// A ring of one key.
    #[must_use]
    pub fn new(primary: GossipKey) -> Self {
        Self { primary, others: Vec::new() }
    }

    fn find(&self, low_epoch: u32) -> Option<&GossipKey> {
        std::iter::once(&self.primary)
            .chain(&self.others)
            .find(|key| wire_epoch(key.epoch) == low_epoch)
    }
}

/// Why a datagram was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum OpenError {
    /// Shorter than header and tag, or longer than [`MAX_DATAGRAM`].
    #[error("{0} bytes are no gossip datagram")]
    Length(usize),
    /// Another version of the format.
    #[error("gossip format version {0} is not known here (this node speaks {VERSION})")]
    Version(u8),
    /// A key that this node does not hold.
    #[error("sealed with the gossip key of epoch {0}, which this node does not hold")]
    UnknownKey(u32),
    /// Another cluster's, or tampered with.
    #[error("not sealed by a member of this cluster")]
    Forged,
    /// It came before.
    #[error("a replay")]
    Replay,
}

/// Seals and opens.
pub struct Sealer {
    cluster: ClusterId,
    keys: Keyring,
    salt: [u8; SALT_LEN],
    own: LessSafeKey,
    counter: u64,
    senders: BTreeMap<(u32, [u8; SALT_LEN]), Sender>,
    /// Counts datagrams opened; orders senders by their last use.
    opened: u64,
}

struct Sender {
    key: LessSafeKey,
    newest: u64,
    /// Bit n: the counter `newest - n` was seen.
    seen: u128,
    used: u64,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer")
            .field("keys", &self.keys)
            .field("counter", &self.counter)
            .field("senders", &self.senders.len())
            .finish_non_exhaustive()
    }
}

fn wire_epoch(epoch: Epoch) -> u32 {
    (epoch.get() & u64::from(u32::MAX)) as u32
}

fn derive(secret: &[u8; 32], salt: &[u8; SALT_LEN]) -> LessSafeKey {
    let prk = Salt::new(HKDF_SHA256, salt).extract(secret);
    let info: [&[u8]; 1] = [b"mesh gossip 1"];
    // RFC 5869 section 2.3: expanding fails beyond 255 hash lengths only; this is one.
    let okm = prk.expand(&info, &CHACHA20_POLY1305).expect("32 bytes are within HKDF's limit");
    LessSafeKey::new(UnboundKey::from(okm))
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 8..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Sealer {
    /// `salt` must be drawn anew, from a cryptographic source, at each start: under one key, a salt
    /// used twice repeats nonces.
    #[must_use]
    pub fn new(cluster: ClusterId, keys: Keyring, salt: [u8; SALT_LEN]) -> Self {
        let own = derive(&keys.primary.secret, &salt);
        Self { cluster, keys, salt, own, counter: 0, senders: BTreeMap::new(), opened: 0 }
    }

    /// Changes the keys. Datagrams in flight under a key that stays are still opened, once.
    pub fn set_keys(&mut self, keys: Keyring) {
        // A key that was replaced under its own epoch must not live on in the cache.
        let old = std::mem::replace(&mut self.keys, keys);
        self.senders.retain(|(epoch, _), _| {
            self.keys.find(*epoch).is_some_and(|key| old.find(*epoch) == Some(key))
        });
        // The counter goes on, so (salt, counter) stays unique even for a key that comes back.
        self.own = derive(&self.keys.primary.secret, &self.salt);
    }

    fn aad(&self, header: &[u8]) -> Vec<u8> {
        let mut aad = Vec::with_capacity(HEADER_LEN + 16);
        aad.extend_from_slice(header);
        aad.extend_from_slice(&self.cluster.bits().to_be_bytes());
        aad
    }

    /// Seals a payload. `None` if the datagram would be longer than [`MAX_DATAGRAM`].
    pub fn seal(&mut self, payload: &[u8]) -> Option<Vec<u8>> {
        if payload.len() + OVERHEAD > MAX_DATAGRAM {
            return None;
        }
        self.counter += 1;
        let mut out = Vec::with_capacity(payload.len() + OVERHEAD);
        out.push(VERSION);
        out.extend_from_slice(&wire_epoch(self.keys.primary.epoch).to_be_bytes());
        out.extend_from_slice(&self.salt);
        out.extend_from_slice(&self.counter.to_be_bytes());
        let aad = self.aad(&out);
        let mut body = payload.to_vec();
        self.own.seal_in_place_append_tag(nonce(self.counter), Aad::from(aad), &mut body).ok()?;
        out.extend_from_slice(&body);
        Some(out)
    }

    /// Opens a datagram.
    ///
    /// # Errors
    /// [`OpenError`]; nothing but a counter of the caller's need remember it.
    pub fn open(&mut self, datagram: &[u8]) -> Result<Vec<u8>, OpenError> {
        if datagram.len() > MAX_DATAGRAM || datagram.len() < OVERHEAD {
            return Err(OpenError::Length(datagram.len()));
        }
        let (header, body) = datagram.split_at(HEADER_LEN);
        let (version, rest) = (header[0], &header[1..]);
        if version != VERSION {
            return Err(OpenError::Version(version));
        }
        let (epoch, rest) = rest.split_first_chunk::<4>().ok_or(OpenError::Forged)?;
        let epoch = u32::from_be_bytes(*epoch);
        let (salt, rest) = rest.split_first_chunk::<SALT_LEN>().ok_or(OpenError::Forged)?;
        let counter = rest.first_chunk::<8>().ok_or(OpenError::Forged)?;
        let counter = u64::from_be_bytes(*counter);
        let key = self.keys.find(epoch).ok_or(OpenError::UnknownKey(epoch))?;

        let known = self.senders.get(&(epoch, *salt));
        if known.is_some_and(|sender| sender.is_replay(counter)) {
            return Err(OpenError::Replay);
        }
        let derived;
        let key = match known {
            Some(sender) => &sender.key,
            None => {
                derived = derive(&key.secret, salt);
                &derived
            }
        };
        let mut body = body.to_vec();
        let aad = self.aad(header);
        let length = key
            .open_in_place(nonce(counter), Aad::from(aad), &mut body)
            .map_err(|_| OpenError::Forged)?
            .len();
        body.truncate(length);
        self.remember(epoch, *salt, counter);
        Ok(body)
    }

    /// Notes an authentic datagram.
    fn remember(&mut self, epoch: u32, salt: [u8; SALT_LEN], counter: u64) {
        self.opened += 1;
        let full = self.senders.len() >= MAX_SENDERS;
        if full && !self.senders.contains_key(&(epoch, salt)) {
            let oldest = self.senders.iter().min_by_key(|(_, s)| s.used).map(|(key, _)| *key);
            oldest.map(|key| self.senders.remove(&key));
        }
        let Some(key) = self.keys.find(epoch) else { return };
        let sender = self.senders.entry((epoch, salt)).or_insert_with(|| Sender {
            key: derive(&key.secret, &salt),
            newest: counter,
            seen: 0,
            used: 0,
        });
        sender.used = self.opened;
        sender.mark(counter);
    }
}

impl Sender {
    fn is_replay(&self, counter: u64) -> bool {
        match self.newest.checked_sub(counter) {
            None => false,
            Some(age) if age >= WINDOW => true,
            Some(age) => self.seen >> age & 1 == 1,
        }
    }

    fn mark(&mut self, counter: u64) {
        match counter.checked_sub(self.newest) {
            Some(ahead) => {
                self.seen =
                    u32::try_from(ahead).ok().and_then(|n| self.seen.checked_shl(n)).unwrap_or(0);
                self.seen |= 1;
                self.newest = counter;
            }
            None => self.seen |= 1 << (self.newest - counter).min(WINDOW - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8, epoch: u64) -> GossipKey {
        GossipKey { epoch: Epoch::new(epoch).unwrap(), secret: [byte; 32] }
    }

    fn sealer(cluster: u128, key_byte: u8, salt: u8) -> Sealer {
        Sealer::new(ClusterId::from_bits(cluster), Keyring::new(key(key_byte, 1)), [salt; SALT_LEN])
    }

    #[test]
    fn other_keys_and_other_clusters_are_refused() {
        let datagram = sealer(1, 7, 1).seal(b"hello").unwrap();
        assert_eq!(sealer(1, 7, 2).open(&datagram), Ok(b"hello".to_vec()));
        assert_eq!(sealer(1, 8, 2).open(&datagram), Err(OpenError::Forged));
        assert_eq!(sealer(2, 7, 2).open(&datagram), Err(OpenError::Forged));
    }

    #[test]
    fn a_datagram_opens_once_and_late_ones_still_do() {
        let (mut from, mut to) = (sealer(1, 7, 1), sealer(1, 7, 2));
        let sent: Vec<_> = (0u8..200).map(|n| from.seal(&[n]).unwrap()).collect();
        assert_eq!(to.open(&sent[150]), Ok(vec![150]));
        assert_eq!(to.open(&sent[150]), Err(OpenError::Replay));
        assert_eq!(to.open(&sent[100]), Ok(vec![100]), "reordered");
        assert_eq!(to.open(&sent[100]), Err(OpenError::Replay));
        assert_eq!(to.open(&sent[0]), Err(OpenError::Replay), "out of the window");
        assert_eq!(to.open(&sent[199]), Ok(vec![199]));
        assert_eq!(to.open(&sent[150]), Err(OpenError::Replay), "still known after a jump");
        assert_eq!(to.open(&sent[151]), Ok(vec![151]));
    }

    #[test]
    fn no_two_datagrams_share_key_and_nonce() {
        let mut one = sealer(1, 7, 1);
        let first = one.seal(b"same").unwrap();
        let second = one.seal(b"same").unwrap();
        let restarted = sealer(1, 7, 2).seal(b"same").unwrap();
        assert_ne!(first, second);
        assert_ne!(first[HEADER_LEN..], restarted[HEADER_LEN..]);
    }

    #[test]
    fn keys_rotate_without_a_gap() {
        let (mut a, mut b) = (sealer(1, 7, 1), sealer(1, 7, 2));
        let ring = |primary: GossipKey, other: GossipKey| Keyring { primary, others: vec![other] };
        b.set_keys(ring(key(7, 1), key(9, 2)));
        assert!(b.open(&a.seal(b"old").unwrap()).is_ok());
        a.set_keys(ring(key(9, 2), key(7, 1)));
        assert!(b.open(&a.seal(b"new").unwrap()).is_ok());
        assert!(a.open(&b.seal(b"old still").unwrap()).is_ok());
        let late = a.seal(b"late").unwrap();
        b.set_keys(Keyring::new(key(7, 1)));
        assert_eq!(b.open(&late), Err(OpenError::UnknownKey(2)));
    }

    #[test]
    fn remembered_senders_are_bounded() {
        let mut to = sealer(1, 7, 0);
        for n in 0..(MAX_SENDERS as u128 + 10) {
            let mut from = Sealer::new(
                ClusterId::from_bits(1),
                Keyring::new(key(7, 1)),
                (n + 1).to_be_bytes(),
            );
            to.open(&from.seal(b"x").unwrap()).unwrap();
        }
        assert_eq!(to.senders.len(), MAX_SENDERS);
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens(
            payload in prop::collection::vec(any::<u8>(), 0..MAX_DATAGRAM - OVERHEAD)
        ) {
            let datagram = sealer(1, 7, 1).seal(&payload).unwrap();
            prop_assert!(datagram.len() <= MAX_DATAGRAM);
            prop_assert_eq!(sealer(1, 7, 2).open(&datagram).unwrap(), payload);
        }

        #[test]
        fn a_changed_bit_is_seen(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            at: prop::sample::Index,
            bit in 0u8..8,
        ) {
            let mut datagram = sealer(1, 7, 1).seal(&payload).unwrap();
            let at = at.index(datagram.len());
            datagram[at] ^= 1 << bit;
            prop_assert!(sealer(1, 7, 2).open(&datagram).is_err());
        }

        #[test]
        fn a_cut_datagram_is_refused(
            payload in prop::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index,
        ) {
            let datagram = sealer(1, 7, 1).seal(&payload).unwrap();
            prop_assert!(sealer(1, 7, 2).open(&datagram[..at.index(datagram.len())]).is_err());
        }

        #[test]
        fn garbage_is_refused(garbage in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert!(sealer(1, 7, 2).open(&garbage).is_err());
        }
    }
}
