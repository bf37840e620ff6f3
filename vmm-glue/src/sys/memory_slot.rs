//! Memory slots of a KVM virtual machine that own the memory they show.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;

/// A memory slot (`KVM_SET_USER_MEMORY_REGION`). The guest has the memory until this is dropped.
pub struct MemorySlot {
    vm: Arc<VmFd>,
    /// As KVM has it now.
    region: kvm_userspace_memory_region,
    /// What keeps it mapped; none once it was given up.
    memory: Option<Arc<dyn Any + Send + Sync>>,
}

impl MemorySlot {
    /// Shows `memory` at the guest-physical address `base`; for reading only if it is mapped so.
    ///
    /// # Errors
    /// The host's: `EINVAL` for an address that is no multiple of the page size or a number that is too high, `EEXIST`
    /// where another slot is in the way.
    pub fn new<B: Bitmap + Send + Sync + 'static>(
        vm: Arc<VmFd>,
        number: u32,
        base: u64,
        memory: Arc<MmapRegion<B>>,
    ) -> Result<MemorySlot, kvm_ioctls::Error> {
        let read_only = memory.prot() & libc::PROT_WRITE == 0;
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: base,
            memory_size: memory.size() as u64,
            userspace_addr: memory.as_ptr() as u64,
        };
        // SAFETY: the range is that of a live mapping, which nothing unmaps before its last `Arc` is dropped. The
        // `Arc` in this value is dropped only after the slot is gone (`Drop`), or never. This process reaches the memory
        // by volatile accesses alone, so the guest may change it at any time.
        unsafe { vm.set_user_memory_region(region) }?;
        Ok(MemorySlot {
            vm,
            region,
            memory: Some(memory),
        })
    }

    /// Whether KVM logs the pages that the guest's processors write, from now on (`KVM_GET_DIRTY_LOG`).
    ///
    /// # Errors
    /// The host's; it logs as before then.
    pub fn log_writes(&mut self, on: bool) -> Result<(), kvm_ioctls::Error> {
        let mut region = self.region;
        region.flags &= !KVM_MEM_LOG_DIRTY_PAGES;
        if on {
            region.flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        // SAFETY: number, address and memory are those of `new`, and the memory is in this value still.
        unsafe { self.vm.set_user_memory_region(region) }?;
        self.region = region;
        Ok(())
    }

    /// Number of the slot.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.region.slot
    }

    /// First guest-physical address.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.region.guest_phys_addr
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.region.memory_size
    }
}

impl fmt::Debug for MemorySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, base, size) = (self.number(), self.base(), self.size());
        write!(f, "slot {number}: {base:#x}..+{size:#x}")
    }
}

impl Drop for MemorySlot {
    fn drop(&mut self) {
        let gone = kvm_userspace_memory_region {
            slot: self.number(),
            guest_phys_addr: self.base(),
            ..kvm_userspace_memory_region::default()
        };
        // SAFETY: a size of 0 removes the slot; no memory is named.
        let removed = unsafe { self.vm.set_user_memory_region(gone) };
        if let Err(error) = removed {
            // The guest may still have it: then it stays mapped for good.
            tracing::error!(%error, slot = self.number(), "memory slot not removed, its memory is kept");
            std::mem::forget(self.memory.take());
        }
    }
}
