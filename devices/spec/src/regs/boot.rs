//! `BOOT`: the handshake that brings the device up.

use crate::table::Width::W4;
use crate::table::{Block, Reg};

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
