//! The difference between what should be and what is, as operations in a safe order.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use mesh_types::ids::EndpointId;

use crate::{
    desired::Desired,
    object::{Hook, Key, LinkRef, NetnsId, Program, Value, Veth},
    slots,
};

/// What the kernel holds of ours, plus what it holds at keys that we want to own.
///
/// Objects that are not ours never appear here, so no operation can name them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// By key. [`Key::Table`]s are not in here.
    pub objects: BTreeMap<Key, Value>,
    /// `MAGLEV` from its start, at least as far as `SERVICES` names it.
    pub maglev: Vec<u64>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Make it so. `old` is what was there.
    Put {
        /// What.
        key: Key,
        /// As it should be.
        value: Value,
        /// As it is, if it is.
        old: Option<Value>,
    },
    /// Remove it.
    Delete {
        /// What.
        key: Key,
        /// As it is.
        old: Value,
    },
}

impl Op {
    /// What it is about.
    #[must_use]
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } => key,
        }
    }

    /// Whether something was there that we did not expect: a change of an existing object.
    #[must_use]
    pub fn repairs(&self) -> bool {
        matches!(self, Self::Put { old: Some(_), .. })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put { key, old: None, .. } => write!(f, "create {key}"),
            Self::Put { key, old: Some(_), .. } => write!(f, "change {key}"),
            Self::Delete { key, .. } => write!(f, "delete {key}"),
        }
    }
}

/// Something that cannot be had, whatever the kernel does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No room for a table.
    #[error(
        "service {service}: MAGLEV has no free slice of {needed} of its {capacity} entries: raise \
         the size of the balancing map"
    )]
    MaglevFull {
        /// The service's name.
        service: String,
        /// Entries needed.
        needed: u32,
        /// Entries that there are.
        capacity: u32,
    },
}

/// What to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The operations.
    pub ops: Vec<Op>,
    /// What no operation can achieve.
    pub refusals: Vec<Refusal>,
}

/// Plans the way from `observed` to `desired`. Safe under traffic, in three steps:
///
/// 1. Strays go, which may hold a name or a port that is needed. What names a link that is gone is
///    removed, before a new link can get its index; pairs that must be made anew, or whose name in
///    the task is needed, go, with the entries that name them.
/// 2. New and changed objects, each after what it refers to (endpoints before tables before
///    services before addresses; programs last).
/// 3. What is no longer wanted, in reverse.
#[must_use]
pub fn plan(desired: &Desired, observed: &Observed) -> Plan {
    let (placed, refusals) = slots::place(desired, observed);
    let want: BTreeMap<&Key, &Value> = desired.objects.iter().chain(&placed).collect();
    let mut seen: BTreeMap<&Key, &Value> = observed.objects.iter().collect();

    let mut ops = Vec::new();
    let doomed = doomed_links(&want, &seen);
    let mut early: Vec<&Key> = seen
        .iter()
        .filter(|(key, value)| is_dangling(key) || is_doomed(key, value, &doomed))
        .map(|(key, _)| *key)
        // What only names the link is written again, if it is wanted; else it goes in its turn.
        .filter(|key| !matches!(key, Key::Endpoint(_) | Key::Config) || want.contains_key(*key))
        .collect();
    early.sort_by_key(|key| (key.delete_rank(), (*key).clone()));
    for key in early {
        let Some(old) = seen.remove(key) else { continue };
        if !goes_by_itself(key) && !matches!(key, Key::Endpoint(_) | Key::Config) {
            ops.push(Op::Delete { key: key.clone(), old: old.clone() });
        }
    }

    let mut puts: Vec<Op> =
        want.iter().filter_map(|(key, value)| put(key, value, &seen, &observed.maglev)).collect();
    puts.sort_by_key(|op| op.key().rank());
    ops.append(&mut puts);

    let leaving = Doomed {
        veths: seen
            .keys()
            .filter(|key| !want.contains_key(*key))
            .filter_map(|k| k.pair())
            .collect(),
        vxlan: false,
    };
    let mut gone: Vec<Op> = seen
        .iter()
        .filter(|(key, _)| !want.contains_key(*key) && !key.is_setting())
        .filter(|(key, value)| !(goes_by_itself(key) && is_doomed(key, value, &leaving)))
        .map(|(key, old)| Op::Delete { key: (*key).clone(), old: (*old).clone() })
        .collect();
    gone.sort_by_key(|op| op.key().delete_rank());
    ops.append(&mut gone);
    Plan { ops, refusals }
}

fn put(key: &Key, value: &Value, seen: &BTreeMap<&Key, &Value>, maglev: &[u64]) -> Option<Op> {
    if let (Key::Table(offset), Value::Table(table)) = (key, value) {
        let start = *offset as usize;
        let now = maglev.get(start..start + table.len());
        let same = now.is_some_and(|now| now.iter().copied().eq(table.iter().map(|id| id.get())));
        return (!same).then(|| Op::Put { key: key.clone(), value: value.clone(), old: None });
    }
    let old = seen.get(key).copied();
    (old != Some(value)).then(|| Op::Put {
        key: key.clone(),
        value: value.clone(),
        old: old.cloned(),
    })
}

/// Strays, and map entries that name a link by an index that is none of ours.
fn is_dangling(key: &Key) -> bool {
    matches!(key, Key::Stray(..) | Key::Port(LinkRef::Index(_) | LinkRef::Vxlan))
}

/// Whether the kernel removes it together with its link.
fn goes_by_itself(key: &Key) -> bool {
    matches!(
        key,
        Key::Sysctl { .. }
            | Key::Address(..)
            | Key::DefaultRoute(_)
            | Key::HostRoute(_)
            | Key::Neighbour(..)
    )
}

/// Links that must go before anything is made.
#[derive(Default)]
struct Doomed {
    veths: BTreeSet<EndpointId>,
    vxlan: bool,
}

fn doomed_links(want: &BTreeMap<&Key, &Value>, seen: &BTreeMap<&Key, &Value>) -> Doomed {
    // Names that interfaces will have, per namespace: an unwanted pair must not be in the way.
    let names: BTreeSet<(NetnsId, &str)> = want
        .values()
        .filter_map(|value| match value {
            Value::Veth(veth) => Some((veth.netns?, veth.ifname.as_str())),
            _ => None,
        })
        .collect();
    let in_the_way = |veth: &Veth| {
        veth.netns.is_some_and(|netns| names.contains(&(netns, veth.ifname.as_str())))
    };
    let mut doomed = Doomed::default();
    for (key, value) in seen {
        match (key, value, want.get(*key)) {
            (Key::Veth(id), Value::Veth(is), Some(Value::Veth(should)))
                if !is.can_become(should) =>
            {
                doomed.veths.insert(*id);
            }
            (Key::Veth(id), Value::Veth(is), None) if in_the_way(is) => {
                doomed.veths.insert(*id);
            }
            (Key::Vxlan, Value::Vxlan(is), Some(Value::Vxlan(should))) => {
                doomed.vxlan =
                    is.port != should.port || is.collects_metadata != should.collects_metadata;
            }
            _ => {}
        }
    }
    doomed
}

fn is_doomed(key: &Key, value: &Value, doomed: &Doomed) -> bool {
    let goes_with = |endpoint: &EndpointId| doomed.veths.contains(endpoint);
    key.veth().as_ref().is_some_and(goes_with)
        || match (key, value) {
            (Key::Vxlan | Key::Hook(Hook::FromVxlan), _) => doomed.vxlan,
            (_, Value::DefaultRoute { endpoint, .. }) => goes_with(endpoint),
            (_, Value::HostRoute(LinkRef::Veth(endpoint))) => goes_with(endpoint),
            // Its link gets another index, so the entry must be written again.
            (_, Value::Endpoint(entry)) => {
                matches!(&entry.link, Some(LinkRef::Veth(endpoint)) if goes_with(endpoint))
            }
            (_, Value::Config(_)) => doomed.vxlan,
            (_, Value::Hook(Program::Current(LinkRef::Veth(endpoint)))) => goes_with(endpoint),
            _ => false,
        }
}
