//! Guest memory in memory slots of a virtual machine.

use std::fmt::Debug;
use std::sync::Arc;

use kvm_ioctls::{Cap, VmFd};
use thiserror::Error;
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{Address as _, GuestAddress, GuestMemoryRegion as _, GuestRegionMmap};

use crate::hbm::{HbmBacking, HbmError};
use crate::sys::memory_slot::MemorySlot;

/// Bytes that addresses and sizes of slots are multiples of.
const PAGE: u64 = 4096;

/// Why the guest does not get the memory.
#[derive(Debug, Error)]
pub enum SlotError {
    /// More slots than the host has.
    #[error("{wanted} memory slot(s) from number {first} on: the host has {have}")]
    TooMany {
        /// Number of the first one.
        first: u32,
        /// How many.
        wanted: usize,
        /// `KVM_CAP_NR_MEMSLOTS`.
        have: usize,
    },
    /// Not whole pages.
    #[error("memory at {base:#x}..+{size:#x}: a slot is whole pages of {PAGE} bytes")]
    Pages {
        /// First guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// Past the last address.
    #[error("memory at {base:#x}..+{size:#x} goes past the last address")]
    Wraps {
        /// First guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The host does not map it a second time.
    #[error(transparent)]
    Map(#[from] HbmError),
    /// The host refused.
    #[error("memory slot {slot} at {base:#x}..+{size:#x}: {source}")]
    Host {
        /// Number of the slot.
        slot: u32,
        /// First guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
        /// The host's error.
        source: kvm_ioctls::Error,
    },
}

/// HBM as a region of guest memory, from guest-physical address `base` on. It shares the backing's mapping: what
/// either writes, both read.
///
/// # Errors
/// [`SlotError::Wraps`] if it does not fit below the last address.
pub fn hbm_region(base: u64, hbm: &HbmBacking) -> Result<GuestRegionMmap, SlotError> {
    let mapping = hbm.mapping();
    let size = mapping.size() as u64;
    GuestRegionMmap::with_arc(mapping, GuestAddress(base)).ok_or(SlotError::Wraps { base, size })
}

/// HBM as a region of guest memory with a bitmap of what is written to it ([`super::GuestDma`]), for a VMM that migrates. The
/// region is a mapping of its own of the same memory, which stays until `hbm` is dropped too.
///
/// # Errors
/// [`SlotError::Map`], and as [`hbm_region`].
pub fn tracked_hbm_region<B>(base: u64, hbm: &HbmBacking) -> Result<GuestRegionMmap<B>, SlotError>
where
    B: NewBitmap + Debug + Send + Sync + 'static,
{
    let mapping = hbm.map_tracked()?;
    let size = mapping.size() as u64;
    GuestRegionMmap::with_arc(mapping, GuestAddress(base)).ok_or(SlotError::Wraps { base, size })
}

/// Slots that show regions of guest memory, which they keep mapped. Dropping it takes the memory from the guest.
#[derive(Debug)]
pub struct MemorySlots {
    slots: Vec<MemorySlot>,
}

impl MemorySlots {
    /// Shows `regions` to the guest, each in a slot of its own, from number `first` on.
    ///
    /// # Errors
    /// [`SlotError`]; the guest then has none of them.
    pub fn attach<'r, B: Bitmap + Send + Sync + 'static>(
        vm: &Arc<VmFd>,
        first: u32,
        regions: impl IntoIterator<Item = &'r GuestRegionMmap<B>>,
    ) -> Result<MemorySlots, SlotError> {
        let regions: Vec<_> = regions.into_iter().collect();
        let have = usize::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        let end = usize::try_from(first).map(|first| first.saturating_add(regions.len()));
        if end.is_err() || end.is_ok_and(|end| end > have) {
            return Err(SlotError::TooMany {
                first,
                wanted: regions.len(),
                have,
            });
        }
        let slots = (first..).zip(regions).map(|(slot, region)| {
            let (base, size) = (region.start_addr().raw_value(), region.len());
            if !base.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
                return Err(SlotError::Pages { base, size });
            }
            let made = MemorySlot::new(Arc::clone(vm), slot, base, region.get_mmap());
            made.map_err(|source| SlotError::Host {
                slot,
                base,
                size,
                source,
            })
        });
        let slots = slots.collect::<Result<_, _>>()?;
        Ok(MemorySlots { slots })
    }

    /// Takes the memory from the guest. The guest's processors see no memory there any more when this returns.
    pub fn detach(self) {
        drop(self);
    }

    /// Whether KVM logs the pages that the guest's processors write, from now on: `VmFd::get_dirty_log` has them, by the
    /// slots' numbers and sizes. What devices write is not in it ([`super::GuestDma`]).
    ///
    /// # Errors
    /// [`SlotError::Host`]; the slots before that one are changed.
    pub fn log_writes(&mut self, on: bool) -> Result<(), SlotError> {
        self.slots.iter_mut().try_for_each(|slot| {
            slot.log_writes(on).map_err(|source| SlotError::Host {
                slot: slot.number(),
                base: slot.base(),
                size: slot.size(),
                source,
            })
        })
    }

    /// The slots, in order of their numbers.
    #[must_use]
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    /// The first number behind them.
    #[must_use]
    pub fn next_free(&self) -> Option<u32> {
        self.slots.last()?.number().checked_add(1)
    }
}
