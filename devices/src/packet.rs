//! Decoding of packets: words of a ring in, one checked operation out.

use numagpu_spec::regs::QueueFault;
use numagpu_spec::sdma::{self, AtomicOp, PollFunction};

use crate::atomic::Atomic;

/// Most words that [`decode`] looks at; data of a linear write stays in the ring.
pub const HEADER_WORDS: usize = sdma::COPY_SUB_WINDOW_WORDS;

/// A surface of elements, and where a box begins in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// First address of the surface.
    pub address: u64,
    /// First column, row and slice of the box.
    pub origin: [u64; 3],
    /// Elements from one row to the next.
    pub pitch: u64,
    /// Elements from one slice to the next.
    pub slice_pitch: u64,
}

/// A box of elements that goes from one surface to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Bytes of an element: 1, 2, 4, 8 or 16.
    pub element: u64,
    /// Where it is read.
    pub source: Plane,
    /// Where it is written.
    pub destination: Plane,
    /// Columns, rows and slices, each at least 1.
    pub extent: [u64; 3],
}

impl Window {
    /// Bytes that are copied.
    pub fn bytes(&self) -> u64 {
        self.extent.iter().product::<u64>() * self.element
    }
}

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Nothing.
    Nop,
    /// Copy `bytes` from `source` to `destination`; overlapping ranges behave as if read before written.
    Copy {
        /// First address read.
        source: u64,
        /// First address written.
        destination: u64,
        /// 1 to [`sdma::MAX_COPY`].
        bytes: u64,
    },
    /// Copy a box of elements, row by row from the first; each row as [`Operation::Copy`] does it.
    CopyWindow(Window),
    /// Copy the words of the packet from word 4 on to `destination`, a multiple of 4.
    Write {
        /// First address written.
        destination: u64,
        /// Bytes, a multiple of 4.
        bytes: u64,
    },
    /// Fill with a pattern.
    Fill {
        /// First address written.
        destination: u64,
        /// Bytes in the order of memory; four equal ones for a byte fill.
        pattern: [u8; 4],
        /// 1 to [`sdma::MAX_COPY`].
        bytes: u64,
    },
    /// Store `value` at `address`, a multiple of 4, when everything before is visible.
    Fence {
        /// Where.
        address: u64,
        /// What.
        value: u32,
    },
    /// Raise the queue's interrupt.
    Trap {
        /// What the driver finds in `QUEUE.TRAP_CONTEXT`.
        context: u32,
    },
    /// Wait until the word at `address`, a multiple of 4, compares as asked.
    Poll {
        /// Which word.
        address: u64,
        /// How it compares.
        function: PollFunction,
        /// With what.
        reference: u32,
        /// Bits of it that count.
        mask: u32,
        /// Tries after the first; `None` is without end.
        retries: Option<u32>,
        /// Microseconds between tries.
        interval: u32,
    },
    /// An atomic operation at `address`, a multiple of its width.
    Atomic {
        /// Where.
        address: u64,
        /// What.
        atomic: Atomic,
        /// Microseconds between tries until the comparison holds; `None` is one try, whether it holds or not.
        until: Option<u32>,
    },
    /// Set the queue's local time.
    SetTime {
        /// Nanoseconds.
        ns: u64,
    },
    /// Store a time in the 8 bytes at `address`, a multiple of 8.
    GetTime {
        /// Where.
        address: u64,
        /// The device's, not the queue's.
        global: bool,
    },
}

/// A packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// What it asks for.
    pub operation: Operation,
    /// Bytes it takes in the ring.
    pub bytes: u64,
}

/// Why a packet is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPacket {
    /// Code for the driver.
    pub code: QueueFault,
    /// The address in the packet that is wrong; `None` if the packet itself is.
    pub address: Option<u64>,
}

impl BadPacket {
    const fn of(code: QueueFault) -> BadPacket {
        BadPacket {
            code,
            address: None,
        }
    }
}

const FIELD: BadPacket = BadPacket::of(QueueFault::BadField);

/// Decodes the packet at the start of `words`. `available` is the number of bytes that the driver has produced
/// from there on; `words` holds them, or the first [`HEADER_WORDS`] words of them.
///
/// Bits that the encoding reserves must be zero: a flag that this engine does not have is refused rather than
/// ignored.
///
/// # Errors
/// [`BadPacket`] with `BadOpcode`, `BadField` or `Truncated`.
pub fn decode(words: &[u32], available: u64) -> Result<Packet, BadPacket> {
    let word = |index: usize| -> Result<u32, BadPacket> {
        let truncated = BadPacket::of(QueueFault::Truncated);
        words.get(index).copied().ok_or(truncated)
    };
    let wide = |index: usize| -> Result<u64, BadPacket> {
        Ok(u64::from(word(index)?) | u64::from(word(index + 1)?) << 32)
    };
    let header = word(0)?;
    let [opcode, sub, _, _] = header.to_le_bytes();
    let flags = header >> 16;
    let (operation, bytes) = match (opcode, sub) {
        (sdma::OP_NOP, 0) => {
            if flags & !0x3fff != 0 {
                return Err(FIELD);
            }
            (Operation::Nop, 4 + 4 * u64::from(flags))
        }
        (sdma::OP_COPY, sdma::SUBOP_COPY_LINEAR) => {
            let (count, parameter) = (word(1)?, word(2)?);
            let (source, destination) = (wide(3)?, wide(5)?);
            if flags | parameter | (count & !sdma::COUNT_MASK) != 0 {
                return Err(FIELD);
            }
            let operation = Operation::Copy {
                source,
                destination,
                bytes: u64::from(count) + 1,
            };
            (operation, 4 * sdma::COPY_LINEAR_WORDS as u64)
        }
        (sdma::OP_COPY, sdma::SUBOP_COPY_SUB_WINDOW) => {
            let bytes = 4 * sdma::COPY_SUB_WINDOW_WORDS as u64;
            (Operation::CopyWindow(window(header, &word)?), bytes)
        }
        (sdma::OP_WRITE, sdma::SUBOP_WRITE_LINEAR) => {
            let (destination, count) = (wide(1)?, word(3)?);
            if flags | (count & !sdma::WRITE_COUNT_MASK) != 0 {
                return Err(FIELD);
            }
            let bytes = 4 * (u64::from(count) + 1);
            let operation = Operation::Write {
                destination: aligned(destination)?,
                bytes,
            };
            let header = 4 * sdma::WRITE_LINEAR_HEADER_WORDS as u64;
            (operation, header + bytes)
        }
        (sdma::OP_FENCE, 0) => {
            let (address, value) = (wide(1)?, word(3)?);
            if flags != 0 {
                return Err(FIELD);
            }
            let address = aligned(address)?;
            let operation = Operation::Fence { address, value };
            (operation, 4 * sdma::FENCE_WORDS as u64)
        }
        (sdma::OP_TRAP, 0) => {
            let context = word(1)?;
            if flags | (context & !sdma::TRAP_CONTEXT_MASK) != 0 {
                return Err(FIELD);
            }
            (Operation::Trap { context }, 4 * sdma::TRAP_WORDS as u64)
        }
        (sdma::OP_CONST_FILL, 0) => {
            let (destination, value, count) = (wide(1)?, word(3)?, word(4)?);
            if count & !sdma::COUNT_MASK != 0 || flags & 0x3fff != 0 {
                return Err(FIELD);
            }
            let bytes = u64::from(count) + 1;
            let pattern = match header >> sdma::FILL_SIZE_SHIFT {
                0 => [value.to_le_bytes()[0]; 4],
                2 => {
                    aligned(destination)?;
                    if !bytes.is_multiple_of(4) {
                        return Err(FIELD);
                    }
                    value.to_le_bytes()
                }
                _ => return Err(FIELD),
            };
            let operation = Operation::Fill {
                destination,
                pattern,
                bytes,
            };
            (operation, 4 * sdma::CONST_FILL_WORDS as u64)
        }
        (sdma::OP_POLL_REGMEM, 0) => (poll(header, &word)?, 4 * sdma::POLL_REGMEM_WORDS as u64),
        (sdma::OP_ATOMIC, 0) => (atomic(header, &word)?, 4 * sdma::ATOMIC_WORDS as u64),
        (
            sdma::OP_TIMESTAMP,
            sdma::SUBOP_TIMESTAMP_SET
            | sdma::SUBOP_TIMESTAMP_GET
            | sdma::SUBOP_TIMESTAMP_GET_GLOBAL,
        ) => {
            let value = wide(1)?;
            if flags != 0 {
                return Err(FIELD);
            }
            let operation = match sub {
                sdma::SUBOP_TIMESTAMP_SET => Operation::SetTime { ns: value },
                _ => Operation::GetTime {
                    address: aligned_to(8, value)?,
                    global: sub == sdma::SUBOP_TIMESTAMP_GET_GLOBAL,
                },
            };
            (operation, 4 * sdma::TIMESTAMP_WORDS as u64)
        }
        _ => return Err(BadPacket::of(QueueFault::BadOpcode)),
    };
    if bytes > available {
        return Err(BadPacket::of(QueueFault::Truncated));
    }
    Ok(Packet { operation, bytes })
}

type Words<'w> = dyn Fn(usize) -> Result<u32, BadPacket> + 'w;

fn window(header: u32, word: &Words<'_>) -> Result<Window, BadPacket> {
    let pair = |index: usize| -> Result<[u64; 2], BadPacket> {
        let both = word(index)?;
        if both & !(sdma::WINDOW_XY_MASK | sdma::WINDOW_XY_MASK << sdma::WINDOW_Y_SHIFT) != 0 {
            return Err(FIELD);
        }
        let (x, y) = (both & sdma::WINDOW_XY_MASK, both >> sdma::WINDOW_Y_SHIFT);
        Ok([x.into(), y.into()])
    };
    let plane = |index: usize| -> Result<Plane, BadPacket> {
        let address = u64::from(word(index)?) | u64::from(word(index + 1)?) << 32;
        let ([x, y], depth, slice) = (pair(index + 2)?, word(index + 3)?, word(index + 4)?);
        let between = (1 << sdma::WINDOW_PITCH_SHIFT) - 1 - sdma::WINDOW_Z_MASK;
        if depth & between != 0 || slice & !sdma::WINDOW_SLICE_MASK != 0 {
            return Err(FIELD);
        }
        Ok(Plane {
            address,
            origin: [x, y, (depth & sdma::WINDOW_Z_MASK).into()],
            pitch: u64::from(depth >> sdma::WINDOW_PITCH_SHIFT) + 1,
            slice_pitch: u64::from(slice) + 1,
        })
    };
    let (source, destination) = (plane(1)?, plane(6)?);
    let ([x, y], z) = (pair(11)?, word(12)?);
    let size = header >> sdma::WINDOW_ELEMENT_SHIFT;
    // Bits 28:16 of the header are others' features, and so is swapping in the last word.
    let reserved = header & 0x1fff_0000 | z & !sdma::WINDOW_Z_MASK;
    if reserved != 0 || size > sdma::WINDOW_ELEMENT_MAX {
        return Err(FIELD);
    }
    Ok(Window {
        element: 1 << size,
        source,
        destination,
        extent: [x + 1, y + 1, u64::from(z) + 1],
    })
}

fn poll(header: u32, word: &Words<'_>) -> Result<Operation, BadPacket> {
    let address = u64::from(word(1)?) | u64::from(word(2)?) << 32;
    let (reference, mask, pace) = (word(3)?, word(4)?, word(5)?);
    // Of the header's upper half only the comparison and the choice of memory; polls of registers and flushes of
    // the host path are others' features.
    let reserved = header & 0x0fff_0000;
    let paces = sdma::POLL_INTERVAL_MASK | sdma::POLL_RETRIES_MASK << sdma::POLL_RETRIES_SHIFT;
    if reserved != 0 || header & sdma::POLL_MEMORY == 0 || pace & !paces != 0 {
        return Err(FIELD);
    }
    let code = header >> sdma::POLL_FUNCTION_SHIFT & 7;
    let mut functions = PollFunction::ALL.into_iter();
    let function = functions.find(|f| *f as u32 == code).ok_or(FIELD)?;
    let retries = pace >> sdma::POLL_RETRIES_SHIFT;
    Ok(Operation::Poll {
        address: aligned(address)?,
        function,
        reference,
        mask,
        retries: (retries != sdma::POLL_RETRIES_MASK).then_some(retries),
        interval: pace & sdma::POLL_INTERVAL_MASK,
    })
}

fn atomic(header: u32, word: &Words<'_>) -> Result<Operation, BadPacket> {
    let pair = |index: usize| -> Result<u64, BadPacket> {
        Ok(u64::from(word(index)?) | u64::from(word(index + 1)?) << 32)
    };
    let (address, operand, comparand, interval) = (pair(1)?, pair(3)?, pair(5)?, word(7)?);
    let [_, _, _, code] = (header >> sdma::ATOMIC_OP_SHIFT << 24).to_le_bytes();
    let looping = header & sdma::ATOMIC_LOOP != 0;
    if header & 0x01fe_0000 != 0 || interval & !sdma::ATOMIC_INTERVAL_MASK != 0 {
        return Err(FIELD);
    }
    let wide = code & sdma::ATOMIC_WIDE != 0;
    let code = code & !(sdma::ATOMIC_WIDE | sdma::ATOMIC_NO_RETURN);
    let mut ops = AtomicOp::ALL.into_iter();
    let op = ops.find(|op| *op as u8 == code).ok_or(FIELD)?;
    if looping && op != AtomicOp::CompareSwap {
        return Err(FIELD);
    }
    Ok(Operation::Atomic {
        address: aligned_to(if wide { 8 } else { 4 }, address)?,
        atomic: Atomic {
            op,
            wide,
            operand,
            comparand,
        },
        until: looping.then_some(interval),
    })
}

fn aligned(address: u64) -> Result<u64, BadPacket> {
    aligned_to(4, address)
}

fn aligned_to(bytes: u64, address: u64) -> Result<u64, BadPacket> {
    if address.is_multiple_of(bytes) {
        Ok(address)
    } else {
        Err(BadPacket {
            code: QueueFault::BadField,
            address: Some(address),
        })
    }
}
