//! Resets, detaches and releases in the middle of work.

use numagpu_spec::regs::{boot, clock, identity, link, queue, topology};
use numagpu_spec::sdma::{const_fill, copy_linear};

use super::*;
use crate::bus::ResetKind;
use crate::config::GpuError;
use crate::fabric::FabricError;

/// Copies that take far longer than any test waits for a stop.
fn long_work() -> Vec<u32> {
    let copy = copy_linear(DATA, DATA + (16 << 20), 4 << 20);
    (0..140).flat_map(|_| copy).collect()
}

#[test]
fn the_register_map_describes_the_machine() {
    let machine = Machine::new();
    let one = |block, reg| machine.read(1, block, 0, reg);
    let id = &identity::BLOCK;
    assert_eq!(one(id, &identity::MAGIC), u64::from(regs::MAGIC));
    assert_eq!(one(id, &identity::CAPS), 0b10_1011);
    assert_eq!(one(id, &identity::PACKETS), 0x2d67);
    assert_eq!(one(id, &identity::GPU_INDEX), 1);
    assert_eq!(one(id, &identity::PARTITION_COUNT), 2);
    assert_eq!(one(id, &identity::QUEUE_COUNT), 2);
    assert_eq!(one(id, &identity::VECTOR_COUNT), 9);
    assert_eq!(one(id, &identity::DOORBELL_STRIDE), 8);
    assert_eq!(one(&topology::BLOCK, &topology::HIVE_ID), 0xabc);
    assert_eq!(one(&topology::BLOCK, &topology::LINK_COUNT), 3);
    assert_eq!(one(&boot::BLOCK, &boot::DELAY_US), 1000);
    let peers = [0, 2, 0xffff_ffff, 0];
    for (index, peer) in (0..).zip(peers) {
        assert_eq!(machine.read(1, &link::BLOCK, index, &link::PEER), peer);
    }
    assert_eq!(machine.read(1, &link::BLOCK, 3, &link::STATE), 0, "absent");
    let base = regs::partition::HBM_BASE;
    assert_eq!(machine.partition(1, 1, &base), hbm(1, 1));
    assert_eq!(machine.partition(1, 2, &base), 0);
    machine.clock.advance(5);
    assert_eq!(one(&clock::BLOCK, &clock::NS), 5);
}

#[test]
fn a_queue_is_not_enabled_before_the_boot() {
    let machine = Machine::new();
    machine.enable_at(0, 0, TOKEN, ring(0, 0));
    assert_eq!(machine.queue_state(0, 0), QueueState::Disabled);
    assert_eq!(machine.queue(0, 0, &queue::CONTROL), 0);
}

#[test]
fn a_queue_reset_stops_a_long_copy() {
    let machine = Machine::ready();
    machine.submit(0, 0, &long_work());
    wait(|| machine.queue(0, 0, &queue::PACKETS) > 0);
    let start = Instant::now();
    machine.reset_queue(0, 0);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 0);
    let before = machine.vmms[0].dma.accesses().len();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.vmms[0].dma.accesses().len(), before);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&[0]), QueueState::Idle);
}

#[test]
fn a_stop_returns_when_the_worker_has_left_and_not_before() {
    let machine = Machine::ready();
    let dma = &machine.vmms[0].dma;
    for stop in 0..3 {
        dma.stall(DATA + 4096);
        let before = dma.accesses().len();
        machine.submit(0, 0, &copy_linear(DATA, hbm(0, 0), 8192));
        // The ring, then the data.
        wait(|| dma.accesses().len() >= before + 2);
        std::thread::scope(|scope| {
            let gpu = &machine.gpus[0];
            let stopping = scope.spawn(move || match stop {
                0 => gpu.bar_write(0, 0x800c, &[2, 0, 0, 0]),
                1 => gpu.reset(ResetKind::Function),
                _ => gpu.detach(),
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!stopping.is_finished());
            // Meanwhile registers answer.
            assert_eq!(
                machine.read(0, &identity::BLOCK, 0, &identity::MAGIC),
                u64::from(regs::MAGIC)
            );
            dma.resume();
        });
        let after = dma.accesses().len();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(dma.accesses().len(), after);
        assert_eq!(machine.queue_state(0, 0), QueueState::Disabled);
        if stop > 0 {
            machine.gpus[0].attach(machine.vmms[0].attachment());
            machine.wait_free(0, 0);
            machine.boot(0);
            assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
        }
        machine.enable(0, 0, TOKEN);
    }
}

#[test]
fn disabling_keeps_the_counters() {
    let machine = Machine::ready();
    machine.submit(0, 0, &long_work());
    wait(|| machine.queue(0, 0, &queue::PACKETS) > 0);
    machine.set_queue(0, 0, &queue::CONTROL, 0);
    assert_eq!(machine.queue_state(0, 0), QueueState::Disabled);
    let packets = machine.queue(0, 0, &queue::PACKETS);
    assert!(packets > 0);
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 28 * packets);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.queue(0, 0, &queue::RPTR), 0);
}

#[test]
fn a_function_reset_stops_every_queue() {
    let machine = Machine::ready();
    machine.enable(0, 1, TOKEN);
    machine.submit(0, 0, &long_work());
    machine.submit(0, 1, &long_work());
    machine.gpus[0].reset(ResetKind::Function);
    let before = machine.vmms[0].dma.accesses().len();
    for queue in 0..2 {
        assert_eq!(machine.queue_state(0, queue), QueueState::Disabled);
        assert_eq!(machine.queue(0, queue, &queue::RING_BASE), 0);
    }
    assert_eq!(machine.read(0, &boot::BLOCK, 0, &boot::STATUS), 0);
    let mut command = [0xee; 2];
    machine.gpus[0].config_read(4, &mut command);
    assert_eq!(command, [0, 0]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.vmms[0].dma.accesses().len(), before);
    // And it comes up again.
    machine.wait_free(0, 0);
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, 1), OwnerResult::Ok);
    machine.enable(0, 0, 1);
    assert_eq!(machine.run(&const_fill(hbm(0, 0), 1, 64)), QueueState::Idle);
}

#[test]
fn a_detach_while_running_touches_memory_no_more() {
    let machine = Machine::ready();
    machine.submit(0, 0, &long_work());
    wait(|| machine.queue(0, 0, &queue::PACKETS) > 0);
    machine.gpus[0].detach();
    assert_eq!(Arc::strong_count(&machine.vmms[0].irq), 1);
    let dma = &machine.vmms[0].dma;
    // Three test VMMs and two attached GPUs hold the port, the detached GPU does not.
    assert_eq!(Arc::strong_count(dma), 5);
    let before = dma.accesses().len();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(dma.accesses().len(), before);
    assert!(!machine.gpus[0].status().attached);
    assert_eq!(
        machine.partition(0, 0, &regs::partition::COHERENCE),
        0,
        "not mapped"
    );
    // The next VMM finds a fresh device.
    machine.gpus[0].attach(machine.vmms[0].attachment());
    machine.boot(0);
    machine.wait_free(0, 0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    assert_eq!(machine.run(&const_fill(hbm(0, 0), 1, 64)), QueueState::Idle);
}

#[test]
fn a_release_under_a_running_copy_leaves_zeros() {
    let machine = Machine::ready();
    machine.poke(DATA, &vec![0xaa; 4 << 20]);
    for _ in 0..20 {
        let words: Vec<u32> = (0..100)
            .flat_map(|_| copy_linear(DATA, hbm(0, 0), 4 << 20))
            .collect();
        machine.submit(0, 0, &words);
        wait(|| machine.queue(0, 0, &queue::PACKETS) > 0);
        assert_eq!(machine.release(0, 0, TOKEN), OwnerResult::Ok);
        machine.wait_free(0, 0);
        let all = bytes(&machine.stores[0][0], 0, 4 << 20);
        assert!(all.iter().all(|byte| *byte == 0));
        assert_eq!(machine.settle(0, 0), QueueState::Fault);
        assert_eq!(machine.fault(0, 0).0, QueueFault::NotOwned);
        machine.reset_queue(0, 0);
        assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
        machine.enable(0, 0, TOKEN);
    }
}

#[test]
fn a_dropped_gpu_leaves_the_fabric() {
    let mut machine = Machine::ready();
    machine.submit(0, 0, &long_work());
    let gpu = machine.gpus.remove(1);
    let config = gpu.config().clone();
    let again = Gpu::new(config.clone(), Arc::clone(&machine.fabric));
    let duplicate = FabricError::DuplicateNode {
        hive: 0xabc,
        node: 1,
    };
    assert_eq!(again.err(), Some(GpuError::Fabric(duplicate)));
    drop(gpu);
    assert!(Gpu::new(config, Arc::clone(&machine.fabric)).is_ok());
}

#[test]
fn bad_configurations_are_refused() {
    let store: Arc<dyn HbmStore> = Arc::new(AnonymousStore::new(8192).unwrap());
    let partition = |base, size| PartitionConfig {
        base,
        size,
        pxm: None,
        store: Arc::clone(&store),
    };
    let good = GpuConfig::new(0, vec![partition(HBM, 8192)]);
    let refused = |config: GpuConfig| Gpu::new(config, Fabric::new()).err().unwrap();
    let with = |partitions| GpuConfig::new(0, partitions);
    let nine = (0..9).map(|index| partition(HBM + index * 8192, 8192));
    assert!(matches!(
        refused(with(nine.collect())),
        GpuError::Count { .. }
    ));
    for (base, size) in [(HBM + 1, 8192), (HBM, 0), (HBM, 100), (!0xfff, 8192)] {
        let error = refused(with(vec![partition(base, size)]));
        assert!(matches!(error, GpuError::Range { .. }), "{error}");
    }
    let error = refused(with(vec![partition(HBM, 4096)]));
    assert!(matches!(error, GpuError::StoreSize { .. }));
    let error = refused(with(vec![
        partition(HBM, 8192),
        partition(HBM + 4096, 8192),
    ]));
    assert_eq!(error, GpuError::Overlap { index: 1, other: 0 });
    for queues in [0, 9] {
        let error = refused(GpuConfig {
            queues,
            ..good.clone()
        });
        assert!(matches!(error, GpuError::Count { .. }));
    }
    let error = refused(GpuConfig {
        node_id: 1,
        ..good.clone()
    });
    assert_eq!(error, GpuError::Node { node: 1, size: 1 });
    assert!(Gpu::new(good, Fabric::new()).is_ok());
}
