//! `meshctl events`: what happens in the cluster, as it happens.

use anyhow::{Context, Result, bail};
use clap::Args;
use http_body_util::BodyExt as _;
use jiff::{Timestamp, tz::TimeZone};
use mesh_api::Event;
use serde_json::json;

use crate::{
    client::{Client, filter_query},
    output::{ObjectFormat, object, say},
    since::since,
};

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Show only what matches, like type=service or service=web (may be repeated); the keys are
    /// event, label, network, node, scope, service, task and type
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// `json` (a line per event), or a Go template
    #[arg(long, value_name = "FORMAT")]
    format: Option<ObjectFormat>,
    /// Begin with what happened since then, as far as this manager remembers: a time, or how long
    /// ago, like 10m
    #[arg(long, value_parser = since, value_name = "TIME")]
    since: Option<String>,
    /// Show what happened until then, and end
    #[arg(long, value_parser = since, value_name = "TIME")]
    until: Option<String>,
}

pub(crate) async fn run(client: &Client, args: EventsArgs) -> Result<()> {
    let times = [("since", &args.since), ("until", &args.until)];
    let times = times.into_iter().filter_map(|(key, at)| Some(format!("{key}={}", at.as_ref()?)));
    let query: Vec<String> = times.chain([filter_query(&args.filter)?]).collect();
    let mut body = client.stream(&format!("/events?{}", query.join("&"))).await?;
    let mut rest = Vec::new();
    while let Some(part) = body.frame().await {
        let part = part.context("the stream of the daemon broke")?;
        rest.extend_from_slice(part.data_ref().map(AsRef::as_ref).unwrap_or_default());
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let event = serde_json::from_slice(&line)
                .context("an event of the daemon's is not understood: is it another version?")?;
            print(&event, args.format.as_ref())?;
        }
    }
    Ok(())
}

fn print(event: &Event, format: Option<&ObjectFormat>) -> Result<()> {
    // What the daemon says of the stream itself.
    if event.kind == "daemon" {
        let why = event.actor.attributes.get("error").map_or("no reason given", String::as_str);
        bail!("the stream of events ended: {why}");
    }
    match format {
        None => say(line(event, &TimeZone::system())),
        Some(ObjectFormat::Json) => object(event, &ObjectFormat::Json),
        // Templates name fields as Go does.
        Some(template) => {
            let Event { kind, action, actor, scope, time, time_nano } = event;
            let fields = json!({
                "Type": kind, "Action": action, "Status": action, "ID": actor.id, "From": "",
                "Actor": actor, "Scope": scope, "Time": time, "TimeNano": time_nano,
            });
            object(&fields, template)
        }
    }
}

/// `2026-01-02T15:04:05.000000000Z service update ID (name=web, replicas.new=3, …)`.
fn line(event: &Event, zone: &TimeZone) -> String {
    let at = Timestamp::from_nanosecond(event.time_nano.into()).unwrap_or_default();
    let at = at.to_zoned(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S.%9f%:z").to_string();
    let at = at.replace("+00:00", "Z");
    let about: Vec<String> =
        event.actor.attributes.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let Event { kind, action, actor, .. } = event;
    let id = &actor.id;
    match about.is_empty() {
        true => format!("{at} {kind} {action} {id}"),
        false => format!("{at} {kind} {action} {id} ({})", about.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_lines_as_dockers() {
        let text = r#"{"Type":"service","Action":"update","Actor":{"ID":"s1","Attributes":
            {"replicas.new":"3","name":"web"}},"scope":"swarm","time":1795218673,
            "timeNano":1795218673250000000}"#;
        let mut event: Event = serde_json::from_str(text).unwrap();
        assert_eq!(
            line(&event, &TimeZone::UTC),
            "2026-11-20T23:51:13.250000000Z service update s1 (name=web, replicas.new=3)"
        );
        event.actor.attributes.clear();
        assert!(line(&event, &TimeZone::UTC).ends_with("service update s1"));
        let template = "{{.Type}} {{.Action}} {{.Actor.ID}} {{.TimeNano}}".parse().unwrap();
        print(&event, Some(&template)).unwrap();
        event.kind = "daemon".to_owned();
        event.actor.attributes.insert("error".to_owned(), "too slow".to_owned());
        assert!(print(&event, None).unwrap_err().to_string().contains("too slow"));
    }
}
