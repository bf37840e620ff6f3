//! The parts for KVM against the host's KVM. What a guest sees of them, `numagpu selftest` shows.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VmFd};
use numagpu_devices::bus::{HbmStore as _, PciFunction};
use numagpu_devices::spec::regs::{self, BootState, OwnerCommand, OwnerState, QueueFault};
use numagpu_devices::spec::table::{Reg, Width};
use numagpu_devices::spec::{pci, sdma};
use numagpu_devices::{Fabric, Gpu, GpuConfig, PartitionConfig};
use numagpu_vmm_glue::hbm::HbmBacking;
use numagpu_vmm_glue::kvm::{
    Decoded, Doorbells, Endpoint, GuestDma, MemorySlots, Message, MessageLine, MsiError, MsiRoutes,
    hbm_region, tracked_hbm_region,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap as _};
use vm_memory::{
    Address as _, Bytes as _, GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic,
    GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap,
};

const MIB: u64 = 1 << 20;
const HBM: u64 = 0x1_4000_0000;

/// A virtual machine with local APICs; none, and a word about it, where the host has no KVM.
fn vm(test: &str) -> Option<Arc<VmFd>> {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("skipped: {test}: no /dev/kvm");
        return None;
    }
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..kvm_enable_cap::default()
    };
    split.args[0] = 24;
    vm.enable_cap(&split).unwrap();
    Some(Arc::new(vm))
}

fn hbm(base: u64) -> GuestRegionMmap {
    hbm_region(base, &HbmBacking::memfd("kvm-test", MIB).unwrap()).unwrap()
}

#[test]
fn the_page_for_vmms_shows_the_example() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("../docs/vmm.md")).unwrap();
    let example = std::fs::read_to_string(root.join("examples/kvm.rs")).unwrap();
    let (_, section) = page.split_once("## The GPUs in your own process").unwrap();
    let blocks = section.split("```rust\n").skip(1);
    let blocks: Vec<&str> = blocks
        .map(|rest| rest.split("```").next().unwrap())
        .collect();
    assert_eq!(blocks.len(), 3);
    for block in blocks {
        assert!(example.contains(block), "not in the example:\n{block}");
    }
}

#[test]
fn the_guest_has_memory_until_it_is_detached() {
    let Some(vm) = vm("the_guest_has_memory_until_it_is_detached") else {
        return;
    };
    let regions = [hbm(HBM), hbm(HBM + MIB)];
    let slots = MemorySlots::attach(&vm, 7, &regions).unwrap();
    let there: Vec<_> = slots
        .slots()
        .iter()
        .map(|slot| (slot.number(), slot.base(), slot.size()))
        .collect();
    assert_eq!(there, [(7, HBM, MIB), (8, HBM + MIB, MIB)]);
    assert_eq!(slots.next_free(), Some(9));
    // Nothing else fits there, and nothing of a refused attempt stays.
    let other = [hbm(0), hbm(HBM + MIB)];
    let refused = MemorySlots::attach(&vm, 20, &other).unwrap_err();
    let wanted = "memory slot 21 at 0x140100000..+0x100000: File exists";
    assert!(refused.to_string().starts_with(wanted), "{refused}");
    drop(MemorySlots::attach(&vm, 20, &other[..1]).unwrap());
    slots.detach();
    drop(MemorySlots::attach(&vm, 20, &other).unwrap());
}

#[test]
fn slots_that_the_host_does_not_have_are_refused_with_numbers() {
    let Some(vm) = vm("slots_that_the_host_does_not_have_are_refused_with_numbers") else {
        return;
    };
    let have = u32::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap();
    let regions = [hbm(HBM), hbm(HBM + MIB)];
    drop(MemorySlots::attach(&vm, have - 2, &regions).unwrap());
    let refused = MemorySlots::attach(&vm, have - 1, &regions).unwrap_err();
    let first = have - 1;
    let wanted = format!("2 memory slot(s) from number {first} on: the host has {have}");
    assert_eq!(refused.to_string(), wanted);
    assert!(MemorySlots::attach(&vm, u32::MAX, &regions).is_err());
    let odd = [hbm(HBM + 1)];
    let refused = MemorySlots::attach(&vm, 0, &odd).unwrap_err();
    let wanted = "memory at 0x140000001..+0x100000: a slot is whole pages of 4096 bytes";
    assert_eq!(refused.to_string(), wanted);
    let wraps = hbm_region(u64::MAX - 5, &HbmBacking::memfd("kvm-test", MIB).unwrap());
    assert!(
        wraps
            .unwrap_err()
            .to_string()
            .ends_with("past the last address")
    );
}

#[test]
fn memory_lives_as_long_as_its_slot_whoever_lets_go_of_it() {
    let Some(vm) = vm("memory_lives_as_long_as_its_slot_whoever_lets_go_of_it") else {
        return;
    };
    let backing = HbmBacking::memfd("kvm-test", MIB).unwrap();
    let mapping = Arc::downgrade(&backing.mapping());
    let region = hbm_region(HBM, &backing).unwrap();
    region
        .write_slice(b"both", vm_memory::MemoryRegionAddress(5))
        .unwrap();
    let mut seen = [0; 4];
    backing
        .slice(5, 4)
        .unwrap()
        .read_slice(&mut seen, 0)
        .unwrap();
    assert_eq!(&seen, b"both");
    let slots = MemorySlots::attach(&vm, 0, [&region]).unwrap();
    drop((backing, region));
    assert!(mapping.upgrade().is_some());
    drop(slots);
    assert!(mapping.upgrade().is_none());
}

#[test]
fn memory_that_is_mapped_for_reading_is_shown_for_reading() {
    let Some(vm) = vm("memory_that_is_mapped_for_reading_is_shown_for_reading") else {
        return;
    };
    let region = vm_memory::mmap::MmapRegionBuilder::<()>::new(4096)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(HBM)).unwrap();
    assert!(MemorySlots::attach(&vm, 0, [&region]).is_ok());
}

#[test]
fn what_a_processor_writes_is_in_the_log_of_kvm_while_that_is_on() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!(
            "skipped: what_a_processor_writes_is_in_the_log_of_kvm_while_that_is_on: no /dev/kvm"
        );
        return;
    }
    // Real mode, from 0x1000 on: mov byte [0x5234], 7; hlt; and again.
    const CODE: [u8; 8] = [0xc6, 0x06, 0x34, 0x52, 7, 0xf4, 0xeb, 0xf8];
    let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
    let mut processor = vm.create_vcpu(0).unwrap();
    let backing = HbmBacking::memfd("kvm-test", MIB).unwrap();
    let region = tracked_hbm_region::<AtomicBitmap>(0, &backing).unwrap();
    let at = vm_memory::MemoryRegionAddress;
    region.write_slice(&CODE, at(0x1000)).unwrap();
    let mut slots = MemorySlots::attach(&vm, 3, [&region]).unwrap();
    let size = usize::try_from(MIB).unwrap();
    let mut special = processor.get_sregs().unwrap();
    (special.cs.base, special.cs.selector) = (0, 0);
    processor.set_sregs(&special).unwrap();
    let mut general = processor.get_regs().unwrap();
    (general.rip, general.rflags) = (0x1000, 2);
    processor.set_regs(&general).unwrap();
    let mut run = || assert!(matches!(processor.run().unwrap(), VcpuExit::Hlt));
    assert!(vm.get_dirty_log(3, size).is_err(), "it is off");
    slots.log_writes(true).unwrap();
    run();
    let mut wanted = vec![0; 4];
    wanted[0] = 1 << 5;
    assert_eq!(vm.get_dirty_log(3, size).unwrap(), wanted);
    wanted[0] = 0;
    assert_eq!(vm.get_dirty_log(3, size).unwrap(), wanted);
    run();
    wanted[0] = 1 << 5;
    assert_eq!(vm.get_dirty_log(3, size).unwrap(), wanted);
    let seen: u8 = region.read_obj(at(0x5234)).unwrap();
    assert_eq!(seen, 7);
    // The bitmap has what the VMM wrote, and not this.
    assert!(region.bitmap().dirty_at(0x1000) && !region.bitmap().dirty_at(0x5000));
    slots.log_writes(false).unwrap();
    run();
    assert!(vm.get_dirty_log(3, size).is_err());
}

#[test]
fn a_line_has_a_number_while_it_lives_and_sends_once_it_has_a_message() {
    let Some(vm) = vm("a_line_has_a_number_while_it_lives_and_sends_once_it_has_a_message") else {
        return;
    };
    let routes = MsiRoutes::new(Arc::clone(&vm), Vec::new(), 24..26).unwrap();
    let (mut first, second) = (routes.line().unwrap(), routes.line().unwrap());
    assert_eq!((first.gsi(), second.gsi()), (24, 25));
    let none = routes.line().err().unwrap();
    assert_eq!(
        none.to_string(),
        "all GSIs 24..26 are in use: a line takes one"
    );
    assert!(!first.send(), "it has no message");
    for data in [0x41, 0x42] {
        let address = 0xfee0_0000;
        first.route(Message { address, data }).unwrap();
        assert!(first.send());
    }
    drop(first);
    assert_eq!(routes.line().unwrap().gsi(), 24);
    let have = vm.check_extension_int(Cap::IrqRouting);
    let have = u32::try_from(have).unwrap();
    let far = MsiRoutes::new(vm, Vec::new(), 24..have + 1).err().unwrap();
    let wanted = format!("GSIs 24..{}: the host routes {have}", have + 1);
    assert_eq!(far.to_string(), wanted);
}

#[test]
fn doorbells_are_heard_where_the_bar_is_and_where_kvm_can() {
    let Some(vm) = vm("doorbells_are_heard_where_the_bar_is_and_where_kvm_can") else {
        return;
    };
    let gpu = Gpu::new(GpuConfig::new(0, Vec::new()), Fabric::new()).unwrap();
    let function: Arc<dyn PciFunction> = gpu;
    let new = || Doorbells::new(Arc::clone(&vm), &function).unwrap().unwrap();
    let mut bells = new();
    assert_eq!(bells.addresses(), [None, None]);
    let bar = |base| Decoded {
        bar: pci::BAR_DOORBELLS,
        base,
        size: pci::BAR_DOORBELLS_SIZE,
    };
    let kick = u64::from(pci::KICK_OFFSET);
    for base in [0xc000_0000, 0xc010_0000] {
        bells.place([bar(base)]);
        let wanted = [Some(base + kick), Some(base + kick + 8)];
        assert_eq!(bells.addresses(), wanted);
    }
    // KVM hears one at each address: the other one's stores exit.
    let mut others = new();
    others.place([bar(0xc010_0000)]);
    assert_eq!(others.addresses(), [None, None]);
    bells.place([]);
    assert_eq!(bells.addresses(), [None, None]);
    others.place([bar(0xc010_0000)]);
    assert_eq!(others.addresses(), [Some(0xc010_0800), Some(0xc010_0808)]);
    drop(others);
    bells.place([bar(0xc010_0000)]);
    assert_eq!(bells.addresses(), [Some(0xc010_0800), Some(0xc010_0808)]);
}

/// Nobody hears of messages.
struct Silent;

impl MessageLine for Silent {
    fn route(&mut self, _: Message) -> Result<(), MsiError> {
        Ok(())
    }

    fn send(&self) -> bool {
        true
    }
}

/// Guest memory with bitmaps and a GPU that works in it: RAM from 0 on, and HBM.
struct Tracked {
    endpoint: Endpoint,
    dma: Arc<GuestDma<AtomicBitmap>>,
}

impl Tracked {
    fn new() -> Tracked {
        let backing = Arc::new(HbmBacking::memfd("kvm-test", MIB).unwrap());
        let ram = HbmBacking::memfd("kvm-ram", MIB).unwrap();
        let regions = vec![
            tracked_hbm_region(0, &ram).unwrap(),
            tracked_hbm_region(HBM, &backing).unwrap(),
        ];
        let memory = GuestMemoryMmap::from_regions(regions).unwrap();
        let partition = PartitionConfig {
            base: HBM,
            size: MIB,
            pxm: Some(1),
            store: backing,
        };
        let config = GpuConfig {
            boot_delay: Duration::ZERO,
            ..GpuConfig::new(0, vec![partition])
        };
        let gpu = Gpu::new(config, Fabric::new()).unwrap();
        let dma = GuestDma::new(GuestMemoryAtomic::new(memory));
        let endpoint = Endpoint::new(gpu, Arc::clone(&dma) as _, || Ok(Silent)).unwrap();
        endpoint.config_write(4, &[0b110]);
        Tracked { endpoint, dma }
    }

    fn write(&self, base: u32, reg: &Reg, value: u64) {
        let width = if reg.width == Width::W8 { 8 } else { 4 };
        let offset = u64::from(base + reg.offset);
        let bar = pci::BAR_REGISTERS;
        self.endpoint
            .bar_write(bar, offset, &value.to_le_bytes()[..width]);
    }

    fn read(&self, base: u32, reg: &Reg) -> u32 {
        let mut data = [0; 4];
        let offset = u64::from(base + reg.offset);
        self.endpoint
            .bar_read(pci::BAR_REGISTERS, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn command(&self, command: OwnerCommand) {
        use regs::partition::{BASE, COMMAND, TOKEN};
        self.write(BASE, &TOKEN, 0x70);
        self.write(BASE, &COMMAND, command.code().into());
    }

    /// First addresses of the pages that are marked; they are not any more then.
    fn take_marked(&self) -> Vec<u64> {
        let memory = self.dma.memory().memory();
        let mut all = Vec::new();
        for region in memory.iter() {
            let pages = (0..region.len()).step_by(4096);
            let dirty = pages.filter(|at| region.bitmap().dirty_at(usize::try_from(*at).unwrap()));
            all.extend(dirty.map(|at| region.start_addr().raw_value() + at));
            (**region).bitmap().reset();
        }
        all
    }

    /// All that is marked until `page` is, which the GPU writes last.
    fn marked_until(&self, page: u64) -> BTreeSet<u64> {
        let mut all = BTreeSet::new();
        let start = Instant::now();
        while !all.contains(&page) {
            assert!(start.elapsed() < Duration::from_secs(10), "{all:x?}");
            all.extend(self.take_marked());
            std::thread::yield_now();
        }
        all
    }
}

#[test]
fn what_a_gpu_writes_is_in_the_bitmaps_of_the_vmm() {
    use regs::queue::{BASE, CONTROL, FAULT_CODE, RING_BASE, RING_SIZE, TOKEN};
    const RING: u64 = 0x1000;
    const SOURCE: u64 = 0x1_0000;
    const FENCE: u64 = 0x2_0ff8;
    let guest = Tracked::new();
    guest.write(
        regs::boot::BASE,
        &regs::boot::CONTROL,
        regs::BOOT_START.into(),
    );
    let start = Instant::now();
    while guest.read(regs::boot::BASE, &regs::boot::STATUS) != BootState::Ready.code() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    guest.command(OwnerCommand::Claim);
    guest.write(BASE, &RING_BASE, RING);
    guest.write(BASE, &RING_SIZE, 4096);
    guest.write(BASE, &TOKEN, 0x70);
    guest.write(BASE, &CONTROL, regs::QUEUE_ENABLE.into());
    // A copy from RAM over a border of pages, a fill of one word, a fence in RAM.
    let packets = [
        &sdma::copy_linear(SOURCE, HBM + 0x3fff, 0x1002)[..],
        &sdma::const_fill(HBM + 0x8000, 5, 4),
        &sdma::fence(FENCE, 1),
    ];
    let words: Vec<u8> = packets
        .concat()
        .iter()
        .flat_map(|it| it.to_le_bytes())
        .collect();
    let memory = guest.dma.memory().memory();
    memory.write_slice(&words, GuestAddress(RING)).unwrap();
    // The VMM marks what it writes itself.
    assert_eq!(guest.take_marked(), [RING]);
    let produced = words.len() as u64;
    let doorbells = pci::BAR_DOORBELLS;
    guest
        .endpoint
        .bar_write(doorbells, 0, &produced.to_le_bytes());
    let fence = FENCE & !0xfff;
    let wanted = [
        fence,
        HBM + 0x3000,
        HBM + 0x4000,
        HBM + 0x5000,
        HBM + 0x8000,
    ];
    let marked = guest.marked_until(fence);
    assert_eq!(guest.read(BASE, &FAULT_CODE), QueueFault::None.code());
    assert_eq!(marked, BTreeSet::from(wanted), "{marked:x?}");
    // Given back, all of it is cleared.
    guest.write(BASE, &CONTROL, 0);
    guest.command(OwnerCommand::Release);
    let start = Instant::now();
    let state = || guest.read(regs::partition::BASE, &regs::partition::STATE);
    while state() != OwnerState::Free.code() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    let all: Vec<u64> = (0..MIB).step_by(4096).map(|at| HBM + at).collect();
    assert_eq!(guest.take_marked(), all);
    drop(memory);
}
