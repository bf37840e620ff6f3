//! What a guest reports of the machine it found itself in.
//!
//! The guest agent fills a [`Report`] and sends it to the host as one JSON object; [`crate::verify`] compares it with the plan.

use serde::{Deserialize, Serialize};

use crate::ranges::Range;

/// Byte before each message, and a line feed after it: a JSON text sequence (RFC 7464).
pub const SEPARATOR: u8 = 0x1e;

/// One message that the agent sends.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "message")]
pub enum Message {
    /// What it is doing.
    Progress {
        /// In a few words.
        text: String,
    },
    /// It has written patterns into HBM, owns it, and waits for a line from the host.
    Held {
        /// Where the patterns are.
        patterns: Vec<Pattern>,
    },
    /// All that it saw; the last line.
    Report(Box<Report>),
}

/// Bytes at an address of HBM: 8-byte little-endian words, word `i` being `seed + i`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pattern {
    /// Position of the GPU in the machine.
    pub gpu: u32,
    /// Partition.
    pub partition: u32,
    /// Offset in the partition.
    pub offset: u64,
    /// Bytes, a multiple of 8.
    pub len: u64,
    /// First word.
    pub seed: u64,
}

/// All that the agent saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Kernel release.
    pub kernel: String,
    /// Kernel command line.
    pub command_line: String,
    /// Soft-reserved ranges of the memory map, as the kernel printed them.
    pub soft_reserved: Vec<Range>,
    /// Usable ranges of the memory map.
    pub usable: Vec<Range>,
    /// `MemTotal` in KiB at the start, with all HBM in use, and at the end.
    pub mem_total_kib: Vec<u64>,
    /// Nodes that could be.
    pub nodes_possible: Vec<u32>,
    /// Nodes that are.
    pub nodes_online: Vec<u32>,
    /// Nodes that the kernel knows a Generic Initiator of.
    pub nodes_initiator: Vec<u32>,
    /// The nodes that are online.
    pub nodes: Vec<NodeSeen>,
    /// Memory entries of the SRAT that are enabled and not empty.
    pub srat_memory: Vec<SratMemory>,
    /// Proximity domains of the SRAT's Generic Initiators, in order.
    pub srat_initiators: Vec<u32>,
    /// The SLIT by proximity domain.
    pub slit: Vec<Vec<u8>>,
    /// ACPI tables by signature.
    pub acpi_tables: Vec<String>,
    /// dax devices, by address.
    pub dax: Vec<DaxSeen>,
    /// GPUs, by position in the machine.
    pub gpus: Vec<GpuSeen>,
    /// What functions did that the guest passed on by VFIO, if it was told to: [`steps::passthrough`].
    pub passthrough: Vec<Step>,
    /// What the agent could not do or did not expect.
    pub problems: Vec<String>,
}

/// An online node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSeen {
    /// Number.
    pub node: u32,
    /// CPUs.
    pub cpus: Vec<u32>,
    /// Distances to the online nodes, in their order.
    pub distances: Vec<u32>,
    /// `MemTotal` of the node in KiB.
    pub mem_total_kib: u64,
    /// Access classes that Linux shows, in order: 0 is of any initiator, 1 of those with CPUs.
    pub access: Vec<AccessSeen>,
}

/// An access class of a node: who reaches its memory best, and how fast.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessSeen {
    /// Number of the class.
    pub class: u32,
    /// Nodes of the initiators.
    pub initiators: Vec<u32>,
    /// Nanoseconds of a read and of a write; 0 = not known.
    pub latency_ns: (u32, u32),
    /// MB/s of reads and of writes; 0 = not known.
    pub bandwidth_mbs: (u32, u32),
}

/// A memory entry of the SRAT.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SratMemory {
    /// Proximity domain.
    pub pxm: u32,
    /// Addresses.
    pub range: Range,
    /// Whether it is marked as hot-pluggable.
    pub hotplug: bool,
}

/// A dax device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaxSeen {
    /// Name, such as `dax0.0`.
    pub name: String,
    /// Addresses of the region it is carved from.
    pub region: Range,
    /// Bytes of the device once the agent has sized it.
    pub size: u64,
    /// Unit in which it can be mapped.
    pub align: u64,
    /// Node that its memory would be if it were onlined.
    pub target_node: i32,
    /// Online node next to it.
    pub numa_node: i32,
    /// Driver that owns it.
    pub driver: String,
}

/// A GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuSeen {
    /// Position in the machine, as its register says.
    pub index: u32,
    /// PCI address without the segment.
    pub bdf: String,
    /// Vendor and device id.
    pub ids: (u16, u16),
    /// Class code.
    pub class: u32,
    /// Node of the PCI function, -1 = none.
    pub numa_node: i32,
    /// Hive, position and size.
    pub hive: (u64, u32, u32),
    /// Links: peer's position or 0xffffffff, physical links, MB/s.
    pub links: Vec<(u32, u32, u32)>,
    /// Partitions as their registers say.
    pub partitions: Vec<PartitionSeen>,
    /// Name of `CLOCK.MODE`.
    pub clock: String,
    /// Blocks that `DISCOVERY` lists, with their instances, in order.
    pub blocks: Vec<(String, u32)>,
    /// What `lspci -n -vvv` prints of the function, with memory decoding and bus mastering on. What it complains of is among
    /// the report's problems.
    pub lspci: String,
    /// What the driver did and how it went.
    pub steps: Vec<Step>,
    /// What accesses to its registers cost, if the agent was told to time them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_times: Option<AccessTimes>,
}

/// Nanoseconds of an access to a register as a driver sees it: a figure for each block of accesses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessTimes {
    /// Of a read.
    pub read_ns: Vec<u64>,
    /// Of a write, up to the last store of the block.
    pub write_ns: Vec<u64>,
    /// Of the same writes, up to the answer to a read behind them: the device has done them all.
    pub done_ns: Vec<u64>,
}

/// A partition's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionSeen {
    /// Addresses.
    pub range: Range,
    /// Proximity domain.
    pub pxm: u32,
    /// Name of the coherence code.
    pub coherence: String,
}

/// Something that the driver did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Which, one of [`steps`].
    pub name: String,
    /// Whether it came out as it should.
    pub ok: bool,
    /// What came out.
    pub detail: String,
}

/// What a driver does with a GPU: [`steps::ALL`] if it has HBM of its own, [`steps::UNIFIED`] if not.
pub mod steps {
    /// The list of register blocks is the register map's.
    pub const BLOCKS: &str = "register blocks and packets";
    /// PCI capabilities that a driver needs are there.
    pub const CAPABILITIES: &str = "PCI capabilities";
    /// Boot handshake to READY.
    pub const BOOT: &str = "boot handshake";
    /// The device's clock runs.
    pub const CLOCK: &str = "clock runs";
    /// Claim of every partition.
    pub const CLAIM: &str = "claim";
    /// A second claim is refused.
    pub const SECOND_CLAIM: &str = "second claim refused";
    /// HBM written and read by the CPU, through its dax device or the GPU's aperture.
    pub const CPU_ACCESS: &str = "CPU writes and reads HBM";
    /// RAM to HBM by the copy engine.
    pub const COPY_IN: &str = "copy RAM to HBM";
    /// HBM to a peer's HBM by the copy engine.
    pub const COPY_PEER: &str = "copy HBM to peer";
    /// HBM to RAM by the copy engine.
    pub const COPY_OUT: &str = "copy peer to RAM";
    /// RAM to RAM by the copy engine.
    pub const COPY_RAM: &str = "copy RAM to RAM";
    /// Links are up and count at both ends what copies move.
    pub const LINKS: &str = "links count bytes";
    /// Fences in order, with their values.
    pub const FENCES: &str = "fences";
    /// Copy of a box between surfaces with pitches.
    pub const SUB_WINDOW: &str = "sub-window copy";
    /// Write of words and fill.
    pub const WRITES: &str = "write and fill";
    /// A poll that waits, and one that gives up.
    pub const POLLS: &str = "polls";
    /// Atomic operations.
    pub const ATOMICS: &str = "atomics";
    /// Time stamps in order.
    pub const TIMESTAMPS: &str = "time stamps";
    /// Queues of two priorities.
    pub const PRIORITIES: &str = "queue priorities";
    /// The MSI-X message of a trap.
    pub const INTERRUPT: &str = "interrupt";
    /// A bad packet stops its queue alone, with an MSI-X message; a reset recovers it.
    pub const FAULT: &str = "queue fault and recovery";
    /// HBM that another driver owns is out of reach.
    pub const FOREIGN: &str = "foreign HBM refused";
    /// Release of every partition.
    pub const RELEASE: &str = "release";
    /// The next owner reads zeros.
    pub const SCRUBBED: &str = "next owner reads zeros";
    /// Ownership commands that are refused.
    pub const REFUSALS: &str = "ownership refusals";
    /// Transfer to another driver.
    pub const TRANSFER: &str = "transfer";
    /// A lease that ends takes the partition, with an MSI-X message.
    pub const LEASE: &str = "lease that ends";
    /// Function-level reset gives a working device.
    pub const RESET: &str = "function-level reset";
    /// Another number of partitions and back.
    pub const MODES: &str = "partition modes";
    /// No memory errors.
    pub const HEALTH: &str = "no memory errors";
    /// A retired page is closed to engines.
    pub const RETIRE: &str = "retired page refused";
    /// What every GPU with HBM of its own goes through, in order.
    pub const ALL: &[&str] = &[
        BLOCKS,
        CAPABILITIES,
        BOOT,
        CLOCK,
        CLAIM,
        SECOND_CLAIM,
        CPU_ACCESS,
        COPY_IN,
        COPY_PEER,
        COPY_OUT,
        LINKS,
        FENCES,
        SUB_WINDOW,
        WRITES,
        POLLS,
        ATOMICS,
        TIMESTAMPS,
        PRIORITIES,
        INTERRUPT,
        FAULT,
        FOREIGN,
        RELEASE,
        SCRUBBED,
        REFUSALS,
        TRANSFER,
        LEASE,
        RESET,
        MODES,
        HEALTH,
        RETIRE,
    ];
    /// What every GPU without goes through, in order: one that works in the machine's RAM.
    pub const UNIFIED: &[&str] = &[
        BLOCKS,
        CAPABILITIES,
        BOOT,
        CLOCK,
        COPY_RAM,
        LINKS,
        FENCES,
        SUB_WINDOW,
        WRITES,
        POLLS,
        ATOMICS,
        TIMESTAMPS,
        PRIORITIES,
        INTERRUPT,
        FAULT,
        RESET,
        HEALTH,
    ];

    /// What a driver meets of a scenario's faults, each by the name of its kind.
    pub mod faults {
        /// The peer's first boot fails, its second does not.
        pub const FIRST_BOOT: &str = "boot-failure at power-on";
        /// A memory error that was corrected.
        pub const CORRECTABLE: &str = "correctable-error";
        /// One that was not.
        pub const UNCORRECTABLE: &str = "uncorrectable-error";
        /// A queue that stands still.
        pub const ENGINE_HANG: &str = "engine-hang";
        /// Doorbells that are not heard.
        pub const LOST_DOORBELL: &str = "lost-doorbell";
        /// A message that does not come.
        pub const LOST_INTERRUPT: &str = "lost-interrupt";
        /// A message for no cause.
        pub const SPURIOUS_INTERRUPT: &str = "spurious-interrupt";
        /// A link that is down for a while.
        pub const LINK_FLAP: &str = "link-flap";
        /// A link that goes down.
        pub const LINK_LOSS: &str = "link-loss";
        /// And comes up.
        pub const LINK_RETURN: &str = "link-return";
        /// A link that keeps some lanes.
        pub const LINK_WIDTH: &str = "link-width";
        /// A partition that cannot be scrubbed.
        pub const SCRUB_FAILURE: &str = "scrub-failure";
        /// A boot that fails.
        pub const BOOT_FAILURE: &str = "boot-failure";
        /// A boot that never ends.
        pub const BOOT_TIMEOUT: &str = "boot-timeout";
        /// A function that does not answer after its reset.
        pub const STUCK_RESET: &str = "stuck-reset";
        /// A function that is gone.
        pub const REMOVAL: &str = "removal";
        /// And comes back.
        pub const RETURN: &str = "return";
        /// All of them, in order.
        pub const ALL: &[&str] = &[
            FIRST_BOOT,
            CORRECTABLE,
            UNCORRECTABLE,
            ENGINE_HANG,
            LOST_DOORBELL,
            LOST_INTERRUPT,
            SPURIOUS_INTERRUPT,
            LINK_FLAP,
            LINK_LOSS,
            LINK_RETURN,
            LINK_WIDTH,
            SCRUB_FAILURE,
            BOOT_FAILURE,
            BOOT_TIMEOUT,
            STUCK_RESET,
            REMOVAL,
            RETURN,
        ];
    }

    /// What functions do that the guest passes on by VFIO, behind an IOMMU of its own.
    pub mod passthrough {
        /// QEMU's `edu` device opened, and HBM mapped for it.
        pub const EDU_MAP: &str = "edu: HBM in the container";
        /// HBM to HBM through the device's buffer.
        pub const EDU_DMA: &str = "edu: DMA from HBM to HBM";
        /// An address that is taken.
        pub const EDU_TAKEN: &str = "edu: address taken";
        /// DMA to what was unmapped.
        pub const EDU_UNMAPPED: &str = "edu: unmapped HBM out of reach";
        /// DMA to what was mapped again.
        pub const EDU_AGAIN: &str = "edu: HBM mapped again";
        /// A GPU opened and booted, with nothing mapped.
        pub const GPU_OPEN: &str = "GPU: boot without HBM";
        /// HBM and RAM in its address space.
        pub const GPU_MAP: &str = "GPU: HBM and RAM in the container";
        /// Copies by addresses of the IOMMU.
        pub const GPU_COPY: &str = "GPU: copy by IOVA";
        /// A fence to RAM that was unmapped.
        pub const GPU_UNMAPPED: &str = "GPU: unmapped RAM out of reach";
        /// All of them, in order.
        pub const ALL: &[&str] = &[
            EDU_MAP,
            EDU_DMA,
            EDU_TAKEN,
            EDU_UNMAPPED,
            EDU_AGAIN,
            GPU_OPEN,
            GPU_MAP,
            GPU_COPY,
            GPU_UNMAPPED,
        ];
    }
}
