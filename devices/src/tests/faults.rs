//! What stops a queue: each bad form, with its code, address and packet index.

use numagpu_spec::regs::{irq, queue};
use numagpu_spec::sdma::{const_fill, copy_linear, fence, trap};

use super::*;
use crate::test_support::Mapping;

const NOP: u32 = 0;

/// Runs two NOPs and `words`, and expects a fault at the third packet.
fn expect(words: &[u32], code: QueueFault, address: u64) {
    let machine = Machine::ready();
    expect_on(&machine, words, code, address);
}

fn expect_on(machine: &Machine, words: &[u32], code: QueueFault, address: u64) {
    // The index counts from enable.
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    let mut all = vec![NOP, NOP];
    all.extend(words);
    assert_eq!(machine.run(&all), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (code, address, 2));
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 8);
    assert!(machine.vmms[0].irq.wait(0, 1, LIMIT));
    assert_eq!(machine.read(0, &irq::BLOCK, 0, &irq::STATUS) & 1, 1);
    // Nothing but a reset recovers it.
    machine.set_queue(0, 0, &queue::CONTROL, 1);
    machine.set_queue(0, 0, &queue::CONTROL, 0);
    assert_eq!(machine.queue_state(0, 0), QueueState::Fault);
    machine.reset_queue(0, 0);
    assert_eq!(machine.fault(0, 0), (QueueFault::None, 0, 0));
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&[NOP]), QueueState::Idle);
}

/// Where the third packet is.
const PACKET: u64 = RING + 8;

#[test]
fn unknown_opcodes() {
    for header in [
        3, 4, 7, 9, 12, 14, 0xff, 0x0101, 0x0102, 0x0105, 0x010b, 0x0108, 0x010a, 0x030d,
    ] {
        expect(
            &[header, 0, 0, 0, 0, 0, 0, 0],
            QueueFault::BadOpcode,
            PACKET,
        );
    }
}

#[test]
fn reserved_bits() {
    let mut cases: Vec<Vec<u32>> = Vec::new();
    let mut case = |packet: &[u32], word: usize, bits: u32| {
        let mut packet = packet.to_vec();
        packet[word] |= bits;
        cases.push(packet);
    };
    let copy = copy_linear(DATA, DATA + 4096, 64);
    case(&copy, 0, 1 << 27);
    case(&copy, 1, 1 << 22);
    case(&copy, 2, 1 << 16);
    case(&write_linear(DATA, &[1]), 3, 1 << 20);
    case(&const_fill(DATA, 1, 64), 4, 1 << 22);
    case(&const_fill(DATA, 1, 64), 0, 1 << 30);
    case(&const_fill(DATA, 1, 63), 0, 0);
    case(&trap(0), 1, 1 << 28);
    case(&[0; 1], 0, 1 << 30);
    for packet in cases {
        expect(&packet, QueueFault::BadField, PACKET);
    }
}

#[test]
fn misaligned_addresses() {
    expect(&fence(DATA + 2, 1), QueueFault::BadField, DATA + 2);
    expect(
        &write_linear(DATA + 1, &[1]),
        QueueFault::BadField,
        DATA + 1,
    );
    expect(&const_fill(DATA + 3, 1, 64), QueueFault::BadField, DATA + 3);
}

#[test]
fn addresses_that_wrap() {
    let top = u64::MAX - 7;
    expect(&copy_linear(top, DATA, 64), QueueFault::BadField, top);
    expect(&copy_linear(DATA, top, 64), QueueFault::BadField, top);
    expect(
        &const_fill(u64::MAX - 3, 0, 64),
        QueueFault::BadField,
        u64::MAX - 3,
    );
}

#[test]
fn unmapped_and_read_only_memory() {
    let hole = RAM + RAM_SIZE as u64;
    expect(&copy_linear(DATA, hole, 64), QueueFault::Unmapped, hole);
    expect(&copy_linear(hole, DATA, 64), QueueFault::Unmapped, hole);
    expect(&fence(hole, 1), QueueFault::Unmapped, hole);
    expect(&const_fill(hole, 1, 64), QueueFault::Unmapped, hole);
    expect(&write_linear(hole, &[1]), QueueFault::Unmapped, hole);
    // A range that begins in memory and ends outside is refused whole.
    expect(
        &copy_linear(hbm(0, 0), hole - 32, 64),
        QueueFault::Unmapped,
        hole - 32,
    );
    let machine = Machine::ready();
    machine.vmms[0].dma.add(Mapping {
        address: 0xc000_0000,
        size: 4096,
        store: Arc::clone(&machine.ram) as _,
        offset: 0,
        writable: false,
        has_fd: true,
    });
    expect_on(
        &machine,
        &fence(0xc000_0000, 1),
        QueueFault::Unmapped,
        0xc000_0000,
    );
}

#[test]
fn truncated_packets() {
    let copy = copy_linear(DATA, DATA + 4096, 64);
    for words in 1..7 {
        expect(&copy[..words], QueueFault::Truncated, PACKET);
    }
    expect(
        &write_linear(DATA, &[1, 2, 3])[..6],
        QueueFault::Truncated,
        PACKET,
    );
    expect(&[0x0003_0000, 0, 0], QueueFault::Truncated, PACKET);
    expect(&trap(0)[..1], QueueFault::Truncated, PACKET);
    expect(&fence(DATA, 0)[..3], QueueFault::Truncated, PACKET);
}

#[test]
fn hbm_of_others() {
    let machine = Machine::ready();
    machine.release(0, 1, TOKEN);
    machine.release(1, 0, TOKEN);
    machine.wait_free(0, 1);
    machine.wait_free(1, 0);
    for address in [hbm(0, 1) + 4096, hbm(1, 0)] {
        expect_on(
            &machine,
            &copy_linear(DATA, address, 64),
            QueueFault::NotOwned,
            address,
        );
        machine.claim(1, 0, 99);
        expect_on(
            &machine,
            &copy_linear(address, DATA, 64),
            QueueFault::NotOwned,
            address,
        );
        expect_on(&machine, &fence(address, 1), QueueFault::NotOwned, address);
        expect_on(
            &machine,
            &const_fill(address, 1, 64),
            QueueFault::NotOwned,
            address,
        );
    }
    // A range that runs from an owned partition into another is refused before a byte moves.
    machine.poke(DATA, &[0xaa; 64]);
    let across = copy_linear(DATA, hbm(0, 1) - (1 << 20), 2 << 20);
    expect_on(&machine, &across, QueueFault::NotOwned, hbm(0, 1));
    assert_eq!(
        bytes(&machine.stores[0][0], HBM_SIZE - (1 << 20), 64),
        [0; 64]
    );
}

#[test]
fn token_zero_owns_nothing() {
    let machine = Machine::ready();
    machine.release(0, 1, TOKEN);
    machine.wait_free(0, 1);
    machine.enable(0, 1, 0);
    machine.submit(0, 1, &fence(hbm(0, 1), 1));
    assert_eq!(machine.settle(0, 1), QueueState::Fault);
    assert_eq!(machine.fault(0, 1), (QueueFault::NotOwned, hbm(0, 1), 0));
}

#[test]
fn hbm_that_stopped_being_coherent() {
    let machine = Machine::ready();
    machine.vmms[0].dma.unmap(hbm(0, 0));
    machine.gpus[0].dma_changed();
    expect_on(
        &machine,
        &fence(hbm(0, 0) + 8, 1),
        QueueFault::NotCoherent,
        hbm(0, 0) + 8,
    );
    // What another GPU's VMM map says counts for that GPU's HBM.
    machine.vmms[0].dma.unmap(hbm(1, 0));
    assert_eq!(machine.run(&fence(hbm(1, 0), 1)), QueueState::Idle);
    machine.gpus[1].dma_changed();
    expect_on(
        &machine,
        &fence(hbm(1, 0), 1),
        QueueFault::NotCoherent,
        hbm(1, 0),
    );
}

#[test]
fn links_down() {
    let machine = Machine::ready();
    machine.fabric.set_link(0xabc, 1, 2, false).unwrap();
    assert_eq!(machine.run(&fence(hbm(1, 0), 1)), QueueState::Idle);
    expect_on(
        &machine,
        &fence(hbm(2, 0), 1),
        QueueFault::LinkDown,
        hbm(2, 0),
    );
    use numagpu_spec::regs::link;
    assert_eq!(machine.read(1, &link::BLOCK, 1, &link::STATE), 2);
    assert_eq!(machine.read(1, &link::BLOCK, 1, &link::ERRORS), 1);
    assert_eq!(machine.read(2, &link::BLOCK, 0, &link::STATE), 2);
    machine.fabric.set_link(0xabc, 1, 2, true).unwrap();
    assert_eq!(machine.run(&fence(hbm(2, 0), 1)), QueueState::Idle);
    assert!(machine.fabric.set_link(0xabc, 0, 2, true).is_err());
}

#[test]
fn bus_master_off() {
    let machine = Machine::ready();
    assert_eq!(machine.run(&[NOP, NOP]), QueueState::Idle);
    machine.gpus[0].config_write(4, &[2]);
    assert_eq!(machine.run(&[NOP]), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::BusMasterOff, PACKET, 2));
    // A ring in own HBM is no DMA, guest memory is. The partition was lost: it is claimed anew.
    machine.wait_free(0, 1);
    assert_eq!(machine.claim(0, 1, TOKEN), OwnerResult::Ok);
    machine.enable_at(0, 1, TOKEN, hbm(0, 1));
    machine.set_queue(0, 1, &queue::RPTR_WRITEBACK, 0);
    machine.ring_doorbell(0, 1, 4);
    assert_eq!(machine.settle(0, 1), QueueState::Fault);
    assert_eq!(machine.fault(0, 1).0, QueueFault::BusMasterOff);
}

#[test]
fn bad_rings() {
    let machine = Machine::ready();
    for (base, size) in [
        (RING, 0),
        (RING, 128),
        (RING, 4097),
        (RING, 32 << 20),
        (!0xff, 4096),
    ] {
        machine.set_queue(0, 1, &queue::RING_BASE, base);
        machine.set_queue(0, 1, &queue::RING_SIZE, size);
        machine.set_queue(0, 1, &queue::CONTROL, 1);
        assert_eq!(machine.queue_state(0, 1), QueueState::Fault);
        assert_eq!(machine.fault(0, 1), (QueueFault::BadRing, base, 0));
        machine.reset_queue(0, 1);
    }
}

#[test]
fn an_unmapped_ring_or_writeback() {
    let machine = Machine::ready();
    machine.enable_at(0, 1, TOKEN, 0x8000_0000);
    machine.ring_doorbell(0, 1, 8);
    assert_eq!(machine.settle(0, 1), QueueState::Fault);
    assert_eq!(machine.fault(0, 1), (QueueFault::Unmapped, 0x8000_0000, 0));
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    machine.reset_queue(0, 0);
    machine.set_queue(0, 0, &queue::RPTR_WRITEBACK, 0x9000_0000);
    machine.set_queue(0, 0, &queue::CONTROL, 1);
    assert_eq!(machine.run(&[NOP]), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::Unmapped, 0x9000_0000, 1));
}

#[test]
fn bad_doorbells() {
    let machine = Machine::ready();
    for wptr in [2, u64::from(RING_SIZE) + 4, u64::MAX, u64::MAX - 3] {
        machine.ring_doorbell(0, 0, wptr);
        assert_eq!(machine.queue_state(0, 0), QueueState::Fault);
        assert_eq!(machine.fault(0, 0), (QueueFault::BadDoorbell, wptr, 0));
        machine.reset_queue(0, 0);
        machine.enable(0, 0, TOKEN);
    }
    machine.run(&[NOP; 8]);
    machine.ring_doorbell(0, 0, 32);
    assert_eq!(machine.queue_state(0, 0), QueueState::Idle);
    machine.ring_doorbell(0, 0, 28);
    assert_eq!(machine.fault(0, 0), (QueueFault::BadDoorbell, 28, 8));
    // A disabled queue hears nothing, nor does one that does not exist.
    machine.ring_doorbell(0, 1, 2);
    assert_eq!(machine.queue_state(0, 1), QueueState::Disabled);
    machine.ring_doorbell(0, 7, 2);
}

#[test]
fn doorbells_in_halves_ring_with_the_low_one() {
    let machine = Machine::ready();
    machine.gpus[0].bar_write(2, 4, &[0; 4]);
    machine.poke(RING, &[0; 64]);
    machine.gpus[0].bar_write(2, 0, &[64, 0, 0, 0]);
    wait(|| machine.queue(0, 0, &queue::RPTR) == 64);
    let mut data = [0xee; 16];
    machine.gpus[0].bar_read(2, 0, &mut data);
    assert_eq!(data, [0; 16]);
}

#[test]
fn a_fault_touches_no_other_queue() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    machine.run(&[0xff]);
    machine.submit(0, 1, &fence(DATA, 3));
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
    assert_eq!(machine.queue_state(0, 0), QueueState::Fault);
}
