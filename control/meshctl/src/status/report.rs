//! From what a manager knows to what an operator should. No IO.

use mesh_api::{Node, Service, Task};
use serde::Serialize;

use super::Seen;
use crate::output::{Tint, natural, title};

/// Lists longer than this show what needs a look alone.
const ROWS_MAX: usize = 12;

/// What `meshctl status` says.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Report {
    node: Own,
    quorum: Option<Quorum>,
    nodes: Vec<NodeLine>,
    services: Vec<ServiceLine>,
    networks: Vec<NetworkLine>,
    warnings: Vec<String>,
}

/// The node that was asked.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Own {
    #[serde(rename = "ID")]
    id: String,
    name: String,
    role: &'static str,
    state: String,
}

/// Who decides.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Quorum {
    managers: usize,
    reachable: usize,
    needed: usize,
    /// How many may go before nothing can be changed.
    margin: usize,
    /// Empty while there is none.
    leader: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct NodeLine {
    name: String,
    role: String,
    status: String,
    availability: String,
    tasks: usize,
    address: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct ServiceLine {
    name: String,
    mode: &'static str,
    running: u64,
    desired: u64,
    /// Of the last update, empty without one.
    update: String,
    ports: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct NetworkLine {
    name: String,
    driver: String,
    subnets: Vec<String>,
}

pub(super) fn report(seen: &Seen) -> Report {
    let swarm = &seen.info.swarm;
    let node = Own {
        id: swarm.node_id.clone(),
        name: seen.info.name.clone(),
        role: match (swarm.node_id.is_empty(), swarm.control_available) {
            (true, _) => "none",
            (false, true) => "manager",
            (false, false) => "worker",
        },
        state: swarm.local_node_state.clone(),
    };
    let mut report = Report { node, ..Report::default() };
    if !swarm.error.is_empty() {
        report.warnings.push(format!("this node: {}", swarm.error));
    }
    if !swarm.control_available {
        report.warnings.push(match report.node.role {
            "none" => "this node is in no cluster: `meshctl swarm init` or `join`".to_owned(),
            _ => "this node is a worker: ask a manager for the rest".to_owned(),
        });
        return report;
    }
    report.quorum = Some(quorum(&seen.nodes));
    report.nodes = nodes(seen);
    report.services = services(&seen.services);
    report.networks = networks(seen);
    report.warnings.extend(report.quorum.iter().flat_map(of_quorum));
    report.warnings.extend(of_nodes(&seen.nodes));
    if swarm.cluster.as_ref().is_some_and(|cluster| cluster.root_rotation_in_progress) {
        report.warnings.push("the root certificate is being rotated".to_owned());
    }
    report.warnings.extend(of_services(seen, &report.services));
    report
}

fn quorum(nodes: &[Node]) -> Quorum {
    let managers: Vec<_> = nodes.iter().filter(|node| node.spec.role == "manager").collect();
    let status = |node: &&&Node| node.manager_status.clone().unwrap_or_default();
    let reachable = managers.iter().filter(|node| status(node).reachability == "reachable").count();
    let needed = managers.len() / 2 + 1;
    let leader = managers.iter().find(|node| status(node).leader);
    Quorum {
        managers: managers.len(),
        reachable,
        needed,
        margin: reachable.saturating_sub(needed),
        leader: leader.map(|node| node.description.hostname.clone()).unwrap_or_default(),
    }
}

fn of_quorum(quorum: &Quorum) -> Vec<String> {
    let Quorum { managers, reachable, needed, margin, leader } = quorum;
    let mut said = Vec::new();
    if reachable < needed {
        said.push(format!(
            "no quorum: {reachable} of {managers} managers are reachable, {needed} are needed; \
             nothing can be changed until they are back, what runs goes on"
        ));
    } else if leader.is_empty() {
        said.push("there is no leader: nothing can be changed until one is elected".to_owned());
    } else if *managers == 1 {
        said.push("one manager alone: without it nothing can be changed; have 3".to_owned());
    } else if *margin == 0 {
        said.push(format!(
            "no margin: {reachable} of {managers} managers are reachable and {needed} are needed; \
             one more that goes stops all changes"
        ));
    }
    if managers % 2 == 0 && *managers > 0 {
        said.push(format!(
            "{managers} managers bear no more losses than {}: have an odd number",
            managers - 1
        ));
    }
    said
}

fn nodes(seen: &Seen) -> Vec<NodeLine> {
    let running = |node: &Node| {
        let on = |task: &&Task| task.node_id == node.id && task.status.state == "running";
        seen.tasks.iter().filter(on).count()
    };
    let mut lines: Vec<_> = seen
        .nodes
        .iter()
        .map(|node| NodeLine {
            name: node.description.hostname.clone(),
            role: match &node.manager_status {
                Some(status) if status.leader => "leader".to_owned(),
                Some(status) if status.reachability == "unreachable" => {
                    "manager, unreachable".to_owned()
                }
                _ => node.spec.role.clone(),
            },
            status: title(&node.status.state),
            availability: title(&node.spec.availability),
            tasks: running(node),
            address: node.status.addr.clone(),
        })
        .collect();
    lines.sort_by_key(|line| natural(&line.name));
    lines
}

fn of_nodes(nodes: &[Node]) -> Vec<String> {
    let mut said: Vec<_> = nodes
        .iter()
        .filter(|node| node.status.state != "ready")
        .map(|node| {
            let why = match node.status.message.is_empty() {
                true => String::new(),
                false => format!(": {}", node.status.message),
            };
            format!("node {} is {}{why}", node.description.hostname, node.status.state)
        })
        .collect();
    said.sort();
    said
}

fn services(services: &[Service]) -> Vec<ServiceLine> {
    let mut lines: Vec<_> = services
        .iter()
        .map(|service| {
            let status = service.service_status.unwrap_or_default();
            let update = service.update_status.as_ref();
            ServiceLine {
                name: name(service),
                mode: match service.spec.pointer("/Mode/Global") {
                    Some(mode) if !mode.is_null() => "global",
                    _ => "replicated",
                },
                running: status.running_tasks,
                desired: status.desired_tasks,
                update: update.map(|status| status.state.replace('_', " ")).unwrap_or_default(),
                ports: crate::service::ports(&service.endpoint.ports),
            }
        })
        .collect();
    lines.sort_by_key(|line| natural(&line.name));
    lines
}

fn name(service: &Service) -> String {
    service.spec["Name"].as_str().unwrap_or(&service.id).to_owned()
}

fn of_services(seen: &Seen, lines: &[ServiceLine]) -> Vec<String> {
    let mut said = Vec::new();
    for line in lines {
        let service = seen.services.iter().find(|service| name(service) == line.name);
        let Some(service) = service else { continue };
        let of = |task: &&Task| task.service_id == service.id;
        if let Some(update) = &service.update_status {
            let what = match &update.state[..] {
                "paused" => "its update is paused",
                "rollback_paused" => "its rollback is paused",
                "rollback_started" => "its update is being rolled back",
                "rollback_completed" => "its last update was rolled back",
                _ => "",
            };
            if !what.is_empty() {
                said.push(format!("service {}: {what}: {}", line.name, update.message));
            }
        }
        if line.running < line.desired && line.update != "updating" {
            let why = newest_error(seen.tasks.iter().filter(of));
            said.push(format!(
                "service {}: {} of {} tasks run{why}",
                line.name, line.running, line.desired
            ));
        }
        let is_rejected = |task: &&Task| task.status.state == "rejected";
        let rejected: Vec<_> = seen.tasks.iter().filter(of).filter(is_rejected).collect();
        if !rejected.is_empty() {
            let why = newest_error(rejected.iter().copied());
            let count = rejected.len();
            let tasks = if count == 1 { "task was" } else { "tasks were" };
            said.push(format!("service {}: {count} {tasks} rejected{why}", line.name));
        }
    }
    said
}

/// What the newest task that has an error says.
fn newest_error<'a>(tasks: impl Iterator<Item = &'a Task>) -> String {
    let newest =
        tasks.filter(|task| !task.status.err.is_empty()).max_by_key(|task| &task.status.timestamp);
    newest.map(|task| format!(": {}", task.status.err)).unwrap_or_default()
}

fn networks(seen: &Seen) -> Vec<NetworkLine> {
    let mut lines: Vec<_> = seen
        .networks
        .iter()
        .map(|network| NetworkLine {
            name: network.name.clone(),
            driver: network.driver.clone(),
            subnets: network.ipam.config.iter().map(|config| config.subnet.clone()).collect(),
        })
        .collect();
    lines.sort_by_key(|line| natural(&line.name));
    lines
}

impl Report {
    /// The screen.
    pub(super) fn text(&self, all: bool, colours: bool) -> String {
        let paint = |tint: Tint, text: &str| match colours {
            true => tint.paint(text),
            false => text.to_owned(),
        };
        let mut out =
            vec![format!("Node      {}: {}, {}", self.node.name, self.node.role, self.node.state)];
        if let Some(quorum) = &self.quorum {
            let leader = match &quorum.leader[..] {
                "" => paint(Tint::Bad, "no leader"),
                name => format!("{name} leads"),
            };
            let tint = match (quorum.reachable >= quorum.needed, quorum.margin) {
                (false, _) => Tint::Bad,
                (true, 0) => Tint::Between,
                (true, _) => Tint::Good,
            };
            let reachable = format!("{} of {}", quorum.reachable, quorum.managers);
            out.push(format!(
                "Quorum    {} managers reachable, {} needed; {leader}",
                paint(tint, &reachable),
                quorum.needed
            ));
            let ready = self.nodes.iter().filter(|node| node.status == "Ready").count();
            out.push(format!("Nodes     {ready} of {} ready", self.nodes.len()));
            out.extend(self.node_lines(all, colours));
            let well = self.services.iter().filter(|service| service.is_well()).count();
            out.push(format!("Services  {well} of {} as they should be", self.services.len()));
            out.extend(self.service_lines(all, colours));
            out.push(format!("Networks  {}", self.networks.len()));
            out.extend(self.network_lines(all));
        }
        for warning in &self.warnings {
            out.push(format!("{} {warning}", paint(Tint::Between, "Warning:")));
        }
        out.join("\n")
    }

    fn node_lines(&self, all: bool, colours: bool) -> Vec<String> {
        let whole = all || self.nodes.len() <= ROWS_MAX;
        let shown = |node: &&NodeLine| whole || !node.is_well();
        let rows = self.nodes.iter().filter(shown).map(|node| {
            vec![
                node.name.clone(),
                node.role.clone(),
                node.status.clone(),
                node.availability.clone(),
                format!("{} {}", node.tasks, if node.tasks == 1 { "task" } else { "tasks" }),
                node.address.clone(),
            ]
        });
        indented(rows.collect(), &["", "", "Status", "Availability", "", ""], colours)
    }

    fn service_lines(&self, all: bool, colours: bool) -> Vec<String> {
        let whole = all || self.services.len() <= ROWS_MAX;
        let shown = |service: &&ServiceLine| whole || !service.is_well();
        let rows = self.services.iter().filter(shown).map(|service| {
            vec![
                service.name.clone(),
                service.mode.to_owned(),
                format!("{}/{}", service.running, service.desired),
                service.update.clone(),
                service.ports.clone(),
            ]
        });
        indented(rows.collect(), &["", "", "Replicas", "", ""], colours)
    }

    fn network_lines(&self, all: bool) -> Vec<String> {
        if !all && self.networks.len() > ROWS_MAX {
            return Vec::new();
        }
        let rows = self.networks.iter().map(|network| {
            vec![network.name.clone(), network.driver.clone(), network.subnets.join(" ")]
        });
        indented(rows.collect(), &["", "", ""], false)
    }
}

impl NodeLine {
    fn is_well(&self) -> bool {
        self.status == "Ready"
            && self.availability == "Active"
            && !self.role.contains("unreachable")
    }
}

impl ServiceLine {
    fn is_well(&self) -> bool {
        let update = matches!(&self.update[..], "" | "completed" | "rollback completed");
        self.running == self.desired && update
    }
}

/// Rows under their heading's words; `keys` name the columns for colours.
fn indented(rows: Vec<Vec<String>>, keys: &[&str], colours: bool) -> Vec<String> {
    let tint = |_: usize, column: usize, cell: &str| {
        keys.get(column).filter(|_| colours).and_then(|key| Tint::of_cell(key, cell))
    };
    let lines = crate::output::aligned(&rows, tint);
    lines.iter().map(|line| format!("          {}", line.trim_end())).collect()
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
