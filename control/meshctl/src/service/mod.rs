//! `meshctl service`.

mod change;
mod create;
mod logs;
mod names;
mod policy;
pub(crate) mod progress;
pub(crate) mod ps;
mod publish;
mod resources;
mod restart;
mod update;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use mesh_api::{Map, Port, Service, ServiceSpec, ServiceStatus};
use serde_json::{Value, json};

use crate::{
    Usage,
    client::{Client, escape},
    output::{
        self, InspectFormat, ListArgs, Screen, Table, error_text, fields, for_each, natural,
        objects, say, short,
    },
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a service
    ///
    /// A process: `--runtime process -- CMD…`, or as the stock CLI has it:
    /// `--container-label mesh.runtime=process IMAGE CMD…`, where the image is only a label.
    Create(Box<create::CreateArgs>),
    /// List services
    #[command(alias = "list", after_help = fields(FILTERS, &[COLUMNS]))]
    Ls(ListArgs),
    /// List the tasks of services
    #[command(after_help = fields(ps::FILTERS, &[ps::COLUMNS]))]
    Ps(ps::PsArgs),
    /// Show what the tasks of a service, or one task, wrote to their output
    Logs(logs::LogsArgs),
    /// Show all that is known of services
    Inspect {
        /// Names or ids
        #[arg(required = true)]
        services: Vec<String>,
        /// For people
        #[arg(long, conflicts_with = "format")]
        pretty: bool,
        #[command(flatten)]
        format: InspectFormat,
    },
    /// Change the number of tasks of services
    Scale {
        #[command(flatten)]
        wait: WaitArgs,
        /// `SERVICE=REPLICAS`
        #[arg(required = true, value_name = "SERVICE=REPLICAS")]
        services: Vec<String>,
    },
    /// Change a service; its tasks are replaced where that needs it
    Update(Box<update::UpdateArgs>),
    /// Bring the spec before the last update back
    Rollback(update::RollbackArgs),
    /// Remove services and their tasks
    #[command(alias = "remove")]
    Rm {
        /// Names or ids
        #[arg(required = true)]
        services: Vec<String>,
    },
}

/// How the verbs that change tasks wait for them.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct WaitArgs {
    /// Do not wait until the tasks are as they should be
    #[arg(short, long)]
    detach: bool,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
    /// Accepted for the stock CLI's sake: images are not resolved
    #[arg(long, hide = true)]
    no_resolve_image: bool,
}

pub(crate) async fn run(client: &Client, command: Command, raw: &[String]) -> Result<()> {
    match command {
        Command::Create(args) => create::run(client, *args, raw).await,
        Command::Ls(args) => list(client, args).await,
        Command::Ps(args) => ps::run(client, args).await,
        Command::Logs(args) => logs::run(client, args).await,
        Command::Inspect { services, pretty, format } => {
            let path = |name: &str| format!("/services/{name}?insertDefaults=true");
            let (found, failed) = inspect_all(client, &services, path).await;
            match pretty {
                true => output::pretty(&found, Screen::Service)?,
                false => objects(&found, &format)?,
            }
            failed
        }
        Command::Scale { wait, services } => scale(client, wait, &services).await,
        Command::Update(args) => update::run(client, *args).await,
        Command::Rollback(args) => update::roll_back(client, args).await,
        Command::Rm { services } => {
            for_each(&services, async |service| {
                client.delete(&format!("/services/{}", escape(&service))).await?;
                say(service)
            })
            .await
        }
    }
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "ID"),
    ("NAME", "Name"),
    ("MODE", "Mode"),
    ("REPLICAS", "Replicas"),
    ("IMAGE", "Image"),
    ("PORTS", "Ports"),
];
const FILTERS: &[&str] = &["id", "label", "mode", "name", "runtime"];

async fn list(client: &Client, args: ListArgs) -> Result<()> {
    let query = args.query(FILTERS, std::iter::empty())?;
    let services: Vec<Service> = client.get(&format!("/services?status=true&{query}")).await?;
    let mut services = services
        .into_iter()
        .map(|service| Ok((spec_of(&service)?, service)))
        .collect::<Result<Vec<_>>>()?;
    services.sort_by_key(|(spec, _)| natural(&spec.name));
    let id = |service: &Service| {
        if args.no_trunc { service.id.clone() } else { short(&service.id) }
    };
    if args.ids_alone() {
        return services.iter().try_for_each(|(_, service)| say(id(service)));
    }
    let mut table = Table::new(COLUMNS);
    for (spec, service) in services {
        let status = service.service_status.unwrap_or_default();
        let container = spec.task_template.container_spec.unwrap_or_default();
        table.row(vec![
            id(&service),
            spec.name,
            if spec.mode.global.is_some() { "global" } else { "replicated" }.to_owned(),
            match spec.task_template.placement.map_or(0, |placement| placement.max_replicas) {
                0 => format!("{}/{}", status.running_tasks, status.desired_tasks),
                most => {
                    let ServiceStatus { running_tasks, desired_tasks, .. } = status;
                    format!("{running_tasks}/{desired_tasks} (max {most} per node)")
                }
            },
            image_name(&container.image),
            ports(&service.endpoint.ports),
        ]);
    }
    table.print(&args.format)
}

/// The typed part of a service's spec.
fn spec_of(service: &Service) -> Result<ServiceSpec> {
    let mut spec = service.spec.clone();
    strip_nulls(&mut spec);
    serde_json::from_value(spec)
        .with_context(|| format!("the spec of service {} is not understood", service.id))
}

/// A spec is echoed as it was sent, and Go clients send `null` for nothing.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// Without the digest, as Docker prints it.
fn image_name(image: &str) -> String {
    image.split_once('@').map_or(image, |(name, _)| name).to_owned()
}

/// `*:8080->80/tcp`.
pub(crate) fn ports(ports: &[Port]) -> String {
    let one =
        |port: &Port| format!("*:{}->{}/{}", port.published_port, port.target_port, port.protocol);
    ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// All objects that are found, and the last failure; earlier ones are printed.
pub(crate) async fn inspect_all(
    client: &Client,
    names: &[String],
    path: impl Fn(&str) -> String,
) -> (Vec<Value>, Result<()>) {
    let mut found = Vec::new();
    let mut failed: Result<()> = Ok(());
    for name in names {
        match client.get(&path(&escape(name))).await {
            Ok(object) => found.push(object),
            Err(err) => {
                if let Err(earlier) = std::mem::replace(&mut failed, Err(err)) {
                    eprintln!("{}", error_text(&earlier));
                }
            }
        }
    }
    (found, failed)
}

/// `KEY=VALUE` flags as a map; a key alone has an empty value.
pub(crate) fn key_values(flags: &[String]) -> impl Iterator<Item = (String, String)> {
    flags.iter().map(|flag| {
        let (key, value) = flag.split_once('=').unwrap_or((flag, ""));
        (key.to_owned(), value.to_owned())
    })
}

/// Go's durations (`1h30m`, `500ms`, `1.5s`) in nanoseconds.
pub(crate) fn duration(text: &str) -> Result<u64, String> {
    let invalid =
        || format!("`{text}` is not a duration: use a number and a unit, like 5s or 1m30s");
    if text == "0" {
        return Ok(0);
    }
    let mut rest = text;
    let mut nanos = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(invalid)?;
        let (number, tail) = rest.split_at(digits);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let factor = match unit {
            "ns" => 1.0,
            "us" | "µs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return Err(invalid()),
        };
        nanos += number.parse::<f64>().map_err(|_| invalid())? * factor;
        rest = tail;
    }
    // Go keeps durations in 63 bits.
    if text.is_empty() || nanos > i64::MAX as f64 {
        Err(invalid())
    } else {
        Ok(nanos.round() as u64)
    }
}

async fn scale(client: &Client, wait: WaitArgs, pairs: &[String]) -> Result<()> {
    let mut wanted = Vec::new();
    for pair in pairs {
        let parsed =
            pair.split_once('=').and_then(|(name, n)| Some((name, n.parse::<u64>().ok()?)));
        match parsed {
            Some(pair) => wanted.push(pair),
            None => bail!(Usage(format!(
                "invalid scale specifier `{pair}`: expected SERVICE=REPLICAS, like web=3"
            ))),
        }
    }
    let mut ids = Vec::new();
    for (name, replicas) in wanted {
        ids.push(scale_one(client, name, replicas).await?);
        say(format!("{name} scaled to {replicas}"))?;
    }
    for id in ids {
        progress::wait(client, &id, progress::Goal::Update, wait).await?;
    }
    Ok(())
}

async fn scale_one(client: &Client, name: &str, replicas: u64) -> Result<String> {
    let path = format!("/services/{}", escape(name));
    let change = |spec: &mut Value| set_replicas(spec, name, replicas);
    let (id, answer) = client.modify("/services", &path, "", change).await?;
    warn(&answer["Warnings"]);
    Ok(id)
}

/// Puts the number of tasks into a spec.
fn set_replicas(spec: &mut Value, name: &str, replicas: u64) -> Result<()> {
    match spec.pointer_mut("/Mode/Replicated").and_then(Value::as_object_mut) {
        Some(mode) => {
            mode.insert("Replicas".into(), json!(replicas));
            Ok(())
        }
        None => bail!("service {name} is not replicated: only such a service has replicas"),
    }
}

/// Warnings of the daemon go to standard error.
fn warn(warnings: &Value) {
    for warning in warnings.as_array().into_iter().flatten().filter_map(Value::as_str) {
        eprintln!("warning: {warning}");
    }
}

/// The labels of `--label` flags.
fn labels(flags: &[String]) -> Map {
    key_values(flags).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        assert_eq!(duration("5s"), Ok(5_000_000_000));
        assert_eq!(duration("1m30s"), Ok(90_000_000_000));
        assert_eq!(duration("1.5s"), Ok(1_500_000_000));
        assert_eq!(duration("250ms"), Ok(250_000_000));
        assert_eq!(duration("0"), Ok(0));
        for bad in ["", "5", "s", "5x", "-1s", "5s3", "1e3s", "999999999999h", "1..2s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_printed_as_dockers() {
        let port = |published| Port {
            protocol: "tcp".into(),
            target_port: 80,
            published_port: published,
            ..Port::default()
        };
        assert_eq!(ports(&[port(8080), port(8081)]), "*:8080->80/tcp, *:8081->80/tcp");
        assert_eq!(image_name("a:v1@sha256:00"), "a:v1");
    }
}
