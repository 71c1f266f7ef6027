//! The store's promises, command by command, and the words of its refusals.

use mesh_types::{
    Revision, Vni,
    spec::{EndpointMode, ServiceMode},
    task::{InterfaceKind, TaskState, TaskStatus},
};

use crate::{
    command::{Command, Rejection, TaskChange},
    fixtures::{Bench, init, network, network_id, new_node, node_id, port, service, service_id},
    model::{Availability, ClusterSpec, NodeSpec, NodeState, Role},
};

fn text<T: std::fmt::Debug>(result: Result<T, Rejection>) -> String {
    result.unwrap_err().to_string()
}

fn make(
    bench: &mut Bench,
    number: u128,
    spec: mesh_types::spec::NetworkSpec,
) -> Result<(), Rejection> {
    bench.apply(Command::CreateNetwork { id: network_id(number), spec }).map(drop)
}

fn serve(
    bench: &mut Bench,
    number: u128,
    spec: mesh_types::spec::ServiceSpec,
) -> Result<(), Rejection> {
    let id = service_id(number);
    bench.apply(Command::CreateService { id, spec: Box::new(spec) }).map(drop)
}

#[test]
fn init_comes_first_and_once() {
    let mut bench = Bench::default();
    let add = Command::AddNode(Box::new(new_node(2, Role::Worker)));
    assert!(text(bench.apply(add)).contains("not initialised"));
    bench.apply(Command::Init(Box::new(init()))).unwrap();
    let ingress = bench.store.ingress().unwrap();
    assert_eq!(ingress.subnet, "10.0.0.0/24".parse().unwrap());
    assert_eq!(ingress.vni, Vni::MIN);
    assert!(text(bench.apply(Command::Init(Box::new(init())))).contains("already part of a swarm"));
}

#[test]
fn a_pool_that_hosts_route_wholly_cannot_serve() {
    let mut bench = Bench::default();
    let mut command = init();
    command.first.description.host_routes.insert("10.0.0.0/8".parse().unwrap());
    let refusal = text(bench.apply(Command::Init(Box::new(command))));
    assert!(refusal.contains("10.0.0.0/8") && refusal.contains("--subnet"), "{refusal}");
    assert_eq!(bench.store.cluster, None);
}

#[test]
fn leased_subnets_avoid_networks_and_host_routes() {
    let mut bench = Bench::with_nodes(1);
    let mut node = new_node(2, Role::Worker);
    node.description.host_routes =
        ["10.0.1.7/32".parse().unwrap(), "0.0.0.0/0".parse().unwrap()].into();
    bench.apply(Command::AddNode(Box::new(node))).unwrap();
    let id = bench.create_network(1, network("app", None));
    let app = &bench.store.networks[&id];
    assert_eq!(app.subnet, "10.0.2.0/24".parse().unwrap());
    assert_eq!(app.gateway.to_string(), "10.0.2.1");
    assert_eq!(app.vni.get(), 4097);
}

#[test]
fn overlaps_name_both_sides() {
    let mut bench = Bench::with_nodes(2);
    bench.create_network(1, network("app", Some("10.9.0.0/16")));
    let refusal = text(make(&mut bench, 2, network("db", Some("10.9.4.0/24"))));
    assert!(
        refusal.ends_with("subnet 10.9.4.0/24 overlaps 10.9.0.0/16 of network app")
            && refusal.starts_with("Pool overlaps with other one on this address space"),
        "{refusal}"
    );
    let refusal = text(make(&mut bench, 2, network("db", Some("192.0.0.0/16"))));
    assert!(
        refusal.contains("192.0.0.0/16 overlaps 192.0.2.0/24, a route of node n1"),
        "{refusal}"
    );
    assert!(make(&mut bench, 2, network("db", Some("100.127.9.0/24"))).is_err());
    assert!(make(&mut bench, 2, network("db", Some("10.8.0.1/24"))).is_err());
}

#[test]
fn gateway_and_range_lie_in_the_subnet() {
    let mut bench = Bench::with_nodes(1);
    let mut spec = network("app", Some("10.9.0.0/24"));
    spec.gateway = Some("10.9.1.1".parse().unwrap());
    assert!(text(make(&mut bench, 1, spec.clone())).contains("10.9.1.1"));
    spec.gateway = Some("10.9.0.255".parse().unwrap());
    assert!(make(&mut bench, 1, spec.clone()).is_err());
    spec.gateway = Some("10.9.0.254".parse().unwrap());
    spec.ip_range = Some("10.9.1.0/28".parse().unwrap());
    assert!(text(make(&mut bench, 1, spec.clone())).contains("10.9.1.0/28"));
    spec.ip_range = Some("10.9.0.32/28".parse().unwrap());
    make(&mut bench, 1, spec).unwrap();
    let id = bench.create_service(1, service("web", 15, &[network_id(1)]));
    bench.run();
    // Sixteen addresses, all in the range: the VIP and fifteen tasks.
    assert_eq!(bench.running(id), 15);
    let range: ipnetwork::IpNetwork = "10.9.0.32/28".parse().unwrap();
    for task in bench.live(id) {
        assert!(range.contains(task.leases[0].address.ip()));
    }
}

#[test]
fn names_conflict_in_dockers_words() {
    let mut bench = Bench::with_nodes(1);
    let app = bench.create_network(1, network("app", None));
    assert_eq!(
        make(&mut bench, 2, network("App", None)),
        Err(Rejection::Exists("network with name App already exists".into()))
    );
    bench.create_service(1, service("web", 1, &[app]));
    assert_eq!(
        serve(&mut bench, 2, service("web", 1, &[])),
        Err(Rejection::Exists(
            "name conflicts with an existing object: service web already exists".into()
        ))
    );
    assert!(
        text(serve(&mut bench, 2, service("a.b", 1, &[])))
            .starts_with("name must be valid as a DNS name component")
    );
    let nosuch = bench.apply(Command::RemoveService { id: service_id(9) });
    assert_eq!(text(nosuch), format!("service {} not found", service_id(9)));
}

#[test]
fn a_published_port_has_one_owner() {
    let mut bench = Bench::with_nodes(1);
    let mut spec = service("web", 1, &[]);
    spec.ports = vec![port(8081), port(0)];
    let web = bench.create_service(1, spec.clone());
    assert_eq!(bench.store.services[&web].ports[1].published, 30_000);
    spec.name = "api".into();
    assert_eq!(
        text(serve(&mut bench, 2, spec.clone())),
        format!("port '8081' is already in use by service 'web' ({web}) as an ingress port")
    );
    spec.ports = vec![port(0)];
    let api = bench.create_service(2, spec.clone());
    assert_eq!(bench.store.services[&api].ports[0].published, 30_001);
    // A leased port stays through an update, and is free again once its service is gone.
    bench.apply(Command::RemoveService { id: web }).unwrap();
    bench.update_service(api, |spec| spec.ports.push(port(8081))).unwrap();
    assert_eq!(bench.store.services[&api].ports[0].published, 30_001);
    spec.name = "x".into();
    spec.ports = vec![port(2377)];
    assert!(text(serve(&mut bench, 3, spec.clone())).contains("used by mesh itself"));
    spec.ports = vec![port(9), port(9)];
    assert!(text(serve(&mut bench, 3, spec.clone())).contains("duplicate published ports"));
    spec.ports = vec![port(9)];
    spec.endpoint_mode = EndpointMode::Dnsrr;
    assert_eq!(
        text(serve(&mut bench, 3, spec)),
        "EndpointSpec: port published with ingress mode can't be used with dnsrr mode"
    );
}

#[test]
fn exhaustion_is_said_on_the_task_and_heals() {
    let mut bench = Bench::with_nodes(1);
    let small = bench.create_network(1, network("app", Some("10.0.1.0/29")));
    let web = bench.create_service(1, service("web", 6, &[small]));
    bench.run();
    // Six hosts less gateway and VIP.
    assert_eq!(bench.running(web), 4);
    let waiting: Vec<_> =
        bench.live(web).into_iter().filter(|t| t.status.state == TaskState::New).collect();
    assert_eq!(waiting.len(), 2);
    for task in waiting {
        assert_eq!(task.status.err, "no free address on network app (10.0.1.0/29): 5 of 5 in use");
    }
    assert!(text(serve(&mut bench, 2, service("api", 1, &[small]))).contains("5 of 5 in use"));
    bench.update_service(web, |spec| spec.mode = ServiceMode::Replicated { replicas: 4 }).unwrap();
    bench.run();
    assert_eq!((bench.running(web), bench.live(web).len()), (4, 4));
}

#[test]
fn addresses_are_reused_late() {
    let mut bench = Bench::with_nodes(1);
    let app = bench.create_network(1, network("app", Some("10.5.0.0/28")));
    let web = bench.create_service(1, service("web", 1, &[app]));
    bench.run();
    let address = |bench: &Bench| bench.live(web)[0].leases[0].address.ip();
    let mut seen = vec![address(&bench)];
    for _ in 0..6 {
        let task = bench.live(web)[0].id;
        bench.report(task, TaskState::Failed);
        bench.run();
        bench.now_ms += 6_000;
        bench.run();
        assert!(!seen.contains(&address(&bench)), "reused {:?}", address(&bench));
        seen.push(address(&bench));
    }
}

#[test]
fn interfaces_follow_networks_and_ports() {
    let mut bench = Bench::with_nodes(1);
    let app = bench.create_network(1, network("app", None));
    let mut inner = network("inner", None);
    inner.internal = true;
    let inner = bench.create_network(2, inner);
    let mut published = service("a", 1, &[app, inner]);
    published.ports = vec![port(8080)];
    let ingress = bench.store.ingress().unwrap().id;
    let cases = [
        (
            published,
            vec!["eth0", "eth1", "gw0"],
            Some(InterfaceKind::IngressGateway { network: ingress }),
        ),
        (
            service("b", 1, &[inner, app]),
            vec!["eth0", "eth1", "gw0"],
            Some(InterfaceKind::LocalGateway),
        ),
        (service("c", 1, &[inner]), vec!["eth0"], None),
        (service("d", 1, &[]), vec!["gw0"], Some(InterfaceKind::LocalGateway)),
    ];
    for (number, (spec, names, gateway)) in (1..).zip(cases) {
        let id = bench.create_service(number, spec);
        bench.run();
        let task = bench.live(id)[0];
        let found: Vec<String> = task.leases.iter().map(|l| l.kind.ifname()).collect();
        assert_eq!(found, names);
        if let Some(kind) = gateway {
            assert_eq!(task.leases.last().unwrap().kind, kind);
        }
    }
    assert_eq!(bench.store.local_gateways[&node_id(1)].len(), 2);
    assert!(!bench.store.local_gateways[&node_id(1)].contains_key(&super::NODE_LOCAL_GATEWAY));
}

#[test]
fn a_network_in_use_stays() {
    let mut bench = Bench::with_nodes(1);
    let app = bench.create_network(1, network("app", None));
    let web = bench.create_service(1, service("web", 1, &[app]));
    bench.run();
    let remove = Command::RemoveNetwork { id: app };
    assert_eq!(text(bench.apply(remove.clone())), "network app is in use by service web");
    let task = bench.live(web)[0].clone();
    bench.apply(Command::RemoveService { id: web }).unwrap();
    assert_eq!(
        text(bench.apply(remove.clone())),
        format!("network app is in use by task {}", task.name())
    );
    bench.run();
    assert!(bench.store.tasks.is_empty());
    bench.apply(remove).unwrap();
    let ingress = bench.store.ingress().unwrap().id;
    let refusal = bench.apply(Command::RemoveNetwork { id: ingress }).unwrap_err();
    assert!(matches!(refusal, Rejection::Forbidden(_)));
}

#[test]
fn updates_are_locked_and_count_what_matters() {
    let mut bench = Bench::with_nodes(1);
    let web = bench.create_service(1, service("web", 1, &[]));
    let first = bench.version(web);
    let spec = bench.store.services[&web].spec_version;
    bench.update_service(web, |spec| spec.mode = ServiceMode::Replicated { replicas: 2 }).unwrap();
    assert_eq!(bench.store.services[&web].spec_version, spec, "scaling replaces no task");
    bench.update_service(web, |spec| spec.task.force_update += 1).unwrap();
    assert!(bench.store.services[&web].spec_version > spec);
    let stale =
        Command::UpdateService { id: web, version: first, spec: Box::new(service("web", 3, &[])) };
    assert_eq!(text(bench.apply(stale)), "update out of sequence");
    let global = bench.update_service(web, |spec| spec.mode = ServiceMode::Global);
    assert_eq!(text(global), "service mode change is not allowed");
    let renamed = bench.update_service(web, |spec| spec.name = "api".into());
    assert_eq!(text(renamed), "renaming services is not supported");
}

#[test]
fn stale_reports_are_dropped() {
    let mut bench = Bench::with_nodes(2);
    let web = bench.create_service(1, service("web", 1, &[]));
    bench.run();
    let task = bench.live(web)[0].clone();
    bench.report(task.id, TaskState::Preparing);
    assert_eq!(bench.store.tasks[&task.id], task);
    let other = if task.node == Some(node_id(1)) { node_id(2) } else { node_id(1) };
    let failed = TaskStatus { state: TaskState::Failed, ..TaskStatus::default() };
    bench.apply(Command::ReportTasks { node: other, statuses: vec![(task.id, failed)] }).unwrap();
    assert_eq!(bench.store.tasks[&task.id], task, "another node's report");
    bench.report(task.id, TaskState::Failed);
    assert!(bench.store.tasks[&task.id].leases.is_empty());
    let ended = bench.store.tasks[&task.id].clone();
    bench.report(task.id, TaskState::Shutdown);
    assert_eq!(bench.store.tasks[&task.id], ended, "what is final stays");
    let states: Vec<TaskState> = ended.history.iter().map(|(state, _)| *state).collect();
    assert!(states.is_sorted() && states.last() == Some(&TaskState::Failed));
}

#[test]
fn nodes_are_removed_with_care() {
    let mut bench = Bench::with_nodes(2);
    let (manager, worker) = (node_id(1), node_id(2));
    let web = bench.create_service(1, service("web", 2, &[]));
    bench.run();
    let remove = |id, force| Command::RemoveNode { id, force };
    assert_eq!(
        text(bench.apply(remove(worker, false))),
        format!("node {worker} is not down and can't be removed")
    );
    assert!(text(bench.apply(remove(manager, true))).contains("last manager"));
    let version = bench.store.nodes[&manager].meta.version;
    let demote = Command::UpdateNode { id: manager, version, spec: NodeSpec::default() };
    assert_eq!(text(bench.apply(demote)), "attempting to demote the last manager of the swarm");
    bench.node_state(2, NodeState::Down);
    bench.apply(remove(worker, false)).unwrap();
    assert_eq!(bench.store.local_gateways.keys().collect::<Vec<_>>(), [&manager]);
    bench.run();
    assert_eq!(bench.running(web), 2);
    bench.apply(Command::AddNode(Box::new(new_node(3, Role::Worker)))).unwrap();
    assert_eq!(bench.store.nodes[&node_id(3)].number.get(), 3, "numbers are not reused");
}

#[test]
fn managers_that_were_removed_have_no_voice() {
    let mut bench = Bench::with_nodes(1);
    let (known, unheard_of) = (node_id(2), node_id(3));
    assert!(bench.store.may_be_manager(unheard_of));
    bench.apply(Command::AddNode(Box::new(new_node(2, Role::Manager)))).unwrap();
    assert!(bench.store.may_be_manager(known));
    bench.apply(Command::RemoveNode { id: known, force: true }).unwrap();
    assert!(!bench.store.may_be_manager(known));
    bench.apply(Command::AddNode(Box::new(new_node(4, Role::Worker)))).unwrap();
    assert!(!bench.store.may_be_manager(node_id(4)));
}

#[test]
fn roles_change_and_a_demoted_manager_has_no_voice() {
    let mut bench = Bench::with_nodes(2);
    let (first, second) = (node_id(1), node_id(2));
    let change = |bench: &mut Bench, id, role| {
        let version = bench.store.nodes[&id].meta.version;
        let spec = NodeSpec { role, ..bench.store.nodes[&id].spec.clone() };
        bench.apply(Command::UpdateNode { id, version, spec })
    };
    assert_eq!(bench.store.nodes[&second].voter().get(), 2);
    change(&mut bench, second, Role::Manager).unwrap();
    assert!(bench.store.may_be_manager(second));
    // None of the voters that an old log knows.
    assert_eq!(bench.store.nodes[&second].voter().get(), 3);
    assert_eq!(bench.store.nodes[&second].number.get(), 2);
    change(&mut bench, first, Role::Worker).unwrap();
    assert!(!bench.store.may_be_manager(first));
    let last = change(&mut bench, second, Role::Worker);
    assert_eq!(text(last), "attempting to demote the last manager of the swarm");
    // Not even after it was removed, with a certificate of a manager.
    bench.apply(Command::RemoveNode { id: first, force: true }).unwrap();
    assert!(!bench.store.may_be_manager(first));
    bench.apply(Command::AddNode(Box::new(new_node(3, Role::Worker)))).unwrap();
    change(&mut bench, node_id(3), Role::Manager).unwrap();
    change(&mut bench, node_id(3), Role::Worker).unwrap();
    change(&mut bench, node_id(3), Role::Manager).unwrap();
    assert!(bench.store.may_be_manager(node_id(3)));
    assert_eq!(bench.store.nodes[&node_id(3)].voter().get(), 6);
    let removed = bench.store.cluster.as_ref().map(|cluster| cluster.removed_managers.clone());
    assert_eq!(removed, Some(vec![first]));
}

#[test]
fn settings_of_the_cluster_change_but_not_its_addresses() {
    let mut bench = Bench::with_nodes(1);
    let cluster = bench.store.cluster.clone().unwrap();
    let (version, spec) = (cluster.meta.version, cluster.spec);
    let update = |version, spec| Command::UpdateCluster { version, spec: Box::new(spec) };
    let other = ClusterSpec { data_path_port: 5000, ..spec.clone() };
    assert!(text(bench.apply(update(version, other))).contains("data path port"));
    let changed = ClusterSpec { task_history: 1, certificate_secs: 7200, ..spec.clone() };
    bench.apply(update(version, changed.clone())).unwrap();
    assert_eq!(bench.store.cluster.as_ref().unwrap().spec, changed);
    assert_eq!(bench.apply(update(version, spec)), Err(Rejection::OutOfSequence));
}

#[test]
fn a_decision_made_twice_does_no_harm() {
    let mut bench = Bench::with_nodes(1);
    let web = bench.create_service(1, service("web", 1, &[]));
    let create = |bits| TaskChange::Create {
        id: mesh_types::TaskId::from_bits(bits),
        service: web,
        slot: Some(1),
        node: None,
        desired: TaskState::Running,
        start_at_ms: None,
        replaces: None,
    };
    bench.apply(Command::ChangeTasks(vec![create(1), create(2)])).unwrap();
    bench.apply(Command::ChangeTasks(vec![create(3)])).unwrap();
    assert_eq!(bench.live(web).len(), 1);
    let unknown = mesh_types::TaskId::from_bits(99);
    let delete = TaskChange::Delete { id: unknown };
    bench.apply(Command::ChangeTasks(vec![delete])).unwrap();
}

#[test]
fn the_operator_changes_a_node() {
    let mut bench = Bench::with_nodes(2);
    let spec = NodeSpec { availability: Availability::Drain, ..NodeSpec::default() };
    let version = bench.store.nodes[&node_id(2)].meta.version;
    bench.apply(Command::UpdateNode { id: node_id(2), version, spec: spec.clone() }).unwrap();
    let again = Command::UpdateNode { id: node_id(2), version: Revision::MIN, spec };
    assert_eq!(bench.apply(again), Err(Rejection::OutOfSequence));
}

/// Whoever may join must not do so in the name of one that is there.
#[test]
fn an_address_is_one_nodes() {
    let mut bench = Bench::with_nodes(2);
    let mut same = |change: &dyn Fn(&mut crate::command::NewNode)| {
        let mut new = new_node(9, Role::Worker);
        change(&mut new);
        bench.apply(Command::AddNode(Box::new(new)))
    };
    let address = std::net::IpAddr::from([192, 0, 2, 2]);
    for refused in
        [same(&|new| new.vtep = address), same(&|new| new.address = (address, 7000).into())]
    {
        assert!(matches!(refused, Err(Rejection::Precondition(why)) if why.contains("192.0.2")));
    }
    // The machine itself, once its old self is known to be gone.
    bench.node_state(2, NodeState::Down);
    let mut new = new_node(9, Role::Worker);
    new.vtep = address;
    bench.apply(Command::AddNode(Box::new(new))).unwrap();
}
