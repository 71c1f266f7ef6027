//! The demo: five nodes on this machine, and a line of proof for each thing that they do.

mod proofs;
mod throughput;
mod traces;
mod trust;

use std::{
    cell::RefCell,
    fs,
    io::{IsTerminal, Write, stdout},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    setup,
    shell::{build_release, output, require_root, visible},
};
use traces::Traces;

const LAB: &str = "demo";
const NODES: [(&str, &str); 5] = [
    ("m1", "192.0.2.11"),
    ("m2", "192.0.2.12"),
    ("m3", "192.0.2.13"),
    ("w1", "192.0.2.21"),
    ("w2", "192.0.2.22"),
];
const CLIENT: &str = "198.51.100.7";
const REPLICAS: usize = 5;
/// How long a fresh service may take until its name, VIP and ports work everywhere.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the demo; an error if any line of it fails.
pub(crate) fn run(keep: bool) -> Result<()> {
    require_root("the demo")?;
    setup::install(setup::DEMO)?;
    build_release()?;
    let dir = fs::canonicalize(release_dir())?;
    let demo = Demo {
        meshctl: dir.join("meshctl"),
        bench: dir.join("mesh-bench"),
        claim: RefCell::default(),
        failed: 0,
    };
    demo.play(keep)
}

/// Where cargo puts release binaries.
fn release_dir() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    target.join("release")
}

struct Demo {
    meshctl: PathBuf,
    /// Makes things fail, and measures what is felt of it.
    bench: PathBuf,
    /// What the current line is to prove.
    claim: RefCell<String>,
    failed: u32,
}

impl Demo {
    fn play(mut self, keep: bool) -> Result<()> {
        self.ctl(&["lab", "down", "--name", LAB])?;
        let before = Traces::now()?;
        let begin = Instant::now();
        println!();
        let up = visible(Command::new(&self.meshctl).args(["lab", "up", "--name", LAB]));
        if let Err(e) = up {
            println!(
                "\nlogs: /var/lib/mesh-lab/{LAB}/*.log; `meshctl lab down --name {LAB}` clears"
            );
            return Err(e);
        }
        let took = begin.elapsed();
        println!();
        self.line("nodes Ready", |demo| demo.nodes_ready(took));
        self.line("network `app`, service `web`", Self::create);
        self.line("a name inside a task is a VIP", Self::name_resolves);
        self.line("requests to the VIP are spread", Self::spread);
        self.line("every node answers the client", Self::mesh);
        self.line("a task reaches the world outside", Self::outside);
        self.line("overlay beside bridge+VXLAN, TCP", Self::throughput);
        for (event, claim) in trust::EVENTS {
            self.line(claim, |demo| demo.survives(event));
        }
        if keep {
            self.print_what_to_try();
        } else {
            self.line("the lab is gone without a trace", |demo| demo.gone(&before));
        }
        ensure!(
            self.failed == 0,
            "{} lines failed; `--keep` leaves the lab for a look",
            self.failed
        );
        Ok(())
    }

    /// One line of proof: progress while it works, then the figure.
    fn line(&mut self, claim: &str, prove: impl FnOnce(&Self) -> Result<String>) {
        self.claim.replace(claim.to_owned());
        self.progress("");
        let back = if stdout().is_terminal() { "\r\x1b[K" } else { "" };
        match prove(self) {
            Ok(figure) => println!("{back}✓ {claim:<36} {figure}"),
            Err(e) => {
                self.failed += 1;
                println!("{back}✗ {claim:<36} {e:#}");
            }
        }
    }

    /// What goes on behind the current line, until its figure takes the place.
    fn progress(&self, doing: &str) {
        if stdout().is_terminal() {
            let separator = if doing.is_empty() { "" } else { ": " };
            print!("\r\x1b[K… {}{separator}{doing}", self.claim.borrow());
            let _ = stdout().flush();
        }
    }

    fn ctl(&self, args: &[&str]) -> Result<String> {
        output(&self.meshctl, args)
    }

    /// Runs a command inside a machine of the lab.
    fn on(&self, machine: &str, command: &[&str]) -> Result<String> {
        let head = ["lab", "exec", "--name", LAB, machine, "--"];
        self.ctl(&[&head, command].concat())
    }

    /// Runs a command inside a task, as seen from m1.
    fn in_task(&self, task: &str, command: &[&str]) -> Result<String> {
        self.on("m1", &[&["meshctl", "task", "exec", task, "--"], command].concat())
    }

    fn gone(&self, before: &Traces) -> Result<String> {
        let begin = Instant::now();
        self.ctl(&["lab", "down", "--name", LAB])?;
        let left = Traces::now()?.beyond(before);
        ensure!(left.is_empty(), "left over: {}", left.join(", "));
        Ok(format!(
            "in {:.1} s: namespaces, links, mounts, cgroups, pins, processes, files",
            begin.elapsed().as_secs_f64()
        ))
    }

    fn print_what_to_try(&self) {
        let ctl = self.meshctl.display();
        println!(
            "\nThe lab is up. Try:\n  \
             alias meshctl={ctl}\n  \
             meshctl lab ps --name {LAB}\n  \
             eval $(meshctl lab env m1 --name {LAB})     # meshctl and docker speak to m1\n  \
             meshctl service ls; docker service ps web\n  \
             meshctl service scale web=8\n  \
             meshctl task exec web.1 -- dig tasks.web\n  \
             meshctl lab exec --name {LAB} client -- curl -s http://192.0.2.22:8080/\n  \
             meshctl lab node w1 crash --name {LAB}; meshctl node ls\n  \
             meshctl node stats\n  \
             meshctl lab down --name {LAB}"
        );
    }
}
