//! What packets do when all is well.

use numagpu_spec::regs::{QueueState, irq, queue};
use numagpu_spec::sdma::{Surface, const_fill, copy_linear, copy_sub_window, fence, trap};
use proptest::prelude::*;

use super::*;
use crate::bus::ResetKind;
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

/// A stop that has returned is never followed by a new pointer, nor by an access.
#[test]
fn nothing_moves_behind_a_stop() {
    let machine = Machine::ready();
    let words: Vec<u32> = (0..100)
        .flat_map(|n| {
            let mut words = copy_linear(DATA, hbm(0, 0), 4096).to_vec();
            words.extend(fence(DATA + 8192, n));
            words
        })
        .collect();
    for round in 0..50 {
        machine.submit(0, 0, &words[..words.len() / 2]);
        std::thread::sleep(Duration::from_micros(round * 20));
        machine.set_queue(0, 0, &queue::CONTROL, 0);
        let seen = |machine: &Machine| {
            let status = machine.gpus[0].status().queues[0];
            let accesses = machine.vmms[0].dma.accesses().len();
            (status, machine.peek32(DATA + 8192), accesses)
        };
        let before = seen(&machine);
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!(seen(&machine), before);
        assert_eq!(before.0.state, QueueState::Disabled);
        machine.reset_queue(0, 0);
        machine.enable(0, 0, TOKEN);
    }
}

/// Memory that was unmapped is never written again, whatever the engine was doing.
#[test]
fn an_unmap_in_the_midst_of_copies_is_the_end_of_them() {
    let machine = Machine::ready();
    let dma = &machine.vmms[0].dma;
    let away = 0x2000_0000;
    let mut caught = 0;
    for round in 0..400u32 {
        if caught == 20 {
            return;
        }
        let ram = dma.map_ram(away, 8 << 20).unwrap();
        machine.run(&const_fill(hbm(0, 0), round + 1, 4 << 20));
        let words: Vec<u32> = (0..20)
            .flat_map(|_| {
                let mut words = copy_linear(hbm(0, 0), away, 4 << 20).to_vec();
                words.extend(copy_linear(away, away + (4 << 20), 4 << 20));
                words
            })
            .collect();
        machine.submit(0, 0, &words);
        std::thread::sleep(Duration::from_micros(u64::from(round % 20) * 50));
        dma.unmap(away);
        let clear = vec![0xee; 8 << 20];
        ram.slice(0, 8 << 20)
            .unwrap()
            .write_slice(&clear, 0)
            .unwrap();
        let state = machine.settle(0, 0);
        assert!(bytes(&ram, 0, 8 << 20) == clear);
        if state == QueueState::Fault {
            let (code, address, _) = machine.fault(0, 0);
            assert_eq!(code, QueueFault::Unmapped);
            assert!((away..away + (8 << 20)).contains(&address));
            caught += 1;
        }
        // On a busy host all may have been done before this thread came back.
        machine.reset_queue(0, 0);
        machine.enable(0, 0, TOKEN);
    }
    panic!("only {caught} of 400 unmaps met a copy");
}

/// A surface of 64 columns, 16 rows and 4 slices.
fn surface(address: u64, origin: [u32; 3]) -> Surface {
    Surface {
        address,
        origin,
        pitch: 64,
        slice_pitch: 64 * 16,
    }
}

fn refused(machine: &Machine, words: &[u32], code: QueueFault, address: u64) {
    assert_eq!(machine.run(words), QueueState::Fault, "{words:x?}");
    assert_eq!(machine.fault(0, 0), (code, address, 0), "{words:x?}");
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
}

#[test]
fn sub_windows_of_bad_form_or_place_are_refused() {
    let machine = Machine::ready();
    let (from, to) = (surface(DATA, [0; 3]), surface(hbm(0, 0), [0; 3]));
    let good = copy_sub_window(2, from, to, [4, 4, 1]);
    assert_eq!(machine.run(&good), QueueState::Idle);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    let flags = [
        (0, 1 << 16),
        (0, 1 << 18),
        (0, 5 << 29),
        (3, 1 << 14),
        (3, 1 << 30),
        (4, 1 << 11),
        (4, 1 << 12),
        (5, 1 << 28),
        (8, 1 << 15),
        (9, 1 << 12),
        (10, 1 << 31),
        (11, 1 << 31),
        (12, 1 << 11),
        (12, 1 << 16),
        (12, 1 << 24),
    ];
    for (word, bits) in flags {
        let mut bad = good;
        bad[word] = bad[word] & !(bits | u32::from(word == 0) << 30) | bits;
        refused(&machine, &bad, QueueFault::BadField, RING);
    }
    // Past the end of the address space, from its second row on.
    let high = u64::MAX - 100;
    let wraps = copy_sub_window(0, surface(high, [0; 3]), to, [4, 4, 1]);
    assert_eq!(machine.run(&wraps), QueueState::Fault);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    // The third row is behind the last partition, where there is nothing.
    let end = hbm(0, 2) - 2 * 64;
    let words = copy_sub_window(0, from, surface(end, [0; 3]), [10, 3, 1]);
    refused(&machine, &words, QueueFault::Unmapped, hbm(0, 2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Copies in one memory, overlapping or not, do what a model of bytes does.
    #[test]
    fn copies_do_what_a_memmove_does(
        steps in prop::collection::vec((0u64..600_000, 0u64..600_000, 1u64..500_000, any::<bool>()), 1..6)
    ) {
        let machine = Machine::ready();
        let mut model = noise(1_100_000);
        machine.poke(DATA, &model);
        machine.run(&copy_linear(DATA, hbm(0, 0), model.len() as u64));
        let mut other = model.clone();
        for (from, to, len, in_ram) in steps {
            let (base, memory) = match in_ram {
                true => (DATA, &mut model),
                false => (hbm(0, 0), &mut other),
            };
            let words = copy_linear(base + from, base + to, len);
            prop_assert_eq!(machine.run(&words), QueueState::Idle);
            memory.copy_within(from as usize..(from + len) as usize, to as usize);
        }
        prop_assert!(machine.peek(DATA, model.len()) == model, "RAM");
        prop_assert!(bytes(&machine.stores[0][0], 0, other.len()) == other, "HBM");
    }

    /// A sub-window goes element by element, and nothing beside it changes.
    #[test]
    fn sub_windows_copy_a_box(
        size in 0u32..5,
        source in (0u32..30, 0u32..8, 0u32..2),
        destination in (0u32..30, 0u32..8, 0u32..2),
        extent in (1u32..30, 1u32..8, 1u32..3),
    ) {
        let machine = Machine::ready();
        let element = 1usize << size;
        let len = 64 * 16 * 4 * element;
        let data = noise(len);
        machine.poke(DATA, &data);
        let (from, to) = (<[u32; 3]>::from(source), <[u32; 3]>::from(destination));
        let extent = <[u32; 3]>::from(extent);
        let words = copy_sub_window(size, surface(DATA, from), surface(hbm(0, 0), to), extent);
        prop_assert_eq!(machine.run(&words), QueueState::Idle);
        let at = |origin: [u32; 3], x: u32, y: u32, z: u32| {
            let index = ((origin[2] + z) * 16 + origin[1] + y) * 64 + origin[0] + x;
            index as usize * element
        };
        let mut model = vec![0; len];
        for z in 0..extent[2] {
            for y in 0..extent[1] {
                for x in 0..extent[0] {
                    let (a, b) = (at(from, x, y, z), at(to, x, y, z));
                    model[b..b + element].copy_from_slice(&data[a..a + element]);
                }
            }
        }
        prop_assert!(bytes(&machine.stores[0][0], 0, len) == model);
        let moved = u64::from(extent.iter().product::<u32>()) * element as u64;
        prop_assert_eq!(machine.gpus[0].status().queues[0].bytes, moved);
    }
}

/// Whatever stops a queue, and whichever chunk of a copy it is at: what is behind that chunk stays as it was, and
/// nothing moves any more when the stop returns.
#[test]
fn a_stop_at_every_step_of_a_copy_ends_it_there() {
    use crate::engine::CHUNK;
    const STEPS: u64 = 8;
    type Stop = fn(&Machine);
    let stops: [Stop; 3] = [
        |machine| machine.set_queue(0, 0, &regs::queue::CONTROL, 2),
        |machine| machine.gpus[0].reset(ResetKind::Function),
        |machine| machine.gpus[0].detach(),
    ];
    let (from, to) = (DATA, DATA + (16 << 20));
    let data = noise((STEPS * CHUNK) as usize);
    let mut ended_there = 0;
    for stop in stops {
        for step in 0..STEPS {
            let machine = Machine::ready();
            machine.poke(from, &data);
            let dma = &machine.vmms[0].dma;
            let at = from + step * CHUNK;
            dma.stall(at);
            machine.submit(0, 0, &copy_linear(from, to, STEPS * CHUNK));
            wait(|| dma.accesses().iter().any(|it| it.address == at));
            std::thread::scope(|scope| {
                let stopping = scope.spawn(|| stop(&machine));
                std::thread::sleep(Duration::from_millis(5));
                assert!(!stopping.is_finished(), "it waits for the chunk");
                dma.resume();
            });
            let accesses = dma.accesses().len();
            let moved = machine.peek(to, data.len());
            let chunk = CHUNK as usize;
            let done = moved.chunks(chunk).zip(data.chunks(chunk));
            let done = done.take_while(|(is, was)| is == was).count();
            assert!(done as u64 >= step, "{done} of {step}");
            let rest = moved.get(done * chunk..).unwrap();
            assert!(rest.iter().all(|byte| *byte == 0), "beyond chunk {done}");
            // A host that was slow to stop it may have let it go on for a while.
            ended_there += u32::from(done as u64 <= step + 1);
            assert_eq!(machine.queue(0, 0, &regs::queue::RPTR), 0);
            assert_eq!(machine.queue_state(0, 0), QueueState::Disabled);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(dma.accesses().len(), accesses, "something moved behind");
        }
    }
    assert!(ended_there > 12, "{ended_there} of 24");
}
