//! `CLOCK`: time as the device counts it.

use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

/// Offset of the block.
pub const BASE: u32 = 0x0300;
/// Nanoseconds since the device was created, monotone.
pub const NS: Reg = Reg::ro("NS", 0x00, W8, "nanoseconds since the device was created");
/// One of [`super::TimingMode`].
pub const MODE: Reg = Reg::ro(
    "MODE",
    0x08,
    W4,
    "what time stamps of queues mean: 0 Off, 1 Modelled, 2 Paced",
);
/// The block.
pub const BLOCK: Block = Block {
    name: "CLOCK",
    base: BASE,
    stride: 0x100,
    count: 1,
    regs: &[NS, MODE],
    doc: "device clock",
};
