//! Networks.

use std::net::IpAddr;

use axum::http::StatusCode;
use ipnetwork::IpNetwork;
use mesh_api as api;
use mesh_control::{
    model::{Holder, Network, Task},
    store::Store,
};
use mesh_types::{
    Mtu, NodeId,
    spec::{Labels, NetworkSpec},
    task::EndpointLease,
};

use super::time;
use crate::api::ApiError;

/// The driver option that sets the tasks' MTU.
const MTU_OPTION: &str = "com.docker.network.driver.mtu";
/// The driver option in which Docker shows the VNI.
const VNI_OPTION: &str = "com.docker.network.driver.overlay.vxlanid_list";

/// Docker's names of networks that exist on every engine.
pub(crate) const PREDEFINED: [&str; 4] = ["bridge", "host", "none", "default"];

/// The id that stands for a task's container: 64 hexadecimal digits as Docker's, the task's own 128
/// bits twice.
pub(crate) fn container_id(task: &Task) -> String {
    format!("{0:032x}{0:032x}", task.id.bits())
}

/// A network as `network ls` sees it.
pub(crate) fn network(network: &Network) -> api::Network {
    let mut options = network.spec.options.clone();
    options.insert(VNI_OPTION.into(), network.vni.to_string());
    api::Network {
        name: network.spec.name.clone(),
        id: network.id.to_string(),
        created: time(network.meta.created_ms),
        scope: "swarm".into(),
        driver: "overlay".into(),
        enable_ipv4: true,
        enable_ipv6: network.subnet.is_ipv6(),
        ipam: api::Ipam {
            driver: "default".into(),
            options: None,
            config: vec![ipam_config(network)],
        },
        internal: network.spec.internal,
        attachable: network.spec.attachable,
        ingress: network.spec.ingress,
        options,
        labels: network.spec.labels.clone(),
        ..api::Network::default()
    }
}

pub(crate) fn ipam_config(network: &Network) -> api::IpamConfig {
    api::IpamConfig {
        subnet: network.subnet.to_string(),
        ip_range: network.spec.ip_range.map(|range| range.to_string()).unwrap_or_default(),
        gateway: network.gateway.to_string(),
        ..api::IpamConfig::default()
    }
}

/// A network as `network inspect` sees it: with the tasks of the node that is asked, the nodes on
/// it, and with `verbose` all its services and tasks.
pub(crate) fn inspected(
    store: &Store,
    found: &Network,
    here: Option<NodeId>,
    verbose: bool,
) -> api::Network {
    let mut shown = network(found);
    let attached: Vec<_> = store
        .tasks
        .values()
        .filter_map(|task| {
            let lease = task.leases.iter().find(|lease| lease.kind.network() == Some(found.id))?;
            Some((task, lease))
        })
        .collect();
    for (task, lease) in
        attached.iter().filter(|(task, _)| task.node.is_some() && task.node == here)
    {
        let container = api::AttachedContainer {
            name: task.name(),
            endpoint_id: lease.endpoint.to_string(),
            mac_address: lease.mac().to_string(),
            ipv4_address: lease.address.to_string(),
            ipv6_address: String::new(),
        };
        shown.containers.insert(container_id(task), container);
    }
    let mut nodes: Vec<NodeId> = attached.iter().filter_map(|(task, _)| task.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    shown.peers = nodes
        .iter()
        .filter_map(|id| store.nodes.get(id))
        .map(|node| api::NetworkPeer { name: node.name().to_owned(), ip: node.vtep.to_string() })
        .collect();
    if verbose {
        shown.services = Some(services(store, found, &attached));
    }
    shown
}

fn services(
    store: &Store,
    network: &Network,
    attached: &[(&Task, &EndpointLease)],
) -> std::collections::BTreeMap<String, api::NetworkService> {
    let mut services = std::collections::BTreeMap::new();
    for service in store.services.values() {
        let tasks: Vec<_> = attached
            .iter()
            .filter(|(task, _)| task.service == service.id)
            .map(|(task, lease)| network_task(store, task, lease))
            .collect();
        let vip = network.leases.iter().find_map(|(address, holder)| {
            (*holder == Holder::Vip(service.id)).then(|| address.to_string())
        });
        if tasks.is_empty() && vip.is_none() {
            continue;
        }
        let ports = if network.spec.ingress {
            let text = |port: &mesh_types::spec::PortSpec| {
                format!("Target: {}, Publish: {}", port.target, port.published)
            };
            service.ports.iter().map(text).collect()
        } else {
            Vec::new()
        };
        services.insert(
            service.spec.name.clone(),
            api::NetworkService { vip: vip.unwrap_or_default(), ports, local_lb_index: 0, tasks },
        );
    }
    services
}

fn network_task(store: &Store, task: &Task, lease: &EndpointLease) -> api::NetworkTask {
    let host = task.node.and_then(|id| store.nodes.get(&id)).map(|node| node.vtep.to_string());
    api::NetworkTask {
        name: task.name(),
        endpoint_id: lease.endpoint.to_string(),
        endpoint_ip: lease.address.ip().to_string(),
        info: api::Map::from([("Host IP".to_owned(), host.unwrap_or_default())]),
    }
}

/// `POST /networks/create`.
pub(crate) fn spec(request: api::NetworkCreate) -> Result<NetworkSpec, ApiError> {
    check_driver(&request)?;
    let refused = [
        (request.config_only, "--config-only (ConfigOnly)"),
        (
            request.config_from.as_ref().is_some_and(|from| !from.network.is_empty()),
            "--config-from (ConfigFrom)",
        ),
        (request.enable_ipv6 == Some(true), "--ipv6 (EnableIPv6)"),
        (request.enable_ipv4 == Some(false), "--ipv4=false (EnableIPv4)"),
        (request.ipam.options.as_ref().is_some_and(|o| !o.is_empty()), "--ipam-opt (IPAM.Options)"),
        (
            !["", "default"].contains(&request.ipam.driver.as_str()),
            "--ipam-driver other than default (IPAM.Driver)",
        ),
        (request.ipam.config.len() > 1, "more than one --subnet (IPAM.Config)"),
    ];
    if let Some((_, what)) = refused.iter().find(|(set, _)| *set) {
        return Err(ApiError::not_implemented(what));
    }
    let config = request.ipam.config.into_iter().next().unwrap_or_default();
    if !config.auxiliary_addresses.is_empty() {
        return Err(ApiError::not_implemented("--aux-address (IPAM.Config.AuxiliaryAddresses)"));
    }
    let spec = NetworkSpec {
        name: request.name,
        labels: request.labels,
        subnet: subnet("subnet", &config.subnet)?,
        gateway: gateway(&config.gateway)?,
        ip_range: subnet("ip-range", &config.ip_range)?,
        mtu: driver_options(&request.options)?,
        attachable: request.attachable,
        internal: request.internal,
        ingress: request.ingress,
        options: request.options,
    };
    if spec.ingress && (spec.internal || spec.attachable) {
        return Err(ApiError::bad_request(
            "an ingress network can be neither --internal nor --attachable",
        ));
    }
    Ok(spec)
}

fn check_driver(request: &api::NetworkCreate) -> Result<(), ApiError> {
    match request.driver.as_str() {
        "overlay" => {}
        "" | "bridge" | "host" | "null" | "macvlan" | "ipvlan" => {
            let driver = if request.driver.is_empty() { "bridge" } else { &request.driver };
            return Err(ApiError::new(
                StatusCode::NOT_IMPLEMENTED,
                format!(
                    "network driver {driver} is not implemented by mesh: create an overlay network \
                     with --driver overlay"
                ),
            ));
        }
        other => return Err(ApiError::not_found(format!("plugin \"{other}\" not found"))),
    }
    if !["", "swarm", "global"].contains(&request.scope.as_str()) {
        return Err(ApiError::bad_request(format!(
            "network scope {} does not go with the overlay driver: leave --scope out",
            request.scope
        )));
    }
    if PREDEFINED.contains(&request.name.as_str()) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            format!("operation is not permitted on predefined {} network", request.name),
        ));
    }
    Ok(())
}

/// The MTU of the driver options, which are refused when they are unknown: an option that does
/// nothing is worse than none, above all `encrypted`.
fn driver_options(options: &Labels) -> Result<Option<Mtu>, ApiError> {
    let mut mtu = None;
    for (key, value) in options {
        match key.as_str() {
            MTU_OPTION => {
                let parsed = value.parse::<u32>().map_err(|err| err.to_string()).and_then(Mtu::new);
                mtu = Some(parsed.map_err(|err| {
                    ApiError::bad_request(format!("invalid value `{value}` of option {key}: {err}"))
                })?);
            }
            "encrypted" => {
                return Err(ApiError::not_implemented("--opt encrypted (an encrypted overlay)"));
            }
            other => {
                return Err(ApiError::not_implemented(format!("the driver option --opt {other}")));
            }
        }
    }
    Ok(mtu)
}

fn subnet(what: &str, text: &str) -> Result<Option<IpNetwork>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    let invalid = |why: String| {
        ApiError::bad_request(format!("invalid network config: invalid {what} {text}: {why}"))
    };
    if !text.contains('/') {
        return Err(invalid("it needs a prefix length, like 10.1.0.0/24".into()));
    }
    let parsed: IpNetwork =
        text.parse().map_err(|err: ipnetwork::IpNetworkError| invalid(err.to_string()))?;
    if parsed.ip() != parsed.network() {
        return Err(invalid(format!("it should be {}/{}", parsed.network(), parsed.prefix())));
    }
    if parsed.is_ipv6() {
        return Err(ApiError::not_implemented(format!("an IPv6 --{what} ({text})")));
    }
    Ok(Some(parsed))
}

fn gateway(text: &str) -> Result<Option<IpAddr>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        ApiError::bad_request(format!(
            "invalid network config: invalid gateway {text}: it is not an IP address"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay() -> api::NetworkCreate {
        api::NetworkCreate {
            name: "app".into(),
            driver: "overlay".into(),
            ..api::NetworkCreate::default()
        }
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        type Change = fn(&mut api::NetworkCreate);
        let refusals: [(&str, Change); 8] = [
            ("encrypted", |n| drop(n.options.insert("encrypted".into(), String::new()))),
            ("--opt x", |n| drop(n.options.insert("x".into(), String::new()))),
            ("--ipv6", |n| n.enable_ipv6 = Some(true)),
            ("--ipv4=false", |n| n.enable_ipv4 = Some(false)),
            ("--config-only", |n| n.config_only = true),
            ("--ipam-driver", |n| n.ipam.driver = "dhcp".into()),
            ("network driver bridge", |n| n.driver = "bridge".into()),
            ("--subnet", |n| n.ipam.config = vec![api::IpamConfig::default(); 2]),
        ];
        for (word, change) in refusals {
            let mut request = overlay();
            change(&mut request);
            let err = spec(request).unwrap_err();
            assert_eq!(err.status, 501, "{word}");
            assert!(err.message.contains(word), "{word}: {}", err.message);
        }
        assert!(spec(overlay()).is_ok());
    }

    #[test]
    fn mtu_is_a_driver_option() {
        let mut request = overlay();
        request.options.insert(MTU_OPTION.into(), "1400".into());
        assert_eq!(spec(request.clone()).unwrap().mtu.map(Mtu::get), Some(1400));
        for bad in ["", "x", "67", "70000", "-1"] {
            request.options.insert(MTU_OPTION.into(), bad.into());
            assert_eq!(spec(request.clone()).unwrap_err().status, 400, "{bad}");
        }
    }

    #[test]
    fn subnets_are_checked() {
        assert!(subnet("subnet", "10.1.0.0/24").unwrap().is_some());
        for bad in ["10.1.0.1/24", "10.1.0.0", "10.1.0.0/33", "x/8"] {
            assert_eq!(subnet("subnet", bad).unwrap_err().status, 400, "{bad}");
        }
        assert_eq!(subnet("subnet", "fd00::/64").unwrap_err().status, 501);
    }
}
