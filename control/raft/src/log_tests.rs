//! The log over restarts: what was acknowledged is there, nothing else, and damage is refused.

use openraft::{EntryPayload, type_config::TypeConfigExt as _};
use proptest::prelude::*;

use super::*;
use crate::{
    tests::net::TempDir,
    types::{LogId, Write},
};

impl Disk {
    /// Flips a bit of a stored entry, as a bad disk would.
    pub(crate) fn damage(&self, index: u64) {
        let places = self.log().shared.state().parts.clone();
        let part = places.iter().rfind(|part| part.first <= index).unwrap();
        let record = part.records[(index - part.first) as usize].clone();
        let at = u64::from(record.start + record.end) / 2;
        let mut byte = [0];
        part.file.read_exact_at(&mut byte, at).unwrap();
        part.file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}

fn id(term: u64, index: u64) -> LogId {
    LogId::new_term_index(term, index)
}

/// An entry of about this many bytes.
fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let status =
        mesh_control::model::NodeStatus { message: "x".repeat(bytes), ..Default::default() };
    let report = mesh_control::command::NodeReport {
        id: mesh_types::NodeId::from_bits(1),
        status: Some(status),
        description: None,
    };
    let command = mesh_control::command::Command::ReportNodes(vec![report]);
    let proposal = mesh_control::command::Proposal { now_ms: index, command };
    Entry {
        log_id: id(term, index),
        payload: EntryPayload::Normal(Write { id: [1; 16], proposal }),
    }
}

fn open(dir: &TempDir) -> LogStore {
    LogStore { disk: Arc::new(Disk::open(dir.path(), &[1; 32]).unwrap()) }
}

async fn append(log: &mut LogStore, entries: Vec<Entry>) {
    let (tell, told) = Types::oneshot();
    log.append(entries, IOFlushed::signal(tell)).await.unwrap();
    told.await.unwrap().unwrap();
}

async fn ids(log: &mut LogStore) -> Vec<LogId> {
    let entries = log.try_get_log_entries(..).await.unwrap();
    entries.into_iter().map(|entry| entry.log_id).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<usize>),
    Truncate(prop::sample::Index),
    Purge(prop::sample::Index),
    /// A snapshot from afar.
    Skip(u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let length =
        prop_oneof![4 => 1..500usize, 1 => 100_000..400_000usize, 1 => Just(1_500_000usize)];
    prop_oneof![
        5 => prop::collection::vec(length, 1..5).prop_map(Step::Append),
        2 => any::<prop::sample::Index>().prop_map(Step::Truncate),
        1 => any::<prop::sample::Index>().prop_map(Step::Purge),
        1 => (1..5u64).prop_map(Step::Skip),
        2 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// The files say what a list in memory would.
    #[test]
    fn it_is_a_list(steps in prop::collection::vec(step(), 1..14), first in 0..3u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = TempDir::new("log");
            let mut log = open(&dir);
            let (mut model, mut next, mut purged) = (Vec::<LogId>::new(), first, None);
            for (term, step) in (1..).zip(steps) {
                match step {
                    Step::Append(lengths) => {
                        let entries: Vec<_> =
                            (next..).zip(&lengths).map(|(at, n)| entry(term, at, *n)).collect();
                        next += entries.len() as u64;
                        model.extend(entries.iter().map(|entry| entry.log_id));
                        append(&mut log, entries).await;
                    }
                    Step::Truncate(at) if !model.is_empty() => {
                        model.truncate(at.index(model.len()));
                        let last = model.last().copied().or(purged);
                        if last.is_none() {
                            continue_from(&mut log, &mut next, first).await;
                            continue;
                        }
                        log.truncate_after(last).await.unwrap();
                        next = last.unwrap().index + 1;
                    }
                    Step::Purge(at) if !model.is_empty() => {
                        let upto = model[at.index(model.len())];
                        log.purge(upto).await.unwrap();
                        model.retain(|id| id.index > upto.index);
                        purged = Some(upto);
                    }
                    Step::Skip(by) => {
                        let upto = id(term, next + by);
                        log.purge(upto).await.unwrap();
                        model.clear();
                        (purged, next) = (Some(upto), upto.index + 1);
                    }
                    Step::Restart => {
                        drop(log);
                        log = open(&dir);
                    }
                    Step::Truncate(_) | Step::Purge(_) => {}
                }
                assert_eq!(ids(&mut log).await, model);
                let state = log.get_log_state().await.unwrap();
                assert_eq!(state.last_purged_log_id, purged);
                assert_eq!(state.last_log_id, model.last().copied().or(purged));
            }
        });
    }
}

/// All is truncated: the log begins anew.
async fn continue_from(log: &mut LogStore, next: &mut u64, first: u64) {
    log.truncate_after(None).await.unwrap();
    *next = first;
    assert_eq!(ids(log).await, []);
}

#[tokio::test]
async fn files_come_and_go() {
    let dir = TempDir::new("log-files");
    let mut log = open(&dir);
    append(&mut log, (0..40).map(|index| entry(1, index, 100_000)).collect()).await;
    let count = || fs::read_dir(dir.path().join("log")).unwrap().count();
    assert!(count() >= 4, "{}", count());
    let held = log.disk.log().shared.state().recent_bytes;
    assert!(held <= MEMORY_BYTES, "{held} bytes in memory");
    // What is no more in memory is read from the files.
    assert_eq!(ids(&mut log).await.len(), 40);
    assert_eq!(log.limited_get_log_entries(0, 40).await.unwrap().len(), 40);
    log.purge(id(1, 37)).await.unwrap();
    assert!(count() <= 2, "{}", count());
    drop(log);
    assert_eq!(ids(&mut open(&dir)).await, [id(1, 38), id(1, 39)]);
}

#[tokio::test]
async fn a_missing_file_is_refused() {
    let dir = TempDir::new("log-missing");
    let mut log = open(&dir);
    append(&mut log, (0..40).map(|index| entry(1, index, 100_000)).collect()).await;
    drop(log);
    let (_, middle) = list(&dir.path().join("log")).unwrap().swap_remove(1);
    let kept = fs::read(&middle).unwrap();
    fs::remove_file(&middle).unwrap();
    let refused = Disk::open(dir.path(), &[1; 32]).unwrap_err().to_string();
    assert!(refused.contains("missing"), "{refused}");
    fs::write(&middle, kept).unwrap();
    assert_eq!(ids(&mut open(&dir)).await.len(), 40);
    fs::remove_dir_all(dir.path().join("log")).unwrap();
    assert!(matches!(Disk::open(dir.path(), &[1; 32]), Err(DiskError::Lost { .. })));
}

#[tokio::test]
async fn a_write_that_was_cut_off_is_no_damage() {
    let dir = TempDir::new("log-torn");
    let mut log = open(&dir);
    append(&mut log, vec![entry(1, 0, 100), entry(1, 1, 100)]).await;
    append(&mut log, vec![entry(1, 2, 3000)]).await;
    let part = log.disk.log().shared.state().parts.back().unwrap().clone();
    drop(log);
    // Its last sectors never came to the disk.
    part.file.write_all_at(&[0; 2000], u64::from(part.end) - 2000).unwrap();
    let mut log = open(&dir);
    assert_eq!(ids(&mut log).await, [id(1, 0), id(1, 1)]);
    append(&mut log, vec![entry(2, 2, 10)]).await;
    drop(log);
    assert_eq!(ids(&mut open(&dir)).await, [id(1, 0), id(1, 1), id(2, 2)]);
}

#[tokio::test]
async fn a_hint_beyond_the_log_is_none() {
    let dir = TempDir::new("log-hint");
    let mut log = open(&dir);
    append(&mut log, vec![entry(1, 0, 10), entry(1, 1, 10)]).await;
    for (hint, read) in [(id(1, 1), Some(id(1, 1))), (id(1, 2), None)] {
        log.save_committed(Some(hint)).await.unwrap();
        assert_eq!(log.read_committed().await.unwrap(), read);
    }
    drop(log);
    fs::write(dir.path().join("committed"), b"no such thing").unwrap();
    assert_eq!(open(&dir).read_committed().await.unwrap(), None);
}

#[test]
fn an_earlier_layout_is_refused() {
    let dir = TempDir::new("log-earlier");
    let earlier = redb::TableDefinition::<u64, &[u8]>::new("log");
    let db = redb::Database::create(dir.path().join("raft.redb")).unwrap();
    let txn = db.begin_write().unwrap();
    txn.open_table(earlier).unwrap();
    txn.commit().unwrap();
    drop(db);
    let refused = Disk::open(dir.path(), &[1; 32]).unwrap_err().to_string();
    assert!(refused.contains("an earlier version"), "{refused}");
}
