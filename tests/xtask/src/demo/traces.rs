//! What a lab could leave on the host.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::Result;

use super::LAB;
use crate::shell::output;

/// As lines to compare.
#[derive(Debug)]
pub(super) struct Traces(BTreeSet<String>);

impl Traces {
    pub(super) fn now() -> Result<Self> {
        let mut lines = BTreeSet::new();
        for (kind, program, args) in [
            ("link", "ip", &["-br", "link"][..]),
            ("route", "ip", &["route", "show", "table", "all"]),
            ("rule", "ip", &["rule"]),
            ("namespace", "ip", &["netns"]),
            ("nft", "nft", &["list", "tables"]),
        ] {
            let listed = output(program, args)?;
            // Counters of a link's state are no trace; its name is.
            let name = |line: &str| if kind == "link" { first_word(line) } else { line.to_owned() };
            lines.extend(listed.lines().map(|line| format!("{kind} {}", name(line))));
        }
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            lines.insert(format!("mount {}", line.split(' ').nth(4).unwrap_or_default()));
        }
        lines.extend(directories(Path::new("/sys/fs/cgroup/mesh")));
        lines.extend(directories(Path::new("/sys/fs/bpf/mesh")));
        // Hybrid machines have one for each hierarchy.
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            lines.extend(directories(&hierarchy.path().join("mesh")));
        }
        for path in ["/run/mesh-lab", "/var/lib/mesh-lab"].map(|root| Path::new(root).join(LAB)) {
            if path.exists() {
                lines.insert(format!("files {}", path.display()));
            }
        }
        lines.extend(processes()?);
        Ok(Self(lines))
    }

    /// What is here and was not there before, but for what belongs to labs of others: they come
    /// and go as they please.
    pub(super) fn beyond(&self, before: &Self) -> Vec<String> {
        let others = other_labs();
        let ours = |line: &&String| !others.iter().any(|lab| is_of(line, lab));
        self.0.difference(&before.0).filter(ours).cloned().collect()
    }
}

/// Labs that are up beside the demo's.
fn other_labs() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/mesh-lab") else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name != LAB).collect()
}

/// Whether a line names something of a lab: a path below its name, or its namespaces, `LAB-NODE`.
fn is_of(line: &str, lab: &str) -> bool {
    line.split(['/', ' '])
        .any(|part| part == lab || part.strip_prefix(lab).is_some_and(|rest| rest.starts_with('-')))
}

fn first_word(line: &str) -> String {
    line.split_whitespace().next().unwrap_or_default().to_owned()
}

fn directories(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let below = entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| p.is_dir());
    let mut all = vec![format!("directory {}", root.display())];
    all.extend(below.flat_map(|path| directories(&path)));
    all
}

/// Processes that have to do with the lab, by their command line.
fn processes() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.filter_map(Result::ok) {
        let Ok(command) = fs::read(entry.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(&format!("/mesh-lab/{LAB}/")) {
            found.push(format!("process {}", command.trim()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::is_of;

    #[test]
    fn what_belongs_to_another_lab_is_told_by_its_name() {
        for line in [
            "directory /sys/fs/bpf/mesh/mine/m1/v1",
            "namespace mine-w1",
            "mount /run/netns/mine-m1",
        ] {
            assert!(is_of(line, "mine"), "{line}");
            assert!(!is_of(line, "min"), "{line}");
            assert!(!is_of(line, "demo"), "{line}");
        }
    }
}
