//! `TOPOLOGY`: where the GPU stands in the machine.

use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

/// Offset of the block.
pub const BASE: u32 = 0x0400;
/// Id shared by the GPUs that reach each other.
pub const HIVE_ID: Reg = Reg::ro("HIVE_ID", 0x00, W8, "id of the hive, 0 = none");
/// Position in the hive, from 0.
pub const NODE_ID: Reg = Reg::ro("NODE_ID", 0x08, W4, "position in the hive, from 0");
/// GPUs in the hive, this one included.
pub const HIVE_SIZE: Reg = Reg::ro("HIVE_SIZE", 0x0c, W4, "GPUs in the hive, this one included");
/// Proximity domain of the CPU node the GPU is attached to.
pub const CPU_PXM: Reg = Reg::ro(
    "CPU_PXM",
    0x10,
    W4,
    "proximity domain of the attached CPU node",
);
/// Number of `LINK` entries in use.
pub const LINK_COUNT: Reg = Reg::ro("LINK_COUNT", 0x14, W4, "LINK entries in use");
/// Partitions that the HBM is divided into now.
pub const PARTITION_MODE: Reg = Reg::ro("PARTITION_MODE", 0x18, W4, "partitions now, 0 = none");
/// Numbers of partitions that are possible.
pub const PARTITION_MODES: Reg = Reg::ro(
    "PARTITION_MODES",
    0x1c,
    W4,
    "bit `n`: `n` partitions are possible",
);
/// Number of partitions that the next function-level or hot reset divides the HBM into. A write of one that is not
/// possible leaves 0.
pub const PARTITION_REQUEST: Reg = Reg::rw(
    "PARTITION_REQUEST",
    0x20,
    W4,
    "partitions after the next reset, 0 = as now",
)
.effect();
/// The block.
pub const BLOCK: Block = Block {
    name: "TOPOLOGY",
    base: BASE,
    stride: 0x100,
    count: 1,
    regs: &[
        HIVE_ID,
        NODE_ID,
        HIVE_SIZE,
        CPU_PXM,
        LINK_COUNT,
        PARTITION_MODE,
        PARTITION_MODES,
        PARTITION_REQUEST,
    ],
    doc: "place in the machine",
};
