//! The parts for KVM against the host's KVM. What a guest sees of them, `numagpu selftest` shows.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VmFd};
use numagpu_devices::bus::{HbmStore as _, PciFunction};
use numagpu_devices::spec::pci;
use numagpu_devices::{Fabric, Gpu, GpuConfig};
use numagpu_vmm_glue::hbm::HbmBacking;
use numagpu_vmm_glue::kvm::{
    Decoded, Doorbells, MemorySlots, Message, MessageLine as _, MsiRoutes, hbm_region,
};
use vm_memory::{Bytes as _, GuestAddress, GuestRegionMmap};

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
    let region = vm_memory::mmap::MmapRegionBuilder::new(4096)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(HBM)).unwrap();
    assert!(MemorySlots::attach(&vm, 0, [&region]).is_ok());
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
