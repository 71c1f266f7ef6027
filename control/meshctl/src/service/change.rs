//! The flags of `service update` that set a field, or add to and take from a list, of what a
//! service is. As there, the spec is changed as JSON.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use clap::Args;
use mesh_api::{NetworkTarget, Port};
use serde_json::{Map, Value, json};

use super::{
    create::EndpointMode,
    key_values, publish,
    restart::RestartArgs,
    update::{list, object, words},
};
use crate::client::{Client, escape};

#[derive(Debug, Default, Args)]
pub(super) struct ChangeArgs {
    /// The image, a mere label for processes
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// What the command's words are given to, as one text with a shell's quotes; empty: nothing
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Accepted for the stock CLI's sake: processes have no health checks
    #[arg(long, hide = true)]
    no_healthcheck: bool,
    /// Host name of its tasks
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Add or replace a label of the service (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    label_add: Vec<String>,
    /// Remove a label of the service (may be repeated)
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
    /// Add or replace a label of its containers (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    container_label_add: Vec<String>,
    /// Remove a label of its containers (may be repeated)
    #[arg(long, value_name = "KEY")]
    container_label_rm: Vec<String>,
    /// Join a network: NAME or name=NAME,alias=ALIAS (may be repeated)
    #[arg(long, value_parser = publish::network, value_name = "NETWORK")]
    network_add: Vec<NetworkTarget>,
    /// Leave a network (may be repeated)
    #[arg(long, value_name = "NETWORK")]
    network_rm: Vec<String>,
    /// Publish a port, as `service create --publish` (may be repeated)
    #[arg(long, value_parser = publish::parse, value_name = "PORT")]
    publish_add: Vec<Vec<Port>>,
    /// Publish no more what goes to a target port: TARGET[/PROTOCOL] (may be repeated)
    #[arg(long, value_parser = publish::parse, value_name = "TARGET")]
    publish_rm: Vec<Vec<Port>>,
    /// How its name resolves
    #[arg(long, value_enum)]
    endpoint_mode: Option<EndpointMode>,
    #[command(flatten)]
    restart: RestartArgs,
}

/// Ids of networks by the names that flags gave.
pub(super) type Networks = BTreeMap<String, String>;

impl ChangeArgs {
    /// The networks that the flags name, which must exist: specs know them by their ids.
    pub(super) async fn networks(&self, client: &Client) -> Result<Networks> {
        let added = self.network_add.iter().map(|network| &network.target);
        let mut ids = Networks::new();
        for name in added.chain(&self.network_rm) {
            let network: mesh_api::Network =
                client.get(&format!("/networks/{}", escape(name))).await?;
            ids.insert(name.clone(), network.id);
        }
        Ok(ids)
    }

    /// Makes of a spec what the flags say.
    pub(super) fn apply(&self, spec: &mut Value, networks: &Networks) -> Result<()> {
        self.container(spec)?;
        labels(spec, &[], &self.label_add, &self.label_rm)?;
        let container = &["TaskTemplate", "ContainerSpec"];
        labels(spec, container, &self.container_label_add, &self.container_label_rm)?;
        if !self.network_add.is_empty() || !self.network_rm.is_empty() {
            self.join(list(object(spec, &["TaskTemplate"])?, "Networks")?, networks);
        }
        if let Some(mode) = self.endpoint_mode {
            object(spec, &["EndpointSpec"])?.insert("Mode".into(), json!(mode.word()));
        }
        if !self.publish_add.is_empty() || !self.publish_rm.is_empty() {
            self.publish(list(object(spec, &["EndpointSpec"])?, "Ports")?)?;
        }
        self.restart(spec)
    }

    fn container(&self, spec: &mut Value) -> Result<()> {
        let mut given = Map::new();
        let texts = [
            ("Image", &self.image),
            ("Hostname", &self.hostname),
            ("Dir", &self.workdir),
            ("StopSignal", &self.restart.stop_signal),
        ];
        for (key, text) in texts {
            given.extend(text.iter().map(|text| (key.to_owned(), json!(text))));
        }
        if let Some(entrypoint) = &self.entrypoint {
            given.insert("Command".into(), json!(words(entrypoint)?));
        }
        let period = self.restart.stop_grace_period;
        given.extend(period.map(|period| ("StopGracePeriod".to_owned(), json!(period))));
        if !given.is_empty() {
            object(spec, &["TaskTemplate", "ContainerSpec"])?.extend(given);
        }
        Ok(())
    }

    fn join(&self, have: &mut Vec<Value>, networks: &Networks) {
        let id = |name: &str| networks.get(name).cloned().unwrap_or_else(|| name.to_owned());
        let is = |network: &Value, name: &str| {
            network["Target"].as_str().is_some_and(|target| target == name || target == id(name))
        };
        have.retain(|network| !self.network_rm.iter().any(|name| is(network, name)));
        for add in &self.network_add {
            have.retain(|network| !is(network, &add.target));
            let mut network = json!({"Target": id(&add.target)});
            if !add.aliases.is_empty() {
                network["Aliases"] = json!(add.aliases);
            }
            have.push(network);
        }
    }

    fn publish(&self, have: &mut Vec<Value>) -> Result<()> {
        // What is left out means tcp.
        let protocol = |port: &Value| port["Protocol"].as_str().unwrap_or("tcp").to_owned();
        let removed = |port: &Value| {
            self.publish_rm
                .iter()
                .flatten()
                .any(|rm| port["TargetPort"] == rm.target_port && protocol(port) == rm.protocol)
        };
        have.retain(|port| !removed(port));
        for port in self.publish_add.iter().flatten() {
            let port = serde_json::to_value(port).context("cannot write a port")?;
            let same = |other: &Value| {
                let keys = ["TargetPort", "PublishedPort"];
                keys.iter().all(|key| other[key] == port[key]) && protocol(other) == protocol(&port)
            };
            if !have.iter().any(same) {
                have.push(port);
            }
        }
        Ok(())
    }

    fn restart(&self, spec: &mut Value) -> Result<()> {
        let Some(given) = self.restart.policy() else { return Ok(()) };
        let given = serde_json::to_value(given).context("cannot write a restart policy")?;
        let fields = given.as_object().into_iter().flatten();
        // An empty condition was not given.
        let fields = fields.filter(|(_, field)| **field != json!(""));
        object(spec, &["TaskTemplate", "RestartPolicy"])?
            .extend(fields.map(|(key, field)| (key.clone(), field.clone())));
        Ok(())
    }
}

/// Adds labels to the object at a path, and takes others from it.
fn labels(spec: &mut Value, path: &[&str], add: &[String], remove: &[String]) -> Result<()> {
    if add.is_empty() && remove.is_empty() {
        return Ok(());
    }
    let path: Vec<&str> = path.iter().copied().chain(["Labels"]).collect();
    let labels = object(spec, &path)?;
    for key in remove {
        labels.remove(key);
    }
    labels.extend(key_values(add).map(|(key, value)| (key, json!(value))));
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn changed(flags: &str, mut spec: Value) -> Value {
        let line = format!("meshctl service update {flags} web");
        let cli = crate::Cli::try_parse_from(line.split_whitespace()).unwrap();
        let crate::Command::Service(crate::service::Command::Update(args)) = cli.command else {
            panic!("not an update: {flags}")
        };
        let networks = Networks::from([
            ("app".to_owned(), "id-app".to_owned()),
            ("db".to_owned(), "id-db".to_owned()),
        ]);
        args.change().apply(&mut spec, &networks).unwrap();
        spec
    }

    #[test]
    fn fields_are_set_and_others_survive() {
        let spec = json!({"Labels": {"a": "1", "b": "2"}, "Unknown": 1, "TaskTemplate": {
            "ContainerSpec": {"Image": "x", "Isolation": "default", "Labels": {"c": "3"}},
            "RestartPolicy": {"Condition": "any", "Delay": 1, "Unknown": true}}});
        let made = changed(
            "--image y --entrypoint env --no-healthcheck --hostname h -w /tmp --label-add a=9 \
             --label-rm b --container-label-add d=4 \
             --container-label-rm c --stop-signal SIGINT --stop-grace-period 3s \
             --restart-delay 2s --restart-max-attempts 4 --endpoint-mode dnsrr",
            spec,
        );
        let expected = json!({"Labels": {"a": "9"}, "Unknown": 1,
            "EndpointSpec": {"Mode": "dnsrr"}, "TaskTemplate": {
            "ContainerSpec": {"Image": "y", "Isolation": "default", "Labels": {"d": "4"},
                "Command": ["env"], "Hostname": "h", "Dir": "/tmp", "StopSignal": "SIGINT",
                "StopGracePeriod": 3_000_000_000_u64},
            "RestartPolicy": {"Condition": "any", "Delay": 2_000_000_000_u64, "MaxAttempts": 4,
                "Unknown": true}}});
        assert_eq!(made, expected);
        let made = changed("--restart-condition none", json!({"TaskTemplate": null}));
        assert_eq!(made, json!({"TaskTemplate": {"RestartPolicy": {"Condition": "none"}}}));
        assert_eq!(changed("", json!({"Labels": null})), json!({"Labels": null}));
    }

    #[test]
    fn networks_and_ports_come_and_go() {
        let spec = json!({"TaskTemplate": {"Networks": [{"Target": "id-app", "Aliases": ["x"]}]}});
        let made = changed("--network-rm app --network-add name=db,alias=y", spec.clone());
        let networks = json!([{"Target": "id-db", "Aliases": ["y"]}]);
        assert_eq!(made["TaskTemplate"]["Networks"], networks);
        let again = changed("--network-add app", spec);
        assert_eq!(again["TaskTemplate"]["Networks"], json!([{"Target": "id-app"}]));

        let ports = json!({"EndpointSpec": {"Ports": [
            {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"},
            {"Protocol": "udp", "TargetPort": 80, "PublishedPort": 8080}]}});
        let made =
            changed("--publish-rm 80 --publish-add 8081:80 --publish-add 8080:80/udp", ports);
        let ports = made["EndpointSpec"]["Ports"].as_array().unwrap();
        let shown: Vec<_> = ports
            .iter()
            .map(|port| format!("{}{}", port["Protocol"], port["PublishedPort"]))
            .collect();
        assert_eq!(shown, ["\"udp\"8080", "\"tcp\"8081"]);
    }
}
