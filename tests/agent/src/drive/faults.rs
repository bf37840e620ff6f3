//! Faults of the host's scenario, as a driver meets them, and the way back from each.
//!
//! The scenario ties each fault of the first GPU to a number of packets of its second queue, which does nothing else:
//! the driver chooses the moment by the number of packets that it gives that queue. A fault that does not show at once
//! is followed, at the same number, by a corrected memory error at an address of its own, which does.

use std::time::{Duration, Instant};

use numagpu_spec::pci;
use numagpu_spec::regs::{
    self, BootState, IrqBits, LinkState, OwnerCommand as C, OwnerResult as R, OwnerState,
    QueueFault, QueueState, RasKind, boot, identity, irq, link, partition, queue as q, ras,
};
use numagpu_spec::sdma;
use numagpu_topology::seen::{Step, steps};

use super::{COPY, COPY_IN, Drive, FOREIGN, HELD, MESSAGES, QUEUE, SOURCE, TARGET, TOKEN};
use crate::device::{Device, Outcome, Queue, wait};
use crate::sys::on_kvm;

/// The GPU with the faults, and its peer, which has one that comes before its first boot.
const GPU: usize = 0;
const PEER: usize = 1;
/// Queue that counts.
const COUNTING: u32 = 1;
/// A packet that is skipped.
const NOP: u32 = sdma::OP_NOP as u32;
/// What the scenario's boot failures show.
const BOOT_FAULT: u32 = 0x42;
/// How long the scenario's stuck reset is stuck.
const STUCK: Duration = Duration::from_millis(1500);
/// Where the scenario spoils a line.
const SPOILT: u64 = HELD + 0x40;
/// Bytes of a line.
const LINE: u64 = 64;
/// How long what must not come is waited for.
const SHORT: Duration = Duration::from_millis(50);

/// A fault by name, and what is done with it at the number of its packets.
type Trial<'a> = (&'static str, fn(&mut Faults<'a>, u64) -> Outcome<String>);

/// Every fault, in the order of its packets. Function-level resets end the count, so what needs one comes late.
fn trials<'a>() -> [Trial<'a>; 16] {
    [
        (steps::faults::CORRECTABLE, Faults::correctable),
        (steps::faults::UNCORRECTABLE, Faults::uncorrectable),
        (steps::faults::ENGINE_HANG, Faults::engine_hang),
        (steps::faults::LOST_DOORBELL, Faults::lost_doorbell),
        (steps::faults::LOST_INTERRUPT, Faults::lost_interrupt),
        (
            steps::faults::SPURIOUS_INTERRUPT,
            Faults::spurious_interrupt,
        ),
        (steps::faults::LINK_FLAP, Faults::link_flap),
        (steps::faults::LINK_LOSS, Faults::link_loss),
        (steps::faults::LINK_RETURN, Faults::link_return),
        (steps::faults::LINK_WIDTH, Faults::link_width),
        (steps::faults::SCRUB_FAILURE, Faults::scrub_failure),
        (steps::faults::BOOT_FAILURE, Faults::boot_failure),
        (steps::faults::BOOT_TIMEOUT, Faults::boot_timeout),
        (steps::faults::STUCK_RESET, Faults::stuck_reset),
        (steps::faults::REMOVAL, Faults::removal),
        (steps::faults::RETURN, Faults::comes_back),
    ]
}

/// The GPUs at work, and the queue that counts.
struct Faults<'a> {
    drive: &'a Drive,
    counting: Option<(Queue<'a>, u64)>,
}

impl Drive {
    /// Meets every fault of the scenario.
    pub fn faults(&mut self) {
        let mut outcomes = vec![(steps::faults::FIRST_BOOT, self.first_boots())];
        let mut faults = Faults {
            drive: self,
            counting: None,
        };
        for (packets, (name, trial)) in (1..).zip(trials()) {
            outcomes.push((name, trial(&mut faults, packets)));
        }
        if let Some(gpu) = self.gpus.get_mut(GPU) {
            let step = |(name, outcome): (&str, Outcome<String>)| {
                let (ok, detail) = match outcome {
                    Ok(detail) => (true, detail),
                    Err(error) => (false, error),
                };
                Step {
                    name: name.to_owned(),
                    ok,
                    detail,
                }
            };
            gpu.seen.steps.extend(outcomes.into_iter().map(step));
        }
    }

    /// The first GPU boots; the second does at the second attempt. Both are claimed.
    fn first_boots(&self) -> Outcome<String> {
        let second = &self.gpu(PEER)?.device;
        self.gpu(GPU)?.device.boot()?;
        expect_boot_fault(second)?;
        second.reset().map_err(|error| format!("reset: {error}"))?;
        second.boot()?;
        for gpu in &self.gpus {
            gpu.device.wait_free(0)?;
            gpu.device.expect(0, C::Claim, TOKEN, R::Ok)?;
        }
        Ok(format!("works: fault {BOOT_FAULT:#x}, then ready"))
    }
}

/// Boots a device that is to fail.
fn expect_boot_fault(device: &Device) -> Outcome {
    match device.boot() {
        Ok(()) => return Err("it booted".to_owned()),
        Err(_) if device.read32(boot::BASE, boot::FAULT) == BOOT_FAULT => {}
        Err(error) => return Err(error),
    }
    let state = device.read32(boot::BASE, boot::STATUS);
    if state != BootState::Fault.code() {
        return Err(format!("boot state {state} with a fault"));
    }
    // Only a reset gives another try.
    device.write(boot::BASE, boot::CONTROL, u64::from(regs::BOOT_START));
    match device.read32(boot::BASE, boot::STATUS) == state {
        true => Ok(()),
        false => Err("it starts again without a reset".to_owned()),
    }
}

impl<'a> Faults<'a> {
    fn device(&self) -> Outcome<&'a Device> {
        Ok(&self.drive.gpu(GPU)?.device)
    }

    /// First address of a GPU's HBM.
    fn hbm(&self, index: usize) -> Outcome<u64> {
        Ok(self.drive.gpu(index)?.first()?.range.base)
    }

    fn ras(&self, reg: numagpu_spec::table::Reg) -> Outcome<u64> {
        Ok(self.device()?.read(ras::BASE, reg))
    }

    /// The queue whose packets are not counted, enabled.
    fn queue(&self) -> Outcome<Queue<'a>> {
        self.drive.queue(GPU, 0, QUEUE, TOKEN)
    }

    /// Lets the counting queue complete so many packets since it was enabled.
    fn count(&mut self, packets: u64) -> Outcome {
        let (queue, done) = match &mut self.counting {
            Some(counting) => counting,
            counting => {
                let queue = self.drive.queue(GPU, COUNTING, FOREIGN, TOKEN)?;
                counting.insert((queue, 0))
            }
        };
        while *done < packets {
            queue.push(&[NOP]);
            *done += 1;
        }
        queue.go();
        wait("the packets that are counted", || {
            (queue.read(q::PACKETS) == packets).then_some(())
        })
    }

    /// The same for a fault that does not show: waits for the memory error that follows it.
    fn count_and_wait(&mut self, packets: u64) -> Outcome {
        self.count(packets)?;
        let device = self.device()?;
        let address = self.hbm(GPU)? + packets * 0x1000;
        wait("the error that follows a fault", || {
            (device.read(ras::BASE, ras::LAST_ADDRESS) == address).then_some(())
        })
    }

    /// Resets the function, which ends the count.
    fn reset(&mut self) -> Outcome<&'a Device> {
        self.counting = None;
        let device = self.device()?;
        device.reset().map_err(|error| format!("reset: {error}"))?;
        Ok(device)
    }

    /// Boots and claims as at the beginning.
    fn start(&self) -> Outcome {
        let device = self.device()?;
        device.boot()?;
        device.wait_free(0)?;
        device.expect(0, C::Claim, TOKEN, R::Ok)
    }

    /// The HBM works: a copy into it arrives.
    fn works(&self) -> Outcome {
        self.drive.copy_in(GPU).map(drop)
    }

    /// Copies from the peer's HBM.
    fn copy_from_peer(&self) -> Outcome<Queue<'a>> {
        let mut queue = self.queue()?;
        let (from, to) = (self.hbm(PEER)? + COPY_IN, self.hbm(GPU)? + COPY_IN);
        queue.push_copy(from, to, COPY as u64);
        queue.push_fence(0, 0x600d);
        queue.go();
        Ok(queue)
    }

    fn correctable(&mut self, packets: u64) -> Outcome<String> {
        let listener = self.drive.listen(GPU, pci::VECTOR_EVENTS, IrqBits::RAS)?;
        let before = self.ras(ras::CORRECTABLE)?;
        self.count_and_wait(packets)?;
        let heard = listener.heard()?;
        let (count, kind) = (self.ras(ras::CORRECTABLE)?, self.ras(ras::LAST_KIND)?);
        if count != before + 1 || kind != u64::from(RasKind::Correctable.code()) {
            return Err(format!("{before} errors, then {count}, kind {kind}"));
        }
        self.works()?;
        Ok(format!("works: {heard}"))
    }

    fn uncorrectable(&mut self, packets: u64) -> Outcome<String> {
        let hbm = self.drive.gpu(GPU)?.first()?;
        let line = hbm.range.base + SPOILT;
        hbm.map(HELD)?.fill(0, 0x1000, 7);
        let listener = self.drive.listen(GPU, pci::VECTOR_EVENTS, IrqBits::RAS)?;
        self.count(packets)?;
        let heard = listener.heard()?;
        let shown = [
            ras::UNCORRECTABLE,
            ras::POISONED,
            ras::LAST_ADDRESS,
            ras::LAST_KIND,
        ];
        let mut seen = [0; 4];
        for (seen, reg) in seen.iter_mut().zip(shown) {
            *seen = self.ras(reg)?;
        }
        if seen != [1, 1, line, RasKind::Uncorrectable.code().into()] {
            return Err(format!("RAS shows {seen:x?}, the line is {line:#x}"));
        }
        let read = || -> Outcome<Queue<'_>> {
            let mut queue = self.queue()?;
            let target = self.drive.physical + TARGET as u64;
            queue.push_copy(hbm.range.base + HELD, target, 0x1000);
            queue.push_fence(0, 1);
            queue.go();
            Ok(queue)
        };
        let queue = read()?;
        queue.wait_stopped(QueueFault::Poisoned)?;
        let at = queue.read(q::FAULT_ADDR);
        if at != line {
            return Err(format!("fault at {at:#x}, the line is {line:#x}"));
        }
        // CPUs are not hindered. What is written anew by an engine is good again.
        hbm.map(HELD)?.check(0, 0x1000, 7)?;
        let mut queue = self.queue()?;
        queue.push(&sdma::const_fill(line, 0, LINE));
        queue.push_fence(0, 1);
        queue.go();
        queue.wait_fence(0, 1)?;
        read()?.wait_fence(0, 1)?;
        match self.ras(ras::POISONED)? {
            0 => Ok(format!("works: {heard}, Poisoned at {line:#x}")),
            pages => Err(format!("{pages} pages poisoned in the end")),
        }
    }

    fn engine_hang(&mut self, packets: u64) -> Outcome<String> {
        let mut queue = self.queue()?;
        queue.push_fence(0, 1);
        queue.go();
        queue.wait_fence(0, 1)?;
        self.count_and_wait(packets)?;
        let before = (queue.read(q::RPTR), queue.read(q::PACKETS));
        queue.push_fence(0, 2);
        queue.go();
        std::thread::sleep(SHORT);
        let after = (queue.read(q::RPTR), queue.read(q::PACKETS));
        let (state, wptr) = (queue.state(), queue.read(q::WPTR));
        if state != Some(QueueState::Running) || before != after || wptr <= after.0 {
            return Err(format!(
                "{state:?}, WPTR {wptr:#x}, RPTR and PACKETS {before:x?}, then {after:x?}"
            ));
        }
        if queue.fence(0) != 0 {
            return Err("a hung engine did a fence".to_owned());
        }
        queue.reset();
        self.works()?;
        Ok(format!("works: RPTR stood at {:#x} of {wptr:#x}", after.0))
    }

    fn lost_doorbell(&mut self, packets: u64) -> Outcome<String> {
        let mut queue = self.queue()?;
        self.count_and_wait(packets)?;
        queue.push_fence(0, 1);
        // The scenario loses two.
        for _ in 0..2 {
            queue.go();
            std::thread::sleep(SHORT);
            let (state, wptr) = (queue.state(), queue.read(q::WPTR));
            if state != Some(QueueState::Idle) || wptr != 0 || queue.fence(0) != 0 {
                return Err(format!("{state:?}, WPTR {wptr:#x} after a lost doorbell"));
            }
        }
        queue.go();
        queue.wait_fence(0, 1)?;
        queue.check_drained()?;
        Ok("works: the third was heard".to_owned())
    }

    fn lost_interrupt(&mut self, packets: u64) -> Outcome<String> {
        let listener = self
            .drive
            .listen(GPU, pci::VECTOR_QUEUE0, IrqBits::QUEUE0)?;
        let device = self.device()?;
        let raised = || device.read(irq::BASE, irq::RAISED);
        self.count_and_wait(packets)?;
        let before = raised();
        let mut queue = self.queue()?;
        queue.push(&sdma::trap(5));
        queue.push_fence(0, 1);
        queue.go();
        queue.wait_fence(0, 1)?;
        wait("pending bit", || listener.pending().then_some(()))?;
        std::thread::sleep(SHORT);
        if listener.arrived() || raised() != before {
            return Err(format!("RAISED {before}, then {}", raised()));
        }
        listener.arm()?;
        queue.push(&sdma::trap(6));
        queue.go();
        let heard = listener.heard()?;
        match raised() == before + 1 {
            true => Ok(format!("works: one lost, then {heard}")),
            false => Err(format!("RAISED {before}, in the end {}", raised())),
        }
    }

    fn spurious_interrupt(&mut self, packets: u64) -> Outcome<String> {
        const VECTOR: u16 = 3;
        let listener = self.drive.listen(GPU, VECTOR, IrqBits::empty())?;
        self.count(packets)?;
        if on_kvm() {
            return Ok("KVM delivers no message to memory".to_owned());
        }
        wait("message", || listener.arrived().then_some(()))?;
        match self.device()?.read32(irq::BASE, irq::STATUS) {
            0 => Ok("works: a message without a bit".to_owned()),
            status => Err(format!("IRQ.STATUS {status:#x}")),
        }
    }

    /// Registers of the links between the two GPUs: base at the first, base at the second.
    fn link(&self) -> Outcome<[(&'a Device, u32); 2]> {
        let end = |from: usize, to: usize| -> Outcome<(&'a Device, u32)> {
            let (gpu, peer) = (self.drive.gpu(from)?, self.drive.gpu(to)?);
            let count = u32::try_from(gpu.seen.links.len()).unwrap_or(0);
            let mut bases = (0..count).map(|number| link::BASE + number * link::STRIDE);
            let base = bases
                .find(|base| gpu.device.read32(*base, link::PEER) == peer.seen.hive.1)
                .ok_or("no link between the GPUs")?;
            Ok((&gpu.device, base))
        };
        Ok([end(GPU, PEER)?, end(PEER, GPU)?])
    }

    /// A change of the link: waits until both ends show it, with its interrupt.
    fn link_change(&mut self, packets: u64, state: LinkState) -> Outcome<&'static str> {
        let ends = self.link()?;
        let listener = self.drive.listen(GPU, pci::VECTOR_EVENTS, IrqBits::LINK)?;
        let far = &self.drive.gpu(PEER)?.device;
        far.write(irq::BASE, irq::STATUS, u64::from(u32::MAX));
        let errors = ends.map(|(device, base)| device.read32(base, link::ERRORS));
        self.count(packets)?;
        let heard = listener.heard()?;
        for ((device, base), before) in ends.into_iter().zip(errors) {
            let seen = device.read32(base, link::STATE);
            let counted = device.read32(base, link::ERRORS) - before;
            // Lanes that go count as an error, lanes that come do not.
            let wanted = u32::from(state != LinkState::Up);
            if seen != state.code() || counted != wanted {
                return Err(format!("state {seen}, {counted} errors at {}", device.bdf));
            }
        }
        // One end is told after the other.
        wait("IRQ.STATUS at the other end", || {
            let status = far.read32(irq::BASE, irq::STATUS);
            (status & IrqBits::LINK.bits() != 0).then_some(())
        })?;
        Ok(heard)
    }

    /// A copy over the link stops.
    fn no_way(&self) -> Outcome<Queue<'a>> {
        let queue = self.copy_from_peer()?;
        queue.wait_stopped(QueueFault::LinkDown)?;
        Ok(queue)
    }

    /// A copy over the link arrives.
    fn way(&self) -> Outcome {
        self.copy_from_peer()?.wait_fence(0, 0x600d)
    }

    fn link_flap(&mut self, packets: u64) -> Outcome<String> {
        self.way()?;
        let heard = self.link_change(packets, LinkState::Down)?;
        let start = Instant::now();
        let queue = self.no_way()?;
        for (device, base) in self.link()? {
            wait("the link to come up", || {
                (device.read32(base, link::STATE) == LinkState::Up.code()).then_some(())
            })?;
        }
        let lasted = start.elapsed().as_millis();
        queue.reset();
        self.way()?;
        Ok(format!("works: {heard}, up again {lasted} ms later"))
    }

    fn link_loss(&mut self, packets: u64) -> Outcome<String> {
        let heard = self.link_change(packets, LinkState::Down)?;
        self.no_way()?.reset();
        // What does not need the link goes on.
        self.works()?;
        Ok(format!("works: {heard}"))
    }

    fn link_return(&mut self, packets: u64) -> Outcome<String> {
        let heard = self.link_change(packets, LinkState::Up)?;
        self.way()?;
        Ok(format!("works: {heard}"))
    }

    fn link_width(&mut self, packets: u64) -> Outcome<String> {
        let heard = self.link_change(packets, LinkState::Degraded)?;
        let [(device, base), _] = self.link()?;
        let read = |reg| device.read32(base, reg);
        let (width, now) = (read(link::WIDTH), read(link::WIDTH_NOW));
        let (all, left) = (read(link::BANDWIDTH_MBS), read(link::BANDWIDTH_NOW_MBS));
        if now != 1 || width < 2 || left != all / width {
            return Err(format!("{now} of {width} lanes, {left} of {all} MB/s"));
        }
        self.way()?;
        Ok(format!("works: {heard}, {left} of {all} MB/s"))
    }

    fn scrub_failure(&mut self, packets: u64) -> Outcome<String> {
        self.count_and_wait(packets)?;
        let device = self.device()?;
        let base = Device::partition(0);
        device.expect(0, C::Release, TOKEN, R::Ok)?;
        wait("the scrub to fail", || {
            (device.read32(base, partition::STATE) == OwnerState::Faulted.code()).then_some(())
        })?;
        device.expect(0, C::Claim, TOKEN, R::Faulted)?;
        self.reset()?;
        self.start()?;
        self.works()?;
        Ok("works: claim refused, and granted after a reset".to_owned())
    }

    fn boot_failure(&mut self, packets: u64) -> Outcome<String> {
        self.count_and_wait(packets)?;
        let device = self.reset()?;
        expect_boot_fault(device)?;
        self.reset()?;
        self.start()?;
        self.works()?;
        Ok(format!("works: fault {BOOT_FAULT:#x}, then ready"))
    }

    fn boot_timeout(&mut self, packets: u64) -> Outcome<String> {
        self.count_and_wait(packets)?;
        let device = self.reset()?;
        device.write(boot::BASE, boot::CONTROL, u64::from(regs::BOOT_START));
        let usual = u64::from(device.read32(boot::BASE, boot::DELAY_US));
        std::thread::sleep(Duration::from_micros(usual) * 10 + SHORT);
        let state = device.read32(boot::BASE, boot::STATUS);
        if state != BootState::Booting.code() {
            return Err(format!("boot state {state}"));
        }
        self.reset()?;
        self.start()?;
        self.works()?;
        Ok("works: booting for ever, then ready after a reset".to_owned())
    }

    fn stuck_reset(&mut self, packets: u64) -> Outcome<String> {
        self.count_and_wait(packets)?;
        let start = Instant::now();
        // Linux waits until the function answers.
        self.reset()?;
        let lasted = start.elapsed();
        if lasted < STUCK {
            return Err(format!("the reset took {} ms", lasted.as_millis()));
        }
        self.start()?;
        self.works()?;
        Ok(format!("works: the reset took {} ms", lasted.as_millis()))
    }

    fn removal(&mut self, packets: u64) -> Outcome<String> {
        self.drive.buffer.write32(MESSAGES, 0);
        let mut queue = self.queue()?;
        self.count_unanswered(packets)?;
        let device = self.device()?;
        wait("the GPU to go", || {
            (device.read32(identity::BASE, identity::MAGIC) == u32::MAX).then_some(())
        })?;
        self.counting = None;
        let state = device.read(Device::partition(0), partition::STATE);
        device.write(identity::BASE, identity::SCRATCH, 1);
        queue.push_fence(0, 1);
        queue.go();
        std::thread::sleep(SHORT);
        if state != u64::from(u32::MAX) || queue.fence(0) != 0 {
            return Err(format!("state {state:#x}, fence {}", queue.fence(0)));
        }
        // The HBM is memory of the machine: CPUs have it still.
        let config = device.config_word(0);
        Ok(format!("works: registers read as ones, ids as {config:x?}"))
    }

    /// The same as [`Faults::count`] for a queue that stops while it counts.
    fn count_unanswered(&mut self, packets: u64) -> Outcome {
        self.count(packets - 1)?;
        if let Some((queue, _)) = &mut self.counting {
            queue.push(&[NOP]);
            queue.go();
        }
        Ok(())
    }

    fn comes_back(&mut self, _: u64) -> Outcome<String> {
        let device = self.device()?;
        wait("the GPU to come back", || {
            (device.config_word(0) != Some(u32::MAX)).then_some(())
        })?;
        device.enable().map_err(|error| error.to_string())?;
        wait("its registers", || {
            (device.read32(identity::BASE, identity::MAGIC) == regs::MAGIC).then_some(())
        })?;
        self.drive.buffer.fill(SOURCE, COPY, 0);
        self.start()?;
        self.drive
            .gpu(GPU)?
            .first()?
            .map(COPY_IN)?
            .check_zero(0, COPY)?;
        self.works()?;
        Ok("works: reset, scrubbed, booted and claimed".to_owned())
    }
}
