//! Limits, placement, backing, distances.

use super::{Check, HBM_UNIT, would_fit, wrong};
use crate::device::{MAX_CLASS, MAX_QUEUES};
use crate::machine::{BackingKind, Machine};
use crate::size::{GIB, MIB, Size, TIB};

/// Lowest begin of the PCI hole below 4 GiB: kernels and firmware need some RAM below it.
const LOWEST_PCI_HOLE: u64 = 256 * MIB;
/// Highest begin of it: q35 keeps 0xb0000000 to 4 GiB for itself (`hw/i386/pc_q35.c`).
const HIGHEST_PCI_HOLE: u64 = 0xb000_0000;
/// Largest PCI hole behind all memory.
const MAX_PCI_HOLE64: u64 = 512 * TIB;

pub(super) fn check_limits(machine: &Machine) -> Check<()> {
    let bits = &machine.limits.phys_bits;
    if !(36..=52).contains(bits.get_ref()) {
        let message = format!(
            "{} physical address bits; x86-64 has 36 to 52",
            bits.get_ref()
        );
        return Err(wrong(machine, bits, "limits.phys_bits", message, None));
    }
    if let Some(hole) = &machine.limits.pci_hole {
        let allowed = LOWEST_PCI_HOLE..=HIGHEST_PCI_HOLE;
        if !allowed.contains(&hole.get_ref().0) || !hole.get_ref().0.is_multiple_of(HBM_UNIT) {
            let message = format!(
                "{} is not a multiple of 2 MiB from {} to {}",
                hole.get_ref(),
                Size(LOWEST_PCI_HOLE),
                Size(HIGHEST_PCI_HOLE)
            );
            let help =
                Some("the hole ends at 4 GiB; RAM that it displaces goes above that".to_owned());
            return Err(wrong(machine, hole, "limits.pci_hole", message, help));
        }
    }
    if let Some(hole) = &machine.limits.pci_hole64 {
        let needed = crate::plan::pci_hole64_needed(machine);
        let size = hole.get_ref().0;
        if !size.is_multiple_of(GIB) || !(GIB..=MAX_PCI_HOLE64).contains(&size) {
            let message = format!(
                "{} is not a multiple of 1 GiB up to {}",
                hole.get_ref(),
                Size(MAX_PCI_HOLE64)
            );
            return Err(wrong(machine, hole, "limits.pci_hole64", message, None));
        }
        if needed.apertures > 0 && size < needed.bytes {
            let message = format!(
                "{} does not hold {} HBM aperture(s), each aligned to its size",
                hole.get_ref(),
                needed.apertures
            );
            let help = Some(format!("{} would fit", Size(needed.bytes)));
            return Err(wrong(machine, hole, "limits.pci_hole64", message, help));
        }
    }
    let align = &machine.placement.align;
    if !align.get_ref().0.is_power_of_two() || align.get_ref().0 < HBM_UNIT {
        let message = format!("{} is not a power of two from 2 MiB up", align.get_ref());
        let help = Some("2GiB is the default, and satisfies every rule of Linux".to_owned());
        return Err(wrong(machine, align, "placement.align", message, help));
    }
    let gap = &machine.placement.gap;
    if !gap.get_ref().0.is_multiple_of(HBM_UNIT) || gap.get_ref().0 > 1 << 46 {
        let message = format!("{} is not a multiple of 2 MiB up to 64 TiB", gap.get_ref());
        let help =
            Some("2GiB is the default; 0 puts ranges side by side, which OVMF merges".to_owned());
        return Err(wrong(machine, gap, "placement.gap", message, help));
    }
    Ok(())
}

/// The GPUs' PCI functions.
pub(super) fn check_device(machine: &Machine) -> Check<()> {
    let device = &machine.device;
    if let Some(vendor) = device.vendor.as_ref().filter(|it| *it.get_ref() == 0xffff) {
        let message = "0xffff is what a slot without a device answers";
        return Err(wrong(machine, vendor, "device.vendor", message, None));
    }
    if let Some(class) = device.class.as_ref().filter(|it| *it.get_ref() > MAX_CLASS) {
        let message = format!("{:#x} has more than three bytes", class.get_ref());
        let help = Some("0x120000 is a processing accelerator".to_owned());
        return Err(wrong(machine, class, "device.class", message, help));
    }
    if let Some(queues) = &device.queues
        && !(1..=MAX_QUEUES).contains(queues.get_ref())
    {
        let message = format!(
            "{} copy queues; a GPU has 1 to {MAX_QUEUES}",
            queues.get_ref()
        );
        return Err(wrong(machine, queues, "device.queues", message, None));
    }
    Ok(())
}

/// What the HBM is made of on the host.
pub(super) fn check_backing(machine: &Machine) -> Check<()> {
    let backing = &machine.backing;
    let kind = *backing.kind.get_ref();
    if let Some(directory) = &backing.directory {
        if kind != BackingKind::File {
            let message = "is for kind `file` only";
            let help = Some("kind = \"file\", or leave directory out".to_owned());
            return Err(wrong(
                machine,
                directory,
                "backing.directory",
                message,
                help,
            ));
        }
        if directory.get_ref().is_empty() {
            let message = "is empty";
            let help = Some("a directory such as \"/dev/shm\"".to_owned());
            return Err(wrong(
                machine,
                directory,
                "backing.directory",
                message,
                help,
            ));
        }
    }
    let page = match &backing.page {
        None => 2 * MIB,
        Some(page) if kind != BackingKind::Hugetlb => {
            let message = "is for kind `hugetlb` only";
            let help = Some("kind = \"hugetlb\", or leave page out".to_owned());
            return Err(wrong(machine, page, "backing.page", message, help));
        }
        Some(page) if ![2 * MIB, GIB].contains(&page.get_ref().0) => {
            let message = format!("{} is not a huge page of x86-64", page.get_ref());
            let help = Some("2MiB or 1GiB".to_owned());
            return Err(wrong(machine, page, "backing.page", message, help));
        }
        Some(page) => page.get_ref().0,
    };
    for (index, gpu) in machine.gpu.iter().enumerate() {
        let gpu = gpu.get_ref();
        if !gpu.partition_bytes().is_multiple_of(page) {
            let message = format!(
                "partitions of {} are not made of huge pages of {}",
                Size(gpu.partition_bytes()),
                Size(page)
            );
            let key = format!("gpu[{index}].hbm");
            let unit = page.saturating_mul(u64::from(*gpu.partitions.get_ref()));
            let help = would_fit(gpu.hbm.get_ref().0, unit);
            return Err(wrong(machine, &gpu.hbm, key, message, help));
        }
    }
    Ok(())
}

pub(super) fn check_distances(machine: &Machine, nodes: usize) -> Check<()> {
    let distances = &machine.distances;
    let rules = [
        ("cpu_cpu", &distances.cpu_cpu),
        ("cpu_hbm_local", &distances.cpu_hbm_local),
        ("cpu_hbm_remote", &distances.cpu_hbm_remote),
        ("hbm_hbm_same_gpu", &distances.hbm_hbm_same_gpu),
        ("hbm_hbm_linked", &distances.hbm_hbm_linked),
        ("hbm_hbm", &distances.hbm_hbm),
    ];
    for (name, value) in rules {
        if !(11..=255).contains(value.get_ref()) {
            let message = format!("{} is not a distance between nodes", value.get_ref());
            let help = Some(
                "11 to 254, or 255 for what cannot be reached; Linux ignores a table with others"
                    .to_owned(),
            );
            return Err(wrong(
                machine,
                value,
                format!("distances.{name}"),
                message,
                help,
            ));
        }
    }
    let Some(matrix) = &distances.matrix else {
        return Ok(());
    };
    let rows = matrix.get_ref();
    let help = || {
        Some(format!(
            "{nodes} rows of {nodes}: one for each CPU node, memory node and HBM domain, in this order"
        ))
    };
    if rows.len() != nodes {
        let message = format!("has {} row(s) for {nodes} nodes", rows.len());
        return Err(wrong(machine, matrix, "distances.matrix", message, help()));
    }
    if let Some((row, values)) = rows.iter().enumerate().find(|(_, row)| row.len() != nodes) {
        let message = format!("row {row} has {} value(s) for {nodes} nodes", values.len());
        return Err(wrong(machine, matrix, "distances.matrix", message, help()));
    }
    for (from, row) in rows.iter().enumerate() {
        for (to, value) in row.iter().enumerate() {
            let allowed = if from == to { 10..=10 } else { 11..=255 };
            if !allowed.contains(value) {
                let message = format!(
                    "row {from}, column {to} is {value}; it has to be {}",
                    if from == to {
                        "10, a node's distance to itself"
                    } else {
                        "11 to 255"
                    }
                );
                return Err(wrong(machine, matrix, "distances.matrix", message, None));
            }
        }
    }
    Ok(())
}
