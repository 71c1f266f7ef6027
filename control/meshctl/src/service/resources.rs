//! Flags about what tasks may take of their nodes, what is kept for them there, and how they are
//! spread. `service create` and `service update` have most of them in common.

use anyhow::{Context, Result};
use clap::Args;
use mesh_api::{PlacementPreference, ResourceRequirements, SpreadOver};
use serde_json::{Value, json};

use super::update::{list, object};

#[derive(Debug, Default, Args)]
pub(super) struct ResourceArgs {
    /// The most CPU time that a task may take, like 0.5 of one CPU; 0: no limit
    #[arg(long, value_parser = cpus, value_name = "CPUS")]
    limit_cpu: Option<i64>,
    /// The most memory that a task may take, like 64m; one that needs more is killed; 0: no limit
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    limit_memory: Option<i64>,
    /// The most processes and threads that a task may have; 0: no limit
    #[arg(long, value_name = "N")]
    limit_pids: Option<u32>,
    /// CPU time that is kept for each task on its node, by the scheduler's count
    #[arg(long, value_parser = cpus, value_name = "CPUS")]
    reserve_cpu: Option<i64>,
    /// Memory that is kept for each task on its node, by the scheduler's count
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    reserve_memory: Option<i64>,
    /// How many of its tasks one node may run; 0: no limit
    #[arg(long, value_name = "N")]
    pub(super) replicas_max_per_node: Option<u64>,
}

impl ResourceArgs {
    /// Makes of a spec what the flags say.
    pub(super) fn apply(&self, spec: &mut Value) -> Result<()> {
        let given = [
            ("Limits", "NanoCPUs", self.limit_cpu),
            ("Limits", "MemoryBytes", self.limit_memory),
            ("Limits", "Pids", self.limit_pids.map(i64::from)),
            ("Reservations", "NanoCPUs", self.reserve_cpu),
            ("Reservations", "MemoryBytes", self.reserve_memory),
        ];
        for (of, key, value) in given {
            if let Some(value) = value {
                object(spec, &["TaskTemplate", "Resources", of])?.insert(key.into(), json!(value));
            }
        }
        if let Some(most) = self.replicas_max_per_node {
            object(spec, &["TaskTemplate", "Placement"])?.insert("MaxReplicas".into(), json!(most));
        }
        Ok(())
    }

    /// The part of a new spec that is about resources.
    pub(super) fn requirements(&self) -> Result<Option<ResourceRequirements>> {
        let mut spec = json!({});
        self.apply(&mut spec)?;
        match spec.pointer_mut("/TaskTemplate/Resources") {
            None => Ok(None),
            Some(made) => serde_json::from_value(made.take()).context("cannot write resources"),
        }
    }
}

/// What `--placement-pref` takes.
pub(super) fn preference(text: &str) -> Result<PlacementPreference, String> {
    match text.split_once('=') {
        Some((strategy, over)) if strategy.eq_ignore_ascii_case("spread") && !over.is_empty() => {
            let spread = SpreadOver { spread_descriptor: over.to_owned() };
            Ok(PlacementPreference { spread: Some(spread) })
        }
        _ => Err(format!("`{text}` is not a preference: use spread=node.labels.KEY")),
    }
}

#[derive(Debug, Default, Args)]
pub(super) struct PreferenceArgs {
    /// Spread tasks over a label's values, as `service create --placement-pref` (may be repeated)
    #[arg(long, value_parser = preference, value_name = "PREFERENCE")]
    placement_pref_add: Vec<PlacementPreference>,
    /// Do not spread tasks over a label's values (may be repeated)
    #[arg(long, value_parser = preference, value_name = "PREFERENCE")]
    placement_pref_rm: Vec<PlacementPreference>,
}

impl PreferenceArgs {
    pub(super) fn apply(&self, spec: &mut Value) -> Result<()> {
        if self.placement_pref_add.is_empty() && self.placement_pref_rm.is_empty() {
            return Ok(());
        }
        let have = list(object(spec, &["TaskTemplate", "Placement"])?, "Preferences")?;
        have.retain(|have| !self.placement_pref_rm.iter().any(|rm| json!(rm) == *have));
        have.extend(self.placement_pref_add.iter().map(|add| json!(add)));
        Ok(())
    }
}

/// CPUs in billionths: a decimal number with at most nine decimals.
fn cpus(text: &str) -> Result<i64, String> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() && decimals.is_empty() || !digits(whole) || !digits(decimals) {
        return Err(format!("`{text}` is not a number of CPUs: use a number like 2 or 0.5"));
    }
    let decimals = decimals.trim_end_matches('0');
    if decimals.len() > 9 {
        return Err(format!("`{text}` is too precise: a CPU has 9 decimals"));
    }
    let nanos = format!("{whole}{decimals:0<9}");
    nanos.parse().map_err(|_| format!("`{text}` is too many CPUs"))
}

/// Bytes as Docker reads them: `64m`, `64MB` and `64MiB` are the same, `1.5g` is more.
fn bytes(text: &str) -> Result<i64, String> {
    let invalid = || format!("`{text}` is not a size: use a number and a unit, like 64m or 1.5g");
    let end = text.rfind(|c: char| c.is_ascii_digit()).ok_or_else(invalid)? + 1;
    let (number, unit) = text.split_at(end);
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let prefix = unit.strip_suffix('b').unwrap_or(&unit);
    let prefix = prefix.strip_suffix('i').unwrap_or(prefix);
    let power = match prefix {
        "" => 0,
        prefix => {
            1 + ["k", "m", "g", "t", "p"].iter().position(|p| *p == prefix).ok_or_else(invalid)?
        }
    };
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && number.starts_with(|c: char| c.is_ascii_digit());
    let number: f64 = number.parse().ok().filter(|_| plain).ok_or_else(invalid)?;
    let bytes = number * 1024_f64.powi(power as i32);
    if bytes > i64::MAX as f64 { Err(invalid()) } else { Ok(bytes as i64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_exact() {
        for (text, nanos) in
            [("2", 2_000_000_000), ("0.5", 500_000_000), (".25", 250_000_000), ("0", 0)]
        {
            assert_eq!(cpus(text), Ok(nanos), "{text}");
        }
        assert_eq!(cpus("0.0000000010"), Ok(1));
        assert!(cpus("0.0000000001").unwrap_err().contains("too precise"));
        for bad in ["", ".", "-1", "1,5", "half", "1e3", "1.5.0", "99999999999"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_dockers() {
        let mib = 1 << 20;
        for text in ["64m", "64M", "64mb", "64 MiB", "67108864", "65536k", "67108864b"] {
            assert_eq!(bytes(text), Ok(64 * mib), "{text}");
        }
        assert_eq!(bytes("1.5g"), Ok(1536 * mib));
        for bad in ["", "m", "-1m", "64x", "64 m b", "1..5g", "64mm", "99999p", "inf", ".5g", "1e3"]
        {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn preferences_have_one_kind() {
        let made = preference("spread=node.labels.zone").unwrap();
        let json = json!({"Spread": {"SpreadDescriptor": "node.labels.zone"}});
        assert_eq!(json!(made), json);
        for bad in ["node.labels.zone", "pack=node.labels.zone", "spread=", ""] {
            assert!(preference(bad).unwrap_err().contains("spread="), "{bad}");
        }
        let args = PreferenceArgs {
            placement_pref_add: vec![preference("spread=node.labels.rack").unwrap()],
            placement_pref_rm: vec![made],
        };
        let mut spec = json!({"TaskTemplate": {"Placement": {"Preferences": [json]}}});
        args.apply(&mut spec).unwrap();
        let rack = json!([{"Spread": {"SpreadDescriptor": "node.labels.rack"}}]);
        assert_eq!(spec["TaskTemplate"]["Placement"]["Preferences"], rack);
    }

    #[test]
    fn flags_set_their_fields_alone() {
        let mut spec = json!({"TaskTemplate": {"Resources": {"Limits": {"Pids": 5}, "X": 1}}});
        let before = spec.clone();
        ResourceArgs::default().apply(&mut spec).unwrap();
        assert_eq!(spec, before);
        let args = ResourceArgs {
            limit_memory: Some(64 << 20),
            reserve_cpu: Some(0),
            replicas_max_per_node: Some(2),
            ..ResourceArgs::default()
        };
        args.apply(&mut spec).unwrap();
        let expected = json!({"Resources": {"Limits": {"Pids": 5, "MemoryBytes": 64 << 20}, "X": 1,
            "Reservations": {"NanoCPUs": 0}}, "Placement": {"MaxReplicas": 2}});
        assert_eq!(spec["TaskTemplate"], expected);
        let made = args.requirements().unwrap().unwrap();
        assert_eq!(made.limits.unwrap().memory_bytes, 64 << 20);
        assert_eq!(ResourceArgs::default().requirements().unwrap(), None);
    }
}
