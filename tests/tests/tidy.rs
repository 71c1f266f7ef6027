//! Rules of the workspace that no compiler holds: sizes, arrows between crates, words.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Columns of a line of code.
const COLUMNS_MAX: usize = 100;
/// Lines of a file; the soft limit is 600.
const LINES_MAX: usize = 1000;

/// Which crate may depend on which. Anything else is a decision, not an edit.
const ARROWS: &[(&str, &[&str])] = &[
    ("mesh-types", &[]),
    ("mesh-ebpf-abi", &["mesh-types"]),
    ("mesh-ebpf-core", &["mesh-ebpf-abi"]),
    ("mesh-dataplane", &["mesh-types"]),
    ("mesh-linux", &["mesh-types", "mesh-ebpf-abi", "mesh-ebpf-core", "mesh-dataplane"]),
    ("mesh-gossip", &["mesh-types"]),
    ("mesh-control", &["mesh-types"]),
    ("mesh-raft", &["mesh-control", "mesh-types"]),
    // In the place of a dependency of openraft's.
    ("base2histogram", &[]),
    ("mesh-executor", &["mesh-types"]),
    ("mesh-api", &["mesh-types"]),
    ("mesh-dns", &["mesh-types"]),
    (
        "meshd",
        &[
            "mesh-types",
            "mesh-linux",
            "mesh-dataplane",
            "mesh-ebpf-abi",
            "mesh-executor",
            "mesh-gossip",
            "mesh-control",
            "mesh-raft",
            "mesh-dns",
            "mesh-api",
        ],
    ),
    ("meshctl", &["mesh-api", "mesh-types", "mesh-lab"]),
    ("mesh-lab", &["mesh-types", "mesh-api", "mesh-linux"]),
    ("mesh-history", &[]),
    // It installs what the others need to compile.
    ("xtask", &[]),
];
/// Tests and benchmarks may use anything.
const FREE: &[&str] = &["mesh-tests", "mesh-bench", "mesh-fuzz"];
/// Crates that other programs simulate: no runtime, no kernel, not even indirectly by name.
const SIMULATED: &[&str] =
    &["mesh-types", "mesh-control", "mesh-dataplane", "mesh-gossip", "mesh-ebpf-core"];
const FORBIDDEN_IN_SIMULATED: &[&str] = &["tokio", "rtnetlink", "nix", "aya", "hyper"];

fn root() -> PathBuf {
    fs::canonicalize(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap()
}

/// Files that git knows or would add.
fn files(suffixes: &[&str]) -> Vec<PathBuf> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let paths: Vec<_> = String::from_utf8(listed.stdout)
        .unwrap()
        .split('\0')
        .filter(|path| suffixes.iter().any(|suffix| path.ends_with(suffix)))
        .map(|path| root().join(path))
        .filter(|path| path.is_file())
        .collect();
    assert!(!paths.is_empty(), "no files end in {suffixes:?}: is this a git tree?");
    paths
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The workspace's packages: name to its normal and build dependencies, and its directory.
fn packages() -> BTreeMap<String, (BTreeSet<String>, PathBuf)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let package = |package: &Value| {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let names = dependencies
            .filter(|dependency| dependency["kind"] != "dev")
            .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
            .collect();
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        let directory = manifest.parent().unwrap().to_owned();
        (package["name"].as_str().unwrap().to_owned(), (names, directory))
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

#[test]
fn crates_depend_only_along_the_arrows() {
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let packages = packages();
    let mut wrong = Vec::new();
    for (name, (dependencies, _)) in &packages {
        if FREE.contains(&name.as_str()) {
            continue;
        }
        let Some(allowed) = allowed.get(name.as_str()) else {
            wrong.push(format!("{name} is new: say in ARROWS what it may depend on"));
            continue;
        };
        for dependency in dependencies.iter().filter(|d| packages.contains_key(*d)) {
            if !allowed.contains(&dependency.as_str()) {
                wrong.push(format!("{name} -> {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "arrows that are not allowed:\n{}", wrong.join("\n"));
}

#[test]
fn simulated_crates_do_no_io() {
    let packages = packages();
    let mut wrong = Vec::new();
    for name in SIMULATED {
        for dependency in &packages[*name].0 {
            if FORBIDDEN_IN_SIMULATED.contains(&dependency.as_str()) {
                wrong.push(format!("{name} -> {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_crate_is_a_member() {
    let members: BTreeSet<_> = packages().into_values().map(|(_, directory)| directory).collect();
    // The BPF programs have a workspace of their own.
    let excluded = [root(), root().join("ebpf"), root().join("ebpf/prog")];
    for manifest in files(&["Cargo.toml"]) {
        let directory = manifest.parent().unwrap();
        if !excluded.iter().any(|other| other == directory) {
            assert!(members.contains(directory), "{} is not in the workspace", shown(&manifest));
        }
    }
}

#[test]
fn every_member_is_explained_and_inherits_the_lints() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    for (name, (_, directory)) in packages() {
        let path = format!("\"{}\",", shown(&directory));
        let line = manifest.lines().find(|line| line.trim_start().starts_with(&path));
        let line = line.unwrap_or_else(|| panic!("{name}: no line for {path} in Cargo.toml"));
        assert!(line.contains('#'), "{name}: say in Cargo.toml why it is a crate of its own");
        let own = fs::read_to_string(directory.join("Cargo.toml")).unwrap();
        assert!(own.contains("[lints]\nworkspace = true"), "{name} does not inherit the lints");
    }
}

/// Whether a line may be longer: a string, an address or a table's row cannot always be broken.
fn may_be_long(line: &str) -> bool {
    let table = line.trim_start().starts_with("//! |") || line.trim_start().starts_with("/// |");
    table || line.contains('"') || line.contains("://") || line.contains("r#")
}

#[test]
fn lines_and_files_are_short_enough() {
    let mut wrong = Vec::new();
    for path in files(&[".rs"]) {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        if lines > LINES_MAX {
            wrong.push(format!("{}: {lines} lines", shown(&path)));
        }
        for (number, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX && !may_be_long(line) {
                wrong.push(format!("{}:{}: {columns} columns", shown(&path), number + 1));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "over {COLUMNS_MAX} columns or {LINES_MAX} lines:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn every_todo_has_an_owner() {
    let mut wrong = Vec::new();
    // In two halves, so that this file is not caught by itself.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    for path in files(&[".rs", ".toml", ".sh"]) {
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            for mark in marks {
                let owned = line.contains(&format!("{mark}("));
                if line.split(|c: char| !c.is_alphanumeric()).any(|word| word == mark) && !owned {
                    wrong.push(format!("{}:{}: {}", shown(&path), number + 1, line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "write {}(owner):\n{}", marks[0], wrong.join("\n"));
}

#[test]
fn nothing_is_of_one_machine() {
    let words = [concat!("/wo", "rk/"), concat!("/tmp/", "setup"), concat!("/ro", "ot/.")];
    let mut wrong = Vec::new();
    for path in files(&[".rs", ".toml", ".md", ".sh", ".ci/run", ".json"]) {
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                wrong.push(format!("{}:{}: {}", shown(&path), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "paths of one machine:\n{}", wrong.join("\n"));
}

#[test]
fn every_module_says_what_it_is() {
    let mut wrong = Vec::new();
    for path in files(&[".rs"]) {
        let text = fs::read_to_string(&path).unwrap();
        if !text.trim_start().starts_with("//!") {
            wrong.push(shown(&path));
        }
    }
    assert!(wrong.is_empty(), "these begin without `//!`:\n{}", wrong.join("\n"));
}

#[test]
fn the_licence_and_the_readme_are_there() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    assert!(read("LICENSE").contains("Apache License"));
    for command in ["cargo xtask demo", "cargo xtask test"] {
        assert!(read("README.md").contains(command), "README.md lacks {command}");
    }
    assert!(read(".ci/run").contains("cargo xtask test"), ".ci/run is not the README's command");
}

/// The fields of log lines, one word per thing, so that one search finds all about it: ids
/// (`node`), numbers of nodes and voters (`number`), where another one is (`address`) and what it
/// asked for (`route`), what happened and why (`state`, `reason`), what is of this machine.
const LOG_FIELDS: &[&str] = &[
    "address", "at", "cluster", "dropped", "error", "event", "group", "healed", "kind", "left_out",
    "log", "lost", "most", "network", "node", "number", "numbers", "objects", "path", "peer",
    "place", "reason", "role", "route", "service", "socket", "state", "status", "step", "task",
    "term", "version",
];

/// The fields of each log line in a text.
fn log_fields(text: &str) -> Vec<String> {
    let mut fields = Vec::new();
    for level in ["error", "warn", "info", "debug"] {
        let macro_call = format!("tracing::{level}!(");
        for (at, _) in text.match_indices(&macro_call) {
            // Up to the message, which is the first string that stands alone.
            let arguments = &text[at + macro_call.len()..];
            let (mut depth, mut argument) = (0, String::new());
            for c in arguments.chars() {
                match c {
                    '(' | '[' | '{' => depth += 1,
                    ')' | ']' | '}' => depth -= 1,
                    _ => {}
                }
                let ends = depth < 0 || (depth == 0 && c == ',');
                if !ends {
                    argument.push(c);
                    continue;
                }
                let name = argument.trim().trim_start_matches(['%', '?']);
                if name.starts_with('"') || name.is_empty() {
                    break;
                }
                fields.push(name.split(['=', ' ']).next().unwrap_or_default().to_owned());
                if depth < 0 {
                    break;
                }
                argument.clear();
            }
        }
    }
    fields
}

#[test]
fn log_lines_have_one_word_per_thing() {
    let call = "tracing::warn!(%task, error = %f(a, \"b\"), ?number, \"said, {x}\")";
    assert_eq!(log_fields(call), ["task", "error", "number"]);
    let mut wrong = Vec::new();
    for path in files(&[".rs"]).into_iter().filter(|path| !shown(path).starts_with("tests/")) {
        let fields = log_fields(&fs::read_to_string(&path).unwrap());
        let unknown = fields.into_iter().filter(|field| !LOG_FIELDS.contains(&field.as_str()));
        wrong.extend(unknown.map(|field| format!("{}: `{field}`", shown(&path))));
    }
    assert!(wrong.is_empty(), "fields of log lines that are not listed:\n{}", wrong.join("\n"));
}
