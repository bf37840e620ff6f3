//! Requests of the client.

use super::super::MAX_TRANSFER;
use super::super::refusal::Refusal;
use super::{Header, Kind, command, u16_at, u32_at, u64_at};

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
        /// The client's room for the reply's body, at least 24 bytes; echoed.
        argsz: u32,
        /// See [`UNMAP_DIRTY`] and [`UNMAP_ALL`].
        flags: u32,
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
        /// What follows if the client asks for a bitmap.
        bitmap: Option<UnmapBitmap>,
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
        /// The client's room for the reply's body, at least 16 bytes.
        argsz: u32,
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
    /// `DEVICE_FEATURE`.
    Feature {
        /// The client's room for the reply's body, at least 8 bytes.
        argsz: u32,
        /// Feature index in bits 0 to 15, what to do with it above.
        flags: u32,
        /// The feature's own data.
        data: &'a [u8],
    },
    /// `MIG_DATA_READ`.
    MigrationRead {
        /// The client's room for the reply's body.
        argsz: u32,
        /// Bytes to read.
        size: u32,
    },
    /// `MIG_DATA_WRITE`, of the bytes that its size field says.
    MigrationWrite(&'a [u8]),
}

/// What a `DMA_UNMAP` asks for with [`UNMAP_DIRTY`]: `struct vfio_bitmap` without its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapBitmap {
    /// Bytes that a bit stands for.
    pub page_size: u64,
    /// Bytes of the bitmap.
    pub size: u64,
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
    /// Whatever follows; with `DATA_BOOL` a byte per vector and no more.
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
            command::DMA_READ | command::DMA_WRITE | command::DIRTY_PAGES => {
                Refusal::Unsupported(header.command)
            }
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
        command::REGION_WRITE_MULTI
        | command::DEVICE_FEATURE
        | command::MIG_DATA_READ
        | command::MIG_DATA_WRITE => 8,
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
    // `argsz` is the room for the reply, and that of the request where the reply has no body.
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
        command::DMA_MAP => {
            let map = DmaMap {
                flags: u32_at(body, 4)?,
                offset: u64_at(body, 8)?,
                address: u64_at(body, 16)?,
                size: u64_at(body, 24)?,
            };
            room(32, Request::DmaMap(map))
        }
        command::DMA_UNMAP => {
            let unmap = Request::DmaUnmap {
                argsz: u32_at(body, 0)?,
                flags: u32_at(body, 4)?,
                address: u64_at(body, 8)?,
                size: u64_at(body, 16)?,
                bitmap: u64_at(body, 24)
                    .zip(u64_at(body, 32))
                    .map(|it| UnmapBitmap {
                        page_size: it.0,
                        size: it.1,
                    }),
            };
            room(24, unmap)
        }
        command::GET_INFO => room(16, Request::GetInfo),
        command::GET_REGION_INFO => {
            let (argsz, index) = (u32_at(body, 0)?, u32_at(body, 8)?);
            room(32, Request::GetRegionInfo { argsz, index })
        }
        command::GET_REGION_IO_FDS => {
            let (argsz, index) = (u32_at(body, 0)?, u32_at(body, 8)?);
            match u32_at(body, 4)? | u32_at(body, 12)? {
                0 => room(16, Request::GetRegionIoFds { argsz, index }),
                value => Err(Refusal::NotZero {
                    command: number,
                    value,
                }),
            }
        }
        command::GET_IRQ_INFO => {
            let index = u32_at(body, 8)?;
            room(16, Request::GetIrqInfo { index })
        }
        command::SET_IRQS => {
            let set = SetIrqs {
                flags: u32_at(body, 4)?,
                index: u32_at(body, 8)?,
                start: u32_at(body, 12)?,
                count: u32_at(body, 16)?,
                data: body.get(20..)?,
            };
            room(20, Request::SetIrqs(set))
        }
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
        command::DEVICE_FEATURE => {
            let (argsz, flags, data) = (u32_at(body, 0)?, u32_at(body, 4)?, body.get(8..)?);
            room(8, Request::Feature { argsz, flags, data })
        }
        command::MIG_DATA_READ => Ok(Request::MigrationRead {
            argsz: u32_at(body, 0)?,
            size: u32_at(body, 4)?,
        }),
        command::MIG_DATA_WRITE => {
            let (size, data) = (u32_at(body, 4)? as usize, body.get(8..)?);
            match data.len() == size {
                true => Ok(Request::MigrationWrite(data)),
                false => Err(mismatch(size.saturating_add(8))),
            }
        }
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
