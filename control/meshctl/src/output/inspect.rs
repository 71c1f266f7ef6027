//! What `inspect` and its like print: whole objects.

use std::{collections::BTreeSet, str::FromStr};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::{
    indented, say,
    template::{ALIASES, Template},
};
use crate::{Usage, unknown::did_you_mean};

/// The flag of `inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectFormat {
    /// `json` (an object per line), or a Go template per object; else one indented array
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) format: Option<ObjectFormat>,
}

/// How an object is printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ObjectFormat {
    /// As JSON, on one line.
    Json,
    /// As a template makes it.
    Template(Template),
}

impl FromStr for ObjectFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "json" => Ok(Self::Json),
            text if text.contains("{{") => text.parse().map(Self::Template),
            word => {
                let hint = did_you_mean(word, ["json"].into_iter(), "");
                Err(format!("use json or a Go template like '{{{{.ID}}}}'{hint}"))
            }
        }
    }
}

/// Prints objects as `inspect` does.
pub(crate) fn objects(objects: &[impl Serialize], format: &InspectFormat) -> Result<()> {
    match &format.format {
        None => say(indented(&objects)?),
        Some(format) => objects.iter().try_for_each(|one| object(one, format)),
    }
}

/// Prints one object in a format.
pub(crate) fn object(object: &impl Serialize, format: &ObjectFormat) -> Result<()> {
    let json = serde_json::to_value(object).context("cannot print an object")?;
    say(made(&json, format)?)
}

fn made(json: &Value, format: &ObjectFormat) -> Result<String> {
    match format {
        ObjectFormat::Json => Ok(json.to_string()),
        ObjectFormat::Template(template) => {
            let mut known: BTreeSet<String> = KNOWN.split_whitespace().map(str::to_owned).collect();
            names(json, &mut known);
            known.extend(ALIASES.iter().map(|(_, of_go)| (*of_go).to_owned()));
            let listed = json.as_object().into_iter().flatten().map(|(key, _)| key.clone());
            template
                .check_fields(&known, &listed.collect())
                .and_then(|()| template.render(json))
                .map_err(|text| Usage(format!("--format: {text}")).into())
        }
    }
}

/// The names of all fields, at any depth.
fn names(json: &Value, into: &mut BTreeSet<String>) {
    match json {
        Value::Object(fields) => {
            for (key, field) in fields {
                into.insert(key.clone());
                names(field, into);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| names(item, into)),
        _ => {}
    }
}

/// Fields of the Engine API that an object may lack: they are empty, not wrong.
const KNOWN: &str = "
    ID Version Index CreatedAt UpdatedAt Created Name Labels Spec PreviousSpec
    Endpoint UpdateStatus ServiceStatus JobStatus State StartedAt CompletedAt Message
    RunningTasks DesiredTasks CompletedTasks JobIteration LastExecution
    TaskTemplate Mode Replicated Replicas Global ReplicatedJob GlobalJob MaxConcurrent
    TotalCompletions UpdateConfig RollbackConfig Parallelism Delay FailureAction Monitor
    MaxFailureRatio Order Networks EndpointSpec Ports Protocol TargetPort PublishedPort
    PublishMode VirtualIPs NetworkID Addr
    ContainerSpec Image Command Args Hostname Env Dir User Groups Privileges TTY OpenStdin
    ReadOnly Mounts StopSignal StopGracePeriod Healthcheck Test Interval Timeout Retries
    StartPeriod StartInterval Hosts DNSConfig Nameservers Search Options Secrets Configs
    Isolation Init Sysctls CapabilityAdd CapabilityDrop Ulimits OomScoreAdj
    Resources Limits Reservations NanoCPUs MemoryBytes Pids GenericResources
    RestartPolicy Condition MaxAttempts Window Placement Constraints Preferences Spread
    SpreadDescriptor MaxReplicas Platforms Architecture OS Target Aliases DriverOpts
    ForceUpdate Runtime LogDriver
    Role Availability Description Platform Engine EngineVersion Plugins Type TLSInfo TrustRoot
    CertIssuerSubject CertIssuerPublicKey Status ManagerStatus Leader Reachability
    Scope Driver EnableIPv4 EnableIPv6 IPAM Config Subnet IPRange Gateway AuxiliaryAddresses
    AuxAddress Internal Attachable Ingress ConfigFrom Network ConfigOnly Containers Peers IP
    Services VIP LocalLBIndex Tasks EndpointID EndpointIP Info MacAddress IPv4Address
    IPv6Address
    JoinTokens Worker Manager Orchestration TaskHistoryRetentionLimit RescheduleAfter Raft
    SnapshotInterval KeepOldSnapshots LogEntriesForSlowFollowers ElectionTick HeartbeatTick
    Dispatcher HeartbeatPeriod CAConfig NodeCertExpiry ExternalCAs SigningCACert SigningCAKey
    ForceRotate TaskDefaults EncryptionConfig AutoLockManagers RootRotationInProgress
    DefaultAddrPool SubnetSize DataPathPort
    Swarm NodeID NodeAddr LocalNodeState ControlAvailable Error RemoteManagers Nodes Managers
    Cluster Warnings Action Actor Attributes From Time TimeNano
    Client Server Context Components Details
";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(template: &str, object: &Value) -> Result<String> {
        made(object, &template.parse().map_err(anyhow::Error::msg)?)
    }

    #[test]
    fn objects_go_through_templates() {
        let service = json!({"ID": "s1", "Spec": {"Name": "web", "Labels": {"a": "b"},
            "TaskTemplate": {"Networks": [{"Target": "n1"}, {"Target": "n2"}]}}});
        for (template, expected) in [
            ("json", &service.to_string()[..]),
            ("{{.Spec.Name}}", "web"),
            ("{{json .Spec.Labels}}", r#"{"a":"b"}"#),
            ("{{range .Spec.TaskTemplate.Networks}}{{.Target}} {{end}}", "n1 n2 "),
            ("{{with .UpdateStatus}}{{.State}}{{else}}none{{end}}", "none"),
            ("{{if .Spec.Labels.zone}}z{{else}}-{{end}}{{index .Spec.Labels \"a\"}}", "-b"),
            ("{{range .Spec.TaskTemplate.ContainerSpec.Env}}x{{end}}", ""),
        ] {
            assert_eq!(shown(template, &service).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn fields_that_no_object_has_are_refused() {
        let object = json!({"ID": "s1", "Spec": {"Name": "web"}});
        let err = shown("{{.Spec.Nmae}}", &object).unwrap_err();
        assert!(err.is::<Usage>(), "{err}");
        let said = "no field `.Spec.Nmae` here; did you mean `.Name`?; there are .ID .Spec";
        assert!(err.to_string().contains(said), "{err}");
        for bad in ["pretty", "yaml", "{{.ID", "{{bogus .}}"] {
            assert!(bad.parse::<ObjectFormat>().is_err(), "{bad}");
        }
    }
}
