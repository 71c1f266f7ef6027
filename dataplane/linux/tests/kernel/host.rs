//! The machine that tests run on: commands, namespaces, patience.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use mesh_linux::netns::Netns;

/// How long to wait for what should happen at once: a machine without KVM is slow.
pub(crate) fn patience() -> Duration {
    Duration::from_secs(if in_vm() { 60 } else { 10 })
}

/// Whether this is a virtual machine of `cargo xtask test`.
pub(crate) fn in_vm() -> bool {
    std::env::var_os("MESH_TEST_VM").is_some()
}

/// Runs a shell command; its output. Panics if it fails.
pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().expect("sh");
    assert!(
        output.status.success(),
        "`{command}`: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `ip` with arguments.
pub(crate) fn ip(args: &str) -> String {
    sh(&format!("ip {args}"))
}

/// One echo, asked from a namespace.
pub(crate) fn ping(netns: &str, to: &str) -> String {
    ip(&format!("netns exec {netns} ping -n -c1 -W{} {to}", patience().as_secs()))
}

/// How many lines of a command's output hold the text.
pub(crate) fn count(command: &str, text: &str) -> usize {
    sh(command).lines().filter(|line| line.contains(text)).count()
}

/// Runs `work` on a thread inside a namespace. What it opens there stays there.
pub(crate) fn inside<T: Send>(netns: &str, work: impl FnOnce() -> T + Send) -> T {
    let netns = Netns::open(&Path::new("/run/netns").join(netns)).expect("a namespace");
    netns.run(|| Ok(work())).unwrap()
}

/// Waits until it is so.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience();
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {:?}: {what}", patience());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a future of the engine on the calling thread.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(work)
}
