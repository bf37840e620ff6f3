//! The plan, and the policy that makes it.
//!
//! Phases: RAM goes where the platform puts it; HBM ranges follow from the start of the device-memory window, in the
//! order of GPUs and partitions, each aligned and apart from the next; ranges with an address of their own are
//! taken out first. Then proximity domains are numbered so that Linux's node numbers come out in the same order.
//! The layout is an interface: what a guest has remembered of its addresses must stay true, so golden files guard it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::MachineError;
use crate::linux::{self, WindowEntry};
use crate::machine::{Exposure, Guest, Machine, PciNode};
use crate::platform;
use crate::qom;
use crate::ranges::{Range, Space};
use crate::size::{MIB, Size};
use crate::validate::{self, Checked, End, wrong};
use crate::{E820_RAM, E820_RESERVED, E820_SOFT_RESERVED};

/// Ranges that OVMF carries without loss (of 40 it loses one, with 48 it does not boot; measured with 2026.08).
pub const OVMF_MAX_RANGES: usize = 32;

/// A guest that can be built: where everything is, and what Linux will call it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Name of the machine.
    pub name: String,
    /// One line on what it is.
    pub description: String,
    /// Memory map, ascending, never overlapping.
    pub e820: Vec<E820Entry>,
    /// Proximity domains, by number.
    pub nodes: Vec<Node>,
    /// Distances by proximity domain.
    pub slit: Vec<Vec<u8>>,
    /// GPUs, in the order of the description.
    pub gpus: Vec<Gpu>,
    /// RAM with the proximity domain it belongs to, ascending.
    pub ram: Vec<NodeRange>,
    /// The device-memory window: from the first HBM range's earliest place to the last one's end.
    pub window: Range,
    /// Physical address bits of the guest's CPUs.
    pub phys_bits: u32,
    /// What will run in the guest.
    #[serde(skip)]
    pub guest: Guest,
    /// What the reader should know before booting it.
    pub warnings: Vec<String>,
}

/// An entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct E820Entry {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// 1 RAM, 2 reserved, 0xefffffff soft reserved.
    #[serde(rename = "type")]
    pub kind: u32,
}

/// What a proximity domain is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// CPUs and RAM.
    Cpu,
    /// HBM of a GPU.
    Hbm,
}

/// A proximity domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// Its number in the ACPI tables, which is QEMU's node number.
    pub pxm: u32,
    /// The number that Linux gives it.
    pub linux_node: u32,
    /// CPUs and RAM, or HBM.
    pub kind: NodeKind,
    /// CPUs.
    pub cpus: Vec<u32>,
    /// Memory.
    pub ranges: Vec<Range>,
    /// GPU whose HBM it is.
    pub gpu: Option<String>,
    /// Whether Linux has the node online at boot: it has CPUs and RAM, or is named by a Generic Initiator.
    pub online: bool,
}

/// RAM of a proximity domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct NodeRange {
    /// Proximity domain.
    pub pxm: u32,
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Name.
    pub id: String,
    /// Position in the description.
    pub index: u32,
    /// PCI address, `bus:device.function`.
    pub bdf: String,
    /// PCI bus.
    pub bus: u8,
    /// How its HBM reaches the guest.
    pub exposure: Exposure,
    /// Proximity domain of the CPU node it is attached to.
    pub cpu_pxm: u32,
    /// Proximity domain of its PCI function.
    pub pci_pxm: u32,
    /// HBM partitions.
    pub hbm: Vec<Hbm>,
    /// Hive, 0 if no other GPU is linked.
    pub hive_id: u64,
    /// Position in the hive.
    pub hive_node: u32,
    /// GPUs in the hive.
    pub hive_size: u32,
    /// Links.
    pub links: Vec<GpuLink>,
}

/// One partition's HBM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hbm {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Proximity domain.
    pub pxm: u32,
    /// QEMU's name of the Generic Initiator object, if there is one.
    pub initiator: Option<String>,
}

impl Hbm {
    /// The addresses.
    pub fn range(&self) -> Range {
        Range {
            base: self.base,
            size: self.size,
        }
    }
}

/// A link as one GPU sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuLink {
    /// The other end: a GPU's id or `cpu0`, `cpu1` and so on.
    pub peer: String,
    /// Position in the hive of the GPU at the other end, none for a CPU.
    pub peer_hive_node: Option<u32>,
    /// Physical links in parallel.
    pub count: u32,
    /// MB/s in one direction; 0 = not known.
    pub bandwidth_mbs: u32,
    /// Nanoseconds; 0 = not known.
    pub latency_ns: u32,
}

impl Plan {
    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|range| range.size).sum()
    }

    /// All HBM, in order of GPUs and partitions.
    pub fn hbm(&self) -> impl Iterator<Item = &Hbm> {
        self.gpus.iter().flat_map(|gpu| &gpu.hbm)
    }

    /// All HBM ranges, in order of GPUs and partitions.
    pub fn hbm_ranges(&self) -> Vec<Range> {
        self.hbm().map(Hbm::range).collect()
    }

    /// The Linux node of a proximity domain.
    pub fn linux_node(&self, pxm: u32) -> Option<u32> {
        self.nodes
            .iter()
            .find(|node| node.pxm == pxm)
            .map(|node| node.linux_node)
    }

    /// Names of the Generic Initiator objects in the order in which QEMU walks them.
    pub fn initiator_order(&self) -> Vec<String> {
        let names: Vec<String> = self.hbm().filter_map(|hbm| hbm.initiator.clone()).collect();
        let cpu_nodes = self
            .nodes
            .iter()
            .filter(|node| node.kind == NodeKind::Cpu)
            .count();
        let backends = backend_names(cpu_nodes, self.hbm().count());
        let mut order = qom::walk_order(&qom::creation_order(&names, &backends));
        order.retain(|name| names.contains(name));
        order
    }

    /// Number of CPUs.
    pub fn cpu_count(&self) -> usize {
        self.nodes.iter().map(|node| node.cpus.len()).sum()
    }

    /// File name of the memory that backs a partition, as `numagpu serve --hbm-dir` makes it.
    pub fn hbm_file(gpu: &Gpu, partition: usize) -> String {
        format!("{}-p{partition}.hbm", gpu.id)
    }

    /// File name of a GPU's socket, as `numagpu serve --socket-dir` makes it.
    pub fn socket_file(gpu: &Gpu) -> String {
        format!("{}.sock", gpu.id)
    }
}

/// Plans a machine.
///
/// # Errors
/// [`MachineError`] for the first thing that makes it impossible.
pub fn plan(machine: &Machine) -> Result<Plan, MachineError> {
    let checked = validate::check(machine)?;
    let ram_total = machine
        .cpu
        .iter()
        .map(|node| node.get_ref().memory.get_ref().0)
        .sum();
    let (layout, window, placed) = place(machine, ram_total)?;
    let ram = assign_ram(machine, &layout.ram);
    let names = name_initiators(machine);
    let numbering = number(machine, &checked, &ram, window, &placed, &names);
    let gpus = gpus(machine, &checked, &placed, &numbering, &names)?;
    let nodes = nodes(machine, &checked, &ram, &gpus, &numbering);
    let slit = slit(machine, &checked, &numbering);
    let e820 = e820(&layout.ram, &placed);
    let warnings = warnings(&gpus);
    Ok(Plan {
        name: machine.name.get_ref().clone(),
        description: machine.description.clone(),
        e820,
        nodes,
        slit,
        gpus,
        ram,
        window,
        phys_bits: *machine.limits.phys_bits.get_ref(),
        guest: machine.guest.clone(),
        warnings,
    })
}

/// Bytes of one partition of a GPU.
fn partition_size(machine: &Machine, gpu: usize) -> u64 {
    machine.gpu.get(gpu).map_or(0, |gpu| {
        gpu.get_ref().hbm.get_ref().0 / u64::from((*gpu.get_ref().partitions.get_ref()).max(1))
    })
}

/// (GPU, partition) of every HBM range in order.
fn partitions(machine: &Machine) -> Vec<(usize, usize)> {
    let of = |(index, gpu): (usize, &toml::Spanned<crate::machine::Gpu>)| {
        (0..*gpu.get_ref().partitions.get_ref() as usize)
            .map(move |partition| (index, partition))
            .collect::<Vec<_>>()
    };
    machine.gpu.iter().enumerate().flat_map(of).collect()
}

type Placed = (platform::Layout, Range, Vec<Range>);

/// Places RAM and HBM: the platform's RAM layout depends on how much is above it, so placement is tried with the
/// window's smallest size first and again if that moved it.
fn place(machine: &Machine, ram: u64) -> Result<Placed, MachineError> {
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
fn assign_ram(machine: &Machine, ram: &[Range]) -> Vec<NodeRange> {
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

/// QEMU's names of its memory backends, in the order of the command line.
pub(crate) fn backend_names(cpu_nodes: usize, hbm: usize) -> Vec<String> {
    (0..cpu_nodes)
        .map(|i| format!("ram{i}"))
        .chain((0..hbm).map(|i| format!("hbm{i}")))
        .collect()
}

/// The Generic Initiator object of every HBM range, and QEMU's order of them.
struct Initiators {
    names: Vec<Option<String>>,
    walked: Vec<usize>,
}

fn name_initiators(machine: &Machine) -> Initiators {
    let all = partitions(machine);
    let named: Vec<usize> = (0..all.len())
        .filter(|i| {
            all.get(*i)
                .and_then(|(gpu, _)| machine.gpu.get(*gpu))
                .is_some_and(|gpu| gpu.get_ref().generic_initiator)
        })
        .collect();
    let backends = backend_names(machine.cpu.len(), all.len());
    let chosen = qom::initiator_names(named.len(), &backends);
    let order = qom::walk_order(&qom::creation_order(&chosen, &backends));
    let mut names = vec![None; all.len()];
    for (name, index) in chosen.iter().zip(&named) {
        if let Some(slot) = names.get_mut(*index) {
            *slot = Some(name.clone());
        }
    }
    let walked = order
        .iter()
        .filter_map(|name| chosen.iter().position(|chosen| chosen == name))
        .filter_map(|position| named.get(position).copied())
        .collect();
    Initiators { names, walked }
}

/// Proximity domains of the HBM ranges in order, and Linux's numbers.
struct Numbering {
    hbm_pxm: Vec<u32>,
    linux: BTreeMap<u32, u32>,
}

fn number(
    machine: &Machine,
    checked: &Checked,
    ram: &[NodeRange],
    window: Range,
    placed: &[Range],
    initiators: &Initiators,
) -> Numbering {
    let cpus = u32::try_from(machine.cpu.len()).unwrap_or(u32::MAX);
    let count = u32::try_from(placed.len()).unwrap_or(u32::MAX);
    let owner: BTreeMap<u32, u32> = (0u32..)
        .zip(&checked.cpus)
        .flat_map(|(pxm, cpus)| cpus.iter().map(move |cpu| (*cpu, pxm)))
        .collect();
    let attempt = |hbm_pxm: Vec<u32>| {
        let ranges: Vec<(u32, Range)> = hbm_pxm
            .iter()
            .copied()
            .zip(placed.iter().copied())
            .collect();
        let last = (cpus + count).saturating_sub(1);
        let entries = linux::window_entries(window, &ranges, last);
        let first = owner
            .values()
            .copied()
            .chain(
                initiators
                    .walked
                    .iter()
                    .filter_map(|index| hbm_pxm.get(*index).copied()),
            )
            .collect::<Vec<u32>>();
        let second = ram
            .iter()
            .map(|range| range.pxm)
            .chain(entries.iter().map(|entry: &WindowEntry| entry.pxm));
        let linux = linux::node_numbers(first, second);
        Numbering { hbm_pxm, linux }
    };
    let in_order = |numbering: &Numbering| {
        numbering
            .hbm_pxm
            .iter()
            .zip(cpus..)
            .all(|(pxm, node)| numbering.linux.get(pxm) == Some(&node))
    };
    let plain = attempt((0..count).map(|i| cpus + i).collect());
    if in_order(&plain) || count == 0 {
        return plain;
    }
    // The range at the start of the window gets the highest number, the others ascend: then the free space between
    // the ranges, which QEMU credits to the highest, comes when that number has been met.
    let turned = attempt((0..count).map(|i| cpus + (i + count - 1) % count).collect());
    if in_order(&turned) { turned } else { plain }
}

fn gpus(
    machine: &Machine,
    checked: &Checked,
    placed: &[Range],
    numbering: &Numbering,
    initiators: &Initiators,
) -> Result<Vec<Gpu>, MachineError> {
    let buses = buses(machine)?;
    let hives = hives(machine, checked);
    let mut ranges = placed.iter().zip(&numbering.hbm_pxm).zip(&initiators.names);
    let mut gpus = Vec::new();
    for ((index, spanned), (bus, hive)) in
        machine.gpu.iter().enumerate().zip(buses.iter().zip(&hives))
    {
        let gpu = spanned.get_ref();
        let hbm: Vec<Hbm> = ranges
            .by_ref()
            .take(*gpu.partitions.get_ref() as usize)
            .map(|((range, pxm), name)| Hbm {
                base: range.base,
                size: range.size,
                pxm: *pxm,
                initiator: name.clone(),
            })
            .collect();
        let cpu_pxm = u32::try_from(*gpu.cpu.get_ref()).unwrap_or(u32::MAX);
        let pci_pxm = match gpu.pci_node {
            PciNode::Cpu => cpu_pxm,
            PciNode::Hbm => hbm.first().map_or(cpu_pxm, |hbm| hbm.pxm),
        };
        gpus.push(Gpu {
            id: checked.ids.get(index).cloned().unwrap_or_default(),
            index: u32::try_from(index).unwrap_or(u32::MAX),
            bdf: format!("{bus:02x}:00.0"),
            bus: *bus,
            exposure: *gpu.exposure.get_ref(),
            cpu_pxm,
            pci_pxm,
            hbm,
            hive_id: hive.id,
            hive_node: hive.node,
            hive_size: hive.size,
            links: links(machine, checked, index, &hives),
        });
    }
    Ok(gpus)
}

/// A PCI bus for each GPU: its own if it names one, otherwise spread over the numbers that are left.
fn buses(machine: &Machine) -> Result<Vec<u8>, MachineError> {
    let wish = |gpu: &toml::Spanned<crate::machine::Gpu>| {
        gpu.get_ref()
            .bus
            .as_ref()
            .and_then(|bus| u8::try_from(*bus.get_ref()).ok())
    };
    let mut taken: Vec<u8> = machine
        .gpu
        .iter()
        .filter_map(wish)
        .flat_map(|bus| [bus - 1, bus])
        .collect();
    let candidates = (0x01..=0x0fu8)
        .step_by(2)
        .flat_map(|low| (1..=0x0fu8).map(move |high| high << 4 | low));
    let candidates: Vec<u8> = candidates.collect();
    let mut buses = Vec::new();
    for (index, gpu) in machine.gpu.iter().enumerate() {
        let free = |bus: &&u8| !taken.contains(bus) && !taken.contains(&(**bus - 1));
        let Some(bus) = wish(gpu).or_else(|| candidates.iter().find(free).copied()) else {
            let help = Some("a PCI segment has 256 buses; each GPU takes two".to_owned());
            return Err(wrong(
                machine,
                gpu,
                format!("gpu[{index}].bus"),
                "no PCI bus is left",
                help,
            ));
        };
        taken.extend([bus - 1, bus]);
        buses.push(bus);
    }
    Ok(buses)
}

struct Hive {
    id: u64,
    node: u32,
    size: u32,
}

/// GPUs that reach each other over links form a hive.
fn hives(machine: &Machine, checked: &Checked) -> Vec<Hive> {
    let count = machine.gpu.len();
    let mut root: Vec<usize> = (0..count).collect();
    for (from, to) in &checked.links {
        let (End::Gpu(from), End::Gpu(to)) = (from, to) else {
            continue;
        };
        let (Some(a), Some(b)) = (root.get(*from).copied(), root.get(*to).copied()) else {
            continue;
        };
        let (low, high) = (a.min(b), a.max(b));
        for entry in root.iter_mut().filter(|entry| **entry == high) {
            *entry = low;
        }
    }
    // FNV-1a of the name: two machines' hives differ, and the same machine's stay.
    let seed = machine
        .name
        .get_ref()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    root.iter()
        .enumerate()
        .map(|(index, own)| {
            let members: Vec<usize> = (0..count)
                .filter(|gpu| root.get(*gpu) == Some(own))
                .collect();
            let node = members.iter().position(|gpu| *gpu == index).unwrap_or(0);
            let alone = members.len() < 2;
            Hive {
                id: if alone { 0 } else { (seed ^ *own as u64) | 1 },
                node: u32::try_from(node).unwrap_or(u32::MAX),
                size: u32::try_from(members.len()).unwrap_or(u32::MAX),
            }
        })
        .collect()
}

fn links(machine: &Machine, checked: &Checked, gpu: usize, hives: &[Hive]) -> Vec<GpuLink> {
    let mut links = Vec::new();
    for (link, (from, to)) in machine.link.iter().zip(&checked.links) {
        let link = link.get_ref();
        let (peer, name) = if *from == End::Gpu(gpu) {
            (to, &link.to)
        } else if *to == End::Gpu(gpu) {
            (from, &link.from)
        } else {
            continue;
        };
        let peer_hive_node = match peer {
            End::Gpu(index) => hives.get(*index).map(|hive| hive.node),
            End::Cpu(_) => None,
        };
        links.push(GpuLink {
            peer: name.get_ref().clone(),
            peer_hive_node,
            count: *link.count.get_ref(),
            bandwidth_mbs: link.bandwidth_mbs,
            latency_ns: link.latency_ns,
        });
    }
    links
}

fn nodes(
    machine: &Machine,
    checked: &Checked,
    ram: &[NodeRange],
    gpus: &[Gpu],
    numbering: &Numbering,
) -> Vec<Node> {
    let linux = |pxm: u32| numbering.linux.get(&pxm).copied().unwrap_or(pxm);
    let mut nodes: Vec<Node> = (0u32..)
        .zip(&checked.cpus)
        .take(machine.cpu.len())
        .map(|(pxm, cpus)| Node {
            pxm,
            linux_node: linux(pxm),
            kind: NodeKind::Cpu,
            cpus: cpus.clone(),
            ranges: ram
                .iter()
                .filter(|r| r.pxm == pxm)
                .map(|r| Range {
                    base: r.base,
                    size: r.size,
                })
                .collect(),
            gpu: None,
            online: true,
        })
        .collect();
    for gpu in gpus {
        nodes.extend(gpu.hbm.iter().map(|hbm| Node {
            pxm: hbm.pxm,
            linux_node: linux(hbm.pxm),
            kind: NodeKind::Hbm,
            cpus: Vec::new(),
            ranges: vec![hbm.range()],
            gpu: Some(gpu.id.clone()),
            online: hbm.initiator.is_some(),
        }));
    }
    nodes.sort_by_key(|node| node.pxm);
    nodes
}

/// Distances by proximity domain.
fn slit(machine: &Machine, checked: &Checked, numbering: &Numbering) -> Vec<Vec<u8>> {
    let cpus = machine.cpu.len();
    let all = partitions(machine);
    let distances = &machine.distances;
    let byte = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    let attached = |gpu: usize| machine.gpu.get(gpu).map(|gpu| *gpu.get_ref().cpu.get_ref());
    let linked = |a: usize, b: usize| {
        checked.links.contains(&(End::Gpu(a), End::Gpu(b)))
            || checked.links.contains(&(End::Gpu(b), End::Gpu(a)))
    };
    let between = |a: usize, b: usize| -> u32 {
        if let Some(matrix) = &distances.matrix {
            return matrix
                .get_ref()
                .get(a)
                .and_then(|row| row.get(b))
                .copied()
                .unwrap_or(255);
        }
        let hbm = |index: usize| {
            index
                .checked_sub(cpus)
                .and_then(|i| all.get(i))
                .map(|(gpu, _)| *gpu)
        };
        *match (hbm(a), hbm(b)) {
            _ if a == b => return 10,
            (None, None) => &distances.cpu_cpu,
            (Some(gpu), None) if attached(gpu) == Some(b) => &distances.cpu_hbm_local,
            (None, Some(gpu)) if attached(gpu) == Some(a) => &distances.cpu_hbm_local,
            (Some(_), None) | (None, Some(_)) => &distances.cpu_hbm_remote,
            (Some(one), Some(other)) if one == other => &distances.hbm_hbm_same_gpu,
            (Some(one), Some(other)) if linked(one, other) => &distances.hbm_hbm_linked,
            (Some(_), Some(_)) => &distances.hbm_hbm,
        }
        .get_ref()
    };
    // Position in the description by proximity domain.
    let mut position: Vec<usize> = (0..cpus).collect();
    let mut hbm: Vec<(u32, usize)> = numbering.hbm_pxm.iter().copied().zip(cpus..).collect();
    hbm.sort_unstable();
    position.extend(hbm.into_iter().map(|(_, index)| index));
    position
        .iter()
        .map(|a| position.iter().map(|b| byte(between(*a, *b))).collect())
        .collect()
}

fn e820(ram: &[Range], hbm: &[Range]) -> Vec<E820Entry> {
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

fn warnings(gpus: &[Gpu]) -> Vec<String> {
    let mut warnings = Vec::new();
    let ranges: usize = gpus.iter().map(|gpu| gpu.hbm.len()).sum();
    if ranges > OVMF_MAX_RANGES {
        warnings.push(format!(
            "{ranges} HBM ranges: OVMF 2026.08 carries {OVMF_MAX_RANGES} and loses the rest; boot with SeaBIOS, which takes one memmap= argument for each"
        ));
    }
    for gpu in gpus {
        for (partition, hbm) in gpu.hbm.iter().enumerate() {
            if !hbm.size.is_multiple_of(128 * MIB) || !hbm.base.is_multiple_of(128 * MIB) {
                warnings.push(format!(
                    "{} partition {partition}: {:#x}..{:#x} is not a multiple of Linux's 128 MiB memory blocks, so a guest that gives it to kmem loses its ends",
                    gpu.id,
                    hbm.base,
                    hbm.range().end()
                ));
            }
        }
    }
    warnings
}
