//! What this machine is, read once at start.

use std::fs;

use mesh_control::model::NodeDescription;
use mesh_executor::cgroup::Hierarchies;

use crate::{api::backend::EngineFacts, options::Options};

/// Reads the machine's facts. What cannot be read is left empty: nothing depends on it.
#[must_use]
pub(crate) fn read(options: &Options) -> EngineFacts {
    let uname = nix::sys::utsname::uname().ok();
    let of = |part: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        uname.as_ref().map(|u| part(u).to_string_lossy().into_owned()).unwrap_or_default()
    };
    let cgroups = Hierarchies::observe(&options.cgroup()).unwrap_or_default();
    EngineFacts {
        hostname: options.node_name.clone().unwrap_or_else(|| of(|u| u.nodename())),
        kernel: of(|u| u.release()),
        architecture: of(|u| u.machine()),
        operating_system: pretty_name().unwrap_or_else(|| "Linux".to_owned()),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory_bytes().unwrap_or_default(),
        state_dir: options.state_dir.display().to_string(),
        tasks_running: 0,
        can_limit: cgroups.can_limit(),
        cgroup_version: cgroups.version(),
    }
}

/// The same for the store.
#[must_use]
pub(crate) fn describe(facts: &EngineFacts) -> NodeDescription {
    NodeDescription {
        hostname: facts.hostname.clone(),
        architecture: facts.architecture.clone(),
        os: "linux".to_owned(),
        engine_version: env!("CARGO_PKG_VERSION").to_owned(),
        nano_cpus: facts.cpus as u64 * 1_000_000_000,
        memory_bytes: facts.memory_bytes,
        ..NodeDescription::default()
    }
}

/// `PRETTY_NAME` of os-release(5).
fn pretty_name() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim_matches('"').to_owned())
}

/// `MemTotal` of proc(5), which is in KiB.
fn memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(value.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}
