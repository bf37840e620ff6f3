//! The boot handshake: RESET, then BOOTING for as long as the machine description says, then READY or FAULT.
//!
//! Nothing runs while the device boots. The driver's START notes when the boot will be over; whoever asks for
//! the state compares that with the clock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use numagpu_spec::regs::BootState;

use crate::state::{BootProgress, NextBoot, SavedBoot};

/// Value of `Boot::ready_at` before START.
const NOT_STARTED: u64 = u64::MAX;
/// Value of `Boot::ready_at` for a boot that never ends.
const NEVER: u64 = u64::MAX - 1;
/// Value of `Boot::next` for a boot that never ends; fault codes are below it.
const HANG: u64 = 1 << 32;

/// The handshake of one GPU.
#[derive(Debug)]
pub struct Boot {
    // Static configuration.
    delay_ns: u64,
    fault: u32,
    // Volatile state.
    ready_at: AtomicU64,
    /// Fault code of the boot that was started last, 0 for none.
    fault_now: AtomicU32,
    /// How the next boot ends: a fault code, [`HANG`], or 0 for as it always does.
    next: AtomicU64,
}

impl Boot {
    /// A device that takes `delay` to boot. With a `fault` other than 0 the boot ends in FAULT with that code.
    pub fn new(delay: Duration, fault: u32) -> Boot {
        Boot {
            delay_ns: u64::try_from(delay.as_nanos()).unwrap_or(NEVER),
            fault,
            ready_at: AtomicU64::new(NOT_STARTED),
            fault_now: AtomicU32::new(0),
            next: AtomicU64::new(0),
        }
    }

    /// The state at `now_ns`.
    pub fn state(&self, now_ns: u64) -> BootState {
        match self.ready_at.load(Ordering::Acquire) {
            NOT_STARTED => BootState::Reset,
            NEVER => BootState::Booting,
            ready_at if now_ns < ready_at => BootState::Booting,
            _ if self.fault_now.load(Ordering::Acquire) != 0 => BootState::Fault,
            _ => BootState::Ready,
        }
    }

    /// The driver's START; ignored unless the state is RESET.
    pub fn start(&self, now_ns: u64) {
        if self.ready_at.load(Ordering::Acquire) != NOT_STARTED {
            return;
        }
        let ready_at = now_ns.saturating_add(self.delay_ns).min(NEVER);
        let (ready_at, fault) = match self.next.swap(0, Ordering::AcqRel) {
            0 => (ready_at, self.fault),
            HANG => (NEVER, 0),
            code => (ready_at, u32::try_from(code).unwrap_or(0)),
        };
        self.fault_now.store(fault, Ordering::Release);
        // A failed exchange means that another driver started it at this moment.
        let _started_before = self.ready_at.compare_exchange(
            NOT_STARTED,
            ready_at,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }

    /// The next boot ends in FAULT with this code, which is not 0.
    pub fn fail_next(&self, code: u32) {
        self.next.store(code.into(), Ordering::Release);
    }

    /// The next boot stays BOOTING until a reset.
    pub fn hang_next(&self) {
        self.next.store(HANG, Ordering::Release);
    }

    /// Why the boot failed at `now_ns`; 0 if it did not, or has not yet.
    pub fn fault(&self, now_ns: u64) -> u32 {
        match self.state(now_ns) {
            BootState::Fault => self.fault_now.load(Ordering::Acquire),
            _ => 0,
        }
    }

    /// Modelled boot time in microseconds, rounded up.
    pub fn delay_us(&self) -> u32 {
        u32::try_from(self.delay_ns.div_ceil(1000)).unwrap_or(u32::MAX)
    }

    /// Back to RESET.
    pub fn reset(&self) {
        let Boot {
            delay_ns: _,
            fault: _,
            ready_at,
            fault_now,
            next: _,
        } = self;
        ready_at.store(NOT_STARTED, Ordering::Release);
        fault_now.store(0, Ordering::Release);
    }

    /// How far it is.
    pub(crate) fn save(&self) -> SavedBoot {
        let code = |next| u32::try_from(next).unwrap_or(0);
        SavedBoot {
            progress: match self.ready_at.load(Ordering::Acquire) {
                NOT_STARTED => BootProgress::Reset,
                NEVER => BootProgress::Never,
                ready_at => BootProgress::Until(ready_at),
            },
            fault: self.fault_now.load(Ordering::Acquire),
            next: match self.next.load(Ordering::Acquire) {
                0 => NextBoot::AsConfigured,
                HANG => NextBoot::Never,
                next => NextBoot::Fault(code(next)),
            },
        }
    }

    /// As [`Boot::save`] found it.
    pub(crate) fn restore(&self, saved: &SavedBoot) {
        let next = match saved.next {
            NextBoot::AsConfigured => 0,
            NextBoot::Never => HANG,
            NextBoot::Fault(code) => code.into(),
        };
        self.next.store(next, Ordering::Release);
        self.fault_now.store(saved.fault, Ordering::Release);
        let ready_at = match saved.progress {
            BootProgress::Reset => NOT_STARTED,
            BootProgress::Never => NEVER,
            BootProgress::Until(ready_at) => ready_at.min(NEVER),
        };
        self.ready_at.store(ready_at, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_takes_its_delay() {
        let boot = Boot::new(Duration::from_micros(5), 0);
        assert_eq!(boot.state(0), BootState::Reset);
        boot.start(100);
        assert_eq!(boot.state(100), BootState::Booting);
        assert_eq!(boot.state(5_099), BootState::Booting);
        boot.start(5_000);
        assert_eq!(boot.state(5_100), BootState::Ready);
        boot.reset();
        assert_eq!(boot.state(u64::MAX), BootState::Reset);
        assert_eq!(boot.delay_us(), 5);
    }

    #[test]
    fn a_fault_shows_when_the_boot_is_over() {
        let boot = Boot::new(Duration::from_nanos(10), 7);
        boot.start(0);
        assert_eq!(boot.fault(9), 0);
        assert_eq!((boot.state(10), boot.fault(10)), (BootState::Fault, 7));
    }

    #[test]
    fn only_the_next_boot_fails_or_hangs() {
        let boot = Boot::new(Duration::from_nanos(10), 0);
        boot.fail_next(3);
        boot.reset();
        boot.start(0);
        assert_eq!((boot.state(10), boot.fault(10)), (BootState::Fault, 3));
        boot.hang_next();
        boot.reset();
        boot.start(0);
        assert_eq!(boot.state(u64::MAX), BootState::Booting);
        boot.reset();
        boot.start(0);
        assert_eq!((boot.state(10), boot.fault(10)), (BootState::Ready, 0));
    }

    #[test]
    fn an_endless_delay_does_not_wrap() {
        let boot = Boot::new(Duration::MAX, 0);
        boot.start(u64::MAX - 1);
        assert_eq!(boot.state(0), BootState::Booting);
    }
}
