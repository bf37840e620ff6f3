//! `IDENTITY`: what the device is.

use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

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
pub const PARTITION_COUNT: Reg = Reg::ro("PARTITION_COUNT", 0x14, W4, "HBM partitions, 0 = none");
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
/// Packets of the copy queues.
pub const PACKETS: Reg = Reg::ro("PACKETS", 0x28, W8, "bit `n`: copy queues have opcode `n`");
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
        PACKETS,
    ],
    doc: "what the device is",
};
