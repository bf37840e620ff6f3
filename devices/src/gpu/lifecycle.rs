//! What happens to a GPU as a whole: resets, losses, changes of the VMM's map, and time that passes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use numagpu_spec::regs::topology;

use super::{Gpu, lock};
use crate::bus::ResetKind;
use crate::fabric::LinkEnd;
use crate::ownership::Event;
use crate::partition::Partition;
use crate::queue::Queue;

/// How long a reset waits for scrubs, so that small HBM is free when it returns. Longer scrubs go on behind it
/// and show as RELEASING.
const SCRUB_WAIT: Duration = Duration::from_millis(5);

/// How long a disconnect waits for scrubs before it puts the planned mode in force.
const DISCONNECT_WAIT: Duration = Duration::from_secs(60);

impl Gpu {
    pub(super) fn judge_coherence(&self) {
        // One at a time, so that the last answer is the newest.
        let _one = lock(&self.judging);
        let dma = lock(&self.attachment).as_ref().map(|a| Arc::clone(&a.dma));
        for partition in self.member.modes.all() {
            partition.judge_coherence(dma.as_deref());
        }
    }

    /// The body of a reset, under `lifecycle`.
    pub(crate) fn reset_function(&self, kind: ResetKind) {
        let Gpu {
            fabric: _,
            member,
            aperture: _,
            attachment: _,
            irq,
            scrubber,
            ticker: _,
            clock: _,
            pauses: _,
            config: _,
            layout: _,
            kicks: _,
            lifecycle: _,
            judging: _,
            config_space,
            dma_allowed,
            registers,
            doorbells,
            mapped_doorbells,
            msix,
            boot,
            health,
            presence,
            flaps: _,
            queues,
        } = self;
        let request = registers.get(&topology::BLOCK, 0, &topology::PARTITION_REQUEST);
        // First, so that no queue is enabled and no partition claimed behind its own reset.
        boot.reset();
        {
            let mut space = lock(config_space);
            space.reset(kind);
            dma_allowed.store(space.dma_allowed(), Ordering::SeqCst);
        }
        queues.iter().for_each(Queue::reset);
        {
            let _causes = irq.hold_resets();
            registers.reset();
        }
        doorbells.reset();
        if let Some(page) = mapped_doorbells {
            page.reset();
        }
        msix.reset();
        health.reset();
        match kind {
            ResetKind::Function | ResetKind::Hot => presence.reset(self.now()),
            ResetKind::Disconnect => presence.power_cycle(),
        }
        member.links.iter().for_each(LinkEnd::clear_counters);
        let planned = member.modes.planned().len() as u64;
        // What the partitions suffer, and how many there are to be, with what they suffer if that is another number.
        let (loss, count, change) = match kind {
            ResetKind::Function => (Event::FunctionReset, request, Event::PartitionChange),
            ResetKind::Hot => (Event::HotReset, request, Event::PartitionChange),
            ResetKind::Disconnect => (Event::Disconnect, planned, Event::Disconnect),
        };
        if !self.change_mode(count, change) {
            self.lose(loss);
        }
        // Whether it was enough shows in PARTITION.STATE.
        let _all_free = scrubber.wait(SCRUB_WAIT);
    }

    /// An incident that takes the partitions from their owners.
    pub(super) fn lose(&self, event: Event) {
        self.incident(self.partitions(), event);
    }

    fn incident(&self, partitions: &[Arc<Partition>], event: Event) {
        for partition in partitions {
            let duty = match event {
                Event::Disconnect => partition.disconnect(self.config.on_disconnect, self.now()),
                _ => partition.incident(event, self.now()),
            };
            self.scrubber.settle(partition, duty);
        }
    }

    /// `PARTITION_REQUEST` was written.
    pub(super) fn request_mode(&self, count: u64) {
        let possible = u64::from(self.member.modes.possible());
        let bit = u32::try_from(count).ok().and_then(|n| 1_u64.checked_shl(n));
        if count == 0 || bit.is_none_or(|bit| possible & bit == 0) {
            self.keep_request(0);
        }
    }

    fn keep_request(&self, count: u64) {
        let request = &topology::PARTITION_REQUEST;
        self.registers.set(&topology::BLOCK, 0, request, count);
    }

    /// Divides the HBM into `count` partitions, if that is another mode than the one in force. Whether it did. Under
    /// `lifecycle`, with queues stopped and the boot undone, so that nobody claims meanwhile.
    fn change_mode(&self, count: u64, event: Event) -> bool {
        let Some(next) = self.member.modes.other(count) else {
            return false;
        };
        // What partitions of the next mode were asked to scrub earlier must not come behind their next owner's
        // claim; nor may a driver wait for a long scrub here. The next reset finds the request again.
        let limit = match event {
            // The next VMM has to find the mode of power-on.
            Event::Disconnect => DISCONNECT_WAIT,
            _ => SCRUB_WAIT,
        };
        if !self.scrubber.wait(limit) {
            self.keep_request(count);
            return false;
        }
        let before = self.partitions();
        self.incident(before, event);
        self.fabric.divide(&self.member, next.len());
        // Scrubs are done in order: what the partitions before gave up is clean when these are free.
        self.incident(next, event);
        true
    }

    /// Does what is due by now, and says in how long the next thing will be. A thread of the GPU's calls it when the
    /// host's time has come; with a clock of one's own, call it after that moved.
    pub fn tick(&self) -> Option<Duration> {
        let pauses = lock(&self.pauses);
        if *pauses > 0 {
            // The end of the pause comes back to it.
            return None;
        }
        let now = self.now();
        let mut next = self.end_flaps(now);
        for partition in self.partitions() {
            self.scrubber.settle(partition, partition.expire(now));
            next = next.into_iter().chain(partition.lease_end()).min();
        }
        next.map(|at| Duration::from_nanos(at.saturating_sub(now)))
    }
}
