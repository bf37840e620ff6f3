//! Time, behind a trait so that tests decide what time it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A source of monotone time.
pub trait Clock: Send + Sync {
    /// Nanoseconds since some fixed moment; never goes back.
    fn now_ns(&self) -> u64;
}

/// The host's monotone clock, from the moment it was created.
#[derive(Debug)]
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock that shows zero now.
    pub fn new() -> HostClock {
        HostClock {
            start: Instant::now(),
        }
    }
}

impl Default for HostClock {
    fn default() -> HostClock {
        HostClock::new()
    }
}

impl Clock for HostClock {
    fn now_ns(&self) -> u64 {
        // 584 years fit.
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Another clock, moved: what a device shows, which goes on where a saved one stood.
pub(crate) struct MovedClock {
    clock: Arc<dyn Clock>,
    /// Added to it, wrapping.
    by: AtomicU64,
}

impl MovedClock {
    /// The clock as it is.
    pub(crate) fn new(clock: Arc<dyn Clock>) -> MovedClock {
        MovedClock {
            clock,
            by: AtomicU64::new(0),
        }
    }

    /// Goes on from `now_ns`.
    pub(crate) fn set(&self, now_ns: u64) {
        let by = now_ns.wrapping_sub(self.clock.now_ns());
        self.by.store(by, Ordering::SeqCst);
    }
}

impl Clock for MovedClock {
    fn now_ns(&self) -> u64 {
        let by = self.by.load(Ordering::SeqCst);
        self.clock.now_ns().wrapping_add(by)
    }
}

/// A clock that stands still until it is told to advance.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: AtomicU64,
}

impl ManualClock {
    /// Lets `ns` nanoseconds pass.
    pub fn advance(&self, ns: u64) {
        self.now.fetch_add(ns, Ordering::AcqRel);
    }
}

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }
}
