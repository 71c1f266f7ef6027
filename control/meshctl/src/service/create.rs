//! `meshctl service create`.

use std::{net::IpAddr, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use mesh_api::{
    ContainerSpec, DnsConfig, EndpointSpec, GlobalMode, NetworkTarget, Placement,
    PlacementPreference, Port, ReplicatedMode, ServiceCreated, ServiceMode, ServiceSpec,
    TaskTemplate, UpdateConfig,
};

use super::{
    WaitArgs, labels,
    policy::PolicyArgs,
    progress, publish,
    resources::{ResourceArgs, preference},
    restart::RestartArgs,
    update::words,
};
use crate::{Usage, client::Client, output::say};

/// The container label that chooses the executor.
const RUNTIME_LABEL: &str = "mesh.runtime";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// A number of tasks, anywhere
    Replicated,
    /// One task on each node
    Global,
    #[value(hide = true)]
    ReplicatedJob,
    #[value(hide = true)]
    GlobalJob,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Runtime {
    /// A host binary in the task's own namespaces
    Process,
    #[value(hide = true)]
    Oci,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum EndpointMode {
    /// One virtual address per network
    Vip,
    /// The addresses of the tasks
    Dnsrr,
}

impl EndpointMode {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Vip => "vip",
            Self::Dnsrr => "dnsrr",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name, a DNS label
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// How many tasks
    #[arg(long, value_enum, default_value = "replicated")]
    mode: Mode,
    /// The number of tasks; 1 if not given
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    replicas: Option<u64>,
    /// Join a network: NAME or name=NAME,alias=ALIAS (may be repeated)
    #[arg(long, value_parser = publish::network, value_name = "NETWORK")]
    network: Vec<NetworkTarget>,
    /// Publish a port on every node: PUBLISHED:TARGET[/PROTOCOL], or
    /// published=…,target=…,protocol=tcp|udp (may be repeated)
    #[arg(short, long, value_parser = publish::parse, value_name = "PORT")]
    publish: Vec<Vec<Port>>,
    /// Set a variable; without a value, that of this environment (may be repeated)
    #[arg(short, long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Set variables from a file of KEY=VALUE lines; --env comes after it (may be repeated)
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// A label of the service (may be repeated)
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// A label of its containers (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    container_label: Vec<String>,
    /// What the command's words are given to, as one text with a shell's quotes
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Accepted for the stock CLI's sake: processes have no health checks
    #[arg(long, hide = true)]
    no_healthcheck: bool,
    /// Host name of its tasks
    #[arg(long, default_value = "", hide_default_value = true)]
    hostname: String,
    /// Working directory
    #[arg(short, long, default_value = "", hide_default_value = true, value_name = "DIR")]
    workdir: String,
    #[command(flatten)]
    restart: RestartArgs,
    /// How its name resolves
    #[arg(long, value_enum, default_value = "vip")]
    endpoint_mode: EndpointMode,
    /// A server for names outside the cluster, instead of the node's (may be repeated)
    #[arg(long, value_name = "IP")]
    dns: Vec<IpAddr>,
    /// A domain in which names are looked for that are not found as they are (may be repeated)
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// An option of resolv.conf, like ndots:2 (may be repeated)
    #[arg(long, value_name = "OPTION")]
    dns_option: Vec<String>,
    /// Run it only on nodes where this holds, like node.labels.zone==a (may be repeated)
    #[arg(long, value_name = "CONSTRAINT")]
    constraint: Vec<String>,
    /// Spread its tasks over the values of a label of nodes, like spread=node.labels.zone (may be
    /// repeated)
    #[arg(long, value_parser = preference, value_name = "PREFERENCE")]
    placement_pref: Vec<PlacementPreference>,
    #[command(flatten)]
    resources: ResourceArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    /// What runs its tasks; sets the container label mesh.runtime
    #[arg(long, value_enum)]
    runtime: Option<Runtime>,
    #[command(flatten)]
    wait: WaitArgs,
    /// The image, a mere label for processes; none if `--` comes here
    #[arg(value_name = "IMAGE")]
    first: Option<String>,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    rest: Vec<String>,
}

pub(super) async fn run(client: &Client, mut args: CreateArgs, raw: &[String]) -> Result<()> {
    let mut env = Vec::new();
    for path in &args.env_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read --env-file {}", path.display()))?;
        env.extend(env_lines(&text));
    }
    env.append(&mut args.env);
    args.env = env;
    let wait = args.wait;
    let spec = spec(args, raw, |name| std::env::var(name).ok())?;
    let created: ServiceCreated = client.post("/services/create", Some(&spec)).await?;
    for warning in created.warnings.iter().flatten() {
        eprintln!("warning: {warning}");
    }
    say(&created.id)?;
    progress::wait(client, &created.id, progress::Goal::Update, wait).await
}

fn spec(
    args: CreateArgs,
    raw: &[String],
    environment: impl Fn(&str) -> Option<String>,
) -> Result<ServiceSpec> {
    let entrypoint = args.entrypoint.as_deref().map(words).transpose()?;
    let words: Vec<String> = args.first.iter().chain(&args.rest).cloned().collect();
    let (image, command) = image_and_command(&words, raw);
    let mut container_labels = labels(&args.container_label);
    match args.runtime {
        Some(Runtime::Process) => {
            container_labels.insert(RUNTIME_LABEL.into(), "process".into());
        }
        Some(Runtime::Oci) => bail!(Usage(
            "--runtime oci is not implemented yet by mesh: use --runtime process".to_owned()
        )),
        None => {}
    }
    let process = container_labels.get(RUNTIME_LABEL).is_some_and(|runtime| runtime == "process");
    let image = match image {
        Some(image) => image,
        None if process => "process".to_owned(),
        None => bail!(Usage(
            "no image and no runtime given: use `--runtime process -- CMD…`".to_owned()
        )),
    };
    let max_replicas = args.resources.replicas_max_per_node.unwrap_or(0);
    if max_replicas > 0 && args.mode != Mode::Replicated {
        let what = "--replicas-max-per-node goes with --mode replicated alone";
        bail!(Usage(what.to_owned()));
    }
    let placement =
        Placement { constraints: args.constraint, preferences: args.placement_pref, max_replicas };
    Ok(ServiceSpec {
        name: if args.name.is_empty() { random_name() } else { args.name },
        labels: labels(&args.label),
        mode: mode(args.mode, args.replicas)?,
        task_template: TaskTemplate {
            container_spec: Some(ContainerSpec {
                image,
                labels: container_labels,
                command: entrypoint.unwrap_or_default(),
                args: command,
                hostname: args.hostname,
                env: env(&args.env, environment),
                dir: args.workdir,
                stop_grace_period: args.restart.stop_grace_period,
                stop_signal: args.restart.stop_signal.clone().unwrap_or_default(),
                dns_config: dns_config(&args.dns, args.dns_search, args.dns_option),
            }),
            resources: args.resources.requirements()?,
            restart_policy: args.restart.policy(),
            placement: (placement != Placement::default()).then_some(placement),
            networks: args.network,
            force_update: 0,
            runtime: "container".into(),
        },
        update_config: whole(args.policy.update()),
        rollback_config: whole(args.policy.rollback()),
        networks: Vec::new(),
        endpoint_spec: Some(EndpointSpec {
            mode: args.endpoint_mode.word().into(),
            ports: args.publish.into_iter().flatten().collect(),
        }),
    })
}

fn dns_config(servers: &[IpAddr], search: Vec<String>, options: Vec<String>) -> Option<DnsConfig> {
    let nameservers = servers.iter().map(ToString::to_string).collect();
    let config = DnsConfig { nameservers, search, options };
    (config != DnsConfig::default()).then_some(config)
}

/// One task at a time is made plain: to other clients a policy that does not say it means all.
fn whole(given: Option<UpdateConfig>) -> Option<UpdateConfig> {
    given.map(|config| UpdateConfig { parallelism: config.parallelism.or(Some(1)), ..config })
}

/// What follows `--` is the command alone; without `--` the first word is the image. clap drops the
/// `--`, so the command line itself tells which it was.
fn image_and_command(words: &[String], raw: &[String]) -> (Option<String>, Vec<String>) {
    let escaped = raw.iter().position(|word| word == "--").map(|at| &raw[at + 1..]);
    if escaped.is_some_and(|command| command == words) {
        return (None, words.to_vec());
    }
    match words.split_first() {
        None => (None, Vec::new()),
        Some((image, command)) => {
            let command = command.strip_prefix(&["--".to_owned()]).unwrap_or(command);
            (Some(image.clone()), command.to_vec())
        }
    }
}

fn mode(mode: Mode, replicas: Option<u64>) -> Result<ServiceMode> {
    match (mode, replicas) {
        (Mode::Replicated, replicas) => Ok(ServiceMode {
            replicated: Some(ReplicatedMode { replicas: Some(replicas.unwrap_or(1)) }),
            global: None,
        }),
        (Mode::Global, None) => Ok(ServiceMode { replicated: None, global: Some(GlobalMode {}) }),
        (Mode::Global, Some(_)) => {
            bail!(Usage("--replicas goes with --mode replicated alone".to_owned()))
        }
        (Mode::ReplicatedJob | Mode::GlobalJob, _) => bail!(Usage(
            "jobs (--mode replicated-job, global-job) are not implemented yet by mesh".to_owned()
        )),
    }
}

/// The variables of an `--env-file`: a line each, but for blank ones and comments.
fn env_lines(text: &str) -> impl Iterator<Item = String> {
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim_start);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned)
}

/// `KEY` alone takes its value from here, and is left out where there is none, as Docker does.
pub(super) fn env(flags: &[String], environment: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let entry = |flag: &String| {
        if flag.contains('=') {
            Some(flag.clone())
        } else {
            environment(flag).map(|value| format!("{flag}={value}"))
        }
    };
    flags.iter().filter_map(entry).collect()
}

/// A name for a service whose user gave none.
fn random_name() -> String {
    const LEFT: [&str; 8] = ["brave", "calm", "eager", "fond", "keen", "proud", "quiet", "witty"];
    const RIGHT: [&str; 8] =
        ["baker", "clerk", "diver", "miner", "piper", "rider", "smith", "weaver"];
    let bits: u32 = rand::random();
    let (left, right) = (bits as usize % 8, bits as usize / 8 % 8);
    format!("{}_{}_{:04x}", LEFT[left], RIGHT[right], bits >> 16)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn parsed(line: &str) -> Result<ServiceSpec> {
        let raw: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let cli = crate::Cli::try_parse_from(&raw)?;
        let crate::Command::Service(crate::service::Command::Create(args)) = cli.command else {
            panic!("not a create: {line}")
        };
        spec(*args, &raw, |name| (name == "HOME").then(|| "/root".to_owned()))
    }

    #[test]
    fn the_labs_example_needs_no_image() {
        let spec = parsed(
            "meshctl service create --name web --replicas 3 --publish 8080:80 --network app \
             --runtime process -- meshctl whoami --http 80",
        )
        .unwrap();
        let container = spec.task_template.container_spec.unwrap();
        assert_eq!(container.args, ["meshctl", "whoami", "--http", "80"]);
        assert_eq!(container.labels["mesh.runtime"], "process");
        assert_eq!(container.image, "process");
        assert_eq!(spec.mode.replicated.unwrap().replicas, Some(3));
        assert_eq!(spec.endpoint_spec.unwrap().ports[0].published_port, 8080);
        assert_eq!(spec.task_template.networks[0].target, "app");
    }

    #[test]
    fn the_stock_form_has_an_image() {
        for line in [
            "meshctl service create --name w --container-label mesh.runtime=process host sh -c -x",
            "meshctl service create --name w --runtime process host -- sh -c -x",
            "meshctl service create --name w --runtime process host sh -c -x",
        ] {
            let container = parsed(line).unwrap().task_template.container_spec.unwrap();
            assert_eq!(container.image, "host", "{line}");
            assert_eq!(container.args, ["sh", "-c", "-x"], "{line}");
        }
        let line =
            "meshctl service create --entrypoint env --no-healthcheck --runtime process h A=1";
        let container = parsed(line).unwrap().task_template.container_spec.unwrap();
        assert_eq!((&container.command[0][..], &container.args[0][..]), ("env", "A=1"));
        let spec = parsed("meshctl service create --runtime process host sh -- x").unwrap();
        assert_eq!(spec.task_template.container_spec.unwrap().args, ["sh", "--", "x"]);
        assert!(!spec.name.is_empty());
    }

    #[test]
    fn flags_become_fields() {
        let spec = parsed(
            "meshctl service create --name w --mode global -e A=b -e HOME -e NOSUCH -l x=y \
             --restart-condition on-failure --restart-delay 1s --stop-signal SIGINT \
             --stop-grace-period 3s --constraint node.role==worker --update-delay 2s \
             --update-order start-first --endpoint-mode dnsrr --hostname h -w /tmp \
             --limit-memory 64m --reserve-cpu 0.5 --placement-pref spread=node.labels.zone \
             --runtime process \
             -- true",
        )
        .unwrap();
        let container = spec.task_template.container_spec.unwrap();
        assert_eq!(container.env, ["A=b", "HOME=/root"]);
        assert_eq!((container.dir.as_str(), container.hostname.as_str()), ("/tmp", "h"));
        assert_eq!(container.stop_grace_period, Some(3_000_000_000));
        let restart = spec.task_template.restart_policy.unwrap();
        assert_eq!(
            (restart.condition.as_str(), restart.delay),
            ("on-failure", Some(1_000_000_000))
        );
        let placement = spec.task_template.placement.unwrap();
        assert_eq!(
            (&placement.constraints[0][..], placement.preferences.len()),
            ("node.role==worker", 1)
        );
        let resources = spec.task_template.resources.unwrap();
        assert_eq!(resources.limits.unwrap().memory_bytes, 64 << 20);
        assert_eq!(resources.reservations.unwrap().nano_cpus, 500_000_000);
        let update = UpdateConfig {
            parallelism: Some(1),
            delay: Some(2_000_000_000),
            order: "start-first".into(),
            ..UpdateConfig::default()
        };
        assert_eq!((spec.update_config, spec.rollback_config), (Some(update), None));
        assert!(spec.mode.global.is_some() && spec.mode.replicated.is_none());
        assert_eq!(spec.endpoint_spec.unwrap().mode, "dnsrr");
    }

    #[test]
    fn files_of_variables_have_comments() {
        let read: Vec<_> = env_lines("\u{feff}# c\nA=1 # b\n\n  HOME\nB=\n").collect();
        assert_eq!(read, ["A=1 # b", "HOME", "B="]);
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for line in [
            "meshctl service create --name w",
            "meshctl service create --name w -- true",
            "meshctl service create --mode global --replicas 2 --runtime process -- true",
            "meshctl service create --mode global --replicas-max-per-node 2 --runtime process x",
            "meshctl service create --mode replicated-job --runtime process -- true",
            "meshctl service create --runtime oci host true",
        ] {
            assert!(parsed(line).unwrap_err().is::<Usage>(), "{line}");
        }
        assert!(parsed("meshctl service create -p mode=host,target=80 x").is_err());
    }
}
