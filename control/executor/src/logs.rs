//! Reading what a shim wrote of a task's output, while it goes on: two files that take
//! turns ([`crate::contract`]). Blocking, without waiting: whoever follows asks again later.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// No entry is longer, with room for JSON's escapes; what is, was not written by a shim.
const LINE_BYTES_MAX: usize = 256 * 1024;

/// One line of output, or a part of a long one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Of standard error; else of standard output.
    pub stderr: bool,
    /// When the shim got it, in nanoseconds since the Unix epoch.
    pub at_ns: i64,
    /// With its newline, if it has one.
    pub text: Vec<u8>,
}

/// What is wanted of a task's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogWanted {
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
    /// Nothing from before this, in nanoseconds since the Unix epoch.
    pub since_ns: i64,
    /// Of what is there at the start, only so many last entries.
    pub tail: Option<u64>,
}

impl LogWanted {
    /// All of it.
    pub const ALL: Self = Self { stdout: true, stderr: true, since_ns: i64::MIN, tail: None };

    fn takes(&self, entry: &LogEntry) -> bool {
        entry.at_ns >= self.since_ns && if entry.stderr { self.stderr } else { self.stdout }
    }
}

/// Reads a task's output in order.
#[derive(Debug)]
pub struct LogReader {
    old: PathBuf,
    current: PathBuf,
    wanted: LogWanted,
    /// What to read, in order. Only the last one may still grow.
    files: VecDeque<File>,
    /// Read, and not yet a whole line.
    pending: Vec<u8>,
    /// Entries to leave out, for the tail.
    skip: u64,
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file is the same one after it was renamed.
fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|about| (about.dev(), about.ino()))
}

fn same(one: &File, other: &File) -> io::Result<bool> {
    Ok(identity(one)? == identity(other)?)
}

impl LogReader {
    /// Of the files that [`crate::Executor::logs`] names, oldest first. They may not exist yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open([old, current]: [PathBuf; 2], wanted: LogWanted) -> io::Result<Self> {
        let mut reader =
            Self { old, current, wanted, files: VecDeque::new(), pending: Vec::new(), skip: 0 };
        // The newer one first: were it to become the older one in between, it would be missed.
        let newer = open(&reader.current)?;
        let older = open(&reader.old)?;
        if let Some(older) = older
            && !newer.as_ref().map_or(Ok(false), |newer| same(newer, &older))?
        {
            reader.files.push_back(older);
        }
        reader.files.extend(newer);
        if let Some(tail) = wanted.tail {
            reader.skip = reader.entries()?.saturating_sub(tail);
        }
        Ok(reader)
    }

    /// How many there are, by descriptors of their own: positions are kept.
    fn entries(&self) -> io::Result<u64> {
        let mut count: u64 = 0;
        for file in &self.files {
            let mut at = 0;
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let read = std::os::unix::fs::FileExt::read_at(file, &mut buffer, at)?;
                if read == 0 {
                    break;
                }
                at += read as u64;
                count += buffer[..read].iter().filter(|byte| **byte == b'\n').count() as u64;
            }
        }
        Ok(count)
    }

    /// What there is now, about `bytes_max` at most; empty when there is nothing more for now.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&mut self, bytes_max: usize) -> io::Result<Vec<LogEntry>> {
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while bytes < bytes_max {
            if self.files.is_empty() && !self.follow()? {
                break;
            }
            let Some(file) = self.files.front() else { break };
            let mut chunk = Vec::with_capacity(32 * 1024);
            let read = file.take(32 * 1024).read_to_end(&mut chunk)?;
            if read == 0 {
                if self.files.len() > 1 {
                    // Whatever it ends with was never finished.
                    self.files.pop_front();
                    self.pending.clear();
                } else if !self.follow()? {
                    break;
                }
                continue;
            }
            self.pending.extend_from_slice(&chunk);
            bytes += self.take_lines(&mut entries);
        }
        Ok(entries)
    }

    /// Splits whole lines off; how many bytes of text came of them.
    fn take_lines(&mut self, entries: &mut Vec<LogEntry>) -> usize {
        let (mut from, mut bytes) = (0, 0);
        while let Some(length) = self.pending[from..].iter().position(|byte| *byte == b'\n') {
            let line = &self.pending[from..from + length];
            from += length + 1;
            if self.skip > 0 {
                self.skip -= 1;
                continue;
            }
            if let Some(entry) = parse(line).filter(|entry| self.wanted.takes(entry)) {
                bytes += entry.text.len();
                entries.push(entry);
            }
        }
        self.pending.drain(..from);
        if self.pending.len() > LINE_BYTES_MAX {
            self.pending.clear();
        }
        bytes
    }

    /// Looks whether the shim has gone on to another file; whether there is more to read.
    fn follow(&mut self) -> io::Result<bool> {
        let Some(newer) = open(&self.current)? else { return Ok(false) };
        let Some(mine) = self.files.back() else {
            self.files.push_back(newer);
            return Ok(true);
        };
        if same(mine, &newer)? {
            return Ok(false);
        }
        // It turned more than once when the older one is not this one. What was between is gone.
        if let Some(older) = open(&self.old)?
            && !same(mine, &older)?
            && !same(&newer, &older)?
        {
            self.files.push_back(older);
        }
        self.files.push_back(newer);
        Ok(true)
    }
}

#[derive(Deserialize)]
struct Line {
    log: String,
    stream: String,
    time: jiff::Timestamp,
}

/// A line of a shim; `None` of anything else (a power cut tears lines).
fn parse(line: &[u8]) -> Option<LogEntry> {
    let Line { log, stream, time } = serde_json::from_slice(line).ok()?;
    let at_ns = i64::try_from(time.as_nanosecond()).ok()?;
    Some(LogEntry { stderr: stream == "stderr", at_ns, text: log.into_bytes() })
}

/// A line of a log that anything may have written.
#[cfg(fuzzing)]
pub fn fuzz_line(line: &[u8]) {
    let _ = parse(line);
}

/// The output of several tasks, in the order of its times as far as it is there.
#[derive(Debug)]
pub struct MergedLogs<Id> {
    of: Vec<(Id, LogReader, VecDeque<LogEntry>)>,
}

impl<Id: Copy + PartialEq> MergedLogs<Id> {
    /// Of nobody yet.
    #[must_use]
    pub fn new() -> Self {
        Self { of: Vec::new() }
    }

    /// One more.
    pub fn add(&mut self, id: Id, reader: LogReader) {
        self.of.push((id, reader, VecDeque::new()));
    }

    /// Keeps those for which `keep` says so.
    pub fn retain(&mut self, keep: impl Fn(Id) -> bool) {
        self.of.retain(|(id, _, waiting)| !waiting.is_empty() || keep(*id));
    }

    /// Whether nobody is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// As [`LogReader::read`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&mut self, bytes_max: usize) -> io::Result<Vec<(Id, LogEntry)>> {
        let (mut out, mut bytes) = (Vec::new(), 0);
        while bytes < bytes_max {
            for (_, reader, waiting) in self.of.iter_mut().filter(|(.., w)| w.is_empty()) {
                waiting.extend(reader.read(8 * 1024)?);
            }
            let times = self.of.iter().enumerate();
            let times = times.filter_map(|(n, (.., waiting))| Some((waiting.front()?.at_ns, n)));
            let Some((_, first)) = times.min() else { break };
            let Some((id, _, waiting)) = self.of.get_mut(first) else { break };
            let Some(entry) = waiting.pop_front() else { break };
            bytes += entry.text.len();
            out.push((*id, entry));
        }
        Ok(out)
    }
}

impl<Id: Copy + PartialEq> Default for MergedLogs<Id> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _};

    use proptest::prelude::*;

    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("mesh-logs-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn paths(&self) -> [PathBuf; 2] {
            [self.0.join("log.json.1"), self.0.join("log.json")]
        }

        /// Appends entries at these seconds; every third is of standard error.
        fn write(&self, seconds: std::ops::Range<i64>) {
            let [_, current] = self.paths();
            let mut file = fs::OpenOptions::new().append(true).create(true).open(current).unwrap();
            for second in seconds {
                let stream = if second % 3 == 0 { "stderr" } else { "stdout" };
                let time = jiff::Timestamp::from_second(second).unwrap();
                let line = serde_json::json!({
                    "log": format!("{second}\n"), "stream": stream, "time": time.to_string(),
                });
                writeln!(file, "{line}").unwrap();
            }
        }

        fn rotate(&self) {
            let [old, current] = self.paths();
            fs::rename(current, old).unwrap();
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn seconds(entries: Vec<LogEntry>) -> Vec<i64> {
        entries.iter().map(|entry| entry.at_ns / 1_000_000_000).collect()
    }

    #[test]
    fn what_is_written_while_files_take_turns_is_read_once_and_in_order() {
        let dir = Dir::new("turns");
        let mut reader = LogReader::open(dir.paths(), LogWanted::ALL).unwrap();
        assert_eq!(reader.read(1 << 20).unwrap(), []);
        dir.write(0..3);
        dir.rotate();
        dir.write(3..5);
        let mut late = LogReader::open(dir.paths(), LogWanted::ALL).unwrap();
        assert_eq!(seconds(reader.read(1 << 20).unwrap()), [3, 4]);
        assert_eq!(seconds(late.read(1 << 20).unwrap()), [0, 1, 2, 3, 4]);
        dir.write(5..6);
        dir.rotate();
        dir.write(6..8);
        assert_eq!(seconds(reader.read(1 << 20).unwrap()), [5, 6, 7]);
        // Twice while nobody looked: of what the reader had not begun, the last two are there.
        dir.write(8..9);
        dir.rotate();
        dir.write(9..10);
        dir.rotate();
        dir.write(10..11);
        assert_eq!(seconds(reader.read(1 << 20).unwrap()), [8, 9, 10]);
        assert_eq!(reader.read(1 << 20).unwrap(), []);
    }

    #[test]
    fn a_tail_goes_over_both_files_and_ends_at_what_was_there() {
        let dir = Dir::new("tail");
        dir.write(0..4);
        dir.rotate();
        dir.write(4..6);
        let open = |tail| {
            LogReader::open(dir.paths(), LogWanted { tail: Some(tail), ..LogWanted::ALL }).unwrap()
        };
        let (mut three, mut none, mut all) = (open(3), open(0), open(99));
        assert_eq!(seconds(three.read(1 << 20).unwrap()), [3, 4, 5]);
        assert!(none.read(1 << 20).unwrap().is_empty());
        assert_eq!(seconds(all.read(1 << 20).unwrap()), [0, 1, 2, 3, 4, 5]);
        dir.write(6..7);
        assert_eq!(seconds(none.read(1 << 20).unwrap()), [6]);
    }

    #[test]
    fn streams_and_times_are_chosen() {
        let dir = Dir::new("chosen");
        dir.write(0..7);
        let since_ns = 2_000_000_000;
        let wanted = LogWanted { stderr: false, since_ns, ..LogWanted::ALL };
        let mut reader = LogReader::open(dir.paths(), wanted).unwrap();
        assert_eq!(seconds(reader.read(1 << 20).unwrap()), [2, 4, 5]);
    }

    #[test]
    fn a_torn_line_is_left_out_and_an_unfinished_one_waited_for() {
        let dir = Dir::new("torn");
        let [_, current] = dir.paths();
        fs::write(&current, "{\"log\":\"half\n").unwrap();
        dir.write(1..2);
        let mut reader = LogReader::open(dir.paths(), LogWanted::ALL).unwrap();
        assert_eq!(seconds(reader.read(1 << 20).unwrap()), [1]);
        let mut file = fs::OpenOptions::new().append(true).open(&current).unwrap();
        write!(file, r#"{{"log":"x","stream":"stderr","time":"1970-01"#).unwrap();
        assert_eq!(reader.read(1 << 20).unwrap(), []);
        writeln!(file, r#"-01T00:00:09Z"}}"#).unwrap();
        let entry = LogEntry { stderr: true, at_ns: 9_000_000_000, text: b"x".to_vec() };
        assert_eq!(reader.read(1 << 20).unwrap(), [entry]);
    }

    #[test]
    fn several_tasks_come_by_their_times() {
        let (a, b) = (Dir::new("merge-a"), Dir::new("merge-b"));
        a.write(0..2);
        b.write(1..3);
        a.write(3..5);
        let mut merged = MergedLogs::new();
        for (id, dir) in [('a', &a), ('b', &b)] {
            merged.add(id, LogReader::open(dir.paths(), LogWanted::ALL).unwrap());
        }
        let read = merged.read(1 << 20).unwrap();
        let order: Vec<_> = read.iter().map(|(id, e)| (*id, e.at_ns / 1_000_000_000)).collect();
        assert_eq!(order, [('a', 0), ('a', 1), ('b', 1), ('b', 2), ('a', 3), ('a', 4)]);
        merged.retain(|id| id == 'b');
        a.write(9..10);
        assert_eq!(merged.read(1 << 20).unwrap(), []);
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_reader(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let dir = Dir::new("any");
            let [_, current] = dir.paths();
            fs::write(&current, &bytes).unwrap();
            let mut reader = LogReader::open(dir.paths(), LogWanted::ALL).unwrap();
            while !reader.read(64).unwrap().is_empty() {}
        }
    }
}
