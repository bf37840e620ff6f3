//! Random accesses and random packets: nothing panics, nothing hangs, nothing escapes.

use numagpu_spec::regs::queue;
use proptest::prelude::*;

use super::*;
use crate::bus::ResetKind;

#[derive(Clone, Debug)]
enum Access {
    ConfigRead(u32, usize),
    ConfigWrite(u32, Vec<u8>),
    BarRead(u8, u64, usize),
    BarWrite(u8, u64, Vec<u8>),
    DmaChanged,
    Reset,
    Reattach,
}

fn access() -> impl Strategy<Value = Access> {
    let data =
        || prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(2), any::<u8>()], 0..17);
    let near = prop_oneof![4 => 0u64..0x200, 4 => 0x2000u64..0x2200, 4 => 0x8000u64..0x8200, 1 => any::<u64>()];
    let config = prop_oneof![4 => 0u32..0x100, 1 => any::<u32>()];
    prop_oneof![
        2 => (config.clone(), 0usize..40).prop_map(|(o, n)| Access::ConfigRead(o, n)),
        2 => (config, data()).prop_map(|(o, d)| Access::ConfigWrite(o, d)),
        8 => (0u8..8, near.clone(), 0usize..40).prop_map(|(b, o, n)| Access::BarRead(b, o, n)),
        16 => (0u8..5, near, data()).prop_map(|(b, o, d)| Access::BarWrite(b, o, d)),
        1 => Just(Access::DmaChanged),
        1 => Just(Access::Reset),
        1 => Just(Access::Reattach),
    ]
}

fn apply(machine: &Machine, access: &Access) {
    let gpu = &machine.gpus[0];
    match access {
        Access::ConfigRead(offset, len) => gpu.config_read(*offset, &mut vec![0; *len]),
        Access::ConfigWrite(offset, data) => gpu.config_write(*offset, data),
        Access::BarRead(bar, offset, len) => gpu.bar_read(*bar, *offset, &mut vec![0; *len]),
        Access::BarWrite(bar, offset, data) => gpu.bar_write(*bar, *offset, data),
        Access::DmaChanged => gpu.dma_changed(),
        Access::Reset => gpu.reset(ResetKind::Function),
        Access::Reattach => {
            gpu.detach();
            gpu.attach(machine.vmms[0].attachment());
        }
    }
}

/// Addresses at the borders of everything.
fn target() -> impl Strategy<Value = u64> {
    let borders = prop::sample::select(vec![
        0,
        RAM,
        DATA,
        RAM + RAM_SIZE as u64,
        hbm(0, 0),
        hbm(0, 1),
        hbm(0, 1) + HBM_SIZE,
        hbm(1, 0),
        hbm(2, 1) + HBM_SIZE,
        u64::MAX - 63,
    ]);
    (borders, -64i64..64).prop_map(|(at, by)| at.saturating_add_signed(by))
}

fn packet() -> impl Strategy<Value = Vec<u32>> {
    let count = || prop_oneof![1u64..200, 1u64..600_000];
    prop_oneof![
        4 => (target(), target(), count()).prop_map(|(s, d, n)| sdma::copy_linear(s, d, n).to_vec()),
        2 => (target(), any::<u32>(), count()).prop_map(|(d, v, n)| sdma::const_fill(d, v, n).to_vec()),
        2 => (target(), any::<u32>()).prop_map(|(a, v)| sdma::fence(a & !3, v).to_vec()),
        1 => any::<u32>().prop_map(|c| sdma::trap(c).to_vec()),
        2 => (target(), 0usize..7, any::<u32>(), 0u32..4)
            .prop_map(|(a, f, v, n)| sdma::poll_memory(a & !3, sdma::PollFunction::ALL[f], v, v, n, 1).to_vec()),
        2 => (target(), 0usize..13, any::<bool>(), any::<u64>())
            .prop_map(|(a, op, w, v)| sdma::atomic(a & !7, sdma::AtomicOp::ALL[op], w, v, 0).to_vec()),
        1 => target().prop_map(|a| sdma::timestamp_get_global(a & !7).to_vec()),
        1 => (target(), prop::collection::vec(any::<u32>(), 1..40)).prop_map(|(d, w)| write_linear(d & !3, &w)),
        1 => prop::collection::vec(any::<u32>(), 1..8),
    ]
}

/// Whoever calls whatever at once: nobody waits for ever, and the function works afterwards.
#[test]
fn threads_do_not_hang_each_other() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let machine = Machine::ready();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (machine, over) = (&machine, &over);
        let going = || !over.load(Ordering::Relaxed);
        for queue in 0..2 {
            scope.spawn(move || {
                while going() {
                    machine.claim(0, queue, TOKEN);
                    machine.enable_at(0, queue, TOKEN, ring(0, queue));
                    let words: Vec<u32> = (0..20)
                        .flat_map(|_| sdma::copy_linear(DATA, hbm(0, queue.into()), 1 << 20))
                        .collect();
                    machine.submit(0, queue, &words);
                    std::thread::sleep(Duration::from_micros(300));
                    machine.release(0, queue, TOKEN);
                    machine.set_queue(0, queue, &queue::CONTROL, 2);
                }
            });
        }
        scope.spawn(move || {
            while going() {
                machine.gpus[0].dma_changed();
                let _status = machine.gpus[0].status();
                machine.gpus[1].reset(ResetKind::Function);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        for round in 0..60 {
            match round % 3 {
                0 => machine.gpus[0].reset(ResetKind::Function),
                1 => machine.gpus[0].config_write(0x59, &[0x80]),
                _ => {
                    machine.gpus[0].detach();
                    machine.gpus[0].attach(machine.vmms[0].attachment());
                }
            }
            machine.gpus[0].config_write(4, &[6, 0]);
            machine.write(0, &regs::boot::BLOCK, 0, &regs::boot::CONTROL, 1);
            machine.clock.advance(1_000_000);
            std::thread::sleep(Duration::from_millis(5));
        }
        over.store(true, Ordering::Relaxed);
    });
    machine.gpus[0].reset(ResetKind::Function);
    for partition in 0..2 {
        machine.wait_free(0, partition);
        assert!(
            bytes(&machine.stores[0][partition as usize], 0, 1 << 20)
                .iter()
                .all(|b| *b == 0)
        );
    }
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&[0]), QueueState::Idle);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_accesses_are_harmless(accesses in prop::collection::vec(access(), 1..200), ready in any::<bool>()) {
        let machine = if ready { Machine::ready() } else { Machine::new() };
        for access in &accesses {
            apply(&machine, access);
        }
        // It still works after a reset.
        machine.gpus[0].reset(ResetKind::Function);
        machine.wait_free(0, 0);
        machine.boot(0);
        prop_assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
        machine.enable(0, 0, TOKEN);
        prop_assert_eq!(machine.run(&[0]), QueueState::Idle);
    }

    #[test]
    fn random_packets_complete_or_fault(packets in prop::collection::vec(packet(), 1..30)) {
        let machine = Machine::ready();
        // GPU 2 belongs to somebody else: whatever comes, it stays as it is.
        for partition in 0..2 {
            machine.release(2, partition, TOKEN);
            machine.wait_free(2, partition);
            machine.claim(2, partition, 99);
        }
        for packet in &packets {
            let before = machine.queue(0, 0, &queue::PACKETS);
            let wptr = machine.queue(0, 0, &queue::WPTR) + 4 * packet.len() as u64;
            match machine.run(packet) {
                QueueState::Idle => prop_assert_eq!(machine.queue(0, 0, &queue::RPTR), wptr),
                state => {
                    prop_assert_eq!(state, QueueState::Fault);
                    let (code, _, index) = machine.fault(0, 0);
                    prop_assert_ne!(code, QueueFault::None);
                    prop_assert!(index >= before);
                    machine.reset_queue(0, 0);
                    machine.enable(0, 0, TOKEN);
                }
            }
        }
        for store in &machine.stores[2] {
            prop_assert!(bytes(store, 0, 4096).iter().all(|b| *b == 0));
            prop_assert!(bytes(store, HBM_SIZE - 4096, 4096).iter().all(|b| *b == 0));
        }
    }
}
