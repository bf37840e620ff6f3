//! Two GPUs of a hive with a VMM that records.
//!
//! Threads and memory stay from input to input. [`Machine::refresh`] is what separates them: a detach, which leaves
//! a GPU as after power-on, zeroed RAM and a new VMM.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use numagpu_devices::aperture::ApertureConfig;
use numagpu_devices::bus::{BackingId, HbmStore, PciFunction, ResetKind};
use numagpu_devices::clock::ManualClock;
use numagpu_devices::fabric::Fabric;
use numagpu_devices::memory::AnonymousStore;
use numagpu_devices::registers::address;
use numagpu_devices::test_support::{Mapping, TestVmm};
use numagpu_devices::{Gpu, GpuConfig, LinkConfig, PartitionConfig};
use numagpu_spec::pci;
use numagpu_spec::regs::{self, OwnerResult, OwnerState, QueueFault, QueueState};
use numagpu_spec::table::{Block, Reg, Width};
use vm_memory::{Bytes, VolatileMemoryError, VolatileSlice};

/// GPUs.
pub const GPUS: usize = 2;
/// Partitions of each.
pub const PARTITIONS: usize = 2;
/// Queues of each.
pub const QUEUES: u32 = 2;
/// Id of the hive that both are in.
pub const HIVE: u64 = 0xabc;
/// First address of guest RAM.
pub const RAM: u64 = 0x10_0000;
/// First address of the rings, one of [`RING_SIZE`] bytes for each queue; far from everything else, so that
/// packets near a border do not write packets.
pub const RINGS: u64 = 0x4000_0000;
/// Bytes of a ring.
pub const RING_SIZE: u32 = 4096;
/// How long a boot takes.
pub const BOOT_NS: u64 = 1_000_000;
/// What must be over in a few microseconds and is not over by now never will be.
const LIMIT: Duration = Duration::from_secs(20);
/// Looks at something before the core is given up for longer.
const SPINS: u32 = 200;

/// Sizes of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of guest RAM.
    pub ram: usize,
    /// Bytes of each partition.
    pub hbm: u64,
    /// Whether CPUs reach the HBM of the second GPU through an aperture.
    pub aperture: bool,
}

/// Memory of a partition that counts who touches it, and whose scrubs can be made to wait or fail.
pub struct Store {
    memory: AnonymousStore,
    touched: AtomicU64,
    gate: Mutex<Gate>,
    opened: Condvar,
}

#[derive(Default)]
struct Gate {
    hold: bool,
    fail: bool,
}

impl Store {
    fn new(size: u64) -> Store {
        Store {
            memory: AnonymousStore::new(size as usize).expect("the host has memory"),
            touched: AtomicU64::new(0),
            gate: Mutex::default(),
            opened: Condvar::new(),
        }
    }

    /// Times that a device or a DMA asked for a part of the memory.
    pub fn touched(&self) -> u64 {
        self.touched.load(Ordering::SeqCst)
    }

    /// Fills the memory as a CPU would.
    pub fn fill(&self, byte: u8) {
        fill(&self.memory, byte);
    }

    /// The contents.
    pub fn contents(&self) -> Vec<u8> {
        let mut data = vec![0; self.memory.size() as usize];
        let all = self.memory.slice(0, self.memory.size());
        all.and_then(|all| all.read_slice(&mut data, 0))
            .expect("all of it is there");
        data
    }

    /// Whether every byte is `byte`.
    pub fn is_all(&self, byte: u8) -> bool {
        let data = self.contents();
        // Equal to itself moved by one: compared by the C library, which is fast with counters too.
        data.first() == Some(&byte) && data[1..] == data[..data.len() - 1]
    }

    /// Makes scrubs wait from now on, or lets them go on, to an error if `fail`.
    pub fn hold(&self, hold: bool, fail: bool) {
        *self.lock() = Gate { hold, fail };
        self.opened.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HbmStore for Store {
    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        self.touched.fetch_add(1, Ordering::SeqCst);
        self.memory.slice(offset, len)
    }

    fn backing(&self) -> (BackingId, u64) {
        self.memory.backing()
    }

    fn scrub(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut gate = self.lock();
        while gate.hold {
            gate = self
                .opened
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if gate.fail {
            return Err(io::Error::other("asked for"));
        }
        drop(gate);
        self.memory.scrub(offset, len)
    }
}

fn fill(memory: &AnonymousStore, byte: u8) {
    let all = memory.slice(0, memory.size()).expect("all of it is there");
    let block = [byte; 4096];
    let mut done = 0;
    while done < all.len() {
        done += all.write(&block, done).expect("inside");
    }
}

/// How the VMM maps a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// As planned.
    Whole,
    /// Not at all.
    Nowhere,
    /// For reading only.
    ReadOnly,
    /// Without a file descriptor.
    NoFd,
    /// Without its last page.
    Part,
}

impl Shown {
    /// Every way.
    pub const ALL: [Shown; 5] = [
        Shown::Whole,
        Shown::Nowhere,
        Shown::ReadOnly,
        Shown::NoFd,
        Shown::Part,
    ];
}

/// The machine.
pub struct Machine {
    /// The GPUs.
    pub gpus: Vec<Arc<Gpu>>,
    /// The VMM of each GPU; they share their memory.
    pub vmms: Vec<TestVmm>,
    /// HBM of each GPU, by partition.
    pub stores: Vec<Vec<Arc<Store>>>,
    /// Guest RAM.
    pub ram: Arc<AnonymousStore>,
    /// The links.
    pub fabric: Arc<Fabric>,
    /// Time of both GPUs.
    pub clock: Arc<ManualClock>,
    rings: Arc<AnonymousStore>,
    shape: Shape,
}

impl Machine {
    /// A machine whose GPUs no VMM holds yet.
    pub fn new(shape: Shape) -> Machine {
        let fabric = Fabric::new();
        let clock = Arc::new(ManualClock::default());
        let memory = |size| Arc::new(AnonymousStore::new(size).expect("the host has memory"));
        let mut machine = Machine {
            gpus: Vec::new(),
            vmms: vec![TestVmm::default(); GPUS],
            stores: Vec::new(),
            ram: memory(shape.ram),
            fabric,
            clock,
            rings: memory(GPUS * QUEUES as usize * RING_SIZE as usize),
            shape,
        };
        for index in 0..GPUS {
            machine.add(index);
        }
        machine
    }

    fn add(&mut self, index: usize) {
        let hbm = self.shape.hbm;
        let aperture = self.shape.aperture && index == 1;
        let stores: Vec<_> = (0..PARTITIONS).map(|_| Arc::new(Store::new(hbm))).collect();
        let partitions = stores.iter().enumerate().map(|(p, store)| PartitionConfig {
            base: self.hbm(index, p),
            size: hbm,
            pxm: Some(4),
            store: Arc::clone(store) as Arc<dyn HbmStore>,
        });
        let link = |peer| LinkConfig {
            peer,
            width: 1,
            bandwidth_mbs: 50_000,
            latency_ns: 700,
        };
        let config = GpuConfig {
            aperture: aperture.then_some(ApertureConfig {
                size: 4 * hbm,
                coherent: true,
            }),
            queues: QUEUES,
            hive_id: HIVE,
            node_id: index as u32,
            hive_size: GPUS as u32,
            links: vec![link(Some(1 - index as u32)), link(None)],
            boot_delay: Duration::from_nanos(BOOT_NS),
            clock: Arc::clone(&self.clock) as _,
            ..GpuConfig::new(index as u32, partitions.collect())
        };
        let gpu = Gpu::new(config, Arc::clone(&self.fabric)).expect("the configuration is valid");
        self.gpus.push(gpu);
        self.stores.push(stores);
    }

    /// The machine as after power-on, with a VMM connected to both GPUs.
    pub fn refresh(&mut self) {
        for (gpu, stores) in self.gpus.iter().zip(&self.stores) {
            for store in stores {
                store.hold(false, false);
            }
            gpu.detach();
        }
        for gpu in 0..GPUS {
            for partition in 0..PARTITIONS {
                self.wait_scrubbed(gpu, partition);
                let state = self.owner_state(gpu, partition);
                assert_eq!(state, OwnerState::Free, "after a disconnect");
                let store = &self.stores[gpu][partition];
                assert!(store.is_all(0), "HBM {gpu}.{partition} is not scrubbed");
            }
        }
        self.set_link(true);
        fill(&self.ram, 0);
        fill(&self.rings, 0);
        let first = TestVmm::default();
        first.dma.map(RAM, Arc::clone(&self.ram) as _);
        first.dma.map(RINGS, Arc::clone(&self.rings) as _);
        self.vmms = (0..GPUS)
            .map(|_| TestVmm {
                dma: Arc::clone(&first.dma),
                ..TestVmm::default()
            })
            .collect();
        for index in 0..GPUS {
            for partition in 0..PARTITIONS {
                self.show(index, partition, Shown::Whole);
            }
        }
        for (gpu, vmm) in self.gpus.iter().zip(&self.vmms) {
            gpu.attach(vmm.attachment());
        }
    }

    /// First address of a partition.
    pub fn hbm(&self, gpu: usize, partition: usize) -> u64 {
        (1 + gpu as u64) * 0x1_0000_0000 + partition as u64 * self.shape.hbm
    }

    /// First address of a queue's ring.
    pub fn ring(gpu: usize, queue: u32) -> u64 {
        RINGS + u64::from(RING_SIZE) * (gpu as u64 * u64::from(QUEUES) + u64::from(queue))
    }

    /// First address after the RAM.
    pub fn ram_end(&self) -> u64 {
        RAM + self.shape.ram as u64
    }

    /// Maps a partition in another way; the GPU is not told.
    pub fn show(&self, gpu: usize, partition: usize, how: Shown) {
        let (dma, address) = (&self.vmms[gpu].dma, self.hbm(gpu, partition));
        dma.unmap(address);
        if how == Shown::Nowhere {
            return;
        }
        dma.add(Mapping {
            address,
            size: match how {
                Shown::Part => self.shape.hbm - 4096,
                _ => self.shape.hbm,
            },
            store: Arc::clone(&self.stores[gpu][partition]) as _,
            offset: 0,
            writable: how != Shown::ReadOnly,
            has_fd: how != Shown::NoFd,
        });
    }

    /// Sets the link between both GPUs.
    pub fn set_link(&self, up: bool) {
        let set = self.fabric.set_link(HIVE, 0, 1, up);
        set.expect("there is a link");
    }

    /// Bus master on, every interrupt enabled, booted.
    pub fn boot(&self, gpu: usize) {
        self.set_bus_master(gpu, true);
        self.write(gpu, &regs::irq::BLOCK, 0, &regs::irq::ENABLE, u64::MAX);
        self.write(gpu, &regs::boot::BLOCK, 0, &regs::boot::CONTROL, 1);
        self.clock.advance(BOOT_NS);
    }

    /// Sets memory space and bus master enable.
    pub fn set_bus_master(&self, gpu: usize, on: bool) {
        self.gpus[gpu].config_write(4, &[if on { 6 } else { 2 }, 0]);
    }

    /// Reads a register.
    pub fn read(&self, gpu: usize, block: &Block, instance: u32, reg: &Reg) -> u64 {
        let offset = address(block, instance, reg).expect("a register of the table");
        let mut data = [0; 8];
        let width = width(reg);
        self.gpus[gpu].bar_read(pci::BAR_REGISTERS, offset.into(), &mut data[..width]);
        u64::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&self, gpu: usize, block: &Block, instance: u32, reg: &Reg, value: u64) {
        let offset = address(block, instance, reg).expect("a register of the table");
        let data = &value.to_le_bytes()[..width(reg)];
        self.gpus[gpu].bar_write(pci::BAR_REGISTERS, offset.into(), data);
    }

    /// Reads a register of a partition.
    pub fn partition(&self, gpu: usize, partition: usize, reg: &Reg) -> u64 {
        self.read(gpu, &regs::partition::BLOCK, partition as u32, reg)
    }

    /// Commands as the driver with `token`.
    pub fn command(&self, gpu: usize, partition: usize, command: u32, token: u64) -> OwnerResult {
        use regs::partition::{BLOCK, COMMAND, TOKEN};
        self.write(gpu, &BLOCK, partition as u32, &TOKEN, token);
        self.write(gpu, &BLOCK, partition as u32, &COMMAND, command.into());
        self.result(gpu, partition)
    }

    /// Claims a partition.
    pub fn claim(&self, gpu: usize, partition: usize, token: u64) -> OwnerResult {
        self.command(gpu, partition, 1, token)
    }

    /// Result of the last command.
    pub fn result(&self, gpu: usize, partition: usize) -> OwnerResult {
        let code = self.partition(gpu, partition, &regs::partition::RESULT);
        OwnerResult::from_code(code as u32).expect("a result of the specification")
    }

    /// State of a partition.
    pub fn owner_state(&self, gpu: usize, partition: usize) -> OwnerState {
        let code = self.partition(gpu, partition, &regs::partition::STATE);
        OwnerState::from_code(code as u32).expect("a state of the specification")
    }

    /// Waits until a partition is not RELEASING.
    pub fn wait_scrubbed(&self, gpu: usize, partition: usize) {
        wait(|| self.owner_state(gpu, partition) != OwnerState::Releasing);
    }

    /// Reads a register of a queue.
    pub fn queue(&self, gpu: usize, queue: u32, reg: &Reg) -> u64 {
        self.read(gpu, &regs::queue::BLOCK, queue, reg)
    }

    /// Writes a register of a queue.
    pub fn set_queue(&self, gpu: usize, queue: u32, reg: &Reg, value: u64) {
        self.write(gpu, &regs::queue::BLOCK, queue, reg, value);
    }

    /// State of a queue.
    pub fn queue_state(&self, gpu: usize, queue: u32) -> QueueState {
        let code = self.queue(gpu, queue, &regs::queue::STATUS);
        QueueState::from_code(code as u32).expect("a state of the specification")
    }

    /// Fault of a queue.
    pub fn queue_fault(&self, gpu: usize, queue: u32) -> QueueFault {
        let code = self.queue(gpu, queue, &regs::queue::FAULT_CODE);
        QueueFault::from_code(code as u32).expect("a fault of the specification")
    }

    /// Enables a disabled queue with a ring at `ring`.
    pub fn enable(&self, gpu: usize, queue: u32, token: u64, ring: u64, writeback: u64) {
        use regs::queue::{CONTROL, RING_BASE, RING_SIZE as SIZE, RPTR_WRITEBACK, TOKEN};
        self.set_queue(gpu, queue, &RING_BASE, ring);
        self.set_queue(gpu, queue, &SIZE, RING_SIZE.into());
        self.set_queue(gpu, queue, &TOKEN, token);
        self.set_queue(gpu, queue, &RPTR_WRITEBACK, writeback);
        self.set_queue(gpu, queue, &CONTROL, regs::QUEUE_ENABLE.into());
    }

    /// Resets a queue, which must always come back, without pointers or fault.
    pub fn reset_queue(&self, gpu: usize, queue: u32) {
        use regs::queue::{CONTROL, RPTR, WPTR};
        self.set_queue(gpu, queue, &CONTROL, regs::QUEUE_RESET.into());
        assert_eq!(self.queue_state(gpu, queue), QueueState::Disabled);
        assert_eq!(self.queue_fault(gpu, queue), QueueFault::None);
        assert_eq!(self.queue(gpu, queue, &RPTR), 0);
        assert_eq!(self.queue(gpu, queue, &WPTR), 0);
    }

    /// Puts words in a queue's ring from byte `position` on.
    pub fn put(&self, gpu: usize, queue: u32, position: u64, words: &[u32]) {
        let start = Machine::ring(gpu, queue) - RINGS;
        let mut position = position;
        for word in words {
            let offset = start + position % u64::from(RING_SIZE);
            let slice = self.rings.slice(offset, 4).expect("inside");
            slice.write_slice(&word.to_le_bytes(), 0).expect("inside");
            position += 4;
        }
    }

    /// Rings a doorbell.
    pub fn ring_doorbell(&self, gpu: usize, queue: u32, wptr: u64) {
        let offset = pci::DOORBELL_STRIDE * u64::from(queue);
        self.gpus[gpu].bar_write(pci::BAR_DOORBELLS, offset, &wptr.to_le_bytes());
    }

    /// Waits until a queue does not run.
    pub fn settle(&self, gpu: usize, queue: u32) -> QueueState {
        wait(|| self.queue_state(gpu, queue) != QueueState::Running);
        self.queue_state(gpu, queue)
    }

    /// Whatever happened before: after a reset a GPU boots, is claimed and works.
    pub fn check_alive(&self, gpu: usize) {
        const TOKEN: u64 = 0x600d;
        self.gpus[gpu].reset(ResetKind::Function);
        // CPUs may have written to what was free: only a new VMM finds zeros.
        self.gpus[gpu].detach();
        self.gpus[gpu].attach(self.vmms[gpu].attachment());
        for partition in 0..PARTITIONS {
            self.show(gpu, partition, Shown::Whole);
            self.wait_scrubbed(gpu, partition);
        }
        self.gpus[gpu].dma_changed();
        self.boot(gpu);
        assert_eq!(self.claim(gpu, 0, TOKEN), OwnerResult::Ok);
        assert!(
            self.stores[gpu][0].is_all(0),
            "a claimed partition reads zero"
        );
        self.run_one(gpu, 0, TOKEN, &[0]);
        assert_eq!(self.settle(gpu, 0), QueueState::Idle);
        self.reset_queue(gpu, 0);
    }

    /// Starts a reset queue and gives it one packet.
    pub fn run_one(&self, gpu: usize, queue: u32, token: u64, words: &[u32]) {
        self.reset_queue(gpu, queue);
        self.enable(gpu, queue, token, Machine::ring(gpu, queue), 0);
        self.put(gpu, queue, 0, words);
        self.ring_doorbell(gpu, queue, 4 * words.len() as u64);
    }
}

/// Bytes of a register.
pub fn width(reg: &Reg) -> usize {
    match reg.width {
        Width::W4 => 4,
        Width::W8 => 8,
    }
}

/// Waits until something is done, which has to be soon.
pub fn wait(done: impl FnMut() -> bool) {
    assert!(wait_for(LIMIT, done), "it takes too long");
}

/// Waits until something is done; whether it was, within `limit`.
pub fn wait_for(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let mut spins = 0;
    let begun = Instant::now();
    while !done() {
        if begun.elapsed() > limit {
            return false;
        }
        spins += 1;
        if spins < SPINS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
    true
}
