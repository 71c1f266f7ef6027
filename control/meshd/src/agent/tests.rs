//! The driver with an executor and a plumber that only note what they are asked.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

use mesh_executor::{Exit, FoundState, Prepared};
use mesh_types::{NodeId, Protocol, ServiceId, spec::TaskSpec, task::TaskState};
use tokio::sync::Notify;

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Fake {
    notes: Mutex<Vec<String>>,
    running: Mutex<BTreeMap<TaskId, Option<Exit>>>,
    context: Mutex<Option<TaskContext>>,
    changed: Notify,
    refuse_to_attach: AtomicBool,
    sockets: Mutex<Sockets>,
}

impl Fake {
    fn note(&self, text: impl Into<String>) {
        self.notes.lock().unwrap().push(text.into());
    }

    fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap().clone()
    }

    fn end(&self, task: TaskId, code: i32) {
        let exit = Exit { code, oom: false, error: None, at_ms: 1 };
        self.running.lock().unwrap().insert(task, Some(exit));
        self.changed.notify_waiters();
    }
}

#[async_trait]
impl Executor for Fake {
    async fn prepare(
        &self,
        _: &TaskAssignment,
        context: &TaskContext,
    ) -> Result<Prepared, ExecutorError> {
        self.note("prepare");
        *self.context.lock().unwrap() = Some(context.clone());
        Ok(Prepared { netns: "/proc/1/ns/net".into() })
    }
    async fn start(&self, task: TaskId) -> Result<u32, ExecutorError> {
        self.note("start");
        self.running.lock().unwrap().insert(task, None);
        Ok(7)
    }
    async fn stop(&self, task: TaskId, signal: i32, _: Duration) -> Result<(), ExecutorError> {
        self.note(format!("stop {signal}"));
        self.end(task, 128 + signal);
        Ok(())
    }
    async fn kill(&self, task: TaskId) -> Result<(), ExecutorError> {
        self.end(task, 137);
        Ok(())
    }
    async fn wait(&self, task: TaskId) -> Result<Exit, ExecutorError> {
        loop {
            let changed = self.changed.notified();
            let state = self.running.lock().unwrap().get(&task).cloned();
            match state {
                None => return Err(ExecutorError::Lost(task)),
                Some(Some(exit)) => return Ok(exit),
                Some(None) => changed.await,
            }
        }
    }
    async fn remove(&self, task: TaskId) -> Result<(), ExecutorError> {
        self.note("remove");
        self.running.lock().unwrap().remove(&task);
        Ok(())
    }
    async fn list(&self) -> Result<Vec<(TaskId, FoundState)>, ExecutorError> {
        let running = self.running.lock().unwrap();
        let found = running.iter().map(|(id, exit)| {
            let state = match exit {
                Some(exit) => FoundState::Exited(exit.clone()),
                None => FoundState::Running { netns: "/proc/1/ns/net".into(), pid: 7 },
            };
            (*id, state)
        });
        Ok(found.collect())
    }
    async fn exec(&self, task: TaskId, _: ExecSpec) -> Result<ExecSession, ExecutorError> {
        Err(ExecutorError::Lost(task))
    }
    fn logs(&self, _: TaskId) -> [PathBuf; 2] {
        [PathBuf::new(), PathBuf::new()]
    }
}

#[async_trait]
impl Plumber for Fake {
    async fn attach(&self, _: &TaskAssignment, netns: &Path) -> anyhow::Result<()> {
        self.note(format!("attach {}", netns.display()));
        anyhow::ensure!(!self.refuse_to_attach.load(Ordering::Relaxed), "no device");
        Ok(())
    }
    async fn close(&self, _: TaskId) -> anyhow::Result<()> {
        self.note("close");
        Ok(())
    }
    async fn detach(&self, _: TaskId) -> anyhow::Result<()> {
        self.note("detach");
        Ok(())
    }
    fn sockets(&self, _: &Path) -> std::io::Result<Sockets> {
        Ok(self.sockets.lock().unwrap().clone())
    }
}

struct Fixture {
    fake: Arc<Fake>,
    config: AgentConfig,
    task: TaskAssignment,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let state_dir =
            std::env::temp_dir().join(format!("mesh-agent-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&state_dir);
        std::fs::create_dir_all(&state_dir).unwrap();
        let lease = mesh_types::task::EndpointLease {
            endpoint: mesh_types::EndpointId::new(5).unwrap(),
            kind: mesh_types::task::InterfaceKind::LocalGateway,
            address: "10.0.0.5/24".parse().unwrap(),
        };
        let task = TaskAssignment {
            id: TaskId::from_bits(5),
            name: "web.1.abc".into(),
            service: ServiceId::from_bits(1),
            service_name: "web".into(),
            slot: Some(1),
            node: NodeId::from_bits(1),
            spec: TaskSpec {
                runtime: Runtime::Process,
                args: vec!["sleep".into()],
                ..TaskSpec::default()
            },
            leases: vec![lease],
            desired: TaskState::Running,
            drain: Duration::ZERO,
            ports: Vec::new(),
        };
        let config = AgentConfig {
            state_dir,
            node_name: "w1".into(),
            path_dir: None,
            resolv_conf: AgentConfig::RESOLV_CONF.into(),
        };
        Self { fake: Arc::default(), config, task }
    }

    async fn start(&self) -> AgentHandle {
        let (executor, plumber) = (Arc::clone(&self.fake), Arc::clone(&self.fake));
        Agent::start(self.config.clone(), executor, plumber).await.unwrap()
    }

    async fn until(&self, handle: &AgentHandle, state: TaskState) -> TaskStatus {
        let mut view = handle.watch();
        let id = self.task.id;
        let reached = view
            .wait_for(|view| view.tasks.get(&id).is_some_and(|task| task.status.state == state));
        let view = timeout(DEADLINE, reached).await.unwrap().unwrap();
        view.tasks[&id].status.clone()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.config.state_dir);
    }
}

#[tokio::test]
async fn a_task_is_run_reported_and_removed() {
    let fixture = Fixture::new("run");
    let handle = fixture.start().await;
    handle.set_managed(true);
    handle.assign(vec![fixture.task.clone()], BTreeSet::new());
    fixture.until(&handle, TaskState::Running).await;
    assert_eq!(fixture.fake.notes(), ["prepare", "attach /proc/1/ns/net", "start"]);
    let context = fixture.fake.context.lock().unwrap().clone().unwrap();
    assert_eq!(context.hostname, fixture.task.id.short());
    assert_eq!(context.hosts, [("10.0.0.5".parse().unwrap(), fixture.task.id.short())]);
    for entry in ["MESH_TASK=web.1.abc", "MESH_SERVICE=web", "MESH_NODE=w1"] {
        assert!(context.env.iter().any(|have| have == entry), "{entry}");
    }
    fixture.fake.end(fixture.task.id, 3);
    let status = fixture.until(&handle, TaskState::Failed).await;
    assert_eq!(status.err, "task: non-zero exit (3)");
    handle.stop_all(DEADLINE).await.unwrap();
    assert_eq!(fixture.fake.notes()[3..], ["detach", "remove"]);
}

#[tokio::test]
async fn a_server_is_waited_for_at_both_ends() {
    let mut fixture = Fixture::new("server");
    let handle = fixture.start().await;
    fixture.task.ports = vec![(Protocol::Tcp, 80)];
    // Far longer than the test waits for anything.
    fixture.task.drain = DEADLINE * 10;
    handle.assign(vec![fixture.task.clone()], BTreeSet::new());
    fixture.until(&handle, TaskState::Starting).await;
    let set = |listening: &[(Protocol, u16)], connections: &[u16]| {
        let listening = listening.iter().copied().collect();
        *fixture.fake.sockets.lock().unwrap() =
            Sockets { listening, connections: connections.to_vec() };
    };
    set(&[(Protocol::Tcp, 80)], &[80]);
    let status = fixture.until(&handle, TaskState::Running).await;
    assert_eq!(status.message, "started");
    let mut ending = fixture.task.clone();
    ending.desired = TaskState::Shutdown;
    handle.assign(vec![ending], BTreeSet::new());
    let mut view = handle.watch();
    let id = fixture.task.id;
    let drains =
        view.wait_for(|view| view.tasks[&id].status.message == "draining: 1 connection open");
    drop(timeout(DEADLINE, drains).await.unwrap().unwrap());
    assert!(!fixture.fake.notes().contains(&"stop 15".to_owned()));
    set(&[(Protocol::Tcp, 80)], &[]);
    fixture.until(&handle, TaskState::Shutdown).await;
    let notes = fixture.fake.notes();
    let at = |what: &str| notes.iter().position(|note| note == what).unwrap();
    assert!(at("close") < at("stop 15"), "{notes:?}");
}

#[tokio::test]
async fn statuses_come_until_they_are_confirmed() {
    let fixture = Fixture::new("feed");
    let handle = fixture.start().await;
    let mut feed = handle.statuses();
    handle.assign(vec![fixture.task.clone()], BTreeSet::new());
    fixture.until(&handle, TaskState::Running).await;
    let first = timeout(DEADLINE, feed.next()).await.unwrap().unwrap();
    let again = timeout(DEADLINE, feed.next()).await.unwrap().unwrap();
    assert_eq!(first, again);
    assert_eq!(again[0].1.state, TaskState::Running);
    feed.confirm(again);
    assert!(timeout(Duration::from_millis(50), feed.next()).await.is_err());
    feed.restart();
    assert_eq!(timeout(DEADLINE, feed.next()).await.unwrap().unwrap(), first);
    feed.confirm(first);
    handle.stop_all(DEADLINE).await.unwrap();
    drop(handle);
    assert!(
        timeout(DEADLINE, feed.next()).await.unwrap().is_none(),
        "the agent ends with its handle"
    );
}

#[tokio::test]
async fn a_restarted_agent_goes_on_without_a_manager() {
    let fixture = Fixture::new("restart");
    let handle = fixture.start().await;
    handle.assign(vec![fixture.task.clone()], BTreeSet::new());
    fixture.until(&handle, TaskState::Running).await;
    drop(handle);
    let handle = fixture.start().await;
    fixture.until(&handle, TaskState::Running).await;
    // It is plugged again, and watched. What follows its end is the managers' to say.
    handle.set_managed(true);
    fixture.fake.end(fixture.task.id, 0);
    fixture.until(&handle, TaskState::Complete).await;
    let notes = fixture.fake.notes();
    assert_eq!(notes.iter().filter(|note| *note == "start").count(), 1, "{notes:?}");
    assert_eq!(notes.iter().filter(|note| note.starts_with("attach")).count(), 2, "{notes:?}");
}

#[tokio::test]
async fn what_cannot_be_run_is_rejected_with_the_remedy() {
    let mut fixture = Fixture::new("reject");
    let handle = fixture.start().await;
    handle.set_managed(true);
    fixture.task.spec.runtime = Runtime::Oci;
    handle.assign(vec![fixture.task.clone()], BTreeSet::new());
    let status = fixture.until(&handle, TaskState::Rejected).await;
    assert!(status.err.contains("--runtime process"), "{status:?}");
    fixture.fake.refuse_to_attach.store(true, Ordering::Relaxed);
    fixture.task.spec.runtime = Runtime::Process;
    fixture.task.id = TaskId::from_bits(6);
    handle.assign(vec![fixture.task.clone()], BTreeSet::new());
    let status = fixture.until(&handle, TaskState::Rejected).await;
    assert_eq!(status.err, "network: no device");
    assert!(!fixture.fake.notes().contains(&"start".to_owned()));
}

#[tokio::test]
async fn a_damaged_file_is_refused_and_touches_nothing() {
    let fixture = Fixture::new("damaged");
    std::fs::write(fixture.config.file(), "{").unwrap();
    let (executor, plumber) = (Arc::clone(&fixture.fake), Arc::clone(&fixture.fake));
    let error = Agent::start(fixture.config.clone(), executor, plumber).await.unwrap_err();
    assert!(format!("{error:#}").contains("agent.json is damaged"), "{error:#}");
    assert!(fixture.fake.notes().is_empty());
}
