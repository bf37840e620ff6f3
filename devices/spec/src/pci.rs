//! Identifiers and BAR roles of the PCI function.

/// Vendor id used by default: the id that Bochs and QEMU use for devices without a registered vendor.
pub const VENDOR_ID: u16 = 0x1234;
/// Device id used by default, unassigned under [`VENDOR_ID`] in QEMU's `docs/specs/pci-ids`.
pub const DEVICE_ID: u16 = 0x6770;
/// Class code 12h 00h 00h: processing accelerator (PCI Code and ID Assignment 1.11, section 1.19).
pub const CLASS_CODE: u32 = 0x12_0000;

/// BAR that holds the registers of [`crate::regs`]; 32-bit, not prefetchable: such a BAR has to lie below 4 GiB
/// behind a bridge, however wide it is (PCI-to-PCI Bridge 1.2, section 3.2.5.8).
pub const BAR_REGISTERS: u8 = 0;
/// Size of [`BAR_REGISTERS`] in bytes.
pub const BAR_REGISTERS_SIZE: u64 = 0x1_0000;
/// BAR that holds the MSI-X table and pending bits and nothing else; 32-bit, not prefetchable.
pub const BAR_MSIX: u8 = 1;
/// Size of [`BAR_MSIX`] in bytes.
pub const BAR_MSIX_SIZE: u64 = 0x2000;
/// BAR that holds the doorbells; 64-bit, not prefetchable, so it takes BAR 3 as its upper half.
pub const BAR_DOORBELLS: u8 = 2;
/// Size of [`BAR_DOORBELLS`] in bytes.
pub const BAR_DOORBELLS_SIZE: u64 = 0x1000;
/// BAR that holds the HBM, in a GPU whose `CAPS` say `HBM_APERTURE`; 64-bit, prefetchable, so it takes BAR 5 as its
/// upper half. Partition `p` starts at `PARTITION[p].HBM_BASE - PARTITION[0].HBM_BASE`. Its size is a power of two;
/// behind the last partition it reads as ones and drops writes, as Linux' `nvgrace-gpu` does.
pub const BAR_APERTURE: u8 = 4;
/// Offset of the MSI-X table in [`BAR_MSIX`].
pub const MSIX_TABLE_OFFSET: u32 = 0;
/// Offset of the MSI-X pending bit array in [`BAR_MSIX`], on a page of its own.
pub const MSIX_PBA_OFFSET: u32 = 0x1000;

/// Bytes between the doorbells of two queues, and between their kicks.
pub const DOORBELL_STRIDE: u64 = 8;
/// Offset of the kicks in [`BAR_DOORBELLS`].
pub const KICK_OFFSET: u32 = 0x800;

/// MSI-X vector of faults and ownership events.
pub const VECTOR_EVENTS: u16 = 0;
/// MSI-X vector of queue 0; queue `q` has `VECTOR_QUEUE0 + q`.
pub const VECTOR_QUEUE0: u16 = 1;
/// Number of MSI-X vectors: one for events and one for each of [`crate::regs::MAX_QUEUES`] queues.
pub const VECTOR_COUNT: u16 = 9;

/// Blocks of [`BAR_DOORBELLS`]: one 64-bit doorbell for each queue.
pub mod doorbell {
    use crate::table::Width::W8;
    use crate::table::{Block, Reg};
    /// Write pointer of a queue in bytes, not wrapped; reads as zero. A write that touches the low half rings;
    /// a driver that can store 32 bits only writes the high half first.
    pub const WPTR: Reg = Reg::rw(
        "WPTR",
        0,
        W8,
        "write pointer in bytes; writing the low half rings",
    )
    .effect()
    .hidden();
    /// The block.
    pub const BLOCK: Block = Block {
        name: "DOORBELL",
        base: 0,
        #[allow(clippy::cast_possible_truncation, reason = "8 bytes")]
        stride: super::DOORBELL_STRIDE as u32,
        count: crate::regs::MAX_QUEUES,
        regs: &[WPTR],
        doc: "doorbells of the copy queues",
    };
}

/// Blocks of [`BAR_DOORBELLS`]: one kick for each queue.
pub mod kick {
    use crate::table::Width::W4;
    use crate::table::{Block, Reg};
    /// A write of anything makes the queue take its write pointer from `QUEUE.WPTR_POLL`; reads as zero. A VMM need not
    /// carry the value, so it can carry the kick by an event.
    pub const KICK: Reg = Reg::rw(
        "KICK",
        0,
        W4,
        "writing anything: the queue reads its write pointer from WPTR_POLL",
    )
    .effect()
    .hidden();
    /// The block.
    pub const BLOCK: Block = Block {
        name: "KICK",
        base: super::KICK_OFFSET,
        #[allow(clippy::cast_possible_truncation, reason = "8 bytes")]
        stride: super::DOORBELL_STRIDE as u32,
        count: crate::regs::MAX_QUEUES,
        regs: &[KICK],
        doc: "doorbells without a value",
    };
}

/// Every block of [`BAR_DOORBELLS`], ascending.
pub const DOORBELL_BLOCKS: &[crate::table::Block] = &[doorbell::BLOCK, kick::BLOCK];

/// Blocks of [`BAR_MSIX`] (PCI Local Bus 3.0 section 6.8.2).
pub mod msix {
    use crate::table::Width::{W4, W8};
    use crate::table::{Block, Reg};
    /// Message address.
    pub const ADDRESS: Reg = Reg::rw("ADDRESS", 0x00, W8, "message address").writable(!3);
    /// Message data.
    pub const DATA: Reg = Reg::rw("DATA", 0x08, W4, "message data");
    /// Bit 0 masks the vector.
    pub const CONTROL: Reg = Reg::rw("CONTROL", 0x0c, W4, "bit 0: masked")
        .writable(1)
        .reset(1);
    /// The table.
    pub const BLOCK: Block = Block {
        name: "MSIX",
        base: super::MSIX_TABLE_OFFSET,
        stride: 0x10,
        count: super::VECTOR_COUNT as u32,
        regs: &[ADDRESS, DATA, CONTROL],
        doc: "MSI-X table, kept for VMMs that do not emulate it",
    };
}

#[allow(clippy::cast_possible_truncation, reason = "one and two pages")]
const _: () = {
    crate::table::check(DOORBELL_BLOCKS, BAR_DOORBELLS_SIZE as u32);
    crate::table::check(&[msix::BLOCK], BAR_MSIX_SIZE as u32);
};

const _: () = assert!(VECTOR_COUNT as u32 == VECTOR_QUEUE0 as u32 + crate::regs::MAX_QUEUES);
