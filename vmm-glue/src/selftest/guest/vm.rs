//! A virtual machine of the parts that [`crate::kvm`] has, with one processor in long mode.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_msi, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use numagpu_devices::bus::{DmaPort, PciFunction};
use numagpu_devices::ownership::OnDisconnect;
use numagpu_topology::Plan;
use numagpu_topology::ranges::Range;
use numagpu_topology::size::GIB;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::super::Outcome;
use super::program;
use super::protocol::{self, Place, ram};
use crate::hbm::HbmBacking;
use crate::instance::Gpus;
use crate::kvm::{
    Bdf, Doorbells, Endpoint, GuestDma, HostBridge, MemorySlots, MsiRoutes, Windows, hbm_region,
};

/// The only version of KVM's interface that there is (`KVM_GET_API_VERSION`).
const API_VERSION: i32 = 12;
/// Where BARs may be below 4 GiB, and ECAM of one bus behind them. RAM ends below.
const WINDOW: Range = Range {
    base: 0xc000_0000,
    size: 0x1000_0000,
};
const ECAM: u64 = 0xe000_0000;
/// Where the kernel may put what it needs for itself on some processors.
const TSS: usize = 0xfffb_d000;
/// Interrupt numbers of an I/O APIC, which this machine has none of, before those of messages.
const PINS: u64 = 24;
const GSIS: std::ops::Range<u32> = 24..64;
/// Where the GPU is on the bus.
pub(super) const GPU: Bdf = Bdf {
    bus: 0,
    device: 3,
    function: 0,
};
/// GiB that one table of page directories spans, and most directories that there is room for.
const SPAN: u64 = 512;
const DIRECTORIES: usize = 32;
/// The longest that the guest may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A page table entry that is there, writable; and one for a page of 2 MiB.
const TABLE: u64 = 0b11;
const PAGE: u64 = 0x83;

/// The machine.
pub(super) struct Machine {
    // In the order in which they are dropped: the GPU works in the memory, and the guest's processor with both.
    vcpu: VcpuFd,
    bridge: HostBridge,
    _slots: MemorySlots,
    gpus: Gpus,
    vm: Arc<VmFd>,
    /// Where KVM was asked to hear the kick.
    pub(super) kick: u64,
}

/// What the guest did that the host has to look at.
pub(super) enum Event {
    /// It stored to an I/O port.
    Port(u16, u32),
    /// It stored where a kick is, and the store came here.
    Kick,
}

/// Opens KVM.
///
/// # Errors
/// Why it is not there.
pub(super) fn open(path: &Path) -> Outcome<Kvm> {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes());
    let name = name.map_err(|error| format!("{}: {error}", path.display()))?;
    let kvm = Kvm::new_with_path(name).map_err(|error| {
        let error = rustix::io::Errno::from_raw_os_error(error.errno());
        format!("{}: {error}", path.display())
    })?;
    // Whatever else is there opens too.
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(format!(
            "{}: no KVM of API version {API_VERSION}, but {other}",
            path.display()
        )),
    }
}

/// With what was tried.
fn doing<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> String {
    move |error| format!("cannot {what}: {error}")
}

impl Machine {
    /// The planned machine with its first GPU plugged in, and in its RAM `source` and the program.
    pub(super) fn new(kvm: &Kvm, plan: &Plan, source: &[u8]) -> Outcome<Machine> {
        let vm = Arc::new(kvm.create_vm().map_err(doing("make a virtual machine"))?);
        vm.set_tss_address(TSS).map_err(doing("place the TSS"))?;
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..kvm_enable_cap::default()
        };
        split.args = [PINS, 0, 0, 0];
        vm.enable_cap(&split)
            .map_err(doing("have local APICs in the kernel"))?;

        let gpus = Gpus::new(plan, None, OnDisconnect::Scrub).map_err(doing("make the GPU"))?;
        let mut regions = Vec::new();
        for range in &plan.ram {
            let ram = HbmBacking::memfd("selftest-ram", range.size);
            let ram = ram.map_err(doing("make RAM"))?;
            regions.push(hbm_region(range.base, &ram).map_err(doing("place RAM"))?);
        }
        for (base, hbm) in gpus.memory() {
            regions.push(hbm_region(base, hbm).map_err(doing("place HBM"))?);
        }
        let slots = MemorySlots::attach(&vm, 0, &regions).map_err(doing("show memory"))?;
        let memory = GuestMemoryMmap::from_regions(regions).map_err(doing("join memory"))?;

        // Behind all memory, as the plan has it.
        let high = Range {
            base: plan.window.end().next_multiple_of(GIB),
            size: GIB,
        };
        let place = Place {
            ecam: ECAM,
            registers: u32::try_from(WINDOW.base + 0x10_0000).unwrap_or(0),
            msix: u32::try_from(WINDOW.base + 0x20_0000).unwrap_or(0),
            doorbells: high.base + 0x30_0000,
        };
        let bridge = HostBridge::new(Windows {
            ecam: ECAM,
            buses: 1,
            memory: vec![WINDOW, high],
        });
        let bridge = bridge.map_err(doing("make a host bridge"))?;
        let kick = plug(&vm, &bridge, &gpus, &memory, &place)?;

        let code = program::assemble(&place).map_err(doing("assemble the program"))?;
        let poke = |at: u64, bytes: &[u8]| {
            let written = memory.write_slice(bytes, GuestAddress(at));
            written.map_err(doing("write the guest's memory"))
        };
        poke(ram::CODE, &code)?;
        poke(ram::SOURCE, source)?;
        // None; 64-bit code; data.
        let descriptors = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff_u64];
        poke(ram::GDT, &descriptors.map(u64::to_le_bytes).concat())?;
        let hbm_end = gpus.memory().map(|(base, hbm)| {
            use numagpu_devices::bus::HbmStore as _;
            (base, hbm.size())
        });
        let ranges = plan.ram.iter().map(|it| (it.base, it.size)).chain(hbm_end);
        let ranges = ranges.chain([(WINDOW.base, GIB), (high.base, high.size)]);
        for (at, entry) in page_tables(ranges)? {
            poke(at, &entry.to_le_bytes())?;
        }
        Ok(Machine {
            vcpu: processor(kvm, &vm)?,
            bridge,
            _slots: slots,
            gpus,
            vm,
            kick,
        })
    }

    /// Runs the guest until `heard` says that it is at its end, or for too long.
    pub(super) fn run(
        &mut self,
        mut heard: impl FnMut(&Gpus, Event) -> Outcome<bool>,
    ) -> Outcome<()> {
        let vm = Arc::clone(&self.vm);
        let (ended, end) = channel::<()>();
        std::thread::scope(|scope| {
            let _watch = std::thread::Builder::new().spawn_scoped(scope, move || {
                // The guest halts in the kernel: it is woken as a device would wake it, and says where it was.
                if end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    let _told = vm.signal_msi(kvm_msi {
                        address_lo: protocol::MESSAGE_ADDRESS,
                        data: protocol::VECTOR_TOO_LONG.into(),
                        ..kvm_msi::default()
                    });
                }
            });
            let result = self.exits(&mut heard);
            drop(ended);
            result
        })
    }

    fn exits(&mut self, heard: &mut impl FnMut(&Gpus, Event) -> Outcome<bool>) -> Outcome<()> {
        loop {
            let mut exit = match self.vcpu.run() {
                Ok(exit) => exit,
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => return Err(format!("the processor does not run: {error}")),
            };
            let answered = self.bridge.answer(&mut exit);
            let event = match exit {
                VcpuExit::IoOut(port, data) if !answered => {
                    let mut value = [0; 4];
                    for (to, from) in value.iter_mut().zip(data) {
                        *to = *from;
                    }
                    Event::Port(port, u32::from_le_bytes(value))
                }
                VcpuExit::MmioWrite(address, _) if address == self.kick => Event::Kick,
                _ if answered => continue,
                VcpuExit::MmioRead(address, _) | VcpuExit::MmioWrite(address, _) => {
                    return Err(format!(
                        "the guest reached for {address:#x}, where nothing is"
                    ));
                }
                other => return Err(format!("the processor stopped: {other:?}")),
            };
            if heard(&self.gpus, event)? {
                return Ok(());
            }
        }
    }
}

/// Plugs the first GPU in; where its first kick will be.
fn plug(
    vm: &Arc<VmFd>,
    bridge: &HostBridge,
    gpus: &Gpus,
    memory: &GuestMemoryMmap,
    place: &Place,
) -> Outcome<u64> {
    let gpu = gpus.gpus().first().ok_or("the plan has no GPU")?;
    let function: Arc<dyn PciFunction> = Arc::<numagpu_devices::Gpu>::clone(gpu);
    let dma: Arc<dyn DmaPort> = GuestDma::new(GuestMemoryAtomic::new(memory.clone()));
    let routes = MsiRoutes::new(Arc::clone(vm), Vec::new(), GSIS);
    let routes = routes.map_err(doing("route messages"))?;
    let doorbells = Doorbells::new(Arc::clone(vm), &function).map_err(doing("hear doorbells"))?;
    let endpoint =
        Endpoint::new(function, dma, || routes.line()).map_err(doing("plug the GPU in"))?;
    let kick = endpoint.function().kicks().first().map(|it| it.offset);
    let plugged = bridge.plug(GPU, Arc::new(endpoint), doorbells);
    plugged.map_err(doing("plug the GPU in"))?;
    let kick = kick.ok_or("the GPU has no kicks")?;
    Ok(place.doorbells + kick)
}

/// Page tables that show the GiB of `ranges` where they are: addresses and entries.
fn page_tables(ranges: impl Iterator<Item = (u64, u64)>) -> Outcome<Vec<(u64, u64)>> {
    let mut gib: Vec<u64> = ranges
        .flat_map(|(base, size)| base / GIB..base.saturating_add(size).div_ceil(GIB))
        .collect();
    gib.sort_unstable();
    gib.dedup();
    if gib.len() > DIRECTORIES || gib.last().is_some_and(|last| *last >= SPAN) {
        return Err(format!(
            "memory in {} GiB up to {:?}: the guest has tables for {DIRECTORIES} below {SPAN}",
            gib.len(),
            gib.last()
        ));
    }
    let (root, next) = (ram::PAGE_TABLES, ram::PAGE_TABLES + 0x1000);
    let mut entries = vec![(root, next | TABLE)];
    for (number, gib) in (1..).zip(gib) {
        let directory = next + 0x1000 * number;
        entries.push((next + 8 * gib, directory | TABLE));
        let pages = (0..512).map(|page| (directory + 8 * page, (gib * GIB + (page << 21)) | PAGE));
        entries.extend(pages);
    }
    Ok(entries)
}

/// The processor, in long mode at the program's first instruction.
fn processor(kvm: &Kvm, vm: &VmFd) -> Outcome<VcpuFd> {
    let vcpu = vm.create_vcpu(0).map_err(doing("make a processor"))?;
    let features = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let features = features.map_err(doing("ask for the processor's features"))?;
    vcpu.set_cpuid2(&features)
        .map_err(doing("set the processor's features"))?;
    let mut special = vcpu.get_sregs().map_err(doing("read registers"))?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 16,
        type_: 3,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..kvm_segment::default()
    };
    special.cs = kvm_segment {
        selector: protocol::CODE_SELECTOR,
        type_: 11,
        l: 1,
        db: 0,
        ..data
    };
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    (special.gdt.base, special.gdt.limit) = (ram::GDT, 3 * 8 - 1);
    // Protection and paging; physical address extension; long mode, enabled and active.
    special.cr0 = 1 << 31 | 1 << 4 | 1;
    special.cr3 = ram::PAGE_TABLES;
    special.cr4 = 1 << 5;
    special.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&special).map_err(doing("set registers"))?;
    let mut general = vcpu.get_regs().map_err(doing("read registers"))?;
    (general.rip, general.rsp, general.rflags) = (ram::CODE, ram::STACK, 2);
    vcpu.set_regs(&general).map_err(doing("set registers"))?;
    Ok(vcpu)
}
