//! Modelled and paced time, priorities, and links that count and lose lanes.

use numagpu_spec::regs::{LinkState, TimingMode, clock, link, queue};
use numagpu_spec::sdma::{
    PollFunction, const_fill, copy_linear, fence, poll_memory, timestamp_get, timestamp_get_global,
};
use proptest::prelude::*;

use super::*;
use crate::clock::Clock as _;

/// A booted, claimed machine whose GPUs count time in `mode`, with HBM of `mbs` and links of `link_mbs`.
fn timed(mode: TimingMode, mbs: u32, link_mbs: u32) -> Machine {
    let machine = Machine::of(|config| {
        config.timing = mode;
        config.hbm_bandwidth_mbs = mbs;
        config.hbm_latency_ns = 100;
        for link in &mut config.links {
            link.bandwidth_mbs = link_mbs;
        }
    });
    for gpu in 0..3 {
        machine.boot(gpu);
        for partition in 0..2 {
            assert_eq!(machine.claim(gpu, partition, TOKEN), OwnerResult::Ok);
        }
    }
    machine.enable(0, 0, TOKEN);
    machine
}

/// When the last packet that moved data began and ended.
fn stamps(machine: &Machine) -> (u64, u64) {
    let stamp = |reg| machine.queue(0, 0, reg);
    (stamp(&queue::STAMP_START_NS), stamp(&queue::STAMP_END_NS))
}

fn duration(machine: &Machine, from: u64, to: u64, bytes: u64) -> u64 {
    assert_eq!(
        machine.run(&copy_linear(from, to, bytes)),
        QueueState::Idle,
        "{:?}",
        machine.fault(0, 0)
    );
    let (start, end) = stamps(machine);
    end - start
}

fn peek64(machine: &Machine, address: u64) -> u64 {
    u64::from_le_bytes(machine.peek(address, 8).try_into().unwrap())
}

#[test]
fn each_way_takes_its_bandwidth_and_latency() {
    let machine = timed(TimingMode::Modelled, 1_000_000, 50_000);
    assert_eq!(
        machine.read(0, &clock::BLOCK, 0, &clock::MODE),
        u64::from(TimingMode::Modelled.code())
    );
    let (own, peer, far) = (hbm(0, 0), hbm(1, 0), hbm(2, 0));
    // 1 MB at a MB/s each us.
    assert_eq!(
        duration(&machine, own, own + (4 << 20), 1_000_000),
        1_000 + 200
    );
    assert_eq!(duration(&machine, DATA, own, 1_000_000), 20_000 + 700 + 100);
    assert_eq!(duration(&machine, own, peer, 1_000_000), 20_000 + 100 + 700);
    assert_eq!(duration(&machine, own, far, 1_000_000), 20_000 + 100 + 1400);
    assert_eq!(
        duration(&machine, DATA, far, 1_000_000),
        20_000 + 700 + 1400
    );
    machine.fabric.set_link_lanes(0xabc, 1, 2, 1).unwrap();
    assert_eq!(duration(&machine, own, far, 1_000_000), 40_000 + 100 + 1400);
    assert_eq!(
        machine.run(&const_fill(own, 1, 1_000_000)),
        QueueState::Idle
    );
    let (start, end) = stamps(&machine);
    assert_eq!(end - start, 1_000 + 100);
    assert_eq!(
        machine.queue(0, 0, &queue::BUSY_NS),
        1_200 + 20_800 * 2 + 21_500 + 22_100 + 41_500 + 1_100
    );
}

#[test]
fn packets_follow_one_another_in_modelled_time() {
    let machine = timed(TimingMode::Modelled, 1000, 0);
    let now = machine.clock.now_ns();
    let mut words = timestamp_get_global(DATA).to_vec();
    words.extend(copy_linear(hbm(0, 0), hbm(0, 1), 1_000_000));
    words.extend(timestamp_get(DATA + 8));
    words.extend(copy_linear(hbm(0, 0), hbm(0, 1), 2_000_000));
    words.extend(timestamp_get_global(DATA + 16));
    assert_eq!(machine.run(&words), QueueState::Idle);
    assert_eq!(peek64(&machine, DATA), now);
    assert_eq!(peek64(&machine, DATA + 8), now + 1_000_200);
    assert_eq!(peek64(&machine, DATA + 16), now + 3_000_400);
    assert_eq!(stamps(&machine), (now + 1_000_200, now + 3_000_400));
    // The device's clock is behind: the next packet waits for the one before. Then it is ahead.
    assert_eq!(duration(&machine, hbm(0, 0), hbm(0, 1), 1000), 1_200);
    assert_eq!(stamps(&machine).0, now + 3_000_400);
    machine.clock.advance(10_000_000);
    duration(&machine, hbm(0, 0), hbm(0, 1), 1000);
    assert_eq!(stamps(&machine).0, now + 10_000_000);
}

#[test]
fn without_a_model_stamps_are_the_clock() {
    let machine = timed(TimingMode::Off, 1, 1);
    machine.clock.advance(777);
    let now = machine.clock.now_ns();
    assert_eq!(duration(&machine, hbm(0, 0), hbm(0, 1), 1_000_000), 0);
    assert_eq!(stamps(&machine), (now, now));
}

#[test]
fn paced_work_ends_when_its_time_is_over_and_can_be_stopped() {
    let machine = timed(TimingMode::Paced, 1000, 0);
    let mut words = copy_linear(hbm(0, 0), hbm(0, 1), 1_000_000).to_vec();
    words.extend(fence(DATA, 1));
    machine.submit(0, 0, &words);
    // The worker has seen the doorbell when it reads the ring.
    let dma = &machine.vmms[0].dma;
    wait(|| dma.accesses().iter().any(|a| a.address == RING));
    machine.clock.advance(1_000_000);
    std::thread::sleep(Duration::from_millis(30));
    // 200 ns are left.
    assert_eq!(machine.peek32(DATA), 0);
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 0);
    machine.clock.advance(200);
    assert_eq!(machine.settle(0, 0), QueueState::Idle);
    assert_eq!(machine.peek32(DATA), 1);
    machine.submit(0, 0, &copy_linear(hbm(0, 0), hbm(0, 1), 4_000_000));
    std::thread::sleep(Duration::from_millis(1));
    let since = Instant::now();
    machine.reset_queue(0, 0);
    assert!(since.elapsed() < Duration::from_secs(2));
    assert_eq!(stamps(&machine), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Large copies take as long as the slower of their ends says.
    #[test]
    fn durations_are_as_bandwidths(hbm_mbs in 1_000u32..2_000_000, link_mbs in 1_000u32..900_000) {
        let machine = timed(TimingMode::Modelled, hbm_mbs, link_mbs);
        let bytes = 4 << 20;
        let own = duration(&machine, hbm(0, 0), hbm(0, 1), bytes) - 200;
        let peer = duration(&machine, hbm(0, 0), hbm(1, 0), bytes) - 800;
        let slower = hbm_mbs.min(link_mbs);
        let (have, want) = (own as f64 / peer as f64, f64::from(slower) / f64::from(hbm_mbs));
        prop_assert!((have / want - 1.0).abs() < 0.02, "{have} for {want}");
    }
}

#[test]
fn links_count_what_goes_through_them() {
    let machine = Machine::ready();
    let count = |gpu, index, reg: &Reg| machine.read(gpu, &link::BLOCK, index, reg);
    let both = |gpu, index| {
        (
            count(gpu, index, &link::BYTES_OUT),
            count(gpu, index, &link::BYTES_IN),
        )
    };
    assert_eq!(
        machine.run(&copy_linear(hbm(0, 0), hbm(2, 0), 300_000)),
        QueueState::Idle
    );
    assert_eq!(
        machine.run(&copy_linear(hbm(1, 0), hbm(0, 0), 5_000)),
        QueueState::Idle
    );
    // 0 - 1, seen from both ends; 1 - 2 likewise.
    assert_eq!(both(0, 0), (300_000, 5_000));
    assert_eq!(both(1, 0), (5_000, 300_000));
    assert_eq!(both(1, 1), (300_000, 0));
    assert_eq!(both(2, 0), (0, 300_000));
    let before = both(0, 1);
    assert_eq!(
        machine.run(&copy_linear(DATA, hbm(0, 0), 70_000)),
        QueueState::Idle
    );
    let after = both(0, 1);
    // The packet is read too, and the read pointer is written back.
    assert_eq!((after.0 - before.0) % 8, 0);
    assert_eq!(after.1 - before.1, 70_000 + 28);
    machine.gpus[0].reset(crate::bus::ResetKind::Function);
    assert_eq!((both(0, 0), both(0, 1)), ((0, 0), (0, 0)));
}

#[test]
fn a_link_that_loses_lanes_is_degraded() {
    let machine = Machine::ready();
    let show = |gpu, index| {
        let read = |reg| machine.read(gpu, &link::BLOCK, index, reg);
        let regs = [
            &link::STATE,
            &link::WIDTH_NOW,
            &link::BANDWIDTH_NOW_MBS,
            &link::ERRORS,
        ];
        regs.map(read)
    };
    let state = |state: LinkState| u64::from(state.code());
    assert_eq!(show(0, 0), [state(LinkState::Up), 2, 50_000, 0]);
    machine.fabric.set_link_lanes(0xabc, 0, 1, 1).unwrap();
    for (gpu, index) in [(0, 0), (1, 0)] {
        assert_eq!(show(gpu, index), [state(LinkState::Degraded), 1, 25_000, 1]);
    }
    let copy = copy_linear(hbm(0, 0), hbm(1, 0), 4096);
    assert_eq!(machine.run(&copy), QueueState::Idle);
    machine.fabric.set_link_lanes(0xabc, 1, 0, 0).unwrap();
    assert_eq!(show(0, 0), [state(LinkState::Down), 0, 0, 2]);
    assert_eq!(machine.run(&copy), QueueState::Fault);
    assert_eq!(machine.fault(0, 0).0, QueueFault::LinkDown);
    machine.fabric.set_link(0xabc, 0, 1, true).unwrap();
    assert_eq!(show(0, 0), [state(LinkState::Up), 2, 50_000, 2]);
    machine.reset_queue(0, 0);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&copy), QueueState::Idle);
    let error = machine.fabric.set_link_lanes(0xabc, 0, 1, 3).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a link between GPUs 0 and 1 of hive 0xabc has 2 lanes, not 3"
    );
    assert_eq!(show(0, 0), [state(LinkState::Up), 2, 50_000, 2]);
}

#[test]
fn a_link_that_goes_down_is_felt_in_the_middle_of_a_queues_work() {
    let machine = Machine::ready();
    let dma = &machine.vmms[0].dma;
    dma.stall(DATA);
    let mut words = copy_linear(hbm(0, 0), hbm(1, 0), 4096).to_vec();
    words.extend(fence(DATA, 1));
    words.extend(copy_linear(hbm(0, 0), hbm(1, 0), 4096));
    machine.submit(0, 0, &words);
    wait(|| dma.accesses().iter().any(|a| a.address == DATA));
    machine.fabric.set_link(0xabc, 0, 1, false).unwrap();
    dma.resume();
    assert_eq!(machine.settle(0, 0), QueueState::Fault);
    assert_eq!(machine.fault(0, 0), (QueueFault::LinkDown, hbm(1, 0), 2));
}

/// Queue 1 of GPU 0 with priority 3, stalled in a copy from DATA: it has work.
fn outranked() -> Machine {
    let machine = Machine::ready();
    machine.set_queue(0, 1, &queue::PRIORITY, 3);
    machine.enable(0, 1, TOKEN);
    machine.vmms[0].dma.stall(DATA);
    machine.submit(0, 1, &copy_linear(DATA, hbm(0, 1), 4096));
    let dma = &machine.vmms[0].dma;
    wait(|| dma.accesses().iter().any(|a| a.address == DATA));
    machine
}

#[test]
fn a_queue_of_lower_priority_waits_but_does_not_starve() {
    let machine = outranked();
    let fences: Vec<u32> = (1..=20).flat_map(|n| fence(DATA + 64, n)).collect();
    let since = Instant::now();
    assert_eq!(machine.run(&fences), QueueState::Idle);
    // A packet a millisecond.
    assert!(since.elapsed() >= Duration::from_millis(19));
    assert_eq!(machine.peek32(DATA + 64), 20);
    assert_eq!(machine.queue_state(0, 1), QueueState::Running);
    // One as high does not wait.
    machine.reset_queue(0, 0);
    machine.set_queue(0, 0, &queue::PRIORITY, 3);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&fences), QueueState::Idle);
    machine.vmms[0].dma.resume();
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
}

#[test]
fn a_queue_that_waits_its_turn_stops_at_once() {
    let machine = outranked();
    let nops = vec![0; 1000];
    machine.submit(0, 0, &nops);
    wait(|| machine.queue(0, 0, &queue::PACKETS) > 0);
    machine.set_queue(0, 0, &queue::CONTROL, 0);
    assert_eq!(machine.queue_state(0, 0), QueueState::Disabled);
    let done = machine.queue(0, 0, &queue::PACKETS);
    assert!(done < 1000);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(machine.queue(0, 0, &queue::PACKETS), done);
    machine.vmms[0].dma.resume();
}

#[test]
fn a_queue_that_polls_holds_up_nobody() {
    let machine = Machine::ready();
    machine.set_queue(0, 1, &queue::PRIORITY, 3);
    machine.enable(0, 1, TOKEN);
    let poll = poll_memory(DATA, PollFunction::Equal, 500, u32::MAX, 0xfff, u16::MAX);
    machine.submit(0, 1, &poll);
    wait(|| machine.queue_state(0, 1) == QueueState::Running);
    std::thread::sleep(Duration::from_millis(2));
    let fences: Vec<u32> = (1..=200).flat_map(|n| fence(DATA + 64, n)).collect();
    let since = Instant::now();
    assert_eq!(machine.run(&fences), QueueState::Idle);
    assert!(
        since.elapsed() < Duration::from_millis(150),
        "200 ms if it did"
    );
    machine.submit(0, 0, &fence(DATA, 500));
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
}
