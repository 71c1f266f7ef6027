//! The host that labs share: where their files, cgroups, pins and namespaces are, and the mounts
//! that a first lab may have to make and the last one takes away again.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::topology::LabName;

/// Sockets, process ids and the record of each lab.
pub const RUN_DIR: &str = "/run/mesh-lab";
/// State directories and logs of each lab.
pub const STATE_DIR: &str = "/var/lib/mesh-lab";
/// Where `ip netns` looks.
pub const NETNS_DIR: &str = "/run/netns";
/// Where the host's bpffs belongs.
pub const BPFFS: &str = "/sys/fs/bpf";

/// What a kernel with CONFIG_BPF_PRELOAD puts into every bpffs: no use of it by anyone.
const KERNELS_OWN: [&str; 2] = ["maps.debug", "progs.debug"];
/// How often a condition is looked at while waiting for it.
const POLL: Duration = Duration::from_millis(5);

/// Where one lab keeps its things.
#[derive(Debug, Clone)]
pub struct Places {
    /// Sockets, process ids, the lab's record: `/run/mesh-lab/LAB`.
    pub run: PathBuf,
    /// State directories and logs: `/var/lib/mesh-lab/LAB`.
    pub state: PathBuf,
    /// `mesh/LAB` below the host's cgroup2 mount.
    pub cgroup: PathBuf,
    /// `mesh/LAB` below the host's bpffs.
    pub pins: PathBuf,
}

impl Places {
    /// The places of lab `name`.
    ///
    /// # Errors
    /// When the host has no cgroup2 mounted.
    pub fn of(name: &LabName) -> Result<Self> {
        Ok(Self {
            run: Path::new(RUN_DIR).join(name.as_str()),
            state: Path::new(STATE_DIR).join(name.as_str()),
            cgroup: cgroup_root()?.join("mesh").join(name.as_str()),
            pins: Path::new(BPFFS).join("mesh").join(name.as_str()),
        })
    }

    /// The lab's record.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.run.join("lab.json")
    }

    /// The socket of a node's API.
    #[must_use]
    pub fn socket(&self, node: &str) -> PathBuf {
        self.run.join(format!("{node}.sock"))
    }

    /// A machine's own `/etc/WHAT`.
    #[must_use]
    pub(crate) fn machine_file(&self, member: &str, what: &str) -> PathBuf {
        self.run.join(format!("{member}.{what}"))
    }

    /// The state directory of a node's daemon.
    #[must_use]
    pub fn state_dir(&self, node: &str) -> PathBuf {
        self.state.join(node)
    }

    /// What a node's daemon says.
    #[must_use]
    pub fn log(&self, node: &str) -> PathBuf {
        self.state.join(format!("{node}.log"))
    }

    /// A machine's cgroup.
    #[must_use]
    pub fn cgroup_of(&self, member: &str) -> PathBuf {
        self.cgroup.join(member)
    }

    /// The leaf for everything of a machine that is not a task: a cgroup with processes of its own
    /// cannot hand controllers to its children (cgroup-v2, "No Internal Process Constraint").
    #[must_use]
    pub fn system_cgroup(&self, member: &str) -> PathBuf {
        self.cgroup_of(member).join("system")
    }

    /// The pins of a node's daemon.
    #[must_use]
    pub fn pins_of(&self, node: &str) -> PathBuf {
        self.pins.join(node)
    }
}

/// The path of a network namespace by name, as `ip netns` has it.
#[must_use]
pub fn netns_path(netns: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(netns)
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside version 1.
///
/// # Errors
/// When it is not mounted.
pub fn cgroup_root() -> Result<PathBuf> {
    let mounts = mounts()?;
    let Some(found) = mounts.into_iter().find(|m| m.kind == "cgroup2") else {
        bail!("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup");
    };
    Ok(found.point)
}

/// Where a cgroup of the cgroup2 mount has version 1 hierarchies beside it: daemons limit tasks
/// there.
pub(crate) fn twins(cgroup: &Path) -> Result<Vec<PathBuf>> {
    let root = cgroup_root()?;
    let Ok(below) = cgroup.strip_prefix(&root) else { return Ok(Vec::new()) };
    let v1 = mounts()?.into_iter().filter(|mount| mount.kind == "cgroup");
    Ok(v1.map(|mount| mount.point.join(below)).filter(|twin| twin.exists()).collect())
}

/// One line of `/proc/self/mountinfo`.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) point: PathBuf,
    pub(crate) kind: String,
}

/// The mounts of this process's namespace.
pub(crate) fn mounts() -> Result<Vec<Mount>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    Ok(text.lines().filter_map(parse_mount).collect())
}

/// proc(5): `36 35 98:0 /root /point options [tags…] - type source super-options`.
fn parse_mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let point = left.split(' ').nth(4)?;
    let kind = right.split(' ').next()?;
    Some(Mount { point: PathBuf::from(unescape(point)), kind: kind.to_owned() })
}

/// Blanks and backslashes stand as three octal digits in mountinfo.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Whether this process may make labs.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Waits until `ready` says so.
///
/// # Errors
/// When `ready` fails, or `what` did not come true in time.
pub fn wait_for(
    what: &str,
    within: Duration,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + within;
    while !ready()? {
        if Instant::now() >= deadline {
            bail!("{what}: not within {within:?}");
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// An exclusive lock on a directory, held while this lives. The directory may be removed and made
/// again by others between opening and locking; only a lock on what is there now counts.
#[derive(Debug)]
pub(crate) struct DirLock(#[expect(dead_code, reason = "held, not read")] File);

impl DirLock {
    /// Makes the directory if it is missing, and waits for the lock.
    pub(crate) fn wait(dir: &Path) -> Result<Self> {
        loop {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
            let Some(file) = open_if_there(dir)? else { continue };
            file.lock().with_context(|| format!("lock {}", dir.display()))?;
            if is_same(&file, dir) {
                return Ok(Self(file));
            }
        }
    }

    /// As [`Self::wait`], but `None` when another process holds it.
    pub(crate) fn try_now(dir: &Path) -> Result<Option<Self>> {
        loop {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
            let Some(file) = open_if_there(dir)? else { continue };
            match file.try_lock() {
                Ok(()) if is_same(&file, dir) => return Ok(Some(Self(file))),
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => return Ok(None),
                Err(fs::TryLockError::Error(e)) => {
                    return Err(e).with_context(|| format!("lock {}", dir.display()));
                }
            }
        }
    }
}

fn open_if_there(dir: &Path) -> Result<Option<File>> {
    match File::open(dir) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("open {}", dir.display())),
    }
}

fn is_same(file: &File, dir: &Path) -> bool {
    match (file.metadata(), fs::metadata(dir)) {
        (Ok(held), Ok(there)) => held.dev() == there.dev() && held.ino() == there.ino(),
        _ => false,
    }
}

/// Says that a mount is a lab's own doing.
fn marker(of: &str) -> PathBuf {
    Path::new(RUN_DIR).join(format!(".mounted-{of}"))
}

/// Makes the host's bpffs and `/run/netns` ready, remembering what was not there before.
pub(crate) fn prepare_mounts() -> Result<()> {
    let _lock = DirLock::wait(Path::new(RUN_DIR))?;
    if !is_bpffs() {
        fs::write(marker("bpffs"), "").context("note the bpffs mount")?;
        mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .with_context(|| format!("mount bpffs at {BPFFS}"))?;
    }
    let netns_dir = Path::new(NETNS_DIR);
    if !mounts()?.iter().any(|m| m.point == netns_dir) {
        // As `ip netns` does: a shared mount, so that removing a namespace's name here removes it
        // in every mount namespace that has a copy, and the namespace can end.
        if !netns_dir.exists() {
            fs::write(marker("netns"), "").context("note the netns directory")?;
            fs::create_dir_all(netns_dir).with_context(|| format!("make {NETNS_DIR}"))?;
        }
        let none = None::<&str>;
        mount(Some(NETNS_DIR), NETNS_DIR, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .with_context(|| format!("bind {NETNS_DIR}"))?;
        fs::write(marker("netns"), "").context("note the netns mount")?;
        mount(none, NETNS_DIR, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none)
            .with_context(|| format!("share {NETNS_DIR}"))?;
    }
    Ok(())
}

/// Takes away what labs made on the host, once the last lab is gone. What others use by now stays.
pub(crate) fn release_mounts() -> Result<()> {
    let run = Path::new(RUN_DIR);
    let _lock = DirLock::wait(run)?;
    if list(run)?.iter().any(|name| !name.starts_with('.')) {
        return Ok(());
    }
    for (of, at) in [("bpffs", BPFFS), ("netns", NETNS_DIR)] {
        let marker = marker(of);
        if !marker.exists() {
            continue;
        }
        let used = list(Path::new(at))?.iter().any(|name| !KERNELS_OWN.contains(&name.as_str()));
        if !used {
            let mounted = mounts()?.iter().any(|m| m.point == Path::new(at));
            if mounted {
                umount2(at, MntFlags::MNT_DETACH).with_context(|| format!("unmount {at}"))?;
            }
            if of == "netns" {
                let _ = fs::remove_dir(at);
            }
        }
        fs::remove_file(&marker).with_context(|| format!("remove {}", marker.display()))?;
    }
    // Not if another lab begins this moment: its directory keeps this one.
    let _ = fs::remove_dir(run);
    let _ = fs::remove_dir(STATE_DIR);
    Ok(())
}

fn is_bpffs() -> bool {
    statfs(BPFFS).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

/// Names in a directory; none if it does not exist.
pub(crate) fn list(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("list {}", dir.display())),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", dir.display()))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Writes a whole file or nothing: readers never see half of it.
pub(crate) fn write_whole(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, text).with_context(|| format!("write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("put {} in place", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_with_and_without_tags() {
        let line = "36 35 98:0 / /sys/fs/cgroup\\040x rw,nosuid shared:4 master:1 - cgroup2 cg rw";
        let mount = parse_mount(line).unwrap();
        assert_eq!(mount.point, Path::new("/sys/fs/cgroup x"));
        assert_eq!(mount.kind, "cgroup2");
        let bare = parse_mount("22 1 0:20 / /proc rw - proc proc rw").unwrap();
        assert_eq!((bare.point.as_path(), bare.kind.as_str()), (Path::new("/proc"), "proc"));
        assert!(parse_mount("nonsense").is_none());
    }

    #[test]
    fn waiting_ends_at_the_deadline_and_says_for_what() {
        let error = wait_for("the moon", Duration::from_millis(20), || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("the moon"), "{error}");
        wait_for("now", Duration::ZERO, || Ok(true)).unwrap();
    }
}
