//! Why memory of the client is not mapped or unmapped.

use rustix::io::Errno;
use thiserror::Error;

use super::MAX_DMA_MAPS;

/// Why a map or unmap is refused.
#[derive(Debug, Error)]
pub enum MapError {
    /// Of size 0.
    #[error("a map of 0 bytes at {address:#x}")]
    Empty {
        /// First address.
        address: u64,
    },
    /// Past the last address or the last file offset.
    #[error("{address:#x}..+{size:#x} at file offset {offset:#x} goes past the end of 64 bits")]
    Wraps {
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
        /// Offset in the file.
        offset: u64,
    },
    /// Flags that are not known, or that allow no access.
    #[error("flags {0:#x}; 1 is readable, 2 is writable, 3 both")]
    Flags(u32),
    /// Over another map.
    #[error("{address:#x}..+{size:#x} overlaps the map at {other:#x}..+{other_size:#x}")]
    Overlap {
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
        /// First address of the map that is there.
        other: u64,
        /// Its bytes.
        other_size: u64,
    },
    /// Too many maps.
    #[error("{MAX_DMA_MAPS} maps exist already")]
    TooMany,
    /// Not a file that stays as long as it says.
    #[error("the file descriptor is no regular file")]
    NotAFile,
    /// A file that ends inside the map.
    #[error("the file has {len:#x} bytes; {size:#x} from {offset:#x} are to be mapped")]
    ShortFile {
        /// Bytes of the file.
        len: u64,
        /// Offset in the file.
        offset: u64,
        /// Bytes to map.
        size: u64,
    },
    /// No map in this range, or one that lies in it only in part.
    #[error("{address:#x}..+{size:#x} has no map in it, or a map only in part")]
    NotMapped {
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Dirty page tracking, which is not offered.
    #[error("unmap with flags {0:#x}; dirty pages are not tracked")]
    UnmapFlags(u32),
    /// The host refused.
    #[error("mapping {size:#x} bytes from file offset {offset:#x}: {errno}")]
    Host {
        /// Offset in the file.
        offset: u64,
        /// Bytes to map.
        size: u64,
        /// The host's error.
        errno: Errno,
    },
}

impl MapError {
    /// The error number for the client.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Overlap { .. } => Errno::EXIST,
            Self::TooMany => Errno::NOSPC,
            Self::NotMapped { .. } => Errno::NOENT,
            Self::UnmapFlags(_) => Errno::NOTSUP,
            Self::Host { errno, .. } => *errno,
            _ => Errno::INVAL,
        }
    }
}
