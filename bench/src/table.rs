//! Tables of figures: medians of paths side by side, and how they stand to each other.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

/// Median, least and greatest of one path's rounds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    path: String,
    pub(crate) median: f64,
    min: f64,
    max: f64,
    rounds: Vec<f64>,
    stalled: u64,
    errors: u64,
}

impl Figure {
    /// Of at least one round.
    pub(crate) fn new(path: &str, rounds: Vec<f64>, stalled: u64, errors: u64) -> Self {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        Self {
            path: path.to_owned(),
            median: at(sorted.len() / 2),
            min: at(0),
            max: at(sorted.len().saturating_sub(1)),
            rounds,
            stalled,
            errors,
        }
    }
}

/// Whether a path is as good as it should be.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    path: String,
    against: String,
    ratio: f64,
    target: f64,
    met: bool,
}

impl Verdict {
    /// Of one path against another, both among the figures. A negative target is a ceiling.
    pub(crate) fn of(figures: &[Figure], path: &str, against: &str, target: f64) -> Option<Self> {
        let median = |name: &str| figures.iter().find(|f| f.path == name).map(|f| f.median);
        Some(Self::new(path, against, median(path)? / median(against)?, target))
    }

    /// Of a path alone, against a number.
    pub(crate) fn below(figures: &[Figure], path: &str, ceiling: f64, unit: &str) -> Option<Self> {
        let figure = figures.iter().find(|f| f.path == path)?;
        Some(Self::new(path, unit, figure.median, -ceiling))
    }

    fn new(path: &str, against: &str, ratio: f64, target: f64) -> Self {
        let met = if target < 0.0 { ratio <= -target } else { ratio >= target };
        let (path, against) = (path.to_owned(), against.to_owned());
        Self { path, against, ratio, target: target.abs(), met }
    }
}

/// A measure.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) measure: String,
    pub(crate) unit: String,
    pub(crate) figures: Vec<Figure>,
    pub(crate) verdicts: Vec<Verdict>,
}

/// Prints the table, and writes it to `STEM.md` and `STEM.json`. `spoilt` names the two counts of
/// what went wrong.
pub(crate) fn write(
    dir: &Path,
    stem: &str,
    heading: &str,
    spoilt: &str,
    rows: &[Row],
) -> Result<()> {
    let table = format!("{heading}\n{}", render(spoilt, rows));
    print!("{table}");
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    fs::write(dir.join(format!("{stem}.md")), table)?;
    fs::write(dir.join(format!("{stem}.json")), serde_json::to_string_pretty(rows)? + "\n")?;
    Ok(())
}

fn render(spoilt: &str, rows: &[Row]) -> String {
    let mut out =
        format!("| measure | path | median | range | {spoilt} |\n|---|---|---|---|---|\n");
    for row in rows {
        for figure in &row.figures {
            let _ = writeln!(
                out,
                "| {} ({}) | {} | {:.1} | {:.1}–{:.1} | {} / {} |",
                row.measure,
                row.unit,
                figure.path,
                figure.median,
                figure.min,
                figure.max,
                figure.stalled,
                figure.errors
            );
        }
    }
    out.push_str("\n| measure | ratio | is | target | |\n|---|---|---|---|---|\n");
    for row in rows {
        for v in &row.verdicts {
            let _ = writeln!(
                out,
                "| {} | {} / {} | {:.2} | {:.2} | {} |",
                row.measure,
                v.path,
                v.against,
                v.ratio,
                v.target,
                if v.met { "met" } else { "missed" }
            );
        }
    }
    out
}
