//! The only room with `unsafe`: what the host offers and no safe wrapper covers.

pub mod child;
pub mod event;
pub mod guarded;
pub mod inherited;
pub mod memory_slot;
pub mod unmarked;
pub mod vfio;
