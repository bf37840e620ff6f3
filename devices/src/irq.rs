//! Interrupt causes: pending bits, enables, and the message.
//!
//! A cause sets its bit in `IRQ.STATUS` whatever is enabled; a message goes out only where `IRQ.ENABLE` has
//! the bit and the function is bus master. Masking of single vectors is the VMM's business, which emulates the MSI-X table. The block's
//! registers live in the register file, where the driver's write-1-to-clear meets the device's set atomically.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numagpu_spec::regs::irq;
use numagpu_spec::table::Reg;

use crate::bus::InterruptSink;
use crate::registers::{RegisterFile, address};

/// The interrupt block of one GPU. `sink` is a leaf lock: nothing else is locked while it is held, and
/// [`InterruptSink::trigger`] must not call back into the function.
pub struct Irq {
    registers: Arc<RegisterFile<'static>>,
    /// Whether the function may write to memory, as a message is one (PCI Local Bus 3.0 section 6.8.3).
    bus_master: Arc<AtomicBool>,
    sink: Mutex<Option<Arc<dyn InterruptSink>>>,
    /// See [`Irq::hold_resets`]. Taken before the lock of a partition's machine.
    resets: Mutex<()>,
    /// Messages that get lost.
    lose: AtomicU32,
    causes: AtomicU64,
}

impl Irq {
    /// The block whose registers are in `registers`; it sends messages while `bus_master` is set.
    pub fn new(registers: Arc<RegisterFile<'static>>, bus_master: Arc<AtomicBool>) -> Irq {
        Irq {
            registers,
            bus_master,
            lose: AtomicU32::new(0),
            causes: AtomicU64::new(0),
            sink: Mutex::new(None),
            resets: Mutex::new(()),
        }
    }

    /// Messages sent since reset.
    pub fn raised(&self) -> u64 {
        self.registers.get(&irq::BLOCK, 0, &irq::RAISED)
    }

    /// Connects the block to a VMM, or with `None` takes it off. When this returns the old sink is unused.
    pub fn connect(&self, sink: Option<Arc<dyn InterruptSink>>) {
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = sink;
    }

    /// Causes since power-on, whether a message was sent or not.
    pub fn causes(&self) -> u64 {
        self.causes.load(Ordering::Acquire)
    }

    /// Keeps a reset from clearing the causes. What happens and is raised under it lies before a reset, which clears its
    /// cause, or after it: none is cleared first and then set for what was before.
    pub(crate) fn hold_resets(&self) -> MutexGuard<'_, ()> {
        self.resets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A cause: sets `bits`, and sends the message of `vector` if one of them is enabled.
    pub fn raise(&self, bits: u32, vector: u16) {
        self.set_and_send(bits, vector);
        self.causes.fetch_add(1, Ordering::AcqRel);
    }

    fn set_and_send(&self, bits: u32, vector: u16) {
        self.update(&irq::STATUS, |cell| {
            cell.fetch_or(u64::from(bits), Ordering::AcqRel);
        });
        if self.registers.get(&irq::BLOCK, 0, &irq::ENABLE) & u64::from(bits) == 0 {
            return;
        }
        if !self.bus_master.load(Ordering::SeqCst) {
            return;
        }
        let lost = self
            .lose
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        if lost.is_ok() {
            return;
        }
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = sink.as_ref() {
            // Counted before it goes out, so that the handler finds it counted.
            self.update(&irq::RAISED, |cell| {
                cell.fetch_add(1, Ordering::AcqRel);
            });
            // Nobody listening is no fault: the bit stays pending.
            let _heard = sink.trigger(vector);
        }
    }

    /// The next `count` messages get lost on their way; their bits in `IRQ.STATUS` do not.
    pub fn lose_next(&self, count: u32) {
        self.lose.store(count, Ordering::Release);
    }

    /// Sends the message of `vector` for no cause. Nothing if no VMM is there or the function is no bus master.
    pub fn spurious(&self, vector: u16) {
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = sink
            .as_ref()
            .filter(|_| self.bus_master.load(Ordering::SeqCst))
        {
            let _heard = sink.trigger(vector);
        }
    }

    /// Messages that get lost, and causes since power-on.
    pub(crate) fn save(&self) -> (u32, u64) {
        (self.lose.load(Ordering::Acquire), self.causes())
    }

    /// As [`Irq::save`] found it.
    pub(crate) fn restore(&self, lose: u32, causes: u64) {
        self.lose.store(lose, Ordering::Release);
        self.causes.store(causes, Ordering::Release);
    }

    fn update(&self, reg: &Reg, f: impl FnOnce(&std::sync::atomic::AtomicU64)) {
        if let Some(cell) =
            address(&irq::BLOCK, 0, reg).and_then(|offset| self.registers.cell(offset))
        {
            f(cell);
        }
    }
}
