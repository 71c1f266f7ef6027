//! Removing a lab: by name, whatever of it there is, however far its `up` came.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};

use crate::{
    host::{self, DirLock, Places},
    machine,
    topology::{LabName, Role},
    wire,
};

/// Removes everything of a lab, and says whether there was anything. What fails does not keep the
/// rest from going; all failures are in the error.
///
/// # Errors
/// When something of the lab would not go.
pub fn down(name: &LabName) -> Result<bool> {
    if !host::is_root() {
        bail!("removing a lab needs root. Run it with sudo. Nothing was changed");
    }
    let places = Places::of(name)?;
    let there = traces(name, &places)?;
    let mut failed = Vec::new();
    {
        let _lock = DirLock::wait(&places.run)?;
        let mut attempt = |result: Result<()>| {
            if let Err(e) = result {
                failed.push(format!("{e:#}"));
            }
        };
        attempt(machine::kill_cgroup(&places.cgroup));
        let members = members_there(name, &places)?;
        // The router last: with its links go those of the machines that have nothing else.
        for member in members.iter().filter(|m| *m != "router").chain([&"router".to_owned()]) {
            attempt(remove_machine(name, &places, member));
        }
        attempt(machine::remove_cgroup(&places.cgroup));
        attempt(remove_tree(&places.pins));
        attempt(unmount_below(&places.state));
        attempt(remove_tree(&places.state));
        // Parents that no other lab uses.
        let cgroups = places.cgroup.parent();
        let twins = cgroups.and_then(|cgroups| host::twins(cgroups).ok()).unwrap_or_default();
        let parents = [cgroups, places.pins.parent()].into_iter().flatten();
        for parent in parents.chain(twins.iter().map(PathBuf::as_path)) {
            let _ = fs::remove_dir(parent);
        }
        attempt(remove_tree(&places.run));
    }
    if let Err(e) = host::release_mounts() {
        failed.push(format!("{e:#}"));
    }
    if !failed.is_empty() {
        bail!("lab {name} is not wholly removed:\n  - {}", failed.join("\n  - "));
    }
    Ok(there)
}

/// Ends one machine: processes, links, namespace, pins, cgroup. Its state directory stays.
pub(crate) fn remove_machine(name: &LabName, places: &Places, member: &str) -> Result<()> {
    let cgroup = places.cgroup_of(member);
    machine::kill_cgroup(&cgroup)?;
    if host::netns_path(&name.netns(member)).exists() {
        // The file may be there without the namespace, when `up` died between the two.
        if let Ok(netns) = machine::open_netns(name, member)
            && is_namespace(&netns)
        {
            wire::remove_links(&netns)?;
        }
        machine::forget_netns(&name.netns(member))?;
    }
    remove_tree(&places.pins_of(member))?;
    machine::remove_cgroup(&cgroup)
}

fn is_namespace(file: &fs::File) -> bool {
    nix::sys::statfs::fstatfs(file)
        .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

/// Machines of the lab that have left a namespace or a cgroup.
fn members_there(name: &LabName, places: &Places) -> Result<Vec<String>> {
    let netns = host::list(Path::new(host::NETNS_DIR))?;
    let mut members: Vec<String> =
        netns.iter().filter_map(|ns| name.member_of_netns(ns)).map(str::to_owned).collect();
    let cgroups = host::list(&places.cgroup)?;
    members.extend(cgroups.into_iter().filter(|c| Role::of_name(c).is_some()));
    members.sort();
    members.dedup();
    Ok(members)
}

fn traces(name: &LabName, places: &Places) -> Result<bool> {
    let dirs = [&places.run, &places.state, &places.cgroup, &places.pins];
    Ok(dirs.iter().any(|dir| dir.exists()) || !members_there(name, places)?.is_empty())
}

/// Labs that have left files on this machine.
///
/// # Errors
/// When the directories cannot be listed.
pub fn known_labs() -> Result<Vec<LabName>> {
    let mut names = host::list(Path::new(host::RUN_DIR))?;
    names.extend(host::list(Path::new(host::STATE_DIR))?);
    names.sort();
    names.dedup();
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Nothing of a node should be mounted in the host's namespace; if something is, removing the tree
/// must not reach through it.
fn unmount_below(dir: &Path) -> Result<()> {
    for mount in host::mounts()?.iter().rev().filter(|m| m.point.starts_with(dir)) {
        umount2(&mount.point, MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {}", mount.point.display()))?;
    }
    Ok(())
}
