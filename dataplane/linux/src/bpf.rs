//! The BPF object: loading it over pinned maps, and attaching its programs.
//!
//! Pins, below `<pin_dir>/v<SCHEMA>/`: `maps/<NAME>` and, with tcx, `links/<hook>`. A daemon that
//! starts opens the maps that are there and puts its own programs into the links that are there:
//! no packet sees a hook without a program. Before tcx (6.6), and on `lo`, there are clsact
//! filters, known again by priority and handle and replaced in one request.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{Ebpf, EbpfLoader, programs::SchedClassifier};
use mesh_dataplane::{Hook, MapId, object::endpoint_of};
use mesh_ebpf_abi::{Counter, FlowKey, FlowValue, SCHEMA, map, prog};

use crate::{
    bpf_sys::{self, RawMap, SharedArray, TCX_INGRESS, TcxInfo},
    codec,
    error::{OpError, OpenError},
    netlink::Socket,
    rtnl,
};

/// The programs, prebuilt by `cargo xtask ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../ebpf/mesh.bpf.o");

/// Entries of the maps; each bounds what the node can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    /// Addresses and endpoints of all networks that have tasks here.
    pub endpoints: u32,
    /// Virtual addresses and services with published ports.
    pub services: u32,
    /// All Maglev tables together: 1021 for a service of 3 to 10 backends.
    pub maglev: u32,
    /// Established flows, two entries each (1M entries: about 180 MiB).
    pub flows: u32,
    /// Half-open and closing flows.
    pub flows_new: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            endpoints: 65_536,
            services: 16_384,
            maglev: 1 << 20,
            flows: 1 << 20,
            flows_new: 1 << 18,
        }
    }
}

pub(crate) struct Bpf {
    /// Keeps programs and maps open.
    ebpf: Ebpf,
    ids: BTreeMap<&'static str, u32>,
    maps: BTreeMap<MapId, RawMap>,
    pub(crate) maglev: SharedArray,
    pub(crate) counters: RawMap,
    pub(crate) flows: RawMap,
    pub(crate) flow_capacity: u32,
    directory: PathBuf,
    links: PathBuf,
    /// All pinned maps, to pin them again.
    pins: BTreeMap<&'static str, (OwnedFd, u32)>,
    pub(crate) tcx: bool,
}

impl std::fmt::Debug for Bpf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bpf").field("links", &self.links).field("tcx", &self.tcx).finish()
    }
}

/// Maps that are pinned beside those of [`MapId`].
const OWN_MAPS: [&str; 5] =
    [map::MAGLEV, map::COUNTERS, map::FLOWS, map::FLOWS_NEW, map::VIP_CLIENTS];

/// All that are pinned.
fn pinned_maps() -> impl Iterator<Item = &'static str> {
    MapId::ALL.map(MapId::name).into_iter().chain(OWN_MAPS)
}

const PROGRAMS: [&str; 4] = [prog::FROM_TASK, prog::FROM_UPLINK, prog::FROM_VXLAN, prog::TASK_LO];

/// The directory of this layout's pins.
pub(crate) fn versioned(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("v{SCHEMA}"))
}

impl Bpf {
    /// Loads the object over the maps that are pinned already, if any.
    pub(crate) fn load(pin_dir: &Path, sizes: &MapSizes, tcx: bool) -> Result<Self, OpenError> {
        let directory = versioned(pin_dir);
        let (map_dir, links) = (directory.join("maps"), directory.join("links"));
        let io = |what: &str, path: &Path| {
            let what = format!("cannot {what} {}", path.display());
            move |source| OpenError::Io { what, source }
        };
        for path in [&map_dir, &links] {
            fs::create_dir_all(path).map_err(io("create", path))?;
        }
        let mut ebpf = load_object(&map_dir, sizes)?;
        let open = |name: &str, sizes| open_map(&map_dir.join(name), sizes);
        let mut maps = BTreeMap::new();
        for id in MapId::ALL {
            maps.insert(id, open(id.name(), codec::sizes(id))?.0);
        }
        let (flows, flow_capacity) =
            open(map::FLOWS, (size_of::<FlowKey>(), size_of::<FlowValue>()))?;
        let (counters, _) = open(map::COUNTERS, (4, 8))?;
        let maglev = shared(&map_dir.join(map::MAGLEV))?;
        let mut pins = BTreeMap::new();
        for name in pinned_maps() {
            let path = map_dir.join(name);
            let fd = bpf_sys::open_pin(&path).map_err(io("open", &path))?;
            let id = bpf_sys::map_id(fd.as_fd()).map_err(io("read", &path))?;
            pins.insert(name, (fd, id));
        }
        // After the maps' layouts are known to fit: the verifier would say it less plainly.
        let mut ids = BTreeMap::new();
        for name in PROGRAMS {
            ids.insert(name, load_program(&mut ebpf, name)?);
        }
        Ok(Self {
            ebpf,
            ids,
            maps,
            maglev,
            counters,
            flows,
            flow_capacity,
            directory,
            links,
            pins,
            tcx,
        })
    }

    pub(crate) fn map(&self, id: MapId) -> &RawMap {
        &self.maps[&id]
    }

    fn program(&self, hook: Hook) -> io::Result<BorrowedFd<'_>> {
        let missing = || io::Error::other("the program is not loaded");
        let program = self.ebpf.program(program_of(hook)).ok_or_else(missing)?;
        Ok(program.fd().map_err(io::Error::other)?.as_fd())
    }

    /// Whether this program id is the one that belongs at the hook now.
    pub(crate) fn is_current(&self, hook: Hook, program: u32) -> bool {
        self.ids.get(program_of(hook)) == Some(&program)
    }

    /// Whether a program works on our maps: it is loaded here, or was by an earlier daemon.
    pub(crate) fn is_ours(&self, program: u32) -> bool {
        let on_ours = |map: &u32| self.pins.values().any(|(_, id)| id == map);
        self.ids.values().any(|id| *id == program)
            || bpf_sys::maps_of(program).is_ok_and(|maps| maps.iter().any(on_ours))
    }

    /// Pins every map again whose pin is gone or another map's, so that the next daemon finds what
    /// the programs use. Returns the names of those.
    pub(crate) fn pin_again(&self) -> io::Result<Vec<&'static str>> {
        let mut done = Vec::new();
        for (name, (map, id)) in &self.pins {
            let path = self.directory.join("maps").join(name);
            let there = bpf_sys::open_pin(&path).and_then(|fd| bpf_sys::map_id(fd.as_fd()));
            if there.is_ok_and(|there| there == *id) {
                continue;
            }
            make_way(&path)?;
            bpf_sys::pin(map.as_fd(), &path)?;
            done.push(*name);
        }
        Ok(done)
    }

    /// The pinned tcx links; all zeros: none that is one.
    pub(crate) fn pinned(&self) -> io::Result<Vec<(Hook, TcxInfo)>> {
        let mut found = Vec::new();
        let entries = match fs::read_dir(&self.links) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let Some(hook) = entry.file_name().to_str().and_then(hook_named) else { continue };
            // One that is no object of BPF is there all the same, and not what it should be.
            let Ok(link) = bpf_sys::open_pin(&entry.path()) else {
                found.push((hook, TcxInfo::default()));
                continue;
            };
            found.push((hook, bpf_sys::link_info(link.as_fd())?.unwrap_or_default()));
        }
        Ok(found)
    }

    /// What the hook's program does with a frame: see [`bpf_sys::test_run`].
    pub(crate) fn test_run(&self, hook: Hook, ifindex: u32, frame: &[u8]) -> io::Result<i32> {
        bpf_sys::test_run(self.program(hook)?, ifindex, frame)
    }

    /// Whether the hook's program is attached by a pinned tcx link. Not so on a task's `lo`: making
    /// a tcx link waits for an RCU grace period under the RTNL lock (`tcx_entry_sync`, measured
    /// 15 ms), which every task start on the machine would pay for once more.
    fn is_pinned(&self, hook: Hook) -> bool {
        self.tcx && !matches!(hook, Hook::TaskLo(_))
    }

    /// Attaches the hook's program to a link of the socket's namespace (with tcx: the calling
    /// thread's), or puts it in the place of an earlier one.
    pub(crate) fn attach(
        &self,
        socket: &mut Socket,
        hook: Hook,
        ifindex: u32,
    ) -> Result<(), OpError> {
        let program = self.program(hook)?;
        if !self.is_pinned(hook) {
            let (parent, name) = (parent_of(hook), program_of(hook));
            rtnl::add_clsact(socket, ifindex)?;
            return Ok(rtnl::set_filter(socket, ifindex, parent, program, name)?);
        }
        let path = self.links.join(name_of(hook));
        if let Ok(link) = bpf_sys::open_pin(&path) {
            let at = bpf_sys::link_info(link.as_fd()).ok().flatten();
            if at.is_some_and(|info| info.ifindex == ifindex) {
                return Ok(bpf_sys::update_link(link.as_fd(), program)?);
            }
        }
        make_way(&path)?;
        let link = bpf_sys::attach_tcx(program, ifindex, TCX_INGRESS)?;
        Ok(bpf_sys::pin(link.as_fd(), &path)?)
    }

    /// Removes a program. `ifindex` is in the socket's namespace; `None`: the link is gone.
    pub(crate) fn detach(
        &self,
        socket: &mut Socket,
        hook: Hook,
        ifindex: Option<u32>,
    ) -> Result<(), OpError> {
        if self.is_pinned(hook) {
            return match fs::remove_file(self.links.join(name_of(hook))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
                _ => Ok(()),
            };
        }
        let Some(ifindex) = ifindex else { return Ok(()) };
        match rtnl::delete_filter(socket, ifindex, parent_of(hook)) {
            // The filter, its queueing discipline or its link is gone.
            Err(error)
                if [libc::ENOENT, libc::EINVAL, libc::ENODEV].iter().any(|e| error.is(*e)) =>
            {
                Ok(())
            }
            // The queueing discipline stays: nobody can tell who made it, or waits to use it, and
            // an empty one does nothing.
            other => Ok(other?),
        }
    }

    /// The sum over all CPUs of each counter.
    pub(crate) fn counters(&self) -> Vec<(Counter, u64)> {
        let sum = |counter: Counter| {
            let values = self.counters.get(&(counter as u32).to_ne_bytes()).ok().flatten();
            let words = values.unwrap_or_default();
            words
                .chunks_exact(8)
                .filter_map(|word| word.try_into().ok().map(u64::from_ne_bytes))
                .fold(0, u64::wrapping_add)
        };
        Counter::ALL.iter().map(|counter| (*counter, sum(*counter))).collect()
    }
}

/// Clears a path that something of ours is to be pinned at.
fn make_way(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn load_object(map_dir: &Path, sizes: &MapSizes) -> Result<Ebpf, OpenError> {
    let mut loader = EbpfLoader::new();
    for name in pinned_maps() {
        loader.map_pin_path(name, map_dir.join(name));
    }
    for (name, size) in [
        (map::ADDRESSES, sizes.endpoints.saturating_add(sizes.services)),
        (map::ENDPOINTS, sizes.endpoints),
        (map::SERVICES, sizes.services),
        (map::PUBLISHED, sizes.services),
        (map::MAGLEV, sizes.maglev),
        (map::FLOWS, sizes.flows),
        (map::FLOWS_NEW, sizes.flows_new),
    ] {
        loader.map_max_entries(name, size.max(1));
    }
    loader.load(OBJECT).map_err(|error| OpenError::Load(chain(&error)))
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<u32, OpenError> {
    let failed = |why: String| OpenError::Load(format!("program {name}: {why}"));
    let program = ebpf.program_mut(name).ok_or_else(|| failed("not in the object".to_owned()))?;
    let program: &mut SchedClassifier =
        program.try_into().map_err(|error| failed(chain(&error)))?;
    program.load().map_err(|error| failed(chain(&error)))?;
    Ok(program.info().map_err(|error| failed(chain(&error)))?.id())
}

/// An error with its causes: aya's own messages leave them out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

fn open_map(path: &Path, expected: (usize, usize)) -> Result<(RawMap, u32), OpenError> {
    let failed = |source| OpenError::Io { what: format!("cannot open {}", path.display()), source };
    let fd = bpf_sys::open_pin(path).map_err(failed)?;
    let (key, value, entries) = bpf_sys::map_info(fd.as_fd()).map_err(failed)?;
    if (key, value) != expected {
        return Err(OpenError::Layout { path: path.to_owned(), found: (key, value), expected });
    }
    // A look-up in a per-CPU map returns a value for each CPU that there could be.
    let per_cpu = path.ends_with(map::COUNTERS);
    let value = if per_cpu { value * possible_cpus() } else { value };
    Ok((RawMap::new(fd, key, value), entries))
}

fn possible_cpus() -> usize {
    aya::util::nr_cpus().unwrap_or(1)
}

fn shared(path: &Path) -> Result<SharedArray, OpenError> {
    let failed = |source| OpenError::Io { what: format!("cannot map {}", path.display()), source };
    let fd = bpf_sys::open_pin(path).map_err(failed)?;
    let (key, value, entries) = bpf_sys::map_info(fd.as_fd()).map_err(failed)?;
    if (key, value) != (4, 8) {
        let found = (key, value);
        return Err(OpenError::Layout { path: path.to_owned(), found, expected: (4, 8) });
    }
    SharedArray::map(fd.as_fd(), entries as usize).map_err(failed)
}

fn program_of(hook: Hook) -> &'static str {
    match hook {
        Hook::FromTask(_) => prog::FROM_TASK,
        Hook::FromUplink => prog::FROM_UPLINK,
        Hook::FromVxlan => prog::FROM_VXLAN,
        Hook::TaskLo(_) => prog::TASK_LO,
    }
}

/// The side of the link that the hook is on.
pub(crate) fn parent_of(hook: Hook) -> u32 {
    if matches!(hook, Hook::TaskLo(_)) { rtnl::EGRESS } else { rtnl::INGRESS }
}

/// The name of the hook's pinned link.
fn name_of(hook: Hook) -> String {
    match hook {
        Hook::FromTask(endpoint) => mesh_dataplane::host_name(endpoint),
        Hook::FromUplink => "uplink".to_owned(),
        Hook::FromVxlan => "vxlan".to_owned(),
        Hook::TaskLo(netns) => format!("lo-{}", netns.ino),
    }
}

fn hook_named(name: &str) -> Option<Hook> {
    match name {
        "uplink" => Some(Hook::FromUplink),
        "vxlan" => Some(Hook::FromVxlan),
        name => endpoint_of(name).map(Hook::FromTask),
    }
}
