//! Polls, atomic operations and timestamps: good forms, bad forms, resets in their midst.

use numagpu_spec::regs::queue;
use numagpu_spec::sdma::{
    AtomicOp, PollFunction, atomic, copy_linear, fence, poll_memory, timestamp_get,
    timestamp_get_global, timestamp_set,
};
use proptest::prelude::*;

use super::*;

/// Retries without end.
const FOREVER: u32 = 0xfff;

fn peek64(machine: &Machine, address: u64) -> u64 {
    u64::from_le_bytes(machine.peek(address, 8).try_into().unwrap())
}

fn fault_of(machine: &Machine, words: &[u32]) -> (QueueFault, u64) {
    assert_eq!(machine.run(words), QueueState::Fault, "{words:x?}");
    let (code, address, _) = machine.fault(0, 0);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    (code, address)
}

#[test]
fn polls_compare_under_their_mask() {
    let machine = Machine::ready();
    for (value, reference) in [(4u32, 5u32), (5, 5), (6, 5), (u32::MAX, 0)] {
        machine.poke(DATA, &value.to_le_bytes());
        let holds = [
            true,
            value < reference,
            value <= reference,
            value == reference,
            value != reference,
            value >= reference,
            value > reference,
        ];
        for (function, holds) in PollFunction::ALL.into_iter().zip(holds) {
            let words = poll_memory(DATA, function, reference, u32::MAX, 1, 0);
            if holds {
                assert_eq!(machine.run(&words), QueueState::Idle);
            } else {
                let timeout = (QueueFault::PollTimeout, DATA);
                assert_eq!(fault_of(&machine, &words), timeout);
            }
        }
    }
    machine.poke(DATA, &0xabcd_1234u32.to_le_bytes());
    let words = poll_memory(DATA, PollFunction::Equal, 0x1200, 0xff00, 0, 0);
    assert_eq!(machine.run(&words), QueueState::Idle);
}

#[test]
fn a_poll_waits_for_the_other_side_and_shows_what_is_done() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    let mut words = fence(DATA + 64, 7).to_vec();
    let poll = poll_memory(DATA, PollFunction::GreaterEqual, 3, u32::MAX, FOREVER, 10);
    words.extend(poll);
    words.extend(fence(DATA + 64, 8));
    machine.submit(0, 0, &words);
    // The fence before it is behind the read pointer while the poll waits; another queue works on.
    wait(|| machine.peek32(writeback(0, 0)) == 16);
    assert_eq!(machine.peek32(DATA + 64), 7);
    machine.submit(0, 1, &fence(DATA, 3));
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(DATA + 64), 8);
}

#[test]
fn a_reset_ends_polls_loops_and_long_copies() {
    let machine = Machine::ready();
    let mut looping = atomic(DATA, AtomicOp::CompareSwap, false, 1, 2);
    looping[0] |= sdma::ATOMIC_LOOP;
    looping[7] = 0x1fff;
    let copies: Vec<u32> = (0..80)
        .flat_map(|_| copy_linear(DATA, DATA + (8 << 20), 4 << 20))
        .collect();
    let endless = poll_memory(DATA, PollFunction::Equal, 1, 1, FOREVER, u16::MAX);
    for words in [&endless[..], &looping, &copies] {
        machine.submit(0, 0, words);
        wait(|| machine.queue_state(0, 0) == QueueState::Running);
        std::thread::sleep(Duration::from_millis(3));
        let since = Instant::now();
        machine.reset_queue(0, 0);
        assert!(since.elapsed() < Duration::from_secs(2));
        assert_eq!(machine.queue_state(0, 0), QueueState::Disabled);
        machine.enable(0, 0, TOKEN);
    }
    assert_eq!(machine.run(&[0]), QueueState::Idle);
}

#[test]
fn a_loop_swaps_when_its_comparison_holds() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    let mut words = atomic(DATA, AtomicOp::CompareSwap, true, 9, 5);
    words[0] |= sdma::ATOMIC_LOOP;
    machine.submit(0, 0, &words);
    std::thread::sleep(Duration::from_millis(1));
    assert_eq!(peek64(&machine, DATA), 0);
    machine.submit(0, 1, &fence(DATA, 5));
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(peek64(&machine, DATA), 9);
}

#[test]
fn two_queues_add_and_lose_nothing() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    let words: Vec<u32> = (0..100)
        .flat_map(|_| atomic(DATA, AtomicOp::Add, true, u64::MAX, 0))
        .collect();
    machine.submit(0, 0, &words);
    machine.submit(0, 1, &words);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
    assert_eq!(peek64(&machine, DATA), 0u64.wrapping_sub(200));
}

#[test]
fn timestamps_are_the_clock_registers() {
    let machine = Machine::ready();
    let now = || machine.read(0, &regs::clock::BLOCK, 0, &regs::clock::NS);
    let mut words = timestamp_get_global(DATA).to_vec();
    words.extend(timestamp_get(DATA + 8));
    words.extend(timestamp_set(1000));
    words.extend(timestamp_get(DATA + 16));
    words.extend(timestamp_get_global(hbm(1, 0)));
    assert_eq!(machine.run(&words), QueueState::Idle);
    for at in [0, 8] {
        assert_eq!(peek64(&machine, DATA + at), now());
    }
    assert_eq!(peek64(&machine, DATA + 16), 1000);
    assert_eq!(bytes(&machine.stores[1][0], 0, 8), now().to_le_bytes());
    machine.clock.advance(500);
    machine.run(&timestamp_get(DATA));
    assert_eq!(peek64(&machine, DATA), 1500);
}

#[test]
fn bad_forms_are_refused() {
    let machine = Machine::ready();
    let poll = poll_memory(DATA, PollFunction::Always, 0, 0, 0, 0);
    let add = atomic(DATA, AtomicOp::Add, true, 1, 0);
    let get = timestamp_get(DATA);
    let changed = |words: &[u32], word: usize, bits: u32| {
        let mut words = words.to_vec();
        words[word] ^= bits;
        words
    };
    for words in [
        changed(&poll, 0, 1 << 31),
        changed(&poll, 0, 7 << 28),
        changed(&poll, 0, 1 << 26),
        changed(&poll, 0, 1 << 16),
        changed(&poll, 5, 1 << 28),
        changed(&add, 0, 1 << 16),
        changed(&add, 0, 1 << 18),
        changed(&add, 0, 1 << 24),
        changed(&add, 0, 0x2f << 25),
        changed(&add, 7, 1 << 13),
        changed(&get, 0, 1 << 16),
    ] {
        assert_eq!(fault_of(&machine, &words).0, QueueFault::BadField);
    }
    for words in [&poll[..], &add, &get] {
        for len in 1..words.len() {
            let code = fault_of(&machine, &words[..len]).0;
            assert_eq!(code, QueueFault::Truncated);
        }
        for odd in [1, 2] {
            let words = changed(words, 1, odd);
            let refused = (QueueFault::BadField, DATA + u64::from(odd));
            assert_eq!(fault_of(&machine, &words), refused);
        }
    }
    let four = (QueueFault::BadField, DATA + 4);
    assert_eq!(fault_of(&machine, &changed(&add, 1, 4)), four);
    assert_eq!(fault_of(&machine, &changed(&get, 1, 4)), four);
    let narrow = atomic(DATA + 4, AtomicOp::Add, false, 1, 0);
    assert_eq!(machine.run(&narrow), QueueState::Idle);
    let at = |address| {
        [
            poll_memory(address, PollFunction::Always, 0, 0, 0, 0).to_vec(),
            atomic(address, AtomicOp::Add, false, 1, 0).to_vec(),
            timestamp_get(address).to_vec(),
        ]
    };
    let hole = RAM + RAM_SIZE as u64;
    for words in at(hole) {
        assert_eq!(fault_of(&machine, &words), (QueueFault::Unmapped, hole));
    }
    machine.release(0, 1, TOKEN);
    let free = hbm(0, 1);
    for words in at(free) {
        assert_eq!(fault_of(&machine, &words), (QueueFault::NotOwned, free));
    }
    machine.fabric.set_link(0xabc, 1, 2, false).unwrap();
    let cut = hbm(2, 0);
    for words in at(cut) {
        assert_eq!(fault_of(&machine, &words), (QueueFault::LinkDown, cut));
    }
}

/// What an operation leaves, in arithmetic that cannot wrap.
fn model(op: AtomicOp, bits: u32, old: u64, operand: u64, comparand: u64) -> u64 {
    let mask = u64::MAX >> (64 - bits);
    let (old, x, y) = (old & mask, operand & mask, comparand & mask);
    let signed = |v: u64| (v << (64 - bits)).cast_signed() >> (64 - bits);
    let wrap = |v: i128| v.rem_euclid(1 << bits) as u64;
    match op {
        AtomicOp::Swap => x,
        AtomicOp::CompareSwap => [old, x][usize::from(old == y)],
        AtomicOp::Add => wrap(i128::from(old) + i128::from(x)),
        AtomicOp::Sub => wrap(i128::from(old) - i128::from(x)),
        AtomicOp::MinSigned => [old, x][usize::from(signed(x) < signed(old))],
        AtomicOp::MinUnsigned => old.min(x),
        AtomicOp::MaxSigned => [old, x][usize::from(signed(x) > signed(old))],
        AtomicOp::MaxUnsigned => old.max(x),
        AtomicOp::And => old & x,
        AtomicOp::Or => old | x,
        AtomicOp::Xor => old ^ x,
        AtomicOp::Increment => [old + u64::from(old != mask), 0][usize::from(old >= x)],
        AtomicOp::Decrement if old == 0 || old > x => x,
        AtomicOp::Decrement => old - 1,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn atomics_do_what_the_model_does(
        steps in prop::collection::vec((0usize..13, any::<bool>(), any::<bool>(), edge(), edge(), edge()), 1..30)
    ) {
        let machine = Machine::ready();
        for (op, wide, quiet, old, operand, comparand) in steps {
            let op = AtomicOp::ALL[op];
            machine.poke(DATA, &old.to_le_bytes());
            let mut words = atomic(DATA, op, wide, operand, comparand);
            if quiet {
                words[0] |= u32::from(sdma::ATOMIC_NO_RETURN) << sdma::ATOMIC_OP_SHIFT;
            }
            prop_assert_eq!(machine.run(&words), QueueState::Idle);
            let bits = if wide { 64 } else { 32 };
            let mut expected = model(op, bits, old, operand, comparand);
            if !wide {
                expected |= old & !0xffff_ffff;
            }
            prop_assert_eq!(peek64(&machine, DATA), expected, "{:?}", op);
        }
        prop_assert_eq!(machine.queue(0, 0, &queue::FAULT_CODE), 0);
    }
}

fn edge() -> impl Strategy<Value = u64> {
    let edges = vec![
        0,
        1,
        2,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 63,
        u64::MAX,
    ];
    prop_oneof![prop::sample::select(edges), any::<u64>()]
}
