//! Leases, losses with their reasons and history, and the ways to divide the HBM.

use numagpu_spec::regs::{
    BlockId, Coherence, IrqBits, LEASE_ENDLESS, OwnerEvent, OwnerLoss, discovery, irq, partition,
    topology,
};
use numagpu_spec::sdma::const_fill;

use super::*;
use crate::bus::ResetKind;

const MS: u64 = 1_000_000;

impl Machine {
    fn lease(&self, gpu: usize, index: u32, ms: u64) {
        self.write(gpu, &partition::BLOCK, index, &partition::LEASE_MS, ms);
    }

    fn loss(&self, gpu: usize, index: u32) -> OwnerLoss {
        OwnerLoss::from_code(self.partition(gpu, index, &partition::LOSS) as u32).unwrap()
    }

    fn pending(&self, gpu: usize) -> IrqBits {
        IrqBits::from_bits_retain(self.read(gpu, &irq::BLOCK, 0, &irq::STATUS) as u32)
    }

    /// The step of GPU 0's first partition with this number, 0 for the newest: state, event, state, time.
    fn step(&self, index: u64) -> (u32, Option<OwnerEvent>, u32, u64) {
        let block = &partition::BLOCK;
        self.write(0, block, 0, &partition::HISTORY_INDEX, index);
        let step = self.partition(0, 0, &partition::HISTORY_STEP) as u32;
        let at = self.partition(0, 0, &partition::HISTORY_NS);
        let event = OwnerEvent::from_code(step >> 8 & 0xff);
        (step & 0xff, event, step >> 16, at)
    }

    fn topology(&self, reg: &Reg) -> u64 {
        self.read(0, &topology::BLOCK, 0, reg)
    }

    fn divide(&self, count: u64) {
        self.write(0, &topology::BLOCK, 0, &topology::PARTITION_REQUEST, count);
        self.gpus[0].reset(ResetKind::Function);
        wait(|| self.topology(&topology::PARTITION_MODE) == count);
        for index in 0..count as u32 {
            self.wait_free(0, index);
        }
    }
}

#[test]
fn a_lease_that_nobody_renews_gives_the_partition_back() {
    let machine = Machine::new();
    machine.boot(0);
    machine.lease(0, 0, 5);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    assert_eq!(machine.partition(0, 0, &partition::LEASE_LEFT_MS), 5);
    machine.enable(0, 0, TOKEN);
    machine.run(&const_fill(hbm(0, 0), 0xdead_beef, 4096));
    machine.clock.advance(4 * MS);
    assert_eq!(machine.command(0, 0, 4, TOKEN + 1), OwnerResult::NotOwner);
    assert_eq!(machine.command(0, 0, 4, TOKEN), OwnerResult::Ok);
    machine.clock.advance(4 * MS + MS / 2);
    machine.gpus[0].tick();
    assert_eq!(machine.owner_state(0, 0), OwnerState::Claimed);
    assert_eq!(machine.partition(0, 0, &partition::LEASE_LEFT_MS), 1);
    let sent = machine.vmms[0].irq.count(pci::VECTOR_EVENTS);
    machine.clock.advance(MS / 2);
    machine.gpus[0].tick();
    machine.wait_free(0, 0);
    assert_eq!(machine.loss(0, 0), OwnerLoss::LeaseExpired);
    assert_eq!(machine.partition(0, 0, &partition::LEASE_LEFT_MS), 0);
    wait(|| machine.vmms[0].irq.count(pci::VECTOR_EVENTS) == sent + 1);
    assert!(machine.pending(0).contains(IrqBits::OWNERSHIP));
    assert_eq!(bytes(&machine.stores[0][0], 0, 4), [0; 4]);
    machine.run(&const_fill(hbm(0, 0), 1, 4096));
    assert_eq!(machine.fault(0, 0).0, QueueFault::NotOwned);
}

#[test]
fn a_lease_ends_by_itself_when_its_time_has_come() {
    let machine = Machine::of(|config| config.clock = Arc::new(crate::clock::HostClock::new()));
    machine.gpus[0].config_write(4, &[6, 0]);
    machine.write(0, &regs::boot::BLOCK, 0, &regs::boot::CONTROL, 1);
    wait(|| machine.read(0, &regs::boot::BLOCK, 0, &regs::boot::STATUS) == 2);
    machine.lease(0, 1, 20);
    assert_eq!(machine.claim(0, 1, TOKEN), OwnerResult::Ok);
    machine.lease(0, 0, 0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.wait_free(0, 1);
    assert_eq!(machine.loss(0, 1), OwnerLoss::LeaseExpired);
    let left = machine.partition(0, 0, &partition::LEASE_LEFT_MS);
    assert_eq!(left, u64::from(LEASE_ENDLESS), "the other has no end");
}

#[test]
fn a_command_meets_a_lease_that_is_over() {
    let machine = Machine::new();
    machine.boot(0);
    machine.lease(0, 0, 1);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.clock.advance(MS);
    // Not Ok, as it would be for the owner, whether the scrub is done by now or not.
    let renewed = machine.command(0, 0, 4, TOKEN);
    assert!(matches!(
        renewed,
        OwnerResult::Releasing | OwnerResult::NotOwner
    ));
}

#[test]
fn clearing_bus_master_takes_partitions_and_sends_no_message() {
    let machine = Machine::ready();
    machine.run(&const_fill(hbm(0, 0), 0xdead_beef, 4096));
    let sent = machine.vmms[0].irq.count(pci::VECTOR_EVENTS);
    machine.gpus[0].config_write(4, &[2, 0]);
    for index in 0..2 {
        machine.wait_free(0, index);
        assert_eq!(machine.loss(0, index), OwnerLoss::BusMasterOff);
    }
    assert_eq!(bytes(&machine.stores[0][0], 0, 4), [0; 4]);
    wait(|| machine.pending(0).contains(IrqBits::OWNERSHIP));
    assert_eq!(machine.vmms[0].irq.count(pci::VECTOR_EVENTS), sent);
    // It is the edge that counts, not the level.
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.gpus[0].config_write(4, &[2, 0]);
    assert_eq!(machine.owner_state(0, 0), OwnerState::Claimed);
}

#[test]
fn resets_say_which_they_were() {
    for (kind, loss) in [
        (ResetKind::Function, OwnerLoss::FunctionReset),
        (ResetKind::Hot, OwnerLoss::HotReset),
        (ResetKind::Disconnect, OwnerLoss::Disconnect),
    ] {
        let machine = Machine::ready();
        machine.gpus[0].reset(kind);
        machine.wait_free(0, 0);
        assert_eq!(machine.loss(0, 0), loss);
        // The history outlives the reset.
        let steps: Vec<_> = (0..4).map(|index| machine.step(index)).collect();
        let events: Vec<_> = steps.iter().map(|step| step.1).collect();
        let lost = Some(match kind {
            ResetKind::Function => OwnerEvent::FunctionReset,
            ResetKind::Hot => OwnerEvent::HotReset,
            ResetKind::Disconnect => OwnerEvent::Disconnect,
        });
        assert_eq!(
            events,
            [
                Some(OwnerEvent::Scrubbed),
                lost,
                Some(OwnerEvent::Claim),
                None
            ]
        );
        assert_eq!(
            (steps[1].0, steps[1].2),
            (OwnerState::Claimed.code(), OwnerState::Releasing.code())
        );
        assert_eq!(steps[2].3, MS, "when it was claimed");
        assert_eq!(machine.partition(0, 0, &partition::HISTORY_COUNT), 3);
        assert_eq!(machine.step(u64::from(u32::MAX)).1, None);
    }
}

#[test]
fn a_reset_divides_the_hbm_as_requested() {
    let machine = Machine::ready();
    assert_eq!(
        machine.topology(&topology::PARTITION_MODES),
        1 << 2 | 1 << 4 | 1 << 8
    );
    machine.run(&const_fill(hbm(0, 1) + (8 << 20), 0xdead_beef, 4096));
    machine.divide(4);
    assert_eq!(
        machine.loss(0, 0),
        OwnerLoss::None,
        "the new ones had no owner"
    );
    assert_eq!(machine.topology(&topology::PARTITION_REQUEST), 0);
    assert_eq!(
        machine.read(
            0,
            &regs::identity::BLOCK,
            0,
            &regs::identity::PARTITION_COUNT
        ),
        4
    );
    let part = HBM_SIZE / 2;
    for index in 0..4 {
        let base = hbm(0, u64::from(index) / 2) + u64::from(index) % 2 * part;
        assert_eq!(machine.partition(0, index, &partition::HBM_BASE), base);
        assert_eq!(machine.partition(0, index, &partition::HBM_SIZE), part);
        assert_eq!(
            machine.partition(0, index, &partition::PXM),
            u64::from(4 + index / 2)
        );
        let coherence = machine.partition(0, index, &partition::COHERENCE);
        assert_eq!(coherence, u64::from(Coherence::Coherent.code()));
    }
    assert_eq!(bytes(&machine.stores[0][1], 8 << 20, 4), [0; 4], "scrubbed");
    machine.boot(0);
    assert_eq!(machine.claim(0, 2, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    machine.run(&const_fill(hbm(0, 1), 0x0102_0304, part));
    assert_eq!(machine.queue_state(0, 0), QueueState::Idle);
    machine.run(&const_fill(hbm(0, 1) + part, 1, 4));
    assert_eq!(
        machine.fault(0, 0),
        (QueueFault::NotOwned, hbm(0, 1) + part, 1)
    );
    // And back: what the part's owner left is gone, and the history of the whole says why.
    machine.divide(2);
    assert_eq!(bytes(&machine.stores[0][1], 0, 4), [0; 4]);
    assert_eq!(machine.loss(0, 0), OwnerLoss::PartitionChange);
}

#[test]
fn peers_find_the_parts_of_a_divided_gpu() {
    let machine = Machine::ready();
    machine.write(1, &topology::BLOCK, 0, &topology::PARTITION_REQUEST, 4);
    machine.gpus[1].reset(ResetKind::Function);
    wait(|| machine.read(1, &topology::BLOCK, 0, &topology::PARTITION_MODE) == 4);
    machine.wait_free(1, 1);
    machine.boot(1);
    assert_eq!(machine.claim(1, 1, TOKEN), OwnerResult::Ok);
    let target = hbm(1, 0) + HBM_SIZE / 2;
    machine.run(&const_fill(target, 0x0506_0708, 4));
    assert_eq!(machine.queue_state(0, 0), QueueState::Idle);
    assert_eq!(bytes(&machine.stores[1][0], HBM_SIZE / 2, 4), [8, 7, 6, 5]);
    machine.run(&const_fill(target - 4, 0, 4));
    assert_eq!(machine.fault(0, 0).0, QueueFault::NotOwned);
}

#[test]
fn a_mode_that_is_not_possible_is_not_taken() {
    let machine = Machine::ready();
    for count in [1, 3, 5, 7, 16, 33, 0xffff_ffff] {
        machine.write(0, &topology::BLOCK, 0, &topology::PARTITION_REQUEST, count);
        assert_eq!(machine.topology(&topology::PARTITION_REQUEST), 0, "{count}");
    }
    machine.write(0, &topology::BLOCK, 0, &topology::PARTITION_REQUEST, 2);
    machine.gpus[0].reset(ResetKind::Function);
    machine.wait_free(0, 0);
    assert_eq!(machine.topology(&topology::PARTITION_MODE), 2);
    let loss = machine.loss(0, 0);
    assert_eq!(loss, OwnerLoss::FunctionReset, "the mode did not change");
}

#[test]
fn the_next_vmm_finds_the_mode_of_power_on() {
    let machine = Machine::ready();
    machine.divide(8);
    machine.gpus[0].detach();
    machine.gpus[0].attach(machine.vmms[0].attachment());
    assert_eq!(machine.topology(&topology::PARTITION_MODE), 2);
    machine.wait_free(0, 1);
    assert_eq!(machine.partition(0, 1, &partition::HBM_BASE), hbm(0, 1));
}

#[test]
fn discovery_lists_every_block_with_what_is_in_use() {
    let machine = Machine::new();
    let read = |index, reg| machine.read(0, &discovery::BLOCK, index, reg) as u32;
    let mut found = Vec::new();
    while let Some(id) = BlockId::from_code(read(found.len() as u32, &discovery::BLOCK_ID))
        && id != BlockId::End
    {
        let index = found.len() as u32;
        let place = [&discovery::OFFSET, &discovery::INSTANCE_STRIDE];
        let [offset, stride] = place.map(|reg| read(index, reg));
        let block = regs::BLOCKS
            .iter()
            .find(|block| block.base == offset)
            .unwrap();
        assert_eq!(block.stride, stride);
        assert_eq!(block.name, id.name().to_uppercase());
        found.push((id, read(index, &discovery::COUNT)));
    }
    assert_eq!(found.len(), regs::BLOCKS.len());
    for entry in [
        (BlockId::Link, 2),
        (BlockId::Partition, 2),
        (BlockId::Queue, 2),
        (BlockId::Ras, 1),
    ] {
        assert!(found.contains(&entry), "{entry:?} in {found:?}");
    }
}
