//! What packets do when all is well.

use numagpu_spec::regs::{QueueState, irq, queue};
use numagpu_spec::sdma::{const_fill, copy_linear, fence, trap};

use super::*;
use crate::test_support::Access;

#[test]
fn data_goes_from_ram_through_two_gpus_and_back() {
    let machine = Machine::ready();
    let data = noise(1_000_003);
    let len = data.len() as u64;
    machine.poke(DATA + 5, &data);
    let mut words = Vec::new();
    // Guest memory, own HBM, own other partition, a neighbour, a peer two hops away, guest memory.
    let stops = [
        DATA + 5,
        hbm(0, 0) + 3,
        hbm(0, 1) + 4096,
        hbm(1, 0) + 1,
        hbm(2, 1),
        DATA + (8 << 20),
    ];
    for pair in stops.windows(2) {
        words.extend(copy_linear(pair[0], pair[1], len));
    }
    words.extend(fence(DATA + (4 << 20), 77));
    assert_eq!(
        machine.run(&words),
        QueueState::Idle,
        "{:?}",
        machine.fault(0, 0)
    );
    assert_eq!(machine.peek32(DATA + (4 << 20)), 77);
    assert_eq!(machine.peek(DATA + (8 << 20), data.len()), data);
    assert_eq!(bytes(&machine.stores[2][1], 0, data.len()), data);
    assert_eq!(machine.queue(0, 0, &queue::PACKETS), 6);
    let status = machine.gpus[0].status().queues[0];
    assert_eq!(status.bytes, 5 * len + 4);
}

#[test]
fn ram_to_ram_goes_too() {
    let machine = Machine::ready();
    let data = noise(300_001);
    machine.poke(DATA + 1, &data);
    let words = copy_linear(DATA + 1, DATA + (1 << 20) + 2, data.len() as u64);
    assert_eq!(machine.run(&words), QueueState::Idle);
    let copied = machine.peek(DATA + (1 << 20) + 2, data.len());
    let wrong = copied.iter().zip(&data).position(|(a, b)| a != b);
    assert_eq!(wrong, None);
}

#[test]
fn overlapping_copies_behave_like_memmove() {
    let machine = Machine::ready();
    let data = noise(700_000);
    for distance in [1i64, 4096, 100_001, -1, -4096, -100_001] {
        let (from, to) = (1 << 20, ((1i64 << 20) + distance).cast_unsigned());
        machine.poke(DATA + from, &data);
        let words = copy_linear(DATA + from, DATA + to, data.len() as u64);
        assert_eq!(machine.run(&words), QueueState::Idle);
        assert!(
            machine.peek(DATA + to, data.len()) == data,
            "RAM by {distance}"
        );

        machine.poke(DATA + from, &data);
        let mut words = copy_linear(DATA + from, hbm(0, 0) + from, data.len() as u64).to_vec();
        words.extend(copy_linear(
            hbm(0, 0) + from,
            hbm(0, 0) + to,
            data.len() as u64,
        ));
        assert_eq!(machine.run(&words), QueueState::Idle);
        let moved = bytes(&machine.stores[0][0], to, data.len());
        assert!(moved == data, "HBM by {distance}");
    }
}

#[test]
fn a_copy_may_cross_from_one_partition_into_the_next() {
    let machine = Machine::ready();
    let data = noise(600_000);
    machine.poke(DATA, &data);
    let border = hbm(0, 1);
    let mut words = copy_linear(DATA, border - 300_000, 600_000).to_vec();
    // Overlapping, backwards, across the border.
    words.extend(copy_linear(border - 300_000, border - 200_000, 600_000));
    words.extend(copy_linear(border - 200_000, DATA + (1 << 20), 600_000));
    assert_eq!(machine.run(&words), QueueState::Idle);
    assert!(machine.peek(DATA + (1 << 20), data.len()) == data);
}

#[test]
fn fills_by_bytes_and_words() {
    let machine = Machine::ready();
    let bytes_fill = {
        let mut words = const_fill(DATA + 3, 0x1234_56ab, 500_001);
        words[0] &= 0xff;
        words
    };
    machine.run(&bytes_fill);
    assert_eq!(machine.peek(DATA + 2, 1), [0]);
    assert!(machine.peek(DATA + 3, 500_001).iter().all(|b| *b == 0xab));
    assert_eq!(machine.peek(DATA + 3 + 500_001, 1), [0]);
    machine.run(&const_fill(hbm(1, 0) + 4, 0x4433_2211, 400_000));
    let filled = bytes(&machine.stores[1][0], 4, 400_000);
    assert!(
        filled
            .chunks(4)
            .all(|word| word == [0x11, 0x22, 0x33, 0x44])
    );
    assert_eq!(bytes(&machine.stores[1][0], 0, 4), [0; 4]);
}

#[test]
fn writes_carry_their_data_across_the_rings_wrap() {
    let machine = Machine::ready();
    // 500 words leave 524 of 1024: the second write wraps.
    for round in 0..4u32 {
        let data: Vec<u32> = (0..700).map(|i| i * 7 + round).collect();
        let words = write_linear(hbm(0, 0) + 0x1000 * u64::from(round), &data);
        assert_eq!(machine.run(&words), QueueState::Idle);
        let written = bytes(&machine.stores[0][0], 0x1000 * u64::from(round), 2800);
        let expected: Vec<u8> = data.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(written, expected);
    }
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 4 * 704 * 4);
}

#[test]
fn packets_wrap_at_any_word() {
    let machine = Machine::ready();
    let mut value = 0;
    for _ in 0..600 {
        value += 1;
        machine.run(&fence(DATA, value));
        assert_eq!(machine.peek32(DATA), value);
        // Three words more move the packets' phase.
        machine.run(&[0x0002_0000, 0xffff_ffff, 0xffff_ffff]);
    }
    let rptr = machine.queue(0, 0, &queue::RPTR);
    assert_eq!(rptr, 600 * 28);
    wait(|| u64::from(machine.peek32(writeback(0, 0))) == rptr);
}

#[test]
fn fences_and_traps_come_in_order() {
    let machine = Machine::ready();
    let mut words = Vec::new();
    for value in 1..=20u32 {
        words.extend(const_fill(hbm(0, 0), value, 4096));
        words.extend(copy_linear(hbm(0, 0), DATA + 64, 4096));
        words.extend(fence(DATA, value));
        words.extend(trap(value));
    }
    machine.submit(0, 0, &words);
    assert!(machine.vmms[0].irq.wait(1, 20, LIMIT));
    assert_eq!(machine.peek32(DATA), 20);
    assert_eq!(machine.peek32(DATA + 64), 20);
    assert_eq!(machine.peek32(writeback(0, 0)), words.len() as u32 * 4);
    assert_eq!(machine.read(0, &irq::BLOCK, 0, &irq::STATUS), 0x100);
    assert_eq!(machine.read(0, &irq::BLOCK, 0, &irq::RAISED), 20);
    machine.write(0, &irq::BLOCK, 0, &irq::STATUS, 0x100);
    assert_eq!(machine.read(0, &irq::BLOCK, 0, &irq::STATUS), 0);
}

#[test]
fn a_trap_without_enable_is_pending_and_silent() {
    let machine = Machine::ready();
    machine.write(0, &irq::BLOCK, 0, &irq::ENABLE, 0);
    machine.enable(0, 1, TOKEN);
    machine.submit(0, 1, &trap(0));
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
    assert_eq!(machine.read(0, &irq::BLOCK, 0, &irq::STATUS), 0x200);
    assert!(machine.vmms[0].irq.vectors().is_empty());
}

#[test]
fn a_ring_may_lie_in_hbm() {
    let machine = Machine::ready();
    let mut packets: Vec<u32> = fence(DATA, 5).to_vec();
    packets.extend(trap(0));
    machine.run(&write_linear(hbm(0, 1), &packets));
    machine.enable_at(0, 1, TOKEN, hbm(0, 1));
    machine.ring_doorbell(0, 1, 24);
    assert!(machine.vmms[0].irq.wait(2, 1, LIMIT));
    assert_eq!(machine.peek32(DATA), 5);
}

#[test]
fn a_slow_queue_holds_up_nobody() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    let dma = &machine.vmms[0].dma;
    dma.stall(DATA + (3 << 20));
    machine.submit(0, 0, &copy_linear(DATA, hbm(0, 0), 4 << 20));
    let stuck = |a: &Access| a.address <= DATA + (3 << 20) && DATA + (3 << 20) < a.address + a.len;
    wait(|| dma.accesses().iter().any(stuck));
    for value in 1..50 {
        machine.submit(0, 1, &fence(DATA - 64, value));
        assert_eq!(machine.settle(0, 1), QueueState::Idle);
    }
    assert_eq!(machine.peek32(DATA - 64), 49);
    // Its own doorbell and registers do not wait either.
    machine.submit(0, 0, &fence(DATA - 128, 1));
    assert_eq!(machine.queue_state(0, 0), QueueState::Running);
    dma.resume();
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(DATA - 128), 1);
}
