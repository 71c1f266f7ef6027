//! The task's output: split into lines, written as json-file entries into two bounded files.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::PathBuf,
};

use serde::Serialize;

/// A line longer than this is written in parts, as Docker's json-file driver does.
pub(super) const PART_BYTES_MAX: usize = 16 * 1024;

/// Collects bytes and cuts them into entries: a line with its newline, or a part of a long one.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    /// Takes bytes and hands every complete entry to `emit`.
    pub(super) fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(&[u8])) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        while let Some(end) = entry_end(rest) {
            let (entry, after) = rest.split_at(end);
            emit(entry);
            rest = after;
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
    }

    /// Hands out what is left when the stream has ended.
    pub(super) fn finish(&mut self, emit: impl FnOnce(&[u8])) {
        if !self.pending.is_empty() {
            emit(&self.pending);
            self.pending.clear();
        }
    }
}

/// Where the first entry ends, if there is a whole one.
fn entry_end(bytes: &[u8]) -> Option<usize> {
    let window = &bytes[..bytes.len().min(PART_BYTES_MAX)];
    if let Some(newline) = window.iter().position(|byte| *byte == b'\n') {
        return Some(newline + 1);
    }
    // One byte more must be there, to see whether it continues a character.
    if bytes.len() <= PART_BYTES_MAX {
        return None;
    }
    // Cut before a UTF-8 character rather than in it: bytes 0b10xxxxxx continue one (RFC 3629).
    let cut = (PART_BYTES_MAX - 3..=PART_BYTES_MAX)
        .rev()
        .find(|at| bytes.get(*at).is_none_or(|byte| byte & 0b1100_0000 != 0b1000_0000));
    Some(cut.unwrap_or(PART_BYTES_MAX))
}

#[derive(Serialize)]
struct Entry<'a> {
    log: &'a str,
    stream: &'a str,
    time: String,
}

/// Two files that take turns. A full disk loses output, never blocks or ends the task.
#[derive(Debug)]
pub(super) struct LogFile {
    current: PathBuf,
    old: PathBuf,
    bytes_max: u64,
    file: Option<File>,
    bytes: u64,
}

impl LogFile {
    /// Appends to `current`; when that exceeds `bytes_max` it becomes `old`.
    pub(super) fn open(current: PathBuf, old: PathBuf, bytes_max: u64) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(&current)?;
        let bytes = file.metadata()?.len();
        Ok(Self { current, old, bytes_max, file: Some(file), bytes })
    }

    /// Writes one entry.
    pub(super) fn write(&mut self, stream: &str, bytes: &[u8]) {
        let entry = Entry {
            log: &String::from_utf8_lossy(bytes),
            stream,
            time: jiff::Timestamp::now().to_string(),
        };
        let Ok(mut line) = serde_json::to_vec(&entry) else { return };
        line.push(b'\n');
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max {
            self.rotate();
        }
        if let Some(file) = &mut self.file
            && file.write_all(&line).is_ok()
        {
            self.bytes += line.len() as u64;
        }
    }

    fn rotate(&mut self) {
        let renamed = fs::rename(&self.current, &self.old);
        self.file = renamed.and_then(|()| File::create(&self.current)).ok();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(chunks: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut splitter = Splitter::default();
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, |entry| out.push(entry.to_vec()));
        }
        splitter.finish(|entry| out.push(entry.to_vec()));
        out
    }

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let chunks = [b"on".to_vec(), b"e\ntwo\nth".to_vec(), b"ree".to_vec()];
        assert_eq!(entries(&chunks), [b"one\n".to_vec(), b"two\n".to_vec(), b"three".to_vec()]);
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let text = "ä".repeat(PART_BYTES_MAX);
        let parts = entries(&[format!("x{text}").into_bytes()]);
        assert!(parts.len() > 1);
        for part in parts {
            assert!(part.len() <= PART_BYTES_MAX);
            assert!(String::from_utf8(part).is_ok());
        }
    }

    #[test]
    fn files_stay_bounded_and_keep_the_newest() {
        let dir = std::env::temp_dir().join(format!("mesh-log-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (current, old) = (dir.join("log.json"), dir.join("log.json.1"));
        let mut log = LogFile::open(current.clone(), old.clone(), 1000).unwrap();
        for number in 0..100 {
            log.write("stdout", format!("line {number}\n").as_bytes());
        }
        assert!(fs::metadata(&current).unwrap().len() <= 1000);
        assert!(fs::metadata(&old).unwrap().len() <= 1000);
        let text = fs::read_to_string(&current).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last["log"], "line 99\n");
        assert_eq!(last["stream"], "stdout");
        fs::remove_dir_all(&dir).unwrap();
    }

    proptest! {
        #[test]
        fn nothing_is_lost(chunks: Vec<Vec<u8>>) {
            let joined: Vec<u8> = chunks.concat();
            let out = entries(&chunks);
            prop_assert_eq!(out.concat(), joined);
            for entry in out {
                prop_assert!(entry.len() <= PART_BYTES_MAX);
                let newlines = entry.iter().filter(|byte| **byte == b'\n').count();
                prop_assert!(newlines == 0 || (newlines == 1 && entry.ends_with(b"\n")));
            }
        }
    }
}
