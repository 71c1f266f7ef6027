//! A machine of a lab: its cgroup, and the init process that holds its namespaces. Entering it,
//! and ending it.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
    sys::wait::{WaitPidFlag, waitpid},
    unistd::Pid,
};

use crate::{
    host::{self, Places, netns_path, wait_for},
    topology::{LabName, Role},
};

/// How long a machine's init may take to set itself up.
const BOOT_DEADLINE: Duration = Duration::from_secs(20);

/// Starts a machine: cgroup, init, and the name of its network namespace.
pub(crate) fn boot(meshctl: &Path, lab: &LabName, places: &Places, member: &str) -> Result<()> {
    let cgroup = places.system_cgroup(member);
    fs::create_dir_all(&cgroup).with_context(|| format!("make cgroup {}", cgroup.display()))?;
    let log = places.log(&format!("{member}.init"));
    let log = File::create(&log).with_context(|| format!("make {}", log.display()))?;
    let mut init = Command::new(meshctl)
        .args(["lab", "--name", lab.as_str(), "init", member])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", meshctl.display()))?;
    let mut said = String::new();
    if let Some(stdout) = init.stdout.take() {
        BufReader::new(stdout).read_line(&mut said).context("read from the machine's init")?;
    }
    if said.trim() != "ready" {
        // The one line is its error; a silent end leaves only the status.
        let status = init.wait().context("wait for the machine's init")?;
        bail!("machine {member} does not come up: {} ({status})", said.trim());
    }
    let pid = init.id();
    host::write_whole(&init_pid_file(places, member), &pid.to_string())?;
    name_netns(&lab.netns(member), pid)
}

/// Gives the network namespace of `pid` a name that `ip netns` shows.
fn name_netns(netns: &str, pid: u32) -> Result<()> {
    let path = netns_path(netns);
    File::create_new(&path).with_context(|| {
        format!("namespace {netns} exists already; clear it away with `meshctl lab down`")
    })?;
    let source = format!("/proc/{pid}/ns/net");
    let none = None::<&str>;
    mount(Some(source.as_str()), &path, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("bind {source} to {}", path.display()))
}

/// Takes the name away; the namespace ends with its last process.
pub(crate) fn forget_netns(netns: &str) -> Result<()> {
    let path = netns_path(netns);
    match umount2(&path, MntFlags::MNT_DETACH) {
        // EINVAL: the file is there but `up` died before it was mounted.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("unmount {}", path.display())),
    }
    fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
}

/// Opens a machine's network namespace.
pub(crate) fn open_netns(lab: &LabName, member: &str) -> Result<File> {
    let path = netns_path(&lab.netns(member));
    File::open(&path).with_context(|| format!("open namespace {}", path.display()))
}

fn init_pid_file(places: &Places, member: &str) -> PathBuf {
    places.run.join(format!("{member}.init"))
}

/// The machine's init, if it lives.
pub(crate) fn init_pid(places: &Places, member: &str) -> Option<Pid> {
    live_pid(&init_pid_file(places, member), &places.cgroup_of(member))
}

/// The process that `file` names, if it still is one of cgroup `cgroup`: numbers are used again.
pub(crate) fn live_pid(file: &Path, cgroup: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
    let root = host::cgroup_root().ok()?;
    let below = cgroup.strip_prefix(&root).ok()?;
    // A zombie child of ours is no daemon any more; one of others is reaped by them.
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit(") ").next()?.chars().next()?;
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let ours = cgroups
        .lines()
        .filter_map(|line| line.strip_prefix("0::/"))
        .any(|path| Path::new(path).starts_with(below));
    // Its first thread may have ended while others still hold its sockets: it is not gone yet.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    (ours && (threads > 1 || !matches!(state, 'Z' | 'X'))).then(|| Pid::from_raw(pid))
}

/// Kills every process of a cgroup and of those below it, and waits until none is left.
pub(crate) fn kill_cgroup(cgroup: &Path) -> Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    let file = cgroup.join("cgroup.kill");
    fs::write(&file, "1").with_context(|| format!("write {}", file.display()))?;
    let events = cgroup.join("cgroup.events");
    wait_for(&format!("the end of all processes in {}", cgroup.display()), BOOT_DEADLINE, || {
        let text = fs::read_to_string(&events).unwrap_or_default();
        Ok(!text.lines().any(|line| line == "populated 1"))
    })
}

/// Removes an empty cgroup and those below it, also on version 1 hierarchies beside it.
pub(crate) fn remove_cgroup(cgroup: &Path) -> Result<()> {
    remove_tree(cgroup)?;
    host::twins(cgroup)?.iter().try_for_each(|twin| remove_tree(twin))
}

fn remove_tree(cgroup: &Path) -> Result<()> {
    for name in host::list(cgroup)? {
        let child = cgroup.join(name);
        if child.is_dir() {
            remove_tree(&child)?;
        }
    }
    // A cgroup stays busy for a moment after its last process (cgroup-v2, "populated").
    wait_for(&format!("cgroup {} to be free", cgroup.display()), BOOT_DEADLINE, || {
        match fs::remove_dir(cgroup) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => Ok(false),
            Err(e) => Err(e).with_context(|| format!("remove cgroup {}", cgroup.display())),
        }
    })
}

/// Moves the calling process into a machine: its cgroup and namespaces. What it executes next runs
/// there. The process must have one thread: the kernel lets nobody else change mount namespaces.
///
/// # Errors
/// When there is no such machine, or it is down.
pub fn enter(lab: &LabName, places: &Places, member: &str) -> Result<()> {
    if Role::of_name(member).is_none() || !places.cgroup_of(member).exists() {
        bail!("lab {lab} has no machine {member}; see `meshctl lab ps --name {lab}`");
    }
    let Some(init) = init_pid(places, member) else {
        bail!("{member} is down; `meshctl lab node {member} start --name {lab}` brings it back");
    };
    // All opened first: after the mount namespace, /proc may be another one.
    let open = |kind: &str| {
        let path = format!("/proc/{init}/ns/{kind}");
        File::open(&path).with_context(|| format!("open {path}"))
    };
    let (net, uts, mnt) = (open("net")?, open("uts")?, open("mnt")?);
    let here = std::env::current_dir().ok();
    join_cgroup(&places.system_cgroup(member))?;
    for (file, flag) in [
        (net, CloneFlags::CLONE_NEWNET),
        (uts, CloneFlags::CLONE_NEWUTS),
        (mnt, CloneFlags::CLONE_NEWNS),
    ] {
        setns(&file, flag).with_context(|| format!("enter the namespaces of {member}"))?;
    }
    if let Some(here) = here {
        // Joining a mount namespace goes to its root. A directory that is not there is no harm.
        let _ = std::env::set_current_dir(here);
    }
    Ok(())
}

/// Moves this process into a cgroup.
pub(crate) fn join_cgroup(cgroup: &Path) -> Result<()> {
    let file = cgroup.join("cgroup.procs");
    fs::write(&file, "0").with_context(|| format!("join cgroup {}", cgroup.display()))
}
