//! Flags and verbs that Docker has and mesh does not have yet: refused as that, not as a typing
//! error.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Every verb and flag of the stock CLI and what becomes of it here.
const TABLE: &str = include_str!("../../../tests/surface.txt");

/// What becomes of a verb or a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Does what it does there.
    Works,
    /// Comes later.
    Due,
    /// Never comes.
    Refused,
}

impl Fate {
    fn parse(word: &str) -> Option<Self> {
        match word {
            "works" => Some(Self::Works),
            "due" => Some(Self::Due),
            "refused" => Some(Self::Refused),
            _ => None,
        }
    }

    /// Nothing for what works.
    fn say(self, what: &str, reason: &str) -> Option<String> {
        match self {
            Self::Works => None,
            Self::Due => Some(format!("{what} is not implemented yet by mesh: {reason}")),
            Self::Refused => Some(format!("{what} is refused by mesh: {reason}")),
        }
    }
}

/// A verb of the stock CLI.
#[derive(Debug)]
struct Verb<'a> {
    name: &'a str,
    fate: Fate,
    reason: &'a str,
    flags: Vec<Flag<'a>>,
}

#[derive(Debug)]
struct Flag<'a> {
    fate: Fate,
    /// `--name`, and `-n` if there is one.
    names: Vec<&'a str>,
    /// It takes a value.
    #[cfg_attr(not(test), expect(dead_code, reason = "meshctl's own flags are held against it"))]
    valued: bool,
    reason: &'a str,
}

/// The table's verbs; what is no line of it is `None`, and a test's business.
fn verbs(table: &str) -> Option<Vec<Verb<'_>>> {
    let mut verbs: Vec<Verb<'_>> = Vec::new();
    for line in table.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let Some(flag) = line.strip_prefix("  ") else {
            let (name, rest) = line.split_once(": ")?;
            let (fate, reason) = rest.split_once(' ').unwrap_or((rest, ""));
            let (fate, reason) = (Fate::parse(fate)?, reason.trim());
            verbs.push(Verb { name, fate, reason, flags: Vec::new() });
            continue;
        };
        let (fate, rest) = flag.split_once(' ')?;
        let mut words = rest.split_whitespace().peekable();
        let mut names = Vec::new();
        while let Some(name) = words.next_if(|word| word.starts_with('-')) {
            names.push(name);
        }
        let last = names.last_mut()?;
        let valued = last.ends_with('=');
        *last = last.trim_end_matches('=');
        let reason = match words.next() {
            Some(word) => rest[rest.find(&format!(" {word}"))?..].trim(),
            None => verbs.last()?.reason,
        };
        let flag = Flag { fate: Fate::parse(fate)?, names, valued, reason };
        verbs.last_mut()?.flags.push(flag);
    }
    Some(verbs)
}

/// What to say in place of clap's own words.
pub(crate) fn explain(err: &clap::Error, raw: &[String]) -> Option<String> {
    let context = |kind| match err.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match err.kind() {
        ErrorKind::UnknownArgument => {
            let word = context(ContextKind::InvalidArg)?;
            let word = word.split(['=', ' ']).next()?;
            let verbs = verbs(TABLE)?;
            let verb = verbs.iter().find(|verb| has_verb(raw, verb.name))?;
            let flag = verb.flags.iter().find(|flag| flag.names.contains(&word))?;
            flag.fate.say(&format!("{word} of `docker {}`", verb.name), flag.reason)
        }
        ErrorKind::InvalidSubcommand => {
            let word = context(ContextKind::InvalidSubcommand)?;
            let verbs = verbs(TABLE)?;
            let named = verbs.iter().filter(|verb| verb.name.split(' ').any(|part| part == word));
            // `docker secret` alone stands for all of its verbs.
            let whole = named.clone().find(|verb| has_verb(raw, verb.name));
            let first = named.into_iter().find(|verb| verb.name.starts_with(&format!("{word} ")));
            let Some(verb) = whole.or(first.filter(|_| raw.iter().any(|said| said == word))) else {
                return elsewhere(word, raw);
            };
            verb.fate.say(&format!("`docker {}`", verb.name), verb.reason)
        }
        _ => None,
    }
}

/// Verbs of the stock CLI for single containers, and what is done here instead.
const ELSEWHERE: &[(&str, &str)] = &[
    ("exec", "`meshctl task exec TASK -- CMD`"),
    ("inspect", "`meshctl service inspect`, or `node` or `network inspect`"),
    ("kill", "`meshctl service rm` or `scale`"),
    ("logs", "`meshctl service logs SERVICE|TASK`"),
    ("ps", "`meshctl service ps SERVICE`, or `meshctl node ps NODE`"),
    ("rm", "`meshctl service rm`"),
    ("run", "`meshctl service create --runtime process -- CMD`"),
    ("stats", "`meshctl node stats`, or `meshctl status`"),
    ("stop", "`meshctl service scale SERVICE=0`"),
    ("top", "`meshctl node ps`"),
    ("update", "`meshctl service update`"),
];

/// A container's verb, given to meshctl itself.
fn elsewhere(word: &str, raw: &[String]) -> Option<String> {
    let (_, instead) = ELSEWHERE.iter().find(|(verb, _)| *verb == word)?;
    (raw.get(1)? == word).then(|| {
        format!("`docker {word}` is about single containers; meshctl runs services: use {instead}")
    })
}

/// `; did you mean `NAME`?` where one of the names is near enough; nothing otherwise. What precedes
/// the name is `mark`.
pub(crate) fn did_you_mean<'a>(
    word: &str,
    names: impl Iterator<Item = &'a str>,
    mark: &str,
) -> String {
    let near = |name: &'a str| {
        let likeness = strsim::jaro_winkler(&word.to_lowercase(), &name.to_lowercase());
        (likeness > NEAR).then_some((likeness, name))
    };
    let nearest = names.filter_map(near).max_by(|(a, _), (b, _)| a.total_cmp(b));
    nearest.map_or_else(String::new, |(_, name)| format!("; did you mean `{mark}{name}`?"))
}

/// Names this like are taken for one another; 1 is the same.
const NEAR: f64 = 0.8;

/// Whether the words of a verb come one after the other on the command line.
fn has_verb(raw: &[String], verb: &str) -> bool {
    let words: Vec<&str> = verb.split(' ').collect();
    raw.windows(words.len()).any(|window| window.iter().zip(&words).all(|(a, b)| a == b))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn said(line: &str) -> Option<String> {
        let raw: Vec<String> = line.split(' ').map(str::to_owned).collect();
        explain(&crate::Cli::try_parse_from(&raw).unwrap_err(), &raw)
    }

    /// The clap command of a verb.
    fn command(verb: &str) -> Option<clap::Command> {
        use clap::CommandFactory as _;
        let mut command = crate::Cli::command();
        for word in verb.split(' ') {
            command = command.find_subcommand(word)?.clone();
        }
        Some(command)
    }

    #[test]
    fn what_works_can_be_given() {
        let verbs = verbs(TABLE).expect("every line of the table is understood");
        assert!(verbs.len() > 50, "{}", verbs.len());
        for verb in verbs.iter().filter(|verb| verb.fate == Fate::Works) {
            let command = command(verb.name).unwrap_or_else(|| panic!("no verb {}", verb.name));
            for flag in verb.flags.iter().filter(|flag| flag.fate == Fate::Works) {
                let what = format!("{} {:?}", verb.name, flag.names);
                let arg = command.get_arguments().find(|arg| {
                    arg.get_long().is_some_and(|long| flag.names.contains(&&*format!("--{long}")))
                });
                let arg = arg.unwrap_or_else(|| panic!("{what} is not there"));
                if let [short, _] = flag.names[..] {
                    let own = arg.get_short().map(|short| format!("-{short}"));
                    assert_eq!(own.as_deref(), Some(short), "{what}");
                }
                assert_eq!(arg.get_action().takes_values(), flag.valued, "{what} takes a value");
            }
        }
    }

    #[test]
    fn what_does_not_is_refused_by_name_with_a_reason() {
        for verb in verbs(TABLE).unwrap() {
            if verb.fate != Fate::Works {
                let text = said(&format!("meshctl {} x", verb.name));
                let text = text.unwrap_or_else(|| panic!("{} is not explained", verb.name));
                assert!(text.contains(verb.name) && text.contains(verb.reason), "{text}");
                assert!(text.contains(" by mesh: ") && !verb.reason.is_empty(), "{text}");
                continue;
            }
            for flag in verb.flags.iter().filter(|flag| flag.fate != Fate::Works) {
                assert!(!flag.reason.is_empty(), "{} {:?} has no reason", verb.name, flag.names);
                for name in &flag.names {
                    let text = said(&format!("meshctl {} {name} x", verb.name));
                    let text = text.unwrap_or_else(|| panic!("{} {name}: silent", verb.name));
                    assert!(text.contains(name) && text.contains(flag.reason), "{text}");
                }
            }
        }
    }

    #[test]
    fn other_mistakes_are_claps() {
        assert_eq!(said("meshctl service crate"), None);
        assert_eq!(said("meshctl service create --nosuch"), None);
        assert_eq!(said("meshctl secrets ls"), None);
        assert!(said("meshctl ps").unwrap().contains("meshctl service ps"));
        assert_eq!(said("meshctl network ps"), None);
        let said = said("meshctl secret create x").unwrap();
        assert!(said.starts_with("`docker secret create` is not implemented yet"), "{said}");
    }

    #[test]
    fn lines_that_are_no_table_are_found() {
        for bad in ["x", "x: maybe", "  works --x", "x: works\n  perhaps --x", "x: due\n  due y"] {
            assert!(verbs(bad).is_none(), "{bad}");
        }
        let verbs =
            verbs("# c\na b: due  why not\n  works    -x --yes=   because of it\n").unwrap();
        assert_eq!((verbs[0].name, verbs[0].reason), ("a b", "why not"));
        let flag = &verbs[0].flags[0];
        assert_eq!((&flag.names[..], flag.valued), (&["-x", "--yes"][..], true));
        assert_eq!((flag.fate, flag.reason), (Fate::Works, "because of it"));
    }

    #[test]
    fn near_names_are_suggested() {
        let names = || ["name", "label", "node"].into_iter();
        assert_eq!(did_you_mean("nmae", names(), "--"), "; did you mean `--name`?");
        assert_eq!(did_you_mean("xyz", names(), ""), "");
    }
}
