//! What is printed: Docker's tables, JSON, Go templates, times in words, errors.

mod colour;
mod format;
mod inspect;
mod pretty;
mod table;
pub(crate) mod template;

use std::io::{self, Write as _};

use anyhow::{Context, Result};
use jiff::{Timestamp, Unit};
use serde::Serialize;

pub(crate) use colour::{Tint, on_stdout};
pub(crate) use format::{Format, ListArgs, fields};
pub(crate) use inspect::{InspectFormat, ObjectFormat, object, objects};
pub(crate) use pretty::{Screen, pretty};
pub(crate) use table::{Table, aligned};

/// Prints a line; a reader that has gone (`| head`) ends the program quietly, as SIGPIPE would.
pub(crate) fn say(text: impl AsRef<str>) -> Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush()) {
        Err(err) if err.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.context("cannot print"),
    }
}

/// Four blanks per level, as Docker does.
pub(crate) fn indented(value: &impl Serialize) -> Result<String> {
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    value.serialize(&mut serializer).context("cannot print an object")?;
    String::from_utf8(bytes).context("cannot print an object")
}

/// An error and what caused it. A refusal by the daemon says it all by itself.
pub(crate) fn error_text(err: &anyhow::Error) -> String {
    if err.is::<crate::client::Refused>() {
        err.to_string()
    } else {
        format!("{} {err:#}", colour::on_stderr(Tint::Bad, "error:"))
    }
}

/// Does `act` for each name, goes on after failures, and fails at the end.
pub(crate) async fn for_each<F: Future<Output = Result<()>>>(
    names: &[String],
    act: impl Fn(String) -> F,
) -> Result<()> {
    let mut last = None;
    for name in names {
        if let Err(err) = act(name.clone()).await
            && let Some(earlier) = last.replace(err)
        {
            eprintln!("{}", error_text(&earlier));
        }
    }
    last.map_or(Ok(()), Err)
}

/// The first 12 characters, as tables print ids.
pub(crate) fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// How long ago a time of the API was, in Docker's words, without "ago".
pub(crate) fn ago(time: &str, now: Timestamp) -> String {
    let Ok(then) = time.parse::<Timestamp>() else { return "an unknown time".to_owned() };
    let seconds = now.since(then).and_then(|span| span.total(Unit::Second)).unwrap_or(0.0).max(0.0);
    in_words(seconds as u64)
}

fn in_words(seconds: u64) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    match seconds {
        0 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        s if s < MINUTE => format!("{s} seconds"),
        s if s < 2 * MINUTE => "About a minute".to_owned(),
        s if s < HOUR => format!("{} minutes", s / MINUTE),
        s if s < 2 * HOUR => "About an hour".to_owned(),
        s if s < 2 * DAY => format!("{} hours", s / HOUR),
        s if s < 14 * DAY => format!("{} days", s / DAY),
        s if s < 60 * DAY => format!("{} weeks", s / DAY / 7),
        s if s < 730 * DAY => format!("{} months", s / DAY / 30),
        s => format!("{} years", s / DAY / 365),
    }
}

/// `active` → `Active`.
pub(crate) fn title(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// Orders names as people do: digits by their value.
pub(crate) fn natural(name: &str) -> Vec<(String, u64)> {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text_end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (text, tail) = rest.split_at(text_end);
        let digits_end = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (digits, tail) = tail.split_at(digits_end);
        parts.push((text.to_lowercase(), digits.parse().unwrap_or(0)));
        rest = tail;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_dockers_words() {
        let told = |seconds| in_words(seconds);
        assert_eq!(told(0), "Less than a second");
        assert_eq!(told(59), "59 seconds");
        assert_eq!(told(61), "About a minute");
        assert_eq!(told(7200), "2 hours");
        assert_eq!(told(3 * 86_400), "3 days");
        let now = "2026-11-21T00:00:05.5Z".parse().unwrap();
        assert_eq!(ago("2026-11-21T00:00:00.123456789Z", now), "5 seconds");
        assert_eq!(ago("2026-11-21T00:01:00Z", now), "Less than a second");
        assert_eq!(ago("x", now), "an unknown time");
    }

    #[test]
    fn names_order_by_their_numbers() {
        let mut names = ["web10", "web2", "App", "web"];
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["App", "web", "web2", "web10"]);
    }
}
