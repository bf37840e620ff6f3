//! The HBM aperture: a BAR through which CPUs reach the HBM of a GPU whose HBM is no memory of the machine.
//!
//! Partitions lie in it one behind the other from its start. A client that can map files maps them from the one file
//! behind them; accesses of one that cannot, and accesses behind the last partition, come here.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use numagpu_spec::pci;
use thiserror::Error;
use vm_memory::{Bytes, VolatileSlice};

use crate::bus::{Area, Bar, DmaAccess};
use crate::config::PartitionConfig;
use crate::partition::Partition;

/// Smallest aperture, and what an area that can be mapped is a multiple of, in bytes.
pub const PAGE: u64 = 4096;

/// The aperture of a GPU whose HBM is reached through a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApertureConfig {
    /// Bytes of the BAR: a power of two of at least 4096 that all partitions fit into.
    pub size: u64,
    /// Whether CPUs cache what they reach through it, as on Grace; a discrete GPU's is not.
    pub coherent: bool,
}

/// Why a GPU cannot have an aperture.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ApertureError {
    /// No size of a BAR.
    #[error("an aperture of {size:#x} bytes: a power of two of at least {PAGE:#x} is possible")]
    Size {
        /// Bytes of the aperture.
        size: u64,
    },
    /// Nothing to reach.
    #[error("an aperture of {size:#x} bytes, but no partition to reach through it")]
    Empty {
        /// Bytes of the aperture.
        size: u64,
    },
    /// A partition that does not follow the one before it.
    #[error(
        "partition {index} is at {base:#x}; in an aperture it follows the one before it, at {want:#x}"
    )]
    Gap {
        /// Partition.
        index: usize,
        /// Its first address.
        base: u64,
        /// Where it has to be.
        want: u64,
    },
    /// Partitions beyond the end.
    #[error("partitions of {hbm:#x} bytes do not fit an aperture of {size:#x}")]
    Short {
        /// Bytes of all partitions.
        hbm: u64,
        /// Bytes of the aperture.
        size: u64,
    },
    /// A partition whose memory is not where the aperture shows it.
    #[error(
        "partition {index} has to be at offset {want:#x} of the file of all partitions; it is at {offset:#x}, or in another file"
    )]
    File {
        /// Partition.
        index: usize,
        /// Where its memory starts in its file.
        offset: u64,
        /// Where it has to start.
        want: u64,
    },
}

impl ApertureConfig {
    /// Checks that the partitions, each of them sound in itself, lie in the aperture as they should.
    pub(crate) fn check(&self, partitions: &[PartitionConfig]) -> Result<(), ApertureError> {
        let size = self.size;
        if !size.is_power_of_two() || size < PAGE {
            return Err(ApertureError::Size { size });
        }
        let first = partitions.first().ok_or(ApertureError::Empty { size })?;
        let has_file = first.store.file().is_some();
        let (file, _) = first.store.backing();
        let mut hbm = 0_u64;
        for (index, partition) in partitions.iter().enumerate() {
            let (base, want) = (partition.base, first.base.saturating_add(hbm));
            if base != want {
                return Err(ApertureError::Gap { index, base, want });
            }
            let (own, offset) = partition.store.backing();
            if has_file && (own, offset) != (file, hbm) {
                let want = hbm;
                return Err(ApertureError::File {
                    index,
                    offset,
                    want,
                });
            }
            // Each ends below 2^64, and so do all in a row.
            hbm = hbm.saturating_add(partition.size);
        }
        if hbm > size {
            return Err(ApertureError::Short { hbm, size });
        }
        Ok(())
    }

    /// The BAR, for partitions that passed the check.
    pub(crate) fn bar(&self, partitions: &[PartitionConfig]) -> Bar {
        let has_file = partitions
            .first()
            .is_some_and(|first| first.store.file().is_some());
        let all = Area {
            offset: 0,
            size: partitions.iter().map(|partition| partition.size).sum(),
        };
        Bar {
            index: pci::BAR_APERTURE,
            size: self.size,
            is_64bit: true,
            prefetchable: true,
            mappable: if has_file { vec![all] } else { Vec::new() },
        }
    }
}

/// The HBM behind the aperture's BAR.
pub(crate) struct Aperture {
    /// One behind the other from offset 0.
    partitions: Vec<Arc<Partition>>,
}

impl Aperture {
    /// The aperture to partitions that passed the check.
    pub(crate) fn new(partitions: &[Arc<Partition>]) -> Aperture {
        Aperture {
            partitions: partitions.to_vec(),
        }
    }

    /// The file that shows all of it.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.partitions.first()?.file()
    }

    /// Reads; what is behind the last partition is all ones.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let len = data.len();
        self.pieces(offset, len, DmaAccess::Read, &mut |at, memory| {
            let place = data.get_mut(at..).and_then(|to| to.get_mut(..memory.len()));
            // Both are as long: there is nothing that could fail.
            let _done = place.map(|to| memory.read_slice(to, 0));
        });
    }

    /// Writes; what is behind the last partition is dropped.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let len = data.len();
        self.pieces(offset, len, DmaAccess::Write, &mut |at, memory| {
            let piece = data.get(at..).and_then(|from| from.get(..memory.len()));
            let _done = piece.map(|from| memory.write_slice(from, 0));
        });
    }

    /// Calls `f` with each piece of HBM in `len` bytes from `offset`, and its distance from `offset`.
    fn pieces(
        &self,
        offset: u64,
        len: usize,
        access: DmaAccess,
        f: &mut dyn FnMut(usize, VolatileSlice<'_>),
    ) {
        let end = offset.saturating_add(len as u64);
        let mut start = 0_u64;
        for partition in &self.partitions {
            let next = start.saturating_add(partition.size());
            let (from, to) = (offset.max(start), end.min(next));
            if from < to
                && let Ok(at) = usize::try_from(from - offset)
            {
                let mut found = |memory: VolatileSlice<'_>| f(at, memory);
                // Inside the partition, so there is nothing that could fail.
                let _done = partition.touch(from - start, to - from, access, None, &mut found);
            }
            start = next;
        }
    }
}
