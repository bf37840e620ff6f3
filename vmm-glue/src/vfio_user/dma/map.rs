//! A map: what a client may ask for, and where its memory is.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use numagpu_devices::bus::{BackingId, DmaAccess, DmaError, Mapped};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::VolatileSlice;

use super::super::PAGE_SIZES;
use super::super::client::{Client, Remote};
use super::super::wire::DmaMap;
use super::files::View;
use super::room::Full;
use super::{READABLE, WRITABLE};

/// How long nothing is said of lost maps after something was: a client can lose as many as it likes.
const QUIET: Duration = Duration::from_secs(1);

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
    /// At a file offset that is inside a page.
    #[error("file offset {0:#x} is not a multiple of {PAGE_SIZES:#x}")]
    Offset(u64),
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
    #[error("{0} maps exist already")]
    TooMany(usize),
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
    /// Flags of an unmap that are not known, or do not go together or with its range.
    #[error("unmap of {address:#x}..+{size:#x} with flags {flags:#x}")]
    UnmapFlags {
        /// Flags.
        flags: u32,
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// More than a client may map, or all of them.
    #[error(transparent)]
    Full(#[from] Full),
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
            Self::TooMany(_) => Errno::NOSPC,
            Self::NotMapped { .. } => Errno::NOENT,
            Self::Full(_) => Errno::NOMEM,
            Self::Host { errno, .. } => *errno,
            _ => Errno::INVAL,
        }
    }
}

/// One map. Its file's memory is unmapped when the last user of the last map that shows it drops that.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) address: u64,
    pub(super) size: u64,
    pub(super) flags: u32,
    pub(super) offset: u64,
    pub(super) backing: Backing,
}

/// Where a map's memory is.
#[derive(Debug)]
pub(super) enum Backing {
    /// In a file of the client's.
    File(BackingId, View),
    /// In a BAR of the function itself, which the client maps into its guest and shows back.
    Own {
        /// The BAR's file.
        file: BackingId,
        /// Where the map begins in it.
        offset: u64,
        memory: View,
    },
    /// With the client, who has to be asked for it.
    Client(Remote),
}

impl Map {
    /// The last address; sizes are never 0.
    pub(super) fn last(&self) -> u64 {
        self.address + (self.size - 1)
    }

    pub(super) fn contains(&self, address: u64) -> bool {
        (self.address..=self.last()).contains(&address)
    }

    pub(super) fn writable(&self) -> bool {
        self.flags & WRITABLE != 0
    }

    /// The file that the client gave.
    pub(super) fn file(&self) -> Option<BackingId> {
        match &self.backing {
            Backing::File(id, _) => Some(*id),
            Backing::Own { .. } | Backing::Client(_) => None,
        }
    }

    /// What the map shows from `address` on, which is inside.
    pub(super) fn shown(&self, address: u64) -> Mapped {
        match self.file() {
            None => Mapped::NoFd,
            Some(id) => Mapped::File {
                id,
                offset: self.offset + (address - self.address),
                writable: self.writable(),
            },
        }
    }

    /// The file that has the map's memory, whoever gave it, and where the map begins in it.
    pub(super) fn shows(&self) -> Option<(BackingId, u64)> {
        match &self.backing {
            Backing::File(id, _) => Some((*id, self.offset)),
            Backing::Own { file, offset, .. } => Some((*file, *offset)),
            Backing::Client(_) => None,
        }
    }

    /// Whether a request describes this very map.
    pub(super) fn is(&self, request: &DmaMap, id: Option<BackingId>) -> bool {
        (
            self.address,
            self.size,
            self.flags,
            self.offset,
            self.file(),
        ) == (
            request.address,
            request.size,
            request.flags,
            request.offset,
            id,
        )
    }

    /// Whether the map's memory can be reached that way.
    pub(super) fn check(
        &self,
        client: Option<&Client>,
        address: u64,
        len: u64,
        access: DmaAccess,
    ) -> Result<(), DmaError> {
        let unmapped = DmaError::Unmapped { address, len };
        if access.writes() && !self.writable() {
            return Err(DmaError::ReadOnly { address });
        }
        if access.reads() && self.flags & READABLE == 0 {
            return Err(unmapped);
        }
        match &self.backing {
            Backing::File(_, view) | Backing::Own { memory: view, .. } if view.is_lost() => {
                Err(unmapped)
            }
            Backing::File(..) | Backing::Own { .. } => Ok(()),
            Backing::Client(remote) => {
                let able = client.ok_or(unmapped)?.check(remote);
                able.map_err(|_| DmaError::Failed { address })
            }
        }
    }

    /// `len` bytes from `address`, both inside the map; none if the client has to be asked for them.
    pub(super) fn slice(&self, address: u64, len: u64) -> Option<VolatileSlice<'_>> {
        let view = match &self.backing {
            Backing::File(_, view) | Backing::Own { memory: view, .. } => view,
            Backing::Client(_) => return None,
        };
        let offset = usize::try_from(address.checked_sub(self.address)?).ok()?;
        let len = usize::try_from(len).ok()?;
        view.slice(offset, len)
    }

    /// Calls `f` with [`Map::slice`].
    pub(super) fn show(
        &self,
        address: u64,
        len: u64,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), DmaError> {
        let slice = self.slice(address, len);
        f(slice.ok_or(DmaError::Unmapped { address, len })?);
        self.kept(address)
    }

    /// Whether an access at `address`, which has ended, was to the memory, and not to zeros in its place because the file has
    /// no such page any more.
    pub(super) fn kept(&self, address: u64) -> Result<(), DmaError> {
        match &self.backing {
            Backing::File(_, view) | Backing::Own { memory: view, .. } if view.is_lost() => {
                if view.is_news() {
                    self.tell_lost();
                }
                Err(DmaError::Failed { address })
            }
            _ => Ok(()),
        }
    }

    #[cold]
    fn tell_lost(&self) {
        static TOLD: Mutex<Option<Instant>> = Mutex::new(None);
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| told.elapsed() >= QUIET) {
            *told = Some(Instant::now());
            let (first, last) = (self.address, self.last());
            tracing::warn!(
                "the file behind a client's map of {first:#x}..={last:#x} was cut short or has no room; \
                 accesses there fail until it is mapped anew"
            );
        }
    }
}

/// Checks the numbers of a map; its last address.
pub(super) fn check(request: &DmaMap) -> Result<u64, MapError> {
    let DmaMap {
        flags,
        offset,
        address,
        size,
    } = *request;
    if flags == 0 || flags & !(READABLE | WRITABLE) != 0 {
        return Err(MapError::Flags(flags));
    }
    if size == 0 {
        return Err(MapError::Empty { address });
    }
    match (address.checked_add(size - 1), offset.checked_add(size - 1)) {
        (Some(last), Some(_)) => Ok(last),
        _ => Err(MapError::Wraps {
            address,
            size,
            offset,
        }),
    }
}
