//! Tasks as clients see them.

use mesh_api as api;
use mesh_control::{
    model::{Network, Task},
    store::Store,
};
use mesh_types::spec::{DnsSpec, NetworkAttachment, RestartCondition, TaskSpec};

use super::{
    network::{container_id, ipam_config},
    resources, time, version,
};

/// Whether a task was made from its service's current spec. Clients that wait for an update count
/// these alone.
pub(crate) fn up_to_date(store: &Store, task: &Task) -> bool {
    store.services.get(&task.service).is_some_and(|s| s.spec_version == task.spec_version)
}

/// A task.
pub(crate) fn task(store: &Store, task: &Task) -> api::Task {
    api::Task {
        id: task.id.to_string(),
        version: version(&task.meta),
        created_at: time(task.meta.created_ms),
        updated_at: time(task.meta.updated_ms),
        labels: api::Map::new(),
        spec: task_template(&task.spec, &task.networks),
        service_id: task.service.to_string(),
        slot: task.slot,
        node_id: task.node.map(|node| node.to_string()).unwrap_or_default(),
        status: status(task),
        desired_state: task.desired.name().into(),
        networks_attachments: attachments(store, task),
    }
}

/// Once a task has run its container is known, while it runs with a process id.
fn status(task: &Task) -> api::TaskStatus {
    let status = &task.status;
    let container =
        (status.pid.is_some() || status.exit_code.is_some()).then(|| api::ContainerStatus {
            container_id: container_id(task),
            pid: status.pid.unwrap_or_default(),
            exit_code: status.exit_code.unwrap_or_default(),
        });
    api::TaskStatus {
        timestamp: time(status.since_ms),
        state: status.state.name().into(),
        message: status.message.clone(),
        err: status.err.clone(),
        container_status: container,
        port_status: api::Map::new(),
    }
}

fn attachments(store: &Store, task: &Task) -> Vec<api::NetworkAttachment> {
    task.leases
        .iter()
        .filter_map(|lease| {
            let network = store.networks.get(&lease.kind.network()?)?;
            Some(api::NetworkAttachment {
                network: network_ref(network),
                addresses: vec![lease.address.to_string()],
            })
        })
        .collect()
}

fn network_ref(network: &Network) -> api::NetworkRef {
    api::NetworkRef {
        id: network.id.to_string(),
        version: version(&network.meta),
        created_at: time(network.meta.created_ms),
        updated_at: time(network.meta.updated_ms),
        spec: api::NetworkRefSpec {
            name: network.spec.name.clone(),
            labels: network.spec.labels.clone(),
            driver_configuration: api::Map::from([("Name".to_owned(), "overlay".to_owned())]),
            internal: network.spec.internal,
            attachable: network.spec.attachable,
            ingress: network.spec.ingress,
            scope: "swarm".into(),
        },
        ipam_options: api::IpamOptions { configs: vec![ipam_config(network)] },
    }
}

/// What a task runs, from the model: the task's own, which may be older than its service's.
pub(crate) fn task_template(spec: &TaskSpec, networks: &[NetworkAttachment]) -> api::TaskTemplate {
    let nanos =
        |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let condition = match spec.restart.condition {
        RestartCondition::None => "none",
        RestartCondition::OnFailure => "on-failure",
        RestartCondition::Any => "any",
    };
    let placement = api::Placement {
        constraints: spec.constraints.iter().map(ToString::to_string).collect(),
        preferences: resources::preferences(&spec.spread),
        max_replicas: spec.max_per_node,
    };
    api::TaskTemplate {
        container_spec: Some(api::ContainerSpec {
            image: spec.image.clone(),
            labels: spec.labels.clone(),
            command: spec.command.clone(),
            args: spec.args.clone(),
            hostname: spec.hostname.clone().unwrap_or_default(),
            env: spec.env.clone(),
            dir: spec.dir.clone().unwrap_or_default(),
            stop_signal: spec.stop_signal.clone().unwrap_or_default(),
            stop_grace_period: spec.stop_grace_period.map(nanos),
            dns_config: (spec.dns != DnsSpec::default()).then(|| api::DnsConfig {
                nameservers: spec.dns.servers.iter().map(ToString::to_string).collect(),
                search: spec.dns.search.clone(),
                options: spec.dns.options.clone(),
            }),
        }),
        resources: resources::requirements(&spec.resources),
        restart_policy: Some(api::RestartPolicy {
            condition: condition.into(),
            delay: Some(nanos(spec.restart.delay)),
            max_attempts: Some(spec.restart.max_attempts.unwrap_or_default()),
            window: Some(nanos(spec.restart.window)),
        }),
        placement: (placement != api::Placement::default()).then_some(placement),
        networks: networks
            .iter()
            .map(|attachment| api::NetworkTarget {
                target: attachment.network.to_string(),
                aliases: attachment.aliases.clone(),
            })
            .collect(),
        force_update: spec.force_update,
        runtime: "container".into(),
    }
}
