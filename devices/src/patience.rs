//! How long one that ran out of work looks for more before it sleeps: a queue's worker for the next doorbell, a transport
//! for the next message.
//!
//! A thread that sleeps wakes after tens of microseconds; one that looks answers in less than one, but keeps a core busy.
//! So a worker learns, as KVM does for idle CPUs (`halt_poll_ns`): while doorbells come soon after one another it looks
//! for them; one that came late makes it sleep at once the next time. A machine without work uses no CPU time.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, TryRecvError};

/// The first window.
const FIRST: Duration = Duration::from_micros(10);
/// The longest window, and the longest pause between doorbells that makes it grow.
const LONGEST: Duration = Duration::from_micros(50);
/// Looks between two offers of the core to whoever else wants it.
const LOOKS: u32 = 32;

/// A time to look for work, learned from when work came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window(Duration);

impl Window {
    /// How long to look this time: nothing, or 10 to 50 us.
    pub fn length(self) -> Duration {
        self.0
    }

    /// Work came `pause` after the last was done.
    pub fn learn(&mut self, pause: Duration) {
        if pause > LONGEST {
            self.0 = Duration::ZERO;
        } else if pause > self.0 {
            self.0 = (self.0 * 2).clamp(FIRST, LONGEST);
        }
    }
}

/// How long one worker looks.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    window: Window,
}

impl Patience {
    /// Waits for the next kick, which carries the time when it was sent. False when none can come any more.
    pub(crate) fn wait(&mut self, kicks: &Receiver<Instant>) -> bool {
        let since = Instant::now();
        let kick = match self.look(kicks, since) {
            Err(TryRecvError::Empty) => kicks.recv().ok(),
            found => found.ok(),
        };
        if let Some(sent) = kick {
            self.window.learn(sent.saturating_duration_since(since));
        }
        kick.is_some()
    }

    /// Looks until the window is over.
    fn look(&self, kicks: &Receiver<Instant>, since: Instant) -> Result<Instant, TryRecvError> {
        loop {
            for _ in 0..LOOKS {
                match kicks.try_recv() {
                    Err(TryRecvError::Empty) => spin_loop(),
                    found => return found,
                }
            }
            if since.elapsed() >= self.window.length() {
                return Err(TryRecvError::Empty);
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(pauses: &[u64]) -> Duration {
        let mut window = Window::default();
        for pause in pauses {
            window.learn(Duration::from_micros(*pause));
        }
        window.length()
    }

    #[test]
    fn a_window_grows_while_doorbells_come_soon_and_ends_with_one_that_is_late() {
        assert_eq!(after(&[]), Duration::ZERO);
        assert_eq!(after(&[30]), FIRST);
        assert_eq!(after(&[30, 30]), 2 * FIRST);
        assert_eq!(after(&[30, 30, 30]), 4 * FIRST);
        // Long enough: it grows no further.
        assert_eq!(after(&[30, 30, 30, 30, 1, 0]), 4 * FIRST);
        assert_eq!(after(&[49; 9]), LONGEST);
        assert_eq!(after(&[49, 49, 49, 51]), Duration::ZERO);
        assert_eq!(after(&[5_000_000]), Duration::ZERO);
    }

    #[test]
    fn a_window_ends_and_the_wait_goes_on() {
        let (send, kicks) = crossbeam::channel::bounded(1);
        let mut patience = Patience {
            window: Window(LONGEST),
        };
        let sender = std::thread::spawn(move || {
            std::thread::sleep(20 * LONGEST);
            send.send(Instant::now()).unwrap();
        });
        assert!(patience.wait(&kicks));
        assert_eq!(patience.window.length(), Duration::ZERO);
        sender.join().unwrap();
        assert!(!patience.wait(&kicks));
    }
}
