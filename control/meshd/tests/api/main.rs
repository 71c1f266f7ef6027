//! The API end to end: the real HTTP server on a unix socket over a store without raft, spoken to
//! by a plain HTTP client and, where it is installed, by the stock `docker` CLI. It proves the
//! forms and the words of the API; it cannot prove what the daemon behind it does.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod fake;
mod http;
mod limits;
mod logs;
mod stock;

use std::{path::PathBuf, sync::Arc, time::Duration};

use fake::Fake;
use serde_json::{Value, json};
use tokio::net::UnixListener;

/// A server in a directory of its own; gone when dropped.
struct Server {
    fake: Arc<Fake>,
    dir: PathBuf,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Server {
    fn start(name: &str) -> Self {
        Self::limited(name, meshd::api::Limits::default())
    }

    fn limited(name: &str, limits: meshd::api::Limits) -> Self {
        let dir = std::env::temp_dir().join(format!("mesh-api-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("sock")).unwrap();
        let fake = Arc::new(Fake::default());
        let (server, ticker) = (fake.clone(), fake.clone());
        let serve = tokio::spawn(async move {
            meshd::api::serve(listener, limits, server).await.unwrap();
        });
        let tick = tokio::spawn(async move {
            let mut interval = tokio::time::interval(Duration::from_millis(20));
            loop {
                interval.tick().await;
                ticker.tick();
            }
        });
        Self { fake, dir, tasks: vec![serve, tick] }
    }

    /// A server whose node has made a cluster.
    async fn manager(name: &str) -> Self {
        let server = Self::start(name);
        let (status, _) = server.post("/swarm/init", json!({"ListenAddr": "0.0.0.0:2377"})).await;
        assert_eq!(status, 200);
        server
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.json("GET", path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.json("POST", path, Some(body)).await
    }

    async fn json(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let answer = http::send(&self.dir, method, path, "application/json", body).await;
        (answer.status, serde_json::from_slice(&answer.body).unwrap_or_default())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A process service as the stock CLI sends it.
fn web(name: &str) -> Value {
    json!({
        "Name": name, "Labels": {"tier": "front"},
        "TaskTemplate": {
            "ContainerSpec": {
                "Image": "host", "Labels": {"mesh.runtime": "process"},
                "Args": ["meshctl", "whoami"], "DNSConfig": {},
            },
            "Resources": {"Limits": {}, "Reservations": {}}, "Placement": {}, "ForceUpdate": 0,
        },
        "Mode": {"Replicated": {}},
        "EndpointSpec": {"Mode": "vip"},
    })
}

fn message(answer: &Value) -> &str {
    answer["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn ping_names_versions_and_membership() {
    let server = Server::start("ping");
    for method in ["GET", "HEAD"] {
        let answer = http::send(&server.dir, method, "/_ping", "", Vec::new()).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("api-version"), "1.51");
        assert_eq!(answer.header("ostype"), "linux");
        assert_eq!(answer.header("swarm"), "inactive");
        assert_eq!(answer.header("docker-experimental"), "false");
        assert_eq!(answer.header("content-type").split(';').next(), Some("text/plain"));
        assert_eq!(answer.body, if method == "GET" { b"OK".to_vec() } else { Vec::new() });
    }
    server.post("/swarm/init", json!({})).await;
    let answer = http::send(&server.dir, "HEAD", "/_ping", "", Vec::new()).await;
    assert_eq!(answer.header("swarm"), "active/manager");
}

#[tokio::test]
async fn paths_go_with_every_known_version() {
    let server = Server::start("versions");
    for path in ["/info", "/v1.24/info", "/v1.51/info", "/v1.50/version", "/version"] {
        assert_eq!(server.get(path).await.0, 200, "{path}");
    }
    let (status, answer) = server.get("/v1.99/info").await;
    let words = "client version 1.99 is too new. Maximum supported API version is 1.51";
    assert_eq!((status, message(&answer)), (400, words));
    let old = http::send(&server.dir, "GET", "/v1.12/info", "", Vec::new()).await;
    assert_eq!(old.status, 400);
    assert!(old.header("content-type").starts_with("text/plain"));
    assert!(String::from_utf8_lossy(&old.body).contains("Minimum supported API version is 1.24"));
    for (method, path) in [("GET", "/nosuch"), ("DELETE", "/info"), ("PUT", "/v1.51/services")] {
        let (status, answer) = server.json(method, path, None).await;
        assert_eq!((status, message(&answer)), (404, "page not found"), "{method} {path}");
    }
}

#[tokio::test]
async fn a_node_outside_says_what_to_do() {
    let server = Server::start("outside");
    for path in ["/nodes", "/services", "/tasks", "/swarm", "/services/x", "/nodes/x"] {
        let (status, answer) = server.get(path).await;
        assert_eq!(status, 503, "{path}");
        assert!(message(&answer).starts_with("This node is not a swarm manager. Use"), "{path}");
    }
    assert_eq!(server.get("/networks").await, (200, json!([])));
    let overlay = json!({"Name": "app", "Driver": "overlay"});
    assert_eq!(server.post("/networks/create", overlay).await.0, 403);
    let (status, answer) = server.post("/swarm/leave", json!({})).await;
    assert_eq!((status, message(&answer)), (503, "This node is not part of a swarm"));
    let (_, info) = server.get("/info").await;
    let swarm = json!({"NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive",
        "ControlAvailable": false, "Error": "", "RemoteManagers": null});
    assert_eq!(info["Swarm"], swarm);
    assert_eq!(server.get("/mesh/status").await.1["State"], "inactive");
}

#[tokio::test]
async fn joining_takes_the_right_token() {
    let server = Server::start("join");
    let join = |token: &str| json!({"RemoteAddrs": ["192.0.2.11:2377"], "JoinToken": token});
    let (status, answer) = server.post("/swarm/join", join("SWMTKN-1-wrong")).await;
    assert_eq!((status, message(&answer)), (500, "invalid join token"));
    let (status, _) = server.post("/swarm/join", json!({"JoinToken": fake::TOKEN})).await;
    assert_eq!(status, 400);
    assert_eq!(server.post("/swarm/join", join(fake::TOKEN)).await.0, 200);
    let (status, answer) = server.post("/swarm/join", join(fake::TOKEN)).await;
    assert_eq!(status, 503);
    assert!(message(&answer).starts_with("This node is already part of a swarm."));
    let (status, answer) = server.get("/nodes").await;
    assert_eq!(status, 503);
    assert!(message(&answer).contains("Worker nodes can't be used to view"));
    assert_eq!(server.get("/networks").await, (200, json!([])));
    assert_eq!(server.post("/swarm/leave", json!({})).await.0, 200);
}

#[tokio::test]
async fn a_cluster_without_leader_says_so() {
    let server = Server::manager("leaderless").await;
    server.fake.set_leaderless(true);
    for (method, path) in [("GET", "/services"), ("GET", "/swarm"), ("DELETE", "/services/x")] {
        let (status, answer) = server.json(method, path, None).await;
        assert_eq!(status, 503, "{path}");
        assert!(message(&answer).starts_with("The swarm does not have a leader."), "{path}");
    }
    let (status, info) = server.get("/info").await;
    assert_eq!((status, &info["Swarm"]["LocalNodeState"]), (200, &json!("active")));
    assert!(info["Swarm"]["Error"].as_str().unwrap().contains("does not have a leader"));
    server.fake.set_leaderless(false);
    assert_eq!(server.get("/services").await, (200, json!([])));
}

#[tokio::test]
async fn bad_bodies_are_refused_before_they_matter() {
    let server = Server::manager("bodies").await;
    let path = "/services/create";
    let send =
        |content: &'static str, body: Vec<u8>| http::send(&server.dir, "POST", path, content, body);
    for body in ["{", "[]", "\"x\"", "{\"Name\": 1}", "nul", "{}x"] {
        let answer = send("application/json", body.into()).await;
        assert_eq!(answer.status, 400, "{body}");
        assert!(answer.text().contains("invalid JSON: "), "{body}: {}", answer.text());
    }
    let answer = send("application/json", Vec::new()).await;
    assert!(answer.text().contains("got EOF while reading request body"));
    let answer = send("text/plain", b"{}".to_vec()).await;
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("unsupported Content-Type header (text/plain)"));
    let answer = send("application/json", vec![b' '; (4 << 20) + 1]).await;
    assert_eq!(answer.status, 413);
    assert!(answer.text().contains("request body too large"));
    let deep = "[".repeat(100_000);
    let answer = send("application/json", format!("{{\"Name\":{deep}").into_bytes()).await;
    assert_eq!(answer.status, 400);
    assert_eq!(server.get("/services").await, (200, json!([])));
}

#[tokio::test]
async fn services_run_through_their_life() {
    let server = Server::manager("life").await;
    let (status, created) = server.post("/v1.50/services/create", web("web")).await;
    assert_eq!(status, 201, "{created}");
    let id = created["ID"].as_str().unwrap().to_owned();
    assert_eq!(id.len(), 25);

    let (status, answer) = server.post("/services/create", web("web")).await;
    assert_eq!(status, 409);
    let words = "name conflicts with an existing object: service web already exists";
    assert!(message(&answer).ends_with(words));

    let (_, service) = server.get("/services/web?insertDefaults=false").await;
    let mut echoed = web("web");
    echoed["Mode"]["Replicated"]["Replicas"] = json!(1);
    assert_eq!(service["Spec"], echoed);
    assert_eq!(service["Endpoint"], json!({"Spec": {}}));
    let (_, full) = server.get(&format!("/services/{}?insertDefaults=true", &id[..8])).await;
    assert_eq!(full["Spec"]["TaskTemplate"]["RestartPolicy"]["Condition"], "any");

    let version = service["Version"]["Index"].as_u64().unwrap();
    let mut spec = echoed.clone();
    spec["Mode"]["Replicated"]["Replicas"] = json!(3);
    let update = |version: String| format!("/services/{id}/update?version={version}");
    let (status, answer) = server.post(&update(String::new()), spec.clone()).await;
    assert_eq!(status, 400);
    assert!(message(&answer).starts_with("invalid service version ''"));
    let (status, answer) = server.post(&update("1".into()), spec.clone()).await;
    assert_eq!(status, 500);
    assert_eq!(message(&answer), "rpc error: code = Unknown desc = update out of sequence");
    assert_eq!(server.post(&update(version.to_string()), spec).await.0, 200);

    let up = || async {
        let (_, list) = server.get("/services?status=true").await;
        list[0]["ServiceStatus"].clone()
    };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while up().await != json!({"RunningTasks": 3, "DesiredTasks": 3, "CompletedTasks": 0}) {
        assert!(tokio::time::Instant::now() < deadline, "{}", up().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    assert_eq!(server.json("DELETE", "/services/web", None).await.0, 200);
    let (status, answer) = server.json("DELETE", "/services/nosuch", None).await;
    assert_eq!((status, message(&answer)), (404, "service nosuch not found"));
}

#[tokio::test]
async fn tasks_are_filtered_by_the_server() {
    let server = Server::manager("tasks").await;
    server.post("/services/create", web("a")).await;
    server.post("/services/create", web("b")).await;
    let tasks = |filters: Value| {
        let text = filters.to_string().replace('"', "%22").replace('{', "%7B").replace('}', "%7D");
        let path = format!("/tasks?filters={text}");
        let server = &server;
        async move { server.get(&path).await }
    };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let all = loop {
        let (_, all) = tasks(json!({})).await;
        let running = |all: &Value| {
            all.as_array().unwrap().iter().filter(|t| t["Status"]["State"] == "running").count()
        };
        if running(&all) == 2 {
            break all;
        }
        assert!(tokio::time::Instant::now() < deadline, "{all}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(all[0]["Spec"]["ContainerSpec"]["Image"], "host");
    assert_eq!(all[0]["Status"]["ContainerStatus"]["PID"], 4711);
    let (_, of_a) = tasks(json!({"service": {"a": true}})).await;
    assert_eq!(of_a.as_array().map(Vec::len), Some(1));
    let (_, fresh) = tasks(json!({"service": ["a"], "_up-to-date": {"true": true}})).await;
    assert_eq!(fresh, of_a);
    let (_, stale) = tasks(json!({"service": ["a"], "_up-to-date": {"false": true}})).await;
    assert_eq!(stale, json!([]));
    let (status, answer) = tasks(json!({"service": ["nosuch"]})).await;
    assert_eq!((status, message(&answer)), (404, "service nosuch not found"));
    let (status, answer) = tasks(json!({"desired-state": ["x"]})).await;
    assert_eq!((status, message(&answer)), (500, "Invalid desired-state filter: 'x'"));
    assert_eq!(tasks(json!({"bogus": ["x"]})).await.0, 400);
    let (status, task) = server.get("/tasks/a.1").await;
    assert_eq!((status, &task["ID"]), (200, &of_a[0]["ID"]));
}

#[tokio::test]
async fn networks_are_leased_shown_and_protected() {
    let server = Server::manager("networks").await;
    let create = |body| server.post("/networks/create", body);
    let (status, created) =
        create(json!({"Name": "app", "Driver": "overlay", "CheckDuplicate": true, "IPAM": null}))
            .await;
    assert_eq!(status, 201, "{created}");
    let (status, answer) = create(json!({"Name": "app", "Driver": "overlay"})).await;
    assert_eq!((status, message(&answer)), (409, "network with name app already exists"));
    let encrypted = json!({"Name": "e", "Driver": "overlay", "Options": {"encrypted": ""}});
    assert_eq!(create(encrypted).await.0, 501);
    let (status, answer) = create(json!({"Name": "x", "Driver": "weave"})).await;
    assert_eq!((status, message(&answer)), (404, "plugin \"weave\" not found"));

    let (_, network) = server.get("/networks/app?verbose=true").await;
    assert_eq!(network["Id"], created["Id"]);
    assert_eq!(network["Scope"], "swarm");
    let subnet = network["IPAM"]["Config"][0]["Subnet"].as_str().unwrap();
    assert!(subnet.ends_with("/24"), "{subnet}");
    let overlap =
        json!({"Name": "o", "Driver": "overlay", "IPAM": {"Config": [{"Subnet": subnet}]}});
    assert_eq!(create(overlap).await.0, 400);

    let mut spec = web("web");
    spec["TaskTemplate"]["Networks"] = json!([{"Target": "app", "Aliases": ["w"]}]);
    assert_eq!(server.post("/services/create", spec).await.0, 201);
    let (_, service) = server.get("/services/web").await;
    assert_eq!(service["Spec"]["TaskTemplate"]["Networks"][0]["Target"], created["Id"]);
    let vip = &service["Endpoint"]["VirtualIPs"][0];
    assert_eq!(vip["NetworkID"], created["Id"]);
    assert!(vip["Addr"].as_str().unwrap().ends_with("/24"));

    let (status, answer) = server.json("DELETE", "/networks/app", None).await;
    assert_eq!(status, 400);
    assert!(message(&answer).contains("is in use by"), "{answer}");
    let (status, answer) = server.json("DELETE", "/networks/bridge", None).await;
    assert_eq!(status, 403);
    assert_eq!(message(&answer), "bridge is a pre-defined network and cannot be removed");
    let (status, answer) = server.get("/networks/nosuch").await;
    assert_eq!((status, message(&answer)), (404, "network nosuch not found"));
}

#[tokio::test]
async fn nodes_and_tokens_change_by_version() {
    let server = Server::manager("nodes").await;
    let (_, nodes) = server.get("/nodes").await;
    let node = &nodes[0];
    assert_eq!(node["ManagerStatus"]["Leader"], true);
    let (id, version) = (node["ID"].as_str().unwrap(), node["Version"]["Index"].as_u64().unwrap());
    let update = format!("/nodes/{id}/update?version={version}");
    let spec = |role| json!({"Labels": {"a": "b"}, "Role": role, "Availability": "drain"});
    let refused = server.post(&update, spec("worker")).await;
    assert_eq!(refused.0, 400);
    assert!(message(&refused.1).contains("attempting to demote the last manager"));
    assert_eq!(server.post(&update, spec("manager")).await.0, 200);
    let (_, node) = server.get("/nodes/m1").await;
    assert_eq!(node["Spec"], spec("manager"));

    let (_, before) = server.get("/swarm").await;
    let version = before["Version"]["Index"].as_u64().unwrap();
    let rotate = format!("/swarm/update?version={version}&rotateWorkerToken=true");
    assert_eq!(server.post(&rotate, before["Spec"].clone()).await.0, 200);
    let (_, after) = server.get("/swarm").await;
    assert_ne!(before["JoinTokens"]["Worker"], after["JoinTokens"]["Worker"]);
    assert_eq!(before["JoinTokens"]["Manager"], after["JoinTokens"]["Manager"]);
    assert_eq!(server.post(&rotate, before["Spec"].clone()).await.0, 500);
}

#[tokio::test]
async fn exec_carries_streams_and_status() {
    let server = Server::manager("exec").await;
    server.post("/services/create", web("web")).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while server.get("/tasks/web.1").await.1["Status"]["State"] != "running" {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let path = "/mesh/task/web.1/exec";
    let frames = http::exec(&server.dir, path, json!({"Cmd": ["cat"]}), &[b"hello", b""]).await;
    assert_eq!(frames, [(1, b"hello".to_vec()), (4, 0i32.to_be_bytes().to_vec())]);
    let frames = http::exec(&server.dir, path, json!({"Cmd": ["id", "-u"]}), &[]).await;
    let text = b"id -u\n".to_vec();
    assert_eq!(frames, [(1, text.clone()), (2, text), (4, 3i32.to_be_bytes().to_vec())]);
    let (status, _) = server.post(path, json!({"Cmd": ["id"]})).await;
    assert_eq!(status, 400, "without an upgrade");
    assert_eq!(server.post(path, json!({"Cmd": []})).await.0, 400);
    let (status, answer) = server.post("/mesh/task/nosuch/exec", json!({"Cmd": ["id"]})).await;
    assert_eq!(status, 400, "{answer}");

    let (_, stats) = server.get("/mesh/node/stats").await;
    let guard = json!({"Name": "source_guard", "Value": 7, "Drop": true});
    assert_eq!(stats["Counters"][1], guard);
    let (_, status) = server.get("/mesh/status").await;
    assert_eq!((&status["State"], &status["Nodes"][0]["Name"]), (&json!("active"), &json!("m1")));
}

/// Who connects and says nothing holds up no scraper for long.
#[tokio::test]
async fn metrics_are_served_past_silent_clients() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = meshd::metrics::server::listen(([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = tokio::spawn(meshd::metrics::server::serve(listener, Arc::new(Fake::default())));
    let mut silent = Vec::new();
    for _ in 0..24 {
        silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let mut scraper = tokio::net::TcpStream::connect(address).await.unwrap();
    scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let read = scraper.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(60), read).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("openmetrics-text") && answer.ends_with("# EOF\n"), "{answer}");
    serve.abort();
}
