//! What a lab needs of the machine, looked at before anything is changed.

use std::{fs, path::Path};

use anyhow::{Result, bail};

use crate::{host, wire};

/// Says everything that is missing, each with its remedy, in one error.
pub(crate) fn check(meshd: &Path) -> Result<()> {
    if !host::is_root() {
        bail!(
            "a lab needs root: it makes network namespaces, cgroups and BPF programs. \
             Run it with sudo. Nothing was changed"
        );
    }
    let mut missing = Vec::new();
    if !meshd.exists() {
        missing.push(format!("{}: build it with `cargo build --release`", meshd.display()));
    }
    // Its `cgroup.kill` is of 5.14, before the oldest kernel that the data plane accepts.
    missing.extend(host::cgroup_root().err().map(|e| e.to_string()));
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.trim_end().ends_with("\tbpf")) {
        missing.push("bpffs: a kernel with CONFIG_BPF_SYSCALL".to_owned());
    }
    missing.extend(wire::probe_bridge().err().map(|e| format!("{e:#}; try: modprobe bridge")));
    // What the daemons will ask for. A bpffs that is not mounted is no lack: `up` mounts it.
    let lacking = mesh_linux::preflight(Path::new(host::BPFFS)).into_iter();
    let lacking = lacking.filter(|m| !m.what.starts_with("a bpffs"));
    missing.extend(lacking.map(|m| format!("{}: {}", m.what, m.remedy)));
    if !missing.is_empty() {
        bail!(
            "this machine lacks what a lab needs. Nothing was changed\n  - {}",
            missing.join("\n  - ")
        );
    }
    Ok(())
}
