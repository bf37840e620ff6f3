//! Machine description in, plan out.
//!
//! A *machine description* (TOML) says which CPU nodes, GPUs, links and distances a machine has. [`plan()`] turns it
//! into a [`Plan`]: the guest's memory map, its proximity domains, its PCI functions, and what Linux will make of
//! them. Everything else is a function of the plan: E820 entries, command lines, JSON, pictures,
//! and the list of facts that a booted guest is held against.
//!
//! ```
//! let source = numagpu_topology::preset::find("two-gpu").unwrap().source;
//! let machine = numagpu_topology::parse("two-gpu", source)?;
//! let plan = numagpu_topology::plan(&machine)?;
//! assert_eq!(plan.gpus.len(), 2);
//! // The second GPU's HBM starts a 2 GiB gap after the first one's end, so that firmware cannot merge the two.
//! let (first, second) = (&plan.gpus[0].hbm[0], &plan.gpus[1].hbm[0]);
//! assert_eq!(second.base - (first.base + first.size), 2 << 30);
//! # Ok::<(), numagpu_topology::MachineError>(())
//! ```
//!
//! | module | what it is for |
//! |---|---|
//! | [`machine`] | the description, as parsed |
//! | [`schema`] | the description's JSON Schema |
//! | [`ranges`] | a range allocator that knows no policy |
//! | [`mod@plan`] | the plan, and the policy that makes it |
//! | [`platform`] | where QEMU's q35 machine puts RAM and device memory |
//! | [`linux`] | what Linux makes of the tables: node numbers, access classes, command line |
//! | [`qom`] | the order in which QEMU walks its objects |
//! | [`render`] | outputs for people and programs |
//! | [`qemu`] | QEMU command lines |
//! | [`cloud_hypervisor`] | Cloud Hypervisor command lines |
//! | [`acpi`], [`memory_map`] | ACPI tables and memory maps as bytes, for other VMMs |
//! | [`mod@predict`] | what Linux will make of the plan on each way of booting it |
//! | [`preset`] | machines that come with the crate |
//! | [`seen`], [`verify`] | what a guest reports, and how it compares |
//!
//! The crate is pure: no I/O, no clock, no randomness; the same input gives the same bytes.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod cloud_hypervisor;
pub mod device;
mod error;
pub mod linux;
pub mod machine;
pub mod memory_map;
mod parse;
pub mod plan;
pub mod platform;
pub mod predict;
pub mod preset;
pub mod qemu;
pub mod qom;
pub mod ranges;
pub mod render;
mod scale;
pub mod schema;
pub mod seen;
pub mod size;
mod validate;
pub mod verify;

pub use error::MachineError;
pub use machine::Machine;
pub use parse::{offset_of, parse, read};
pub use plan::{Plan, plan};
pub use predict::{Prediction, predict};

/// E820 type of memory that the page allocator may use (ACPI 6.5, table 15.4).
pub const E820_RAM: u32 = 1;
/// E820 type of memory that nobody may use.
pub const E820_RESERVED: u32 = 2;
/// E820 type that Linux uses for EFI Specific Purpose Memory (`arch/x86/include/asm/e820/types.h`).
pub const E820_SOFT_RESERVED: u32 = 0xefff_ffff;
