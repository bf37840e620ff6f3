//! A saved state makes another device the same one, and work goes on as if nothing had happened.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use numagpu_spec::regs::{
    IrqBits, OwnerLoss, TimingMode, clock, irq, partition, queue, ras, topology,
};
use numagpu_spec::sdma::{AtomicOp, PollFunction, atomic, copy_linear, fence, poll_memory, trap};
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::bus::ResetKind;
use crate::inject::Injection;
use crate::state::{GpuState, RestoreError, SaveError, VERSION};

const MS: u64 = 1_000_000;
/// A word that polls wait for, a counter, and where fences go.
const WORD: u64 = DATA;
const COUNTER: u64 = DATA + 64;
const FENCE: u64 = DATA + 128;
const SOURCE: u64 = DATA + 0x1_0000;

/// Through the text that a file would have.
fn text_and_back(state: &GpuState) -> GpuState {
    let text = serde_json::to_string(state).unwrap();
    serde_json::from_str(&text).unwrap()
}

impl Machine {
    /// All that a driver can read of a GPU.
    fn dump(&self, gpu: usize) -> Vec<u8> {
        let gpu = &self.gpus[gpu];
        let mut all = vec![0; 0x1000];
        gpu.config_read(0, &mut all);
        for (bar, size) in [
            (pci::BAR_REGISTERS, pci::BAR_REGISTERS_SIZE),
            (pci::BAR_MSIX, pci::BAR_MSIX_SIZE),
            (pci::BAR_DOORBELLS, pci::BAR_DOORBELLS_SIZE),
        ] {
            let mut data = vec![0; size as usize];
            gpu.bar_read(bar, 0, &mut data);
            all.extend(data);
        }
        all
    }

    /// Puts a new GPU in the place of one, on a host whose clock stands elsewhere, without a VMM.
    fn renew(&mut self, gpu: usize) {
        let old = self.gpus.remove(gpu);
        let clock = Arc::new(ManualClock::default());
        clock.advance(123_456_789);
        let config = GpuConfig {
            clock: Arc::clone(&clock) as _,
            ..old.config().clone()
        };
        drop(old);
        self.clock = clock;
        let mut new = None;
        // A ticker may hold the old one for a moment.
        wait(|| {
            new = Gpu::new(config.clone(), Arc::clone(&self.fabric)).ok();
            new.is_some()
        });
        self.gpus.insert(gpu, new.unwrap());
    }

    fn attach(&self, gpu: usize) {
        self.gpus[gpu].attach(self.vmms[gpu].attachment());
    }

    /// Moves GPU 0 into a new device, as a migration would, and gives the state that it had.
    fn migrate(&mut self) -> GpuState {
        let state = self.gpus[0].pause().unwrap().finish();
        self.renew(0);
        self.attach(0);
        self.gpus[0].restore(&text_and_back(&state)).unwrap();
        state
    }

    fn inject_all(&self, faults: &[Injection]) {
        for fault in faults {
            self.gpus[0].inject(*fault).unwrap();
        }
    }

    /// A GPU 0 with something in every corner.
    fn eventful() -> Machine {
        let machine = Machine::ready();
        let gpu = &machine.gpus[0];
        gpu.config_write(0x10, &0xfebf_0000_u32.to_le_bytes());
        gpu.config_write(0x3c, &[11]);
        gpu.bar_write(pci::BAR_MSIX, 0x10, &0xfee0_1000_u64.to_le_bytes());
        gpu.bar_write(pci::BAR_DOORBELLS, 12, &7_u32.to_le_bytes());
        machine.enable(0, 1, TOKEN);
        let mut words = copy_linear(SOURCE, hbm(0, 0), 8192).to_vec();
        words.extend(copy_linear(hbm(0, 0), hbm(1, 0), 4096));
        words.extend(trap(0x77));
        assert_eq!(machine.run(&words), QueueState::Idle);
        machine.submit(0, 1, &fence(3, 1));
        assert_eq!(machine.settle(0, 1), QueueState::Fault);
        machine.inject_all(&[
            Injection::CorrectableError { address: hbm(0, 1) },
            Injection::UncorrectableError {
                address: hbm(0, 1) + 0x5000,
            },
            Injection::LostDoorbell { queue: 0, count: 2 },
            Injection::LostInterrupt { count: 3 },
            Injection::LinkFlap {
                peer: 1,
                down_ms: 90,
            },
            Injection::BootFailure { code: 0x42 },
            Injection::StuckReset { ms: 5 },
            Injection::ScrubFailure { partition: 1 },
        ]);
        machine.write(0, &ras::BLOCK, 0, &ras::ADDRESS, hbm(0, 0) + 0x7000);
        machine.write(0, &ras::BLOCK, 0, &ras::COMMAND, 1);
        machine.write(0, &partition::BLOCK, 1, &partition::LEASE_MS, 40);
        assert_eq!(machine.command(0, 1, 4, TOKEN), OwnerResult::Ok);
        assert_eq!(machine.claim(0, 0, 5), OwnerResult::Busy);
        machine.write(0, &topology::BLOCK, 0, &topology::PARTITION_REQUEST, 4);
        machine.clock.advance(3 * MS);
        machine
    }
}

/// Waits for the word, then copies and counts, then tells.
fn work_behind_a_poll() -> Vec<u32> {
    let mut words = copy_linear(SOURCE, hbm(0, 0), 4096).to_vec();
    words.extend(atomic(COUNTER, AtomicOp::Add, false, 1, 0));
    words.extend(poll_memory(
        WORD,
        PollFunction::Equal,
        9,
        u32::MAX,
        u32::MAX,
        1,
    ));
    words.extend(copy_linear(hbm(0, 0), SOURCE + 8192, 4096));
    words.extend(atomic(COUNTER, AtomicOp::Add, false, 1, 0));
    words.extend(fence(FENCE, 0x1234));
    words
}

#[test]
fn all_that_can_be_read_is_the_same_after_a_restore() {
    let mut machine = Machine::eventful();
    let before = machine.dump(0);
    let state = machine.migrate();
    assert!(state.attached);
    let after = machine.dump(0);
    let differs = before.iter().zip(&after).position(|(b, a)| b != a);
    assert_eq!(differs, None, "offset in configuration space, BAR 0, 1, 2");
    assert_eq!(machine.gpus[0].save().unwrap(), state, "what is hidden too");
    // The clock goes on, and with it what is due.
    let now = machine.read(0, &clock::BLOCK, 0, &clock::NS);
    machine.clock.advance(40 * MS);
    let later = machine.read(0, &clock::BLOCK, 0, &clock::NS);
    assert_eq!(later, now + 40 * MS);
    wait(|| machine.partition(0, 1, &partition::LOSS) == u64::from(OwnerLoss::LeaseExpired.code()));
    wait(|| machine.owner_state(0, 1) == OwnerState::Faulted);
    machine.clock.advance(90 * MS);
    wait(|| machine.gpus[0].status().links[0].state == regs::LinkState::Up);
    // What was to happen at the next reset and boot happens.
    machine.gpus[0].reset(ResetKind::Function);
    assert!(!machine.gpus[0].status().present);
    machine.clock.advance(5 * MS);
    assert_eq!(machine.gpus[0].status().partitions.len(), 4);
    machine.write(0, &regs::boot::BLOCK, 0, &regs::boot::CONTROL, 1);
    machine.clock.advance(MS);
    let fault = machine.read(0, &regs::boot::BLOCK, 0, &regs::boot::FAULT);
    assert_eq!(fault, 0x42);
}

#[test]
fn a_kick_that_was_not_followed_is_followed_after_a_restore() {
    let mut machine = Machine::ready();
    machine.set_queue(0, 1, &queue::WPTR_POLL, WORD);
    machine.enable(0, 1, TOKEN);
    let words = fence(FENCE, 0x4b1c);
    for (at, word) in (ring(0, 1)..).step_by(4).zip(words) {
        machine.poke(at, &word.to_le_bytes());
    }
    machine.poke(WORD, &16_u64.to_le_bytes());
    let pause = machine.gpus[0].pause().unwrap();
    let offset = u64::from(pci::KICK_OFFSET) + pci::DOORBELL_STRIDE;
    machine.gpus[0].bar_write(pci::BAR_DOORBELLS, offset, &[1]);
    let state = pause.finish();
    machine.renew(0);
    machine.attach(0);
    assert_eq!(machine.peek32(FENCE), 0);
    machine.gpus[0].restore(&text_and_back(&state)).unwrap();
    wait(|| machine.peek32(FENCE) == 0x4b1c);
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
    // A state in which nobody would follow the kick is none.
    let mut bad = state.clone();
    bad.queues[1].run.as_mut().unwrap().wptr_poll = 0;
    machine.renew(0);
    assert!(machine.gpus[0].restore(&bad).is_err());
    bad.queues[1].run.as_mut().unwrap().wptr_poll = WORD + 4;
    assert!(machine.gpus[0].restore(&bad).is_err());
}

#[test]
fn a_mode_of_partitions_and_its_owners_are_kept() {
    let mut machine = Machine::ready();
    machine.write(0, &topology::BLOCK, 0, &topology::PARTITION_REQUEST, 4);
    machine.gpus[0].reset(ResetKind::Function);
    (0..4).for_each(|part| machine.wait_free(0, part));
    machine.boot(0);
    assert_eq!(machine.claim(0, 3, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    let before = machine.dump(0);
    let state = machine.migrate();
    assert!(machine.dump(0) == before);
    assert_eq!(machine.gpus[0].save().unwrap(), state);
    let last = hbm(0, 1) + HBM_SIZE / 2;
    assert_eq!(machine.run(&fence(last, 5)), QueueState::Idle);
    assert_eq!(machine.run(&fence(last - 4, 5)), QueueState::Fault);
    assert_eq!(machine.fault(0, 0).0, QueueFault::NotOwned);
}

#[test]
fn a_device_that_is_saved_goes_on() {
    let machine = Machine::ready();
    machine.submit(0, 0, &work_behind_a_poll());
    wait(|| machine.queue(0, 0, &queue::PACKETS) == 2);
    for _ in 0..20 {
        let state = machine.gpus[0].save().unwrap();
        assert_eq!(state.queues[0].packets, 2);
        assert_eq!(machine.queue_state(0, 0), QueueState::Running);
    }
    machine.poke(WORD, &[9]);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(FENCE), 0x1234);
    assert_eq!(machine.peek32(COUNTER), 2);
}

#[test]
fn queued_work_goes_on_in_another_device() {
    let mut machine = Machine::ready();
    let data = noise(4096);
    machine.poke(SOURCE, &data);
    let words = work_behind_a_poll();
    machine.submit(0, 0, &words);
    wait(|| machine.queue(0, 0, &queue::PACKETS) == 2);
    machine.migrate();
    assert_eq!(machine.queue_state(0, 0), QueueState::Running);
    assert_eq!(machine.queue(0, 0, &queue::PACKETS), 2);
    assert_eq!(machine.peek32(FENCE), 0);
    machine.poke(WORD, &[9]);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.queue(0, 0, &queue::PACKETS), 6);
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 4 * words.len() as u64);
    assert_eq!(machine.peek32(FENCE), 0x1234);
    assert_eq!(machine.peek32(COUNTER), 2);
    assert_eq!(machine.peek(SOURCE + 8192, 4096), data);
    // And the driver goes on with it.
    assert_eq!(machine.run(&trap(3)), QueueState::Idle);
    assert_eq!(machine.queue(0, 0, &queue::TRAP_CONTEXT), 3);
}

#[test]
fn what_was_restored_before_a_vmm_came_waits_for_it() {
    let mut machine = Machine::ready();
    machine.submit(0, 0, &work_behind_a_poll());
    wait(|| machine.queue(0, 0, &queue::PACKETS) == 2);
    let state = machine.gpus[0].pause().unwrap().finish();
    machine.poke(WORD, &[9]);
    machine.renew(0);
    machine.gpus[0].restore(&state).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.queue_state(0, 0), QueueState::Running);
    assert_eq!(machine.queue(0, 0, &queue::PACKETS), 2);
    assert_eq!(machine.partition(0, 0, &partition::COHERENCE), 0);
    machine.attach(0);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(FENCE), 0x1234);
    assert_eq!(machine.owner_state(0, 0), OwnerState::Claimed);
    assert_eq!(machine.release(0, 0, TOKEN), OwnerResult::Ok);
}

#[test]
fn owners_keep_their_partitions_and_leases() {
    let mut machine = Machine::ready();
    machine.write(0, &partition::BLOCK, 0, &partition::LEASE_MS, 50);
    assert_eq!(machine.command(0, 0, 4, TOKEN), OwnerResult::Ok);
    machine.clock.advance(20 * MS);
    machine.migrate();
    assert_eq!(machine.partition(0, 0, &partition::LEASE_LEFT_MS), 30);
    assert_eq!(machine.release(0, 0, TOKEN + 1), OwnerResult::NotOwner);
    machine.clock.advance(29 * MS);
    machine.gpus[0].tick();
    assert_eq!(machine.owner_state(0, 0), OwnerState::Claimed);
    machine.clock.advance(MS);
    machine.gpus[0].tick();
    machine.wait_free(0, 0);
    assert_eq!(machine.release(0, 1, TOKEN), OwnerResult::Ok);
}

#[test]
fn a_lease_does_not_end_in_a_pause() {
    let machine = Machine::ready();
    machine.write(0, &partition::BLOCK, 0, &partition::LEASE_MS, 1);
    assert_eq!(machine.command(0, 0, 4, TOKEN), OwnerResult::Ok);
    let pause = machine.gpus[0].pause().unwrap();
    machine.clock.advance(5 * MS);
    assert_eq!(machine.gpus[0].tick(), None);
    assert_eq!(machine.owner_state(0, 0), OwnerState::Claimed);
    drop(pause);
    wait(|| machine.owner_state(0, 0) != OwnerState::Claimed);
}

#[test]
fn what_was_being_scrubbed_is_scrubbed_again_and_free() {
    let mut machine = Machine::ready();
    machine.enable(1, 0, TOKEN);
    // A peer inside keeps the scrubber out.
    machine.vmms[1].dma.stall(SOURCE);
    let before = machine.vmms[1].dma.accesses().len();
    machine.submit(1, 0, &copy_linear(SOURCE, hbm(0, 0), 4096));
    wait(|| machine.vmms[1].dma.accesses().len() >= before + 2);
    machine.gpus[0].config_write(4, &[2, 0]);
    assert_eq!(machine.owner_state(0, 0), OwnerState::Releasing);
    let state = machine.gpus[0].pause().unwrap().finish();
    machine.renew(0);
    machine.attach(0);
    let store = Arc::clone(&machine.stores[0][0]);
    store.slice(0, 4).unwrap().write_slice(b"old!", 0).unwrap();
    let told = machine.gpus[0].status().causes;
    machine.gpus[0].restore(&text_and_back(&state)).unwrap();
    machine.wait_free(0, 0);
    assert_eq!(bytes(&store, 0, 4), [0; 4]);
    wait(|| machine.gpus[0].status().causes > told);
    let status = machine.read(0, &irq::BLOCK, 0, &irq::STATUS) as u32;
    assert!(IrqBits::from_bits_retain(status).contains(IrqBits::OWNERSHIP));
    machine.vmms[1].dma.resume();
}

#[test]
fn bad_memory_hung_engines_and_faults_stay() {
    let mut machine = Machine::eventful();
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    machine.inject_all(&[
        Injection::LostDoorbell { queue: 0, count: 0 },
        Injection::EngineHang { queue: 0 },
    ]);
    machine.submit(0, 0, &fence(FENCE, 1));
    let fault = machine.fault(0, 1);
    assert_eq!(fault.0, QueueFault::BadField);
    machine.migrate();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.peek32(FENCE), 0, "it is hung");
    assert_eq!(machine.queue_state(0, 0), QueueState::Running);
    assert_eq!(machine.queue_state(0, 1), QueueState::Fault);
    assert_eq!(machine.fault(0, 1), fault);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    assert_eq!(
        machine.run(&copy_linear(hbm(0, 1) + 0x5000, DATA, 8)),
        QueueState::Fault
    );
    assert_eq!(machine.fault(0, 0).0, QueueFault::Poisoned);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    assert_eq!(
        machine.run(&fence(hbm(0, 0) + 0x7008, 1)),
        QueueState::Fault
    );
    assert_eq!(machine.fault(0, 0).0, QueueFault::Retired);
}

#[test]
fn a_paced_wait_is_cut_and_made_up_for() {
    let mut machine = Machine::of(|config| {
        config.timing = TimingMode::Paced;
    });
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    // 1 MiB at 50 GB/s and 700 ns.
    let mut words = copy_linear(SOURCE, hbm(0, 0), 1 << 20).to_vec();
    words.extend(fence(FENCE, 1));
    machine.submit(0, 0, &words);
    wait(|| {
        bytes(&machine.stores[0][0], 0, 1).len() == 1 && {
            let state = machine.gpus[0].save().unwrap();
            state.queues[0].packets == 1
        }
    });
    let stamps = |machine: &Machine| {
        [
            &queue::STAMP_START_NS,
            &queue::STAMP_END_NS,
            &queue::BUSY_NS,
        ]
        .map(|reg| machine.queue(0, 0, reg))
    };
    let before = stamps(&machine);
    assert!(before[2] > 20_000, "{before:?}");
    machine.migrate();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(machine.peek32(FENCE), 0, "the copy's time is not over");
    machine.clock.advance(MS);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(stamps(&machine), before);
}

#[test]
fn no_packet_is_lost_or_done_twice_over_many_migrations() {
    let mut machine = Machine::ready();
    machine.set_queue(0, 1, &queue::PRIORITY, 2);
    machine.enable(0, 1, TOKEN);
    let counter = |queue: u32| COUNTER + 8 * u64::from(queue);
    let mut counts = [0; 2];
    for round in 0..30 {
        for queue in 0..2 {
            let mut words = Vec::new();
            for _ in 0..8 {
                words.extend(copy_linear(SOURCE, hbm(0, 0), 1 << 20));
                words.extend(atomic(counter(queue), AtomicOp::Add, false, 1, 0));
                counts[queue as usize] += 1;
            }
            words.extend(trap(round));
            machine.submit(0, queue, &words);
        }
        std::thread::sleep(Duration::from_micros(300 * u64::from(round % 7)));
        if round % 2 == 0 {
            machine.gpus[0].save().unwrap();
        }
        machine.migrate();
        if round % 3 == 0 {
            for queue in 0..2 {
                assert_eq!(machine.settle(0, queue), QueueState::Idle);
            }
        }
        // Room in the ring for the next round.
        wait(|| {
            (0..2).all(|q| {
                machine.queue(0, q, &queue::WPTR) - machine.queue(0, q, &queue::RPTR) < 2048
            })
        });
    }
    for queue in 0..2 {
        assert_eq!(machine.settle(0, queue), QueueState::Idle);
        assert_eq!(machine.peek32(counter(queue)), counts[queue as usize]);
        assert_eq!(machine.queue(0, queue, &queue::PACKETS), 30 * 17);
        let vector = pci::VECTOR_QUEUE0 + queue as u16;
        assert!(machine.vmms[0].irq.wait(vector, 30, LIMIT));
        assert_eq!(machine.vmms[0].irq.count(vector), 30);
    }
}

#[test]
fn a_packet_that_does_not_end_is_an_error_and_no_pause() {
    let machine = Machine::ready();
    let dma = &machine.vmms[0].dma;
    dma.stall(SOURCE);
    let before = dma.accesses().len();
    machine.submit(0, 0, &copy_linear(SOURCE, hbm(0, 0), 4096));
    wait(|| dma.accesses().len() >= before + 2);
    let busy = SaveError::Busy {
        queue: 0,
        waited_ms: 20,
    };
    let paused = machine.gpus[0].begin_pause(Duration::from_millis(20));
    assert_eq!(paused, Err(busy));
    dma.resume();
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.run(&fence(FENCE, 8)), QueueState::Idle);
}

#[test]
fn a_paused_device_answers_and_stops() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    machine.submit(0, 0, &work_behind_a_poll());
    wait(|| machine.queue(0, 0, &queue::PACKETS) == 2);
    let pause = machine.gpus[0].pause().unwrap();
    let again = machine.gpus[0].pause().unwrap();
    machine.submit(0, 1, &fence(FENCE + 8, 3));
    assert_eq!(machine.queue_state(0, 1), QueueState::Running);
    drop(again);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(machine.peek32(FENCE + 8), 0, "one pause is left");
    machine.reset_queue(0, 0);
    drop(pause);
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
    assert_eq!(machine.peek32(FENCE + 8), 3);
    let pause = machine.gpus[0].pause().unwrap();
    machine.gpus[0].detach();
    machine.attach(0);
    machine.gpus[0].reset(ResetKind::Function);
    drop(pause);
    machine.wait_free(0, 0);
}

#[test]
fn saves_accesses_resets_and_detaches_do_not_wait_for_each_other_for_ever() {
    let machine = Machine::ready();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (machine, stop) = (&machine, &stop);
        let going = || !stop.load(Ordering::SeqCst);
        for _ in 0..2 {
            scope.spawn(move || {
                while going() {
                    let state = machine.gpus[0].save().unwrap();
                    assert_eq!(state.version, VERSION);
                }
            });
        }
        scope.spawn(move || {
            let words = work_behind_a_poll();
            while going() {
                machine.gpus[0].config_write(4, &[6, 0]);
                machine.write(0, &regs::boot::BLOCK, 0, &regs::boot::CONTROL, 1);
                machine.clock.advance(MS);
                machine.claim(0, 0, TOKEN);
                machine.set_queue(0, 0, &queue::CONTROL, 2);
                machine.enable_at(0, 0, TOKEN, ring(0, 0));
                machine.submit(0, 0, &words);
                machine.dump(0);
            }
        });
        for round in 0..60 {
            match round % 3 {
                0 => machine.gpus[0].reset(ResetKind::Function),
                1 => machine.gpus[0].reset(ResetKind::Hot),
                _ => {
                    machine.gpus[0].detach();
                    machine.attach(0);
                }
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn states_of_other_gpus_and_devices_in_use_are_refused_with_numbers() {
    let mut machine = Machine::ready();
    let state = machine.gpus[0].save().unwrap();
    let refused = |machine: &Machine, state: &GpuState| {
        let before = machine.gpus[0].save().unwrap();
        let error = machine.gpus[0].restore(state).unwrap_err();
        assert_eq!(machine.gpus[0].save().unwrap(), before, "{error}");
        error.to_string()
    };
    assert_eq!(refused(&machine, &state), "partition 0 is in use");
    for partition in 0..2 {
        machine.release(0, partition, TOKEN);
        machine.wait_free(0, partition);
    }
    assert_eq!(refused(&machine, &state), "queue 0 is in use");
    machine.renew(0);
    machine.attach(0);
    let with = |change: &dyn Fn(&mut GpuState)| {
        let mut state = state.clone();
        change(&mut state);
        refused(&machine, &state)
    };
    assert_eq!(
        with(&|it| it.version = 9),
        "the state has version 9, this device reads 2"
    );
    assert_eq!(
        with(&|it| it.shape.queues = 3),
        "queues 0: the state has 0x3, this GPU 0x2"
    );
    assert_eq!(
        with(&|it| it.shape.ids[1] = 0x74a1),
        "id 1: the state has 0x74a1, this GPU 0x6770"
    );
    assert_eq!(
        with(&|it| it.shape.partitions[1][1] = 4096),
        "HBM_SIZE of partition 1: the state has 0x1000, this GPU 0x1000000"
    );
    assert_eq!(
        with(&|it| it.shape.bars[2] = 0),
        "size of BAR 2: the state has 0x0, this GPU 0x1000"
    );
    assert_eq!(
        with(&|it| it.shape.links.truncate(1)),
        "links 0: the state has 0x1, this GPU 0x2"
    );
    assert_eq!(
        with(&|it| it.queues[0].wptr = 4),
        "read pointer of queue 0 cannot be 0x0"
    );
    assert_eq!(
        with(&|it| it.modes[1][0].state = 1),
        "state, in a mode not in force, of partition 0 cannot be 0x1"
    );
    assert_eq!(
        with(&|it| it.config_space[0] ^= 1),
        "byte of configuration space 0 cannot be 0x35"
    );
    machine.gpus[0].restore(&state).unwrap();
    assert_eq!(
        machine.gpus[0].restore(&state),
        Err(RestoreError::InUse {
            what: "partition",
            index: 0
        })
    );
}

#[test]
fn fields_that_nobody_knows_are_refused() {
    let machine = Machine::new();
    let state = machine.gpus[0].save().unwrap();
    let mut value = serde_json::to_value(state).unwrap();
    value["queues"][0]["turbo"] = true.into();
    let error = serde_json::from_value::<GpuState>(value).unwrap_err();
    assert!(error.to_string().contains("turbo"), "{error}");
}

/// Every leaf and container of a value, as pointers into it.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.into());
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                places(value, &format!("{at}/{name}"), all);
            }
        }
        Value::Array(items) => {
            // The long ones are much the same everywhere.
            let step = (items.len() / 40).max(1);
            for (index, value) in items.iter().enumerate().step_by(step) {
                places(value, &format!("{at}/{index}"), all);
            }
        }
        _ => {}
    }
}

fn spoil(value: &mut Value, how: usize, number: u64) {
    let old = value.as_u64().unwrap_or(0);
    *value = match (how, &value) {
        (0, _) => Value::Null,
        (1, Value::Array(items)) => items.iter().skip(1).cloned().collect(),
        (2, Value::Array(items)) => items.iter().chain(items).cloned().collect(),
        (3, Value::Bool(was)) => (!was).into(),
        (4, _) => number.into(),
        (5, _) => u64::MAX.into(),
        (6, _) => u32::MAX.into(),
        (7, _) => (old ^ (1 << (number % 64))).into(),
        (8, _) => old.wrapping_add(1).into(),
        (9, _) => "Never".into(),
        (10, _) => old.wrapping_sub(4).into(),
        _ => (number % 8).into(),
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn spoilt_states_are_refused_or_harmless(
        picks in prop::collection::vec((any::<prop::sample::Index>(), 0usize..14, any::<u64>()), 1..4),
    ) {
        spoilt(&picks);
    }
}

/// Threads of devices that panicked.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn spoilt(picks: &[(prop::sample::Index, usize, u64)]) {
    static SOUND: std::sync::OnceLock<Value> = std::sync::OnceLock::new();
    let sound = SOUND.get_or_init(|| {
        std::panic::set_hook(Box::new(|info| {
            let thread = std::thread::current();
            if thread.name().is_some_and(|name| name.starts_with("gpu-")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            eprintln!("{info}");
        }));
        let machine = Machine::eventful();
        machine.inject_all(&[Injection::LostDoorbell { queue: 0, count: 0 }]);
        machine.submit(0, 0, &work_behind_a_poll());
        serde_json::to_value(machine.gpus[0].save().unwrap()).unwrap()
    });
    let mut value = sound.clone();
    for (pick, how, number) in picks {
        let mut all = Vec::new();
        places(&value, "", &mut all);
        let at: &String = pick.get(&all);
        let at = value.pointer_mut(at);
        at.into_iter().for_each(|at| spoil(at, *how, *number));
    }
    let Ok(state) = serde_json::from_value::<GpuState>(value) else {
        return;
    };
    let machine = Machine::new();
    let before = machine.gpus[0].save().unwrap();
    match machine.gpus[0].restore(&state) {
        Err(_) => assert_eq!(machine.gpus[0].save().unwrap(), before),
        Ok(()) => {
            machine.dump(0);
            machine.gpus[0].tick();
            for queue in 0..2 {
                machine.ring_doorbell(0, queue, machine.queue(0, queue, &queue::WPTR));
            }
            machine.poke(WORD, &[9]);
            let again = machine.gpus[0].save().unwrap();
            assert_eq!(again.shape, state.shape);
            machine.gpus[0].detach();
            machine.attach(0);
            machine.wait_free(0, 0);
            machine.write(0, &regs::boot::BLOCK, 0, &regs::boot::CONTROL, 1);
            machine.dump(0);
        }
    }
    drop(machine);
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
}
