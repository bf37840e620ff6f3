//! Modelled time: how long a packet takes on the real machine, and what a queue's clock shows.
//!
//! A packet that moves data takes the latency of its way and its bytes at the bandwidth of the way's slowest part. The
//! parts are the GPU's own HBM, the links to a peer, and the link to the CPU for guest memory; a part whose bandwidth
//! is not known is no limit. Both directions of a part go on at once. The two ends of a copy add their latencies, once
//! for a packet; where a packet crosses from one place into another, the largest counts.
//!
//! A queue does one packet at a time: each starts when the one before it has ended, or when the worker saw the doorbell
//! that produced it, whatever is later.

use numagpu_spec::regs::TimingMode;

use crate::clock::Clock;

/// How a GPU counts time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// What time stamps mean, and whether work takes as long.
    pub mode: TimingMode,
    /// MB/s of own HBM; 0 = no limit.
    pub hbm_bandwidth_mbs: u32,
    /// Latency of own HBM in ns.
    pub hbm_latency_ns: u32,
}

/// What limits an access to one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    /// MB/s; 0 = no limit.
    pub(crate) bandwidth_mbs: u32,
    pub(crate) latency_ns: u64,
}

/// How long a packet takes, added up from its chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    moving_ps: u128,
    latency_ns: u64,
}

impl Cost {
    /// `bytes` more, which go through `parts` at once.
    pub(crate) fn add(&mut self, bytes: u64, parts: &[Part]) {
        let known = parts.iter().map(|part| part.bandwidth_mbs);
        if let Some(slowest) = known.filter(|mbs| *mbs > 0).min() {
            // A MB/s is a byte in a million picoseconds.
            self.moving_ps += u128::from(bytes) * 1_000_000 / u128::from(slowest);
        }
        let latency = parts.iter().map(|part| part.latency_ns).sum();
        self.latency_ns = self.latency_ns.max(latency);
    }

    /// In all, in nanoseconds.
    pub(crate) fn ns(&self) -> u64 {
        let moving = u64::try_from(self.moving_ps / 1000).unwrap_or(u64::MAX);
        moving.saturating_add(self.latency_ns)
    }
}

/// When a packet that moved data began and ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) start_ns: u64,
    pub(crate) end_ns: u64,
}

/// The clock of one queue.
pub(crate) struct QueueTime<'r> {
    clock: &'r dyn Clock,
    mode: TimingMode,
    /// When the last packet ended, or the worker last looked at the device's clock, whatever is later.
    reached: u64,
}

impl<'r> QueueTime<'r> {
    /// The clock of a queue whose last packet ended at `reached`.
    pub(crate) fn new(clock: &'r dyn Clock, mode: TimingMode, reached: u64) -> QueueTime<'r> {
        QueueTime {
            clock,
            mode,
            reached,
        }
    }

    /// The worker has waited for others: what comes now starts now at the earliest.
    pub(crate) fn catch_up(&mut self) {
        self.reached = self.reached.max(self.clock.now_ns());
    }

    /// A packet that moved data is done.
    pub(crate) fn pass(&mut self, cost: &Cost) -> Stamp {
        let start_ns = self.reached;
        self.reached = match self.mode {
            TimingMode::Off => start_ns.max(self.clock.now_ns()),
            TimingMode::Modelled | TimingMode::Paced => start_ns.saturating_add(cost.ns()),
        };
        Stamp {
            start_ns,
            end_ns: self.reached,
        }
    }

    /// Nanoseconds until the last packet's end, if the queue is to take that long.
    pub(crate) fn ahead_ns(&self) -> u64 {
        match self.mode {
            TimingMode::Off | TimingMode::Modelled => 0,
            TimingMode::Paced => self.reached.saturating_sub(self.clock.now_ns()),
        }
    }

    /// What a time stamp packet stores.
    pub(crate) fn shown(&self) -> u64 {
        match self.mode {
            TimingMode::Off => self.clock.now_ns(),
            TimingMode::Modelled | TimingMode::Paced => self.reached,
        }
    }

    /// When the last packet ended.
    pub(crate) fn reached(&self) -> u64 {
        self.reached
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_part_that_is_known_counts() {
        let part = |bandwidth_mbs, latency_ns| Part {
            bandwidth_mbs,
            latency_ns,
        };
        let cost = |parts: &[Part]| {
            let mut cost = Cost::default();
            cost.add(1_000_000, parts);
            cost.ns()
        };
        assert_eq!(cost(&[]), 0);
        assert_eq!(cost(&[part(0, 5), part(0, 6)]), 11);
        assert_eq!(cost(&[part(0, 5), part(1000, 6)]), 1_000_011);
        assert_eq!(cost(&[part(500, 5), part(1000, 6)]), 2_000_011);
        let mut two = Cost::default();
        two.add(1_000_000, &[part(1000, 100)]);
        two.add(1_000_000, &[part(500, 30)]);
        assert_eq!(two.ns(), 3_000_100);
        // More than 2^64 ns does not wrap.
        two.add(u64::MAX, &[part(1, 0)]);
        assert_eq!(two.ns(), u64::MAX);
    }
}
