//! Whether a session looks for the next message before it sleeps.
//!
//! A receive that sleeps costs the client of a register read the time in which the host wakes a thread; one that looks
//! keeps a core busy. Looking is bounded in every mode, so an idle client's session uses no CPU time.

use std::time::{Duration, Instant};

use numagpu_devices::patience::Window;

/// How long [`Polling::Always`] looks after each message.
const ALWAYS: Duration = Duration::from_millis(1);

/// Whether a session looks for messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// It sleeps until the next one comes: one receive and one send for each request.
    #[default]
    Off,
    /// It looks while messages come within 50 us of one another, and sleeps at once after one that came later.
    Auto,
    /// It looks for 1 ms after each message.
    Always,
}

/// The looking of one session.
#[derive(Debug, Default)]
pub(super) struct Poller {
    mode: Polling,
    window: Window,
    since: Option<Instant>,
}

impl Poller {
    pub(super) fn new(mode: Polling) -> Self {
        Self {
            mode,
            ..Self::default()
        }
    }

    /// A receive begins. Whether it shall look before it sleeps.
    pub(super) fn begin(&mut self) -> bool {
        self.since = (self.mode != Polling::Off).then(Instant::now);
        self.length() > Duration::ZERO
    }

    /// A look found nothing. Whether to look again.
    pub(super) fn again(&self) -> bool {
        std::hint::spin_loop();
        self.since
            .is_some_and(|since| since.elapsed() < self.length())
    }

    /// Something came.
    pub(super) fn end(&mut self) {
        if let Some(since) = self.since.take() {
            self.window.learn(since.elapsed());
        }
    }

    fn length(&self) -> Duration {
        match self.mode {
            Polling::Off => Duration::ZERO,
            Polling::Auto => self.window.length(),
            Polling::Always => ALWAYS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a receive looks, after `pause` passed in the one before.
    fn looks_after(poller: &mut Poller, pause: Duration) -> bool {
        poller.begin();
        std::thread::sleep(pause);
        poller.end();
        poller.begin()
    }

    #[test]
    fn auto_looks_while_messages_come_soon_and_gives_up_after_a_late_one() {
        let mut poller = Poller::new(Polling::Auto);
        assert!(!poller.begin(), "nothing is known yet");
        poller.end();
        // A busy host can make a moment long: it takes some tries for one that was short.
        let soon = (0..1000).any(|_| looks_after(&mut poller, Duration::ZERO));
        assert!(soon);
        assert!(!looks_after(&mut poller, Duration::from_millis(2)));
    }

    #[test]
    fn a_look_ends() {
        for mode in [Polling::Auto, Polling::Always] {
            let mut poller = Poller::new(mode);
            poller.begin();
            std::thread::sleep(2 * ALWAYS);
            assert!(!poller.again(), "{mode:?}");
        }
        let mut off = Poller::new(Polling::Off);
        assert!(!off.begin() && !off.again());
    }
}
