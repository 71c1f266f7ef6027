//! Kernel state is held level: what is changed by hand comes back, what is not ours stays.
//!
//! [`WAVES`] is the list of what is done to a node: every kind of kernel object of ours, damaged,
//! removed and copied. A wave's harms are done at once, so they are to different objects; each must
//! be counted, and the node's state as [`STATE`] prints it must be what it was within [`HEALED`].

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::group;
use crate::cluster::{Cluster, SOON, Task, eventually};

group!("heal": every_object_heals, flow_state_may_be_anything,
    foreign_objects_stay, a_restart_changes_nothing);

/// The contract: within this, everything is as it should be.
const HEALED: Duration = Duration::from_secs(2);

/// A task of `each` on `w1` and its peer on `w2`, with packets passing.
fn set_up(c: &Cluster) -> Result<(Task, Task)> {
    c.network("app")?;
    c.service("--name each --mode global --network app --publish 8080:80", crate::cluster::WHOAMI)?;
    let tasks = c.wait_running("each", 5)?;
    let on = |node: &str| tasks.iter().find(|t| t.node == node).cloned().context("no task there");
    let pair = (on("w1")?, on("w2")?);
    works(c, &pair)?;
    Ok(pair)
}

/// Everything that needs kernel state on `w1` passes.
fn works(c: &Cluster, (from, to): &(Task, Task)) -> Result<()> {
    let address = to.addresses.get("app").context("a task without an address")?;
    eventually("overlay, VIP, mesh and the way out", SOON, || {
        c.in_task(&from.id, &["ping", "-c1", "-W1", address])?.ok()?;
        c.fetch_in_task(&from.id, "http://each/")?;
        c.in_task(&from.id, &["ping", "-c1", "-W1", "198.51.100.7"])?.ok()?;
        c.fetch("client", "http://192.0.2.21:8080/")
    })?;
    Ok(())
}

fn sh(c: &Cluster, script: &str) -> Result<String> {
    c.on("w1", &["sh", "-c", script])?.ok()
}

/// Harms that are done together.
struct Wave {
    /// Whether links are made anew, or services find another slot: then entries that name them by
    /// number differ, and only how many there are is compared.
    remakes: bool,
    /// A shell command each; see [`Wounded::prelude`] for its words.
    harms: &'static [&'static str],
}

const fn keeps(harms: &'static [&'static str]) -> Wave {
    Wave { remakes: false, harms }
}

const fn remakes(harms: &'static [&'static str]) -> Wave {
    Wave { remakes: true, harms }
}

const WAVES: &[Wave] = &[
    // Links: attributes of both ends and of the tunnel's device.
    keeps(&["ip link set $E down", "n ip link set gw0 down", "ip link set mesh-vxlan down"]),
    keeps(&["ip link set $E mtu 1000", "n ip link set gw0 mtu 1000", "n ip link set lo down"]),
    keeps(&["n ip link set eth0 mtu 1000", "ip link set $G mtu 1000"]),
    keeps(&[
        "ip link set $E address 02:11:22:33:44:55",
        "n ip link set gw0 address 02:11:22:33:44:56",
        "ip link set mesh-vxlan mtu 1000",
    ]),
    keeps(&["ip link set $E alias ''", "n ip link set gw0 arp off", "n ip link set eth0 down"]),
    keeps(&["n ip link set eth0 address 02:11:22:33:44:57", "ip link set $G arp off"]),
    keeps(&[
        "ip link set mesh-vxlan alias ''",
        "ip link add bridge0 type bridge; ip link set $E master bridge0",
    ]),
    keeps(&["ip link del bridge0; ip link set $E address 02:11:22:33:44:55 alias ''"]),
    // Links: gone, renamed, moved, in another's place.
    remakes(&["ip link del $E", "ip link del mesh-vxlan"]),
    remakes(&["n ip link del eth0", "n ip link del gw0"]),
    remakes(&[
        "ip link set $E down; ip link set $E name lost0",
        "ip link set mesh-vxlan down; ip link set mesh-vxlan name lost1",
    ]),
    remakes(&[
        "n ip link set eth0 down; n ip link set eth0 name lost0",
        "n ip link set gw0 netns $HOST",
        "ip link del mesh-vxlan; ip link add mesh-vxlan type vxlan id 9 dstport 4789",
    ]),
    // Links: copies.
    keeps(&[
        "ip link add mv00000000ff type veth peer dup1; ip link set mv00000000ff alias mesh",
        "ip link add dup2 type veth peer dup3; \
         ip link set dup2 alias mesh address 02:00:00:00:00:00",
        "ip link add dup4 type vxlan external dstport 4790; ip link set dup4 alias mesh",
    ]),
    // Addresses, and what the kernel makes for them.
    keeps(&["n ip addr flush dev eth0", "n ip addr flush dev gw0", "n ip addr flush dev lo"]),
    keeps(&["ip addr add 10.9.9.9/24 dev $E", "ip addr add 10.9.8.9/24 dev mesh-vxlan"]),
    keeps(&["n ip route del $NET dev eth0", "n ip route del local $GW table local"]),
    keeps(&[
        "n ip route del local $ETH table local",
        "n ip route del local 127.0.0.0/8 table local",
    ]),
    // Routes.
    keeps(&["n ip route del default", "ip route del $GW"]),
    keeps(&["n ip route replace default dev eth0", "ip route replace $GW dev lo"]),
    keeps(&["n ip route replace blackhole default", "ip route replace blackhole $GW"]),
    keeps(&[
        "n ip route add default dev eth0 metric 5 proto 109",
        "ip route add $GW dev $G metric 7 proto 109",
        "ip route add 10.77.0.0/24 dev $G proto 109",
        "ip route add 10.78.0.1/32 dev $E proto 109",
    ]),
    // Neighbours.
    keeps(&[
        "ip neigh del $GW dev $G",
        "ip neigh add 10.9.9.1 lladdr 02:1:1:1:1:1 dev $G nud permanent",
    ]),
    keeps(&["ip neigh replace $GW lladdr 02:11:22:33:44:55 dev $G nud permanent"]),
    keeps(&["ip neigh replace $GW lladdr 02:11:22:33:44:55 dev $G nud stale"]),
    // Settings.
    keeps(&[
        "echo 0 > $NET4/ip_forward",
        "echo 1 > $NET4/conf/$G/rp_filter",
        "echo 0 > $NET6/conf/$E/disable_ipv6",
        "n sh -c \"echo 1 > $NET4/conf/all/rp_filter\"",
        "n sh -c \"echo 1 > $NET4/conf/gw0/rp_filter\"",
        "n sh -c \"echo 2 > $NET6/conf/eth0/accept_ra\"",
        "n sh -c \"echo 0 > $NET6/conf/eth0/disable_ipv6\"",
    ]),
    // The nft table.
    keeps(&["nft flush ruleset"]),
    keeps(&["nft delete table ip mesh"]),
    keeps(&["nft flush chain ip mesh forward; nft delete chain ip mesh forward"]),
    keeps(&["nft insert rule ip mesh postrouting accept"]),
    keeps(&["nft add rule ip mesh forward iifname '\"mv*\"' oifname '\"mv*\"' drop"]),
    keeps(&["nft add chain ip mesh more"]),
    // Maps: entries gone, corrupted, made up.
    keeps(&["bpftool map update pinned $PINS/maps/MAGLEV key $(slot) value 9 9 0 0 0 0 0 0"]),
    remakes(&[
        "erase ADDRESSES",
        "erase ENDPOINTS",
        "erase PORTS",
        "erase NODES",
        "erase VTEPS",
        "erase SERVICES",
        "erase PUBLISHED",
        "erase LOCAL_ADDRS",
    ]),
    remakes(&[
        "clobber ADDRESSES",
        "clobber ENDPOINTS",
        "clobber PORTS",
        "clobber NODES",
        "clobber VTEPS",
        "clobber SERVICES",
        "clobber PUBLISHED",
        "clobber LOCAL_ADDRS",
        "clobber CONFIG",
    ]),
    keeps(&[
        "invent ADDRESSES",
        "invent ENDPOINTS",
        "invent PORTS",
        "invent NODES",
        "invent VTEPS",
        "invent SERVICES",
        "invent PUBLISHED",
        "invent LOCAL_ADDRS",
    ]),
    // Programs: let go of, detached, replaced by another, attached twice.
    keeps(&[
        "rm $PINS/links/$E",
        "rm $PINS/links/$G",
        "rm $PINS/links/uplink",
        "rm $PINS/links/vxlan",
    ]),
    keeps(&[
        "bpftool link detach pinned $PINS/links/$E",
        "bpftool link detach pinned $PINS/links/uplink",
        "bpftool link detach pinned $PINS/links/vxlan",
        "n tc qdisc del dev lo clsact",
    ]),
    keeps(&[
        "rm $PINS/links/uplink; bpftool link pin id $(link_id vxlan) $PINS/links/uplink",
        "bpftool link pin id $(link_id $E) $PINS/links/mv00000000ff",
        "n tc filter del dev lo egress",
    ]),
    keeps(&["bpftool prog pin id $(program_of vxlan) $PINS/other; \
         n tc filter replace dev lo egress pref 28005 protocol all handle 1 \
         bpf da pinned $PINS/other; \
         rm $PINS/other"]),
    keeps(&[
        "bpftool prog pin id $(n tc filter show dev lo egress | grep -oE 'id [0-9]+' | cut -c4-) \
         $PINS/same; n tc filter add dev lo egress pref 7 protocol all bpf da pinned $PINS/same; \
         rm $PINS/same",
    ]),
    // Pins: gone, another's, all at once.
    keeps(&[
        "rm $PINS/maps/ADDRESSES",
        "rm $PINS/maps/ENDPOINTS",
        "rm $PINS/maps/PORTS",
        "rm $PINS/maps/NODES; bpftool map pin id $(map_id VTEPS) $PINS/maps/NODES",
        "rm $PINS/maps/SERVICES",
        "rm $PINS/maps/PUBLISHED",
        "rm $PINS/maps/LOCAL_ADDRS",
        "rm $PINS/maps/CONFIG",
        "rm $PINS/maps/MAGLEV",
        "rm $PINS/maps/COUNTERS",
        "rm $PINS/maps/FLOWS",
        "rm $PINS/maps/FLOWS_NEW",
        "rm $PINS/maps/VIP_CLIENTS",
    ]),
    keeps(&["rm $PINS/maps/VTEPS"]),
    keeps(&["rm -r $PINS/links", "rm -r $PINS/maps"]),
];

/// Maps that the programs fill themselves: they are not restored, and nothing in them may keep new
/// flows from passing. What is counted is no state.
const FLOW_STATE: [&str; 4] = ["FLOWS", "FLOWS_NEW", "VIP_CLIENTS", "COUNTERS"];

/// Prints what the kernel holds of ours on `w1` and in its task, without what differs from time to
/// time: numbers of links, and the VXLAN device's own MAC.
const STATE: &str = r#"
links() { sed -E 's/^[0-9]+: //; s/@[a-z0-9]+//; s/link-netns[a-z]* [^ ]+//
    s/ group .*qlen [0-9]+//
    s/(mesh-vxlan.*ether) [0-9a-f:]+/\1/' | grep -E "$1" | sort; }
dump() { bpftool -j map dump pinned $PINS/maps/$1 | sed 's/},{"key"/}\n{"key"/g' |
    tr -d '[]' | sort; }
ip -o link show | links '^(mv|mesh-|dup|lost)'; n ip -o link show | links .
ip -o -4 addr show | grep -oE '(mv|mesh-|dup|lost).*' || true
n ip -o -4 addr show | grep -oE '[a-z]+[0-9]* +inet [^ ]+'
ip -4 route show table all | grep -E '^(blackhole )?10\.|proto 109|dev (mv|mesh-)' || true
n ip -4 route show table all | sort; ip neigh show nud permanent | grep -E 'dev (mv|mesh-)'
cat $NET4/ip_forward; grep . $NET4/conf/mv*/rp_filter $NET6/conf/mv*/disable_ipv6
n sh -c "grep . $NET4/conf/all/rp_filter $NET4/conf/[eg]*/rp_filter $NET6/conf/[eg]*/accept_ra \
    $NET6/conf/[eg]*/disable_ipv6"
nft -s list table ip mesh
for m in NODES VTEPS LOCAL_ADDRS; do echo $m; dump $m; done
for m in PORTS ENDPOINTS CONFIG ADDRESSES SERVICES PUBLISHED; do
    if [ "$REMADE" ]; then echo $m $(dump $m | wc -l); else echo $m; dump $m; fi
done
[ "$REMADE" ] || bpftool -j map lookup pinned $PINS/maps/MAGLEV key $(slot)
for m in $PINS/maps/*; do echo $m $(bpftool -j map show pinned $m | grep -oE '"id":[0-9]+'); done
for l in $PINS/links/*; do
    echo $l $(bpftool -j link show pinned $l | grep -oE '"prog_id":[0-9]+')
done
n tc filter show dev lo egress
"#;

/// `w1`, which is harmed.
struct Wounded {
    prelude: String,
}

impl Wounded {
    fn new(c: &Cluster, task: &Task) -> Result<Self> {
        let node = c.lab.places().state_dir("w1");
        let pid = std::fs::read_to_string(node.join(format!("tasks/{}/shim.pid", task.id)))
            .context("read the process id of the task's shim")?;
        let pins = c.lab.places().pins_of("w1");
        let netns = c.lab.name().netns("w1");
        let words = format!(
            "n() {{ nsenter -t {pid} -n \"$@\"; }}
            NET4=/proc/sys/net/ipv4 NET6=/proc/sys/net/ipv6 HOST={netns} PINS={pins}/v1
            link() {{ n ip -o link show $1 | grep -oE 'if[0-9]+' | cut -c3- | \
                xargs -I% sh -c 'ip -o link | grep \"^%: \"' | grep -oE 'mv[0-9a-f]+'; }}
            hex() {{ tr -d ',[]\"' | sed 's/0x/ 0x/g'; }}
            key() {{ bpftool -j map dump pinned $PINS/maps/$1 | grep -oE '\"key\":[^]]*' | \
                head -1 | cut -c7- | hex; }}
            slot() {{ bpftool -j map dump pinned $PINS/maps/SERVICES | \
                grep -oE '\"value\":(.\"0x..\"){{4}}' | head -1 | cut -c9- | hex; }}
            erase() {{ bpftool map delete pinned $PINS/maps/$1 key $(key $1); }}
            put() {{ bpftool map update pinned $PINS/maps/$1 key $2 value $3; }}
            bytes() {{ bpftool -j map show pinned $PINS/maps/$1 | \
                grep -oE '\"bytes_'$2'\":[0-9]+' | \
                grep -oE '[0-9]+$'; }}
            filled() {{ for i in $(seq $1); do echo 0x5a; done; }}
            clobber() {{ put $1 \"$(key $1)\" \"$(filled $(bytes $1 value))\"; }}
            invent() {{ put $1 \"$(filled $(bytes $1 key))\" \"$(filled $(bytes $1 value))\"; }}
            map_id() {{ bpftool -j map show pinned $PINS/maps/$1 | grep -oE '\"id\":[0-9]+' | \
                cut -c6-; }}
            link_id() {{ bpftool -j link show pinned $PINS/links/$1 | grep -oE '\"id\":[0-9]+' | \
                cut -c6-; }}
            program_of() {{ bpftool -j link show pinned $PINS/links/$1 | \
                grep -oE '\"prog_id\":[0-9]+' | cut -c11-; }}
            address() {{ n ip -o -4 addr show $1 | grep -oE 'inet [^ ]+' | cut -c6-; }}\n",
            pid = pid.trim(),
            pins = pins.display(),
        );
        let mut prelude = words;
        let found = sh(
            c,
            &format!(
                "{prelude} echo E=$(link eth0) G=$(link gw0) ETH=$(address eth0 | cut -d/ -f1) \
                 GW=$(address gw0 | cut -d/ -f1) \
                 NET=$(n ip -4 route show dev eth0 proto kernel | cut -d' ' -f1)"
            ),
        )?;
        ensure!(!found.contains("= ") && !found.ends_with('='), "not all is there: {found}");
        prelude += &found;
        prelude += "\n";
        Ok(Self { prelude })
    }

    fn state(&self, c: &Cluster, remade: bool) -> Result<String> {
        let remade = if remade { "REMADE=1" } else { "" };
        let said = sh(c, &format!("{} {remade}\n{STATE} exit 0", self.prelude))?;
        // Links that are made anew come in another order.
        let mut lines: Vec<_> = said.lines().collect();
        lines.sort_unstable();
        Ok(lines.join("\n"))
    }

    /// Does the harms of a wave, and says how long all was not as it should be.
    fn harm(&self, c: &Cluster, before: &mut [String; 2], wave: &Wave) -> Result<Duration> {
        let [all, masked] = before;
        let before = if wave.remakes { masked } else { &*all };
        let healed = c.counter("w1", "healed")?;
        let script = format!("{} set -e\n{}", self.prelude, wave.harms.join("\n"));
        sh(c, &script)?;
        let done = Instant::now();
        let took = loop {
            let looked = done.elapsed();
            // Half-way between, some of it may not be there to be shown.
            let now = self.state(c, wave.remakes).unwrap_or_default();
            if now == *before {
                break looked;
            }
            ensure!(looked < HEALED, "not healed in {looked:?}:\n{}", difference(before, &now));
        };
        if wave.remakes {
            *all = self.state(c, false)?;
        }
        let healed = c.counter("w1", "healed")?.saturating_sub(healed);
        ensure!(healed >= wave.harms.len() as u64, "only {healed} were counted");
        Ok(took)
    }
}

/// Lines of one that are not in the other.
fn difference(before: &str, now: &str) -> String {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (before, now) = (lines(before), lines(now));
    let gone = before.difference(&now).map(|line| format!("- {line:.200}"));
    let new = now.difference(&before).map(|line| format!("+ {line:.200}"));
    gone.chain(new).collect::<Vec<_>>().join("\n")
}

/// Every kind of kernel object of ours, in every way.
fn every_object_heals(c: &Cluster) -> Result<()> {
    let pair = set_up(c)?;
    let w1 = Wounded::new(c, &pair.0)?;
    let mut before = [w1.state(c, false)?, w1.state(c, true)?];
    let mut longest = Duration::ZERO;
    for wave in WAVES {
        let harms = wave.harms.join("; ");
        longest = longest.max(w1.harm(c, &mut before, wave).with_context(|| harms)?);
    }
    let harms: usize = WAVES.iter().map(|wave| wave.harms.len()).sum();
    println!("    {harms} harms, the longest took {longest:?} to heal");
    works(c, &pair)?;
    // Nothing that is pinned is missing in the table.
    let all: Vec<_> = WAVES.iter().flat_map(|wave| wave.harms).copied().collect();
    for map in sh(c, &format!("{} ls $PINS/maps", w1.prelude))?.lines() {
        let harmed = |what: &str| all.iter().any(|harm| harm.contains(&format!("{what}{map}")));
        ensure!(harmed("$PINS/maps/"), "no harm takes away the pin of {map}");
        let contents = ["erase ", "clobber ", "invent "].iter().filter(|way| harmed(way)).count();
        // Of arrays nothing can be erased, and nothing invented.
        let least = if ["CONFIG", "MAGLEV"].contains(&map) { 0 } else { 3 };
        ensure!(FLOW_STATE.contains(&map) || contents >= least, "not all is done to {map}");
    }
    for link in sh(c, &format!("{} ls $PINS/links", w1.prelude))?.lines() {
        let name = if link.starts_with("mv") { "$E" } else { link };
        let harmed =
            |how: &str| all.iter().any(|h| h.contains(&format!("{how}$PINS/links/{name}")));
        ensure!(harmed("rm ") && harmed("detach pinned "), "not all is done to program {link}");
    }
    Ok(())
}

/// What the programs keep of flows is theirs: it may be lost or nonsense, and new flows pass.
fn flow_state_may_be_anything(c: &Cluster) -> Result<()> {
    let pair = set_up(c)?;
    let w1 = Wounded::new(c, &pair.0)?;
    let harms = "
        for m in FLOWS FLOWS_NEW; do
            while k=$(key $m); [ \"$k\" ]; do bpftool map delete pinned $PINS/maps/$m key $k; done
            invent $m
        done
        put VIP_CLIENTS '0 0 0 0' '9 9 9 9 9 9 9 9'";
    sh(c, &format!("{}{harms}", w1.prelude))?;
    works(c, &pair)?;
    // With nonsense for every flow that there is.
    sh(
        c,
        &format!(
            "{} for m in FLOWS FLOWS_NEW; do [ -z \"$(key $m)\" ] || clobber $m; done",
            w1.prelude
        ),
    )?;
    works(c, &pair)
}

fn foreign_objects_stay(c: &Cluster) -> Result<()> {
    let foreign = "ip link add foreign0 type veth peer foreign1 && \
        ip link set foreign1 up && ip addr add 10.250.0.1/24 dev foreign0 && \
        ip link set foreign0 up && ip route add 10.251.0.0/24 via 10.250.0.2 && \
        nft add table ip foreign && nft add chain ip foreign c";
    sh(c, foreign)?;
    let seen = || {
        sh(c, "ip -br addr show foreign0; ip route show 10.251.0.0/24; nft list table ip foreign")
    };
    let before = seen()?;
    let pair = set_up(c)?;
    c.lab.end_daemon("w1", mesh_lab::DaemonSignal::Kill)?;
    c.lab.start("w1")?;
    works(c, &pair)?;
    c.empty()?;
    let after = seen()?;
    sh(c, "ip link del foreign0; nft delete table ip foreign")?;
    ensure!(before == after, "before:\n{before}\nnow:\n{after}");
    Ok(())
}

/// A new daemon finds all as it should be: it replaces no link and no program.
fn a_restart_changes_nothing(c: &Cluster) -> Result<()> {
    let pair = set_up(c)?;
    let state = || sh(c, "ip -br link | sort; bpftool net show dev eth0");
    let before = state()?;
    c.lab.end_daemon("w1", mesh_lab::DaemonSignal::Kill)?;
    c.lab.start("w1")?;
    works(c, &pair)?;
    let after = state()?;
    ensure!(before == after, "before:\n{before}\nnow:\n{after}");
    Ok(())
}
