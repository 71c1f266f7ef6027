//! What is wrong with a lab's underlay on purpose: partitions and bad links.
//!
//! All of it is one value, remembered in the lab's record. What drops is one table of the bridge
//! family in the router's namespace, made anew from the whole value in one transaction: the switch
//! sees every frame of every node, ARP and VXLAN too, and ports are matched by name, so that a node
//! that crashes and comes back is still cut off. What delays is a queueing discipline at each end
//! of the node's link; both go with the link, and are set again when it returns.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    process::{Command, Stdio},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    topology::{CLIENT, CLIENT6, Member},
    wire::{self, UPLINK},
};

/// The table that drops.
const TABLE: &str = "bridge mesh-lab-faults";
/// A burst that a rate limit lets through, bytes: two jumbo frames.
const BURST: u32 = 32 << 10;
/// How long a packet may wait for its turn at a limited rate.
const LATENCY: &str = "50ms";
/// Packets that a delayed link holds: 1 s at 100,000 a second.
const HELD_MAX: &str = "100000";
/// What makes one packet of many, or many of one: off while a link is impaired.
const OFFLOADS: [&str; 4] = [
    "tcp-segmentation-offload",
    "generic-segmentation-offload",
    "generic-receive-offload",
    "tx-udp-segmentation",
];

/// A share of packets, in parts of a million; read from `5%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share(u32);

impl Share {
    /// As nft and tc want it.
    const ALL: u32 = 1_000_000;
}

impl FromStr for Share {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || format!("{text:?} is no share of packets: say 5% or 0.1%, at most 100%");
        let number: f64 =
            text.strip_suffix('%').and_then(|n| n.parse().ok()).with_context(wrong)?;
        ensure!((0.0..=100.0).contains(&number), wrong());
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 100 was checked"
        )]
        Ok(Self((number * 1e4).round() as u32))
    }
}

/// A number with one of some units at its end, in the smallest unit.
fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let (_, times) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*times)
}

/// A time, read from `20ms`.
///
/// # Errors
/// When it is none, or over a minute.
pub fn parse_delay(text: &str) -> Result<Duration> {
    let micros = with_unit(text, &[("us", 1), ("ms", 1000), ("s", 1_000_000)]);
    match micros.map(Duration::from_micros) {
        Some(delay) if delay <= Duration::from_secs(60) => Ok(delay),
        _ => bail!("{text:?} is no delay: say 500us, 20ms or 1s, at most 60s"),
    }
}

/// Bits per second, read from `100mbit`.
///
/// # Errors
/// When it is none.
pub fn parse_rate(text: &str) -> Result<u64> {
    let units = [("bit", 1), ("kbit", 1000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)];
    match with_unit(text, &units) {
        Some(rate) if rate >= 8000 => Ok(rate),
        _ => bail!("{text:?} is no rate: say 500kbit, 100mbit or 1gbit, at least 8kbit"),
    }
}

/// What is wrong with a link, in each direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Impairment {
    /// Packets dropped.
    pub loss: Option<Share>,
    /// How much later packets come.
    pub delay: Option<Duration>,
    /// How much the delay varies.
    pub jitter: Option<Duration>,
    /// Packets that overtake the delayed ones.
    pub reorder: Option<Share>,
    /// Packets that come twice.
    pub duplicate: Option<Share>,
    /// Bits per second at most.
    pub rate: Option<u64>,
}

impl Impairment {
    fn needs_netem(&self) -> bool {
        let Self { loss: _, delay, jitter, reorder, duplicate, rate: _ } = self;
        delay.is_some() || jitter.is_some() || reorder.is_some() || duplicate.is_some()
    }

    /// Says what makes no sense, or cannot be done on this machine.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { loss, delay, jitter, reorder, duplicate: _, rate } = self;
        ensure!(
            self.needs_netem() || loss.is_some() || rate.is_some(),
            "say what is to be wrong: --loss, --delay, --jitter, --reorder, --duplicate or --rate"
        );
        ensure!(
            delay.is_some() || (jitter.is_none() && reorder.is_none()),
            "--jitter and --reorder need --delay: packets overtake only what waits"
        );
        if self.needs_netem() {
            wire::probe(|| tc(&["qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]))
                .context(
                    "--delay, --jitter, --reorder and --duplicate need netem, which this kernel \
                     lacks (CONFIG_NET_SCH_NETEM; try: modprobe sch_netem). --loss and --rate \
                     work without. Nothing was changed",
                )?;
        } else if rate.is_some() {
            let tbf = ["qdisc", "add", "dev", "lo", "root", "tbf"];
            let limit = ["rate", "1mbit", "burst", "32k", "latency", LATENCY];
            wire::probe(|| tc(&[&tbf[..], &limit].concat())).context(
                "--rate needs tbf, which this kernel lacks (CONFIG_NET_SCH_TBF; try: modprobe \
                 sch_tbf). Nothing was changed",
            )?;
        }
        Ok(())
    }

    /// The queueing discipline at each end of the link, as tc wants it; loss is the table's.
    fn discipline(&self) -> Option<String> {
        let Self { loss: _, delay, jitter, reorder, duplicate, rate } = self;
        if !self.needs_netem() {
            let rate = (*rate)?;
            return Some(format!("tbf rate {rate}bit burst {BURST} latency {LATENCY}"));
        }
        let percent = |share: &Share| f64::from(share.0) / 1e4;
        let mut netem = format!("netem limit {HELD_MAX}");
        if let Some(delay) = delay {
            netem += &format!(" delay {}us", delay.as_micros());
            if let Some(jitter) = jitter {
                netem += &format!(" {}us", jitter.as_micros());
            }
        }
        if let Some(share) = reorder {
            netem += &format!(" reorder {}%", percent(share));
        }
        if let Some(share) = duplicate {
            netem += &format!(" duplicate {}%", percent(share));
        }
        if let Some(rate) = rate {
            netem += &format!(" rate {rate}bit");
        }
        Some(netem)
    }
}

/// Groups of machines that do not reach each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Partition {
    groups: Vec<Vec<String>>,
    one_way: bool,
}

impl Partition {
    /// Checks the names against the machines that there are.
    pub(crate) fn new(groups: &[Vec<String>], one_way: bool, members: &[Member]) -> Result<Self> {
        ensure!(
            groups.len() >= 2,
            "a partition has two groups or more, each a list such as m1,w1; who is in none \
             reaches all"
        );
        let mut seen: Vec<(&str, usize)> = Vec::new();
        for (number, group) in groups.iter().enumerate() {
            ensure!(!group.is_empty(), "a group of a partition is empty");
            for name in group {
                let list: Vec<_> = members.iter().map(|member| member.name.as_str()).collect();
                ensure!(
                    list.contains(&name.as_str()),
                    "the lab has no machine {name:?}; it has {}. Nothing was changed",
                    list.join(", ")
                );
                ensure!(
                    !seen.iter().any(|(other, _)| other == name),
                    "{name} is named twice. Nothing was changed"
                );
                seen.push((name, number));
            }
        }
        let group_of = |name: &str| seen.iter().find(|(other, _)| *other == name).map(|s| s.1);
        if let (Some(client), Some(router)) = (group_of("client"), group_of("router")) {
            ensure!(
                client == router,
                "the client is behind the router: put both into one group. Nothing was changed"
            );
        }
        Ok(Self { groups: groups.to_vec(), one_way })
    }

    /// Pairs of machines of which the second gets nothing from the first.
    fn cuts(&self) -> impl Iterator<Item = (&str, &str)> {
        let Self { groups, one_way } = self;
        let pairs = groups.iter().enumerate().flat_map(move |(i, from)| {
            let others = groups.iter().enumerate();
            others
                .filter(move |(j, _)| i != *j && (!one_way || i == 0))
                .map(move |(_, to)| (from, to))
        });
        pairs.flat_map(|(from, to)| {
            from.iter().flat_map(move |a| to.iter().map(move |b| (a.as_str(), b.as_str())))
        })
    }
}

/// All that is wrong on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Faults {
    pub(crate) partition: Option<Partition>,
    pub(crate) impaired: BTreeMap<String, Impairment>,
    /// Offloads that were on, of the node's end and of the switch's.
    #[serde(default)]
    pub(crate) offloads: BTreeMap<String, [Vec<String>; 2]>,
}

impl Faults {
    /// A node is gone for good.
    pub(crate) fn forget(&mut self, node: &str) {
        self.impaired.remove(node);
        self.offloads.remove(node);
        if let Some(partition) = &mut self.partition {
            for group in &mut partition.groups {
                group.retain(|name| name != node);
            }
        }
    }

    /// The script that makes the table what it should be, or takes it away.
    fn script(&self) -> String {
        let Self { partition, impaired, offloads: _ } = self;
        let (mut forward, mut input, mut output) = (Vec::new(), Vec::new(), Vec::new());
        for cut in partition.iter().flat_map(Partition::cuts) {
            // What the router's own stack sends or gets is its own or the client's.
            match cut {
                ("router", to) => output.push(format!("oifname {to:?} drop")),
                (from, "router") => input.push(format!("iifname {from:?} drop")),
                ("client", to) => output.extend([
                    format!("oifname {to:?} ip saddr {CLIENT} drop"),
                    format!("oifname {to:?} ip6 saddr {CLIENT6} drop"),
                ]),
                (from, "client") => input.extend([
                    format!("iifname {from:?} ip daddr {CLIENT} drop"),
                    format!("iifname {from:?} ip6 daddr {CLIENT6} drop"),
                ]),
                (from, to) => forward.push(format!("iifname {from:?} oifname {to:?} drop")),
            }
        }
        let (mut prerouting, mut postrouting) = (Vec::new(), Vec::new());
        for (node, impairment) in impaired {
            if let Some(Share(loss)) = impairment.loss {
                let dice = format!("numgen random mod {} < {loss} drop", Share::ALL);
                prerouting.push(format!("iifname {node:?} {dice}"));
                postrouting.push(format!("oifname {node:?} {dice}"));
            }
        }
        // Declared first: the deletion is good whether or not it is there.
        let mut script = format!("table {TABLE}\ndelete table {TABLE}\n");
        let chains = [
            ("prerouting", prerouting),
            ("input", input),
            ("forward", forward),
            ("output", output),
            ("postrouting", postrouting),
        ];
        if chains.iter().all(|(_, rules)| rules.is_empty()) {
            return script;
        }
        script += &format!("table {TABLE} {{\n");
        for (hook, rules) in chains.iter().filter(|(_, rules)| !rules.is_empty()) {
            script += &format!("chain {hook} {{\ntype filter hook {hook} priority 0;\n");
            script += &rules.join("\n");
            script += "\n}\n";
        }
        script + "}\n"
    }

    /// Makes the switch drop what it should.
    pub(crate) fn apply(&self, router: &File) -> Result<()> {
        let script = self.script();
        wire::on_thread_in(router, || {
            fed(Command::new("nft").args(["-f", "-"]), &script)
                .map(drop)
                .context("set what the underlay switch drops")
        })
    }

    /// Makes a node's link as bad as it should be. `offloads` remembers what was on before.
    pub(crate) fn impair_link(&mut self, router: &File, netns: &File, node: &str) -> Result<()> {
        let Some(impairment) = self.impaired.get(node) else { return Ok(()) };
        let discipline = impairment.discipline();
        let ends = [(netns, UPLINK), (router, node)];
        let mut were_on = [Vec::new(), Vec::new()];
        for ((end, link), were_on) in ends.into_iter().zip(&mut were_on) {
            *were_on = wire::on_thread_in(end, || {
                let on = offloads_on(link)?;
                set_offloads(link, &on, "off")?;
                // None there is no failure.
                let _ = tc(&["qdisc", "del", "dev", link, "root"]);
                if let Some(discipline) = &discipline {
                    let words = discipline.split(' ').collect::<Vec<_>>();
                    tc(&[&["qdisc", "add", "dev", link, "root"], words.as_slice()].concat())?;
                }
                Ok(on)
            })
            .with_context(|| format!("impair the link of {node}"))?;
        }
        // Of one that was impaired already, what was on before that counts.
        self.offloads.entry(node.to_owned()).or_insert(were_on);
        Ok(())
    }

    /// Makes a node's link good again.
    pub(crate) fn clear_link(&mut self, router: &File, netns: &File, node: &str) -> Result<()> {
        if self.impaired.remove(node).is_none() {
            return Ok(());
        }
        let were_on = self.offloads.remove(node).unwrap_or_default();
        let ends = [(netns, UPLINK), (router, node)];
        for ((end, link), were_on) in ends.into_iter().zip(&were_on) {
            wire::on_thread_in(end, || {
                let _ = tc(&["qdisc", "del", "dev", link, "root"]);
                set_offloads(link, were_on, "on")
            })
            .with_context(|| format!("clear the link of {node}"))?;
        }
        Ok(())
    }
}

/// The offloads of a link, in the calling thread's namespace, that are on and can be changed.
fn offloads_on(link: &str) -> Result<Vec<String>> {
    let listed = fed(Command::new("ethtool").args(["-k", link]), "")?;
    let on = |name: &&&str| listed.lines().any(|line| line.trim() == format!("{name}: on"));
    Ok(OFFLOADS.iter().filter(on).map(|&name| name.to_owned()).collect())
}

fn set_offloads(link: &str, names: &[String], state: &str) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let settings = names.iter().flat_map(|name| [name.as_str(), state]);
    fed(Command::new("ethtool").args(["-K", link]).args(settings), "").map(drop)
}

fn tc(words: &[&str]) -> Result<()> {
    fed(Command::new("tc").args(words), "").map(drop)
}

/// Runs a command on `input` in the calling thread's namespace, and gives what it printed.
fn fed(command: &mut Command, input: &str) -> Result<String> {
    let shown = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("the program `{shown}` is missing: install it (`cargo xtask setup` does)")
        }
        other => other.with_context(|| format!("start {shown}"))?,
    };
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {shown}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{shown}: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Topology;

    fn partition(groups: &[&str], one_way: bool) -> Result<Partition> {
        let split = |group: &&str| group.split(',').map(str::to_owned).collect::<Vec<_>>();
        let groups: Vec<_> = groups.iter().map(split).collect();
        Partition::new(&groups, one_way, &Topology::default().members())
    }

    fn drops(groups: &[&str], one_way: bool) -> Vec<String> {
        let faults = Faults { partition: partition(groups, one_way).ok(), ..Faults::default() };
        let script = faults.script();
        script.lines().filter(|line| line.ends_with("drop")).map(str::to_owned).collect()
    }

    #[test]
    fn a_partition_drops_between_groups_and_nowhere_else() {
        assert_eq!(
            drops(&["m1,w1", "m2"], false),
            [
                r#"iifname "m1" oifname "m2" drop"#,
                r#"iifname "w1" oifname "m2" drop"#,
                r#"iifname "m2" oifname "m1" drop"#,
                r#"iifname "m2" oifname "w1" drop"#,
            ]
        );
        assert_eq!(
            drops(&["m1", "m2", "m3"], true),
            [r#"iifname "m1" oifname "m2" drop"#, r#"iifname "m1" oifname "m3" drop"#]
        );
        assert_eq!(drops(&["router", "m2"], true), [r#"oifname "m2" drop"#]);
        assert_eq!(drops(&["m1", "client"], true)[0], r#"iifname "m1" ip daddr 198.51.100.7 drop"#);
        let nothing = Faults::default().script();
        assert!(!nothing.contains('{'), "{nothing}");
    }

    #[test]
    fn bad_partitions_are_refused() {
        for (groups, word) in [
            (&["m1"][..], "two groups"),
            (&["m1", "m9"], "m9"),
            (&["m1", "m2,m1"], "twice"),
            (&["client", "router,m1"], "behind"),
            (&["m1", ""], "no machine"),
        ] {
            let said = partition(groups, false).unwrap_err().to_string();
            assert!(said.contains(word), "{groups:?}: {said}");
        }
    }

    #[test]
    fn shares_delays_and_rates() {
        assert_eq!("5%".parse::<Share>().unwrap(), Share(50_000));
        assert_eq!("0.01%".parse::<Share>().unwrap(), Share(100));
        for bad in ["5", "101%", "-1%", "%", "NaN%"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
        assert_eq!(parse_delay("20ms").unwrap(), Duration::from_millis(20));
        assert_eq!(parse_rate("100mbit").unwrap(), 100_000_000);
        for bad in ["", "20", "ms", "61s", "-1ms", "99999999999999999999s"] {
            assert!(parse_delay(bad).is_err(), "{bad}");
        }
        for bad in ["100", "100mb", "1bit", "99999999999gbit"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn netem_only_where_it_must_be() {
        let rate = Impairment { rate: Some(8_000_000), ..Impairment::default() };
        assert_eq!(rate.discipline().unwrap(), "tbf rate 8000000bit burst 32768 latency 50ms");
        let loss = Impairment { loss: Some(Share(10)), ..Impairment::default() };
        assert_eq!(loss.discipline(), None);
        let both = Impairment { delay: Some(Duration::from_millis(20)), ..rate };
        assert_eq!(both.discipline().unwrap(), "netem limit 100000 delay 20000us rate 8000000bit");
        assert!(Impairment::default().check().is_err());
        let jitter = Impairment { jitter: Some(Duration::from_millis(1)), ..loss };
        assert!(jitter.check().unwrap_err().to_string().contains("--delay"));
    }
}
