//! Services as clients see them.

use std::net::IpAddr;

use mesh_api as api;
use mesh_control::{
    model::{Service, Task},
    store::Store,
};
use mesh_types::{
    NetworkId,
    spec::{EndpointMode, PortSpec, ServiceMode, ServiceSpec},
    task::TaskState,
};
use serde_json::{Value, json};

use super::{task::task_template, time, update, version};

/// A service. `defaults` fills in what the user left out; `status` counts its tasks.
pub(crate) fn service(
    store: &Store,
    service: &Service,
    defaults: bool,
    status: bool,
) -> api::Service {
    let mut spec = raw_spec(&service.spec);
    if defaults {
        insert_defaults(&mut spec);
    }
    api::Service {
        id: service.id.to_string(),
        version: version(&service.meta),
        created_at: time(service.meta.created_ms),
        updated_at: time(service.meta.updated_ms),
        spec,
        previous_spec: service.previous_spec.as_deref().map(raw_spec),
        endpoint: endpoint(store, service),
        update_status: service.update.as_ref().map(update::status),
        service_status: status.then(|| service_status(store, service)),
    }
}

/// The spec as it was sent; made from the model for one that came by another way.
pub(crate) fn raw_spec(spec: &ServiceSpec) -> Value {
    if let Some(raw) = &spec.raw
        && let Ok(value) = serde_json::from_str(raw)
    {
        return value;
    }
    let mode = match spec.mode {
        ServiceMode::Replicated { replicas } => api::ServiceMode {
            replicated: Some(api::ReplicatedMode { replicas: Some(replicas) }),
            global: None,
        },
        ServiceMode::Global => {
            api::ServiceMode { replicated: None, global: Some(api::GlobalMode {}) }
        }
    };
    let made = api::ServiceSpec {
        name: spec.name.clone(),
        labels: spec.labels.clone(),
        task_template: task_template(&spec.task, &spec.networks),
        mode,
        update_config: Some(update::config(&spec.update)),
        rollback_config: Some(update::config(&spec.rollback)),
        networks: Vec::new(),
        endpoint_spec: Some(endpoint_spec(spec.endpoint_mode, &spec.ports)),
    };
    serde_json::to_value(made).unwrap_or_default()
}

fn endpoint_spec(mode: EndpointMode, ports: &[PortSpec]) -> api::EndpointSpec {
    let mode = match mode {
        EndpointMode::Vip => "vip",
        EndpointMode::Dnsrr => "dnsrr",
    };
    api::EndpointSpec { mode: mode.into(), ports: ports.iter().map(port).collect() }
}

fn port(port: &PortSpec) -> api::Port {
    api::Port {
        name: String::new(),
        protocol: port.protocol.to_string(),
        target_port: port.target.into(),
        published_port: port.published.into(),
        publish_mode: "ingress".into(),
    }
}

/// `{"Spec":{}}` for a service with neither network nor port, as Docker does.
fn endpoint(store: &Store, service: &Service) -> api::Endpoint {
    if service.vips.is_empty() && service.ports.is_empty() && service.spec.networks.is_empty() {
        return api::Endpoint::default();
    }
    let virtual_ip = |(network, address): &(NetworkId, IpAddr)| {
        let prefix = store.networks.get(network)?.subnet.prefix();
        Some(api::VirtualIp {
            network_id: network.to_string(),
            addr: format!("{address}/{prefix}"),
        })
    };
    api::Endpoint {
        spec: endpoint_spec(service.spec.endpoint_mode, &service.spec.ports),
        ports: service.ports.iter().map(port).collect(),
        virtual_ips: service.vips.iter().filter_map(virtual_ip).collect(),
    }
}

/// Running of desired tasks. The desired number of a global service is that of its tasks.
fn service_status(store: &Store, service: &Service) -> api::ServiceStatus {
    let tasks: Vec<&Task> =
        store.tasks.values().filter(|task| task.service == service.id).collect();
    let wanted = |task: &&&Task| task.desired <= TaskState::Running;
    let count = |n: usize| n as u64;
    api::ServiceStatus {
        running_tasks: count(
            tasks.iter().filter(wanted).filter(|t| t.status.state == TaskState::Running).count(),
        ),
        desired_tasks: match service.spec.mode {
            ServiceMode::Replicated { replicas } => replicas,
            ServiceMode::Global => count(tasks.iter().filter(wanted).count()),
        },
        completed_tasks: count(
            tasks.iter().filter(|t| t.status.state == TaskState::Complete).count(),
        ),
    }
}

/// `insertDefaults=true`: what a spec means where it says nothing.
fn insert_defaults(spec: &mut Value) {
    let update = json!({
        "Parallelism": 1, "FailureAction": "pause", "Monitor": 5_000_000_000_u64,
        "MaxFailureRatio": 0, "Order": "stop-first",
    });
    let restart = json!({ "Condition": "any", "Delay": 5_000_000_000_u64, "MaxAttempts": 0 });
    let defaults = [
        ("/TaskTemplate/ContainerSpec", "StopGracePeriod", json!(10_000_000_000_u64)),
        ("/TaskTemplate/ContainerSpec", "DNSConfig", json!({})),
        ("/TaskTemplate", "RestartPolicy", restart),
        ("", "UpdateConfig", update.clone()),
        ("", "RollbackConfig", update),
        ("", "EndpointSpec", json!({ "Mode": "vip" })),
    ];
    for (parent, key, default) in defaults {
        let Some(fields) = spec.pointer_mut(parent).and_then(Value::as_object_mut) else {
            continue;
        };
        match (fields.get_mut(key), default) {
            (None | Some(Value::Null), default) => {
                fields.insert(key.to_owned(), default);
            }
            (Some(Value::Object(have)), Value::Object(default)) => {
                for (key, value) in default {
                    have.entry(key).or_insert(value);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fill_gaps_and_keep_what_is_there() {
        let mut spec = json!({
            "TaskTemplate": {
                "ContainerSpec": {"StopGracePeriod": 1},
                "RestartPolicy": {"Condition": "none"},
            },
        });
        insert_defaults(&mut spec);
        assert_eq!(spec["TaskTemplate"]["ContainerSpec"]["StopGracePeriod"], 1);
        assert_eq!(spec["TaskTemplate"]["RestartPolicy"]["Condition"], "none");
        assert_eq!(spec["TaskTemplate"]["RestartPolicy"]["Delay"], 5_000_000_000_u64);
        assert_eq!(spec["EndpointSpec"]["Mode"], "vip");
        assert_eq!(spec["UpdateConfig"], spec["RollbackConfig"]);
    }
}
