//! What the operator sets for this daemon. Every option is a flag, a variable of the environment
//! and a key of the configuration file ([`crate::config`]); those for tests are flags alone.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use clap::{ArgAction, Args, builder::BoolishValueParser};
use tracing_subscriber::EnvFilter;

use crate::log::LogFormat;

/// Options of the daemon.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where the node keeps its identity, its raft log and its tasks.
    #[arg(
        long,
        env = "MESH_STATE_DIR",
        default_value = "/var/lib/mesh",
        value_parser = absolute,
        value_name = "DIR"
    )]
    pub state_dir: PathBuf,
    /// The unix socket of the API.
    #[arg(
        long,
        env = "MESH_SOCKET",
        default_value = mesh_api::DEFAULT_SOCKET,
        value_parser = absolute,
        value_name = "PATH"
    )]
    pub socket: PathBuf,
    /// The group that may use the API's socket, beside root: its members are as mighty as root.
    /// `mesh` if there is such a group, else nobody.
    #[arg(long, env = "MESH_SOCKET_GROUP", value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// The node's name; the host name if not given.
    #[arg(long, env = "MESH_NODE_NAME", value_parser = node_name, value_name = "NAME")]
    pub node_name: Option<String>,
    /// The address that other nodes reach this one at, unless `swarm init` or `join` gives one.
    #[arg(long, env = "MESH_ADVERTISE_ADDR", value_parser = own_address, value_name = "IP")]
    pub advertise_addr: Option<IpAddr>,
    /// The address that this node's tunnels end at; the advertised address if not given.
    #[arg(long, env = "MESH_DATA_PATH_ADDR", value_parser = own_address, value_name = "IP")]
    pub data_path_addr: Option<IpAddr>,
    /// The underlay link; the one with the data path address if not given.
    #[arg(long, env = "MESH_UPLINK", value_parser = link, value_name = "LINK")]
    pub uplink: Option<String>,
    /// Where BPF objects are pinned.
    #[arg(
        long,
        env = "MESH_PIN_DIR",
        default_value = "/sys/fs/bpf/mesh",
        value_parser = absolute,
        value_name = "DIR"
    )]
    pub pin_dir: PathBuf,
    /// The cgroup (v2) that tasks live under; `mesh` below the cgroup2 mount if not given.
    #[arg(long, env = "MESH_CGROUP_PARENT", value_parser = absolute, value_name = "DIR")]
    pub cgroup_parent: Option<PathBuf>,
    /// A directory in front of the PATH of process tasks; that of meshd itself if not given.
    #[arg(long, env = "MESH_PATH_DIR", value_parser = absolute, value_name = "DIR")]
    pub path_dir: Option<PathBuf>,
    /// Send and receive through the kernel's VXLAN device instead of writing VXLAN headers in BPF.
    #[arg(
        long,
        env = "MESH_VXLAN_VIA_DEVICE",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = false,
        value_parser = BoolishValueParser::new(),
        value_name = "BOOL"
    )]
    pub vxlan_via_device: bool,
    /// Entries of each connection tracking map (1M entries cost about 180 MiB).
    #[arg(
        long,
        env = "MESH_CONNTRACK_ENTRIES",
        default_value_t = 1 << 20,
        value_parser = clap::value_parser!(u32).range(1024..=1 << 24),
        value_name = "N"
    )]
    pub conntrack_entries: u32,
    /// Seconds for which tasks may remember what a name of the cluster stands for. More spares
    /// look-ups, and is how long they may go on asking for a task that is gone.
    #[arg(
        long,
        env = "MESH_DNS_TTL",
        default_value_t = mesh_dns::snapshot::TTL_DEFAULT,
        value_parser = clap::value_parser!(u32).range(0..=86_400),
        value_name = "SECONDS"
    )]
    pub dns_ttl: u32,
    /// How many DNS queries a second one task gets answers to over UDP; 0: no limit.
    #[arg(
        long,
        env = "MESH_DNS_RATE_LIMIT",
        default_value_t = mesh_dns::snapshot::RATE_LIMIT_DEFAULT,
        value_name = "N"
    )]
    pub dns_rate_limit: u32,
    /// Serve metrics for Prometheus at this address too (`/metrics`), to whoever reaches it. On the
    /// API's socket they are in any case.
    #[arg(long, env = "MESH_METRICS_ADDR", value_name = "IP:PORT")]
    pub metrics_addr: Option<SocketAddr>,
    /// For tests of slow nodes: the kernel hears of every change this many milliseconds late.
    #[arg(long, hide = true, default_value_t = 0, value_name = "MS")]
    pub fault_apply_late: u64,
    /// For tests of large clusters: so many nodes alone probe each data path, however few exist.
    #[arg(long, hide = true, default_value_t = 0, value_name = "N")]
    pub fault_watchers: usize,
    /// Log filter: error, warn, info, debug, trace, or per module (`meshd=debug`).
    #[arg(
        long,
        env = "MESH_LOG",
        default_value = "info,openraft=warn",
        value_parser = log_filter,
        value_name = "FILTER"
    )]
    pub log: String,
    /// How the lines of the log look: for people, or one JSON object each.
    #[arg(
        long,
        env = "MESH_LOG_FORMAT",
        default_value = "text",
        value_enum,
        value_name = "FORMAT"
    )]
    pub log_format: LogFormat,
}

/// The longest path of a unix socket (`sun_path` of unix(7), with its NUL).
const SOCKET_PATH_MAX: usize = 107;
/// The longest name of a link (`IFNAMSIZ` of netdevice(7), with its NUL).
const LINK_NAME_MAX: usize = 15;
/// As of a label of DNS, which node names end up beside.
const NODE_NAME_MAX: usize = 63;

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("not an absolute path".to_owned()) }
}

fn own_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|error| format!("{error}"))?;
    if address.is_unspecified() || address.is_multicast() {
        return Err("not the address of one machine".to_owned());
    }
    Ok(address)
}

fn link(text: &str) -> Result<String, String> {
    let named = (1..=LINK_NAME_MAX).contains(&text.len())
        && !text.contains(|c: char| c == '/' || c.is_whitespace());
    if named { Ok(text.to_owned()) } else { Err("not the name of a link".to_owned()) }
}

fn node_name(text: &str) -> Result<String, String> {
    let named = (1..=NODE_NAME_MAX).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
    let rule = || format!("1 to {NODE_NAME_MAX} letters, digits, `.`, `-` and `_` make a name");
    if named { Ok(text.to_owned()) } else { Err(rule()) }
}

fn log_filter(text: &str) -> Result<String, String> {
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}")),
    }
}

impl Options {
    /// What does not go together: the option at fault, and why.
    #[must_use]
    pub fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        if let (Some(advertised), Some(data)) = (self.advertise_addr, self.data_path_addr)
            && advertised.is_ipv4() != data.is_ipv4()
        {
            let why = format!("{data} and the advertised {advertised} are IPv4 and IPv6");
            found.push(("data_path_addr", why));
        }
        let length = self.socket.as_os_str().len();
        if length > SOCKET_PATH_MAX {
            let why = format!("{length} bytes: a socket's path has {SOCKET_PATH_MAX} at most");
            found.push(("socket", why));
        }
        if let Some(group) = &self.socket_group
            && self.socket.starts_with(&self.state_dir)
        {
            let why = format!(
                "`{group}` does not reach {}: {} is for root alone",
                self.socket.display(),
                self.state_dir.display()
            );
            found.push(("socket_group", why));
        }
        found
    }

    /// Where task directories are.
    #[must_use]
    pub fn tasks_dir(&self) -> PathBuf {
        self.state_dir.join("tasks")
    }

    /// Where the raft log is.
    #[must_use]
    pub fn raft_dir(&self) -> PathBuf {
        self.state_dir.join("raft")
    }

    /// The cgroup that tasks live under.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        self.cgroup_parent.clone().unwrap_or_else(|| {
            // Hybrid hosts have cgroup2 beside the v1 controllers.
            let hybrid = Path::new("/sys/fs/cgroup/unified");
            let root = if hybrid.exists() { hybrid } else { Path::new("/sys/fs/cgroup") };
            root.join("mesh")
        })
    }

    /// The directory put in front of the PATH of process tasks.
    #[must_use]
    pub fn path_prefix(&self) -> Option<PathBuf> {
        self.path_dir.clone().or_else(|| {
            std::env::current_exe().ok().as_deref().and_then(Path::parent).map(Path::to_owned)
        })
    }
}
