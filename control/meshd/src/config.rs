//! The configuration file: [`Options`] in TOML, by the same names and rules as the flags, since
//! both are made from the same clap definitions. A flag overrides the environment, that overrides
//! the file, and that the default.

use std::{
    any::TypeId,
    collections::BTreeMap,
    ffi::OsString,
    fmt::{self, Write as _},
    fs,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgMatches, Args as _, Command, FromArgMatches as _, parser::ValueSource};
use serde::Serialize;
use toml::de::{DeTable, DeValue};

use crate::options::Options;

/// The file that is read if no other is named; it may be missing.
pub const DEFAULT_PATH: &str = "/etc/mesh/meshd.toml";
/// Larger files are no configuration.
const BYTES_MAX: u64 = 1 << 20;
/// Names this like are taken for one another; 1 is the same.
const NEAR: f64 = 0.8;
/// Columns of the example's comments, without their `# `.
const COMMENT_COLUMNS: usize = 96;

/// What is wrong with a configuration: one line for each mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Mistakes {}

/// One option as it is in effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Its key in the file.
    pub key: String,
    /// Its value; nothing if it is not set and has no default.
    pub value: Option<String>,
    /// What kind of place the value comes from.
    pub source: Source,
    /// The place: a flag, a variable, or a line of the file.
    #[serde(rename = "where")]
    pub place: Option<String>,
}

/// What a value can come from, the mightiest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The command line.
    Flag,
    /// The environment.
    Environment,
    /// The configuration file.
    File,
    /// The program.
    Default,
}

/// The options in effect.
#[derive(Debug, Clone)]
pub struct Effective {
    /// For the daemon.
    pub options: Options,
    /// The same with where each comes from, for people.
    pub settings: Vec<Setting>,
}

/// Puts the command line, the environment and the file together. Without `file` the default one is
/// read, if there is one.
///
/// # Errors
/// All that is wrong with the file, or with what came together.
pub fn effective(given: &ArgMatches, file: Option<&Path>) -> Result<Effective, Mistakes> {
    let entries = read(file)?;
    let mut command = definitions();
    for (key, entry) in &entries {
        // For clap the file's values are defaults, which every flag and variable overrides. It
        // borrows them for ever: they are few, and read once.
        let value: &'static str = Box::leak(entry.value.clone().into_boxed_str());
        command = command.mut_arg(key, |arg| arg.default_value(value));
    }
    let flags = definitions();
    let flags = flags.get_arguments().filter_map(|arg| {
        let id = arg.get_id().as_str();
        let flagged = given.value_source(id) == Some(ValueSource::CommandLine);
        let mut flag = OsString::from(format!("--{}=", arg.get_long()?));
        flag.push(flagged.then(|| given.get_raw(id))??.next()?);
        Some(flag)
    });
    let matches =
        command.clone().try_get_matches_from(flags).map_err(|e| Mistakes(vec![said(&e)]))?;
    let options =
        Options::from_arg_matches(&matches).map_err(|error| Mistakes(vec![said(&error)]))?;
    let settings: Vec<Setting> =
        keys(&command).map(|arg| setting(arg, &matches, &entries)).collect();
    let contradictions = options.contradictions().into_iter().map(|(key, why)| {
        let setting = settings.iter().find(|setting| setting.key == key);
        let place = setting.and_then(|setting| setting.place.as_deref()).unwrap_or("default");
        format!("{place}: `{key}`: {why}")
    });
    let contradictions: Vec<String> = contradictions.collect();
    if contradictions.is_empty() {
        Ok(Effective { options, settings })
    } else {
        Err(Mistakes(contradictions))
    }
}

/// A file that sets nothing, and says of each key what it is for.
#[must_use]
pub fn example() -> String {
    let mut text = String::new();
    let about = [
        &format!(
            "What meshd is told, at {DEFAULT_PATH} unless --config or MESH_CONFIG says where."
        ),
        "Written by `meshd config example`; `meshd config check` says what is in effect, and why.",
        "Each key is also a flag and a variable: `dns_ttl` is --dns-ttl and MESH_DNS_TTL. A flag \
         overrides the variable, and that this file. A value in capitals has no default.",
    ];
    for line in about.iter().flat_map(|paragraph| wrapped(paragraph)) {
        let _ = writeln!(text, "# {line}");
    }
    for arg in keys(&definitions()) {
        text.push('\n');
        let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string);
        for line in wrapped(&help.unwrap_or_default()) {
            let _ = writeln!(text, "# {line}");
        }
        let value = match arg.get_default_values().first().and_then(|value| value.to_str()) {
            Some(value) if Kind::of(arg) == Kind::Text => format!("\"{value}\""),
            Some(value) => value.to_owned(),
            None => format!("\"{}\"", value_name(arg)),
        };
        let _ = writeln!(text, "#{} = {value}", arg.get_id());
    }
    text
}

/// The settings for people: a table.
#[must_use]
pub fn table(settings: &[Setting]) -> String {
    let rows: Vec<[&str; 3]> = [["KEY", "VALUE", "FROM"]]
        .into_iter()
        .chain(settings.iter().map(|setting| {
            let value = setting.value.as_deref().unwrap_or("-");
            [&*setting.key, value, setting.place.as_deref().unwrap_or("default")]
        }))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (keys, values) = (width(0), width(1));
    rows.iter().fold(String::new(), |mut text, [key, value, place]| {
        let _ = writeln!(text, "{key:keys$}  {value:values$}  {place}");
        text
    })
}

/// The options' definitions alone.
fn definitions() -> Command {
    Options::augment_args(Command::new("meshd").no_binary_name(true).disable_help_flag(true))
}

/// Those that a file may set: all but those for tests.
fn keys(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_hide_set())
}

fn setting(arg: &Arg, matches: &ArgMatches, entries: &BTreeMap<String, Entry>) -> Setting {
    let id = arg.get_id().as_str();
    let raw = matches.get_raw(id).and_then(|mut raw| raw.next());
    let (source, place) = match matches.value_source(id) {
        Some(ValueSource::CommandLine) => {
            (Source::Flag, arg.get_long().map(|long| format!("--{long}")))
        }
        Some(ValueSource::EnvVariable) => {
            (Source::Environment, arg.get_env().map(|name| name.to_string_lossy().into_owned()))
        }
        _ => match entries.get(id) {
            Some(entry) => (Source::File, Some(entry.place.clone())),
            None => (Source::Default, None),
        },
    };
    let value = raw.map(|raw| raw.to_string_lossy().into_owned());
    Setting { key: id.to_owned(), value, source, place }
}

/// What a file says about one key.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// As a flag would have it.
    value: String,
    /// `FILE:LINE`.
    place: String,
}

fn read(file: Option<&Path>) -> Result<BTreeMap<String, Entry>, Mistakes> {
    let path = file.map_or_else(|| PathBuf::from(DEFAULT_PATH), Path::to_owned);
    let mistake = |why: &dyn fmt::Display| {
        Mistakes(vec![format!("cannot read the configuration {}: {why}", path.display())])
    };
    let size = match fs::metadata(&path) {
        Ok(metadata) => metadata.len(),
        Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(BTreeMap::new());
        }
        Err(error) => return Err(mistake(&error)),
    };
    if size > BYTES_MAX {
        return Err(mistake(&format!("{size} bytes are more than a configuration has")));
    }
    let text = fs::read_to_string(&path).map_err(|error| mistake(&error))?;
    parse(&text, &path.display().to_string())
}

/// Reads the file's text. All that is wrong is told at once.
fn parse(text: &str, name: &str) -> Result<BTreeMap<String, Entry>, Mistakes> {
    let place = |at: usize| {
        let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
        format!("{name}:{line}")
    };
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        Mistakes(vec![format!("{}: {}", place(at), error.message())])
    })?;
    let mut command = definitions();
    // Only then clap can name an option in an error.
    command.build();
    let mut found: Vec<_> = table.get_ref().iter().collect();
    found.sort_by_key(|(key, _)| key.span().start);
    let (mut entries, mut mistakes) = (BTreeMap::new(), Vec::new());
    for (key, value) in found {
        let (place, key) = (place(key.span().start), key.get_ref());
        let read = match keys(&command).find(|arg| arg.get_id() == &**key) {
            Some(arg) => flag_value(arg, value.get_ref()),
            None => Err(format!("no such key{}", did_you_mean(key, &command))),
        };
        match read {
            Ok(value) => drop(entries.insert(key.to_string(), Entry { value, place })),
            Err(why) => mistakes.push(format!("{place}: `{key}`: {why}")),
        }
    }
    if mistakes.is_empty() { Ok(entries) } else { Err(Mistakes(mistakes)) }
}

/// Any text is a configuration, or it is said what is wrong with it.
#[cfg(fuzzing)]
pub fn fuzz(text: &str) {
    if let Err(Mistakes(mistakes)) = parse(text, "meshd.toml") {
        assert!(!mistakes.is_empty() && mistakes.iter().all(|why| why.starts_with("meshd.toml:")));
    }
}

fn did_you_mean(word: &str, command: &Command) -> String {
    let likeness = |arg: &Arg| strsim::jaro_winkler(word, arg.get_id().as_str());
    let near = keys(command).map(|arg| (likeness(arg), arg)).filter(|(like, _)| *like > NEAR);
    near.max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map_or_else(String::new, |(_, arg)| format!("; did you mean `{}`?", arg.get_id()))
}

/// How a value is written in TOML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Integer,
    Boolean,
}

impl Kind {
    fn of(arg: &Arg) -> Self {
        let id = arg.get_value_parser().type_id();
        let integers = [TypeId::of::<u16>(), TypeId::of::<u32>(), TypeId::of::<u64>()];
        if id == TypeId::of::<bool>() {
            Self::Boolean
        } else if integers.iter().any(|integer| id == *integer) {
            Self::Integer
        } else {
            Self::Text
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Text => "a string in quotes",
            Self::Integer => "an integer",
            Self::Boolean => "true or false",
        }
    }
}

/// The value as the flag would have it, judged as the flag would be.
fn flag_value(arg: &Arg, value: &DeValue<'_>) -> Result<String, String> {
    let kind = Kind::of(arg);
    let text = match (kind, value) {
        (Kind::Text, DeValue::String(text)) => text.to_string(),
        (Kind::Boolean, DeValue::Boolean(value)) => value.to_string(),
        (Kind::Integer, DeValue::Integer(integer)) => {
            match i64::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(number) => number.to_string(),
                Err(error) => return Err(format!("{}: {error}", integer.as_str())),
            }
        }
        _ => return Err(format!("this is {}, not {}", value.type_str(), kind.name())),
    };
    let judge = Command::new("meshd").no_binary_name(true).arg(arg.clone());
    let flag = format!("--{}={text}", arg.get_long().unwrap_or_default());
    match judge.try_get_matches_from([flag]) {
        Ok(_) => Ok(text),
        Err(error) => Err(said(&error).replace(&format!(" for '{arg}'"), "")),
    }
}

/// The words of clap's error alone.
fn said(error: &clap::Error) -> String {
    let text = error.to_string();
    let words = text.split("\n\n").next().unwrap_or_default().replace("\n ", "");
    words.strip_prefix("error: ").unwrap_or(&words).trim().to_owned()
}

fn value_name(arg: &Arg) -> &str {
    arg.get_value_names().and_then(|names| names.first()).map_or("VALUE", |name| name.as_str())
}

/// Lines of words.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        if let Some(line) = lines.last_mut()
            && (line.is_empty() || line.len() + 1 + word.len() <= COMMENT_COLUMNS)
        {
            let space = if line.is_empty() { "" } else { " " };
            line.extend([space, word]);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(text: &str) -> String {
        parse(text, "f.toml").unwrap_err().to_string()
    }

    #[test]
    fn every_option_is_a_key_a_flag_and_a_variable() {
        let command = definitions();
        for arg in command.get_arguments() {
            let id = arg.get_id().as_str();
            assert_eq!(arg.get_long(), Some(&*id.replace('_', "-")));
            let variable = arg.get_env().map(|name| name.to_string_lossy().into_owned());
            if arg.is_hide_set() {
                // Faults must not come from a file that was left behind.
                assert_eq!(variable, None, "{id}");
                let said = mistakes(&format!("{id} = 1"));
                assert!(said.contains("no such key"), "{said}");
            } else {
                assert_eq!(variable, Some(format!("MESH_{}", id.to_uppercase())));
                assert!(example().contains(&format!("\n#{id} = ")), "{id}");
            }
        }
    }

    /// The example with every key set to its default means the same as no file.
    #[test]
    fn the_example_is_committed_and_its_keys_can_be_set() {
        let committed = include_str!("../../../dist/meshd.toml");
        assert_eq!(committed, example(), "write it anew: meshd config example > dist/meshd.toml");
        assert_eq!(parse(&example(), "f.toml"), Ok(BTreeMap::new()));
        let command = definitions();
        let with_default: Vec<_> =
            keys(&command).filter(|arg| !arg.get_default_values().is_empty()).collect();
        let set: String = example()
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| {
                with_default.iter().any(|arg| line.starts_with(&format!("{} = ", arg.get_id())))
            })
            .map(|line| format!("{line}\n"))
            .collect();
        let entries = parse(&set, "f.toml").unwrap();
        assert_eq!(entries.len(), with_default.len());
        for arg in with_default {
            let entry = &entries[arg.get_id().as_str()];
            assert_eq!(arg.get_default_values(), [entry.value.as_str()]);
        }
    }

    #[test]
    fn values_are_judged_as_flags_are_and_all_mistakes_are_told() {
        let entries = parse("dns_ttl = 0x1e\nvxlan_via_device = true\nlog = 'debug'", "f").unwrap();
        assert_eq!(entries["dns_ttl"], Entry { value: "30".into(), place: "f:1".into() });
        assert_eq!(entries["vxlan_via_device"].value, "true");
        let text = "\ndns_tll = 5\n\ndns_ttl = 86_401\nstate_dir = \"var\"\nsocket = 7\n\
                    advertise_addr = '0.0.0.0'\n[dns]\nttl = 1\n";
        let expected = [
            "f.toml:2: `dns_tll`: no such key; did you mean `dns_ttl`?",
            "f.toml:4: `dns_ttl`: invalid value '86401': 86401 is not in 0..=86400",
            "f.toml:5: `state_dir`: invalid value 'var': not an absolute path",
            "f.toml:6: `socket`: this is integer, not a string in quotes",
            "f.toml:7: `advertise_addr`: invalid value '0.0.0.0': not the address of one machine",
            "f.toml:8: `dns`: no such key; did you mean `dns_ttl`?",
        ];
        assert_eq!(mistakes(text), expected.join("\n"));
        assert_eq!(
            mistakes("dns_ttl = \"30\""),
            "f.toml:1: `dns_ttl`: this is string, not an integer"
        );
        assert!(mistakes("log = 'a'\nlog = 'b'").starts_with("f.toml:2: "), "told twice");
        assert!(mistakes("log = 'a'\nlog").starts_with("f.toml:2: "), "no TOML");
    }

    #[test]
    fn a_missing_file_is_fine_unless_it_was_named() {
        let said = read(Some(Path::new("/nonexistent/meshd.toml"))).unwrap_err().to_string();
        assert!(said.contains("/nonexistent/meshd.toml: No such file"), "{said}");
    }
}
