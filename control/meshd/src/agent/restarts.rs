//! How often a task was started again by its node, because no manager could replace it.

use mesh_types::spec::RestartPolicy;

/// Of one task.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub(super) struct Restarts {
    /// In all.
    times: u64,
    /// When, in milliseconds: those that the policy still counts.
    recent: Vec<u64>,
}

impl Restarts {
    pub(super) fn count(&mut self, policy: &RestartPolicy, now_ms: u64) {
        self.times = self.times.saturating_add(1);
        self.recent.retain(|at| counts(policy, *at, now_ms));
        // Without a limit nothing needs to be remembered.
        if policy.limit().is_some() {
            self.recent.push(now_ms);
        }
    }

    /// Whether the policy allows no more.
    pub(super) fn spent(&self, policy: &RestartPolicy, now_ms: u64) -> bool {
        let recent = self.recent.iter().filter(|at| counts(policy, **at, now_ms));
        policy.is_spent(recent.count() as u64)
    }

    /// What the task's status says of it.
    pub(super) fn message(&self) -> String {
        match self.times {
            0 => "started".to_owned(),
            1 => "restarted once while no manager was reached".to_owned(),
            times => format!("restarted {times} times while no manager was reached"),
        }
    }
}

fn counts(policy: &RestartPolicy, at_ms: u64, now_ms: u64) -> bool {
    policy.window_ms().is_none_or(|window_ms| now_ms.saturating_sub(at_ms) < window_ms)
}
