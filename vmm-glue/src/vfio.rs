//! HBM for devices that are passed through: memory in a VFIO container, where they reach it by DMA.
//!
//! A [`Container`] is an address space behind the IOMMU. A device joins it with its IOMMU group ([`Container::device`]),
//! and reaches whatever memory the container maps, at the addresses of the container, and nothing else. HBM comes as
//! the file that backs it or as the dax device that a guest has of it ([`Memory::of_file`]), or as a mapping that
//! exists ([`Memory::of_region`]).
//!
//! ```no_run
//! use std::{fs::File, path::Path};
//! use numagpu_vmm_glue::vfio::{Container, Memory};
//!
//! let container = Container::open()?;
//! let device = container.device(Path::new("/sys/bus/pci/devices/0000:01:00.0"))?;
//! let hbm = File::options().read(true).write(true).open("/dev/dax0.0")?;
//! let hbm = Memory::of_file(&hbm, 0, 1 << 30)?;
//! // The first 2 MiB, at an address that fits a device of 28 address bits.
//! let mapped = container.map(0x100_0000, &hbm, 0, 2 << 20)?;
//! device.reset();
//! // Behind this the device does not reach it any more.
//! mapped.unmap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioOps};
use vm_memory::{MmapRegion, VolatileSlice};

use crate::sys::vfio::{Own, Shared};

/// Unit of addresses and sizes.
const PAGE: u64 = 4096;

/// Why memory is not where a device could reach it.
#[derive(Debug, Error)]
pub enum VfioError {
    /// The host has no VFIO for us.
    #[error("no VFIO container: {source}; it needs the module vfio_iommu_type1 and an IOMMU")]
    Container {
        /// What the kernel said.
        source: vfio_ioctls::VfioError,
    },
    /// The device cannot be had.
    #[error("no VFIO device {path}: {source}; all of its IOMMU group has to be bound to vfio-pci")]
    Device {
        /// The device in sysfs.
        path: PathBuf,
        /// What the kernel said.
        source: vfio_ioctls::VfioError,
    },
    /// The file cannot be mapped.
    #[error("cannot map {size:#x} bytes at offset {offset:#x} of the file: {source}")]
    File {
        /// First byte.
        offset: u64,
        /// Bytes.
        size: u64,
        /// The host's error.
        source: io::Error,
    },
    /// An address or a size that no IOMMU can have.
    #[error(
        "{size:#x} bytes at IOVA {iova:#x} from offset {offset:#x} of {have:#x} bytes: all are multiples of {PAGE}, the size is not 0, and nothing goes beyond the memory or 64 bits"
    )]
    Range {
        /// First address.
        iova: u64,
        /// First byte of the memory.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes of the memory.
        have: u64,
    },
    /// The kernel does not map it.
    #[error("cannot map {size:#x} bytes at IOVA {iova:#x}: {source}")]
    Map {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// What the kernel said.
        source: vfio_ioctls::VfioError,
    },
    /// The kernel does not unmap it.
    #[error("cannot unmap {size:#x} bytes at IOVA {iova:#x}: {source}")]
    Unmap {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// What the kernel said.
        source: vfio_ioctls::VfioError,
    },
}

/// Memory that devices can be given.
#[derive(Debug)]
pub struct Memory(Shared);

impl Memory {
    /// `size` bytes of a file from `offset`, both as the file's pages want it: a dax device has pages as large as its
    /// alignment.
    ///
    /// # Errors
    /// [`VfioError::File`].
    pub fn of_file(file: &File, offset: u64, size: u64) -> Result<Arc<Memory>, VfioError> {
        let failed = |source| VfioError::File {
            offset,
            size,
            source,
        };
        let len = usize::try_from(size).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        let own = Own::map(file, offset, len).map_err(failed)?;
        Ok(Arc::new(Memory(Shared::Own(own))))
    }

    /// A mapping that exists, such as that of a guest's memory.
    #[must_use]
    pub fn of_region(region: Arc<MmapRegion>) -> Arc<Memory> {
        Arc::new(Memory(Shared::Region(region)))
    }

    /// All of it, as the CPU reaches it.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        self.0.slice()
    }
}

/// An address space of devices.
#[derive(Clone)]
pub struct Container(Arc<VfioContainer>);

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container").finish_non_exhaustive()
    }
}

impl Container {
    /// A new address space, in which nothing is mapped.
    ///
    /// # Errors
    /// [`VfioError::Container`].
    pub fn open() -> Result<Container, VfioError> {
        let container =
            VfioContainer::new(None).map_err(|source| VfioError::Container { source })?;
        Ok(Container(Arc::new(container)))
    }

    /// Puts a device's group into the address space, and opens the device. `path` is its directory in sysfs; it is bound to
    /// `vfio-pci`. Memory can be mapped while there is a device.
    ///
    /// # Errors
    /// [`VfioError::Device`].
    pub fn device(&self, path: &Path) -> Result<VfioDevice, VfioError> {
        let space: Arc<dyn VfioOps> = Arc::clone(&self.0) as Arc<dyn VfioOps>;
        VfioDevice::new(path, space, false).map_err(|source| VfioError::Device {
            path: path.to_owned(),
            source,
        })
    }

    /// Lets the devices reach `size` bytes of the memory from `offset`, at the addresses from `iova` on.
    ///
    /// # Errors
    /// [`VfioError::Range`] and, for addresses that are taken or that the IOMMU does not have, and for memory that cannot be
    /// pinned, [`VfioError::Map`].
    pub fn map(
        &self,
        iova: u64,
        memory: &Arc<Memory>,
        offset: u64,
        size: u64,
    ) -> Result<DmaMap, VfioError> {
        let all = memory.slice();
        let part = part(&all, iova, offset, size).ok_or(VfioError::Range {
            iova,
            offset,
            size,
            have: all.len() as u64,
        })?;
        Shared::map_dma(&part, &self.0, iova).map_err(|source| VfioError::Map {
            iova,
            size,
            source,
        })?;
        Ok(DmaMap {
            container: Some(Arc::clone(&self.0)),
            _memory: Arc::clone(memory),
            iova,
            size,
        })
    }
}

/// The part of the memory that is to be mapped, if it can be.
fn part<'a>(
    all: &VolatileSlice<'a>,
    iova: u64,
    offset: u64,
    size: u64,
) -> Option<VolatileSlice<'a>> {
    let aligned = [iova, offset, size]
        .iter()
        .all(|it| it.is_multiple_of(PAGE));
    // The last address may be the last of all.
    let last = iova.checked_add(size.checked_sub(1)?)?;
    let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(size).ok()?);
    (aligned && last >= iova)
        .then(|| all.subslice(offset, len).ok())
        .flatten()
}

/// Memory in an address space. It leaves when this is dropped, and stays mapped here as long.
pub struct DmaMap {
    /// Until it is unmapped.
    container: Option<Arc<VfioContainer>>,
    _memory: Arc<Memory>,
    iova: u64,
    size: u64,
}

impl DmaMap {
    /// First address as devices have it.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Takes it out of the address space: when this returns, no device reaches it any more.
    ///
    /// # Errors
    /// [`VfioError::Unmap`].
    pub fn unmap(mut self) -> Result<(), VfioError> {
        self.take_out()
    }

    fn take_out(&mut self) -> Result<(), VfioError> {
        let Some(container) = self.container.take() else {
            return Ok(());
        };
        // It was a `usize` when it was mapped.
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        let unmapped = container.vfio_dma_unmap(self.iova, size);
        unmapped.map_err(|source| VfioError::Unmap {
            iova: self.iova,
            size: self.size,
            source,
        })
    }
}

impl std::fmt::Debug for DmaMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let range = self.iova..self.iova.saturating_add(self.size);
        write!(f, "DmaMap({range:#x?})")
    }
}

impl Drop for DmaMap {
    fn drop(&mut self) {
        // The kernel has unmapped it before if the last device has left.
        if let Err(error) = self.take_out() {
            tracing::debug!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn memory_of_a_file_is_that_file() {
        use std::os::unix::fs::FileExt as _;
        let file = file(3 * PAGE);
        let memory = Memory::of_file(&file, PAGE, 2 * PAGE).unwrap();
        assert_eq!(memory.slice().len() as u64, 2 * PAGE);
        memory.slice().write_obj(0x600d_u32, 8).unwrap();
        let mut seen = [0; 4];
        file.read_exact_at(&mut seen, PAGE + 8).unwrap();
        assert_eq!(u32::from_le_bytes(seen), 0x600d);
    }

    #[test]
    fn a_region_is_not_mapped_a_second_time() {
        let region = Arc::new(MmapRegion::new(8192).unwrap());
        let memory = Memory::of_region(Arc::clone(&region));
        let same = memory.slice().ptr_guard().as_ptr() == region.as_ptr().cast_const();
        assert!(same && memory.slice().len() == 8192);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error_with_its_numbers() {
        let failed = Memory::of_file(&file(PAGE), 1, PAGE).unwrap_err();
        let text = failed.to_string();
        assert!(
            text.starts_with("cannot map 0x1000 bytes at offset 0x1 of the file: "),
            "{text}"
        );
        let failed = Memory::of_file(&file(PAGE), 0, u64::MAX).unwrap_err();
        assert!(matches!(failed, VfioError::File { .. }), "{failed}");
    }

    #[test]
    fn only_whole_pages_inside_the_memory_are_mapped() {
        let memory = Memory::of_file(&file(4 * PAGE), 0, 4 * PAGE).unwrap();
        let all = memory.slice();
        let fits = |iova, offset, size| part(&all, iova, offset, size).is_some();
        assert!(fits(0, 0, 4 * PAGE) && fits(PAGE, 3 * PAGE, PAGE));
        assert!(fits(PAGE.wrapping_neg(), 0, PAGE), "the last page of all");
        for (iova, offset, size) in [
            (0, 0, 0),
            (1, 0, PAGE),
            (0, 8, PAGE),
            (0, 0, PAGE - 1),
            (0, PAGE, 4 * PAGE),
            (0, u64::MAX - PAGE + 1, PAGE),
            (PAGE.wrapping_neg(), 0, 2 * PAGE),
        ] {
            assert!(!fits(iova, offset, size), "{iova:#x} {offset:#x} {size:#x}");
        }
    }
}
