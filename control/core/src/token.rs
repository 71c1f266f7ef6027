//! Join tokens: `SWMTKN-1-<SHA-256 of the root certificate, 50 base-36 digits>-<secret, 25 base-36
//! digits>`, Swarm's form. The digest pins the cluster's CA for the one who joins; the secret says
//! to the cluster that he may, and as what.

use core::{fmt, hint, str::FromStr};

use ring::digest;
use thiserror::Error;

use crate::model::{Cluster, Role};

const PREFIX: &str = "SWMTKN-1-";
/// 36^50 > 2^256 > 36^49.
const DIGEST_DIGITS: usize = 50;
/// 36^25 > 2^128 > 36^24.
const SECRET_DIGITS: usize = 25;
const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// A join token.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the root certificate's DER.
    pub digest: [u8; 32],
    /// The cluster's secret for the role.
    pub secret: [u8; 16],
}

/// A text that is no join token, or one of another cluster or time. It says no more on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("invalid join token")]
pub struct InvalidToken;

impl JoinToken {
    /// The token for a root certificate (DER) and a secret.
    #[must_use]
    pub fn new(root_der: &[u8], secret: [u8; 16]) -> Self {
        Self { digest: root_digest(root_der), secret }
    }

    /// Whether a certificate (DER) is the root that the token pins.
    #[must_use]
    pub fn pins(&self, root_der: &[u8]) -> bool {
        equal(&self.digest, &root_digest(root_der))
    }

    /// What the bearer may become. The digest is for the bearer to check, with [`Self::pins`].
    ///
    /// # Errors
    /// [`InvalidToken`] if the secret is neither role's.
    pub fn role(&self, cluster: &Cluster) -> Result<Role, InvalidToken> {
        role_of(&self.secret, cluster)
    }
}

/// What the bearer of a secret may become; both secrets are always compared, in constant time.
///
/// # Errors
/// [`InvalidToken`] if it is neither role's.
pub fn role_of(secret: &[u8; 16], cluster: &Cluster) -> Result<Role, InvalidToken> {
    let manager = equal(secret, &cluster.manager_secret);
    let worker = equal(secret, &cluster.worker_secret);
    match (manager, worker) {
        (true, _) => Ok(Role::Manager),
        (false, true) => Ok(Role::Worker),
        (false, false) => Err(InvalidToken),
    }
}

/// SHA-256 of a root certificate in DER.
#[must_use]
pub fn root_digest(root_der: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, root_der).as_ref());
    out
}

/// Compares in a time that does not depend on the contents.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |acc, (a, b)| hint::black_box(acc | (a ^ b)));
    a.len() == b.len() && differing == 0
}

/// Writes a big-endian number with that many base-36 digits.
fn encode<const BYTES: usize>(bytes: [u8; BYTES], digits: usize) -> String {
    let mut number = bytes;
    let mut out = vec![b'0'; digits];
    for slot in out.iter_mut().rev() {
        let mut rest = 0u16;
        for byte in &mut number {
            let value = rest * 256 + u16::from(*byte);
            *byte = (value / 36) as u8;
            rest = value % 36;
        }
        *slot = DIGITS[usize::from(rest)];
    }
    out.into_iter().map(char::from).collect()
}

/// The inverse of [`encode`]; `None` for other digits or a number that does not fit.
fn decode<const BYTES: usize>(text: &str, digits: usize) -> Option<[u8; BYTES]> {
    if text.len() != digits {
        return None;
    }
    let mut number = [0u8; BYTES];
    for digit in text.bytes() {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'z' => digit - b'a' + 10,
            _ => return None,
        };
        let mut carry = u16::from(value);
        for byte in number.iter_mut().rev() {
            let sum = u16::from(*byte) * 36 + carry;
            *byte = (sum & 0xff) as u8;
            carry = sum >> 8;
        }
        if carry != 0 {
            return None;
        }
    }
    Some(number)
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = encode(self.digest, DIGEST_DIGITS);
        let secret = encode(self.secret, SECRET_DIGITS);
        write!(f, "{PREFIX}{digest}-{secret}")
    }
}

/// The secret stays out of logs.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({PREFIX}{}-…)", encode(self.digest, DIGEST_DIGITS))
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let body = text.strip_prefix(PREFIX).ok_or(InvalidToken)?;
        let (digest, secret) = body.split_once('-').ok_or(InvalidToken)?;
        Ok(Self {
            digest: decode(digest, DIGEST_DIGITS).ok_or(InvalidToken)?,
            secret: decode(secret, SECRET_DIGITS).ok_or(InvalidToken)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_form_is_swarms() {
        let token = JoinToken { digest: [0xff; 32], secret: [0xff; 16] };
        let text = token.to_string();
        assert_eq!(text.len(), PREFIX.len() + 50 + 1 + 25);
        // 2^128 - 1 as ids write it.
        assert!(text.ends_with("-f5lxx1zz5pnorynqglhzmsp33"), "{text}");
        assert!(text[..text.len() - 1].parse::<JoinToken>().is_err());
        let beyond = format!("{}4", &text[..text.len() - 1]);
        assert_eq!(beyond.parse::<JoinToken>(), Err(InvalidToken));
        assert!(!format!("{token:?}").contains("f5lxx1"));
    }

    #[test]
    fn junk_is_refused() {
        for junk in ["", "SWMTKN-1-", "SWMTKN-2-a-b", "SWMTKN-1-a-b", "SWMTKN-1-é-é"] {
            assert_eq!(junk.parse::<JoinToken>(), Err(InvalidToken), "{junk}");
        }
        assert_eq!(InvalidToken.to_string(), "invalid join token");
    }

    #[test]
    fn the_digest_pins_the_root() {
        let token = JoinToken::new(b"root", [1; 16]);
        assert!(token.pins(b"root"));
        assert!(!token.pins(b"another"));
    }

    proptest! {
        #[test]
        fn tokens_round_trip(digest: [u8; 32], secret: [u8; 16]) {
            let token = JoinToken { digest, secret };
            prop_assert_eq!(token.to_string().parse::<JoinToken>(), Ok(token));
        }

        #[test]
        fn any_text_is_either_refused_or_written_back(text in "(SWMTKN-1-)?[0-9a-z-]{60,80}") {
            if let Ok(token) = text.parse::<JoinToken>() {
                prop_assert_eq!(token.to_string(), text);
            }
        }
    }
}
