//! TLS between nodes: version 1.3 alone, both sides show a certificate on every connection, and
//! the names in it say who the other side is.
//!
//! Nothing is resumed: each connection is judged anew, so an expired certificate ends with the
//! connection that it opened.

use std::{fmt, sync::Arc, time::SystemTime};

use mesh_control::model::{Role, RootId};
use mesh_types::{ClusterId, NodeId};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use thiserror::Error as ThisError;

use crate::{
    identity::Identity,
    pki::{self, PkiError, PublicKey, Subject},
};

/// Why there is no TLS configuration.
#[derive(Debug, ThisError)]
pub enum TlsError {
    /// A certificate.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A key that does not parse.
    #[error("the node's key cannot be used: {0}")]
    Key(String),
    /// rustls.
    #[error("TLS: {0}")]
    Tls(#[from] Error),
}

/// Who is on the other side of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A node of this cluster: its certificate was verified.
    Node(Subject),
    /// Someone with a key and no certificate of this cluster. May ask to join, nothing else.
    Joiner(PublicKey),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(Subject { node, role: Role::Manager, .. }) => write!(f, "manager {node}"),
            Self::Node(Subject { node, role: Role::Worker, .. }) => write!(f, "worker {node}"),
            Self::Joiner(_) => f.write_str("a node that is not in the cluster"),
        }
    }
}

/// Whom a client wants to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Expect {
    /// This very node.
    Node(NodeId),
    /// Any manager.
    Manager,
    /// Any node of the cluster.
    Member,
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(f, "node {node}"),
            Self::Manager => f.write_str("a manager"),
            Self::Member => f.write_str("a member of the cluster"),
        }
    }
}

impl Expect {
    fn check(self, subject: Subject) -> Result<(), String> {
        let fits = match self {
            Self::Node(node) => subject.node == node,
            Self::Manager => subject.role == Role::Manager,
            Self::Member => true,
        };
        if fits { Ok(()) } else { Err(format!("it is {}, not {self}", Peer::Node(subject))) }
    }
}

fn refused(why: impl fmt::Display) -> Error {
    Error::General(why.to_string())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Leaf first; the roots too, for those who have the digest of one alone.
fn chain(pems: &[&str], key_pem: &str) -> Result<Chain, TlsError> {
    let certs = pems.iter().map(|pem| pki::parse_pems(pem)).collect::<Result<Vec<_>, _>>()?;
    let certs = certs.into_iter().flatten().collect();
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|e| TlsError::Key(e.to_string()))?;
    Ok((certs, key))
}

fn store(roots: Vec<CertificateDer<'static>>) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root)?;
    }
    Ok(store)
}

/// Which of these roots signed a certificate itself. Dates play no part.
pub(crate) fn issuer(
    leaf: &CertificateDer<'_>,
    roots: &[CertificateDer<'static>],
) -> Option<RootId> {
    let (since, _) = pki::validity(leaf).ok()?;
    let then = UnixTime::since_unix_epoch(since.duration_since(SystemTime::UNIX_EPOCH).ok()?);
    let parsed = ParsedCertificate::try_from(leaf).ok()?;
    let all = provider().signature_verification_algorithms.all;
    let signed = |root: &&CertificateDer<'static>| {
        store(vec![(*root).clone()]).is_ok_and(|root| {
            verify_server_cert_signed_by_trust_anchor(&parsed, &root, &[], then, all).is_ok()
        })
    };
    roots.iter().find(signed).map(|root| pki::digest(root))
}

/// What a listener needs.
#[derive(Debug, Clone)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
    verifier: Arc<MemberOrJoiner>,
}

impl ServerTls {
    /// For a member of a cluster.
    ///
    /// # Errors
    /// [`TlsError`] if the identity is unusable.
    pub fn new(identity: &Identity) -> Result<Self, TlsError> {
        let provider = provider();
        let roots = store(pki::parse_pems(&identity.ca_pem)?)?;
        let members =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .map_err(|e| TlsError::Key(e.to_string()))?;
        let verifier = Arc::new(MemberOrJoiner { members, cluster: identity.cluster });
        let (certs, key) = chain(&[&identity.cert_pem, &identity.ca_pem], &identity.key_pem)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::clone(&verifier) as _)
            .with_single_cert(certs, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config), verifier })
    }

    /// Who a client is, after the handshake.
    ///
    /// # Errors
    /// The reason why it is nobody.
    pub fn peer(&self, certs: Option<&[CertificateDer<'_>]>) -> Result<Peer, Error> {
        let (leaf, rest) =
            certs.and_then(<[_]>::split_first).ok_or(Error::NoCertificatesPresented)?;
        self.verifier.judge(leaf, rest, UnixTime::now())
    }
}

/// Lets in members, and strangers with a certificate of their own as joiners.
#[derive(Debug)]
struct MemberOrJoiner {
    members: Arc<dyn ClientCertVerifier>,
    cluster: ClusterId,
}

impl MemberOrJoiner {
    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Peer, Error> {
        // A certificate that another root signed, or ours that expired, is not self-issued: its
        // holder is refused, not taken for a joiner.
        if pki::is_self_issued(leaf).map_err(refused)? {
            return PublicKey::of(leaf).map(Peer::Joiner).map_err(refused);
        }
        self.members.verify_client_cert(leaf, rest, now)?;
        let subject = pki::subject(leaf).map_err(refused)?;
        if subject.cluster != self.cluster {
            return Err(refused(format!("it is of cluster {}", subject.cluster)));
        }
        Ok(Peer::Node(subject))
    }
}

impl ClientCertVerifier for MemberOrJoiner {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hint: a joiner would take it for "no certificate of yours will do".
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge(leaf, rest, now).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(refused("TLS 1.2 is not spoken between nodes"))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.members.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.members.supported_verify_schemes()
    }
}

/// What a client needs: its own certificate and whom it trusts.
#[derive(Debug, Clone)]
pub struct ClientTls {
    certs: Arc<Chain>,
    trust: Trust,
}

#[derive(Debug, Clone)]
enum Trust {
    /// A member pins its cluster's root, or both while another one takes its place.
    Roots(Arc<RootCertStore>, ClusterId),
    /// A joiner has the root's digest from its token.
    Digest([u8; 32]),
}

impl ClientTls {
    /// For a member of a cluster.
    ///
    /// # Errors
    /// [`TlsError`] if the identity is unusable.
    pub fn member(identity: &Identity) -> Result<Self, TlsError> {
        let certs = chain(&[&identity.cert_pem], &identity.key_pem)?;
        let roots = Arc::new(store(pki::parse_pems(&identity.ca_pem)?)?);
        Ok(Self { certs: Arc::new(certs), trust: Trust::Roots(roots, identity.cluster) })
    }

    /// For a node that wants to join: its new key, and the root's digest of the token.
    ///
    /// # Errors
    /// [`TlsError`] if the key is unusable.
    pub fn joiner(key_pem: &str, root_digest: [u8; 32]) -> Result<Self, TlsError> {
        Self::showing(&pki::joiner_certificate(key_pem, SystemTime::now())?, key_pem, root_digest)
    }

    /// As [`ClientTls::joiner`], with whatever certificate.
    pub(crate) fn showing(
        cert_pem: &str,
        key_pem: &str,
        root_digest: [u8; 32],
    ) -> Result<Self, TlsError> {
        let certs = chain(&[cert_pem], key_pem)?;
        Ok(Self { certs: Arc::new(certs), trust: Trust::Digest(root_digest) })
    }

    /// The configuration of one connection.
    pub(crate) fn config(&self, expect: Expect) -> Result<Arc<ClientConfig>, TlsError> {
        let provider = provider();
        let verifier = ServerVerifier {
            trust: self.trust.clone(),
            expect,
            algorithms: provider.signature_verification_algorithms,
        };
        let (certs, key) = &*self.certs;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(certs.clone(), key.clone_key())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(Arc::new(config))
    }
}

/// Nodes are known by the names in their certificates, not by what they are dialled as.
pub(crate) fn any_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into())
}

#[derive(Debug)]
struct ServerVerifier {
    trust: Trust,
    expect: Expect,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let roots = match &self.trust {
            Trust::Roots(roots, _) => Arc::clone(roots),
            Trust::Digest(digest) => {
                let pinned = rest.iter().find(|cert| pki::digest(cert) == *digest);
                let pinned = pinned.ok_or_else(|| {
                    refused(
                        "the manager's cluster is not the one that the join token is for: its root \
                         certificate does not match the token",
                    )
                })?;
                Arc::new(store(vec![pinned.clone().into_owned()])?)
            }
        };
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, rest, now, self.algorithms.all)?;
        let subject = pki::subject(leaf).map_err(refused)?;
        match &self.trust {
            Trust::Roots(_, cluster) if subject.cluster != *cluster => {
                return Err(refused(format!("it is of cluster {}", subject.cluster)));
            }
            _ => {}
        }
        self.expect.check(subject).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(refused("TLS 1.2 is not spoken between nodes"))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
