//! Which queue of a GPU goes first.
//!
//! While a queue with a higher priority has work, the others wait before each packet and each chunk of one. None
//! starves: whoever has waited for a millisecond does one chunk. A queue that polls memory has no work meanwhile, since
//! it may be waiting for one of the others.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Priorities, from 0.
const LEVELS: usize = 4;
/// Longest wait for others before a chunk.
pub(crate) const SHARE: Duration = Duration::from_millis(1);
/// Pause between two looks at whether others still have work.
pub(crate) const LOOK: Duration = Duration::from_micros(50);

/// How many queues of a GPU have work, by priority.
#[derive(Debug, Default)]
pub struct Priorities {
    busy: [AtomicU32; LEVELS],
}

/// A queue has work, until this is dropped.
pub(crate) struct Busy<'p> {
    priorities: &'p Priorities,
    level: usize,
}

impl Priorities {
    /// A queue of priority `level`, 3 at most, has work.
    pub(crate) fn enter(&self, level: u32) -> Busy<'_> {
        let level = (level as usize).min(LEVELS - 1);
        if let Some(count) = self.busy.get(level) {
            count.fetch_add(1, Ordering::AcqRel);
        }
        Busy {
            priorities: self,
            level,
        }
    }
}

impl Busy<'_> {
    /// Whether a queue of higher priority has work.
    pub(crate) fn is_outranked(&self) -> bool {
        let above = self.priorities.busy.iter().skip(self.level + 1);
        above
            .into_iter()
            .any(|count| count.load(Ordering::Acquire) > 0)
    }

    /// Does `f`, without work meanwhile.
    pub(crate) fn idle<T>(&self, f: impl FnOnce() -> T) -> T {
        self.count(u32::MAX);
        let result = f();
        self.count(1);
        result
    }

    fn count(&self, more: u32) {
        if let Some(count) = self.priorities.busy.get(self.level) {
            // Adding the largest number takes one away.
            count.fetch_add(more, Ordering::AcqRel);
        }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.count(u32::MAX);
    }
}
