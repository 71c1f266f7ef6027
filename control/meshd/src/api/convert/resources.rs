//! What tasks may take and what is kept for them, and how they are spread: between the API's
//! numbers and the store's.

use mesh_api as api;
use mesh_types::{
    resources::{Amount, Limits, Resources},
    spec::Spread,
};

use crate::api::ApiError;

/// Swarm's least; 0 is none.
const NANO_CPUS_MIN: u64 = 1_000_000;
const MEMORY_BYTES_MIN: u64 = 4 << 20;

pub(super) fn resources(sent: Option<&api::ResourceRequirements>) -> Result<Resources, ApiError> {
    let limits = sent.and_then(|sent| sent.limits).unwrap_or_default();
    let reserved = sent.and_then(|sent| sent.reservations).unwrap_or_default();
    Ok(Resources {
        limits: Limits {
            amount: amount("Limits", limits.nano_cpus, limits.memory_bytes)?,
            pids: u64::try_from(limits.pids).map_err(|_| {
                let pids = limits.pids;
                ApiError::bad_request(format!("invalid pids value {pids}: Must be at least 1"))
            })?,
        },
        reserved: amount("Reservations", reserved.nano_cpus, reserved.memory_bytes)?,
    })
}

fn amount(of: &str, nano_cpus: i64, memory_bytes: i64) -> Result<Amount, ApiError> {
    let checked = |value: i64, least: u64| {
        u64::try_from(value).ok().filter(|value| *value == 0 || *value >= least)
    };
    let cpus = checked(nano_cpus, NANO_CPUS_MIN).ok_or_else(|| {
        let cpus = nano_cpus as f64 / 1e9;
        let least = NANO_CPUS_MIN as f64 / 1e9;
        let message = format!("{of}: invalid cpu value {cpus}: Must be at least {least}");
        ApiError::bad_request(message)
    })?;
    let memory = checked(memory_bytes, MEMORY_BYTES_MIN).ok_or_else(|| {
        let message = format!("{of}: invalid memory value {memory_bytes}: Must be at least 4MiB");
        ApiError::bad_request(message)
    })?;
    Ok(Amount { nano_cpus: cpus, memory_bytes: memory })
}

/// What a task's resources are to clients; nothing if there are none.
pub(super) fn requirements(resources: &Resources) -> Option<api::ResourceRequirements> {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let limits = &resources.limits;
    let limit = api::Limit {
        nano_cpus: signed(limits.amount.nano_cpus),
        memory_bytes: signed(limits.amount.memory_bytes),
        pids: signed(limits.pids),
    };
    let reservation = api::Reservation {
        nano_cpus: signed(resources.reserved.nano_cpus),
        memory_bytes: signed(resources.reserved.memory_bytes),
    };
    let requirements = api::ResourceRequirements {
        limits: (limit != api::Limit::default()).then_some(limit),
        reservations: (reservation != api::Reservation::default()).then_some(reservation),
    };
    (requirements != api::ResourceRequirements::default()).then_some(requirements)
}

pub(super) fn spread(sent: &[api::PlacementPreference]) -> Result<Vec<Spread>, ApiError> {
    let parse = |preference: &api::PlacementPreference| {
        let over = preference.spread.as_ref().map_or("", |spread| &spread.spread_descriptor);
        over.parse().map_err(|err| ApiError::bad_request(format!("invalid Placement: {err}")))
    };
    sent.iter().map(parse).collect()
}

pub(super) fn preferences(over: &[Spread]) -> Vec<api::PlacementPreference> {
    let preference = |spread: &Spread| {
        let spread = api::SpreadOver { spread_descriptor: spread.to_string() };
        api::PlacementPreference { spread: Some(spread) }
    };
    over.iter().map(preference).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(json: &str) -> Result<Resources, ApiError> {
        resources(Some(&serde_json::from_str(json).unwrap()))
    }

    #[test]
    fn there_and_back_it_stays_the_same() {
        let json = r#"{"Limits":{"NanoCPUs":500000000,"MemoryBytes":67108864,"Pids":9},"Reservations":{"MemoryBytes":4194304}}"#;
        let made = sent(json).unwrap();
        assert_eq!(made.limits.pids, 9);
        assert_eq!(made.reserved, Amount { nano_cpus: 0, memory_bytes: 4 << 20 });
        assert_eq!(serde_json::to_string(&requirements(&made).unwrap()).unwrap(), json);
        for none in ["{}", r#"{"Limits":{},"Reservations":{}}"#, r#"{"Limits":null}"#] {
            let made = sent(none).unwrap();
            assert_eq!((made, requirements(&made)), (Resources::default(), None), "{none}");
        }
        let over = spread(&preferences(&["node.labels.zone".parse().unwrap()])).unwrap();
        assert_eq!(over[0].label, "zone");
    }

    #[test]
    fn too_little_is_refused_in_swarms_words() {
        let cases = [
            (r#"{"Limits":{"NanoCPUs":999999}}"#, "Limits: invalid cpu value 0.000999999: Must be"),
            (r#"{"Reservations":{"NanoCPUs":-1}}"#, "Reservations: invalid cpu value -0.00"),
            (r#"{"Limits":{"MemoryBytes":4194303}}"#, "invalid memory value 4194303: Must be at"),
            (r#"{"Limits":{"Pids":-1}}"#, "invalid pids value -1"),
        ];
        for (json, words) in cases {
            let err = sent(json).unwrap_err();
            assert!(err.status == 400 && err.message.contains(words), "{}", err.message);
        }
        for none in [None, Some("engine.labels.x")] {
            let over = none.map(|text| api::SpreadOver { spread_descriptor: text.to_owned() });
            let err = spread(&[api::PlacementPreference { spread: over }]).unwrap_err();
            assert!(err.message.contains("node.labels.zone"), "{}", err.message);
        }
    }
}
