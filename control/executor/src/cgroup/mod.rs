//! The cgroup (v2) of a task: `<parent>/<task id>` with two leaves, `task` for its processes and
//! `shim` for its shim, so that killing the one spares the other, and so that neither is in the
//! daemon's cgroup (a service manager that stops meshd must not take the tasks along). What holds
//! the task to its limits is in [`limits`].

mod limits;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub use self::limits::{Hierarchies, Plan};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// A task's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The cgroup at `path`, which need not exist.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The leaf of the task's processes.
    #[must_use]
    pub fn task(&self) -> PathBuf {
        self.0.join("task")
    }

    /// The leaf of the shim.
    #[must_use]
    pub fn shim(&self) -> PathBuf {
        self.0.join("shim")
    }

    /// Makes it with both leaves; one that is there already is fine.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir_all(self.task())?;
        fs::create_dir_all(self.shim())
    }

    /// Whether the kernel's out-of-memory killer struck among the task's processes, as far as a
    /// memory controller counts that: on this hierarchy, or on that of one of the task's twins.
    #[must_use]
    pub fn oom_killed(&self, twins: &[PathBuf]) -> bool {
        let counters = twins.iter().map(|twin| twin.join("memory.oom_control"));
        let mut counters = counters.chain([self.task().join("memory.events")]);
        let counted = |path| field(&fs::read_to_string(path).ok()?, "oom_kill");
        counters.any(|path: PathBuf| counted(path).is_some_and(|count| count > 0))
    }

    /// Sends SIGKILL to every process in `leaf` and below (`cgroup.kill`, since Linux 5.14).
    ///
    /// # Errors
    /// Those of the file system; a cgroup that is not there is fine.
    pub fn kill(leaf: &Path) -> io::Result<()> {
        absent_is_fine(fs::write(leaf.join("cgroup.kill"), "1"))
    }

    /// Kills what is left in the cgroup, waits until it is gone, and removes it and its twins.
    /// Blocks for at most `timeout`.
    ///
    /// # Errors
    /// Those of the file system, and `TimedOut` while a process does not die (it hangs in the
    /// kernel).
    pub fn destroy(&self, twins: &[PathBuf], timeout: Duration) -> io::Result<()> {
        let deadline = Instant::now() + timeout;
        Self::kill(&self.0)?;
        self.wait_empty(&self.0, deadline)?;
        for path in [self.task(), self.shim(), self.0.clone()] {
            absent_is_fine(fs::remove_dir(path))?;
        }
        twins.iter().try_for_each(|twin| {
            // Version 1 does not tell when the last process has left.
            loop {
                match absent_is_fine(fs::remove_dir(twin)) {
                    Err(error)
                        if error.kind() == io::ErrorKind::ResourceBusy
                            && Instant::now() < deadline =>
                    {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    done => return done,
                }
            }
        })
    }

    fn wait_empty(&self, path: &Path, deadline: Instant) -> io::Result<()> {
        loop {
            let text = match fs::read_to_string(path.join("cgroup.events")) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            };
            if field(&text, "populated") == Some(0) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("a process in {} does not die", path.display()),
                ));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Checks that `parent`, or the nearest directory above that exists, is on a cgroup2 file system.
///
/// # Errors
/// A sentence that says what is missing.
pub fn check_parent(parent: &Path) -> Result<(), String> {
    let existing = parent
        .ancestors()
        .find(|path| path.exists())
        .ok_or_else(|| format!("cgroup {} has no directory above it", parent.display()))?;
    let kind = statfs(existing)
        .map_err(|error| format!("cgroup {}: {error}", existing.display()))?
        .filesystem_type();
    if kind == CGROUP2_SUPER_MAGIC {
        return Ok(());
    }
    Err(format!(
        "cgroup {} is not on a cgroup2 file system: mount one with `mount -t cgroup2 none \
         /sys/fs/cgroup/unified` and name it with --cgroup-parent",
        parent.display()
    ))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A field of a flat keyed file (cgroup-v2.rst, "Flat keyed").
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "low 0\noom 3\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(field(text, "oom_kill"), Some(1));
        assert_eq!(field(text, "absent"), None);
    }

    #[test]
    fn a_parent_elsewhere_is_refused_with_the_remedy() {
        let message = check_parent(Path::new("/tmp/no-cgroup-here/x")).unwrap_err();
        assert!(message.contains("cgroup2") && message.contains("--cgroup-parent"), "{message}");
    }
}
