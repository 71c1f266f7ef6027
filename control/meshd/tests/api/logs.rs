//! Output of tasks, as frames.

use std::time::Duration;

use serde_json::json;

use super::{Server, http, message, web};

/// Stream and payload of each frame.
fn frames(mut body: &[u8]) -> Vec<(u8, String)> {
    let mut frames = Vec::new();
    while let Some(([stream, 0, 0, 0, length @ ..], rest)) = body.split_first_chunk::<8>() {
        let (payload, rest) = rest.split_at(u32::from_be_bytes(*length) as usize);
        frames.push((*stream, String::from_utf8_lossy(payload).into_owned()));
        body = rest;
    }
    assert!(body.is_empty(), "torn: {body:?}");
    frames
}

impl Server {
    /// A manager with a service of two tasks that run.
    async fn two(name: &str) -> Self {
        let server = Self::manager(name).await;
        let mut spec = web("web");
        spec["Mode"] = json!({"Replicated": {"Replicas": 2}});
        let (status, _) = server.post("/services/create", spec).await;
        assert_eq!(status, 201);
        for _ in 0..500 {
            let (_, tasks) = server.get("/tasks").await;
            let running = |task: &&serde_json::Value| task["Status"]["State"] == "running";
            if tasks.as_array().unwrap().iter().filter(running).count() == 2 {
                return server;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the tasks do not run");
    }

    async fn logs(&self, path: &str) -> Vec<(u8, String)> {
        let answer = http::send(&self.dir, "GET", path, "", Vec::new()).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        let kind = "application/vnd.docker.multiplexed-stream";
        assert_eq!(answer.header("content-type"), kind);
        frames(&answer.body)
    }
}

#[tokio::test]
async fn lines_of_all_tasks_come_by_their_times() {
    let server = Server::two("logs").await;
    let all = server.logs("/services/web/logs?stdout=1&stderr=1&tail=all").await;
    let line = |stream, text: &str| (stream, text.to_owned());
    let expected = [line(1, "one\n"), line(1, "one\n"), line(2, "two\n"), line(2, "two\n")];
    assert_eq!(all, expected);
    let errors = server.logs("/services/web/logs?stderr=1&timestamps=1&since=1.5").await;
    let expected = line(2, "1970-01-01T00:00:02.000000000Z two\n");
    assert_eq!(errors, [expected.clone(), expected]);
}

#[tokio::test]
async fn details_say_whose_a_line_is() {
    let server = Server::two("logs-details").await;
    let (_, tasks) = server.get("/tasks").await;
    let id = tasks[0]["ID"].as_str().unwrap();
    for name in [id.to_owned(), format!("web.{}", tasks[0]["Slot"])] {
        let path = format!("/tasks/{name}/logs?stdout=1&details=1&timestamps=1");
        let text = format!(
            "1970-01-01T00:00:01.000000000Z com.docker.swarm.node.id={},\
             com.docker.swarm.service.id={},com.docker.swarm.task.id={id} one\n",
            tasks[0]["NodeID"].as_str().unwrap(),
            tasks[0]["ServiceID"].as_str().unwrap(),
        );
        assert_eq!(server.logs(&path).await, [(1, text)]);
    }
}

#[tokio::test]
async fn who_follows_gets_each_line_once_and_the_end() {
    let server = Server::two("logs-follow").await;
    let (_, tasks) = server.get("/tasks").await;
    // The stand-in breaks the stream off again and again: it is taken up where it was.
    let path = format!("/tasks/{}/logs?stdout=1&follow=1", tasks[0]["ID"].as_str().unwrap());
    let told = server.logs(&path);
    let removed = async {
        tokio::time::sleep(Duration::from_millis(1200)).await;
        server.json("DELETE", "/services/web", None).await
    };
    let both = async { tokio::join!(told, removed) };
    let (told, _) = tokio::time::timeout(Duration::from_secs(10), both).await.unwrap();
    assert_eq!(told, [(1, "one\n".to_owned()), (1, "three\n".to_owned())]);
}

#[tokio::test]
async fn bad_requests_are_refused_before_the_stream() {
    let server = Server::two("logs-bad").await;
    for (query, status, words) in [
        ("", 400, "at least one stream"),
        ("?stdout=1&tail=some", 400, "tail"),
        ("?stdout=1&tail=-1", 400, "tail"),
        ("?stdout=1&since=x", 400, "since"),
        ("?stdout=1&until=5", 501, "until"),
    ] {
        let (got, answer) = server.get(&format!("/services/web/logs{query}")).await;
        assert_eq!(got, status, "{query}: {answer}");
        assert!(message(&answer).contains(words), "{query}: {answer}");
    }
    for path in ["/services/nosuch/logs?stdout=1", "/tasks/nosuch/logs?stdout=1"] {
        let (status, answer) = server.get(path).await;
        assert_eq!(status, 404, "{answer}");
        assert!(message(&answer).contains("nosuch not found"), "{answer}");
    }
}
