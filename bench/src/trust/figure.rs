//! A figure of one event, its target, and what many rounds of it come to.

use std::fmt;

use serde::Serialize;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Seconds.
    Seconds,
    /// So many of so many.
    Of(usize),
    /// MiB.
    Mebibytes,
    /// Hundredths of a core.
    Percent,
}

/// Which of many rounds must meet a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Judged {
    /// The one in the middle.
    ByMedian,
    /// All.
    ByWorst,
}

/// The most that a figure may be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Target {
    most: f64,
    judged: Judged,
}

/// One figure of one event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Figure {
    what: &'static str,
    value: f64,
    unit: Unit,
    target: Option<Target>,
}

impl Figure {
    /// A time.
    pub(crate) fn time(what: &'static str, took: std::time::Duration) -> Self {
        Self { what, value: took.as_secs_f64(), unit: Unit::Seconds, target: None }
    }

    /// So many of `of`.
    pub(crate) fn count(what: &'static str, count: usize, of: usize) -> Self {
        // Counts of a minute's requests are far from where this would round.
        Self { what, value: count as f64, unit: Unit::Of(of), target: None }
    }

    /// Any other figure.
    pub(crate) fn other(what: &'static str, value: f64, unit: Unit) -> Self {
        Self { what, value, unit, target: None }
    }

    /// The median of many may be `most`.
    pub(crate) fn median_at_most(mut self, most: f64) -> Self {
        self.target = Some(Target { most, judged: Judged::ByMedian });
        self
    }

    /// None may be more than `most`.
    pub(crate) fn at_most(mut self, most: f64) -> Self {
        self.target = Some(Target { most, judged: Judged::ByWorst });
        self
    }

    /// Its name.
    pub(crate) fn what(&self) -> &'static str {
        self.what
    }

    /// Whether this one meets its target, however many are judged later.
    pub(crate) fn met(&self) -> bool {
        self.target.is_none_or(|target| self.value <= target.most)
    }
}

impl fmt::Display for Figure {
    /// `next write after 0.92 s`, `0 of 1512 requests failed`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, value, unit, target } = self;
        match unit {
            Unit::Seconds => write!(f, "{what} after {value:.2} s")?,
            Unit::Of(of) => write!(f, "{value} of {of} {what}")?,
            Unit::Mebibytes | Unit::Percent => write!(f, "{what} {value:.1} {}", symbol(*unit))?,
        }
        match target {
            Some(target) if !self.met() => write!(f, " (at most {})", target.most),
            _ => Ok(()),
        }
    }
}

fn symbol(unit: Unit) -> &'static str {
    match unit {
        Unit::Seconds => "s",
        Unit::Of(_) => "",
        Unit::Mebibytes => "MiB",
        Unit::Percent => "%",
    }
}

/// All rounds of one figure.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    event: &'static str,
    figure: &'static str,
    unit: Unit,
    target: Option<Target>,
    median: f64,
    worst: f64,
    met: Option<bool>,
    rounds: Vec<f64>,
    /// What counts are of, over all rounds.
    of: usize,
}

impl Row {
    fn new(event: &'static str, figure: &Figure) -> Self {
        let Figure { what, unit, target, .. } = *figure;
        Self {
            event,
            figure: what,
            unit,
            target,
            median: f64::NAN,
            worst: f64::NAN,
            met: None,
            rounds: Vec::new(),
            of: 0,
        }
    }

    fn add(&mut self, figure: &Figure) {
        self.rounds.push(figure.value);
        if let Unit::Of(of) = figure.unit {
            self.of += of;
        }
        let mut sorted = self.rounds.clone();
        sorted.sort_by(f64::total_cmp);
        // Of an even number the upper one: never the more flattering of two.
        self.median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        self.worst = sorted.last().copied().unwrap_or(f64::NAN);
        self.met = self.target.map(|Target { most, judged }| match judged {
            Judged::ByMedian => self.median <= most,
            Judged::ByWorst => self.worst <= most,
        });
    }

    fn markdown(&self) -> String {
        let Self { event, figure, unit, target, median, worst, met, rounds, .. } = self;
        let shown = |value: f64| match unit {
            Unit::Seconds => format!("{value:.2} s"),
            Unit::Of(_) => format!("{value}"),
            Unit::Mebibytes | Unit::Percent => format!("{value:.1} {}", symbol(*unit)),
        };
        let all = match unit {
            Unit::Of(_) => format!("{} of {}", rounds.iter().sum::<f64>(), self.of),
            _ => String::new(),
        };
        let target = target.map_or_else(String::new, |Target { most, judged }| {
            let which = if judged == Judged::ByMedian { "median" } else { "worst" };
            if most == 0.0 { "none".to_owned() } else { format!("{which} ≤ {}", shown(most)) }
        });
        let mark = met.map_or("", |met| if met { "✓" } else { "✗" });
        let (median, worst) = (shown(*median), shown(*worst));
        format!("| {event} | {figure} | {median} | {worst} | {all} | {target} | {mark} |")
    }
}

/// All figures, in the order in which they first came.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// Adds one round of an event.
    pub(crate) fn add(&mut self, event: &'static str, figures: &[Figure]) {
        for figure in figures {
            let known =
                self.rows.iter_mut().find(|row| row.event == event && row.figure == figure.what);
            match known {
                Some(row) => row.add(figure),
                None => {
                    let mut row = Row::new(event, figure);
                    row.add(figure);
                    self.rows.push(row);
                }
            }
        }
    }

    /// How many figures missed their targets.
    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| row.met == Some(false)).count()
    }

    /// As a Markdown table.
    pub(crate) fn markdown(&self) -> String {
        let head = "| what happens | figure | median | worst | all rounds | target | |\n\
                    |---|---|---|---|---|---|---|\n";
        let rows: String = self.rows.iter().map(|row| row.markdown() + "\n").collect();
        head.to_owned() + &rows
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn medians_worsts_and_verdicts() {
        let mut table = Table::default();
        for (seconds, failed) in [(1, 0), (9, 0), (2, 3)] {
            let took = Duration::from_secs(seconds);
            table.add(
                "leader killed",
                &[
                    Figure::time("next write", took).median_at_most(2.0),
                    Figure::count("requests failed", failed, 100).at_most(0.0),
                ],
            );
        }
        assert_eq!(table.missed(), 1);
        let text = table.markdown();
        let lines: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| leader killed | next write | 2.00 s | 9.00 s |  | median ≤ 2.00 s | ✓ |",
                "| leader killed | requests failed | 0 | 3 | 3 of 300 | none | ✗ |",
            ]
        );
    }

    #[test]
    fn one_figure_says_what_it_should_have_been() {
        let write = Figure::time("next write", Duration::from_millis(920)).median_at_most(2.0);
        assert_eq!(write.to_string(), "next write after 0.92 s");
        let failed = Figure::count("requests failed", 2, 1512).at_most(0.0);
        assert_eq!(failed.to_string(), "2 of 1512 requests failed (at most 0)");
        assert!(write.met() && !failed.met());
    }
}
