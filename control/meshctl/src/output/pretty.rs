//! `inspect --pretty`: the stock CLI's screens, which are templates there too.

use anyhow::Result;
use serde_json::Value;

use super::{say, template::Template};

const NODE: &str = "\
ID:                     {{.ID}}
{{- if .Spec.Labels}}
Labels:
{{- range $k, $v := .Spec.Labels}}
 - {{$k}}{{if $v}}={{$v}}{{end}}
{{- end}}{{end}}
Hostname:               {{.Description.Hostname}}
Joined at:              {{.CreatedAt}}
Status:
 State:                 {{title .Status.State}}
{{- if .Status.Message}}
 Message:               {{.Status.Message}}
{{- end}}
 Availability:          {{title .Spec.Availability}}
 Address:               {{.Status.Addr}}
{{- if .ManagerStatus}}
Manager Status:
 Address:               {{.ManagerStatus.Addr}}
 Raft Status:           {{title .ManagerStatus.Reachability}}
 Leader:                {{if .ManagerStatus.Leader}}Yes{{else}}No{{end}}
{{- end}}
Platform:
 Operating System:      {{.Description.Platform.OS}}
 Architecture:          {{.Description.Platform.Architecture}}
Resources:
 CPUs:                  {{.Description.Resources.CPUs}}
 Memory:                {{.Description.Resources.Memory}}
Engine Version:         {{.Description.Engine.EngineVersion}}
";

const SERVICE: &str = "\
{{- define \"policy\"}}
 Parallelism:   {{.Parallelism}}
{{- if .Delay}}
 Delay:         {{.Delay}}
{{- end}}
 On failure:    {{.FailureAction}}
 Monitoring Period: {{.Monitor}}
 Max failure ratio: {{.MaxFailureRatio}}
{{- end -}}
ID:             {{.ID}}
Name:           {{.Spec.Name}}
{{- if .Spec.Labels}}
Labels:
{{- range $k, $v := .Spec.Labels}}
 {{$k}}{{if $v}}={{$v}}{{end}}
{{- end}}{{end}}
Service Mode:   {{if .Spec.Mode.Replicated}}Replicated
 Replicas:      {{.Spec.Mode.Replicated.Replicas}}{{else}}Global{{end}}
{{- if .UpdateStatus}}
UpdateStatus:
 State:         {{.UpdateStatus.State}}
 Started:       {{.UpdateStatus.StartedAt}}
{{- if .UpdateStatus.CompletedAt}}
 Completed:     {{.UpdateStatus.CompletedAt}}
{{- end}}
 Message:       {{.UpdateStatus.Message}}
{{- end}}
Placement:
{{- with .Spec.TaskTemplate.Placement}}{{with .Constraints}}
 Constraints:   {{join . \", \"}}
{{- end}}
{{- with .Preferences}}
 Preferences:  {{range .}} spread={{.Spread.SpreadDescriptor}}{{end}}
{{- end}}
{{- with .MaxReplicas}}
 Max Replicas Per Node: {{.}}
{{- end}}{{end}}
{{- with .Spec.UpdateConfig}}
UpdateConfig:{{template \"policy\" .}}
 Update order:      {{.Order}}
{{- end}}
{{- with .Spec.RollbackConfig}}
RollbackConfig:{{template \"policy\" .}}
 Rollback order:    {{.Order}}
{{- end}}
ContainerSpec:
{{- with .Spec.TaskTemplate.ContainerSpec}}
 Image:         {{.Image}}
{{- if .Args}}
 Args:          {{join .Args \" \"}}
{{- end}}
{{- if .Env}}
 Env:           {{join .Env \" \"}}
{{- end}}
{{- if .Dir}}
 Dir:           {{.Dir}}
{{- end}}
{{- end}}
{{- with .Spec.TaskTemplate.Resources}}{{if or .Reservations .Limits}}
Resources:
{{- with .Reservations}}
 Reservations:
{{- with .CPUs}}
  CPU:          {{.}}
{{- end}}
{{- with .Memory}}
  Memory:       {{.}}
{{- end}}
{{- end}}
{{- with .Limits}}
 Limits:
{{- with .CPUs}}
  CPU:          {{.}}
{{- end}}
{{- with .Memory}}
  Memory:       {{.}}
{{- end}}
{{- with .Pids}}
  Pids:         {{.}}
{{- end}}
{{- end}}
{{- end}}{{end}}
{{- with .Spec.TaskTemplate.Networks}}
Networks:{{range .}} {{.Target}}{{end}}
{{- end}}
Endpoint Mode:  {{with .Endpoint.Spec.Mode}}{{.}}{{else}}vip{{end}}
{{- if .Endpoint.Ports}}
Ports:
{{- range .Endpoint.Ports}}
 PublishedPort = {{.PublishedPort}}
  Protocol = {{.Protocol}}
  TargetPort = {{.TargetPort}}
  PublishMode = {{.PublishMode}}
{{- end}}{{end}}
";

/// Whose screen.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Screen {
    Node,
    Service,
}

/// Prints objects for people.
pub(crate) fn pretty(objects: &[Value], screen: Screen) -> Result<()> {
    let text = match screen {
        Screen::Node => NODE,
        Screen::Service => SERVICE,
    };
    let template: Template = text.parse().map_err(anyhow::Error::msg)?;
    objects
        .iter()
        .try_for_each(|one| say(template.render(&readable(one)).map_err(anyhow::Error::msg)?))
}

/// Fields in nanoseconds, of CPUs and of bytes, as people read them.
fn readable(object: &Value) -> Value {
    match object {
        Value::Object(fields) => {
            let mut made: serde_json::Map<String, Value> = fields
                .iter()
                .map(|(key, field)| match (&key[..], field.as_u64()) {
                    ("Delay" | "Monitor" | "Window" | "StopGracePeriod", Some(nanos)) => {
                        (key.clone(), Value::from(seconds(nanos)))
                    }
                    _ => (key.clone(), readable(field)),
                })
                .collect();
            let nanos = fields.get("NanoCPUs").and_then(Value::as_u64);
            if let Some(nanos) = nanos.filter(|nanos| *nanos > 0) {
                made.insert("CPUs".to_owned(), Value::from((nanos as f64 / 1e9).to_string()));
            }
            let bytes = fields.get("MemoryBytes").and_then(Value::as_u64);
            if let Some(bytes) = bytes.filter(|bytes| *bytes > 0) {
                made.insert("Memory".to_owned(), Value::from(size(bytes)));
            }
            Value::Object(made)
        }
        Value::Array(items) => items.iter().map(readable).collect(),
        other => other.clone(),
    }
}

fn seconds(nanos: u64) -> String {
    format!("{}s", nanos as f64 / 1e9)
}

/// 1024 by 1024, as the stock CLI shows memory.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut rest = bytes as f64;
    let mut unit = 0;
    while rest >= 1024.0 && unit + 1 < UNITS.len() {
        rest /= 1024.0;
        unit += 1;
    }
    format!("{}{}", (rest * 1000.0).round() / 1000.0, UNITS[unit])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(object: &Value, text: &str) -> String {
        text.parse::<Template>().unwrap().render(&readable(object)).unwrap()
    }

    #[test]
    fn services_are_shown_for_people() {
        let service = json!({"ID": "s1", "Spec": {"Name": "web", "Labels": {"a": "b", "c": ""},
            "Mode": {"Replicated": {"Replicas": 2}},
            "UpdateConfig": {"Parallelism": 1, "Delay": 2_500_000_000_u64,
                "FailureAction": "pause", "Monitor": 5_000_000_000_u64, "MaxFailureRatio": 0.1,
                "Order": "stop-first"},
            "TaskTemplate": {"ContainerSpec": {"Image": "process", "Args": ["sleep", "9"]},
                "Resources": {"Limits": {"NanoCPUs": 500_000_000, "MemoryBytes": 67_108_864},
                    "Reservations": {"MemoryBytes": 4_194_304}},
                "Placement": {"Constraints": ["node.role==worker"], "MaxReplicas": 2,
                    "Preferences": [{"Spread": {"SpreadDescriptor": "node.labels.zone"}}]}}},
            "Endpoint": {"Spec": {}, "Ports": [{"PublishedPort": 8080, "TargetPort": 80,
                "Protocol": "tcp", "PublishMode": "ingress"}]}});
        let text = shown(&service, SERVICE);
        for line in [
            "ID:             s1\n",
            "Labels:\n a=b\n c\nService Mode:   Replicated\n Replicas:      2\nPlacement:\n",
            " Constraints:   node.role==worker\n Preferences:   spread=node.labels.zone\n",
            " Max Replicas Per Node: 2\nUpdateConfig:\n Parallelism:   1\n",
            " Delay:         2.5s\n On failure:    pause\n Monitoring Period: 5s\n",
            " Args:          sleep 9\nResources:\n Reservations:\n  Memory:       4MiB\n",
            " Limits:\n  CPU:          0.5\n",
            "  Memory:       64MiB\nEndpoint Mode:  vip\nPorts:\n PublishedPort = 8080\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
        assert!(!text.contains("no value") && !text.contains("UpdateStatus"), "{text}");
    }

    #[test]
    fn nodes_are_shown_for_people() {
        let node = json!({"ID": "n1", "CreatedAt": "t", "Spec": {"Labels": {}, "Availability":
            "active"}, "Status": {"State": "ready", "Addr": "1.2.3.4"}, "ManagerStatus":
            {"Leader": true, "Reachability": "reachable", "Addr": "1.2.3.4:2377"}, "Description":
            {"Hostname": "m1", "Platform": {"OS": "linux", "Architecture": "x86_64"}, "Resources":
            {"NanoCPUs": 2_000_000_000, "MemoryBytes": 8_589_934_592_u64}, "Engine":
            {"EngineVersion": "1"}}});
        let text = shown(&node, NODE);
        for line in [
            "ID:                     n1\nHostname:               m1\n",
            " State:                 Ready\n Availability:          Active\n",
            " Raft Status:           Reachable\n Leader:                Yes\nPlatform:\n",
            " CPUs:                  2\n Memory:                8GiB\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
    }
}
