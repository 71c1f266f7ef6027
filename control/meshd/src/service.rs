//! What meshd is to the machine that it serves: the API's socket, and the word to systemd.

use std::{
    env,
    ffi::OsStr,
    fs, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            fs::{PermissionsExt as _, chown},
            net::{SocketAddr, UnixDatagram, UnixStream},
        },
    },
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{Gid, Group},
};
use tokio::net::UnixListener;

/// The group that may use the API where no other is named.
const GROUP: &str = "mesh";
/// A daemon that was killed has its socket until the last of its threads is gone.
const OLD_DAEMON_PATIENCE: Duration = Duration::from_secs(2);

/// As many descriptors as may be: each connection takes one. (Tasks begin with the usual limit: see
/// the shim.)
pub fn take_descriptors() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "there are {soft} descriptors, and no more connections than that");
    }
}

/// The group that may use the API; `None`: root alone.
///
/// # Errors
/// A group was named and there is none of this name.
pub fn socket_group(named: Option<&str>) -> Result<Option<Gid>> {
    let name = named.unwrap_or(GROUP);
    let group = Group::from_name(name).with_context(|| format!("looking up the group `{name}`"))?;
    match (group, named) {
        (Some(group), _) => Ok(Some(group.gid)),
        (None, None) => {
            tracing::debug!(group = name, "no such group: the API is for root alone");
            Ok(None)
        }
        (None, Some(_)) => {
            anyhow::bail!(
                "socket_group: no group `{name}` here: `groupadd --system {name}` makes it"
            )
        }
    }
}

/// Binds the API's socket, for root and the group. A socket that an earlier daemon left is
/// replaced; one that somebody answers on is not.
///
/// # Errors
/// Another daemon serves it; no right to make it.
pub fn listen(path: &Path, group: Option<Gid>) -> Result<UnixListener> {
    let parent = path.parent().context("the socket's path has no directory")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    let patient_until = Instant::now() + OLD_DAEMON_PATIENCE;
    while UnixStream::connect(path).is_ok() {
        if Instant::now() >= patient_until {
            anyhow::bail!("another daemon serves {}: stop it first", path.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    // The group first: the one that it was made with may be anybody's.
    let owned = chown(path, None, Some(group.unwrap_or(Gid::from_raw(0)).as_raw()));
    owned
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o660)))
        .with_context(|| format!("giving {} to its group", path.display()))?;
    Ok(listener)
}

/// Tells systemd how the daemon is (`READY=1`, `STOPPING=1`: sd_notify(3)), if that started it.
pub fn notify(state: &str) {
    let Some(socket) = env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = tell(&socket, state) {
        tracing::warn!(%error, ?socket, state, "systemd cannot be told");
    }
}

fn tell(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_group_must_exist() {
        assert_eq!(socket_group(Some("root")).unwrap(), Some(Gid::from_raw(0)));
        let said = socket_group(Some("no-such-group")).unwrap_err().to_string();
        assert!(said.contains("groupadd --system no-such-group"), "{said}");
    }

    #[test]
    fn systemd_is_told() {
        let name = format!("meshd-notify-{}", std::process::id());
        let path = env::temp_dir().join(&name);
        let (by_path, by_name) = (
            UnixDatagram::bind(&path).unwrap(),
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(),
        );
        for (at, socket) in
            [(path.clone().into_os_string(), by_path), (format!("@{name}").into(), by_name)]
        {
            tell(&at, "READY=1").unwrap();
            let mut buffer = [0; 16];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
        }
        fs::remove_file(path).unwrap();
    }

    /// As root: the socket is its group's and nobody else's.
    #[tokio::test]
    async fn the_socket_is_for_root_and_one_group() {
        use std::os::unix::fs::MetadataExt as _;
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = env::temp_dir().join(format!("meshd-socket-{}", std::process::id()));
        let path = dir.join("sock");
        let _listener = listen(&path, Some(Gid::from_raw(42))).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.gid(), metadata.mode() & 0o777), (42, 0o660));
        fs::remove_dir_all(dir).unwrap();
    }
}
