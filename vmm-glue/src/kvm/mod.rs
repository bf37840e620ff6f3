//! KVM, for a VMM of one's own that runs the devices in its process (rust-vmm: `kvm-ioctls`, `vm-memory`).
//!
//! | part | what it does |
//! |---|---|
//! | [`hbm_region`], [`tracked_hbm_region`], [`MemorySlots`] | HBM as guest memory, at its planned address, in memory slots |
//! | [`GuestDma`] | the devices' way to guest memory, whose bitmap it marks if there is one |
//! | [`MsiRoutes`], [`MsiLine`] | messages as interrupts: eventfd, irqfd, GSI routing |
//! | [`Msix`] | the MSI-X table with its masks and pending bits |
//! | [`Endpoint`] | a function for a VMM with a PCI bus of its own |
//! | [`HostBridge`] | a PCI bus for a VMM that has none: configuration space and BARs by exits |
//! | [`Doorbells`] | doorbells that ring without an exit to this process (ioeventfd) |
//!
//! `examples/kvm.rs` puts them together.

mod bridge;
mod dma;
mod doorbells;
mod endpoint;
mod msi;
mod msix;
mod ports;
mod slots;

pub use bridge::{Bdf, BridgeError, ECAM_BUS, HostBridge, Windows};
pub use dma::GuestDma;
pub use doorbells::Doorbells;
pub use endpoint::{Decoded, Endpoint};
pub use msi::{Message, MessageLine, MsiError, MsiLine, MsiRoutes};
pub use msix::{Msix, MsixCapability};
pub use ports::{CONFIG_ADDRESS, CONFIG_DATA};
pub use slots::{MemorySlots, SlotError, hbm_region, tracked_hbm_region};
