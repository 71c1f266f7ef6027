//! Network namespaces: identity, and work inside them.
//!
//! A thread that changed its namespace is never given back to anyone: each visit runs on a thread
//! of its own, which ends with it.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    thread,
};

use mesh_dataplane::NetnsId;
use nix::sched::{CloneFlags, setns, unshare};

/// The path of a namespace file: `/proc/<pid>/ns/net`, `/run/netns/<name>`.
pub type NetnsPath = Path;

/// An open namespace. It lives at least as long as this does, so it must not be kept for long.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: NetnsId,
}

impl Netns {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// No such file, or no right to open it.
    pub fn open(path: &NetnsPath) -> io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        Ok(Self { file, id: NetnsId { dev: meta.dev(), ino: meta.ino() } })
    }

    /// Opens the calling thread's namespace.
    ///
    /// # Errors
    /// `/proc` is missing.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `work` on a thread that is inside this namespace.
    ///
    /// # Errors
    /// The thread cannot be started or may not enter; else what `work` returns.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_thread(|| {
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// Runs `work` inside this namespace on the calling thread, which comes back to `home`. The
    /// thread must be one of [`on_thread`]'s.
    ///
    /// # Panics
    /// The way back fails: what the thread did next would happen in the wrong namespace.
    pub(crate) fn visit<T>(
        &self,
        home: &Self,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let result = work();
        if let Err(error) = setns(home.file.as_fd(), CloneFlags::CLONE_NEWNET) {
            panic!("cannot return from {} to {}: {error}", self.id, home.id);
        }
        result
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// Runs `work` inside a new namespace that ends with it, unless something holds on to it.
///
/// # Errors
/// The thread cannot be started or no namespace be made; else what `work` returns.
pub fn scratch<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// Makes a namespace and keeps it at `/run/netns/<name>`, where `ip netns` finds it.
///
/// # Errors
/// The name is taken; no right to mount.
pub fn create(name: &str) -> io::Result<PathBuf> {
    use nix::mount::{MsFlags, mount};
    let directory = Path::new("/run/netns");
    std::fs::create_dir_all(directory)?;
    let path = directory.join(name);
    File::options().write(true).create_new(true).open(&path)?;
    let made = scratch(|| {
        let own = Path::new("/proc/thread-self/ns/net");
        Ok(mount(Some(own), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
    });
    if made.is_err() {
        let _ = std::fs::remove_file(&path);
    }
    made.map(|()| path)
}

/// Removes the name that [`create`] made; the namespace ends when nobody is in it.
///
/// # Errors
/// No such name.
pub fn remove(name: &str) -> io::Result<()> {
    use nix::mount::{MntFlags, umount2};
    let path = Path::new("/run/netns").join(name);
    // Not mounted (any more): then the file alone is left.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    std::fs::remove_file(path)
}

/// Runs `work` on a thread of its own.
pub(crate) fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let handle = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work)?;
        handle.join().unwrap_or_else(|_| Err(io::Error::other("the netns thread panicked")))
    })
}
