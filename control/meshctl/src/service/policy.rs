//! The `--update-*` and `--rollback-*` flags.

use clap::{Args, ValueEnum};
use mesh_api::UpdateConfig;

use super::duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FailureAction {
    /// Stop where it is
    Pause,
    /// Go on
    Continue,
    /// Go back to the spec before
    Rollback,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RollbackFailureAction {
    /// Stop where it is
    Pause,
    /// Go on
    Continue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Order {
    /// The old task ends before the new one starts
    StopFirst,
    /// The new task takes traffic before the old one ends
    StartFirst,
}

#[derive(Debug, Default, Args)]
pub(super) struct PolicyArgs {
    /// Tasks updated at a time, 0 for all; 1 if not given
    #[arg(long, value_name = "N")]
    update_parallelism: Option<u64>,
    /// Pause between a batch of updates and the next
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    update_delay: Option<u64>,
    /// What happens when too many updated tasks fail; pause if not given
    #[arg(long, value_enum, value_name = "ACTION")]
    update_failure_action: Option<FailureAction>,
    /// An updated task that ends within this time has failed; 5s if not given
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    update_monitor: Option<u64>,
    /// How many updated tasks may fail, 0 to 1 of all; 0 if not given
    #[arg(long, value_parser = ratio, value_name = "RATIO")]
    update_max_failure_ratio: Option<f64>,
    /// Which comes first, the old task's end or the new one's start; stop-first if not given
    #[arg(long, value_enum, value_name = "ORDER")]
    update_order: Option<Order>,
    /// Tasks rolled back at a time, 0 for all; 1 if not given
    #[arg(long, value_name = "N")]
    rollback_parallelism: Option<u64>,
    /// Pause between a batch of rollbacks and the next
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    rollback_delay: Option<u64>,
    /// What happens when too many tasks fail that were rolled back; pause if not given
    #[arg(long, value_enum, value_name = "ACTION")]
    rollback_failure_action: Option<RollbackFailureAction>,
    /// A task rolled back that ends within this time has failed; 5s if not given
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    rollback_monitor: Option<u64>,
    /// How many tasks rolled back may fail, 0 to 1 of all; 0 if not given
    #[arg(long, value_parser = ratio, value_name = "RATIO")]
    rollback_max_failure_ratio: Option<f64>,
    /// As --update-order, on the way back
    #[arg(long, value_enum, value_name = "ORDER")]
    rollback_order: Option<Order>,
}

impl PolicyArgs {
    /// What the `--update-*` flags say; `None` without any.
    pub(super) fn update(&self) -> Option<UpdateConfig> {
        given(UpdateConfig {
            parallelism: self.update_parallelism,
            delay: self.update_delay.map(nanos),
            failure_action: word(self.update_failure_action),
            monitor: self.update_monitor.map(nanos),
            max_failure_ratio: self.update_max_failure_ratio,
            order: word(self.update_order),
        })
    }

    /// What the `--rollback-*` flags say; `None` without any.
    pub(super) fn rollback(&self) -> Option<UpdateConfig> {
        given(UpdateConfig {
            parallelism: self.rollback_parallelism,
            delay: self.rollback_delay.map(nanos),
            failure_action: word(self.rollback_failure_action),
            monitor: self.rollback_monitor.map(nanos),
            max_failure_ratio: self.rollback_max_failure_ratio,
            order: word(self.rollback_order),
        })
    }
}

fn given(config: UpdateConfig) -> Option<UpdateConfig> {
    (config != UpdateConfig::default()).then_some(config)
}

/// [`duration`] gives no more than Go's 63 bits.
fn nanos(nanos: u64) -> i64 {
    i64::try_from(nanos).unwrap_or(i64::MAX)
}

/// The word of a flag's value, empty if it was not given.
fn word(value: Option<impl ValueEnum>) -> String {
    let value = value.as_ref().and_then(ValueEnum::to_possible_value);
    value.map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err(format!("`{text}` is not a ratio: use a number from 0 to 1, like 0.25")),
    }
}
