//! Durations and sizes in query strings.

use std::time::Duration;

/// Nobody waits longer for an answer.
const DELAY_MAX: Duration = Duration::from_secs(3600);
/// The body is made on the fly, so this is only a guard against typing errors.
const SIZE_MAX: u64 = 1 << 40;

/// Splits `2.5MB` into its number and its unit.
fn split(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit))
}

/// `2s`, `150ms`, `1m`; a bare number is seconds.
pub(super) fn delay(text: &str) -> Result<Duration, String> {
    let error = || format!("`{text}` is not a delay: use 150ms, 2s or 1m, up to an hour\n");
    let (number, unit) = split(text).ok_or_else(error)?;
    let seconds = match unit {
        "ms" => number / 1e3,
        "s" | "" => number,
        "m" => number * 60.0,
        _ => return Err(error()),
    };
    let delay = Duration::try_from_secs_f64(seconds).map_err(|_| error())?;
    if delay <= DELAY_MAX { Ok(delay) } else { Err(error()) }
}

/// `1MB` (powers of ten), `1MiB` (powers of two); a bare number is bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let error = || format!("`{text}` is not a size: use 512, 10kB, 1MB or 1MiB, up to 1TiB\n");
    let (number, unit) = split(text).ok_or_else(error)?;
    let factor: u32 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(error()),
    };
    let bytes = number * f64::from(factor);
    // Exact below 2^53, and compared before the cast.
    if bytes <= SIZE_MAX as f64 { Ok(bytes as u64) } else { Err(error()) }
}

/// The value of `key` in a query string. Values here need no percent-decoding.
pub(super) fn parameter<'a>(query: Option<&'a str>, key: &str) -> Option<&'a str> {
    let mut pairs = query?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
}
