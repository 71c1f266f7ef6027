//! All metrics: their names, kinds, labels and words. Those of Docker have its names and labels;
//! what has no counterpart here is left out rather than made up (swarmkit's `store_read_tx`,
//! `store_lookup`, `store_batch` and `store_memory_store_lock`).

use super::{Kind, Metric};

macro_rules! metrics {
    ($($name:ident = $kind:ident $text:literal [$($label:literal),*] $help:literal;)*) => {
        $(
            #[doc = $help]
            pub static $name: Metric = Metric::new($text, Kind::$kind, &[$($label),*], $help);
        )*
        /// All of them, in the order in which they are shown.
        pub static ALL: &[&Metric] = &[$(&$name),*];
    };
}

metrics! {
    BUILD = Gauge "mesh_build_info" ["version"] "Always 1: which meshd this is";

    OVERLAY_PACKETS = Counter "mesh_overlay_packets_total" ["path"]
        "Packets that the BPF programs carried, by the way that they took";
    OVERLAY_DROPS = Counter "mesh_overlay_drops_total" ["reason"]
        "Packets that the BPF programs dropped, by reason";
    OVERLAY_EVENTS = Counter "mesh_overlay_events_total" ["event"]
        "What else the BPF programs did: answers in place, ICMP errors";
    OVERLAY_REVISION = Gauge "mesh_overlay_revision" ["of"]
        "The revision that this node was told (`told`) and that its kernel has (`kernel`)";
    OVERLAY_RECORDS = Gauge "mesh_overlay_records" ["kind"]
        "What this node knows of: nodes, networks, services, endpoints";

    LB_FLOWS_NEW = Counter "mesh_lb_flows_new_total" []
        "New flows that were given a backend here";
    LB_REBALANCED = Counter "mesh_lb_rebalanced_packets_total" []
        "Packets of published ports whose backend is gone from here, given to another one";
    LB_TABLE_FULL = Counter "mesh_lb_flow_table_full_total" []
        "Packets of flows that found no room among the established ones";
    LB_FLOWS = Gauge "mesh_lb_flows" []
        "Entries of the flow table, as its last whole walk found them; a flow has one or two";
    LB_FLOWS_MAX = Gauge "mesh_lb_flows_max" [] "Entries that the flow table has room for";

    DNS_UP = Gauge "mesh_dns_up" [] "1 while the resolver process is connected to the daemon";
    DNS_LOST = Counter "mesh_dns_lost_total" []
        "How often the daemon lost the resolver process, which is then started again";
    DNS_QUERIES = Counter "mesh_dns_queries_total" []
        "Questions of this node's tasks, since the resolver process began";
    DNS_ANSWERS = Counter "mesh_dns_answers_total" ["source"]
        "How they were answered: on the fast path, by other servers, from the cache of these; \
         the rest was answered on the slow path";
    DNS_DROPS = Counter "mesh_dns_drops_total" ["reason"] "Questions that were dropped, by reason";

    GOSSIP_MEMBERS = Gauge "mesh_gossip_members" [] "Other nodes that answer gossip";
    GOSSIP_DATAGRAMS = Counter "mesh_gossip_datagrams_total" ["direction"]
        "Datagrams of the gossip: `in`, `out`, or `rejected`: those that came in and were not \
         understood";
    GOSSIP_EVENTS = Counter "mesh_gossip_events_total" ["event"]
        "Changes of the membership as this node saw them";
    GOSSIP_SYNCS = Counter "mesh_gossip_syncs_total" ["result"]
        "Comparisons of notes: calls of this node that were answered (`called`) or not \
         (`failed`), and calls of others (`answered`)";

    PROBES = Counter "mesh_probe_datagrams_total" ["direction"]
        "Probes of other nodes' data paths that were sent, and their answers";
    PROBE_PEERS = Gauge "mesh_probe_peers" ["state"]
        "Nodes whose data path answered lately (`reached`), does not (`silent`), or gets no new \
         flows from here (`withdrawn`)";

    RECONCILER_ROUNDS = Counter "mesh_reconciler_rounds_total" ["loop", "result"]
        "Rounds of the loops that bring what is to what should be";
    RECONCILER_SECONDS = Histogram "mesh_reconciler_round_seconds" ["loop"]
        "How long these rounds took";
    RECONCILER_HEALED = Counter "mesh_reconciler_healed_total" []
        "Kernel objects that someone else had changed, and that were put back";

    RAFT_TERM = Gauge "mesh_raft_term" [] "The term";
    RAFT_LEADER = Gauge "mesh_raft_leader" [] "1 while this node leads and a majority answers it";
    RAFT_QUORUM = Gauge "mesh_raft_quorum" [] "1 while a leader with a majority is known";
    RAFT_LEADER_NUMBER = Gauge "mesh_raft_leader_number" []
        "The raft number of the leader; 0 while there is none";
    RAFT_LEADER_CHANGES = Counter "mesh_raft_leader_changes_total" []
        "How often this node saw another leader, or none";
    RAFT_MEMBERS = Gauge "mesh_raft_members" ["kind"] "Voters, and learners that only follow";
    RAFT_INDEX = Gauge "mesh_raft_index" ["of"]
        "Log indexes: the last entry, the last one applied, that of the snapshot";
    RAFT_LAG = Gauge "mesh_raft_lag_entries" ["number"]
        "On the leader: by how many entries each other manager is behind";
    RAFT_STORE_BYTES = Gauge "mesh_raft_store_bytes" [] "The store's size on the disk";
    LEADER_COMMANDS = Counter "mesh_leader_commands_total" ["result"]
        "What the leader's loops decided and had written";

    TASKS = Gauge "mesh_tasks" ["state"] "Tasks that are assigned to this node, by state";
    TASK_EXITS = Counter "mesh_task_exits_total" ["result"]
        "Tasks of this node whose process ended, by what that made of them: `complete`, `failed`, \
         or `shutdown` when they were told to";
    TASK_STEPS = Counter "mesh_task_steps_total" ["step", "result"]
        "What the agent did with tasks";

    API_REQUESTS = Counter "mesh_api_requests_total" ["method", "route", "code"]
        "Requests to the API that were answered";
    API_SECONDS = Histogram "mesh_api_request_seconds" ["method"]
        "How long the answers took, to their first byte";

    REFUSED = Counter "mesh_refused_total" ["what"]
        "What other machines asked of this node and was refused: connections, handshakes, calls, \
         join tokens, tries to join";
    CERTIFICATE_EXPIRY = Gauge "mesh_certificate_expiry_timestamp_seconds" []
        "When this node's certificate ends, since the Unix epoch";

    ENGINE_INFO = Gauge "engine_daemon_engine_info"
        ["architecture", "commit", "daemon_id", "graphdriver", "kernel", "os", "os_type",
         "os_version", "version"]
        "Always 1: what this machine is";
    ENGINE_CPUS = Gauge "engine_daemon_engine_cpus_cpus" [] "CPUs of this machine";
    ENGINE_MEMORY = Gauge "engine_daemon_engine_memory_bytes" [] "Memory of this machine";
    ENGINE_CONTAINERS = Gauge "engine_daemon_container_states_containers" ["state"]
        "Tasks of this node, in the states of containers";

    SWARM_NODE_INFO = Gauge "swarm_node_info" ["swarm_id", "node_id"]
        "Always 1: who this node is in its cluster";
    SWARM_NODE_MANAGER = Gauge "swarm_node_manager" [] "1 on managers";
    SWARM_LEADER = Gauge "swarm_manager_leader" [] "1 on the leader";
    SWARM_NODES = Gauge "swarm_manager_nodes" ["state"] "Nodes of the cluster, by state";
    SWARM_TASKS = Gauge "swarm_manager_tasks_total" ["state"] "Tasks of the cluster, by state";
    SWARM_SERVICES = Gauge "swarm_manager_services_total" [] "Services of the cluster";
    SWARM_NETWORKS = Gauge "swarm_manager_networks_total" [] "Networks of the cluster";
    SWARM_SCHEDULING = Histogram "swarm_dispatcher_scheduling_delay_seconds" []
        "From a task's beginning until its node reported to this manager that it runs";
    SWARM_TRANSACTION = Histogram "swarm_raft_transaction_latency_seconds" []
        "On the leader: how long writes took until a majority had them";
    SWARM_SNAPSHOT = Histogram "swarm_raft_snapshot_latency_seconds" []
        "How long snapshots of the store took";
    SWARM_WRITE = Histogram "swarm_store_write_tx_latency_seconds" []
        "How long changes of the store in memory took";

    PROCESS_CPU = Counter "process_cpu_seconds_total" [] "CPU time of the daemon";
    PROCESS_RESIDENT = Gauge "process_resident_memory_bytes" [] "Memory of the daemon";
    PROCESS_VIRTUAL = Gauge "process_virtual_memory_bytes" [] "Address space of the daemon";
    PROCESS_THREADS = Gauge "process_threads" [] "Threads of the daemon";
    PROCESS_FDS = Gauge "process_open_fds" [] "Open files of the daemon";
    PROCESS_FDS_MAX = Gauge "process_max_fds" [] "Open files that it may have";
    PROCESS_START = Gauge "process_start_time_seconds" []
        "When the daemon began, since the Unix epoch";
}
