//! Doorbells that a client maps: memory that drivers store to without an exit, and a thread that looks at it.
//!
//! A VMM that may map one BAR of a function sends the writes to all others one by one and waits for each answer (QEMU
//! does), so a GPU with a mapped aperture has its doorbell page mapped too. Nothing tells the device of a store there:
//! a thread looks, without a pause while doorbells come one after another, then ever more rarely, and not at all
//! while no queue is enabled.
//!
//! A slot is a letter box: the look takes the value out and leaves zero, as the register reads. So a driver that rings
//! again with the same value, after a doorbell got lost, is heard.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use numagpu_spec::pci;
use vm_memory::VolatileMemory;

use crate::bus::HbmStore;
use crate::gpu::Gpu;
use crate::on_demand::OnDemand;
use crate::queue::Queue;

/// How long the thread looks without a pause after a doorbell.
const EAGER: Duration = Duration::from_micros(50);
/// Its shortest pause after that.
const FIRST_PAUSE: Duration = Duration::from_micros(20);
/// A pause's part of the time since the last doorbell: a driver that rings again waits at most as much longer than it
/// waited anyway.
const PART: u32 = 16;
/// The longest pause: what the first doorbell after a rest of 64 ms or more waits at most. It costs 250 looks a second.
const LONGEST_PAUSE: Duration = Duration::from_millis(4);

/// The page of doorbells that clients map.
pub(crate) struct MappedDoorbells {
    store: Arc<dyn HbmStore>,
    /// High halves that came by themselves, as drivers write them that can store 32 bits only. Held while values are
    /// taken and rung, so that whoever clears the page knows that nothing of before is on its way.
    high: Mutex<Vec<u64>>,
    poller: OnDemand,
}

impl MappedDoorbells {
    /// The doorbells of `queues` queues in `store`, which has the size of the BAR.
    pub(crate) fn new(store: Arc<dyn HbmStore>, queues: u32, gpu: Weak<Gpu>) -> MappedDoorbells {
        MappedDoorbells {
            store,
            high: Mutex::new((0..queues).map(|_| 0).collect()),
            poller: OnDemand::new("gpu-doorbells", gpu, poll),
        }
    }

    /// The file that shows the page.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.store.file()
    }

    /// Rings the queues whose doorbells were written since the last look. Whether there were any.
    pub(crate) fn look(&self, queues: &[Queue]) -> bool {
        let mut high = self.lock();
        let mut rung = false;
        for ((slot, queue), high) in (0..).zip(queues).zip(high.iter_mut()) {
            let value = self.take(slot);
            if value == 0 {
                continue;
            }
            rung = true;
            if value >> 32 != 0 {
                *high = value & !0xffff_ffff;
            }
            if value & 0xffff_ffff != 0 {
                queue.doorbell(*high | value);
            } else if value > queue.wptr() {
                // All of a pointer, or the half that came first: as far as that the ring is filled in either case.
                queue.doorbell(value);
            }
        }
        rung
    }

    /// Forgets what was written to a queue's doorbell. When this returns, no value of before is on its way.
    pub(crate) fn clear(&self, queue: u32) {
        let mut all = self.lock();
        if let Some(high) = all.get_mut(queue as usize) {
            self.take(queue.into());
            *high = 0;
        }
    }

    /// As [`MappedDoorbells::clear`], for all queues.
    pub(crate) fn reset(&self) {
        let mut all = self.lock();
        for (slot, high) in (0..).zip(all.iter_mut()) {
            self.take(slot);
            *high = 0;
        }
    }

    /// The thread that looks.
    pub(crate) fn poller(&self) -> &OnDemand {
        &self.poller
    }

    fn take(&self, slot: u64) -> u64 {
        let offset = slot.saturating_mul(pci::DOORBELL_STRIDE);
        let Ok(cell) = self.store.slice(offset, pci::DOORBELL_STRIDE) else {
            return 0;
        };
        let word = cell.get_atomic_ref::<AtomicU64>(0);
        // What the driver stored in memory before it rang is there for the queue that the value goes to.
        word.map_or(0, |word| match word.load(Ordering::Relaxed) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u64>> {
        self.high.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Body of the thread.
fn poll(gpu: &Weak<Gpu>, woken: &Receiver<()>) {
    let mut last = Instant::now();
    loop {
        let Some(look) = gpu.upgrade().map(|gpu| gpu.look_at_doorbells()) else {
            return;
        };
        match look {
            None => {
                if woken.recv().is_err() {
                    return;
                }
                last = Instant::now();
            }
            Some(true) => last = Instant::now(),
            Some(false) => match pause(last.elapsed()) {
                Some(pause) => std::thread::sleep(pause),
                None => std::thread::yield_now(),
            },
        }
    }
}

/// How long not to look, `rest` after the last doorbell; none if there is to be no pause.
fn pause(rest: Duration) -> Option<Duration> {
    (rest >= EAGER).then(|| (rest / PART).clamp(FIRST_PAUSE, LONGEST_PAUSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_a_sixteenth_of_the_rest() {
        let [us, ms] = [Duration::from_micros, Duration::from_millis];
        assert_eq!(pause(us(49)), None);
        assert_eq!(pause(us(50)), Some(us(20)));
        assert_eq!(pause(ms(8)), Some(us(500)));
        assert_eq!(pause(ms(64)), Some(ms(4)));
        assert_eq!(pause(Duration::from_secs(3600)), Some(ms(4)));
    }
}
