//! The daemon's log: lines for people or for machines, and none of them without end.
//!
//! One word per thing, in every line: `node`, `task`, `service`, `network` and `cluster` are ids,
//! `number` is a node's (or a voter's), `address` where another one is, `error` and `reason` say
//! why. A case of the lab tests holds the list.

use std::{
    collections::HashMap,
    io::{self, IsTerminal as _},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use mesh_control::limit::{Allowance, Rate};
use tracing::{Event, Level, Metadata, Subscriber, callsite};
use tracing_subscriber::{
    EnvFilter,
    layer::{Context, Layer, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Lines that one place in the program may write.
const LINES: Rate = Rate { burst: 50, every: Duration::from_millis(200) };
/// How often it is told what was left out.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Begins to log to standard error. `filter` was checked with the other options.
pub fn start(filter: &str, format: LogFormat) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).with(Limit).init();
}

/// Tells from time to time what was left out. Runs until dropped.
pub async fn tell_left_out() {
    let mut ticks = tokio::time::interval(TELL_EVERY);
    loop {
        ticks.tick().await;
        // Let go of before a line is written, which takes the lock itself.
        let told: Vec<_> = lock().values_mut().filter_map(Place::take_left_out).collect();
        for (place, left_out) in told {
            tracing::warn!(place, left_out, "a line was repeated too often: not all are here");
        }
    }
}

/// Keeps a place that something drives in circles from filling the disk. Who asks for `debug` gets
/// all of it.
struct Limit;

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO {
            return true;
        }
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        let now = START.elapsed();
        lock().entry(metadata.callsite()).or_insert_with(|| Place::new(metadata)).admit(now)
    }
}

/// Places in the program that wrote something: bounded, since the program is.
fn lock() -> MutexGuard<'static, HashMap<callsite::Identifier, Place>> {
    static PLACES: LazyLock<Mutex<HashMap<callsite::Identifier, Place>>> =
        LazyLock::new(Mutex::default);
    PLACES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place in the program that writes lines.
#[derive(Debug)]
struct Place {
    /// `file:line`.
    name: String,
    allowance: Allowance,
    left_out: u64,
}

impl Place {
    fn new(metadata: &Metadata<'_>) -> Self {
        let file = metadata.file().unwrap_or_else(|| metadata.target());
        let name = format!("{file}:{}", metadata.line().unwrap_or_default());
        Self { name, allowance: Allowance::default(), left_out: 0 }
    }

    /// Whether one more line may be written.
    fn admit(&mut self, now: Duration) -> bool {
        let admitted = self.allowance.take(LINES, now);
        self.left_out += u64::from(!admitted);
        admitted
    }

    /// What was left out since this was asked last, if anything was.
    fn take_left_out(&mut self) -> Option<(String, u64)> {
        let left_out = std::mem::take(&mut self.left_out);
        (left_out > 0).then(|| (self.name.clone(), left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_silenced_for_a_while_and_that_is_told() {
        let began = Duration::from_secs(60);
        let mut place = Place { name: "x:1".into(), allowance: Allowance::default(), left_out: 0 };
        assert_eq!((0..LINES.burst + 7).filter(|_| place.admit(began)).count(), 50);
        assert_eq!(place.take_left_out(), Some(("x:1".to_owned(), 7)));
        assert_eq!(place.take_left_out(), None);
        assert!(!place.admit(began + LINES.every / 2));
        assert!(place.admit(began + LINES.every));
    }

    /// Through the whole subscriber: what a loop writes is cut, `debug` is not.
    #[test]
    fn lines_are_json_and_loops_are_cut() {
        use std::sync::Arc;
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let writer = sink.clone();
        let lines = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let lines = lines.json().flatten_event(true);
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(lines).with(Limit),
            || {
                for number in 0..3 * LINES.burst {
                    tracing::info!(number, "round and round");
                    tracing::debug!(number, "in detail");
                }
            },
        );
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |level| lines.iter().filter(|line| line["level"] == level).count();
        // A slow machine may have let some more of them through.
        assert!((50..100).contains(&of("INFO")), "{}", of("INFO"));
        assert_eq!(of("DEBUG"), 150);
        assert_eq!(
            (&lines[0]["message"], &lines[0]["number"]),
            (&"round and round".into(), &0.into())
        );
    }
}
