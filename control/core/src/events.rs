//! What happened in the cluster, for those who watch: the differences between one look at the
//! store and the next, in a history of bounded length.
//!
//! Every manager makes its own history from its own store, so it begins with the manager's start,
//! and what came and went between two looks is in none. Events are news for people and tools;
//! nothing here depends on them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use mesh_types::{
    NetworkId, NodeId, Revision, ServiceId, TaskId,
    spec::{Labels, ServiceMode},
};

use crate::{
    model::{Meta, Network, Node, Service, Task},
    store::Store,
};

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventKind {
    /// A node.
    Node,
    /// A network.
    Network,
    /// A service.
    Service,
    /// A task.
    Task,
}

impl EventKind {
    /// As clients write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Network => "network",
            Self::Service => "service",
            Self::Task => "task",
        }
    }
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// It was made.
    Create,
    /// It was changed.
    Update,
    /// It is gone.
    Remove,
}

impl Action {
    /// As clients write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Update => "update",
            Self::Remove => "remove",
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When, ms since the epoch: by the clock of whoever proposed it; for what is gone, when that
    /// was seen.
    pub at_ms: u64,
    /// About what.
    pub kind: EventKind,
    /// What became of it.
    pub action: Action,
    /// Its id.
    pub id: String,
    /// `name`, for tasks `service` and `node`, and `THING.old` and `THING.new` of what changed.
    pub attributes: Labels,
}

/// An event's number. They are given in order; one follows the other.
pub type Number = u64;

/// What was seen of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    version: Revision,
    /// What names it.
    about: Labels,
    /// What may change.
    now: BTreeMap<&'static str, String>,
}

/// Events that a reader asked for are forgotten already; so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgotten(pub u64);

/// The latest events.
#[derive(Debug)]
pub struct EventLog {
    /// Nothing is news at the first look.
    looked: bool,
    nodes: BTreeMap<NodeId, Seen>,
    networks: BTreeMap<NetworkId, Seen>,
    services: BTreeMap<ServiceId, Seen>,
    tasks: BTreeMap<TaskId, Seen>,
    events: VecDeque<Arc<Event>>,
    /// The number of the next event.
    next: Number,
    most: usize,
}

impl EventLog {
    /// A history that keeps so many events.
    #[must_use]
    pub fn keeping(most: usize) -> Self {
        Self {
            looked: false,
            nodes: BTreeMap::new(),
            networks: BTreeMap::new(),
            services: BTreeMap::new(),
            tasks: BTreeMap::new(),
            events: VecDeque::new(),
            next: 0,
            most,
        }
    }

    /// Takes in what has changed since the last look; the number of the event to come next.
    pub fn look(&mut self, store: &Store, now_ms: u64) -> Number {
        let mut fresh = Vec::new();
        let out = &mut fresh;
        diff(EventKind::Node, &mut self.nodes, store.nodes.iter(), now_ms, out);
        diff(EventKind::Network, &mut self.networks, store.networks.iter(), now_ms, out);
        diff(EventKind::Service, &mut self.services, store.services.iter(), now_ms, out);
        diff(EventKind::Task, &mut self.tasks, store.tasks.iter(), now_ms, out);
        if std::mem::replace(&mut self.looked, true) {
            fresh.sort_by_key(|event| event.at_ms);
            self.next += fresh.len() as u64;
            self.events.extend(fresh.into_iter().map(Arc::new));
            let excess = self.events.len().saturating_sub(self.most);
            self.events.drain(..excess);
        }
        self.next
    }

    /// The number of the event to come next.
    #[must_use]
    pub fn next(&self) -> Number {
        self.next
    }

    /// The number of the oldest event that is kept.
    #[must_use]
    pub fn oldest(&self) -> Number {
        self.next - self.events.len() as u64
    }

    /// The events from this number on.
    ///
    /// # Errors
    /// When some of them are forgotten.
    pub fn from(&self, number: Number) -> Result<Vec<Arc<Event>>, Forgotten> {
        match number.checked_sub(self.oldest()) {
            None => Err(Forgotten(self.oldest() - number)),
            Some(skip) => {
                let skip = usize::try_from(skip).unwrap_or(usize::MAX);
                Ok(self.events.iter().skip(skip).cloned().collect())
            }
        }
    }
}

/// What events tell of an object.
trait Observed {
    fn meta(&self) -> &Meta;
    fn about(&self) -> Labels;
    fn now(&self) -> BTreeMap<&'static str, String>;
}

/// Tells what became of objects, and remembers how they are. Objects whose version is known are
/// only counted.
fn diff<'a, K: Ord + Copy + ToString + 'a, T: Observed + 'a>(
    kind: EventKind,
    seen: &mut BTreeMap<K, Seen>,
    objects: impl Iterator<Item = (&'a K, &'a T)> + Clone,
    now_ms: u64,
    out: &mut Vec<Event>,
) {
    let mut there = 0;
    for (key, object) in objects.clone() {
        there += 1;
        let meta = object.meta();
        let before = seen.get(key);
        if before.is_some_and(|before| before.version == meta.version) {
            continue;
        }
        let after = Seen { version: meta.version, about: object.about(), now: object.now() };
        let mut attributes = after.about.clone();
        let (action, at_ms) = match before {
            None => (Action::Create, meta.created_ms),
            Some(before) => {
                for (what, new) in &after.now {
                    let old = before.now.get(what).map_or("", String::as_str);
                    if old != new {
                        attributes.insert(format!("{what}.old"), old.to_owned());
                        attributes.insert(format!("{what}.new"), new.clone());
                    }
                }
                (Action::Update, meta.updated_ms)
            }
        };
        out.push(Event { at_ms, kind, action, id: key.to_string(), attributes });
        seen.insert(*key, after);
    }
    if seen.len() == there {
        return;
    }
    let keys: BTreeSet<K> = objects.map(|(key, _)| *key).collect();
    seen.retain(|key, gone| {
        let stays = keys.contains(key);
        if !stays {
            let (action, id) = (Action::Remove, key.to_string());
            let attributes = std::mem::take(&mut gone.about);
            out.push(Event { at_ms: now_ms, kind, action, id, attributes });
        }
        stays
    });
}

fn named(name: &str) -> Labels {
    Labels::from([("name".to_owned(), name.to_owned())])
}

impl Observed for Node {
    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn about(&self) -> Labels {
        named(self.name())
    }

    fn now(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::from([
            ("state", self.status.state.name().to_owned()),
            ("availability", self.spec.availability.name().to_owned()),
            ("role", self.spec.role.name().to_owned()),
        ])
    }
}

impl Observed for Network {
    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn about(&self) -> Labels {
        named(&self.spec.name)
    }

    fn now(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::new()
    }
}

impl Observed for Service {
    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn about(&self) -> Labels {
        named(&self.spec.name)
    }

    fn now(&self) -> BTreeMap<&'static str, String> {
        let mut now = BTreeMap::from([("image", self.spec.task.image.clone())]);
        if let ServiceMode::Replicated { replicas } = self.spec.mode {
            now.insert("replicas", replicas.to_string());
        }
        if let Some(update) = &self.update {
            now.insert("updatestate", update.state.name().to_owned());
        }
        now
    }
}

impl Observed for Task {
    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn about(&self) -> Labels {
        let mut about = named(&self.name());
        about.insert("service".to_owned(), self.service_name.clone());
        about.extend(self.node.map(|node| ("node".to_owned(), node.to_string())));
        let end = self.status.exit_code.map(|code| ("exitCode".to_owned(), code.to_string()));
        about.extend(end);
        about
    }

    fn now(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::from([
            ("state", self.status.state.name().to_owned()),
            ("desired", self.desired.name().to_owned()),
            ("error", self.status.err.clone()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use mesh_types::task::TaskState;

    use super::*;
    use crate::{
        command::Command,
        fixtures::{Bench, network, service},
        model::NodeState,
    };

    fn lines(log: &EventLog, from: Number) -> Vec<String> {
        let events = log.from(from).unwrap();
        let line = |event: &Arc<Event>| {
            let changed: Vec<String> = (event.attributes.iter())
                .filter(|(key, _)| key.ends_with(".new") || *key == "name")
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            let (kind, action) = (event.kind.name(), event.action.name());
            format!("{kind} {action} {}", changed.join(" "))
        };
        events.iter().map(line).collect()
    }

    #[test]
    fn what_was_there_before_is_no_news_and_what_comes_is() {
        let mut bench = Bench::with_nodes(2);
        let mut log = EventLog::keeping(100);
        assert_eq!(log.look(&bench.store, 0), 0, "the first look");
        let net = bench.create_network(1, network("app", None));
        let web = bench.create_service(1, service("web", 1, &[net]));
        let next = log.look(&bench.store, 0);
        assert_eq!(lines(&log, 0), ["network create name=app", "service create name=web"]);
        assert_eq!(log.look(&bench.store, 0), next, "nothing changed");

        bench.node_state(2, NodeState::Down);
        log.look(&bench.store, 0);
        assert_eq!(lines(&log, next), ["node update name=n2 state.new=down"]);
        let next = log.next();
        bench
            .update_service(web, |spec| {
                spec.mode = ServiceMode::Replicated { replicas: 3 };
            })
            .unwrap();
        bench.apply(Command::RemoveService { id: web }).unwrap();
        log.look(&bench.store, 7);
        assert_eq!(lines(&log, next), ["service remove name=web"], "it came and went in between");
        assert_eq!(log.from(next).unwrap()[0].at_ms, 7);
    }

    #[test]
    fn tasks_tell_how_they_fare() {
        let mut bench = Bench::with_nodes(1);
        let mut log = EventLog::keeping(100);
        log.look(&bench.store, 0);
        let web = bench.create_service(1, service("web", 1, &[]));
        bench.settle();
        let next = log.look(&bench.store, 0);
        bench.report(bench.live(web)[0].id, TaskState::Failed);
        log.look(&bench.store, 0);
        let event = log.from(next).unwrap()[0].clone();
        assert_eq!((event.kind, event.action), (EventKind::Task, Action::Update));
        assert_eq!(event.attributes["state.old"], "assigned");
        assert_eq!(event.attributes["state.new"], "failed");
        assert_eq!(event.attributes["service"], "web");
    }

    #[test]
    fn a_history_has_an_end_and_says_so() {
        let mut bench = Bench::with_nodes(1);
        let mut log = EventLog::keeping(3);
        log.look(&bench.store, 0);
        for number in 0..5 {
            bench.create_network(number + 1, network(&format!("n{number}"), None));
            log.look(&bench.store, 0);
        }
        assert_eq!((log.oldest(), log.next()), (2, 5));
        assert_eq!(log.from(0), Err(Forgotten(2)));
        assert_eq!(lines(&log, 2).len(), 3);
        assert_eq!(lines(&log, 4), ["network create name=n4"]);
        assert!(lines(&log, 5).is_empty() && lines(&log, 9).is_empty());
    }
}
