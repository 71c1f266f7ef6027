//! The tables of flows: finding an entry, and doing what `mesh_ebpf_core::flow` says to it.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use mesh_ebpf_abi::{
    Counter, FLOW_STATE_ALONE, FLOW_STATE_FIN, FLOW_STATE_FIN_REPLY, FLOW_STATE_REPLIED, FlowKey,
    FlowValue,
};
use mesh_ebpf_core::{
    addr,
    flow::{self, Step},
    wire::{TCP_RST, TCP_SYN},
};

use crate::maps::{FLOWS, FLOWS_NEW, SCRATCH, count};

const ANY: u64 = 0;

/// An entry that was found.
#[derive(Clone, Copy)]
pub struct Entry {
    at: *mut FlowValue,
    established: bool,
}

/// Now, as precise as a clock tick: cheaper than the exact time, and enough for seconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes and gives plain numbers.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Finds a flow's entry.
#[inline(always)]
pub fn find(key: &FlowKey, now_ns: u64) -> Option<Entry> {
    if let Some(at) = FLOWS.get_ptr_mut(key) {
        return Some(Entry { at, established: true });
    }
    let at = FLOWS_NEW.get_ptr_mut(key)?;
    let entry = Entry { at, established: false };
    if flow::is_forgotten(now_ns, key.protocol, entry.value()) { None } else { Some(entry) }
}

impl Entry {
    /// The decision.
    #[inline(always)]
    pub fn value(&self) -> &FlowValue {
        // SAFETY: RCU keeps the entry's memory alive for the program's run. It may be written
        // meanwhile; each field is a plain integer.
        unsafe { &*self.at }
    }

    /// Does to the flow what a packet with these TCP flags (0: none) does. `false`: the decision is
    /// void, and the entries are gone.
    #[inline(always)]
    pub fn advance(&self, key: &FlowKey, reply: bool, flags: u8, now_ns: u64) -> bool {
        let value = self.value();
        if flow::is_stale(now_ns, value) {
            // SAFETY: as above; who writes last wins, and all write about the same.
            unsafe { (*self.at).last_ns = now_ns };
        }
        // Nearly every packet ends here.
        if self.established && !flow::changes_state(flags) {
            return true;
        }
        transition(key, self, u32::from(reply), u32::from(flags)) != 0
    }

    /// As [`Entry::advance`] for a client's packet, where the replies pass elsewhere.
    #[inline(always)]
    pub fn relay(&self, flags: u8, now_ns: u64) -> bool {
        let value = self.value();
        if flow::is_stale(now_ns, value) {
            // SAFETY: as above.
            unsafe { (*self.at).last_ns = now_ns };
        }
        let Some(state) = flow::relayed(value.state, flags) else { return false };
        if state != value.state {
            self.set(state);
        }
        true
    }

    /// Whether nobody answered yet, as far as this entry tells after [`Entry::advance`].
    #[inline(always)]
    pub fn is_half_open(&self, key: &FlowKey) -> bool {
        // What has just become established has left the LRU, and so has the entry looked at.
        !self.established
            && FLOWS.get_ptr(key).is_none()
            && !flow::is_answered(self.value().state)
    }

    /// Removes the flow.
    #[inline(always)]
    pub fn forget(&self, key: &FlowKey) {
        // As a reset does.
        transition(key, self, 0, u32::from(TCP_RST));
    }

    #[inline(always)]
    fn set(&self, state: u16) {
        // SAFETY: as in `value`.
        unsafe { (*self.at).state = state };
    }
}

/// The steps that few packets of a flow take. Gives 0 if the decision is void.
#[inline(never)]
fn transition(key: &FlowKey, entry: &Entry, reply: u32, flags: u32) -> u32 {
    let (reply, flags) = (reply != 0, flags as u8);
    let value = entry.value();
    let step = if entry.established {
        flow::established(value.state, reply, flags)
    } else {
        flow::unestablished(value.state, reply, flags)
    };
    match step {
        Step::Keep => return 1,
        Step::Mark(state) => {
            entry.set(state);
            return 1;
        }
        _ => {}
    }
    let Some(scratch) = scratch() else { return 1 };
    let paired = flow::write_partner(key, value, &mut scratch.partner);
    match step {
        Step::Keep | Step::Mark(_) => {}
        Step::MarkBoth(state) => {
            entry.set(state);
            if paired {
                mark(entry.established, &scratch.partner, state);
            }
        }
        Step::CheckPartner => {
            if paired {
                check_partner(key, entry, flags & TCP_SYN != 0, scratch);
            }
        }
        Step::Promote => {
            copy(value, &mut scratch.value);
            if FLOWS.insert(key, &scratch.value, ANY).is_ok() {
                let _ = FLOWS_NEW.remove(key);
            } else {
                count(Counter::FlowTableFull);
            }
        }
        Step::Close(state) => {
            entry.set(state);
            copy(value, &mut scratch.value);
            let _ = FLOWS_NEW.insert(key, &scratch.value, ANY);
            if paired {
                flow::write_partner_value(key, value, &mut scratch.value);
                let _ = FLOWS_NEW.insert(&scratch.partner, &scratch.value, ANY);
                let _ = FLOWS.remove(&scratch.partner);
            }
            let _ = FLOWS.remove(key);
        }
        Step::Remove | Step::Restart => {
            remove(entry.established, key);
            if paired {
                remove(entry.established, &scratch.partner);
            }
            return u32::from(step == Step::Remove);
        }
    }
    1
}

#[inline(always)]
fn mark(established: bool, key: &FlowKey, state: u16) {
    let at = if established { FLOWS.get_ptr_mut(key) } else { FLOWS_NEW.get_ptr_mut(key) };
    if let Some(at) = at {
        // SAFETY: as in `Entry::value`.
        unsafe { (*at).state |= state & (FLOW_STATE_FIN | FLOW_STATE_FIN_REPLY) };
    }
}

#[inline(always)]
fn remove(established: bool, key: &FlowKey) {
    // That it is gone already is as good.
    let _ = if established { FLOWS.remove(key) } else { FLOWS_NEW.remove(key) };
}

/// Puts the partner back if it is gone; makes both established once a reply was seen.
#[inline(always)]
fn check_partner(key: &FlowKey, entry: &Entry, syn: bool, scratch: &mut Scratch) {
    let value = entry.value();
    flow::write_partner_value(key, value, &mut scratch.value);
    if entry.established {
        if FLOWS.get_ptr(&scratch.partner).is_none() {
            let _ = FLOWS.insert(&scratch.partner, &scratch.value, ANY);
        }
        return;
    }
    let Some(other) = FLOWS_NEW.get_ptr(&scratch.partner) else {
        let _ = FLOWS_NEW.insert(&scratch.partner, &scratch.value, ANY);
        return;
    };
    // SAFETY: as in `Entry::value`.
    let replied = unsafe { (*other).state } & FLOW_STATE_REPLIED != 0;
    if !replied || syn {
        return;
    }
    // The reply's entry first: where the forward one is, the other is.
    scratch.value.state |= FLOW_STATE_REPLIED;
    if FLOWS.insert(&scratch.partner, &scratch.value, ANY).is_err() {
        // It stays where it is, and is as long-lived there as the LRU allows.
        entry.set(value.state | FLOW_STATE_REPLIED);
        count(Counter::FlowTableFull);
        return;
    }
    copy(value, &mut scratch.value);
    if FLOWS.insert(key, &scratch.value, ANY).is_err() {
        let _ = FLOWS.remove(&scratch.partner);
        entry.set(value.state | FLOW_STATE_REPLIED);
        count(Counter::FlowTableFull);
        return;
    }
    let _ = FLOWS_NEW.remove(key);
    let _ = FLOWS_NEW.remove(&scratch.partner);
}

/// Enters a new flow, both its entries. With `distinct`, for flows whose clients share an address
/// behind the translation, another port stands for the client's if its own is taken by one of its
/// other flows. `fill` writes the decision.
#[inline(always)]
pub fn create<const KIND: u8>(
    key: &FlowKey,
    distinct: bool,
    hash: u32,
    fill: impl FnOnce(&mut FlowValue),
) -> Result<&'static FlowValue, Counter> {
    let Some(Scratch { own, partner, value, .. }) = scratch() else {
        return Err(Counter::DropFlowTable);
    };
    fill(own);
    if own.state & FLOW_STATE_ALONE == 0 {
        let mut attempt = 0;
        loop {
            own.client_port_be = flow::client_port(key.sport_be, hash, attempt);
            flow::write_partner_value_of(KIND, key, own, value);
            if flow::write_partner_of(KIND, key, own, partner)
                && (!distinct || is_free(partner, value, own.last_ns))
            {
                break;
            }
            attempt += 1;
            if attempt == PORT_ATTEMPTS {
                return Err(Counter::DropFlowTable);
            }
        }
        FLOWS_NEW.insert(&*partner, &*value, ANY).map_err(|_| Counter::DropFlowTable)?;
    }
    FLOWS_NEW.insert(key, &*own, ANY).map_err(|_| Counter::DropFlowTable)?;
    count(Counter::FlowNew);
    Ok(own)
}

/// Whether no other flow that still lives has this entry.
#[inline(always)]
fn is_free(key: &FlowKey, value: &FlowValue, now_ns: u64) -> bool {
    find(key, now_ns).is_none_or(|entry| {
        flow::is_closed(entry.value().state) || flow::is_same(entry.value(), value)
    })
}

/// A copy that LLVM knows not to overlap: else it calls `memmove`.
#[inline(always)]
fn copy(from: &FlowValue, to: &mut FlowValue) {
    let FlowValue { ref addr, endpoint, node, last_ns, port_be, client_port_be, state, pad } =
        *from;
    let addr = addr::copy(addr);
    *to = FlowValue { addr, endpoint, node, last_ns, port_be, client_port_be, state, pad };
}

/// Ports that are tried for a client before its packet is dropped; it will try again.
const PORT_ATTEMPTS: u32 = 4;

/// Room for entries: a BPF stack of 512 bytes, shared by a chain of calls, has none to spare.
#[repr(C)]
pub struct Scratch {
    partner: FlowKey,
    pad: u32,
    value: FlowValue,
    own: FlowValue,
}

#[inline(always)]
fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the entry is this CPU's own; programs on one CPU do not preempt one another, and no
    // function that holds it calls another that takes it.
    SCRATCH.get_ptr_mut(0).map(|at| unsafe { &mut *at })
}
