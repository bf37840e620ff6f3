//! The messages of the protocol: bytes to a checked [`Request`], results to bytes.
//!
//! Nothing here does I/O or allocates after [`Reply::new`]. A request borrows the message it was decoded from.
//! All numbers are in the host's byte order (specification, "Protocol Specification").

use rustix::io::Errno;

use super::MAX_TRANSFER;
use super::refusal::Refusal;

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
mod flag {
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
            // The error field at 12 is reserved in commands.
        })
        .filter(|_| bytes.len() >= HEADER_SIZE)
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
}

/// A command whose body is as long as its fields say. Values are the client's, unchecked beyond that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// `VERSION`.
    Version {
        /// Major version proposed.
        major: u16,
        /// Minor version proposed.
        minor: u16,
        /// JSON with its terminating NUL, or nothing.
        data: &'a [u8],
    },
    /// `DMA_MAP`.
    DmaMap(DmaMap),
    /// `DMA_UNMAP`.
    DmaUnmap {
        /// The client's room for the reply, echoed.
        argsz: u32,
        /// See [`UNMAP_DIRTY`] and [`UNMAP_ALL`].
        flags: u32,
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// `DEVICE_GET_INFO`.
    GetInfo,
    /// `DEVICE_GET_REGION_INFO`.
    GetRegionInfo {
        /// The client's room for the reply's body, at least 32 bytes.
        argsz: u32,
        /// Region index.
        index: u32,
    },
    /// `DEVICE_GET_REGION_IO_FDS`.
    GetRegionIoFds {
        /// Region index.
        index: u32,
    },
    /// `DEVICE_GET_IRQ_INFO`.
    GetIrqInfo {
        /// Interrupt index.
        index: u32,
    },
    /// `DEVICE_SET_IRQS`.
    SetIrqs(SetIrqs<'a>),
    /// `REGION_READ`.
    RegionRead(Access),
    /// `REGION_WRITE`; `data` has `count` bytes.
    RegionWrite(Access, &'a [u8]),
    /// `REGION_WRITE_MULTI`.
    RegionWriteMulti(Writes<'a>),
    /// `DEVICE_RESET`.
    Reset,
}

/// Body of `DMA_MAP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// Bit 0 readable, bit 1 writable by the server.
    pub flags: u32,
    /// Offset in the file descriptor's file.
    pub offset: u64,
    /// First address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Body of `DEVICE_SET_IRQS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// One `DATA` and one `ACTION` bit.
    pub flags: u32,
    /// Interrupt index.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Vectors.
    pub count: u32,
    /// Whatever follows; with `DATA_BOOL` a byte per vector.
    pub data: &'a [u8],
}

/// Where a region access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Offset in the region.
    pub offset: u64,
    /// Region index.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

/// `DMA_UNMAP` flag: return a dirty bitmap (`VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`).
pub const UNMAP_DIRTY: u32 = 1 << 0;
/// `DMA_UNMAP` flag: every map (`VFIO_DMA_UNMAP_FLAG_ALL`).
pub const UNMAP_ALL: u32 = 1 << 1;
/// The same in older revisions of the protocol, which the `vfio_user` crate follows.
pub const UNMAP_ALL_OLD: u32 = 1 << 2;

/// Bytes of one write in `REGION_WRITE_MULTI`.
const MULTI_ENTRY: usize = 24;

/// The writes of a `REGION_WRITE_MULTI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writes<'a> {
    entries: &'a [u8],
}

impl<'a> Writes<'a> {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        (self.entries.len() / MULTI_ENTRY) as u64
    }

    /// Each write and its data, of 0 to 8 bytes; an error where a count is larger.
    pub fn iter(&self) -> impl Iterator<Item = Result<(Access, &'a [u8]), Refusal>> + use<'a> {
        self.entries.chunks_exact(MULTI_ENTRY).map(|entry| {
            let access = access_at(entry).ok_or(Refusal::BodySize {
                command: command::REGION_WRITE_MULTI,
                got: entry.len(),
                want: MULTI_ENTRY,
            })?;
            let data = usize::try_from(access.count)
                .ok()
                .and_then(|count| entry.get(16..)?.get(..count))
                .ok_or(Refusal::Transfer {
                    count: access.count.into(),
                    max: 8,
                })?;
            Ok((access, data))
        })
    }
}

/// Decodes the command in a message.
///
/// # Errors
/// [`Refusal`] if the command is not served or `body` is not as long as it should be.
pub fn decode<'a>(header: &Header, body: &'a [u8]) -> Result<Request<'a>, Refusal> {
    if let Kind::Reserved(kind) = header.kind() {
        return Err(Refusal::Kind(kind));
    }
    let Some(want) = body_size(header.command) else {
        return Err(match header.command {
            command::DMA_READ
            | command::DMA_WRITE
            | command::DIRTY_PAGES
            | command::DEVICE_FEATURE
            | command::MIG_DATA_READ
            | command::MIG_DATA_WRITE => Refusal::Unsupported(header.command),
            other => Refusal::UnknownCommand(other),
        });
    };
    decode_body(header.command, body).unwrap_or(Err(Refusal::BodySize {
        command: header.command,
        got: body.len(),
        want,
    }))
}

/// Bytes of the fixed part of a served command's body.
fn body_size(number: u16) -> Option<usize> {
    Some(match number {
        command::VERSION => 4,
        command::DMA_MAP | command::GET_REGION_INFO => 32,
        command::DMA_UNMAP => 24,
        command::GET_INFO
        | command::GET_REGION_IO_FDS
        | command::GET_IRQ_INFO
        | command::REGION_READ
        | command::REGION_WRITE => 16,
        command::SET_IRQS => 20,
        command::REGION_WRITE_MULTI => 8,
        command::RESET => 0,
        _ => return None,
    })
}

/// The request in `body`; none if the body is too short for the command's fixed part.
fn decode_body(number: u16, body: &[u8]) -> Option<Result<Request<'_>, Refusal>> {
    if body.len() < body_size(number)? {
        return None;
    }
    let mismatch = |want| Refusal::BodySize {
        command: number,
        got: body.len(),
        want,
    };
    let room = |want: u32, request| match u32_at(body, 0) {
        Some(argsz) if argsz < want => Err(Refusal::Argsz {
            command: number,
            argsz,
            want,
        }),
        _ => Ok(request),
    };
    Some(match number {
        command::VERSION => Ok(Request::Version {
            major: u16_at(body, 0)?,
            minor: u16_at(body, 2)?,
            data: body.get(4..)?,
        }),
        command::DMA_MAP => Ok(Request::DmaMap(DmaMap {
            flags: u32_at(body, 4)?,
            offset: u64_at(body, 8)?,
            address: u64_at(body, 16)?,
            size: u64_at(body, 24)?,
        })),
        command::DMA_UNMAP => Ok(Request::DmaUnmap {
            argsz: u32_at(body, 0)?,
            flags: u32_at(body, 4)?,
            address: u64_at(body, 8)?,
            size: u64_at(body, 16)?,
        }),
        command::GET_INFO => room(16, Request::GetInfo),
        command::GET_REGION_INFO => {
            let (argsz, index) = (u32_at(body, 0)?, u32_at(body, 8)?);
            room(32, Request::GetRegionInfo { argsz, index })
        }
        command::GET_REGION_IO_FDS => {
            let index = u32_at(body, 8)?;
            room(16, Request::GetRegionIoFds { index })
        }
        command::GET_IRQ_INFO => {
            let index = u32_at(body, 8)?;
            room(16, Request::GetIrqInfo { index })
        }
        command::SET_IRQS => Ok(Request::SetIrqs(SetIrqs {
            flags: u32_at(body, 4)?,
            index: u32_at(body, 8)?,
            start: u32_at(body, 12)?,
            count: u32_at(body, 16)?,
            data: body.get(20..)?,
        })),
        command::REGION_READ => match body.len() {
            16 => access(body, 16).map(Request::RegionRead),
            _ => Err(mismatch(16)),
        },
        command::REGION_WRITE => {
            let data = body.get(16..)?;
            access(body, 16).and_then(|access| match usize::try_from(access.count) {
                Ok(count) if count == data.len() => Ok(Request::RegionWrite(access, data)),
                _ => Err(mismatch(16 + access.count as usize)),
            })
        }
        command::REGION_WRITE_MULTI => {
            // A client may send its whole array and use a part of it.
            let count = u64_at(body, 0)?;
            let entries = body.get(8..)?;
            let used = usize::try_from(count)
                .ok()
                .and_then(|count| count.checked_mul(MULTI_ENTRY))
                .and_then(|len| entries.get(..len));
            used.map(|entries| Request::RegionWriteMulti(Writes { entries }))
                .ok_or(Refusal::Transfer {
                    count,
                    max: entries.len() / MULTI_ENTRY,
                })
        }
        command::RESET => Ok(Request::Reset),
        _ => return None,
    })
}

/// The access described at the start of `body`, with its count checked.
fn access(body: &[u8], want: usize) -> Result<Access, Refusal> {
    let access = access_at(body).ok_or(Refusal::BodySize {
        command: command::REGION_READ,
        got: body.len(),
        want,
    })?;
    if access.count as usize > MAX_TRANSFER {
        return Err(Refusal::Transfer {
            count: access.count.into(),
            max: MAX_TRANSFER,
        });
    }
    Ok(access)
}

/// `offset`, `region` and `count` at the start of `bytes`.
fn access_at(bytes: &[u8]) -> Option<Access> {
    Some(Access {
        offset: u64_at(bytes, 0)?,
        region: u32_at(bytes, 8)?,
        count: u32_at(bytes, 12)?,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A reply under construction, in a buffer that is made once per connection and fits the largest one.
#[derive(Debug)]
pub struct Reply {
    buffer: Box<[u8]>,
    len: usize,
    bar: Option<u8>,
}

impl Default for Reply {
    fn default() -> Self {
        Self::new()
    }
}

impl Reply {
    /// An empty reply. Its pages are touched only as far as replies are long.
    #[must_use]
    pub fn new() -> Self {
        Self {
            buffer: vec![0; HEADER_SIZE + 16 + MAX_TRANSFER].into_boxed_slice(),
            len: HEADER_SIZE,
            bar: None,
        }
    }

    /// Drops what was put; the next [`finish`](Self::finish) gives an empty body.
    pub fn clear(&mut self) {
        self.len = HEADER_SIZE;
        self.bar = None;
    }

    /// Says that the file of a BAR goes with the reply.
    pub fn with_file_of(&mut self, bar: u8) -> &mut Self {
        self.bar = Some(bar);
        self
    }

    /// The BAR whose file goes with the reply, if one does.
    #[must_use]
    pub fn file_of(&self) -> Option<u8> {
        self.bar
    }

    /// Appends a 16-bit number.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends a 32-bit number.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends a 64-bit number.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.space(bytes.len()).copy_from_slice(bytes);
        self
    }

    /// Appends `len` zero bytes and returns them to be filled.
    ///
    /// More than fits a reply (a fixed part and [`MAX_TRANSFER`]) is a bug in the caller, which decoded the
    /// request's count.
    pub fn space(&mut self, len: usize) -> &mut [u8] {
        let at = self.len;
        let (_, free) = self.buffer.split_at_mut(at);
        let (space, _) = free.split_at_mut(len);
        self.len += len;
        space.fill(0);
        space
    }

    /// Completes the header of a successful reply to `request`; the message to send.
    pub fn finish(&mut self, request: &Header) -> &[u8] {
        self.header(request, flag::REPLY, 0)
    }

    /// Replaces all that was put by an error; the message to send, of 16 bytes.
    pub fn refuse(&mut self, request: &Header, errno: Errno) -> &[u8] {
        self.clear();
        self.header(
            request,
            flag::REPLY | flag::ERROR,
            errno.raw_os_error().unsigned_abs(),
        )
    }

    fn header(&mut self, request: &Header, flags: u32, error: u32) -> &[u8] {
        // The buffer is far shorter than 4 GiB.
        let size = u32::try_from(self.len).unwrap_or(u32::MAX);
        let (message, _) = self.buffer.split_at_mut(self.len);
        let fields = [
            u32::from_ne_bytes(pair(request.id, request.command)),
            size,
            flags,
            error,
        ];
        for (place, field) in message.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_ne_bytes());
        }
        message
    }
}

/// Two 16-bit numbers as they lie in memory.
fn pair(first: u16, second: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d]
}
