//! The plan, and the policy that makes it.
//!
//! Phases: RAM goes where the platform puts it; HBM ranges follow from the start of the device-memory window, in the
//! order of GPUs and partitions, each aligned and apart from the next; ranges with an address of their own are
//! taken out first. Then proximity domains are numbered so that Linux's node numbers come out in the same order.
//! The layout is an interface: what a guest has remembered of its addresses must stay true, so golden files guard it.
//!
//! Rooms: `place` (addresses), `number` (proximity domains and Linux's node numbers), `fabric` (PCI buses, hives,
//! links, distances). This one has the types, and puts the parts together.

mod access;
mod fabric;
mod number;
mod place;

use serde::Serialize;

use crate::error::MachineError;
use crate::machine::{Exposure, Guest, Machine, PciNode};
use crate::qom;
use crate::ranges::Range;
use crate::size::MIB;
use crate::validate::{self, Checked};

pub use access::Access;
pub(crate) use number::backend_names;
use number::{Initiators, Numbering};

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
    /// What is known of latencies and bandwidths, by initiator and target.
    pub accesses: Vec<Access>,
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
    /// PCI address, `bus:device.function`; `segment:bus:device.function` where the segment is not 0.
    pub bdf: String,
    /// PCI segment; only 0 has the GPUs that QEMU can carry.
    #[serde(skip_serializing_if = "is_zero")]
    pub segment: u16,
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

    /// RAM with the borders between its nodes taken away.
    pub fn ram_whole(&self) -> Vec<Range> {
        let mut whole: Vec<Range> = Vec::new();
        for range in &self.ram {
            match whole.last_mut() {
                Some(last) if last.end() == range.base => last.size += range.size,
                _ => whole.push(Range {
                    base: range.base,
                    size: range.size,
                }),
            }
        }
        whole
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
        let position = self.nodes.binary_search_by_key(&pxm, |node| node.pxm);
        let node = self.nodes.get(position.ok()?)?;
        Some(node.linux_node)
    }

    /// Whether Linux has the node of a proximity domain online at boot.
    pub fn is_online(&self, pxm: u32) -> bool {
        self.nodes.iter().any(|node| node.pxm == pxm && node.online)
    }

    /// Distance between two proximity domains.
    pub fn distance(&self, from: u32, to: u32) -> Option<u8> {
        let row = self.slit.get(usize::try_from(from).ok()?)?;
        row.get(usize::try_from(to).ok()?).copied()
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
        qom::initiators_walked(&names, &backends)
            .into_iter()
            .filter_map(|position| names.get(position).cloned())
            .collect()
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
    let (layout, window, placed) = place::place(machine, ram_total)?;
    let ram = place::assign_ram(machine, &layout.ram);
    let names = number::name_initiators(machine);
    let numbering = number::number(machine, &checked, &ram, window, &placed, &names);
    let gpus = gpus(machine, &checked, &placed, &numbering, &names)?;
    let nodes = nodes(machine, &checked, &ram, &gpus, &numbering);
    let slit = fabric::slit(machine, &checked, &numbering);
    let e820 = place::e820(&layout.ram, &placed);
    let warnings = warnings(&gpus);
    Ok(Plan {
        name: machine.name.get_ref().clone(),
        description: machine.description.clone(),
        e820,
        nodes,
        slit,
        accesses: access::access(machine, &gpus),
        gpus,
        ram,
        window,
        phys_bits: *machine.limits.phys_bits.get_ref(),
        guest: machine.guest.clone(),
        warnings,
    })
}

/// For `serde`: keeps the plan of a machine with one PCI segment free of segments.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(segment: &u16) -> bool {
    *segment == 0
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

fn gpus(
    machine: &Machine,
    checked: &Checked,
    placed: &[Range],
    numbering: &Numbering,
    initiators: &Initiators,
) -> Result<Vec<Gpu>, MachineError> {
    let buses = fabric::buses(machine)?;
    let hives = fabric::hives(machine, checked);
    let mut links = fabric::links(machine, checked, &hives).into_iter();
    let mut ranges = placed.iter().zip(&numbering.hbm_pxm).zip(&initiators.names);
    let mut gpus = Vec::new();
    for ((index, spanned), ((segment, bus), hive)) in
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
        let pci_pxm = match gpu.pci_node.get_ref() {
            PciNode::Cpu => cpu_pxm,
            PciNode::Hbm => hbm.first().map_or(cpu_pxm, |hbm| hbm.pxm),
        };
        gpus.push(Gpu {
            id: checked.ids.get(index).cloned().unwrap_or_default(),
            index: u32::try_from(index).unwrap_or(u32::MAX),
            bdf: match segment {
                0 => format!("{bus:02x}:00.0"),
                segment => format!("{segment:04x}:{bus:02x}:00.0"),
            },
            segment: *segment,
            bus: *bus,
            exposure: *gpu.exposure.get_ref(),
            cpu_pxm,
            pci_pxm,
            hbm,
            hive_id: hive.id,
            hive_node: hive.node,
            hive_size: hive.size,
            links: links.next().unwrap_or_default(),
        });
    }
    Ok(gpus)
}

fn nodes(
    machine: &Machine,
    checked: &Checked,
    ram: &[NodeRange],
    gpus: &[Gpu],
    numbering: &Numbering,
) -> Vec<Node> {
    let linux = |pxm: u32| numbering.linux.get(&pxm).copied().unwrap_or(pxm);
    let mut ram = ram.iter().peekable();
    let mut nodes: Vec<Node> = (0u32..)
        .zip(&checked.cpus)
        .take(machine.cpu.len())
        .map(|(pxm, cpus)| Node {
            pxm,
            linux_node: linux(pxm),
            kind: NodeKind::Cpu,
            cpus: cpus.clone(),
            ranges: std::iter::from_fn(|| ram.next_if(|r| r.pxm == pxm))
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
