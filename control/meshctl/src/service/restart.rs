//! Flags about how tasks end and come back, of `service create` and `service update` alike.

use clap::{Args, ValueEnum};
use mesh_api::RestartPolicy;

use super::duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RestartCondition {
    None,
    OnFailure,
    Any,
}

#[derive(Debug, Default, Args)]
pub(super) struct RestartArgs {
    /// When an ended task is replaced; of a new service any
    #[arg(long, value_enum, value_name = "WHEN")]
    restart_condition: Option<RestartCondition>,
    /// Pause before the replacement starts; of a new service 5s
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    restart_delay: Option<u64>,
    /// Give up after this many
    #[arg(long, value_name = "N")]
    restart_max_attempts: Option<u64>,
    /// Attempts are counted over this long
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    restart_window: Option<u64>,
    /// Time between the stop signal and SIGKILL; of a new service 10s
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(super) stop_grace_period: Option<u64>,
    /// The signal that asks a task to end; of a new service SIGTERM
    #[arg(long, value_name = "SIGNAL")]
    pub(super) stop_signal: Option<String>,
}

impl RestartArgs {
    /// What the `--restart-*` flags say; `None` without any.
    pub(super) fn policy(&self) -> Option<RestartPolicy> {
        let word = match self.restart_condition {
            None => "",
            Some(RestartCondition::None) => "none",
            Some(RestartCondition::OnFailure) => "on-failure",
            Some(RestartCondition::Any) => "any",
        };
        let policy = RestartPolicy {
            condition: word.into(),
            delay: self.restart_delay,
            max_attempts: self.restart_max_attempts,
            window: self.restart_window,
        };
        (policy != RestartPolicy::default()).then_some(policy)
    }
}
