//! HBM in the memory of this process: for tests and for machines without a VMM that maps files.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileMemoryError, VolatileSlice};

use crate::bus::{BackingId, HbmStore};

/// Device number that no file has: the identities of anonymous memory are made up here.
const ANONYMOUS: u64 = u64::MAX;
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Anonymous memory of this process. Pages are taken at first touch.
#[derive(Debug)]
pub struct AnonymousStore {
    region: MmapRegion,
    id: BackingId,
}

impl AnonymousStore {
    /// `size` bytes of zeros.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn new(size: usize) -> Result<AnonymousStore, MmapRegionError> {
        Ok(AnonymousStore {
            region: MmapRegion::new(size)?,
            id: BackingId {
                device: ANONYMOUS,
                inode: NEXT.fetch_add(1, Ordering::Relaxed),
            },
        })
    }
}

impl HbmStore for AnonymousStore {
    fn size(&self) -> u64 {
        self.region.size() as u64
    }

    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        let outside = VolatileMemoryError::OutOfBounds { addr: usize::MAX };
        match (usize::try_from(offset), usize::try_from(len)) {
            (Ok(offset), Ok(len)) => self.region.get_slice(offset, len),
            _ => Err(outside),
        }
    }

    fn backing(&self) -> (BackingId, u64) {
        (self.id, 0)
    }

    /// Writes zeros; anonymous pages cannot be given back without unsafe code.
    fn scrub(&self, offset: u64, len: u64) -> io::Result<()> {
        let all = self.slice(offset, len).map_err(io::Error::other)?;
        let zeros = [0; 4096];
        let mut done = 0;
        while done < all.len() {
            let count = all.write(&zeros, done).map_err(io::Error::other)?;
            done += count.max(1);
        }
        Ok(())
    }
}
