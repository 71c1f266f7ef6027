//! Limits as files: which cgroup of which hierarchy gets what value.
//!
//! Each controller is where the machine has it: on the cgroup2 hierarchy that tasks live in, or on
//! a version 1 hierarchy beside it (hybrid machines), where the task gets a directory of the same
//! path, its *twin*. A limit whose controller is nowhere is an error: a task is never silently
//! unlimited.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use mesh_types::resources::Limits;

use super::Cgroup;

/// The kernel gives out CPU time by this many microseconds (its default)…
const PERIOD_US: u64 = 100_000;
/// … and no less than this many of them, so that a very small share needs the longest period.
const QUOTA_US_MIN: u64 = 1_000;
const PERIOD_US_MAX: u64 = 1_000_000;

/// What holds tasks to a kind of limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Controller {
    Cpu,
    Memory,
    Pids,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }

    /// Those among a list's words.
    fn among<'a>(words: impl Iterator<Item = &'a str>) -> BTreeSet<Self> {
        let words: BTreeSet<&str> = words.collect();
        Self::ALL.into_iter().filter(|one| words.contains(one.name())).collect()
    }
}

/// Where a machine has its controllers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hierarchies {
    /// Where the cgroup2 hierarchy is mounted.
    unified: PathBuf,
    /// What that has.
    controllers: BTreeSet<Controller>,
    /// Where the version 1 hierarchies of the others are mounted.
    v1: BTreeMap<Controller, PathBuf>,
}

/// One file and what is written to it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    file: PathBuf,
    value: String,
    /// Kernels may lack it.
    optional: bool,
}

/// What to do for the limits of one task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Its twins to make, which its processes join.
    pub twins: Vec<PathBuf>,
    /// In this order.
    settings: Vec<Setting>,
}

impl Hierarchies {
    /// What this machine has, for cgroups below `parent`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn observe(parent: &Path) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mut found = Self::parse(&mounts, parent);
        let words = fs::read_to_string(found.unified.join("cgroup.controllers"))?;
        found.controllers = Controller::among(words.split_whitespace());
        Ok(found)
    }

    /// Reads proc_pid_mountinfo(5).
    fn parse(mounts: &str, parent: &Path) -> Self {
        let mut found = Self::default();
        for line in mounts.lines() {
            let Some((place, kind)) = line.split_once(" - ") else { continue };
            let Some(point) = place.split(' ').nth(4).map(PathBuf::from) else { continue };
            let mut kind = kind.split(' ');
            match (kind.next(), kind.nth(1)) {
                // The last one is on top, and the longest one is the nearest.
                (Some("cgroup2"), _)
                    if parent.starts_with(&point) && point.starts_with(&found.unified) =>
                {
                    found.unified = point;
                }
                (Some("cgroup"), Some(options)) => {
                    let controllers = Controller::among(options.split(','));
                    found.v1.extend(controllers.into_iter().map(|one| (one, point.clone())));
                }
                _ => {}
            }
        }
        found
    }

    /// Whether tasks can be limited in CPU time, memory and processes here.
    #[must_use]
    pub fn can_limit(&self) -> [bool; 3] {
        Controller::ALL.map(|one| self.controllers.contains(&one) || self.v1.contains_key(&one))
    }

    /// The version of the hierarchies that limit tasks: 2, or 1 if any is.
    #[must_use]
    pub fn version(&self) -> u32 {
        let elsewhere = |one: &Controller| !self.controllers.contains(one);
        if self.v1.keys().any(elsewhere) { 1 } else { 2 }
    }

    /// The places of a cgroup's twins, whether they are there or not.
    #[must_use]
    pub fn twins(&self, cgroup: &Path) -> Vec<PathBuf> {
        let places: BTreeSet<PathBuf> =
            self.v1.keys().filter_map(|controller| self.twin(*controller, cgroup)).collect();
        places.into_iter().collect()
    }

    fn twin(&self, controller: Controller, cgroup: &Path) -> Option<PathBuf> {
        let below = cgroup.strip_prefix(&self.unified).ok()?;
        Some(self.v1.get(&controller)?.join(below))
    }

    /// What a task's limits need.
    ///
    /// # Errors
    /// The limit that this machine cannot hold a task to, and why.
    pub fn plan(&self, cgroup: &Path, limits: &Limits) -> Result<Plan, String> {
        let mut plan = Plan::default();
        let mut handed_down = String::new();
        let mut on_leaf = Vec::new();
        for (controller, limit, v2, v1) in files(limits) {
            if self.controllers.contains(&controller) {
                handed_down.push_str(&format!(" +{}", controller.name()));
                on_leaf.extend(v2.into_iter().map(|file| (Cgroup::new(cgroup).task(), file)));
            } else if let Some(twin) = self.twin(controller, cgroup) {
                if !plan.twins.contains(&twin) {
                    plan.twins.push(twin.clone());
                }
                on_leaf.extend(v1.into_iter().map(|file| (twin.clone(), file)));
            } else {
                let name = controller.name();
                return Err(format!(
                    "this node cannot limit {limit}: its kernel has no {name} controller, neither \
                     on {} nor mounted beside it. Leave the limit out, or keep the service off \
                     this node with --constraint",
                    self.unified.display()
                ));
            }
        }
        if !handed_down.is_empty() {
            // From the hierarchy's root down to the task's own cgroup.
            let above = cgroup.ancestors().take_while(|path| path.starts_with(&self.unified));
            let above: Vec<&Path> = above.collect();
            plan.settings.extend(above.into_iter().rev().map(|path| Setting {
                file: path.join("cgroup.subtree_control"),
                value: handed_down.trim_start().to_owned(),
                optional: false,
            }));
        }
        plan.settings.extend(on_leaf.into_iter().map(|(dir, (name, value, optional))| Setting {
            file: dir.join(name),
            value,
            optional,
        }));
        Ok(plan)
    }
}

/// A file's name, its value, and whether kernels may lack it.
type File = (&'static str, String, bool);

/// The files of each limit that is set: by its controller, what it limits, on version 2 and 1.
fn files(limits: &Limits) -> Vec<(Controller, &'static str, Vec<File>, Vec<File>)> {
    let must = |name, value: String| (name, value, false);
    let may = |name, value: String| (name, value, true);
    let mut all = Vec::new();
    if limits.amount.nano_cpus > 0 {
        let (quota, period) = share(limits.amount.nano_cpus);
        let v2 = vec![must("cpu.max", format!("{quota} {period}"))];
        let v1 = vec![
            must("cpu.cfs_period_us", period.to_string()),
            must("cpu.cfs_quota_us", quota.to_string()),
        ];
        all.push((Controller::Cpu, "CPU time", v2, v1));
    }
    if limits.amount.memory_bytes > 0 {
        let bytes = limits.amount.memory_bytes.to_string();
        // No swap on top: a limit is one.
        let v2 = vec![must("memory.max", bytes.clone()), may("memory.swap.max", "0".to_owned())];
        let v1 = vec![
            must("memory.limit_in_bytes", bytes.clone()),
            may("memory.memsw.limit_in_bytes", bytes),
        ];
        all.push((Controller::Memory, "memory", v2, v1));
    }
    if limits.pids > 0 {
        // One more for the task's init, which is ours.
        let pids = vec![must("pids.max", limits.pids.saturating_add(1).to_string())];
        all.push((Controller::Pids, "processes", pids.clone(), pids));
    }
    all
}

/// A share of CPU time as microseconds per period.
fn share(nano_cpus: u64) -> (u64, u64) {
    let of = |period: u64| {
        let micros = u128::from(nano_cpus) * u128::from(period) / 1_000_000_000;
        u64::try_from(micros).unwrap_or(u64::MAX)
    };
    match of(PERIOD_US) {
        quota if quota >= QUOTA_US_MIN => (quota, PERIOD_US),
        _ => (of(PERIOD_US_MAX).max(QUOTA_US_MIN), PERIOD_US_MAX),
    }
}

impl Plan {
    /// Does it; nothing if there is nothing to do. Afterwards the task's processes must join its
    /// cgroup and its twins before they run anything.
    ///
    /// # Errors
    /// Those of the file system, with the file.
    pub fn apply(&self, cgroup: &Cgroup) -> io::Result<()> {
        if self.settings.is_empty() {
            return Ok(());
        }
        cgroup.create()?;
        let about = |path: &Path, error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        };
        for twin in &self.twins {
            fs::create_dir_all(twin).map_err(|error| about(twin, error))?;
        }
        for Setting { file, value, optional } in &self.settings {
            match set(file, value) {
                Err(error) if *optional && error.kind() == io::ErrorKind::NotFound => {}
                done => done.map_err(|error| about(file, error))?,
            }
        }
        Ok(())
    }
}

/// Writes to a file that the kernel must have. Asked to make one that it lacks, it would say that
/// this is not permitted; where its hierarchy is not mounted any more, one would be made.
fn set(file: &Path, value: &str) -> io::Result<()> {
    fs::File::options().write(true).open(file)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use mesh_types::resources::Amount;

    use super::*;

    const HYBRID: &str = "\
        30 24 0:27 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw,mode=755\n\
        31 30 0:28 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n\
        32 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        33 30 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        34 30 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
        35 30 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
    const TASK: &str = "/sys/fs/cgroup/unified/mesh/t1";

    fn all() -> Limits {
        let amount = Amount { nano_cpus: 500_000_000, memory_bytes: 64 << 20 };
        Limits { amount, pids: 10 }
    }

    fn written(plan: &Plan) -> Vec<String> {
        let line = |s: &Setting| format!("{}={}", s.file.display(), s.value);
        plan.settings.iter().map(line).collect()
    }

    #[test]
    fn beside_version_1_a_task_has_twins() {
        let here = Hierarchies::parse(HYBRID, Path::new("/sys/fs/cgroup/unified/mesh"));
        assert_eq!((here.can_limit(), here.version()), ([true; 3], 1));
        let plan = here.plan(Path::new(TASK), &all()).unwrap();
        let (cpu, root) = ("/sys/fs/cgroup/cpu,cpuacct/mesh/t1", "/sys/fs/cgroup");
        let expected = [
            format!("{cpu}/cpu.cfs_period_us=100000"),
            format!("{cpu}/cpu.cfs_quota_us=50000"),
            format!("{root}/memory/mesh/t1/memory.limit_in_bytes=67108864"),
            format!("{root}/memory/mesh/t1/memory.memsw.limit_in_bytes=67108864"),
            format!("{root}/pids/mesh/t1/pids.max=11"),
        ];
        assert_eq!(written(&plan), expected);
        assert_eq!(plan.twins.len(), 3);
        let twins = here.twins(Path::new(TASK));
        assert!(plan.twins.iter().all(|twin| twins.contains(twin)), "all are removed again");
    }

    #[test]
    fn on_version_2_controllers_are_handed_down() {
        let mounts = "31 24 0:28 / /sys/fs/cgroup rw shared:10 - cgroup2 cgroup2 rw\n";
        let parent = Path::new("/sys/fs/cgroup/mesh");
        let mut here = Hierarchies::parse(mounts, parent);
        here.controllers = Controller::among("cpuset cpu io memory hugetlb pids".split(' '));
        assert_eq!((here.can_limit(), here.version()), ([true; 3], 2));
        let plan = here.plan(&parent.join("t1"), &all()).unwrap();
        let hand = |path: &str| format!("{path}/cgroup.subtree_control=+cpu +memory +pids");
        let root = "/sys/fs/cgroup";
        let expected = [
            hand(root),
            hand("/sys/fs/cgroup/mesh"),
            hand("/sys/fs/cgroup/mesh/t1"),
            format!("{root}/mesh/t1/task/cpu.max=50000 100000"),
            format!("{root}/mesh/t1/task/memory.max=67108864"),
            format!("{root}/mesh/t1/task/memory.swap.max=0"),
            format!("{root}/mesh/t1/task/pids.max=11"),
        ];
        assert_eq!(written(&plan), expected);
        assert!(plan.twins.is_empty() && here.twins(parent).is_empty());
        // One limit hands down its own controller alone.
        let one = Limits { pids: 1, ..Limits::default() };
        let plan = here.plan(&parent.join("t1"), &one).unwrap();
        assert!(written(&plan)[0].ends_with("=+pids") && plan.settings.len() == 4);
        assert_eq!(here.plan(parent, &Limits::default()).unwrap(), Plan::default());
    }

    #[test]
    fn without_a_controller_a_limit_is_refused() {
        let lines: Vec<&str> = HYBRID.lines().filter(|line| !line.contains(",memory")).collect();
        let here = Hierarchies::parse(&lines.join("\n"), Path::new(TASK));
        assert_eq!(here.can_limit(), [true, false, true]);
        let error = here.plan(Path::new(TASK), &all()).unwrap_err();
        assert!(error.starts_with("this node cannot limit memory: "), "{error}");
        let mut others = all();
        others.amount.memory_bytes = 0;
        assert_eq!(here.plan(Path::new(TASK), &others).unwrap().twins.len(), 2);
    }

    #[test]
    fn shares_of_cpu_time_are_such_that_the_kernel_takes_them() {
        assert_eq!(share(2_500_000_000), (250_000, 100_000));
        assert_eq!(share(10_000_000), (1_000, 100_000));
        // The least that the API takes.
        assert_eq!(share(1_000_000), (1_000, 1_000_000));
        assert_eq!(share(5_000_000), (5_000, 1_000_000));
        assert_eq!(share(u64::MAX).1, 100_000);
    }
}
