//! Which statuses a manager has not confirmed yet.

use std::{collections::BTreeMap, sync::Arc};

use mesh_types::{TaskId, task::TaskStatus};
use tokio::sync::watch;

use super::AgentView;

/// The statuses of this node's tasks, each handed out until it is confirmed. Levels, not edges: a
/// status that was overtaken before it was reported is left out.
#[derive(Debug)]
pub struct StatusFeed {
    view: watch::Receiver<Arc<AgentView>>,
    confirmed: BTreeMap<TaskId, TaskStatus>,
}

impl StatusFeed {
    pub(super) fn new(view: watch::Receiver<Arc<AgentView>>) -> Self {
        Self { view, confirmed: BTreeMap::new() }
    }

    /// Waits until there is something to report; `None` when the agent is gone. What it returns
    /// comes again at the next call, at once, unless it was [confirmed](Self::confirm). Dropping
    /// the future loses nothing.
    pub async fn next(&mut self) -> Option<Vec<(TaskId, TaskStatus)>> {
        loop {
            let pending = self.pending();
            if !pending.is_empty() {
                return Some(pending);
            }
            self.view.changed().await.ok()?;
        }
    }

    /// A manager has these in its store.
    pub fn confirm(&mut self, statuses: Vec<(TaskId, TaskStatus)>) {
        self.confirmed.extend(statuses);
    }

    /// Forgets what was confirmed, for a manager that may not have it.
    pub fn restart(&mut self) {
        self.confirmed.clear();
    }

    fn pending(&mut self) -> Vec<(TaskId, TaskStatus)> {
        let view = Arc::clone(&self.view.borrow_and_update());
        self.confirmed.retain(|id, _| view.tasks.contains_key(id));
        let unconfirmed =
            view.tasks.iter().filter(|(id, task)| self.confirmed.get(id) != Some(&task.status));
        unconfirmed.map(|(id, task)| (*id, task.status.clone())).collect()
    }
}
