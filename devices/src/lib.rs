//! The GPU of numagpu: a PCI function whose HBM is coherent memory of the guest, or is reached through a BAR.
//!
//! A transport serves [`gpu::Gpu`] through the seam of [`bus`]; the GPU knows no transport. Whoever models a
//! GPU of their own takes the same parts.
//!
//! | part | what it does |
//! |---|---|
//! | [`bus`] | the seam: PCI function, guest memory, interrupts, HBM memory |
//! | [`config`], [`gpu`] | what a GPU is made of, and the function itself |
//! | [`config_space`], [`registers`] | checked tables for configuration space and BARs; any access becomes whole registers |
//! | [`boot`], [`clock`], [`irq`] | handshake, time, interrupt causes |
//! | [`ownership`], [`partition`], [`coherence`], [`scrub`] | who owns HBM, who may touch it now, whether the VMM really maps it |
//! | [`queue`], `worker`, `patience`, `ring`, [`packet`], [`engine`], `span`, [`atomic`] | doorbells and states; workers; how long they wait awake; reading ahead; decoding; moving bytes; where they are; atomic operations |
//! | [`aperture`] | the BAR through which CPUs reach HBM that is no memory of the machine |
//! | [`priority`], [`timing`] | which queue goes first; modelled and paced time |
//! | [`fabric`], [`link`], `route` | peers of a hive, the links to them, the ways over several |
//! | [`health`], [`inject`] | memory errors and retired pages; faults on demand |
//! | [`kit`] | a PCI function of one's own out of a register table and one trait |
//! | [`state`] | all of a GPU but its memory, to save and to restore |
//! | `modes` | how HBM can be divided into partitions |
//! | [`memory`] | HBM in the memory of this process |
//!
//! Rules that hold everywhere: nothing that a guest or a client sends makes the crate panic; register accesses
//! wait for no copy; engines touch only what the queue's token owns at that moment; after a reset or a detach no
//! worker touches memory.
//!
//! Not implemented: an expansion ROM.

#![forbid(unsafe_code)]

pub use numagpu_spec as spec;

pub mod aperture;
pub mod atomic;
pub mod boot;
pub mod bus;
pub mod clock;
pub mod coherence;
pub mod config;
pub mod config_space;
mod doorbells;
pub mod engine;
pub mod fabric;
pub mod gpu;
pub mod health;
pub mod inject;
pub mod irq;
pub mod kit;
pub mod limit;
pub mod link;
pub mod memory;
mod modes;
mod on_demand;
pub mod ownership;
pub mod packet;
pub mod partition;
pub mod patience;
pub mod priority;
pub mod queue;
pub mod registers;
mod ring;
mod route;
pub mod scrub;
mod span;
pub mod state;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;
#[cfg(test)]
mod tests;
mod ticker;
pub mod timing;
mod worker;

pub use aperture::ApertureConfig;
pub use config::{GpuConfig, GpuError, LinkConfig, PartitionConfig, PciIds};
pub use fabric::Fabric;
pub use gpu::{Gpu, GpuStatus};
