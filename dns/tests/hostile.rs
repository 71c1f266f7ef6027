//! What tasks and servers of ill will can do to the resolver, and what the well-meaning feel of it.
//! Needs root and `ip`. Each test has namespaces of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, Metadata, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, SOA},
    },
};
use mesh_dns::{
    control::{Request, Status, read_frame, write_frame},
    server::{RunConfig, serve},
    snapshot::{Policy, Snapshot, TaskView},
};
use mesh_types::{
    EndpointId, NetworkId, NodeNumber, Revision, ServiceId, TaskId, Vni,
    record::{EndpointRecord, EndpointState, NetworkRecord, ServiceRecord},
    spec::EndpointMode,
};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        resource::{UsageWho, getrusage},
        socket::{setsockopt, sockopt::Linger},
        time::{TimeVal, TimeValLike as _},
    },
};
use tokio::net::UnixStream;

const LIMIT: Duration = Duration::from_secs(10);
const RESOLVER: &str = "127.0.0.11:10053";
/// The node's server, in the namespace of the test's first task.
const UPSTREAM: &str = "198.51.100.53:53";

fn ip(args: &str) {
    let done = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "ip {args}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Namespaces of tasks, the first of which is also the node's, and a resolver that serves them.
struct Place {
    names: Vec<String>,
    dir: PathBuf,
    control: Option<UnixStream>,
    resolver: Option<thread::JoinHandle<()>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Place {
    async fn make(test: &str, tasks: usize, change: impl Fn(&mut Snapshot)) -> Self {
        let names: Vec<_> = (0..tasks).map(|n| format!("h5-{test}{n}")).collect();
        let dir = std::env::temp_dir().join(format!("h5-{test}-{}", std::process::id()));
        let mut place = Self { names, dir, control: None, resolver: None };
        std::fs::create_dir_all(&place.dir).unwrap();
        for name in &place.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
            ip(&format!("netns add {name}"));
            ip(&format!("-n {name} link set lo up"));
            ip(&format!("-n {name} addr add 198.51.100.53/32 dev lo"));
        }
        let config = RunConfig {
            control_socket: place.dir.join("control.sock"),
            state_file: place.dir.join("last.json"),
        };
        let socket = config.control_socket.clone();
        let node = place.names[0].clone();
        place.resolver = Some(thread::spawn(move || {
            enter(&node);
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(serve(&config)).unwrap();
        }));
        let end = Instant::now() + LIMIT;
        let mut control = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > end => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let mut snapshot = snapshot(&place.names);
        change(&mut snapshot);
        write_frame(&mut control, &Request::Snapshot(Box::new(snapshot))).await.unwrap();
        loop {
            let status: Status = read_frame(&mut control).await.unwrap().unwrap();
            if status.tasks.len() == tasks && status.tasks.values().all(Option::is_none) {
                break;
            }
        }
        place.control = Some(control);
        place
    }

    /// Runs this in a task's namespace.
    fn inside<T: Send + 'static>(
        &self,
        task: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let name = self.names[task].clone();
        thread::spawn(move || {
            enter(&name);
            work()
        })
        .join()
        .unwrap()
    }

    async fn end(mut self) {
        let mut control = self.control.take().unwrap();
        write_frame(&mut control, &Request::Shutdown).await.unwrap();
        self.resolver.take().unwrap().join().unwrap();
    }
}

fn enter(name: &str) {
    setns(File::open(Path::new("/run/netns").join(name)).unwrap(), CloneFlags::CLONE_NEWNET)
        .unwrap();
}

/// Service `web` with a virtual address, and `many` with 200 tasks.
fn snapshot(names: &[String]) -> Snapshot {
    let network = NetworkId::from_bits(1);
    let service = |id, name: &str, vip: Option<&str>| ServiceRecord {
        network,
        id: ServiceId::from_bits(id),
        name: name.to_owned(),
        aliases: Vec::new(),
        mode: if vip.is_some() { EndpointMode::Vip } else { EndpointMode::Dnsrr },
        vip: vip.map(|vip| vip.parse().unwrap()),
        ports: Vec::new(),
    };
    let endpoint = |n: u8| EndpointRecord {
        id: EndpointId::new(n.into()).unwrap(),
        network,
        node: NodeNumber::MIN,
        address: [10, 0, 1, n].into(),
        task: TaskId::from_bits(n.into()),
        task_name: format!("many.{n}.{}", TaskId::from_bits(n.into())),
        service: ServiceId::from_bits(2),
        state: EndpointState::Ready,
    };
    Snapshot {
        revision: Revision::MIN,
        networks: vec![NetworkRecord {
            id: network,
            name: "app".to_owned(),
            vni: Vni::MIN,
            subnet: "10.0.0.0/16".parse().unwrap(),
            gateway: "10.0.0.1".parse().unwrap(),
            mtu: None,
            internal: false,
            ingress: false,
        }],
        services: vec![service(1, "web", Some("10.0.0.2")), service(2, "many", None)],
        endpoints: (1..=200).map(endpoint).collect(),
        tasks: names
            .iter()
            .zip(100..)
            .map(|(name, id)| TaskView {
                task: TaskId::from_bits(id),
                netns: Path::new("/run/netns").join(name),
                networks: vec![network],
                forward: true,
                servers: Vec::new(),
            })
            .collect(),
        upstreams: vec![UPSTREAM.parse().unwrap()],
        policy: Policy::default(),
    }
}

fn query(name: &str, kind: RecordType, id: u16) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

fn client() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(RESOLVER).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// The answer to a query over a connection of its own.
fn ask_over_tcp(query: &[u8]) -> Message {
    let mut stream = TcpStream::connect(RESOLVER).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(&u16::try_from(query.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(query).unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut reply = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut reply).unwrap();
    Message::from_vec(&reply).unwrap()
}

/// Asks, and gives the reply; anything that comes before it is none of ours.
fn ask(socket: &UdpSocket, query: &[u8]) -> Message {
    socket.send(query).unwrap();
    let mut buffer = [0; 65_535];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(buffer[..2], query[..2]);
    Message::from_vec(&buffer[..length]).unwrap()
}

fn address_of(reply: &Message) -> Option<String> {
    reply.answers.first().map(|record| record.data.to_string())
}

fn is_served(socket: &UdpSocket) {
    let reply = ask(socket, &query("web.", RecordType::A, 9));
    assert_eq!(address_of(&reply).as_deref(), Some("10.0.0.2"));
}

/// Queries that no honest program sends: what is a query gets its error, the rest no answer, and
/// the next honest one its address. On TCP what breaks off ends, and the idle make room.
#[tokio::test]
async fn broken_queries_harm_nobody() {
    let place = Place::make("broken", 1, |_| {}).await;
    place.inside(0, || {
        let socket = client();
        let header = |counts: [u8; 8], flags: u8| {
            let mut bytes = vec![0, 7, flags, 0];
            bytes.extend(counts);
            bytes
        };
        let one = [0, 1, 0, 0, 0, 0, 0, 0];
        let with = |rest: &[u8]| [&header(one, 1)[..], rest].concat();
        let mut too_long = Vec::new();
        for _ in 0..5 {
            too_long.push(63);
            too_long.extend([b'a'; 63]);
        }
        let to_itself = with(&[0xc0, 12, 0, 1, 0, 1]);
        let to_each_other = with(&[0xc0, 14, 0xc0, 12, 0, 1, 0, 1]);
        let beyond = with(&[0xc0, 200, 0, 1, 0, 1]);
        let long_name = with(&[&too_long[..], &[0, 0, 1, 0, 1]].concat());
        let unended = with(b"\x03web");
        let two = [&header([0, 2, 0, 0, 0, 0, 0, 0], 1)[..], b"\x03web\0\0\x01\0\x01"].concat();
        let none = header([0; 8], 1);
        let counts =
            [&header([0, 1, 255, 255, 255, 255, 255, 255], 1)[..], b"\x03web\0\0\x01\0\x01"];
        let long = with(&[&b"\x03web\0\0\x01\0\x01"[..], &[0; 9000]].concat());
        let update = [&header(one, 0x28)[..], b"\x03web\0\0\x06\0\x01"].concat();
        let chaos = with(b"\x07version\x04bind\0\0\x10\0\x03");
        for (bad, code) in [
            (to_itself, ResponseCode::FormErr),
            (to_each_other, ResponseCode::FormErr),
            (beyond, ResponseCode::FormErr),
            (long_name, ResponseCode::FormErr),
            (unended, ResponseCode::FormErr),
            (two, ResponseCode::FormErr),
            (none, ResponseCode::FormErr),
            (counts.concat(), ResponseCode::FormErr),
            (long, ResponseCode::FormErr),
            (update, ResponseCode::NotImp),
            (chaos, ResponseCode::Refused),
        ] {
            let reply = ask(&socket, &bad);
            assert_eq!(reply.metadata.response_code, code, "{bad:?}");
            is_served(&socket);
        }
        // No answer to what is no question, least of all to an answer.
        let mut response = query("web.", RecordType::A, 1);
        response[2] |= 0x80;
        for silent in [&response[..], &[], &[1; 11], &query("web.", RecordType::A, 1)[..11]] {
            socket.send(silent).unwrap();
        }
        is_served(&socket);

        // Little is asked, so little is said: nobody is flooded through it.
        let mut greedy = Message::from_vec(&query("many.", RecordType::ANY, 3)).unwrap();
        let mut edns = Edns::new();
        edns.set_max_payload(65_535);
        greedy.edns = Some(edns);
        socket.send(&greedy.to_vec().unwrap()).unwrap();
        let mut buffer = [0; 65_535];
        let length = socket.recv(&mut buffer).unwrap();
        assert!(length <= 1232, "{length} bytes");
        assert!(Message::from_vec(&buffer[..length]).unwrap().metadata.truncation);

        // TCP: half a length, half a message, and gone; then a thousand that say nothing.
        for half in [&[0][..], &[0, 40, 1, 2, 3]] {
            for _ in 0..100 {
                let mut stream = TcpStream::connect(RESOLVER).unwrap();
                stream.write_all(half).unwrap();
                // A reset instead of an end.
                setsockopt(&stream, Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
            }
        }
        let idle: Vec<_> = (0..1000).filter_map(|_| TcpStream::connect(RESOLVER).ok()).collect();
        assert!(idle.len() > 100);
        assert_eq!(ask_over_tcp(&query("many.", RecordType::A, 4)).answers.len(), 200);

        let before = cpu();
        thread::sleep(Duration::from_millis(300));
        let spent = cpu() - before;
        assert!(spent < Duration::from_millis(100), "{spent:?} of CPU for idle connections");
        drop(idle);
        is_served(&socket);
    });
    place.end().await;
}

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = |time: TimeVal| Duration::from_micros(time.num_microseconds().cast_unsigned());
    micros(usage.user_time()) + micros(usage.system_time())
}

/// What a server was asked: name, id and port.
type Asked = Arc<Mutex<Vec<(String, u16, u16)>>>;

/// A server for outside names that is surrounded by liars: wrong ids, wrong questions and wrong
/// sources come before what is right. `no.test.` does not exist, `cut.test.` needs TCP.
fn start_server(netns: &str, address: &'static str, right: [u8; 4]) -> Asked {
    let asked = Asked::default();
    let (log, netns) = (Arc::clone(&asked), netns.to_owned());
    let (bound, ready) = std::sync::mpsc::channel();
    thread::spawn(move || {
        enter(&netns);
        let server = UdpSocket::bind(address).unwrap();
        let liar = UdpSocket::bind((address.parse::<SocketAddr>().unwrap().ip(), 0)).unwrap();
        let tcp = TcpListener::bind(address).unwrap();
        bound.send(()).unwrap();
        thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut query = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut query).unwrap();
                let reply = say(&query, right, |_| {});
                stream.write_all(&u16::try_from(reply.len()).unwrap().to_be_bytes()).unwrap();
                stream.write_all(&reply).unwrap();
            }
        });
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            let query = &buffer[..length];
            let message = Message::from_vec(query).unwrap();
            let name = message.queries[0].name.to_ascii().to_lowercase();
            log.lock().unwrap().push((name.clone(), message.metadata.id, from.port()));
            let lie = [192, 0, 2, 66];
            let forged = [
                say(query, lie, |m| m.metadata.id ^= 1),
                say(query, lie, |m| m.queries[0].name = Name::from_ascii("else.test.").unwrap()),
                say(query, lie, |m| m.queries.clear()),
                vec![0; 12],
                query.to_vec(),
            ];
            for forged in forged {
                server.send_to(&forged, from).unwrap();
            }
            // Right but for the port that it is from.
            let _ = liar.send_to(&say(query, lie, |_| {}), from);
            let reply = say(query, right, |m| {
                if name == "no.test." {
                    m.answers.clear();
                    m.metadata.response_code = ResponseCode::NXDomain;
                    let zone = Name::from_ascii("test.").unwrap();
                    let soa = SOA::new(zone.clone(), zone.clone(), 1, 60, 60, 60, 60);
                    m.authorities.push(Record::from_rdata(zone, 60, RData::SOA(soa)));
                }
                if name == "cut.test." {
                    m.answers.clear();
                    m.metadata.truncation = true;
                }
            });
            server.send_to(&reply, from).unwrap();
        }
    });
    ready.recv().unwrap();
    asked
}

fn say(query: &[u8], address: [u8; 4], change: impl Fn(&mut Message)) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&query.metadata);
    reply.queries = query.queries;
    let name = reply.queries[0].name.clone();
    reply.add_answer(Record::from_rdata(name, 60, RData::A(A(address.into()))));
    change(&mut reply);
    reply.to_vec().unwrap()
}

/// Forged answers do not get through, ids and ports cannot be guessed, answers are remembered, and
/// names of ours and of private addresses are never asked outside.
#[tokio::test]
async fn answers_from_outside_are_not_taken_from_anybody() {
    let place = Place::make("forged", 1, |_| {}).await;
    let asked = start_server(&place.names[0], UPSTREAM, [203, 0, 113, 9]);
    place.inside(0, || {
        let socket = client();
        for id in 0..64 {
            let reply = ask(&socket, &query(&format!("n{id}.test."), RecordType::A, id));
            assert_eq!(address_of(&reply).as_deref(), Some("203.0.113.9"));
        }
        for id in 100..103 {
            let reply = ask(&socket, &query("No.test.", RecordType::A, id));
            assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
            assert_eq!(reply.queries[0].name.to_ascii(), "No.test.");
            assert_eq!(
                address_of(&ask(&socket, &query("n1.TEST.", RecordType::A, id))).unwrap(),
                "203.0.113.9"
            );
        }
        for (name, kind) in [
            ("secret.", RecordType::A),
            ("secret.app.", RecordType::AAAA),
            ("tasks.secret.", RecordType::A),
            ("_80._tcp.web.", RecordType::SRV),
            ("9.9.0.10.in-addr.arpa.", RecordType::PTR),
            ("1.1.168.192.in-addr.arpa.", RecordType::PTR),
            ("b._dns-sd._udp.0.0.0.10.in-addr.arpa.", RecordType::PTR),
        ] {
            let reply = ask(&socket, &query(name, kind, 200));
            assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{name}");
        }
    });
    let asked = asked.lock().unwrap().clone();
    let (ids, ports): (HashSet<u16>, HashSet<u16>) =
        asked.iter().map(|(_, id, port)| (*id, *port)).unzip();
    assert!(ids.len() > 60 && ports.len() > 50, "{} ids, {} ports", ids.len(), ports.len());
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for (name, ..) in asked {
        *times.entry(name.to_lowercase()).or_default() += 1;
    }
    assert_eq!(times.len(), 65, "only what is outside: {:?}", times.keys());
    assert!(times.values().all(|count| *count == 1), "asked again: {times:?}");
    place.end().await;
}

/// `--dns`: a task's own servers are asked from its own namespace, though it has no way out, and
/// what they say is its alone.
#[tokio::test]
async fn a_tasks_own_servers_are_asked_from_its_namespace() {
    let place = Place::make("own", 2, |snapshot| {
        let own: IpAddr = "198.51.100.53".parse().unwrap();
        snapshot.tasks[1].servers = vec![own];
        snapshot.tasks[1].forward = false;
    })
    .await;
    let nodes = start_server(&place.names[0], UPSTREAM, [203, 0, 113, 1]);
    let own = start_server(&place.names[1], UPSTREAM, [203, 0, 113, 2]);
    for (task, address) in [(1, "203.0.113.2"), (0, "203.0.113.1"), (1, "203.0.113.2")] {
        place.inside(task, move || {
            let socket = client();
            let reply = ask(&socket, &query("www.test.", RecordType::A, 5));
            assert_eq!(address_of(&reply).as_deref(), Some(address), "task {task}");
            is_served(&socket);
            assert!(ask(&socket, &query("cut.test.", RecordType::A, 6)).metadata.truncation);
            let reply = ask_over_tcp(&query("cut.test.", RecordType::A, 7));
            assert_eq!(address_of(&reply).as_deref(), Some(address), "task {task}, TCP");
        });
    }
    for asked in [nodes, own] {
        assert!(asked.lock().unwrap().iter().any(|(name, ..)| name == "www.test."));
    }
    place.end().await;
}

/// A task that floods gets its share, which is counted; another's queries are answered meanwhile.
#[tokio::test]
async fn a_flood_is_limited_and_counted() {
    let mut place = Place::make("flood", 2, |snapshot| snapshot.policy.rate_limit = 200).await;
    let answered = place.inside(0, || {
        let socket = client();
        let mut sent = 0_u32;
        let end = Instant::now() + Duration::from_millis(400);
        let mut buffer = [0; 512];
        let mut answered = 0;
        socket.set_nonblocking(true).unwrap();
        while Instant::now() < end {
            let _ = socket.send(&query("web.", RecordType::A, 1));
            sent += 1;
            while socket.recv(&mut buffer).is_ok() {
                answered += 1;
            }
        }
        assert!(sent > 2000, "that is no flood: {sent}");
        answered
    });
    // A second's worth at once, and the share of the time.
    assert!((1..=400).contains(&answered), "{answered} answers");
    place.inside(1, || is_served(&client()));
    let mut control = place.control.take().unwrap();
    let counted = async {
        loop {
            let status: Status = read_frame(&mut control).await.unwrap().unwrap();
            if status.limited.get(&TaskId::from_bits(100)).is_some_and(|count| *count > 1000) {
                assert!(!status.limited.contains_key(&TaskId::from_bits(101)));
                assert!(status.counts.limited > 1000 && status.counts.fast > 0);
                return;
            }
        }
    };
    tokio::time::timeout(LIMIT, counted).await.expect("the flood is not counted");
    place.control = Some(control);
    place.end().await;
}
