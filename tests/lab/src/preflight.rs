//! What a lab needs of the machine, looked at before anything is changed.

use std::{fs, path::Path};

use anyhow::{Result, bail};
use nix::unistd::geteuid;

use crate::{host, wire};

/// Says everything that is missing, each with its remedy, in one error.
pub(crate) fn check(meshd: &Path) -> Result<()> {
    if !geteuid().is_root() {
        bail!(
            "a lab needs root: it makes network namespaces, cgroups and BPF programs. \
             Run it with sudo. Nothing was changed"
        );
    }
    let mut missing = Vec::new();
    if !meshd.exists() {
        missing.push(format!("{}: build it with `cargo build --release`", meshd.display()));
    }
    for kind in ["net", "mnt", "uts", "ipc", "pid"] {
        if !Path::new("/proc/self/ns").join(kind).exists() {
            missing.push(format!("{kind} namespaces in the kernel"));
        }
    }
    match host::cgroup_root() {
        // The root cgroup itself has no cgroup.kill, so a version tells (5.14 brought it).
        Ok(_) if kernel() < (5, 14) => {
            missing.push("cgroup.kill: a kernel of at least 5.14".to_owned());
        }
        Ok(_) => {}
        Err(e) => missing.push(e.to_string()),
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.trim_end().ends_with("\tbpf")) {
        missing.push("bpffs: a kernel with CONFIG_BPF_SYSCALL".to_owned());
    }
    missing.extend(wire::probe_links());
    if !missing.is_empty() {
        bail!(
            "this machine lacks what a lab needs. Nothing was changed\n  - {}",
            missing.join("\n  - ")
        );
    }
    Ok(())
}

fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    parse_kernel(&release)
}

fn parse_kernel(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_compare_by_number() {
        assert_eq!(parse_kernel("6.18.44-fc-v595"), (6, 18));
        assert_eq!(parse_kernel("6.1.0-37-amd64\n"), (6, 1));
        assert!(parse_kernel("5.4.0") < (5, 14));
        assert_eq!(parse_kernel(""), (0, 0));
    }
}
