//! Addresses: where RAM and HBM are.

use super::{E820Entry, NodeRange, partition_size, partitions};
use crate::error::MachineError;
use crate::machine::Machine;
use crate::platform;
use crate::ranges::{Range, Space};
use crate::size::Size;
use crate::validate::{self, wrong};
use crate::{E820_RAM, E820_RESERVED, E820_SOFT_RESERVED};

/// RAM and the window's start, the window, and every HBM range in order.
type Placed = (platform::Layout, Range, Vec<Range>);

/// Places RAM and HBM: the platform's RAM layout depends on how much is above it, so placement is tried with the
/// window's smallest size first and again if that moved it.
pub(super) fn place(machine: &Machine, ram: u64) -> Result<Placed, MachineError> {
    let mut window = 0;
    loop {
        let layout = platform::layout(ram, window).map_err(|error| {
            machine
                .text
                .error(0, "cpu", format!("RAM does not fit: {error}"), None)
        })?;
        let placed = place_hbm(machine, layout.window_base)?;
        let end = placed
            .iter()
            .map(Range::end)
            .max()
            .unwrap_or(layout.window_base);
        if end - layout.window_base <= window
            || platform::layout(ram, end - layout.window_base).as_ref() == Ok(&layout)
        {
            let range = Range {
                base: layout.window_base,
                size: end - layout.window_base,
            };
            check_bits(machine, range, &placed)?;
            return Ok((layout, range, placed));
        }
        window = end - layout.window_base;
    }
}

fn place_hbm(machine: &Machine, window_base: u64) -> Result<Vec<Range>, MachineError> {
    let align = machine.placement.align.get_ref().0;
    let gap = machine.placement.gap.get_ref().0;
    let mut space = Space::new(1 << 52);
    let mut fixed: Vec<(usize, Range)> = Vec::new();
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
            return Err(wrong(machine, base, key, message, None));
        }
        if range.base < window_base || range.end() > 1 << 52 {
            let message = format!(
                "{:#x}..{:#x} is not in {window_base:#x}..{:#x}",
                range.base,
                range.end(),
                1u64 << 52
            );
            let help = Some(format!(
                "RAM and the PCI hole below 4 GiB end at {window_base:#x} ({})",
                Size(window_base)
            ));
            return Err(wrong(machine, base, key, message, help));
        }
        if range.overlaps(&platform::AMD_HT) {
            let message = format!(
                "{:#x}..{:#x} reaches into the range that AMD's HyperTransport reserves",
                range.base,
                range.end()
            );
            let help = Some(format!(
                "{:#x}..{:#x} is not memory",
                platform::AMD_HT.base,
                platform::AMD_HT.end()
            ));
            return Err(wrong(machine, base, key, message, help));
        }
        for (other, taken) in &fixed {
            if range.overlaps(taken) {
                let message = format!(
                    "{:#x}..{:#x} overlaps gpu[{other}]'s {:#x}..{:#x}",
                    range.base,
                    range.end(),
                    taken.base,
                    taken.end()
                );
                let help = Some(format!(
                    "{:#x} is the first address behind it and its gap",
                    taken.end().saturating_add(gap)
                ));
                return Err(wrong(machine, base, key, message, help));
            }
            if around(range).overlaps(taken) {
                let message = format!(
                    "{:#x}..{:#x} is less than {} away from gpu[{other}]'s {:#x}..{:#x}",
                    range.base,
                    range.end(),
                    Size(gap),
                    taken.base,
                    taken.end()
                );
                return Err(wrong(machine, base, key, message, None));
            }
        }
        fixed.push((*gpu, range));
    }
    for (_, range) in &fixed {
        space.reserve(around(*range));
    }
    space.reserve(platform::AMD_HT);
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
        let align = if from == window_base {
            align.min(crate::size::GIB)
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
    machine
        .text
        .error(offset, format!("gpu[{gpu}].hbm"), message, None)
}

fn check_bits(machine: &Machine, window: Range, placed: &[Range]) -> Result<(), MachineError> {
    let bits = *machine.limits.phys_bits.get_ref();
    let used = platform::used_end(window.end());
    if used <= 1u64 << bits {
        return Ok(());
    }
    let needed = 64 - (used - 1).leading_zeros();
    let beyond = placed
        .iter()
        .position(|range| platform::used_end(range.end()) > 1u64 << bits)
        .unwrap_or(0);
    let gpu = partitions(machine).get(beyond).map_or(0, |(gpu, _)| *gpu);
    let hbm: u64 = placed.iter().map(|range| range.size).sum();
    let offset = machine
        .gpu
        .get(gpu)
        .map_or(0, |gpu| gpu.get_ref().hbm.span().start);
    Err(machine.text.error(
        offset,
        format!("gpu[{gpu}].hbm"),
        format!(
            "{} of HBM in {} range(s) and the PCI window of {} behind them end at {used:#x}, but {bits} address bits end at {:#x}",
            Size(hbm),
            placed.len(),
            Size(platform::PCI_HOLE64),
            1u64 << bits
        ),
        Some(if needed <= 52 {
            format!("limits.phys_bits = {needed} would fit")
        } else {
            "no x86-64 machine has that many address bits".to_owned()
        }),
    ))
}

/// Gives RAM to the CPU nodes in order, as QEMU does.
pub(super) fn assign_ram(machine: &Machine, ram: &[Range]) -> Vec<NodeRange> {
    let mut pieces = ram.iter().copied();
    let mut piece = pieces.next();
    let mut assigned = Vec::new();
    for (pxm, node) in (0u32..).zip(&machine.cpu) {
        let mut left = node.get_ref().memory.get_ref().0;
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
