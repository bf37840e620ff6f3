//! The body of the thread that calls [`Gpu::tick`] when something is due, and sleeps otherwise.

use std::sync::Weak;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};

use crate::gpu::Gpu;

/// Longest sleep while something is due: the device's clock need not go as fast as the host's.
const MOST: Duration = Duration::from_secs(1);
/// Shortest sleep, so that a clock that stands still costs nothing.
const LEAST: Duration = Duration::from_millis(1);

/// Ticks until the GPU is gone. A message says that something is due at another time than before.
pub(crate) fn work(gpu: &Weak<Gpu>, woken: &Receiver<()>) {
    loop {
        let Some(next) = gpu.upgrade().map(|gpu| gpu.tick()) else {
            return;
        };
        let woken = match next {
            None => woken.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(rest) => woken.recv_timeout(rest.clamp(LEAST, MOST)),
        };
        if woken == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}
