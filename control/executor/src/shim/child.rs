//! The children of a shim: the task's init, and the helper of an `exec`.
//!
//! The init is PID 1 of the task's PID namespace. It does not exec the command itself, since the
//! kernel drops signals for which a PID 1 has no handler (pid_namespaces(7)): a plain program would
//! ignore SIGTERM. So it forks the command, forwards signals to it, reaps orphans, and ends with
//! its status; the kernel then kills whatever is left in the namespace.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    unistd::{Pid, chdir, dup, pipe2, setsid},
};

use super::sys::{self, Fork};
use crate::{
    cgroup::Cgroup,
    contract::{ShimSpec, TaskDir},
};

/// The standard streams of a process to run.
#[derive(Debug)]
pub(super) struct Stdio {
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// One process to run in the task.
#[derive(Debug)]
pub(super) struct Program<'a> {
    pub(super) argv: &'a [String],
    pub(super) env: &'a [String],
    pub(super) dir: Option<&'a Path>,
    pub(super) stdio: Stdio,
}

/// Makes the task's namespaces and starts its program in them. Returns when the program runs, with
/// the init's process id.
///
/// # Errors
/// The sentence that the user should read.
pub(super) fn start_task(
    dir: &TaskDir,
    spec: &ShimSpec,
    program: &Program<'_>,
) -> Result<Pid, String> {
    let namespaces =
        libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
    launch(namespaces, program, || {
        sys::set_name(c"mesh-init");
        join_cgroups(spec)?;
        unshare(CloneFlags::CLONE_NEWCGROUP)
            .map_err(|error| format!("cannot make a cgroup namespace: {error}"))?;
        nix::unistd::sethostname(&spec.hostname)
            .map_err(|error| format!("cannot set the host name `{}`: {error}", spec.hostname))?;
        mount_all(dir)
    })
}

/// Runs one more program in the namespaces of the task whose init is `init`. Returns when it runs,
/// with the id of the helper that ends with its status.
///
/// # Errors
/// The sentence that the user should read.
pub(super) fn start_exec(init: Pid, spec: &ShimSpec, program: &Program<'_>) -> Result<Pid, String> {
    launch(0, program, || {
        sys::set_name(c"mesh-exec");
        join_cgroups(spec)?;
        // All are opened before the first is entered: in the task's mount namespace /proc shows
        // other process ids. The mount namespace comes last for the same reason.
        let kinds = ["cgroup", "ipc", "uts", "net", "pid", "mnt"];
        let open = |kind: &str| {
            let path = format!("/proc/{init}/ns/{kind}");
            File::open(&path).map_err(|error| format!("cannot open {path}: {error}"))
        };
        let files = kinds.iter().map(|kind| open(kind)).collect::<Result<Vec<_>, _>>()?;
        for (kind, file) in kinds.iter().zip(files) {
            setns(file, CloneFlags::empty())
                .map_err(|error| format!("cannot enter the task's {kind} namespace: {error}"))?;
        }
        Ok(())
    })
}

/// Forks a supervisor into new namespaces; that one sets itself up and forks the program. Waits
/// until the program has been exec'd, or for the reason why not.
fn launch(
    namespaces: libc::c_int,
    program: &Program<'_>,
    set_up: impl FnOnce() -> Result<(), String>,
) -> Result<Pid, String> {
    // The program's end of this pipe closes at exec; whoever fails before writes why.
    let (reader, writer) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|error| format!("cannot make a pipe: {error}"))?;
    let forked = sys::fork_into(namespaces)
        .map_err(|error| format!("cannot fork into the task's namespaces: {error}"))?;
    let pid = match forked {
        Fork::Child => {
            drop(reader);
            supervise(program, writer, set_up)
        }
        Fork::Parent(pid) => pid,
    };
    drop(writer);
    let reason = io::read_to_string(File::from(reader)).unwrap_or_else(|error| error.to_string());
    if reason.is_empty() { Ok(pid) } else { Err(reason) }
}

/// The supervisor's whole life.
fn supervise(
    program: &Program<'_>,
    writer: OwnedFd,
    set_up: impl FnOnce() -> Result<(), String>,
) -> ! {
    sys::die_with_parent();
    // The shim may have died before that call; then nobody holds the pipe's other end.
    if sys::reader_is_gone(writer.as_fd()) {
        sys::exit_now(1);
    }
    sys::block_signals();
    if let Err(reason) = set_up() {
        fail(writer.as_fd(), &reason);
    }
    let child = match sys::fork_into(0) {
        Err(error) => fail(writer.as_fd(), &format!("cannot fork: {error}")),
        Ok(Fork::Child) => run(program, writer.as_fd()),
        Ok(Fork::Parent(child)) => child,
    };
    // The shim's sockets and the task's pipes are not for us: a reader must see their end when the
    // program closes them.
    for standard in 0..=2 {
        let _ = File::open("/dev/null").map(|null| sys::install_fd(null.as_raw_fd(), standard));
    }
    let _ = sys::close_from(3, false);
    sys::exit_now(forward_signals_until_the_end_of(child))
}

fn forward_signals_until_the_end_of(child: Pid) -> i32 {
    loop {
        match sys::next_signal() {
            libc::SIGCHLD => {
                while let Some((pid, code)) = sys::reap() {
                    if pid == child {
                        return code;
                    }
                }
            }
            signal => {
                // It may have ended already; its SIGCHLD follows.
                let _ = sys::send_signal(child, signal);
            }
        }
    }
}

/// The program's process until it is exec'd.
fn run(program: &Program<'_>, writer: BorrowedFd<'_>) -> ! {
    sys::die_with_parent();
    let _ = setsid();
    let dir = program.dir.unwrap_or(Path::new("/"));
    if let Err(error) = chdir(dir) {
        let reason = error.desc().to_lowercase();
        fail(writer, &format!("working directory \"{}\": {reason}", dir.display()));
    }
    let streams = [&program.stdio.stdin, &program.stdio.stdout, &program.stdio.stderr];
    // Through duplicates above 2: a stream could itself be numbered 0, 1 or 2 and be overwritten.
    let copies: Result<Vec<OwnedFd>, _> = streams.iter().map(dup).collect();
    let installed = copies.map_err(io::Error::from).and_then(|copies| {
        copies.iter().zip(0..).try_for_each(|(fd, target)| sys::install_fd(fd.as_raw_fd(), target))
    });
    if let Err(error) = installed.and_then(|()| sys::close_from(3, true)) {
        fail(writer, &format!("cannot set up the standard streams: {error}"));
    }
    sys::reset_signals();
    let reason = sys::exec(program.argv, program.env);
    fail(writer, &reason)
}

fn fail(writer: BorrowedFd<'_>, reason: &str) -> ! {
    sys::tell(writer, reason);
    sys::exit_now(127)
}

fn join_cgroups(spec: &ShimSpec) -> Result<(), String> {
    spec.twins.iter().chain([&Cgroup::new(&spec.cgroup).task()]).try_for_each(|cgroup| {
        let procs = cgroup.join("cgroup.procs");
        fs::write(&procs, "0").map_err(|error| format!("cannot join {}: {error}", procs.display()))
    })
}

/// What the task sees of the file system: the host's, but its own `/etc` files, `/proc`, `/sys`.
fn mount_all(dir: &TaskDir) -> Result<(), String> {
    let attempt = |what: &str, result: nix::Result<()>| {
        result.map_err(|error| format!("cannot mount {what}: {error}"))
    };
    let none: Option<&str> = None;
    // Slave rather than private: nothing of ours reaches the host, but an unmount on the host
    // reaches us, so that a task does not keep the host's file systems busy.
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    attempt("/ as slave", mount(none, "/", none, slave, none))?;
    mount_etc(&dir.etc()).map_err(|error| format!("cannot lay files over /etc: {error}"))?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    attempt("/proc", mount(Some("proc"), "/proc", Some("proc"), plain, none))?;
    // sysfs shows the network namespace of whoever mounted it. The host's mounts below it (BPF
    // pins, other cgroups) vanish from sight.
    attempt("/sys", mount(Some("sysfs"), "/sys", Some("sysfs"), plain, none))?;
    // Comforts: a host may lack them, and a task rarely needs them.
    let _ = mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), plain, none);
    let shm = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let _ = mount(Some("shm"), "/dev/shm", Some("tmpfs"), shm, Some("mode=1777,size=64m"));
    Ok(())
}

/// Lays the files in `ours` over `/etc`.
///
/// By a read-only overlay, because a file that is bind-mounted over `/etc/resolv.conf` disappears
/// when the host replaces that file by rename, as DHCP clients do (the kernel drops mounts on a
/// dentry that goes: `detach_mounts`), and because the host may have it as a dangling symbolic
/// link. Where there is no overlayfs, file by file.
fn mount_etc(ours: &Path) -> io::Result<()> {
    let none: Option<&str> = None;
    let mut option = "lowerdir=".to_owned();
    for byte in ours.to_string_lossy().chars() {
        // overlayfs.rst: colons separate layers, commas options.
        if matches!(byte, ':' | ',' | '\\') {
            option.push('\\');
        }
        option.push(byte);
    }
    option.push_str(":/etc");
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if mount(Some("mesh-etc"), "/etc", Some("overlay"), flags, Some(option.as_str())).is_ok() {
        return Ok(());
    }
    for entry in fs::read_dir(ours)? {
        let entry = entry?;
        let target = Path::new("/etc").join(entry.file_name());
        mount(Some(&entry.path()), &target, none, MsFlags::MS_BIND, none).map_err(|error| {
            let kind = io::Error::from(error).kind();
            io::Error::new(kind, format!("{}: {error}", target.display()))
        })?;
    }
    Ok(())
}
