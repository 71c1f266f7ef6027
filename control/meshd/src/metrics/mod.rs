//! What this daemon counts, in the text that Prometheus reads (OpenMetrics).
//!
//! A metric is a static of [`list`], which has all of them with their words. What happens is
//! counted where it happens; what *is* (who leads, how many tasks there are) is looked up when
//! somebody asks: `node::scrape`. [`server`] answers on an address of its own. No label is a name
//! that users choose, so that how much there is to scrape does not grow with what runs.

pub mod list;
mod process;
pub mod server;

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};

pub use list::ALL;
pub(crate) use process::look as look_at_process;

/// The form of [`text`](text()), for `Content-Type`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Sets of labels that one metric may have; more are not counted.
const SERIES_MAX: usize = 512;
/// Upper bounds of the histograms' buckets, in seconds.
const BOUNDS: [f64; 13] =
    [0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// What a metric's numbers mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only goes up, from the daemon's start on.
    Counter,
    /// What is now.
    Gauge,
    /// How long something took, in seconds.
    Histogram,
}

/// One metric, with all its series.
#[derive(Debug)]
pub struct Metric {
    name: &'static str,
    kind: Kind,
    labels: &'static [&'static str],
    help: &'static str,
    series: Mutex<BTreeMap<Vec<String>, Value>>,
}

#[derive(Debug, Clone, Default)]
struct Value {
    /// A counter's or a gauge's number; the sum of a histogram's.
    number: f64,
    /// Of histograms: how many were in each bucket, the last without a bound.
    buckets: Vec<u64>,
}

impl Metric {
    const fn new(
        name: &'static str,
        kind: Kind,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self { name, kind, labels, help, series: Mutex::new(BTreeMap::new()) }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its labels' names.
    #[must_use]
    pub fn labels(&self) -> &'static [&'static str] {
        self.labels
    }

    /// Counts one more.
    pub(crate) fn count(&self, labels: &[&str]) {
        self.change(labels, |value| value.number += 1.0);
    }

    /// Sets a gauge, or a counter that is kept elsewhere.
    #[expect(clippy::cast_precision_loss, reason = "what counts beyond 2^53 is not exact")]
    pub(crate) fn set(&self, labels: &[&str], number: u64) {
        self.set_float(labels, number as f64);
    }

    /// Sets a gauge that is no whole number.
    pub(crate) fn set_float(&self, labels: &[&str], number: f64) {
        self.change(labels, |value| value.number = number);
    }

    /// Counts something that took this long.
    pub(crate) fn observe(&self, labels: &[&str], took: Duration) {
        let seconds = took.as_secs_f64();
        self.change(labels, |value| {
            value.number += seconds;
            value.buckets.resize(BOUNDS.len() + 1, 0);
            let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
            value.buckets[bucket] += 1;
        });
    }

    /// Counts something that began then and has ended.
    pub(crate) fn observe_since(&self, labels: &[&str], began: Instant) {
        self.observe(labels, began.elapsed());
    }

    /// Forgets all series: for what is looked up anew at each scrape.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    fn change(&self, labels: &[&str], change: impl FnOnce(&mut Value)) {
        debug_assert_eq!(labels.len(), self.labels.len(), "{}", self.name);
        let key: Vec<String> = labels.iter().map(|&label| label.to_owned()).collect();
        let mut series = self.lock();
        if series.len() < SERIES_MAX || series.contains_key(&key) {
            change(series.entry(key).or_default());
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Vec<String>, Value>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (name, kind) = match self.kind {
            // The encoder puts it there again.
            Kind::Counter => {
                (self.name.strip_suffix("_total").unwrap_or(self.name), MetricType::Counter)
            }
            Kind::Gauge => (self.name, MetricType::Gauge),
            Kind::Histogram => (self.name, MetricType::Histogram),
        };
        let mut family = encoder.encode_descriptor(name, self.help, None, kind)?;
        let series = self.lock();
        if series.is_empty() && self.labels.is_empty() && self.kind != Kind::Gauge {
            return self.encode_value(&mut family, &Value::default());
        }
        for (labels, value) in &*series {
            if labels.is_empty() {
                self.encode_value(&mut family, value)?;
                continue;
            }
            let labels: Vec<(&str, &str)> =
                self.labels.iter().copied().zip(labels.iter().map(String::as_str)).collect();
            self.encode_value(&mut family.encode_family(&labels)?, value)?;
        }
        Ok(())
    }

    fn encode_value(&self, encoder: &mut MetricEncoder<'_>, value: &Value) -> fmt::Result {
        match self.kind {
            Kind::Counter => encoder.encode_counter::<NoLabelSet, _, f64>(&value.number, None),
            Kind::Gauge => encoder.encode_gauge(&value.number),
            Kind::Histogram => {
                let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
                let counts = value.buckets.iter().copied().chain(std::iter::repeat(0));
                let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
                let count = value.buckets.iter().sum();
                encoder.encode_histogram::<NoLabelSet>(value.number, count, &buckets, None)
            }
        }
    }
}

/// All metrics, for the encoder.
#[derive(Debug)]
struct Everything;

impl Collector for Everything {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        ALL.iter().try_for_each(|metric| metric.encode(&mut encoder))
    }
}

/// All metrics as they stand.
#[must_use]
pub fn text() -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Everything));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut text, &registry);
    text
}

/// The list of all metrics, for people.
#[must_use]
pub fn table() -> String {
    let mut table = format!(
        "# Metrics\n\n{}\n{}\n\n{}\n{}\n\n| name | kind | labels | what it is |\n\
         |---|---|---|---|\n",
        "What `/metrics` has, on `--metrics-addr` and on the API's socket. Written by",
        "`meshd metrics`; what is not known on a node (raft, on workers) is not there.",
        "Names that begin with `engine_` or `swarm_` are Docker's, and mean the same here. The",
        "dashboard for Grafana is [grafana/mesh.json](grafana/mesh.json).",
    );
    for Metric { name, kind, labels, help, .. } in ALL {
        let kind = format!("{kind:?}").to_lowercase();
        let labels = labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>();
        let _ = writeln!(table, "| `{name}` | {kind} | {} | {help} |", labels.join(", "));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    static COUNTED: Metric = Metric::new("a_total", Kind::Counter, &["why"], "A");
    static TIMED: Metric = Metric::new("b_seconds", Kind::Histogram, &[], "B");

    fn encoded(metric: &'static Metric) -> String {
        #[derive(Debug)]
        struct One(&'static Metric);
        impl Collector for One {
            fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
                self.0.encode(&mut encoder)
            }
        }
        let mut registry = Registry::default();
        registry.register_collector(Box::new(One(metric)));
        let mut text = String::new();
        text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn what_is_counted_is_shown() {
        COUNTED.count(&["x"]);
        COUNTED.count(&["x"]);
        COUNTED.count(&["a \"quoted\" word"]);
        let text = encoded(&COUNTED);
        assert!(text.starts_with("# HELP a A\n# TYPE a counter\n"), "{text}");
        assert!(text.contains("a_total{why=\"x\"} 2.0\n"), "{text}");
        assert!(text.contains("a_total{why=\"a \\\"quoted\\\" word\"} 1.0\n"), "{text}");
        for series in 0..2 * SERIES_MAX {
            COUNTED.count(&[&series.to_string()]);
        }
        assert_eq!(encoded(&COUNTED).lines().count(), SERIES_MAX + 3, "bounded");
    }

    #[test]
    fn what_took_time_is_in_its_bucket_and_those_above() {
        let text = encoded(&TIMED);
        assert!(text.contains("b_seconds_count 0\n"), "nothing yet, and yet there: {text}");
        TIMED.observe(&[], Duration::from_millis(2));
        TIMED.observe(&[], Duration::from_secs(60));
        let text = encoded(&TIMED);
        for line in [
            "b_seconds_count 2\n",
            "b_seconds_bucket{le=\"0.001\"} 0\n",
            "b_seconds_bucket{le=\"0.0025\"} 1\n",
            "b_seconds_bucket{le=\"5.0\"} 1\n",
            "b_seconds_bucket{le=\"+Inf\"} 2\n",
        ] {
            assert!(text.contains(line), "{line} {text}");
        }
    }

    #[test]
    fn names_are_valid_and_of_one_kind() {
        let mut names = std::collections::BTreeSet::new();
        for metric in ALL {
            let word = |text: &str| {
                text.starts_with(|c: char| c.is_ascii_lowercase())
                    && text
                        .chars()
                        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            };
            assert!(word(metric.name) && metric.labels.iter().all(|label| word(label)));
            assert!(names.insert(metric.name), "{} is there twice", metric.name);
            assert_eq!(
                metric.kind == Kind::Counter,
                // Swarm's own are gauges all the same.
                metric.name.ends_with("_total") && !metric.name.starts_with("swarm_"),
                "{}",
                metric.name
            );
            assert!(!metric.help.is_empty() && !metric.help.ends_with('.'), "{}", metric.name);
        }
    }

    #[test]
    fn the_list_is_committed() {
        let committed = include_str!("../../../../dist/metrics.md");
        assert_eq!(committed, table(), "write it anew: meshd metrics > dist/metrics.md");
    }

    /// Words of an expression that could be metrics or labels.
    fn words(expression: &str) -> impl Iterator<Item = &str> {
        expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
    }

    /// The dashboard asks for nothing that is not there.
    #[test]
    fn the_dashboard_asks_for_metrics_that_there_are() {
        let text = include_str!("../../../../dist/grafana/mesh.json");
        let dashboard: serde_json::Value = serde_json::from_str(text).unwrap();
        let find = |word: &str| {
            let of = |end: &&str| word.strip_suffix(end);
            let plain = ["_bucket", "_sum", "_count"].iter().find_map(of);
            let is = |metric: &&&Metric| match metric.kind {
                Kind::Histogram => Some(metric.name) == plain,
                Kind::Counter | Kind::Gauge => metric.name == word,
            };
            ALL.iter().find(is).copied()
        };
        let mut rows = Vec::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = panel["title"].as_str().unwrap();
            if panel["type"] == "row" {
                rows.push(title);
                continue;
            }
            for target in panel["targets"].as_array().unwrap() {
                let expression = target["expr"].as_str().unwrap();
                let ours = words(expression).filter(|word| {
                    ["mesh_", "swarm_", "engine_", "process_"].iter().any(|p| word.starts_with(p))
                });
                let found: Vec<&Metric> = ours
                    .map(|word| find(word).unwrap_or_else(|| panic!("{title}: no {word}")))
                    .collect();
                assert!(!found.is_empty(), "{title} shows nothing of ours");
                let grouped = expression.split_once("by (").and_then(|(_, by)| by.split_once(')'));
                for label in
                    words(grouped.map_or("", |(labels, _)| labels)).filter(|w| !w.is_empty())
                {
                    let has = |metric: &&Metric| metric.labels.contains(&label);
                    assert!(
                        ["le", "instance"].contains(&label) || found.iter().any(has),
                        "{title}: no label {label}"
                    );
                }
            }
        }
        assert!(rows.len() >= 7, "{rows:?}");
    }
}
