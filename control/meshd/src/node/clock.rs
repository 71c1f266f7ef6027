//! The daemon's clocks. Cores get time from here, as an argument.

use std::{
    sync::LazyLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
/// So that "an hour ago" can be said right after the start.
const HEAD_START: Duration = Duration::from_secs(3600);

/// Monotonic time since an hour before the daemon's start.
pub(crate) fn monotonic() -> Duration {
    START.elapsed() + HEAD_START
}

/// Milliseconds since the Unix epoch.
pub(crate) fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
