//! The stock `docker` CLI against the API. Without it on PATH these tests say so and pass.

use std::process::Stdio;

use tokio::process::Command;

use super::Server;

struct Cli<'a>(&'a Server);

impl Cli<'_> {
    /// Exit status, standard output, standard error.
    async fn run(&self, line: &str) -> (i32, String, String) {
        let mut command = Command::new("docker");
        command
            .arg("-H")
            .arg(format!("unix://{}", self.0.dir.join("sock").display()))
            .args(line.split_whitespace())
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONTEXT")
            .env("DOCKER_CONFIG", &self.0.dir)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(std::time::Duration::from_secs(60), command.output())
            .await
            .unwrap_or_else(|_| panic!("docker {line}: no end after 60 s"))
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// Standard output of a command that has to succeed.
    async fn ok(&self, line: &str) -> String {
        let (code, out, err) = self.run(line).await;
        assert_eq!(code, 0, "docker {line}: {out}{err}");
        out.trim().to_owned()
    }

    /// What the daemon said to a command that has to fail.
    async fn fails(&self, line: &str) -> String {
        let (code, out, err) = self.run(line).await;
        assert_eq!(code, 1, "docker {line}: {out}{err}");
        err.trim().to_owned()
    }
}

async fn installed() -> bool {
    let found = Command::new("docker").arg("--version").output().await.is_ok();
    if !found {
        eprintln!("skipped: there is no docker CLI on PATH");
    }
    found
}

const PROCESS: &str = "--container-label mesh.runtime=process";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swarm_and_node_verbs() {
    if !installed().await {
        return;
    }
    let server = Server::start("stock-swarm");
    let docker = Cli(&server);
    assert!(docker.ok("info").await.contains("Swarm: inactive"));
    assert!(docker.fails("node ls").await.contains("This node is not a swarm manager."));
    let out = docker.ok("swarm init --advertise-addr 192.0.2.11").await;
    assert!(out.contains("is now a manager"), "{out}");
    assert!(out.contains("docker swarm join --token SWMTKN-1-"), "{out}");
    assert!(docker.fails("swarm init").await.contains("already part of a swarm"));
    let token = docker.ok("swarm join-token -q worker").await;
    assert!(token.starts_with("SWMTKN-1-"), "{token}");
    let rotated = docker.ok("swarm join-token --rotate -q worker").await;
    assert_ne!(token, rotated);
    assert!(docker.ok("swarm join-token manager").await.contains("192.0.2.11:2377"));
    let nodes = docker.ok("node ls").await;
    assert!(nodes.contains("m1") && nodes.contains("Leader") && nodes.contains('*'), "{nodes}");
    assert_eq!(docker.ok("node inspect self --format {{.Description.Hostname}}").await, "m1");
    assert_eq!(docker.ok("node update --availability drain --label-add a=b m1").await, "m1");
    assert_eq!(docker.ok("node inspect m1 --format {{.Spec.Availability}}").await, "drain");
    assert_eq!(
        docker.ok("node update --availability pause --label-rm a --label-add c=d m1").await,
        "m1"
    );
    let spec = docker.ok("node inspect m1 --format {{.Spec.Availability}}{{.Spec.Labels}}").await;
    assert_eq!(spec, "pausemap[c:d]");
    assert!(docker.ok("node ls").await.contains("Pause"));
    assert!(docker.ok("node ps self").await.contains("DESIRED STATE"));
    let refused = docker.fails("node rm m1").await;
    assert!(refused.contains("last manager of the swarm"), "{refused}");
    assert!(docker.ok("node inspect --pretty m1").await.contains("Hostname"));
    assert!(docker.fails("node demote m1").await.contains("demote the last manager"));
    assert!(docker.ok("node promote m1").await.contains("is already a manager"));
    let version = docker.ok("version").await;
    assert!(version.contains("1.51 (minimum version 1.24)"), "{version}");
    assert!(docker.ok("info").await.contains("Managers: 1"));
    assert!(docker.fails("swarm leave").await.contains("--force"));
    docker.ok("swarm leave --force").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn network_verbs() {
    if !installed().await {
        return;
    }
    let server = Server::manager("stock-network").await;
    let docker = Cli(&server);
    let id = docker
        .ok("network create -d overlay --subnet 10.99.0.0/24 --gateway 10.99.0.254 \
             --ip-range 10.99.0.128/25 --opt com.docker.network.driver.mtu=1400 --attachable \
             --internal --label a=b app")
        .await;
    assert_eq!(id.len(), 25);
    let config = docker.ok("network inspect app --format {{.IPAM.Config}}").await;
    assert!(config.contains("10.99.0.0/24") && config.contains("10.99.0.254"), "{config}");
    assert!(docker.ok("network ls").await.contains("app"));
    assert_eq!(docker.ok("network ls -q --no-trunc --filter name=app").await, id);
    assert!(docker.ok("network inspect -v app").await.contains("\"Services\""));
    assert!(docker.fails("network create -d overlay app").await.contains("already exists"));
    let refused = docker.fails("network create -d overlay --opt encrypted e").await;
    assert!(refused.contains("--opt encrypted"), "{refused}");
    assert!(docker.fails("network create x").await.contains("--driver overlay"));
    assert_eq!(docker.ok("network rm app").await, "app");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn service_verbs() {
    if !installed().await {
        return;
    }
    let server = Server::manager("stock-service").await;
    let docker = Cli(&server);
    docker.ok("network create -d overlay app").await;
    let out = docker
        .ok(&format!(
            "service create --name web --replicas 2 --publish 8080:80 --network app --env A=b \
             --label l=1 --hostname h --restart-delay 1s --restart-condition on-failure \
             --stop-grace-period 3s --stop-signal SIGINT --no-resolve-image {PROCESS} host meshctl \
             whoami --http 80"
        ))
        .await;
    assert!(out.contains("converged"), "{out}");
    let table = docker.ok("service ls").await;
    assert!(table.contains("2/2") && table.contains("*:8080->80/tcp"), "{table}");
    let tasks = docker.ok("service ps web").await;
    assert_eq!(tasks.matches("Running").count(), 4, "{tasks}");
    assert!(tasks.contains("web.1") && tasks.contains("m1"), "{tasks}");
    let pretty = docker.ok("service inspect --pretty web").await;
    assert!(pretty.contains("Replicas:\t2") && pretty.contains("PublishedPort = 8080"), "{pretty}");
    let out = docker.ok("service scale web=3").await;
    assert!(out.contains("web scaled to 3") && out.contains("converged"), "{out}");
    docker.ok("service update -d --env-add X=y web").await;
    let env =
        docker.ok("service inspect web --format {{.Spec.TaskTemplate.ContainerSpec.Env}}").await;
    // The client puts them in any order.
    assert!(["[A=b X=y]", "[X=y A=b]"].contains(&env.as_str()), "{env}");
    let spec = async |path: &str| {
        docker.ok(&format!("service inspect web --format {{{{.Spec.{path}|json}}}}")).await
    };
    let before = spec("TaskTemplate.ForceUpdate").await.parse::<u64>().unwrap();
    docker
        .ok("service update -d --force --update-order start-first --update-parallelism 2 \
             --update-delay 1s --update-monitor 2s --update-max-failure-ratio 0.25 \
             --update-failure-action rollback --rollback-parallelism 0 \
             --constraint-add node.hostname==m1 --args true web")
        .await;
    let update = spec("UpdateConfig").await;
    let expected = r#"{"Parallelism":2,"Delay":1000000000,"FailureAction":"rollback","#;
    assert!(update.starts_with(expected), "{update}");
    assert!(update.contains(r#""MaxFailureRatio":0.25"#), "{update}");
    assert!(update.ends_with(r#""Order":"start-first"}"#), "{update}");
    assert!(spec("RollbackConfig").await.starts_with(r#"{"Parallelism":0,"#));
    let task = spec("TaskTemplate").await;
    assert!(task.contains(r#""Constraints":["node.hostname==m1"]"#), "{task}");
    assert!(task.contains(r#""Args":["true"]"#), "{task}");
    assert!(task.contains(&format!(r#""ForceUpdate":{}"#, before + 1)), "{task}");
    let pretty = docker.ok("service inspect --pretty web").await;
    assert!(pretty.contains("[node.hostname==m1]"), "{pretty}");
    docker.ok("service update -d --constraint-rm node.hostname==m1 --env-rm X web").await;
    assert!(!spec("TaskTemplate").await.contains("node.hostname"));
    docker.ok("service update -d --env-rm A --env-add X=y web").await;
    let refused = docker.fails("service update -d --constraint-add node.mood==good web").await;
    assert!(refused.contains("constraint `node.mood==good`"), "{refused}");
    let out = docker.ok("service update --replicas 1 --update-monitor 1s web").await;
    assert!(out.contains("converged"), "{out}");
    docker.ok("service update -d --env-rm X --env-add A=b web").await;
    docker.ok("service update -d --env-add X=y web").await;
    let out = docker.ok("service rollback web").await;
    assert!(out.contains("rollback: manually requested rollback"), "{out}");
    assert!(out.contains("converged"), "{out}");
    let env =
        docker.ok("service inspect web --format {{.Spec.TaskTemplate.ContainerSpec.Env}}").await;
    assert_eq!(env, "[A=b]");
    // This backend runs no leader that would end it.
    let state = docker.ok("service inspect web --format {{.UpdateStatus.State}}").await;
    assert_eq!(state, "rollback_started");
    let out =
        docker.ok(&format!("service create --mode global --name g {PROCESS} host true")).await;
    assert!(out.contains("converged"), "{out}");
    let taken = docker
        .fails(&format!("service create -d --publish 8080:80 --name other {PROCESS} host true"))
        .await;
    assert!(taken.contains("port '8080' is already in use by service"), "{taken}");
    for (flags, word) in [
        ("--mount type=volume,source=a,target=/a", "--mount"),
        ("--limit-memory 1M", "at least 4MiB"),
        ("--generic-resource gpu=1", "--generic-resource"),
        ("--constraint node.mood==good", "node.mood"),
        ("--health-cmd true", "--health"),
        ("--mode replicated-job", "replicated-job"),
        ("--publish mode=host,target=80", "mode=host"),
        ("--user nobody", "--user"),
    ] {
        let line = format!("service create -d --name no {flags} {PROCESS} host true");
        let refused = docker.fails(&line).await;
        assert!(refused.contains(word), "{flags}: {refused}");
    }
    let refused = docker.fails("service create -d --name no nginx").await;
    assert!(refused.contains("mesh.runtime=process"), "{refused}");
    assert_eq!(docker.ok("service rm web g").await, "web\ng");
    assert!(docker.fails("service inspect nosuch").await.contains("no such service: nosuch"));
}

/// With too few managers for a majority every change is refused, at once and with the remedy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_verbs() {
    if !installed().await {
        return;
    }
    let server = Server::manager("stock-logs").await;
    let docker = Cli(&server);
    docker.ok(&format!("service create --name web --quiet {PROCESS} host sleep 60")).await;
    let logs = docker.ok("service logs --timestamps web").await;
    assert!(logs.starts_with("1970-01-01T00:00:01.000000000Z web.1."), "{logs}");
    assert!(logs.ends_with("@m1    | one"), "{logs}");
    assert_eq!(docker.ok("service logs --raw web.1").await, "one");
    assert_eq!(docker.run("service logs --raw web").await.2, "two\n");
    assert!(docker.fails("service logs nosuch").await.contains("no such task or service"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_says_that_it_has_no_leader() {
    if !installed().await {
        return;
    }
    let server = Server::manager("stock-minority").await;
    let docker = Cli(&server);
    docker.ok(&format!("service create -d --name web {PROCESS} host true")).await;
    docker.ok("network create -d overlay app").await;
    server.fake.set_leaderless(true);
    let start = std::time::Instant::now();
    let create = format!("service create -d --name other {PROCESS} host true");
    let lines = [
        create.as_str(),
        "service update -d --force web",
        "service scale -d web=2",
        "service rm web",
        "network create -d overlay other",
        "network rm app",
        "node update --availability drain m1",
        "node rm m1",
    ];
    for line in lines {
        let said = docker.fails(line).await;
        assert!(said.contains("The swarm does not have a leader."), "{line}: {said}");
    }
    let each = start.elapsed() / u32::try_from(lines.len()).unwrap();
    assert!(each < std::time::Duration::from_secs(5), "{each:?} each");
    server.fake.set_leaderless(false);
    assert_eq!(docker.ok("service ls -q").await.lines().count(), 1);
}
