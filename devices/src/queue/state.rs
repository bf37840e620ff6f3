//! Pausing a queue between two packets, and its state while it is paused.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use numagpu_spec::regs::{QueueFault, QueueState};

use super::{Queue, Run, Setup, Shown, is_ring};
use crate::bus::DmaPort;
use crate::engine::Reach;
use crate::state::{RestoreError, SavedQueue, SavedRun};

impl Queue {
    /// Asks the worker to leave its run at the end of the packet at hand, or at once if that only waits for others.
    /// Does not wait for it. Drivers see no change. Ended by as many calls of [`Queue::go_on`].
    pub(crate) fn hold(&self) {
        let shared = &self.shared;
        let mut control = shared.lock();
        control.pauses = control.pauses.saturating_add(1);
        shared.held.store(true, Ordering::SeqCst);
        shared.ended.notify_all();
    }

    /// Waits until the worker has left its run; false if it has not at `end`.
    pub(crate) fn is_held(&self, end: Instant) -> bool {
        let shared = &self.shared;
        let mut control = shared.lock();
        while control.active {
            let Some(rest) = end.checked_duration_since(Instant::now()) else {
                return false;
            };
            let woken = shared.left.wait_timeout(control, rest);
            control = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Ends a pause; with the last one the worker takes its run again.
    pub(crate) fn go_on(&self) {
        let shared = &self.shared;
        let mut control = shared.lock();
        control.pauses = control.pauses.saturating_sub(1);
        let goes_on = control.pauses == 0;
        if goes_on {
            shared.held.store(false, Ordering::SeqCst);
        }
        drop(control);
        if goes_on && shared.state() == QueueState::Running {
            self.kick();
        }
    }

    /// The state of a queue that is held.
    pub(crate) fn save(&self) -> SavedQueue {
        let shared = &self.shared;
        let control = shared.lock();
        let Shown {
            state,
            rptr,
            wptr,
            packets,
            bytes,
            fault_code,
            fault_address,
            fault_packet,
            trap_context,
            busy_ns,
            stamp_start_ns,
            stamp_end_ns,
        } = &shared.shown;
        let run = control.run.as_ref().map(|run| SavedRun {
            ring_base: run.setup.ring_base,
            ring_size: run.setup.ring_size,
            writeback: run.setup.writeback,
            wptr_poll: run.setup.wptr_poll,
            kicked: run.kicked.load(Ordering::SeqCst),
            priority: run.setup.priority,
            token: run.setup.reach.token,
            time_offset: run.time_offset.load(Ordering::Acquire),
            reached_ns: run.reached_ns.load(Ordering::Acquire),
            seen_wptr: run.seen_wptr.load(Ordering::Acquire),
        });
        SavedQueue {
            state: state.load(Ordering::Acquire),
            rptr: rptr.load(Ordering::Acquire),
            wptr: wptr.load(Ordering::Acquire),
            packets: packets.load(Ordering::Acquire),
            bytes: bytes.load(Ordering::Acquire),
            fault: fault_code.load(Ordering::Acquire),
            fault_address: fault_address.load(Ordering::Acquire),
            fault_packet: fault_packet.load(Ordering::Acquire),
            trap_context: trap_context.load(Ordering::Acquire),
            busy_ns: busy_ns.load(Ordering::Acquire),
            stamp_start_ns: stamp_start_ns.load(Ordering::Acquire),
            stamp_end_ns: stamp_end_ns.load(Ordering::Acquire),
            hung: shared.hung.load(Ordering::SeqCst),
            lose_doorbells: shared.lose_doorbells.load(Ordering::SeqCst),
            run,
        }
    }

    /// Whether it is as after power-on or a reset, and has a worker if `saved` needs one.
    ///
    /// # Errors
    /// [`RestoreError::InUse`] and [`RestoreError::NoThread`]; nothing has changed then.
    pub(crate) fn is_ready_for(&self, saved: &SavedQueue) -> Result<(), RestoreError> {
        let index = self.shared.index;
        if saved.run.is_some() && !self.start_worker() {
            return Err(RestoreError::NoThread { queue: index });
        }
        let control = self.shared.lock();
        let idle = self.shared.state() == QueueState::Disabled && !control.active;
        idle.then_some(()).ok_or(RestoreError::InUse {
            what: "queue",
            index: index as usize,
        })
    }

    /// Puts a checked state in the place of that of a queue which [`Queue::is_ready_for`] it. Work goes on at once, or
    /// with `waits_for_vmm` when a VMM is there.
    pub(crate) fn restore(&self, saved: &SavedQueue, reach: Option<Reach>, waits_for_vmm: bool) {
        let shared = &self.shared;
        let mut control = shared.lock();
        let Shown {
            state,
            rptr,
            wptr,
            packets,
            bytes,
            fault_code,
            fault_address,
            fault_packet,
            trap_context,
            busy_ns,
            stamp_start_ns,
            stamp_end_ns,
        } = &shared.shown;
        for (cell, value) in [
            (rptr, saved.rptr),
            (wptr, saved.wptr),
            (packets, saved.packets),
            (bytes, saved.bytes),
            (fault_address, saved.fault_address),
            (fault_packet, saved.fault_packet),
            (busy_ns, saved.busy_ns),
            (stamp_start_ns, saved.stamp_start_ns),
            (stamp_end_ns, saved.stamp_end_ns),
        ] {
            cell.store(value, Ordering::Release);
        }
        fault_code.store(saved.fault, Ordering::Release);
        trap_context.store(saved.trap_context, Ordering::Release);
        shared.hung.store(saved.hung, Ordering::SeqCst);
        let lost = saved.lose_doorbells;
        shared.lose_doorbells.store(lost, Ordering::SeqCst);
        let epoch = shared.next_epoch();
        control.waits_for_vmm = waits_for_vmm;
        control.run = saved.run.as_ref().zip(reach).map(|(run, reach)| {
            Arc::new(Run {
                epoch,
                setup: Setup {
                    ring_base: run.ring_base,
                    ring_size: run.ring_size,
                    writeback: run.writeback,
                    wptr_poll: run.wptr_poll,
                    priority: run.priority,
                    reach,
                },
                time_offset: AtomicU64::new(run.time_offset),
                reached_ns: AtomicU64::new(run.reached_ns),
                seen_wptr: AtomicU64::new(run.seen_wptr),
                kicked: AtomicBool::new(run.kicked),
            })
        });
        state.store(saved.state, Ordering::Release);
        drop(control);
        if saved.state == QueueState::Running.code() {
            self.kick();
        }
    }

    /// A VMM is there: restored work that waited for it goes on in its memory.
    pub(crate) fn vmm_is_there(&self, dma: &Arc<dyn DmaPort>) {
        let mut control = self.shared.lock();
        if !std::mem::take(&mut control.waits_for_vmm) {
            return;
        }
        if let Some(run) = control.run.take() {
            let mut setup = run.setup.clone();
            setup.reach.dma = Some(Arc::clone(dma));
            control.run = Some(Arc::new(Run {
                epoch: run.epoch,
                setup,
                time_offset: AtomicU64::new(run.time_offset.load(Ordering::Acquire)),
                reached_ns: AtomicU64::new(run.reached_ns.load(Ordering::Acquire)),
                seen_wptr: AtomicU64::new(run.seen_wptr.load(Ordering::Acquire)),
                kicked: AtomicBool::new(run.kicked.load(Ordering::SeqCst)),
            }));
        }
        drop(control);
        if self.shared.state() == QueueState::Running {
            self.kick();
        }
    }
}

impl SavedQueue {
    /// Checks all values of queue `index`.
    pub(crate) fn check(&self, index: usize) -> Result<(), RestoreError> {
        let bad = |what: &'static str, value: u64| RestoreError::Bad { what, index, value };
        let state = QueueState::from_code(self.state)
            .ok_or_else(|| bad("state of queue", self.state.into()))?;
        let fault = QueueFault::from_code(self.fault)
            .ok_or_else(|| bad("fault of queue", self.fault.into()))?;
        if (fault == QueueFault::None) == (state == QueueState::Fault) {
            return Err(bad("fault of queue", self.fault.into()));
        }
        let works = matches!(state, QueueState::Idle | QueueState::Running);
        if works != self.run.is_some() {
            return Err(bad("setup of queue", self.state.into()));
        }
        let ahead = self.wptr.checked_sub(self.rptr);
        let room = match &self.run {
            Some(run) => run.ring_size,
            None => numagpu_spec::regs::RING_MAX,
        };
        let fits = ahead.is_some_and(|ahead| ahead <= room.into());
        if !fits || !self.rptr.is_multiple_of(4) || !self.wptr.is_multiple_of(4) {
            return Err(bad("write pointer of queue", self.wptr));
        }
        if state == QueueState::Idle && ahead != Some(0) {
            return Err(bad("read pointer of queue", self.rptr));
        }
        let Some(run) = &self.run else {
            return Ok(());
        };
        if !is_ring(run.ring_base, run.ring_size) {
            return Err(bad("ring of queue", run.ring_base));
        }
        if !run.writeback.is_multiple_of(8) {
            return Err(bad("RPTR_WRITEBACK of queue", run.writeback));
        }
        if !run.wptr_poll.is_multiple_of(8) {
            return Err(bad("WPTR_POLL of queue", run.wptr_poll));
        }
        // Who follows a kick is seen to run.
        if run.kicked && (run.wptr_poll == 0 || state != QueueState::Running) {
            return Err(bad("kick of queue", run.wptr_poll));
        }
        if run.priority > 3 {
            return Err(bad("priority of queue", run.priority.into()));
        }
        if run.seen_wptr > self.wptr {
            return Err(bad("seen write pointer of queue", run.seen_wptr));
        }
        Ok(())
    }
}
