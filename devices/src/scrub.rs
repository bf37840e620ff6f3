//! The scrubber: clears partitions that were given up, behind the backs of registers and queues.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};
use numagpu_spec::pci;
use numagpu_spec::regs::IrqBits;

use crate::bus::Attachment;
use crate::clock::Clock;
use crate::irq::Irq;
use crate::limit::LogLimit;
use crate::ownership::{Duty, Event};
use crate::partition::Partition;

/// What the scrubber and its callers share.
struct Shared {
    irq: Arc<Irq>,
    clock: Arc<dyn Clock>,
    /// Whose log hears of what was cleared.
    attachment: Arc<Mutex<Option<Attachment>>>,
    log: LogLimit,
    /// Jobs given and not yet done. Bounded: a partition asks for two at most, see [`crate::ownership`].
    pending: Mutex<usize>,
    done: Condvar,
}

/// What is to be done with a partition that was given up.
#[derive(Clone, Copy)]
enum Work {
    /// Wait until engines are out, and clear it.
    Clear,
    /// Wait only.
    Keep,
}

/// A partition and what is to be done with it.
type Job = (Arc<Partition>, Work);

/// The scrubber of one GPU; its thread starts with the first job.
pub struct Scrubber {
    shared: Arc<Shared>,
    jobs: Mutex<Option<Sender<Job>>>,
}

impl Scrubber {
    /// A scrubber that tells of lost partitions through `irq`, and of what it cleared to the VMM that is attached then.
    pub fn new(
        irq: Arc<Irq>,
        clock: Arc<dyn Clock>,
        attachment: Arc<Mutex<Option<Attachment>>>,
    ) -> Scrubber {
        Scrubber {
            shared: Arc::new(Shared {
                irq,
                clock,
                attachment,
                log: LogLimit::default(),
                pending: Mutex::new(0),
                done: Condvar::new(),
            }),
            jobs: Mutex::new(None),
        }
    }

    /// Does the duty that a step of a partition's ownership left.
    pub fn settle(&self, partition: &Arc<Partition>, duty: Duty) {
        match duty {
            Duty::Nothing => {}
            Duty::Notify => self.shared.notify(),
            Duty::Scrub => self.give(partition, Work::Clear),
            Duty::Keep => self.give(partition, Work::Keep),
        }
    }

    /// Waits until no job is left, or `limit` is over. Whether no job is left.
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let lock = self.shared.pending.lock();
        let mut pending = lock.unwrap_or_else(PoisonError::into_inner);
        while *pending > 0 {
            let Some(rest) = end.checked_duration_since(Instant::now()) else {
                return false;
            };
            let woken = self.shared.done.wait_timeout(pending, rest);
            pending = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn give(&self, partition: &Arc<Partition>, work: Work) {
        {
            let lock = self.shared.pending.lock();
            *lock.unwrap_or_else(PoisonError::into_inner) += 1;
        }
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.is_none() {
            let (sender, receiver) = unbounded();
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("gpu-scrub".into());
            match thread.spawn(move || shared.work(&receiver)) {
                // Not joined: it ends with its channel, and holds nothing but what it scrubs.
                Ok(_thread) => *jobs = Some(sender),
                Err(error) => tracing::error!(%error, "no thread for the scrubber"),
            }
        }
        let sent = jobs
            .as_ref()
            .is_some_and(|jobs| jobs.send((Arc::clone(partition), work)).is_ok());
        drop(jobs);
        if !sent {
            // Slow but safe: here and now.
            self.shared.job(partition, work);
        }
    }
}

impl Shared {
    fn work(&self, jobs: &Receiver<Job>) {
        for (partition, work) in jobs {
            self.job(&partition, work);
        }
    }

    fn job(&self, partition: &Partition, work: Work) {
        let done = match work {
            Work::Clear => {
                let scrubbed = partition.scrub(|file, offset, len| {
                    // Held while it is used: a detach waits.
                    let attachment = self.attachment.lock();
                    let attachment = attachment.unwrap_or_else(PoisonError::into_inner);
                    if let Some(attachment) = &*attachment {
                        attachment.dma.wrote(file, offset, len);
                    }
                });
                scrubbed.map(|()| Event::Scrubbed)
            }
            Work::Keep => {
                partition.wait_until_left();
                Ok(Event::Kept)
            }
        };
        let event = match done {
            Ok(event) => event,
            Err(error) => {
                if self.log.allow() {
                    tracing::error!(%error, "HBM at {:#x} cannot be scrubbed", partition.base());
                }
                Event::ScrubFailed
            }
        };
        let held = self.irq.hold_resets();
        if partition.incident(event, self.clock.now_ns()) == Duty::Notify {
            self.notify();
        }
        drop(held);
        let lock = self.pending.lock();
        let mut pending = lock.unwrap_or_else(PoisonError::into_inner);
        *pending = pending.saturating_sub(1);
        self.done.notify_all();
    }

    fn notify(&self) {
        self.irq
            .raise(IrqBits::OWNERSHIP.bits(), pci::VECTOR_EVENTS);
    }
}
