//! Which index in `SERVICES` and which slice of `MAGLEV` each service has.
//!
//! The kernel is the memory: a service keeps what the maps already say of its address or ports, so
//! neither a round nor a restart of the daemon moves a table under flows. A slice that the maps
//! name is never given to another service in the same plan: its table is still being read.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    desired::{Desired, Service, SlotKey},
    object::{AddressUse, Key, ServiceEntry, Value},
    plan::{Observed, Refusal},
};

/// The map entries of all services, with their tables.
pub(crate) fn place(
    desired: &Desired,
    observed: &Observed,
) -> (BTreeMap<Key, Value>, Vec<Refusal>) {
    let mut slots = Slots::read(observed, desired.maglev_capacity);
    let mut objects = BTreeMap::new();
    let mut refusals = Vec::new();
    // Services that stay where they are go first: what they hold must not be handed out.
    let kept: Vec<Option<(u32, Option<u32>)>> =
        desired.services.iter().map(|service| slots.keep(service)).collect();
    for (service, kept) in desired.services.iter().zip(kept) {
        let len = service.table.len() as u32;
        let (index, offset) = match kept {
            Some((index, offset)) => (index, offset),
            None => (slots.free_index(), None),
        };
        let Some(offset) = offset.or_else(|| slots.free_slice(len)) else {
            refusals.push(Refusal::MaglevFull {
                service: service.name.clone(),
                needed: len,
                capacity: desired.maglev_capacity,
            });
            continue;
        };
        write(&mut objects, service, index, offset);
    }
    (objects, refusals)
}

fn write(objects: &mut BTreeMap<Key, Value>, service: &Service, index: u32, offset: u32) {
    let len = service.table.len() as u32;
    let mut vip = None;
    for (key, target) in &service.keys {
        match *key {
            SlotKey::Vip(vni, address) => {
                vip = Some(address);
                let used = Value::MapAddress(AddressUse::Vip(index));
                objects.insert(Key::MapAddress(vni, address), used);
            }
            SlotKey::Published(protocol, port) => {
                let value = Value::Published { service: index, target: *target };
                objects.insert(Key::Published(protocol, port), value);
            }
        }
    }
    let entry = ServiceEntry { offset, len, vip, vni: service.vni };
    objects.insert(Key::Service(index), Value::Service(entry));
    if len > 0 {
        objects.insert(Key::Table(offset), Value::Table(service.table.clone()));
    }
}

struct Slots {
    capacity: u32,
    /// What the maps say now.
    index_of: BTreeMap<SlotKey, u32>,
    slice_of: BTreeMap<u32, (u32, u32)>,
    /// Indexes and slices (offset -> end) that are in use, before or after.
    indexes: BTreeSet<u32>,
    slices: BTreeMap<u32, u32>,
    /// Indexes that a service of this plan has.
    claimed: BTreeSet<u32>,
}

impl Slots {
    fn read(observed: &Observed, capacity: u32) -> Self {
        let mut slots = Self {
            capacity,
            index_of: BTreeMap::new(),
            slice_of: BTreeMap::new(),
            indexes: BTreeSet::new(),
            slices: BTreeMap::new(),
            claimed: BTreeSet::new(),
        };
        for (key, value) in &observed.objects {
            match (key, value) {
                (Key::MapAddress(vni, address), Value::MapAddress(AddressUse::Vip(index))) => {
                    slots.index_of.insert(SlotKey::Vip(*vni, *address), *index);
                }
                (Key::Published(protocol, port), Value::Published { service, .. }) => {
                    slots.index_of.insert(SlotKey::Published(*protocol, *port), *service);
                }
                (Key::Service(index), value) => {
                    slots.indexes.insert(*index);
                    if let Value::Service(entry) = value {
                        slots.read_slice(*index, entry);
                    }
                }
                _ => {}
            }
        }
        slots
    }

    fn read_slice(&mut self, index: u32, entry: &ServiceEntry) {
        let Some(end) = entry.offset.checked_add(entry.len) else { return };
        // A corrupted entry may overlap another's slice: the first one counts.
        if entry.len > 0 && end <= self.capacity && self.is_free(entry.offset, end) {
            self.slices.insert(entry.offset, end);
            self.slice_of.insert(index, (entry.offset, entry.len));
        }
    }

    fn is_free(&self, start: u32, end: u32) -> bool {
        self.slices.range(..end).next_back().is_none_or(|(_, used_to)| *used_to <= start)
    }

    /// The index that the service has, and its slice if it fits the table's size.
    fn keep(&mut self, service: &Service) -> Option<(u32, Option<u32>)> {
        let indexes = service.keys.keys().filter_map(|key| self.index_of.get(key).copied());
        let index = { indexes }.find(|index| !self.claimed.contains(index))?;
        self.claimed.insert(index);
        self.indexes.insert(index);
        let len = service.table.len() as u32;
        let slice = self.slice_of.get(&index).filter(|(_, had)| *had == len);
        Some((index, slice.map(|(offset, _)| *offset)))
    }

    fn free_index(&mut self) -> u32 {
        // At most as many are taken as there are services, so the search ends.
        let index = (0..).find(|index| !self.indexes.contains(index)).unwrap_or(u32::MAX);
        self.indexes.insert(index);
        self.claimed.insert(index);
        index
    }

    /// First fit.
    fn free_slice(&mut self, len: u32) -> Option<u32> {
        if len == 0 {
            return Some(0);
        }
        let mut start = 0u32;
        for (used_from, used_to) in &self.slices {
            if used_from.checked_sub(start).is_some_and(|gap| gap >= len) {
                break;
            }
            start = start.max(*used_to);
        }
        let end = start.checked_add(len).filter(|end| *end <= self.capacity)?;
        self.slices.insert(start, end);
        Some(start)
    }
}
