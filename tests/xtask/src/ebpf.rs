//! Building the BPF object with pinned tools.

use anyhow::{Result, bail};

/// Rebuilds the object, or compares it with the committed one.
pub(crate) fn run(_check: bool) -> Result<()> {
    bail!("`cargo xtask ebpf` is due with the BPF programs")
}
