//! Installs Debian packages that are missing, and only those.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::shell::{on_path, output, require_root, visible};

/// A program, and the packages that may bring it, best first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    program: &'static str,
    packages: &'static [&'static str],
}

const fn tool(program: &'static str, packages: &'static [&'static str]) -> Tool {
    Tool { program, packages }
}

/// What the demo and the lab use: the first [`DEMO_TOOLS`] of all.
pub(crate) const DEMO: &[Tool] = ALL.split_at(DEMO_TOOLS).0;
const DEMO_TOOLS: usize = 7;

/// Everything that tests and benchmarks use.
pub(crate) const ALL: &[Tool] = &[
    tool("nft", &["nftables"]),
    tool("ip", &["iproute2"]),
    tool("ping", &["iputils-ping"]),
    tool("iperf3", &["iperf3"]),
    tool("dig", &["bind9-dnsutils", "dnsutils"]),
    tool("curl", &["curl"]),
    tool("tcpdump", &["tcpdump"]),
    // For the tests alone.
    tool("ethtool", &["ethtool"]),
    tool("bpftool", &["bpftool"]),
    tool("docker", &["docker-cli", "docker.io"]),
    tool("qemu-system-x86_64", &["qemu-system-x86"]),
    tool("busybox", &["busybox-static"]),
    tool("cpio", &["cpio"]),
    tool("modprobe", &["kmod"]),
    tool("xz", &["xz-utils"]),
    tool("strip", &["binutils"]),
];

/// What libFuzzer is compiled with.
pub(crate) const FUZZ: &[Tool] = &[tool("c++", &["g++"])];

/// The peers of `bench dns`. They are daemons: see [`install_peers`].
const DNS_PEERS: &[Tool] = &[
    tool("dnsperf", &["dnsperf"]),
    tool("unbound", &["unbound"]),
    tool("nsd", &["nsd"]),
    tool("dnsmasq", &["dnsmasq-base"]),
];
/// The peer of `bench control`, likewise.
const CONTROL_PEERS: &[Tool] = &[tool("etcd", &["etcd-server"])];
/// What says whether a package may start its daemon (invoke-rc.d(8)).
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Installs what a benchmark compares mesh with. None of it serves this machine, now or after its
/// next start.
pub(crate) fn install_peers(benchmark: &str) -> Result<()> {
    let (peers, daemons): (_, &[&str]) = match benchmark {
        "dns" => (DNS_PEERS, &["unbound", "nsd"]),
        "control" => (CONTROL_PEERS, &["etcd"]),
        _ => return Ok(()),
    };
    if peers.iter().all(|tool| on_path(tool.program)) {
        return Ok(());
    }
    let policy = Path::new(POLICY);
    let own = !policy.exists();
    if own {
        fs::write(policy, "#!/bin/sh\nexit 101\n").with_context(|| format!("write {POLICY}"))?;
        fs::set_permissions(policy, fs::Permissions::from_mode(0o755))?;
    }
    let installed = install(peers);
    if own {
        fs::remove_file(policy).with_context(|| format!("remove {POLICY}"))?;
    }
    installed?;
    if Path::new("/run/systemd/system").exists() {
        visible(Command::new("systemctl").args(["disable", "--now", "--quiet"]).args(daemons))?;
    }
    Ok(())
}

/// Installs the packages of tools that are not on this machine; does nothing if all are.
pub(crate) fn install(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| !on_path(tool.program)).collect();
    if missing.is_empty() {
        println!("set-up: all {} tools are here", tools.len());
        return Ok(());
    }
    let programs: Vec<_> = missing.iter().map(|tool| tool.program).collect();
    println!("set-up: installing {}", programs.join(", "));
    require_root("installing packages")?;
    if !on_path("apt-get") {
        bail!("this is no Debian: install {} by hand, then run it again", programs.join(", "));
    }
    visible(apt().args(["update", "--quiet=2"])).context("update the list of packages")?;
    let packages = missing.iter().map(|tool| available(tool)).collect::<Result<Vec<_>>>()?;
    visible(
        apt().args(["install", "--yes", "--quiet=2", "--no-install-recommends"]).args(&packages),
    )
    .with_context(|| format!("install {}", packages.join(" ")))
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

/// The first of a tool's packages that this release of Debian has.
fn available(tool: &Tool) -> Result<&'static str> {
    let has_candidate = |package: &str| {
        let policy = output("apt-cache", &["policy", package]).unwrap_or_default();
        let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"));
        candidate.is_some_and(|version| version.trim() != "(none)")
    };
    let found = tool.packages.iter().find(|package| has_candidate(package));
    found.copied().with_context(|| {
        format!("no package has {}: tried {}", tool.program, tool.packages.join(", "))
    })
}
