//! What Linux makes of the tables.
//!
//! Access classes: see [`access`].
//!
//! Node numbers: Linux gives node numbers to proximity domains in the order in which it first meets them, walking the
//! SRAT twice: first processor and Generic Initiator entries, then memory entries (`drivers/acpi/numa/srat.c`,
//! `acpi_numa_init`, `acpi_map_pxm_to_node`).

pub mod access;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::machine::Driver;
use crate::ranges::Range;

/// How the guest learns of its soft-reserved memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BootPath {
    /// OVMF from edk2-stable202605 on: firmware announces the ranges itself.
    #[default]
    Ovmf,
    /// SeaBIOS, which drops the ranges: `memmap=` arguments announce them, so the kernel is booted directly.
    SeaBios,
    /// qboot, which hands the memory map to the kernel as it is, but sets up no PCI bridges.
    Qboot,
    /// A VMM that loads the kernel itself and hands it the plan's own memory map and ACPI tables.
    Direct,
}

impl BootPath {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            BootPath::Ovmf => "OVMF",
            BootPath::SeaBios => "SeaBIOS with memmap= arguments",
            BootPath::Qboot => "qboot",
            BootPath::Direct => "direct boot",
        }
    }
}

/// A memory entry of the SRAT that QEMU writes for the device-memory window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowEntry {
    /// Proximity domain.
    pub pxm: u32,
    /// Addresses.
    pub range: Range,
    /// Whether it is free window space, which QEMU marks as hot-pluggable memory of the last node.
    pub free: bool,
}

/// The SRAT memory entries that QEMU writes for a device-memory window: one for each HBM range, and what is free
/// between them as memory of the node with the highest number.
pub fn window_entries(window: Range, hbm: &[(u32, Range)], last_pxm: u32) -> Vec<WindowEntry> {
    let mut sorted = hbm.to_vec();
    sorted.sort_by_key(|(_, range)| range.base);
    let mut entries = Vec::new();
    let mut next = window.base;
    let free = |from: u64, to: u64| {
        let range = Range {
            base: from,
            size: to.saturating_sub(from),
        };
        (range.size > 0).then_some(WindowEntry {
            pxm: last_pxm,
            range,
            free: true,
        })
    };
    for (pxm, range) in sorted {
        entries.extend(free(next, range.base));
        entries.push(WindowEntry {
            pxm,
            range,
            free: false,
        });
        next = range.end();
    }
    entries.extend(free(next, window.end()));
    entries
}

/// Linux node numbers by proximity domain, for an SRAT that names domains in this order: processors and Generic
/// Initiators in `first`, memory in `second`.
pub fn node_numbers(
    first: impl IntoIterator<Item = u32>,
    second: impl IntoIterator<Item = u32>,
) -> BTreeMap<u32, u32> {
    let mut nodes = BTreeMap::new();
    for pxm in first.into_iter().chain(second) {
        let next = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
        nodes.entry(pxm).or_insert(next);
    }
    nodes
}

/// Kernel arguments that the guest needs, without those of its console.
///
/// `dax_hmem.region_idle=1` makes dax devices that no driver owns: without it, kernels from 6.3 on hand HBM to `kmem`,
/// and it becomes the guest's ordinary memory. For a kernel driver, `device_hmem.disable=1` makes no dax device.
pub fn command_line(boot: BootPath, driver: Driver, hbm: &[Range]) -> Vec<String> {
    let mut arguments = Vec::new();
    if boot == BootPath::SeaBios {
        arguments.extend(hbm.iter().map(|range| {
            format!(
                "memmap={:#x}%{:#x}+{:#x}",
                range.size,
                range.base,
                crate::E820_SOFT_RESERVED
            )
        }));
    }
    let argument = match driver {
        Driver::User => "dax_hmem.region_idle=1",
        Driver::Kernel => "device_hmem.disable=1",
    };
    // Without soft-reserved memory there is nothing that kmem could take.
    arguments.extend((!hbm.is_empty()).then(|| argument.to_owned()));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::GIB;

    fn hbm(pxms: &[u32]) -> Vec<(u32, Range)> {
        pxms.iter()
            .enumerate()
            .map(|(i, pxm)| {
                (
                    *pxm,
                    Range {
                        base: (4 + 2 * i as u64) * GIB,
                        size: GIB,
                    },
                )
            })
            .collect()
    }

    /// Measured: three ranges with gaps on nodes 1, 2, 3 at ascending addresses became nodes 1, 3, 2.
    #[test]
    fn gaps_make_linux_meet_the_last_node_early() {
        let window = Range {
            base: 4 * GIB,
            size: 6 * GIB,
        };
        let numbers = |pxms: &[u32]| {
            let entries = window_entries(window, &hbm(pxms), 3);
            node_numbers(
                [0, 0],
                std::iter::once(0).chain(entries.iter().map(|entry| entry.pxm)),
            )
        };
        assert_eq!(
            numbers(&[1, 2, 3]).into_values().collect::<Vec<_>>(),
            [0, 1, 3, 2]
        );
        // The cure: the first range on the highest node, the others ascending.
        let cured = numbers(&[3, 1, 2]);
        assert_eq!([cured[&3], cured[&1], cured[&2]], [1, 2, 3]);
    }

    #[test]
    fn generic_initiators_count_before_memory() {
        let entries = window_entries(
            Range {
                base: 4 * GIB,
                size: 4 * GIB,
            },
            &hbm(&[2, 1]),
            2,
        );
        let nodes = node_numbers([0, 2, 1], entries.iter().map(|entry| entry.pxm));
        assert_eq!([nodes[&0], nodes[&2], nodes[&1]], [0, 1, 2]);
    }

    #[test]
    fn seabios_gets_one_argument_for_each_range() {
        let ranges = [
            Range {
                base: 4 * GIB,
                size: GIB,
            },
            Range {
                base: 6 * GIB,
                size: GIB,
            },
        ];
        assert_eq!(
            command_line(BootPath::SeaBios, Driver::User, &ranges),
            [
                "memmap=0x40000000%0x100000000+0xefffffff",
                "memmap=0x40000000%0x180000000+0xefffffff",
                "dax_hmem.region_idle=1"
            ]
        );
        assert_eq!(
            command_line(BootPath::Ovmf, Driver::Kernel, &ranges),
            ["device_hmem.disable=1"]
        );
    }
}
