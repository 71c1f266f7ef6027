//! `/_ping`, `/version`, `/info`, `/distribution`.

use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, header},
    response::IntoResponse,
};
use jiff::Timestamp;
use mesh_api::{
    API_VERSION, ComponentVersion, Info, MIN_API_VERSION, Map, RemoteManager, SwarmInfo,
    VersionInfo,
};
use mesh_control::model::Role;
use serde_json::{Value, json};

use super::{
    ApiError, Shared,
    backend::{LocalState, Membership, SwarmState},
    convert, read,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `GET` and `HEAD /_ping`.
pub(super) async fn ping(State(backend): State<Shared>) -> impl IntoResponse {
    let swarm = match backend.local().swarm {
        SwarmState::Inactive => "inactive",
        SwarmState::Pending => "pending",
        SwarmState::Error(_) => "error",
        SwarmState::Active(Membership { role: Role::Worker, .. }) => "active/worker",
        SwarmState::Active(Membership { role: Role::Manager, .. }) => "active/manager",
    };
    let mut headers = HeaderMap::new();
    headers.insert("swarm", HeaderValue::from_static(swarm));
    headers.insert("builder-version", HeaderValue::from_static("2"));
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, no-store, must-revalidate"),
    );
    headers.insert(header::PRAGMA, HeaderValue::from_static("no-cache"));
    (headers, "OK")
}

/// Docker's words for architectures (Go's).
fn go_arch(machine: &str) -> &str {
    match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `GET /version`.
pub(super) async fn version(State(backend): State<Shared>) -> Json<VersionInfo> {
    let engine = backend.local().engine;
    let dotted = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    let info = VersionInfo {
        platform: Map::from([("Name".into(), "mesh".into())]),
        version: VERSION.into(),
        api_version: dotted(API_VERSION),
        min_api_version: dotted(MIN_API_VERSION),
        git_commit: "unknown".into(),
        go_version: "none (Rust)".into(),
        os: "linux".into(),
        arch: go_arch(&engine.architecture).into(),
        kernel_version: engine.kernel,
        // Builds are reproducible, so they have no time; clients want one all the same.
        build_time: "1970-01-01T00:00:00.000000000+00:00".into(),
        components: Vec::new(),
    };
    let details = [
        ("ApiVersion", &info.api_version),
        ("MinAPIVersion", &info.min_api_version),
        ("Arch", &info.arch),
        ("Os", &info.os),
        ("GitCommit", &info.git_commit),
        ("GoVersion", &info.go_version),
        ("BuildTime", &info.build_time),
        ("KernelVersion", &info.kernel_version),
        ("Experimental", &"false".to_owned()),
    ];
    let engine = ComponentVersion {
        name: "Engine".into(),
        version: VERSION.into(),
        details: details.into_iter().map(|(k, v)| (k.to_owned(), v.clone())).collect(),
    };
    Json(VersionInfo { components: vec![engine], ..info })
}

/// `GET /info`: on managers with the cluster. It answers without a leader too, and says so.
pub(super) async fn info(State(backend): State<Shared>) -> Json<Value> {
    let local = backend.local();
    let swarm = swarm_info(&backend, &local);
    let engine = local.engine;
    let [cpu, memory, pids] = engine.can_limit;
    let lacking = [(cpu, "cpu cfs quota"), (memory, "memory limit"), (pids, "pids limit")];
    let lacking = lacking.iter().filter(|(can, _)| !can);
    let warnings: Vec<String> =
        lacking.map(|(_, what)| format!("WARNING: No {what} support")).collect();
    let version = engine.cgroup_version.to_string();
    let info = Info {
        id: swarm.node_id.clone(),
        name: engine.hostname,
        server_version: VERSION.into(),
        containers: engine.tasks_running,
        containers_running: engine.tasks_running,
        kernel_version: engine.kernel,
        operating_system: engine.operating_system,
        os_type: "linux".into(),
        architecture: engine.architecture,
        ncpu: engine.cpus,
        mem_total: engine.memory_bytes,
        docker_root_dir: engine.state_dir,
        system_time: format!("{:.9}", Timestamp::now()),
        swarm,
    };
    // What clients expect of any engine, and what does not vary here.
    let mut full = json!({
        "ContainersPaused": 0, "ContainersStopped": 0, "Images": 0, "Driver": "none",
        "DriverStatus": [],
        "Plugins": {"Volume": [], "Network": ["overlay"], "Authorization": null, "Log": []},
        "MemoryLimit": memory, "SwapLimit": memory, "CpuCfsPeriod": cpu, "CpuCfsQuota": cpu,
        "CPUShares": false, "CPUSet": false, "PidsLimit": pids, "IPv4Forwarding": true,
        "OomKillDisable": false, "Debug": false, "NFd": 0, "NGoroutines": 0, "NEventsListener": 0,
        "LoggingDriver": "json-file", "CgroupDriver": "cgroupfs", "CgroupVersion": version,
        "RegistryConfig": {"InsecureRegistryCIDRs": [], "IndexConfigs": {}},
        "Labels": [], "Runtimes": {"process": {"path": "meshd"}}, "DefaultRuntime": "process",
        "SecurityOptions": [], "Warnings": warnings,
    });
    if let (Value::Object(full), Ok(Value::Object(info))) = (&mut full, serde_json::to_value(info))
    {
        full.extend(info);
    }
    Json(full)
}

fn swarm_info(backend: &Shared, local: &LocalState) -> SwarmInfo {
    let member = match &local.swarm {
        SwarmState::Inactive => {
            return SwarmInfo { local_node_state: "inactive".into(), ..SwarmInfo::default() };
        }
        SwarmState::Pending => {
            return SwarmInfo { local_node_state: "pending".into(), ..SwarmInfo::default() };
        }
        SwarmState::Error(why) => {
            return SwarmInfo {
                local_node_state: "error".into(),
                error: why.clone(),
                ..SwarmInfo::default()
            };
        }
        SwarmState::Active(member) => member,
    };
    let managers = member.managers.iter();
    let info = SwarmInfo {
        node_id: member.node.to_string(),
        node_addr: member.address.to_string(),
        local_node_state: "active".into(),
        control_available: member.role == Role::Manager,
        remote_managers: Some(
            managers
                .map(|(id, addr)| RemoteManager { node_id: id.to_string(), addr: addr.to_string() })
                .collect(),
        ),
        ..SwarmInfo::default()
    };
    if member.role == Role::Worker {
        return info;
    }
    let cluster = read(backend, |store| {
        let managers = store.nodes.values().filter(|node| node.spec.role == Role::Manager).count();
        let cluster = store.cluster.as_ref().map(|cluster| convert::cluster::swarm(cluster, None));
        (store.nodes.len(), managers, cluster)
    });
    match cluster {
        Ok((nodes, managers, cluster)) => {
            SwarmInfo { nodes: Some(nodes), managers: Some(managers), cluster, ..info }
        }
        Err(err) => SwarmInfo { error: err.message, ..info },
    }
}

/// `GET /distribution/{image}/json`: the CLI asks it before it creates a service and only warns
/// when it fails, so it has to fail fast.
pub(super) async fn distribution(Path(image): Path<String>) -> ApiError {
    let image = image.strip_suffix("/json").unwrap_or(&image);
    ApiError::not_found(format!(
        "{image} was not looked up: images are not implemented yet by mesh"
    ))
}
