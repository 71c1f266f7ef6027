//! Who this node is, on disk: `identity/` in the state directory with `key.pem`, `cert.pem`,
//! `ca.pem` and `node.json`. The set changes as a whole: it is written beside and renamed into
//! place, so a crash leaves the old or the new one, never a key without its certificate.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use mesh_control::model::{Role, RootId};
use mesh_types::{ClusterId, NodeId, NodeNumber};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    pki::{self, PkiError, Subject},
    tls,
};

/// Why the identity cannot be used.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The file system.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that is there but makes no sense.
    #[error("{path}: {why}; leave the cluster by force on this node and join again")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// Who this node is.
#[derive(Clone)]
pub struct Identity {
    /// Its id.
    pub node: NodeId,
    /// Its number.
    pub number: NodeNumber,
    /// Its number among the voters, if it is a manager.
    pub voter: NodeNumber,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its role, as its certificate has it.
    pub role: Role,
    /// The cluster's root certificate, PEM; the next one too while that takes its place.
    pub ca_pem: String,
    /// Its certificate, PEM, with the one of its issuer if that is no root to everybody yet.
    pub cert_pem: String,
    /// Its key, PEM (PKCS #8).
    pub key_pem: Zeroizing<String>,
    /// Seals the raft log and other data at rest. Never leaves the node.
    pub data_key: [u8; 32],
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("node", &self.node)
            .field("number", &self.number)
            .field("cluster", &self.cluster)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// `node.json`.
#[derive(Serialize, Deserialize)]
struct NodeFile {
    node: NodeId,
    number: NodeNumber,
    #[serde(default)]
    voter: Option<NodeNumber>,
    cluster: ClusterId,
    role: Role,
    data_key: String,
}

const KEY: &str = "key.pem";
const CERT: &str = "cert.pem";
const CA: &str = "ca.pem";
const NODE: &str = "node.json";

struct Places {
    current: PathBuf,
    new: PathBuf,
    old: PathBuf,
}

fn places(state_dir: &Path) -> Places {
    Places {
        current: state_dir.join("identity"),
        new: state_dir.join("identity.new"),
        old: state_dir.join("identity.old"),
    }
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io { path, source }
}

/// A fresh data key.
///
/// # Errors
/// [`IdentityError::Io`] without random bytes.
pub fn fresh_data_key() -> Result<[u8; 32], IdentityError> {
    use ring::rand::{SecureRandom, SystemRandom};
    let mut key = [0; 32];
    SystemRandom::new()
        .fill(&mut key)
        .map_err(|_| io_at(Path::new("/dev/urandom"))(io::Error::other("no random bytes")))?;
    Ok(key)
}

impl Identity {
    /// What is on disk; `None` if this node is in no cluster.
    ///
    /// # Errors
    /// [`IdentityError`]; an incomplete or contradictory identity is never taken for none.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, IdentityError> {
        let Places { current, old, .. } = places(state_dir);
        // A crash between the two renames of `save`.
        if !current.exists() && old.exists() {
            fs::rename(&old, &current).map_err(io_at(&current))?;
        }
        if !current.exists() {
            return Ok(None);
        }
        let read = |name: &str| {
            let path = current.join(name);
            fs::read_to_string(&path).map(Zeroizing::new).map_err(io_at(&path))
        };
        let bad =
            |name: &str, why: String| IdentityError::Malformed { path: current.join(name), why };
        let file: NodeFile =
            serde_json::from_str(&read(NODE)?).map_err(|e| bad(NODE, e.to_string()))?;
        let data_key = STANDARD
            .decode(&file.data_key)
            .ok()
            .and_then(|key| <[u8; 32]>::try_from(key).ok())
            .ok_or_else(|| bad(NODE, "the data key is not 32 bytes of base64".into()))?;
        let identity = Self {
            node: file.node,
            number: file.number,
            voter: file.voter.unwrap_or(file.number),
            cluster: file.cluster,
            role: file.role,
            ca_pem: read(CA)?.to_string(),
            cert_pem: read(CERT)?.to_string(),
            key_pem: read(KEY)?,
            data_key,
        };
        identity.check().map_err(|e| bad(CERT, e))?;
        Ok(Some(identity))
    }

    /// Names, keys and files must agree.
    fn check(&self) -> Result<(), String> {
        let text = |e: PkiError| e.to_string();
        let cert = pki::parse_pem(&self.cert_pem).map_err(text)?;
        pki::parse_pems(&self.ca_pem).map_err(text)?;
        let subject = pki::subject(&cert).map_err(text)?;
        let expected = Subject { node: self.node, role: self.role, cluster: self.cluster };
        if subject != expected {
            return Err(format!("the certificate is of {subject:?}, not of {expected:?}"));
        }
        let key = pki::public_key(&self.key_pem).map_err(text)?;
        if pki::PublicKey::of(&cert).map_err(text)? != key {
            return Err(format!("{CERT} is not of the key in {KEY}"));
        }
        Ok(())
    }

    /// Writes the set, durably.
    ///
    /// # Errors
    /// [`IdentityError`]; what was there before is then still there.
    pub fn save(&self, state_dir: &Path) -> Result<(), IdentityError> {
        let Places { current, new, old } = places(state_dir);
        self.check().map_err(|why| IdentityError::Malformed { path: current.clone(), why })?;
        private_dir(state_dir)?;
        remove_dir(&new)?;
        private_dir(&new)?;
        let file = NodeFile {
            node: self.node,
            number: self.number,
            voter: Some(self.voter),
            cluster: self.cluster,
            role: self.role,
            data_key: STANDARD.encode(self.data_key),
        };
        let json = serde_json::to_string_pretty(&file)
            .map_err(|e| io_at(&new.join(NODE))(io::Error::other(e)))?;
        write(&new.join(KEY), &self.key_pem)?;
        write(&new.join(CERT), &self.cert_pem)?;
        write(&new.join(CA), &self.ca_pem)?;
        write(&new.join(NODE), &json)?;
        sync(&new)?;
        if current.exists() {
            remove_dir(&old)?;
            fs::rename(&current, &old).map_err(io_at(&old))?;
        }
        fs::rename(&new, &current).map_err(io_at(&current))?;
        sync(state_dir)?;
        remove_dir(&old)
    }

    /// Forgets who this node is. It was nobody already: nothing happens.
    ///
    /// # Errors
    /// [`IdentityError::Io`].
    pub fn remove(state_dir: &Path) -> Result<(), IdentityError> {
        let Places { current, new, old } = places(state_dir);
        for dir in [new, old, current] {
            remove_dir(&dir)?;
        }
        if state_dir.exists() { sync(state_dir) } else { Ok(()) }
    }

    /// Whether the certificate is old enough to be renewed: at a point between half and four fifths
    /// of its life, another one for each certificate.
    #[must_use]
    pub fn renewal_due(&self, now: SystemTime) -> bool {
        let due = pki::parse_pem(&self.cert_pem).and_then(|cert| {
            let [random, ..] = pki::digest(&cert);
            pki::renew_at(&cert, f64::from(random) / 255.0)
        });
        due.is_ok_and(|due| now >= due)
    }

    /// The roots that it trusts, and the one of them that signed its certificate.
    #[must_use]
    pub fn roots(&self) -> (BTreeSet<RootId>, Option<RootId>) {
        let roots = pki::parse_pems(&self.ca_pem).unwrap_or_default();
        let leaf = pki::parse_pem(&self.cert_pem);
        let issuer = leaf.ok().and_then(|leaf| tls::issuer(&leaf, &roots));
        (roots.iter().map(|root| pki::digest(root)).collect(), issuer)
    }

    /// Whether the certificate ran out.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        let validity = pki::parse_pem(&self.cert_pem).and_then(|cert| pki::validity(&cert));
        validity.is_ok_and(|(_, end)| now > end)
    }

    /// As its certificate has it.
    #[must_use]
    pub fn subject(&self) -> Subject {
        Subject { node: self.node, role: self.role, cluster: self.cluster }
    }
}

fn private_dir(path: &Path) -> Result<(), IdentityError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_at(path))
}

fn remove_dir(path: &Path) -> Result<(), IdentityError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_at(path)(error)),
        _ => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<(), IdentityError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path).map_err(io_at(path))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io_at(path))
}

fn sync(dir: &Path) -> Result<(), IdentityError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_at(dir))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, time::Duration};

    use super::*;

    fn identity() -> Identity {
        let (cluster, node) = (ClusterId::from_bits(1), NodeId::from_bits(2));
        let now = SystemTime::now();
        let root = pki::Root::generate(cluster, now).unwrap();
        let key_pem = pki::generate_key().unwrap();
        let subject = Subject { node, role: Role::Manager, cluster };
        let public = pki::public_key(&key_pem).unwrap();
        let cert_pem = root.sign(subject, &public, Duration::from_secs(7200), now).unwrap();
        Identity {
            node,
            number: NodeNumber::new(3).unwrap(),
            voter: NodeNumber::new(7).unwrap(),
            cluster,
            role: Role::Manager,
            ca_pem: root.cert_pem,
            cert_pem,
            key_pem,
            data_key: fresh_data_key().unwrap(),
        }
    }

    fn dir(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("meshd-identity-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn an_identity_lasts_and_goes_and_its_key_is_private() {
        let dir = dir("lasts");
        assert!(Identity::load(&dir).unwrap().is_none());
        let mut saved = identity();
        saved.save(&dir).unwrap();
        saved.data_key = [5; 32];
        saved.save(&dir).unwrap();
        let loaded = Identity::load(&dir).unwrap().unwrap();
        assert_eq!(loaded.subject(), saved.subject());
        assert_eq!((loaded.number, loaded.voter), (saved.number, saved.voter));
        assert_eq!((loaded.key_pem, loaded.data_key), (saved.key_pem, [5; 32]));
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir.join("identity")), 0o700);
        assert_eq!(mode(dir.join("identity/key.pem")), 0o600);
        Identity::remove(&dir).unwrap();
        Identity::remove(&dir).unwrap();
        assert!(Identity::load(&dir).unwrap().is_none());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_certificate_is_renewed_between_half_and_four_fifths_of_its_life() {
        let identity = identity();
        let (from, to) = pki::validity(&pki::parse_pem(&identity.cert_pem).unwrap()).unwrap();
        let life = to.duration_since(from).unwrap();
        assert!(!identity.renewal_due(from + life.mul_f64(0.49)));
        assert!(identity.renewal_due(from + life.mul_f64(0.81)));
        assert!(!identity.expired(to) && identity.expired(to + Duration::from_secs(1)));
    }

    #[test]
    fn a_crash_between_the_renames_leaves_the_old_one() {
        let dir = dir("crash");
        identity().save(&dir).unwrap();
        fs::rename(dir.join("identity"), dir.join("identity.old")).unwrap();
        assert!(Identity::load(&dir).unwrap().is_some());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_key_without_its_certificate_is_refused() {
        let dir = dir("torn");
        identity().save(&dir).unwrap();
        fs::write(dir.join("identity/key.pem"), pki::generate_key().unwrap().as_bytes()).unwrap();
        let refused = Identity::load(&dir).unwrap_err().to_string();
        assert!(refused.contains("is not of the key"), "{refused}");
        fs::remove_file(dir.join("identity/key.pem")).unwrap();
        assert!(Identity::load(&dir).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
