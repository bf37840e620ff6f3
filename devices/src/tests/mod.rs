//! Tests of the whole function, through the seam that a transport uses.

#![allow(
    clippy::cast_possible_truncation,
    reason = "offsets and lengths of tests are small"
)]

mod aperture;
mod copies;
mod doorbells;
mod faults;
mod fuzz;
mod inject;
mod kicks;
mod lifecycle;
mod model;
mod ownership;
mod packets;
mod partitions;
mod state;
mod timing;
mod written;

use std::sync::Arc;
use std::time::{Duration, Instant};

use numagpu_spec::regs::{self, OwnerResult, OwnerState, QueueFault, QueueState};
use numagpu_spec::table::{Block, Reg, Width};
use numagpu_spec::{pci, sdma};
use vm_memory::Bytes;

use crate::bus::{HbmStore, PciFunction};
use crate::clock::ManualClock;
use crate::config::{GpuConfig, LinkConfig, PartitionConfig};
use crate::fabric::Fabric;
use crate::gpu::Gpu;
use crate::memory::AnonymousStore;
use crate::registers::address;
use crate::test_support::TestVmm;

/// Guest RAM: 64 MiB from 1 MiB on.
const RAM: u64 = 0x10_0000;
const RAM_SIZE: usize = 64 << 20;
/// HBM of GPU `g`, partition `p`: 16 MiB at `HBM + g * 0x1_0000_0000 + p * 16 MiB`.
const HBM: u64 = 0x1_0000_0000;
const HBM_SIZE: u64 = 16 << 20;
/// Rings, one for each queue, and where read pointers go.
const RING: u64 = RAM;
const RING_SIZE: u32 = 4096;
const WRITEBACK: u64 = RAM + 0x2_0000;
/// Free for tests.
const DATA: u64 = RAM + 0x10_0000;
const TOKEN: u64 = 0x1234_5678_9abc_def0;
const LIMIT: Duration = Duration::from_secs(20);

/// Three GPUs of a hive in a chain 0 - 1 - 2, two partitions each, with a VMM that maps everything.
struct Machine {
    gpus: Vec<Arc<Gpu>>,
    vmms: Vec<TestVmm>,
    stores: Vec<Vec<Arc<AnonymousStore>>>,
    ram: Arc<AnonymousStore>,
    fabric: Arc<Fabric>,
    clock: Arc<ManualClock>,
}

fn hbm(gpu: u64, partition: u64) -> u64 {
    HBM + gpu * 0x1_0000_0000 + partition * HBM_SIZE
}

impl Machine {
    fn new() -> Machine {
        Machine::of(|_| {})
    }

    /// The same machine of GPUs whose configuration `change` has changed.
    fn of(change: impl Fn(&mut GpuConfig)) -> Machine {
        let fabric = Fabric::new();
        let clock = Arc::new(ManualClock::default());
        let mut gpus = Vec::new();
        let mut stores = Vec::new();
        let first = TestVmm::default();
        let ram = first.dma.map_ram(RAM, RAM_SIZE).unwrap();
        let mut vmms = Vec::new();
        for index in 0..3u32 {
            let own: Vec<_> = (0..2)
                .map(|_| Arc::new(AnonymousStore::new(HBM_SIZE as usize).unwrap()))
                .collect();
            let partitions = (0..2).zip(&own).map(|(p, store)| PartitionConfig {
                base: hbm(index.into(), p),
                size: HBM_SIZE,
                pxm: Some(4 + 2 * index + p as u32),
                store: Arc::clone(store) as Arc<dyn HbmStore>,
            });
            let peers: &[u32] = match index {
                0 => &[1],
                1 => &[0, 2],
                _ => &[1],
            };
            let mut links: Vec<_> = peers.iter().map(|peer| Some(*peer)).collect();
            links.push(None);
            let mut config = GpuConfig {
                hive_id: 0xabc,
                node_id: index,
                hive_size: 3,
                cpu_pxm: 1,
                links: links
                    .into_iter()
                    .map(|peer| LinkConfig {
                        peer,
                        width: 2,
                        bandwidth_mbs: 50_000,
                        latency_ns: 700,
                    })
                    .collect(),
                clock: Arc::clone(&clock) as _,
                ..GpuConfig::new(index, partitions.collect())
            };
            change(&mut config);
            gpus.push(Gpu::new(config, Arc::clone(&fabric)).unwrap());
            for (p, store) in (0..2).zip(&own) {
                first.dma.map(hbm(index.into(), p), Arc::clone(store) as _);
            }
            stores.push(own);
            vmms.push(TestVmm {
                dma: Arc::clone(&first.dma),
                ..TestVmm::default()
            });
        }
        for (gpu, vmm) in gpus.iter().zip(&vmms) {
            gpu.attach(vmm.attachment());
        }
        Machine {
            gpus,
            vmms,
            stores,
            ram,
            fabric,
            clock,
        }
    }

    /// Every GPU booted with bus master on and all interrupts enabled, every partition claimed by [`TOKEN`],
    /// queue 0 of GPU 0 enabled.
    fn ready() -> Machine {
        let machine = Machine::new();
        for gpu in 0..3 {
            machine.boot(gpu);
            for partition in 0..2 {
                assert_eq!(machine.claim(gpu, partition, TOKEN), OwnerResult::Ok);
            }
        }
        machine.enable(0, 0, TOKEN);
        machine
    }

    fn boot(&self, gpu: usize) {
        self.gpus[gpu].config_write(4, &[6, 0]);
        self.write(gpu, &regs::irq::BLOCK, 0, &regs::irq::ENABLE, 0xffff_ffff);
        self.write(gpu, &regs::boot::BLOCK, 0, &regs::boot::CONTROL, 1);
        self.clock.advance(1_000_000);
        assert_eq!(
            self.read(gpu, &regs::boot::BLOCK, 0, &regs::boot::STATUS),
            2
        );
    }

    fn read(&self, gpu: usize, block: &Block, instance: u32, reg: &Reg) -> u64 {
        let offset = address(block, instance, reg).unwrap();
        let mut data = [0; 8];
        let width = if reg.width == Width::W8 { 8 } else { 4 };
        self.gpus[gpu].bar_read(0, offset.into(), &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn write(&self, gpu: usize, block: &Block, instance: u32, reg: &Reg, value: u64) {
        let offset = address(block, instance, reg).unwrap();
        let width = if reg.width == Width::W8 { 8 } else { 4 };
        self.gpus[gpu].bar_write(0, offset.into(), &value.to_le_bytes()[..width]);
    }

    fn partition(&self, gpu: usize, partition: u32, reg: &Reg) -> u64 {
        self.read(gpu, &regs::partition::BLOCK, partition, reg)
    }

    fn command(&self, gpu: usize, partition: u32, command: u32, token: u64) -> OwnerResult {
        use regs::partition::{BLOCK, COMMAND, RESULT, TOKEN};
        self.write(gpu, &BLOCK, partition, &TOKEN, token);
        self.write(gpu, &BLOCK, partition, &COMMAND, command.into());
        OwnerResult::from_code(self.partition(gpu, partition, &RESULT) as u32).unwrap()
    }

    fn claim(&self, gpu: usize, partition: u32, token: u64) -> OwnerResult {
        self.command(gpu, partition, 1, token)
    }

    fn release(&self, gpu: usize, partition: u32, token: u64) -> OwnerResult {
        self.command(gpu, partition, 2, token)
    }

    fn owner_state(&self, gpu: usize, partition: u32) -> OwnerState {
        let state = self.partition(gpu, partition, &regs::partition::STATE);
        OwnerState::from_code(state as u32).unwrap()
    }

    fn wait_free(&self, gpu: usize, partition: u32) {
        wait(|| self.owner_state(gpu, partition) == OwnerState::Free);
    }

    fn queue(&self, gpu: usize, queue: u32, reg: &Reg) -> u64 {
        self.read(gpu, &regs::queue::BLOCK, queue, reg)
    }

    fn set_queue(&self, gpu: usize, queue: u32, reg: &Reg, value: u64) {
        self.write(gpu, &regs::queue::BLOCK, queue, reg, value);
    }

    fn enable_at(&self, gpu: usize, queue: u32, token: u64, ring: u64) {
        use regs::queue::{CONTROL, RING_BASE, RING_SIZE as SIZE, RPTR_WRITEBACK, TOKEN};
        self.set_queue(gpu, queue, &RING_BASE, ring);
        self.set_queue(gpu, queue, &SIZE, RING_SIZE.into());
        self.set_queue(gpu, queue, &TOKEN, token);
        self.set_queue(gpu, queue, &RPTR_WRITEBACK, writeback(gpu, queue));
        self.set_queue(gpu, queue, &CONTROL, 1);
    }

    fn enable(&self, gpu: usize, queue: u32, token: u64) {
        self.enable_at(gpu, queue, token, ring(gpu, queue));
        assert_eq!(self.queue_state(gpu, queue), QueueState::Idle);
    }

    fn reset_queue(&self, gpu: usize, queue: u32) {
        self.set_queue(gpu, queue, &regs::queue::CONTROL, 2);
        assert_eq!(self.queue_state(gpu, queue), QueueState::Disabled);
    }

    fn queue_state(&self, gpu: usize, queue: u32) -> QueueState {
        let state = self.queue(gpu, queue, &regs::queue::STATUS);
        QueueState::from_code(state as u32).unwrap()
    }

    fn ring_doorbell(&self, gpu: usize, queue: u32, wptr: u64) {
        let offset = pci::DOORBELL_STRIDE * u64::from(queue);
        self.gpus[gpu].bar_write(pci::BAR_DOORBELLS, offset, &wptr.to_le_bytes());
    }

    /// Appends words to a ring in RAM and rings.
    fn submit(&self, gpu: usize, queue: u32, words: &[u32]) {
        let mut wptr = self.queue(gpu, queue, &regs::queue::WPTR);
        for word in words {
            let offset = wptr % u64::from(RING_SIZE);
            self.poke(ring(gpu, queue) + offset, &word.to_le_bytes());
            wptr += 4;
        }
        self.ring_doorbell(gpu, queue, wptr);
    }

    /// Submits to queue 0 of GPU 0 and waits until it is idle or faulted.
    fn run(&self, words: &[u32]) -> QueueState {
        self.submit(0, 0, words);
        self.settle(0, 0)
    }

    fn settle(&self, gpu: usize, queue: u32) -> QueueState {
        wait(|| self.queue_state(gpu, queue) != QueueState::Running);
        self.queue_state(gpu, queue)
    }

    /// Code, address and packet of a queue's fault.
    fn fault(&self, gpu: usize, queue: u32) -> (QueueFault, u64, u64) {
        use regs::queue::{FAULT_ADDR, FAULT_CODE, FAULT_PACKET};
        let code = self.queue(gpu, queue, &FAULT_CODE) as u32;
        (
            QueueFault::from_code(code).unwrap(),
            self.queue(gpu, queue, &FAULT_ADDR),
            self.queue(gpu, queue, &FAULT_PACKET),
        )
    }

    fn poke(&self, address: u64, data: &[u8]) {
        let offset = (address - RAM) as usize;
        let slice = self.ram.slice(offset as u64, data.len() as u64).unwrap();
        slice.write_slice(data, 0).unwrap();
    }

    fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        bytes(&self.ram, address - RAM, len)
    }

    fn peek32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.peek(address, 4).try_into().unwrap())
    }
}

fn bytes(store: &AnonymousStore, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    let slice = store.slice(offset, len as u64).unwrap();
    slice.read_slice(&mut data, 0).unwrap();
    data
}

fn ring(gpu: usize, queue: u32) -> u64 {
    RING + 0x1000 * (8 * gpu as u64 + u64::from(queue))
}

fn writeback(gpu: usize, queue: u32) -> u64 {
    WRITEBACK + 64 * (8 * gpu as u64 + u64::from(queue))
}

fn wait(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "it takes too long");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Bytes that differ everywhere.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..len).map(step).collect()
}

/// A linear write of `data`.
fn write_linear(destination: u64, data: &[u32]) -> Vec<u32> {
    let mut words = vec![
        u32::from(sdma::OP_WRITE),
        destination as u32,
        (destination >> 32) as u32,
        data.len() as u32 - 1,
    ];
    words.extend(data);
    words
}
