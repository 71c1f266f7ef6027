//! What is printed: Docker's tables, JSON lines, times in words, errors.

use std::io::{self, Write as _};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use jiff::{Timestamp, Unit};
use serde::Serialize;
use serde_json::{Map, Value};

/// How lists are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// An aligned table
    Table,
    /// One JSON object per line
    Json,
}

/// The flags of `inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectFormat {
    /// `json`: one object per line instead of one indented array
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) format: Option<JsonOnly>,
}

/// The one format that `inspect` can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum JsonOnly {
    /// One JSON object per line
    Json,
}

/// Prints a line; a reader that has gone (`| head`) ends the program quietly, as SIGPIPE would.
pub(crate) fn say(text: impl AsRef<str>) -> Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush()) {
        Err(err) if err.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.context("cannot print"),
    }
}

/// Rows of a list, under the names of their columns: the heading, and the key in JSON.
#[derive(Debug)]
pub(crate) struct Table {
    columns: &'static [(&'static str, &'static str)],
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(columns: &'static [(&'static str, &'static str)]) -> Self {
        Self { columns, rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    pub(crate) fn print(&self, format: Format) -> Result<()> {
        match format {
            Format::Table => say(self.aligned()),
            Format::Json => self.lines().iter().try_for_each(say),
        }
    }

    /// Columns as wide as their widest cell and 3 blanks, at least 10; the last is not padded.
    fn aligned(&self) -> String {
        let head = self.columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
        let all: Vec<&Vec<String>> = std::iter::once(&head).chain(&self.rows).collect();
        let width = |column: usize| {
            all.iter().map(|row| row[column].chars().count() + 3).max().unwrap_or(0).max(10)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |row: &&Vec<String>| {
            let last = row.len() - 1;
            let padded = row.iter().zip(&widths).enumerate();
            padded
                .map(
                    |(at, (cell, width))| {
                        if at == last { cell.clone() } else { format!("{cell:<width$}") }
                    },
                )
                .collect::<String>()
        };
        all.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    fn lines(&self) -> Vec<String> {
        let object = |row: &Vec<String>| {
            let keys = self.columns.iter().map(|(_, key)| (*key).to_owned());
            let fields = keys.zip(row.iter().cloned().map(Value::String));
            Value::Object(fields.collect::<Map<_, _>>()).to_string()
        };
        self.rows.iter().map(object).collect()
    }
}

/// Prints objects as `inspect` does.
pub(crate) fn objects(objects: &[impl Serialize], format: &InspectFormat) -> Result<()> {
    match format.format {
        None => say(indented(&objects)?),
        Some(JsonOnly::Json) => objects.iter().try_for_each(|object| {
            say(serde_json::to_string(object).context("cannot print an object")?)
        }),
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
    if err.is::<crate::client::Refused>() { err.to_string() } else { format!("error: {err:#}") }
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

    const COLUMNS: &[(&str, &str)] = &[("ID", "ID"), ("LONG NAME", "Name"), ("PORTS", "Ports")];

    #[test]
    fn tables_are_aligned_as_dockers() {
        let mut table = Table::new(COLUMNS);
        table.row(vec!["abcdefghijkl".into(), "w".into(), String::new()]);
        table.row(vec!["x".into(), "web".into(), "*:80->80/tcp".into()]);
        let expected = "ID             LONG NAME   PORTS\n\
                        abcdefghijkl   w           \n\
                        x              web         *:80->80/tcp";
        assert_eq!(table.aligned(), expected);
        assert_eq!(table.lines()[1], r#"{"ID":"x","Name":"web","Ports":"*:80->80/tcp"}"#);
        assert_eq!(Table::new(&[("NAME", "Name"), ("X", "X")]).aligned(), "NAME      X");
    }

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
