//! `GET /events`: what happens in the cluster, as it happens, as this manager sees it.
//!
//! A reader keeps its place in the manager's history. One that is slower than the news loses its
//! place there, is told so, and is let go: nothing waits for it, and nothing is kept for it.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    body::Body,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use mesh_api as api;
use mesh_control::events::{Event, EventKind, EventLog, Forgotten, Number};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    ApiError, Shared,
    logs::unix_ns,
    request::{Filters, Params},
};

/// A manager's history, and how far it is.
#[derive(Debug, Clone)]
pub struct Feed {
    /// The history.
    pub log: Arc<Mutex<EventLog>>,
    /// The number of the next event; closed when this node is no manager any more.
    pub next: watch::Receiver<Number>,
}

/// What Docker's events can be asked for; of what is not here there are none.
const FILTERS: [&str; 15] = [
    "config",
    "container",
    "daemon",
    "event",
    "image",
    "label",
    "network",
    "node",
    "plugin",
    "scope",
    "secret",
    "service",
    "type",
    "volume",
    "task",
];

/// What a client asked for.
struct Wanted {
    filters: Filters,
    since_ns: Option<i64>,
    until_ns: Option<i64>,
}

/// `GET /events`.
pub(super) async fn stream(
    State(backend): State<Shared>,
    params: Params,
) -> Result<Response, ApiError> {
    let filters = params.filters(&FILTERS)?;
    let time = |name: &str| match params.text(name) {
        "" | "0" => Ok(None),
        text => unix_ns(text).map(Some).ok_or_else(|| {
            let message = format!("invalid value for \"{name}\": `{text}` is no Unix time");
            ApiError::bad_request(message)
        }),
    };
    let wanted = Wanted { filters, since_ns: time("since")?, until_ns: time("until")? };
    if let (Some(since), Some(until)) = (wanted.since_ns, wanted.until_ns)
        && since > until
    {
        return Err(ApiError::bad_request("`since` time cannot be after `until` time"));
    }
    let feed = backend.events()?;
    let (sender, receiver) = mpsc::channel(8);
    tokio::spawn(async move {
        // The client went away.
        let _ = follow(feed, &wanted, &sender).await;
    });
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// The client does not listen any more.
struct Gone;

async fn follow(mut feed: Feed, wanted: &Wanted, sender: &mpsc::Sender<Bytes>) -> Result<(), Gone> {
    let send = async |event: &api::Event| {
        let mut line = serde_json::to_vec(event).unwrap_or_default();
        line.push(b'\n');
        sender.send(line.into()).await.map_err(|_| Gone)
    };
    let history = |look: &mut dyn FnMut(&EventLog)| {
        look(&feed.log.lock().unwrap_or_else(PoisonError::into_inner));
    };
    let mut place = 0;
    history(&mut |log| place = if wanted.since_ns.is_some() { log.oldest() } else { log.next() });
    loop {
        let mut events = Ok(Vec::new());
        history(&mut |log| events = log.from(place));
        let events = match events {
            Ok(events) => events,
            Err(Forgotten(count)) => return send(&lost(count)).await,
        };
        for event in &events {
            place += 1;
            if wanted.has(event) {
                send(&shown(event)).await?;
            }
        }
        let now_ns = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
        let left = wanted.until_ns.map(|until| until.saturating_sub(now_ns));
        let left = left.map(|left| Duration::from_nanos(u64::try_from(left).unwrap_or(0)));
        if left == Some(Duration::ZERO) {
            return Ok(());
        }
        let over = async {
            match left {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            news = feed.next.wait_for(|next| *next > place) => {
                if news.is_err() {
                    return Ok(());
                }
            }
            () = over => {}
            () = sender.closed() => return Err(Gone),
        }
    }
}

impl Wanted {
    fn has(&self, event: &Event) -> bool {
        let at_ns = nanos(event.at_ms);
        let name = event.attributes.get("name").map_or("", String::as_str);
        // As Docker, by the beginning of an id or a name; one of an object asks for it alone.
        let is = |wanted: &str| event.id.starts_with(wanted) || name.starts_with(wanted);
        let about = |key: &str, kind: EventKind| {
            self.filters.any(key, |wanted| {
                let of_task = || {
                    event.kind == EventKind::Task
                        && event.attributes.get(key).is_some_and(|of| of.starts_with(wanted))
                };
                (event.kind == kind && is(wanted)) || of_task()
            })
        };
        let elsewhere = ["config", "container", "daemon", "image", "plugin", "secret", "volume"];
        let kind = event.kind.name();
        // Docker has none of these: who wants them says so.
        let task_wanted = || {
            ["type", "task"].iter().any(|key| {
                let values = self.filters.values(key);
                values.is_some_and(|values| *key == "task" || values.contains("task"))
            })
        };
        self.since_ns.is_none_or(|since| at_ns >= since)
            && self.until_ns.is_none_or(|until| at_ns <= until)
            && (event.kind != EventKind::Task || task_wanted())
            && self.filters.any("type", |wanted| wanted == kind)
            && self.filters.any("event", |wanted| wanted == event.action.name())
            && self.filters.any("scope", |wanted| wanted == "swarm")
            && self.filters.labels("label", &event.attributes)
            && about("service", EventKind::Service)
            && about("node", EventKind::Node)
            && about("network", EventKind::Network)
            && about("task", EventKind::Task)
            && elsewhere.iter().all(|key| self.filters.values(key).is_none())
    }
}

fn nanos(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX).saturating_mul(1_000_000)
}

fn shown(event: &Event) -> api::Event {
    let time_nano = nanos(event.at_ms);
    api::Event {
        kind: event.kind.name().into(),
        action: event.action.name().into(),
        actor: api::Actor { id: event.id.clone(), attributes: event.attributes.clone() },
        scope: "swarm".into(),
        time: time_nano / 1_000_000_000,
        time_nano,
    }
}

/// The last thing that a reader hears who was too slow.
fn lost(count: u64) -> api::Event {
    let now = Timestamp::now();
    let why = format!("{count} events were forgotten before they were read: begin again");
    api::Event {
        kind: "daemon".into(),
        action: "lost".into(),
        actor: api::Actor {
            id: String::new(),
            attributes: api::Map::from([("error".to_owned(), why)]),
        },
        scope: "local".into(),
        time: now.as_second(),
        time_nano: i64::try_from(now.as_nanosecond()).unwrap_or(i64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use mesh_control::events::Action;

    use super::*;

    fn event(kind: EventKind, name: &str) -> Event {
        let mut attributes = api::Map::from([("name".to_owned(), name.to_owned())]);
        if kind == EventKind::Task {
            attributes.insert("service".to_owned(), "web".to_owned());
        }
        Event { at_ms: 5_000, kind, action: Action::Create, id: "abc".to_owned(), attributes }
    }

    fn passes(filters: &str, event: &Event) -> bool {
        let filters = Filters::parse(filters, &FILTERS).unwrap();
        Wanted { filters, since_ns: None, until_ns: None }.has(event)
    }

    #[test]
    fn filters_are_dockers_and_tasks_are_asked_for() {
        let (service, node) = (event(EventKind::Service, "web"), event(EventKind::Node, "web"));
        let task = event(EventKind::Task, "web.1.abc");
        let cases = [
            ("", [true, true, false]),
            (r#"{"type":["task"]}"#, [false, false, true]),
            (r#"{"type":["service","task"]}"#, [true, false, true]),
            (r#"{"service":["web"]}"#, [true, false, false]),
            (r#"{"service":["web"],"type":["task"]}"#, [false, false, true]),
            (r#"{"service":["other"],"type":["task"]}"#, [false, false, false]),
            (r#"{"task":["web.1"]}"#, [false, false, true]),
            (r#"{"node":["ab"]}"#, [false, true, false]),
            (r#"{"event":["update"]}"#, [false, false, false]),
            (r#"{"event":["create"],"scope":["swarm"]}"#, [true, true, false]),
            (r#"{"scope":["local"]}"#, [false, false, false]),
            (r#"{"label":["name=web"]}"#, [true, true, false]),
            (r#"{"container":["web"]}"#, [false, false, false]),
        ];
        for (filters, expected) in cases {
            let got = [&service, &node, &task].map(|event| passes(filters, event));
            assert_eq!(got, expected, "{filters}");
        }
    }

    #[test]
    fn times_bound_what_is_shown() {
        let at = |since_ns, until_ns| {
            let wanted = Wanted { filters: Filters::default(), since_ns, until_ns };
            wanted.has(&event(EventKind::Service, "web"))
        };
        let second = 1_000_000_000;
        assert!(at(Some(5 * second), Some(5 * second)) && at(None, None));
        assert!(!at(Some(6 * second), None) && !at(None, Some(4 * second)));
        assert_eq!(shown(&event(EventKind::Node, "n")).time, 5);
    }

    /// Reads nothing while more happens than is kept.
    #[tokio::test]
    async fn a_slow_reader_is_told_and_let_go() {
        let mut log = EventLog::keeping(4);
        let mut store = mesh_control::store::Store::default();
        log.look(&store, 0);
        let (next, watched) = watch::channel(0);
        let feed = Feed { log: Arc::new(Mutex::new(log)), next: watched };
        let (sender, mut receiver) = mpsc::channel(1);
        let wanted = Wanted { filters: Filters::default(), since_ns: None, until_ns: None };
        let following = tokio::spawn({
            let feed = feed.clone();
            async move { follow(feed, &wanted, &sender).await.is_ok() }
        });
        tokio::task::yield_now().await;
        for number in 1..100_u128 {
            add_network(&mut store, number);
            let at = feed.log.lock().unwrap().look(&store, 0);
            next.send(at).unwrap();
            tokio::task::yield_now().await;
        }
        let mut lines = Vec::new();
        while let Some(line) = receiver.recv().await {
            lines.push(String::from_utf8(line.to_vec()).unwrap());
        }
        assert!(following.await.unwrap(), "it ended by itself");
        assert!(lines.len() < 20, "{lines:?}");
        assert!(lines.pop().unwrap().contains("were forgotten before they were read"));
        assert!(lines[0].contains(r#""Type":"node","Action":"create""#), "{lines:?}");
    }

    fn add_network(store: &mut mesh_control::store::Store, number: u128) {
        use mesh_control::{command::*, model::*};
        let revision = store.revision.next().unwrap();
        let command = if number == 1 {
            let first = NewNode {
                id: mesh_types::NodeId::from_bits(1),
                spec: NodeSpec { role: Role::Manager, ..NodeSpec::default() },
                description: NodeDescription::default(),
                address: ([192, 0, 2, 1], 2377).into(),
                vtep: [192, 0, 2, 1].into(),
            };
            Command::Init(Box::new(InitCluster {
                id: mesh_types::ClusterId::from_bits(1),
                spec: ClusterSpec::default(),
                ca_cert_pem: String::new(),
                ca_key_pem: String::new(),
                worker_secret: [1; 16],
                manager_secret: [2; 16],
                gossip_key: [3; 32],
                ingress: mesh_types::NetworkId::from_bits(number),
                first,
            }))
        } else {
            let sent = serde_json::json!({"Name": format!("n{number}"), "Driver": "overlay"});
            let spec = super::super::convert::network::spec(serde_json::from_value(sent).unwrap());
            let id = mesh_types::NetworkId::from_bits(number);
            Command::CreateNetwork { id, spec: spec.unwrap() }
        };
        store.apply(revision, &Proposal { now_ms: 0, command }).unwrap();
    }
}
