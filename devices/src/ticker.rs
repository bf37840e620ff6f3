//! A thread that calls [`Gpu::tick`] when something is due, and sleeps otherwise.

use std::sync::{Mutex, PoisonError, Weak};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::gpu::Gpu;

/// Longest sleep while something is due: the device's clock need not go as fast as the host's.
const MOST: Duration = Duration::from_secs(1);
/// Shortest sleep, so that a clock that stands still costs nothing.
const LEAST: Duration = Duration::from_millis(1);

/// The ticker of one GPU; its thread starts when it is first woken.
pub(crate) struct Ticker {
    gpu: Weak<Gpu>,
    wake: Mutex<Option<Sender<()>>>,
}

impl Ticker {
    pub(crate) fn new(gpu: Weak<Gpu>) -> Ticker {
        Ticker {
            gpu,
            wake: Mutex::new(None),
        }
    }

    /// As [`Ticker::wake`], if something was ever due.
    pub(crate) fn wake_if_used(&self) {
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = wake.as_ref() {
            let _full = wake.try_send(());
        }
    }

    /// Something is due at another time than before.
    pub(crate) fn wake(&self) {
        let mut wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if wake.is_none() {
            let (sender, woken) = bounded(1);
            let gpu = Weak::clone(&self.gpu);
            let thread = std::thread::Builder::new().name("gpu-ticker".into());
            match thread.spawn(move || work(&gpu, &woken)) {
                // Not joined: it ends with its channel, and does not keep the GPU.
                Ok(_thread) => *wake = Some(sender),
                Err(error) => tracing::error!(%error, "no thread for what is due later"),
            }
        }
        if let Some(wake) = wake.as_ref() {
            // Full means that it is about to look.
            let _full = wake.try_send(());
        }
    }
}

fn work(gpu: &Weak<Gpu>, woken: &Receiver<()>) {
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
