//! Addresses: where RAM and HBM are.

use std::collections::BTreeMap;

use super::{Aperture, E820Entry, NodeRange, partitions};
use crate::error::MachineError;
use crate::machine::{Exposure, Gpu, Machine};
use crate::platform::{self, Holes};
use crate::ranges::{Range, Space};
use crate::size::{GIB, Size};
use crate::validate::{self, wrong};
use crate::{E820_RAM, E820_RESERVED, E820_SOFT_RESERVED};

/// RAM and the window's start, the window, and every soft-reserved HBM range in order.
type Placed = (platform::Layout, Range, Vec<Range>);

/// Bytes of one partition of a GPU.
fn partition_size(machine: &Machine, gpu: usize) -> u64 {
    let gpu = machine.gpu.get(gpu);
    gpu.map_or(0, |gpu| gpu.get_ref().partition_bytes())
}

/// What the 64-bit PCI hole has to hold.
pub(crate) struct Hole64 {
    /// HBM apertures.
    pub apertures: usize,
    /// Bytes that suffice wherever the hole begins.
    pub bytes: u64,
}

/// What the 64-bit PCI hole has to hold: the apertures, room to align the largest, and what q35 has without any.
pub(crate) fn pci_hole64_needed(machine: &Machine) -> Hole64 {
    let sizes = machine
        .gpu
        .iter()
        .filter_map(|gpu| gpu.get_ref().aperture_bytes());
    let largest = sizes.clone().max().unwrap_or(0);
    let sum = sizes.clone().fold(0, u64::saturating_add);
    let bytes = sum.saturating_add(largest);
    Hole64 {
        apertures: sizes.count(),
        bytes: bytes
            .saturating_add(platform::PCI_HOLE64)
            .checked_next_multiple_of(GIB)
            .unwrap_or(u64::MAX),
    }
}

/// The machine's holes.
pub(super) fn holes(machine: &Machine) -> Holes {
    let limits = &machine.limits;
    let wanted = limits.pci_hole64.as_ref().map(|size| size.get_ref().0);
    Holes {
        below_4g: limits.pci_hole.as_ref().map(|size| size.get_ref().0),
        pci_hole64: wanted.unwrap_or_else(|| pci_hole64_needed(machine).bytes),
        amd: limits.amd_hole,
    }
}

/// Where the apertures are for a VMM that places BARs itself: the largest first from the begin of the 64-bit PCI hole, each
/// aligned to its size. Firmware that places BARs need not agree. The hole is below AMD's range or behind it, never across:
/// see [`Holes::layout`].
pub(super) fn apertures(machine: &Machine, window: Range) -> Vec<Option<Aperture>> {
    let mut apertures: Vec<Option<Aperture>> = machine.gpu.iter().map(|_| None).collect();
    let mut sizes: Vec<(usize, u64)> = machine
        .gpu
        .iter()
        .enumerate()
        .filter_map(|(index, gpu)| Some((index, gpu.get_ref().aperture_bytes()?)))
        .collect();
    sizes.sort_by_key(|(index, size)| (std::cmp::Reverse(*size), *index));
    let mut next = window.end().next_multiple_of(GIB);
    for (index, size) in sizes {
        next = next.checked_next_multiple_of(size).unwrap_or(next);
        if let Some(slot) = apertures.get_mut(index) {
            *slot = Some(Aperture { base: next, size });
        }
        next = next.saturating_add(size);
    }
    apertures
}

/// HBM of a GPU that is not soft reserved: partitions from the start of its aperture, or its part of a node's RAM.
pub(super) fn other_hbm(
    machine: &Machine,
    gpu: usize,
    aperture: Option<&Aperture>,
    ram: &[NodeRange],
) -> Vec<Range> {
    let Some(described) = machine.gpu.get(gpu).map(toml::Spanned::get_ref) else {
        return Vec::new();
    };
    if let Some(aperture) = aperture {
        let size = described.partition_bytes();
        return (0..u64::from(*described.partitions.get_ref()))
            .map(|partition| Range {
                base: aperture.base.saturating_add(partition.saturating_mul(size)),
                size,
            })
            .collect();
    }
    let node = *described.cpu.get_ref();
    // Behind the node's own RAM and what GPUs before this one bring.
    let own = machine
        .cpu
        .get(node)
        .map_or(0, |n| n.get_ref().own_memory());
    let before = machine.gpu.iter().take(gpu).map(toml::Spanned::get_ref);
    let mut skip = before
        .filter(|other| brings_ram(other, node))
        .fold(own, |sum, other| sum.saturating_add(other.hbm.get_ref().0));
    let mut left = described.hbm.get_ref().0;
    let mut ranges = Vec::new();
    for range in ram
        .iter()
        .filter(|range| usize::try_from(range.pxm) == Ok(node))
    {
        let skipped = skip.min(range.size);
        skip -= skipped;
        let size = (range.size - skipped).min(left);
        left -= size;
        if size > 0 {
            ranges.push(Range {
                base: range.base + skipped,
                size,
            });
        }
    }
    ranges
}

/// Whether a GPU's HBM is RAM of this CPU node.
fn brings_ram(gpu: &Gpu, node: usize) -> bool {
    *gpu.exposure.get_ref() == Exposure::Ram && *gpu.cpu.get_ref() == node
}

/// Bytes of RAM of every node that has some: CPU nodes, then memory nodes.
pub(super) fn ram_of_nodes(machine: &Machine) -> Vec<u64> {
    let mut bytes: Vec<u64> = machine
        .cpu
        .iter()
        .map(|node| node.get_ref().own_memory())
        .collect();
    for gpu in machine.gpu.iter().map(toml::Spanned::get_ref) {
        if *gpu.exposure.get_ref() == Exposure::Ram
            && let Some(node) = bytes.get_mut(*gpu.cpu.get_ref())
        {
            *node = node.saturating_add(gpu.hbm.get_ref().0);
        }
    }
    let memory = machine.memory.iter();
    bytes.extend(memory.map(|node| node.get_ref().memory.get_ref().0));
    bytes
}

/// Places RAM and HBM.
///
/// q35 puts RAM and the window beyond the HyperTransport range where they would reach it, which depends on the size of
/// the window. So HBM is placed with everything low first, and if that reaches too far, again with everything high.
pub(super) fn place(machine: &Machine, ram: u64) -> Result<Placed, MachineError> {
    let holes = holes(machine);
    let at = |window: u64| -> Result<Placed, MachineError> {
        let layout = holes.layout(ram, window).map_err(|error| {
            machine
                .text
                .error(0, "cpu", format!("RAM does not fit: {error}"), None)
        })?;
        let placed = place_hbm(machine, layout.window_base)?;
        let ends = placed.iter().map(Range::end);
        let size = ends.max().unwrap_or(layout.window_base) - layout.window_base;
        let range = Range {
            base: layout.window_base,
            size,
        };
        Ok((layout, range, placed))
    };
    let settled = |(layout, window, _): &Placed| {
        holes
            .layout(ram, window.size)
            .is_ok_and(|again| again == *layout)
    };
    let low = at(0)?;
    let (layout, window, placed) = if settled(&low) {
        low
    } else {
        let base = low.1.base;
        let mut high = at(low.1.size)?;
        if !settled(&high) {
            // HBM fits in less than what makes q35 move it there, so the window is as large as that takes.
            high.1.size = high.1.size.max(holes.moving_window(base));
        }
        high
    };
    check_bits(machine, ram, window, &placed)?;
    Ok((layout, window, placed))
}

fn place_hbm(machine: &Machine, window_base: u64) -> Result<Vec<Range>, MachineError> {
    let align = machine.placement.align.get_ref().0;
    let gap = machine.placement.gap.get_ref().0;
    let mut space = Space::new(1 << 52);
    let mut fixed: Vec<(usize, Range)> = Vec::new();
    // The same by address, so that only the last one below a range's end has to be looked at.
    let mut by_base: BTreeMap<u64, Range> = BTreeMap::new();
    let around = |range: Range| Range {
        base: range.base.saturating_sub(gap),
        size: range
            .size
            .saturating_add(gap)
            .saturating_add(range.base.min(gap)),
    };
    let all = partitions(machine);
    for (gpu, partition) in &all {
        let Some(base) = machine
            .gpu
            .get(*gpu)
            .and_then(|gpu| gpu.get_ref().base.as_ref())
        else {
            continue;
        };
        let key = format!("gpu[{gpu}].base");
        let size = partition_size(machine, *gpu);
        let stride = size
            .saturating_add(gap)
            .checked_next_multiple_of(align)
            .unwrap_or(u64::MAX);
        let offset = stride.saturating_mul(*partition as u64);
        let range = Range {
            base: base.get_ref().0.saturating_add(offset),
            size,
        };
        if !base.get_ref().0.is_multiple_of(validate::HBM_UNIT) {
            let message = format!("{:#x} is not a multiple of 2 MiB", base.get_ref().0);
            let help = validate::would_fit(base.get_ref().0, validate::HBM_UNIT);
            return Err(wrong(machine, base, key, message, help));
        }
        let what = match *partition {
            0 => String::new(),
            partition => format!("partition {partition} at "),
        };
        let what = format!("{what}{:#x}..{:#x}", range.base, range.end());
        if range.base < window_base {
            let message = format!("{what} is below {window_base:#x}, where device memory starts");
            let why = if window_base < platform::AMD_HT.end() || !machine.limits.amd_hole {
                "RAM and the PCI hole below 4 GiB end there"
            } else {
                "the machine reaches AMD's HyperTransport range, so that RAM above 4 GiB and all HBM go behind it"
            };
            let lowest = Size(window_base).to_string().replace(' ', "");
            let help = Some(format!(
                "{why}; base = \"{lowest}\" is the lowest that fits"
            ));
            return Err(wrong(machine, base, key, message, help));
        }
        if range.end() > 1 << 52 {
            let message = format!("{what} is beyond the 52 address bits of x86-64");
            let help = Some(format!("the last address is {:#x}", (1u64 << 52) - 1));
            return Err(wrong(machine, base, key, message, help));
        }
        if machine.limits.amd_hole && range.overlaps(&platform::AMD_HT) {
            let message =
                format!("{what} reaches into the range that AMD's HyperTransport reserves");
            let help = Some(format!(
                "{:#x}..{:#x} is not memory; {:#x} is the first address behind it",
                platform::AMD_HT.base,
                platform::AMD_HT.end(),
                platform::AMD_HT.end()
            ));
            return Err(wrong(machine, base, key, message, help));
        }
        let wanted = around(range);
        let below = by_base.range(..wanted.end()).next_back();
        if let Some((other, taken)) = below
            .filter(|(_, taken)| wanted.overlaps(taken))
            // Of several it is the first in the description that is named.
            .and_then(|_| fixed.iter().find(|(_, taken)| wanted.overlaps(taken)))
        {
            let clash = if range.overlaps(taken) {
                "overlaps".to_owned()
            } else {
                format!("is less than {} away from", Size(gap))
            };
            let message = format!(
                "{what} {clash} gpu[{other}]'s {:#x}..{:#x}",
                taken.base,
                taken.end()
            );
            let help = Some(format!(
                "{:#x} is the first address behind it and placement.gap",
                taken.end().saturating_add(gap)
            ));
            return Err(wrong(machine, base, key, message, help));
        }
        fixed.push((*gpu, range));
        by_base.insert(range.base, range);
    }
    for (_, range) in &fixed {
        space.reserve(around(*range));
    }
    if machine.limits.amd_hole {
        space.reserve(platform::AMD_HT);
    }
    let mut next_fixed = fixed.iter();
    let mut placed = Vec::new();
    let mut from = window_base;
    for (gpu, _) in &all {
        if machine
            .gpu
            .get(*gpu)
            .is_some_and(|gpu| gpu.get_ref().base.is_some())
        {
            placed.extend(next_fixed.next().map(|(_, range)| *range));
            continue;
        }
        let size = partition_size(machine, *gpu);
        // The first range starts where the window does, whatever the alignment: a gap before it would cost it its
        // node number (see `linux::window_entries`). The window is aligned to 1 GiB.
        let start = Range {
            base: window_base,
            size,
        };
        let align = if from == window_base && space.is_free(start) {
            align.min(GIB)
        } else {
            align
        };
        let range = space
            .place(size, align, from)
            .map_err(|error| no_room(machine, *gpu, &error.to_string()))?;
        space.reserve(around(range));
        from = range.end();
        placed.push(range);
    }
    Ok(placed)
}

fn no_room(machine: &Machine, gpu: usize, message: &str) -> MachineError {
    let offset = machine
        .gpu
        .get(gpu)
        .map_or(0, |gpu| gpu.get_ref().hbm.span().start);
    let help = "less HBM, or a smaller placement.align or placement.gap".to_owned();
    machine
        .text
        .error(offset, format!("gpu[{gpu}].hbm"), message, Some(help))
}

/// Whether all of it is within the guest's address bits. If not, the key to change is a `base` that is beyond, or the
/// first HBM that is, or the bits themselves where RAM alone needs more.
fn check_bits(
    machine: &Machine,
    ram: u64,
    window: Range,
    placed: &[Range],
) -> Result<(), MachineError> {
    let bits = *machine.limits.phys_bits.get_ref();
    let holes = holes(machine);
    let used = holes.used_end(window.end());
    if used <= 1u64 << bits {
        return Ok(());
    }
    let needed = 64 - (used - 1).leading_zeros();
    let beyond = |end: u64| holes.used_end(end) > 1u64 << bits;
    let ram_alone = holes
        .layout(ram, 0)
        .is_ok_and(|low| beyond(low.window_base));
    let all: Vec<_> = partitions(machine)
        .into_iter()
        .zip(placed)
        .filter(|(_, range)| beyond(range.end()) && !ram_alone)
        .filter_map(|((index, _), _)| Some((index, machine.gpu.get(index)?.get_ref())))
        .collect();
    let fixed = all.iter().find(|(_, gpu)| gpu.base.is_some());
    let first_beyond = fixed.or(all.first());
    let (offset, key) = match first_beyond {
        Some((index, gpu)) => match &gpu.base {
            Some(base) => (base.span().start, format!("gpu[{index}].base")),
            None => (gpu.hbm.span().start, format!("gpu[{index}].hbm")),
        },
        None => (
            machine.limits.phys_bits.span().start,
            "limits.phys_bits".to_owned(),
        ),
    };
    let hbm: u64 = placed.iter().map(|range| range.size).sum();
    Err(machine.text.error(
        offset,
        key,
        format!(
            "RAM, {} of HBM in {} range(s) and the PCI window of {} behind them end at {used:#x}, but {bits} address bits end at {:#x}",
            Size(hbm),
            placed.len(),
            Size(holes.pci_hole64),
            1u64 << bits
        ),
        Some(if needed <= 52 {
            format!("limits.phys_bits = {needed} would fit")
        } else {
            "no x86-64 machine has that many address bits".to_owned()
        }),
    ))
}

/// Gives RAM to the nodes in order, as QEMU does.
pub(super) fn assign_ram(bytes: &[u64], ram: &[Range]) -> Vec<NodeRange> {
    let mut pieces = ram.iter().copied();
    let mut piece = pieces.next();
    let mut assigned = Vec::new();
    for (pxm, bytes) in (0u32..).zip(bytes) {
        let mut left = *bytes;
        while let Some(range) = piece.filter(|_| left > 0) {
            let size = range.size.min(left);
            assigned.push(NodeRange {
                pxm,
                base: range.base,
                size,
            });
            left -= size;
            let rest = Range {
                base: range.base + size,
                size: range.size - size,
            };
            piece = if rest.size > 0 {
                Some(rest)
            } else {
                pieces.next()
            };
        }
    }
    assigned
}

/// The memory map: RAM around the legacy hole, and HBM.
pub(super) fn e820(ram: &[Range], hbm: &[Range]) -> Vec<E820Entry> {
    let entry = |range: Range, kind: u32| E820Entry {
        base: range.base,
        size: range.size,
        kind,
    };
    let mut entries = vec![entry(platform::LEGACY_HOLE, E820_RESERVED)];
    for range in ram {
        let hole = platform::LEGACY_HOLE;
        if range.contains(&hole) {
            entries.push(entry(
                Range {
                    base: range.base,
                    size: hole.base - range.base,
                },
                E820_RAM,
            ));
            entries.push(entry(
                Range {
                    base: hole.end(),
                    size: range.end() - hole.end(),
                },
                E820_RAM,
            ));
        } else {
            entries.push(entry(*range, E820_RAM));
        }
    }
    entries.extend(hbm.iter().map(|range| entry(*range, E820_SOFT_RESERVED)));
    entries.retain(|entry| entry.size > 0);
    entries.sort_by_key(|entry| entry.base);
    entries
}

#[cfg(test)]
mod tests {
    use crate::size::GIB;
    use crate::{Plan, parse, plan, platform};

    fn planned(memory: &str, gpus: &str, placement: &str) -> Plan {
        let text = format!(
            "name = \"m\"\n[limits]\nphys_bits = 46\n[placement]\n{placement}\n\
             [[cpu]]\ncpus = 1\nmemory = \"{memory}\"\n{gpus}"
        );
        plan(&parse("m.toml", &text).unwrap()).unwrap()
    }

    fn gpu(hbm: &str, more: &str) -> String {
        format!("[[gpu]]\nhbm = \"{hbm}\"\ncpu = 0\n{more}\n")
    }

    fn bases(plan: &Plan) -> Vec<u64> {
        plan.hbm().map(|hbm| hbm.base / GIB).collect()
    }

    /// q35 goes by the window's size, so a small window has to be made as large as what moves it.
    #[test]
    fn a_base_at_one_tib_takes_a_window_that_q35_puts_there() {
        let plan = planned("1GiB", &gpu("4GiB", "base = \"1TiB\""), "");
        assert_eq!(bases(&plan), [1024]);
        assert_eq!(plan.window.base, 1 << 40);
        let layout = platform::Holes::default()
            .layout(GIB, plan.window.size)
            .unwrap();
        assert_eq!(layout.window_base, plan.window.base);
    }

    #[test]
    fn hbm_that_needs_less_room_above_the_hole_than_below_still_moves() {
        let gpus = gpu("255GiB", "").repeat(3);
        let plan = planned("1GiB", &gpus, "align = \"256GiB\"\ngap = \"1GiB\"");
        assert_eq!(bases(&plan), [1024, 1280, 1536]);
        let layout = platform::Holes::default()
            .layout(GIB, plan.window.size)
            .unwrap();
        assert_eq!(layout.window_base, plan.window.base);
    }

    #[test]
    fn only_the_range_at_the_windows_start_is_off_its_alignment() {
        let align = "align = \"4GiB\"";
        // 3 GiB of RAM: the window starts at 5 GiB.
        let plan = planned("3GiB", &gpu("4GiB", "").repeat(2), align);
        assert_eq!(bases(&plan), [5, 12]);
        let gpus = gpu("4GiB", "base = \"5GiB\"") + &gpu("4GiB", "");
        assert_eq!(bases(&planned("3GiB", &gpus, align)), [5, 12]);
    }

    #[test]
    fn partitions_of_a_fixed_gpu_follow_their_base() {
        let gpus = gpu("4GiB", "base = \"100GiB\"\npartitions = 2") + &gpu("4GiB", "");
        assert_eq!(bases(&planned("1GiB", &gpus, "")), [100, 104, 4]);
    }
}
