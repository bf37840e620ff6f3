//! The messages of the protocol: bytes to a checked [`Request`], results to bytes.
//!
//! Nothing here does I/O or allocates after [`Reply::new`]. A request borrows the message it was decoded from.
//! All numbers are in the host's byte order (specification, "Protocol Specification").

mod memory;
mod reply;
mod request;

pub use memory::{DmaHead, Moved};
pub use reply::{Files, Reply};
pub use request::{
    Access, DmaMap, Request, SetIrqs, UNMAP_ALL, UNMAP_ALL_OLD, UNMAP_DIRTY, UnmapBitmap, Writes,
    decode,
};

/// Bytes of the header of every message (specification, "Header").
pub const HEADER_SIZE: usize = 16;

/// Command numbers (specification, "Commands").
pub mod command {
    /// `VFIO_USER_VERSION`.
    pub const VERSION: u16 = 1;
    /// `VFIO_USER_DMA_MAP`.
    pub const DMA_MAP: u16 = 2;
    /// `VFIO_USER_DMA_UNMAP`.
    pub const DMA_UNMAP: u16 = 3;
    /// `VFIO_USER_DEVICE_GET_INFO`.
    pub const GET_INFO: u16 = 4;
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`.
    pub const GET_REGION_INFO: u16 = 5;
    /// `VFIO_USER_DEVICE_GET_REGION_IO_FDS`.
    pub const GET_REGION_IO_FDS: u16 = 6;
    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`.
    pub const GET_IRQ_INFO: u16 = 7;
    /// `VFIO_USER_DEVICE_SET_IRQS`.
    pub const SET_IRQS: u16 = 8;
    /// `VFIO_USER_REGION_READ`.
    pub const REGION_READ: u16 = 9;
    /// `VFIO_USER_REGION_WRITE`.
    pub const REGION_WRITE: u16 = 10;
    /// `VFIO_USER_DMA_READ`, sent by servers only.
    pub const DMA_READ: u16 = 11;
    /// `VFIO_USER_DMA_WRITE`, sent by servers only.
    pub const DMA_WRITE: u16 = 12;
    /// `VFIO_USER_DEVICE_RESET`.
    pub const RESET: u16 = 13;
    /// `VFIO_USER_DIRTY_PAGES` of older revisions.
    pub const DIRTY_PAGES: u16 = 14;
    /// `VFIO_USER_REGION_WRITE_MULTI`.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// `VFIO_USER_DEVICE_FEATURE`.
    pub const DEVICE_FEATURE: u16 = 16;
    /// `VFIO_USER_MIG_DATA_READ`.
    pub const MIG_DATA_READ: u16 = 17;
    /// `VFIO_USER_MIG_DATA_WRITE`.
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// Bits of the header's flags (specification, "Header").
pub mod flag {
    /// Mask of the message type.
    pub const TYPE: u32 = 0xf;
    /// The type of a command.
    pub const COMMAND: u32 = 0;
    /// The type of a reply.
    pub const REPLY: u32 = 1;
    /// No reply is wanted, not even with an error.
    pub const NO_REPLY: u32 = 1 << 4;
    /// The command failed; the error field says why.
    pub const ERROR: u32 = 1 << 5;
}

/// What a message is, by the type bits of its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command to carry out.
    Command,
    /// A reply to a command of ours.
    Reply,
    /// Neither: these type bits are reserved.
    Reserved(u32),
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Echoed in the reply; need not be unique.
    pub id: u16,
    /// Command number, see [`command`].
    pub command: u16,
    /// Bytes of the message, header included. Not checked.
    pub size: u32,
    /// Type, no-reply and error bits.
    pub flags: u32,
    /// Error number of a reply with the error bit, may be 0; reserved in commands.
    pub error: u32,
}

impl Header {
    /// The header at the start of `bytes`; none if there are fewer than [`HEADER_SIZE`].
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            id: u16_at(bytes, 0)?,
            command: u16_at(bytes, 2)?,
            size: u32_at(bytes, 4)?,
            flags: u32_at(bytes, 8)?,
            error: u32_at(bytes, 12)?,
        })
    }

    /// Whether this is a command or a reply.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.flags & flag::TYPE {
            flag::COMMAND => Kind::Command,
            flag::REPLY => Kind::Reply,
            other => Kind::Reserved(other),
        }
    }

    /// Whether the sender wants no reply.
    #[must_use]
    pub fn no_reply(&self) -> bool {
        self.flags & flag::NO_REPLY != 0
    }

    /// Whether this reply says that the command failed.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.flags & flag::ERROR != 0
    }

    /// The header as it is sent.
    fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let first = pair(self.id, self.command);
        let fields = [u32::from_ne_bytes(first), self.size, self.flags, self.error];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Two 16-bit numbers as they lie in memory.
fn pair(first: u16, second: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d]
}
