//! A GPU behind the IOMMU: what its queues are told are addresses of the IOMMU, and its HBM is in reach where the IOMMU has it
//! at the planned address.

use std::sync::Arc;

use numagpu_spec::regs::{
    self, BootState, Coherence, OwnerCommand, OwnerResult, QueueFault, QueueState, boot, partition,
    queue as q,
};
use numagpu_spec::table::{Reg, Width};
use numagpu_spec::{pci, sdma};
use numagpu_topology::seen::DaxSeen;
use numagpu_vmm_glue::vfio::{DmaMap, Memory};
use vm_memory::{Bytes as _, MmapRegion};

use super::{Done, Passed, hbm, names_of, note, words};
use crate::device::{Device, Outcome, wait};

/// Where the GPU has our RAM: no physical address of this guest.
const RAM: u64 = 0x10_0000_0000;
const RAM_SIZE: usize = 2 << 20;
/// In it.
const RING: u64 = 0;
const RING_SIZE: u64 = 0x1000;
const FENCE: usize = 0x1_0000;
const SOURCE: usize = 0x2_0000;
const TARGET: usize = 0x4_0000;
const COPY: usize = 0x1_0000;
/// Where in HBM it is copied to.
const IN_HBM: u64 = 4 << 20;

const TOKEN: u64 = 0x6e75_6d61_0000_0003;

/// A GPU, our RAM, and the HBM of its first partition, each in its address space.
struct Work {
    gpu: Passed,
    ram: Arc<Memory>,
    ram_map: Option<DmaMap>,
    hbm: Arc<Memory>,
    base: u64,
    _hbm_maps: Vec<DmaMap>,
    written: u64,
}

impl Passed {
    fn reg(&self, base: u32, reg: Reg) -> u64 {
        let at = u64::from(base + reg.offset);
        let bar = u32::from(pci::BAR_REGISTERS);
        let low = u64::from(self.read32(bar, at));
        match reg.width {
            Width::W4 => low,
            Width::W8 => low | u64::from(self.read32(bar, at + 4)) << 32,
        }
    }

    fn set(&self, base: u32, reg: Reg, value: u64) {
        let at = u64::from(base + reg.offset);
        let bar = u32::from(pci::BAR_REGISTERS);
        let half = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        if reg.width == Width::W8 {
            self.write32(bar, at + 4, half(value >> 32));
        }
        self.write32(bar, at, half(value));
    }

    fn coherence(&self) -> String {
        let code = self.reg(Device::partition(0), partition::COHERENCE);
        let known = u32::try_from(code).ok().and_then(Coherence::from_code);
        known.map_or_else(|| format!("code {code}"), |code| code.name().to_owned())
    }

    fn claim(&self) -> Outcome<OwnerResult> {
        let base = Device::partition(0);
        self.set(base, partition::TOKEN, TOKEN);
        self.set(base, partition::COMMAND, OwnerCommand::Claim.code().into());
        let code = self.reg(base, partition::RESULT);
        let result = u32::try_from(code).ok().and_then(OwnerResult::from_code);
        result.ok_or_else(|| format!("ownership result {code}"))
    }
}

impl Work {
    /// Opens and boots the GPU. Nothing of its address space is mapped then, so it has no HBM to give.
    fn open() -> Outcome<(Passed, String)> {
        let gpu = Passed::open((pci::VENDOR_ID, pci::DEVICE_ID))?;
        let magic = gpu.reg(regs::identity::BASE, regs::identity::MAGIC);
        if magic != u64::from(regs::MAGIC) {
            return Err(format!("magic {magic:#x}"));
        }
        gpu.set(boot::BASE, boot::CONTROL, u64::from(regs::BOOT_START));
        wait("boot", || {
            (gpu.reg(boot::BASE, boot::STATUS) == u64::from(BootState::Ready.code())).then_some(())
        })?;
        let (coherence, claim) = (gpu.coherence(), gpu.claim()?);
        if coherence != Coherence::NotMapped.name() || claim != OwnerResult::NotCoherent {
            return Err(format!(
                "HBM is {coherence}, a claim gives {}",
                claim.name()
            ));
        }
        let group = gpu.group();
        Ok((gpu, format!("works: group {group}, HBM {coherence}")))
    }

    /// Maps HBM at the address that the device has of it, and RAM somewhere else.
    fn map(gpu: Passed, dax: &[DaxSeen]) -> Outcome<(Work, String)> {
        let base = gpu.reg(Device::partition(0), partition::HBM_BASE);
        let size = gpu.reg(Device::partition(0), partition::HBM_SIZE);
        let dax = dax.iter().find(|dax| dax.region.base == base);
        let dax = dax.ok_or_else(|| format!("no dax device at {base:#x}"))?;
        let hbm = hbm(dax, size)?;
        let map = gpu.container.map(base, &hbm, 0, size).map_err(words)?;
        let region = MmapRegion::new(RAM_SIZE).map_err(words)?;
        let ram = Memory::of_region(Arc::new(region));
        let ram_map = gpu.container.map(RAM, &ram, 0, RAM_SIZE as u64);
        let ram_map = Some(ram_map.map_err(words)?);
        let coherence = gpu.coherence();
        if coherence != Coherence::Coherent.name() {
            return Err(format!("HBM is {coherence}"));
        }
        match gpu.claim()? {
            OwnerResult::Ok => {}
            other => return Err(format!("a claim gives {}", other.name())),
        }
        let work = Work {
            gpu,
            ram,
            ram_map,
            hbm,
            base,
            _hbm_maps: vec![map],
            written: 0,
        };
        Ok((work, format!("works: {size:#x} bytes, HBM {coherence}")))
    }

    fn queue(&self, reg: Reg) -> u64 {
        self.gpu.reg(q::BASE, reg)
    }

    fn enable(&mut self) {
        let set = |reg, value| self.gpu.set(q::BASE, reg, value);
        set(q::CONTROL, regs::QUEUE_RESET.into());
        set(q::RING_BASE, RAM + RING);
        set(q::RING_SIZE, RING_SIZE);
        set(q::TOKEN, TOKEN);
        set(q::CONTROL, regs::QUEUE_ENABLE.into());
        self.written = 0;
    }

    fn push(&mut self, packet: &[u32]) -> Outcome {
        for word in packet {
            let at = usize::try_from(RING + self.written % RING_SIZE).map_err(words)?;
            self.ram
                .slice()
                .store(*word, at, std::sync::atomic::Ordering::Release)
                .map_err(words)?;
            self.written += 4;
        }
        Ok(())
    }

    /// Rings the doorbell: the high half first, since the low half rings.
    fn ring(&self) {
        let bar = u32::from(pci::BAR_DOORBELLS);
        let half = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        self.gpu.write32(bar, 4, half(self.written >> 32));
        self.gpu.write32(bar, 0, half(self.written));
    }

    fn fence(&self) -> Outcome<u32> {
        let order = std::sync::atomic::Ordering::Acquire;
        self.ram.slice().load(FENCE, order).map_err(words)
    }

    fn state(&self) -> Option<QueueState> {
        let code = u32::try_from(self.queue(q::STATUS)).ok()?;
        QueueState::from_code(code)
    }

    fn fault(&self) -> String {
        let code = u32::try_from(self.queue(q::FAULT_CODE)).unwrap_or(u32::MAX);
        let name = QueueFault::from_code(code).map_or("unknown", QueueFault::name);
        format!("{name} at {:#x}", self.queue(q::FAULT_ADDR))
    }

    /// RAM to HBM and back, all by addresses of the IOMMU.
    fn copies(&mut self) -> Outcome<String> {
        let pattern: Vec<u8> = (0..COPY)
            .map(|at| (at >> 3).to_le_bytes()[0] ^ 0x5a)
            .collect();
        self.ram
            .slice()
            .write_slice(&pattern, SOURCE)
            .map_err(words)?;
        self.enable();
        let hbm = self.base + IN_HBM;
        self.push(&sdma::copy_linear(RAM + SOURCE as u64, hbm, COPY as u64))?;
        self.push(&sdma::copy_linear(hbm, RAM + TARGET as u64, COPY as u64))?;
        self.push(&sdma::fence(RAM + FENCE as u64, 0x600d))?;
        self.ring();
        wait("the fence", || match (self.fence(), self.state()) {
            (Ok(0x600d), _) => Some(Ok(())),
            (_, Some(QueueState::Fault)) => Some(Err(self.fault())),
            _ => None,
        })??;
        let mut seen = vec![0; COPY];
        self.ram
            .slice()
            .read_slice(&mut seen, TARGET)
            .map_err(words)?;
        if seen != pattern {
            return Err("RAM has other bytes".to_owned());
        }
        let at = usize::try_from(IN_HBM).map_err(words)?;
        self.hbm.slice().read_slice(&mut seen, at).map_err(words)?;
        match seen == pattern {
            true => Ok(format!("works: {COPY} bytes in and out")),
            false => Err("HBM has other bytes".to_owned()),
        }
    }

    /// What is taken from the address space is out of the GPU's reach.
    fn unmapped(&mut self) -> Outcome<String> {
        if let Some(map) = self.ram_map.take() {
            map.unmap().map_err(words)?;
        }
        self.push(&sdma::fence(RAM + FENCE as u64, 0xbad))?;
        self.ring();
        wait("the queue to stop", || {
            (self.state() == Some(QueueState::Fault)).then_some(())
        })?;
        match self.fence()? {
            0x600d => Ok(format!("works: {}", self.fault())),
            fence => Err(format!("the fence is {fence:#x}")),
        }
    }
}

/// The copy engine of a GPU that is passed through.
pub(super) fn run(dax: &[DaxSeen], done: &mut Vec<Done>) {
    let opened = Work::open();
    let gpu = match opened {
        Ok((gpu, text)) => {
            note(done, names_of::GPU_OPEN, Ok(text));
            gpu
        }
        Err(error) => {
            note(done, names_of::GPU_OPEN, Err(error));
            return;
        }
    };
    let mut work = match Work::map(gpu, dax) {
        Ok((work, text)) => {
            note(done, names_of::GPU_MAP, Ok(text));
            work
        }
        Err(error) => {
            note(done, names_of::GPU_MAP, Err(error));
            return;
        }
    };
    let copied = work.copies();
    if note(done, names_of::GPU_COPY, copied) {
        let unmapped = work.unmapped();
        note(done, names_of::GPU_UNMAPPED, unmapped);
    }
}
