//! Connection tracking: keys, partners, states, ages.
//!
//! A flow has an entry per direction. Both hold the decision that was taken for it; each names the
//! other ([`partner`]). New flows begin in the LRU table; a flow moves to the table of established
//! ones when its client sends on after a reply was seen, and back to the LRU when both sides have
//! closed it. So the LRU may evict what it likes: established flows are not in it, and an evicted
//! half of a new flow is put back by the next packet ([`Step::CheckPartner`]).

use mesh_ebpf_abi::{
    FLOW_MESH, FLOW_MESH_REPLY, FLOW_SELF, FLOW_SELF_REPLY, FLOW_STATE_ALONE, FLOW_STATE_FIN,
    FLOW_STATE_FIN_REPLY, FLOW_STATE_HAIRPIN, FLOW_STATE_HAIRPIN_REPLY, FLOW_STATE_REPLIED,
    FLOW_VIP, FLOW_VIP_REPLY, FlowKey, FlowValue,
};

use crate::{
    addr::{copy, low, wide},
    hash::Tuple,
    wire::{PROTOCOL_TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};

const SECOND: u64 = 1_000_000_000;
/// How long an established TCP flow may be silent: 2 h 11 min, above the default keepalive (2 h and
/// 9 probes of 75 s, tcp(7)).
pub const TCP_ESTABLISHED_NS: u64 = 7860 * SECOND;
/// How long an established UDP flow may be silent: above the 2 minutes that RFC 4787 REQ-5 asks.
pub const UDP_ESTABLISHED_NS: u64 = 180 * SECOND;
/// How long a new or closing flow's decision holds without a packet.
pub const NEW_NS: u64 = 60 * SECOND;
/// After this an entry without its partner is collected.
pub const ORPHAN_NS: u64 = 10 * SECOND;
/// Timestamps are refreshed no more often than this.
const REFRESH_NS: u64 = SECOND;

const CLOSED: u16 = FLOW_STATE_FIN | FLOW_STATE_FIN_REPLY;

/// The key of a packet's flow.
#[inline(always)]
#[must_use]
pub const fn key(kind: u8, vni: u32, tuple: &Tuple) -> FlowKey {
    FlowKey {
        src: wide(tuple.src),
        dst: wide(tuple.dst),
        vni,
        sport_be: tuple.sport_be,
        dport_be: tuple.dport_be,
        protocol: tuple.protocol,
        kind,
        pad: 0,
    }
}

/// The key of the other direction's entry; `None` if the flow has one entry only.
///
/// For entries that the programs write, the partner's partner is the entry again.
#[inline(always)]
#[must_use]
pub const fn partner(key: &FlowKey, value: &FlowValue) -> Option<FlowKey> {
    let mut out = *key;
    if write_partner(key, value, &mut out) { Some(out) } else { None }
}

/// [`partner`] in place, for BPF's small stack; `false`: there is none.
#[inline(always)]
#[must_use]
pub const fn write_partner(key: &FlowKey, value: &FlowValue, out: &mut FlowKey) -> bool {
    write_partner_of(key.kind, key, value, out)
}

/// [`write_partner`] of a key whose kind is known.
#[inline(always)]
#[must_use]
pub const fn write_partner_of(
    kind: u8,
    key: &FlowKey,
    value: &FlowValue,
    out: &mut FlowKey,
) -> bool {
    if value.state & FLOW_STATE_ALONE != 0 {
        return false;
    }
    out.vni = key.vni;
    out.protocol = key.protocol;
    out.pad = 0;
    match kind {
        FLOW_VIP if value.state & FLOW_STATE_HAIRPIN != 0 => {
            out.kind = FLOW_VIP;
            out.src = copy(&key.src);
            out.dst = copy(&key.dst);
            out.sport_be = key.dport_be;
            out.dport_be = key.sport_be;
        }
        FLOW_VIP | FLOW_MESH => {
            out.kind = if kind == FLOW_VIP { FLOW_VIP_REPLY } else { FLOW_MESH_REPLY };
            out.src = copy(&value.addr);
            out.dst = copy(&key.src);
            out.sport_be = value.port_be;
            out.dport_be = value.client_port_be;
        }
        FLOW_VIP_REPLY | FLOW_MESH_REPLY => {
            out.kind = if kind == FLOW_VIP_REPLY { FLOW_VIP } else { FLOW_MESH };
            out.src = copy(&key.dst);
            out.dst = copy(&value.addr);
            out.sport_be = value.client_port_be;
            out.dport_be = value.port_be;
        }
        // A task's call to its own node: the node's address stands for the task's.
        FLOW_SELF => {
            out.kind = FLOW_SELF_REPLY;
            out.src = copy(&key.dst);
            out.dst = copy(&key.dst);
            out.sport_be = key.dport_be;
            out.dport_be = value.client_port_be;
        }
        FLOW_SELF_REPLY => {
            out.kind = FLOW_SELF;
            out.src = copy(&value.addr);
            out.dst = copy(&key.src);
            out.sport_be = value.client_port_be;
            out.dport_be = key.sport_be;
        }
        _ => return false,
    }
    true
}

/// The other direction's entry, made from one of them. With [`partner`] it puts back what the LRU
/// evicted; which also makes the second entry of a new flow.
#[inline(always)]
#[must_use]
pub const fn partner_value(key: &FlowKey, value: &FlowValue) -> FlowValue {
    let mut out = *value;
    write_partner_value(key, value, &mut out);
    out
}

/// [`partner_value`] in place.
#[inline(always)]
pub const fn write_partner_value(key: &FlowKey, value: &FlowValue, out: &mut FlowValue) {
    write_partner_value_of(key.kind, key, value, out);
}

/// [`write_partner_value`] of a key whose kind is known.
#[inline(always)]
pub const fn write_partner_value_of(
    kind: u8,
    key: &FlowKey,
    value: &FlowValue,
    out: &mut FlowValue,
) {
    let reply = is_reply(kind);
    if value.state & FLOW_STATE_HAIRPIN != 0 {
        out.addr = copy(&value.addr);
    } else if reply || kind == FLOW_SELF {
        out.addr = copy(&key.src);
    } else {
        out.addr = copy(&key.dst);
    }
    out.endpoint = value.endpoint;
    out.node = value.node;
    out.last_ns = value.last_ns;
    // Of a hairpin both entries are forward ones, with the ports exchanged.
    if reply || value.state & FLOW_STATE_HAIRPIN != 0 {
        out.port_be = key.sport_be;
        out.client_port_be = key.dport_be;
    } else {
        out.port_be = key.dport_be;
        out.client_port_be = key.sport_be;
    }
    out.state = value.state & !FLOW_STATE_REPLIED;
    if value.state & FLOW_STATE_HAIRPIN != 0 {
        out.state ^= FLOW_STATE_HAIRPIN_REPLY;
    }
    out.pad = 0;
}

/// Whether two entries of one key belong to the same flow.
#[inline(always)]
#[must_use]
pub const fn is_same(a: &FlowValue, b: &FlowValue) -> bool {
    low(&a.addr) == low(&b.addr)
        && a.port_be == b.port_be
        && a.client_port_be == b.client_port_be
        && a.endpoint == b.endpoint
}

/// Whether a flow in this state ends: both sides have closed it.
#[inline(always)]
#[must_use]
pub const fn is_closed(state: u16) -> bool {
    state & CLOSED == CLOSED
}

/// Whether this entry tells that the backend answered. Of a flow's two entries that of the client's
/// packets does not know before the client goes on; but that both know of the backend's FIN.
#[inline(always)]
#[must_use]
pub const fn is_answered(state: u16) -> bool {
    state & (FLOW_STATE_REPLIED | FLOW_STATE_FIN_REPLY) != 0
}

/// Whether a hairpin's entry is that of the replies.
#[inline(always)]
#[must_use]
pub const fn is_hairpin_reply(state: u16) -> bool {
    state & FLOW_STATE_HAIRPIN_REPLY != 0
}

/// Whether entries of this kind are of replies.
#[inline(always)]
#[must_use]
pub const fn is_reply(kind: u8) -> bool {
    matches!(kind, FLOW_VIP_REPLY | FLOW_MESH_REPLY | FLOW_SELF_REPLY)
}

/// What a packet does to its flow, beside passing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Keep,
    /// The decision is void: decide anew, as for an unknown flow.
    Restart,
    /// See that the partner exists; put it back if not. If it is new, has seen a reply, and the
    /// packet is no SYN, both become established.
    CheckPartner,
    /// Set this state on this entry.
    Mark(u16),
    /// Set this state on both entries.
    MarkBoth(u16),
    /// The flow has one entry: it becomes established.
    Promote,
    /// Set this state and move both to the LRU: the flow ends.
    Close(u16),
    /// Remove both.
    Remove,
}

/// Whether TCP flags can change the state of an established flow.
#[inline(always)]
#[must_use]
pub const fn changes_state(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_FIN | TCP_RST) != 0
}

/// What a packet of an *established* flow does to it. `flags` are TCP's; 0 for other protocols.
#[inline(always)]
#[must_use]
pub const fn established(state: u16, reply: bool, flags: u8) -> Step {
    if !changes_state(flags) {
        return Step::Keep;
    }
    if flags & TCP_RST != 0 {
        return Step::Remove;
    }
    if flags & TCP_SYN != 0 {
        return if reply || flags & TCP_ACK != 0 {
            Step::Keep
        } else if state & CLOSED != 0 {
            Step::Restart
        } else {
            // The client lost its state, or the packet is late. The backend answers with what it
            // knows (RFC 9293 section 3.10.7.4), so the answer must find its way.
            Step::CheckPartner
        };
    }
    let closing = state | if reply { FLOW_STATE_FIN_REPLY } else { FLOW_STATE_FIN };
    if closing == state {
        Step::Keep
    } else if closing & CLOSED == CLOSED {
        Step::Close(closing)
    } else {
        Step::MarkBoth(closing)
    }
}

/// What a packet of a flow in the *LRU* does to it.
#[inline(always)]
#[must_use]
pub const fn unestablished(state: u16, reply: bool, flags: u8) -> Step {
    if flags & TCP_RST != 0 {
        return Step::Remove;
    }
    let closed = state & CLOSED == CLOSED;
    if reply {
        let mut next = state | FLOW_STATE_REPLIED;
        if flags & TCP_FIN != 0 {
            next |= FLOW_STATE_FIN_REPLY;
        }
        return if next == state {
            Step::Keep
        } else if next & CLOSED == state & CLOSED {
            Step::Mark(next)
        } else {
            Step::MarkBoth(next)
        };
    }
    if flags & TCP_SYN != 0 {
        return if state & CLOSED != 0 { Step::Restart } else { Step::CheckPartner };
    }
    if flags & TCP_FIN != 0 && state & FLOW_STATE_FIN == 0 {
        return Step::MarkBoth(state | FLOW_STATE_FIN);
    }
    if closed {
        return Step::Keep;
    }
    if state & FLOW_STATE_ALONE != 0 {
        return if state & FLOW_STATE_REPLIED != 0 { Step::Promote } else { Step::Keep };
    }
    Step::CheckPartner
}

/// The state of an entry after a client's packet where the replies pass elsewhere: at a node that
/// gave the flow to a backend on a third one. `None`: the decision is void, as for
/// [`Step::Restart`].
///
/// That the client goes on says that it got a reply. Nobody there sees the backend close its side,
/// so the client's FIN is taken for both: the decision then holds as long as packets come. Such an
/// entry stays in the LRU, where nobody has to collect it.
#[inline(always)]
#[must_use]
pub const fn relayed(state: u16, flags: u8) -> Option<u16> {
    if restarts(state, flags) {
        None
    } else if flags & (TCP_FIN | TCP_RST) != 0 {
        Some(state | CLOSED)
    } else if flags & TCP_SYN != 0 {
        Some(state)
    } else {
        Some(state | FLOW_STATE_REPLIED)
    }
}

/// Whether a client's packet begins a new flow where an old one was closed.
#[inline(always)]
#[must_use]
pub const fn restarts(state: u16, flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN && state & CLOSED != 0
}

/// Whether the entry's timestamp should be set to `now`.
#[inline(always)]
#[must_use]
pub const fn is_stale(now_ns: u64, value: &FlowValue) -> bool {
    now_ns.saturating_sub(value.last_ns) >= REFRESH_NS
}

/// Whether an entry of the LRU is too old for its decision to hold. A flow that both sides use is
/// there only because the other table is full: it keeps the other table's terms.
#[inline(always)]
#[must_use]
pub const fn is_forgotten(now_ns: u64, protocol: u8, value: &FlowValue) -> bool {
    let used = value.state & FLOW_STATE_REPLIED != 0 && !is_closed(value.state);
    let limit = if used { established_ns(protocol) } else { NEW_NS };
    now_ns.saturating_sub(value.last_ns) >= limit
}

/// How long an established flow may be silent.
#[inline(always)]
const fn established_ns(protocol: u8) -> u64 {
    if protocol == PROTOCOL_TCP { TCP_ESTABLISHED_NS } else { UDP_ESTABLISHED_NS }
}

/// Whether user space should collect an entry of the table of established flows, and with it its
/// partner (whose key is [`partner`]'s). `other` is the partner's entry, if there is one.
///
/// The clock is CLOCK_MONOTONIC. A flow lives as long as either direction does.
#[must_use]
pub fn expired(now_ns: u64, key: &FlowKey, value: &FlowValue, other: Option<&FlowValue>) -> bool {
    let last = match (other, partner(key, value)) {
        (Some(other), _) => value.last_ns.max(other.last_ns),
        (None, None) => value.last_ns,
        (None, Some(_)) => return now_ns.saturating_sub(value.last_ns) >= ORPHAN_NS,
    };
    now_ns.saturating_sub(last) >= established_ns(key.protocol)
}

/// The client's port that stands for it on the backend's side: its own at first, others when that
/// one is taken by another of its flows. In the dynamic range.
#[inline(always)]
#[must_use]
pub const fn client_port(own_be: u16, hash: u32, attempt: u32) -> u16 {
    if attempt == 0 {
        return own_be;
    }
    let mixed = hash.rotate_left(7).wrapping_add(attempt.wrapping_mul(0x9e37_79b9)) >> 16;
    (49152 | (mixed & 0x3fff) as u16).to_be()
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
