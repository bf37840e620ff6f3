//! `DMA_READ` and `DMA_WRITE`, the two commands that go from the server to the client.

use super::{HEADER_SIZE, Header, command, flag, u32_at, u64_at};

/// Bytes of a command without the data of a write.
const HEAD: usize = HEADER_SIZE + 16;

/// All of a `DMA_READ`, or what goes before the data of a `DMA_WRITE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaHead {
    /// Echoed in the reply.
    pub id: u16,
    /// A write, not a read.
    pub is_write: bool,
    /// First address.
    pub address: u64,
    /// Bytes to move.
    pub count: u32,
}

impl DmaHead {
    /// Command number.
    #[must_use]
    pub fn command(&self) -> u16 {
        match self.is_write {
            true => command::DMA_WRITE,
            false => command::DMA_READ,
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(&self) -> [u8; HEAD] {
        let data = if self.is_write { self.count } else { 0 };
        let header = Header {
            id: self.id,
            command: self.command(),
            // The head has 32 bytes.
            size: data.saturating_add(32),
            flags: flag::COMMAND,
            error: 0,
        };
        let mut bytes = [0; HEAD];
        let (head, body) = bytes.split_at_mut(HEADER_SIZE);
        head.copy_from_slice(&header.encode());
        let (address, count) = body.split_at_mut(8);
        address.copy_from_slice(&self.address.to_ne_bytes());
        count.copy_from_slice(&u64::from(self.count).to_ne_bytes());
        bytes
    }
}

/// What a client says that it has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved<'a> {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub count: u64,
    /// What a read brought.
    pub data: &'a [u8],
}

impl<'a> Moved<'a> {
    /// The body of a reply; none if it is too short. That to a write has a count of 64 bits in the clients there are,
    /// of 32 in the specification's table; what follows it is not looked at.
    #[must_use]
    pub fn decode(command: u16, body: &'a [u8]) -> Option<Self> {
        let is_write = command == command::DMA_WRITE;
        Some(Self {
            address: u64_at(body, 0)?,
            count: match is_write && body.len() < 16 {
                true => u32_at(body, 8)?.into(),
                false => u64_at(body, 8)?,
            },
            data: match is_write {
                true => &[],
                false => body.get(16..)?,
            },
        })
    }
}
