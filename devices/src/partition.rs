//! One HBM partition: its range, its memory, its owner, and the gate that engines pass to touch it.
//!
//! The gate is what makes a release safe. An engine enters it for one chunk of work, and only with the owner's
//! token; whoever takes the ownership away changes the token first and then waits until every engine has left.
//! After that the memory is touched by nobody but the scrubber.
//!
//! A partition gives its memory to nobody: whoever touches it says how, and what the device writes is told to the port
//! of the GPU that wrote, for the log of a VMM that migrates its guest ([`DmaPort::wrote`]).

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use numagpu_spec::regs::{
    Coherence, HISTORY_EVENT_SHIFT, HISTORY_TO_SHIFT, LEASE_ENDLESS, OwnerLoss, OwnerState,
    QueueFault,
};
use vm_memory::{VolatileMemoryError, VolatileSlice};

use crate::bus::{BackingId, DmaAccess, DmaPort, HbmStore};
use crate::coherence;
use crate::config::PartitionConfig;
use crate::health::Health;
use crate::ownership::{Circumstances, Duty, ENDLESS, Event, Machine, OnDisconnect, Step};
use crate::state::SavedPartition;

/// Pause between two looks at the gate: about the time of one chunk of a copy.
const GATE_PAUSE: Duration = Duration::from_micros(50);

/// A partition, shared by its GPU and, through the fabric, by the engines of its peers.
pub struct Partition {
    // Static configuration.
    base: u64,
    size: u64,
    pxm: Option<u32>,
    store: Arc<dyn HbmStore>,
    /// The store's file, and where it starts in it.
    backing: (BackingId, u64),
    in_aperture: bool,
    health: Arc<Health>,
    // Volatile state.
    /// A leaf lock, held for a step of the table only.
    machine: Mutex<Machine>,
    /// What `machine` says, for readers that take no lock. The token stays in the engine's check.
    owner: AtomicU64,
    state: AtomicU32,
    generation: AtomicU32,
    result: AtomicU32,
    loss: AtomicU32,
    lease_end: AtomicU64,
    coherence: AtomicU32,
    /// Engines at work inside.
    users: AtomicU32,
    fail_scrub: AtomicBool,
}

/// Snapshot of a partition.
#[derive(Clone, Debug)]
pub struct PartitionStatus {
    /// First address for packets.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Proximity domain, if it is in one.
    pub pxm: Option<u32>,
    /// Ownership state.
    pub state: OwnerState,
    /// Claims and frees so far.
    pub generation: u32,
    /// Why an owner last lost it without asking.
    pub loss: OwnerLoss,
    /// Whether and how the VMM maps it.
    pub coherence: Coherence,
    /// Last steps of the ownership machine, oldest first.
    pub history: Vec<Step>,
}

/// Leave to touch a partition's memory for one chunk of work; ends when it is dropped.
pub struct Entry<'p> {
    partition: &'p Partition,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.partition.users.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Partition {
    /// A free partition that no VMM maps yet. The caller has checked the configuration.
    pub(crate) fn new(
        config: &PartitionConfig,
        in_aperture: bool,
        health: &Arc<Health>,
    ) -> Partition {
        let coherence = if in_aperture {
            Coherence::Aperture
        } else {
            Coherence::NotMapped
        };
        Partition {
            base: config.base,
            size: config.size,
            pxm: config.pxm,
            store: Arc::clone(&config.store),
            backing: config.store.backing(),
            in_aperture,
            health: Arc::clone(health),
            machine: Mutex::new(Machine::new()),
            owner: AtomicU64::new(0),
            state: AtomicU32::new(OwnerState::Free.code()),
            generation: AtomicU32::new(0),
            result: AtomicU32::new(0),
            loss: AtomicU32::new(OwnerLoss::None.code()),
            lease_end: AtomicU64::new(0),
            coherence: AtomicU32::new(coherence.code()),
            users: AtomicU32::new(0),
            fail_scrub: AtomicBool::new(false),
        }
    }

    /// First address for packets.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// First address after it.
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }

    /// Proximity domain, if it is in one.
    pub fn pxm(&self) -> Option<u32> {
        self.pxm
    }

    /// The file of its memory, for a client to map.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.store.file()
    }

    /// Calls `f` with `len` bytes of its memory from `offset`; afterwards `port`, that of the GPU at work, hears of a
    /// write. None if it is a CPU: VMMs see those writes themselves. An engine is inside the gate.
    ///
    /// # Errors
    /// If the range is not inside the memory; then `f` was not called.
    pub(crate) fn touch(
        &self,
        offset: u64,
        len: u64,
        access: DmaAccess,
        port: Option<&dyn DmaPort>,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), VolatileMemoryError> {
        f(self.store.slice(offset, len)?);
        if let Some(port) = port.filter(|_| access.writes()) {
            let (file, start) = self.backing;
            port.wrote(file, start.saturating_add(offset), len);
        }
        Ok(())
    }

    /// Its GPU's memory errors.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// `PARTITION.STATE`.
    pub fn state_code(&self) -> u32 {
        self.state.load(Ordering::Acquire)
    }

    /// `PARTITION.GENERATION`.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// `PARTITION.RESULT`.
    pub fn result_code(&self) -> u32 {
        self.result.load(Ordering::Acquire)
    }

    /// `PARTITION.LOSS`.
    pub fn loss_code(&self) -> u32 {
        self.loss.load(Ordering::Acquire)
    }

    /// When the owner's lease ends, in nanoseconds of the device's clock; `None` if it does not, or there is no
    /// owner.
    pub fn lease_end(&self) -> Option<u64> {
        let end = self.lease_end.load(Ordering::Acquire);
        (end != 0 && end != ENDLESS).then_some(end)
    }

    /// `PARTITION.LEASE_LEFT_MS` at `now_ns`, rounded up: 0 means that it is over.
    pub fn lease_left_ms(&self, now_ns: u64) -> u32 {
        match self.lease_end.load(Ordering::Acquire) {
            0 => 0,
            ENDLESS => LEASE_ENDLESS,
            end => {
                let left = end.saturating_sub(now_ns).div_ceil(1_000_000);
                u32::try_from(left).unwrap_or(LEASE_ENDLESS - 1)
            }
        }
    }

    /// `PARTITION.HISTORY_COUNT`.
    pub fn history_count(&self) -> u32 {
        let count = self.lock().history().len();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// `PARTITION.HISTORY_STEP` and `HISTORY_NS` of the step with this number, 0 for the newest; zeros if there is
    /// none.
    pub fn history_step(&self, index: u64) -> (u32, u64) {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let machine = self.lock();
        machine.history().rev().nth(index).map_or((0, 0), |step| {
            let event = step.event.code() << HISTORY_EVENT_SHIFT;
            let to = step.to.code() << HISTORY_TO_SHIFT;
            (step.from.code() | event | to, step.at_ns)
        })
    }

    /// `PARTITION.COHERENCE`.
    pub fn coherence_code(&self) -> u32 {
        self.coherence.load(Ordering::Acquire)
    }

    /// Whether CPUs reach exactly this memory where they should: the VMM maps it at its planned address, or it is in
    /// the aperture.
    pub fn is_attached(&self) -> bool {
        let code = self.coherence.load(Ordering::SeqCst);
        code == Coherence::Coherent.code() || code == Coherence::Aperture.code()
    }

    /// Looks again at what the VMM maps; `None` stands for no VMM. HBM in an aperture is the same either way.
    pub fn judge_coherence(&self, dma: Option<&dyn DmaPort>) {
        if self.in_aperture {
            return;
        }
        let code = dma.map_or(Coherence::NotMapped, |dma| {
            coherence::judge(dma.mapped(self.base, self.size), self.backing)
        });
        self.coherence.store(code.code(), Ordering::SeqCst);
    }

    /// A driver's command. `with` is called under the machine's lock: a reset that comes first is seen.
    pub fn command(&self, command: u32, with: impl FnOnce() -> Circumstances, now_ns: u64) -> Duty {
        self.step(|machine| machine.command(command, with(), now_ns))
    }

    /// An incident that no driver asked for.
    pub fn incident(&self, event: Event, now_ns: u64) -> Duty {
        self.step(|machine| machine.incident(event, now_ns))
    }

    /// The VMM went away.
    pub fn disconnect(&self, contents: OnDisconnect, now_ns: u64) -> Duty {
        self.step(|machine| machine.disconnect(contents, now_ns))
    }

    /// Ends a lease that is over at `now_ns`.
    pub fn expire(&self, now_ns: u64) -> Duty {
        match self.lease_end() {
            Some(end) if now_ns >= end => self.step(|machine| machine.expire(now_ns)),
            _ => Duty::Nothing,
        }
    }

    /// Checks that `token` owns the partition and that it is attached, and keeps both the scrubber
    /// and the next owner out until the entry is dropped.
    ///
    /// # Errors
    /// [`QueueFault::NotOwned`] or [`QueueFault::NotCoherent`].
    pub fn enter(&self, token: u64) -> Result<Entry<'_>, QueueFault> {
        // Counted before it looks, as `scrub` changes the owner before it counts: one of them sees the other.
        self.users.fetch_add(1, Ordering::SeqCst);
        let entry = Entry { partition: self };
        if token == 0 || self.owner.load(Ordering::SeqCst) != token {
            return Err(QueueFault::NotOwned);
        }
        if !self.is_attached() {
            return Err(QueueFault::NotCoherent);
        }
        Ok(entry)
    }

    /// Waits until no engine is inside, then clears the memory and tells `wrote` where it is, as [`DmaPort::wrote`] is
    /// told. For the scrubber, after [`Duty::Scrub`].
    ///
    /// # Errors
    /// The store's error.
    pub fn scrub(&self, wrote: impl FnOnce(BackingId, u64, u64)) -> std::io::Result<()> {
        self.wait_until_left();
        if self.fail_scrub.swap(false, Ordering::AcqRel) {
            return Err(std::io::Error::other("as injected"));
        }
        let scrubbed = self.store.scrub(0, self.size);
        // One that failed may have cleared a part.
        let (file, start) = self.backing;
        wrote(file, start, self.size);
        scrubbed?;
        self.health.wrote(self.base, self.size);
        Ok(())
    }

    /// Waits until no engine is inside. For the scrubber, after [`Duty::Keep`].
    pub fn wait_until_left(&self) {
        while self.users.load(Ordering::SeqCst) != 0 {
            std::thread::sleep(GATE_PAUSE);
        }
    }

    /// The next scrub fails.
    pub fn fail_next_scrub(&self) {
        self.fail_scrub.store(true, Ordering::Release);
    }

    /// Snapshot.
    pub fn status(&self) -> PartitionStatus {
        let machine = self.lock();
        PartitionStatus {
            base: self.base,
            size: self.size,
            pxm: self.pxm,
            state: machine.state(),
            generation: machine.generation(),
            loss: machine.loss(),
            coherence: Coherence::from_code(self.coherence_code()).unwrap_or(Coherence::NotMapped),
            history: machine.history().copied().collect(),
        }
    }

    /// Its ownership.
    pub(crate) fn save(&self) -> SavedPartition {
        SavedPartition {
            fail_scrub: self.fail_scrub.load(Ordering::Acquire),
            ..self.lock().save()
        }
    }

    /// Puts a machine that was restored in the place of the partition's. What remains to be done.
    pub(crate) fn restore(&self, machine: Machine, fail_scrub: bool) -> Duty {
        self.fail_scrub.store(fail_scrub, Ordering::Release);
        self.step(|own| {
            *own = machine;
            match own.state() {
                OwnerState::Releasing => Duty::Scrub,
                _ => Duty::Nothing,
            }
        })
    }

    fn step(&self, f: impl FnOnce(&mut Machine) -> Duty) -> Duty {
        let mut machine = self.lock();
        let duty = f(&mut machine);
        // Published under the lock, so that two steps cannot publish in the wrong order.
        self.owner.store(machine.owner(), Ordering::SeqCst);
        self.generation
            .store(machine.generation(), Ordering::Release);
        self.result
            .store(machine.result().code(), Ordering::Release);
        self.loss.store(machine.loss().code(), Ordering::Release);
        self.lease_end.store(machine.lease_end(), Ordering::Release);
        self.state.store(machine.state().code(), Ordering::Release);
        duty
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
