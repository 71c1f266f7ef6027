//! Holds the table of the stock CLI's verbs and flags, `tests/surface.txt`, against what `docker`
//! itself says it has. That meshctl does what the table says is meshctl's own test.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

/// Flags of a later `docker` than that which is installed for the tests.
const LATER: &[&str] = &["--memory-swap=", "--memory-swappiness="];

/// The table: verb to its flags, `-s --name=` each.
fn table() -> BTreeMap<String, BTreeSet<String>> {
    let text = include_str!("../surface.txt");
    let mut verbs: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut last = String::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(flag) = line.strip_prefix("  ") {
            let names: Vec<_> =
                flag.split_whitespace().skip(1).take_while(|word| word.starts_with('-')).collect();
            verbs.get_mut(&last).unwrap().insert(names.join(" "));
        } else {
            last = line.split(": ").next().unwrap().to_owned();
            verbs.insert(last.clone(), BTreeSet::new());
        }
    }
    verbs
}

/// The lines of `docker … --help` under a heading.
fn help(words: &[&str], heading: &str) -> Option<Vec<String>> {
    // Without a daemon nothing is hidden.
    let output = Command::new("docker")
        .args(words)
        .arg("--help")
        .env("DOCKER_HOST", "unix:///nonexistent")
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let section = text.split("\n\n").find(|part| part.trim_start().starts_with(heading));
    let lines = section.unwrap_or_default().trim_start().lines().skip(1);
    Some(lines.map(str::to_owned).collect())
}

/// `-f, --filter filter   Filter output` as `-f --filter=`; nothing for a text's second line.
fn flag(line: &str) -> Option<String> {
    let signature = line.trim_start();
    // `-s, --name` or `    --name`.
    if line.len() - signature.len() > 6 || !signature.starts_with('-') {
        return None;
    }
    let signature = signature.split("  ").next()?;
    let mut words = signature.split_whitespace().map(|word| word.trim_end_matches(','));
    let mut names = Vec::new();
    let mut value = "";
    for word in &mut words {
        if word.starts_with('-') {
            names.push(word);
        } else {
            value = "=";
        }
    }
    Some(format!("{}{value}", names.join(" ")))
}

#[test]
fn help_is_read_as_it_is_meant() {
    assert_eq!(flag("  -f, --filter filter   Filter").unwrap(), "-f --filter=");
    assert_eq!(flag("      --no-trunc        Do not").unwrap(), "--no-trunc");
    assert_eq!(flag("                        of output"), None);
    assert_eq!(flag("                        --replicas)"), None);
}

#[test]
fn the_table_has_every_verb_and_flag_of_docker() {
    if Command::new("docker").arg("--version").output().is_err() {
        eprintln!("docker is not installed: the table is not held against it");
        return;
    }
    let table = table();
    let mut wrong = Vec::new();
    let groups: BTreeSet<&str> =
        table.keys().filter_map(|verb| Some(verb.split_once(' ')?.0)).collect();
    for group in groups {
        for line in help(&[group], "Commands:").unwrap() {
            let verb = line.split_whitespace().next().unwrap_or_default().trim_end_matches('*');
            if !table.contains_key(&format!("{group} {verb}")) {
                wrong.push(format!("{group} {verb} is missing"));
            }
        }
    }
    for (verb, flags) in &table {
        let words: Vec<&str> = verb.split(' ').collect();
        let theirs: BTreeSet<String> =
            help(&words, "Options:").unwrap().iter().filter_map(|line| flag(line)).collect();
        for missing in theirs.difference(flags) {
            wrong.push(format!("{verb} {missing} is missing"));
        }
        for more in flags.difference(&theirs).filter(|flag| !LATER.contains(&flag.as_str())) {
            wrong.push(format!("{verb} {more} is not in docker"));
        }
    }
    assert!(wrong.is_empty(), "tests/surface.txt against `docker --help`:\n{}", wrong.join("\n"));
}
