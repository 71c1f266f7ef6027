//! What `cargo xtask fuzz` calls.

use mesh_control::model::{GossipKeys, NodeDescription};
use mesh_types::{NodeId, Revision, TaskId, task::TaskStatus};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Route, RpcError, RpcErrorKind,
    frames::Splitter,
    messages::{
        ClusterKeys, CounterValue, ExecInput, ExecOutput, ExecRequest, JoinRequest, JoinResponse,
        LogLine, LogsOutput, LogsRequest, NodeUpdate, RenewRequest, RenewResponse, ReportRequest,
        ReportResponse, SessionRequest, StatsResponse,
    },
};

/// A message of another node, of any kind. What is understood is understood again after it was
/// written anew.
pub fn message(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    KINDS[usize::from(*kind) % KINDS.len()](body);
}

const KINDS: &[fn(&[u8])] = &[
    again::<SessionRequest>,
    again::<NodeUpdate>,
    again::<ReportRequest>,
    again::<ExecRequest>,
    again::<ExecInput>,
    again::<ExecOutput>,
    again::<LogsRequest>,
    again::<LogsOutput>,
    again::<StatsResponse>,
    again::<RpcError>,
    again::<ReportResponse>,
    again::<JoinRequest>,
    again::<JoinResponse>,
    again::<RenewRequest>,
    again::<RenewResponse>,
];

/// Messages of most kinds, for a fuzzer to begin with.
#[must_use]
pub fn examples() -> Vec<Vec<u8>> {
    let task = TaskId::from_bits(7);
    let revision = Revision::new(9).expect("a revision");
    let exec = ExecRequest {
        task,
        argv: vec!["sh".into()],
        env: vec!["A=1".into()],
        dir: Some("/tmp".into()),
        user: None,
        tty: Some((80, 24)),
        stdin: true,
    };
    let line = LogLine { task, stderr: true, at_ns: 1, text: "a line\n".into() };
    let update = NodeUpdate {
        assignments: Some(Vec::new()),
        ended: [task].into(),
        keys: Some(ClusterKeys {
            roots: vec!["PEM".into()],
            gossip: GossipKeys { key: [1; 32], epoch: GossipKeys::first(), next: None },
        }),
        data_path_port: Some(4789),
        ..NodeUpdate::default()
    };
    let report = ReportRequest {
        statuses: vec![(task, TaskStatus::default())],
        description: Some(NodeDescription::default()),
        acks: vec![(NodeId::from_bits(1), revision)],
        ..ReportRequest::default()
    };
    let counter = CounterValue { name: "to_local".into(), value: 1, is_drop: false };
    let parts = [
        bytes(&SessionRequest { revision, ..SessionRequest::default() }),
        bytes(&update),
        bytes(&report),
        bytes(&exec),
        bytes(&ExecInput::Stdin("x".into())),
        bytes(&ExecOutput::Failed("why".into())),
        bytes(&LogsRequest { tasks: vec![(task, 1)], tail: Some(3), ..LogsRequest::default() }),
        bytes(&LogsOutput::Lines(vec![line])),
        bytes(&StatsResponse { counters: vec![counter] }),
        bytes(&RpcError::new(RpcErrorKind::Denied, "why")),
        bytes(&ReportResponse { revision }),
    ];
    (0..).zip(parts).map(|(kind, part)| [&[kind][..], &part].concat()).collect()
}

fn bytes(message: &impl Serialize) -> Vec<u8> {
    rmp_serde::to_vec_named(message).expect("it encodes")
}

fn again<T: Serialize + DeserializeOwned>(body: &[u8]) {
    let Ok(first) = rmp_serde::from_slice::<T>(body) else { return };
    let encoded = bytes(&first);
    let second: T = rmp_serde::from_slice(&encoded).expect("what was encoded is decoded");
    assert_eq!(bytes(&second), encoded);
}

/// A stream of messages, cut where the first byte says: the same ones come out, and no more is kept
/// than what was given.
pub fn frames(data: &[u8]) {
    const LIMIT: usize = 256;
    let Some((step, stream)) = data.split_first() else { return };
    let pieces = |step: usize| {
        let (mut splitter, mut out) = (Splitter::default(), Vec::new());
        for piece in stream.chunks(step) {
            splitter.push(piece);
            loop {
                match splitter.next(LIMIT) {
                    Ok(Some(message)) => out.push(message),
                    Ok(None) => break,
                    Err(_) => return out,
                }
            }
        }
        out
    };
    let whole = pieces(stream.len().max(1));
    assert!(whole.iter().all(|message| message.len() <= LIMIT));
    assert_eq!(whole, pieces(usize::from(*step).max(1)));
}

/// The path of a call.
pub fn path(text: &str) {
    if let Some(route) = Route::parse(text) {
        assert_eq!(route.path(), text);
    }
}
