//! MSI-X messages, seen as what they are: words that the device writes to memory. And what stops a queue.

use std::time::Duration;

use numagpu_spec::regs::{self, IrqBits, QueueFault, QueueState};
use numagpu_spec::{pci, sdma};

use super::{COPY, COPY_IN, Drive, FOREIGN, MESSAGES, OTHER, QUEUE, TARGET, TOKEN};
use crate::device::{Device, Outcome, wait, wait_at_most};
use crate::sys::on_kvm;

/// How long a message may take that perhaps does not come.
const SHORT: Duration = Duration::from_secs(1);
/// Opcode that no engine has.
const BAD_OPCODE: u32 = 0xff;

/// A cause of interrupts whose message is waited for.
pub(super) struct Listener<'a> {
    drive: &'a Drive,
    device: &'a Device,
    vector: u16,
    bits: u32,
    data: u32,
}

impl Listener<'_> {
    fn slot(&self) -> usize {
        MESSAGES + usize::from(self.vector) * 8
    }

    /// Clears cause and message, and asks for the next.
    pub(super) fn arm(&self) -> Outcome {
        self.drive.buffer.write32(self.slot(), 0);
        let all = u64::from(u32::MAX);
        self.device.write(regs::irq::BASE, regs::irq::STATUS, all);
        if self.pending() {
            return Err("the pending bit does not clear".to_owned());
        }
        let bits = u64::from(self.bits);
        self.device.write(regs::irq::BASE, regs::irq::ENABLE, bits);
        Ok(())
    }

    /// Whether the cause is there.
    pub(super) fn pending(&self) -> bool {
        self.device.read32(regs::irq::BASE, regs::irq::STATUS) & self.bits != 0
    }

    /// Whether the message is.
    pub(super) fn arrived(&self) -> bool {
        self.drive.buffer.read32(self.slot()) == self.data
    }

    /// Waits for the cause and its message; the answer says what was seen.
    pub(super) fn heard(&self) -> Outcome<&'static str> {
        wait("pending bit", || self.pending().then_some(()))?;
        let arrived = || self.arrived().then_some(());
        let heard = if on_kvm() {
            let came = wait_at_most(SHORT, "MSI-X message", arrived);
            Ok(came.map_or(
                "pending bit seen; KVM delivers no message to memory",
                |()| "MSI-X message seen in memory",
            ))
        } else {
            wait("MSI-X message", arrived).map(|()| "MSI-X message seen in memory")
        };
        self.device.write(regs::irq::BASE, regs::irq::ENABLE, 0);
        heard
    }
}

impl Drive {
    /// Routes a vector to memory, clears all causes and enables `bits`.
    pub(super) fn listen(&self, index: usize, vector: u16, bits: IrqBits) -> Outcome<Listener<'_>> {
        let number = u32::try_from(index).unwrap_or(0);
        let listener = Listener {
            drive: self,
            device: &self.gpu(index)?.device,
            vector,
            bits: bits.bits(),
            data: 0x1234_0000 | u32::from(vector) << 8 | number,
        };
        let address = self.physical + listener.slot() as u64;
        let device = listener.device;
        device.route_vector(vector, address, listener.data)?;
        listener.arm()?;
        Ok(listener)
    }

    pub(super) fn interrupt(&self, index: usize) -> Outcome<String> {
        let listener = self.listen(index, pci::VECTOR_QUEUE0, IrqBits::QUEUE0)?;
        let device = listener.device;
        let raised = || device.read(regs::irq::BASE, regs::irq::RAISED);
        let before = raised();
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        let mut trap = |context: u32, fence: u32| {
            queue.push(&sdma::trap(context));
            queue.push_fence(1, fence);
            queue.go();
            queue.wait_fence(1, fence)?;
            let seen = queue.read(regs::queue::TRAP_CONTEXT);
            if seen != u64::from(context) {
                return Err(format!("TRAP_CONTEXT {seen:#x} instead of {context:#x}"));
            }
            Ok(())
        };
        trap(7, 1)?;
        let heard = listener.heard()?;
        if raised() != before + 1 {
            return Err(format!("IRQ.RAISED {} after {before}", raised()));
        }
        if on_kvm() {
            return Ok(heard.to_owned());
        }
        // A masked vector holds its message back, and sends it when it is unmasked (PCI Local Bus 3.0, section 6.8.3.4).
        device.mask_vector(pci::VECTOR_QUEUE0, true);
        listener.arm()?;
        trap(0x0abc_def0, 2)?;
        wait("pending bit", || listener.pending().then_some(()))?;
        std::thread::sleep(Duration::from_millis(5));
        if listener.arrived() {
            return Err("the message of a masked vector arrived".to_owned());
        }
        let held = device.is_vector_pending(pci::VECTOR_QUEUE0);
        device.mask_vector(pci::VECTOR_QUEUE0, false);
        let late = wait_at_most(SHORT, "message", || listener.arrived().then_some(()));
        device.write(regs::irq::BASE, regs::irq::ENABLE, 0);
        let (held, late) = match (held, late) {
            (true, Ok(())) => ("pending", "then sent"),
            (false, Ok(())) => ("not pending", "then sent"),
            (true, Err(_)) => ("pending", "then lost"),
            (false, Err(_)) => ("not pending", "then lost"),
        };
        Ok(format!("works: {heard}; masked: {held}, {late}"))
    }

    /// A packet that cannot be done stops its queue, says so by message, and leaves the other queue alone.
    pub(super) fn fault(&self, index: usize) -> Outcome<String> {
        let listener = self.listen(index, pci::VECTOR_EVENTS, IrqBits::FAULT)?;
        let number = self.second(index)?;
        let mut other = (number != 0)
            .then(|| self.queue(index, 0, QUEUE, TOKEN))
            .transpose()?;
        let mut alive = |value: u32| -> Outcome {
            let Some(queue) = &mut other else {
                return Ok(());
            };
            queue.push_fence(3, value);
            queue.go();
            queue.wait_fence(3, value)
        };
        alive(1)?;
        let mut bad = self.queue(index, number, FOREIGN, TOKEN)?;
        bad.push_fence(0, 1);
        bad.push(&[BAD_OPCODE]);
        bad.push_fence(1, 1);
        bad.go();
        bad.wait_stopped(QueueFault::BadOpcode)?;
        let packet = bad.read(regs::queue::FAULT_PACKET);
        if packet != 1 || bad.fence(0) != 1 || bad.fence(1) != 0 {
            let fences = (bad.fence(0), bad.fence(1));
            return Err(format!("packet {packet} stopped, fences {fences:?}"));
        }
        let heard = listener.heard()?;
        alive(2)?;
        bad.reset();
        if bad.state() != Some(QueueState::Disabled) {
            return Err(format!("state {:?} after reset", bad.state()));
        }
        let mut again = self.queue(index, number, FOREIGN, TOKEN)?;
        again.push_fence(1, 2);
        again.go();
        again.wait_fence(1, 2)?;
        again.check_drained()?;
        alive(3)?;
        Ok(format!("works: {heard}"))
    }

    /// A queue of another driver cannot read what is ours.
    pub(super) fn foreign(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let source = gpu.first()?.range.base + COPY_IN;
        self.buffer.fill(TARGET, COPY, 0xdead);
        let mut queue = self.queue(index, self.second(index)?, FOREIGN, OTHER)?;
        queue.push_copy(source, self.physical + TARGET as u64, COPY as u64);
        queue.push_fence(0, 1);
        queue.go();
        wait("fault", || {
            (queue.state() == Some(QueueState::Fault)).then_some(())
        })?;
        let code = queue.read(regs::queue::FAULT_CODE);
        let (address, packet) = (
            queue.read(regs::queue::FAULT_ADDR),
            queue.read(regs::queue::FAULT_PACKET),
        );
        if code != u64::from(QueueFault::NotOwned.code()) || address != source || packet != 0 {
            return Err(format!("fault {}", queue.fault()));
        }
        self.buffer.check(TARGET, COPY, 0xdead)?;
        let pending = gpu.device.read32(regs::irq::BASE, regs::irq::STATUS);
        if pending & IrqBits::FAULT.bits() == 0 {
            return Err(format!("IRQ.STATUS {pending:#x} shows no fault"));
        }
        queue.reset();
        if queue.state() != Some(QueueState::Disabled) {
            return Err(format!("state {:?} after reset", queue.state()));
        }
        Ok(String::new())
    }
}
