//! Connection tracking against a plain model: partners, states, ages.

use mesh_ebpf_abi::{FLOW_STATE_HAIRPIN, FLOW_STATE_HAIRPIN_REPLY};
use proptest::prelude::*;

use super::*;
use crate::wire::PROTOCOL_UDP;

const SYN: u8 = TCP_SYN;
const SYN_ACK: u8 = TCP_SYN | TCP_ACK;
const ACK: u8 = TCP_ACK;
const FIN: u8 = TCP_FIN | TCP_ACK;
const RST: u8 = TCP_RST;

/// A flow's first entry, as the programs make it.
fn forward() -> impl Strategy<Value = (FlowKey, FlowValue)> {
    let tuple = (any::<[u32; 3]>(), any::<[u16; 4]>(), any::<bool>(), 0u8..4, any::<(u64, u64)>());
    tuple.prop_map(
        |(
            [client, service, backend],
            [sport_be, dport_be, to, remapped],
            tcp,
            which,
            (endpoint, node),
        )| {
            let protocol = if tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
            let tuple = Tuple { src: client, dst: service, sport_be, dport_be, protocol };
            let hairpin = which == 3;
            let (kind, addr, port_be, client_port_be) = match which {
                0 => (FLOW_VIP, backend, dport_be, sport_be),
                1 => (FLOW_MESH, backend, to, remapped),
                2 => (FLOW_SELF, service, dport_be, remapped),
                _ => (FLOW_VIP, client, dport_be, sport_be),
            };
            let value = FlowValue {
                addr: wide(addr),
                endpoint,
                node,
                last_ns: 0,
                port_be,
                client_port_be,
                state: if hairpin { FLOW_STATE_HAIRPIN } else { 0 },
                pad: 0,
            };
            (key(kind, 7, &tuple), value)
        },
    )
}

proptest! {
    /// Each entry names the other, and can be made from the other: neither can be lost for good
    /// while one of them is there.
    #[test]
    fn partners_are_mutual((key, value) in forward()) {
        let other_key = partner(&key, &value).unwrap();
        let other = partner_value(&key, &value);
        prop_assert_eq!(partner(&other_key, &other), Some(key));
        prop_assert_eq!(partner_value(&other_key, &other), value);
        prop_assert!(other_key != key || key.sport_be == key.dport_be);
        prop_assert_eq!(is_reply(key.kind), false);
        let hairpin = value.state & FLOW_STATE_HAIRPIN != 0;
        prop_assert_eq!(is_reply(other_key.kind), !hairpin);
        prop_assert_eq!(is_hairpin_reply(other.state), hairpin);
        prop_assert!(value.state & FLOW_STATE_HAIRPIN_REPLY == 0);
    }

    /// A reply's key is the tuple that the backend answers with, and its translation gives the
    /// client the tuple that it called.
    #[test]
    fn replies_are_those_of_the_translated_packet((key, value) in forward()) {
        prop_assume!(key.kind != FLOW_SELF && value.state == 0);
        // What the backend sees is (client, client port) to (backend, its port).
        let reply = partner(&key, &value).unwrap();
        prop_assert_eq!((reply.src, reply.sport_be), (value.addr, value.port_be));
        prop_assert_eq!((reply.dst, reply.dport_be), (key.src, value.client_port_be));
        // What the client sees.
        let back = partner_value(&key, &value);
        prop_assert_eq!((back.addr, back.port_be), (key.dst, key.dport_be));
        prop_assert_eq!(back.client_port_be, key.sport_be);
    }

    #[test]
    fn flows_of_one_entry_have_no_partner((key, mut value) in forward()) {
        value.state |= FLOW_STATE_ALONE;
        prop_assert_eq!(partner(&key, &value), None);
    }

    /// Whatever came before, no packet but RST, or the second FIN, ends an established flow; and a
    /// SYN begins a new one only after a FIN.
    #[test]
    fn established_flows_end_by_their_own_word(state in 0u16..32, reply: bool, flags: u8) {
        match established(state, reply, flags) {
            Step::Remove => prop_assert!(flags & RST != 0),
            Step::Close(next) => {
                prop_assert!(flags & TCP_FIN != 0 && is_closed(next) && !is_closed(state));
            }
            Step::Restart => prop_assert!(!reply && flags & SYN != 0 && state & CLOSED != 0),
            Step::MarkBoth(next) => prop_assert!(flags & TCP_FIN != 0 && next != state),
            Step::Keep | Step::CheckPartner => prop_assert!(flags & RST == 0),
            Step::Mark(_) | Step::Promote => prop_assert!(false),
        }
        prop_assert_eq!(changes_state(flags), flags & (SYN | RST | TCP_FIN) != 0);
        if !changes_state(flags) {
            prop_assert_eq!(established(state, reply, flags), Step::Keep);
        }
    }

    /// No single side can make a flow established: a SYN flood, answered or not, stays in the LRU.
    #[test]
    fn one_side_alone_establishes_nothing(packets in proptest::collection::vec(any::<u8>(), 0..32),
                                          reply: bool) {
        let mut flow = Model::default();
        for flags in packets {
            flow.packet(reply, flags & !RST);
            prop_assert!(!flow.established);
        }
    }

    /// Ages: an established TCP flow outlives 2 h 11 min of silence of one side, and of both to the
    /// second; a lone half does not linger.
    #[test]
    fn ages((key, value) in forward(), now in TCP_ESTABLISHED_NS..u64::MAX / 2,
            idle in 0..2 * TCP_ESTABLISHED_NS, other_idle in 0..2 * TCP_ESTABLISHED_NS) {
        let value = FlowValue { last_ns: now.saturating_sub(idle), ..value };
        let other = FlowValue { last_ns: now.saturating_sub(other_idle), ..value };
        let limit =
            if key.protocol == PROTOCOL_TCP { TCP_ESTABLISHED_NS } else { UDP_ESTABLISHED_NS };
        let silent = (now - value.last_ns).min(now - other.last_ns);
        prop_assert_eq!(expired(now, &key, &value, Some(&other)), silent >= limit);
        prop_assert_eq!(expired(now, &key, &value, None), now - value.last_ns >= ORPHAN_NS);
        let alone = FlowValue { state: FLOW_STATE_ALONE, ..value };
        prop_assert_eq!(expired(now, &key, &alone, None), now - value.last_ns >= limit);
        // A clock that is a tick behind the entry's is no reason.
        prop_assert!(!expired(0, &key, &other, Some(&value)) || now == 0 || other.last_ns == 0);
        prop_assert_eq!(is_stale(now, &value), now - value.last_ns >= SECOND);
        let protocol = key.protocol;
        prop_assert_eq!(is_forgotten(now, protocol, &value), now - value.last_ns >= NEW_NS);
        let used = FlowValue { state: value.state | FLOW_STATE_REPLIED, ..value };
        prop_assert_eq!(is_forgotten(now, protocol, &used), now - value.last_ns >= limit);
        let closed = FlowValue { state: used.state | CLOSED, ..used };
        prop_assert_eq!(is_forgotten(now, protocol, &closed), now - value.last_ns >= NEW_NS);
    }

    #[test]
    fn substitute_ports_are_dynamic(own: u16, hash: u32, attempt in 1u32..64) {
        prop_assert_eq!(client_port(own, hash, 0), own);
        prop_assert!(u16::from_be(client_port(own, hash, attempt)) >= 49_152);
    }
}

/// Both entries of a flow, kept as the programs keep them.
#[derive(Default)]
struct Model {
    established: bool,
    gone: bool,
    state: [u16; 2],
}

impl Model {
    fn packet(&mut self, reply: bool, flags: u8) -> Step {
        let own = usize::from(reply);
        let step = if self.established {
            established(self.state[own], reply, flags)
        } else {
            unestablished(self.state[own], reply, flags)
        };
        match step {
            Step::Keep => {}
            Step::Mark(state) => self.state[own] = state,
            Step::MarkBoth(state) => {
                self.state[own] = state;
                self.state[1 - own] |= state & CLOSED;
            }
            Step::CheckPartner => {
                let replied = self.state[1] & FLOW_STATE_REPLIED != 0;
                self.established |= replied && flags & SYN == 0;
            }
            Step::Close(state) => {
                self.established = false;
                self.state[own] = state;
                self.state[1 - own] |= state & CLOSED;
            }
            Step::Promote => self.established = true,
            Step::Remove | Step::Restart => self.gone = true,
        }
        step
    }
}

#[test]
fn a_connection_from_syn_to_the_last_ack() {
    let mut flow = Model::default();
    flow.packet(false, SYN);
    assert!(!flow.state.into_iter().any(is_answered));
    flow.packet(true, SYN_ACK);
    assert!(!flow.established && flow.state.into_iter().any(is_answered));
    flow.packet(false, ACK);
    assert!(flow.established);
    for _ in 0..3 {
        assert_eq!(flow.packet(false, ACK), Step::Keep);
        assert_eq!(flow.packet(true, ACK), Step::Keep);
    }
    flow.packet(true, FIN);
    assert!(flow.established, "half-closed flows are established: the other side may go on");
    assert_eq!(flow.packet(true, FIN), Step::Keep);
    flow.packet(false, FIN);
    assert!(!flow.established && !flow.gone);
    assert!(flow.state.into_iter().all(is_answered), "else it is taken for half-open");
    // The last packets still find their way, and change nothing.
    assert_eq!(flow.packet(true, ACK), Step::Keep);
    assert_eq!(flow.packet(false, ACK), Step::Keep);
    assert!(!flow.established);
    // The ports may be used again at once.
    assert_eq!(flow.packet(false, SYN), Step::Restart);
}

#[test]
fn a_reset_ends_a_flow_in_any_state() {
    for established in [false, true] {
        for reply in [false, true] {
            let mut flow = Model { established, ..Model::default() };
            assert_eq!(flow.packet(reply, RST), Step::Remove);
        }
    }
}

/// An exchange of UDP: established by the client's second word.
#[test]
fn udp_is_established_after_a_reply() {
    let mut flow = Model::default();
    flow.packet(false, 0);
    flow.packet(false, 0);
    assert!(!flow.established);
    flow.packet(true, 0);
    flow.packet(true, 0);
    assert!(!flow.established);
    flow.packet(false, 0);
    assert!(flow.established);
}

/// At an ingress node with the backend elsewhere: one entry, replies pass it by.
#[test]
fn a_flow_of_one_entry() {
    let alone = FLOW_STATE_ALONE;
    assert_eq!(unestablished(alone, false, SYN), Step::CheckPartner);
    assert_eq!(unestablished(alone, false, ACK), Step::Keep);
    let replied = alone | FLOW_STATE_REPLIED;
    assert_eq!(unestablished(alone, true, SYN_ACK), Step::Mark(replied));
    assert_eq!(unestablished(replied, false, ACK), Step::Promote);
    assert_eq!(unestablished(replied | CLOSED, false, ACK), Step::Keep);
}

/// A node that gave a flow to another one sees its client alone.
#[test]
fn a_relayed_flow_is_held_while_its_client_goes_on() {
    let open = relayed(FLOW_STATE_ALONE, TCP_SYN).unwrap();
    assert_eq!(open, FLOW_STATE_ALONE, "a client that only knocks is forgotten soon");
    let used = relayed(open, TCP_ACK).unwrap();
    assert_eq!(used, FLOW_STATE_ALONE | FLOW_STATE_REPLIED);
    let at = |state| FlowValue {
        addr: wide(1),
        endpoint: 1,
        node: 1,
        last_ns: 0,
        port_be: 80,
        client_port_be: 4711,
        state,
        pad: 0,
    };
    assert!(is_forgotten(NEW_NS, PROTOCOL_TCP, &at(open)));
    assert!(!is_forgotten(NEW_NS, PROTOCOL_TCP, &at(used)));
    for end in [TCP_FIN | TCP_ACK, TCP_RST] {
        let ended = relayed(used, end).unwrap();
        assert!(is_closed(ended) && is_forgotten(NEW_NS, PROTOCOL_TCP, &at(ended)));
        // Its last packets still follow it; a new flow of the same ports does not.
        assert_eq!(relayed(ended, TCP_ACK), Some(ended));
        assert_eq!(relayed(ended, TCP_SYN), None);
    }
}

#[test]
fn a_void_decision_is_told_before_it_is_followed() {
    for state in [0, FLOW_STATE_FIN, FLOW_STATE_FIN_REPLY, CLOSED, FLOW_STATE_REPLIED] {
        for flags in [TCP_SYN, TCP_SYN | TCP_ACK, TCP_ACK, TCP_FIN, TCP_RST, 0] {
            let void = established(state, false, flags) == Step::Restart;
            assert_eq!(restarts(state, flags), void, "{state} {flags}");
        }
    }
}
