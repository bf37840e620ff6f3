//! `QUEUE`: one instance for each copy queue.

use super::MAX_QUEUES;
use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

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
pub const FAULT_PACKET: Reg = Reg::ro("FAULT_PACKET", 0x40, W8, "index of the packet since enable");
/// Packets completed since enable.
pub const PACKETS: Reg = Reg::ro("PACKETS", 0x48, W8, "packets completed since enable");
/// Which queues of the GPU go first; taken over by enable.
pub const PRIORITY: Reg = Reg::rw(
    "PRIORITY",
    0x50,
    W4,
    "0 lowest to 3 highest; taken over when the queue is enabled",
)
.writable(3);
/// Context of the last TRAP.
pub const TRAP_CONTEXT: Reg = Reg::ro("TRAP_CONTEXT", 0x54, W4, "context of the last TRAP");
/// Time that the queue's packets took.
pub const BUSY_NS: Reg = Reg::ro(
    "BUSY_NS",
    0x58,
    W8,
    "ns that packets took since enable, as `CLOCK.MODE` says",
);
/// When the last packet that moved data began.
pub const STAMP_START_NS: Reg = Reg::ro(
    "STAMP_START_NS",
    0x60,
    W8,
    "when the last packet that moved data began",
);
/// When it ended.
pub const STAMP_END_NS: Reg = Reg::ro("STAMP_END_NS", 0x68, W8, "when it ended");
/// Address of a 64-bit write pointer that a kick reads, in bytes as a doorbell has it; a multiple of 8, 0 = nowhere.
/// Taken over by enable.
pub const WPTR_POLL: Reg = Reg::rw(
    "WPTR_POLL",
    0x70,
    W8,
    "address of the write pointer that a kick reads, 0 = nowhere; taken over when the queue is enabled",
)
.writable(!7);
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
        PRIORITY,
        TRAP_CONTEXT,
        BUSY_NS,
        STAMP_START_NS,
        STAMP_END_NS,
        WPTR_POLL,
    ],
    doc: "copy queues",
};
