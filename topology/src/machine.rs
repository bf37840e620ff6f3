//! The machine description: what the TOML file says.

use std::collections::BTreeSet;
use std::fmt;

use schemars::JsonSchema;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Deserialize as DeriveDeserialize, Serialize};
use toml::Spanned;

use crate::device::Device;
use crate::error::MachineError;
use crate::size::{GIB, Size};

/// A machine, as its file describes it.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
// Without a CPU node it is parsed, so that the error can say more.
#[schemars(extend("required" = ["name", "cpu"]))]
pub struct Machine {
    /// Name, for output.
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// One line on what it is.
    #[serde(default)]
    pub description: String,
    /// Which real machine it matches, and how far.
    #[serde(default)]
    pub matches: String,
    /// CPU nodes, in the order of their proximity domains, which start at 0.
    #[serde(default)]
    #[schemars(with = "Vec<CpuNode>", length(min = 1))]
    pub cpu: Vec<Spanned<CpuNode>>,
    /// Memory nodes without CPUs, such as the HBM of a CPU package: ordinary RAM, numbered after the CPU nodes.
    #[serde(default)]
    #[schemars(with = "Vec<MemoryNode>")]
    pub memory: Vec<Spanned<MemoryNode>>,
    /// GPUs.
    #[serde(default)]
    #[schemars(with = "Vec<Gpu>")]
    pub gpu: Vec<Spanned<Gpu>>,
    /// Links between GPUs, and between GPUs and CPU nodes.
    #[serde(default)]
    #[schemars(with = "Vec<Link>")]
    pub link: Vec<Spanned<Link>>,
    /// NUMA distances.
    #[serde(default)]
    pub distances: Distances,
    /// What the guest can address.
    #[serde(default)]
    pub limits: Limits,
    /// How HBM is laid out.
    #[serde(default)]
    pub placement: Placement,
    /// What the HBM is made of on the host.
    #[serde(default)]
    pub backing: Backing,
    /// The GPUs' PCI functions.
    #[serde(default)]
    pub device: Device,
    /// What will run in the guest.
    #[serde(default)]
    pub guest: Guest,
    /// Where the values come from.
    #[serde(default)]
    pub source: Vec<Source>,
    /// What the description was read from.
    #[serde(skip)]
    pub text: SourceText,
}

/// The text of a description, kept for the line numbers of errors.
#[derive(Clone, Debug, Default)]
pub struct SourceText {
    /// Name of the file, or of the preset.
    pub file: String,
    /// Contents.
    pub text: String,
}

impl SourceText {
    /// Line of the byte at `offset`, from 1.
    pub fn line(&self, offset: usize) -> usize {
        1 + self
            .text
            .bytes()
            .take(offset)
            .filter(|byte| *byte == b'\n')
            .count()
    }

    /// An error at the byte at `offset`.
    pub fn error(
        &self,
        offset: usize,
        key: impl Into<String>,
        message: impl Into<String>,
        help: Option<String>,
    ) -> MachineError {
        MachineError {
            file: self.file.clone(),
            line: self.line(offset),
            key: key.into(),
            message: message.into(),
            help,
        }
    }
}

/// A node with CPUs and RAM.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuNode {
    /// Its CPUs: as many, numbered on from the node before, or these.
    #[schemars(with = "Cpus")]
    pub cpus: Spanned<Cpus>,
    /// Its RAM; a multiple of 2 MiB. Not needed where a GPU with exposure `ram` brings the node's memory.
    #[serde(default)]
    #[schemars(with = "Size")]
    pub memory: Option<Spanned<Size>>,
    /// Nanoseconds from its CPUs to its RAM; 0 = not known.
    #[serde(default)]
    pub latency_ns: u32,
    /// MB/s from its CPUs to its RAM; 0 = not known.
    #[serde(default)]
    pub bandwidth_mbs: u32,
}

impl CpuNode {
    /// Bytes of RAM of its own, without what GPUs bring.
    pub fn own_memory(&self) -> u64 {
        self.memory.as_ref().map_or(0, |size| size.get_ref().0)
    }
}

/// A node with RAM and without CPUs (Intel Xeon Max in flat mode: HBM of the package).
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryNode {
    /// Its RAM; a multiple of 2 MiB.
    #[schemars(with = "Size")]
    pub memory: Spanned<Size>,
    /// CPU node that it is next to, from 0 in the order of the `[[cpu]]` tables.
    #[schemars(with = "usize")]
    pub cpu: Spanned<usize>,
    /// Nanoseconds from that node's CPUs; 0 = not known.
    #[serde(default)]
    pub latency_ns: u32,
    /// MB/s from that node's CPUs; 0 = not known.
    #[serde(default)]
    pub bandwidth_mbs: u32,
}

/// CPUs of a node: a count, or a list such as `0-15,64-79`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// As many as this, numbered on from the node before.
    Count(u32),
    /// These.
    List(Vec<u32>),
}

/// More CPUs than this are refused: QEMU's q35 has at most 4096.
pub const MAX_CPUS: u32 = 4096;

impl Cpus {
    fn parse(text: &str) -> Result<Cpus, String> {
        let wrong = || format!("`{text}` is not a CPU list: write \"0-15,64-79\" or a count");
        let mut cpus = Vec::new();
        let mut seen = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: u32 = first.trim().parse().map_err(|_| wrong())?;
            let last: u32 = last.trim().parse().map_err(|_| wrong())?;
            if first > last || last >= MAX_CPUS {
                return Err(format!(
                    "CPUs {first}-{last} are not a range within 0-{}",
                    MAX_CPUS - 1
                ));
            }
            // Stops here, so that a list is never longer than there are CPUs.
            if let Some(cpu) = (first..=last).find(|cpu| seen.contains(cpu)) {
                return Err(format!("CPU {cpu} is twice in `{text}`"));
            }
            seen.extend(first..=last);
            cpus.extend(first..=last);
        }
        Ok(Cpus::List(cpus))
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Cpus, D::Error> {
        struct CpusVisitor;
        impl Visitor<'_> for CpusVisitor {
            type Value = Cpus;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of CPUs, or a list such as \"0-15,64-79\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Cpus, E> {
                Cpus::parse(text).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, count: i64) -> Result<Cpus, E> {
                u32::try_from(count)
                    .ok()
                    .filter(|count| (1..=MAX_CPUS).contains(count))
                    .map(Cpus::Count)
                    .ok_or_else(|| {
                        E::custom(format!("a node has 1 to {MAX_CPUS} CPUs, not {count}"))
                    })
            }
        }
        deserializer.deserialize_any(CpusVisitor)
    }
}

/// How HBM reaches the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, DeriveDeserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Exposure {
    /// Soft-reserved memory with a proximity domain of its own, present at boot (AMD MI250X node).
    Spm,
    /// Ordinary memory of its CPU node, which the page allocator owns (AMD MI300A).
    Ram,
    /// A coherent BAR, and proximity domains without memory that the driver fills (NVIDIA GH200).
    Bar,
    /// A BAR of the device, not coherent, without a proximity domain (AMD MI300X on a PCIe host).
    Private,
}

impl fmt::Display for Exposure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Exposure::Spm => "spm",
            Exposure::Ram => "ram",
            Exposure::Bar => "bar",
            Exposure::Private => "private",
        })
    }
}

/// Which node the GPU's PCI function belongs to (its expander bridge's `_PXM`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, DeriveDeserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PciNode {
    /// The CPU node the GPU is attached to.
    #[default]
    Cpu,
    /// The node of its first HBM partition. Needs `generic_initiator`, so that the node is online.
    Hbm,
}

/// A GPU.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Name; `gpu0`, `gpu1` and so on by default.
    #[serde(default)]
    #[schemars(
        with = "String",
        length(max = 32),
        regex(pattern = "^[A-Za-z][A-Za-z0-9_-]*$")
    )]
    pub id: Option<Spanned<String>>,
    /// HBM of all partitions together; each partition is a multiple of 2 MiB.
    #[schemars(with = "Size")]
    pub hbm: Spanned<Size>,
    /// Partitions of equal size, 1 to 8; with exposure `spm` each is a proximity domain of its own. A GPU with exposure
    /// `ram` has 1.
    #[serde(default = "one")]
    #[schemars(with = "u32", range(min = 1, max = 8))]
    pub partitions: Spanned<u32>,
    /// Proximity domains without memory of a GPU with exposure `bar`: as many as partitions, up to 8, which is the
    /// default, as on NVIDIA Grace.
    #[serde(default)]
    #[schemars(with = "u32", range(min = 1, max = 8))]
    pub domains: Option<Spanned<u32>>,
    /// Size of the BAR through which HBM is reached, for exposures `bar` and `private`: a power of two that is no smaller
    /// than the HBM; by default the smallest.
    #[serde(default)]
    #[schemars(with = "Size")]
    pub aperture: Option<Spanned<Size>>,
    /// Nanoseconds from the GPU to its own HBM; 0 = not known. Linux sees it only of a Generic Initiator.
    #[serde(default)]
    pub hbm_latency_ns: u32,
    /// MB/s from the GPU to its own HBM; 0 = not known. Linux sees it only of a Generic Initiator.
    #[serde(default)]
    pub hbm_bandwidth_mbs: u32,
    /// CPU node it is attached to, from 0 in the order of the `[[cpu]]` tables.
    #[schemars(with = "usize")]
    pub cpu: Spanned<usize>,
    /// How its HBM reaches the guest.
    #[serde(default = "spm")]
    #[schemars(with = "Exposure")]
    pub exposure: Spanned<Exposure>,
    /// Which node its PCI function belongs to.
    #[serde(default = "attached")]
    #[schemars(with = "PciNode")]
    pub pci_node: Spanned<PciNode>,
    /// Whether firmware names it as Generic Initiator of its HBM's domains, which keeps those nodes online. By default
    /// only with exposure `bar`, whose domains Linux learns of in no other way.
    #[serde(default)]
    #[schemars(with = "bool")]
    pub generic_initiator: Option<Spanned<bool>>,
    /// Guest physical address of its first partition, with exposure `spm`; chosen if not given. The others follow it.
    #[serde(default)]
    #[schemars(with = "Size")]
    pub base: Option<Spanned<Size>>,
    /// PCI bus it appears on, 2 to 255; chosen if not given.
    #[serde(default)]
    #[schemars(with = "u32", range(min = 2, max = 255))]
    pub bus: Option<Spanned<u32>>,
    /// NUMA node of the host whose memory its HBM is made of, with exposure `spm`; any if not given.
    #[serde(default)]
    #[schemars(with = "u32", range(max = 1023))]
    pub host_node: Option<Spanned<u32>>,
}

impl Gpu {
    /// Whether firmware names it as Generic Initiator of its domains.
    pub fn is_initiator(&self) -> bool {
        let by_default = *self.exposure.get_ref() == Exposure::Bar;
        self.generic_initiator
            .as_ref()
            .map_or(by_default, |is| *is.get_ref())
    }

    /// Proximity domains of its own.
    pub fn domain_count(&self) -> u32 {
        match self.exposure.get_ref() {
            Exposure::Spm => *self.partitions.get_ref(),
            Exposure::Bar => self
                .domains
                .as_ref()
                .map_or(MAX_DOMAINS, |count| *count.get_ref()),
            Exposure::Ram | Exposure::Private => 0,
        }
    }

    /// Bytes of each partition.
    pub fn partition_bytes(&self) -> u64 {
        self.hbm.get_ref().0 / u64::from((*self.partitions.get_ref()).max(1))
    }

    /// Bytes of the BAR through which its HBM is reached; none if it is not reached through one.
    pub fn aperture_bytes(&self) -> Option<u64> {
        match self.exposure.get_ref() {
            Exposure::Bar | Exposure::Private => self.aperture.as_ref().map_or_else(
                || self.hbm.get_ref().0.checked_next_power_of_two(),
                |size| Some(size.get_ref().0),
            ),
            Exposure::Spm | Exposure::Ram => None,
        }
    }
}

/// Most proximity domains of a GPU: what NVIDIA's firmware gives each (`nvidia,gpu-mem-pxm-count`).
pub const MAX_DOMAINS: u32 = 8;

fn spanned<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

fn one() -> Spanned<u32> {
    spanned(1)
}

fn attached() -> Spanned<PciNode> {
    spanned(PciNode::Cpu)
}

fn spm() -> Spanned<Exposure> {
    spanned(Exposure::Spm)
}

/// A link between two GPUs, or a GPU and a CPU node.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// One end: a GPU's id, or `cpu0`, `cpu1` and so on.
    #[schemars(with = "String")]
    pub from: Spanned<String>,
    /// The other end.
    #[schemars(with = "String")]
    pub to: Spanned<String>,
    /// Physical links in parallel, 1 to 64.
    #[serde(default = "one")]
    #[schemars(with = "u32", range(min = 1, max = 64))]
    pub count: Spanned<u32>,
    /// MB/s in one direction, all of them together; 0 = not known.
    #[serde(default)]
    #[schemars(range(max = 4_294_967_295u32), extend("x-unit" = "MB/s"))]
    pub bandwidth_mbs: u32,
    /// Nanoseconds; 0 = not known.
    #[serde(default)]
    #[schemars(range(max = 4_294_967_295u32), extend("x-unit" = "ns"))]
    pub latency_ns: u32,
}

/// NUMA distances (ACPI 6.5, section 5.2.17): 10 on the diagonal, 11 to 254 elsewhere, 255 = cannot reach.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Distances {
    /// The whole matrix by CPU node, then memory node, then HBM in order of GPUs and partitions; overrules all else.
    #[schemars(with = "Vec<Vec<u32>>", inner(inner(range(min = 10, max = 255))))]
    pub matrix: Option<Spanned<Vec<Vec<u32>>>>,
    /// Between CPU nodes.
    #[schemars(with = "u32", range(min = 11, max = 255))]
    pub cpu_cpu: Spanned<u32>,
    /// Between HBM and the CPU node that its GPU is attached to, and between a memory node and the CPU node next to it.
    #[schemars(with = "u32", range(min = 11, max = 255))]
    pub cpu_hbm_local: Spanned<u32>,
    /// Between HBM or a memory node and the other CPU nodes.
    #[schemars(with = "u32", range(min = 11, max = 255))]
    pub cpu_hbm_remote: Spanned<u32>,
    /// Between partitions of one GPU.
    #[schemars(with = "u32", range(min = 11, max = 255))]
    pub hbm_hbm_same_gpu: Spanned<u32>,
    /// Between HBM of GPUs with a link.
    #[schemars(with = "u32", range(min = 11, max = 255))]
    pub hbm_hbm_linked: Spanned<u32>,
    /// Between HBM of GPUs without a link, and between memory nodes and other HBM.
    #[schemars(with = "u32", range(min = 11, max = 255))]
    pub hbm_hbm: Spanned<u32>,
}

impl Default for Distances {
    fn default() -> Distances {
        Distances {
            matrix: None,
            cpu_cpu: spanned(20),
            cpu_hbm_local: spanned(15),
            cpu_hbm_remote: spanned(25),
            hbm_hbm_same_gpu: spanned(12),
            hbm_hbm_linked: spanned(20),
            hbm_hbm: spanned(30),
        }
    }
}

/// What the guest can address.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Physical address bits of its CPUs, 36 to 52.
    #[schemars(with = "u32", range(min = 36, max = 52), extend("x-unit" = "bits"))]
    pub phys_bits: Spanned<u32>,
    /// Where the PCI hole below 4 GiB begins, so the most RAM that is below it: a multiple of 2 MiB from 256 MiB to
    /// 2816 MiB. By default q35's: at 2 GiB with 2816 MiB of RAM or more, otherwise behind the RAM.
    #[schemars(with = "Size")]
    pub pci_hole: Option<Spanned<Size>>,
    /// Size of the PCI hole behind all memory: a multiple of 1 GiB. By default 32 GiB, and what the GPUs' HBM apertures
    /// take.
    #[schemars(with = "Size")]
    pub pci_hole64: Option<Spanned<Size>>,
    /// Whether the range 0xFD00000000 to 1 TiB is reserved, as AMD's CPUs have it; without it the guest's CPUs say that
    /// they are Intel's.
    pub amd_hole: bool,
}

impl Default for Limits {
    /// 40 bits, what QEMU's own emulation has; q35's holes; AMD CPUs.
    fn default() -> Limits {
        Limits {
            phys_bits: spanned(40),
            pci_hole: None,
            pci_hole64: None,
            amd_hole: true,
        }
    }
}

/// Kinds of host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, DeriveDeserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingKind {
    /// Memory files without a name (memfd).
    #[default]
    Memfd,
    /// Memory files without a name, of huge pages.
    Hugetlb,
    /// Files in a directory: the command's `--hbm-dir`, else `directory`.
    File,
}

/// What the HBM is made of on the host.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Backing {
    /// Kind of memory.
    #[schemars(with = "BackingKind")]
    pub kind: Spanned<BackingKind>,
    /// Directory of the files, for `file`: of a file system that has room, such as tmpfs, hugetlbfs or one on a dax device.
    #[schemars(with = "String")]
    pub directory: Option<Spanned<String>>,
    /// Size of the huge pages, for `hugetlb`: 2MiB, the default, or 1GiB.
    #[schemars(with = "Size")]
    pub page: Option<Spanned<Size>>,
}

impl Default for Backing {
    fn default() -> Backing {
        Backing {
            kind: spanned(BackingKind::Memfd),
            directory: None,
            page: None,
        }
    }
}

/// How HBM is laid out.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// Alignment of every HBM range: a power of two from 2 MiB. 2 GiB satisfies every rule of Linux.
    #[schemars(with = "Size")]
    pub align: Spanned<Size>,
    /// Free space between two HBM ranges, a multiple of 2 MiB. With none, OVMF merges them (see `numagpu plan`'s
    /// warnings).
    #[schemars(with = "Size")]
    pub gap: Spanned<Size>,
}

impl Default for Placement {
    fn default() -> Placement {
        Placement {
            align: spanned(Size(2 * GIB)),
            gap: spanned(Size(2 * GIB)),
        }
    }
}

/// Who drives the GPUs in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, DeriveDeserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// A program that maps `/dev/dax*`: dax devices appear, and `kmem` does not take them.
    #[default]
    User,
    /// A kernel module that claims the range itself: no dax device is made.
    Kernel,
}

/// What will run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, DeriveDeserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Guest {
    /// Who drives the GPUs.
    pub driver: Driver,
}

/// How well a value is founded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, DeriveDeserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// Printed by or documented for the real machine.
    Published,
    /// Follows from published values.
    Derived,
    /// Ours, where nothing is published.
    Hypothetical,
    /// Smaller than on the real machine, so that it runs on a small host.
    Scaled,
}

/// Where a value comes from.
#[derive(Clone, Debug, DeriveDeserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Which value.
    pub value: String,
    /// How well it is founded.
    pub mark: Mark,
    /// From where, or why.
    pub from: String,
}
