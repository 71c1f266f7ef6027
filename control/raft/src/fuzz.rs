//! What `cargo xtask fuzz` calls.

use mesh_control::command::Proposal;
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    network::{Envelope, SnapshotRequest},
    types::{Types, Write, decode, encode},
};

/// The body of a call of another manager, or its answer. What is understood is understood again
/// after it was written anew.
pub fn call(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    match kind % 6 {
        0 => again::<AppendEntriesRequest<Types>>(body),
        1 => again::<VoteRequest<Types>>(body),
        2 => again::<TransferLeaderRequest<Types>>(body),
        3 => again::<Write>(body),
        4 => again::<SnapshotRequest>(body),
        _ => {
            let _ = crate::machine::fuzz_snapshot(body);
        }
    }
}

/// Forwarded writes, for a fuzzer to begin with.
#[must_use]
pub fn examples() -> Vec<Vec<u8>> {
    let of = |command| {
        let body = Write { id: [1; 16], proposal: Proposal { now_ms: 1, command } };
        let call = encode(&Envelope { to: 1, body }).expect("it encodes");
        [&[3][..], &call].concat()
    };
    mesh_control::fuzz::examples().into_iter().flatten().map(of).collect()
}

fn again<T: Serialize + DeserializeOwned>(body: &[u8]) {
    let Ok(first) = decode::<Envelope<T>>(body) else { return };
    let bytes = encode(&first).expect("what was decoded is encoded");
    let second: Envelope<T> = decode(&bytes).expect("and decoded again");
    assert_eq!(encode(&second).ok(), Some(bytes));
}
