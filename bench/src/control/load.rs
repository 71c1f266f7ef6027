//! Writers, each with one write under way, and what they saw.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;

/// Bytes of a value.
pub(super) const VALUE: usize = 256;

/// What writers saw together.
#[derive(Debug, Serialize)]
pub(super) struct Seen {
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    failed: usize,
    /// Between two writes that were done one after the other, by whomever.
    longest_gap_ms: f64,
}

/// A value that differs from others.
pub(super) fn value(writer: usize, count: usize) -> String {
    format!("{:x<VALUE$}", format!("{writer}-{count}-"))
}

/// Has `write(writer, count)` called by as many writers, each when its last one was done.
pub(super) async fn drive<F, W>(writers: usize, patience: Duration, write: F) -> Seen
where
    F: Fn(usize, usize) -> W + Send + Sync + 'static,
    W: Future<Output = Result<(), String>> + Send,
{
    let write = Arc::new(write);
    let begin = Instant::now();
    let each = (0..writers).map(|writer| {
        let write = Arc::clone(&write);
        tokio::spawn(async move {
            let (mut done, mut failed) = (Vec::new(), 0);
            for count in 0.. {
                let asked = Instant::now();
                if asked >= begin + patience {
                    break;
                }
                match write(writer, count).await {
                    Ok(()) => done.push((asked, Instant::now())),
                    Err(_) => {
                        failed += 1;
                        // Refused at once, it would be asked without end.
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            }
            (done, failed)
        })
    });
    let each: Vec<_> = each.collect();
    let (mut done, mut failed) = (Vec::new(), 0);
    for writer in each {
        // A writer that panicked wrote nothing.
        let (of, not) = writer.await.unwrap_or_default();
        done.extend(of);
        failed += not;
    }
    let took = begin.elapsed().as_secs_f64();
    let mut times: Vec<f64> =
        done.iter().map(|(asked, at)| at.duration_since(*asked).as_secs_f64() * 1e6).collect();
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or(f64::NAN);
    let mut ends: Vec<Instant> = done.iter().map(|(_, at)| *at).collect();
    ends.sort();
    let gap = ends.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(patience);
    Seen {
        per_second: done.len() as f64 / took,
        p50_us: at(50),
        p99_us: at(99),
        failed,
        longest_gap_ms: gap.as_secs_f64() * 1e3,
    }
}
