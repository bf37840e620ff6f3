//! What a VMM that loads Linux itself makes of a plan: memory slots, zero page, ACPI tables, kernel arguments.
//!
//!     cargo run -p numagpu-topology --example direct_boot -- frontier-node

use std::error::Error;

use numagpu_topology::acpi::{self, Table};
use numagpu_topology::linux::{self, BootPath};
use numagpu_topology::{MachineError, Plan, memory_map, parse, plan, preset};

/// A range of guest memory, and the file that it is made of; RAM has none of its own.
#[derive(Debug)]
pub struct Slot {
    /// Guest physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Name of the file, shared with the process that serves the GPU.
    pub file: Option<String>,
}

/// Memory slots: RAM, soft-reserved HBM, and HBM behind a BAR at the planned address of that BAR.
pub fn slots(plan: &Plan) -> Vec<Slot> {
    let ram = plan.ram_whole().into_iter().map(|range| Slot {
        base: range.base,
        size: range.size,
        file: None,
    });
    // One file for each soft-reserved range, one for all partitions behind a BAR.
    let hbm = plan.gpus.iter().flat_map(|gpu| {
        let files = Plan::hbm_files(gpu).into_iter();
        gpu.hbm.iter().zip(files).map(|(hbm, (name, size))| Slot {
            base: hbm.base,
            size,
            file: Some(name),
        })
    });
    ram.chain(hbm).collect()
}

/// The zero page with its memory map, and what goes to `list`, if anything: entries that the page does not hold.
pub fn zero_page(plan: &Plan, list: u64) -> Result<(Vec<u8>, Vec<u8>), Box<dyn Error>> {
    let params = memory_map::boot_params(plan);
    let mut page = vec![0; 4096];
    params.write(&mut page)?;
    let rest = params.setup_data(0).unwrap_or_default();
    if !rest.is_empty() {
        // setup_header.setup_data, the head of a linked list.
        let head = page.get_mut(0x250..0x258).ok_or("a short page")?;
        head.copy_from_slice(&list.to_le_bytes());
    }
    Ok((page, rest))
}

/// The plan's tables from an address on; the addresses go into the XSDT beside the VMM's own tables.
pub fn tables(plan: &Plan, mut base: u64) -> Vec<(u64, Table)> {
    let mut placed = Vec::new();
    for table in acpi::tables(plan) {
        let next = (base + table.bytes.len() as u64).next_multiple_of(16);
        placed.push((base, table));
        base = next;
    }
    placed
}

/// Kernel arguments that keep HBM out of the page allocator.
pub fn arguments(plan: &Plan) -> String {
    linux::command_line(BootPath::Direct, plan.guest.driver, &plan.hbm_ranges()).join(" ")
}

/// A plan from a preset's name.
pub fn load(name: &str) -> Result<Plan, MachineError> {
    let source = preset::find(name).map_or("", |preset| preset.source);
    plan(&parse(name, source)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1);
    let plan = load(name.as_deref().unwrap_or("two-gpu"))?;
    for slot in slots(&plan) {
        let file = slot.file.as_deref().unwrap_or("RAM");
        println!("slot {:#x} + {:#x}: {file}", slot.base, slot.size);
    }
    let (page, rest) = zero_page(&plan, 0x8000)?;
    let (bytes, more) = (page.len(), rest.len());
    println!("zero page of {bytes} bytes, {more} bytes more");
    for (address, table) in tables(&plan, 0xa_0000) {
        let bytes = table.bytes.len();
        println!("{} at {address:#x}, {bytes} bytes", table.signature);
    }
    println!("arguments: {}", arguments(&plan));
    Ok(())
}
