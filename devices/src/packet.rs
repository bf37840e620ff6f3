//! Decoding of packets: words of a ring in, one checked operation out.

use numagpu_spec::regs::QueueFault;
use numagpu_spec::sdma;

/// Most words that [`decode`] looks at; data of a linear write stays in the ring.
pub const HEADER_WORDS: usize = sdma::COPY_LINEAR_WORDS;

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
        _ => return Err(BadPacket::of(QueueFault::BadOpcode)),
    };
    if bytes > available {
        return Err(BadPacket::of(QueueFault::Truncated));
    }
    Ok(Packet { operation, bytes })
}

fn aligned(address: u64) -> Result<u64, BadPacket> {
    if address.is_multiple_of(4) {
        Ok(address)
    } else {
        Err(BadPacket {
            code: QueueFault::BadField,
            address: Some(address),
        })
    }
}
