//! The servers of `mesh-bench dns`: all in one namespace, on its loopback, each with one worker,
//! and all of the same names.

use std::{
    fs,
    io::{Read, Write},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_dns::{
    control::{Request, Status},
    netns::{RESOLVER_ADDRESS, RESOLVER_PORT},
    snapshot::{Policy, Snapshot, TaskView},
};
use mesh_types::{
    EndpointId, NetworkId, NodeNumber, Revision, ServiceId, TaskId, Vni,
    record::{EndpointRecord, EndpointState, NetworkRecord, ServiceRecord},
    spec::EndpointMode,
};

use crate::shell::{Netns, sh};

const NAMESPACE: &str = "mbench-dns";
/// How long a server may take to answer for the first time.
const START: Duration = Duration::from_secs(20);

/// The server that is measured against the others.
pub(crate) const MESH: &str = "mesh";

/// The namespace and the directory that the servers are in; gone when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) netns: Netns,
    pub(crate) dir: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = sh(&format!("ip netns del {NAMESPACE}"));
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Place {
    pub(crate) fn make() -> Result<Self> {
        let _ = sh(&format!("ip netns del {NAMESPACE}"));
        sh(&format!("ip netns add {NAMESPACE}"))?;
        // In memory: dnsperf writes a line for each answer of which the time is taken.
        let dir = PathBuf::from(format!("/dev/shm/{NAMESPACE}-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let place = Self { netns: Netns::named(NAMESPACE), dir };
        place.netns.sh("ip link set lo up")?;
        Ok(place)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

/// A name of the zone that all serve, and its address.
pub(crate) fn name(number: usize) -> (String, Ipv4Addr) {
    let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 32, 0, 2).to_bits() + number as u32);
    (format!("svc-{number:05}"), address)
}

/// A server under way; killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) address: Ipv4Addr,
    pub(crate) port: u16,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        for pid in self.pids().into_iter().rev() {
            let _ = sh(&format!("kill -9 {pid}"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts all of them.
    pub(crate) fn start_all(place: &Place, names: usize, cpu: usize) -> Result<Vec<Self>> {
        let servers = vec![
            mesh(place, names, cpu)?,
            unbound(place, names, cpu)?,
            nsd(place, names, cpu)?,
            dnsmasq(place, names, cpu)?,
        ];
        for server in &servers {
            server.wait_for(place, names)?;
        }
        Ok(servers)
    }

    fn start(
        place: &Place,
        name: &'static str,
        (address, port): (Ipv4Addr, u16),
        cpu: usize,
        words: &[&str],
    ) -> Result<Self> {
        let log = fs::File::create(place.path(&format!("{name}.log")))?;
        let child = Command::new("nsenter")
            .arg(format!("--net={}", place.netns.0.display()))
            .args(["taskset", "-c", &cpu.to_string()])
            .args(words)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name, address, port, child })
    }

    /// Waits until the first and the last name are served.
    fn wait_for(&self, place: &Place, names: usize) -> Result<()> {
        let end = Instant::now() + START;
        for number in [0, names - 1] {
            let (name, address) = name(number);
            let ask = format!(
                "dig @{} -p {} +short +tries=1 +time=1 {name}.app",
                self.address, self.port
            );
            while place.netns.sh(&ask).unwrap_or_default().trim() != address.to_string() {
                if Instant::now() > end {
                    let log = fs::read_to_string(place.path(&format!("{}.log", self.name)));
                    bail!("{} does not serve {name}.app: {}", self.name, log.unwrap_or_default());
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    /// Its processes: itself and its children.
    fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.child.id()];
        let mut next = 0;
        while let Some(pid) = pids.get(next).copied() {
            next += 1;
            let path = format!("/proc/{pid}/task/{pid}/children");
            let children = fs::read_to_string(path).unwrap_or_default();
            pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        pids
    }

    /// Resident memory of all its processes, in MiB.
    pub(crate) fn resident_mib(&self) -> Result<f64> {
        let mut kib = 0.0;
        for pid in self.pids() {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))
                .with_context(|| format!("{} has ended", self.name))?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let number = line.and_then(|line| line.split_whitespace().next()).unwrap_or("0");
            kib += number.parse::<f64>()?;
        }
        Ok(kib / 1024.0)
    }
}

fn mesh(place: &Place, names: usize, cpu: usize) -> Result<Server> {
    let exe = std::env::current_exe()?.with_file_name("meshd");
    let (socket, state) = (place.path("control.sock"), place.path("last.json"));
    let words = ["dns", "--control-socket"].map(str::to_owned);
    let words: Vec<String> = [exe.display().to_string()]
        .into_iter()
        .chain(words)
        .chain([socket.display().to_string(), "--state-file".into(), state.display().to_string()])
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let server = Server::start(place, MESH, (RESOLVER_ADDRESS, RESOLVER_PORT), cpu, &words)?;
    let end = Instant::now() + START;
    let mut control = loop {
        match UnixStream::connect(&socket) {
            Ok(control) => break control,
            Err(error) if Instant::now() > end => return Err(error).context("the control socket"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let request = Request::Snapshot(Box::new(snapshot(place, names)?));
    let body = serde_json::to_vec(&request)?;
    control.write_all(&u32::try_from(body.len())?.to_be_bytes())?;
    control.write_all(&body)?;
    loop {
        let mut length = [0; 4];
        control.read_exact(&mut length)?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        control.read_exact(&mut body)?;
        let status: Status = serde_json::from_slice(&body)?;
        if status.tasks.values().any(Option::is_none) {
            return Ok(server);
        }
        ensure!(Instant::now() < end, "the resolver opens no sockets: {:?}", status.tasks);
    }
}

/// As many services, each with a virtual address and one task.
fn snapshot(place: &Place, names: usize) -> Result<Snapshot> {
    let network = NetworkId::from_bits(1);
    let service = |number: usize| {
        let (name, vip) = name(number);
        ServiceRecord {
            network,
            id: ServiceId::from_bits(number as u128),
            name,
            aliases: Vec::new(),
            mode: EndpointMode::Vip,
            vip: Some(vip.into()),
            ports: Vec::new(),
        }
    };
    let endpoint = |number: usize| {
        let task = TaskId::from_bits(number as u128);
        let (name, vip) = name(number);
        Some(EndpointRecord {
            id: EndpointId::new(number as u64 + 1).ok()?,
            network,
            node: NodeNumber::MIN,
            address: Ipv4Addr::from_bits(vip.to_bits() + 0x8000).into(),
            task,
            task_name: format!("{name}.1.{task}"),
            service: ServiceId::from_bits(number as u128),
            state: EndpointState::Ready,
        })
    };
    Ok(Snapshot {
        revision: Revision::MIN,
        networks: vec![NetworkRecord {
            id: network,
            name: "app".to_owned(),
            vni: Vni::MIN,
            subnet: "10.32.0.0/16".parse()?,
            gateway: Ipv4Addr::new(10, 32, 0, 1).into(),
            mtu: None,
            internal: false,
            ingress: false,
        }],
        services: (0..names).map(service).collect(),
        endpoints: (0..names).filter_map(endpoint).collect(),
        tasks: vec![TaskView {
            task: TaskId::from_bits(1 << 64),
            netns: place.netns.0.clone(),
            networks: vec![network],
            forward: true,
            servers: Vec::new(),
        }],
        upstreams: Vec::new(),
        // One task asks all of it.
        policy: Policy { rate_limit: 0, ..Policy::default() },
    })
}

fn unbound(place: &Place, names: usize, cpu: usize) -> Result<Server> {
    let port = 5301;
    let data: String = (0..names)
        .map(name)
        .map(|(name, address)| format!("  local-data: \"{name}.app. 5 IN A {address}\"\n"))
        .collect();
    let path = place.write(
        "unbound.conf",
        &format!(
            "server:\n  interface: 127.0.0.1@{port}\n  num-threads: 1\n  do-daemonize: no\n  \
             username: \"\"\n  chroot: \"\"\n  directory: \"{0}\"\n  pidfile: \"\"\n  \
             use-syslog: no\n  logfile: \"\"\n  verbosity: 0\n  module-config: \"iterator\"\n  \
             local-zone: \"app.\" static\n{data}remote-control:\n  control-enable: no\n",
            place.dir.display()
        ),
    )?;
    let words = ["unbound", "-d", "-c", &path.display().to_string()];
    Server::start(place, "unbound", (Ipv4Addr::LOCALHOST, port), cpu, &words)
}

fn nsd(place: &Place, names: usize, cpu: usize) -> Result<Server> {
    let port = 5302;
    let records: String =
        (0..names).map(name).map(|(name, address)| format!("{name} 5 IN A {address}\n")).collect();
    place.write(
        "app.zone",
        &format!(
            "$ORIGIN app.\n@ 5 IN SOA app. app. 1 5 5 5 5\n@ 5 IN NS ns.app.\nns 5 IN A 127.0.0.1\n\
             {records}"
        ),
    )?;
    let dir = place.dir.display();
    let path = place.write(
        "nsd.conf",
        &format!(
            "server:\n  ip-address: 127.0.0.1@{port}\n  server-count: 1\n  username: \"\"\n  \
             zonesdir: \"{dir}\"\n  database: \"\"\n  pidfile: \"\"\n  \
             xfrdfile: \"{dir}/xfrd.state\"\n  zonelistfile: \"{dir}/zone.list\"\n  \
             xfrdir: \"{dir}\"\n  rrl-ratelimit: 0\n  minimal-responses: yes\n\
             remote-control:\n  control-enable: no\n\
             zone:\n  name: app\n  zonefile: app.zone\n"
        ),
    )?;
    let words = ["nsd", "-d", "-c", &path.display().to_string()];
    Server::start(place, "nsd", (Ipv4Addr::LOCALHOST, port), cpu, &words)
}

fn dnsmasq(place: &Place, names: usize, cpu: usize) -> Result<Server> {
    let port = 5303;
    let hosts: String =
        (0..names).map(name).map(|(name, address)| format!("{address} {name}.app\n")).collect();
    let path = place.write("hosts", &hosts)?;
    let hosts = format!("--addn-hosts={}", path.display());
    let words = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--port=5303",
        "--listen-address=127.0.0.1",
        "--bind-interfaces",
        "--no-resolv",
        "--no-hosts",
        "--local=/app/",
        "--local-ttl=5",
        "--cache-size=10000",
        "--user=root",
        "--pid-file=",
        &hosts,
    ];
    Server::start(place, "dnsmasq", (Ipv4Addr::LOCALHOST, port), cpu, &words)
}
