//! What a VMM's port hears of the HBM that the device wrote.

use std::sync::{Condvar, Mutex};

use numagpu_spec::sdma::{
    AtomicOp, PollFunction, Surface, atomic, const_fill, copy_linear, copy_sub_window, fence,
    poll_memory, timestamp_get, timestamp_get_global, timestamp_set, trap,
};
use vm_memory::{VolatileMemoryError, VolatileSlice};

use super::*;
use crate::aperture::ApertureConfig;
use crate::bus::{BackingId, Migrate as _, MigrateError, ResetKind};
use crate::engine::CHUNK;
use crate::inject::Injection;
use crate::test_support::Written;

/// Where HBM is written: GPU, partition, offset, bytes.
type At = (usize, usize, u64, u64);

fn place(machine: &Machine, (gpu, partition, offset, len): At) -> Written {
    let (file, start) = machine.stores[gpu][partition].backing();
    Written {
        inode: file.inode,
        offset: start + offset,
        len,
    }
}

/// In order of their places, neighbours as one.
fn joined(mut all: Vec<Written>) -> Vec<Written> {
    all.sort_unstable();
    let mut joined: Vec<Written> = Vec::new();
    for next in all {
        match joined.last_mut() {
            Some(last) if (last.inode, last.offset + last.len) == (next.inode, next.offset) => {
                last.len += next.len;
            }
            _ => joined.push(next),
        }
    }
    joined
}

/// What the port of a GPU hears while its queue 0 works off packets.
fn heard(machine: &Machine, gpu: usize, words: &[u32]) -> Vec<Written> {
    machine.vmms[gpu].dma.take_written();
    machine.submit(gpu, 0, words);
    let state = machine.settle(gpu, 0);
    assert_eq!(state, QueueState::Idle, "{:?}", machine.fault(gpu, 0));
    joined(machine.vmms[gpu].dma.take_written())
}

#[track_caller]
fn check(machine: &Machine, words: &[u32], places: &[At]) {
    let want = places.iter().map(|at| place(machine, *at)).collect();
    assert_eq!(heard(machine, 0, words), joined(want), "{words:x?}");
}

#[test]
fn every_packet_that_writes_hbm_tells_where() {
    let machine = Machine::ready();
    let at = hbm(0, 0);
    let far = |offset| hbm(2, 1) + offset;
    let long = 3 * CHUNK + 17;
    check(
        &machine,
        &write_linear(at + 4, &[1, 2, 3]),
        &[(0, 0, 4, 12)],
    );
    check(
        &machine,
        &const_fill(at + 0x1ffc, 7, 0x300),
        &[(0, 0, 0x1ffc, 0x300)],
    );
    check(
        &machine,
        &const_fill(at, 7, 4 * CHUNK + 4),
        &[(0, 0, 0, 4 * CHUNK + 4)],
    );
    check(&machine, &copy_linear(DATA, at + 5, 777), &[(0, 0, 5, 777)]);
    check(
        &machine,
        &copy_linear(at, hbm(0, 1) + 3, long),
        &[(0, 1, 3, long)],
    );
    // From its end, across the border of the partitions, to a neighbour and a peer behind it.
    check(
        &machine,
        &copy_linear(at, at + 100, long),
        &[(0, 0, 100, long)],
    );
    check(
        &machine,
        &copy_linear(DATA, hbm(0, 1) - 8, 20),
        &[(0, 0, HBM_SIZE - 8, 8), (0, 1, 0, 12)],
    );
    check(
        &machine,
        &copy_linear(DATA, hbm(1, 0) + 9, 99),
        &[(1, 0, 9, 99)],
    );
    check(&machine, &copy_linear(at, far(1), 64), &[(2, 1, 1, 64)]);
    let surface = |address| Surface {
        address,
        origin: [2, 1, 0],
        pitch: 16,
        slice_pitch: 64,
    };
    let rows = [16 + 2, 32 + 2, 64 + 16 + 2, 64 + 32 + 2];
    check(
        &machine,
        &copy_sub_window(2, surface(DATA), surface(at), [5, 2, 2]),
        &rows.map(|element| (0, 0, 4 * element, 20)),
    );
    check(&machine, &fence(at + 0x20, 1), &[(0, 0, 0x20, 4)]);
    check(&machine, &fence(far(8), 1), &[(2, 1, 8, 4)]);
    check(&machine, &timestamp_get(at + 0x28), &[(0, 0, 0x28, 8)]);
    check(
        &machine,
        &timestamp_get_global(at + 0x30),
        &[(0, 0, 0x30, 8)],
    );
    for (wide, bytes) in [(false, 4), (true, 8)] {
        let add = atomic(at + 0x38, AtomicOp::Add, wide, 1, 0);
        check(&machine, &add, &[(0, 0, 0x38, bytes)]);
        // As a bus sees it, whether the comparison holds or not.
        let swap = atomic(far(0x38), AtomicOp::CompareSwap, wide, 1, 99);
        check(&machine, &swap, &[(2, 1, 0x38, bytes)]);
    }
}

#[test]
fn what_only_reads_hbm_or_writes_ram_tells_nothing() {
    let machine = Machine::ready();
    for words in [
        &copy_linear(hbm(0, 0), DATA, 3 * CHUNK)[..],
        &copy_linear(hbm(2, 1), DATA, 1),
        &copy_linear(DATA, DATA + 64, 64),
        &const_fill(DATA, 1, 64),
        &fence(DATA, 1),
        &poll_memory(hbm(1, 1), PollFunction::Always, 0, 0, 0, 0),
        &timestamp_set(5),
        &trap(3),
    ] {
        check(&machine, words, &[]);
    }
}

#[test]
fn a_ring_in_hbm_is_read_and_only_its_write_back_is_written() {
    use regs::queue::{CONTROL, RING_BASE, RPTR_WRITEBACK, WPTR_POLL};
    let machine = Machine::ready();
    let store = &machine.stores[0][0];
    let packet = fence(DATA, 5);
    let bytes: Vec<u8> = packet.iter().flat_map(|word| word.to_le_bytes()).collect();
    let slice = store.slice(0, 4096).unwrap();
    slice.write_slice(&bytes, 0).unwrap();
    slice
        .write_slice(&(bytes.len() as u64).to_le_bytes(), 0x900)
        .unwrap();
    machine.set_queue(0, 1, &RPTR_WRITEBACK, hbm(0, 0) + 0x800);
    machine.set_queue(0, 1, &WPTR_POLL, hbm(0, 0) + 0x900);
    machine.set_queue(0, 1, &RING_BASE, hbm(0, 0));
    machine.set_queue(0, 1, &regs::queue::RING_SIZE, 1024);
    machine.set_queue(0, 1, &regs::queue::TOKEN, TOKEN);
    machine.set_queue(0, 1, &CONTROL, 1);
    machine.vmms[0].dma.take_written();
    let kick = u64::from(pci::KICK_OFFSET) + pci::DOORBELL_STRIDE;
    machine.gpus[0].bar_write(pci::BAR_DOORBELLS, kick, &[1]);
    wait(|| machine.peek32(DATA) == 5);
    assert_eq!(machine.settle(0, 1), QueueState::Idle);
    let heard = machine.vmms[0].dma.take_written();
    let want = place(&machine, (0, 0, 0x800, 8));
    assert!(!heard.is_empty() && heard.iter().all(|it| *it == want));
}

#[test]
fn the_port_of_the_gpu_that_writes_hears_of_it() {
    let mut machine = Machine::new();
    // GPU 1 gets a VMM of its own, which maps the same.
    let vmm = TestVmm::default();
    vmm.dma.map(RAM, Arc::clone(&machine.ram) as _);
    for gpu in 0..3 {
        for partition in 0..2 {
            let store = Arc::clone(&machine.stores[gpu][partition]);
            vmm.dma.map(hbm(gpu as u64, partition as u64), store as _);
        }
    }
    machine.gpus[1].detach();
    machine.gpus[1].attach(vmm.attachment());
    machine.vmms[1] = vmm;
    for gpu in 0..2 {
        machine.boot(gpu);
        machine.wait_free(gpu, 0);
        assert_eq!(machine.claim(gpu, 0, TOKEN), OwnerResult::Ok);
        machine.enable(gpu, 0, TOKEN);
    }
    for writer in [0, 1] {
        let other = &machine.vmms[1 - writer].dma;
        other.take_written();
        for target in [0, 1] {
            let words = const_fill(hbm(target, 0) + 0x40, 1, 0x80);
            let want = place(&machine, (target as usize, 0, 0x40, 0x80));
            assert_eq!(heard(&machine, writer, &words), [want]);
        }
        assert!(other.take_written().is_empty());
    }
}

#[test]
fn a_scrub_tells_of_all_that_it_cleared() {
    let machine = Machine::ready();
    let dma = &machine.vmms[0].dma;
    dma.take_written();
    assert_eq!(machine.release(0, 1, TOKEN), OwnerResult::Ok);
    machine.wait_free(0, 1);
    let want = place(&machine, (0, 1, 0, HBM_SIZE));
    assert_eq!(dma.take_written(), [want]);
    // One that does nothing.
    let failure = Injection::ScrubFailure { partition: 0 };
    machine.gpus[0].inject(failure).unwrap();
    assert_eq!(machine.release(0, 0, TOKEN), OwnerResult::Ok);
    wait(|| machine.owner_state(0, 0) == OwnerState::Faulted);
    assert!(dma.take_written().is_empty());
    machine.gpus[0].reset(ResetKind::Function);
    machine.wait_free(0, 0);
    let first = place(&machine, (0, 0, 0, HBM_SIZE));
    assert!(dma.take_written().contains(&first));
    // Nobody is there to hear what a disconnect clears.
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.gpus[0].detach();
    wait(|| machine.gpus[0].status().partitions[0].state == OwnerState::Free);
    assert!(dma.take_written().is_empty());
}

#[test]
fn a_part_of_a_divided_memory_is_told_by_its_place_in_the_file() {
    use regs::topology::{BLOCK, PARTITION_REQUEST};
    let machine = Machine::new();
    machine.write(0, &BLOCK, 0, &PARTITION_REQUEST, 4);
    machine.gpus[0].reset(ResetKind::Function);
    (0..4).for_each(|index| machine.wait_free(0, index));
    machine.boot(0);
    assert_eq!(machine.claim(0, 3, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    let half = HBM_SIZE / 2;
    let words = const_fill(hbm(0, 1) + half + 8, 1, 16);
    check(&machine, &words, &[(0, 1, half + 8, 16)]);
}

#[test]
fn stores_of_cpus_through_the_aperture_are_not_told() {
    let machine = Machine::of(|config| {
        config.aperture = Some(ApertureConfig {
            size: 64 << 20,
            coherent: true,
        });
        for partition in &mut config.partitions {
            partition.pxm = None;
        }
    });
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.enable(0, 0, TOKEN);
    machine.vmms[0].dma.take_written();
    machine.gpus[0].bar_write(pci::BAR_APERTURE, 0x100, &[1; 8]);
    let mut seen = [0; 8];
    machine.gpus[0].bar_read(pci::BAR_APERTURE, 0x100, &mut seen);
    assert_eq!(seen, [1; 8]);
    assert!(machine.vmms[0].dma.take_written().is_empty());
    check(&machine, &fence(hbm(0, 0), 1), &[(0, 0, 0, 4)]);
}

/// A memory whose scrubs wait.
struct Slow {
    memory: Arc<dyn HbmStore>,
    open: Mutex<bool>,
    opened: Condvar,
}

impl HbmStore for Slow {
    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        self.memory.slice(offset, len)
    }

    fn backing(&self) -> (BackingId, u64) {
        self.memory.backing()
    }

    fn scrub(&self, offset: u64, len: u64) -> std::io::Result<()> {
        let open = self.open.lock().unwrap();
        let _open = self.opened.wait_while(open, |open| !*open).unwrap();
        self.memory.scrub(offset, len)
    }
}

/// A state that says that HBM is free must not be taken before the log has its zeros.
#[test]
fn a_stop_for_a_migration_waits_for_scrubs_and_gives_up_in_time() {
    let store = Arc::new(Slow {
        memory: Arc::new(AnonymousStore::new(4096).unwrap()),
        open: Mutex::new(false),
        opened: Condvar::new(),
    });
    let partition = PartitionConfig {
        base: HBM,
        size: 4096,
        pxm: Some(4),
        store: Arc::clone(&store) as _,
    };
    let config = GpuConfig {
        boot_delay: Duration::ZERO,
        ..GpuConfig::new(0, vec![partition])
    };
    let gpu = Gpu::new(config, Fabric::new()).unwrap();
    let vmm = TestVmm::default();
    vmm.dma.map(HBM, Arc::clone(&store) as _);
    gpu.attach(vmm.attachment());
    let set = |block: &Block, reg: &Reg, value: u64| {
        let offset = address(block, 0, reg).unwrap();
        let width = if reg.width == Width::W8 { 8 } else { 4 };
        gpu.bar_write(0, offset.into(), &value.to_le_bytes()[..width]);
    };
    set(&regs::boot::BLOCK, &regs::boot::CONTROL, 1);
    for command in [1, 2] {
        set(&regs::partition::BLOCK, &regs::partition::TOKEN, TOKEN);
        set(&regs::partition::BLOCK, &regs::partition::COMMAND, command);
    }
    let state = || gpu.status().partitions[0].state;
    assert_eq!(state(), OwnerState::Releasing);
    assert!(matches!(gpu.stop(), Err(MigrateError::Busy(_))));
    std::thread::scope(|scope| {
        let stopped = scope.spawn(|| gpu.stop());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!stopped.is_finished());
        *store.open.lock().unwrap() = true;
        store.opened.notify_all();
        assert_eq!(stopped.join().unwrap(), Ok(()));
    });
    assert_eq!(state(), OwnerState::Free);
    assert_eq!(vmm.dma.take_written().len(), 1);
    gpu.run();
    *store.open.lock().unwrap() = true;
}
