//! How updates go: policies from specs and back, and how far an update is.

use std::time::Duration;

use mesh_api as api;
use mesh_control::model::UpdateStatus;
use mesh_types::spec::{FailureAction, UpdateOrder, UpdatePolicy};

use super::time;
use crate::api::ApiError;

/// `UpdateConfig` or `RollbackConfig`; `which` begins the flags that set it. What is left out has
/// Swarm's default; as there, a monitor of zero does too.
pub(crate) fn policy(
    which: &str,
    sent: Option<&api::UpdateConfig>,
) -> Result<UpdatePolicy, ApiError> {
    let default = UpdatePolicy::default();
    let Some(sent) = sent else { return Ok(default) };
    let invalid =
        |flag: &str, why: String| ApiError::bad_request(format!("invalid --{which}-{flag}: {why}"));
    let duration =
        |flag: &str, nanos: Option<i64>, default: Duration| match nanos.map(u64::try_from) {
            None => Ok(default),
            Some(Ok(nanos)) => Ok(Duration::from_nanos(nanos)),
            Some(Err(_)) => Err(invalid(flag, "it must not be negative".to_owned())),
        };
    let on_failure = match sent.failure_action.as_str() {
        "" | "pause" => FailureAction::Pause,
        "continue" => FailureAction::Continue,
        "rollback" => FailureAction::Rollback,
        other => {
            let why = format!("`{other}` is neither pause nor continue nor rollback");
            return Err(invalid("failure-action", why));
        }
    };
    let order = match sent.order.as_str() {
        "" | "stop-first" => UpdateOrder::StopFirst,
        "start-first" => UpdateOrder::StartFirst,
        other => {
            let why = format!("`{other}` is neither stop-first nor start-first");
            return Err(invalid("order", why));
        }
    };
    let ratio = sent.max_failure_ratio.unwrap_or_default();
    if !(0.0..=1.0).contains(&ratio) {
        return Err(invalid("max-failure-ratio", format!("{ratio} is not between 0 and 1")));
    }
    Ok(UpdatePolicy {
        parallelism: sent.parallelism.unwrap_or(default.parallelism),
        delay: duration("delay", sent.delay, default.delay)?,
        on_failure,
        monitor: duration("monitor", sent.monitor.filter(|nanos| *nanos != 0), default.monitor)?,
        // In range: the ratio was checked.
        max_failure_ppm: (ratio * 1e6).round() as u32,
        order,
    })
}

/// A policy as clients see it.
pub(crate) fn config(policy: &UpdatePolicy) -> api::UpdateConfig {
    let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
    api::UpdateConfig {
        parallelism: Some(policy.parallelism),
        delay: Some(nanos(policy.delay)),
        failure_action: match policy.on_failure {
            FailureAction::Pause => "pause",
            FailureAction::Continue => "continue",
            FailureAction::Rollback => "rollback",
        }
        .into(),
        monitor: Some(nanos(policy.monitor)),
        max_failure_ratio: Some(f64::from(policy.max_failure_ppm) / 1e6),
        order: match policy.order {
            UpdateOrder::StopFirst => "stop-first",
            UpdateOrder::StartFirst => "start-first",
        }
        .into(),
    }
}

/// How far an update is. Clients that wait for one end by it.
pub(crate) fn status(status: &UpdateStatus) -> api::UpdateStatus {
    api::UpdateStatus {
        state: status.state.name().into(),
        started_at: Some(time(status.started_ms)),
        completed_at: status.completed_ms.map(time),
        message: status.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use mesh_control::model::UpdateState;

    use super::*;

    fn sent() -> api::UpdateConfig {
        api::UpdateConfig {
            parallelism: Some(2),
            delay: Some(1_500_000_000),
            failure_action: "rollback".into(),
            monitor: Some(7_000_000_000),
            max_failure_ratio: Some(0.25),
            order: "start-first".into(),
        }
    }

    #[test]
    fn policies_go_there_and_back() {
        let made = policy("update", Some(&sent())).unwrap();
        assert_eq!((made.delay.as_millis(), made.max_failure_ppm), (1500, 250_000));
        assert_eq!(config(&made), sent());
    }

    #[test]
    fn what_is_left_out_is_swarms_default() {
        assert_eq!(policy("update", None), Ok(UpdatePolicy::default()));
        let empty = api::UpdateConfig { monitor: Some(0), ..api::UpdateConfig::default() };
        assert_eq!(policy("update", Some(&empty)), Ok(UpdatePolicy::default()));
        let all = api::UpdateConfig { parallelism: Some(0), ..api::UpdateConfig::default() };
        assert_eq!(policy("update", Some(&all)).unwrap().parallelism, 0);
    }

    #[test]
    fn nonsense_is_refused_by_its_flag() {
        let refused = |change: fn(&mut api::UpdateConfig), flag: &str| {
            let mut config = sent();
            change(&mut config);
            let err = policy("rollback", Some(&config)).unwrap_err();
            assert_eq!(err.status, 400);
            assert!(err.message.contains(&format!("--rollback-{flag}:")), "{}", err.message);
        };
        refused(|c| c.delay = Some(-1), "delay");
        refused(|c| c.monitor = Some(-1), "monitor");
        refused(|c| c.max_failure_ratio = Some(1.01), "max-failure-ratio");
        refused(|c| c.max_failure_ratio = Some(-0.01), "max-failure-ratio");
        refused(|c| c.failure_action = "Pause".into(), "failure-action");
        refused(|c| c.order = "none".into(), "order");
    }

    #[test]
    fn a_running_update_has_not_completed() {
        let going = UpdateStatus {
            state: UpdateState::Updating,
            started_ms: 1_795_218_673_250,
            completed_ms: None,
            message: "update in progress".into(),
        };
        let shown = serde_json::to_value(status(&going)).unwrap();
        assert_eq!(shown["State"], "updating");
        assert_eq!(shown["StartedAt"], "2026-11-20T23:51:13.250000000Z");
        assert_eq!(shown.get("CompletedAt"), None);
        let done = UpdateStatus {
            state: UpdateState::RollbackCompleted,
            completed_ms: Some(1_795_218_674_250),
            ..going
        };
        let shown = serde_json::to_value(status(&done)).unwrap();
        assert_eq!(shown["State"], "rollback_completed");
        assert_eq!(shown["CompletedAt"], "2026-11-20T23:51:14.250000000Z");
    }
}
