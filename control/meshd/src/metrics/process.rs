//! What the kernel says of this process (proc(5)), by the names that all Prometheus clients use.

use std::fs;

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};

use super::list;

/// Looks. What cannot be read is not shown.
pub(crate) fn look() {
    // Fields are counted from the state on, which follows the name in brackets.
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit_once(") ")
        .map(|(_, fields)| fields.split(' ').map(|word| word.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied();
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let config = |name| sysconf(name).ok().flatten().map(|value| value as f64);
    if let Some(ticks) = config(SysconfVar::CLK_TCK) {
        if let (Some(user), Some(system)) = (field(14), field(15)) {
            list::PROCESS_CPU.set_float(&[], (user + system) / ticks);
        }
        if let (Some(start), Some(boot)) = (field(22), boot_time()) {
            list::PROCESS_START.set_float(&[], boot + start / ticks);
        }
    }
    if let Some(threads) = field(20) {
        list::PROCESS_THREADS.set_float(&[], threads);
    }
    if let Some(bytes) = field(23) {
        list::PROCESS_VIRTUAL.set_float(&[], bytes);
    }
    if let (Some(pages), Some(size)) = (field(24), config(SysconfVar::PAGE_SIZE)) {
        list::PROCESS_RESIDENT.set_float(&[], pages * size);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        list::PROCESS_FDS.set(&[], open.count() as u64);
    }
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        list::PROCESS_FDS_MAX.set(&[], soft);
    }
}

/// When the machine began, since the Unix epoch.
fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}
