//! One end of a link: its lanes, what it carries, and what went through it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use numagpu_spec::regs::LinkState;

use crate::config::LinkConfig;
use crate::state::SavedLink;

/// One end of a link, at the GPU whose `LINK` block shows it.
#[derive(Debug)]
pub struct LinkEnd {
    /// Hive position of the other end; `None` is the CPU.
    pub peer: Option<u32>,
    // Static configuration.
    width: u32,
    bandwidth_mbs: u32,
    latency_ns: u32,
    // Volatile state.
    lanes: AtomicU32,
    errors: AtomicU32,
    bytes_out: AtomicU64,
    bytes_in: AtomicU64,
}

impl LinkEnd {
    /// A link with all its lanes up. One of width 0 counts as one lane.
    pub(crate) fn new(config: &LinkConfig) -> LinkEnd {
        let width = config.width.max(1);
        LinkEnd {
            peer: config.peer,
            width,
            bandwidth_mbs: config.bandwidth_mbs,
            latency_ns: config.latency_ns,
            lanes: AtomicU32::new(width),
            errors: AtomicU32::new(0),
            bytes_out: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
        }
    }

    /// Lanes that it has.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Lanes that carry traffic now.
    pub fn lanes(&self) -> u32 {
        self.lanes.load(Ordering::Acquire)
    }

    /// Whether it carries traffic.
    pub fn is_up(&self) -> bool {
        self.lanes() > 0
    }

    /// `LINK.STATE`.
    pub fn state(&self) -> LinkState {
        match self.lanes() {
            0 => LinkState::Down,
            lanes if lanes < self.width => LinkState::Degraded,
            _ => LinkState::Up,
        }
    }

    /// MB/s in one direction with the lanes that are up; 0 = not known, or down.
    pub fn bandwidth_now_mbs(&self) -> u32 {
        let all = u64::from(self.bandwidth_mbs) * u64::from(self.lanes());
        u32::try_from(all / u64::from(self.width)).unwrap_or(self.bandwidth_mbs)
    }

    /// Latency in ns; 0 = not known.
    pub fn latency_ns(&self) -> u32 {
        self.latency_ns
    }

    /// Errors since reset.
    pub fn errors(&self) -> u32 {
        self.errors.load(Ordering::Acquire)
    }

    /// Bytes that left through it since reset.
    pub fn bytes_out(&self) -> u64 {
        self.bytes_out.load(Ordering::Acquire)
    }

    /// Bytes that came through it since reset.
    pub fn bytes_in(&self) -> u64 {
        self.bytes_in.load(Ordering::Acquire)
    }

    pub(crate) fn count_out(&self, bytes: u64) {
        self.bytes_out.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(crate) fn count_in(&self, bytes: u64) {
        self.bytes_in.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Lets `lanes` lanes, at most its width, carry traffic. Fewer than before count as an error. Whether it is another
    /// number than before.
    pub(crate) fn set_lanes(&self, lanes: u32) -> bool {
        let lanes = lanes.min(self.width);
        let before = self.lanes.swap(lanes, Ordering::AcqRel);
        if before > lanes {
            self.errors.fetch_add(1, Ordering::AcqRel);
        }
        before != lanes
    }

    /// What it carries and what went through it.
    pub(crate) fn save(&self) -> SavedLink {
        SavedLink {
            lanes: self.lanes(),
            errors: self.errors(),
            bytes_out: self.bytes_out(),
            bytes_in: self.bytes_in(),
        }
    }

    /// As [`LinkEnd::save`] found it, with its width at most. The fabric has to look anew then.
    pub(crate) fn restore(&self, saved: &SavedLink) {
        self.lanes
            .store(saved.lanes.min(self.width), Ordering::Release);
        self.errors.store(saved.errors, Ordering::Release);
        self.bytes_out.store(saved.bytes_out, Ordering::Release);
        self.bytes_in.store(saved.bytes_in, Ordering::Release);
    }

    /// Sets errors and bytes to zero; lanes stay as they are.
    pub(crate) fn clear_counters(&self) {
        self.errors.store(0, Ordering::Release);
        self.bytes_out.store(0, Ordering::Release);
        self.bytes_in.store(0, Ordering::Release);
    }
}
