//! CPU time, memory and processes: what a node has, what a task may take, what is kept for it.

use core::fmt;

use serde::{Deserialize, Serialize};

/// CPU time and memory. Zero is none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Amount {
    /// Billionths of a CPU.
    pub nano_cpus: u64,
    /// Bytes.
    pub memory_bytes: u64,
}

impl Amount {
    /// This and that.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            nano_cpus: self.nano_cpus.saturating_add(other.nano_cpus),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
        }
    }

    /// What is left of it; never less than nothing.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            nano_cpus: self.nano_cpus.saturating_sub(other.nano_cpus),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
        }
    }

    /// The smaller one of each.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self {
            nano_cpus: self.nano_cpus.min(other.nano_cpus),
            memory_bytes: self.memory_bytes.min(other.memory_bytes),
        }
    }
}

/// What a task may take at most. Zero is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// CPU time and memory.
    pub amount: Amount,
    /// Processes and threads at once.
    pub pids: u64,
}

/// What a task asks of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    /// The kernel holds it to these.
    pub limits: Limits,
    /// The scheduler counts this on its node.
    pub reserved: Amount,
}

/// Bytes for people, 1024 by 1024: `64MiB`, `1.5GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut rest = self.0 as f64;
        let mut unit = 0;
        while rest >= 1024.0 && unit + 1 < UNITS.len() {
            rest /= 1024.0;
            unit += 1;
        }
        write!(f, "{}{}", (rest * 1000.0).round() / 1000.0, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_add_up_and_never_wrap() {
        let small = Amount { nano_cpus: 1, memory_bytes: 2 };
        let most = Amount { nano_cpus: u64::MAX, memory_bytes: 5 };
        assert_eq!(small.plus(most), Amount { nano_cpus: u64::MAX, memory_bytes: 7 });
        assert_eq!(small.minus(most), Amount::default());
        assert_eq!(most.min(Amount { nano_cpus: 3, memory_bytes: 9 }).nano_cpus, 3);
    }

    #[test]
    fn bytes_are_read_by_people() {
        for (bytes, text) in [(0, "0B"), (64 << 20, "64MiB"), (1536 << 20, "1.5GiB"), (1, "1B")] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
