//! A limit for log lines that a guest can cause.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may come in one period.
const LINES: u32 = 10;
/// The period.
const PERIOD: Duration = Duration::from_secs(5);

/// Lets a few lines through in each period and counts the others.
#[derive(Debug, Default)]
pub struct LogLimit {
    state: Mutex<Option<(Instant, u32)>>,
}

impl LogLimit {
    /// Whether a line may be written now.
    pub fn allow(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (since, lines) = match *state {
            Some((since, lines)) if now.duration_since(since) < PERIOD => (since, lines),
            _ => (now, 0),
        };
        *state = Some((since, lines.saturating_add(1)));
        lines < LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut() {
        let limit = LogLimit::default();
        let passed = (0..1000).filter(|_| limit.allow()).count();
        assert_eq!(passed, LINES as usize);
    }
}
