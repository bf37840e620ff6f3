//! Register blocks of BAR 0.
//!
//! Every register is little-endian. A read of an address that no register has gives zero, a write there is
//! dropped. All addresses in registers and packets are the guest's bus addresses, which equal its physical
//! addresses where no IOMMU stands before the device.

use bitflags::bitflags;

use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg, check};

/// Partitions that the register map has room for.
pub const MAX_PARTITIONS: u32 = 8;
/// Queues that the register map has room for.
pub const MAX_QUEUES: u32 = 8;
/// Links that the register map has room for.
pub const MAX_LINKS: u32 = 32;

/// Value of `IDENTITY.MAGIC`: `NGPU` in ASCII, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"NGPU");
/// Value of `IDENTITY.VERSION`: major in the upper half, minor in the lower. A driver refuses another major.
pub const VERSION: u32 = 0x0001_0002;

/// `IDENTITY`: what the device is.
pub mod identity {
    use super::*;
    /// Offset of the block.
    pub const BASE: u32 = 0x0000;
    /// Always [`MAGIC`].
    pub const MAGIC: Reg = Reg::ro("MAGIC", 0x00, W4, "`NGPU` in ASCII").reset(super::MAGIC as u64);
    /// Register map version.
    pub const VERSION: Reg = Reg::ro(
        "VERSION",
        0x04,
        W4,
        "register map version, major << 16 | minor",
    )
    .reset(super::VERSION as u64);
    /// Bits of [`super::Caps`].
    pub const CAPS: Reg = Reg::ro("CAPS", 0x08, W8, "capability bits");
    /// Index of the GPU in its machine description.
    pub const GPU_INDEX: Reg = Reg::ro("GPU_INDEX", 0x10, W4, "index of this GPU in the machine");
    /// HBM partitions; 0 if the GPU works in the machine's RAM and has no HBM of its own (exposure `ram`).
    pub const PARTITION_COUNT: Reg =
        Reg::ro("PARTITION_COUNT", 0x14, W4, "HBM partitions, 0 = none");
    /// Copy queues.
    pub const QUEUE_COUNT: Reg = Reg::ro("QUEUE_COUNT", 0x18, W4, "copy queues");
    /// MSI-X vectors.
    pub const VECTOR_COUNT: Reg = Reg::ro("VECTOR_COUNT", 0x1c, W4, "MSI-X vectors");
    /// Bytes between doorbells in BAR 2.
    pub const DOORBELL_STRIDE: Reg = Reg::ro(
        "DOORBELL_STRIDE",
        0x20,
        W4,
        "bytes between the doorbells of two queues",
    )
    .reset(8);
    /// Free for the driver; survives nothing but reads and writes.
    pub const SCRATCH: Reg = Reg::rw("SCRATCH", 0x24, W4, "free for the driver, cleared by reset");
    /// The block.
    pub const BLOCK: Block = Block {
        name: "IDENTITY",
        base: BASE,
        stride: 0x100,
        count: 1,
        regs: &[
            MAGIC,
            VERSION,
            CAPS,
            GPU_INDEX,
            PARTITION_COUNT,
            QUEUE_COUNT,
            VECTOR_COUNT,
            DOORBELL_STRIDE,
            SCRATCH,
        ],
        doc: "what the device is",
    };
}

bitflags! {
    /// Bits of `IDENTITY.CAPS`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Caps: u64 {
        /// CPUs reach the HBM coherently: it is memory of the guest's physical address space (exposure `spm`), or its
        /// aperture is coherent (exposure `bar`).
        const COHERENT_HBM = 1 << 0;
        /// Queues reach the HBM of the other GPUs of the hive.
        const PEER_COPY = 1 << 1;
        /// CPUs reach the HBM through [`crate::pci::BAR_APERTURE`] (exposures `bar` and `private`); `HBM_BASE` is then
        /// an address of the device's own.
        const HBM_APERTURE = 1 << 2;
    }
}

/// `BOOT`: the handshake that brings the device up.
pub mod boot {
    use super::*;
    /// Offset of the block.
    pub const BASE: u32 = 0x0100;
    /// Bit 0 starts the boot when `STATUS` is reset.
    pub const CONTROL: Reg = Reg::rw(
        "CONTROL",
        0x00,
        W4,
        "bit 0: start; ignored unless STATUS is RESET",
    )
    .writable(1)
    .effect();
    /// One of [`super::BootState`].
    pub const STATUS: Reg = Reg::ro("STATUS", 0x04, W4, "0 RESET, 1 BOOTING, 2 READY, 3 FAULT");
    /// Why the boot failed; 0 if it did not.
    pub const FAULT: Reg = Reg::ro("FAULT", 0x08, W4, "boot fault code, 0 = none");
    /// How long a boot takes.
    pub const DELAY_US: Reg = Reg::ro("DELAY_US", 0x0c, W4, "modelled boot time in microseconds");
    /// The block.
    pub const BLOCK: Block = Block {
        name: "BOOT",
        base: BASE,
        stride: 0x100,
        count: 1,
        regs: &[CONTROL, STATUS, FAULT, DELAY_US],
        doc: "boot handshake",
    };
}

/// `CONTROL` bit that starts the boot.
pub const BOOT_START: u32 = 1;

/// `IRQ`: what raised an interrupt.
pub mod irq {
    use super::*;
    /// Offset of the block.
    pub const BASE: u32 = 0x0200;
    /// Pending causes, bits of [`super::IrqBits`]; set whether enabled or not.
    pub const STATUS: Reg =
        Reg::ro("STATUS", 0x00, W4, "pending causes, write ones to clear").w1c(0xffff_ffff);
    /// Causes that send an MSI-X message.
    pub const ENABLE: Reg = Reg::rw("ENABLE", 0x04, W4, "causes that send an MSI-X message");
    /// Messages sent since reset.
    pub const RAISED: Reg = Reg::ro("RAISED", 0x08, W8, "MSI-X messages sent since reset");
    /// The block.
    pub const BLOCK: Block = Block {
        name: "IRQ",
        base: BASE,
        stride: 0x100,
        count: 1,
        regs: &[STATUS, ENABLE, RAISED],
        doc: "interrupt causes",
    };
}

bitflags! {
    /// Bits of `IRQ.STATUS` and `IRQ.ENABLE`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqBits: u32 {
        /// A queue stopped with a fault; vector [`crate::pci::VECTOR_EVENTS`].
        const FAULT = 1 << 0;
        /// A partition changed hands without its owner asking; vector [`crate::pci::VECTOR_EVENTS`].
        const OWNERSHIP = 1 << 1;
        /// Queue 0 executed a TRAP packet; vector [`crate::pci::VECTOR_QUEUE0`]. Queue `q` has bit `8 + q`.
        const QUEUE0 = 1 << 8;
        /// Trap bits of the other queues.
        const _ = !0;
    }
}

/// `CLOCK`: time as the device counts it.
pub mod clock {
    use super::*;
    /// Offset of the block.
    pub const BASE: u32 = 0x0300;
    /// Nanoseconds since the device was created, monotone.
    pub const NS: Reg = Reg::ro("NS", 0x00, W8, "nanoseconds since the device was created");
    /// The block.
    pub const BLOCK: Block = Block {
        name: "CLOCK",
        base: BASE,
        stride: 0x100,
        count: 1,
        regs: &[NS],
        doc: "device clock",
    };
}

/// `TOPOLOGY`: where the GPU stands in the machine.
pub mod topology {
    use super::*;
    /// Offset of the block.
    pub const BASE: u32 = 0x0400;
    /// Id shared by the GPUs that reach each other.
    pub const HIVE_ID: Reg = Reg::ro("HIVE_ID", 0x00, W8, "id of the hive, 0 = none");
    /// Position in the hive, from 0.
    pub const NODE_ID: Reg = Reg::ro("NODE_ID", 0x08, W4, "position in the hive, from 0");
    /// GPUs in the hive, this one included.
    pub const HIVE_SIZE: Reg =
        Reg::ro("HIVE_SIZE", 0x0c, W4, "GPUs in the hive, this one included");
    /// Proximity domain of the CPU node the GPU is attached to.
    pub const CPU_PXM: Reg = Reg::ro(
        "CPU_PXM",
        0x10,
        W4,
        "proximity domain of the attached CPU node",
    );
    /// Number of `LINK` entries in use.
    pub const LINK_COUNT: Reg = Reg::ro("LINK_COUNT", 0x14, W4, "LINK entries in use");
    /// The block.
    pub const BLOCK: Block = Block {
        name: "TOPOLOGY",
        base: BASE,
        stride: 0x100,
        count: 1,
        regs: &[HIVE_ID, NODE_ID, HIVE_SIZE, CPU_PXM, LINK_COUNT],
        doc: "place in the machine",
    };
}

/// `LINK`: one entry for each link that leaves the GPU.
pub mod link {
    use super::*;
    /// Offset of the first instance.
    pub const BASE: u32 = 0x0800;
    /// Bytes between instances.
    pub const STRIDE: u32 = 0x20;
    /// Hive position of the GPU at the other end, or [`super::LINK_PEER_CPU`].
    pub const PEER: Reg = Reg::ro(
        "PEER",
        0x00,
        W4,
        "hive position of the peer, 0xffffffff = the CPU",
    );
    /// 0 absent, 1 up, 2 down.
    pub const STATE: Reg = Reg::ro("STATE", 0x04, W4, "0 absent, 1 up, 2 down");
    /// Physical links in parallel.
    pub const WIDTH: Reg = Reg::ro("WIDTH", 0x08, W4, "physical links in parallel");
    /// MB/s in one direction, all links together; 0 = not known.
    pub const BANDWIDTH_MBS: Reg = Reg::ro(
        "BANDWIDTH_MBS",
        0x0c,
        W4,
        "MB/s in one direction, 0 = not known",
    );
    /// Latency in nanoseconds; 0 = not known.
    pub const LATENCY_NS: Reg = Reg::ro("LATENCY_NS", 0x10, W4, "latency in ns, 0 = not known");
    /// Errors counted.
    pub const ERRORS: Reg = Reg::ro("ERRORS", 0x14, W4, "errors since reset");
    /// The block.
    pub const BLOCK: Block = Block {
        name: "LINK",
        base: BASE,
        stride: STRIDE,
        count: MAX_LINKS,
        regs: &[PEER, STATE, WIDTH, BANDWIDTH_MBS, LATENCY_NS, ERRORS],
        doc: "links to peers and to the CPU",
    };
}

/// Value of `LINK.PEER` for the link to the CPU.
pub const LINK_PEER_CPU: u32 = u32::MAX;

/// Value of `PARTITION.PXM` for HBM that is in no proximity domain.
pub const NO_PXM: u32 = u32::MAX;

/// `PARTITION`: one instance for each HBM partition; range, coherent attach and ownership.
pub mod partition {
    use super::*;
    /// Offset of the first instance.
    pub const BASE: u32 = 0x2000;
    /// Bytes between instances.
    pub const STRIDE: u32 = 0x100;
    /// First address of the HBM as packets name it: its guest physical address, or with an aperture an address that
    /// only GPUs use.
    pub const HBM_BASE: Reg = Reg::ro("HBM_BASE", 0x00, W8, "first address, as packets name it");
    /// Bytes of HBM.
    pub const HBM_SIZE: Reg = Reg::ro("HBM_SIZE", 0x08, W8, "bytes");
    /// ACPI proximity domain of the HBM, or [`super::NO_PXM`].
    pub const PXM: Reg = Reg::ro("PXM", 0x10, W4, "proximity domain, 0xffffffff = none");
    /// One of [`super::Coherence`].
    pub const COHERENCE: Reg = Reg::ro(
        "COHERENCE",
        0x14,
        W4,
        "whether the VMM maps this HBM at HBM_BASE, and if not, why",
    );
    /// One of [`super::OwnerState`].
    pub const STATE: Reg = Reg::ro(
        "STATE",
        0x18,
        W4,
        "0 FREE, 1 CLAIMED, 2 RELEASING, 3 FAULTED",
    );
    /// Grows by one whenever the partition is claimed or becomes free.
    pub const GENERATION: Reg = Reg::ro("GENERATION", 0x1c, W4, "counts changes of owner");
    /// Token of the driver that commands; reads as zero, so that no token leaks. Each command clears it and
    /// `NEW_TOKEN`, so that nobody commands with what another driver left there: write it before each command.
    pub const TOKEN: Reg = Reg::rw(
        "TOKEN",
        0x20,
        W8,
        "token of the commanding driver; reads 0, cleared by each command",
    )
    .hidden();
    /// One of [`super::OwnerCommand`]; executed when written.
    pub const COMMAND: Reg = Reg::rw(
        "COMMAND",
        0x28,
        W4,
        "1 CLAIM, 2 RELEASE, 3 TRANSFER; reads 0",
    )
    .effect()
    .hidden();
    /// One of [`super::OwnerResult`], of the last command.
    pub const RESULT: Reg = Reg::ro("RESULT", 0x2c, W4, "result of the last command");
    /// Token of the driver that TRANSFER makes the owner; reads as zero.
    pub const NEW_TOKEN: Reg = Reg::rw(
        "NEW_TOKEN",
        0x30,
        W8,
        "token of the next owner, for TRANSFER; reads 0",
    )
    .hidden();
    /// The block.
    pub const BLOCK: Block = Block {
        name: "PARTITION",
        base: BASE,
        stride: STRIDE,
        count: MAX_PARTITIONS,
        regs: &[
            HBM_BASE, HBM_SIZE, PXM, COHERENCE, STATE, GENERATION, TOKEN, COMMAND, RESULT,
            NEW_TOKEN,
        ],
        doc: "HBM range, coherent attach, ownership",
    };
}

/// `QUEUE`: one instance for each copy queue.
pub mod queue {
    use super::*;
    /// Offset of the first instance.
    pub const BASE: u32 = 0x8000;
    /// Bytes between instances.
    pub const STRIDE: u32 = 0x100;
    /// Address of the ring; a multiple of 256.
    pub const RING_BASE: Reg = Reg::rw(
        "RING_BASE",
        0x00,
        W8,
        "address of the ring, a multiple of 256",
    )
    .writable(!0xff);
    /// Bytes of the ring.
    pub const RING_SIZE: Reg = Reg::rw(
        "RING_SIZE",
        0x08,
        W4,
        "bytes of the ring, a power of two from 256 to 16 MiB",
    );
    /// Bit 0 enables, ignored unless `BOOT.STATUS` is READY; clearing it disables. Bit 1 resets the queue and
    /// reads as zero. After either stop the queue touches no memory.
    pub const CONTROL: Reg = Reg::rw("CONTROL", 0x0c, W4, "bit 0: enable; bit 1: reset, reads 0")
        .writable(3)
        .effect();
    /// Token of the driver whose partitions the queue may touch; reads as zero.
    pub const TOKEN: Reg = Reg::rw("TOKEN", 0x10, W8, "token the queue acts for; reads 0").hidden();
    /// Address to which the read pointer is written; a multiple of 8, 0 = nowhere.
    pub const RPTR_WRITEBACK: Reg = Reg::rw(
        "RPTR_WRITEBACK",
        0x18,
        W8,
        "address to which RPTR is written, 0 = nowhere",
    )
    .writable(!7);
    /// Bytes consumed since the queue was enabled; monotone, not wrapped.
    pub const RPTR: Reg = Reg::ro("RPTR", 0x20, W8, "bytes consumed since enable, not wrapped");
    /// Bytes produced, as the last doorbell said.
    pub const WPTR: Reg = Reg::ro(
        "WPTR",
        0x28,
        W8,
        "bytes produced, as the last doorbell said",
    );
    /// One of [`super::QueueState`].
    pub const STATUS: Reg = Reg::ro("STATUS", 0x30, W4, "0 DISABLED, 1 IDLE, 2 RUNNING, 3 FAULT");
    /// One of [`super::QueueFault`].
    pub const FAULT_CODE: Reg = Reg::ro(
        "FAULT_CODE",
        0x34,
        W4,
        "why the queue stopped, 0 = it did not",
    );
    /// Address that the fault is about.
    pub const FAULT_ADDR: Reg = Reg::ro("FAULT_ADDR", 0x38, W8, "address that the fault is about");
    /// Index of the packet since enable.
    pub const FAULT_PACKET: Reg =
        Reg::ro("FAULT_PACKET", 0x40, W8, "index of the packet since enable");
    /// Packets completed since enable.
    pub const PACKETS: Reg = Reg::ro("PACKETS", 0x48, W8, "packets completed since enable");
    /// The block.
    pub const BLOCK: Block = Block {
        name: "QUEUE",
        base: BASE,
        stride: STRIDE,
        count: MAX_QUEUES,
        regs: &[
            RING_BASE,
            RING_SIZE,
            CONTROL,
            TOKEN,
            RPTR_WRITEBACK,
            RPTR,
            WPTR,
            STATUS,
            FAULT_CODE,
            FAULT_ADDR,
            FAULT_PACKET,
            PACKETS,
        ],
        doc: "copy queues",
    };
}

/// `QUEUE.CONTROL` bit that enables the queue.
pub const QUEUE_ENABLE: u32 = 1;
/// `QUEUE.CONTROL` bit that resets the queue: stopped, pointers and fault cleared.
pub const QUEUE_RESET: u32 = 2;
/// Smallest ring in bytes.
pub const RING_MIN: u32 = 256;
/// Largest ring in bytes.
pub const RING_MAX: u32 = 16 << 20;

/// Every block of BAR 0, ascending.
pub const BLOCKS: &[Block] = &[
    identity::BLOCK,
    boot::BLOCK,
    irq::BLOCK,
    clock::BLOCK,
    topology::BLOCK,
    link::BLOCK,
    partition::BLOCK,
    queue::BLOCK,
];

#[allow(clippy::cast_possible_truncation, reason = "the BAR is 64 KiB")]
const _: () = check(BLOCKS, crate::pci::BAR_REGISTERS_SIZE as u32);

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $value:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum $name { $($(#[$vdoc])* $variant = $value,)* }
        impl $name {
            /// Every code.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
            /// The code with this number, if there is one.
            pub const fn from_code(code: u32) -> Option<$name> {
                match code { $($value => Some($name::$variant),)* _ => None }
            }
            /// The number that the register shows.
            pub const fn code(self) -> u32 { self as u32 }
            /// Name as in documents.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => stringify!($variant),)* }
            }
        }
    };
}

codes! {
    /// `BOOT.STATUS`.
    BootState {
        /// Waiting for the driver's START.
        Reset = 0,
        /// On its way.
        Booting = 1,
        /// Every block works.
        Ready = 2,
        /// Failed; a function-level reset gives another try.
        Fault = 3,
    }
}

codes! {
    /// `PARTITION.COHERENCE`.
    Coherence {
        /// The VMM maps nothing at the planned address.
        NotMapped = 0,
        /// The VMM maps exactly this HBM's backing memory there.
        Coherent = 1,
        /// The VMM maps memory without a file descriptor there, so the device cannot tell what it is.
        NoFd = 2,
        /// The VMM maps another file there.
        OtherFile = 3,
        /// The right file, at another offset.
        OtherOffset = 4,
        /// Only a part of the range is mapped.
        Partial = 5,
        /// Mapped without write permission.
        ReadOnly = 6,
        /// Reached through the aperture, not mapped by the VMM; nothing to judge, and claims are allowed.
        Aperture = 7,
    }
}

codes! {
    /// `PARTITION.STATE`.
    OwnerState {
        /// Nobody's; holds zeros.
        Free = 0,
        /// One driver's.
        Claimed = 1,
        /// Being scrubbed.
        Releasing = 2,
        /// Unusable until reset.
        Faulted = 3,
    }
}

codes! {
    /// `PARTITION.COMMAND`.
    OwnerCommand {
        /// Makes the driver that `TOKEN` names the owner of a free partition.
        Claim = 1,
        /// Gives the partition back; it is scrubbed before it is free.
        Release = 2,
        /// Makes `NEW_TOKEN` the owner; contents stay.
        Transfer = 3,
    }
}

codes! {
    /// `PARTITION.RESULT`.
    OwnerResult {
        /// No command since reset.
        None = 0,
        /// Done.
        Ok = 1,
        /// Refused: claimed by another driver, or by this one already.
        Busy = 2,
        /// Refused: `TOKEN` is not the owner's.
        NotOwner = 3,
        /// Refused: `BOOT.STATUS` is not READY.
        NotReady = 4,
        /// Refused: the VMM does not map this HBM where the plan says; see `COHERENCE`.
        NotCoherent = 5,
        /// Refused: token 0 is nobody's.
        BadToken = 6,
        /// Refused: the partition is faulted.
        Faulted = 7,
        /// Refused: being scrubbed; try again.
        Releasing = 8,
        /// Refused: no such command.
        BadCommand = 9,
    }
}

codes! {
    /// `QUEUE.STATUS`.
    QueueState {
        /// Not enabled.
        Disabled = 0,
        /// Enabled, nothing to do.
        Idle = 1,
        /// Working.
        Running = 2,
        /// Stopped by a fault; `CONTROL` reset recovers it.
        Fault = 3,
    }
}

codes! {
    /// `QUEUE.FAULT_CODE`.
    QueueFault {
        /// It did not stop.
        None = 0,
        /// Opcode or sub-opcode that the engine does not have.
        BadOpcode = 1,
        /// A field out of its range, such as a misaligned fence.
        BadField = 2,
        /// Nothing is mapped at the address, or not all of the length, or not for writing.
        Unmapped = 3,
        /// HBM that the queue's token does not own.
        NotOwned = 4,
        /// HBM of a partition that is neither coherently attached nor reached through an aperture.
        NotCoherent = 5,
        /// The function's bus master bit is off.
        BusMasterOff = 6,
        /// Ring base or size out of range when the queue was enabled.
        BadRing = 7,
        /// A doorbell value behind RPTR, beyond RPTR plus the ring's size, or not a multiple of 4.
        BadDoorbell = 8,
        /// No link to the peer is up.
        LinkDown = 9,
        /// The ring ends in the middle of a packet.
        Truncated = 10,
        /// A poll used up its retries.
        PollTimeout = 11,
    }
}
