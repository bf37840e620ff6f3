//! `RAS`: memory errors, and pages out of use.

use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

/// Offset of the block.
pub const BASE: u32 = 0x0500;
/// Errors that were corrected.
pub const CORRECTABLE: Reg = Reg::ro("CORRECTABLE", 0x00, W4, "correctable errors since reset");
/// Errors that were not.
pub const UNCORRECTABLE: Reg = Reg::ro(
    "UNCORRECTABLE",
    0x04,
    W4,
    "uncorrectable errors since reset",
);
/// Pages that hold an uncorrectable error and are not retired.
pub const POISONED: Reg = Reg::ro(
    "POISONED",
    0x08,
    W4,
    "pages with an uncorrectable error in them",
);
/// Pages that are retired.
pub const RETIRED: Reg = Reg::ro("RETIRED", 0x0c, W4, "retired pages; resets keep them");
/// Address of the last error.
pub const LAST_ADDRESS: Reg = Reg::ro("LAST_ADDRESS", 0x10, W8, "address of the last error");
/// One of [`super::RasKind`].
pub const LAST_KIND: Reg = Reg::ro("LAST_KIND", 0x18, W4, "kind of the last error");
/// One of [`super::RasCommand`]; executed when written.
pub const COMMAND: Reg = Reg::rw("COMMAND", 0x1c, W4, "1 RETIRE the page at ADDRESS; reads 0")
    .effect()
    .hidden();
/// Page that the next command is about.
pub const ADDRESS: Reg = Reg::rw(
    "ADDRESS",
    0x20,
    W8,
    "address that the next command is about",
);
/// One of [`super::RasResult`], of the last command.
pub const RESULT: Reg = Reg::ro("RESULT", 0x28, W4, "result of the last command");
/// Which retired page `ENTRY` shows.
pub const INDEX: Reg = Reg::rw("INDEX", 0x2c, W4, "which retired page ENTRY shows");
/// Address of a retired page, or [`super::NO_ENTRY`].
pub const ENTRY: Reg = Reg::ro(
    "ENTRY",
    0x30,
    W8,
    "address of retired page INDEX, all ones = no such page",
);
/// The block.
pub const BLOCK: Block = Block {
    name: "RAS",
    base: BASE,
    stride: 0x100,
    count: 1,
    regs: &[
        CORRECTABLE,
        UNCORRECTABLE,
        POISONED,
        RETIRED,
        LAST_ADDRESS,
        LAST_KIND,
        COMMAND,
        ADDRESS,
        RESULT,
        INDEX,
        ENTRY,
    ],
    doc: "memory errors and retired pages",
};
