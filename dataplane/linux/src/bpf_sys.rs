//! The bpf(2) calls that go beyond what `aya` offers: maps as bytes, links by number, pins.
//!
//! Layouts: `union bpf_attr` and `struct bpf_link_info` in `include/uapi/linux/bpf.h`.

#![allow(unsafe_code, reason = "bpf(2) and mmap(2)")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

const BPF_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_MAP_DELETE_ELEM: i32 = 3;
const BPF_MAP_GET_NEXT_KEY: i32 = 4;
const BPF_PROG_LOAD: i32 = 5;
const BPF_OBJ_PIN: i32 = 6;
const BPF_OBJ_GET: i32 = 7;
const BPF_PROG_DETACH: i32 = 9;
const BPF_PROG_TEST_RUN: i32 = 10;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_OBJ_GET_INFO_BY_FD: i32 = 15;
const BPF_PROG_QUERY: i32 = 16;
const BPF_LINK_CREATE: i32 = 28;
const BPF_LINK_UPDATE: i32 = 29;
const BPF_LINK_GET_FD_BY_ID: i32 = 30;
const BPF_LINK_DETACH: i32 = 34;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_LINK_TYPE_TCX: u32 = 11;
/// `bpf_attach_type`.
pub(crate) const TCX_INGRESS: u32 = 46;

/// `union bpf_attr`: zeroed, filled at the offsets of the command's struct.
#[repr(C, align(8))]
struct Attr([u8; 128]);

impl Attr {
    fn new() -> Self {
        Self([0; 128])
    }
    fn u32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }
    fn u64(mut self, at: usize, value: u64) -> Self {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }
    fn fd(self, at: usize, fd: BorrowedFd) -> Self {
        self.u32(at, fd.as_raw_fd() as u32)
    }

    /// # Safety
    /// Pointers in the attribute must be good for what the command does with them.
    unsafe fn call(mut self, command: i32) -> io::Result<i32> {
        // SAFETY: the caller's promise.
        unsafe { self.call_back(command) }
    }

    /// As [`Attr::call`], where the kernel writes into the attribute.
    ///
    /// # Safety
    /// As [`Attr::call`].
    unsafe fn call_back(&mut self, command: i32) -> io::Result<i32> {
        // SAFETY: the attribute is as long as said; the rest is the caller's promise.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
    }

    /// # Safety
    /// As [`Attr::call`]; the command must return a descriptor.
    unsafe fn call_fd(self, command: i32) -> io::Result<OwnedFd> {
        // SAFETY: the caller's promise.
        let fd = unsafe { self.call(command)? };
        // SAFETY: the kernel just opened it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a zero byte in a path"))
}

/// Pins an object under a path of a bpffs.
pub(crate) fn pin(fd: BorrowedFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: `path` is a C string that lives through the call.
    unsafe { Attr::new().u64(0, path.as_ptr() as u64).fd(8, fd).call(BPF_OBJ_PIN) }.map(|_| ())
}

/// Opens a pinned object.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: `path` is a C string that lives through the call.
    unsafe { Attr::new().u64(0, path.as_ptr() as u64).call_fd(BPF_OBJ_GET) }
}

/// Attaches a program to a link of the calling thread's namespace (6.6 and later).
pub(crate) fn attach_tcx(program: BorrowedFd, ifindex: u32, attach: u32) -> io::Result<OwnedFd> {
    let attr = Attr::new().fd(0, program).u32(4, ifindex).u32(8, attach);
    // SAFETY: no pointers in it.
    unsafe { attr.call_fd(BPF_LINK_CREATE) }
}

/// Replaces the program of a link, with no packet in between seeing neither.
pub(crate) fn update_link(link: BorrowedFd, program: BorrowedFd) -> io::Result<()> {
    // SAFETY: no pointers in it.
    unsafe { Attr::new().fd(0, link).fd(4, program).call(BPF_LINK_UPDATE) }.map(|_| ())
}

/// What a tcx link is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TcxInfo {
    /// The tcx link's number.
    pub(crate) link: u32,
    pub(crate) program: u32,
    /// 0: its device is gone.
    pub(crate) ifindex: u32,
}

/// What a link is; `None` if it is no tcx link.
pub(crate) fn link_info(link: BorrowedFd) -> io::Result<Option<TcxInfo>> {
    let mut info = [0u64; 16];
    let attr =
        Attr::new().fd(0, link).u32(4, size_of_val(&info) as u32).u64(8, info.as_mut_ptr() as u64);
    // SAFETY: `info` is as long as said and lives through the call.
    unsafe { attr.call(BPF_OBJ_GET_INFO_BY_FD)? };
    // type, id | prog_id, (padding) | tcx.ifindex, tcx.attach_type
    let low = |word: u64| (word & 0xffff_ffff) as u32;
    if low(info[0].to_le()) != BPF_LINK_TYPE_TCX {
        return Ok(None);
    }
    Ok(Some(TcxInfo {
        link: (info[0].to_le() >> 32) as u32,
        program: low(info[1].to_le()),
        ifindex: low(info[2].to_le()),
    }))
}

/// The most programs that the kernel has on one side of a device (`BPF_MPROG_MAX`).
const TCX_MAX: usize = 64;

/// The programs on a device of the calling thread's namespace, each with its tcx link (0: none).
pub(crate) fn attached(ifindex: u32, attach: u32) -> io::Result<Vec<(u32, u32)>> {
    let (mut programs, mut links) = ([0u32; TCX_MAX], [0u32; TCX_MAX]);
    let mut attr = Attr::new()
        .u32(0, ifindex)
        .u32(4, attach)
        .u64(16, programs.as_mut_ptr() as u64)
        .u32(24, TCX_MAX as u32)
        .u64(40, links.as_mut_ptr() as u64);
    // SAFETY: both arrays are as long as said and live through the call.
    match unsafe { attr.call_back(BPF_PROG_QUERY) } {
        // Nothing was ever attached there, or the device is gone.
        Err(error) if [libc::ENOENT, libc::ENODEV].map(Some).contains(&error.raw_os_error()) => {
            return Ok(Vec::new());
        }
        other => other?,
    };
    let [a, b, c, d] = [24, 25, 26, 27].map(|at| attr.0[at]);
    let count = u32::from_ne_bytes([a, b, c, d]) as usize;
    Ok(programs.into_iter().zip(links).take(count).collect())
}

/// Takes a program off a device of the calling thread's namespace. That it is gone will do.
pub(crate) fn detach_tcx(ifindex: u32, attach: u32, program: u32, link: u32) -> io::Result<()> {
    let detach = || {
        if link != 0 {
            // SAFETY: no pointers in it.
            let link = unsafe { Attr::new().u32(0, link).call_fd(BPF_LINK_GET_FD_BY_ID)? };
            // SAFETY: no pointers in it.
            return unsafe { Attr::new().fd(0, link.as_fd()).call(BPF_LINK_DETACH) };
        }
        let program = program_by_id(program)?;
        let attr = Attr::new().u32(0, ifindex).fd(4, program.as_fd()).u32(8, attach);
        // SAFETY: no pointers in it.
        unsafe { attr.call(BPF_PROG_DETACH) }
    };
    match detach() {
        Err(error) if ![libc::ENOENT, libc::ENODEV].map(Some).contains(&error.raw_os_error()) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

fn program_by_id(program: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers in it.
    unsafe { Attr::new().u32(0, program).call_fd(BPF_PROG_GET_FD_BY_ID) }
}

/// The numbers of the maps that a program uses.
pub(crate) fn maps_of(program: u32) -> io::Result<Vec<u32>> {
    let program = program_by_id(program)?;
    let mut maps = [0u32; 64];
    // `struct bpf_prog_info`: nr_map_ids at 52, map_ids at 56.
    let mut info = [0u64; 16];
    info[6] = (maps.len() as u64) << 32;
    info[7] = maps.as_mut_ptr() as u64;
    let attr = Attr::new()
        .fd(0, program.as_fd())
        .u32(4, size_of_val(&info) as u32)
        .u64(8, info.as_mut_ptr() as u64);
    // SAFETY: `info` and `maps` are as long as said and live through the call.
    unsafe { attr.call(BPF_OBJ_GET_INFO_BY_FD)? };
    let count = (info[6] >> 32) as usize;
    Ok(maps.into_iter().take(count).collect())
}

/// The kernel's number of a map.
pub(crate) fn map_id(map: BorrowedFd) -> io::Result<u32> {
    // type, id, …
    let mut info = [0u32; 32];
    let attr =
        Attr::new().fd(0, map).u32(4, size_of_val(&info) as u32).u64(8, info.as_mut_ptr() as u64);
    // SAFETY: `info` is as long as said and lives through the call.
    unsafe { attr.call(BPF_OBJ_GET_INFO_BY_FD)? };
    Ok(info[1])
}

/// What a map is: key size, value size, entries.
pub(crate) fn map_info(map: BorrowedFd) -> io::Result<(usize, usize, u32)> {
    // type, id, key_size, value_size, max_entries, …
    let mut info = [0u32; 32];
    let attr =
        Attr::new().fd(0, map).u32(4, size_of_val(&info) as u32).u64(8, info.as_mut_ptr() as u64);
    // SAFETY: `info` is as long as said and lives through the call.
    unsafe { attr.call(BPF_OBJ_GET_INFO_BY_FD)? };
    Ok((info[2] as usize, info[3] as usize, info[4]))
}

/// Loads a program that does nothing: whether the kernel lets us, and something to attach.
pub(crate) fn load_trivial() -> io::Result<OwnedFd> {
    // r0 = 0; exit
    let code: [u64; 2] = [0xb7, 0x95];
    let attr = Attr::new()
        .u32(0, BPF_PROG_TYPE_SCHED_CLS)
        .u32(4, code.len() as u32)
        .u64(8, code.as_ptr() as u64)
        .u64(16, c"GPL".as_ptr() as u64);
    // SAFETY: instructions and licence live through the call.
    unsafe { attr.call_fd(BPF_PROG_LOAD) }
}

/// Runs a tc program on a copy of a frame, as if it came in by a link of the calling thread's
/// namespace, and returns its action. What it wrote into the frame is lost.
pub(crate) fn test_run(program: BorrowedFd, ifindex: u32, frame: &[u8]) -> io::Result<i32> {
    // `struct __sk_buff` up to its ifindex.
    let mut context = [0u32; 11];
    context[10] = ifindex;
    let mut attr = Attr::new()
        .fd(0, program)
        .u32(8, frame.len() as u32)
        .u64(16, frame.as_ptr() as u64)
        .u32(32, 1)
        .u32(40, size_of_val(&context) as u32)
        .u64(48, context.as_ptr() as u64);
    // SAFETY: frame and context are as long as said and live through the call.
    unsafe { attr.call_back(BPF_PROG_TEST_RUN)? };
    let [a, b, c, d] = [4, 5, 6, 7].map(|at| attr.0[at]);
    Ok(i32::from_ne_bytes([a, b, c, d]))
}

/// A hash or array map as bytes.
#[derive(Debug)]
pub struct RawMap {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

impl RawMap {
    /// Opens a pinned map (not a per-CPU one).
    ///
    /// # Errors
    /// No such pin, or no right to open it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = open_pin(path)?;
        let (key, value, _) = map_info(fd.as_fd())?;
        Ok(Self { fd, key, value })
    }

    /// Sizes of key and value in bytes.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        (self.key, self.value)
    }

    /// `key` and `value` must be the map's sizes; the caller has checked them.
    pub(crate) fn new(fd: OwnedFd, key: usize, value: usize) -> Self {
        Self { fd, key, value }
    }

    fn attr(&self, key: &[u8]) -> Attr {
        assert_eq!(key.len(), self.key, "the key has the map's size");
        Attr::new().fd(0, self.fd.as_fd()).u64(8, key.as_ptr() as u64)
    }

    /// The value at a key.
    ///
    /// # Errors
    /// The kernel refuses.
    ///
    /// # Panics
    /// The key has not the map's size.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.value];
        let attr = self.attr(key).u64(16, value.as_mut_ptr() as u64);
        // SAFETY: key and value buffers have the map's sizes.
        match unsafe { attr.call(BPF_MAP_LOOKUP_ELEM) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// The map is full (`E2BIG`), or the kernel refuses.
    ///
    /// # Panics
    /// Key or value have not the map's sizes.
    pub fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!(value.len(), self.value, "the value has the map's size");
        let attr = self.attr(key).u64(16, value.as_ptr() as u64);
        // SAFETY: key and value buffers have the map's sizes.
        unsafe { attr.call(BPF_MAP_UPDATE_ELEM) }.map(|_| ())
    }

    /// Removes an entry; one that is gone already will do.
    ///
    /// # Errors
    /// The kernel refuses.
    ///
    /// # Panics
    /// The key has not the map's size.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        // SAFETY: the key buffer has the map's size.
        match unsafe { self.attr(key).call(BPF_MAP_DELETE_ELEM) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    /// The key after `key`; the first one for `None`. After a key that is gone the kernel begins
    /// anew, so walks bound their steps.
    pub(crate) fn next(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        let mut next = vec![0; self.key];
        let attr = match key {
            Some(key) => self.attr(key),
            None => Attr::new().fd(0, self.fd.as_fd()),
        };
        // SAFETY: both key buffers have the map's size; a null first key is allowed.
        match unsafe { attr.u64(16, next.as_mut_ptr() as u64).call(BPF_MAP_GET_NEXT_KEY) } {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All entries, at most `limit` of them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn dump(&self, limit: usize) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut entries = Vec::new();
        let mut key = None;
        for _ in 0..limit {
            key = self.next(key.as_deref())?;
            let Some(key) = &key else { break };
            if let Some(value) = self.get(key)? {
                entries.push((key.clone(), value));
            }
        }
        Ok(entries)
    }
}

/// An array of `u64` shared with the programs.
#[derive(Debug)]
pub(crate) struct SharedArray {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: all access is by atomics.
unsafe impl Send for SharedArray {}
// SAFETY: all access is by atomics.
unsafe impl Sync for SharedArray {}

impl SharedArray {
    /// Maps a `BPF_F_MMAPABLE` array of `len` values of 8 bytes.
    pub(crate) fn map(fd: BorrowedFd, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping; the kernel checks the length against the map's.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { base, len })
    }

    fn slots(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned, `len` values long, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn read(&self, upto: usize) -> Vec<u64> {
        self.slots().iter().take(upto).map(|slot| slot.load(Ordering::Relaxed)).collect()
    }

    /// Writes a slice; `false` if it does not fit.
    pub(crate) fn write(&self, offset: usize, values: impl ExactSizeIterator<Item = u64>) -> bool {
        let end = offset.saturating_add(values.len());
        let Some(slots) = self.slots().get(offset..end) else { return false };
        for (slot, value) in slots.iter().zip(values) {
            slot.store(value, Ordering::Release);
        }
        true
    }
}

impl Drop for SharedArray {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len * 8) };
    }
}

const _: () = assert!(cfg!(target_endian = "little"), "infos are read as words of two fields");
