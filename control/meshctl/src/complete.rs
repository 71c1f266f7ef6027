//! `meshctl completion` and `meshctl man`: what shells and manual readers want of the command tree.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use clap_complete::{
    CompleteEnv,
    engine::{ArgValueCandidates, CompletionCandidate},
    env::Shells,
};
use serde_json::Value;

use crate::{Usage, client::Client, output::say};

/// Set by the shell's script when it asks for candidates.
const VARIABLE: &str = "MESHCTL_COMPLETE";
const BIN: &str = "meshctl";
/// A shell does not wait longer for names.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    /// source <(meshctl completion bash)
    Bash,
    /// source <(meshctl completion zsh)
    Zsh,
    /// meshctl completion fish | source
    Fish,
}

impl Shell {
    fn name(self) -> &'static str {
        match self {
            Self::Bash => "bash",
            Self::Zsh => "zsh",
            Self::Fish => "fish",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write the pages of all verbs there, `meshctl-service-create.1` and so on
    #[arg(long, value_name = "DIR", conflicts_with = "verb")]
    dir: Option<PathBuf>,
    /// Whose page; that of meshctl if not given
    verb: Vec<String>,
}

/// Answers a shell that asks for candidates, and ends; goes on for people.
pub(crate) fn answer_shell(command: impl Fn() -> clap::Command) {
    CompleteEnv::with_factory(|| with_names(command())).var(VARIABLE).bin(BIN).complete();
}

/// `meshctl completion`: the script that makes a shell ask.
pub(crate) fn script(shell: Shell) -> Result<()> {
    let shells = Shells::builtins();
    let name = shell.name();
    let completer = shells.completer(name).with_context(|| format!("no completion for {name}"))?;
    let mut text = Vec::new();
    completer.write_registration(VARIABLE, BIN, BIN, BIN, &mut text)?;
    say(String::from_utf8(text).context("the script is no text")?)
}

/// `meshctl man`.
pub(crate) fn man(args: &ManArgs, command: clap::Command) -> Result<()> {
    if let Some(dir) = &args.dir {
        return clap_mangen::generate_to(command, dir)
            .with_context(|| format!("cannot write the pages to {}", dir.display()));
    }
    let mut command = command;
    command.build();
    let mut of = &command;
    for word in &args.verb {
        let Some(found) = of.find_subcommand(word) else {
            bail!(Usage(format!("there is no verb `{}`, thus no page", args.verb.join(" "))))
        };
        of = found;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(of.clone()).render(&mut page).context("cannot make the page")?;
    say(String::from_utf8(page).context("the page is no text")?)
}

/// Where an argument takes names of objects: their list, and the name in each.
fn names_of(argument: &str) -> Option<(&'static str, &'static str)> {
    match argument {
        "service" | "services" => Some(("/services", "/Spec/Name")),
        "node" | "nodes" => Some(("/nodes", "/Description/Hostname")),
        "network" | "networks" => Some(("/networks", "/Name")),
        _ => None,
    }
}

/// With the names of what is there, asked for when a shell wants them.
fn with_names(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| match names_of(arg.get_id().as_str()) {
        Some((path, name)) => arg.add(ArgValueCandidates::new(move || candidates(path, name))),
        None => arg,
    });
    command.mut_subcommands(with_names)
}

/// The names of objects; none where no daemon answers.
fn candidates(path: &str, name: &str) -> Vec<CompletionCandidate> {
    let ask = async {
        let client = Client::new(None).ok()?;
        client.get::<Vec<Value>>(path).await.ok()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let found = runtime.ok().and_then(|runtime| {
        runtime.block_on(async { tokio::time::timeout(PATIENCE, ask).await.ok().flatten() })
    });
    let named = found.into_iter().flatten().filter_map(|object| {
        object.pointer(name).and_then(Value::as_str).map(CompletionCandidate::new)
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn completed(words: &[&str]) -> Vec<String> {
        let mut command = with_names(crate::Cli::command());
        let args: Vec<std::ffi::OsString> = words.iter().map(Into::into).collect();
        let at = args.len() - 1;
        let found = clap_complete::engine::complete(&mut command, args, at, None).unwrap();
        found.iter().map(|one| one.get_value().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn verbs_flags_and_values_complete() {
        assert!(completed(&["meshctl", "serv"]).contains(&"service".to_owned()));
        let verbs = completed(&["meshctl", "service", ""]);
        assert!(verbs.contains(&"create".to_owned()) && verbs.contains(&"rollback".to_owned()));
        assert_eq!(completed(&["meshctl", "service", "ls", "--for"]), ["--format"]);
        let values = completed(&["meshctl", "node", "update", "--availability", ""]);
        assert_eq!(values, ["active", "pause", "drain"]);
    }

    #[test]
    fn every_verb_has_a_page() {
        let dir = std::env::temp_dir().join(format!("meshctl-man-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let args = ManArgs { dir: Some(dir.clone()), verb: Vec::new() };
        man(&args, crate::Cli::command()).unwrap();
        let page = std::fs::read_to_string(dir.join("meshctl-service-create.1")).unwrap();
        assert!(page.contains("replicas"), "{page}");
        std::fs::remove_dir_all(&dir).unwrap();
        let none = ManArgs { dir: None, verb: vec!["bogus".into()] };
        assert!(man(&none, crate::Cli::command()).unwrap_err().is::<Usage>());
    }
}
