//! Sealing at rest: ChaCha20-Poly1305 (RFC 8439) with a key of this node alone. The tag is the
//! checksum too, and the place of a record is authenticated with it, so that a record moved to
//! another index or table does not open.

use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom, SystemRandom},
};
use thiserror::Error;

/// Why a record did not seal or open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SealError {
    /// The key has the wrong length (cannot happen with 32 bytes).
    #[error("the data key is unusable")]
    Key,
    /// The system gave no random bytes for a nonce.
    #[error("the system's random source failed")]
    Random,
    /// Damaged, moved, or sealed with another key.
    #[error("it is damaged, or was sealed with another data key")]
    Open,
}

pub(crate) struct Sealer {
    key: LessSafeKey,
    random: SystemRandom,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

impl Sealer {
    pub(crate) fn new(key: &[u8; 32]) -> Result<Self, SealError> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key).map_err(|_| SealError::Key)?;
        Ok(Self { key: LessSafeKey::new(key), random: SystemRandom::new() })
    }

    /// Nonce, ciphertext, tag. A random 96-bit nonce is safe for 2³² records under one key (NIST
    /// SP 800-38D section 8.3): a log at 100 entries per second takes over a year for 1 % of that
    /// collision bound, and a node that joins again has a new key.
    pub(crate) fn seal(&self, place: &str, mut plain: Vec<u8>) -> Result<Vec<u8>, SealError> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| SealError::Random)?;
        self.key
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(place.as_bytes()),
                &mut plain,
            )
            .map_err(|_| SealError::Key)?;
        let mut out = Vec::with_capacity(NONCE_LEN + plain.len());
        out.extend_from_slice(&nonce);
        out.append(&mut plain);
        Ok(out)
    }

    pub(crate) fn open(&self, place: &str, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let (nonce, body) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Open)?;
        let mut body = body.to_vec();
        let length = self
            .key
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::from(place.as_bytes()),
                &mut body,
            )
            .map_err(|_| SealError::Open)?
            .len();
        body.truncate(length);
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn opens_what_it_sealed_and_nothing_else(
            plain: Vec<u8>, flip: prop::sample::Index, bit in 0u8..8,
        ) {
            let sealer = Sealer::new(&[7; 32]).unwrap();
            let sealed = sealer.seal("log 1", plain.clone()).unwrap();
            prop_assert_eq!(sealer.open("log 1", &sealed).unwrap(), plain);
            prop_assert_eq!(sealer.open("log 2", &sealed), Err(SealError::Open));
            prop_assert_eq!(Sealer::new(&[8; 32]).unwrap().open("log 1", &sealed), Err(SealError::Open));
            let mut damaged = sealed.clone();
            damaged[flip.index(sealed.len())] ^= 1 << bit;
            prop_assert_eq!(sealer.open("log 1", &damaged), Err(SealError::Open));
            prop_assert!(sealer.open("log 1", &sealed[..flip.index(sealed.len())]).is_err());
        }
    }
}
