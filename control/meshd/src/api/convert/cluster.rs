//! The cluster and its settings.

use std::net::IpAddr;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use ipnetwork::IpNetwork;
use mesh_api::{self as api, TlsInfo};
use mesh_control::model::{Availability, Cluster, ClusterSpec};
use mesh_raft::{SNAPSHOT_ENTRIES, Timers};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{time, version};
use crate::{
    api::{
        ApiError,
        backend::{InitRequest, JoinRequest, JoinTokens, NodeAddress},
    },
    node::HEARTBEAT,
};

/// The port of managers. Not an option yet.
const MANAGER_PORT: u16 = 2377;
const NANOS: u64 = 1_000_000_000;
/// How often a node is heard.
const HEARTBEAT_NANOS: u64 = HEARTBEAT.as_secs() * NANOS;

/// `GET /swarm`; without tokens as part of `GET /info`.
pub(crate) fn swarm(cluster: &Cluster, tokens: Option<JoinTokens>) -> api::Swarm {
    let rotation = cluster.ca_rotation.as_deref();
    let mut spec = spec(&cluster.spec);
    spec.ca_config.force_rotate = cluster.ca_forced;
    api::Swarm {
        id: cluster.id.to_string(),
        version: version(&cluster.meta),
        created_at: time(cluster.meta.created_ms),
        updated_at: time(cluster.meta.updated_ms),
        spec,
        // What is trusted until all have certificates of the next root, and who signs them.
        tls_info: tls_info(
            &cluster.ca_cert_pem,
            rotation.map_or(&cluster.ca_cert_pem, |next| &next.cert_pem),
        ),
        root_rotation_in_progress: rotation.is_some(),
        default_addr_pool: Some(
            cluster.spec.address_pools.iter().map(ToString::to_string).collect(),
        ),
        subnet_size: cluster.spec.subnet_len,
        data_path_port: cluster.spec.data_path_port,
        join_tokens: tokens
            .map(|tokens| api::JoinTokens { worker: tokens.worker, manager: tokens.manager }),
    }
}

/// The settings, with the figures that mesh has in place of Swarm's. A tick is a heartbeat.
pub(crate) fn spec(spec: &ClusterSpec) -> api::ClusterSpec {
    let timers = Timers::default();
    let election = timers.election_max.as_millis().div_ceil(timers.heartbeat.as_millis());
    api::ClusterSpec {
        name: "default".into(),
        labels: spec.labels.clone(),
        orchestration: api::Orchestration {
            task_history_retention_limit: Some(i64::from(spec.task_history)),
            reschedule_after: Some(spec.reschedule_after_secs.saturating_mul(NANOS)),
        },
        raft: api::RaftConfig {
            snapshot_interval: SNAPSHOT_ENTRIES,
            keep_old_snapshots: 0,
            log_entries_for_slow_followers: 500,
            election_tick: u64::try_from(election).unwrap_or(u64::MAX),
            heartbeat_tick: 1,
        },
        dispatcher: api::Dispatcher { heartbeat_period: HEARTBEAT_NANOS },
        ca_config: api::CaConfig {
            node_cert_expiry: spec.certificate_secs.saturating_mul(NANOS),
            ..api::CaConfig::default()
        },
        ..api::ClusterSpec::default()
    }
}

/// A root of trust, and the root that signs. The store made the certificates itself, so one that
/// does not parse shows as empty fields.
pub(crate) fn tls_info(trusted: &str, issuer: &str) -> TlsInfo {
    let mut info = TlsInfo { trust_root: trusted.to_owned(), ..TlsInfo::default() };
    let Ok((_, block)) = x509_parser::pem::parse_x509_pem(issuer.as_bytes()) else { return info };
    let Ok((_, certificate)) = X509Certificate::from_der(&block.contents) else { return info };
    info.cert_issuer_subject = BASE64.encode(certificate.subject().as_raw());
    info.cert_issuer_public_key = BASE64.encode(certificate.public_key().raw);
    info
}

/// `POST /swarm/init`: zero values mean defaults.
pub(crate) fn init(request: api::SwarmInit) -> Result<InitRequest, ApiError> {
    if request.force_new_cluster {
        return Err(ApiError::not_implemented("--force-new-cluster (ForceNewCluster)"));
    }
    if request.auto_lock_managers {
        return Err(ApiError::not_implemented("--autolock (AutoLockManagers)"));
    }
    check_listen(&request.listen_addr)?;
    refuse_other_settings(&request.spec)?;
    if request.spec.ca_config.force_rotate != 0 {
        return Err(ApiError::not_implemented("ForceRotate in a cluster that is being made"));
    }
    let mut spec = ClusterSpec { labels: request.spec.labels.clone(), ..ClusterSpec::default() };
    if !request.default_addr_pool.is_empty() {
        spec.address_pools = request
            .default_addr_pool
            .iter()
            .map(|pool| address_pool(pool))
            .collect::<Result<_, _>>()?;
    }
    if request.subnet_size != 0 {
        spec.subnet_len = u8::try_from(request.subnet_size)
            .ok()
            .filter(|len| (8..=29).contains(len))
            .ok_or_else(|| {
                ApiError::bad_request(format!(
                    "invalid SubnetSize {}: --default-addr-pool-mask-length must be 8 to 29",
                    request.subnet_size
                ))
            })?;
    }
    if let Some(pool) = spec.address_pools.iter().find(|pool| pool.prefix() > spec.subnet_len) {
        return Err(ApiError::bad_request(format!(
            "invalid DefaultAddrPool: {pool} is smaller than one subnet of /{}",
            spec.subnet_len
        )));
    }
    if request.data_path_port != 0 {
        spec.data_path_port = u16::try_from(request.data_path_port)
            .ok()
            .filter(|port| (1024..=49151).contains(port))
            .ok_or_else(|| {
                ApiError::bad_request(format!(
                    "invalid DataPathPort {}: must be 1024 to 49151",
                    request.data_path_port
                ))
            })?;
    }
    set(&mut spec, &request.spec)?;
    Ok(InitRequest {
        advertise: node_address("--advertise-addr", &request.advertise_addr)?,
        data_path: node_address("--data-path-addr", &request.data_path_addr)?,
        availability: availability(&request.availability)?,
        spec,
    })
}

/// The settings that can be changed later. What is left out stays.
fn set(spec: &mut ClusterSpec, sent: &api::ClusterSpec) -> Result<(), ApiError> {
    if let Some(limit) = sent.orchestration.task_history_retention_limit {
        spec.task_history = u32::try_from(limit).map_err(|_| {
            ApiError::bad_request(format!(
                "invalid --task-history-limit {limit}: must not be negative"
            ))
        })?;
    }
    if let Some(nanos) = sent.orchestration.reschedule_after {
        if nanos < NANOS {
            return Err(ApiError::bad_request(
                "invalid --reschedule-after: nodes are heard once a second, so it must be at \
                 least 1s",
            ));
        }
        spec.reschedule_after_secs = nanos.div_ceil(NANOS);
    }
    if sent.ca_config.node_cert_expiry != 0 {
        let seconds = sent.ca_config.node_cert_expiry / NANOS;
        if seconds < 3600 {
            return Err(ApiError::bad_request("minimum certificate expiry time must be 1h0m0s"));
        }
        spec.certificate_secs = seconds;
    }
    Ok(())
}

/// `POST /swarm/update`: the settings as they become. Docker's clients send all that they know.
pub(crate) fn update(
    sent: api::ClusterSpec,
    current: &ClusterSpec,
) -> Result<ClusterSpec, ApiError> {
    if !matches!(sent.name.as_str(), "" | "default") {
        return Err(ApiError::bad_request(format!(
            "invalid Name: \"{}\": swarm spec must be named \"default\"",
            sent.name
        )));
    }
    refuse_other_settings(&sent)?;
    let mut spec = current.clone();
    set(&mut spec, &sent)?;
    spec.labels = sent.labels;
    Ok(spec)
}

/// Settings that mesh has no counterpart for pass with Swarm's defaults, or as they are shown.
fn refuse_other_settings(spec: &api::ClusterSpec) -> Result<(), ApiError> {
    let checks = [
        ("--snapshot-interval", spec.raft.snapshot_interval, [10_000, SNAPSHOT_ENTRIES]),
        ("--max-snapshots", spec.raft.keep_old_snapshots, [0; 2]),
        ("--dispatcher-heartbeat", spec.dispatcher.heartbeat_period, [5 * NANOS, HEARTBEAT_NANOS]),
    ];
    for (flag, value, taken) in checks {
        if value != 0 && !taken.contains(&value) {
            return Err(ApiError::not_implemented(format!("{flag} other than its default")));
        }
    }
    let ca = &spec.ca_config;
    let refused = [
        ("--autolock (AutoLockManagers)", spec.encryption_config.auto_lock_managers),
        ("--external-ca (ExternalCAs)", !ca.external_cas.is_empty()),
        (
            "a root certificate of your own (--ca-cert, --ca-key; `swarm ca --rotate` makes one)",
            !(ca.signing_ca_cert.is_empty() && ca.signing_ca_key.is_empty()),
        ),
        ("a default log driver (TaskDefaults)", !spec.task_defaults.is_empty()),
    ];
    match refused.iter().find(|(_, asked)| *asked) {
        Some((what, _)) => Err(ApiError::not_implemented(what)),
        None => Ok(()),
    }
}

/// `POST /swarm/join`.
pub(crate) fn join(request: api::SwarmJoin) -> Result<JoinRequest, ApiError> {
    check_listen(&request.listen_addr)?;
    if request.remote_addrs.iter().all(|remote| remote.trim().is_empty()) {
        return Err(ApiError::bad_request(
            "at least one RemoteAddr is required to join: give the address of a manager",
        ));
    }
    if request.join_token.is_empty() {
        return Err(ApiError::invalid_token());
    }
    Ok(JoinRequest {
        advertise: node_address("--advertise-addr", &request.advertise_addr)?,
        data_path: node_address("--data-path-addr", &request.data_path_addr)?,
        availability: availability(&request.availability)?,
        remotes: request.remote_addrs,
        token: request.join_token,
    })
}

pub(crate) fn availability(text: &str) -> Result<Availability, ApiError> {
    match text.to_ascii_lowercase().as_str() {
        "" | "active" => Ok(Availability::Active),
        "pause" => Ok(Availability::Pause),
        "drain" => Ok(Availability::Drain),
        _ => Err(ApiError::bad_request(format!(
            "invalid Availability: \"{text}\": use active, pause or drain"
        ))),
    }
}

/// Managers listen on every address, on port 2377.
fn check_listen(text: &str) -> Result<(), ApiError> {
    let wildcard = ["", "0.0.0.0", "0.0.0.0:2377", "[::]:2377", "::"];
    if wildcard.contains(&text) {
        Ok(())
    } else {
        Err(ApiError::not_implemented(format!("--listen-addr {text} (other than 0.0.0.0:2377)")))
    }
}

/// `IP`, `IP:2377`, `[IP6]:2377` or a link's name.
fn node_address(flag: &str, text: &str) -> Result<Option<NodeAddress>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(Some(NodeAddress::Ip(ip)));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host.trim_start_matches('[').trim_end_matches(']'), Some(port)),
        None => (text, None),
    };
    if let Some(port) = port
        && port.parse() != Ok(MANAGER_PORT)
    {
        return Err(ApiError::not_implemented(format!(
            "{flag} {text}: a port other than {MANAGER_PORT}"
        )));
    }
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(Some(NodeAddress::Ip(ip)));
    }
    // IFNAMSIZ is 16 with the final zero; what the kernel refuses in a name, dev_valid_name() says.
    let valid = (1..16).contains(&host.len())
        && !host.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if valid {
        Ok(Some(NodeAddress::Link(host.to_owned())))
    } else {
        Err(ApiError::bad_request(format!(
            "{flag} must be an IP address or the name of a network interface: `{text}` is neither"
        )))
    }
}

fn address_pool(text: &str) -> Result<IpNetwork, ApiError> {
    let pool: IpNetwork = text.parse().map_err(|err| {
        ApiError::bad_request(format!("invalid DefaultAddrPool: `{text}`: {err}"))
    })?;
    if !pool.is_ipv4() {
        return Err(ApiError::not_implemented(format!("--default-addr-pool {text}: IPv6")));
    }
    if pool.ip() != pool.network() {
        return Err(ApiError::bad_request(format!(
            "invalid DefaultAddrPool: {pool}: it should be {}/{}",
            pool.network(),
            pool.prefix()
        )));
    }
    Ok(pool)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_values_are_defaults() {
        let request = init(api::SwarmInit::default()).unwrap();
        assert_eq!(request.spec, ClusterSpec::default());
        assert_eq!(request.advertise, None);
    }

    #[test]
    fn a_silent_node_has_at_least_a_second() {
        let after = |nanos| {
            let mut request = api::SwarmInit::default();
            request.spec.orchestration.reschedule_after = Some(nanos);
            init(request).map(|request| request.spec)
        };
        let made = after(7_500_000_000).unwrap();
        assert_eq!(made.reschedule_after_secs, 8);
        assert_eq!(spec(&made).orchestration.reschedule_after, Some(8 * NANOS));
        assert!(after(NANOS - 1).unwrap_err().message.contains("--reschedule-after"));
    }

    #[test]
    fn an_update_changes_what_it_names_and_refuses_the_rest_by_name() {
        let old = ClusterSpec { reschedule_after_secs: 60, ..ClusterSpec::default() };
        let sent = |change: &dyn Fn(&mut api::ClusterSpec)| {
            let mut sent = spec(&old);
            // Docker's clients do not know it.
            sent.orchestration.reschedule_after = None;
            change(&mut sent);
            update(sent, &old)
        };
        assert_eq!(sent(&|_| {}).unwrap(), old);
        let new = sent(&|spec| {
            spec.orchestration.task_history_retention_limit = Some(2);
            spec.ca_config.node_cert_expiry = 7200 * NANOS;
        });
        let expected = ClusterSpec { task_history: 2, certificate_secs: 7200, ..old.clone() };
        assert_eq!(new.unwrap(), expected);
        let refused = |change: &dyn Fn(&mut api::ClusterSpec)| sent(change).unwrap_err().message;
        for (word, said) in [
            ("--autolock", refused(&|s| s.encryption_config.auto_lock_managers = true)),
            ("--external-ca", refused(&|s| s.ca_config.external_cas = vec![1.into()])),
            ("--ca-cert", refused(&|s| s.ca_config.signing_ca_cert = "PEM".into())),
            ("--ca-cert", refused(&|s| s.ca_config.signing_ca_cert = "x".into())),
            ("--dispatcher-heartbeat", refused(&|s| s.dispatcher.heartbeat_period = 1)),
            ("--snapshot-interval", refused(&|s| s.raft.snapshot_interval = 1)),
            ("--max-snapshots", refused(&|s| s.raft.keep_old_snapshots = 1)),
            ("default", refused(&|s| s.name = "other".into())),
            ("1h0m0s", refused(&|s| s.ca_config.node_cert_expiry = NANOS)),
        ] {
            assert!(said.contains(word), "{word}: {said}");
        }
    }

    #[test]
    fn addresses_are_ips_or_links() {
        let parse = |text| node_address("--advertise-addr", text);
        let ip = NodeAddress::Ip([192, 0, 2, 11].into());
        assert_eq!(parse("192.0.2.11"), Ok(Some(ip.clone())));
        assert_eq!(parse("192.0.2.11:2377"), Ok(Some(ip)));
        assert_eq!(parse("eth0"), Ok(Some(NodeAddress::Link("eth0".into()))));
        assert_eq!(parse("::1"), Ok(Some(NodeAddress::Ip("::1".parse().unwrap()))));
        assert_eq!(parse("[::1]:2377"), Ok(Some(NodeAddress::Ip("::1".parse().unwrap()))));
        assert!(parse("192.0.2.11:2378").is_err());
        assert!(parse("a name that is too long").is_err());
    }

    #[test]
    fn pools_hold_at_least_one_subnet() {
        let pool = |pool: &str, len| {
            init(api::SwarmInit {
                default_addr_pool: vec![pool.into()],
                subnet_size: len,
                ..api::SwarmInit::default()
            })
        };
        assert!(pool("10.20.0.0/16", 24).is_ok());
        assert!(pool("10.20.0.0/25", 24).is_err());
        assert!(pool("10.20.0.1/16", 24).is_err());
        assert!(pool("fd00::/48", 24).is_err());
        assert!(pool("10.20.0.0/16", 31).is_err());
    }
}
