//! Copy queues: a ring, a doorbell, a worker.
//!
//! A queue's worker is a thread that starts when the queue is first enabled and waits at a channel until the
//! doorbell rings. Doorbells and register accesses take the queue's short lock `control` at most, which no one
//! holds while memory moves. Each run of a queue has an epoch; a stop ends the epoch, and what a worker of an
//! ended epoch still wants to publish is dropped.
//!
//! A pause (`Queue::hold`) is no stop: the worker leaves its run between two packets, drivers see no change, and when
//! the pause ends the worker takes the same run again.

mod doorbell;
mod state;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded};
use numagpu_spec::pci;
use numagpu_spec::regs::{IrqBits, QueueFault, QueueState, RING_MAX, RING_MIN};

use crate::engine::{Fault, Leave, Reach, Stop};
use crate::irq::Irq;
use crate::limit::LogLimit;
use crate::priority::Priorities;
use crate::timing::Stamp;
use crate::worker::work;

/// What the driver wrote into the registers of a queue when it enabled it.
#[derive(Clone)]
pub struct Setup {
    /// `RING_BASE`, a multiple of 256.
    pub ring_base: u64,
    /// `RING_SIZE`.
    pub ring_size: u32,
    /// `RPTR_WRITEBACK`, a multiple of 8; 0 = nowhere.
    pub writeback: u64,
    /// `WPTR_POLL`, a multiple of 8; 0 = nowhere.
    pub wptr_poll: u64,
    /// `PRIORITY`, 0 to 3.
    pub priority: u32,
    /// What the queue can reach.
    pub reach: Reach,
}

/// Snapshot of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueStatus {
    /// State.
    pub state: QueueState,
    /// Bytes consumed since enable.
    pub rptr: u64,
    /// Bytes produced since enable.
    pub wptr: u64,
    /// Packets completed since enable.
    pub packets: u64,
    /// Bytes copied, written and filled since enable.
    pub bytes: u64,
    /// Why it stopped.
    pub fault: QueueFault,
    /// Address that the fault is about.
    pub fault_address: u64,
    /// Index of the packet since enable.
    pub fault_packet: u64,
    /// Context of the last trap.
    pub trap_context: u32,
    /// Nanoseconds that packets took since enable.
    pub busy_ns: u64,
    /// When the last packet that moved data began.
    pub stamp_start_ns: u64,
    /// When it ended.
    pub stamp_end_ns: u64,
}

/// A packet that is done.
pub(crate) struct Done {
    /// Bytes that it took in the ring.
    pub(crate) ring_bytes: u64,
    /// Bytes that it moved.
    pub(crate) moved: u64,
    /// When it moved them, if it did.
    pub(crate) stamp: Option<Stamp>,
}

/// One enabled period of a queue.
pub(crate) struct Run {
    epoch: u64,
    pub(crate) setup: Setup,
    /// Added to the device's clock, wrapping, it is the queue's local time. Only the worker uses it.
    pub(crate) time_offset: AtomicU64,
    /// When the last packet ended, as [`crate::timing::QueueTime`] has it. Only the worker uses it.
    pub(crate) reached_ns: AtomicU64,
    /// The write pointer when the worker last took note of a doorbell. Only the worker uses it.
    pub(crate) seen_wptr: AtomicU64,
    /// Whether a kick came that the worker has not followed.
    pub(crate) kicked: AtomicBool,
}

impl Run {
    pub(crate) fn leave<'q>(&self, shared: &'q Shared) -> Leave<'q> {
        Leave {
            epoch: &shared.epoch,
            mine: self.epoch,
        }
    }

    /// Address of the ring byte with this unwrapped position.
    pub(crate) fn ring_address(&self, position: u64) -> u64 {
        let offset = position & u64::from(self.setup.ring_size).saturating_sub(1);
        self.setup.ring_base.saturating_add(offset)
    }
}

/// What `control` protects.
struct Control {
    run: Option<Arc<Run>>,
    /// Whether the worker is between taking a run and leaving it.
    active: bool,
    /// Pauses that have not ended.
    pauses: u32,
    /// Whether the run was restored and waits for its VMM.
    waits_for_vmm: bool,
}

/// What the registers show; written under `control`, read without it.
#[derive(Default)]
struct Shown {
    state: AtomicU32,
    rptr: AtomicU64,
    wptr: AtomicU64,
    packets: AtomicU64,
    bytes: AtomicU64,
    fault_code: AtomicU32,
    fault_address: AtomicU64,
    fault_packet: AtomicU64,
    trap_context: AtomicU32,
    busy_ns: AtomicU64,
    stamp_start_ns: AtomicU64,
    stamp_end_ns: AtomicU64,
}

impl Shown {
    /// Clears all but the state. Under `control`.
    fn clear(&self) {
        let Shown {
            state: _,
            rptr,
            wptr,
            packets,
            bytes,
            fault_code,
            fault_address,
            fault_packet,
            trap_context,
            busy_ns,
            stamp_start_ns,
            stamp_end_ns,
        } = self;
        let counters = [rptr, wptr, packets, bytes, busy_ns];
        let others = [fault_address, fault_packet, stamp_start_ns, stamp_end_ns];
        for cell in counters.into_iter().chain(others) {
            cell.store(0, Ordering::Release);
        }
        fault_code.store(0, Ordering::Release);
        trap_context.store(0, Ordering::Release);
    }
}

pub(crate) struct Shared {
    // Runtime glue.
    irq: Arc<Irq>,
    priorities: Arc<Priorities>,
    // Static configuration.
    index: u32,
    // Volatile state.
    control: Mutex<Control>,
    left: Condvar,
    /// An epoch ended or a pause begins: nobody waits for others any longer.
    ended: Condvar,
    /// Whether there are pauses, for the worker's look between two packets.
    held: AtomicBool,
    /// Ends the work of every worker that began with another value.
    epoch: AtomicU64,
    shown: Shown,
    /// The engine stands still until a reset of the queue.
    hung: AtomicBool,
    /// Doorbells that get lost.
    lose_doorbells: AtomicU32,
    log: LogLimit,
}

/// A copy queue.
pub struct Queue {
    shared: Arc<Shared>,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    /// Kicks carry the time when they were sent.
    kick: Sender<Instant>,
    thread: JoinHandle<()>,
}

impl Queue {
    /// A disabled queue without a worker. `priorities` are those of its GPU.
    pub fn new(index: u32, irq: Arc<Irq>, priorities: Arc<Priorities>) -> Queue {
        Queue {
            shared: Arc::new(Shared {
                irq,
                priorities,
                index,
                control: Mutex::new(Control {
                    run: None,
                    active: false,
                    pauses: 0,
                    waits_for_vmm: false,
                }),
                left: Condvar::new(),
                ended: Condvar::new(),
                held: AtomicBool::new(false),
                epoch: AtomicU64::new(0),
                shown: Shown::default(),
                hung: AtomicBool::new(false),
                lose_doorbells: AtomicU32::new(0),
                log: LogLimit::default(),
            }),
            worker: Mutex::new(None),
        }
    }

    /// Enables a disabled queue; does nothing in another state, or if `setup` gives nothing. `setup` is called
    /// under the queue's lock, so that a stop either comes before it or stops what it gives. A bad ring is a
    /// fault of the queue. Whether the queue is enabled now, if only to fault.
    pub fn enable(&self, setup: impl FnOnce() -> Option<Setup>) -> bool {
        let started = self.start_worker();
        let shared = &self.shared;
        let mut control = shared.lock();
        if shared.state() != QueueState::Disabled || control.active {
            return true;
        }
        let Some(setup) = setup() else {
            return false;
        };
        shared.shown.clear();
        let base = setup.ring_base;
        let fits = is_ring(base, setup.ring_size);
        let epoch = shared.next_epoch();
        control.waits_for_vmm = false;
        control.run = Some(Arc::new(Run {
            epoch,
            setup,
            time_offset: AtomicU64::new(0),
            reached_ns: AtomicU64::new(0),
            seen_wptr: AtomicU64::new(0),
            kicked: AtomicBool::new(false),
        }));
        if fits && started {
            shared.show_state(QueueState::Idle);
            return true;
        }
        let code = QueueFault::BadRing;
        shared.stop_with(
            &mut control,
            Fault {
                code,
                address: base,
            },
            0,
        );
        shared.announce_fault();
        true
    }

    /// Disables the queue; a faulted one stays faulted. When this returns, no worker touches memory for it:
    /// the wait is one chunk of a copy at most.
    pub fn disable(&self) {
        let control = self.shared.halt();
        if self.shared.state() != QueueState::Fault {
            self.shared.show_state(QueueState::Disabled);
        }
        drop(control);
    }

    /// Disables the queue and clears pointers, counters and fault. Waits as [`Queue::disable`].
    pub fn reset(&self) {
        let control = self.shared.halt();
        self.shared.shown.clear();
        self.shared.hung.store(false, Ordering::SeqCst);
        self.shared.show_state(QueueState::Disabled);
        drop(control);
    }

    /// Whether doorbells have an effect.
    pub(crate) fn is_enabled(&self) -> bool {
        !matches!(
            self.shared.state(),
            QueueState::Disabled | QueueState::Fault
        )
    }

    /// Bytes produced, as the last doorbell said.
    pub(crate) fn wptr(&self) -> u64 {
        self.shared.shown.wptr.load(Ordering::Acquire)
    }

    /// Wakes the worker.
    fn kick(&self) {
        if let Some(worker) = self.lock_worker().as_ref() {
            // Full means that a kick waits already.
            let _full = worker.kick.try_send(Instant::now());
        }
    }

    /// The engine stands still in the middle of its work, without a fault, until a reset of the queue.
    pub(crate) fn hang(&self) {
        self.shared.hung.store(true, Ordering::SeqCst);
    }

    /// The next `count` doorbells get lost.
    pub(crate) fn lose_doorbells(&self, count: u32) {
        self.shared.lose_doorbells.store(count, Ordering::SeqCst);
    }

    /// Snapshot; the values may come from neighbouring moments.
    pub fn status(&self) -> QueueStatus {
        let shown = &self.shared.shown;
        let fault = QueueFault::from_code(shown.fault_code.load(Ordering::Acquire));
        QueueStatus {
            state: self.shared.state(),
            rptr: shown.rptr.load(Ordering::Acquire),
            wptr: shown.wptr.load(Ordering::Acquire),
            packets: shown.packets.load(Ordering::Acquire),
            bytes: shown.bytes.load(Ordering::Acquire),
            fault: fault.unwrap_or(QueueFault::None),
            fault_address: shown.fault_address.load(Ordering::Acquire),
            fault_packet: shown.fault_packet.load(Ordering::Acquire),
            trap_context: shown.trap_context.load(Ordering::Acquire),
            busy_ns: shown.busy_ns.load(Ordering::Acquire),
            stamp_start_ns: shown.stamp_start_ns.load(Ordering::Acquire),
            stamp_end_ns: shown.stamp_end_ns.load(Ordering::Acquire),
        }
    }

    /// False if the host refuses a thread.
    fn start_worker(&self) -> bool {
        let mut worker = self.lock_worker();
        if worker.is_some() {
            return true;
        }
        let (kick, kicks) = bounded(1);
        let shared = Arc::clone(&self.shared);
        let name = format!("gpu-queue-{}", shared.index);
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || work(&shared, &kicks));
        match thread {
            Ok(thread) => {
                *worker = Some(Worker { kick, thread });
                true
            }
            Err(error) => {
                tracing::error!(%error, queue = self.shared.index, "no thread for a copy queue");
                false
            }
        }
    }

    fn lock_worker(&self) -> MutexGuard<'_, Option<Worker>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a ring may be there.
fn is_ring(base: u64, size: u32) -> bool {
    size.is_power_of_two()
        && (RING_MIN..=RING_MAX).contains(&size)
        && base.is_multiple_of(u64::from(RING_MIN))
        && base.checked_add(u64::from(size)).is_some()
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.reset();
        if let Some(Worker { kick, thread }) = self.lock_worker().take() {
            drop(kick);
            // A worker that panicked has said so.
            let _panicked = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> QueueState {
        let code = self.shown.state.load(Ordering::Acquire);
        QueueState::from_code(code).unwrap_or(QueueState::Disabled)
    }

    fn show_state(&self, state: QueueState) {
        self.shown.state.store(state.code(), Ordering::Release);
    }

    /// Ends the epoch; gives the next one. The caller holds `control`.
    fn next_epoch(&self) -> u64 {
        self.ended.notify_all();
        self.epoch.fetch_add(1, Ordering::SeqCst).wrapping_add(1)
    }

    /// Ends the epoch and waits until the worker has left it.
    fn halt(&self) -> MutexGuard<'_, Control> {
        let mut control = self.lock();
        self.next_epoch();
        control.run = None;
        while control.active {
            control = self
                .left
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
        control
    }

    /// Ends the epoch with a fault, without waiting.
    fn stop_with(&self, control: &mut Control, fault: Fault, packet: u64) {
        self.next_epoch();
        control.run = None;
        let shown = &self.shown;
        shown.fault_address.store(fault.address, Ordering::Release);
        shown.fault_packet.store(packet, Ordering::Release);
        shown.fault_code.store(fault.code.code(), Ordering::Release);
        self.show_state(QueueState::Fault);
    }

    /// Tells the driver and the log of a fault that [`Shared::stop_with`] noted. The caller still holds `control`, so that
    /// a reset, which clears the cause, comes before the fault or after its interrupt.
    fn announce_fault(&self) {
        self.irq.raise(IrqBits::FAULT.bits(), pci::VECTOR_EVENTS);
        if self.log.allow() {
            let code = self.shown.fault_code.load(Ordering::Acquire);
            let address = self.shown.fault_address.load(Ordering::Acquire);
            let code = QueueFault::from_code(code).map_or("?", QueueFault::name);
            tracing::info!(queue = self.index, code, "queue stopped at {address:#x}");
        }
    }

    /// Read and write pointer.
    pub(crate) fn pointers(&self) -> (u64, u64) {
        let shown = &self.shown;
        let rptr = shown.rptr.load(Ordering::Acquire);
        (rptr, shown.wptr.load(Ordering::Acquire))
    }

    /// The worker takes the enabled run, if there is one, and is active until [`Active`] is dropped.
    pub(crate) fn enter(&self) -> Option<(Active<'_>, Arc<Run>)> {
        let mut control = self.lock();
        if control.pauses > 0 || control.waits_for_vmm {
            return None;
        }
        let run = control.run.clone()?;
        control.active = true;
        Some((Active(self), run))
    }

    /// The ring is empty up to `rptr`: the queue is idle, unless the doorbell rang meanwhile. Whether it is.
    pub(crate) fn rest(&self, run: &Run, rptr: u64) -> Result<bool, Stop> {
        let _control = self.lock();
        run.leave(self).check()?;
        let kicked = run.kicked.load(Ordering::SeqCst);
        let empty = !kicked && self.shown.wptr.load(Ordering::Acquire) == rptr;
        if empty {
            self.show_state(QueueState::Idle);
        }
        Ok(empty)
    }

    /// A packet is done.
    pub(crate) fn advance(&self, run: &Run, done: &Done) -> Result<(), Stop> {
        // Under the lock, so that a stop that has returned is never followed by a new pointer.
        let _control = self.lock();
        run.leave(self).check()?;
        let shown = &self.shown;
        if let Some(Stamp { start_ns, end_ns }) = done.stamp {
            let busy = end_ns.saturating_sub(start_ns);
            shown.busy_ns.fetch_add(busy, Ordering::AcqRel);
            shown.stamp_start_ns.store(start_ns, Ordering::Release);
            shown.stamp_end_ns.store(end_ns, Ordering::Release);
        }
        shown.packets.fetch_add(1, Ordering::AcqRel);
        shown.bytes.fetch_add(done.moved, Ordering::AcqRel);
        shown.rptr.fetch_add(done.ring_bytes, Ordering::AcqRel);
        Ok(())
    }

    /// Which queues of the GPU have work.
    pub(crate) fn priorities(&self) -> &Priorities {
        &self.priorities
    }

    /// Lets `time` pass, or less if the run ends or the queue pauses: neither waits for it.
    pub(crate) fn pause(&self, run: &Run, time: Duration) -> Result<(), Stop> {
        let control = self.lock();
        self.go_on(run)?;
        let waited = self.ended.wait_timeout(control, time);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        self.go_on(run)
    }

    /// To be asked where the worker may leave the run and take it again later: between packets, and while it waits
    /// for others in one that has done nothing yet.
    pub(crate) fn go_on(&self, run: &Run) -> Result<(), Stop> {
        run.leave(self).check()?;
        match self.held.load(Ordering::SeqCst) {
            true => Err(Stop::Held),
            false => Ok(()),
        }
    }

    /// Stays here while the engine is hung.
    pub(crate) fn stand_still(&self, run: &Run) -> Result<(), Stop> {
        while self.hung.load(Ordering::SeqCst) {
            self.pause(run, Duration::from_secs(1))?;
        }
        Ok(())
    }

    /// Raises the queue's interrupt for a trap of `run`.
    pub(crate) fn trap(&self, run: &Run, context: u32) -> Result<(), Stop> {
        {
            let _control = self.lock();
            run.leave(self).check()?;
            self.shown.trap_context.store(context, Ordering::Release);
        }
        let vector = u16::try_from(self.index).unwrap_or(0);
        let bit = IrqBits::QUEUE0.bits().wrapping_shl(self.index);
        self.irq
            .raise(bit, pci::VECTOR_QUEUE0.saturating_add(vector));
        Ok(())
    }

    /// A fault that the worker of `run` met; dropped if the run is over.
    pub(crate) fn fail(&self, run: &Run, fault: Fault) {
        let mut control = self.lock();
        if run.leave(self).check().is_err() {
            return;
        }
        let packet = self.shown.packets.load(Ordering::Acquire);
        self.stop_with(&mut control, fault, packet);
        self.announce_fault();
    }
}

/// Says that the worker has left its run, also when it panics.
pub(crate) struct Active<'q>(&'q Shared);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.lock().active = false;
        self.0.left.notify_all();
    }
}
