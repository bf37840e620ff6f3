//! Memory that devices reach by DMA through an IOMMU.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vfio_ioctls::{VfioContainer, VfioError};
use vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

/// Memory that is accessed only by volatile and atomic means, so that a device may change it at any time.
#[derive(Debug)]
pub enum Shared {
    /// A mapping that others have too.
    Region(Arc<MmapRegion>),
    /// A mapping of our own.
    Own(Own),
}

/// A shared mapping of a file, character devices included, which vm-memory refuses because they have no length.
#[derive(Debug)]
pub struct Own {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned, belongs to no thread, and is reached through volatile slices only.
unsafe impl Send for Own {}
// SAFETY: as above; volatile accesses from several threads at once are what such memory is for.
unsafe impl Sync for Own {}

impl Own {
    /// Maps `len` bytes of a file from `offset`, to read and to write.
    ///
    /// # Errors
    /// The host's.
    pub fn map(file: &File, offset: u64, len: usize) -> io::Result<Own> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let null = std::ptr::null_mut();
        // SAFETY: a fresh mapping at an address that the kernel chooses aliases nothing.
        let base = unsafe { mmap(null, len, prot, MapFlags::SHARED, file.as_fd(), offset)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Own { base, len })
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: `map` made this very mapping, and slices of it cannot outlive `self`. A failure leaks it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl Shared {
    /// All of it.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        match self {
            Shared::Region(region) => region.as_volatile_slice(),
            // SAFETY: the memory stays mapped as long as `self`, and nothing but volatile slices leads to it.
            Shared::Own(own) => unsafe { VolatileSlice::new(own.base.as_ptr(), own.len) },
        }
    }

    /// Lets the devices of a container reach the part of it that `part` is, at an address of theirs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map_dma(
        part: &VolatileSlice<'_>,
        container: &VfioContainer,
        iova: u64,
    ) -> Result<(), VfioError> {
        let start = part.ptr_guard_mut();
        // SAFETY: a volatile slice is memory that others may change at any time, and no Rust reference to it exists.
        // The kernel pins its pages until they are unmapped, so devices never reach memory of somebody else.
        unsafe { container.vfio_dma_map(iova, part.len(), start.as_ptr()) }
    }
}
