//! `meshd config` as a program: what wins over what, what it says of mistakes; and that the files
//! in `dist/` fit this meshd.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Gone when dropped.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = env::temp_dir().join(format!("meshd-{}-{name}.toml", std::process::id()));
        fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Exit status, standard output and standard error.
fn meshd(args: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut meshd = Command::new(env!("CARGO_BIN_EXE_meshd"));
    let variables = variables.iter().copied();
    let output = meshd.args(args).env_clear().envs(variables).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Value and place of a key as `config check` has them.
fn setting(settings: &Value, key: &str) -> (String, String, String) {
    let found = settings.as_array().unwrap().iter().find(|s| s["key"] == key).unwrap();
    let text = |field: &str| found[field].as_str().unwrap_or("-").to_owned();
    (text("value"), text("source"), text("where"))
}

#[test]
fn flags_override_variables_and_these_the_file() {
    let text = "dns_ttl = 1\ndns_rate_limit = 1\nconntrack_entries = 2048\n\
                vxlan_via_device = true\nnode_name = 'file'\n";
    let file = File::new("precedence", text);
    let path = file.0.to_str().unwrap();
    let variables = [("MESH_DNS_TTL", "2"), ("MESH_DNS_RATE_LIMIT", "2"), ("MESH_CONFIG", path)];
    let args =
        ["config", "check", "--format", "json", "--dns-ttl", "3", "--vxlan-via-device=false"];
    let (status, out, err) = meshd(&args, &variables);
    assert_eq!(status, Some(0), "{err}");
    let settings: Value = serde_json::from_str(&out).unwrap();
    let owned = |value: &str, source: &str, place: &str| {
        (value.to_owned(), source.to_owned(), place.to_owned())
    };
    assert_eq!(setting(&settings, "dns_ttl"), owned("3", "flag", "--dns-ttl"));
    let expected = owned("2", "environment", "MESH_DNS_RATE_LIMIT");
    assert_eq!(setting(&settings, "dns_rate_limit"), expected);
    assert_eq!(setting(&settings, "node_name"), owned("file", "file", &format!("{path}:5")));
    let expected = owned("false", "flag", "--vxlan-via-device");
    assert_eq!(setting(&settings, "vxlan_via_device"), expected);
    assert_eq!(setting(&settings, "state_dir"), owned("/var/lib/mesh", "default", "-"));
    assert_eq!(setting(&settings, "uplink"), owned("-", "default", "-"));
    // The same for people, with the file named.
    let (_, out, _) = meshd(&["config", "check", path], &[]);
    let row = out.lines().find(|line| line.starts_with("conntrack_entries ")).unwrap();
    let words: Vec<_> = row.split_whitespace().collect();
    assert_eq!(words, ["conntrack_entries", "2048", &format!("{path}:3")]);
}

#[test]
fn mistakes_are_told_and_the_daemon_does_not_start() {
    let file = File::new("mistakes", "dns_tll = 5\nconntrack_entries = 1\n");
    let path = file.0.to_str().unwrap();
    let range = "invalid value '1': 1 is not in 1024..=16777216";
    let expected = format!(
        "meshd: {path}:1: `dns_tll`: no such key; did you mean `dns_ttl`?\n\
         meshd: {path}:2: `conntrack_entries`: {range}\n"
    );
    for args in [&["config", "check", path][..], &["--config", path]] {
        let (status, out, err) = meshd(args, &[]);
        assert_eq!((status, &*out, &*err), (Some(1), "", &*expected));
    }
    let (status, _, err) = meshd(&["--config", "/nonexistent.toml"], &[]);
    assert_eq!(status, Some(1));
    assert!(err.contains("cannot read the configuration /nonexistent.toml"), "{err}");
    // What came together does not fit: told with where it comes from.
    let file = File::new("families", "advertise_addr = '10.0.0.1'\n");
    let args = ["config", "check", file.0.to_str().unwrap(), "--data-path-addr", "fd00::1"];
    let (status, _, err) = meshd(&args, &[]);
    assert_eq!(status, Some(1));
    assert!(err.starts_with("meshd: --data-path-addr: `data_path_addr`: "), "{err}");
    let args = ["config", "check", "/dev/null", "--socket-group", "no-such-group"];
    let (status, _, err) = meshd(&args, &[]);
    assert!(status == Some(1) && err.contains("no group `no-such-group`"), "{err}");
}

fn dist(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist").join(name)
}

/// The unit's daemon is this one: it has each flag there. systemd reads the unit without a word,
/// where there is a systemd.
#[test]
fn the_unit_fits() {
    let unit = fs::read_to_string(dist("meshd.service")).unwrap();
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let (_, help, _) = meshd(&["--help"], &[]);
    for flag in start.split_whitespace().filter(|word| word.starts_with("--")) {
        assert!(help.contains(&format!("{flag} ")), "meshd has no {flag}");
    }
    // Tasks, shims and the resolver must outlive the daemon.
    assert!(unit.contains("\nKillMode=process\n"));
    let exe = env!("CARGO_BIN_EXE_meshd");
    let copy = env::temp_dir().join(format!("meshd-{}.service", std::process::id()));
    fs::write(&copy, unit.replace("ExecStart=/usr/bin/meshd", &format!("ExecStart={exe}")))
        .unwrap();
    let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output();
    let _ = fs::remove_file(&copy);
    if let Ok(output) = verified {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let ours: Vec<_> = said.lines().filter(|line| line.contains("meshd")).collect();
        assert!(output.status.success() && ours.is_empty(), "{said}");
    }
    // The group that the daemon looks for is the one that is made.
    let group = fs::read_to_string(dist("mesh.sysusers.conf")).unwrap();
    assert!(group.lines().any(|line| line.split_whitespace().take(2).eq(["g", "mesh"])));
}
