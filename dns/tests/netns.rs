//! The resolver as tasks see it: `dig` in one namespace, the node's resolver in another, an
//! upstream in a third. Needs root, `ip` and `dig`. The port rewrite on the task's `lo` is not part
//! of this.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, Metadata},
    rr::{RData, Record, rdata::A},
};
use mesh_dns::{
    control::{Request, Status, read_frame, write_frame},
    handover::{self, Sockets, SocketsOf},
    server::{RunConfig, serve},
    snapshot::{Policy, Snapshot, TaskView},
};
use mesh_types::{
    EndpointId, NetworkId, NodeNumber, Revision, ServiceId, TaskId, Vni,
    record::{EndpointRecord, EndpointState, NetworkRecord, ServiceRecord},
    spec::EndpointMode,
};
use nix::sched::{CloneFlags, setns};
use tokio::net::UnixStream;

const NODE: &str = "h5-node";
const UPSTREAM: &str = "h5-up";
const TASK: &str = "h5-task";
const LATE: &str = "h5-late";
const ALONE: &str = "h5-alone";
const LIMIT: Duration = Duration::from_secs(10);

fn ip(args: &str) {
    let done = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "ip {args}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Removes the namespaces, also after a failed run.
struct Namespaces(PathBuf);

impl Namespaces {
    fn remove(&self) {
        for name in [NODE, UPSTREAM, TASK, LATE] {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }

    fn make() -> Self {
        let made = Self(std::env::temp_dir().join(format!("h5-dns-{}", std::process::id())));
        made.remove();
        std::fs::create_dir_all(&made.0).unwrap();
        for name in [NODE, UPSTREAM, TASK] {
            ip(&format!("netns add {name}"));
            ip(&format!("-n {name} link set lo up"));
        }
        ip(&format!("-n {NODE} link add h5-v type veth peer name h5-v netns {UPSTREAM}"));
        ip(&format!("-n {NODE} addr add 192.0.2.1/30 dev h5-v"));
        ip(&format!("-n {UPSTREAM} addr add 192.0.2.2/30 dev h5-v"));
        ip(&format!("-n {NODE} link set h5-v up"));
        ip(&format!("-n {UPSTREAM} link set h5-v up"));
        made
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        self.remove();
    }
}

fn enter(name: &str) {
    setns(File::open(Path::new("/run/netns").join(name)).unwrap(), CloneFlags::CLONE_NEWNET)
        .unwrap();
}

/// What the world says: 203.0.113.9, for every name; `big.test.` only over TCP.
fn outside(query: &[u8], udp: bool) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&query.metadata);
    reply.queries = query.queries;
    let name = reply.queries[0].name.clone();
    if udp && name.to_ascii() == "big.test." {
        reply.metadata.truncation = true;
    } else {
        let data = RData::A(A("203.0.113.9".parse().unwrap()));
        reply.add_answer(Record::from_rdata(name, 60, data));
    }
    reply.to_vec().unwrap()
}

fn start_upstream() {
    let (bound, ready) = std::sync::mpsc::channel();
    thread::spawn(move || {
        enter(UPSTREAM);
        let udp = UdpSocket::bind("192.0.2.2:53").unwrap();
        let tcp = TcpListener::bind("192.0.2.2:53").unwrap();
        bound.send(()).unwrap();
        thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut query = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut query).unwrap();
                let reply = outside(&query, false);
                stream.write_all(&u16::try_from(reply.len()).unwrap().to_be_bytes()).unwrap();
                stream.write_all(&reply).unwrap();
            }
        });
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            udp.send_to(&outside(&buffer[..length], true), from).unwrap();
        }
    });
    ready.recv().unwrap();
}

fn start_resolver(config: RunConfig) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        enter(NODE);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(serve(&config)).unwrap();
    })
}

fn dig(netns: &str, args: &str) -> String {
    let done = Command::new("ip")
        .args(["netns", "exec", netns, "dig", "@127.0.0.11", "-p", "10053", "+tries=1", "+time=9"])
        .args(args.split_whitespace())
        .output()
        .unwrap();
    String::from_utf8(done.stdout).unwrap().trim().to_owned()
}

fn task(n: u128, netns: &str) -> TaskView {
    TaskView {
        task: TaskId::from_bits(n),
        netns: Path::new("/run/netns").join(netns),
        networks: vec![NetworkId::from_bits(1)],
        forward: true,
        servers: Vec::new(),
    }
}

fn snapshot(replicas: u8, tasks: Vec<TaskView>) -> Snapshot {
    let network = NetworkId::from_bits(1);
    let service = ServiceId::from_bits(1);
    Snapshot {
        revision: Revision::new(u64::from(replicas)).unwrap(),
        networks: vec![NetworkRecord {
            id: network,
            name: "app".to_owned(),
            vni: Vni::MIN,
            subnet: "10.0.0.0/24".parse().unwrap(),
            gateway: "10.0.0.1".parse().unwrap(),
            mtu: None,
            internal: false,
            ingress: false,
        }],
        services: vec![ServiceRecord {
            network,
            id: service,
            name: "web".to_owned(),
            aliases: Vec::new(),
            mode: EndpointMode::Vip,
            vip: Some("10.0.0.2".parse().unwrap()),
            ports: Vec::new(),
        }],
        endpoints: (1..=replicas)
            .map(|n| EndpointRecord {
                id: EndpointId::new(n.into()).unwrap(),
                network,
                node: NodeNumber::MIN,
                address: [10, 0, 0, n].into(),
                task: TaskId::from_bits(n.into()),
                task_name: format!("web.{n}.{}", TaskId::from_bits(n.into())),
                service,
                state: EndpointState::Ready,
            })
            .collect(),
        tasks,
        // The first does not answer.
        upstreams: vec!["192.0.2.2:54".parse().unwrap(), "192.0.2.2:53".parse().unwrap()],
        policy: Policy::default(),
    }
}

struct Control(UnixStream);

impl Control {
    async fn connect(path: &Path) -> Self {
        let end = Instant::now() + LIMIT;
        loop {
            match UnixStream::connect(path).await {
                Ok(stream) => return Self(stream),
                Err(error) if Instant::now() > end => panic!("{}: {error}", path.display()),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    async fn push(&mut self, snapshot: Snapshot) {
        write_frame(&mut self.0, &Request::Snapshot(Box::new(snapshot))).await.unwrap();
    }

    async fn wait(&mut self, what: &str, done: impl Fn(&Status) -> bool) {
        let waiting = async {
            loop {
                let status: Status = read_frame(&mut self.0).await.unwrap().expect("it ended");
                if done(&status) {
                    return;
                }
            }
        };
        tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("waited for {what}"));
    }
}

#[tokio::test]
async fn tasks_find_services_and_the_world() {
    let namespaces = Namespaces::make();
    let config = RunConfig {
        control_socket: namespaces.0.join("control.sock"),
        state_file: namespaces.0.join("last.json"),
    };
    start_upstream();
    let resolver = start_resolver(config.clone());
    let mut control = Control::connect(&config.control_socket).await;
    let ready = |n: u128| move |s: &Status| s.tasks.get(&TaskId::from_bits(n)) == Some(&None);

    control.push(snapshot(3, vec![task(100, TASK)])).await;
    control.wait("the first task", ready(100)).await;
    assert_eq!(dig(TASK, "web +short"), "10.0.0.2");
    assert_eq!(dig(TASK, "+tcp WEB.app +short"), "10.0.0.2");
    assert_eq!(dig(TASK, "tasks.web +short").lines().count(), 3);
    assert_eq!(dig(TASK, "-x 10.0.0.2 +short"), "web.app.");
    let missing = dig(TASK, "nosuch.app +comments");
    assert!(missing.contains("NXDOMAIN") && missing.contains("SOA"), "{missing}");
    let none = dig(TASK, "AAAA web +comments");
    assert!(none.contains("NOERROR") && none.contains("ANSWER: 0"), "{none}");
    assert_eq!(dig(TASK, "example.test +short"), "203.0.113.9");
    assert_eq!(dig(TASK, "+tcp example.test +short"), "203.0.113.9");
    assert_eq!(dig(TASK, "big.test +short"), "203.0.113.9", "cut over UDP, asked again over TCP");

    // A task whose namespace is not there yet is waited for, and said to be missing.
    control.push(snapshot(200, vec![task(100, TASK), task(101, LATE)])).await;
    let late = TaskId::from_bits(101);
    let named = move |s: &Status| matches!(s.tasks.get(&late), Some(Some(why)) if why.contains("namespace"));
    control.wait("the reason", named).await;
    ip(&format!("netns add {LATE}"));
    ip(&format!("-n {LATE} link set lo up"));
    control.wait("the late task", ready(101)).await;
    let whole = dig(LATE, "tasks.web +short +noedns");
    assert_eq!(whole.lines().count(), 200, "over TCP: {whole}");

    // A task that is gone: its sockets close, the other's stay.
    control.push(snapshot(3, vec![task(100, TASK)])).await;
    control.wait("the late task gone", move |s| !s.tasks.contains_key(&late)).await;
    assert!(dig(LATE, "web +short +time=1").contains("refused"));
    assert_eq!(dig(TASK, "web +short"), "10.0.0.2");

    // meshd goes, the resolver stays; a second one is refused; and it serves its last snapshot
    // again after its own death.
    drop(control);
    assert_eq!(dig(TASK, "web +short"), "10.0.0.2");
    assert!(serve(&config).await.unwrap_err().to_string().contains("another resolver"));
    let saved = Instant::now() + LIMIT;
    while !std::fs::read_to_string(&config.state_file).is_ok_and(|s| s.contains("\"web\"")) {
        assert!(Instant::now() < saved, "the snapshot was not saved");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let kept = std::fs::read(&config.state_file).unwrap();
    let mut control = Control::connect(&config.control_socket).await;
    write_frame(&mut control.0, &Request::Shutdown).await.unwrap();
    resolver.join().unwrap();
    // In it wait the sockets that the resolver sent.
    drop(control);
    assert!(!config.state_file.exists() && !config.control_socket.exists());
    std::fs::write(&config.state_file, kept).unwrap();
    let resolver = start_resolver(config.clone());
    let mut control = Control::connect(&config.control_socket).await;
    control.wait("the task of the last snapshot", ready(100)).await;
    assert_eq!(dig(TASK, "web +short"), "10.0.0.2");
    write_frame(&mut control.0, &Request::Shutdown).await.unwrap();
    resolver.join().unwrap();
}

/// A query for `web`, and whether a reply to it names its address.
fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    query.extend(b"\x03web\0\0\x01\0\x01");
    query
}

/// What the tasks ask while there is no resolver waits in their sockets, which the next one gets.
#[tokio::test]
async fn queries_wait_for_the_next_resolver() {
    let dir = std::env::temp_dir().join(format!("h5-handover-{}", std::process::id()));
    let _cleanup = Alone(dir.clone());
    std::fs::create_dir_all(&dir).unwrap();
    let _ = Command::new("ip").args(["netns", "del", ALONE]).output();
    ip(&format!("netns add {ALONE}"));
    ip(&format!("-n {ALONE} link set lo up"));
    let config =
        RunConfig { control_socket: dir.join("control.sock"), state_file: dir.join("last.json") };
    let id = TaskId::from_bits(100);
    let view = task(100, ALONE);

    let end = Arc::new(tokio::sync::Notify::new());
    let first = {
        let (config, end) = (config.clone(), Arc::clone(&end));
        thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            // As dead as one that was killed: nothing of it goes on.
            runtime.block_on(async {
                tokio::select! {
                    ended = serve(&config) => ended.unwrap(),
                    () = end.notified() => {}
                }
            });
        })
    };
    let Control(stream) = Control::connect(&config.control_socket).await;
    let (mut reader, mut writer) = stream.into_split();
    write_frame(&mut writer, &Request::Snapshot(Box::new(snapshot(1, vec![view.clone()]))))
        .await
        .unwrap();
    let mut kept = loop {
        let (status, fds) = handover::receive::<Status>(&mut reader).await.unwrap().unwrap();
        assert!(status.takes_sockets);
        if !status.sockets.is_empty() {
            break Sockets::pair(status.sockets, fds).unwrap();
        }
    };
    let (task, kept) = kept.pop().unwrap();
    assert_eq!((task, &kept.netns), (id, &view.netns));
    end.notify_one();
    first.join().unwrap();
    // A child of the other test may hold the dead listener open between its fork and its exec.
    std::fs::remove_file(&config.control_socket).unwrap();

    // Nobody is there: UDP queries and a TCP connection that none refuses.
    let (udp, mut tcp) = thread::spawn(|| {
        enter(ALONE);
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect("127.0.0.11:10053").unwrap();
        for id in 0..20 {
            udp.send(&query(id)).unwrap();
        }
        let mut tcp = std::net::TcpStream::connect("127.0.0.11:10053").unwrap();
        let query = query(20);
        tcp.write_all(&u16::try_from(query.len()).unwrap().to_be_bytes()).unwrap();
        tcp.write_all(&query).unwrap();
        (udp, tcp)
    })
    .join()
    .unwrap();

    let second = start_in_place(config.clone());
    let Control(stream) = Control::connect(&config.control_socket).await;
    let (mut reader, mut writer) = stream.into_split();
    let of = Request::Sockets(vec![SocketsOf { task: id, netns: view.netns.clone() }]);
    handover::send(&mut writer, &of, &kept.fds()).await.unwrap();
    drop(kept);
    write_frame(&mut writer, &Request::Snapshot(Box::new(snapshot(1, vec![view])))).await.unwrap();
    // It gives them back for the next time.
    while handover::receive::<Status>(&mut reader).await.unwrap().unwrap().1.is_empty() {}
    tokio::task::spawn_blocking(move || {
        udp.set_read_timeout(Some(LIMIT)).unwrap();
        let mut buffer = [0; 512];
        for id in 0..20 {
            let length = udp.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..2], &u16::to_be_bytes(id));
            assert_eq!(&buffer[length - 4..length], &[10, 0, 0, 2]);
        }
        udp.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(udp.recv(&mut buffer).is_err(), "each query is answered once");
        tcp.set_read_timeout(Some(LIMIT)).unwrap();
        tcp.read_exact(&mut buffer[..4]).unwrap();
        assert_eq!(&buffer[2..4], &u16::to_be_bytes(20));
    })
    .await
    .unwrap();

    // A task that is gone has no sockets in it, once meshd lets go of them too.
    write_frame(&mut writer, &Request::Snapshot(Box::new(snapshot(1, Vec::new())))).await.unwrap();
    while !handover::receive::<Status>(&mut reader).await.unwrap().unwrap().0.tasks.is_empty() {}
    assert!(dig(ALONE, "web +short +time=1").contains("refused"));
    write_frame(&mut writer, &Request::Shutdown).await.unwrap();
    second.join().unwrap();
}

fn start_in_place(config: RunConfig) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(serve(&config)).unwrap();
    })
}

/// The namespace of the test above, and its directory.
struct Alone(PathBuf);

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", ALONE]).output();
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
