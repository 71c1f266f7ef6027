//! The node's role: it becomes a manager, or a worker again, as the store says, while its tasks run
//! on. Its certificate is renewed by the same way.
//!
//! Who is to be a manager is first in the store, then in the certificate, then among the voters.
//! Back it goes the other way round: managers sign a worker's certificate only once its vote is
//! gone, so the store's file is removed only when nobody counts on it.

use std::{
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};
use mesh_control::model::Role;
use tokio::sync::watch;

use super::{
    handler::Handler,
    manager::Manager,
    member::{self, Member},
    persist::Settings,
};
use crate::{
    identity::{self, Identity},
    pki,
    rpc::{
        Route, RpcClient, RpcServer,
        messages::{RenewRequest, RenewResponse},
    },
    tls::{ClientTls, Expect, ServerTls},
};

/// Between attempts, and looks at the certificate's age.
const RETRY: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_secs(30);
/// How long a manager may take to sign.
const PATIENCE: Duration = Duration::from_secs(5);

/// What makes a node a manager. Dropped, it is none.
pub(super) struct ManagerParts {
    pub(super) manager: Arc<Manager>,
    pub(super) run: tokio::task::AbortHandle,
    /// Listens on the managers' port.
    pub(super) server: RpcServer,
}

impl Drop for ManagerParts {
    fn drop(&mut self) {
        self.run.abort();
        self.manager.close();
    }
}

/// Makes a node a manager: other nodes are answered, the leader's loops run.
pub(super) fn lead(
    handler: &Handler,
    client: &RpcClient,
    manager: Arc<Manager>,
    server: RpcServer,
) -> ManagerParts {
    handler.set_manager(Some(Arc::clone(&manager)));
    let forward = member::Forward { client: client.clone() };
    let run = tokio::spawn(Arc::clone(&manager).run(forward)).abort_handle();
    ManagerParts { manager, run, server }
}

/// Keeps the role and the certificate as they should be, until the member is gone.
pub(super) async fn keep(member: Weak<Member>, mut settings: watch::Receiver<Arc<Settings>>) {
    // Soon after a start: a crash may have come in between.
    let mut patience = RETRY;
    loop {
        if let Ok(Err(_)) = tokio::time::timeout(patience, settings.changed()).await {
            return;
        }
        let Some(member) = member.upgrade() else { return };
        patience = match member.take_role().await {
            Ok(()) => LOOK,
            Err(error) => {
                let error = format!("{error:#}");
                if member.identity().expired(SystemTime::now()) {
                    tracing::error!(
                        error,
                        "this node's certificate ran out, and no other node talks to it any more; \
                         its tasks and their traffic go on with what is known. `node rm --force` \
                         it on a manager, `swarm leave --force` here, and join again"
                    );
                    LOOK
                } else {
                    tracing::debug!(error, "role and certificate stay for now");
                    RETRY
                }
            }
        };
    }
}

impl Member {
    /// Has the role that the managers list says, and a certificate that is not too old.
    async fn take_role(&self) -> Result<()> {
        let leaving = self.leaving.lock().await;
        if *leaving {
            return Ok(());
        }
        let identity = self.identity();
        let managers = self.settings.borrow().managers.clone();
        let listed = managers.iter().find(|manager| manager.node == identity.node);
        let right = match identity.role {
            Role::Manager => listed.is_some_and(|me| me.number == identity.voter),
            Role::Worker => listed.is_none(),
        };
        let identity = self.trust(identity)?;
        let roots = self.settings.borrow().roots.clone();
        let signer = roots.last().and_then(|pem| pki::parse_pem(pem).ok());
        let signer = signer.map(|root| pki::digest(&root));
        let replaced = signer.is_some() && identity.roots().1 != signer;
        let stale = replaced || identity.renewal_due(SystemTime::now());
        if managers.is_empty() || (right && !stale) {
            return Ok(());
        }
        let key_pem = pki::generate_key()?;
        let request = RenewRequest {
            public_key: pki::public_key(&key_pem)?.der().to_vec().into(),
            voter: (identity.role == Role::Manager).then_some(identity.voter),
        };
        let mut answer: Result<RenewResponse> = Err(anyhow::anyhow!("there is no other manager"));
        // Itself last: a manager that is none any more cannot tell, and one to be is none yet.
        let (me, others): (Vec<_>, Vec<_>) =
            managers.into_iter().partition(|manager| manager.node == identity.node);
        for manager in others.into_iter().chain(me) {
            let expect = Expect::Node(manager.node);
            let call = self.client.call(manager.address, expect, Route::Renew, &request, PATIENCE);
            match call.await {
                Ok(signed) => {
                    answer = Ok(signed);
                    break;
                }
                Err(error) => answer = Err(error.into()),
            }
        }
        let answer = answer?;
        let new = Identity {
            role: answer.role,
            voter: answer.voter,
            cert_pem: answer.cert_pem,
            key_pem,
            ..Identity::clone(&identity)
        };
        match (identity.role, new.role) {
            (Role::Worker, Role::Manager) => self.promoted(new).await,
            (Role::Manager, Role::Worker) => self.demoted(new).await,
            _ => {
                ensure!(stale, "the manager that was asked knows of no other role");
                self.renewed(new)?;
                tracing::info!(node = %identity.node, "the certificate is renewed");
                Ok(())
            }
        }
    }

    /// Trusts the roots that the managers do, before anything is asked of them.
    fn trust(&self, identity: Arc<Identity>) -> Result<Arc<Identity>> {
        let ca_pem = self.settings.borrow().roots.concat();
        if ca_pem.is_empty() || ca_pem == identity.ca_pem {
            return Ok(identity);
        }
        self.renewed(Identity { ca_pem, ..Identity::clone(&identity) })?;
        tracing::info!("the roots that this node trusts have changed");
        Ok(self.identity())
    }

    /// A new certificate of the same role: for connections from now on.
    fn renewed(&self, new: Identity) -> Result<()> {
        new.save(&self.options.state_dir)?;
        self.use_identity(new)
    }

    fn use_identity(&self, new: Identity) -> Result<()> {
        let server = ServerTls::new(&new)?;
        self.client.set_tls(ClientTls::member(&new)?);
        self.server.set_tls(server.clone());
        if let Some(parts) = self.parts().as_ref() {
            parts.server.set_tls(server);
        }
        self.identity.send_replace(Arc::new(new));
        Ok(())
    }

    async fn promoted(&self, new: Identity) -> Result<()> {
        let new = Identity { data_key: identity::fresh_data_key()?, ..new };
        let address = self.settings.borrow().address;
        // A store from before a demotion that a crash left: sealed by a key that is gone.
        member::remove_store(&self.options)?;
        let handler = Arc::clone(&self.handler);
        let server = RpcServer::bind(
            member::any(address.ip(), address.port()),
            ServerTls::new(&new)?,
            handler,
        )
        .await?;
        let client = self.client.clone();
        let raft = member::start_raft(&self.options, &new, address, &client, false).await?;
        // The store's file before the identity that says that there is one.
        if let Err(error) = new.save(&self.options.state_dir) {
            raft.shutdown().await;
            return Err(error).context("keeping the manager's identity");
        }
        self.use_identity(new)?;
        *self.parts() = Some(lead(&self.handler, &client, Manager::new(raft), server));
        tracing::info!(node = %self.identity().node, "this node is a manager now");
        Ok(())
    }

    async fn demoted(&self, new: Identity) -> Result<()> {
        new.save(&self.options.state_dir)?;
        self.handler.set_manager(None);
        let parts = self.parts().take();
        self.use_identity(new)?;
        if let Some(parts) = parts {
            parts.manager.raft.shutdown().await;
        }
        member::remove_store(&self.options)?;
        tracing::info!(node = %self.identity().node, "this node is a worker now");
        Ok(())
    }
}
