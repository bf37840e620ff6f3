//! Doorbells without a value.

use numagpu_spec::regs::queue::{WPTR, WPTR_POLL};
use numagpu_spec::sdma::fence;

use super::*;
use crate::inject::Injection;

/// Where the driver keeps its write pointer.
const POINTER: u64 = DATA + 0x100;
const FENCE: u64 = DATA + 0x200;

impl Machine {
    /// A machine whose queue 0 takes its write pointer from `pointer`.
    fn polling(pointer: u64) -> Machine {
        let machine = Machine::ready();
        machine.reset_queue(0, 0);
        machine.set_queue(0, 0, &WPTR_POLL, pointer);
        machine.enable(0, 0, TOKEN);
        machine
    }

    fn kick(&self, queue: u64, data: &[u8]) {
        let offset = u64::from(pci::KICK_OFFSET) + queue * pci::DOORBELL_STRIDE;
        self.gpus[0].bar_write(pci::BAR_DOORBELLS, offset, data);
    }

    /// Puts a fence into the ring at `position`.
    fn put_fence(&self, position: u64, value: u32) {
        for (at, word) in (ring(0, 0) + position..)
            .step_by(4)
            .zip(fence(FENCE, value))
        {
            self.poke(at, &word.to_le_bytes());
        }
    }
}

#[test]
fn every_queue_has_a_place_for_kicks_that_reads_as_zero() {
    let machine = Machine::polling(POINTER);
    let places: Vec<_> = machine.gpus[0]
        .kicks()
        .iter()
        .map(|it| (it.bar, it.offset))
        .collect();
    assert_eq!(places, [(2, 0x800), (2, 0x808)]);
    machine.kick(0, &[0xff; 8]);
    let mut seen = [0xee; 16];
    machine.gpus[0].bar_read(pci::BAR_DOORBELLS, 0x800, &mut seen);
    assert_eq!(seen, [0; 16]);
}

#[test]
fn a_kick_takes_the_write_pointer_from_memory_whatever_is_written() {
    let machine = Machine::polling(POINTER);
    for (number, data) in (1_u32..).zip([&[0][..], &[0xff; 2], &[7; 4], &[0x80; 8]]) {
        let position = u64::from(number - 1) * 16;
        machine.put_fence(position, number);
        machine.poke(POINTER, &(position + 16).to_le_bytes());
        machine.kick(0, data);
        assert_eq!(machine.settle(0, 0), QueueState::Idle);
        assert_eq!(machine.peek32(FENCE), number);
        assert_eq!(machine.queue(0, 0, &WPTR), position + 16);
    }
    // With nothing new in memory it does nothing, and doorbells with a value work beside it.
    machine.kick(0, &[1]);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    machine.put_fence(64, 5);
    machine.ring_doorbell(0, 0, 80);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(FENCE), 5);
    assert_eq!(machine.queue(0, 0, &WPTR), 80);
}

#[test]
fn the_pointer_may_be_in_hbm_of_the_owner() {
    let pointer = hbm(0, 1) + 0x40;
    let machine = Machine::polling(pointer);
    machine.put_fence(0, 1);
    let slice = machine.stores[0][1].slice(0x40, 8).unwrap();
    slice.write_slice(&16_u64.to_le_bytes(), 0).unwrap();
    machine.kick(0, &[1]);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(FENCE), 1);
    assert_eq!(machine.release(0, 1, TOKEN), OwnerResult::Ok);
    machine.wait_free(0, 1);
    machine.kick(0, &[1]);
    assert_eq!(machine.settle(0, 0), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::NotOwned, pointer, 1));
}

#[test]
fn a_queue_without_a_place_for_it_or_that_is_disabled_hears_no_kick() {
    let machine = Machine::ready();
    machine.poke(POINTER, &16_u64.to_le_bytes());
    machine.put_fence(0, 1);
    machine.kick(0, &[1]);
    // The register counts from the next enable on.
    machine.set_queue(0, 0, &WPTR_POLL, POINTER);
    machine.kick(0, &[1]);
    machine.kick(1, &[1]);
    assert_eq!(machine.queue_state(0, 0), QueueState::Idle);
    assert_eq!(machine.queue_state(0, 1), QueueState::Disabled);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((machine.peek32(FENCE), machine.queue(0, 0, &WPTR)), (0, 0));
    // Nor does it remember one.
    machine.reset_queue(0, 0);
    machine.kick(0, &[1]);
    machine.enable(0, 0, TOKEN);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.peek32(FENCE), 0);
    machine.kick(0, &[1]);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(FENCE), 1);
}

#[test]
fn a_pointer_that_cannot_be_stops_the_queue_as_a_doorbell_with_it_does() {
    // Nor may it go back.
    let machine = Machine::polling(POINTER);
    machine.put_fence(0, 1);
    machine.ring_doorbell(0, 0, 16);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    machine.poke(POINTER, &12_u64.to_le_bytes());
    machine.kick(0, &[1]);
    assert_eq!(machine.settle(0, 0), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::BadDoorbell, 12, 1));
    for wptr in [2, u64::from(RING_SIZE) + 4, u64::MAX - 3] {
        let machine = Machine::polling(POINTER);
        machine.poke(POINTER, &wptr.to_le_bytes());
        machine.kick(0, &[1]);
        assert_eq!(machine.settle(0, 0), QueueState::Fault);
        assert_eq!(machine.fault(0, 0), (QueueFault::BadDoorbell, wptr, 0));
    }
    let nowhere = RAM - 8;
    let machine = Machine::polling(nowhere);
    machine.kick(0, &[1]);
    assert_eq!(machine.settle(0, 0), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::Unmapped, nowhere, 0));
}

#[test]
fn a_kick_can_get_lost_like_a_doorbell() {
    let machine = Machine::polling(POINTER);
    machine.gpus[0]
        .inject(Injection::LostDoorbell { queue: 0, count: 1 })
        .unwrap();
    machine.put_fence(0, 1);
    machine.poke(POINTER, &16_u64.to_le_bytes());
    machine.kick(0, &[1]);
    assert_eq!(machine.queue_state(0, 0), QueueState::Idle);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.peek32(FENCE), 0);
    machine.kick(0, &[1]);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(FENCE), 1);
}

#[test]
fn every_kick_of_many_is_followed() {
    let machine = Machine::polling(POINTER);
    for number in 1..=2000_u32 {
        let end = u64::from(number) * 16;
        machine.put_fence((end - 16) % u64::from(RING_SIZE), number);
        machine.poke(POINTER, &end.to_le_bytes());
        machine.kick(0, &[1]);
        // Sometimes the worker sleeps, sometimes it is just about to.
        if number % 3 != 0 {
            wait(|| machine.peek32(FENCE) == number);
        } else {
            assert_eq!(machine.settle(0, 0), QueueState::Idle);
            assert_eq!(machine.peek32(FENCE), number);
        }
    }
}
