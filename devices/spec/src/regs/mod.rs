//! Register blocks of BAR 0.
//!
//! Every register is little-endian. A read of an address that no register has gives zero, a write there is
//! dropped. All addresses in registers and packets are the guest's bus addresses, which equal its physical
//! addresses where no IOMMU stands before the device.

pub mod boot;
pub mod clock;
mod codes;
pub mod discovery;
pub mod identity;
pub mod irq;
pub mod link;
pub mod partition;
pub mod queue;
pub mod ras;
pub mod topology;

pub use codes::*;

use crate::table::{Block, check};

/// Partitions that the register map has room for.
pub const MAX_PARTITIONS: u32 = 8;
/// Queues that the register map has room for.
pub const MAX_QUEUES: u32 = 8;
/// Links that the register map has room for.
pub const MAX_LINKS: u32 = 32;

/// Value of `IDENTITY.MAGIC`: `NGPU` in ASCII, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"NGPU");
/// Value of `IDENTITY.VERSION`: major in the upper half, minor in the lower. A driver refuses another major.
pub const VERSION: u32 = 0x0002_0001;

/// `CONTROL` bit that starts the boot.
pub const BOOT_START: u32 = 1;

/// Value of `LINK.PEER` for the link to the CPU.
pub const LINK_PEER_CPU: u32 = u32::MAX;

/// Value of `PARTITION.LEASE_LEFT_MS` for a lease without end.
pub const LEASE_ENDLESS: u32 = u32::MAX;
/// Position of the event in `PARTITION.HISTORY_STEP`; the state before is in bits 7:0.
pub const HISTORY_EVENT_SHIFT: u32 = 8;
/// Position of the state after in `PARTITION.HISTORY_STEP`.
pub const HISTORY_TO_SHIFT: u32 = 16;
/// Bytes of a page that is retired, and that `RAS` addresses are multiples of.
pub const RAS_PAGE: u64 = 4096;
/// Pages that can be retired.
pub const MAX_RETIRED: u32 = 256;
/// Value of `RAS.ENTRY` behind the last retired page.
pub const NO_ENTRY: u64 = u64::MAX;

/// Value of `PARTITION.PXM` for HBM that is in no proximity domain.
pub const NO_PXM: u32 = u32::MAX;

/// `QUEUE.CONTROL` bit that enables the queue.
pub const QUEUE_ENABLE: u32 = 1;
/// `QUEUE.CONTROL` bit that resets the queue: stopped, pointers and fault cleared.
pub const QUEUE_RESET: u32 = 2;
/// Highest `QUEUE.PRIORITY`.
pub const PRIORITY_MAX: u32 = 3;
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
    ras::BLOCK,
    discovery::BLOCK,
    link::BLOCK,
    partition::BLOCK,
    queue::BLOCK,
];

#[allow(clippy::cast_possible_truncation, reason = "the BAR is 64 KiB")]
const _: () = check(BLOCKS, crate::pci::BAR_REGISTERS_SIZE as u32);
