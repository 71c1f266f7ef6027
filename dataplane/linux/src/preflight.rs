//! What the data plane needs of this machine, asked before anything is changed.
//!
//! Features are tried out in a network namespace that ends with the question; versions are not
//! trusted, since distributions backport and leave out.

use std::{fs, io, os::fd::AsFd, path::Path, process::Command};

use crate::{bpf_sys, error::Missing, netlink::Socket, netns, rtnl};

/// What the kernel offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Programs attach as tcx links (6.6 and later); else as clsact filters.
    pub tcx: bool,
    /// `redirect_peer` needs `bpf_skb_change_type` before it (kernels before 6.15).
    pub change_type: bool,
}

/// Everything that is missing, at once, each with its remedy. `pin_dir` is where objects will be
/// pinned.
#[must_use]
pub fn preflight(pin_dir: &Path) -> Vec<Missing> {
    match probe() {
        Ok((_, mut missing)) => {
            missing.extend(bpffs(pin_dir));
            missing
        }
        Err(missing) => vec![missing],
    }
}

/// Probes the kernel. `Err`: nothing else can be found out without it.
pub(crate) fn probe() -> Result<(Features, Vec<Missing>), Missing> {
    let privileged = capability(CAP_NET_ADMIN) && capability(CAP_SYS_ADMIN);
    if !privileged {
        return Err(missing(
            "root (CAP_NET_ADMIN and CAP_SYS_ADMIN)",
            "run it as root, or through sudo",
        ));
    }
    let mut found = Vec::new();
    let version = kernel();
    if version < (6, 1) {
        let what = format!("Linux 6.1 (this is {}.{})", version.0, version.1);
        found.push(missing(&what, "boot a newer kernel"));
    }
    if Command::new("nft").arg("--version").output().is_err() {
        found.push(missing("the program `nft`", "install the package nftables"));
    }
    let tcx = netns::scratch(|| Ok(try_out(&mut found)));
    let tcx = tcx.unwrap_or_else(|error| {
        found.push(missing(
            &format!("network namespaces ({error})"),
            "use a kernel with CONFIG_NET_NS and allow this process to create them",
        ));
        false
    });
    Ok((Features { tcx, change_type: version < (6, 15) }, found))
}

fn missing(what: &str, remedy: &str) -> Missing {
    Missing { what: what.to_owned(), remedy: remedy.to_owned() }
}

/// Tries everything out in the calling thread's (throw-away) namespace. Returns whether tcx works.
fn try_out(found: &mut Vec<Missing>) -> bool {
    let mut socket = match Socket::route() {
        Ok(socket) => socket,
        Err(error) => {
            found.push(missing(&format!("rtnetlink ({error})"), "use a kernel with CONFIG_NET"));
            return false;
        }
    };
    let module = |what: &str, module: &str, error: &dyn std::fmt::Display| {
        missing(
            &format!("{what} ({error})"),
            &format!("load the kernel module {module}, or use a kernel that has it"),
        )
    };
    if let Err(error) = rtnl::add_veth_here(&mut socket, "probe0", "probe1") {
        found.push(module("veth links", "veth", &error));
    }
    if let Err(error) = rtnl::add_vxlan(&mut socket, "probe2", 4789, 1450) {
        found.push(module("VXLAN devices", "vxlan", &error));
    }
    let rules = "table ip probe { chain c { type nat hook postrouting priority srcnat; \
                 oifname != \"x*\" ct state established masquerade; }; }";
    if let Err(error) = crate::nft::run(rules) {
        found.push(module("nft with NAT", "nft_masq (and nft_chain_nat, nft_ct)", &error));
    }
    let program = match bpf_sys::load_trivial() {
        Ok(program) => program,
        Err(error) => {
            found.push(missing(
                &format!("BPF classifier programs ({error})"),
                "use a kernel with CONFIG_BPF_SYSCALL, and allow bpf(2) (lockdown, seccomp)",
            ));
            return false;
        }
    };
    let lo = mesh_dataplane::desired::LOOPBACK_IFINDEX;
    if bpf_sys::attach_tcx(program.as_fd(), lo, bpf_sys::TCX_INGRESS).is_ok() {
        return true;
    }
    let clsact = rtnl::add_clsact(&mut socket, lo)
        .and_then(|()| rtnl::set_filter(&mut socket, lo, rtnl::INGRESS, program.as_fd(), "probe"));
    if let Err(error) = clsact {
        found.push(module("clsact with BPF filters", "sch_ingress and cls_bpf", &error));
    }
    false
}

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Whether this thread has the capability in effect.
fn capability(bit: u32) -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| set & (1 << bit) != 0)
}

fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    parse_release(&release)
}

fn parse_release(release: &str) -> (u32, u32) {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().ok());
    let mut next = || parts.next().flatten().unwrap_or(0);
    (next(), next())
}

/// Whether the directory, or the nearest one above it that exists, is on a bpffs.
fn on_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|above| nix::sys::statfs::statfs(above).ok())
        .is_some_and(|stat| stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

fn bpffs(pin_dir: &Path) -> Option<Missing> {
    (!on_bpffs(pin_dir)).then(|| {
        missing(
            &format!("a bpffs at {}", pin_dir.display()),
            "mount -t bpf bpf /sys/fs/bpf (and give a pin directory below it)",
        )
    })
}

/// Mounts a bpffs so that `pin_dir` is on one: at `/sys/fs/bpf` if it is below that, else at
/// `pin_dir` itself. Returns whether it mounted one.
///
/// # Errors
/// No right to mount, or no such file system in this kernel.
pub fn ensure_bpffs(pin_dir: &Path) -> io::Result<bool> {
    use nix::mount::{MsFlags, mount};
    if on_bpffs(pin_dir) {
        return Ok(false);
    }
    let usual = Path::new("/sys/fs/bpf");
    let at = if pin_dir.starts_with(usual) { usual } else { pin_dir };
    if at == pin_dir {
        fs::create_dir_all(at)?;
    }
    mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), None::<&str>)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        assert_eq!(parse_release("6.1.0-40-amd64\n"), (6, 1));
        assert_eq!(parse_release("6.18.44-fc-v595"), (6, 18));
        assert_eq!(parse_release("7.0-rc1"), (7, 0));
        assert_eq!(parse_release(""), (0, 0));
    }

    #[test]
    fn a_plain_directory_is_no_bpffs() {
        assert!(!on_bpffs(Path::new("/proc")));
    }
}
