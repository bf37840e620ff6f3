//! `DISCOVERY`: which blocks this device has, where, and how many instances are in use.

use crate::table::Width::W4;
use crate::table::{Block, Reg};

/// Offset of the first instance.
pub const BASE: u32 = 0x0600;
/// Bytes between instances.
pub const STRIDE: u32 = 0x10;
/// One of [`super::BlockId`]; the list ends with [`super::BlockId::End`].
pub const BLOCK_ID: Reg = Reg::ro("BLOCK", 0x00, W4, "which block, 0 = end of the list");
/// Offset of its first instance in BAR 0.
pub const OFFSET: Reg = Reg::ro("OFFSET", 0x04, W4, "offset of its first instance");
/// Bytes between its instances.
pub const INSTANCE_STRIDE: Reg = Reg::ro("STRIDE", 0x08, W4, "bytes between its instances");
/// Instances in use on this device.
pub const COUNT: Reg = Reg::ro("COUNT", 0x0c, W4, "instances in use on this device");
/// The block.
pub const BLOCK: Block = Block {
    name: "DISCOVERY",
    base: BASE,
    stride: STRIDE,
    count: 16,
    regs: &[BLOCK_ID, OFFSET, INSTANCE_STRIDE, COUNT],
    doc: "blocks of this device",
};
