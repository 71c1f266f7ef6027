//! One manager without the rest of the daemon: raft, the store, and calls over mutual TLS.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use bytes::Bytes;
use clap::Args;
use futures::stream::BoxStream;
use mesh_control::{
    command::{Command, InitCluster, NewNode, NodeReport, Proposal},
    model::{ClusterSpec, NodeDescription, NodeSpec, NodeState, NodeStatus, Role},
};
use mesh_raft::{Raft, RaftConfig, RpcKind};
use mesh_types::{ClusterId, NetworkId, NodeId, NodeNumber};
use meshd::{
    identity::Identity,
    pki::{self, Root, Subject},
    rpc::{
        Joiner, RaftTransport, Refusals, RpcClient, RpcError, RpcErrorKind, RpcHandler, RpcServer,
        Standing,
        frames::{FrameReader, FrameWriter},
        messages::{
            ExecInput, ExecOutput, ExecRequest, JoinRequest, JoinResponse, LogsOutput, LogsRequest,
            NodeUpdate, RenewRequest, RenewResponse, ReportRequest, ReportResponse, SessionRequest,
            StatsResponse,
        },
    },
    tls::{ClientTls, ServerTls},
};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::load;

const CLUSTER: ClusterId = ClusterId::from_bits(1);
const PORT: u16 = 2377;
/// A certificate's life: longer than any run.
const LIFE: Duration = Duration::from_secs(86_400);

/// Options of one manager.
#[derive(Debug, Args)]
pub(crate) struct Node {
    /// Its number, from 1.
    #[arg(long)]
    number: u64,
    /// Its directory, with its key and certificate.
    #[arg(long)]
    dir: PathBuf,
    /// Go on from what is there.
    #[arg(long)]
    resume: bool,
}

pub(super) fn address(number: u64) -> SocketAddr {
    (super::place::ip(number), PORT).into()
}

/// Makes a root, and a key and a certificate in each node's directory.
pub(super) fn certify(dirs: &[PathBuf]) -> Result<()> {
    let now = SystemTime::now();
    let root = Root::generate(CLUSTER, now)?;
    for (number, dir) in (1..).zip(dirs) {
        let key = pki::generate_key()?;
        let subject = Subject { node: id(number), role: Role::Manager, cluster: CLUSTER };
        let certificate = root.sign(subject, &pki::public_key(&key)?, LIFE, now)?;
        std::fs::create_dir_all(dir)?;
        for (name, text) in [("ca", &root.cert_pem), ("cert", &certificate), ("key", &*key)] {
            std::fs::write(dir.join(format!("{name}.pem")), text)?;
        }
    }
    Ok(())
}

fn id(number: u64) -> NodeId {
    NodeId::from_bits(number.into())
}

fn identity(number: u64, dir: &Path) -> Result<Identity> {
    let read = |name: &str| std::fs::read_to_string(dir.join(format!("{name}.pem")));
    Ok(Identity {
        node: id(number),
        number: NodeNumber::new(number)?,
        voter: NodeNumber::new(number)?,
        cluster: CLUSTER,
        role: Role::Manager,
        ca_pem: read("ca")?,
        cert_pem: read("cert")?,
        key_pem: read("key")?.into(),
        data_key: [number as u8; 32],
    })
}

impl Node {
    /// Serves, and does what standard input says: `found`, `add NUMBER`, `load WRITERS
    /// MILLISECONDS`, `leader`. Each order is answered by a line.
    pub(super) async fn run(self) -> Result<()> {
        let (number, own) = (self.number, address(self.number));
        let identity = identity(number, &self.dir)?;
        let client = RpcClient::new(ClientTls::member(&identity)?);
        let mut config =
            RaftConfig::new(self.dir.join("raft"), identity.voter, own, identity.data_key);
        config.resume = self.resume;
        let raft = Raft::start(config, Arc::new(RaftTransport::new(client))).await?;
        let handler = Handler { raft: raft.clone(), refusals: Refusals::default() };
        let handler = Arc::new(handler);
        let _server = RpcServer::bind(own, ServerTls::new(&identity)?, handler).await?;
        println!("ready");
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while let Some(line) = lines.next_line().await? {
            println!("{}", order(&raft, &line).await.with_context(|| line)?);
        }
        Ok(())
    }
}

async fn order(raft: &Raft, line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    Ok(match words[..] {
        ["found"] => {
            raft.bootstrap().await?;
            write(raft, Command::Init(Box::new(init()))).await.map_err(anyhow::Error::msg)?;
            "founded".to_owned()
        }
        ["add", number] => {
            let number = number.parse()?;
            raft.add_voter(NodeNumber::new(number)?, address(number)).await?;
            "added".to_owned()
        }
        ["leader"] => {
            let leadership = raft.leadership().borrow().clone();
            let leader = leadership.leader.filter(|_| leadership.has_quorum);
            leader.map_or(0, |(number, _)| number.get()).to_string()
        }
        ["load", writers, millis] => {
            let (raft, patience) = (raft.clone(), Duration::from_millis(millis.parse()?));
            let seen = load::drive(writers.parse()?, patience, move |writer, count| {
                let raft = raft.clone();
                async move { write(&raft, report(load::value(writer, count))).await }
            });
            serde_json::to_string(&seen.await)?
        }
        _ => bail!("no such order"),
    })
}

async fn write(raft: &Raft, command: Command) -> Result<(), String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    raft.propose(Proposal { now_ms, command }).await.map(drop).map_err(|error| error.to_string())
}

fn report(value: String) -> Command {
    let status = NodeStatus { state: NodeState::Ready, message: value, lost: false };
    Command::ReportNodes(vec![NodeReport { id: id(1), status: Some(status), description: None }])
}

fn init() -> InitCluster {
    InitCluster {
        id: CLUSTER,
        spec: ClusterSpec::default(),
        ca_cert_pem: String::new(),
        ca_key_pem: String::new(),
        worker_secret: [1; 16],
        manager_secret: [2; 16],
        gossip_key: [3; 32],
        ingress: NetworkId::from_bits(1),
        first: NewNode {
            id: id(1),
            spec: NodeSpec { role: Role::Manager, ..NodeSpec::default() },
            description: NodeDescription::default(),
            address: address(1),
            vtep: IpAddr::V4(Ipv4Addr::LOCALHOST),
        },
    }
}

/// Raft's calls, and no others.
struct Handler {
    raft: Raft,
    refusals: Refusals,
}

fn nothing<T>() -> Result<T, RpcError> {
    Err(RpcError::new(RpcErrorKind::NotFound, "this is a benchmark's manager"))
}

#[async_trait]
impl RpcHandler for Handler {
    async fn vouch(&self, _: Subject, _: Standing) -> Result<(), RpcError> {
        Ok(())
    }

    fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    async fn raft(&self, _: Subject, kind: RpcKind, body: Bytes) -> Result<Bytes, RpcError> {
        let answer = self.raft.serve(kind, body).await;
        answer.map_err(|error| RpcError::new(RpcErrorKind::Unavailable, error))
    }

    async fn join(&self, _: Joiner, _: JoinRequest) -> Result<JoinResponse, RpcError> {
        nothing()
    }

    async fn session(
        &self,
        _: Subject,
        _: SessionRequest,
    ) -> Result<BoxStream<'static, NodeUpdate>, RpcError> {
        nothing()
    }

    async fn report(&self, _: Subject, _: ReportRequest) -> Result<ReportResponse, RpcError> {
        nothing()
    }

    async fn exec(
        &self,
        _: Subject,
        _: ExecRequest,
        _: FrameReader<ExecInput>,
        _: FrameWriter<ExecOutput>,
    ) {
    }

    async fn renew(&self, _: Subject, _: RenewRequest) -> Result<RenewResponse, RpcError> {
        nothing()
    }

    async fn logs(&self, _: Subject, _: LogsRequest, _: FrameWriter<LogsOutput>) {}

    async fn stats(&self, _: Subject) -> Result<StatsResponse, RpcError> {
        nothing()
    }

    async fn leave(&self, _: Subject) -> Result<(), RpcError> {
        nothing()
    }

    async fn anti_entropy(&self, _: Subject, _: Bytes) -> Result<Bytes, RpcError> {
        nothing()
    }
}
