//! The init of a machine: makes its namespaces, sets up what is seen inside, and stays. On the
//! client it also serves the world outside.

use std::{
    fs,
    io::{Write, stdout},
    path::Path,
    thread,
};

use anyhow::{Context, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::sethostname,
};

use crate::{
    host::{self, BPFFS, Places},
    lab::Record,
    machine::join_cgroup,
    outside::Outside,
    topology::{CLIENT, LabName, Member, Role},
};

/// Runs as the init of machine `name`, and returns only with an error. Says `ready` on its output
/// once the namespaces are as they should be, or the error in one line.
///
/// # Errors
/// When the machine cannot be set up.
pub fn run_init(lab: &LabName, name: &str) -> Result<()> {
    let outside = match set_up(lab, name) {
        Ok(outside) => outside,
        Err(e) => {
            println!("{e:#}");
            return Err(e);
        }
    };
    println!("ready");
    stdout().flush().context("say that the machine is ready")?;
    match outside {
        Some(outside) => outside.serve(),
        None => loop {
            thread::park();
        },
    }
}

fn set_up(lab: &LabName, name: &str) -> Result<Option<Outside>> {
    let places = Places::of(lab)?;
    // First of all, so that `down` ends this process from here on, whoever dies in between.
    join_cgroup(&places.system_cgroup(name))?;
    let record = Record::read(&places)?;
    let members = record.members();
    let me = members.iter().find(|m| m.name == name).context("not a machine of this lab")?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)
        .context("make namespaces")?;
    sethostname(name).context("set the host name")?;
    set_sysctls(me.role)?;
    set_files(&places, me, &members)?;
    remount_sys()?;
    (me.role == Role::Client).then(Outside::bind).transpose()
}

/// Duplicate address detection would keep IPv6 addresses unusable for a second; there is nobody
/// else here who could have them. The router forwards; a node is left as its daemon finds it.
fn set_sysctls(role: Role) -> Result<()> {
    let mut settings = vec![
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
    ];
    if role == Role::Router {
        settings.extend([
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            // A switch must not show frames to a firewall (set where br_netfilter is loaded).
            ("bridge/bridge-nf-call-iptables", "0"),
            ("bridge/bridge-nf-call-ip6tables", "0"),
            ("bridge/bridge-nf-call-arptables", "0"),
        ]);
    }
    for (name, value) in settings {
        let path = Path::new("/proc/sys/net").join(name);
        // Absent: IPv6 is off in this kernel, or br_netfilter is not loaded.
        if path.exists() {
            fs::write(&path, value).with_context(|| format!("set {}", path.display()))?;
        }
    }
    Ok(())
}

/// Gives the machine its own `/etc/hostname`, `hosts` and `resolv.conf`.
fn set_files(places: &Places, me: &Member, members: &[Member]) -> Result<()> {
    let none = None::<&str>;
    // Slave: what the host unmounts goes here too (else a namespace of another lab would live as
    // long as this machine), what is mounted here does not show outside.
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .context("keep mounts apart from the host's")?;
    let files = [
        ("/etc/hostname", format!("{}\n", me.name)),
        ("/etc/hosts", hosts(members)),
        ("/etc/resolv.conf", format!("nameserver {CLIENT}\n")),
    ];
    for (target, text) in files {
        let base = target.trim_start_matches("/etc/");
        let source = places.machine_file(&me.name, base);
        fs::write(&source, text).with_context(|| format!("write {}", source.display()))?;
        if !Path::new(target).exists() {
            continue;
        }
        mount(Some(&source), target, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("put {} over {target}", source.display()))?;
    }
    Ok(())
}

fn hosts(members: &[Member]) -> String {
    let mut hosts = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_owned();
    for member in members {
        let Member { name, address, address6, .. } = member;
        hosts.push_str(&format!("{address} {name}\n{address6} {name}\n"));
    }
    hosts
}

/// Tells every machine that is up of all machines: what they have mounted is written in place.
pub(crate) fn update_hosts(places: &Places, members: &[Member]) -> Result<()> {
    for member in members {
        let path = places.machine_file(&member.name, "hosts");
        if path.exists() {
            fs::write(&path, hosts(members))
                .with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(())
}

/// A sysfs that shows this machine's links, with the host's cgroups and bpffs in it.
fn remount_sys() -> Result<()> {
    let none = None::<&str>;
    let cgroup = host::cgroup_root()?;
    let kept: Vec<_> = [Path::new("/sys/fs/cgroup"), Path::new(BPFFS)]
        .into_iter()
        .chain((!cgroup.starts_with("/sys/fs/cgroup")).then_some(cgroup.as_path()))
        .filter(|path| path.starts_with("/sys") && path.exists())
        .map(|path| Ok((path, fs::File::open(path)?)))
        .collect::<std::io::Result<_>>()
        .context("open the mounts below /sys")?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("mount sysfs")?;
    for (path, file) in kept {
        use std::os::fd::AsRawFd;
        let source = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(source.as_str()), path, none, flags, none)
            .with_context(|| format!("bring {} back", path.display()))?;
    }
    Ok(())
}
