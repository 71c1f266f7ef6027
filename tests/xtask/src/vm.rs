//! Stock Debian kernels in QEMU: the data plane's own tests, run where tcx is missing (6.1) and
//! where it is there (6.12). No image is needed: an initramfs holds busybox, the modules, a few
//! tools, and the test executables with their libraries.

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::shell::cargo;

/// A kernel series: its name for people, and the meta-package whose newest image is taken.
const KERNELS: &[(&str, &str)] = &[("6.1", "linux-image-6.1.0-"), ("6.12", "linux-image-6.12.")];
/// What the data plane and its tests need; names differ little between the two series.
const MODULES: &[&str] = &[
    "veth",
    "vxlan",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "nf_tables",
    "nft_chain_nat",
    "nft_masq",
    "nft_ct",
    "nft_fib_inet",
    "nft_nat",
    "nft_compat",
    "tun",
    "af_packet",
];
/// Tools that the tests call, beside busybox.
const TOOLS: &[&str] = &["ip", "tc", "nft", "bridge", "ping"];
/// What runs if nothing is asked for: what depends on the kernel most. Without KVM it takes seconds
/// to verify the BPF programs, which every test does once for each of its nodes.
const TESTS: &[&str] = &[
    "wire::mixed",
    "wire::via_device",
    "a_namespace_that_ends_is_reported",
    "a_restart_cuts_nothing",
    "corruption_heals",
    "foreign_objects_are_untouched",
    "the_way_out_is_masqueraded",
];
/// A machine without KVM boots in 10 s and runs these tests in a minute or two.
const DEADLINE: Duration = Duration::from_secs(600);

/// Runs an integration test in every kernel, all at once: the cases that `filter` names, else
/// [`TESTS`].
pub(crate) fn run(test: &str, filter: Option<&str>) -> Result<()> {
    let dir = fs::canonicalize(".")?.join("target/vm");
    fs::create_dir_all(&dir)?;
    let tests = executables(test)?;
    ensure!(!tests.is_empty(), "no integration test {test:?} found");
    let mut kernels = Vec::new();
    for (series, prefix) in KERNELS {
        match Kernel::fetch(&dir, series, prefix)? {
            Some(kernel) => kernels.push(kernel),
            None => println!("vm {series}: skipped, this Debian release has no {prefix}* package"),
        }
    }
    let results: Vec<_> = thread::scope(|scope| {
        let (dir, tests) = (&dir, &tests);
        let run = |kernel| scope.spawn(move || run_in(dir, kernel, tests, filter));
        let threads: Vec<_> = kernels.iter().map(run).collect();
        let panicked = |_| Err(anyhow!("a thread that runs a kernel panicked"));
        threads.into_iter().map(|t| t.join().unwrap_or_else(panicked)).collect()
    });
    let failures: Vec<_> =
        results.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

fn run_in(dir: &Path, kernel: &Kernel, tests: &[PathBuf], filter: Option<&str>) -> Result<()> {
    let Kernel { series, release, .. } = kernel;
    println!("vm {series}: booting {release}");
    let start = Instant::now();
    let initrd = initramfs(dir, kernel, tests, filter)?;
    let result = boot(dir, kernel, &initrd, tests.len());
    println!("vm {series}: {} s", start.elapsed().as_secs());
    let cases = result?;
    // The names above may have got stale.
    ensure!(filter.is_some() || cases >= TESTS.len(), "only {cases} tests ran in {series}");
    Ok(())
}

/// Builds the integration tests of a name and lists them.
fn executables(test: &str) -> Result<Vec<PathBuf>> {
    let output = cargo(&["test", "--workspace", "--no-run", "--test", test])
        .output()
        .context("running cargo")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "the tests do not build:\n{text}");
    // `  Executable tests/engine.rs (target/debug/deps/engine-0123456789abcdef)`
    Ok(text
        .lines()
        .filter(|line| line.trim_start().starts_with("Executable"))
        .filter_map(|line| Some(line.rsplit_once('(')?.1.trim_end_matches(')').into()))
        .collect())
}

struct Kernel {
    series: &'static str,
    release: String,
    root: PathBuf,
}

impl Kernel {
    /// Downloads and unpacks the newest image of a series, once.
    fn fetch(dir: &Path, series: &'static str, prefix: &str) -> Result<Option<Self>> {
        let pattern = format!("^{}[0-9].*-amd64$", prefix.replace('.', r"\."));
        let found = text("apt-cache", &["search", "--names-only", &pattern])?;
        let newest = found
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| !["cloud", "rt-", "dbg", "unsigned"].iter().any(|w| name.contains(w)))
            .max_by_key(|name| version_key(name));
        let Some(package) = newest else { return Ok(None) };
        let release = package.trim_start_matches("linux-image-").to_owned();
        let root = dir.join(&release);
        if !root.join("done").exists() {
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(&root)?;
            quiet(Command::new("apt-get").args(["download", package]).current_dir(&root))
                .with_context(|| format!("downloading {package}"))?;
            let deb = fs::read_dir(&root)?
                .filter_map(Result::ok)
                .map(|entry| entry.path())
                .find(|path| path.extension().is_some_and(|e| e == "deb"))
                .context("apt-get downloaded no package")?;
            quiet(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
            fs::remove_file(deb)?;
            // Releases with a merged /usr keep the modules there.
            if !root.join("lib").exists() {
                std::os::unix::fs::symlink("usr/lib", root.join("lib"))?;
            }
            quiet(Command::new("depmod").arg("-b").arg(&root).arg(&release))?;
            fs::write(root.join("done"), "")?;
        }
        Ok(Some(Self { series, release, root }))
    }

    /// The files of a module and all that it needs, in loading order.
    fn module_files(&self, module: &str) -> Result<Vec<PathBuf>> {
        let root = self.root.to_string_lossy();
        let args = ["-d", &root, "-S", &self.release, "--show-depends", module];
        // A module that this kernel has built in, or does not know, is no file.
        let Ok(out) = text("modprobe", &args) else { return Ok(Vec::new()) };
        Ok(out
            .lines()
            .filter_map(|line| Some(line.strip_prefix("insmod ")?.trim().into()))
            .collect())
    }
}

/// Numbers compare as numbers: 6.12.107 is newer than 6.12.99.
fn version_key(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn text(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("running {program}: is it installed? `cargo xtask setup`"))?;
    ensure!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn quiet(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Copies a program and its libraries to the same paths under `root`.
fn copy_with_libraries(program: &Path, to: &Path, root: &Path) -> Result<()> {
    copy(program, &root.join(to))?;
    let Ok(list) = text("ldd", &[&program.to_string_lossy()]) else { return Ok(()) };
    for word in list.split_whitespace().filter(|word| word.starts_with('/')) {
        let inside = root.join(word.trim_start_matches('/'));
        if !inside.exists() {
            copy(Path::new(word), &inside)?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}

fn initramfs(
    dir: &Path,
    kernel: &Kernel,
    tests: &[PathBuf],
    filter: Option<&str>,
) -> Result<PathBuf> {
    let root = dir.join(format!("initramfs-{}", kernel.release));
    let _ = fs::remove_dir_all(&root);
    for sub in ["bin", "dev", "proc", "sys", "run", "tmp", "tests", "modules", "var/lib", "etc"] {
        fs::create_dir_all(root.join(sub))?;
    }
    copy(&which("busybox")?, &root.join("bin/busybox"))?;
    for tool in TOOLS {
        let path = which(tool)?;
        copy_with_libraries(&path, Path::new("usr/sbin").join(tool).as_path(), &root)?;
    }
    // Busybox's own shell would run its applets instead of these tools.
    copy_with_libraries(&which("dash")?, Path::new("usr/sbin/sh"), &root)?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for module in MODULES {
        for file in kernel.module_files(module)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if seen.insert(name.clone()) {
                let inside = root.join("modules").join(&name);
                copy(&file, &inside)?;
                if let Some(plain) = name.strip_suffix(".xz") {
                    quiet(Command::new("xz").arg("-d").arg(&inside))?;
                    order.push(plain.to_owned());
                } else {
                    order.push(name);
                }
            }
        }
    }
    for (index, test) in tests.iter().enumerate() {
        let name = test.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.rsplit_once('-').map_or(&*name, |(stem, _)| stem);
        let inside = PathBuf::from(format!("tests/{index:02}-{stem}"));
        copy_with_libraries(test, &inside, &root)?;
        // Debug information is most of the size, and a guest without KVM unpacks it slowly.
        quiet(Command::new("strip").arg("--strip-debug").arg(root.join(&inside)))?;
    }
    fs::write(root.join("init"), init_script(&order, filter))?;
    quiet(Command::new("chmod").arg("-R").arg("a+rx").arg(&root))?;
    let image = dir.join(format!("initramfs-{}.cpio.gz", kernel.release));
    let pack = format!(
        "cd {} && find . | cpio --quiet -o -H newc | gzip -1 > {}",
        root.display(),
        image.display()
    );
    quiet(Command::new("sh").arg("-c").arg(pack))?;
    Ok(image)
}

fn which(program: &str) -> Result<PathBuf> {
    for dir in ["/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        let path = Path::new(dir).join(program);
        if path.exists() {
            return Ok(path);
        }
    }
    bail!("{program} is not installed: `cargo xtask setup` installs it")
}

fn init_script(modules: &[String], filter: Option<&str>) -> String {
    let load: String = modules
        .iter()
        .map(|m| format!("insmod /modules/{m} || echo \"no module {m}\"\n"))
        .collect();
    let filter = filter.map_or_else(|| TESTS.join(" "), |filter| format!("'{filter}'"));
    format!(
        r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/bin HOME=/ RUST_BACKTRACE=1 MESH_TEST_VM=1
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t bpf bpf /sys/fs/bpf
mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo 1 > /proc/sys/net/core/bpf_jit_enable
dmesg -n 1
{load}ip link set lo up
echo "VM-KERNEL $(uname -r)"
for test in /tests/*; do
  $test --test-threads=2 {filter} 2>&1
  echo "VM-RESULT $test $?"
done
poweroff -f
"#
    )
}

/// How many processors a guest has: as many as there are, shared by the kernels, within reason.
fn cpus() -> String {
    let all = thread::available_parallelism().map_or(1, usize::from);
    (all / KERNELS.len()).clamp(1, 2).to_string()
}

/// Boots, shows what the guest prints, and judges its results. Returns how many tests passed.
fn boot(dir: &Path, kernel: &Kernel, initrd: &Path, tests: usize) -> Result<usize> {
    let log_path = dir.join(format!("{}.log", kernel.release));
    let mut log = fs::File::create(&log_path)?;
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-M", "q35", "-cpu", "qemu64", "-accel", "tcg,thread=multi", "-smp", &cpus()])
        .args(["-m", "3072", "-nographic", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(kernel.root.join(format!("boot/vmlinuz-{}", kernel.release)))
        .arg("-initrd")
        .arg(initrd)
        // Without KVM on a busy machine the guest's timer may be late, and its kernel would panic.
        .args(["-append", "console=ttyS0 panic=-1 quiet no_timer_check"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("starting qemu-system-x86_64: `cargo xtask setup` installs it")?;
    let stdout = child.stdout.take().context("qemu has no standard output")?;
    let (lines, received) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let start = Instant::now();
    let deadline = start + DEADLINE;
    let mut heard = Heard::default();
    let late = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match received.recv_timeout(left) {
            Ok(line) => {
                writeln!(log, "[{:6.1}] {line}", start.elapsed().as_secs_f32())?;
                if heard.line(&line) {
                    println!("  {}: {line}", kernel.series);
                }
            }
            Err(error) => break error == RecvTimeoutError::Timeout,
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    println!("  {}: {} tests passed", kernel.series, heard.cases);
    let Heard { passed, failed, .. } = &heard;
    if failed.is_empty() && *passed == tests {
        return Ok(heard.cases);
    }
    for line in heard.why() {
        println!("  {}: {line}", kernel.series);
    }
    bail!(
        "kernel {}: {passed} of {tests} test programs passed, failed: {failed:?}{}; \
         the guest's whole output is in {}",
        kernel.release,
        if late { format!(", ended after {} s", DEADLINE.as_secs()) } else { String::new() },
        log_path.display()
    )
}

/// How many lines tell why a guest failed.
const WHY: usize = 150;

/// What a guest said.
#[derive(Default)]
struct Heard {
    /// Test programs that passed, and names of those that did not.
    passed: usize,
    failed: Vec<String>,
    /// Tests that passed.
    cases: usize,
    /// What the tests that failed printed: between `failures:` and `test result:`.
    failures: Vec<String>,
    /// Whether more of that is to come.
    in_failures: bool,
    /// The newest lines.
    tail: VecDeque<String>,
}

impl Heard {
    /// Takes a line; whether to show it at once.
    fn line(&mut self, line: &str) -> bool {
        if self.tail.len() == WHY / 5 {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
        if line.starts_with("test result:") {
            self.in_failures = false;
        } else if self.in_failures || line == "failures:" {
            self.in_failures = true;
            self.failures.push(line.to_owned());
            return false;
        }
        let result = line.split_once("VM-RESULT ").and_then(|(_, rest)| rest.rsplit_once(' '));
        match result {
            Some((_, "0")) => self.passed += 1,
            Some((test, _)) => self.failed.push(test.to_owned()),
            None if line.starts_with("test ") || line.contains("VM-KERNEL") => {
                self.cases += usize::from(line.ends_with(" ok"));
                return true;
            }
            None => {}
        }
        false
    }

    /// Why it failed: the output of the tests that did, or what came last if the guest ended, or
    /// was ended, before they could say. A panic's message is near the beginning.
    fn why(&self) -> Vec<String> {
        if self.failures.is_empty() {
            return self.tail.iter().cloned().collect();
        }
        let left_out = self.failures.len().saturating_sub(WHY);
        let mut why: Vec<_> = self.failures.iter().take(WHY).cloned().collect();
        if left_out > 0 {
            why.push(format!("({left_out} more lines)"));
        }
        why
    }
}

#[cfg(test)]
mod tests {
    use super::{Heard, WHY};

    fn heard(text: &str) -> (Heard, Vec<&str>) {
        let mut heard = Heard::default();
        let shown = text.lines().filter(|line| heard.line(line)).collect();
        (heard, shown)
    }

    #[test]
    fn a_failing_test_is_quoted() {
        let (heard, shown) = heard(
            "VM-KERNEL 6.1\n\nrunning 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n\
             ---- b stdout ----\nscene: 3 s\ntest tube broke\n\nfailures:\n    b\n\n\
             test result: FAILED. 1 passed; 1 failed\n\nVM-RESULT /tests/00-kernel 101\nbye",
        );
        assert_eq!((heard.passed, heard.cases), (0, 1));
        assert_eq!(heard.failed, ["/tests/00-kernel"]);
        assert_eq!(shown.len(), 4, "{shown:?}");
        let why = heard.why().join("\n");
        assert!(why.contains("---- b stdout ----\nscene: 3 s\ntest tube broke"), "{why}");
        assert!(!why.contains("bye") && !why.contains("test a"), "{why}");
    }

    #[test]
    fn what_came_last_is_shown_of_a_guest_that_died() {
        let (heard, _) = heard("VM-KERNEL 6.1\ntest a ... ok\nKernel panic");
        assert_eq!(heard.why().last().map(String::as_str), Some("Kernel panic"));
    }

    #[test]
    fn long_output_is_cut() {
        let (heard, _) = heard(&format!("failures:\n{}", "line\n".repeat(1000)));
        assert_eq!(heard.why().len(), WHY + 1);
        assert!(heard.why()[WHY].contains("851 more"));
    }
}
