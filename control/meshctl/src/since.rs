//! Points in time as users give them: RFC 3339, a date, Unix seconds, or how long ago (`10m`).

use jiff::{Timestamp, civil, tz::TimeZone};

use crate::service::duration;

/// As the daemon takes it: `seconds.nanoseconds` of Unix time.
pub(crate) fn unix(text: &str, now: Timestamp) -> Result<String, String> {
    let at = parse(text, now).ok_or_else(|| {
        format!(
            "`{text}` is no point in time: use 2026-01-02T15:04:05Z, Unix seconds, or a duration \
             like 10m for how long ago"
        )
    })?;
    Ok(format!("{}.{:09}", at.as_second(), at.subsec_nanosecond().max(0)))
}

/// For clap.
pub(crate) fn since(text: &str) -> Result<String, String> {
    unix(text, Timestamp::now())
}

fn parse(text: &str, now: Timestamp) -> Option<Timestamp> {
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (seconds, nanos) = text.split_once('.').unwrap_or((text, "0"));
    if plain(seconds) && plain(nanos) && nanos.len() <= 9 {
        let nanos = format!("{nanos:0<9}").parse().ok()?;
        return Timestamp::new(seconds.parse().ok()?, nanos).ok();
    }
    if let Ok(nanos) = duration(text) {
        return now.checked_sub(std::time::Duration::from_nanos(nanos)).ok();
    }
    if let Ok(at) = text.parse::<Timestamp>() {
        return Some(at);
    }
    // Without a zone: the user's own.
    let local: civil::DateTime = text.parse().ok()?;
    Some(local.to_zoned(TimeZone::system()).ok()?.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_absolute_or_ago() {
        let now: Timestamp = "2026-01-02T15:04:05Z".parse().unwrap();
        let unix = |text| unix(text, now);
        assert_eq!(unix("10m").unwrap(), (now.as_second() - 600).to_string() + ".000000000");
        assert_eq!(unix("1.5s").unwrap(), (now.as_second() - 2).to_string() + ".500000000");
        assert_eq!(unix("1795218673").unwrap(), "1795218673.000000000");
        assert_eq!(unix("1795218673.25").unwrap(), "1795218673.250000000");
        assert_eq!(unix("2026-01-02T15:04:05.5Z").unwrap(), "1767366245.500000000");
        assert_eq!(unix("2026-01-02T16:04:05+01:00").unwrap(), "1767366245.000000000");
        assert!(unix("2026-01-02").is_ok() && unix("2026-01-02T15:04:05").is_ok());
        for bad in ["", "yesterday", "-5", "5 minutes", "1.2.3", "999999999999999999999"] {
            assert!(unix(bad).unwrap_err().contains("point in time"), "{bad}");
        }
    }
}
