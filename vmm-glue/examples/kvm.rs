//! How a VMM of one's own that runs on KVM takes a plan's GPUs into its process: HBM in memory slots, functions on a host
//! bridge, messages by irqfd, kicks by ioeventfd.
//!
//!     cargo run -p numagpu-vmm-glue --example kvm -- two-gpu
//!
//! It makes the machine and shows it; there is no processor in it. `numagpu selftest` runs a guest in such a one.

use std::error::Error;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use numagpu_devices::bus::PciFunction;
use numagpu_devices::ownership::OnDisconnect;
use numagpu_topology::{MachineError, Plan, parse, plan, preset};
use numagpu_vmm_glue::hbm::HbmBacking;
use numagpu_vmm_glue::instance::Gpus;
use numagpu_vmm_glue::kvm::{
    Bdf, Doorbells, Endpoint, GuestDma, HostBridge, MemorySlots, MsiRoutes, hbm_region,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory as planned, RAM and HBM, in slots from number `first` on.
pub fn memory(
    vm: &Arc<VmFd>,
    first: u32,
    plan: &Plan,
    gpus: &Gpus,
) -> Result<(GuestMemoryMmap, MemorySlots), Box<dyn Error>> {
    let mut regions = Vec::new();
    for range in plan.ram_whole() {
        let ram = HbmBacking::memfd("ram", range.size)?;
        regions.push(hbm_region(range.base, &ram)?);
    }
    for (base, hbm) in gpus.memory() {
        regions.push(hbm_region(base, hbm)?);
    }
    let slots = MemorySlots::attach(vm, first, &regions)?;
    Ok((GuestMemoryMmap::from_regions(regions)?, slots))
}

/// Plugs every GPU into a bridge, each as a device of bus 0.
pub fn plug(
    vm: &Arc<VmFd>,
    bridge: &HostBridge,
    gpus: &Gpus,
    memory: GuestMemoryMmap,
) -> Result<(), Box<dyn Error>> {
    let dma = GuestDma::new(GuestMemoryAtomic::new(memory));
    // The numbers behind those of an I/O APIC; its own entries would go where the empty list is.
    let routes = MsiRoutes::new(Arc::clone(vm), Vec::new(), 24..1024)?;
    for (device, gpu) in (1..).zip(gpus.gpus()) {
        let function: Arc<dyn PciFunction> = Arc::clone(gpu) as _;
        let doorbells = Doorbells::new(Arc::clone(vm), &function)?;
        let endpoint = Endpoint::new(function, Arc::clone(&dma) as _, || routes.line())?;
        let place = Bdf {
            bus: 0,
            device,
            function: 0,
        };
        bridge.plug(place, Arc::new(endpoint), doorbells)?;
    }
    Ok(())
}

/// One exit of a processor; false for one that is not the GPUs'.
pub fn exit(bridge: &HostBridge, exit: &mut kvm_ioctls::VcpuExit<'_>) -> bool {
    bridge.answer(exit)
}

fn planned(name: &str) -> Result<Plan, MachineError> {
    let source = preset::find(name).map_or("", |preset| preset.source);
    plan(&parse(name, source)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1);
    let plan = planned(name.as_deref().unwrap_or("two-gpu"))?;
    let vm = Arc::new(Kvm::new()?.create_vm()?);
    vm.create_irq_chip()?;
    let gpus = Gpus::new(&plan, None, OnDisconnect::Scrub)?;
    let (memory, slots) = memory(&vm, 0, &plan, &gpus)?;
    let bridge = HostBridge::new(numagpu_vmm_glue::kvm::Windows {
        ecam: 0xe000_0000,
        buses: 1,
        memory: vec![numagpu_topology::ranges::Range {
            base: 0xc000_0000,
            size: 0x1000_0000,
        }],
    })?;
    plug(&vm, &bridge, &gpus, memory)?;
    for slot in slots.slots() {
        println!("{slot:?}");
    }
    for device in 0..32_u64 {
        let mut ids = [0; 4];
        bridge.read(bridge.windows().ecam + (device << 15), &mut ids);
        if ids != [0xff; 4] {
            let [v0, v1, d0, d1] = ids;
            println!("00:{device:02x}.0: {v1:02x}{v0:02x}:{d1:02x}{d0:02x}");
        }
    }
    Ok(())
}
