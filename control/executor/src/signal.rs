//! Names of signals as users write them.

use std::str::FromStr;

use nix::sys::signal::Signal;

/// Asks a process to end.
pub const SIGTERM: i32 = libc::SIGTERM;

/// A signal's number from `SIGTERM`, `term`, `15` or `SIGRTMIN+3`.
///
/// # Errors
/// A sentence that names the text.
pub fn parse_signal(text: &str) -> Result<i32, String> {
    let error =
        || format!("`{text}` is not a signal: use a name like SIGTERM or a number of 1..=64");
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(error()) };
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset: i32 = if offset.is_empty() { 0 } else { parse_offset(offset, '+', error)? };
        return within_real_time(libc::SIGRTMIN() + offset, error);
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        let offset: i32 = if offset.is_empty() { 0 } else { parse_offset(offset, '-', error)? };
        return within_real_time(libc::SIGRTMAX() - offset, error);
    }
    Signal::from_str(&format!("SIG{name}")).map(|signal| signal as i32).map_err(|_| error())
}

fn parse_offset(text: &str, sign: char, error: impl Fn() -> String) -> Result<i32, String> {
    let digits = text.strip_prefix(sign).ok_or_else(&error)?;
    digits.parse::<u8>().map(i32::from).map_err(|_| error())
}

fn within_real_time(number: i32, error: impl Fn() -> String) -> Result<i32, String> {
    if (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number) { Ok(number) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_the_ways_to_write_one() {
        for text in ["SIGTERM", "TERM", "term", " 15 "] {
            assert_eq!(parse_signal(text), Ok(15), "{text}");
        }
        assert_eq!(parse_signal("SIGQUIT"), Ok(3));
        assert_eq!(parse_signal("SIGRTMIN+3"), Ok(libc::SIGRTMIN() + 3));
        assert_eq!(parse_signal("RTMAX-1"), Ok(libc::SIGRTMAX() - 1));
        for text in ["", "0", "65", "-9", "SIGNOPE", "RTMIN+99", "RTMIN-1", "SIG"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_gives_a_valid_number_or_none(text: String) {
            if let Ok(number) = parse_signal(&text) {
                prop_assert!((1..=64).contains(&number));
            }
        }
    }
}
