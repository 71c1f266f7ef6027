//! What `cargo xtask fuzz` calls.

use crate::{
    command::{Command, NodeReport},
    fixtures::{Bench, network, network_id, new_node, node_id, port, service, service_id},
    model::{NodeStatus, Role},
};

/// Short histories, for a fuzzer to begin with.
#[must_use]
pub fn examples() -> Vec<Vec<Command>> {
    let app = network_id(1);
    let mut web = service("web", 2, &[app]);
    web.ports.push(port(8080));
    let create = vec![
        Command::CreateNetwork { id: app, spec: network("app", Some("10.9.0.0/24")) },
        Command::CreateService { id: service_id(1), spec: Box::new(web) },
        Command::RemoveService { id: service_id(1) },
        Command::RemoveNetwork { id: app },
    ];
    let nodes = vec![
        Command::AddNode(Box::new(new_node(3, Role::Manager))),
        Command::ReportNodes(vec![NodeReport {
            id: node_id(3),
            status: Some(NodeStatus::default()),
            description: None,
        }]),
        Command::RemoveNode { id: node_id(3), force: true },
        Command::RotateToken { role: Role::Worker, secret: [4; 16] },
    ];
    vec![create, nodes]
}

/// Applies commands to the store of a small cluster, whatever they are. What is refused leaves no
/// trace, and what the leader makes of the rest is not refused.
pub fn commands(commands: impl IntoIterator<Item = Command>) {
    let mut bench = Bench::with_nodes(2);
    bench.mute = true;
    for command in commands {
        let _ = bench.apply(command);
        bench.now_ms += 1_000;
    }
    for _ in 0..4 {
        bench.round();
        bench.now_ms += 10_000;
    }
}
