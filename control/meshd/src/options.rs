//! What the operator sets for this daemon. Every option is a flag and an environment variable.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use clap::Args;

/// Options of the daemon.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where the node keeps its identity, its raft log and its tasks.
    #[arg(long, env = "MESH_STATE_DIR", default_value = "/var/lib/mesh", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// The unix socket of the API.
    #[arg(long, env = "MESH_SOCKET", default_value = "/run/mesh/mesh.sock", value_name = "PATH")]
    pub socket: PathBuf,
    /// The node's name; the host name if not given.
    #[arg(long, env = "MESH_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// The address that other nodes reach this one at, unless `swarm init` or `join` gives one.
    #[arg(long, env = "MESH_ADVERTISE_ADDR", value_name = "IP")]
    pub advertise_addr: Option<IpAddr>,
    /// The address that this node's tunnels end at; the advertised address if not given.
    #[arg(long, env = "MESH_DATA_PATH_ADDR", value_name = "IP")]
    pub data_path_addr: Option<IpAddr>,
    /// The underlay link; the one with the data path address if not given.
    #[arg(long, env = "MESH_UPLINK", value_name = "LINK")]
    pub uplink: Option<String>,
    /// Where BPF objects are pinned.
    #[arg(long, env = "MESH_PIN_DIR", default_value = "/sys/fs/bpf/mesh", value_name = "DIR")]
    pub pin_dir: PathBuf,
    /// The cgroup (v2) that tasks live under; `mesh` below the cgroup2 mount if not given.
    #[arg(long, env = "MESH_CGROUP_PARENT", value_name = "DIR")]
    pub cgroup_parent: Option<PathBuf>,
    /// A directory in front of the PATH of process tasks; that of meshd itself if not given.
    #[arg(long, env = "MESH_PATH_DIR", value_name = "DIR")]
    pub path_dir: Option<PathBuf>,
    /// Send and receive through the kernel's VXLAN device instead of writing VXLAN headers in BPF.
    #[arg(long, env = "MESH_VXLAN_VIA_DEVICE")]
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
    /// For tests of slow nodes: the kernel hears of every change this many milliseconds late.
    #[arg(long, hide = true, default_value_t = 0, value_name = "MS")]
    pub fault_apply_late: u64,
    /// For tests of large clusters: so many nodes alone probe each data path, however few exist.
    #[arg(long, hide = true, default_value_t = 0, value_name = "N")]
    pub fault_watchers: usize,
    /// Log filter: error, warn, info, debug, trace, or per module (`meshd=debug`).
    #[arg(long, env = "MESH_LOG", default_value = "info,openraft=warn", value_name = "FILTER")]
    pub log: String,
}

impl Options {
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
