//! The system calls that need `unsafe`: fork, clone3, and what a child does between them and exec.
//!
//! The shim is single-threaded, so a forked child may allocate and use all of std.
#![allow(unsafe_code, reason = "fork, clone3, sigwaitinfo, dup2 and descriptors from SCM_RIGHTS")]

use std::{
    ffi::CString,
    io::{self, Write},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{errno::Errno, unistd::Pid};

/// Which side of a fork this is.
pub(super) enum Fork {
    Parent(Pid),
    Child,
}

/// Forks into new namespaces (`CLONE_NEW*` flags; 0 is a plain fork).
pub(super) fn fork_into(namespaces: libc::c_int) -> io::Result<Fork> {
    let args = libc::clone_args {
        flags: namespaces as u64,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    // SAFETY: clone3 without CLONE_VM and without a stack is fork(2); the process has one thread,
    // so the child finds no lock held by another, and it never returns into the parent's frames'
    // destructors: both callers end it with `_exit`.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match pid {
        0 => Ok(Fork::Child),
        pid if pid > 0 => Ok(Fork::Parent(Pid::from_raw(pid as i32))),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends the process at once, running nothing.
pub(super) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Makes `fd` the process's descriptor `target`, open across exec.
pub(super) fn install_fd(fd: RawFd, target: RawFd) -> io::Result<()> {
    // SAFETY: dup2 on two numbers; the caller owns `fd` and wants `target` replaced. When both are
    // equal dup2 leaves the close-on-exec flag, so it is cleared by hand.
    let done = unsafe {
        if fd == target { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, target) }
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor from `first` on, or marks them close-on-exec.
pub(super) fn close_from(first: RawFd, on_exec: bool) -> io::Result<()> {
    let flags = if on_exec { libc::CLOSE_RANGE_CLOEXEC } else { 0 };
    // SAFETY: close_range(2); callers are children that own no Rust object with such a descriptor
    // which they would use or drop later, or a shim that has opened nothing yet.
    let done = unsafe {
        libc::syscall(libc::SYS_close_range, first as libc::c_uint, libc::c_uint::MAX, flags)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Blocks every signal, so that [`next_signal`] gets them.
pub(super) fn block_signals() {
    // SAFETY: plain calls on a local set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Gives a child back what a program expects at its start: no blocked signal, none ignored (Rust
/// ignores SIGPIPE).
pub(super) fn reset_signals() {
    // SAFETY: plain calls; SIG_DFL runs no code of ours. Numbers that the C library keeps for
    // itself are refused by it, which is fine.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Waits for the next of the blocked signals.
pub(super) fn next_signal() -> i32 {
    // SAFETY: plain calls on a local set; sigwaitinfo takes a null info.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        loop {
            let signal = libc::sigwaitinfo(&raw const set, std::ptr::null_mut());
            if signal > 0 {
                return signal;
            }
        }
    }
}

/// Sends a signal by its number (real-time ones too).
pub(super) fn send_signal(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill(2) on numbers.
    if unsafe { libc::kill(pid.as_raw(), signal) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Asks the kernel for SIGKILL when the parent ends.
pub(super) fn die_with_parent() {
    // SAFETY: prctl on numbers; it cannot fail with a valid signal.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
}

/// Names the process in `ps`.
pub(super) fn set_name(name: &std::ffi::CStr) {
    // SAFETY: PR_SET_NAME reads at most 16 bytes of a terminated string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) };
}

/// Collects one ended child, if there is one: its id and its exit status (128 + n for signal n).
pub(super) fn reap() -> Option<(Pid, i32)> {
    let mut status = 0;
    // SAFETY: waitpid(2) writes one int.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    let code = if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    };
    Some((Pid::from_raw(pid), code))
}

/// Runs `argv`, found in the PATH of `env`. Comes back only with the reason why not, in the words
/// that Docker's users know.
pub(super) fn exec(argv: &[String], env: &[String]) -> String {
    let Some(name) = argv.first() else { return "exec: no command given".to_owned() };
    let c_strings = |texts: &[String]| -> Result<Vec<CString>, _> {
        texts.iter().map(|text| CString::new(text.as_str())).collect()
    };
    let (Ok(c_argv), Ok(c_env)) = (c_strings(argv), c_strings(env)) else {
        return format!("exec: \"{name}\": an argument or variable holds a NUL byte");
    };
    let path = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let mut denied = false;
    let candidates: Vec<String> = if name.contains('/') {
        vec![name.clone()]
    } else {
        let dirs = path.split(':').filter(|dir| !dir.is_empty());
        dirs.map(|dir| format!("{dir}/{name}")).collect()
    };
    for candidate in &candidates {
        let Ok(program) = CString::new(candidate.as_str()) else { continue };
        let Err(error) = nix::unistd::execve(&program, &c_argv, &c_env);
        match error {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => denied = true,
            other => return format!("exec: \"{candidate}\": {}", other.desc().to_lowercase()),
        }
    }
    if denied {
        format!("exec: \"{name}\": permission denied")
    } else if name.contains('/') {
        format!("exec: \"{name}\": stat {name}: no such file or directory")
    } else {
        format!("exec: \"{name}\": executable file not found in $PATH")
    }
}

/// Takes ownership of descriptors that the kernel just installed for us.
pub(super) fn adopt_fds(fds: &[RawFd]) -> Vec<OwnedFd> {
    // SAFETY: they come out of one SCM_RIGHTS message and nothing else knows their numbers.
    fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect()
}

/// Whether the reader of this pipe's other end is gone.
pub(super) fn reader_is_gone(fd: BorrowedFd<'_>) -> bool {
    let mut poll = [nix::poll::PollFd::new(fd, nix::poll::PollFlags::empty())];
    let ready = nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO);
    ready.is_ok_and(|count| count > 0)
}

/// Writes to a descriptor that a child inherited, ignoring that nobody may read.
pub(super) fn tell(fd: BorrowedFd<'_>, text: &str) {
    // SAFETY: `ManuallyDrop` keeps the descriptor from being closed by the temporary owner.
    let mut file =
        std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(fd.as_raw_fd()) });
    let _ = file.write_all(text.as_bytes());
}
