//! Service specs: from the JSON that a client sent to what the store keeps. What is not implemented
//! is refused by name, never ignored; what a client sends without meaning it (zero values, explicit
//! defaults) passes.

use std::time::Duration;

use axum::http::StatusCode;
use mesh_api as api;
use mesh_control::store::Store;
use mesh_types::{
    Protocol,
    spec::{
        Constraint, EndpointMode, NetworkAttachment, PortSpec, RestartCondition, RestartPolicy,
        Runtime, ServiceMode, ServiceSpec, TaskSpec,
    },
};
use serde_json::{Value, json};

use super::{dns, resources, update};
use crate::api::{ApiError, find, request::typed};

/// The container label that chooses the executor.
const RUNTIME_LABEL: &str = "mesh.runtime";

/// Where a spec has what is not implemented, and the flags that set it. Any value there but null,
/// zero, an empty one or the one in the third column is refused.
const NOT_IMPLEMENTED: &[(&str, &str, &[&str])] = &[
    ("/TaskTemplate/ContainerSpec/Mounts", "--mount", &[]),
    ("/TaskTemplate/ContainerSpec/Secrets", "--secret", &[]),
    ("/TaskTemplate/ContainerSpec/Configs", "--config", &[]),
    ("/TaskTemplate/ContainerSpec/Healthcheck", "--health-*", &[r#"{"Test":["NONE"]}"#]),
    ("/TaskTemplate/ContainerSpec/User", "--user", &[]),
    ("/TaskTemplate/ContainerSpec/Groups", "--group", &[]),
    ("/TaskTemplate/ContainerSpec/Privileges", "--credential-spec and the like", &[]),
    ("/TaskTemplate/ContainerSpec/TTY", "--tty", &[]),
    ("/TaskTemplate/ContainerSpec/OpenStdin", "an open standard input", &[]),
    ("/TaskTemplate/ContainerSpec/ReadOnly", "--read-only", &[]),
    ("/TaskTemplate/ContainerSpec/Init", "--init", &[]),
    ("/TaskTemplate/ContainerSpec/Isolation", "--isolation", &[r#""default""#]),
    ("/TaskTemplate/ContainerSpec/Hosts", "--host", &[]),
    ("/TaskTemplate/ContainerSpec/Sysctls", "--sysctl", &[]),
    ("/TaskTemplate/ContainerSpec/CapabilityAdd", "--cap-add", &[]),
    ("/TaskTemplate/ContainerSpec/CapabilityDrop", "--cap-drop", &[]),
    ("/TaskTemplate/ContainerSpec/Ulimits", "--ulimit", &[]),
    ("/TaskTemplate/ContainerSpec/OomScoreAdj", "--oom-score-adj", &[]),
    ("/TaskTemplate/Resources/Reservations/GenericResources", "--generic-resource", &[]),
    ("/TaskTemplate/Resources/SwapBytes", "--memory-swap", &[]),
    ("/TaskTemplate/Resources/MemorySwappiness", "--memory-swappiness", &["-1"]),
    ("/TaskTemplate/LogDriver", "--log-driver, --log-opt", &[]),
    ("/TaskTemplate/PluginSpec", "a plugin service", &[]),
    ("/TaskTemplate/NetworkAttachmentSpec", "a network attachment service", &[]),
    ("/TaskTemplate/Runtime", "a task runtime other than container", &[r#""container""#]),
];

/// A service spec as it was sent, to what the store keeps. `raw` in the answer is the same JSON
/// with the number of replicas and the networks' ids filled in, as Docker does.
pub(crate) fn service_spec(store: &Store, mut sent: Value) -> Result<ServiceSpec, ApiError> {
    refuse_not_implemented(&sent)?;
    let spec: api::ServiceSpec = typed(sent.clone())?;
    let Some(container) = spec.task_template.container_spec.clone() else {
        return Err(ApiError::bad_request(
            "mismatched Runtime and *Spec fields: ContainerSpec is missing",
        ));
    };
    let task = task_spec(container, &spec.task_template)?;
    let mode = mode(&sent, &spec.mode)?;
    let targets = if spec.task_template.networks.is_empty() {
        spec.networks
    } else {
        spec.task_template.networks
    };
    let networks =
        targets.into_iter().map(|t| attachment(store, t)).collect::<Result<Vec<_>, _>>()?;
    let endpoint = spec.endpoint_spec.unwrap_or_default();
    let endpoint_mode = match endpoint.mode.as_str() {
        "" | "vip" => EndpointMode::Vip,
        "dnsrr" => EndpointMode::Dnsrr,
        other => {
            return Err(ApiError::bad_request(format!(
                "EndpointSpec: unknown mode `{other}`: --endpoint-mode is vip or dnsrr"
            )));
        }
    };
    let update = update::policy("update", spec.update_config.as_ref())?;
    let rollback = update::policy("rollback", spec.rollback_config.as_ref())?;
    let ports = endpoint.ports.iter().map(port).collect::<Result<Vec<_>, _>>()?;
    fill_in(&mut sent, mode, &networks);
    Ok(ServiceSpec {
        name: spec.name,
        labels: spec.labels,
        mode,
        task,
        networks,
        endpoint_mode,
        ports,
        update,
        rollback,
        raw: Some(sent.to_string()),
    })
}

fn refuse_not_implemented(sent: &Value) -> Result<(), ApiError> {
    for (path, flags, defaults) in NOT_IMPLEMENTED {
        let Some(value) = sent.pointer(path) else { continue };
        let is_default = defaults
            .iter()
            .any(|default| serde_json::from_str::<Value>(default).is_ok_and(|d| d == *value));
        if !is_default && !is_empty(value) {
            let field = path.trim_start_matches('/').replace('/', ".");
            return Err(ApiError::not_implemented(format!("{flags} ({field})")));
        }
    }
    for networks in ["/TaskTemplate/Networks", "/Networks"] {
        let items = sent.pointer(networks).and_then(Value::as_array).into_iter().flatten();
        if items.into_iter().any(|item| item.get("DriverOpts").is_some_and(|opts| !is_empty(opts)))
        {
            return Err(ApiError::not_implemented("--network driver-opt (Networks.DriverOpts)"));
        }
    }
    Ok(())
}

/// What a client sends that does not mean it.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

fn task_spec(
    container: api::ContainerSpec,
    template: &api::TaskTemplate,
) -> Result<TaskSpec, ApiError> {
    let runtime = match container.labels.get(RUNTIME_LABEL).map(String::as_str) {
        Some("process") => Runtime::Process,
        other => {
            let have = match other {
                Some(value) => format!("it has {RUNTIME_LABEL}={value}"),
                None => "it has none".to_owned(),
            };
            return Err(ApiError::new(
                StatusCode::NOT_IMPLEMENTED,
                format!(
                    "running images is not implemented yet by mesh: a service needs the container \
                     label {RUNTIME_LABEL}=process ({have}). Give `--runtime process` to meshctl \
                     or `--container-label {RUNTIME_LABEL}=process` to docker; the command is then \
                     a host binary and the image name only a label"
                ),
            ));
        }
    };
    if container.image.is_empty() {
        return Err(ApiError::bad_request("ContainerSpec: image reference must be provided"));
    }
    if container.command.is_empty() && container.args.is_empty() {
        return Err(ApiError::bad_request(
            "ContainerSpec: a process service needs a command: put it after the image name (after \
             `--` with meshctl)",
        ));
    }
    if let Some(bad) =
        container.env.iter().find(|entry| entry.starts_with('=') || entry.contains('\0'))
    {
        return Err(ApiError::bad_request(format!(
            "ContainerSpec: invalid environment variable `{bad}`: expected KEY=value"
        )));
    }
    let text = |text: String| (!text.is_empty()).then_some(text);
    let placement = template.placement.clone().unwrap_or_default();
    Ok(TaskSpec {
        image: container.image,
        runtime,
        command: container.command,
        args: container.args,
        env: container.env,
        dir: text(container.dir),
        hostname: text(container.hostname),
        labels: container.labels,
        stop_signal: text(container.stop_signal),
        stop_grace_period: container.stop_grace_period.map(Duration::from_nanos),
        restart: restart_policy(template.restart_policy.as_ref())?,
        constraints: constraints(&placement.constraints)?,
        force_update: template.force_update,
        dns: dns::config(container.dns_config)?,
        resources: resources::resources(template.resources.as_ref())?,
        spread: resources::spread(&placement.preferences)?,
        max_per_node: placement.max_replicas,
    })
}

fn constraints(sent: &[String]) -> Result<Vec<Constraint>, ApiError> {
    let parse = |text: &String| {
        text.parse::<Constraint>()
            .map_err(|err| ApiError::bad_request(format!("invalid Placement: {err}")))
    };
    sent.iter().map(parse).collect()
}

fn restart_policy(sent: Option<&api::RestartPolicy>) -> Result<RestartPolicy, ApiError> {
    let default = RestartPolicy::default();
    let Some(sent) = sent else { return Ok(default) };
    let condition = match sent.condition.as_str() {
        "" | "any" => RestartCondition::Any,
        "on-failure" => RestartCondition::OnFailure,
        "none" => RestartCondition::None,
        other => {
            return Err(ApiError::bad_request(format!(
                "invalid RestartCondition: \"{other}\": use none, on-failure or any"
            )));
        }
    };
    Ok(RestartPolicy {
        condition,
        delay: sent.delay.map_or(default.delay, Duration::from_nanos),
        max_attempts: sent.max_attempts.filter(|attempts| *attempts > 0),
        window: sent.window.map_or(default.window, Duration::from_nanos),
    })
}

fn mode(sent: &Value, mode: &api::ServiceMode) -> Result<ServiceMode, ApiError> {
    let object = sent.get("Mode").and_then(Value::as_object);
    for (key, flag) in [("ReplicatedJob", "replicated-job"), ("GlobalJob", "global-job")] {
        if object.and_then(|object| object.get(key)).is_some_and(|job| !job.is_null()) {
            return Err(ApiError::not_implemented(format!("--mode {flag} (Mode.{key})")));
        }
    }
    match (&mode.replicated, &mode.global) {
        (Some(_), Some(_)) => {
            Err(ApiError::bad_request("Mode: both Replicated and Global are set: choose one"))
        }
        (None, Some(_)) => Ok(ServiceMode::Global),
        (replicated, None) => Ok(ServiceMode::Replicated {
            replicas: replicated.and_then(|mode| mode.replicas).unwrap_or(1),
        }),
    }
}

fn attachment(store: &Store, target: api::NetworkTarget) -> Result<NetworkAttachment, ApiError> {
    let name = &target.target;
    for alias in &target.aliases {
        dns::check_alias(alias)?;
    }
    match find::network(store, name) {
        Ok(network) => Ok(NetworkAttachment { network: network.id, aliases: target.aliases }),
        Err(_) if super::network::PREDEFINED.contains(&name.as_str()) => {
            Err(ApiError::not_implemented(format!("--network {name}")))
        }
        // Docker's status for a network of a spec; a plain look-up answers 404.
        Err(err) if err.status == StatusCode::NOT_FOUND => Err(ApiError::internal(err.message)),
        Err(err) => Err(err),
    }
}

fn port(sent: &api::Port) -> Result<PortSpec, ApiError> {
    if !["", "ingress"].contains(&sent.publish_mode.as_str()) {
        return Err(ApiError::not_implemented(format!(
            "--publish mode={} (EndpointSpec.Ports.PublishMode other than ingress)",
            sent.publish_mode
        )));
    }
    let protocol = match sent.protocol.as_str() {
        "" | "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => {
            return Err(ApiError::not_implemented(
                "--publish protocol=sctp (EndpointSpec.Ports.Protocol)",
            ));
        }
        other => {
            return Err(ApiError::bad_request(format!(
                "EndpointSpec: unknown protocol `{other}`: use tcp or udp"
            )));
        }
    };
    let number = |what: &str, value: u32| {
        u16::try_from(value).map_err(|_| {
            ApiError::bad_request(format!(
                "EndpointSpec: {what} port {value} is out of range 1..=65535"
            ))
        })
    };
    Ok(PortSpec {
        protocol,
        target: number("target", sent.target_port)?,
        published: number("published", sent.published_port)?,
    })
}

/// Clients count on the number of replicas and on networks' ids being there.
fn fill_in(sent: &mut Value, mode: ServiceMode, networks: &[NetworkAttachment]) {
    if let ServiceMode::Replicated { replicas } = mode {
        sent["Mode"] = json!({ "Replicated": { "Replicas": replicas } });
    }
    let in_template = sent
        .pointer("/TaskTemplate/Networks")
        .and_then(Value::as_array)
        .is_some_and(|items| !items.is_empty());
    let path = if in_template { "/TaskTemplate/Networks" } else { "/Networks" };
    let targets = sent.pointer_mut(path).and_then(Value::as_array_mut).into_iter().flatten();
    for (target, attachment) in targets.zip(networks) {
        target["Target"] = Value::String(attachment.network.to_string());
    }
}

#[cfg(test)]
mod tests {
    use mesh_types::spec::{ConstraintKey, FailureAction, UpdateOrder};
    use proptest::prelude::*;

    use super::*;

    /// What the stock CLI sends when no flag is given but the label.
    fn stock() -> Value {
        json!({
            "Name": "web", "Labels": {},
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": "host", "Labels": {"mesh.runtime": "process"}, "Args": ["sleep", "1d"],
                    "Init": false, "DNSConfig": {}, "Isolation": "default", "Mounts": null,
                    "Privileges": {"CredentialSpec": null, "SELinuxContext": null},
                },
                "Resources": {"Limits": {}, "Reservations": {}},
                "Placement": {"Platforms": [{"Architecture": "amd64", "OS": "linux"}]},
                "ForceUpdate": 0, "Runtime": "container",
            },
            "Mode": {"Replicated": {}},
            "EndpointSpec": {"Mode": "vip"},
        })
    }

    fn with(path: &str, value: Value) -> Value {
        let mut spec = stock();
        let (parent, key) = path.rsplit_once('/').unwrap();
        let mut at = &mut spec;
        for part in parent.split('/').filter(|part| !part.is_empty()) {
            if at[part].is_null() {
                at[part] = json!({});
            }
            at = &mut at[part];
        }
        at[key] = value;
        spec
    }

    #[test]
    fn the_stock_clis_defaults_pass() {
        let spec = service_spec(&Store::default(), stock()).unwrap();
        assert_eq!(spec.mode, ServiceMode::Replicated { replicas: 1 });
        assert_eq!(spec.task.args, ["sleep", "1d"]);
        assert_eq!(spec.task.restart, RestartPolicy::default());
        let raw: Value = serde_json::from_str(&spec.raw.unwrap()).unwrap();
        assert_eq!(raw["Mode"]["Replicated"]["Replicas"], 1);
        assert_eq!(raw["TaskTemplate"]["Placement"], stock()["TaskTemplate"]["Placement"]);
    }

    #[test]
    fn each_field_that_is_not_implemented_is_refused_by_name() {
        for (path, flags, defaults) in NOT_IMPLEMENTED {
            let spec = with(path, json!({"something": ["set"]}));
            let err = service_spec(&Store::default(), spec).unwrap_err();
            assert_eq!(err.status, 501, "{path}");
            assert!(err.message.contains(flags), "{path}: {}", err.message);
            for default in *defaults {
                let spec = with(path, serde_json::from_str(default).unwrap());
                assert!(service_spec(&Store::default(), spec).is_ok(), "{path} {default}");
            }
        }
    }

    #[test]
    fn other_refusals_name_their_cause() {
        let cases = [
            ("/TaskTemplate/ContainerSpec/Labels", json!({}), 501, "mesh.runtime=process"),
            ("/TaskTemplate/ContainerSpec/Image", json!(""), 400, "image reference"),
            ("/TaskTemplate/ContainerSpec/Args", json!([]), 400, "needs a command"),
            ("/TaskTemplate/ContainerSpec", json!(null), 400, "mismatched Runtime"),
            ("/Mode", json!({"ReplicatedJob": {}}), 501, "replicated-job"),
            ("/Mode", json!({"Replicated": {"Replicas": -1}}), 400, "invalid JSON"),
            ("/EndpointSpec/Mode", json!("x"), 400, "--endpoint-mode"),
            (
                "/EndpointSpec/Ports",
                json!([{"TargetPort": 80, "PublishMode": "host"}]),
                501,
                "mode=host",
            ),
            ("/EndpointSpec/Ports", json!([{"TargetPort": 80, "Protocol": "sctp"}]), 501, "sctp"),
            ("/EndpointSpec/Ports", json!([{"TargetPort": 70000}]), 400, "70000"),
            (
                "/TaskTemplate/Networks",
                json!([{"Target": "nosuch"}]),
                500,
                "network nosuch not found",
            ),
            ("/TaskTemplate/Networks", json!([{"Target": "host"}]), 501, "--network host"),
            ("/TaskTemplate/RestartPolicy", json!({"Condition": "x"}), 400, "RestartCondition"),
            (
                "/TaskTemplate/Placement/Constraints",
                json!(["node.hostname==a", "node.mood==good"]),
                400,
                "constraint `node.mood==good`: unknown key",
            ),
            (
                "/TaskTemplate/Placement/Preferences",
                json!([{"Spread": {"SpreadDescriptor": "node.ip"}}]),
                400,
                "cannot be spread over `node.ip`",
            ),
            ("/TaskTemplate/Placement/MaxReplicas", json!(-1), 400, "invalid JSON"),
            ("/TaskTemplate/Resources/Limits/MemoryBytes", json!(1024), 400, "at least 4MiB"),
            ("/UpdateConfig", json!({"Parallelism": -1}), 400, "invalid JSON"),
            ("/UpdateConfig", json!({"Order": "x"}), 400, "--update-order"),
            ("/RollbackConfig", json!({"FailureAction": "x"}), 400, "--rollback-failure-action"),
        ];
        for (path, value, status, words) in cases {
            let err = service_spec(&Store::default(), with(path, value)).unwrap_err();
            assert_eq!(err.status, status, "{path}: {}", err.message);
            assert!(err.message.contains(words), "{path}: {}", err.message);
        }
    }

    #[test]
    fn policies_and_constraints_reach_the_store() {
        let mut spec = with(
            "/UpdateConfig",
            json!({"Parallelism": 0, "Delay": 2_000_000_000, "Order": "start-first"}),
        );
        spec["RollbackConfig"] = json!({"FailureAction": "continue"});
        spec["TaskTemplate"]["Placement"]["Constraints"] =
            json!(["node.role==worker", "node.labels.zone != a"]);
        let spec = service_spec(&Store::default(), spec).unwrap();
        assert_eq!((spec.update.parallelism, spec.update.delay.as_secs()), (0, 2));
        assert_eq!(spec.update.order, UpdateOrder::StartFirst);
        assert_eq!(spec.rollback.on_failure, FailureAction::Continue);
        assert_eq!((spec.rollback.parallelism, spec.rollback.order), (1, UpdateOrder::StopFirst));
        let keys: Vec<_> = spec.task.constraints.iter().map(|c| (&c.key, c.equal)).collect();
        let label = ConstraintKey::Label("zone".into());
        assert_eq!(keys, [(&ConstraintKey::Role, true), (&label, false)]);
        assert!(service_spec(&Store::default(), stock()).unwrap().task.constraints.is_empty());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-z]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("(Name|Mode|Ports|Replicated|[A-Z]{1,3})", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_spec_panics(
            index in 0..NOT_IMPLEMENTED.len(),
            value in any_json(),
            key in "/(Mode|Networks|EndpointSpec|TaskTemplate|Labels|UpdateConfig)",
        ) {
            let _ = service_spec(&Store::default(), with(&key, value.clone()));
            let _ = service_spec(&Store::default(), with(NOT_IMPLEMENTED[index].0, value));
        }
    }
}
