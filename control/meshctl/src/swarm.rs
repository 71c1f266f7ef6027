//! `meshctl swarm`.

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use mesh_api::{CaConfig, ClusterSpec, Info, Node, Orchestration, Swarm, SwarmInit, SwarmJoin};

use crate::{
    client::{Client, NOTHING, escape},
    output::{InspectFormat, objects, say},
    service::duration,
    settings,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a cluster of this node
    Init(InitArgs),
    /// Join a cluster as the node that the token says: worker or manager
    Join(JoinArgs),
    /// Leave the cluster
    Leave {
        /// Leave even as a manager
        #[arg(short, long)]
        force: bool,
    },
    /// Show the cluster's settings, root certificate and tokens
    Inspect(InspectFormat),
    /// Change the cluster's settings
    Update(settings::UpdateArgs),
    /// Show or replace the root certificate that every node trusts
    Ca(settings::CaArgs),
    /// Replace the key that seals gossip between nodes
    ///
    /// Whoever had the old one (a node that was removed, a disk that was lost) reads and says
    /// nothing more. Every node gets the new key first, then uses it, then the old one is dropped;
    /// a node that is down gets it when it is back.
    RotateGossipKey {
        /// Do not wait until the old one is dropped
        #[arg(short, long)]
        detach: bool,
    },
    /// Show or rotate a join token
    JoinToken {
        /// Whose
        role: TokenRole,
        /// Print the token alone
        #[arg(short, long)]
        quiet: bool,
        /// Replace it; nodes that joined with the old one stay
        #[arg(long)]
        rotate: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TokenRole {
    Worker,
    Manager,
}

/// Whether a node takes tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Availability {
    /// Takes tasks
    Active,
    /// Keeps its tasks, takes no more
    Pause,
    /// Has its tasks moved away
    Drain,
}

impl Availability {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Pause => "pause",
            Self::Drain => "drain",
        }
    }
}

#[derive(Debug, Args)]
struct AddressArgs {
    /// The address that other nodes reach this one at: an IP address or a link's name
    #[arg(long, default_value = "", hide_default_value = true, value_name = "ADDR")]
    advertise_addr: String,
    /// Where this node's tunnels end; the advertised address if not given
    #[arg(long, default_value = "", hide_default_value = true, value_name = "ADDR")]
    data_path_addr: String,
    /// Where the managers' port listens
    #[arg(long, default_value = "0.0.0.0:2377", value_name = "ADDR")]
    listen_addr: String,
    /// Whether this node takes tasks
    #[arg(long, value_enum, default_value = "active")]
    availability: Availability,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    #[command(flatten)]
    address: AddressArgs,
    /// VXLAN's UDP port, 1024-49151; 4789 if not given
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "PORT")]
    data_path_port: u32,
    /// Subnets of networks are leased from here (may be repeated); 10.0.0.0/8 if not given
    #[arg(long, value_delimiter = ',', value_name = "SUBNET")]
    default_addr_pool: Vec<String>,
    /// The prefix length of leased subnets
    #[arg(long, default_value_t = 24, value_name = "BITS")]
    default_addr_pool_mask_length: u32,
    /// Ended tasks kept per slot
    #[arg(long, default_value_t = 5, value_name = "N")]
    task_history_limit: i64,
    /// How long a node must be silent, its data path too, before its tasks are replaced; 15s if
    /// not given
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    reschedule_after: Option<u64>,
    /// Life of a node certificate
    #[arg(long, value_parser = duration, default_value = "2160h", value_name = "DURATION")]
    cert_expiry: u64,
}

#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    #[command(flatten)]
    address: AddressArgs,
    /// The join token, `SWMTKN-1-…`
    #[arg(long, value_name = "TOKEN")]
    token: String,
    /// A manager, `HOST:2377`
    manager: String,
}

pub(crate) async fn run(client: &Client, command: Command) -> Result<()> {
    match command {
        Command::Init(args) => init(client, args).await,
        Command::Join(args) => join(client, args).await,
        Command::Leave { force } => {
            let query = if force { "?force=1" } else { "" };
            client.tell(&format!("/swarm/leave{query}"), NOTHING).await?;
            say("Node left the swarm.")
        }
        Command::Inspect(format) => {
            let swarm: serde_json::Value = client.get("/swarm").await?;
            objects(&[swarm], &format)
        }
        Command::Update(args) => settings::update(client, args).await,
        Command::Ca(args) => settings::root(client, &args).await,
        Command::RotateGossipKey { detach } => settings::rotate_gossip_key(client, detach).await,
        Command::JoinToken { role, quiet, rotate } => token(client, role, quiet, rotate).await,
    }
}

async fn init(client: &Client, args: InitArgs) -> Result<()> {
    let request = SwarmInit {
        listen_addr: args.address.listen_addr,
        advertise_addr: args.address.advertise_addr,
        data_path_addr: args.address.data_path_addr,
        availability: args.address.availability.word().into(),
        data_path_port: args.data_path_port,
        default_addr_pool: args.default_addr_pool,
        subnet_size: args.default_addr_pool_mask_length,
        spec: ClusterSpec {
            orchestration: Orchestration {
                task_history_retention_limit: Some(args.task_history_limit),
                reschedule_after: args.reschedule_after,
            },
            ca_config: CaConfig { node_cert_expiry: args.cert_expiry, ..CaConfig::default() },
            ..ClusterSpec::default()
        },
        ..SwarmInit::default()
    };
    let node: String = client.post("/swarm/init", Some(&request)).await?;
    say(format!("Swarm initialized: current node ({node}) is now a manager.\n"))?;
    let swarm: Swarm = client.get("/swarm").await?;
    join_line(client, &node, &swarm, TokenRole::Worker).await?;
    say("\nTo add a manager, run 'meshctl swarm join-token manager' and follow the instructions.")
}

async fn join(client: &Client, args: JoinArgs) -> Result<()> {
    let request = SwarmJoin {
        listen_addr: args.address.listen_addr,
        advertise_addr: args.address.advertise_addr,
        data_path_addr: args.address.data_path_addr,
        availability: args.address.availability.word().into(),
        remote_addrs: vec![args.manager],
        join_token: args.token,
    };
    client.tell("/swarm/join", Some(&request)).await?;
    let info: Info = client.get("/info").await?;
    let role = if info.swarm.control_available { "manager" } else { "worker" };
    say(format!("This node joined a swarm as a {role}."))
}

async fn token(client: &Client, role: TokenRole, quiet: bool, rotate: bool) -> Result<()> {
    let mut swarm: Swarm = client.get("/swarm").await?;
    if rotate {
        let path = format!(
            "/swarm/update?version={}&rotateWorkerToken={}&rotateManagerToken={}",
            swarm.version.index,
            role == TokenRole::Worker,
            role == TokenRole::Manager
        );
        client.tell(&path, Some(&swarm.spec)).await?;
        swarm = client.get("/swarm").await?;
        if !quiet {
            say(format!("Successfully rotated {} join token.\n", role_word(role)))?;
        }
    }
    if quiet {
        return say(secret(&swarm, role)?);
    }
    let info: Info = client.get("/info").await?;
    join_line(client, &info.swarm.node_id, &swarm, role).await
}

fn role_word(role: TokenRole) -> &'static str {
    match role {
        TokenRole::Worker => "worker",
        TokenRole::Manager => "manager",
    }
}

fn secret(swarm: &Swarm, role: TokenRole) -> Result<String> {
    let Some(tokens) = &swarm.join_tokens else { bail!("the daemon did not tell its join tokens") };
    Ok(match role {
        TokenRole::Worker => tokens.worker.clone(),
        TokenRole::Manager => tokens.manager.clone(),
    })
}

async fn join_line(client: &Client, node: &str, swarm: &Swarm, role: TokenRole) -> Result<()> {
    let me: Node = client.get(&format!("/nodes/{}", escape(node))).await?;
    let address = me.manager_status.map(|status| status.addr).context("this node is no manager")?;
    say(format!(
        "To add a {} to this swarm, run the following command:\n\n    \
         meshctl swarm join --token {} {address}",
        role_word(role),
        secret(swarm, role)?
    ))
}
