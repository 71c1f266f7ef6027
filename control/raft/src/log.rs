//! openraft's log: files of sealed entries ([`crate::segment`]) that one thread writes.
//!
//! An append is readable at once, from memory, and acknowledged when it is on the disk; whatever
//! was appended meanwhile is written and synced together. So a leader's disk and its followers'
//! work at the same time, and one sync serves many writes. Votes go through the same thread: raft
//! wants both in one order.

use std::{
    collections::VecDeque,
    fmt::Debug,
    fs::{self, File},
    io,
    ops::{Bound, Range, RangeBounds},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use openraft::{
    RaftLogReader,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::{
    disk::{Disk, DiskError, blocking},
    seal::Sealer,
    segment::{self, Damage},
    types::{Entry, LogId, Types, Vote, decode, encode},
};

/// Bytes of a file, unless one entry needs more. Files are made in this size, so that a sync has
/// only data to write.
const FILE_BYTES: u64 = 1 << 20;
/// Entries that are kept in memory take about this much, sealed.
const MEMORY_BYTES: usize = 1 << 20;
/// What was appended and is not written yet is no more than this (or one append), in KiB: beyond it
/// an append waits, so that a disk that hangs holds up writes instead of filling memory.
const UNWRITTEN_KIB: u32 = 32 << 10;
/// A batch is no larger than this, but for one entry.
const BATCH_BYTES: usize = 4 << 20;
/// An append to a follower carries about this much at most (or one entry).
pub(crate) const APPEND_BYTES: usize = 4 << 20;

/// The log on the disk.
#[derive(Debug)]
pub(crate) struct Log {
    shared: Arc<Shared>,
    jobs: Option<mpsc::Sender<Job>>,
    unwritten: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
}

impl Drop for Log {
    fn drop(&mut self) {
        self.jobs = None;
        // A writer that panicked has nothing more to write.
        let _ = self.writer.take().map(JoinHandle::join);
    }
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    sealer: Arc<Sealer>,
    state: Mutex<State>,
}

/// What there is, and where.
#[derive(Debug, Default)]
struct State {
    purged: Option<LogId>,
    last: Option<LogId>,
    /// Oldest first; the last one is written to.
    parts: VecDeque<Part>,
    /// The latest entries: at least all that are not written yet.
    recent: VecDeque<(Entry, usize)>,
    recent_bytes: usize,
    /// Bytes appended since the last snapshot.
    grown: u64,
}

/// A file.
#[derive(Debug, Clone)]
struct Part {
    first: u64,
    path: PathBuf,
    file: Arc<File>,
    bytes: u64,
    /// Where the sealed entries are.
    records: Vec<Range<u32>>,
    end: u32,
}

impl Part {
    fn next(&self) -> u64 {
        self.first + self.records.len() as u64
    }
}

impl State {
    fn next(&self) -> u64 {
        self.last.map_or(0, |last| last.index + 1)
    }

    /// The index of the first entry in memory.
    fn recent_from(&self) -> u64 {
        self.recent.front().map_or(self.next(), |(entry, _)| entry.log_id.index)
    }

    fn written(&self) -> u64 {
        self.parts.back().map_or(0, Part::next)
    }

    /// Lets go of entries that the files have: those below `written`.
    fn forget(&mut self, written: u64) {
        while self.recent_bytes > MEMORY_BYTES && self.recent_from() < written {
            let Some((_, bytes)) = self.recent.pop_front() else { break };
            self.recent_bytes -= bytes;
        }
    }

    fn retain_recent(&mut self, keep: impl Fn(u64) -> bool) {
        self.recent.retain(|(entry, _)| keep(entry.log_id.index));
        self.recent_bytes = self.recent.iter().map(|(_, bytes)| bytes).sum();
    }
}

/// Whom to tell that entries are on the disk, and the room that they take until then.
struct Done {
    tell: IOFlushed<Types>,
    _room: OwnedSemaphorePermit,
}

enum Job {
    /// Entries from an index on.
    Append {
        first: u64,
        sealed: Vec<Vec<u8>>,
        done: Done,
    },
    Other(Box<dyn FnOnce(&mut Writer) + Send>),
}

/// Where a reader finds an entry.
enum Place {
    Memory(Entry),
    File(u64, Arc<File>, Range<u32>),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, path: &Path) -> impl Fn(io::Error) -> DiskError {
        let path = path.to_owned();
        move |source| DiskError::Log { path: path.clone(), source }
    }

    /// Makes a file, and its name lasting.
    fn create(&self, first: u64, bytes: u64) -> Result<Part, DiskError> {
        let path = self.dir.join(format!("{first:020}.log"));
        let draft = path.with_extension("new");
        let make = || {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&draft)?;
            file.write_all_at(&segment::header(first), 0)?;
            reserve(&file, bytes)?;
            file.sync_all()?;
            fs::rename(&draft, &path)?;
            sync_directory(&self.dir)?;
            Ok(file)
        };
        let file = Arc::new(make().map_err(self.failed(&path))?);
        Ok(Part { first, path, file, bytes, records: Vec::new(), end: segment::HEADER as u32 })
    }
}

/// Gives a file its length in zeros, and its place on the disk where the file system can.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)?;
    let length = i64::try_from(bytes).map_err(io::Error::other)?;
    match nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), 0, length) {
        Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The files of a directory by their first index; drafts are removed.
fn list(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.ends_with(".new") {
            fs::remove_file(&path)?;
        } else if let Some(first) = name.strip_suffix(".log").and_then(|first| first.parse().ok()) {
            found.push((first, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

impl Log {
    /// Opens the files of a directory and checks every entry in them. `fresh`: there may be none.
    pub(crate) fn open(
        dir: &Path,
        sealer: Arc<Sealer>,
        purged: Option<LogId>,
        fresh: bool,
    ) -> Result<Self, DiskError> {
        let state = Mutex::new(State { purged, last: purged, ..State::default() });
        let shared = Arc::new(Shared { dir: dir.to_owned(), sealer, state });
        let found = match list(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            found => found.map_err(shared.failed(dir))?,
        };
        if found.is_empty() && !fresh {
            return Err(DiskError::Lost { path: dir.to_owned() });
        }
        use std::os::unix::fs::DirBuilderExt as _;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(shared.failed(dir))?;
        shared.load(&found)?;
        let (jobs, queue) = mpsc::channel();
        let mut writer = Writer { shared: Arc::clone(&shared), broken: None };
        let thread = thread::Builder::new().name("raft-log".into());
        let writer = thread.spawn(move || writer.run(&queue)).map_err(shared.failed(dir))?;
        let unwritten = Arc::new(Semaphore::new(UNWRITTEN_KIB as usize));
        Ok(Self { shared, jobs: Some(jobs), unwritten, writer: Some(writer) })
    }

    /// Bytes appended since the last snapshot.
    pub(crate) fn grown(&self) -> u64 {
        self.shared.state().grown
    }

    /// There is a snapshot of all so far.
    pub(crate) fn snapshot_made(&self) {
        self.shared.state().grown = 0;
    }

    fn log_state(&self) -> LogState<Types> {
        let state = self.shared.state();
        LogState { last_purged_log_id: state.purged, last_log_id: state.last }
    }

    fn send(&self, job: Job) -> io::Result<()> {
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        sent.is_some_and(|sent| sent.is_ok()).then_some(()).ok_or_else(gone)
    }

    /// Has the writer do something, after all that it was given before.
    async fn ordered<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Writer) -> Result<T, DiskError> + Send + 'static,
    ) -> io::Result<T> {
        let (tell, told) = oneshot::channel();
        self.send(Job::Other(Box::new(move |writer| {
            // Nobody waits any more: it is done all the same.
            let _ = tell.send(match &writer.broken {
                Some(why) => Err(io::Error::other(why.clone())),
                None => work(writer).map_err(io::Error::from),
            });
        })))?;
        told.await.map_err(|_| gone())?
    }

    async fn append(&self, entries: Vec<Entry>, tell: IOFlushed<Types>) -> Result<(), DiskError> {
        let Some(first) = entries.first().map(|entry| entry.log_id.index) else {
            tell.io_completed(Ok(()));
            return Ok(());
        };
        let mut sealed = Vec::with_capacity(entries.len());
        for entry in &entries {
            let index = entry.log_id.index;
            sealed.push(self.shared.seal(index, entry)?);
        }
        let kib = sealed.iter().map(Vec::len).sum::<usize>().div_ceil(1024);
        let kib = u32::try_from(kib).unwrap_or(u32::MAX).min(UNWRITTEN_KIB);
        let room = Arc::clone(&self.unwritten).acquire_many_owned(kib).await;
        let room = room.map_err(|_| self.shared.failed(&self.shared.dir)(gone()))?;
        let done = Done { tell, _room: room };
        let mut state = self.shared.state();
        for (entry, sealed) in entries.into_iter().zip(&sealed) {
            let (id, next) = (entry.log_id, state.next());
            if state.last.is_some() && id.index != next {
                let why = format!("refused: the log goes on at {next}");
                return Err(self.shared.malformed(id.index, &why));
            }
            state.last = Some(id);
            state.grown += sealed.len() as u64;
            state.recent_bytes += sealed.len();
            state.recent.push_back((entry, sealed.len()));
        }
        drop(state);
        self.send(Job::Append { first, sealed, done }).map_err(self.shared.failed(&self.shared.dir))
    }

    /// Where the entries of a range are: at least one (if there is one), then up to `limit` bytes.
    fn places(&self, range: (Bound<u64>, Bound<u64>), limit: usize) -> Vec<Place> {
        let state = self.shared.state();
        let first = state.parts.front().map_or(state.recent_from(), |part| part.first);
        let first = first.max(state.purged.map_or(0, |id| id.index + 1));
        let from = match range.0 {
            Bound::Included(from) => from,
            Bound::Excluded(from) => from.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let to = match range.1 {
            Bound::Included(to) => to.saturating_add(1),
            Bound::Excluded(to) => to,
            Bound::Unbounded => u64::MAX,
        };
        let (mut places, mut bytes) = (Vec::new(), 0);
        let recent_from = state.recent_from();
        for index in from.max(first)..to.min(state.next()) {
            let (place, length) = if index >= recent_from {
                let Some((entry, length)) = state.recent.get((index - recent_from) as usize) else {
                    break;
                };
                (Place::Memory(entry.clone()), *length)
            } else {
                let at = state.parts.partition_point(|part| part.first <= index);
                let Some(part) = at.checked_sub(1).and_then(|at| state.parts.get(at)) else {
                    break;
                };
                let Some(record) = part.records.get((index - part.first) as usize) else { break };
                let place = Place::File(index, Arc::clone(&part.file), record.clone());
                (place, record.len())
            };
            bytes += length;
            if !places.is_empty() && bytes > limit {
                break;
            }
            places.push(place);
        }
        places
    }
}

fn gone() -> io::Error {
    io::Error::other("the log's writer has ended")
}

impl Shared {
    fn seal(&self, index: u64, entry: &Entry) -> Result<Vec<u8>, DiskError> {
        let plain = encode(entry).map_err(|e| self.malformed(index, &e.to_string()))?;
        let sealed = self.sealer.seal(&entry_place(index), plain);
        sealed.map_err(|source| DiskError::Sealed {
            path: self.dir.clone(),
            record: entry_place(index),
            source,
        })
    }

    fn unseal(&self, index: u64, sealed: &[u8]) -> Result<Entry, DiskError> {
        let opened = self.sealer.open(&entry_place(index), sealed);
        let plain = opened.map_err(|source| DiskError::Sealed {
            path: self.dir.clone(),
            record: entry_place(index),
            source,
        })?;
        let entry: Entry = decode(&plain).map_err(|e| self.malformed(index, &e.to_string()))?;
        if entry.log_id.index != index {
            return Err(self.malformed(index, &format!("it says {}", entry.log_id)));
        }
        Ok(entry)
    }

    fn malformed(&self, index: u64, why: &str) -> DiskError {
        DiskError::Malformed {
            path: self.dir.clone(),
            record: entry_place(index),
            why: why.to_owned(),
        }
    }

    /// Takes in what the files hold.
    fn load(&self, found: &[(u64, PathBuf)]) -> Result<(), DiskError> {
        let mut state = self.state();
        let purged_to = state.purged.map_or(0, |id| id.index + 1);
        for (at, (first, path)) in found.iter().enumerate() {
            let later = found.get(at + 1).map(|(later, _)| *later);
            if later.is_some_and(|later| later <= purged_to) {
                // Purging was cut short.
                fs::remove_file(path).map_err(self.failed(path))?;
                continue;
            }
            let part = self.read(*first, path, later, &mut state)?;
            state.parts.push_back(part);
        }
        // Of a log that was never purged nobody knows where it begins.
        if state.purged.is_some() && state.parts.front().is_some_and(|part| part.first > purged_to)
        {
            return Err(self.malformed(purged_to, "it is missing: the first file is gone"));
        }
        if state.written() < purged_to {
            // A snapshot came from the leader, and the log was not begun anew.
            let anew = self.create(purged_to, FILE_BYTES)?;
            for part in state.parts.drain(..).filter(|part| part.path != anew.path) {
                fs::remove_file(&part.path).map_err(self.failed(&part.path))?;
            }
            state.parts.push_back(anew);
            state.recent.clear();
            state.recent_bytes = 0;
        }
        if state.parts.is_empty() {
            let part = self.create(purged_to, FILE_BYTES)?;
            state.parts.push_back(part);
        }
        let written = state.written();
        state.forget(written);
        Ok(())
    }

    fn read(
        &self,
        first: u64,
        path: &Path,
        later: Option<u64>,
        state: &mut State,
    ) -> Result<Part, DiskError> {
        let failed = self.failed(path);
        let bytes = fs::read(path).map_err(&failed)?;
        let damaged = |why: String| DiskError::Malformed {
            path: path.to_owned(),
            record: "the log".to_owned(),
            why: format!(
                "{why}. Nothing of it is used. Remove this manager from the cluster on another \
                 manager and let it join again, or restore a backup"
            ),
        };
        let (mut opened, mut first_error) = (Vec::new(), None);
        let scan = segment::scan(&bytes, first, |index, sealed| match self.unseal(index, sealed) {
            Ok(entry) => {
                opened.push((entry, sealed.len()));
                true
            }
            Err(error) => {
                first_error.get_or_insert(error);
                false
            }
        });
        let scan = scan.map_err(|damage| match damage {
            Damage::NotALog => damaged("it does not begin as such".to_owned()),
            Damage::Header(at) => damaged(format!("the record at byte {at} is damaged")),
            Damage::Lost(at) => damaged(format!("there are records missing from byte {at} on")),
            Damage::Record(index) => {
                first_error.unwrap_or_else(|| self.malformed(index, "it is damaged"))
            }
        })?;
        let next = first + scan.records.len() as u64;
        match later {
            Some(later) if scan.torn || later != next => {
                return Err(self.malformed(next, "an entry is missing before the next file"));
            }
            _ => {}
        }
        let file = File::options().read(true).write(true).open(path).map_err(&failed)?;
        if scan.torn {
            tracing::warn!(path = %path.display(), at = scan.end, "a write was cut off: it was not acknowledged");
            cut(&file, scan.end as u64, bytes.len() as u64).map_err(&failed)?;
        }
        let purged = state.purged.map_or(0, |id| id.index + 1);
        for (entry, length) in opened {
            if entry.log_id.index >= purged {
                state.last = Some(entry.log_id);
                state.grown += length as u64;
                state.recent_bytes += length;
                state.recent.push_back((entry, length));
            }
        }
        // All of it is in files.
        state.forget(u64::MAX);
        let (file, bytes) = (Arc::new(file), bytes.len() as u64);
        let (path, end) = (path.to_owned(), scan.end as u32);
        Ok(Part { first, path, file, bytes, records: scan.records, end })
    }
}

/// Ends a file's records at `end`: zeros from there to `bytes`, on the disk.
fn cut(file: &File, end: u64, bytes: u64) -> io::Result<()> {
    file.set_len(end)?;
    reserve(file, bytes)?;
    file.sync_all()
}

fn entry_place(index: u64) -> String {
    format!("log entry {index}")
}

/// The one that writes.
struct Writer {
    shared: Arc<Shared>,
    /// A write or a sync failed: what is on the disk is not known, and nothing is written after it.
    broken: Option<String>,
}

impl Writer {
    fn run(&mut self, queue: &mpsc::Receiver<Job>) {
        let mut next = queue.recv().ok();
        while let Some(job) = next {
            next = match job {
                Job::Other(work) => {
                    work(self);
                    queue.recv().ok()
                }
                Job::Append { first, mut sealed, done } => {
                    let mut all_done = vec![done];
                    let mut bytes: usize = sealed.iter().map(Vec::len).sum();
                    let mut after = None;
                    while bytes < BATCH_BYTES {
                        match queue.try_recv() {
                            Ok(Job::Append { sealed: more, done, .. }) => {
                                bytes += more.iter().map(Vec::len).sum::<usize>();
                                sealed.extend(more);
                                all_done.push(done);
                            }
                            Ok(other) => {
                                after = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.append(first, &sealed, all_done);
                    after.or_else(|| queue.recv().ok())
                }
            };
        }
    }

    /// Writes, syncs, and says so.
    fn append(&mut self, first: u64, sealed: &[Vec<u8>], done: Vec<Done>) {
        if self.broken.is_none()
            && let Err(error) = self.write(first, sealed)
        {
            self.broken = Some(error.to_string());
        }
        for done in done {
            done.tell
                .io_completed(self.broken.clone().map_or(Ok(()), |why| Err(io::Error::other(why))));
        }
    }

    fn write(&self, first: u64, mut sealed: &[Vec<u8>]) -> Result<(), DiskError> {
        self.begin_at(first)?;
        while let Some(first) = sealed.first() {
            let mut part = match self.shared.state().parts.back() {
                Some(part) => (Arc::clone(&part.file), part.end, part.bytes, part.path.clone()),
                None => return Err(self.shared.malformed(0, "there is no file of the log")),
            };
            let room = |end: u32, bytes: u64| bytes.saturating_sub(end.into()) as usize;
            if room(part.1, part.2) < segment::size(first.len()) {
                let next = self.shared.state().written();
                let bytes = FILE_BYTES.max((segment::HEADER + segment::size(first.len())) as u64);
                let new = self.shared.create(next, bytes)?;
                part = (Arc::clone(&new.file), new.end, new.bytes, new.path.clone());
                let mut state = self.shared.state();
                // An empty one that is too small was replaced under its name.
                let _ = state.parts.pop_back_if(|part| part.first == next);
                state.parts.push_back(new);
            }
            let (file, begin, bytes, path) = part;
            let (mut out, mut records) = (Vec::new(), Vec::new());
            let fits = |out: &Vec<u8>, sealed: &Vec<u8>| {
                out.len() + segment::size(sealed.len()) <= room(begin, bytes)
            };
            while let Some((first, rest)) = sealed.split_first()
                && fits(&out, first)
            {
                let at = begin + out.len() as u32;
                records.push(segment::put(&mut out, at, begin, first));
                sealed = rest;
            }
            let written = file.write_all_at(&out, begin.into()).and_then(|()| file.sync_data());
            written.map_err(self.shared.failed(&path))?;
            let mut state = self.shared.state();
            if let Some(part) = state.parts.back_mut() {
                part.records.append(&mut records);
                part.end = begin + out.len() as u32;
            }
            let written = state.written();
            state.forget(written);
        }
        Ok(())
    }

    /// A log that is empty goes on anywhere.
    fn begin_at(&self, first: u64) -> Result<(), DiskError> {
        let mut state = self.shared.state();
        let Some(part) = state.parts.back() else { return Ok(()) };
        if part.records.is_empty() && part.first != first && state.parts.len() == 1 {
            let old = part.path.clone();
            let part = self.shared.create(first, FILE_BYTES)?;
            fs::remove_file(&old).map_err(self.shared.failed(&old))?;
            state.parts.clear();
            state.parts.push_back(part);
        }
        Ok(())
    }

    /// Removes all entries behind `last`.
    fn truncate(&mut self, last: Option<LogId>) -> Result<(), DiskError> {
        let keep = last.map_or(0, |id| id.index + 1);
        let mut state = self.shared.state();
        state.retain_recent(|index| index < keep);
        if state.next() > keep {
            state.last = last.or(state.purged);
        }
        // Newest first: never a hole.
        while state.parts.len() > 1 && state.parts.back().is_some_and(|part| part.first >= keep) {
            let Some(part) = state.parts.pop_back() else { break };
            fs::remove_file(&part.path).map_err(self.shared.failed(&part.path))?;
        }
        sync_directory(&self.shared.dir).map_err(self.shared.failed(&self.shared.dir))?;
        let Some(part) = state.parts.back_mut() else { return Ok(()) };
        let kept = (keep.saturating_sub(part.first) as usize).min(part.records.len());
        let end = match part.records.get(kept) {
            // A record's header comes before its entry.
            Some(record) => record.start - (segment::size(0) as u32),
            None => return Ok(()),
        };
        part.records.truncate(kept);
        part.end = end;
        let (file, bytes, path) = (Arc::clone(&part.file), part.bytes, part.path.clone());
        drop(state);
        cut(&file, end.into(), bytes).map_err(self.shared.failed(&path))
    }

    /// Forgets all entries up to `upto`; that it is so was noted already.
    fn purge(&mut self, upto: LogId) -> Result<(), DiskError> {
        let begins = upto.index + 1;
        let mut state = self.shared.state();
        state.retain_recent(|index| index >= begins);
        state.purged = Some(upto);
        let whole = state.last.is_none_or(|last| last.index <= upto.index);
        let mut gone = Vec::new();
        while state.parts.get(1).is_some_and(|later| later.first <= begins)
            || whole && !state.parts.is_empty()
        {
            gone.extend(state.parts.pop_front());
        }
        if whole {
            state.last = Some(upto);
        }
        drop(state);
        if whole {
            // Before the others go: a log without a file is a lost one.
            let part = self.shared.create(begins, FILE_BYTES)?;
            gone.retain(|old: &Part| old.path != part.path);
            self.shared.state().parts.push_back(part);
        }
        for part in gone {
            fs::remove_file(&part.path).map_err(self.shared.failed(&part.path))?;
        }
        Ok(())
    }
}

/// openraft's log on the disk.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    pub(crate) disk: Arc<Disk>,
}

impl LogStore {
    async fn entries(&self, range: impl RangeBounds<u64>, limit: usize) -> io::Result<Vec<Entry>> {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        let places = self.disk.log().places(range, limit);
        let in_memory = |place: Place| match place {
            Place::Memory(entry) => Some(entry),
            Place::File(..) => None,
        };
        if places.iter().all(|place| matches!(place, Place::Memory(_))) {
            return Ok(places.into_iter().filter_map(in_memory).collect());
        }
        blocking(&self.disk, move |disk| {
            let shared = &disk.log().shared;
            let read = |place| match place {
                Place::Memory(entry) => Ok(entry),
                Place::File(index, file, at) => {
                    let mut sealed = vec![0; at.len()];
                    let read = file.read_exact_at(&mut sealed, at.start.into());
                    read.map_err(shared.failed(&shared.dir))?;
                    shared.unseal(index, &sealed)
                }
            };
            places.into_iter().map(read).collect()
        })
        .await
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        self.entries(range, usize::MAX).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        blocking(&self.disk, |disk| disk.meta().vote()).await
    }

    /// For replication: bounded, so that no append grows beyond what the transport takes.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.entries(start..end, APPEND_BYTES).await
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        Ok(self.disk.log().log_state())
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        // The writer gets the database alone: dropping the log, it would wait for itself.
        let (vote, meta) = (*vote, Arc::clone(self.disk.meta()));
        self.disk.log().ordered(move |_| meta.save_vote(&vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        Ok(committed.map_or(Ok(()), |committed| self.disk.save_committed(&committed))?)
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        // After a power cut the hint may be further than the log, or none.
        let last = self.disk.log().log_state().last_log_id.map(|id| id.index);
        Ok(self.disk.committed().filter(|committed| Some(committed.index) <= last))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        Ok(self.disk.log().append(entries, callback).await?)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.disk.log().ordered(move |writer| writer.truncate(last)).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let meta = Arc::clone(self.disk.meta());
        let purge = move |writer: &mut Writer| {
            // First that they are gone, so that no start misses them.
            meta.save_purged(&upto)?;
            writer.purge(upto)
        };
        self.disk.log().ordered(purge).await
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
