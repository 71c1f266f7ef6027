//! The node: in no cluster, or a member of one.
//!
//! - [`bootstrap`] makes members, [`member`] brings their parts up and down; [`admit`] lets in
//!   those that ask.
//! - [`session`] keeps records and assignments coming, [`plumbing`] plugs tasks in, [`dataplane`]
//!   drives the kernel.
//! - [`role`] makes a member a manager, and a worker again.
//! - [`manager`] runs the leader's loops; [`handler`] answers other nodes; [`backend`] the API.

mod admit;
mod backend;
mod bootstrap;
mod clock;
mod dataplane;
mod exec;
mod facts;
mod handler;
mod liveness;
mod logs;
mod manager;
mod member;
mod persist;
mod plumbing;
mod probe;
mod role;
mod scrape;
mod session;

use std::{
    os::unix::fs::PermissionsExt,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use anyhow::{Context, Result};

pub(crate) use self::liveness::HEARTBEAT;
use self::member::Member;
use crate::{api::backend::EngineFacts, identity::Identity, options::Options};

/// This node.
pub struct Node {
    options: Options,
    engine: EngineFacts,
    state: RwLock<State>,
    /// Held while the node joins or leaves.
    changing: tokio::sync::Mutex<()>,
    /// Held while the metrics are looked up.
    scraping: tokio::sync::Mutex<()>,
    /// For work that outlives the call that asked for it.
    me: Weak<Self>,
}

#[derive(Clone)]
enum State {
    Inactive,
    Pending,
    Active(Arc<Member>),
    Error(String),
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Node {
    /// Takes up the membership that is kept in the state directory, if there is one. What keeps it
    /// from that is the node's state (`docker info` shows it), not the daemon's end.
    ///
    /// # Errors
    /// If the state directory cannot be used.
    pub async fn start(options: Options) -> Result<Arc<Self>> {
        private_dir(&options.state_dir)
            .with_context(|| format!("making {}", options.state_dir.display()))?;
        let engine = facts::read(&options);
        let identity = Identity::load(&options.state_dir)?;
        let state = match identity {
            None => State::Inactive,
            Some(identity) => resume(&options, &engine, identity).await,
        };
        Ok(Arc::new_cyclic(|me| Self {
            options,
            engine,
            state: RwLock::new(state),
            changing: tokio::sync::Mutex::new(()),
            scraping: tokio::sync::Mutex::new(()),
            me: Weak::clone(me),
        }))
    }

    fn state(&self) -> State {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_state(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

/// Keys, tokens and the tasks' environments are kept in it: for root alone.
fn private_dir(path: &std::path::Path) -> std::io::Result<()> {
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
}

async fn resume(options: &Options, engine: &EngineFacts, identity: Identity) -> State {
    let started = match persist::settings(&options.state_dir) {
        Ok(settings) => Member::start(options, engine, identity, settings, None).await,
        Err(error) => Err(error),
    };
    match started {
        Ok(member) => State::Active(member),
        Err(error) => {
            let text = format!("{error:#}");
            tracing::error!(error = %text, "this node cannot take up its membership");
            State::Error(text)
        }
    }
}
