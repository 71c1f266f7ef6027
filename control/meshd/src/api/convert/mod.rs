//! Between the API's objects and the store's, by hand: the two change at different speeds.

pub(super) mod cluster;
mod dns;
pub(super) mod network;
pub(super) mod node;
mod resources;
pub(super) mod service;
pub(super) mod spec;
pub(super) mod task;
pub(super) mod update;

use jiff::Timestamp;
use mesh_api::Version;
use mesh_control::model::Meta;

/// RFC 3339 with nanoseconds, as every time in the API.
pub(super) fn time(ms: u64) -> String {
    let stamp = i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    format!("{:.9}", stamp.unwrap_or(Timestamp::UNIX_EPOCH))
}

pub(super) fn version(meta: &Meta) -> Version {
    Version { index: meta.version.get() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_have_nanoseconds() {
        assert_eq!(super::time(1_795_218_673_250), "2026-11-20T23:51:13.250000000Z");
        assert_eq!(super::time(u64::MAX), "1970-01-01T00:00:00.000000000Z");
    }
}
