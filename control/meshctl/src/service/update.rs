//! `meshctl service update`. The spec is changed as JSON, so that fields unknown here survive.

use anyhow::{Context, Result, bail};
use clap::Args;
use mesh_api::UpdateConfig;
use serde_json::{Map, Value, json};

use super::{
    WaitArgs,
    change::ChangeArgs,
    create::env,
    names::NameArgs,
    policy::PolicyArgs,
    progress,
    resources::{PreferenceArgs, ResourceArgs},
    set_replicas, warn,
};
use crate::{
    Usage,
    client::{Client, escape},
    output::say,
};

#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Replace its tasks even if nothing else changes
    #[arg(long)]
    force: bool,
    /// The command's arguments, as one text with a shell's quotes
    #[arg(long, allow_hyphen_values = true, value_name = "ARGS")]
    args: Option<String>,
    /// Set a variable; without a value, that of this environment (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    env_add: Vec<String>,
    /// Remove a variable (may be repeated)
    #[arg(long, value_name = "KEY")]
    env_rm: Vec<String>,
    /// The number of tasks
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    replicas: Option<u64>,
    /// Run it only on nodes where this holds, like node.labels.zone==a (may be repeated)
    #[arg(long, value_name = "CONSTRAINT")]
    constraint_add: Vec<String>,
    /// Remove a constraint (may be repeated)
    #[arg(long, value_name = "CONSTRAINT")]
    constraint_rm: Vec<String>,
    #[command(flatten)]
    change: ChangeArgs,
    #[command(flatten)]
    names: NameArgs,
    #[command(flatten)]
    preferences: PreferenceArgs,
    #[command(flatten)]
    resources: ResourceArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Go back to the spec before the last update
    #[arg(long)]
    rollback: bool,
    #[command(flatten)]
    wait: WaitArgs,
    /// Name or id
    service: String,
}

#[cfg(test)]
impl UpdateArgs {
    pub(super) fn change(&self) -> &ChangeArgs {
        &self.change
    }
}

pub(super) async fn run(client: &Client, args: UpdateArgs) -> Result<()> {
    let environment = |name: &str| std::env::var(name).ok();
    let command = args.args.as_deref().map(words).transpose()?;
    let networks = args.change.networks(client).await?;
    let change = |spec: &mut Value| {
        let before = args.rollback.then(|| spec.clone());
        edit(spec, &args, command.as_deref(), environment)?;
        args.change.apply(spec, &networks)?;
        if before.is_some_and(|before| before != *spec) {
            bail!(Usage("other flags may not be combined with --rollback".to_owned()));
        }
        Ok(())
    };
    let goal = if args.rollback { progress::Goal::Rollback } else { progress::Goal::Update };
    send(client, &args.service, goal, args.wait, change).await
}

#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    #[command(flatten)]
    wait: WaitArgs,
    /// Name or id
    service: String,
}

/// `meshctl service rollback`.
pub(super) async fn roll_back(client: &Client, args: RollbackArgs) -> Result<()> {
    send(client, &args.service, progress::Goal::Rollback, args.wait, |_| Ok(())).await
}

async fn send(
    client: &Client,
    service: &str,
    goal: progress::Goal,
    wait: WaitArgs,
    change: impl Fn(&mut Value) -> Result<()>,
) -> Result<()> {
    let query = match goal {
        progress::Goal::Update => "",
        progress::Goal::Rollback => "rollback=previous",
    };
    let path = format!("/services/{}", escape(service));
    let (id, answer) = client.modify("/services", &path, query, change).await?;
    warn(&answer["Warnings"]);
    say(service)?;
    progress::wait(client, &id, goal, wait).await
}

/// Makes of a spec what the flags say.
fn edit(
    spec: &mut Value,
    args: &UpdateArgs,
    command: Option<&[String]>,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<()> {
    if let Some(replicas) = args.replicas {
        set_replicas(spec, &args.service, replicas)?;
    }
    if args.force {
        let template = object(spec, &["TaskTemplate"])?;
        let before = template.get("ForceUpdate").and_then(Value::as_u64).unwrap_or(0);
        template.insert("ForceUpdate".into(), json!(before.wrapping_add(1)));
    }
    if let Some(command) = command {
        object(spec, &["TaskTemplate", "ContainerSpec"])?.insert("Args".into(), json!(command));
    }
    let added = env(&args.env_add, environment);
    if !added.is_empty() || !args.env_rm.is_empty() {
        fn key(entry: &str) -> &str {
            entry.split_once('=').map_or(entry, |(key, _)| key)
        }
        let list = list(object(spec, &["TaskTemplate", "ContainerSpec"])?, "Env")?;
        let set = |entry: &str| added.iter().any(|add| key(add) == key(entry));
        let removed = |entry: &str| args.env_rm.iter().any(|rm| rm == key(entry));
        list.retain(|entry| !entry.as_str().is_some_and(|entry| set(entry) || removed(entry)));
        list.extend(added.iter().map(|entry| json!(entry)));
    }
    if !args.constraint_add.is_empty() || !args.constraint_rm.is_empty() {
        let list = list(object(spec, &["TaskTemplate", "Placement"])?, "Constraints")?;
        list.retain(|have| {
            !have.as_str().is_some_and(|have| args.constraint_rm.iter().any(|rm| same(rm, have)))
        });
        for constraint in &args.constraint_add {
            if !list.iter().filter_map(Value::as_str).any(|have| same(have, constraint)) {
                list.push(json!(constraint));
            }
        }
    }
    args.names.apply(spec)?;
    args.preferences.apply(spec)?;
    args.resources.apply(spec)?;
    policy(spec, "UpdateConfig", args.policy.update())?;
    policy(spec, "RollbackConfig", args.policy.rollback())
}

/// Puts what was given into a policy. One task at a time is made plain: to other clients a policy
/// that does not say it means all at once.
fn policy(spec: &mut Value, key: &str, given: Option<UpdateConfig>) -> Result<()> {
    let Some(given) = given else { return Ok(()) };
    let fields = object(spec, &[key])?;
    fields.entry("Parallelism").or_insert(json!(1));
    if let Value::Object(given) = serde_json::to_value(given).context("cannot write a policy")? {
        fields.extend(given);
    }
    Ok(())
}

/// Whether two constraints differ in blanks alone.
fn same(a: &str, b: &str) -> bool {
    let parts = |text: &str| {
        let at = [text.find("=="), text.find("!=")].into_iter().flatten().min();
        let (key, rest) = text.split_at(at.unwrap_or(text.len()));
        let (operator, value) = rest.split_at(rest.len().min(2));
        (key.trim().to_owned(), operator.to_owned(), value.trim().to_owned())
    };
    parts(a) == parts(b)
}

/// The object at a path, made where there is none.
pub(super) fn object<'a>(spec: &'a mut Value, path: &[&str]) -> Result<&'a mut Map<String, Value>> {
    let mut at = spec;
    for key in path {
        let Value::Object(fields) = at else { bail!("the service's spec has no object at {key}") };
        at = fields.entry(*key).or_insert(Value::Null);
        if at.is_null() {
            *at = json!({});
        }
    }
    at.as_object_mut().with_context(|| format!("the service's spec has no object at {path:?}"))
}

/// The list at a key, made if there is none.
pub(super) fn list<'a>(
    fields: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Vec<Value>> {
    let at = fields.entry(key).or_insert(Value::Null);
    if at.is_null() {
        *at = json!([]);
    }
    at.as_array_mut().with_context(|| format!("the service's spec has no list at {key}"))
}

/// Splits a text as a shell does: at blanks, except in quotes and after a backslash.
pub(super) fn words(text: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (letter, quote) {
            (end, Some(open)) if end == open => quote = None,
            ('"' | '\'', None) => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            ('\\', None | Some('"')) => {
                let Some(next) = letters.next() else { bail!(unfinished(text, "backslash")) };
                word.get_or_insert_default().push(next);
            }
            (blank, None) if blank.is_whitespace() => words.extend(word.take()),
            (other, _) => word.get_or_insert_default().push(other),
        }
    }
    if quote.is_some() {
        bail!(unfinished(text, "quote"));
    }
    words.extend(word);
    Ok(words)
}

fn unfinished(text: &str, what: &str) -> Usage {
    Usage(format!("invalid command `{text}`: a {what} without its other half"))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn edited(flags: &str, mut spec: Value) -> Result<Value> {
        let raw = format!("meshctl service update {flags} web");
        let cli = crate::Cli::try_parse_from(words(&raw)?)?;
        let crate::Command::Service(crate::service::Command::Update(args)) = cli.command else {
            panic!("not an update: {flags}")
        };
        let command = args.args.as_deref().map(words).transpose()?;
        edit(&mut spec, &args, command.as_deref(), |name| {
            (name == "HOME").then(|| "/root".to_owned())
        })?;
        Ok(spec)
    }

    /// As another client may have sent it, with what meshctl does not know.
    fn spec() -> Value {
        json!({
            "Name": "web", "Unknown": {"a": [1]},
            "TaskTemplate": {
                "ContainerSpec": {"Args": ["a"], "Env": ["A=1", "B=2", "AB"], "Unknown": true},
                "Placement": {"Constraints": ["node.role==worker"], "Platforms": [{"OS": "linux"}]},
                "ForceUpdate": 6,
            },
            "Mode": {"Replicated": {"Replicas": 2}},
            "UpdateConfig": {"Parallelism": 2, "Unknown": 1, "Order": "stop-first"},
        })
    }

    #[test]
    fn without_flags_nothing_changes() {
        assert_eq!(edited("", spec()).unwrap(), spec());
    }

    #[test]
    fn each_flag_changes_its_field_alone() {
        let cases = [
            ("--force", "/TaskTemplate/ForceUpdate", json!(7)),
            ("--replicas 5", "/Mode/Replicated/Replicas", json!(5)),
            (
                "--args 'sh -c \"sleep  1\"'",
                "/TaskTemplate/ContainerSpec/Args",
                json!(["sh", "-c", "sleep  1"]),
            ),
            (
                "--env-add A=3 --env-add C=4 --env-add HOME --env-add NOSUCH --env-rm B",
                "/TaskTemplate/ContainerSpec/Env",
                json!(["AB", "A=3", "C=4", "HOME=/root"]),
            ),
            (
                "--constraint-add node.labels.zone==a --constraint-add node.role==worker",
                "/TaskTemplate/Placement/Constraints",
                json!(["node.role==worker", "node.labels.zone==a"]),
            ),
            (
                "--constraint-rm 'node.role == worker'",
                "/TaskTemplate/Placement/Constraints",
                json!([]),
            ),
            (
                "--update-delay 2s --update-order start-first --update-monitor 1s \
                 --update-failure-action rollback --update-max-failure-ratio 0.5",
                "/UpdateConfig",
                json!({
                    "Parallelism": 2, "Unknown": 1, "Order": "start-first",
                    "Delay": 2_000_000_000, "Monitor": 1_000_000_000,
                    "FailureAction": "rollback", "MaxFailureRatio": 0.5,
                }),
            ),
            ("--update-parallelism 0", "/UpdateConfig/Parallelism", json!(0)),
        ];
        for (flags, path, value) in cases {
            let mut expected = spec();
            *expected.pointer_mut(path).unwrap() = value;
            assert_eq!(edited(flags, spec()).unwrap(), expected, "{flags}");
        }
    }

    #[test]
    fn names_are_found_as_the_flags_say() {
        let dns = |flags: &str, dns: Value| {
            let before = json!({"TaskTemplate": {"ContainerSpec": {"DNSConfig": dns}}});
            edited(flags, before).unwrap()["TaskTemplate"]["ContainerSpec"]["DNSConfig"].take()
        };
        assert_eq!(
            dns("--dns-add 10.0.0.9 --dns-add 10.0.0.9 --dns-rm 10.0.0.8", json!(null)),
            json!({"Nameservers": ["10.0.0.9"]})
        );
        assert_eq!(
            dns(
                "--dns-search-add b.test --dns-search-rm a.test --dns-option-add ndots:2 \
                 --dns-option-rm rotate",
                json!({"Nameservers": ["10.0.0.8"], "Search": ["a.test"], "Options": ["rotate"]})
            ),
            json!({"Nameservers": ["10.0.0.8"], "Search": ["b.test"], "Options": ["ndots:2"]})
        );
    }

    #[test]
    fn what_is_missing_is_made() {
        let bare = json!({"TaskTemplate": {"Placement": null, "ContainerSpec": {"Env": null}}});
        let made =
            edited("--constraint-add node.id==x --env-add A=1 --rollback-delay 1s --force", bare);
        let expected = json!({
            "TaskTemplate": {
                "Placement": {"Constraints": ["node.id==x"]},
                "ContainerSpec": {"Env": ["A=1"]}, "ForceUpdate": 1,
            },
            "RollbackConfig": {"Parallelism": 1, "Delay": 1_000_000_000},
        });
        assert_eq!(made.unwrap(), expected);
    }

    #[test]
    fn nonsense_is_refused() {
        let global = json!({"Mode": {"Global": {}}});
        assert!(edited("--replicas 2", global).unwrap_err().to_string().contains("not replicated"));
        for flags in ["--args '\"'", "--args 'a\\'"] {
            assert!(edited(flags, spec()).unwrap_err().is::<Usage>(), "{flags}");
        }
        for flags in ["--update-max-failure-ratio nan", "--update-order x", "--update-delay 5"] {
            assert!(edited(flags, spec()).is_err(), "{flags}");
        }
        assert!(edited("--force", json!({"TaskTemplate": 1})).is_err());
    }

    #[test]
    fn texts_split_as_in_a_shell() {
        let cases: [(&str, &[&str]); 5] = [
            ("", &[]),
            ("  a  b ", &["a", "b"]),
            ("a '' \"b c\"d", &["a", "", "b cd"]),
            (r#"a\ b "\"" '\'"#, &["a b", "\"", "\\"]),
            ("x=\"y z\"", &["x=y z"]),
        ];
        for (text, expected) in cases {
            assert_eq!(words(text).unwrap(), expected, "{text}");
        }
    }
}
