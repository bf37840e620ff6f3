//! The boot handshake: RESET, then BOOTING for as long as the machine description says, then READY or FAULT.
//!
//! Nothing runs while the device boots. The driver's START notes when the boot will be over; whoever asks for
//! the state compares that with the clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use numagpu_spec::regs::BootState;

/// Value of `Boot::ready_at` before START.
const NOT_STARTED: u64 = u64::MAX;

/// The handshake of one GPU.
#[derive(Debug)]
pub struct Boot {
    // Static configuration.
    delay_ns: u64,
    fault: u32,
    // Volatile state.
    ready_at: AtomicU64,
}

impl Boot {
    /// A device that takes `delay` to boot. With a `fault` other than 0 the boot ends in FAULT with that code.
    pub fn new(delay: Duration, fault: u32) -> Boot {
        Boot {
            delay_ns: u64::try_from(delay.as_nanos()).unwrap_or(NOT_STARTED - 1),
            fault,
            ready_at: AtomicU64::new(NOT_STARTED),
        }
    }

    /// The state at `now_ns`.
    pub fn state(&self, now_ns: u64) -> BootState {
        match self.ready_at.load(Ordering::Acquire) {
            NOT_STARTED => BootState::Reset,
            ready_at if now_ns < ready_at => BootState::Booting,
            _ if self.fault != 0 => BootState::Fault,
            _ => BootState::Ready,
        }
    }

    /// The driver's START; ignored unless the state is RESET.
    pub fn start(&self, now_ns: u64) {
        let ready_at = now_ns.saturating_add(self.delay_ns).min(NOT_STARTED - 1);
        // A failed exchange means that it was started before.
        let _started_before = self.ready_at.compare_exchange(
            NOT_STARTED,
            ready_at,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }

    /// Why the boot failed at `now_ns`; 0 if it did not, or has not yet.
    pub fn fault(&self, now_ns: u64) -> u32 {
        match self.state(now_ns) {
            BootState::Fault => self.fault,
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
        } = self;
        ready_at.store(NOT_STARTED, Ordering::Release);
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
    fn an_endless_delay_does_not_wrap() {
        let boot = Boot::new(Duration::MAX, 0);
        boot.start(u64::MAX - 1);
        assert_eq!(boot.state(0), BootState::Booting);
    }
}
