//! Faults on demand: each has the signature that its documentation promises, and the way back.

use numagpu_spec::regs::{
    BootState, IrqBits, OwnerLoss, RasKind, RasResult, boot, irq, link, queue, ras,
};
use numagpu_spec::sdma::{copy_linear, fence, trap};

use super::*;
use crate::bus::ResetKind;
use crate::config_space::CAP_AER;
use crate::inject::{InjectError, Injection};

const MS: u64 = 1_000_000;
const NOP: u32 = 0;

impl Machine {
    fn inject(&self, fault: Injection) {
        self.gpus[0].inject(fault).unwrap();
    }

    fn ras(&self, reg: &Reg) -> u64 {
        self.read(0, &ras::BLOCK, 0, reg)
    }

    fn irq_status(&self, gpu: usize) -> IrqBits {
        IrqBits::from_bits_retain(self.read(gpu, &irq::BLOCK, 0, &irq::STATUS) as u32)
    }

    fn events(&self) -> usize {
        self.vmms[0].irq.count(pci::VECTOR_EVENTS)
    }

    fn retire(&self, address: u64) -> Option<RasResult> {
        self.write(0, &ras::BLOCK, 0, &ras::ADDRESS, address);
        self.write(0, &ras::BLOCK, 0, &ras::COMMAND, 1);
        RasResult::from_code(self.ras(&ras::RESULT) as u32)
    }

    fn start(&self) -> Option<BootState> {
        self.write(0, &boot::BLOCK, 0, &boot::CONTROL, 1);
        self.clock.advance(MS);
        self.boot_state()
    }

    /// Correctable and uncorrectable error status of advanced error reporting.
    fn aer(&self) -> (u32, u32) {
        let word = |offset| {
            let mut bytes = [0; 4];
            self.gpus[0].config_read(u32::from(CAP_AER) + offset, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        (word(0x10), word(0x04))
    }

    fn boot_state(&self) -> Option<BootState> {
        BootState::from_code(self.read(0, &boot::BLOCK, 0, &boot::STATUS) as u32)
    }
}

#[test]
fn errors_are_counted_and_told() {
    let machine = Machine::ready();
    machine.inject(Injection::CorrectableError {
        address: hbm(0, 0) + 5,
    });
    assert_eq!(machine.ras(&ras::CORRECTABLE), 1);
    assert_eq!(machine.ras(&ras::LAST_ADDRESS), hbm(0, 0) + 5);
    assert_eq!(
        machine.ras(&ras::LAST_KIND),
        u64::from(RasKind::Correctable.code())
    );
    assert!(machine.irq_status(0).contains(IrqBits::RAS));
    assert_eq!(machine.events(), 1);
    // PCIe Base 6.0 sections 7.8.4.5 and 7.8.4.2: corrected internal error, uncorrectable internal error.
    assert_eq!(machine.aer(), (1 << 14, 0));
    machine.inject(Injection::UncorrectableError { address: hbm(0, 1) });
    assert_eq!(machine.aer(), (1 << 14, 1 << 22));
    assert_eq!(machine.ras(&ras::UNCORRECTABLE), 1);
    assert_eq!(machine.ras(&ras::POISONED), 1);
    assert_eq!(
        machine.ras(&ras::LAST_KIND),
        u64::from(RasKind::Uncorrectable.code())
    );
    assert_eq!(machine.events(), 2);
    machine.gpus[0].reset(ResetKind::Function);
    assert_eq!(
        (
            machine.ras(&ras::CORRECTABLE),
            machine.ras(&ras::UNCORRECTABLE)
        ),
        (0, 0)
    );
    assert_eq!(machine.aer(), (1 << 14, 1 << 22), "sticky");
    machine.wait_free(0, 1);
    assert_eq!(machine.ras(&ras::POISONED), 0, "the scrub wrote it anew");
}

#[test]
fn poison_is_met_by_readers_and_goes_when_it_is_overwritten() {
    let machine = Machine::ready();
    let bad = hbm(0, 0) + (1 << 20) + 64;
    machine.inject(Injection::UncorrectableError { address: bad + 3 });
    let read = copy_linear(hbm(0, 0), DATA, 4 << 20);
    assert_eq!(machine.run(&read), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::Poisoned, bad, 0));
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    // A part of the line does not help.
    machine.run(&copy_linear(DATA, bad, 32));
    assert_eq!(
        machine.run(&copy_linear(bad + 8, DATA, 4)),
        QueueState::Fault
    );
    assert_eq!(machine.fault(0, 0), (QueueFault::Poisoned, bad + 8, 1));
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    machine.run(&copy_linear(DATA, bad - 64, 256));
    assert_eq!(machine.run(&read), QueueState::Idle);
    assert_eq!(machine.ras(&ras::POISONED), 0);
}

#[test]
fn a_peer_s_poison_stops_the_reader_s_queue() {
    let machine = Machine::ready();
    machine.gpus[1]
        .inject(Injection::UncorrectableError { address: hbm(1, 0) })
        .unwrap();
    assert_eq!(
        machine.run(&copy_linear(hbm(1, 0), hbm(0, 0), 64)),
        QueueState::Fault
    );
    assert_eq!(machine.fault(0, 0), (QueueFault::Poisoned, hbm(1, 0), 0));
    assert_eq!(
        machine.ras(&ras::UNCORRECTABLE),
        0,
        "it is the peer's error"
    );
}

#[test]
fn a_retired_page_is_closed_to_engines_for_good() {
    let machine = Machine::ready();
    let page = hbm(0, 0) + 0x3000;
    assert_eq!(machine.retire(page + 17), Some(RasResult::Ok));
    assert_eq!(machine.retire(hbm(1, 0)), Some(RasResult::OutOfRange));
    assert_eq!(machine.retire(RAM), Some(RasResult::OutOfRange));
    machine.write(0, &ras::BLOCK, 0, &ras::COMMAND, 9);
    assert_eq!(
        machine.ras(&ras::RESULT),
        u64::from(RasResult::BadCommand.code())
    );
    assert_eq!(machine.run(&fence(page + 8, 1)), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::Retired, page + 8, 0));
    machine.gpus[0].detach();
    machine.gpus[0].attach(machine.vmms[0].attachment());
    assert_eq!(machine.ras(&ras::RETIRED), 1);
    assert_eq!(machine.ras(&ras::ENTRY), page);
    machine.write(0, &ras::BLOCK, 0, &ras::INDEX, 1);
    assert_eq!(machine.ras(&ras::ENTRY), u64::MAX);
}

#[test]
fn a_hung_engine_stands_still_until_its_queue_is_reset() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    assert_eq!(machine.run(&[NOP]), QueueState::Idle);
    machine.inject(Injection::EngineHang { queue: 0 });
    machine.submit(0, 0, &fence(DATA, 1));
    // Others go on.
    machine.submit(0, 1, &fence(DATA + 8, 2));
    wait(|| machine.peek32(DATA + 8) == 2);
    assert_eq!(machine.queue_state(0, 0), QueueState::Running);
    assert_eq!(machine.queue(0, 0, &queue::PACKETS), 1);
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 4);
    assert_eq!(machine.queue(0, 0, &queue::WPTR), 20);
    assert_eq!(machine.peek32(DATA), 0);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&fence(DATA, 1)), QueueState::Idle);
    assert_eq!(machine.peek32(DATA), 1);
}

#[test]
fn a_lost_doorbell_is_heard_when_it_rings_again() {
    let machine = Machine::ready();
    machine.inject(Injection::LostDoorbell { queue: 0, count: 2 });
    machine.submit(0, 0, &fence(DATA, 7));
    machine.ring_doorbell(0, 0, 16);
    assert_eq!(machine.queue(0, 0, &queue::WPTR), 0);
    assert_eq!(machine.queue_state(0, 0), QueueState::Idle);
    machine.ring_doorbell(0, 0, 16);
    wait(|| machine.peek32(DATA) == 7);
}

#[test]
fn a_lost_interrupt_leaves_its_bit() {
    let machine = Machine::ready();
    machine.inject(Injection::LostInterrupt { count: 1 });
    machine.run(&trap(5));
    wait(|| machine.irq_status(0).contains(IrqBits::QUEUE0));
    assert_eq!(machine.queue(0, 0, &queue::TRAP_CONTEXT), 5);
    assert_eq!(machine.vmms[0].irq.count(pci::VECTOR_QUEUE0), 0);
    assert_eq!(machine.read(0, &irq::BLOCK, 0, &irq::RAISED), 0);
    machine.run(&trap(6));
    assert!(machine.vmms[0].irq.wait(pci::VECTOR_QUEUE0, 1, LIMIT));
}

#[test]
fn a_spurious_interrupt_has_no_bit() {
    let machine = Machine::ready();
    machine.inject(Injection::SpuriousInterrupt { vector: 3 });
    assert_eq!(machine.vmms[0].irq.vectors(), [3]);
    assert_eq!(machine.irq_status(0), IrqBits::empty());
}

#[test]
fn a_link_that_flaps_comes_back_by_itself() {
    let machine = Machine::ready();
    let copy = copy_linear(DATA, hbm(1, 0), 64);
    machine.inject(Injection::LinkFlap {
        peer: 1,
        down_ms: 3,
    });
    assert_eq!(machine.run(&copy), QueueState::Fault);
    assert_eq!(machine.fault(0, 0).0, QueueFault::LinkDown);
    for (gpu, index) in [(0, 0), (1, 0)] {
        assert_eq!(machine.read(gpu, &link::BLOCK, index, &link::STATE), 2);
        assert_eq!(machine.read(gpu, &link::BLOCK, index, &link::ERRORS), 1);
        assert!(machine.irq_status(gpu).contains(IrqBits::LINK), "GPU {gpu}");
    }
    machine.clock.advance(3 * MS);
    machine.gpus[0].tick();
    assert_eq!(machine.read(0, &link::BLOCK, 0, &link::STATE), 1);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&copy), QueueState::Idle);
    machine.inject(Injection::LinkWidth { peer: 1, lanes: 1 });
    let state = |reg| machine.read(0, &link::BLOCK, 0, reg);
    let shown = [&link::STATE, &link::WIDTH_NOW, &link::BANDWIDTH_NOW_MBS].map(state);
    assert_eq!(shown, [3, 1, 25_000], "degraded");
    assert_eq!(machine.run(&copy), QueueState::Idle);
    machine.inject(Injection::LinkLoss { peer: 1 });
    assert_eq!(machine.read(1, &link::BLOCK, 0, &link::STATE), 2);
    machine.inject(Injection::LinkReturn { peer: 1 });
    assert_eq!(machine.run(&copy), QueueState::Idle);
}

#[test]
fn the_next_boot_fails_or_never_ends() {
    let machine = Machine::new();
    machine.inject(Injection::BootFailure { code: 0x42 });
    assert_eq!(machine.start(), Some(BootState::Fault));
    assert_eq!(machine.read(0, &boot::BLOCK, 0, &boot::FAULT), 0x42);
    machine.inject(Injection::BootTimeout);
    machine.gpus[0].reset(ResetKind::Function);
    assert_eq!(machine.start(), Some(BootState::Booting));
    machine.clock.advance(3_600_000 * MS);
    assert_eq!(machine.boot_state(), Some(BootState::Booting));
    machine.gpus[0].reset(ResetKind::Function);
    assert_eq!(machine.start(), Some(BootState::Ready));
}

#[test]
fn a_stuck_reset_answers_with_ones_for_its_time() {
    let machine = Machine::ready();
    machine.inject(Injection::StuckReset { ms: 7 });
    // By the driver's own FLR.
    machine.gpus[0].config_write(0x59, &[0x80]);
    let mut id = [0; 4];
    machine.gpus[0].config_read(0, &mut id);
    assert_eq!(id, [0xff; 4]);
    assert_eq!(machine.ras(&ras::RETIRED), u64::from(u32::MAX));
    machine.gpus[0].config_write(4, &[6, 0]);
    machine.clock.advance(7 * MS);
    machine.gpus[0].config_read(4, &mut id[..2]);
    assert_eq!(id[..2], [0, 0], "what was written meanwhile is lost");
    machine.boot(0);
    machine.gpus[0].reset(ResetKind::Function);
    assert_eq!(machine.start(), Some(BootState::Ready), "once only");
}

#[test]
fn a_scrub_that_fails_faults_the_partition_until_a_reset() {
    let machine = Machine::ready();
    machine.inject(Injection::ScrubFailure { partition: 1 });
    assert_eq!(machine.release(0, 1, TOKEN), OwnerResult::Ok);
    wait(|| machine.owner_state(0, 1) == OwnerState::Faulted);
    assert_eq!(machine.claim(0, 1, TOKEN), OwnerResult::Faulted);
    machine.gpus[0].reset(ResetKind::Function);
    machine.wait_free(0, 1);
}

#[test]
fn a_gpu_that_is_pulled_out_is_gone_until_it_returns() {
    let machine = Machine::ready();
    machine.run(&copy_linear(DATA, hbm(0, 0), 4096));
    machine.inject(Injection::StuckReset { ms: 1 });
    machine.inject(Injection::Removal);
    assert!(!machine.gpus[0].status().present);
    assert_eq!(
        machine.read(0, &regs::identity::BLOCK, 0, &regs::identity::MAGIC),
        0xffff_ffff
    );
    machine.gpus[0].config_write(4, &[6, 0]);
    machine.ring_doorbell(0, 0, 4);
    machine.gpus[0].reset(ResetKind::Function);
    machine.clock.advance(10 * MS);
    assert!(
        !machine.gpus[0].status().present,
        "a reset does not bring it back"
    );
    // Peers find nothing that they own there.
    machine.enable(1, 0, TOKEN);
    machine.submit(1, 0, &copy_linear(hbm(0, 0), DATA, 64));
    assert_eq!(machine.settle(1, 0), QueueState::Fault);
    machine.inject(Injection::Return);
    assert_eq!(machine.boot_state(), Some(BootState::Reset));
    machine.wait_free(0, 0);
    assert_eq!(
        machine.partition(0, 0, &regs::partition::LOSS),
        u64::from(OwnerLoss::HotReset.code())
    );
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&[NOP]), QueueState::Idle);
}

#[test]
fn what_the_gpu_does_not_have_is_an_error_with_its_numbers() {
    let machine = Machine::new();
    let gpu = &machine.gpus[0];
    let error = |fault| gpu.inject(fault).unwrap_err().to_string();
    assert_eq!(
        error(Injection::EngineHang { queue: 2 }),
        "the GPU has 2 queues, so there is no number 2"
    );
    assert_eq!(
        error(Injection::ScrubFailure { partition: 9 }),
        "the GPU has 2 partitions, so there is no number 9"
    );
    assert_eq!(
        error(Injection::SpuriousInterrupt { vector: 9 }),
        "the GPU has 9 vectors, so there is no number 9"
    );
    assert_eq!(
        error(Injection::UncorrectableError { address: hbm(1, 0) }),
        "0x200000000 is not in this GPU's HBM"
    );
    assert_eq!(
        gpu.inject(Injection::BootFailure { code: 0 }),
        Err(InjectError::NoCode)
    );
    assert!(error(Injection::LinkLoss { peer: 2 }).contains("no link joins GPUs 0 and 2"));
}
