//! What Linux will make of a plan on each way of booting it, before anything boots.
//!
//! Sources: `linux` for the node numbers; Linux `drivers/dax/hmem/device.c` and `drivers/acpi/numa/hmat.c` for dax devices
//! (with an HMAT one for each SRAT range inside soft-reserved memory, else one for each soft-reserved entry, on the node of
//! its first byte); EDK2 `MdeModulePkg/Core/Dxe/Mem/Page.c`, which joins neighbours of equal type and attributes; limits as
//! measured with OVMF 2026.08, SeaBIOS 1.17.0, qboot of QEMU 11.1 and Linux 6.1, 6.12 and 7.3.

use std::fmt;

use serde::Serialize;

use crate::linux::BootPath;
use crate::machine::{Driver, Exposure};
use crate::plan::{Gpu, OVMF_MAX_RANGES, Plan};
use crate::platform::{AMD_HT, PCI_HOLE64};
use crate::qemu;
use crate::ranges::Range;
use crate::size::{GIB, Size, TIB};

/// Soft-reserved entries that qboot can hand to a kernel: it writes 128 entries of the zero page, of which its own
/// take 7 (measured: of 130 ranges 121 arrived).
pub const QBOOT_MAX_RANGES: usize = 121;
/// First slot of the root bus that a GPU takes where no bridge can be.
const FIRST_SLOT: u32 = 2;
/// Nodes of a kernel that was not configured for more (`NODES_SHIFT=6`, the default of x86-64).
const COMMON_NODES: usize = 64;
/// How far above RAM kernels with memory KASLR can map HBM (`RANDOMIZE_MEMORY_PHYSICAL_PADDING` of Debian).
const KASLR_PADDING: u64 = 10 * TIB;

/// What Linux will make of a plan on one way of booting it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Prediction {
    /// The way.
    pub boot: BootPath,
    /// Nodes that could be.
    pub possible: Vec<u32>,
    /// Nodes that are online at boot.
    pub online: Vec<u32>,
    /// Nodes that a Generic Initiator names.
    pub initiators: Vec<u32>,
    /// Soft-reserved entries of the kernel's memory map, ascending.
    pub soft_reserved: Vec<Range>,
    /// dax devices, by address.
    pub dax: Vec<Dax>,
    /// PCI functions, in order of GPUs.
    pub functions: Vec<Function>,
    /// What is lost on this way, and what would help.
    pub warnings: Vec<Warning>,
}

/// A dax device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dax {
    /// Addresses.
    pub range: Range,
    /// Node that its memory would be if it were onlined (`target_node`).
    pub target_node: u32,
    /// Online node next to it (`numa_node`).
    pub numa_node: u32,
}

/// A GPU's PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Function {
    /// The GPU.
    pub gpu: String,
    /// PCI address, as in [`Gpu::bdf`].
    pub bdf: String,
    /// Its node, none where no bridge gives it one.
    pub node: Option<u32>,
}

/// Something that is lost on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// What Linux will not have as it was described.
    pub what: String,
    /// Why.
    pub cause: String,
    /// What would help.
    pub cure: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.what, self.cause, self.cure)
    }
}

/// Neighbours that touch as one range; `ranges` ascend.
fn joined(ranges: &[Range]) -> Vec<Range> {
    let mut all: Vec<Range> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end() == range.base => last.size += range.size,
            _ => all.push(*range),
        }
    }
    all
}

/// The PCI address of a GPU where no bridge can be: a slot of the root bus.
pub(crate) fn root_slot(gpu: &Gpu) -> u32 {
    gpu.index + FIRST_SLOT
}

impl Plan {
    /// Whether there is an HMAT: something is known of an access by a domain that can be an initiator.
    pub fn has_hmat(&self) -> bool {
        qemu::hmat(self).is_some()
    }

    /// Online node nearest to a domain, as `numa_map_to_online_node` finds it: itself, or the lowest of the nearest.
    fn nearest_online(&self, pxm: u32) -> u32 {
        let mut online: Vec<_> = self.nodes.iter().filter(|node| node.online).collect();
        online.sort_by_key(|node| node.linux_node);
        let nearest = online
            .iter()
            .min_by_key(|node| self.distance(pxm, node.pxm).unwrap_or(u8::MAX));
        nearest.map_or(0, |node| node.linux_node)
    }
}

fn dax(plan: &Plan, soft_reserved: &[Range]) -> Vec<Dax> {
    if plan.guest.driver == Driver::Kernel {
        return Vec::new();
    }
    let device = |range: Range| {
        let owner = plan.hbm().find(|hbm| hbm.base == range.base);
        let pxm = owner.and_then(|hbm| hbm.pxm)?;
        Some(Dax {
            range,
            target_node: plan.linux_node(pxm)?,
            numa_node: plan.nearest_online(pxm),
        })
    };
    let mut all: Vec<Dax> = if plan.has_hmat() {
        let inside = |range: &Range| soft_reserved.iter().any(|soft| soft.contains(range));
        let ranges = plan.hbm_ranges().into_iter().filter(inside);
        ranges.filter_map(device).collect()
    } else {
        soft_reserved.iter().copied().filter_map(device).collect()
    };
    all.sort_by_key(|dax| dax.range);
    all
}

/// Predicts what Linux will make of the plan.
pub fn predict(plan: &Plan, boot: BootPath) -> Prediction {
    let mut ranges = plan.hbm_ranges();
    ranges.sort_unstable();
    let soft_reserved = match boot {
        BootPath::Ovmf => {
            let mut kept = joined(&ranges);
            kept.truncate(OVMF_MAX_RANGES);
            kept
        }
        BootPath::Qboot => {
            ranges.truncate(QBOOT_MAX_RANGES);
            ranges
        }
        BootPath::SeaBios | BootPath::Direct => ranges,
    };
    let mut possible: Vec<u32> = plan.nodes.iter().map(|node| node.linux_node).collect();
    possible.sort_unstable();
    let online = plan.nodes.iter().filter(|node| node.online);
    let mut online: Vec<u32> = online.map(|node| node.linux_node).collect();
    online.sort_unstable();
    let named = plan.domains().filter(|domain| domain.initiator.is_some());
    let mut initiators: Vec<u32> = named.filter_map(|d| plan.linux_node(d.pxm)).collect();
    initiators.sort_unstable();
    let function = |gpu: &Gpu| match boot {
        BootPath::Qboot => Function {
            gpu: gpu.id.clone(),
            bdf: format!("00:{:02x}.0", root_slot(gpu)),
            node: None,
        },
        BootPath::Ovmf | BootPath::SeaBios | BootPath::Direct => Function {
            gpu: gpu.id.clone(),
            bdf: gpu.bdf.clone(),
            node: plan.linux_node(gpu.pci_pxm),
        },
    };
    Prediction {
        boot,
        possible,
        online,
        initiators,
        dax: dax(plan, &soft_reserved),
        warnings: warnings(plan, boot),
        soft_reserved,
        functions: plan.gpus.iter().map(function).collect(),
    }
}

/// What this way of booting loses.
fn warnings(plan: &Plan, boot: BootPath) -> Vec<Warning> {
    let mut all = Vec::new();
    let mut warn = |what: String, cause: &str, cure: &str| {
        all.push(Warning {
            what,
            cause: cause.to_owned(),
            cure: cure.to_owned(),
        });
    };
    let mut hbm: Vec<(Range, String)> = plan
        .gpus
        .iter()
        .filter(|gpu| gpu.exposure == Exposure::Spm)
        .flat_map(|gpu| {
            let name = move |part: usize| format!("{} partition {part}", gpu.id);
            let parts = gpu.hbm.iter().enumerate();
            parts.map(move |(part, hbm)| (hbm.range(), name(part)))
        })
        .collect();
    hbm.sort_unstable();
    if boot == BootPath::Ovmf {
        for pair in hbm.windows(2) {
            let [(first, a), (second, b)] = pair else {
                continue;
            };
            if first.end() != second.base {
                continue;
            }
            let what = format!("{a} and {b} touch at {:#x}", second.base);
            if plan.has_hmat() {
                warn(
                    format!("{what}, and come out as one E820 entry"),
                    "OVMF joins neighbours; Linux makes a dax device of each only because there is an HMAT",
                    "placement.gap = \"2MiB\" or more keeps them apart without one",
                );
            } else {
                warn(
                    format!(
                        "{what}, and Linux makes one dax device of both, on the first one's node"
                    ),
                    "OVMF joins neighbours, and no HMAT tells Linux where one ends",
                    "placement.gap = \"2MiB\" or more, latencies or bandwidths for an HMAT, or another --boot",
                );
            }
        }
        let ranges = joined(&plan_ranges(&hbm)).len();
        if ranges > OVMF_MAX_RANGES {
            warn(
                format!(
                    "{ranges} HBM ranges, of which {} are lost",
                    ranges - OVMF_MAX_RANGES
                ),
                &format!("OVMF 2026.08 carries {OVMF_MAX_RANGES}"),
                "boot with SeaBIOS, which takes one memmap= argument for each",
            );
        }
        let apertures = apertures_end(plan);
        let window = 1u64 << plan.phys_bits.min(46).saturating_sub(3);
        if apertures > window {
            warn(
                format!("HBM apertures need a PCI window of {}", Size(apertures)),
                &format!(
                    "OVMF makes one of {}, an eighth of what {} address bits reach",
                    Size(window),
                    plan.phys_bits
                ),
                &format!("limits.phys_bits = {}", needed_bits(apertures)),
            );
        }
    }
    if boot == BootPath::Qboot {
        if hbm.len() > QBOOT_MAX_RANGES {
            warn(
                format!(
                    "{} HBM ranges, of which {} are lost",
                    hbm.len(),
                    hbm.len() - QBOOT_MAX_RANGES
                ),
                "qboot writes the 128 entries of the zero page, and 7 are its own",
                "boot with SeaBIOS",
            );
        }
        if !plan.gpus.is_empty() {
            warn(
                format!(
                    "{} PCI function(s) on the root bus, without a node",
                    plan.gpus.len()
                ),
                "qboot sets up no PCI bridges, so no expander bridge can give a function its bus and node",
                "boot with OVMF or SeaBIOS where the guest's driver asks for its device's node",
            );
        }
    }
    misnumbered(plan, &mut warn);
    if plan.nodes.len() > COMMON_NODES {
        warn(
            format!("{} nodes", plan.nodes.len()),
            "kernels that are not configured for more have 64 (NODES_SHIFT=6); Debian's have 1,024",
            "a kernel with a larger NODES_SHIFT",
        );
    }
    let ram_end = plan.ram.iter().map(|range| range.base + range.size).max();
    let top = hbm.last().map(|(range, name)| (range.end(), name));
    if let (Some(ram_end), Some((end, name))) = (ram_end, top)
        && end > ram_end.saturating_add(KASLR_PADDING)
    {
        warn(
            format!("{name} ends {} above RAM", Size(end - ram_end)),
            "older kernels with memory KASLR map 10 TiB above RAM (RANDOMIZE_MEMORY_PHYSICAL_PADDING)",
            "a lower base, more RAM, or the kernel argument nokaslr",
        );
    }
    all
}

fn plan_ranges(hbm: &[(Range, String)]) -> Vec<Range> {
    hbm.iter().map(|(range, _)| *range).collect()
}

/// Bytes that the apertures need, with what else is behind PCI; 0 without one.
fn apertures_end(plan: &Plan) -> u64 {
    if plan.gpus.iter().any(|gpu| gpu.aperture.is_some()) {
        plan.holes.pci_hole64.saturating_sub(PCI_HOLE64)
    } else {
        0
    }
}

/// Address bits of which an eighth is no less than `bytes`.
fn needed_bits(bytes: u64) -> u32 {
    bytes.max(GIB).next_power_of_two().trailing_zeros() + 3
}

/// Domains that Linux does not number in the order of the description.
fn misnumbered(plan: &Plan, warn: &mut impl FnMut(String, &str, &str)) {
    let numbers: Vec<(u32, u32)> = plan
        .domains()
        .filter_map(|domain| Some((domain.pxm, plan.linux_node(domain.pxm)?)))
        .collect();
    if numbers.is_sorted_by_key(|(_, node)| *node) {
        return;
    }
    let list: Vec<String> = numbers
        .iter()
        .map(|(pxm, node)| format!("PXM {pxm} is node {node}"))
        .collect();
    warn(
        format!(
            "Linux numbers the GPUs' nodes out of order ({})",
            list.join(", ")
        ),
        "it numbers domains as the SRAT first names them: Generic Initiators in QEMU's hash order, then ranges by address with the free space between them as the last node's",
        "go by proximity domain or target_node, or leave out `base` and `generic_initiator`",
    );
}

/// What holds on every way of booting, and no test of a guest shows.
pub fn notes(plan: &Plan) -> Vec<String> {
    let mut notes = Vec::new();
    let hbm: u64 = plan.hbm().map(|hbm| hbm.size).sum();
    if hbm > 0 {
        let argument = match plan.guest.driver {
            Driver::User => "dax_hmem.region_idle=1",
            Driver::Kernel => "device_hmem.disable=1",
        };
        notes.push(format!(
            "Linux 6.3 and newer give HBM to kmem, so to the page allocator, unless the kernel is started with {argument}"
        ));
        if plan.has_hmat() && plan.guest.driver == Driver::User {
            notes.push(
                "Linux 5.10 lists each range twice where there is an HMAT; the second dax device stays unbound".to_owned(),
            );
        }
        notes.push(format!(
            "QEMU 11.1 completes a migration without the contents of the {} of HBM: do not migrate or snapshot",
            Size(hbm)
        ));
    }
    if plan.holes.amd && plan.window.end() > AMD_HT.end() {
        notes.push(format!(
            "RAM above 4 GiB and HBM are behind {:#x}, since AMD's CPUs reserve {:#x} to there",
            AMD_HT.end(),
            AMD_HT.base
        ));
    }
    notes
}
