//! A GPU's own threads: each starts when it is first needed, sleeps until it is woken, and ends with the GPU.

use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::gpu::Gpu;

/// What a thread does until its channel or its GPU is gone; a message says that there is something to look at.
type Body = fn(&Weak<Gpu>, &Receiver<()>);

/// One thread of a GPU.
pub(crate) struct OnDemand {
    name: &'static str,
    body: Body,
    gpu: Weak<Gpu>,
    wake: Mutex<Option<Sender<()>>>,
}

impl OnDemand {
    /// A thread of this name (at most 15 bytes), that does not run yet.
    pub(crate) fn new(name: &'static str, gpu: Weak<Gpu>, body: Body) -> OnDemand {
        OnDemand {
            name,
            body,
            gpu,
            wake: Mutex::new(None),
        }
    }

    /// Wakes the thread; starts it if it does not run.
    pub(crate) fn wake(&self) {
        let mut wake = self.lock();
        if wake.is_none() {
            let (sender, woken) = bounded(1);
            let (body, gpu) = (self.body, Weak::clone(&self.gpu));
            let thread = std::thread::Builder::new().name(self.name.into());
            match thread.spawn(move || body(&gpu, &woken)) {
                // Not joined: it ends with its channel, and does not keep the GPU.
                Ok(_thread) => *wake = Some(sender),
                Err(error) => tracing::error!(%error, thread = self.name, "cannot start a thread"),
            }
        }
        send(wake.as_ref());
    }

    /// Wakes the thread if it runs.
    pub(crate) fn wake_if_used(&self) {
        send(self.lock().as_ref());
    }

    fn lock(&self) -> MutexGuard<'_, Option<Sender<()>>> {
        self.wake.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send(wake: Option<&Sender<()>>) {
    // Full means that it is about to look.
    let _full = wake.map(|wake| wake.try_send(()));
}
