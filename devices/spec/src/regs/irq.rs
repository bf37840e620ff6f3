//! `IRQ`: what raised an interrupt.

use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

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
