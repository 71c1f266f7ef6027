//! What is changed on purpose, under load: roll-outs, the number of tasks, drained nodes.

use std::time::Instant;

use anyhow::{Result, ensure};
use mesh_tests::cluster::{SOON, eventually};

use super::{
    bed::{Bed, REPLICAS, SERVICE, pause},
    figure::Figure,
};

/// Does it under load; no request may fail.
fn under_load(bed: &Bed, change: impl FnOnce() -> Result<()>) -> Result<Vec<Figure>> {
    let load = bed.load()?;
    let begin = Instant::now();
    let changed = change();
    let took = begin.elapsed();
    pause();
    let report = load.stop()?;
    changed?;
    Ok(vec![
        Figure::count("requests failed", report.failed.len(), report.requests.len()).at_most(0.0),
        Figure::time("done", took),
    ])
}

pub(super) fn roll_out(bed: &Bed) -> Result<Vec<Figure>> {
    bed.settle()?;
    bed.step("replacing all tasks, two at a time");
    under_load(bed, || bed.roll("--update-parallelism 2"))
}

pub(super) fn scale(bed: &Bed) -> Result<Vec<Figure>> {
    bed.settle()?;
    under_load(bed, || {
        for count in [REPLICAS + 3, 2, REPLICAS] {
            bed.step(&format!("scaling to {count}"));
            bed.scale(count)?;
        }
        Ok(())
    })
}

pub(super) fn drain(bed: &Bed) -> Result<Vec<Figure>> {
    const NODE: &str = "w1";
    bed.settle_spread()?;
    bed.step(&format!("draining {NODE}"));
    let figures = under_load(bed, || {
        bed.cluster.meshctl("m1", &format!("node update --availability drain {NODE}"))?.ok()?;
        eventually("the node to be left", SOON * 3, || {
            let tasks = bed.cluster.tasks(SERVICE)?;
            let alive: Vec<_> = tasks.iter().filter(|task| task.state == "running").collect();
            ensure!(alive.len() == REPLICAS, "{} run", alive.len());
            ensure!(alive.iter().all(|task| task.node != NODE), "not left yet");
            Ok(())
        })
    });
    bed.cluster.meshctl("m1", &format!("node update --availability active {NODE}"))?.ok()?;
    figures
}
