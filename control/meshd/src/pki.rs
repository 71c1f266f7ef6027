//! The cluster's certificates: a root that every member pins, and one certificate per node that
//! says who it is. The names are Swarm's: CN = node id, OU = role, O = cluster id.
//!
//! The root's key is in the store (sealed at rest), so every manager can sign. A node makes its key
//! itself; it proves that it has it in the TLS handshake, and only the public half is signed.
//!
//! While another root takes the root's place, certificates come with the new root's key signed by
//! the old root: a text of PEM may hold several.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_control::model::Role;
use mesh_types::{ClusterId, NodeId};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SubjectPublicKeyInfo, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};
use zeroize::Zeroizing;

/// A root lives 20 years, as Swarm's.
const ROOT_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Certificates begin an hour back, so that clocks may differ by as much.
const BACKDATE: Duration = Duration::from_secs(3600);
/// A shorter life leaves no time to renew.
pub const SHORTEST_LIFE: Duration = Duration::from_secs(3600);

/// Why a certificate was not made or not understood.
#[derive(Debug, Error)]
pub enum PkiError {
    /// Making or signing.
    #[error("cannot make the certificate of {subject}: {source}")]
    Make {
        /// Whose.
        subject: String,
        /// Why.
        source: rcgen::Error,
    },
    /// Not PEM, or not a certificate.
    #[error("not a certificate: {0}")]
    Parse(String),
    /// A certificate without the names of a node.
    #[error("the certificate names no node of a cluster: {0}")]
    Names(String),
    /// A key of another kind than ECDSA on P-256.
    #[error("the key is not an ECDSA P-256 key")]
    Key,
}

/// The OU of a role.
#[must_use]
pub const fn unit(role: Role) -> &'static str {
    match role {
        Role::Manager => "swarm-manager",
        Role::Worker => "swarm-worker",
    }
}

/// Who a certificate of a cluster says its holder is. Meaningful only once the chain was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// CN.
    pub node: NodeId,
    /// OU.
    pub role: Role,
    /// O.
    pub cluster: ClusterId,
}

/// A root and its key.
#[derive(Clone)]
pub struct Root {
    /// The certificate, PEM. Goes into the store and to every node.
    pub cert_pem: String,
    /// The key, PEM (PKCS #8). Goes into the store alone.
    pub key_pem: Zeroizing<String>,
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}

fn failed(subject: &str) -> impl Fn(rcgen::Error) -> PkiError + use<> {
    let subject = subject.to_owned();
    move |source| PkiError::Make { subject: subject.clone(), source }
}

fn valid(params: &mut CertificateParams, now: SystemTime, life: Duration) {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // `date_time_ymd` names the type of the dates without another dependency.
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since.saturating_sub(BACKDATE);
    params.not_after = epoch + since + life;
}

impl Root {
    /// A new root for a cluster.
    ///
    /// # Errors
    /// [`PkiError::Make`] without random bytes.
    pub fn generate(cluster: ClusterId, now: SystemTime) -> Result<Self, PkiError> {
        let failed = failed("the cluster");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(&failed)?;
        // One more below it: its successor, while that takes its place.
        let cert = root_params(cluster, now, 1).self_signed(&key).map_err(&failed)?;
        Ok(Self { cert_pem: cert.pem(), key_pem: Zeroizing::new(key.serialize_pem()) })
    }

    /// Signs the key of the root that is to take this one's place: who trusts this one alone trusts
    /// its certificates by that.
    ///
    /// # Errors
    /// [`PkiError::Make`], if one of them is no root.
    pub fn cross_sign(
        &self,
        successor: &Self,
        cluster: ClusterId,
        now: SystemTime,
    ) -> Result<String, PkiError> {
        let failed = failed("the cluster's next root");
        let issuer = self.issuer().map_err(&failed)?;
        let key = KeyPair::from_pem(&successor.key_pem).map_err(&failed)?;
        let mut params = root_params(cluster, now, 0);
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&key, &issuer).map_err(&failed)?.pem())
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, rcgen::Error> {
        Issuer::from_ca_cert_pem(&self.cert_pem, KeyPair::from_pem(&self.key_pem)?)
    }

    /// Signs a node's key. What else the node may have asked for plays no part: names, usages and
    /// dates are decided here.
    ///
    /// # Errors
    /// [`PkiError`], if the root is none or the key is not ECDSA on P-256.
    pub fn sign(
        &self,
        subject: Subject,
        public_key: &PublicKey,
        life: Duration,
        now: SystemTime,
    ) -> Result<String, PkiError> {
        let failed = failed(&format!("node {}", subject.node));
        let issuer = self.issuer().map_err(&failed)?;
        let key = SubjectPublicKeyInfo::from_der(&public_key.0).map_err(&failed)?;
        let mut params = node_params(&subject.node.to_string()).map_err(&failed)?;
        params.distinguished_name.push(DnType::OrganizationalUnitName, unit(subject.role));
        params.distinguished_name.push(DnType::OrganizationName, subject.cluster.to_string());
        params.use_authority_key_identifier_extension = true;
        valid(&mut params, now, life.max(SHORTEST_LIFE));
        Ok(params.signed_by(&key, &issuer).map_err(&failed)?.pem())
    }

    /// SHA-256 of the root certificate (DER): what join tokens carry.
    ///
    /// # Errors
    /// [`PkiError::Parse`].
    pub fn digest(&self) -> Result<[u8; 32], PkiError> {
        Ok(digest(&parse_pem(&self.cert_pem)?))
    }
}

/// `below`: authorities that it may sign, one below the other.
fn root_params(cluster: ClusterId, now: SystemTime, below: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "swarm-ca");
    params.distinguished_name.push(DnType::OrganizationName, cluster.to_string());
    valid(&mut params, now, ROOT_LIFE);
    params
}

fn node_params(name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::NoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![SanType::DnsName(name.try_into()?)];
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

/// A public key, DER of SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7); ECDSA on P-256.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey(Vec<u8>);

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PublicKey({} bytes)", self.0.len())
    }
}

impl PublicKey {
    /// The key of a certificate.
    ///
    /// # Errors
    /// [`PkiError::Key`] for keys of other kinds, [`PkiError::Parse`].
    pub fn of(cert: &CertificateDer<'_>) -> Result<Self, PkiError> {
        Self::from_der(parse_der(cert)?.tbs_certificate.subject_pki.raw)
    }

    /// As it comes from a node.
    ///
    /// # Errors
    /// [`PkiError::Key`] if it is none, or one of another kind.
    pub fn from_der(der: &[u8]) -> Result<Self, PkiError> {
        let info = SubjectPublicKeyInfo::from_der(der).map_err(|_| PkiError::Key)?;
        let right = info.algorithm() == &PKCS_ECDSA_P256_SHA256;
        if right { Ok(Self(der.to_vec())) } else { Err(PkiError::Key) }
    }

    /// DER of SubjectPublicKeyInfo.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.0
    }

    /// The key of a pair.
    #[must_use]
    pub fn of_pair(key: &KeyPair) -> Self {
        Self(key.subject_public_key_info())
    }
}

/// A node's key as it is made on the node: PEM (PKCS #8).
///
/// # Errors
/// [`PkiError::Make`] without random bytes.
pub fn generate_key() -> Result<Zeroizing<String>, PkiError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed("this node"))?;
    Ok(Zeroizing::new(key.serialize_pem()))
}

/// The public half of a key.
///
/// # Errors
/// [`PkiError::Make`] if it is no key.
pub fn public_key(key_pem: &str) -> Result<PublicKey, PkiError> {
    let key = KeyPair::from_pem(key_pem).map_err(failed("this node"))?;
    Ok(PublicKey::of_pair(&key))
}

/// A certificate that a node signs itself, to show its key when it joins. It vouches for nothing.
///
/// # Errors
/// [`PkiError::Make`] if it is no key.
pub fn joiner_certificate(key_pem: &str, now: SystemTime) -> Result<String, PkiError> {
    let failed = failed("this node");
    let key = KeyPair::from_pem(key_pem).map_err(&failed)?;
    let mut params = node_params("joiner").map_err(&failed)?;
    valid(&mut params, now, Duration::from_secs(24 * 3600));
    Ok(params.self_signed(&key).map_err(&failed)?.pem())
}

/// SHA-256.
#[must_use]
pub fn digest(cert: &CertificateDer<'_>) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, cert).as_ref());
    out
}

/// The first certificate of a PEM text.
///
/// # Errors
/// [`PkiError::Parse`].
pub fn parse_pem(pem: &str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| PkiError::Parse(e.to_string()))
}

/// All certificates of a PEM text; one at least.
///
/// # Errors
/// [`PkiError::Parse`].
pub fn parse_pems(pem: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let certs = certs.map_err(|error| PkiError::Parse(error.to_string()))?;
    if certs.is_empty() {
        return Err(PkiError::Parse("there is none in the text".into()));
    }
    Ok(certs)
}

fn parse_der<'a>(cert: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PkiError> {
    match X509Certificate::from_der(cert) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(PkiError::Parse("bytes after its end".into())),
        Err(error) => Err(PkiError::Parse(error.to_string())),
    }
}

/// Whether a certificate was issued by its own subject, as a joiner's is.
pub(crate) fn is_self_issued(cert: &CertificateDer<'_>) -> Result<bool, PkiError> {
    let parsed = parse_der(cert)?;
    Ok(parsed.subject().as_raw() == parsed.issuer().as_raw())
}

/// Whom a certificate names. The caller must have verified the chain.
///
/// # Errors
/// [`PkiError`] if it is no node's certificate.
pub fn subject(cert: &CertificateDer<'_>) -> Result<Subject, PkiError> {
    fn one<'a>(
        what: &str,
        mut values: impl Iterator<Item = &'a x509_parser::x509::AttributeTypeAndValue<'a>>,
    ) -> Result<&'a str, PkiError> {
        let value = values.next().and_then(|value| value.as_str().ok());
        match (value, values.next()) {
            (Some(value), None) => Ok(value),
            _ => Err(PkiError::Names(format!("not exactly one {what}"))),
        }
    }
    let parsed = parse_der(cert)?;
    let name: &X509Name<'_> = parsed.subject();
    let names = |e: mesh_types::IdParseError| PkiError::Names(e.to_string());
    let role = match one("OU", name.iter_organizational_unit())? {
        "swarm-manager" => Role::Manager,
        "swarm-worker" => Role::Worker,
        other => return Err(PkiError::Names(format!("unknown role `{other}`"))),
    };
    Ok(Subject {
        node: one("CN", name.iter_common_name())?.parse().map_err(names)?,
        role,
        cluster: one("O", name.iter_organization())?.parse().map_err(names)?,
    })
}

/// From when to when a certificate is valid.
///
/// # Errors
/// [`PkiError::Parse`].
pub fn validity(cert: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), PkiError> {
    let parsed = parse_der(cert)?;
    let time = |at: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(at.timestamp()).unwrap_or(0))
    };
    Ok((time(parsed.validity().not_before), time(parsed.validity().not_after)))
}

/// When to renew: at a point of 50–80 % of its life that `random` (0..=1) picks, as Swarm does, so
/// that a cluster's nodes do not come all at once.
///
/// # Errors
/// [`PkiError::Parse`].
pub fn renew_at(cert: &CertificateDer<'_>, random: f64) -> Result<SystemTime, PkiError> {
    let (from, to) = validity(cert)?;
    let life = to.duration_since(from).unwrap_or_default();
    Ok(from + life.mul_f64(0.5 + 0.3 * random.clamp(0.0, 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject_of(bits: u128, role: Role) -> Subject {
        let cluster = ClusterId::from_bits(7);
        Subject { node: NodeId::from_bits(bits), role, cluster }
    }

    #[test]
    fn a_signed_certificate_says_who_the_node_is_and_for_how_long() {
        let now = SystemTime::now();
        let root = Root::generate(ClusterId::from_bits(7), now).unwrap();
        let key = public_key(&generate_key().unwrap()).unwrap();
        let life = Duration::from_secs(90 * 24 * 3600);
        for role in [Role::Manager, Role::Worker] {
            let pem = root.sign(subject_of(5, role), &key, life, now).unwrap();
            let cert = parse_pem(&pem).unwrap();
            assert_eq!(subject(&cert).unwrap(), subject_of(5, role));
            assert_eq!(PublicKey::of(&cert).unwrap(), key);
            let (from, to) = validity(&cert).unwrap();
            assert!(from <= now - Duration::from_secs(3599));
            assert!(to <= now + life && to > now + life - Duration::from_secs(2));
            let renew = renew_at(&cert, 0.5).unwrap().duration_since(from).unwrap();
            assert!(renew > (life / 2) && renew < life.mul_f64(0.8));
        }
    }

    #[test]
    fn the_root_and_a_joiners_certificate_name_no_node() {
        let now = SystemTime::now();
        let root = Root::generate(ClusterId::from_bits(7), now).unwrap();
        assert!(subject(&parse_pem(&root.cert_pem).unwrap()).is_err());
        let joiner = joiner_certificate(&generate_key().unwrap(), now).unwrap();
        let joiner = parse_pem(&joiner).unwrap();
        assert!(subject(&joiner).is_err());
        assert!(is_self_issued(&joiner).unwrap());
    }

    #[test]
    fn a_key_of_another_kind_is_not_signed() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let cert = CertificateParams::new(["x".to_owned()]).unwrap().self_signed(&key).unwrap();
        assert!(matches!(PublicKey::of(cert.der()), Err(PkiError::Key)));
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        assert!(parse_pem("nonsense").is_err());
        assert!(subject(&CertificateDer::from(vec![0x30, 0x82, 0xff])).is_err());
    }
}
