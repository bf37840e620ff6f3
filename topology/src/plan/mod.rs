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
mod backing;
mod fabric;
mod number;
mod place;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::device::Device;
use crate::error::MachineError;
use crate::machine::{Exposure, Guest, Machine, PciNode};
use crate::platform::Holes;
use crate::qom;
use crate::ranges::Range;
use crate::size::MIB;
use crate::validate::{self, Checked};

pub use access::Access;
pub use backing::Backing;
pub(crate) use number::backend_names;
use number::{Initiators, Numbering};
pub(crate) use place::pci_hole64_needed;

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
    /// The device-memory window: from the first soft-reserved range's earliest place to the last one's end.
    pub window: Range,
    /// Holes of the address space.
    pub holes: Holes,
    /// Physical address bits of the guest's CPUs.
    pub phys_bits: u32,
    /// What will run in the guest.
    #[serde(skip)]
    pub guest: Guest,
    /// What the HBM is made of on the host.
    #[serde(skip)]
    pub backing: Backing,
    /// The GPUs' PCI functions.
    #[serde(skip)]
    pub device: Device,
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
    /// HBM, of a GPU or of a CPU package, without CPUs.
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
    /// Memory that is there at boot.
    pub ranges: Vec<Range>,
    /// GPU whose HBM it is.
    pub gpu: Option<String>,
    /// Proximity domain of the CPUs next to it: its own, or the node that its GPU is attached to.
    pub cpu_pxm: Option<u32>,
    /// Whether Linux has the node online at boot: it has RAM, or is named by a Generic Initiator.
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
    /// HBM: its partitions, or with exposure `ram` its parts of the CPU node's RAM.
    pub hbm: Vec<Hbm>,
    /// Proximity domains of its own: with exposure `spm` one for each partition, with `bar` those that its driver fills.
    pub domains: Vec<Domain>,
    /// The BAR through which HBM is reached, with exposures `bar` and `private`.
    pub aperture: Option<Aperture>,
    /// NUMA node of the host that HBM is taken from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_node: Option<u32>,
    /// Hive, 0 if no other GPU is linked.
    pub hive_id: u64,
    /// Position in the hive.
    pub hive_node: u32,
    /// GPUs in the hive.
    pub hive_size: u32,
    /// Links.
    pub links: Vec<GpuLink>,
    /// MB/s from the GPU to its own HBM; 0 = not known.
    #[serde(skip)]
    pub hbm_bandwidth_mbs: u32,
    /// Nanoseconds from the GPU to its own HBM; 0 = not known.
    #[serde(skip)]
    pub hbm_latency_ns: u32,
}

/// A range of HBM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hbm {
    /// First address. Behind an aperture it is where a VMM that places BARs itself shall put it; the GPU's engines know
    /// the HBM by this address wherever firmware puts the BAR.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Proximity domain, none with exposure `private`.
    pub pxm: Option<u32>,
}

/// A proximity domain of a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Domain {
    /// Its number.
    pub pxm: u32,
    /// QEMU's name of the Generic Initiator object, if there is one.
    pub initiator: Option<String>,
}

/// A BAR through which HBM is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Aperture {
    /// Planned address.
    pub base: u64,
    /// Bytes, a power of two.
    pub size: u64,
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

    /// HBM that is soft reserved, in order of GPUs and partitions.
    pub fn hbm(&self) -> impl Iterator<Item = &Hbm> {
        let spm = |gpu: &&Gpu| gpu.exposure == Exposure::Spm;
        self.gpus.iter().filter(spm).flat_map(|gpu| &gpu.hbm)
    }

    /// Ranges of HBM that is soft reserved, in order of GPUs and partitions.
    pub fn hbm_ranges(&self) -> Vec<Range> {
        self.hbm().map(Hbm::range).collect()
    }

    /// The GPUs' proximity domains, in order of GPUs.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.gpus.iter().flat_map(|gpu| &gpu.domains)
    }

    /// Nodes that have RAM: CPU nodes, and memory nodes without CPUs.
    pub fn ram_nodes(&self) -> impl Iterator<Item = &Node> {
        let ram = |node: &&Node| node.kind == NodeKind::Cpu || node.gpu.is_none();
        self.nodes.iter().filter(ram)
    }

    /// Names of the files that back a GPU's HBM, with their sizes: one for each partition that is soft reserved, one for
    /// all of them behind an aperture, none for HBM that is the guest's RAM.
    pub fn hbm_files(gpu: &Gpu) -> Vec<(String, u64)> {
        match gpu.exposure {
            Exposure::Spm => (0..)
                .zip(&gpu.hbm)
                .map(|(partition, hbm)| (Plan::hbm_file(gpu, partition), hbm.size))
                .collect(),
            Exposure::Bar | Exposure::Private => {
                let bytes = gpu.hbm.iter().map(|hbm| hbm.size).sum();
                vec![(format!("{}-aperture.hbm", gpu.id), bytes)]
            }
            Exposure::Ram => Vec::new(),
        }
    }

    fn node(&self, pxm: u32) -> Option<&Node> {
        let position = self.nodes.binary_search_by_key(&pxm, |node| node.pxm);
        self.nodes.get(position.ok()?)
    }

    /// The Linux node of a proximity domain.
    pub fn linux_node(&self, pxm: u32) -> Option<u32> {
        self.node(pxm).map(|node| node.linux_node)
    }

    /// Whether Linux has the node of a proximity domain online at boot.
    pub fn is_online(&self, pxm: u32) -> bool {
        self.node(pxm).is_some_and(|node| node.online)
    }

    /// Distance between two proximity domains.
    pub fn distance(&self, from: u32, to: u32) -> Option<u8> {
        let row = self.slit.get(usize::try_from(from).ok()?)?;
        row.get(usize::try_from(to).ok()?).copied()
    }

    /// Names of the Generic Initiator objects in the order in which QEMU walks them.
    pub fn initiator_order(&self) -> Vec<String> {
        let names: Vec<String> = self.domains().filter_map(|d| d.initiator.clone()).collect();
        let backends = backend_names(self.ram_nodes().count(), self.hbm().count());
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
    let ram_bytes = place::ram_of_nodes(machine);
    let (layout, window, placed) = place::place(machine, ram_bytes.iter().sum())?;
    let ram = place::assign_ram(&ram_bytes, &layout.ram);
    let names = number::name_initiators(machine, ram_bytes.len(), placed.len());
    let numbering = number::number(machine, &checked, &ram, window, &placed, &names);
    let gpus = gpus(
        machine,
        &checked,
        (window, &placed, &ram),
        &numbering,
        &names,
    )?;
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
        holes: place::holes(machine),
        phys_bits: *machine.limits.phys_bits.get_ref(),
        guest: machine.guest.clone(),
        backing: Backing::of(machine),
        device: machine.device.clone(),
        warnings,
    })
}

/// For `serde`: keeps the plan of a machine with one PCI segment free of segments.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(segment: &u16) -> bool {
    *segment == 0
}

/// (GPU, partition) of every soft-reserved HBM range in order.
fn partitions(machine: &Machine) -> Vec<(usize, usize)> {
    domains(machine)
        .into_iter()
        .filter(|domain| domain.range.is_some())
        .map(|domain| (domain.gpu, domain.index))
        .collect()
}

/// A proximity domain that a GPU has, before it has a number.
struct Described {
    gpu: usize,
    /// Which of the GPU's.
    index: usize,
    /// Position of its memory among the soft-reserved ranges; none for a domain without memory.
    range: Option<usize>,
}

/// Every domain of the GPUs, in order.
fn domains(machine: &Machine) -> Vec<Described> {
    let mut ranges = 0..;
    let mut all = Vec::new();
    for (gpu, described) in machine.gpu.iter().enumerate() {
        let described = described.get_ref();
        let is_spm = *described.exposure.get_ref() == Exposure::Spm;
        all.extend(
            (0..described.domain_count() as usize).map(|index| Described {
                gpu,
                index,
                range: if is_spm { ranges.next() } else { None },
            }),
        );
    }
    all
}

fn gpus(
    machine: &Machine,
    checked: &Checked,
    (window, placed, ram): (Range, &[Range], &[NodeRange]),
    numbering: &Numbering,
    initiators: &Initiators,
) -> Result<Vec<Gpu>, MachineError> {
    let buses = fabric::buses(machine)?;
    let hives = fabric::hives(machine, checked);
    let mut links = fabric::links(machine, checked, &hives).into_iter();
    let mut apertures = place::apertures(machine, window).into_iter();
    let mut placed = placed.iter();
    let mut numbers = numbering.pxm.iter().zip(&initiators.names);
    let mut gpus = Vec::new();
    for ((index, spanned), ((segment, bus), hive)) in
        machine.gpu.iter().enumerate().zip(buses.iter().zip(&hives))
    {
        let gpu = spanned.get_ref();
        let exposure = *gpu.exposure.get_ref();
        let aperture = apertures.next().flatten();
        let domains: Vec<Domain> = numbers
            .by_ref()
            .take(gpu.domain_count() as usize)
            .map(|(pxm, initiator)| Domain {
                pxm: *pxm,
                initiator: initiator.clone(),
            })
            .collect();
        let ranges: Vec<Range> = match exposure {
            Exposure::Spm => placed.by_ref().take(domains.len()).copied().collect(),
            _ => place::other_hbm(machine, index, aperture.as_ref(), ram),
        };
        let pxm = |part: usize| match exposure {
            Exposure::Spm | Exposure::Bar => domains.get(part).map(|domain| domain.pxm),
            Exposure::Ram => u32::try_from(*gpu.cpu.get_ref()).ok(),
            Exposure::Private => None,
        };
        let hbm: Vec<Hbm> = ranges
            .iter()
            .enumerate()
            .map(|(part, range)| Hbm {
                base: range.base,
                size: range.size,
                pxm: pxm(part),
            })
            .collect();
        let cpu_pxm = u32::try_from(*gpu.cpu.get_ref()).unwrap_or(u32::MAX);
        let pci_pxm = match gpu.pci_node.get_ref() {
            PciNode::Cpu => cpu_pxm,
            PciNode::Hbm => domains.first().map_or(cpu_pxm, |domain| domain.pxm),
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
            exposure,
            cpu_pxm,
            pci_pxm,
            hbm,
            domains,
            aperture,
            host_node: gpu.host_node.as_ref().map(|node| *node.get_ref()),
            hive_id: hive.id,
            hive_node: hive.node,
            hive_size: hive.size,
            links: links.next().unwrap_or_default(),
            hbm_bandwidth_mbs: gpu.hbm_bandwidth_mbs,
            hbm_latency_ns: gpu.hbm_latency_ns,
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
    let mut ranges = |pxm: u32| {
        std::iter::from_fn(|| ram.next_if(|r| r.pxm == pxm))
            .map(|r| Range {
                base: r.base,
                size: r.size,
            })
            .collect()
    };
    // Backwards, so that of several it is the first in the description.
    let bringing = gpus
        .iter()
        .rev()
        .filter(|gpu| gpu.exposure == Exposure::Ram);
    let brought_by: BTreeMap<u32, &Gpu> = bringing.map(|gpu| (gpu.cpu_pxm, gpu)).collect();
    let mut nodes: Vec<Node> = (0u32..)
        .zip(&checked.cpus)
        .map(|(pxm, cpus)| Node {
            pxm,
            linux_node: linux(pxm),
            kind: NodeKind::Cpu,
            cpus: cpus.clone(),
            ranges: ranges(pxm),
            gpu: brought_by.get(&pxm).map(|gpu| gpu.id.clone()),
            cpu_pxm: Some(pxm),
            online: true,
        })
        .collect();
    let first_memory = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
    nodes.extend(
        (first_memory..)
            .zip(&machine.memory)
            .map(|(pxm, node)| Node {
                pxm,
                linux_node: linux(pxm),
                kind: NodeKind::Hbm,
                cpus: Vec::new(),
                ranges: ranges(pxm),
                gpu: None,
                cpu_pxm: u32::try_from(*node.get_ref().cpu.get_ref()).ok(),
                online: true,
            }),
    );
    for gpu in gpus {
        let memory = |domain: &Domain| {
            let mut own = gpu.hbm.iter().filter(|_| gpu.exposure == Exposure::Spm);
            own.find(|hbm| hbm.pxm == Some(domain.pxm)).map(Hbm::range)
        };
        nodes.extend(gpu.domains.iter().map(|domain| Node {
            pxm: domain.pxm,
            linux_node: linux(domain.pxm),
            kind: NodeKind::Hbm,
            cpus: Vec::new(),
            ranges: memory(domain).into_iter().collect(),
            gpu: Some(gpu.id.clone()),
            cpu_pxm: Some(gpu.cpu_pxm),
            online: domain.initiator.is_some(),
        }));
    }
    nodes.sort_by_key(|node| node.pxm);
    nodes
}

fn warnings(gpus: &[Gpu]) -> Vec<String> {
    let mut warnings = Vec::new();
    let spm = |gpu: &&Gpu| gpu.exposure == Exposure::Spm;
    for gpu in gpus.iter().filter(spm) {
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
