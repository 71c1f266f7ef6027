//! Building the BPF object with pinned tools: one nightly (core is built from source for the BPF
//! target), one bpf-linker, one LLVM. The object is committed, so that nobody else needs them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::shell::{output, require_root, visible};

/// The nightly, as rustup names it, and the commit that it is built from.
const TOOLCHAIN: &str = "nightly-2026-05-20";
const TOOLCHAIN_COMMIT: &str = "e50aa6fba4e63ab34c72bf9acfd2c307c1155d1a";
const LINKER: &str = "0.13.0";
const LLVM: &str = "22";

const SOURCE: &str = "ebpf/prog";
const OBJECT: &str = "ebpf/mesh.bpf.o";

/// Rebuilds the object, or compares it with the committed one.
pub(crate) fn run(check: bool) -> Result<()> {
    let toolchain = toolchain()?;
    linker()?;
    let built = build(&toolchain)?;
    let object = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    let committed = fs::read(OBJECT).unwrap_or_default();
    let same = object == committed;
    if !check && !same {
        fs::write(OBJECT, &object).with_context(|| format!("write {OBJECT}"))?;
    }
    if check && !same {
        bail!(
            "{OBJECT} is not what {SOURCE} gives ({} bytes committed, {} built as {}): run `cargo \
             xtask ebpf` and commit the object with the source. Built with {TOOLCHAIN}, bpf-linker \
             {LINKER}, LLVM {}",
            committed.len(),
            object.len(),
            built.display(),
            llvm_version(),
        );
    }
    println!("{OBJECT}: {} bytes, {}", object.len(), if same { "as committed" } else { "new" });
    Ok(())
}

/// Builds the object; nothing in it depends on where the source lies.
fn build(toolchain: &str) -> Result<PathBuf> {
    // Joined as CARGO_ENCODED_RUSTFLAGS wants them. No path may be among them: cargo names crates
    // by a hash of its flags too.
    let flags = [
        "-Clinker=bpf-linker",
        "-Clinker-plugin-lto",
        "-Clink-arg=-O3",
        // The instruction set of Linux 5.4 and later.
        "-Ctarget-cpu=v3",
    ]
    .join("\x1f");
    let target = Path::new("target/ebpf");
    let mut cargo = Command::new("rustup");
    cargo
        .args(["run", toolchain, "cargo", "build", "--release", "--locked", "--quiet"])
        .args(["--target=bpfel-unknown-none", "-Zbuild-std=core"])
        .arg(format!("--manifest-path={SOURCE}/Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    // What the cargo that runs this set for its own toolchain.
    for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(name);
    }
    visible(&mut cargo).with_context(|| format!("build {SOURCE}"))?;
    Ok(target.join("bpfel-unknown-none/release/mesh"))
}

/// The pinned nightly by whatever name it is installed; installs it if it is not.
fn toolchain() -> Result<String> {
    for name in [TOOLCHAIN, "nightly"] {
        // Asking rustup to run what is not there would install it: look first.
        let here = output("rustup", &["toolchain", "list"])?.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with("-x86_64") || rest.starts_with("-aarch64"))
        });
        if here && commit(name)? == TOOLCHAIN_COMMIT {
            visible(Command::new("rustup").args([
                "component",
                "add",
                "--toolchain",
                name,
                "rust-src",
            ]))?;
            return Ok(name.to_owned());
        }
    }
    let mut install = Command::new("rustup");
    install.args(["toolchain", "install", TOOLCHAIN, "--profile=minimal", "--component=rust-src"]);
    visible(&mut install).with_context(|| format!("install {TOOLCHAIN}"))?;
    let found = commit(TOOLCHAIN)?;
    ensure!(found == TOOLCHAIN_COMMIT, "{TOOLCHAIN} is of {found}, not of {TOOLCHAIN_COMMIT}");
    Ok(TOOLCHAIN.to_owned())
}

/// The commit that a toolchain is built from.
fn commit(toolchain: &str) -> Result<String> {
    let version = output("rustup", &["run", toolchain, "rustc", "-vV"])?;
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: "));
    Ok(commit.unwrap_or_default().to_owned())
}

/// Installs the pinned linker if it is not there.
fn linker() -> Result<()> {
    let wanted = format!("bpf-linker {LINKER}");
    if output("bpf-linker", &["--version"]).is_ok_and(|version| version == wanted) {
        return Ok(());
    }
    let prefix = format!("/usr/lib/llvm-{LLVM}");
    if !Path::new(&prefix).join("include").is_dir() {
        require_root("installing LLVM, which bpf-linker needs")?;
        visible(apt().args(["update", "--quiet=2"])).context("update the list of packages")?;
        let packages = [
            &format!("llvm-{LLVM}-dev"),
            &format!("libpolly-{LLVM}-dev"),
            "zlib1g-dev",
            "libzstd-dev",
            "libxml2-dev",
        ];
        visible(
            apt().args(["install", "--yes", "--quiet=2", "--no-install-recommends"]).args(packages),
        )
        .with_context(|| format!("install LLVM {LLVM}"))?;
    }
    let mut install = Command::new("cargo");
    install
        .args(["install", "bpf-linker", "--locked", "--no-default-features"])
        .args(["--version", LINKER, "--features", &format!("llvm-{LLVM}")])
        .env("LLVM_PREFIX", prefix);
    visible(&mut install).with_context(|| format!("install bpf-linker {LINKER}"))
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

/// LLVM's full version, for the message alone: Debian may move it within a release.
fn llvm_version() -> String {
    let config = format!("/usr/lib/llvm-{LLVM}/bin/llvm-config");
    output(config, &["--version"]).unwrap_or_else(|_| format!("{LLVM} (unknown)"))
}
