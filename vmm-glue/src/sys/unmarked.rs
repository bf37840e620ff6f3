//! Guest memory without the bitmap of what is written to it.
#![allow(unsafe_code)]

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The same memory for one that knows of no bitmap. What is written through it is marked nowhere: that is left to whoever
/// lends it.
#[must_use]
pub fn unmarked<'m, B: BitmapSlice>(slice: &VolatileSlice<'m, B>) -> VolatileSlice<'m> {
    let start = slice.ptr_guard_mut();
    // SAFETY: it is the memory of `slice`, which is mapped and reached by volatile accesses alone for `'m`, whoever holds
    // the slice. The pointer is good longer than the guard: guards map something only with vm-memory's feature `xen`,
    // with which this crate does not build.
    unsafe { VolatileSlice::new(start.as_ptr(), slice.len()) }
}
