//! Packets of the copy queue, in AMD's published SDMA encoding.
//!
//! Source: Linux `drivers/gpu/drm/amd/amdgpu/vega10_sdma_pkt_open.h` (SDMA 4.x). All packets are sequences of
//! little-endian 32-bit words; the first has the opcode in bits 7:0 and the sub-opcode in bits 15:8.

/// No operation; bits 29:16 of the header give the number of further words to skip.
pub const OP_NOP: u8 = 0;
/// Copy; sub-opcode [`SUBOP_COPY_LINEAR`].
pub const OP_COPY: u8 = 1;
/// Write of words that follow in the packet; sub-opcode [`SUBOP_WRITE_LINEAR`].
pub const OP_WRITE: u8 = 2;
/// Store of one word when all packets before are done.
pub const OP_FENCE: u8 = 5;
/// Interrupt.
pub const OP_TRAP: u8 = 6;
/// Fill with a constant.
pub const OP_CONST_FILL: u8 = 11;

/// Linear copy.
pub const SUBOP_COPY_LINEAR: u8 = 0;
/// Linear write.
pub const SUBOP_WRITE_LINEAR: u8 = 0;

/// Words of a linear copy: header, bytes - 1, parameter, source low/high, destination low/high.
pub const COPY_LINEAR_WORDS: usize = 7;
/// Words of a linear write before its data: header, destination low/high, words - 1.
pub const WRITE_LINEAR_HEADER_WORDS: usize = 4;
/// Words of a fence: header, address low/high, value.
pub const FENCE_WORDS: usize = 4;
/// Words of a trap: header, interrupt context.
pub const TRAP_WORDS: usize = 2;
/// Words of a constant fill: header, destination low/high, value, bytes - 1.
pub const CONST_FILL_WORDS: usize = 5;

/// Bits of the byte count of a copy and a fill (SDMA 4.x: 21:0).
pub const COUNT_MASK: u32 = 0x003f_ffff;
/// Largest copy or fill in one packet, in bytes.
pub const MAX_COPY: u64 = COUNT_MASK as u64 + 1;
/// Bits of the word count of a linear write (19:0).
pub const WRITE_COUNT_MASK: u32 = 0x000f_ffff;
/// Bits of a trap's interrupt context (27:0).
pub const TRAP_CONTEXT_MASK: u32 = 0x0fff_ffff;
/// Position of the fill size in a constant fill's header (31:30): 0 = bytes, 2 = words.
pub const FILL_SIZE_SHIFT: u32 = 30;

/// Low half of an address.
#[allow(
    clippy::cast_possible_truncation,
    reason = "the low half is what is asked for"
)]
const fn lo(address: u64) -> u32 {
    address as u32
}

/// High half of an address.
const fn hi(address: u64) -> u32 {
    (address >> 32) as u32
}

/// A linear copy of `bytes`, 1 to [`MAX_COPY`]; more is cut to the field's width.
#[allow(clippy::cast_possible_truncation, reason = "masked to the field")]
pub const fn copy_linear(source: u64, destination: u64, bytes: u64) -> [u32; COPY_LINEAR_WORDS] {
    let count = (bytes.wrapping_sub(1) as u32) & COUNT_MASK;
    [
        OP_COPY as u32,
        count,
        0,
        lo(source),
        hi(source),
        lo(destination),
        hi(destination),
    ]
}

/// A fence: stores `value` at `address`, a multiple of 4.
pub const fn fence(address: u64, value: u32) -> [u32; FENCE_WORDS] {
    [OP_FENCE as u32, lo(address), hi(address), value]
}

/// A trap: raises the queue's interrupt.
pub const fn trap(context: u32) -> [u32; TRAP_WORDS] {
    [OP_TRAP as u32, context & TRAP_CONTEXT_MASK]
}

/// A fill of `bytes`, a multiple of 4 from 4 to [`MAX_COPY`], with a 32-bit value.
#[allow(clippy::cast_possible_truncation, reason = "masked to the field")]
pub const fn const_fill(destination: u64, value: u32, bytes: u64) -> [u32; CONST_FILL_WORDS] {
    let count = (bytes.wrapping_sub(1) as u32) & COUNT_MASK;
    [
        OP_CONST_FILL as u32 | 2 << FILL_SIZE_SHIFT,
        lo(destination),
        hi(destination),
        value,
        count,
    ]
}
