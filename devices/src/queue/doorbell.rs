//! Doorbells: where the driver says how far its ring is filled, by value or by a pointer in memory.

use std::sync::atomic::Ordering;

use numagpu_spec::regs::{QueueFault, QueueState};

use super::{Queue, Run, Shared};
use crate::engine::{Fault, Stop};

impl Queue {
    /// The driver rang: `wptr` bytes are produced. Ignored unless the queue is enabled; a value between the read
    /// pointer and an earlier doorbell is an older doorbell that came late, and is ignored too.
    pub fn doorbell(&self, wptr: u64) {
        let shared = &self.shared;
        let mut control = shared.lock();
        let Some(run) = control.run.clone().filter(|_| !shared.loses_doorbell()) else {
            return;
        };
        match shared.take_wptr(&run, wptr) {
            Ok(true) => {
                drop(control);
                self.kick();
            }
            Ok(false) => {}
            Err(fault) => {
                let packet = shared.shown.packets.load(Ordering::Acquire);
                shared.stop_with(&mut control, fault, packet);
                shared.announce_fault();
            }
        }
    }

    /// The driver kicked: the worker takes the write pointer from memory, as if the doorbell had had it. Ignored unless the
    /// queue is enabled with a place for it.
    pub fn doorbell_in_memory(&self) {
        let shared = &self.shared;
        let control = shared.lock();
        let run = control.run.as_ref().filter(|it| it.setup.wptr_poll != 0);
        let Some(run) = run.filter(|_| !shared.loses_doorbell()) else {
            return;
        };
        run.kicked.store(true, Ordering::SeqCst);
        shared.show_state(QueueState::Running);
        drop(control);
        self.kick();
    }
}

impl Shared {
    /// Whether the doorbell that rings now gets lost.
    fn loses_doorbell(&self) -> bool {
        let lost = &self.lose_doorbells;
        let lost = lost.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        lost.is_ok()
    }

    /// Takes over a write pointer that the driver gave; whether it is a new one. The caller holds `control`.
    fn take_wptr(&self, run: &Run, wptr: u64) -> Result<bool, Fault> {
        let rptr = self.shown.rptr.load(Ordering::Acquire);
        let room = u64::from(run.setup.ring_size);
        let ahead = wptr.checked_sub(rptr);
        if ahead.is_none_or(|ahead| ahead > room) || !wptr.is_multiple_of(4) {
            let code = QueueFault::BadDoorbell;
            return Err(Fault {
                code,
                address: wptr,
            });
        }
        if wptr <= self.shown.wptr.load(Ordering::Acquire) {
            return Ok(false);
        }
        self.shown.wptr.store(wptr, Ordering::Release);
        self.show_state(QueueState::Running);
        Ok(true)
    }

    /// The worker read a write pointer from memory.
    pub(crate) fn follow(&self, run: &Run, wptr: u64) -> Result<(), Stop> {
        let _control = self.lock();
        run.leave(self).check()?;
        self.take_wptr(run, wptr)?;
        Ok(())
    }
}
