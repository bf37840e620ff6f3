//! Decoding of packets: words of a ring in, one checked operation out.

use numagpu_spec::regs::QueueFault;
use numagpu_spec::sdma::{self, AtomicOp, PollFunction};

use crate::atomic::Atomic;

/// Most words that [`decode`] looks at; data of a linear write stays in the ring.
pub const HEADER_WORDS: usize = sdma::ATOMIC_WORDS;

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
    Trap,
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
            if flags | (word(1)? & !sdma::TRAP_CONTEXT_MASK) != 0 {
                return Err(FIELD);
            }
            (Operation::Trap, 4 * sdma::TRAP_WORDS as u64)
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
