//! Cloud Hypervisor command lines.
//!
//! Written for version 54, at ae44c2971c83 of its source. What it does with them:
//!
//! * RAM fills 0 to 3 GiB and then goes on at 4 GiB, zone after zone (`arch/src/x86_64/layout.rs`,
//!   `create_memory_regions_from_zones` in `vmm/src/memory_manager.rs`). Its memory map has RAM and reserved ranges only.
//! * Its SRAT and SLIT walk the nodes by ascending `guest_numa_id` (`vmm/src/acpi.rs`), so that the numbers given here are
//!   the ones that Linux shall give: nodes come out as planned. There is no HMAT.
//! * A PCI segment has one bus, 0, and may belong to a node. Each GPU gets a segment of its own and is device 0 there. That
//!   is also the one place at which the PCI handle of its Generic Initiator entries is right: `from_pci_bdf` puts the bus
//!   where device and function belong.
//! * A node with `device_id` and neither CPUs nor memory is a Generic Initiator; any number may name one device.
//! * Its CPUs have no more address bits than the host's.

use std::fmt;

use thiserror::Error;

use crate::machine::Exposure;
use crate::plan::{Gpu, Node, NodeRange, Plan};
use crate::ranges::Range;
use crate::render::text::cpu_list;
use crate::size::{GIB, KIB, MIB, Size};

/// Most PCI segments (`MAX_NUM_PCI_SEGMENTS` in `vmm/src/config.rs`); the first is Cloud Hypervisor's own devices'.
const MAX_SEGMENTS: usize = 96;
/// End of RAM below 4 GiB (`MEM_32BIT_RESERVED_START` in `arch/src/x86_64/layout.rs`).
const LOW_RAM_END: u64 = 3 * GIB;
/// Where RAM goes on (`RAM_64BIT_START`).
const HIGH_RAM: u64 = 4 * GIB;
/// What Cloud Hypervisor keeps at the end of the address space (`mmio_address_space_size` and
/// `PLATFORM_DEVICE_AREA_SIZE` in `vmm/src/memory_manager.rs`).
const TOP_RESERVE: u64 = 64 * KIB + MIB;
/// Granularity of the segments' windows for 64-bit BARs (`create_mmio_allocators` in `vmm/src/device_manager.rs`).
const WINDOW_UNIT: u64 = 4 * GIB;
/// Most address bits of a description.
const MAX_PHYS_BITS: u32 = 52;

/// What the guest starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A Linux image, `bzImage` or `vmlinux`.
    Kernel {
        /// The image.
        image: String,
        /// Initial RAM disk.
        initramfs: Option<String>,
        /// Kernel arguments. A machine that can be carried needs none of its own.
        arguments: String,
    },
    /// Firmware, which starts what it finds on a disk.
    Firmware(String),
}

/// What the plan does not know: where things are on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// What the guest starts.
    pub payload: Payload,
    /// Socket of every GPU, in order.
    pub sockets: Vec<String>,
    /// File that the guest's serial port writes to; the terminal if none.
    pub console: Option<String>,
}

impl Host {
    /// Placeholders for a command line that is printed: sockets as `numagpu serve` makes them in this directory.
    pub fn placeholders(plan: &Plan, socket_dir: &str) -> Host {
        Host {
            payload: Payload::Kernel {
                image: "vmlinuz".to_owned(),
                initramfs: Some("initrd.img".to_owned()),
                arguments: "console=ttyS0".to_owned(),
            },
            sockets: plan
                .gpus
                .iter()
                .map(|gpu| format!("{socket_dir}/{}", Plan::socket_file(gpu)))
                .collect(),
            console: None,
        }
    }
}

/// A command line, and what it loses of the plan without making the guest another machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// Arguments, without the program's name.
    pub arguments: Vec<String>,
    /// What is lost, one line each.
    pub warnings: Vec<String>,
}

/// Everything for which Cloud Hypervisor cannot carry a machine; never empty.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("Cloud Hypervisor cannot carry this machine: {}", joined(.0))]
pub struct CloudHypervisorError(pub Vec<Obstacle>);

/// Something that Cloud Hypervisor cannot express.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Obstacle {
    /// HBM that is soft reserved.
    #[error(
        "{ranges} HBM range(s) of {} in all ({}) are soft reserved, and its memory map has RAM and reserved ranges only (use --format qemu)",
        Size(*bytes), listed(gpus)
    )]
    SoftReserved {
        /// Number of ranges.
        ranges: usize,
        /// Bytes of all of them.
        bytes: u64,
        /// GPUs whose HBM it is.
        gpus: Vec<String>,
    },
    /// More GPUs than PCI segments.
    #[error(
        "{gpus} GPUs need a PCI segment each, and it has {} beside the one of its own devices",
        MAX_SEGMENTS - 1
    )]
    TooManyGpus {
        /// GPUs of the machine.
        gpus: usize,
    },
    /// Apertures that do not fit into the windows of the GPUs' PCI segments.
    #[error(
        "the 64-bit BARs of {} GPU(s) (apertures: {}) do not fit into {:#x}..{:#x}, which its PCI segments divide among themselves{}",
        apertures.len(), listed(apertures), space.base, space.end(), bits(*needed)
    )]
    Apertures {
        /// GPUs with the sizes of their apertures.
        apertures: Vec<String>,
        /// What is left behind RAM.
        space: Range,
        /// Address bits with which they fit, if there are any.
        needed: Option<u32>,
    },
    /// The host has more or fewer sockets than the plan needs.
    #[error("the plan has {planned} GPUs, the host {given} sockets")]
    Sockets {
        /// GPUs of the plan.
        planned: usize,
        /// Sockets that were given.
        given: usize,
    },
}

fn joined<T: fmt::Display>(all: &[T]) -> String {
    all.iter()
        .map(T::to_string)
        .collect::<Vec<_>>()
        .join("; and ")
}

fn listed(all: &[String]) -> String {
    all.join(", ")
}

fn bits(needed: Option<u32>) -> String {
    needed.map_or_else(String::new, |bits| {
        format!("; they do with limits.phys_bits = {bits}")
    })
}

/// A value for Cloud Hypervisor's option parser: quoted where a comma, bracket or quote would end or open something.
fn value(text: &str) -> String {
    if text.contains([',', '[', ']', '"']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

/// The number of a GPU's PCI segment.
fn segment(gpu: &Gpu) -> u32 {
    gpu.index + 1
}

/// Where a GPU appears: device 0 of the only bus of its segment.
pub fn bdf(gpu: &Gpu) -> String {
    format!("{:04x}:00:00.0", segment(gpu))
}

/// Where RAM goes, ascending.
fn ram(plan: &Plan) -> Vec<NodeRange> {
    let mut all = Vec::new();
    let mut next = 0;
    for node in plan.ram_nodes() {
        let mut left: u64 = node.ranges.iter().map(|range| range.size).sum();
        while left > 0 {
            let room = if next < LOW_RAM_END {
                LOW_RAM_END - next
            } else {
                next = next.max(HIGH_RAM);
                u64::MAX - next
            };
            let size = left.min(room);
            all.push(NodeRange {
                pxm: node.pxm,
                base: next,
                size,
            });
            next += size;
            left -= size;
        }
    }
    all
}

/// Where the segments' windows for 64-bit BARs are: behind RAM, to the end of what `phys_bits` reach.
fn device_space(plan: &Plan, phys_bits: u32) -> Range {
    let ram_end = ram(plan).last().map_or(0, |last| last.base + last.size);
    let base = ram_end.max(HIGH_RAM);
    let end = (1u64 << phys_bits.min(MAX_PHYS_BITS)).saturating_sub(TOP_RESERVE);
    Range {
        base,
        size: end.saturating_sub(base),
    }
}

/// The segments' windows in a space, as Cloud Hypervisor divides it by weight; none if there is nothing for each.
fn windows(space: Range, weights: &[u64]) -> Option<Vec<Range>> {
    let unit = space.size / (WINDOW_UNIT * weights.iter().sum::<u64>().max(1)) * WINDOW_UNIT;
    let mut next = space.base;
    let mut all: Vec<Range> = Vec::new();
    for weight in weights {
        let size = unit * weight;
        all.push(Range { base: next, size });
        next += size;
    }
    // What the division leaves is the last one's.
    if let Some(last) = all.last_mut() {
        last.size = space.end() - last.base;
    }
    all.iter().all(|window| window.size > 0).then_some(all)
}

/// Whether a naturally aligned BAR fits into a window.
fn holds(window: &Range, bar: u64) -> bool {
    let base = window.base.checked_next_multiple_of(bar.max(1));
    let end = base.and_then(|base| base.checked_add(bar));
    end.is_some_and(|end| end <= window.end())
}

/// Weights of the segments, the first being Cloud Hypervisor's own devices': equal ones if they do, else some by which
/// segments with larger BARs get more; none if nothing fits.
fn weights(plan: &Plan, phys_bits: u32) -> Option<Vec<u64>> {
    let bar = |gpu: &Gpu| gpu.aperture.map_or(0, |aperture| aperture.size);
    let space = device_space(plan, phys_bits);
    let fit = |weights: &Vec<u64>| {
        windows(space, weights).is_some_and(|windows| {
            let own = windows.iter().skip(1);
            own.zip(&plan.gpus)
                .all(|(window, gpu)| holds(window, bar(gpu)))
        })
    };
    // A window has a granularity, so that small BARs need as much as one of that size.
    let least = |gpu: &Gpu| bar(gpu).max(WINDOW_UNIT);
    let smallest = plan.gpus.iter().map(least).min().unwrap_or(WINDOW_UNIT);
    let weighted = |share: u64| {
        let needs = plan.gpus.iter().map(|gpu| least(gpu) / smallest * share);
        std::iter::once(1).chain(needs).collect()
    };
    let equal = vec![1; plan.gpus.len() + 1];
    let shares = [1, 2, 4, 8, 16, 32].into_iter().map(weighted);
    std::iter::once(equal).chain(shares).find(fit)
}

fn obstacles(plan: &Plan, host: &Host) -> Vec<Obstacle> {
    let mut all = Vec::new();
    let soft: Vec<_> = plan.hbm().collect();
    if !soft.is_empty() {
        let owners = plan.gpus.iter();
        all.push(Obstacle::SoftReserved {
            ranges: soft.len(),
            bytes: soft.iter().map(|hbm| hbm.size).sum(),
            gpus: owners
                .filter(|gpu| gpu.exposure == Exposure::Spm)
                .map(|gpu| gpu.id.clone())
                .collect(),
        });
    }
    if plan.gpus.len() >= MAX_SEGMENTS {
        let gpus = plan.gpus.len();
        all.push(Obstacle::TooManyGpus { gpus });
    } else if weights(plan, plan.phys_bits).is_none() {
        let size = |gpu: &Gpu| {
            let size = gpu.aperture.map_or(0, |aperture| aperture.size);
            format!("{} {}", gpu.id, Size(size))
        };
        all.push(Obstacle::Apertures {
            apertures: plan.gpus.iter().map(size).collect(),
            space: device_space(plan, plan.phys_bits),
            needed: (plan.phys_bits..=MAX_PHYS_BITS).find(|bits| weights(plan, *bits).is_some()),
        });
    }
    if host.sockets.len() != plan.gpus.len() {
        all.push(Obstacle::Sockets {
            planned: plan.gpus.len(),
            given: host.sockets.len(),
        });
    }
    all
}

fn warnings(plan: &Plan) -> Vec<String> {
    let mut all = Vec::new();
    let now = ram(plan);
    if now != plan.ram {
        let list = |ranges: &[NodeRange]| {
            let range =
                |r: &NodeRange| format!("{:#x}..{:#x} PXM {}", r.base, r.base + r.size, r.pxm);
            ranges.iter().map(range).collect::<Vec<_>>().join(", ")
        };
        all.push(format!(
            "RAM is at {}, not at {}: Cloud Hypervisor fills 0 to 3 GiB and goes on at 4 GiB; each node has as much as planned",
            list(&now),
            list(&plan.ram)
        ));
    }
    let moved: Vec<String> = plan
        .nodes
        .iter()
        .filter(|node| node.pxm != node.linux_node)
        .map(|node| format!("PXM {} is {}", node.pxm, node.linux_node))
        .collect();
    if !moved.is_empty() {
        all.push(format!(
            "proximity domains have the numbers of Linux's nodes ({}): Cloud Hypervisor names them in ascending order",
            moved.join(", ")
        ));
    }
    if !plan.gpus.is_empty() {
        let at = |gpu: &Gpu| format!("{} at {}, not {}", gpu.id, bdf(gpu), gpu.bdf);
        let gpus: Vec<String> = plan.gpus.iter().map(at).collect();
        all.push(format!(
            "GPUs have other PCI addresses ({}): Cloud Hypervisor's PCI segments have one bus, 0, and one node each",
            gpus.join(", ")
        ));
    }
    if plan.has_hmat() {
        all.push(format!(
            "latencies and bandwidths of {} pair(s) of nodes are lost: Cloud Hypervisor writes no HMAT",
            plan.accesses.len()
        ));
    }
    all
}

/// Name of the memory zone of a node.
fn zone(node: &Node) -> String {
    format!("mem{}", node.linux_node)
}

/// The settings of a node.
fn numa(plan: &Plan, node: &Node) -> String {
    let mut text = format!("guest_numa_id={}", node.linux_node);
    if !node.cpus.is_empty() {
        text += &format!(",cpus=[{}]", cpu_list(&node.cpus));
    }
    if !node.ranges.is_empty() {
        text += &format!(",memory_zones=[{}]", zone(node));
    }
    let initiator = plan.gpus.iter().find(|gpu| {
        let mut domains = gpu.domains.iter();
        domains.any(|domain| domain.pxm == node.pxm && domain.initiator.is_some())
    });
    if let Some(gpu) = initiator {
        text += &format!(",device_id=gpu{}", gpu.index);
    }
    let others = plan.nodes.iter().filter(|other| other.pxm != node.pxm);
    let mut distances: Vec<(u32, u8)> = others
        .filter_map(|other| Some((other.linux_node, plan.distance(node.pxm, other.pxm)?)))
        .collect();
    distances.sort_unstable();
    let distances: Vec<String> = distances
        .iter()
        .map(|(to, distance)| format!("{to}@{distance}"))
        .collect();
    if !distances.is_empty() {
        text += &format!(",distances=[{}]", distances.join(","));
    }
    let here = plan.gpus.iter().filter(|gpu| gpu.pci_pxm == node.pxm);
    let segments: Vec<String> = here.map(|gpu| segment(gpu).to_string()).collect();
    if !segments.is_empty() {
        text += &format!(",pci_segments=[{}]", segments.join(","));
    }
    text
}

/// Cloud Hypervisor's arguments, and what is lost.
///
/// # Errors
/// [`CloudHypervisorError`] with everything that Cloud Hypervisor cannot express and that would make the guest another
/// machine.
pub fn command_line(plan: &Plan, host: &Host) -> Result<CommandLine, CloudHypervisorError> {
    let obstacles = obstacles(plan, host);
    if !obstacles.is_empty() {
        return Err(CloudHypervisorError(obstacles));
    }
    let mut arguments: Vec<String> = Vec::new();
    let mut arg = |option: &str, value: String| arguments.extend([option.to_owned(), value]);

    let (cpus, cores) = (plan.cpu_count(), plan.cores_per_socket());
    let packages = cpus / cores as usize;
    arg(
        "--cpus",
        format!(
            "boot={cpus},topology=1:{cores}:1:{packages},max_phys_bits={}",
            plan.phys_bits
        ),
    );
    if !plan.gpus.is_empty() {
        let segments = plan.gpus.len() + 1;
        arg("--platform", format!("num_pci_segments={segments}"));
    }
    let weights = weights(plan, plan.phys_bits).unwrap_or_default();
    for (segment, weight) in weights
        .iter()
        .enumerate()
        .filter(|(_, weight)| **weight > 1)
    {
        arg(
            "--pci-segment",
            format!("pci_segment={segment},mmio64_aperture_weight={weight}"),
        );
    }
    arg("--memory", "size=0".to_owned());
    for node in plan.ram_nodes() {
        let size: u64 = node.ranges.iter().map(|range| range.size).sum();
        let (zone, size) = (zone(node), size / MIB);
        arg("--memory-zone", format!("id={zone},size={size}M,shared=on"));
    }
    let mut nodes: Vec<&Node> = plan.nodes.iter().collect();
    nodes.sort_by_key(|node| node.linux_node);
    for node in nodes {
        arg("--numa", numa(plan, node));
    }
    for (gpu, socket) in plan.gpus.iter().zip(&host.sockets) {
        let (socket, segment) = (value(socket), segment(gpu));
        arg(
            "--user-device",
            format!(
                "socket={socket},id=gpu{},pci_segment={segment},pci_device_id=0",
                gpu.index
            ),
        );
    }
    match &host.payload {
        Payload::Kernel {
            image,
            initramfs,
            arguments,
        } => {
            arg("--kernel", image.clone());
            if let Some(initramfs) = initramfs {
                arg("--initramfs", initramfs.clone());
            }
            arg("--cmdline", arguments.clone());
        }
        Payload::Firmware(image) => arg("--firmware", image.clone()),
    }
    let serial = host.console.as_ref();
    let serial = serial.map_or_else(|| "tty".to_owned(), |path| format!("file={}", value(path)));
    arg("--serial", serial);
    arg("--console", "off".to_owned());
    Ok(CommandLine {
        arguments,
        warnings: warnings(plan),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Cloud Hypervisor logged them for 40 address bits, 1 GiB of RAM and 3 segments.
    #[test]
    fn windows_are_divided_as_cloud_hypervisor_divides_them() {
        let space = Range {
            base: 4 * GIB,
            size: (1 << 40) - TOP_RESERVE - 4 * GIB,
        };
        let ends = |weights: &[u64]| {
            let all = windows(space, weights).unwrap();
            let ends = all.iter().map(|window| (window.base, window.end() - 1));
            ends.collect::<Vec<_>>()
        };
        assert_eq!(
            ends(&[1, 1, 1]),
            [
                (0x1_0000_0000, 0x54_ffff_ffff),
                (0x55_0000_0000, 0xa8_ffff_ffff),
                (0xa9_0000_0000, 0xff_ffee_ffff),
            ]
        );
        // 255 units of 4 GiB for 256 segments.
        assert_eq!(windows(space, &[1; 256]), None);
    }

    #[test]
    fn values_survive_the_option_parser() {
        assert_eq!(value("dir/gpu0.sock"), "dir/gpu0.sock");
        assert_eq!(value("a,b"), "\"a,b\"");
        assert_eq!(value("[\"x\"]"), "\"[\"\"x\"\"]\"");
    }
}
