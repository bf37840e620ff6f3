//! Packets of the copy queue, in AMD's published SDMA encoding.
//!
//! Source: Linux `drivers/gpu/drm/amd/amdgpu/vega10_sdma_pkt_open.h` (SDMA 4.x). All packets are sequences of
//! little-endian 32-bit words; the first has the opcode in bits 7:0 and the sub-opcode in bits 15:8.

use crate::table::Packet;

/// No operation; bits 29:16 of the header give the number of further words to skip.
pub const OP_NOP: u8 = 0;
/// Copy; sub-opcode [`SUBOP_COPY_LINEAR`] or [`SUBOP_COPY_SUB_WINDOW`].
pub const OP_COPY: u8 = 1;
/// Write of words that follow in the packet; sub-opcode [`SUBOP_WRITE_LINEAR`].
pub const OP_WRITE: u8 = 2;
/// Store of one word when all packets before are done.
pub const OP_FENCE: u8 = 5;
/// Interrupt.
pub const OP_TRAP: u8 = 6;
/// Wait until a word of memory compares with a reference as asked.
pub const OP_POLL_REGMEM: u8 = 8;
/// Atomic operation on a word of memory, one of [`AtomicOp`].
pub const OP_ATOMIC: u8 = 10;
/// Device time; sub-opcode one of the `SUBOP_TIMESTAMP`s.
pub const OP_TIMESTAMP: u8 = 13;
/// Fill with a constant.
pub const OP_CONST_FILL: u8 = 11;

/// Linear copy.
pub const SUBOP_COPY_LINEAR: u8 = 0;
/// Copy of a box of elements from one surface to another, both with pitches.
pub const SUBOP_COPY_SUB_WINDOW: u8 = 4;
/// Linear write.
pub const SUBOP_WRITE_LINEAR: u8 = 0;

/// Sets the queue's local time.
pub const SUBOP_TIMESTAMP_SET: u8 = 0;
/// Stores the queue's local time: the device clock, moved by the last set since the queue was enabled.
pub const SUBOP_TIMESTAMP_GET: u8 = 1;
/// Stores the device clock, as `CLOCK.NS` has it.
pub const SUBOP_TIMESTAMP_GET_GLOBAL: u8 = 2;

/// Words of a linear copy: header, bytes - 1, parameter, source low/high, destination low/high.
pub const COPY_LINEAR_WORDS: usize = 7;
/// Words of a sub-window copy: header, of source and then of destination (address low/high, y << 16 | x,
/// (pitch - 1) << 13 | z, slice pitch - 1), (rows - 1) << 16 | columns - 1, slices - 1.
pub const COPY_SUB_WINDOW_WORDS: usize = 13;
/// Words of a linear write before its data: header, destination low/high, words - 1.
pub const WRITE_LINEAR_HEADER_WORDS: usize = 4;
/// Words of a fence: header, address low/high, value.
pub const FENCE_WORDS: usize = 4;
/// Words of a trap: header, interrupt context.
pub const TRAP_WORDS: usize = 2;
/// Words of a constant fill: header, destination low/high, value, bytes - 1.
pub const CONST_FILL_WORDS: usize = 5;
/// Words of a poll: header, address low/high, reference, mask, retries << 16 | interval.
pub const POLL_REGMEM_WORDS: usize = 6;
/// Words of an atomic: header, address low/high, operand low/high, comparand low/high, loop interval.
pub const ATOMIC_WORDS: usize = 8;
/// Words of a timestamp: header, then low/high of the address, or for a set of the new time in ns.
pub const TIMESTAMP_WORDS: usize = 3;

/// Position of the element's size in a sub-window copy's header (31:29): its bytes are 1 << size.
pub const WINDOW_ELEMENT_SHIFT: u32 = 29;
/// Largest size of an element: 16 bytes.
pub const WINDOW_ELEMENT_MAX: u32 = 4;
/// Bits of a column of a sub-window copy (13:0), and of a row above [`WINDOW_Y_SHIFT`].
pub const WINDOW_XY_MASK: u32 = 0x3fff;
/// Position of the row (29:16).
pub const WINDOW_Y_SHIFT: u32 = 16;
/// Bits of a slice (10:0).
pub const WINDOW_Z_MASK: u32 = 0x7ff;
/// Position of the pitch - 1, in elements (31:13).
pub const WINDOW_PITCH_SHIFT: u32 = 13;
/// Bits of the slice pitch - 1, in elements (27:0).
pub const WINDOW_SLICE_MASK: u32 = 0x0fff_ffff;
/// Header bit of a poll that polls memory; without it a register is meant, which this device does not have.
pub const POLL_MEMORY: u32 = 1 << 31;
/// Position of the comparison in a poll's header (30:28), one of [`PollFunction`].
pub const POLL_FUNCTION_SHIFT: u32 = 28;
/// Bits of a poll's interval (15:0). The encoding publishes no unit; this device counts microseconds.
pub const POLL_INTERVAL_MASK: u32 = 0xffff;
/// Position of a poll's retries (27:16): tries after the first.
pub const POLL_RETRIES_SHIFT: u32 = 16;
/// Bits of a poll's retries, and the value that stands for no end of them, as user-mode drivers use it.
pub const POLL_RETRIES_MASK: u32 = 0xfff;
/// Header bit of an atomic that is tried again until its comparison holds; for compare-and-swap only.
pub const ATOMIC_LOOP: u32 = 1 << 16;
/// Position of the operation in an atomic's header (31:25).
pub const ATOMIC_OP_SHIFT: u32 = 25;
/// Bit of the operation that makes it work on 64 bits.
pub const ATOMIC_WIDE: u8 = 0x20;
/// Bit of the operation that asks for no return value. The copy queue returns none either way.
pub const ATOMIC_NO_RETURN: u8 = 0x40;
/// Bits of an atomic's loop interval (12:0), in microseconds as [`POLL_INTERVAL_MASK`].
pub const ATOMIC_INTERVAL_MASK: u32 = 0x1fff;

/// How a poll compares memory, after the mask, with its reference; both unsigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PollFunction {
    /// Holds whatever the memory has.
    Always = 0,
    /// Less.
    Less = 1,
    /// Less or equal.
    LessEqual = 2,
    /// Equal.
    Equal = 3,
    /// Not equal.
    NotEqual = 4,
    /// Greater or equal.
    GreaterEqual = 5,
    /// Greater.
    Greater = 6,
}

impl PollFunction {
    /// Every function, in the order of their codes.
    pub const ALL: [PollFunction; 7] = [
        PollFunction::Always,
        PollFunction::Less,
        PollFunction::LessEqual,
        PollFunction::Equal,
        PollFunction::NotEqual,
        PollFunction::GreaterEqual,
        PollFunction::Greater,
    ];
}

/// Operations of an atomic, without [`ATOMIC_WIDE`] and [`ATOMIC_NO_RETURN`]. Source: the `TC_OP` codes of AMD's
/// published Gfx9 command headers; increment and decrement as in the Vega instruction set manual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AtomicOp {
    /// Stores the operand.
    Swap = 0x07,
    /// Stores the operand if memory has the comparand.
    CompareSwap = 0x08,
    /// Adds, wrapping.
    Add = 0x0f,
    /// Subtracts, wrapping.
    Sub = 0x10,
    /// Signed minimum.
    MinSigned = 0x11,
    /// Unsigned minimum.
    MinUnsigned = 0x12,
    /// Signed maximum.
    MaxSigned = 0x13,
    /// Unsigned maximum.
    MaxUnsigned = 0x14,
    /// Bitwise and.
    And = 0x15,
    /// Bitwise or.
    Or = 0x16,
    /// Bitwise exclusive or.
    Xor = 0x17,
    /// Adds one; zero where memory has the operand or more.
    Increment = 0x18,
    /// Subtracts one; the operand where memory has zero or more than the operand.
    Decrement = 0x19,
}

impl AtomicOp {
    /// Every operation, in the order of their codes.
    pub const ALL: [AtomicOp; 13] = [
        AtomicOp::Swap,
        AtomicOp::CompareSwap,
        AtomicOp::Add,
        AtomicOp::Sub,
        AtomicOp::MinSigned,
        AtomicOp::MinUnsigned,
        AtomicOp::MaxSigned,
        AtomicOp::MaxUnsigned,
        AtomicOp::And,
        AtomicOp::Or,
        AtomicOp::Xor,
        AtomicOp::Increment,
        AtomicOp::Decrement,
    ];
}

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

/// Every packet that the copy queue takes.
pub const PACKETS: &[Packet] = &[
    Packet {
        name: "NOP",
        op: OP_NOP,
        sub_op: 0,
        words: &["HEADER"],
        doc: "skips itself and as many words as its header says",
    },
    Packet {
        name: "COPY_LINEAR",
        op: OP_COPY,
        sub_op: SUBOP_COPY_LINEAR,
        words: &[
            "HEADER",
            "COUNT",
            "PARAMETER",
            "SOURCE_LO",
            "SOURCE_HI",
            "DESTINATION_LO",
            "DESTINATION_HI",
        ],
        doc: "copies COUNT + 1 bytes",
    },
    Packet {
        name: "WRITE_LINEAR",
        op: OP_WRITE,
        sub_op: SUBOP_WRITE_LINEAR,
        words: &["HEADER", "DESTINATION_LO", "DESTINATION_HI", "COUNT"],
        doc: "writes the COUNT + 1 words that follow",
    },
    Packet {
        name: "FENCE",
        op: OP_FENCE,
        sub_op: 0,
        words: &["HEADER", "ADDRESS_LO", "ADDRESS_HI", "VALUE"],
        doc: "stores a word when all packets before are done",
    },
    Packet {
        name: "TRAP",
        op: OP_TRAP,
        sub_op: 0,
        words: &["HEADER", "CONTEXT"],
        doc: "raises the queue's interrupt",
    },
    Packet {
        name: "POLL_REGMEM",
        op: OP_POLL_REGMEM,
        sub_op: 0,
        words: &[
            "HEADER",
            "ADDRESS_LO",
            "ADDRESS_HI",
            "REFERENCE",
            "MASK",
            "RETRIES_INTERVAL",
        ],
        doc: "waits until a word of memory compares as asked",
    },
    Packet {
        name: "ATOMIC",
        op: OP_ATOMIC,
        sub_op: 0,
        words: &[
            "HEADER",
            "ADDRESS_LO",
            "ADDRESS_HI",
            "OPERAND_LO",
            "OPERAND_HI",
            "COMPARAND_LO",
            "COMPARAND_HI",
            "LOOP_INTERVAL",
        ],
        doc: "changes 4 or 8 bytes of memory atomically",
    },
    Packet {
        name: "CONST_FILL",
        op: OP_CONST_FILL,
        sub_op: 0,
        words: &[
            "HEADER",
            "DESTINATION_LO",
            "DESTINATION_HI",
            "VALUE",
            "COUNT",
        ],
        doc: "fills COUNT + 1 bytes",
    },
    Packet {
        name: "TIMESTAMP_SET",
        op: OP_TIMESTAMP,
        sub_op: SUBOP_TIMESTAMP_SET,
        words: &["HEADER", "NS_LO", "NS_HI"],
        doc: "sets the queue's local time",
    },
    Packet {
        name: "TIMESTAMP_GET",
        op: OP_TIMESTAMP,
        sub_op: SUBOP_TIMESTAMP_GET,
        words: &["HEADER", "ADDRESS_LO", "ADDRESS_HI"],
        doc: "stores the queue's local time",
    },
    Packet {
        name: "TIMESTAMP_GET_GLOBAL",
        op: OP_TIMESTAMP,
        sub_op: SUBOP_TIMESTAMP_GET_GLOBAL,
        words: &["HEADER", "ADDRESS_LO", "ADDRESS_HI"],
        doc: "stores the device clock",
    },
];

/// Stops compilation where the table is not as long as the packets are.
#[allow(clippy::indexing_slicing, reason = "runs at compile time")]
const _: () = {
    let mut i = 0;
    while i < PACKETS.len() {
        let words = match PACKETS[i].op {
            OP_NOP => 1,
            OP_COPY => COPY_LINEAR_WORDS,
            OP_WRITE => WRITE_LINEAR_HEADER_WORDS,
            OP_FENCE => FENCE_WORDS,
            OP_TRAP => TRAP_WORDS,
            OP_POLL_REGMEM => POLL_REGMEM_WORDS,
            OP_ATOMIC => ATOMIC_WORDS,
            OP_CONST_FILL => CONST_FILL_WORDS,
            OP_TIMESTAMP => TIMESTAMP_WORDS,
            _ => 0,
        };
        assert!(PACKETS[i].words.len() == words, "a packet has its words");
        i += 1;
    }
};

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

/// A surface of a sub-window copy, and where the box begins in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surface {
    /// Address of its first element.
    pub address: u64,
    /// First column, row and slice of the box, cut to their fields' widths.
    pub origin: [u32; 3],
    /// Elements from one row to the next, 1 to 2^19.
    pub pitch: u32,
    /// Elements from one slice to the next, 1 to 2^28.
    pub slice_pitch: u32,
}

/// A copy of a box of `extent` columns, rows and slices, each at least 1, of elements of `1 << element_size` bytes, at most 16.
pub const fn copy_sub_window(
    element_size: u32,
    source: Surface,
    destination: Surface,
    extent: [u32; 3],
) -> [u32; COPY_SUB_WINDOW_WORDS] {
    let from = surface(source);
    let to = surface(destination);
    let [columns, rows, slices] = extent;
    [
        OP_COPY as u32 | (SUBOP_COPY_SUB_WINDOW as u32) << 8 | element_size << WINDOW_ELEMENT_SHIFT,
        from[0],
        from[1],
        from[2],
        from[3],
        from[4],
        to[0],
        to[1],
        to[2],
        to[3],
        to[4],
        columns_and_rows(columns.wrapping_sub(1), rows.wrapping_sub(1)),
        slices.wrapping_sub(1) & WINDOW_Z_MASK,
    ]
}

const fn surface(surface: Surface) -> [u32; 5] {
    let [x, y, z] = surface.origin;
    [
        lo(surface.address),
        hi(surface.address),
        columns_and_rows(x, y),
        surface.pitch.wrapping_sub(1) << WINDOW_PITCH_SHIFT | z & WINDOW_Z_MASK,
        surface.slice_pitch.wrapping_sub(1) & WINDOW_SLICE_MASK,
    ]
}

const fn columns_and_rows(x: u32, y: u32) -> u32 {
    (y & WINDOW_XY_MASK) << WINDOW_Y_SHIFT | x & WINDOW_XY_MASK
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

/// A poll of the word at `address`, a multiple of 4, under a mask: `retries` after the first try, cut to
/// [`POLL_RETRIES_MASK`], every `interval` microseconds.
pub const fn poll_memory(
    address: u64,
    function: PollFunction,
    reference: u32,
    mask: u32,
    retries: u32,
    interval: u16,
) -> [u32; POLL_REGMEM_WORDS] {
    [
        OP_POLL_REGMEM as u32 | (function as u32) << POLL_FUNCTION_SHIFT | POLL_MEMORY,
        lo(address),
        hi(address),
        reference,
        mask,
        (retries & POLL_RETRIES_MASK) << POLL_RETRIES_SHIFT | interval as u32,
    ]
}

/// An atomic operation on 4 bytes at `address`, or on 8 if `wide`; a multiple of that many. Narrow ones use the low
/// halves of operand and comparand.
pub const fn atomic(
    address: u64,
    op: AtomicOp,
    wide: bool,
    operand: u64,
    comparand: u64,
) -> [u32; ATOMIC_WORDS] {
    let code = op as u32 | if wide { ATOMIC_WIDE as u32 } else { 0 };
    [
        OP_ATOMIC as u32 | code << ATOMIC_OP_SHIFT,
        lo(address),
        hi(address),
        lo(operand),
        hi(operand),
        lo(comparand),
        hi(comparand),
        0,
    ]
}

/// Sets the queue's local time to `ns` nanoseconds.
pub const fn timestamp_set(ns: u64) -> [u32; TIMESTAMP_WORDS] {
    timestamp(SUBOP_TIMESTAMP_SET, ns)
}

/// Stores the queue's local time, in nanoseconds, in the 8 bytes at `address`, a multiple of 8.
pub const fn timestamp_get(address: u64) -> [u32; TIMESTAMP_WORDS] {
    timestamp(SUBOP_TIMESTAMP_GET, address)
}

/// Stores the device clock, in nanoseconds, in the 8 bytes at `address`, a multiple of 8.
pub const fn timestamp_get_global(address: u64) -> [u32; TIMESTAMP_WORDS] {
    timestamp(SUBOP_TIMESTAMP_GET_GLOBAL, address)
}

const fn timestamp(sub: u8, value: u64) -> [u32; TIMESTAMP_WORDS] {
    [
        OP_TIMESTAMP as u32 | (sub as u32) << 8,
        lo(value),
        hi(value),
    ]
}
