//! The maps: keys and values are in `mesh-ebpf-abi`, which also says who fills each of them. The
//! loader may set every capacity but those of arrays of one entry.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use mesh_ebpf_abi::{
    Addr, AddrKey, AddrValue, Config, Counter, Endpoint, FlowKey, FlowValue, Node, Port, Published,
    PublishedKey, Service, VIP_CLIENTS_CAPACITY,
};

use crate::flows::Scratch;

/// Entries of the maps that user space fills. They are allocated as they are needed.
const RECORDS: u32 = 1 << 16;
/// Established flows: two entries each, allocated at once (about 150 bytes an entry), so that a
/// flow never fails for want of memory in softirq.
const FLOW_ENTRIES: u32 = 1 << 20;
/// New and closing flows.
const NEW_FLOW_ENTRIES: u32 = 1 << 18;
/// Slots of all Maglev tables together.
const MAGLEV_SLOTS: u32 = 1 << 20;

#[map]
pub static ADDRESSES: HashMap<AddrKey, AddrValue> =
    HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static ENDPOINTS: HashMap<u64, Endpoint> =
    HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static PORTS: HashMap<u32, Port> = HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static NODES: HashMap<u64, Node> = HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static VTEPS: HashMap<Addr, u64> = HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static SERVICES: HashMap<u32, Service> = HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static PUBLISHED: HashMap<PublishedKey, Published> =
    HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static MAGLEV: Array<u64> = Array::with_max_entries(MAGLEV_SLOTS, BPF_F_MMAPABLE);
#[map]
pub static LOCAL_ADDRS: HashMap<Addr, u32> = HashMap::with_max_entries(RECORDS, BPF_F_NO_PREALLOC);
#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::CAPACITY, 0);
#[map]
pub static FLOWS: HashMap<FlowKey, FlowValue> = HashMap::with_max_entries(FLOW_ENTRIES, 0);
#[map]
pub static FLOWS_NEW: LruHashMap<FlowKey, FlowValue> =
    LruHashMap::with_max_entries(NEW_FLOW_ENTRIES, 0);
#[map]
pub static VIP_CLIENTS: Array<u64> = Array::with_max_entries(VIP_CLIENTS_CAPACITY, 0);
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// A look-up whose result is only read.
macro_rules! get {
    ($map:expr, $key:expr) => {
        // SAFETY: the entry is read through a pointer that RCU keeps alive for the program's run. A
        // concurrent update may be seen half done in a pre-allocated map; entries that user space
        // updates are in maps that are not, and of flows every field is judged on its own.
        unsafe { $map.get($key) }
    };
}
pub(crate) use get;

/// An index of [`COUNTERS`].
pub struct Index(u32);

impl From<Counter> for Index {
    fn from(counter: Counter) -> Self {
        Self(counter as u32)
    }
}

impl From<u32> for Index {
    fn from(index: u32) -> Self {
        Self(index)
    }
}

/// Counts a packet.
#[inline(always)]
pub fn count(counter: impl Into<Index>) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter.into().0) {
        // SAFETY: the entry is this CPU's own, and programs on one CPU do not preempt one another.
        unsafe { *value = (*value).wrapping_add(1) }
    }
}

/// The node's settings.
#[inline(always)]
pub fn config() -> Result<&'static Config, Counter> {
    CONFIG.get(0).ok_or(Counter::DropHelper)
}
