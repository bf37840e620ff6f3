//! A machine of GPUs with its memory, and a driver of queue 0 of each.

use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};

use numagpu_devices::bus::{Attachment, DmaPort, HbmStore, InterruptSink, PciFunction};
use numagpu_devices::registers::address;
use numagpu_devices::spec::regs::{boot, irq, partition, queue};
use numagpu_devices::spec::table::{Block, Reg, Width};
use numagpu_devices::spec::{pci, sdma};
use numagpu_devices::{Fabric, Gpu, GpuConfig, PartitionConfig};
use numagpu_vmm_glue::hbm::HbmBacking;
use numagpu_vmm_glue::vfio_user::dma::{DmaTable, READABLE, WRITABLE};
use numagpu_vmm_glue::vfio_user::wire::DmaMap;
use vm_memory::{Bytes, VolatileSlice};

pub const MIB: u64 = 1 << 20;
/// Guest memory, and for each GPU a ring, a fence and two windows in it.
const RAM: u64 = 0;
const PER_GPU: u64 = 256 * MIB;
const FENCE: u64 = MIB;
pub const WINDOW: u64 = 64 * MIB;
const RAM_FROM: u64 = 64 * MIB;
const RAM_TO: u64 = 128 * MIB;
const RING_SIZE: u32 = 256 << 10;
/// HBM of each GPU, and two windows in it.
pub const HBM: u64 = 1 << 40;
pub const HBM_STRIDE: u64 = 1 << 32;
const HBM_SIZE: u64 = 128 * MIB;
pub const HBM_FROM: u64 = 0;
pub const HBM_TO: u64 = WINDOW;
const TOKEN: u64 = 1;

/// Counts messages, and lets a thread sleep until they come.
#[derive(Default)]
pub struct Bell(Mutex<u64>, Condvar);

impl InterruptSink for Bell {
    fn trigger(&self, _: u16) -> bool {
        *self.0.lock().unwrap() += 1;
        self.1.notify_all();
        true
    }
}

impl Bell {
    pub fn wait(&self, count: u64) {
        let mut rung = self.0.lock().unwrap();
        while *rung < count {
            rung = self.1.wait(rung).unwrap();
        }
    }
}

/// Memory that engines and floors both reach.
pub struct Memory {
    ram: Arc<HbmBacking>,
    hbm: Vec<Arc<HbmBacking>>,
}

impl Memory {
    pub fn slice(&self, address: u64, len: u64) -> VolatileSlice<'_> {
        let (store, offset) = match address.checked_sub(HBM) {
            Some(offset) => {
                let gpu = usize::try_from(offset / HBM_STRIDE).unwrap();
                (self.hbm.get(gpu).unwrap(), offset % HBM_STRIDE)
            }
            None => (&self.ram, address - RAM),
        };
        store.slice(offset, len).unwrap()
    }

    pub fn copy(&self, from: u64, to: u64, len: u64) {
        self.slice(from, len)
            .copy_to_volatile_slice(self.slice(to, len));
    }
}

/// A GPU whose queue 0 is enabled.
pub struct Driver {
    pub gpu: Arc<Gpu>,
    pub bell: Arc<Bell>,
    pub memory: Arc<Memory>,
    base: u64,
    hbm: u64,
    wptr: u64,
    pub rung: u64,
    fence: u32,
}

impl Driver {
    fn write(&self, block: &Block, reg: &Reg, value: u64) {
        let offset = address(block, 0, reg).unwrap().into();
        let bytes = value.to_le_bytes();
        let data = match reg.width {
            Width::W4 => bytes.split_at(4).0,
            Width::W8 => &bytes,
        };
        self.gpu.bar_write(pci::BAR_REGISTERS, offset, data);
    }

    pub fn read32(&self, block: &Block, reg: &Reg) -> u32 {
        let mut data = [0; 4];
        let offset = address(block, 0, reg).unwrap().into();
        self.gpu.bar_read(pci::BAR_REGISTERS, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn start(&self) {
        self.gpu.config_write(4, &[6, 0]);
        self.write(&irq::BLOCK, &irq::ENABLE, 0xffff_ffff);
        self.write(&boot::BLOCK, &boot::CONTROL, 1);
        while self.read32(&boot::BLOCK, &boot::STATUS) != 2 {
            spin_loop();
        }
        self.write(&partition::BLOCK, &partition::TOKEN, TOKEN);
        self.write(&partition::BLOCK, &partition::COMMAND, 1);
        self.write(&queue::BLOCK, &queue::RING_BASE, self.base);
        self.write(&queue::BLOCK, &queue::RING_SIZE, RING_SIZE.into());
        self.write(&queue::BLOCK, &queue::TOKEN, TOKEN);
        self.write(
            &queue::BLOCK,
            &queue::RPTR_WRITEBACK,
            self.base + FENCE + 64,
        );
        self.write(&queue::BLOCK, &queue::CONTROL, 1);
        assert_eq!(self.read32(&queue::BLOCK, &queue::STATUS), 1);
    }

    /// Appends words to the ring.
    pub fn put(&mut self, words: &[u32]) {
        for word in words {
            let at = self.wptr % u64::from(RING_SIZE);
            let place = self.memory.slice(self.base + at, 4);
            place.store(*word, 0, Ordering::Relaxed).unwrap();
            self.wptr += 4;
        }
    }

    pub fn ring(&self) {
        let data = self.wptr.to_le_bytes();
        self.gpu.bar_write(pci::BAR_DOORBELLS, 0, &data);
    }

    /// Appends a fence; the value to wait for.
    pub fn put_fence(&mut self) -> u32 {
        self.fence += 1;
        self.put(&sdma::fence(self.base + FENCE, self.fence));
        self.fence
    }

    pub fn fence_value(&self) -> u32 {
        let place = self.memory.slice(self.base + FENCE, 4);
        place.load(0, Ordering::Acquire).unwrap()
    }

    /// Rings for what is in the ring and a trap behind it, and sleeps until the trap.
    pub fn run(&mut self) {
        self.put(&sdma::trap(0));
        self.rung += 1;
        self.ring();
        self.bell.wait(self.rung);
        assert_ne!(self.read32(&queue::BLOCK, &queue::STATUS), 3);
    }

    /// First addresses of the windows that a copy goes between.
    pub fn windows(&self, way: Way) -> (u64, u64) {
        let (ram, hbm) = (self.base, self.hbm);
        match way {
            Way::RamToHbm => (ram + RAM_FROM, hbm + HBM_TO),
            Way::HbmToHbm => (hbm + HBM_FROM, hbm + HBM_TO),
            Way::RamToRam => (ram + RAM_FROM, ram + RAM_TO),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Way {
    RamToHbm,
    HbmToHbm,
    RamToRam,
}

/// A machine of `count` GPUs.
pub fn machine(count: u32) -> Vec<Driver> {
    let table = Arc::new(DmaTable::new());
    let map = |address, backing: &HbmBacking| {
        let request = DmaMap {
            flags: READABLE | WRITABLE,
            offset: 0,
            address,
            size: backing.size(),
        };
        let fd = backing.as_fd().try_clone_to_owned().unwrap();
        table.map(&request, Some(fd)).unwrap();
    };
    let ram = Arc::new(HbmBacking::memfd("ram", PER_GPU * u64::from(count)).unwrap());
    map(RAM, &ram);
    let stores = (0..count).map(|_| Arc::new(HbmBacking::memfd("hbm", HBM_SIZE).unwrap()));
    let memory = Arc::new(Memory {
        ram,
        hbm: stores.collect(),
    });
    let fabric = Fabric::new();
    let drivers = (0..count).zip(&memory.hbm).map(|(index, store)| {
        let base = HBM + HBM_STRIDE * u64::from(index);
        map(base, store);
        let partition = PartitionConfig {
            base,
            size: HBM_SIZE,
            pxm: None,
            store: Arc::clone(store) as _,
        };
        let config = GpuConfig::new(index, vec![partition]);
        let gpu = Gpu::new(config, Arc::clone(&fabric)).unwrap();
        let bell = Arc::new(Bell::default());
        gpu.attach(Attachment {
            dma: Arc::clone(&table) as Arc<dyn DmaPort>,
            irq: Arc::clone(&bell) as _,
        });
        let driver = Driver {
            gpu,
            bell,
            memory: Arc::clone(&memory),
            base: RAM + PER_GPU * u64::from(index),
            hbm: base,
            wptr: 0,
            rung: 0,
            fence: 0,
        };
        driver.start();
        driver
    });
    drivers.collect()
}
