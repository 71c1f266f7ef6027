//! What `meshctl status` says of clusters in every state.

use mesh_api::{ManagerStatus, Network, UpdateStatus};
use serde_json::json;

use super::*;

fn node(name: &str, reachability: Option<&str>, leader: bool) -> Node {
    let mut node = Node { id: format!("id-{name}"), ..Node::default() };
    node.description.hostname = name.into();
    node.status.state = "ready".into();
    node.status.addr = "192.0.2.1".into();
    node.spec.availability = "active".into();
    node.spec.role = if reachability.is_some() { "manager" } else { "worker" }.into();
    node.manager_status = reachability.map(|reachability| ManagerStatus {
        leader,
        reachability: reachability.into(),
        ..ManagerStatus::default()
    });
    node
}

fn service(name: &str, running: u64, desired: u64, update: &str) -> Service {
    let status = mesh_api::ServiceStatus {
        running_tasks: running,
        desired_tasks: desired,
        completed_tasks: 0,
    };
    Service {
        id: format!("id-{name}"),
        spec: json!({"Name": name, "Mode": {"Replicated": {"Replicas": desired}}}),
        service_status: Some(status),
        update_status: (!update.is_empty()).then(|| UpdateStatus {
            state: update.into(),
            message: "because".into(),
            ..UpdateStatus::default()
        }),
        ..Service::default()
    }
}

fn task(service: &str, node: &str, state: &str, err: &str, at: &str) -> Task {
    let mut task = Task { service_id: service.into(), node_id: node.into(), ..Task::default() };
    task.status.state = state.into();
    task.status.err = err.into();
    task.status.timestamp = at.into();
    task
}

fn seen() -> Seen {
    let mut seen = Seen {
        nodes: vec![
            node("m1", Some("reachable"), true),
            node("m2", Some("reachable"), false),
            node("m3", Some("reachable"), false),
            node("w1", None, false),
        ],
        services: vec![service("web", 2, 2, "completed")],
        networks: vec![Network {
            name: "app".into(),
            driver: "overlay".into(),
            ..Network::default()
        }],
        tasks: vec![task("id-web", "id-w1", "running", "", "1")],
        ..Seen::default()
    };
    seen.info.name = "m1".into();
    seen.info.swarm.node_id = "id-m1".into();
    seen.info.swarm.local_node_state = "active".into();
    seen.info.swarm.control_available = true;
    seen
}

#[test]
fn a_healthy_cluster_has_no_warnings() {
    let report = report(&seen());
    assert_eq!(report.warnings, [""; 0]);
    let text = report.text(false, false);
    let expected = "\
Node      m1: manager, active
Quorum    3 of 3 managers reachable, 2 needed; m1 leads
Nodes     4 of 4 ready
          m1        leader    Ready     Active    0 tasks   192.0.2.1
          m2        manager   Ready     Active    0 tasks   192.0.2.1
          m3        manager   Ready     Active    0 tasks   192.0.2.1
          w1        worker    Ready     Active    1 task    192.0.2.1
Services  1 of 1 as they should be
          web       replicated   2/2       completed
Networks  1
          app       overlay";
    assert_eq!(text, expected);
    assert!(report.text(false, true).contains("\u{1b}[32mReady\u{1b}[0m"));
}

#[test]
fn managers_are_counted() {
    let said = |reachable: usize, managers: usize, leader: bool| {
        let reach = |n| if n < reachable { "reachable" } else { "unreachable" };
        let nodes: Vec<_> = (0..managers)
            .map(|n| node(&format!("m{n}"), Some(reach(n)), leader && n == 0))
            .collect();
        of_quorum(&quorum(&nodes)).join("|")
    };
    assert_eq!(said(3, 3, true), "");
    assert_eq!(said(5, 5, true), "");
    assert!(said(1, 1, true).contains("one manager alone"));
    assert!(said(2, 3, true).contains("no margin: 2 of 3"));
    assert!(said(1, 3, true).contains("no quorum: 1 of 3"));
    assert!(said(3, 3, false).contains("no leader"));
    let even = said(2, 2, true);
    assert!(even.contains("no margin") && even.contains("no more losses than 1"), "{even}");
    let even = said(4, 4, true);
    assert!(!even.contains("no margin") && even.contains("no more losses than 3"), "{even}");
}

#[test]
fn what_needs_a_look_is_a_warning() {
    let mut seen = seen();
    seen.nodes[3].status.state = "down".into();
    seen.nodes[3].status.message = "silent".into();
    seen.services = vec![
        service("api", 1, 3, "paused"),
        service("back", 2, 2, "rollback_completed"),
        service("new", 0, 2, "updating"),
    ];
    seen.tasks = vec![
        task("id-api", "", "pending", "no suitable node", "2"),
        task("id-api", "id-w1", "rejected", "older", "1"),
    ];
    let report = report(&seen);
    let expected = [
        "node w1 is down: silent",
        "service api: its update is paused: because",
        "service api: 1 of 3 tasks run: no suitable node",
        "service api: 1 task was rejected: older",
        "service back: its last update was rolled back: because",
    ];
    assert_eq!(report.warnings, expected);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["Quorum"]["Leader"], "m1");
    assert_eq!(json["Services"][0]["Running"], 1);
    assert_eq!(json["Warnings"].as_array().unwrap().len(), expected.len());
}

#[test]
fn a_long_list_shows_what_is_not_well() {
    let mut seen = seen();
    seen.nodes.extend((2..60).map(|n| node(&format!("w{n}"), None, false)));
    seen.nodes[40].spec.availability = "drain".into();
    let report = report(&seen);
    let text = report.text(false, false);
    assert!(text.contains("62 of 62 ready") && text.contains("w38"), "{text}");
    assert!(!text.contains("w39"), "{text}");
    assert!(report.text(true, false).contains("w39"));
}

#[test]
fn a_worker_knows_of_itself_alone() {
    let mut seen = Seen::default();
    seen.info.name = "w1".into();
    seen.info.swarm.node_id = "x".into();
    seen.info.swarm.local_node_state = "active".into();
    let text = report(&seen).text(false, false);
    let expected = "Node      w1: worker, active\n\
                    Warning: this node is a worker: ask a manager for the rest";
    assert_eq!(text, expected);
    seen.info.swarm.node_id.clear();
    assert!(report(&seen).text(false, false).contains("in no cluster"));
}
